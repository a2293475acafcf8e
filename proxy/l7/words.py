"""Text of users as words of HAProxy's configuration, from which nothing of it can break out.

Source: HAProxy 2.6 configuration manual, 2.2 (quoting and escaping), 8.2.4 (log format).
"""

from __future__ import annotations

import re

_PLAIN = re.compile(r"[A-Za-z0-9_./:@+,=-]+")
_UNQUOTABLE = re.compile(r"[^ -&(-~]+")
_ARGUMENT = re.compile(r"[A-Za-z0-9_./:@+=-]+")
_FREE_BACKSLASH = re.compile(r"\\(?![0-9])")


def word(text: str) -> str:
    """Return a text as one word: as it is, or between single quotes, where nothing has a meaning.

    What cannot be there, single quotes and control characters, is written by its code. Raises ValueError for
    NUL, which nothing can stand for.
    """
    if "\0" in text:
        raise ValueError(f"{text!r} has a NUL in it")
    if _PLAIN.fullmatch(text):
        return text
    return "'" + _UNQUOTABLE.sub(lambda found: f"'{_codes(found[0])}'", text) + "'"


def _codes(text: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in text.encode())


def argument(text: str) -> str:
    """Return a text as the argument of a sample or converter: what stands between its parentheses."""
    if _ARGUMENT.fullmatch(text):
        return text
    return "'" + text.replace("'", "'\\''") + "'"


def literal(text: str) -> str:
    """Return a text as a log format that yields it."""
    return text.replace("%", "%%") or "%[str('')]"


def replacement(text: str) -> str:
    """Return what a match becomes: \\0 to \\9 are groups, other backslashes themselves."""
    return _FREE_BACKSLASH.sub(r"\\\\", text)


def command_word(text: str) -> str:
    """Return a text as one word of a command on HAProxy's socket."""
    return re.sub(r"([\\ ;])", r"\\\1", text)
