"""A node as a runtime sees it; and say what differs, when an assertion in the helper fails."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.cni.world")

from cni.plugin import ledger_of  # noqa: E402
from tests.cni.world import Node, Runtime  # noqa: E402


@pytest.fixture
def runtime(namespaces: Callable[[], str], tmp_path: Path) -> Iterator[Runtime]:
    node = Node(namespaces, tmp_path)
    with ledger_of(tmp_path) as ledger:
        yield Runtime(node, ledger)
