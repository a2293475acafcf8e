"""The command line: what is wrong is one sentence and an exit status; help says how it is meant."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli import output
from cli.main import main, parser
from cli.output import table


def run(*words: str) -> int:
    """Return the exit status, however it is given."""
    try:
        return main(list(words))
    except SystemExit as error:
        assert isinstance(error.code, int)
        return error.code


def commands(top: argparse.ArgumentParser, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command and verb there is."""
    yield before
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield from commands(sub, (*before, name))


def examples() -> list[tuple[str, ...]]:
    """Every line of an examples section that is a command, as words."""
    found = []
    for words in commands(parser()):
        epilog = parser_of(words).epilog or ""
        for line in epilog.splitlines():
            text = line.strip().split("   ")[0]
            if text.startswith("podwire "):
                found.append(tuple(shlex.split(text)[1:]))
    return found


def parser_of(words: tuple[str, ...]) -> argparse.ArgumentParser:
    found = parser()
    for word in words:
        found = next(a.choices[word] for a in found._actions if isinstance(a, argparse._SubParsersAction))
    return found


@pytest.mark.parametrize("words", list(commands(parser())), ids=" ".join)
def test_help_of_every_command(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words, "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: podwire")
    epilog = parser_of(words).epilog
    if epilog:
        assert "examples:" in text
        assert epilog.strip().splitlines()[1] in text


@pytest.mark.parametrize("words", sorted(set(examples())), ids=" ".join)
def test_every_example_is_right_usage(words: tuple[str, ...]) -> None:
    assert parser().parse_args(words).run


def test_the_daemon_and_the_lab_have_examples() -> None:
    assert {words[0] for words in examples()} >= {"daemon", "lab"}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("podwire 0.")


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("nothing",),
        ("daemon",),
        ("daemon", "--source", ".", "--mode", "vxlan"),
        ("daemon", "--source", ".", "--mtu", "big"),
        ("status", "-o", "yaml"),
        ("routes", "too", "many"),
        ("frontends", "one", "two"),
        ("lab",),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: podwire")
    assert "error: " in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--source", "/no/such"], "--source /no/such is not a folder"),
        (
            ["--no-masquerade-cidr", "10.0.0.1/8"],
            "--no-masquerade-cidr 10.0.0.1/8: 10.0.0.1/8 has host bits set",
        ),
        (["--no-masquerade-cidr", "x"], "--no-masquerade-cidr x: 'x' does not appear to be an IPv4 or IPv6"),
        (["--mtu", "100"], "--mtu 100 is not between 576 and 65535"),
        (["--metrics-bind-address", "10249"], "--metrics-bind-address '10249' is not host:port"),
        (["--healthz-bind-address", ":99999"], "--healthz-bind-address ':99999' is not host:port"),
        (
            ["--healthz-bind-address", "0.0.0.0:99999"],
            "--healthz-bind-address '0.0.0.0:99999' is not host:port",
        ),
    ],
)
def test_a_wrong_value_is_a_sentence_with_option_and_value(
    options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("daemon", "--source", str(tmp_path), *options) == 1
    assert capsys.readouterr().err.startswith(f"podwire: {sentence}")


@pytest.mark.parametrize("command", ["status", "pods", "frontends", "routes"])
@pytest.mark.parametrize("form", ["table", "json"])
def test_without_a_daemon_one_sentence_and_status_1(
    command: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "podwire.sock"
    assert run(command, "--socket", str(place), "-o", form) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"podwire: no daemon answers on {place}; ")
    assert len(err.splitlines()) == 1


def test_a_socket_that_nobody_answers_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a killed daemon leaves it."""
    place = tmp_path / "podwire.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(place))
    assert run("status", "--socket", str(place)) == 1
    assert capsys.readouterr().err.startswith(f"podwire: no daemon answers on {place}; ")


@pytest.mark.parametrize("words", [("daemon", "--source", "."), ("install",)], ids=" ".join)
def test_without_root_one_sentence(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert run(*words) == 1
    what = "the daemon" if words[0] == "daemon" else "install"
    assert capsys.readouterr().err == f"podwire: {what} needs root\n"


def test_install_where_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    assert run("install", "--no-conflist", "--bin-dir", str(file), "--conf-dir", str(tmp_path)) == 1
    assert capsys.readouterr().err == f"podwire: {file}: File exists\n"


def test_a_reader_that_goes_away_is_no_error() -> None:
    """`podwire ... | head`."""
    code = (
        "import sys; from cli import install, main\n"
        "install.run_install = lambda args: print('x' * 100000) or 0\n"
        "sys.exit(main.main(['install']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.wait(10) == 0
        assert process.stderr.read() == ""


def test_a_table_is_aligned_and_has_no_blanks_at_the_end() -> None:
    assert table(("name", "to"), [["a", "b"], ["long-name", ""]]) == "NAME       TO\na          b\nlong-name"


def test_rows_as_json_have_all_fields(capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, object]] = [
        {"name": "a", "list": ["x", "y"], "more": 1},
        {"name": "b", "list": [], "more": None},
    ]
    output.show("json", ("name",), rows)
    assert json.loads(capsys.readouterr().out) == rows
    output.show("table", ("name", "list", "more"), rows)
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["a", "x,", "y", "1"],
        ["b", "-", "-"],
    ]
