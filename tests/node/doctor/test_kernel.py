"""The kernel: what podwire needs is tried, and each thing that lacks is named with its module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from netlink import netns
from netlink.nftables.expressions import Masquerade, RandomIndex
from netlink.nftables.objects import Rule
from netlink.nftables.operations import AddRule
from netlink.requests import Vxlan, vxlan_add
from netlink.rtnl import Rtnl
from node.doctor import kernel
from node.doctor.kernel import Observed, Try, judge
from node.doctor.view import Context, View
from tests.netlink.kernel_with import has_wireguard

GOOD = Observed("6.1.0-18-amd64", (Try("make veth pairs"),))


def sentences(seen: Observed) -> list[str]:
    return [finding.sentence for finding in judge(seen).findings]


def test_this_kernel_has_all_of_it_in_every_mode() -> None:
    before = Path("/proc/thread-self/ns/net").stat().st_ino
    for mode in ("routed", "bridge"):
        tried = kernel.in_namespace(lambda mode=mode: tuple(kernel.attempts(mode, ipv6=True)))
        assert [t for t in tried if t.reason] == []
        assert len(tried) >= 11
    assert Path("/proc/thread-self/ns/net").stat().st_ino == before


def test_trying_leaves_nothing_behind(namespaces: Callable[[], str]) -> None:
    def names() -> list[str]:
        kernel.check(Context(View("node1")))
        with Rtnl() as rtnl:
            return [link.name for link in rtnl.links()]

    assert netns.run(namespaces(), names) == ["lo"]


def test_what_was_refused_is_told_with_the_modules_that_may_lack() -> None:
    rule = AddRule(Rule("c", (RandomIndex(2), Masquerade()), "comment"))
    assert kernel._modules(rule) == "nft_numgen nft_masq"
    [finding] = judge(replace(GOOD, tries=(Try("do x", "Not supported", "nft_fib_ipv4"),))).findings
    assert finding.sentence == "the kernel cannot do x: Not supported"
    assert finding.remedy == "modprobe -a nft_fib_ipv4"


def test_an_error_inside_is_raised_outside() -> None:
    def fail() -> tuple[Try, ...]:
        raise OSError(1, "no")

    with pytest.raises(OSError, match="no"):
        kernel.in_namespace(fail)


def test_findings_of_what_was_seen() -> None:
    assert sentences(GOOD) == []
    assert sentences(replace(GOOD, release="5.4.0-42-generic"))[0].startswith("the kernel is Linux 5.4.0-42")
    assert "br_netfilter is not loaded" in sentences(replace(GOOD, mode="bridge", bridge_filters=False))[0]
    assert "IPv6 is off" in sentences(replace(GOOD, ipv6=False, ipv6_wanted=True))[0]
    assert judge(replace(GOOD, ipv6=False)).notes


@pytest.mark.parametrize(
    ("release", "wrong"),
    [
        ("4.14.180", True),
        ("4.14.181", False),
        ("4.19.122-x", True),
        ("5.3.18", True),
        ("5.4.40", True),
        ("5.4.41", False),
        ("5.6.12", True),
        ("5.7.0", False),
        ("6.18.44", False),
    ],
)
def test_63_second_delays_kernels_with_wrong_checksums_are_known(release: str, wrong: bool) -> None:
    assert kernel.wrong_checksums(release) is wrong
    found = sentences(replace(GOOD, release=release, tunnels=("pwvxlan4",)))
    assert any("wrong UDP checksums over pwvxlan4" in s for s in found) is wrong


def test_who_computes_checksums_is_read_from_the_interface(namespaces: Callable[[], str]) -> None:
    def work() -> tuple[bool, bool]:
        with Rtnl() as rtnl:
            rtnl.commit(vxlan_add(Vxlan("pwvxlan4", 112, 8472, "192.0.2.1", "02:00:00:00:00:01", 1450)))
        return kernel.checksums_by_card("pwvxlan4"), kernel.checksums_by_card("nothing")

    assert netns.run(namespaces(), work) == (True, False)


def test_a_node_without_ipv6_is_not_asked_for_it(tmp_path: Path) -> None:
    check = kernel.check(Context(View("node1", pod_cidrs=("fd00::/64",)), root=tmp_path))
    assert "IPv6 is off" in check.findings[0].sentence


def test_wireguard_is_tried_where_it_is_used() -> None:
    """A kernel without it is told by the module that it lacks."""
    tries = kernel.in_namespace(lambda: tuple(kernel.attempts("routed", ipv6=False, secured=True)))
    tried = next(t for t in tries if t.what == "make WireGuard devices")
    lacking = Try(tried.what, "Operation not supported", "wireguard")
    assert tried == (Try(tried.what) if has_wireguard() else lacking)
    (finding,) = judge(Observed("6.1.0", (lacking,))).findings
    assert finding.sentence == "the kernel cannot make WireGuard devices: Operation not supported"
    assert finding.remedy == "modprobe -a wireguard"
