"""All scenarios by name, and how they are run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict

from lab.qemu import cache, driver
from lab.qemu.scenarios import kernels, modules, neighbours, reboot, sandboxes, units
from lab.qemu.scenarios.base import Trial, Verdict
from lab.table import aligned
from lab.topology import Driver, IpFamily, LabError, apart
from lab.topology import plan as lab_plan
from lab.world import NODES, World, deploy

Scenario = Callable[[Trial], Iterator[Verdict]]

SHARED: dict[str, Scenario] = {
    "boot": units.boot,
    "kill": units.kill,
    "watchdog": units.watchdog,
    "upgrade": units.upgrade,
    "reboot": reboot.reboot,
    "containerd": sandboxes.containerd,
    "leftovers": modules.leftovers,
    "ipvs": modules.ipvs,
    "wireguard": modules.wireguard,
    "legacy": neighbours.legacy,
    "firewalld": neighbours.firewalld,
    "networkmanager": neighbours.network_manager,
}
"""Those that one lab serves, one after the other."""

OWN = {"old-kernel": "old", "new-kernel": "backports"}
"""Those that need a lab of their own, by the kernel that its machines boot."""

NAMES = (*SHARED, *OWN)


def run(world: World, name: str) -> list[Verdict]:
    """Run a scenario in a lab; what goes wrong in it is a verdict, too."""
    trial = Trial(name, world)
    found: list[Verdict] = []
    try:
        found += SHARED[name](trial) if name in SHARED else kernels.kernel(trial)
    except (LabError, OSError, ValueError) as error:
        found.append(trial.verdict("it ran to its end", error, "it does", False))
    return found


def render(verdicts: Sequence[Verdict]) -> str:
    """Return verdicts as a table, and their count."""
    lines = [("scenario", "what", "saw", "expected", "verdict")]
    lines += [(v.scenario, v.what, v.saw, v.expected, "ok" if v.passed else "FAILED") for v in verdicts]
    return "\n".join(
        [*aligned(lines), "", f"{sum(v.passed for v in verdicts)} of {len(verdicts)} as expected"]
    )


def render_json(verdicts: Sequence[Verdict]) -> str:
    """Return verdicts as a JSON list of objects."""
    return json.dumps([asdict(verdict) for verdict in verdicts], indent=2)


def main(lab_name: str, names: Sequence[str], keep: bool, as_json: bool) -> int:
    """Make labs, run scenarios in them, and print the verdicts; 1 when any was not as expected.

    Raises LabError for a name that there is none of, and when a lab cannot be made.
    """
    for name in names:
        if name not in NAMES:
            raise LabError(f"scenario {name!r} is none of {', '.join(NAMES)}")
    chosen = [name for name in NAMES if not names or name in names]
    shared = [name for name in chosen if name in SHARED]
    labs = [("stable", shared)] if shared else []
    labs += [(OWN[name], [name]) for name in chosen if name in OWN]
    found: list[Verdict] = []
    for kernel, here in labs:
        plan = apart(lab_plan(lab_name, NODES, ip_family=IpFamily.DUAL), Driver.QEMU)
        with ExitStack() as undo:
            lab = driver.up(plan, kernel=kernel)
            undo.callback(driver.remove, lab_name)
            with cache.step(driver.tell, "sample deployed"):
                world = deploy(lab)
            for name in here:
                with cache.step(driver.tell, f"scenario {name}"):
                    verdicts = run(world, name)
                for verdict in verdicts:
                    driver.tell(
                        f"{'ok' if verdict.passed else 'FAILED'}: {name}: {verdict.what}: {verdict.saw}"
                    )
                found += verdicts
            if keep and kernel == "stable":
                undo.pop_all()
    print(render_json(found) if as_json else render(found))
    return 0 if all(verdict.passed for verdict in found) else 1
