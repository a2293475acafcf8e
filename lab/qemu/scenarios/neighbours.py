"""Other programs that are in charge of a node's network: firewalld, NetworkManager, iptables-legacy."""

from __future__ import annotations

from collections.abc import Iterator
from shlex import quote

from lab.qemu import driver
from lab.qemu.scenarios.base import Trial, Verdict
from lab.qemu.scenarios.units import traffic
from lab.topology import Node

NODE = "node2"


def firewalld(trial: Trial) -> Iterator[Verdict]:
    """Start firewalld beside podwire, and have it load its rules again under traffic."""
    ports = " ".join(f"--add-port={port}" for port in ("8080/tcp", "8080/udp", "30183/tcp"))
    trial.shell(NODE, "systemctl unmask -q dbus firewalld; systemctl start dbus firewalld", 180)
    try:
        trial.shell(NODE, f"firewall-cmd -q {ports}; firewall-cmd -q --add-protocol=icmp")
        yield trial.verdict("firewalld", trial.shell(NODE, "firewall-cmd --state"), "running")
        driver.wait_ready(trial.world.lab, NODE)
        yield trial.judged("pods, services and node ports", trial.cases("B", "C", "D"))
        with traffic(trial) as streams:
            trial.shell(NODE, f"firewall-cmd -q --reload && firewall-cmd -q {ports}", 180)
        yield from streams.verdicts(trial, "while it reloads")
        yield trial.judged("pod to pod after a reload", trial.cases("B"))
    finally:
        trial.try_shell(NODE, "systemctl stop firewalld", 180)


def network_manager(trial: Trial) -> Iterator[Verdict]:
    """Give the node's interface to NetworkManager instead of systemd-networkd."""
    node = trial.world.lab.plan.node(NODE)
    profile, conf = (
        "/etc/NetworkManager/system-connections/eth0.nmconnection",
        "/etc/NetworkManager/conf.d/lab.conf",
    )
    trial.shell(NODE, f"printf %s {quote(_profile(node))} > {profile}; chmod 600 {profile};"
                      f" printf '[keyfile]\\nunmanaged-devices+=interface-name:mgmt0' > {conf}")  # fmt: skip
    trial.shell(NODE, "systemctl unmask -q dbus NetworkManager; systemctl stop systemd-networkd.socket"
                      " systemd-networkd; systemctl start dbus NetworkManager", 180)  # fmt: skip
    try:
        trial.wait("NetworkManager has eth0", lambda: "connected" in _states(trial).get("eth0", ""))
        states = {name: state for name, state in _states(trial).items() if name.startswith("pw")}
        yield trial.verdict("podwire's interfaces are", set(states.values()), {"unmanaged"})
        driver.wait_ready(trial.world.lab, NODE)
        yield trial.judged("pods, services and node ports", trial.cases("B", "C", "D"))
        with traffic(trial) as streams:
            trial.shell(NODE, "systemctl restart NetworkManager", 180)
            trial.wait("NetworkManager has eth0", lambda: "connected" in _states(trial).get("eth0", ""))
        yield from streams.verdicts(trial, "while it restarts")
        yield trial.judged("pod to pod after its restart", trial.cases("B"))
    finally:
        trial.try_shell(NODE, f"systemctl stop NetworkManager; rm -f {profile} {conf};"
                              " systemctl start systemd-networkd", 180)  # fmt: skip


def legacy(trial: Trial) -> Iterator[Verdict]:
    """Run the iptables dataplane on nodes whose programs write the kernel's older tables."""
    nodes = trial.nodes
    try:
        for node in nodes:
            trial.shell(node, "for p in iptables ip6tables; do"
                              " update-alternatives --set $p /usr/sbin/$p-legacy > /dev/null; done;"
                              " iptables -A INPUT -i lo -m comment --comment lab -j ACCEPT")  # fmt: skip
        with trial.configured(nodes, {"services": {"mode": "iptables"}}):
            count = trial.shell(NODE, "iptables-legacy-save -t nat | grep -c '^:KUBE-SVC'")
            yield trial.verdict("chains of services in the legacy tables", int(count) > 5, True)
            count = trial.shell(NODE, "iptables-nft-save -t nat 2>/dev/null | grep -c KUBE-SVC || true")
            yield trial.verdict("and in those of nftables", int(count), 0)
            yield trial.judged("services, node ports and load balancers", trial.cases("C", "D", "E"))
        count = trial.shell(NODE, "iptables-legacy-save | grep -c KUBE-SVC || true")
        yield trial.verdict("chains left after the way back to nftables", int(count), 0)
        yield trial.verdict(
            "the rule of the host's own", trial.shell(NODE, "iptables-legacy-save | grep -c lab"), "1"
        )
    finally:
        for node in nodes:
            trial.try_shell(node, "iptables-legacy -D INPUT -i lo -m comment --comment lab -j ACCEPT")
            trial.try_shell(node, "for p in iptables ip6tables; do update-alternatives --auto $p; done")


def _profile(node: Node) -> str:
    """Return NetworkManager's profile of a node's interface, with what networkd gives it."""
    lines = ["[connection]", "id=eth0", "type=ethernet", "interface-name=eth0", ""]
    for subnet in node.subnets:
        lines += [f"[ipv{subnet.family.value}]", "method=manual", f"gateway={node.gateway(subnet.family)}"]
        lines += [
            f"address1={subnet.interface(node.number)}",
            f"address2={subnet.interface(node.number + 100)}",
            "",
        ]
    return "\n".join(lines)


def _states(trial: Trial) -> dict[str, str]:
    """Return what NetworkManager says of each interface."""
    said = trial.try_shell(NODE, "nmcli -t -f DEVICE,STATE device")[1]
    return dict(line.split(":", 1) for line in said.splitlines() if ":" in line)
