"""Regular expressions in path rules: those that Python and HAProxy's PCRE2 read alike, and soon decide.

A pattern that only one of the two can compile would cost all services of the node their configuration, and
one that tries an exponential number of ways would hold up a thread of the proxy. So only a part of the
language is taken: characters, `.`, `^`, `$`, classes, groups, alternatives, repetitions, `\\d`, `\\w`, `\\s`,
`\\b`, and `(?i)` in front. Source: pcre2pattern(3).
"""

from __future__ import annotations

import re
import warnings

LONGEST = 512
MOST_GROUPS, MOST_REPEATS = 9, 16

TOKEN = re.compile(
    r"""(?P<escape>\\(?:[dDwWsSbB]|[^0-9A-Za-z]))
    |   (?P<set>\[(?!([:.=])[^\]]*\3\])\^?(?:\\[dDwWsS]|\\[^0-9A-Za-z]|[^\\\[\]])+\])
    |   (?P<open>\((?:\?:|(?!\?)))
    |   (?P<close>\))
    |   (?P<or>\|)
    |   (?P<repeat>(?:[*+?]|\{[0-9]{1,3}(?:,(?:[0-9]{1,3})?)?\})\??)
    |   (?P<plain>[^\\\[\](){}*+?|])""",
    re.VERBOSE,
)
"""The lookahead of `set`: PCRE2 takes [:alpha:], [.a.] and [=a=] for classes that are none."""


def wrong(pattern: str) -> str:
    """Return what is wrong with a pattern, to complete "… is not"; "" if it can be used."""
    rest = pattern.removeprefix("(?i)")
    if told := _wrong_parts(rest):
        return told
    try:
        _compiled(rest)
    except (re.error, OverflowError) as error:
        return f"a regular expression: {error}"
    return ""


def groups(pattern: str) -> int:
    """Return how many groups a pattern has that can be referred to."""
    return _compiled(pattern.removeprefix("(?i)")).groups


def _compiled(pattern: str) -> re.Pattern[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # on sets that Python may read otherwise some day
        return re.compile(pattern)


def _wrong_parts(pattern: str) -> str:
    place, before, count, repeats = 0, "", 0, 0
    loose = [False]  # of the whole and of each open group: whether it can match a text in several ways
    closed = False  # the same of the group that was closed last
    while place < len(pattern):
        token = TOKEN.match(pattern, place)
        kind = token.lastgroup if token else None
        if token is None or kind is None:
            return f"a regular expression of the kinds known here: what is {pattern[place : place + 8]!r}?"
        if kind == "open":
            loose.append(False)
            count += 1
        elif kind == "close":
            if len(loose) == 1:
                return "a regular expression: unbalanced parenthesis"
            closed = loose.pop()
            loose[-1] |= closed
        elif kind == "or":
            loose[-1] = True
        elif kind == "repeat":
            repeats += 1
            if before == "repeat":
                return "a regular expression: multiple repeat"
            if before == "close" and closed and token[0][0] != "?":
                return "soon decided: a repeated group has repetitions or alternatives in it"
            loose[-1] = True
        place, before = token.end(), kind
    if count > MOST_GROUPS or repeats > MOST_REPEATS:
        return f"of at most {MOST_GROUPS} groups and {MOST_REPEATS} repetitions"
    return ""
