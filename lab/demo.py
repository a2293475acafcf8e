"""Make a lab, run all scenarios on it, and say what came of them."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from lab import drivers, state
from lab.cases import Row
from lab.checks import run
from lab.state import Lab
from lab.table import aligned
from lab.topology import ProxyMode, Topology
from lab.world import World, deploy
from netlink.family import with_port


def demo(plan: Topology, keep: bool, as_json: bool, root: Path = state.ROOT) -> int:
    """Make a lab, run every case on it, print the verdicts, take it down; 1 when any case failed.

    Progress goes to stderr, the table (or JSON) to stdout. With `keep` the lab stays.
    """
    clock = _Progress()
    with ExitStack() as undo:
        hosts = drivers.of(plan.driver)
        lab = hosts.up(plan, root)
        undo.callback(hosts.remove, plan.name, root)
        clock.say(f"{len(plan.nodes)} nodes up, {plan.about}")
        world = deploy(lab)
        clock.say(f"{len(world.pods)} pods and {len(world.services[world.family])} services up")
        rows = run(world)
        clock.say(f"{len(rows)} cases run")
        print(render_json(rows) if as_json else render(rows))
        failed = not all(row.passed for row in rows)
        if failed:
            _explain(lab, rows, keep)
        if keep:
            undo.pop_all()
            print(hints(world), file=sys.stderr)
    if not keep:
        clock.say("lab taken down")
    return 1 if failed else 0


def render(rows: Sequence[Row]) -> str:
    """Return the table of verdicts, then the paths, then the count."""
    lines = [("", "", "from", "to", "via", "address seen", "expected", "verdict")]
    lines += [
        (r.scenario, r.family, r.source, r.to, r.via, r.saw, r.expected, "ok" if r.passed else "FAILED")
        for r in rows
    ]
    table = aligned(lines)
    for row in rows:
        if row.path:
            table += ["", f"The way from {row.source} to {row.to} by {row.via}, and back:"]
            table += [f"  {hop}" for hop in row.path]
    return "\n".join([*table, "", f"{sum(row.passed for row in rows)} of {len(rows)} as expected"])


def render_json(rows: Sequence[Row]) -> str:
    """Return the rows as a JSON list of objects."""
    return json.dumps(
        [
            {
                "scenario": row.scenario,
                "family": row.family,
                "from": row.source,
                "to": row.to,
                "via": row.via,
                "saw": row.saw,
                "expected": row.expected,
                "verdict": "ok" if row.passed else "failed",
                "path": list(row.path),
            }
            for row in rows
        ],
        indent=2,
    )


def hints(world: World) -> str:
    """Return what to try in a lab that is kept, as commands that work as printed."""
    name = world.lab.plan.name
    exec_ = f"podwire lab exec --name {name}"
    seen = [world.of(family) for family in world.lab.plan.families]
    return "\n".join(
        [
            f"lab: {name} is kept. To try:",
            f"  podwire lab status --name {name}",
            *(f"  {exec_} customer -- curl -s {_url(*w.services[w.family]['summary'])}" for w in seen),
            *(f"  {exec_} client -- curl -s {_url(w.address('node2'), 30180)}" for w in seen),
            *(f"  {exec_} client -- curl -s {_url(*w.balancers[w.family]['front-local'])}" for w in seen),
            *(f"  {exec_} node1 -- {_rules(w)}" for w in seen),
            f"  podwire trace --lab {name} yaobank/customer yaobank/summary",
            f"  {exec_} node1 -- podwire status --socket {world.lab.socket('node1')}",
            f"  {exec_} node1 -- podwire routes --socket {world.lab.socket('node1')}",
            f"  podwire lab pod run --name {name} --node node3 --namespace yaobank"
            " --label app=summary --serve 80 summary-3",
            f"  podwire lab down --name {name}",
        ]
    )


def _rules(world: World) -> str:
    """Return what lists the rules of services in one family."""
    keyword = world.family.keyword
    if world.lab.plan.proxy_mode is ProxyMode.IPTABLES:
        return f"{keyword}tables -t nat -n -L KUBE-SERVICES"
    return f"nft list table {keyword} podwire"


def _url(address: str, port: int) -> str:
    """Return a URL that a shell takes as it is, brackets and all."""
    url = f"http://{with_port(address, port)}"
    return f"-g '{url}'" if ":" in address else url


class _Progress:
    """Lines on stderr with the seconds since the one before."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def say(self, what: str) -> None:
        now = time.monotonic()
        print(f"lab: {what} ({now - self._last:.1f} s)", file=sys.stderr, flush=True)
        self._last = now


def _explain(lab: Lab, rows: Iterable[Row], keep: bool) -> None:
    """Say on stderr what each failure was, and where the daemons' logs are: beyond the lab's life."""
    for row in rows:
        if not row.passed:
            what = f"{row.scenario} {row.family}: {row.source} to {row.to} by {row.via}"
            print(f"lab: {what}: expected {row.expected}, saw {row.saw or 'nothing'}", file=sys.stderr)
    logs = lab.root
    if not keep or lab.apart:
        logs = Path(tempfile.mkdtemp(prefix=f"podwire-lab-{lab.plan.name}-"))
        for node in lab.plan.nodes:
            (logs / f"{node.name}.log").write_text(drivers.of(lab.plan.driver).log(lab, node.name))
    print(f"lab: the daemons' logs are in {logs}", file=sys.stderr)
