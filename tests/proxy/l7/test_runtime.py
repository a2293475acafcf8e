"""Commands to a running HAProxy as text, and its answers as values."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.l7.model import Server
from proxy.l7.policy import ActiveCheck, Policy, Tls
from proxy.l7.runtime import (
    PAYLOAD_BYTES,
    Command,
    CommandError,
    ServerState,
    Worker,
    add_server,
    ask,
    change_map,
    delete_server,
    hold_server,
    map_entries,
    master_of,
    replace_map,
    resume_server,
    server_states,
    worker_of,
)
from tests.proxy.l7.traffic import backend, endpoint

A = endpoint(1)
FILE = Path("/run/l7/http.map")


def test_an_endpoint_is_added_with_all_its_words_and_its_checks_are_begun() -> None:
    policy = Policy(check=ActiveCheck(), tls=Tls(ca="own.pem", server_name="x.example"))
    added = list(add_server(backend("one", 1, (A,), policy), A, Path("/etc/podwire/ca")))
    assert added == [
        Command(
            "add server one/10.8.0.1:8080 10.8.0.1:8080 ssl verify required ca-file /etc/podwire/ca/own.pem "
            "sni str(x.example) check-ssl check-sni x.example check inter 2000ms rise 2 fall 3",
            "New server registered",
        ),
        Command("enable health one/10.8.0.1:8080"),
        Command("enable server one/10.8.0.1:8080"),
    ]


def test_an_address_of_ipv6_is_in_brackets_but_not_in_the_name() -> None:
    server = Server("fd00::1", 80)
    added = list(add_server(backend("one", 1, ()), server, Path("/ca")))
    assert added[0].text == "add server one/fd00::1:80 [fd00::1]:80"


def test_states_of_endpoints_are_set() -> None:
    assert [make("one", A).text for make in (hold_server, resume_server, delete_server)] == [
        "set server one/10.8.0.1:8080 state maint",
        "set server one/10.8.0.1:8080 state ready",
        "del server one/10.8.0.1:8080",
    ]


def test_an_entry_of_a_map_is_added_changed_and_removed() -> None:
    before, after = {"a:1": "x", "b:1": "x"}, {"b:1": "y", "c:1": "z"}
    assert [c.text for c in change_map(FILE, before, after)] == [
        f"add map {FILE} c:1 z",
        f"set map {FILE} b:1 y",
        f"del map {FILE} a:1",
    ]


def test_a_map_is_replaced_in_commands_that_haproxy_can_take() -> None:
    entries = {f"10.96.0.1:{port}": "default_service_http_http4" for port in range(1, 1001)}
    commands = [c.text for c in replace_map(FILE, 3, entries)]
    assert commands[-1] == f"commit map @3 {FILE}"
    assert all(c.startswith(f"add map @3 {FILE} <<\n10.") for c in commands[:-1])
    assert max(map(len, commands)) < PAYLOAD_BYTES + 100
    assert sum(c.count("default_service") for c in commands) == 1000
    assert [c.text for c in replace_map(FILE, 4, {})] == [f"commit map @4 {FILE}"]


def test_states_are_read_by_the_names_of_their_columns() -> None:
    answer = "1\n# be_name srv_name srv_admin_state more\none 10.8.0.1:8080 0 -\none fd00::1:80 1 -\n\n"
    assert list(server_states(answer)) == [
        ServerState("one", A, True),
        ServerState("one", Server("fd00::1", 80), False),
    ]
    with pytest.raises(CommandError, match="show servers state"):
        list(server_states("Permission denied\n"))


def test_other_answers_are_read() -> None:
    assert map_entries("0x1 a:1 one\n0x2 b:1 two words\n\n") == {"a:1": "one", "b:1": "two words"}
    assert worker_of("Name: HAProxy\nPid: 7\ndescription: x: y\n") == Worker(7, "x: y")
    assert master_of("#<PID> <type>\n12  master  0 [failed: 0]\n# workers\n13 worker 0\n") == 12
    for read in (worker_of, master_of):
        with pytest.raises(CommandError):
            read("Unknown command\n")


def test_an_error_names_command_and_answer() -> None:
    error = CommandError("add map @1 x <<\na b\n", "no such map")
    assert str(error) == "HAProxy answers 'no such map' to 'add map @1 x <<'"


def test_where_nobody_answers_there_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        ask(tmp_path / "none.sock", "show info")
