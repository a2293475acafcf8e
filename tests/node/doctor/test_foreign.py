"""Other programs' rules, interfaces and configurations: what stands in the way is told, the rest is not."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from netlink import netns
from netlink.decode import Link
from netlink.requests import Vxlan, bridge_add, vxlan_add
from netlink.rtnl import Rtnl
from node.doctor import foreign
from node.doctor.findings import Check
from node.doctor.foreign import Observed, judge
from node.doctor.view import Context, PeerRoute, View

ROUTES = (PeerRoute("10.244.1.0/24", "node1", backend="local"),)
TUNNELLED = (*ROUTES, PeerRoute("10.244.2.0/24", "node2", backend="vxlan"))
FIREWALLD = """
table inet firewalld {
  chain zone_podwire { accept; }
  chain zone_public { tcp dport 22 accept; }
  chain zones { %s iifname "eth0" goto zone_public; }
  chain filter_FORWARD {
    type filter hook forward priority 10; policy accept;
    ct state established,related accept
    jump zones
    reject with icmpx admin-prohibited
  }
}
"""
SETS = """
table inet mine {
  set trusted { type ifname; elements = { "lo" }; }
  chain forward { type filter hook forward priority 0; policy drop; iifname @trusted accept; }
}
"""
MASQUERADES = """
table ip mine { chain post { type nat hook postrouting priority 0; %s masquerade; }; }
"""
EARLY = """
table ip mine {
  chain pre { type nat hook prerouting priority -150; tcp dport 80 redirect to :8080; }
}
"""
CLOSED = "table inet mine { chain in { type filter hook input priority 0; policy drop; %s }; }"


def run(*words: str, stdin: str = "") -> None:
    subprocess.run(words, input=stdin, text=True, check=True, capture_output=True)


def look(name: str, rules: str, routes: tuple[PeerRoute, ...], tmp_path: Path) -> Check:
    """Load rules of nft, or commands of iptables, and run the check."""

    def work() -> Check:
        if rules.lstrip().startswith("table"):
            run("nft", "-f", "-", stdin=rules)
        else:
            for line in filter(None, rules.splitlines()):
                run(*line.split())
        (tmp_path / "proc").symlink_to("/proc")
        return foreign.check(Context(View("node1", routes=routes), root=tmp_path))

    return netns.run(name, work)


CASES = [
    ("nothing", "", ROUTES, "", ""),
    (
        "Docker",
        "iptables -P FORWARD DROP\niptables -N DOCKER-USER\niptables -A FORWARD -j DOCKER-USER\n"
        "iptables -A FORWARD -i docker0 -j ACCEPT",
        ROUTES,
        "chain FORWARD of table ip filter of nftables drops what no rule accepts, and none accepts packets",
        "iptables -I DOCKER-USER -i pw+ -j ACCEPT && iptables -I DOCKER-USER -o pw+ -j ACCEPT",
    ),
    (
        "Docker, with pods let pass",
        "iptables -P FORWARD DROP\niptables -N DOCKER-USER\niptables -A FORWARD -j DOCKER-USER\n"
        "iptables -I DOCKER-USER -i pw+ -j ACCEPT",
        ROUTES,
        "",
        "",
    ),
    (
        "pods let pass by range",
        "iptables -P FORWARD DROP\niptables -A FORWARD -s 10.244.0.0/16 -j ACCEPT",
        ROUTES,
        "",
        "",
    ),
    (
        "another range",
        "iptables -P FORWARD DROP\niptables -A FORWARD -s 10.245.0.0/16 -j ACCEPT",
        ROUTES,
        "chain FORWARD of table ip filter",
        "iptables -I FORWARD",
    ),
    (
        "legacy",
        "iptables-legacy -P FORWARD DROP\niptables-legacy -A FORWARD -i docker0 -j ACCEPT",
        ROUTES,
        "chain FORWARD of table filter of iptables-legacy (IPv4) drops",
        "iptables-legacy -I FORWARD -i pw+ -j ACCEPT",
    ),
    (
        "legacy, with pods let pass",
        "iptables-legacy -P FORWARD DROP\niptables-legacy -A FORWARD -s 10.244.0.0/16 -j ACCEPT",
        ROUTES,
        "",
        "",
    ),
    (
        "ufw, IPv6",
        "ip6tables -P FORWARD DROP\nip6tables -N ufw6-forward\nip6tables -A FORWARD -j ufw6-forward",
        ROUTES,
        "chain FORWARD of table ip6 filter",
        "ufw default allow routed",
    ),
    (
        "firewalld",
        FIREWALLD % "",
        ROUTES,
        "chain filter_FORWARD of table inet firewalld",
        "install deploy/firewalld",
    ),
    ("firewalld with our zone", FIREWALLD % 'iifname "pwpod*" goto zone_podwire;', ROUTES, "", ""),
    ("sets", SETS, ROUTES, "", ""),
    ("input without tunnels", CLOSED % "", ROUTES, "", ""),
    (
        "input with tunnels",
        CLOSED % "tcp dport 22 accept;",
        TUNNELLED,
        "chain in of table inet mine of nftables drops what no rule accepts, and none accepts VXLAN",
        "accept udp dport 8472",
    ),
    ("input with the port", CLOSED % "udp dport 8472 accept;", TUNNELLED, "", ""),
    (
        "masquerade of all",
        MASQUERADES % 'oifname "eth0"',
        ROUTES,
        "chain post of table ip mine of nftables gives the node's address to all packets",
        "take that rule away",
    ),
    (
        "masquerade of pods",
        MASQUERADES % "ip saddr 10.244.0.0/16",
        ROUTES,
        "chain post of table ip mine of nftables gives the node's address to packets of pods",
        "take that rule away",
    ),
    ("masquerade of others", MASQUERADES % 'ip saddr 172.17.0.0/16 oifname != "docker0"', ROUTES, "", ""),
    (
        "kubelet's or kube-proxy's masquerade of what is marked",
        "iptables -t nat -N KUBE-POSTROUTING\niptables -t nat -A POSTROUTING -j KUBE-POSTROUTING\n"
        "iptables -t nat -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n"
        "iptables -t nat -A KUBE-POSTROUTING -j MASQUERADE --random-fully",
        ROUTES,
        "",
        "",
    ),
    (
        "masquerade that excepts pods",
        "iptables -t nat -A POSTROUTING -s 10.244.0.0/16 -d 10.244.0.0/16 -j RETURN\n"
        "iptables -t nat -A POSTROUTING -s 10.244.0.0/16 -j MASQUERADE",
        ROUTES,
        "",
        "",
    ),
    ("early translation", EARLY, ROUTES, "", ""),
]


@pytest.mark.parametrize(
    ("rules", "routes", "said", "remedy"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_what_is_said_of_rules(
    namespaces: Callable[[], str],
    tmp_path: Path,
    rules: str,
    routes: tuple[PeerRoute, ...],
    said: str,
    remedy: str,
) -> None:
    check = look(namespaces(), rules, routes, tmp_path)
    assert len(check.findings) == bool(said), check.findings
    for finding in check.findings:
        assert finding.sentence.startswith(said)
        assert finding.remedy.startswith(remedy)


def test_what_was_not_decided_is_a_note(namespaces: Callable[[], str], tmp_path: Path) -> None:
    assert look(namespaces(), SETS, ROUTES, tmp_path).notes == (
        "chain forward of table inet mine of nftables may drop packets of pods: "
        "what its sets hold was not looked at",
    )


def test_who_translates_before_podwire_is_a_note(namespaces: Callable[[], str], tmp_path: Path) -> None:
    assert look(namespaces(), EARLY, ROUTES, tmp_path).notes == (
        "chain pre of table ip mine of nftables translates before podwire does (priority -150)",
    )


def test_the_configuration_that_comes_first_is_told(namespaces: Callable[[], str], tmp_path: Path) -> None:
    folder = tmp_path / "etc/cni/net.d"
    folder.mkdir(parents=True)
    for name in ("05-cilium.conflist", "10-podwire.conflist", "00-notes.txt"):
        (folder / name).touch()
    [finding] = look(namespaces(), "", ROUTES, tmp_path).findings
    assert "/etc/cni/net.d/05-cilium.conflist, which comes before 10-podwire.conflist" in finding.sentence
    assert finding.remedy == "move /etc/cni/net.d/05-cilium.conflist out of that folder"


def test_interfaces_of_other_networks_are_found(namespaces: Callable[[], str]) -> None:
    def work() -> Check:
        with Rtnl() as rtnl:
            mac = "02:00:00:00:00:01"
            rtnl.commit(bridge_add("cni0"), vxlan_add(Vxlan("flannel.1", 112, 8472, "192.0.2.1", mac, 1450)))
        return foreign.check(Context())

    found = [finding.sentence for finding in netns.run(namespaces(), work).findings]
    assert found == [
        "interfaces of flannel are there: cni0, flannel.1",
        "the VXLAN device flannel.1 has podwire's UDP port 8472 and VNI 112",
    ]


def test_our_own_interfaces_are_no_finding() -> None:
    own = Link(2, "pwvxlan4", "", 1450, True, "vxlan", None, None)
    made = Vxlan("pwvxlan4", 112, 8472, "192.0.2.1", "02:00:00:00:00:01", 1450)
    assert judge(Observed(links=(replace(own, vxlan=made),))).findings == ()
