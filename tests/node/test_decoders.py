"""What the daemon's threads decode is prepared before there are threads.

msgspec learns a type when it first decodes it, and shows what it has learnt to other threads before that is
complete: two pods that were a node's first, at the same moment, ended its daemon with a segmentation fault.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IN_THREADS = ("cni", "ipam", "netlink", "node", "proxy")
ONE_THREAD = {"node/config_file.py"}
"""The configuration is read before any thread, and again by one."""


def modules() -> list[str]:
    found = (path.relative_to(ROOT).as_posix() for d in IN_THREADS for path in (ROOT / d).rglob("*.py"))
    return sorted(path for path in found if path not in ONE_THREAD)


def learning(tree: ast.Module) -> list[int]:
    """The lines of functions that give msgspec a type; a module may, as it is imported once."""
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    calls = {n for f in functions for n in ast.walk(f) if isinstance(n, ast.Call)}
    return sorted(call.lineno for call in calls if _gives_a_type(call))


def _gives_a_type(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    typed = any(keyword.arg == "type" for keyword in call.keywords)
    return name.startswith("msgspec.") and (typed or name.endswith(".Decoder"))


@pytest.mark.parametrize("path", modules())
def test_no_type_is_learnt_in_a_function(path: str) -> None:
    assert learning(ast.parse((ROOT / path).read_text())) == []


def test_such_a_function_is_found() -> None:
    assert learning(ast.parse("def f():\n    msgspec.json.decode(b'', type=int)")) == [2]
