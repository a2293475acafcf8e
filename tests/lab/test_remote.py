"""Calls to another machine: here its agent is a process beside us."""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import probe, remote
from lab.probe import Answer, Failure
from lab.remote import Remote
from lab.runtime import PluginError
from lab.topology import LabError

AGENT = [sys.executable, "-m", "lab.agent"]


def refused(code: int) -> None:
    raise PluginError("the plugin said no", code)


def missing(path: Path) -> str:
    return path.read_text()


def broken() -> None:
    raise ZeroDivisionError("one by zero")


def noisy(word: str) -> str:
    print("this is no answer")
    return word.upper()


@pytest.fixture(scope="module")
def machines() -> Iterator[Remote]:
    found = Remote(lambda machine: AGENT if machine != "gone" else ["false"])
    yield found
    found.close()


def test_a_call_returns_what_the_function_does(machines: Remote) -> None:
    assert machines.call("node1", str.upper, "word") == "WORD"
    assert machines.call("node1", probe.answer, b'{"name": "a", "client_address": "b"}') == Answer("a", "b")
    assert isinstance(machines.call("node1", probe.answer, b"?"), Failure)
    assert machines.call("node1", noisy, "word") == "WORD"


def test_errors_come_back_as_what_they_were(machines: Remote) -> None:
    with pytest.raises(PluginError, match=r"^the plugin said no$") as plugin:
        machines.call("node1", refused, 11)
    assert plugin.value.code == 11
    with pytest.raises(FileNotFoundError):
        machines.call("node1", missing, Path("/no/such/file"))
    with pytest.raises(LabError, match=r"^exit: SystemExit: 1$"):
        machines.call("node1", sys.exit, 1)
    with pytest.raises(LabError, match=r"^broken: ZeroDivisionError: one by zero$"):
        machines.call("node1", broken)


def test_a_machine_that_is_gone_is_named(machines: Remote) -> None:
    with pytest.raises(LabError, match=r"^gone does not answer"):
        machines.call("gone", str)


def test_after_an_agent_has_ended_another_is_started(machines: Remote) -> None:
    with pytest.raises(LabError, match=r"^node2 does not answer"):
        machines.call("node2", _end)
    assert machines.call("node2", str.upper, "word") == "WORD"


def _end() -> None:
    import os

    os._exit(1)


def test_a_machine_cannot_make_us_run_its_code() -> None:
    content = pickle.dumps((1, None, print))
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.print is nothing that a machine may send"):
        remote._Careful(io.BytesIO(content)).load()
