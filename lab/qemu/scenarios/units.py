"""The daemon as a unit of systemd: at boot, killed, stuck, and replaced by another version."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from lab.qemu import driver
from lab.qemu.scenarios.base import Trial, Verdict
from lab.stream import Outcome, streaming

NODE = "node2"
UNIT = "podwire"
EXPOSURE = 3.9
WATCHDOG_SECONDS = 20
DROP_IN = f"/run/systemd/system/{UNIT}.service.d"


@dataclass(slots=True)
class Traffic:
    """Streams through everything that the daemon keeps: node ports, services from pods, the proxy's."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def verdicts(self, trial: Trial, when: str) -> Iterator[Verdict]:
        """Yield what came of each stream."""
        for way, outcome in self.outcomes.items():
            saw = str(outcome)
            yield trial.verdict(
                f"{way} {when}", saw, "none failed", not outcome.failures and outcome.count > 0
            )


@contextmanager
def traffic(trial: Trial) -> Iterator[Traffic]:
    """Ask all through a block: from outside by a node port, and from the node's pod by services."""
    world, found = trial.world, Traffic()
    ways = {"client by node port": ("client", (world.address(NODE), 30180))}
    for family in world.lab.plan.families:
        service = world.services[family]["customer"]
        ways[f"summary-1 by IPv{family.value} service"] = ("summary-1", service)
    ways["summary-1 by the L7 proxy"] = ("summary-1", world.services[world.family]["database-l7"])
    with ExitStack() as streams:
        for way, (place, target) in ways.items():
            found.outcomes[way] = streams.enter_context(streaming(world, place, target, 0.3))
        yield found


def boot(trial: Trial) -> Iterator[Verdict]:
    """Look at a node after its boot."""
    said = trial.shell(NODE, f"systemctl is-active {UNIT}; systemctl is-enabled {UNIT}")
    yield trial.verdict("the unit", said.split(), ["active", "enabled"])
    yield trial.verdict("failed units", trial.shell(NODE, "systemctl --failed --plain --no-legend"), "")
    yield trial.verdict("the conflist", trial.shell(NODE, "ls /etc/cni/net.d"), "10-podwire.conflist")
    code, said = trial.try_shell(NODE, "podwire status")
    yield trial.verdict("podwire status", f"status {code}" + (f": {said[-200:]}" if code else ""), "status 0")
    took = trial.shell(
        NODE,
        "a=$(systemctl show -P InactiveExitTimestampMonotonic podwire);"
        "b=$(systemctl show -P ActiveEnterTimestampMonotonic podwire); echo $(((b - a) / 100000))",
    )
    seconds = int(took) / 10
    yield trial.verdict("its start", f"{seconds} s", "below 60 s", seconds < 60)
    said = trial.shell(NODE, f"systemd-analyze security --no-pager {UNIT}.service | tail -1")
    exposure = float(next(word for word in said.split() if word.replace(".", "").isdigit()))
    yield trial.verdict("exposure", exposure, f"at most {EXPOSURE}", exposure <= EXPOSURE)


def kill(trial: Trial) -> Iterator[Verdict]:
    """Kill the daemon without a warning: systemd starts it again, and no request notices."""
    before, lab = driver.pid(trial.world.lab, NODE), trial.world.lab
    with traffic(trial) as streams:
        trial.shell(NODE, f"systemctl kill --signal=KILL --kill-who=main {UNIT}")
        took = trial.wait("another daemon runs", lambda: driver.pid(lab, NODE) not in (None, before))
        driver.wait_ready(lab, NODE)
    yield trial.verdict("systemd starts another", f"after {took:.0f} s", "at once", took < 60)
    yield from streams.verdicts(trial, "meanwhile")
    yield trial.verdict(
        "restarts counted", trial.shell(NODE, f"systemctl show -P NRestarts {UNIT}") != "0", True
    )


def watchdog(trial: Trial) -> Iterator[Verdict]:
    """Stop the daemon without ending it: the watchdog notices, and no request does."""
    lab = trial.world.lab
    drop_in = f"[Service]\\nWatchdogSec={WATCHDOG_SECONDS}s\\nTimeoutAbortSec=5s\\n"
    trial.shell(
        NODE, f"mkdir -p {DROP_IN}; printf '{drop_in}' > {DROP_IN}/watchdog.conf; systemctl daemon-reload"
    )
    try:
        trial.restart([NODE])
        before = driver.pid(lab, NODE)
        with traffic(trial) as streams:
            trial.shell(NODE, f"kill -STOP {before}")
            trial.wait("another daemon runs", lambda: driver.pid(lab, NODE) not in (None, before))
            driver.wait_ready(lab, NODE)
        said = trial.shell(
            NODE, f"journalctl --unit={UNIT} --no-pager --output=cat | grep -c 'Watchdog timeout'"
        )
        yield trial.verdict("the watchdog", int(said) > 0, True)
        yield from streams.verdicts(trial, "meanwhile")
    finally:
        trial.shell(NODE, f"rm -rf {DROP_IN}; systemctl daemon-reload")
        trial.restart([NODE])


def upgrade(trial: Trial) -> Iterator[Verdict]:
    """Replace podwire as the documentation says, by itself, and restart: no request notices."""
    before = driver.pid(trial.world.lab, NODE)
    with traffic(trial) as streams:
        trial.shell(NODE, "/opt/podwire/bin/pip install -q --no-index --no-deps --force-reinstall"
                          " /usr/share/podwire/podwire-*.whl", 300)  # fmt: skip
        trial.shell(NODE, "/opt/podwire/bin/podwire install --host-root / --no-conflist")
        trial.restart([NODE])
    after = driver.pid(trial.world.lab, NODE)
    yield trial.verdict("another daemon runs", after not in (None, before), True)
    yield from streams.verdicts(trial, "meanwhile")
    rows = trial.cases("B")
    yield trial.judged("pod to pod afterwards", rows)
