"""Settings that stand in the way are named with their value and the command that sets them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from node.doctor import settings
from node.doctor.settings import Observed, judge, tracked
from node.doctor.view import Context, PeerRoute, View

ALL = "sys/net/ipv4/conf/all/rp_filter"


def rp(name: str) -> str:
    return f"sys/net/ipv4/conf/{name}/rp_filter"


CASES: list[tuple[str, dict[str, Any], str]] = [
    ("forwarding", {"sysctls": {"sys/net/ipv4/ip_forward": "0"}}, "net.ipv4.ip_forward is 0, not 1: "),
    ("it is on", {"sysctls": {"sys/net/ipv4/ip_forward": "1"}}, ""),
    (
        "IPv6 that no pod has",
        {"sysctls": {"sys/net/ipv6/conf/all/forwarding": "0"}, "ipv6": False},
        "",
    ),
    ("IPv6", {"sysctls": {"sys/net/ipv6/conf/all/forwarding": "0"}}, "net.ipv6.conf.all.forwarding is 0"),
    (
        "a strict tunnel",
        {"own": ("pwvxlan4",), "sysctls": {rp("pwvxlan4"): "1"}},
        "net.ipv4.conf.pwvxlan4.rp_filter is 1, not 2",
    ),
    ("pods' interfaces may be strict", {"own": ("pwpod0",), "sysctls": {ALL: "1", rp("pwpod0"): "1"}}, ""),
    ("loose beats strict", {"ways": ("eth0", "eth1"), "sysctls": {ALL: "2", rp("eth0"): "1"}}, ""),
    ("one way out", {"ways": ("eth0",), "sysctls": {rp("eth0"): "1"}}, ""),
    (
        "two ways out",
        {"ways": ("eth0", "eth1"), "sysctls": {rp("eth0"): "1", rp("eth1"): "2"}},
        "rp_filter is strict (1) on eth0",
    ),
    (
        "advertisements of pods",
        {"own": ("pwpod0",), "sysctls": {"sys/net/ipv6/conf/pwpod0/accept_ra": "2"}},
        "net.ipv6.conf.pwpod0.accept_ra is 2",
    ),
    (
        "connections at 90 %",
        {
            "sysctls": {
                "sys/net/netfilter/nf_conntrack_max": "1000",
                "sys/net/netfilter/nf_conntrack_count": "900",
            }
        },
        "connection tracking holds 900 of at most 1000",
    ),
    (
        "connections below",
        {
            "sysctls": {
                "sys/net/netfilter/nf_conntrack_max": "1000",
                "sys/net/netfilter/nf_conntrack_count": "899",
            }
        },
        "",
    ),
    (
        "neighbours",
        {"peers": 5000, "sysctls": {"sys/net/ipv4/neigh/default/gc_thresh3": "1024"}},
        "net.ipv4.neigh.default.gc_thresh3 is 1024, not 16384: ",
    ),
    (
        "a full table of neighbours",
        {"neighbours": {4: 950}, "sysctls": {"sys/net/ipv4/neigh/default/gc_thresh3": "1024"}},
        "there are 950 neighbours, and net.ipv4.neigh.default.gc_thresh3 is 1024",
    ),
    (
        "bridges",
        {"mode": "bridge", "sysctls": {"sys/net/bridge/bridge-nf-call-iptables": "0"}},
        "net.bridge.bridge-nf-call-iptables is 0",
    ),
    (
        "node ports",
        {"sysctls": {"sys/net/ipv4/ip_local_port_range": "15000\t64000"}},
        "net.ipv4.ip_local_port_range is 15000 to 64000",
    ),
    ("ports by default", {"sysctls": {"sys/net/ipv4/ip_local_port_range": "32768\t60999"}}, ""),
    (
        "ports that are reserved",
        {
            "sysctls": {
                "sys/net/ipv4/ip_local_port_range": "15000\t64000",
                "sys/net/ipv4/ip_local_reserved_ports": "8080,30000-32767",
            }
        },
        "",
    ),
    ("networkd", {"running": frozenset({"systemd-network"})}, "systemd-networkd runs and takes away routes"),
    ("firewalld", {"running": frozenset({"firewalld"})}, "firewalld runs and drops"),
    (
        "NetworkManager that was told",
        {
            "running": frozenset({"NetworkManager"}),
            "files": frozenset({"NetworkManager/conf.d/50-podwire.conf"}),
        },
        "",
    ),
]


@pytest.mark.parametrize(("seen", "said"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_what_is_said_of_a_setting(seen: dict[str, Any], said: str) -> None:
    found = [finding.sentence for finding in judge(Observed(**seen)).findings]
    assert len(found) == bool(said)
    assert all(sentence.startswith(said) for sentence in found)


def test_the_remedy_is_a_command() -> None:
    [finding] = judge(Observed({"sys/net/ipv4/ip_forward": "0"})).findings
    assert finding.remedy == "sysctl -w net.ipv4.ip_forward=1"
    [finding] = judge(Observed({rp("eth0.5"): "1"}, ways=("eth0.5", "eth1"))).findings
    assert finding.remedy == "sysctl -w net.ipv4.conf.eth0/5.rp_filter=2"


def test_what_connection_tracking_lost_is_a_note() -> None:
    table = "entries drop early_drop insert_failed\n00000002 00000001 00000000 0000000a\n0 1 1 0\n"
    assert tracked(table) == (3, 10)
    assert tracked("") == (0, 0)
    assert judge(Observed(tracked=(3, 10))).notes == (
        "since boot, connection tracking has dropped 3 packets, and 10 connections failed",
    )


def test_values_are_read_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "proc/sys/net/ipv4/ip_forward"
    path.parent.mkdir(parents=True)
    path.write_text("0\n")
    routes = (
        PeerRoute("10.244.2.0/24", "node2", backend="direct"),
        PeerRoute("10.244.3.0/24", "node3", backend="vxlan"),
    )
    seen = settings.look(Context(View("node1", routes=routes), root=tmp_path))
    assert seen.sysctls["sys/net/ipv4/ip_forward"] == "0"
    assert seen.peers == 1  # neighbours of a tunnel are permanent, and do not count
    assert settings.check(Context(root=tmp_path)).findings
