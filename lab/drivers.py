"""What makes a lab's hosts: one module for each kind of them, with the same functions."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from lab import state
from lab.state import Lab
from lab.topology import Driver, LabError, Topology

MODULES = {Driver.NETNS: "lab.network", Driver.QEMU: "lab.qemu.driver"}


class Hosts(Protocol):
    """What each of the modules does."""

    def up(self, plan: Topology, root: Path = state.ROOT) -> Lab:
        """Make a lab and return when its daemons are ready. Raises LabError."""

    def remove(self, name: str, root: Path = state.ROOT) -> bool:
        """Take down what is left of a lab; return whether there was anything."""

    def pid(self, lab: Lab, node: str) -> int | None:
        """Return the pid of a node's daemon; None when it does not run."""

    def log(self, lab: Lab, node: str) -> str:
        """Return what a node's daemon wrote."""

    def execute(self, lab: Lab, place: str, namespace: str, command: list[str]) -> int:
        """Run a command at a place with our standard streams; return its exit status."""


def of(driver: Driver) -> Hosts:
    """Return what makes hosts of a kind."""
    return cast(Hosts, import_module(MODULES[driver]))


def remove(name: str, root: Path = state.ROOT) -> bool:
    """Take down what is left of a lab of any kind, whole or half-made; return whether there was anything."""
    try:
        driver = state.load(name, root).plan.driver
    except LabError:  # half-made: what it would be made of is not written
        driver = Driver.QEMU if (state.directory(name, root) / "machines").exists() else Driver.NETNS
    return of(driver).remove(name, root)
