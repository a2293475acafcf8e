"""The kernel's routes as they are read: looked up here, they lead where the kernel says."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

import pytest

from netlink import netns
from netlink.family import Family
from node.trace.packet import Packet
from node.trace.read import read
from node.trace.state import TYPES, Routing, State

SETUP = {
    Family.V4: """
addr add 192.0.2.1/24 dev d0
addr add 198.51.100.1/24 dev d1
route add default via 192.0.2.254
route add 10.0.0.0/8 via 198.51.100.9
route add 10.1.0.0/16 dev d1 metric 50
route add 10.1.0.0/16 dev d0 metric 20
route add 10.1.2.0/24 nexthop via 192.0.2.7 nexthop via 198.51.100.7
route add blackhole 10.9.0.0/16
route add unreachable 10.8.0.0/16
route add prohibit 10.7.0.0/16
route add 10.1.2.3/32 via 198.51.100.3 mtu 1400
route add default via 198.51.100.5 table 100
route add throw 10.2.0.0/16 table 100
route add 10.5.0.0/16 dev d1 table 7000
rule add from 10.3.0.0/16 table 100 priority 1000
rule add fwmark 0x4/0xff table 7000 priority 900
rule add to 10.6.0.0/16 unreachable priority 950
rule add not from 0.0.0.0/0 table 100 priority 960
rule add iif d1 table 100 priority 970
rule add from 10.4.0.0/16 goto 1500 priority 980
rule add from 10.4.0.0/16 table 100 priority 1400
rule add from 10.4.0.0/16 lookup 254 priority 1500 suppress_prefixlength 0
rule add from 10.4.0.0/16 table 100 priority 1600
""",
    Family.V6: """
addr add fd00:1::1/64 dev d0 nodad
addr add fd00:2::1/64 dev d1 nodad
route add default via fd00:1::ff
route add fd00:a::/32 via fd00:2::9
route add fd00:a:1::/48 dev d1 metric 50
route add fd00:a:1::/48 dev d0 metric 20
route add blackhole fd00:a:9::/48
route add unreachable fd00:a:8::/48
route add default via fd00:2::5 table 100
rule add from fd00:a:3::/48 table 100 priority 1000
rule add fwmark 0x4/0xff table 100 priority 900
""",
}
NETS = {Family.V4: "10.{}.{}.{}", Family.V6: "fd00:a:{}:{}::{}"}


@pytest.fixture(scope="module")
def states(namespaces: Callable[[], str]) -> tuple[str, dict[Family, State]]:
    name = namespaces()

    def setup() -> dict[Family, State]:
        for setting in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            Path("/proc/sys/net", setting).write_text("1")
        links = "".join(
            f"link add d{n} type veth peer name e{n}\nlink set d{n} up\nlink set e{n} up\n" for n in (0, 1)
        )
        batches = {"-4": f"link set lo up\n{links}{SETUP[Family.V4]}", "-6": SETUP[Family.V6]}
        for option, text in batches.items():
            subprocess.run(["ip", option, "-batch", "-"], input=text, text=True, check=True)
        return {family: read("node", family) for family in Family}

    return name, netns.run(name, setup)


def _asked(packet: Packet) -> str:
    """Return what the kernel says of a packet: type, gateway and interface."""
    words = ["ip", "-j", "-6" if packet.family is Family.V6 else "-4", "route", "get", packet.destination]
    words += ["from", packet.source] if packet.source else []
    words += ["iif", packet.iif] if packet.iif else []
    words += ["mark", str(packet.mark)] if packet.mark else []
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        return "refused"
    (found,) = json.loads(done.stdout)
    return f"{found.get('type', 'unicast')} {found.get('gateway', '')} {found.get('dev', '')}"


def _found(routing: Routing, packet: Packet) -> set[str]:
    way = routing.find(packet, output=not packet.iif).way
    if way is None or way.kind in (6, 7, 8):
        return {"refused", "blackhole  ", f"{TYPES[way.kind]}  lo" if way else "", f"{TYPES[7]}  lo"}
    kind = TYPES.get(way.kind, "unicast")
    shown = {f"{kind} {way.gateway} {routing.interfaces[way.oif]}", f"{kind} {way.gateway} lo"}
    if way.hops > 1:
        shown |= {"unicast 192.0.2.7 d0", "unicast 198.51.100.7 d1"}
    return shown


@pytest.mark.parametrize("family", Family)
def test_packets_go_where_the_kernel_would_send_them(
    states: tuple[str, dict[Family, State]], family: Family
) -> None:
    name, found = states
    routing, chance = Routing(found[family]), random.Random(3)
    own = (a.cidr.partition("/")[0] for a in found[family].addresses)
    near = [
        a
        for a in own
        if (":" in a) == (family is Family.V6)
        and not ip_address(a).is_link_local
        and a not in ("127.0.0.1", "::1")
    ]
    for _ in range(60):
        numbers = chance.choice(range(1, 11)), chance.choice((1, 2, 3)), chance.choice((1, 2, 3))
        to = chance.choice((NETS[family].format(*numbers), NETS[family].format(1, 2, 3), chance.choice(near)))
        iif = chance.choice(("", "d0", "d1"))
        source = NETS[family].format(chance.choice((3, 4, 5)), 1, 1) if iif else ""
        packet = Packet(family, 6, source, to, 80, iif=iif, mark=chance.choice((0, 0, 4)))
        asked = netns.run(name, _asked, packet)
        assert asked in _found(routing, packet), (packet, asked)


def test_an_address_has_the_type_that_the_kernel_gives_it(states: tuple[str, dict[Family, State]]) -> None:
    routing = Routing(states[1][Family.V4])
    kinds = {"192.0.2.1": 2, "127.0.0.5": 2, "192.0.2.255": 3, "10.9.1.1": 6, "8.8.8.8": 1, "224.0.0.1": 5}
    assert {address: routing.kind_of(address) for address in kinds} == kinds


def test_a_source_is_chosen_as_the_kernel_chooses_it(states: tuple[str, dict[Family, State]]) -> None:
    routing = Routing(states[1][Family.V4])
    by_name = {name: link.index for name, link in routing.by_name.items()}
    assert routing.source_for(by_name["d1"], "198.51.100.9", "10.2.3.4") == "198.51.100.1"
    six = Routing(states[1][Family.V6])
    assert six.source_for(by_name["d0"], "", "fd00:2::7") == "fd00:1::1"
