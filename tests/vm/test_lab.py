"""The lab on virtual machines, as `make vm-lab` has it, and what its scenarios say of a unit and a boot."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from lab import checks, state
from lab.cases import CASES
from lab.qemu import driver
from lab.qemu.scenarios import catalogue
from lab.topology import Driver, IpFamily, apart, plan
from lab.world import NODES, World, deploy

NAME = f"ci{os.getpid()}"
TIMED = ("services reached after its boot", "its start")
"""Verdicts about time: for a machine that has no other work."""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A lab with the sample; nothing of it is left afterwards."""
    lab = driver.up(apart(plan(NAME, NODES, ip_family=IpFamily.DUAL), Driver.QEMU))
    try:
        yield deploy(lab)
    finally:
        lab.machines.close()
        driver.remove(NAME)
        assert not state.directory(NAME).exists()
        assert (
            subprocess.run(
                ["pgrep", "-f", "--", f"-name podwire-{NAME}-"], check=False, capture_output=True
            ).stdout
            == b""
        )


def test_pods_and_services_work_between_machines(world: World) -> None:
    """One case of each kind: pods, services, node ports, balancers, the outside, the L7 proxy."""
    kinds = {(case.scenario, case.check, case.way.partition("/")[0], case.udp): case for case in CASES}
    rows = checks.run(world, list(kinds.values()))
    assert len(rows) > 40
    assert [row for row in rows if not row.passed] == []


def test_commands_reach_its_places(world: World) -> None:
    words = [sys.executable, "-m", "cli.main", "lab", "exec", "--name", NAME, "customer", "--"]
    address, port = world.services[world.family]["summary"]
    done = subprocess.run(
        [*words, "curl", "-s", f"http://{address}:{port}/"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "summary-" in done.stdout


@pytest.mark.parametrize("scenario", ["boot", "kill", "reboot"])
def test_a_scenario_is_as_expected(world: World, scenario: str) -> None:
    verdicts = catalogue.run(world, scenario)
    assert verdicts
    assert [v for v in verdicts if not v.passed and v.what not in TIMED] == []
