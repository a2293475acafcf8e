"""What the L7 proxy lacks is named, and where no service asks for it nothing is looked at."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from netlink import netns
from netlink.family import Family
from netlink.requests import link_up
from netlink.rtnl import Rtnl
from node import l7_network
from node.doctor import l7
from node.doctor.findings import Severity
from node.doctor.l7 import MUCH, Observed, Process, judge
from node.doctor.view import Context, View
from proxy.l7.engine import Engine
from proxy.l7.model import Backend, Route, Server
from proxy.l7.places import PORT, RANGES, address
from proxy.l7.policy import Policy, Protocol
from proxy.l7.render import Settings
from proxy.l7.stats import process_of

FOUR = tuple(address(protocol, Family.V4, "shop/web") for protocol in Protocol)
BINDS = "".join(f"    bind {where}:{PORT}\n" for where in FOUR)
TRANSPARENT = "    source 0.0.0.0 usesrc clientip\n"
KEPT = frozenset(f"local route to {where}/32" for where in FOUR)
BACK = frozenset({"ip rule 113", "ip route of table 113", "table ip podwire_l7"})
OWN = tuple((address, PORT, "haproxy") for address in FOUR)
WORKER = Process(20, 10, 500, 1 << 20)
VERSION = "HAProxy version 2.6.12-1+deb12u2 2025/04/16 - https://haproxy.org/\n"
SAID = "Service shop/web: metadata.annotations['podwire.io/proxy']: retries.attempts: 99: plain balancing"
GOOD: dict[str, Any] = {
    "program": "/usr/sbin/haproxy",
    "version": VERSION,
    "workers": (WORKER,),
    "configuration": BINDS,
    "kept": KEPT,
    "listeners": OWN,
}
NOT_RUNNING: dict[str, Any] = {
    "workers": (),
    "configuration": "",
    "listeners": (),
    "problems": ("the L7 proxy does not do what services ask for: it does not start",),
}
TAKEN = "another program listens on the L7 proxy's port: 0.0.0.0:10000 (nginx)"
CASES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("all is well", {}, []),
    ("a later version", {"version": "HAProxy version 3.0.5 2024"}, []),
    ("no program", {"program": "", "version": ""}, ["the program haproxy is not installed"]),
    ("an old one", {"version": "HA-Proxy version 2.2.9"}, ["/usr/sbin/haproxy is version 2.2, and 2.6"]),
    ("something else", {"version": "hello"}, ["/usr/sbin/haproxy -v does not say its version"]),
    (
        "an address lost",
        {"kept": KEPT - {f"local route to {FOUR[1]}/32"}},
        [f"the L7 proxy's {FOUR[1]}/32 is not local"],
    ),
    ("not listening", {"listeners": OWN[:1]}, [f"does not listen on {FOUR[1]}:{PORT}"]),
    ("others on other ports", {"listeners": (*OWN, ("0.0.0.0", PORT + 1, "nginx"))}, []),
    ("it does not run", NOT_RUNNING, ["HAProxy does not run", NOT_RUNNING["problems"][0]]),
    (
        "as its port is taken",
        {**NOT_RUNNING, "listeners": (("0.0.0.0", PORT, "nginx"),)},
        ["HAProxy does not run", TAKEN, NOT_RUNNING["problems"][0]],
    ),
    ("a refused annotation", {"problems": (SAID,)}, [SAID]),
    ("transparent, and whole", {"configuration": BINDS + TRANSPARENT, "kept": KEPT | BACK}, []),
    (
        "transparent without a rule",
        {"configuration": BINDS + TRANSPARENT, "kept": KEPT | BACK - {"ip rule 113"}},
        ["the ip rule 113 is missing"],
    ),
    ("obstacles", {"obstacles": ("src_valid_mark is 1",)}, ["src_valid_mark is 1"]),
    ("old processes, small", {"workers": (WORKER, Process(21, 10, 400, MUCH - 1))}, []),
    (
        "old processes",
        {"workers": (Process(21, 10, 400, MUCH), WORKER, Process(22, 10, 450, 1 << 20))},
        ["2 old processes of HAProxy take 257 MB"],
    ),
    ("another port", {"configuration": BINDS.replace(str(PORT), "10009"), "listeners": tuple(
        (address, 10009, "haproxy") for address in FOUR)}, []),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_what_is_found(changes: dict[str, Any], expected: list[str]) -> None:
    found = judge(Observed(**{**GOOD, **changes}))
    assert not found.skipped
    assert len(found.findings) == len(expected)
    for finding, words in zip(found.findings, expected, strict=True):
        assert words in finding.sentence
        assert finding.remedy


def test_sentences_of_the_daemon_are_warnings_as_traffic_goes_on() -> None:
    [finding] = judge(Observed(**{**GOOD, "problems": (SAID,)})).findings
    assert finding.severity is Severity.WARNING


def test_both_families_are_looked_at_where_haproxy_listens_in_both() -> None:
    six = [address(protocol, Family.V6, "shop/web") for protocol in Protocol]
    text = BINDS + "".join(f"    bind [{where}]:{PORT} transparent\n" for where in six)
    found = judge(Observed(**{**GOOD, "configuration": text}))
    lost = [f.sentence for f in found.findings if "not local" in f.sentence]
    assert len(lost) == 2
    assert all(r[Family.V6] in sentence for r, sentence in zip(RANGES.values(), lost, strict=True))


def test_where_nothing_is_there_nothing_is_looked_at() -> None:
    assert judge(Observed()).skipped
    assert judge(Observed(program="/usr/sbin/haproxy", version=VERSION)).skipped


def test_addresses_without_haproxy_are_a_note() -> None:
    found = judge(Observed(**{**GOOD, "workers": (), "listeners": (), "configuration": ""}))
    assert not found.findings
    assert "right if no service asks for it" in found.notes[0]


def test_sentences_that_are_about_it_are_known() -> None:
    view = View("node1", problems=(SAID, "something else", "the L7 proxy is not there"))
    assert l7._sentences(view) == (SAID, "the L7 proxy is not there")


@contextlib.contextmanager
def haproxy(node: str, folder: Path, policy: Policy) -> Iterator[Engine]:
    """A HAProxy that serves one service, in a namespace."""
    engine = Engine(Settings(folder / "l7", threads=1))
    routes = (Route(Family.V4, "10.96.0.1", 80),)
    web = Backend("web", "shop/web", Family.V4, policy, routes, (Server("10.0.0.1", 80),))
    try:
        assert netns.run(node, engine.bring, {"web": web})
        yield engine
    finally:
        engine.stop()


def _prepare() -> None:
    with Rtnl() as rtnl:
        rtnl.commit(link_up(1))
    l7_network.ensure((Family.V4,), transparent=False)


def _lose() -> None:
    subprocess.run(f"ip route delete local {FOUR[0]}/32 dev lo table local".split(), check=True)


def test_a_real_haproxy_is_found_with_what_it_needs(namespaces: Callable[[], str], tmp_path: Path) -> None:
    node = namespaces()
    netns.run(node, _prepare)
    with haproxy(node, tmp_path, Policy(protocol=Protocol.TCP)) as engine:
        seen = netns.run(node, l7.look, Context())
        [worker] = seen.workers
        assert process_of(engine.ask("show info")) == worker.number
        assert worker.memory > 1 << 20
        assert (seen.families, seen.port, seen.transparent) == ((Family.V4,), PORT, False)
        assert set(OWN[1:]) <= set(seen.listeners)
        assert seen.kept == KEPT
        found = netns.run(node, l7.check, Context())
        assert (found.findings, found.notes, found.skipped) == ((), (), "")
        netns.run(node, _lose)
        [finding] = netns.run(node, l7.check, Context()).findings
        assert FOUR[0] in finding.sentence
    assert netns.run(namespaces(), l7.check, Context()).skipped  # another namespace is another node


def test_what_a_transparent_service_lacks_is_found(namespaces: Callable[[], str], tmp_path: Path) -> None:
    node = namespaces()
    netns.run(node, _prepare)
    with haproxy(node, tmp_path, Policy(transparent=True)):
        lost = {f.sentence.split(" is missing")[0] for f in netns.run(node, l7.check, Context()).findings}
        assert lost == {f"the {part}" for part in BACK}
        netns.run(node, l7_network.ensure, (Family.V4,), transparent=True)
        assert netns.run(node, l7.check, Context()).findings == ()
