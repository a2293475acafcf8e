"""A node as a runtime sees it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cni.plugin import ledger_of
from tests.cni.world import Node, Runtime


@pytest.fixture
def runtime(namespaces: Callable[[], str], tmp_path: Path) -> Iterator[Runtime]:
    node = Node(namespaces, tmp_path)
    with ledger_of(tmp_path) as ledger:
        yield Runtime(node, ledger)
