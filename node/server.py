"""The daemon's gRPC server: Cni for the plugin binary, Inspect for the command line."""

from __future__ import annotations

import contextlib
import os
import re
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
from node import describe
from node.syncer import SyncConfig, Syncer
from proxy.frontends import Frontend, owner_of
from proxy.model import ObjectName
from proxy.nftables.dataplane import Dataplane

WORKERS = 16
MESSAGE_BYTES = 64 << 20
GRACE_SECONDS = 5.0
NAME = re.compile(r"[a-z0-9.-]+/[a-z0-9-]+")
"""Objects named in a sentence."""


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
    """Tell what the daemon knows; change nothing."""

    def __init__(
        self,
        config: SyncConfig,
        ledger: Ledger,
        syncer: Syncer,
        report: Report,
    ) -> None:
        self._config = config
        self._ledger = ledger
        self._syncer = syncer
        self._ready, self._problems, self._source = report

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
        problems = [(set(NAME.findall(sentence)), sentence) for sentence in self._problems()]
        for message in found:
            message.problems.extend(sentence for names, sentence in problems if message.name in names)
        return pb.ServicesReply(services=found)

    def Routes(self, request: pb.RoutesRequest, context: object) -> pb.RoutesReply:
        """List the routes to the pods of other nodes."""
        routes = self._syncer.status.routes
        return pb.RoutesReply(
            routes=(
                pb.Route(destination=r.route.destination, via=r.route.gateway or "", node=r.node)
                for r in routes
            )
        )

    def Health(self, request: pb.HealthRequest, context: object) -> pb.HealthReply:
        """Tell whether the node works, and what is wrong."""
        status = self._syncer.status
        return pb.HealthReply(
            version=version("podwire"),
            node=self._config.node,
            mode=self._config.mode.value,
            dataplane=Dataplane.name,
            pod_cidrs=status.pod_cidrs,
            ready=self._ready() and status.ready,
            last_sync=status.last_sync,
            services=status.services,
            frontends=len(self._syncer.frontends),
            elements=self._syncer.elements,
            problems=self._problems(),
            source=self._source(),
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
