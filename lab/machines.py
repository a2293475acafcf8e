"""The machines that a lab's hosts are on: this one for all, or each its own.

Whatever a lab does at a place is a function that runs on the place's machine and is told the place's network
namespace: `call(machine, function, namespace, …)`. Where all are namespaces of this machine that is a plain
call; of virtual machines an agent there makes it (`lab.remote`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

OWN = "/proc/thread-self/ns/net"
"""The namespace of a host that is a machine of its own, as a path: where the call arrives."""


class Machines(Protocol):
    """Where a lab's functions run."""

    def call(self, machine: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function of a module on a machine; return or raise what it does.

        Raises LabError when the machine does not answer.
        """

    def close(self) -> None:
        """Let go of what calls need; another call takes it up again."""


@dataclass(frozen=True, slots=True)
class Here:
    """All of them are here."""

    def call(self, machine: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the function."""
        return function(*args, **kwargs)

    def close(self) -> None:
        """Nothing is needed."""
