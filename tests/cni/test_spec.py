import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cni import spec
from cni.spec import CniError, Command, parse_request

ENV = {
    "CNI_COMMAND": "ADD",
    "CNI_CONTAINERID": "c0ffee",
    "CNI_NETNS": "/run/netns/blue",
    "CNI_IFNAME": "eth0",
    "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;COLOUR=blue",
    "CNI_PATH": "/opt/cni/bin",
    "PODWIRE_REQUEST_ID": "1-2",
}
CONFIG: dict[str, Any] = {"cniVersion": "1.0.0", "name": "podwire", "type": "podwire"}


def config(**changes: object) -> bytes:
    return json.dumps(CONFIG | changes).encode()


def without(key: str) -> bytes:
    return json.dumps({name: value for name, value in CONFIG.items() if name != key}).encode()


def refused(env: dict[str, str], stdin: bytes) -> CniError:
    with pytest.raises(CniError) as caught:
        parse_request(env, stdin)
    return caught.value


def test_an_add_is_parsed_whole() -> None:
    fields = {
        "prevResult": {"cniVersion": "1.0.0"},
        "runtimeConfig": {"mac": "02:00:00:00:00:01"},
        "args": {"cni": {"labels": []}},
        "dns": {"nameservers": ["10.0.0.10"]},
        "mode": "routed",
    }
    request = parse_request(ENV, config(**fields))
    assert request == spec.Request(
        command=Command.ADD,
        config=spec.NetConf(
            cni_version="1.0.0",
            name="podwire",
            type="podwire",
            prev_result={"cniVersion": "1.0.0"},
            runtime_config={"mac": "02:00:00:00:00:01"},
            args={"cni": {"labels": []}},
            dns={"nameservers": ["10.0.0.10"]},
            raw=CONFIG | fields,
        ),
        container_id="c0ffee",
        netns="/run/netns/blue",
        ifname="eth0",
        args=(("IgnoreUnknown", "1"), ("K8S_POD_NAMESPACE", "shop"), ("COLOUR", "blue")),
        path="/opt/cni/bin",
        request_id="1-2",
    )


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("ADD", "CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME"),
        ("CHECK", "CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME"),
        ("DEL", "CNI_CONTAINERID, CNI_IFNAME"),
    ],
)
def test_missing_variables_are_all_named(command: str, missing: str) -> None:
    error = refused({"CNI_COMMAND": command, "CNI_NETNS": ""}, config())
    assert (error.code, error.msg) == (4, f"CNI_COMMAND {command} needs {missing}: not set")


@pytest.mark.parametrize("command", ["GC", "STATUS"])
def test_gc_and_status_need_no_container(command: str) -> None:
    assert parse_request({"CNI_COMMAND": command}, config()).command == command


def test_del_needs_no_namespace() -> None:
    request = parse_request({**ENV, "CNI_COMMAND": "DEL", "CNI_NETNS": ""}, config())
    assert (request.container_id, request.netns) == ("c0ffee", "")


@pytest.mark.parametrize("fault", [{"name": ""}, {"prevResult": 5}, {"dns": []}, {"runtimeConfig": "x"}])
def test_what_an_add_is_refused_for_does_not_stop_the_del_after_it(fault: dict[str, object]) -> None:
    env = ENV | {"CNI_ARGS": "COLOUR=blue"}
    assert refused(env, config()).code == 4
    assert refused(ENV, config(**fault)).code == 7
    request = parse_request(env | {"CNI_COMMAND": "DEL"}, config(**fault))
    assert request.container_id == "c0ffee"
    assert request.args == ()
    assert request.config == spec.NetConf("1.0.0", raw=CONFIG | fault)


BAD_VARIABLES = [
    ("CNI_COMMAND", "", "CNI_COMMAND is '', not one of ADD, DEL, CHECK, GC, STATUS, VERSION"),
    ("CNI_COMMAND", "add", "CNI_COMMAND is 'add', not one of"),
    ("CNI_CONTAINERID", "../etc", "CNI_CONTAINERID is '../etc', not a letter or digit, then"),
    ("CNI_CONTAINERID", "a b", "CNI_CONTAINERID is 'a b', not"),
    ("CNI_CONTAINERID", "a\n", "CNI_CONTAINERID is 'a\\n', not"),
    ("CNI_CONTAINERID", "é", "CNI_CONTAINERID is 'é', not"),
    ("CNI_CONTAINERID", "a" * 129, f"CNI_CONTAINERID is '{'a' * 79}…, which is longer than 128 bytes"),
    ("CNI_IFNAME", "sixteen-letters-", "CNI_IFNAME is 'sixteen-letters-', which is longer than 15 bytes"),
    ("CNI_IFNAME", "éééééééé", "CNI_IFNAME is 'éééééééé', which is longer than 15 bytes"),
    ("CNI_IFNAME", ".", "CNI_IFNAME is '.', which is not a name"),
    ("CNI_IFNAME", "..", "CNI_IFNAME is '..', which is not a name"),
    ("CNI_IFNAME", "a/b", "CNI_IFNAME is 'a/b', which has a '/', a ':' or white space in it"),
    ("CNI_IFNAME", "a:b", "CNI_IFNAME is 'a:b', which has"),
    ("CNI_IFNAME", "a\tb", "CNI_IFNAME is 'a\\tb', which has"),
    ("CNI_NETNS", "blue", "CNI_NETNS is 'blue', which is not an absolute path"),
    ("CNI_NETNS", "/run/\udcff", "CNI_NETNS is '/run/\\udcff', which is not UTF-8"),
    ("CNI_ARGS", "IP=\udcff", "CNI_ARGS is 'IP=\\udcff', which is not UTF-8"),
    ("CNI_ARGS", "A", "CNI_ARGS has 'A' in it, which is not KEY=VALUE"),
    ("CNI_ARGS", "=1", "CNI_ARGS has '=1' in it, which is not KEY=VALUE"),
    ("CNI_ARGS", "IP=10.0.0.1;", "CNI_ARGS has '' in it, which is not KEY=VALUE"),
    ("CNI_ARGS", "IP=10.0.0.1;COLOUR=blue", "CNI_ARGS has the unknown key 'COLOUR'"),
    ("CNI_ARGS", "IgnoreUnknown=false;COLOUR=blue", "CNI_ARGS has the unknown key 'COLOUR'"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_VARIABLES)
def test_a_bad_variable_is_code_4_and_is_named_with_its_value(name: str, value: str, message: str) -> None:
    error = refused(ENV | {name: value}, config())
    assert error.code == 4
    assert error.msg.startswith(message)
    assert json.loads(spec.error_json(error, "1.0.0"))["msg"] == error.msg


@pytest.mark.parametrize("text", ["IgnoreUnknown=1;A=b", "IgnoreUnknown=true;A=b", "A=b;IgnoreUnknown=True"])
def test_unknown_args_are_passed_on_when_they_are_to_be_ignored(text: str) -> None:
    assert ("A", "b") in parse_request(ENV | {"CNI_ARGS": text}, config()).args


@pytest.mark.parametrize("length", [64, spec.CONTAINER_ID_BYTES])
def test_the_container_ids_of_runtimes_have_room(length: int) -> None:
    env = ENV | {"CNI_CONTAINERID": "f" * length}
    assert len(parse_request(env, config()).container_id) == length


def test_all_known_args_are_accepted() -> None:
    text = ";".join(f"{key}=0" for key in spec.KNOWN_ARGS)
    assert len(parse_request(ENV | {"CNI_ARGS": text}, config()).args) == len(spec.KNOWN_ARGS)


BAD_CONFIGS = [
    (b"", 6, "the network configuration on standard input is empty"),
    (b"{", 6, "the network configuration is not JSON: "),
    (b'{"name": "\xff"}', 6, "the network configuration is not JSON: "),
    (b"[" * 100_000, 6, "the network configuration is nested too deeply"),
    (b"[1]", 6, "the network configuration is [1], not an object"),
    (without("cniVersion"), 1, "no cniVersion, which means 0.1.0, is not supported"),
    (config(cniVersion=""), 1, "no cniVersion, which means 0.1.0, is not supported"),
    (config(cniVersion="0.2.0"), 1, "cniVersion '0.2.0' is not supported"),
    (config(cniVersion="2.0.0"), 1, "cniVersion '2.0.0' is not supported"),
    (config(cniVersion=1), 6, "cniVersion is 1, which is not a string"),
    (without("name"), 7, "name is missing from the network configuration"),
    (config(name="a/b"), 7, "name is 'a/b', not a letter or digit, then"),
    (config(name=["x"]), 7, "name is ['x'], which is not a string"),
    (config(type=1), 7, "type is 1, which is not a string"),
    (config(prevResult="x"), 7, "prevResult is 'x', which is not an object"),
    (config(runtimeConfig=[]), 7, "runtimeConfig is [], which is not an object"),
    (config(args=True), 7, "args is True, which is not an object"),
    (config(dns={"search": "x"}), 7, "dns.search is 'x', which is not a list"),
    (config(dns={"search": [1]}), 7, "dns.search has 1 in it, which is not a string"),
    (config(dns={"domain": 1}), 7, "dns.domain is 1, which is not a string"),
    (config(name="x" * 500 + "!"), 7, f"name is '{'x' * 79}…, not a letter"),
]


@pytest.mark.parametrize(("stdin", "code", "message"), BAD_CONFIGS)
def test_a_bad_configuration_is_refused_in_one_clear_sentence(stdin: bytes, code: int, message: str) -> None:
    error = refused(ENV, stdin)
    assert error.code == code
    assert error.msg.startswith(message)


def gc(attachments: object) -> spec.Request:
    return parse_request({"CNI_COMMAND": "GC"}, config(**{"cni.dev/valid-attachments": attachments}))


def test_an_absent_list_of_valid_attachments_is_not_an_empty_one() -> None:
    assert parse_request({"CNI_COMMAND": "GC"}, config()).config.valid_attachments is None
    assert gc(None).config.valid_attachments is None
    assert gc([]).config.valid_attachments == ()
    assert gc([{"containerID": "a", "ifname": "eth0"}]).config.valid_attachments == (("a", "eth0"),)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "cni.dev/valid-attachments is {}, which is not a list"),
        ([1], "cni.dev/valid-attachments[0] is 1, which is not an object"),
        ([{"containerID": "a"}], "cni.dev/valid-attachments[0].ifname is missing"),
        ([{"containerID": 1, "ifname": "a"}], "cni.dev/valid-attachments[0].containerID is 1, which is not"),
    ],
)
def test_a_valid_attachment_that_cannot_be_read_stops_the_gc(value: object, message: str) -> None:
    with pytest.raises(CniError, match="^" + message.replace("[", r"\[").replace("{", r"\{")) as caught:
        gc(value)
    assert caught.value.code == 7


@pytest.mark.parametrize(
    ("stdin", "version"),
    [(b"", "1.1.0"), (b"{}", "1.1.0"), (b'{"cniVersion": "0.1.0"}', "0.1.0"), (config(), "1.0.0")],
)
def test_version_is_asked_with_any_version_or_none(stdin: bytes, version: str) -> None:
    assert parse_request({"CNI_COMMAND": "VERSION"}, stdin).config.cni_version == version


def test_version_is_answered_with_the_version_asked_and_all_supported() -> None:
    answer = b'{"cniVersion":"0.1.0","supportedVersions":["0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]}'
    assert spec.version_json("0.1.0") == answer


@pytest.mark.parametrize(
    ("stdin", "version"),
    [
        (config(cniVersion="0.4.0"), "0.4.0"),
        (config(cniVersion="9"), "1.1.0"),
        (b"{", "1.1.0"),
        (b"", "1.1.0"),
    ],
)
def test_errors_are_answered_in_a_version_the_runtime_may_know(stdin: bytes, version: str) -> None:
    assert spec.version_of(stdin) == version


def test_an_error_carries_code_message_and_details() -> None:
    error = CniError(spec.TRY_AGAIN, "busy", "\udcff")
    assert spec.error_json(error, "1.0.0") == (
        b'{"cniVersion":"1.0.0","code":11,"msg":"busy","details":"\\\\udcff"}'
    )


text = st.text(max_size=20)
values = st.one_of(text, st.sampled_from(list(ENV.values())))
environments = st.dictionaries(st.one_of(text, st.sampled_from(list(ENV))), values, max_size=8)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), text)
json_values = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3))
)
KEYS = [
    "cniVersion",
    "name",
    "type",
    "prevResult",
    "runtimeConfig",
    "args",
    "dns",
    "cni.dev/valid-attachments",
]


@given(
    environments,
    st.one_of(
        st.binary(max_size=60),
        st.dictionaries(st.sampled_from(KEYS), json_values).map(lambda c: json.dumps(CONFIG | c).encode()),
    ),
    st.sampled_from(list(Command)),
)
@example({}, b'{"cniVersion": "\\ud800"}', Command.STATUS)
@example({}, b'{"cniVersion": "1.0.0", "name": "a", "n": ' + b"9" * 5000 + b"}", Command.STATUS)
def test_any_request_is_parsed_or_refused_with_an_error_that_can_be_printed(
    env: dict[str, str], stdin: bytes, command: Command
) -> None:
    for environment in (env, ENV | env | {"CNI_COMMAND": command}):
        try:
            request = parse_request(environment, stdin)
        except CniError as error:
            assert json.loads(spec.error_json(error, spec.version_of(stdin)))["code"] == error.code
        else:
            assert request.command is command or "CNI_COMMAND" in env
