"""Regular expressions of path rules: what is taken, HAProxy can compile."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.l7 import patterns

GOOD_PATTERNS = [
    "^/v[0-9]+/users$",
    "(?i)^/Admin(/|$)",
    r"\.(png|jpe?g)$",
    "^/([^/]+)/([^/]+)/(.*)$",
    r"/a{2,3}\b",
    "(foo|bar)?",
    r"[\w.\-]+\s*",
    "it's 100% [#\"]",
]
BAD_PATTERNS = [
    *("(", ")", "[", "[]", "a**", "*a", "{2}", "a{2", "a{,3}", "a{1000}", "a{3,2}", "[z-a]", "^*"),
    *(
        "(?=a)",
        "(?<=a)",
        "(?P<n>a)",
        "(?>a)",
        "(?a)a",
        "(a)\\1",
        "\\Z",
        "\\u0041",
        "\\",
        "a\\",
        "[[:alpha:]]",
    ),
    *("[:alpha:]", "[=a=]", "[a[b]", "(a*)*", "(a+)+", "((a+))+", "(a|b)*", "(a|a){9}", "(a?){9}"),
    *("(" * 10 + ")" * 10, "a?" * 17),
]


@pytest.mark.parametrize("pattern", GOOD_PATTERNS)
def test_a_pattern_of_known_parts_can_be_used(pattern: str) -> None:
    assert patterns.wrong(pattern) == ""


@pytest.mark.parametrize("pattern", BAD_PATTERNS)
def test_a_pattern_that_pcre_reads_otherwise_or_takes_long_over_is_refused(pattern: str) -> None:
    assert patterns.wrong(pattern)


PIECES = st.sampled_from(
    [
        *"ab/.^$|()[]{}*+?\\-:=&~%'\"# ",
        "(?:",
        "(?i)",
        "[a-z]",
        "[^/]",
        "\\d",
        "\\w",
        "\\.",
        "{2}",
        "{1,3}",
        "[:",
    ]
)


@settings(max_examples=30)
@given(st.lists(st.lists(PIECES, min_size=1, max_size=8).map("".join), min_size=20, max_size=40))
@example(GOOD_PATTERNS)
def test_what_is_taken_for_a_pattern_haproxy_takes_too(
    tmp_path_factory: pytest.TempPathFactory, candidates: list[str]
) -> None:
    good = [pattern for pattern in candidates if patterns.wrong(pattern) == ""]
    quoted = ["'" + pattern.replace("'", "'\\''") + "'" for pattern in good]
    config = tmp_path_factory.mktemp("haproxy") / "haproxy.cfg"
    lines = [
        "defaults",
        " mode http",
        " timeout connect 1s",
        " timeout client 1s",
        " timeout server 1s",
        "listen b",
        " bind 127.0.0.1:1",
    ]
    lines += [f" http-request deny if {{ path_reg -- {word} }}" for word in quoted]
    config.write_text("\n".join([*lines, " server s 127.0.0.1:1", ""]))
    checked = subprocess.run(["haproxy", "-c", "-f", config], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
