"""A lab without daemons: a network and a directory, for what needs no more."""

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import network, state
from lab.state import Lab
from lab.topology import IpFamily, Mode, plan

numbers = itertools.count()


@pytest.fixture
def make_lab(tmp_path: Path) -> Iterator[Callable[[], Lab]]:
    """Return a function that builds one more bare lab; all are taken down at the end."""
    root, made = tmp_path / "labs", []

    def make() -> Lab:
        made.append(f"t{os.getpid()}x{next(numbers)}")
        lab = Lab(plan(made[-1], 2, 0, Mode.ROUTED, IpFamily.DUAL), state.directory(made[-1], root))
        lab.manifests.mkdir(parents=True)
        network.build(lab.plan)
        state.save(lab)
        return lab

    try:
        yield make
    finally:
        for name in made:
            network.remove(name, root)
