"""A node that kube-proxy has left, and others live on: tables of iptables as they would be there.

Lines of THEIRS stay, lines of KUBE_PROXY go; both in the order in which programs have put them in.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from netlink import netns
from netlink.family import Family
from netlink.xtables import Variant
from tests.node.world import wait_until

SVC, SEP, EXT = "KUBE-SVC-NPX46M4PTMTKRN6Y", "KUBE-SEP-QHNBUIKLMXRGWQTB", "KUBE-EXT-CG5I4G2RS3ZVWGLK"
FW, SVL = "KUBE-FW-CG5I4G2RS3ZVWGLK", "KUBE-SVL-CG5I4G2RS3ZVWGLK"


@dataclass(frozen=True, slots=True)
class Addresses:
    """What differs between the families."""

    cluster: str
    service: str
    endpoint: str
    bits: int


ADDRESSES = {
    Family.V4: Addresses("10.244.0.0/16", "10.96.0.1", "10.244.2.10", 32),
    Family.V6: Addresses("fd00:244::/56", "fd00:96::1", "fd00:244:0:2::10", 128),
}

# Each line begins with who has it: "=" is somebody else's, "-" is kube-proxy's.
_RULES = r"""
*nat
=:DOCKER - [0:0]
=:CNI-HOSTPORT-DNAT - [0:0]
=:MINE - [0:0]
-:KUBE-SERVICES - [0:0]
-:KUBE-NODEPORTS - [0:0]
-:KUBE-POSTROUTING - [0:0]
-:KUBE-MARK-MASQ - [0:0]
-:KUBE-PROXY-CANARY - [0:0]
-:{svc} - [0:0]
-:{sep} - [0:0]
-:{ext} - [0:0]
-:{svl} - [0:0]
=:KUBE-MARK-DROP - [0:0]
=:KUBE-KUBELET-CANARY - [0:0]
=:KUBE-SERVICES-OF-MINE - [0:0]
-A PREROUTING {note} "kubernetes service portals" -j KUBE-SERVICES
=A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
=A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
=A PREROUTING -p tcp {note} "say \"-j KUBE-SERVICES\", it's \\ fine" -j MINE
-A OUTPUT {note} "kubernetes service portals" -j KUBE-SERVICES
=A OUTPUT -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING {note} "kubernetes postrouting rules" -j KUBE-POSTROUTING
=A POSTROUTING -s {cluster} {note} "mine, not for KUBE-POSTROUTING" -j MASQUERADE
=A KUBE-MARK-DROP -j MARK --set-xmark 0x8000/0x8000
-A KUBE-SERVICES -d {service}/{bits} -p tcp {note} "default/kubernetes:https" -m tcp --dport 443 -j {svc}
-A KUBE-SERVICES {note} "kubernetes service nodeports; NOTE" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp {note} "shop/web" -m tcp --dport 30080 -j {ext}
-A {ext} -s {cluster} {note} "pod traffic for shop/web" -j {svc}
-A {ext} {note} "masquerade LOCAL traffic" -m addrtype --src-type LOCAL -j KUBE-MARK-MASQ
-A {ext} -j {svl}
-A {svc} ! -s {cluster} -d {service}/{bits} -p tcp -m tcp --dport 443 -j KUBE-MARK-MASQ
-A {svc} {note} "half" -m statistic --mode random --probability 0.50000000000 -j {sep}
-A {svc} -j {sep}
-A {sep} -s {endpoint}/{bits} -j KUBE-MARK-MASQ
-A {sep} -p tcp -m tcp -j DNAT --to-destination {to}
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING {note} "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
=A DOCKER -i docker0 -j RETURN
=A MINE -j RETURN
COMMIT
*filter
=:DOCKER-USER - [0:0]
=:KUBE-FIREWALL - [0:0]
=:KUBE-KUBELET-CANARY - [0:0]
=:KUBE-ROUTER-INPUT - [0:0]
=:KUBE-POD-FW-ABCDEFGHIJKLMNOP - [0:0]
=:KUBE-NWPLCY-ABCDEFGHIJKLMNOP - [0:0]
-:KUBE-FORWARD - [0:0]
-:KUBE-SERVICES - [0:0]
-:KUBE-EXTERNAL-SERVICES - [0:0]
-:KUBE-NODEPORTS - [0:0]
-:KUBE-PROXY-FIREWALL - [0:0]
-:KUBE-PROXY-CANARY - [0:0]
-:{fw} - [0:0]
=A INPUT {note} "kube-router netpol" -j KUBE-ROUTER-INPUT
-A INPUT {new} {note} "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A INPUT {note} "kubernetes health check service ports" -j KUBE-NODEPORTS
-A INPUT {new} {note} "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
=A INPUT -j KUBE-FIREWALL
-A FORWARD {new} {note} "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A FORWARD {note} "kubernetes forwarding rules" -j KUBE-FORWARD
-A FORWARD {new} {note} "kubernetes service portals" -j KUBE-SERVICES
=A FORWARD -j DOCKER-USER
-A FORWARD {new} {note} "kubernetes service portals" -j KUBE-SERVICES
=A FORWARD -s {cluster} -j ACCEPT
-A OUTPUT {new} {note} "kubernetes service portals" -j KUBE-SERVICES
=A OUTPUT -j KUBE-FIREWALL
=A DOCKER-USER -j RETURN
=A KUBE-FIREWALL {note} "block incoming localnet connections" -m conntrack ! --ctstate RELATED -j DROP
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD {note} "kubernetes forwarding rules" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-PROXY-FIREWALL -d {service}/{bits} -p tcp -m tcp --dport 443 -j {fw}
-A {fw} -j DROP
-A KUBE-SERVICES -d {service}/{bits} -p tcp -m tcp --dport 80 -j REJECT
=A KUBE-ROUTER-INPUT -d {service}/{bits} -j RETURN
=A KUBE-POD-FW-ABCDEFGHIJKLMNOP -j KUBE-NWPLCY-ABCDEFGHIJKLMNOP
COMMIT
*mangle
=:KUBE-IPTABLES-HINT - [0:0]
=:KUBE-KUBELET-CANARY - [0:0]
-:KUBE-PROXY-CANARY - [0:0]
COMMIT
*raw
=A PREROUTING -s {cluster} -p udp -j NOTRACK
COMMIT
"""

CHAINS = {
    "nat": {"KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-MARK-MASQ", "KUBE-PROXY-CANARY"}
    | {SVC, SEP, EXT, SVL},
    "filter": {"KUBE-FORWARD", "KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES", "KUBE-NODEPORTS"}
    | {"KUBE-PROXY-FIREWALL", "KUBE-PROXY-CANARY", FW},
    "mangle": {"KUBE-PROXY-CANARY"},
}
JUMPS = {"nat": 3, "filter": 8, "mangle": 0}
"""The rules of built-in chains that lead to kube-proxy's."""
EVERYWHERE = tuple(product(Variant, Family))


def rules(family: Family, *, kube_proxys: bool = True) -> str:
    """Return the input of iptables-restore for a family, with kube-proxy's part or without."""
    a = ADDRESSES[family]
    to = f"[{a.endpoint}]:6443" if family is Family.V6 else f"{a.endpoint}:6443"
    lines = []
    for line in _RULES.strip().splitlines():
        if line[0] == "-" and not kube_proxys:
            continue
        lines.append(re.sub(r"^[-=]", "-" if line[1] == "A" else "", line) if line[0] in "-=" else line)
    return ("\n".join(lines) + "\n").format(
        note="-m comment --comment",
        new="-m conntrack --ctstate NEW",
        svc=SVC,
        sep=SEP,
        ext=EXT,
        svl=SVL,
        fw=FW,
        to=to,
        cluster=a.cluster,
        service=a.service,
        endpoint=a.endpoint,
        bits=a.bits,
    )


def load(variant: Variant, family: Family, text: str) -> None:
    """Put rules into the tables of this namespace, to what is there."""
    words = [variant.program(family, "restore"), "--noflush", "--wait=10"]
    subprocess.run(words, input=text, text=True, check=True, capture_output=True)


def saved(variant: Variant, family: Family) -> str:
    """Return the tables of this namespace as iptables-save prints them, without times and counters."""
    words = [variant.program(family, "save")]
    text = subprocess.run(words, text=True, check=True, capture_output=True).stdout
    return "\n".join(
        re.sub(r"\[\d+:\d+\]", "[0:0]", line) for line in text.splitlines() if not line.startswith("#")
    )


def load_everywhere() -> None:
    """Load the rules in both variants and families."""
    for variant, family in EVERYWHERE:
        load(variant, family, rules(family))


def saved_everywhere() -> dict[tuple[Variant, Family], str]:
    """Return all tables of this namespace, and nothing of times and counters."""
    return {where: saved(*where) for where in EVERYWHERE}


def ruleset() -> str:
    """Return all of nftables in this namespace, without counters."""
    text = subprocess.run(["nft", "list", "ruleset"], text=True, check=True, capture_output=True).stdout
    return re.sub(r"packets \d+ bytes \d+", "", text)


@contextlib.contextmanager
def running_in(namespace: str, folder: Path) -> Iterator[int]:
    """Let a process named kube-proxy run in a namespace; yield its id."""
    program = folder / "kube-proxy"
    shutil.copy(shutil.which("sleep") or "", program)
    with netns.run(namespace, lambda: subprocess.Popen([program, "60"])) as process:
        try:
            comm = Path(f"/proc/{process.pid}/comm")  # exec returns to the parent before it sets the name
            wait_until(lambda: comm.read_text() == "kube-proxy\n", "a process named kube-proxy")
            yield process.pid
        finally:
            process.kill()
