"""Lines of the log: for people, for the journal, as JSON."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any, Literal

import pytest

from node import logs
from node.logs import fields, formatter


def line(
    format: Literal["console", "json"], message: str, *args: Any, journal: bool = False, **more: Any
) -> str:
    """What a record becomes."""
    level = more.pop("level", logging.INFO)
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter(format, journal=journal))
    logger = logging.Logger("node.syncer")
    logger.addHandler(handler)
    logger.log(level, message, *args, **more)
    return stream.getvalue().removesuffix("\n")


def parsed(message: str, *args: Any, **more: Any) -> dict[str, Any]:
    text = line("json", message, *args, **more)
    assert "\n" not in text
    found: dict[str, Any] = json.loads(text)
    return found


def test_a_console_line_is_as_before_with_fields_behind_the_message() -> None:
    text = line("console", "%d changed", 3, extra=fields(total=40, node="node1", why="a b", none=None))
    assert text.endswith(' INFO node.syncer: 3 changed total=40 node=node1 why="a b" none=null')
    assert datetime.strptime(text[:23], "%Y-%m-%d %H:%M:%S,%f")


def test_nobody_writes_lines_of_ours_or_moves_the_cursor() -> None:
    text = line("console", "pod %s", "a\nfake\x1b[2J\u2028", extra=fields(name="b\nc"))
    assert text.endswith(r'pod a\nfake\x1b[2J\u2028 name="b\nc"')
    assert len(text.splitlines()) == 1


def test_the_journal_gets_priorities_and_no_time() -> None:
    def of(level: int) -> str:
        return line("console", "x", journal=True, level=level)

    levels = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL)
    assert [of(level)[:3] for level in levels[1:]] == ["<6>", "<4>", "<3>", "<2>"]
    assert of(logging.INFO) == "<6>node.syncer: x"


def test_every_line_of_a_traceback_has_its_priority_in_the_journal() -> None:
    try:
        raise ValueError("no\ngood")
    except ValueError:
        text = line("console", "x", journal=True, level=logging.ERROR, exc_info=True)
    assert len(text.splitlines()) > 3
    assert all(part.startswith("<3>") for part in text.splitlines())


def test_a_json_line_has_time_level_logger_message_and_fields() -> None:
    found = parsed("%d changed", 3, extra=fields(total=40, cidrs=("a", "b"), where=io))
    time = datetime.fromisoformat(found.pop("time"))
    assert time.tzinfo == UTC
    assert abs((datetime.now(UTC) - time).total_seconds()) < 5
    assert found.pop("where").startswith("<module")
    assert found == {
        "level": "info",
        "logger": "node.syncer",
        "message": "3 changed",
        "total": 40,
        "cidrs": ["a", "b"],
    }


def test_a_field_takes_no_place_of_what_every_line_has() -> None:
    found = parsed("x", extra=fields(message="y", level=5))
    assert (found["message"], found["field.message"], found["level"]) == ("x", "y", "info")


def test_a_traceback_is_one_field() -> None:
    try:
        raise ValueError("no")
    except ValueError:
        found = parsed("failed", exc_info=True)
    assert found["exception"].splitlines()[-1] == "ValueError: no"


@pytest.mark.parametrize("text", ["\ud800", "\x00", "ü", "a\nb", '"'])
def test_any_text_makes_a_line_that_can_be_written_and_read(text: str) -> None:
    assert parsed("x", extra=fields(text=text))["text"] == text
    line("console", "x %s", text, extra=fields(text=text)).encode()


def run(code: str, **environ: str) -> str:
    """Run a program that logs; return its standard error."""
    done = subprocess.run(
        [sys.executable, "-c", f"import logging\nfrom node import logs\n{code}"],
        capture_output=True,
        text=True,
        env={**os.environ, **environ},
        check=False,
    )
    return done.stderr


def test_faults_of_our_own_are_lines_of_the_log_too() -> None:
    text = run(
        "import threading\n"
        "logs.setup('json', 'info')\n"
        "thread = threading.Thread(target=lambda: 1 / 0, name='t1'); thread.start(); thread.join()\n"
        "raise ValueError('end')\n"
    )
    first, second = (json.loads(part) for part in text.splitlines())
    assert (first["thread"], first["exception"].splitlines()[-1]) == (
        "t1",
        "ZeroDivisionError: division by zero",
    )
    assert (second["level"], second["exception"].splitlines()[-1]) == ("critical", "ValueError: end")


def test_the_level_can_change_and_libraries_do_not_chatter() -> None:
    text = run(
        "logs.setup('console', 'warning')\n"
        "log = logging.getLogger('a')\n"
        "log.info('one')\n"
        "logs.set_level('debug')\n"
        "log.debug('two')\n"
        "logging.getLogger('urllib3.connectionpool').debug('three')\n"
    )
    assert [part.rpartition(" ")[2] for part in text.splitlines()] == ["two"]


def test_the_journal_is_known_by_device_and_inode() -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader), os.fdopen(writer, "w") as stream:
        status = os.fstat(writer)
        right = f"{status.st_dev}:{status.st_ino}"
        assert logs.is_journal(stream, {"JOURNAL_STREAM": right})
        assert not logs.is_journal(stream, {"JOURNAL_STREAM": f"{right}0"})
        assert not logs.is_journal(stream, {})
    assert not logs.is_journal(io.StringIO(), {"JOURNAL_STREAM": right})
