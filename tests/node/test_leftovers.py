"""kube-proxy's leftovers on the kernel: all of it found and gone, and the rest byte for byte as it was."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from netlink import netns
from netlink.attributes import attribute, nested, text
from netlink.delivery import Delivery
from netlink.family import Family
from netlink.ipvs import Command, Real, Request, Schedule, Virtual
from netlink.ipvs import Ipvs as KernelIpvs
from netlink.messages import NLM_F_ACK, NLM_F_CREATE
from netlink.requests import address_add, bridge_add
from netlink.rtnl import Rtnl
from netlink.xtables import Variant
from node import leftover_ipvs
from node.leftover_chains import Chains
from node.leftover_ipvs import INTERFACE, Ipvs, Server, Sets, ask_ipset
from node.leftovers import Survey, remove, running, survey
from proxy.ipvs.places import DEVICE, MARKED
from tests.node.kube_proxy import (
    CHAINS,
    EVERYWHERE,
    JUMPS,
    SVC,
    load,
    load_everywhere,
    rules,
    ruleset,
    running_in,
    saved,
    saved_everywhere,
)
from tests.proxy.dataplanes import needs_ipvs

OWN = "table inet podwire { chain forward { type filter hook forward priority 0; accept; }; };"
OWN += "table ip podwire { map services { type ipv4_addr : verdict; }; };"
NFTABLES = (
    'table {family} kube-proxy {{ comment "rules for kube-proxy"; set cluster-ips {{ type ipv4_addr; }};'
)
NFTABLES += (
    "chain services {{ }}; chain nat-output {{ type nat hook output priority -100; jump services; }}; }};"
)


def nft(text: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)


def exact() -> Survey:
    return survey(exact=True)


def ipset(name: str) -> None:
    """Make a set of addresses and ports, as kube-proxy does (linux/netfilter/ipset/ip_set.h)."""
    body = text(2, name) + text(3, "hash:ip,port") + attribute(4, b"\1") + attribute(5, struct.pack("B", 2))
    ask_ipset(2, NLM_F_ACK | NLM_F_CREATE, body + nested(7), f"make ipset {name}")


def sets() -> list[str]:
    return [name for found in leftover_ipvs.find_sets() for name in found.names]


@pytest.fixture
def namespace(namespaces: Callable[[], str]) -> str:
    return namespaces()


@pytest.fixture
def node(namespace: str) -> str:
    """A node where kube-proxy has written all it can, beside podwire and others."""
    netns.run(namespace, nft, OWN)
    netns.run(namespace, load_everywhere)
    return namespace


@pytest.mark.parametrize("is_exact", [False, True])
def test_all_chains_and_jumps_are_found_in_both_variants_and_families(node: str, is_exact: bool) -> None:
    found = netns.run(node, survey, exact=is_exact)
    chains = {(c.variant, c.family, c.table): c for c in found.leftovers if isinstance(c, Chains)}
    assert len(chains) == len(found.leftovers)
    assert set(chains) == {(*where, table) for where in EVERYWHERE for table in CHAINS}
    for (_, _, table), some in chains.items():
        assert set(some.names) == CHAINS[table]
        assert len(some.jumps) == JUMPS[table]


def test_a_survey_changes_nothing(node: str) -> None:
    before = netns.run(node, saved_everywhere), netns.run(node, ruleset)
    netns.run(node, survey)
    netns.run(node, exact)
    assert (netns.run(node, saved_everywhere), netns.run(node, ruleset)) == before


def test_removal_takes_kube_proxys_and_leaves_the_rest_byte_for_byte(
    node: str, namespaces: Callable[[], str]
) -> None:
    without = namespaces()
    netns.run(without, nft, OWN)
    for variant, family in EVERYWHERE:
        netns.run(without, load, variant, family, rules(family, kube_proxys=False))
    done = netns.run(node, lambda: remove(exact().leftovers))
    assert not done.failures
    assert len(done.removed) == len(EVERYWHERE) * len(CHAINS)
    assert netns.run(node, saved_everywhere) == netns.run(without, saved_everywhere)
    assert netns.run(node, ruleset) == netns.run(without, ruleset)
    assert netns.run(node, exact).leftovers == ()
    assert netns.run(node, survey).leftovers == ()


def test_a_repeated_removal_of_the_same_survey_harms_nothing(node: str) -> None:
    found = netns.run(node, exact).leftovers
    netns.run(node, remove, found)
    before = netns.run(node, saved_everywhere)
    again = netns.run(node, remove, found)
    assert all("failed" in failure for failure in again.failures)
    assert netns.run(node, saved_everywhere) == before


@pytest.mark.parametrize(("variant", "family"), EVERYWHERE)
def test_what_others_use_stays_with_a_remark(variant: Variant, family: Family, node: str) -> None:
    """Somebody's chain leads to a service's, which leads on; and a rule of theirs in a built-in chain."""
    theirs = f"*nat\n-A MINE -j {SVC}\nCOMMIT\n*filter\n"
    theirs += "-A OUTPUT -j KUBE-FW-CG5I4G2RS3ZVWGLK\nCOMMIT\n"
    netns.run(node, load, variant, family, theirs)
    found = netns.run(node, exact)
    where = f"iptables-{variant.value} (IPv{family.value}), for rules of others use them"
    used = f"KUBE-MARK-MASQ, KUBE-POSTROUTING, KUBE-SEP-QHNBUIKLMXRGWQTB, {SVC}"
    assert f"left alone in table nat of {where}: {used}" in found.remarks
    assert f"left alone in table filter of {where}: KUBE-FW-CG5I4G2RS3ZVWGLK" in found.remarks
    assert not netns.run(node, remove, found.leftovers).failures
    after = netns.run(node, saved, variant, family)
    assert f"-A MINE -j {SVC}" in after
    assert '-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING' in after
    assert f"-A {SVC} -j KUBE-SEP-QHNBUIKLMXRGWQTB" in after
    assert "-A OUTPUT -j KUBE-FW-CG5I4G2RS3ZVWGLK" in after
    assert "KUBE-SERVICES " not in after
    assert netns.run(node, exact).leftovers == ()


@pytest.mark.parametrize(("variant", "family"), EVERYWHERE)
def test_a_table_that_changes_meanwhile_is_left_as_it_is(variant: Variant, family: Family, node: str) -> None:
    found = netns.run(node, exact).leftovers
    netns.run(node, load, variant, family, f"*nat\n-A MINE -j {SVC}\nCOMMIT\n")
    before = netns.run(node, saved, variant, family).split("*nat")[1].split("COMMIT")[0]
    done = netns.run(node, remove, found)
    assert len(done.removed) == len(found) - 1
    assert len(done.failures) == 1
    assert "\n" not in done.failures[0]
    where = f"in table nat of iptables-{variant.value} (IPv{family.value}): "
    assert f"{where}{variant.program(family, 'restore')} failed: " in done.failures[0]
    assert netns.run(node, saved, variant, family).split("*nat")[1].split("COMMIT")[0] == before


def test_rules_that_others_insert_meanwhile_stay(node: str) -> None:
    found = netns.run(node, exact).leftovers
    for variant, family in EVERYWHERE:
        netns.run(node, load, variant, family, "*nat\n-I PREROUTING 1 -i eth7 -j RETURN\nCOMMIT\n")
    assert not netns.run(node, remove, found).failures
    for variant, family in EVERYWHERE:
        assert "-A PREROUTING -i eth7 -j RETURN" in netns.run(node, saved, variant, family)


def test_the_tables_of_its_nftables_mode_go_and_no_others(namespace: str) -> None:
    netns.run(namespace, nft, OWN + "table inet kube-proxy { }; table ip kube-proxy-2 { };")
    before = netns.run(namespace, ruleset)
    for family in Family:
        netns.run(namespace, nft, NFTABLES.format(family=family.keyword))
    found = netns.run(namespace, survey).leftovers
    assert list(map(str, found)) == [
        "table ip kube-proxy of nftables with 2 chains",
        "table ip6 kube-proxy of nftables with 2 chains",
    ]
    assert not netns.run(namespace, remove, found).failures
    assert netns.run(namespace, ruleset) == before
    assert not netns.run(namespace, remove, found).failures


def test_sets_go_after_the_rules_that_name_them_and_others_stay(namespace: str) -> None:
    def fill() -> None:
        for name in ("KUBE-CLUSTER-IP", "KUBE-6-LOOP-BACK", "KUBE-MINE", "KUBE-NODE-PORT-LOCAL-SCTP-HASH"):
            ipset(name[:31])
        text = "*nat\n:KUBE-SERVICES - [0:0]\n-A OUTPUT -j KUBE-SERVICES\n"
        text += "-A KUBE-SERVICES -m set --match-set KUBE-CLUSTER-IP dst,dst -j ACCEPT\nCOMMIT\n"
        for variant in Variant:
            load(variant, Family.V4, text)

    netns.run(namespace, fill)
    found = netns.run(namespace, exact).leftovers
    names = ("KUBE-6-LOOP-BACK", "KUBE-CLUSTER-IP", "KUBE-NODE-PORT-LOCAL-SCTP-HASH")
    assert found[-1] == Sets(names)
    assert netns.run(namespace, remove, found).failures == ()
    assert netns.run(namespace, sets) == []
    everything = netns.run(namespace, ask_ipset, 7, 0x300, b"", "list")
    assert [b"KUBE-MINE\0" in message for message in everything] == [True]


def test_a_set_that_others_name_stays_with_a_sentence(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftover_ipvs, "SET_SECONDS", 0.0)
    netns.run(namespace, ipset, "KUBE-CLUSTER-IP")
    text = "*nat\n-A OUTPUT -m set --match-set KUBE-CLUSTER-IP dst,dst -j ACCEPT\nCOMMIT\n"
    netns.run(namespace, load, Variant.LEGACY, Family.V4, text)
    done = netns.run(namespace, lambda: remove(exact().leftovers))
    assert done.failures == ("1 ipset: cannot remove ipset KUBE-CLUSTER-IP: a rule still names it",)
    assert netns.run(namespace, sets) == ["KUBE-CLUSTER-IP"]


def interface() -> None:
    """Make kube-ipvs0; of another type than kube-proxy's, for its name decides."""
    with Rtnl() as rtnl:
        rtnl.commit(bridge_add(INTERFACE))
        link = rtnl.link(INTERFACE)
        assert link
        rtnl.commit(address_add(link.index, "10.96.0.1/32"), address_add(link.index, "fd00:96::1/128"))


def links() -> set[str]:
    return {
        line.split(":")[0].strip() for line in Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]
    }


def test_the_interface_of_its_ipvs_mode_goes(namespace: str) -> None:
    before = netns.run(namespace, links)
    netns.run(namespace, interface)
    found = netns.run(namespace, survey).leftovers
    assert list(map(str, found)) == [f"interface {INTERFACE}"]
    assert not netns.run(namespace, remove, found).failures
    assert netns.run(namespace, links) == before
    assert not netns.run(namespace, remove, found).failures


def test_virtual_servers_are_known_by_the_addresses_of_the_interface(namespace: str, tmp_path: Path) -> None:
    """The kernel's list is a file here: not every kernel has IPVS."""
    net = tmp_path / "thread-self/net"
    net.mkdir(parents=True)
    lines = "TCP  0A600001:01BB rr\n  -> 0AF4020A:192B Masq 1 0 0\nTCP  C0000201:0050 wlc\n"
    (net / "ip_vs").write_text(lines)
    netns.run(namespace, interface)
    found = netns.run(namespace, survey, tmp_path)
    (ipvs,) = found.leftovers
    assert isinstance(ipvs, Ipvs)
    assert ipvs.servers == (Server("TCP", "10.96.0.1", 443, frozenset({("10.244.2.10", 6443)})),)
    assert str(ipvs) == f"interface {INTERFACE} with 1 virtual server of IPVS"
    assert found.remarks == ("left alone, not known to be kube-proxy's: 1 virtual server of IPVS",)


def test_without_ipvs_the_interface_stays_for_the_next_time(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its addresses tell which virtual servers are kube-proxy's."""
    netns.run(namespace, interface)
    monkeypatch.setattr("netlink.ipvs.Ipvs.NAME", "NO-IPVS")
    done = netns.run(namespace, remove, [Ipvs((Server("TCP", "10.96.0.1", 443),))])
    what = f"interface {INTERFACE} with 1 virtual server of IPVS"
    assert done.failures == (f"{what}: cannot use IPVS: the kernel has none (its module ip_vs)",)
    assert INTERFACE in netns.run(namespace, links)


def test_kube_proxys_virtual_servers_go_and_those_of_others_and_our_own_stay(namespace: str) -> None:
    needs_ipvs()
    tcp, udp, sctp = 6, 17, 132
    theirs = [
        Virtual(Family.V4, tcp, "10.96.0.1", 443),
        Virtual(Family.V6, udp, "fd00:96::1", 53),
        Virtual(Family.V4, sctp, "10.96.0.1", 9),
    ]
    node_port = Virtual(Family.V4, tcp, "192.168.50.11", 30443)
    others = [Virtual(Family.V4, tcp, "192.0.2.1", 80), Virtual(Family.V4, mark=7)]
    ours = Virtual(Family.V4, tcp, "10.96.0.2", 80)

    def make() -> None:
        interface()
        with Rtnl() as rtnl:
            Delivery(rtnl, Family.V4, DEVICE, MARKED).add(["10.96.0.2"], [])
            link = rtnl.link(INTERFACE)
            assert link
            rtnl.commit(address_add(link.index, "10.96.0.2/32"))  # kube-proxy served it before
        with KernelIpvs() as kernel:
            kernel.commit([Request(Command.NEW_SERVICE, v, Schedule("rr")) for v in servers])
            real = Real("10.244.2.10", 6443)
            kernel.commit([Request(Command.NEW_DEST, v, real=real) for v in (theirs[0], node_port)])

    def there() -> set[Virtual]:
        with KernelIpvs() as kernel:
            return set(kernel.servers())

    servers = [*theirs, node_port, *others, ours]
    netns.run(namespace, make)
    found = netns.run(namespace, survey)
    assert found.remarks == ("left alone, not known to be kube-proxy's: 1 virtual server of IPVS",)
    assert not netns.run(namespace, remove, found.leftovers).failures
    assert netns.run(namespace, there) == {*others, ours}
    assert INTERFACE not in netns.run(namespace, links)
    assert DEVICE in netns.run(namespace, links)


def test_a_running_kube_proxy_is_seen_in_its_own_namespace_only(
    namespaces: Callable[[], str], tmp_path: Path
) -> None:
    here, elsewhere = namespaces(), namespaces()
    with running_in(here, tmp_path) as process:
        assert netns.run(here, running) == (process,)
        assert netns.run(elsewhere, running) == ()
    assert netns.run(here, running) == ()
