"""Fixtures that every test may use: network namespaces that are gone afterwards."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import pytest

from netlink import netns

# Assertions in helpers say what differs, as those in tests do.
pytest.register_assert_rewrite("tests.cni.world", "tests.cni.endurance", "tests.netlink.nft")

_numbers = itertools.count()


@pytest.fixture(scope="session", autouse=True)
def _root() -> None:
    if os.geteuid() != 0:
        pytest.exit("the tests make network namespaces and need root: sudo make test", returncode=1)


@pytest.fixture(scope="module")
def namespaces() -> Iterator[Callable[[], str]]:
    """A function that makes a network namespace and returns its name."""
    made: list[str] = []

    def make() -> str:
        name = f"pwtest-{os.getpid()}-{next(_numbers)}"
        netns.create(name)
        made.append(name)
        return name

    yield make
    for name in made:
        netns.delete(name)
