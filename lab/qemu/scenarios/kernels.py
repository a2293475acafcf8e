"""The oldest kernel that podwire supports, and Debian's newest."""

from __future__ import annotations

from collections.abc import Iterator

from lab.qemu.scenarios.base import Trial, Verdict


def kernel(trial: Trial) -> Iterator[Verdict]:
    """Run the lab's own cases, and look at what each node's doctor says of the kernel."""
    release = trial.shell("node1", "uname -r")
    code, said = trial.try_shell("node1", "podwire doctor --check kernel")
    yield trial.verdict(
        f"podwire doctor, kernel {release}", said.splitlines()[-1] if code else "", "", code == 0
    )
    yield trial.judged(f"all cases of the demo, kernel {release}", trial.cases(*"ABCDEFI"))
