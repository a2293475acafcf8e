"""The daemon's gRPC server: Cni for the plugin binary, Inspect for the command line."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import grpc

from api import podwire_pb2 as pb
from api import podwire_pb2_grpc as rpc
from cni.plugin import Plugin
from ipam.ledger import Ledger
from netlink.errors import NetlinkError
from netlink.family import with_port
from netlink.wireguard import Known
from node import describe
from node.backends.wireguard import NAMES
from node.l7_stats import L7Stats
from node.syncer import SyncConfig, Syncer
from proxy.frontends import Frontend, owner_of
from proxy.model import ObjectName

WORKERS = 16
MESSAGE_BYTES = 64 << 20
GRACE_SECONDS = 5.0


class Report(NamedTuple):
    """What the daemon says of itself: whether it works, what is wrong, and where objects come from."""

    ready: Callable[[], bool]
    problems: Callable[[], tuple[str, ...]]
    source: Callable[[], str]


class CniService(rpc.CniServicer):
    """Every call is one execution of the plugin; the request says which command it is."""

    def __init__(self, plugin: Plugin) -> None:
        self._plugin = plugin

    def Attach(self, request: pb.CniRequest, context: object) -> pb.CniReply:
        """Handle CNI_COMMAND=ADD."""
        return self._handle(request)

    def Detach(self, request: pb.CniRequest, context: object) -> pb.CniReply:
        """Handle CNI_COMMAND=DEL."""
        return self._handle(request)

    def Check(self, request: pb.CniRequest, context: object) -> pb.CniReply:
        """Handle CNI_COMMAND=CHECK."""
        return self._handle(request)

    def Gc(self, request: pb.CniRequest, context: object) -> pb.CniReply:
        """Handle CNI_COMMAND=GC."""
        return self._handle(request)

    def Status(self, request: pb.CniRequest, context: object) -> pb.CniReply:
        """Handle CNI_COMMAND=STATUS."""
        return self._handle(request)

    def _handle(self, request: pb.CniRequest) -> pb.CniReply:
        values = {
            "CNI_COMMAND": request.command,
            "CNI_CONTAINERID": request.container_id,
            "CNI_NETNS": request.netns,
            "CNI_IFNAME": request.ifname,
            "CNI_ARGS": request.args,
            "CNI_PATH": request.path,
            "PODWIRE_REQUEST_ID": request.request_id,
        }
        code, stdout = self._plugin.handle({k: v for k, v in values.items() if v}, request.config)
        return pb.CniReply(exit_code=code, stdout=stdout)


class InspectService(rpc.InspectServicer):
    """Tell what the daemon knows; change nothing, but for WireGuard's keys."""

    def __init__(
        self,
        config: SyncConfig,
        ledger: Ledger,
        syncer: Syncer,
        report: Report,
        l7: L7Stats | None = None,
    ) -> None:
        self._config = config
        self._ledger = ledger
        self._syncer = syncer
        self._ready, self._problems, self._source = report
        self._l7 = l7

    def Pods(self, request: pb.PodsRequest, context: object) -> pb.PodsReply:
        """List the attachments in the ledger."""
        pods = (
            pb.Pod(
                container_id=a.key.container_id,
                ifname=a.key.ifname,
                netns=a.netns,
                host_ifname=a.host_ifname,
                addresses=map(str, a.addresses),
                state=a.state,
                created=a.created,
            )
            for a in self._ledger.attachments()
        )
        return pb.PodsReply(pods=pods)

    def Frontends(self, request: pb.FrontendsRequest, context: object) -> pb.FrontendsReply:
        """List what packets can be addressed to, as it is in the kernel."""
        wanted = request.service
        found = (f for f in self._syncer.frontends if not wanted or str(owner_of(f.service)) == wanted)
        return pb.FrontendsReply(frontends=map(describe.frontend, found))

    def Services(self, request: pb.ServicesRequest, context: grpc.ServicerContext) -> pb.ServicesReply:
        """List services in short, or one with all about it: frontends, endpoints, connections."""
        snapshot, place = self._syncer.snapshot, self._syncer.place
        own: dict[ObjectName, list[Frontend]] = {}
        for frontend in self._syncer.frontends:
            own.setdefault(owner_of(frontend.service), []).append(frontend)
        found = []
        for name, service in sorted(snapshot.services.items()):
            slices, mine = snapshot.slices.get(name, ()), own.get(name, [])
            if not request.service:
                found.append(describe.summary(service, slices, mine))
            elif request.service == str(name):
                found.append(describe.details(service, slices, mine, place))
        problems = [(set(describe.NAME.findall(sentence)), sentence) for sentence in self._problems()]
        for message in found:
            message.problems.extend(sentence for names, sentence in problems if message.name in names)
        return pb.ServicesReply(services=found)

    def Routes(self, request: pb.RoutesRequest, context: object) -> pb.RoutesReply:
        """List the routes to the pods of other nodes."""
        names = self._syncer.interfaces
        return pb.RoutesReply(
            routes=(
                pb.Route(
                    destination=hop.cidr,
                    via=hop.route.gateway or "",
                    node=hop.node,
                    backend=hop.backend,
                    device=names.get(hop.route.oif or 0, ""),
                    mtu=hop.route.mtu,
                    peer=hop.peer,
                )
                for hop in self._syncer.hops
            )
        )

    def Health(self, request: pb.HealthRequest, context: object) -> pb.HealthReply:
        """Tell whether the node works, and what is wrong."""
        status = self._syncer.status
        return pb.HealthReply(
            version=version("podwire"),
            node=self._config.node,
            mode=self._config.mode.value,
            dataplane=self._syncer.dataplane,
            pod_cidrs=status.pod_cidrs,
            ready=self._ready() and status.ready,
            last_sync=status.last_sync,
            services=status.services,
            frontends=len(self._syncer.frontends),
            elements=self._syncer.elements,
            problems=self._problems(),
            source=self._source(),
            backend=self._syncer.config.backend,
            pod_mtu=status.pod_mtu,
            vxlan_port=self._syncer.config.tunnel.port,
            vxlan_id=self._syncer.config.tunnel.vni,
            wireguard_port=self._syncer.config.tunnel.wireguard_port,
            l7=describe.in_short(self._l7.view) if self._l7 else "",
        )

    def L7(self, request: pb.L7Request, context: object) -> pb.L7Reply:
        """Tell what the L7 proxy does for the services that ask for it, and for which it does nothing."""
        services: list[pb.L7Service] = []
        reply = pb.L7Reply()
        if self._l7:
            view, seen = self._l7.view, self._l7.seen()
            services += map(describe.proxied, seen)
            reply = pb.L7Reply(
                running=view.up, reloads=view.reloads, restarts=view.restarts, problems=view.problems
            )
        services += filter(None, map(describe.refused, self._problems()))
        services = [s for s in services if request.service in ("", s.service.partition(":")[0])]
        if not request.configuration:
            reply.services.extend(services)
        elif self._l7:
            text = self._l7.view.configuration()
            names = {s.backend for s in services}
            reply.configuration = describe.sections(text, names) if request.service else text
        return reply

    def Wireguard(self, request: pb.WireguardRequest, context: grpc.ServicerContext) -> pb.WireguardReply:
        """Tell of WireGuard's keys and peers, as the devices have them at this moment."""
        wireguard = self._syncer.wireguard
        if not wireguard.used:
            return pb.WireguardReply()
        problems, peers = list(wireguard.problems), []
        try:
            used = {(hop.node, hop.tunnel) for hop in self._syncer.hops}
            for name, known in zip(NAMES, self._syncer.wireguard_peers(), strict=True):
                peers += [(node, name, one, (node, name) in used) for node, one in known.items()]
        except NetlinkError as error:
            problems.append(f"WireGuard: {error}")
        return pb.WireguardReply(
            used=True,
            keys=[key for _, key in sorted(wireguard.keys.public.items())],
            step=wireguard.rotation.step.value,
            rotated=wireguard.rotation.finished,
            problems=problems,
            peers=(_peer(*peer) for peer in sorted(peers)),
        )

    def RotateWireguard(self, request: pb.RotateWireguardRequest, context: object) -> pb.RotateWireguardReply:
        """Have WireGuard's keys of this node changed."""
        return pb.RotateWireguardReply(refused=self._syncer.wireguard.ask())


def _peer(node: str, device: str, known: Known, route: bool) -> pb.WireguardPeer:
    peer = known.peer
    return pb.WireguardPeer(
        node=node,
        device=device,
        key=peer.key,
        endpoint=with_port(*peer.endpoint) if peer.endpoint else "",
        handshake=known.handshake,
        received=known.received,
        sent=known.sent,
        allowed=sorted(peer.allowed),
        route=route,
    )


@contextlib.contextmanager
def serving(socket: Path, cni: CniService, inspect: InspectService) -> Iterator[None]:
    """Serve on a unix socket that only root can use; on leaving, calls in progress are finished."""
    socket.parent.mkdir(parents=True, exist_ok=True)
    size = [
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        ("grpc.max_send_message_length", MESSAGE_BYTES),
    ]
    server = grpc.server(ThreadPoolExecutor(WORKERS, thread_name_prefix="grpc"), options=size)
    rpc.add_CniServicer_to_server(cni, server)  # type: ignore[no-untyped-call]
    rpc.add_InspectServicer_to_server(inspect, server)  # type: ignore[no-untyped-call]
    before = os.umask(0o177)  # nobody else may connect, not even before a chmod
    try:
        if not server.add_insecure_port(f"unix:{socket}"):
            raise OSError(f"cannot listen on {socket}")
    finally:
        os.umask(before)
    server.start()
    try:
        yield
    finally:
        server.stop(GRACE_SECONDS).wait()
