"""What a machine of a lab has that the image has not: its name, its network, its keys. Pure: a plan → files.

    .link       which name an interface has, by its MAC: eth0 and mgmt0, on the router the hosts' names
    .network    its addresses and routes; `mgmt0` is for ssh from outside, and leads nowhere
    .netdev     the router's bridges, one for each segment

systemd-networkd reads these at every boot, so that a machine that boots again is in the network again.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from ipaddress import ip_address, ip_interface

from lab.network import node_object, to_balancers, to_pods
from lab.state import ON_NODES, Json
from lab.topology import ANYWHERE, Host, Node, Topology

MANAGEMENT = "10.0.2.15/24"
"""QEMU's user network: the machine's end of it."""

NETWORKD = "etc/systemd/network"
PATIENCE = "[Service]\nTimeoutStartSec=15min\nWatchdogSec=10min\n"
UNIT = "etc/systemd/system/multi-user.target.wants/podwire.service"


def mac(machine: str, port: str) -> str:
    """Return the MAC of a machine's interface: the same at every boot."""
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in sha256(f"{machine}/{port}".encode()).digest()[:3])


def ports(plan: Topology, machine: str) -> list[str]:
    """Return the names of a machine's cables: eth0, or on the router one for each host."""
    return [name for name in plan.machines if name != "router"] if machine == "router" else ["eth0"]


def files(plan: Topology, machine: str, public_key: str) -> dict[str, str]:
    """Return a machine's own files by path, without the first slash."""
    found = {
        "etc/hostname": f"{machine}\n",
        "etc/machine-id": f"{sha256(f'{plan.name}/{machine}'.encode()).hexdigest()[:32]}\n",
        "etc/resolv.conf": "# there is no name server\n",
        "etc/hosts": "".join(f"{line}\n" for line in _hosts(plan)),
        "root/.ssh/authorized_keys": f"{public_key}\n",
        f"{NETWORKD}/05-mgmt0.link": _link(machine, "mgmt0"),
        f"{NETWORKD}/05-mgmt0.network": _network("mgmt0", [MANAGEMENT], ["LinkLocalAddressing=no"]),
    }
    for port in ports(plan, machine):
        found[f"{NETWORKD}/20-{port}.link"] = _link(machine, port)
    found |= _router(plan) if machine == "router" else _host(plan, machine)
    if machine in (node.name for node in plan.nodes):
        found |= _node(plan, machine)
    return found


def archive(content: Mapping[str, str], links: Mapping[str, str]) -> bytes:
    """Return a tar archive of root's files and symbolic links, for the initrd to unpack."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path, text in content.items():
            member = tarfile.TarInfo(f"./{path}")
            member.size, member.mode = len(text.encode()), 0o600 if ".ssh" in path else 0o644
            tar.addfile(member, io.BytesIO(text.encode()))
        for path, target in links.items():
            member = tarfile.TarInfo(f"./{path}")
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return stream.getvalue()


def links(plan: Topology, machine: str) -> dict[str, str]:
    """Return a machine's symbolic links: on nodes the unit is enabled."""
    is_node = any(node.name == machine for node in plan.nodes)
    return {UNIT: "/etc/systemd/system/podwire.service"} if is_node else {}


def config(plan: Topology) -> Json:
    """Return the configuration of a lab's daemons."""
    return {
        "apiVersion": "podwire.io/v1alpha1",
        "kind": "Configuration",
        "source": str(ON_NODES),
        "network": {"backend": plan.backend.value},
        "pods": {"mode": plan.mode.value, "cniConfDir": "/etc/cni/net.d"},
        # On every address of a node, not only on those in its Node object: a lab shows both kinds.
        "services": {"mode": plan.proxy_mode.value, "nodePortAddresses": list(ANYWHERE.values())},
    }


def _node(plan: Topology, machine: str) -> dict[str, str]:
    """Return what makes a host a node; strict about where packets come from, as some distributions are."""
    manifests = {
        f"{str(ON_NODES).lstrip('/')}/node-{node.name}.yaml": json.dumps(node_object(node), indent=2) + "\n"
        for node in plan.nodes
    }
    return manifests | {
        "etc/podwire/config.yaml": json.dumps(config(plan), indent=2) + "\n",
        "etc/sysctl.d/50-lab.conf": "net.ipv4.conf.all.rp_filter=1\nnet.ipv4.conf.default.rp_filter=1\n",
        # A start takes a second; on an emulated processor among four others a minute.
        "etc/systemd/system/podwire.service.d/lab.conf": PATIENCE,
    }


def _host(plan: Topology, machine: str) -> dict[str, str]:
    """Return the network of a host with one cable."""
    host = plan.host(machine)
    routes = [(ANYWHERE[subnet.family], host.gateway(subnet.family)) for subnet in host.subnets]
    network = _network("eth0", _usual_first(host), ["KeepConfiguration=yes"], routes)
    return {f"{NETWORKD}/20-eth0.network": network}


def _usual_first(host: Host) -> list[str]:
    """Return a host's addresses with lengths; the second one of a node is marked as not to be sent from."""
    if not isinstance(host, Node):
        return list(host.interfaces)
    usual = [subnet.interface(host.number) for subnet in host.subnets]
    return usual + [f"{subnet.interface(host.number + 100)} second" for subnet in host.subnets]


def _router(plan: Topology) -> dict[str, str]:
    """Return the router's network: a bridge for each segment, hosts' cables in them or on their own."""
    found = {"etc/sysctl.d/50-lab.conf": "net.ipv4.ip_forward=1\nnet.ipv6.conf.all.forwarding=1\n"}
    hosts = [host for host in plan.hosts if host.name in plan.machines]
    addressed = {port.name: port for port in plan.router_ports}
    routes = [*to_pods(plan), *to_balancers(plan)]
    for port in plan.router_ports:
        if port.bridge:
            found[f"{NETWORKD}/10-{port.name}.netdev"] = _ini(
                [("NetDev", [f"Name={port.name}", "Kind=bridge"])]
            )
            networks = [ip_interface(address).network for address in port.addresses]
            near = [
                (to, via) for to, via in routes if any(ip_address(via) in network for network in networks)
            ]
            found[f"{NETWORKD}/20-{port.name}.network"] = _network(port.name, port.addresses, [], near)
    for host in hosts:
        if host.segment:
            settings = [f"Bridge={host.segment}", "LinkLocalAddressing=no"]
            found[f"{NETWORKD}/30-{host.name}.network"] = _network(host.name, [], settings)
        else:
            found[f"{NETWORKD}/30-{host.name}.network"] = _network(
                host.name, addressed[host.name].addresses, []
            )
    return found


def _network(
    name: str, addresses: Iterable[str], settings: Sequence[str], routes: Iterable[tuple[str, str]] = ()
) -> str:
    """Return a .network file. No lab has router advertisements, or an address twice."""
    lines = [*settings, "IPv6AcceptRA=no", "ConfigureWithoutCarrier=yes"]
    sections = [("Match", [f"Name={name}"]), ("Network", lines)]
    for address in addresses:
        cidr, _, second = address.partition(" ")
        # IPv6 chooses what is not deprecated, IPv4 the first of a subnet.
        spare = ["PreferredLifetime=0"] if second and ":" in cidr else []
        sections.append(("Address", [f"Address={cidr}", "DuplicateAddressDetection=none", *spare]))
    for to, via in routes:
        sections.append(("Route", [f"Destination={to}", f"Gateway={via}", "GatewayOnLink=yes"]))
    return _ini(sections)


def _link(machine: str, port: str) -> str:
    return _ini([("Match", [f"PermanentMACAddress={mac(machine, port)}"]), ("Link", [f"Name={port}"])])


def _ini(sections: Iterable[tuple[str, Iterable[str]]]) -> str:
    return "\n".join("\n".join([f"[{title}]", *lines, ""]) for title, lines in sections)


def _hosts(plan: Topology) -> Iterator[str]:
    yield "127.0.0.1 localhost"
    yield "::1 localhost"
    for host in plan.hosts:
        yield from (f"{address} {host.name}" for address in host.addresses)
