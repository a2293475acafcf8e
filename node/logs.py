"""How the daemon logs: lines for people, or a JSON object a line, to standard error.

log.info("routes changed", extra=fields(changed=3, total=40))
  console   2026-01-31 12:00:00,123 INFO node.syncer: routes changed changed=3 total=40
  journal   <6>node.syncer: routes changed changed=3 total=40
  json      {"time": "2026-01-31T12:00:00.123Z", "level": "info", "logger": "node.syncer",
             "message": "routes changed", "changed": 3, "total": 40}
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import IO, Any, Literal

CONSOLE = "%(asctime)s %(levelname)s %(name)s: %(message)s"
JOURNAL = "%(name)s: %(message)s"
FIELDS = "fields"
RESERVED = ("time", "level", "logger", "message", "exception", "stack")
PLAIN = re.compile(r"[^\s\"'=\\]+")
CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
TALKATIVE = ("urllib3", "kubernetes", "grpc", "asyncio")
"""Libraries that log every request, with its body, where we log a change; of them nothing below info."""

PRIORITY = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
"""Levels as syslog(3) numbers them."""


def fields(**values: Any) -> dict[str, Mapping[str, Any]]:
    """Return what a log call takes as `extra` to carry named values beside its message."""
    return {FIELDS: values}


def setup(format: Literal["console", "json"], level: str) -> None:
    """Log to standard error from now on; an uncaught exception, too, is a line of the log."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(format, journal=is_journal(sys.stderr)))
    logging.basicConfig(handlers=[handler], force=True)
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.INFO)
    set_level(level)
    sys.excepthook = lambda kind, error, trace: logging.getLogger("podwire").critical(
        "a fault of podwire's own", exc_info=(kind, error, trace)
    )
    threading.excepthook = _thread_failed


def set_level(level: str) -> None:
    """Log this level (debug, info, warning, error) and those above from now on."""
    logging.getLogger().setLevel(level.upper())


def formatter(format: Literal["console", "json"], *, journal: bool = False) -> logging.Formatter:
    """Return the formatter; for the journal, which knows the time itself, with its priorities."""
    if format == "json":
        return _Json()
    return _Journal(JOURNAL) if journal else _Console(CONSOLE)


def is_journal(stream: IO[str], environ: Mapping[str, str] = os.environ) -> bool:
    """Say whether a stream leads to the journal of systemd: $JOURNAL_STREAM is its device and inode."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class _Console(logging.Formatter):
    """A line: a message's control characters are escaped, so that nobody can write lines of ours."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        words = [record.message, *(f"{name}={_word(value)}" for name, value in _fields(record).items())]
        record.message = CONTROL.sub(lambda found: ascii(found[0])[1:-1], " ".join(words))
        return super().formatMessage(record)


class _Journal(_Console):
    """Every line, of a traceback too, begins with its priority; see sd-daemon(3)."""

    def format(self, record: logging.LogRecord) -> str:
        number = next((number for level, number in PRIORITY if record.levelno >= level), 7)
        return "\n".join(f"<{number}>{line}" for line in super().format(record).splitlines())


class _Json(logging.Formatter):
    """One object a line: time in RFC 3339 (UTC), level, logger, message, and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in _fields(record).items():
            line[f"field.{name}" if name in RESERVED else name] = value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        return json.dumps(line, default=str)


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    found = getattr(record, FIELDS, {})
    return found if isinstance(found, Mapping) else {}


def _word(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str, separators=(",", ":"))
    plain = not isinstance(value, str) or PLAIN.fullmatch(text)
    return text if plain else json.dumps(text, ensure_ascii=False)


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is None or isinstance(args.exc_value, SystemExit):
        return
    name = args.thread.name if args.thread else "?"
    logging.getLogger("podwire").critical(
        "a thread ended by a fault of podwire's own",
        exc_info=(args.exc_type, args.exc_value, args.exc_traceback),
        extra=fields(thread=name),
    )
