"""What scenarios are made of."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lab import checks, controller, runtime
from lab.cases import CASES, Case, Row
from lab.qemu import driver
from lab.topology import LabError
from lab.world import NODE_PORT, TWIN, TWIN_SECOND_PORT, World, serve_host

COMMAND_SECONDS = 120.0
CONFIG = Path("/etc/podwire/config.yaml")
KEPT = CONFIG.with_suffix(".kept")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One thing that a scenario found."""

    scenario: str
    what: str
    saw: str
    expected: str
    passed: bool


@dataclass(frozen=True, slots=True)
class Trial:
    """A scenario at work in a lab: `world` is the lab with the sample deployed."""

    name: str
    world: World

    def verdict(self, what: str, saw: object, expected: object, passed: bool | None = None) -> Verdict:
        """Return a verdict; without `passed` what was seen has to be what was expected."""
        return Verdict(
            self.name, what, str(saw), str(expected), saw == expected if passed is None else passed
        )

    def shell(self, place: str, script: str, seconds: float = COMMAND_SECONDS) -> str:
        """Run a shell script on a machine and return what it printed. Raises LabError when it fails."""
        code, said = self.try_shell(place, script, seconds)
        if code:
            raise LabError(f"on {place} `{script}` failed with status {code}: {said[-500:]}")
        return said

    def try_shell(self, place: str, script: str, seconds: float = COMMAND_SECONDS) -> tuple[int, str]:
        """Run a shell script on a machine; return its exit status and what it printed."""
        return self.world.lab.call(place, shell, script, seconds)

    def wait(self, what: str, condition: Callable[[], bool], seconds: float = COMMAND_SECONDS) -> float:
        """Wait until a condition holds; return how long it took (seconds). Raises LabError."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > seconds:
                raise LabError(f"not within {seconds:.0f} s: {what}")
            time.sleep(0.3)
        return time.monotonic() - began

    def cases(self, *names: str, only: Callable[[Case], bool] = lambda _: True) -> list[Row]:
        """Run the lab's cases of these scenarios (A to I), but for those that are about the whole demo."""
        chosen = [case for case in CASES if case.scenario in names and not case.last and only(case)]
        return checks.run(self.world, chosen)

    def judged(self, what: str, rows: list[Row]) -> Verdict:
        """Return one verdict about cases; of those that failed the first two are told."""
        failed = [row for row in rows if not row.passed]
        saw = f"{len(rows) - len(failed)} of {len(rows)}"
        for r in failed[:2]:
            what_failed = f"{r.scenario} {r.family} {r.source} to {r.to} by {r.via}"
            saw += f"; {what_failed}: {r.saw or 'nothing'}, not {r.expected}"
        return self.verdict(what, saw, f"{len(rows)} of {len(rows)}", not failed)

    @property
    def nodes(self) -> list[str]:
        """The names of the nodes."""
        return [node.name for node in self.world.lab.plan.nodes]

    @contextmanager
    def configured(self, places: list[str], changes: dict[str, dict[str, object]]) -> Iterator[None]:
        """Have the daemons of these nodes run with another configuration during a block."""
        try:
            for place in places:
                self.world.lab.call(place, change_config, changes)
            self.restart(places)
            yield
        finally:
            for place in places:
                self.world.lab.call(place, restore_config)
            self.restart(places)

    def restart(self, places: list[str]) -> None:
        """Restart daemons, one after the other, and wait until they are ready."""
        for place in places:
            self.shell(place, "systemctl restart podwire")
            driver.wait_ready(self.world.lab, place)

    def pods_on(self, node: str) -> list[runtime.Pod]:
        """Return the pods of a node."""
        return [pod for pod in runtime.pods(self.world.lab) if pod.spec.node == node]

    def replace_pods(self, node: str) -> None:
        """Make the pods and servers of a node anew, as kubelet does after a boot: all of them are gone."""
        lab = self.world.lab
        gone = self.pods_on(node)
        for pod in gone:
            controller.remove(lab, pod)
        for pod in controller.run(lab, [pod.spec for pod in gone]):
            self.world.pods[pod.spec.name] = pod
            if pod.spec == TWIN:
                runtime.serve(lab, pod, [TWIN_SECOND_PORT])
        serve_host(lab, node, NODE_PORT)


def shell(script: str, seconds: float) -> tuple[int, str]:
    """Run a shell script on this machine; return its exit status and output. Status 124: it took too long."""
    try:
        done = subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return 124, f"not done after {seconds:.0f} s"
    return done.returncode, (done.stdout + done.stderr).strip()


def change_config(changes: dict[str, dict[str, object]]) -> None:
    """Change sections of this node's configuration, and keep what was there."""
    if not KEPT.exists():
        KEPT.write_text(CONFIG.read_text())
    document = json.loads(KEPT.read_text())
    for section, values in changes.items():
        document[section] = {**document.get(section, {}), **values}
    CONFIG.write_text(json.dumps(document, indent=2))


def restore_config() -> None:
    """Put back the configuration that was there before, if it was changed."""
    if KEPT.exists():
        KEPT.replace(CONFIG)
