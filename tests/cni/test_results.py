import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni import spec
from cni.results import Interface, IpConfig, Result, Route, merged, parse_result, result_json
from cni.spec import CniError

RESULT = Result(
    interfaces=(
        Interface("pwpod0123456789", "02:00:00:00:00:01", mtu=1500),
        Interface("eth0", "02:00:00:00:00:02", "/run/netns/blue", 1500),
    ),
    ips=(IpConfig("10.244.1.5/32", "169.254.1.1", 1), IpConfig("fd00::5/128", "fe80::1", 1)),
    routes=(Route("0.0.0.0/0", "169.254.1.1"), Route("::/0")),
    dns={"nameservers": ["10.96.0.10"]},
)
INTERFACES = (
    '"interfaces":[{"name":"pwpod0123456789","mac":"02:00:00:00:00:01"%s},'
    '{"name":"eth0","mac":"02:00:00:00:00:02","sandbox":"/run/netns/blue"%s}]'
)
IPS = (
    '"ips":[{%s"address":"10.244.1.5/32","gateway":"169.254.1.1","interface":1},'
    '{%s"address":"fd00::5/128","gateway":"fe80::1","interface":1}]'
)
REST = '"routes":[{"dst":"0.0.0.0/0","gw":"169.254.1.1"},{"dst":"::/0"}],"dns":{"nameservers":["10.96.0.10"]}'


@pytest.mark.parametrize("version", spec.SUPPORTED_VERSIONS)
def test_a_result_has_the_shape_of_the_version_asked_for(version: str) -> None:
    families = ('"version":"4",', '"version":"6",') if version < "1" else ("", "")
    mtu = ',"mtu":1500' if version == "1.1.0" else ""
    text = f'{{"cniVersion":"{version}",{INTERFACES % (mtu, mtu)},{IPS % families},{REST}}}'
    assert result_json(RESULT, version).decode() == text


@pytest.mark.parametrize("version", spec.SUPPORTED_VERSIONS)
def test_a_result_comes_back_from_every_version(version: str) -> None:
    back = parse_result(json.loads(result_json(RESULT, version)))
    assert (back.ips, back.routes, back.dns) == (RESULT.ips, RESULT.routes, RESULT.dns)
    assert [i.name for i in back.interfaces] == ["pwpod0123456789", "eth0"]
    assert (back == RESULT) == (version == "1.1.0")


FOREIGN = {
    "interfaces": [{"name": "net1", "mtu": 9000, "socketPath": "/run/vhost.sock", "pciID": "0000:04:00.5"}],
    "ips": [{"address": "192.0.2.5/24", "gateway": "192.0.2.1", "interface": 0}],
    "routes": [
        {"dst": "198.51.100.0/24", "mtu": 1400, "advmss": 1360, "priority": 7, "table": 0, "scope": 253}
    ],
}


def test_a_result_before_ours_loses_nothing_in_1_1_0() -> None:
    document = {"cniVersion": "1.1.0"} | FOREIGN
    assert json.loads(result_json(parse_result(document), "1.1.0")) == document


@pytest.mark.parametrize("version", [v for v in spec.SUPPORTED_VERSIONS if v < "1.1.0"])
def test_older_versions_get_no_field_they_do_not_have(version: str) -> None:
    document = json.loads(result_json(parse_result(FOREIGN), version))
    assert document["interfaces"] == [{"name": "net1"}]
    assert document["routes"] == [{"dst": "198.51.100.0/24"}]
    assert document["ips"][0].get("version") == ("4" if version < "1" else None)


PREVIOUS = Result(
    interfaces=(Interface("net1", "02:00:00:00:00:09", "/run/netns/blue", 9000, pci_id="0000:04:00.5"),),
    ips=(IpConfig("192.0.2.5/24", "192.0.2.1", 0),),
    routes=(Route("198.51.100.0/24", priority=7),),
    dns={"nameservers": ["192.0.2.53"], "domain": "lan", "search": []},
)


def test_a_chains_result_is_the_one_before_then_ours_with_indexes_moved() -> None:
    whole = merged(PREVIOUS, RESULT)
    assert whole == Result(
        interfaces=PREVIOUS.interfaces + RESULT.interfaces,
        ips=(
            *PREVIOUS.ips,
            IpConfig("10.244.1.5/32", "169.254.1.1", 2),
            IpConfig("fd00::5/128", "fe80::1", 2),
        ),
        routes=PREVIOUS.routes + RESULT.routes,
        dns={"nameservers": ["192.0.2.53", "10.96.0.10"], "domain": "lan"},
    )


def test_nothing_is_doubled_when_the_result_before_has_ours_in_it() -> None:
    """As with a repeated ADD, or a runtime that passes its cached result."""
    assert merged(RESULT, RESULT) == RESULT
    whole = merged(PREVIOUS, RESULT)
    assert merged(whole, RESULT) == whole


def test_of_an_interface_that_both_name_nothing_is_lost() -> None:
    before = Result((Interface("eth0", "02:00:00:00:00:01", "/ns", pci_id="0000:04:00.5"),))
    ours = Result((Interface("eth0", "02:00:00:00:00:02", "/ns", 1500),), (IpConfig("10.1.0.5/32", "", 0),))
    assert merged(before, ours) == Result(
        (Interface("eth0", "02:00:00:00:00:02", "/ns", 1500, pci_id="0000:04:00.5"),), ours.ips
    )
    assert len(merged(before, Result((Interface("eth0"),))).interfaces) == 2  # the host's own eth0


def test_without_a_result_before_or_without_ours_the_other_is_the_result() -> None:
    assert merged(Result(), RESULT) == RESULT
    assert merged(RESULT, Result()) == RESULT


def test_an_empty_result_is_one_and_says_so() -> None:
    text = b'{"cniVersion":"1.0.0","interfaces":[],"ips":[],"routes":[]}'
    assert result_json(Result(), "1.0.0") == text
    assert parse_result({"ips": None}) == Result()


def test_a_result_of_an_unknown_version_is_not_written() -> None:
    with pytest.raises(CniError, match=r"version '0\.2\.0' cannot be written"):
        result_json(RESULT, "0.2.0")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"cniVersion": "0.2.0"}, "prevResult.cniVersion '0.2.0' is not supported"),
        ({"cniVersion": ["x"]}, "prevResult.cniVersion ['x'] is not supported"),
        ({"interfaces": {}}, "prevResult.interfaces is {}, which is not a list"),
        ({"interfaces": [{}]}, "prevResult.interfaces[0].name is missing"),
        (
            {"interfaces": [{"name": "a", "mtu": True}]},
            "prevResult.interfaces[0].mtu is True, which is not a",
        ),
        (
            {"interfaces": [{"name": "a", "mtu": -1}]},
            "prevResult.interfaces[0].mtu is -1, which is not between",
        ),
        (
            {"interfaces": [{"name": "a", "pciID": 4}]},
            "prevResult.interfaces[0].pciID is 4, which is not a str",
        ),
        (
            {"routes": [{"dst": "10.0.0.0/8", "table": "x"}]},
            "prevResult.routes[0].table is 'x', which is not a n",
        ),
        (
            {"ips": [{"address": "x"}]},
            "prevResult.ips[0].address is 'x', which is not an address with a prefix",
        ),
        ({"ips": [{"address": "10.0.0.1"}]}, "prevResult.ips[0].address is '10.0.0.1', which is not"),
        (
            {"ips": [{"address": "10.0.0.1/8", "gateway": "x"}]},
            "prevResult.ips[0].gateway is 'x', which is not",
        ),
        (
            {"ips": [{"address": "10.0.0.1/8", "interface": 0}]},
            "prevResult.ips[0].interface is 0, but there are 0",
        ),
        (
            {"ips": [{"address": "10.0.0.1/255.0.0.0"}]},
            "prevResult.ips[0].address is '10.0.0.1/255.0.0.0', which",
        ),
        ({"routes": [{"dst": "x/y"}]}, "prevResult.routes[0].dst is 'x/y', which is not an address with"),
        ({"routes": ["x"]}, "prevResult.routes[0] is 'x', which is not an object"),
        ({"dns": {"options": [None]}}, "prevResult.dns.options has None in it, which is not a string"),
    ],
)
def test_a_wrong_result_is_refused_by_the_name_of_its_field(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(CniError) as caught:
        parse_result(raw)
    assert caught.value.msg.startswith(message)


text = st.text(max_size=20)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), text)
json_values = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3))
)
RESULT_KEYS = ["cniVersion", "interfaces", "ips", "routes", "dns"]
ITEM_KEYS = [
    "name",
    "mac",
    "mtu",
    "sandbox",
    "address",
    "gateway",
    "interface",
    "dst",
    "gw",
    "domain",
    "search",
    "socketPath",
    "pciID",
    "advmss",
    "priority",
    "table",
    "scope",
]


@given(
    st.dictionaries(
        st.sampled_from(RESULT_KEYS),
        st.one_of(
            json_values, st.lists(st.dictionaries(st.sampled_from(ITEM_KEYS), json_values), max_size=3)
        ),
    )
)
def test_any_result_is_parsed_or_refused(raw: dict[str, Any]) -> None:
    try:
        result = parse_result(raw)
    except CniError as error:
        assert error.code in (1, 7)
    else:
        back = parse_result(json.loads(result_json(result, "1.1.0")))
        assert (back.interfaces, back.ips, back.routes) == (result.interfaces, result.ips, result.routes)


numbers = st.one_of(st.none(), st.integers(0, 2**32 - 1))
words = st.text(max_size=8)
addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str)
cidrs = st.builds(lambda address: f"{address}/{128 if ':' in address else 32}", addresses)
gateways = st.one_of(st.just(""), addresses)
interfaces = st.builds(Interface, words.filter(bool), words, words, numbers, words, words)
routes = st.builds(Route, cidrs, gateways, numbers, numbers, numbers, numbers, numbers)
nameservers = st.lists(addresses, max_size=2, unique=True)
dns = st.fixed_dictionaries({}, optional={"nameservers": nameservers, "domain": words})


@st.composite
def results(draw: st.DrawFn) -> Result:
    found = tuple(draw(st.lists(interfaces, max_size=3, unique_by=lambda one: (one.name, one.sandbox))))
    index = st.one_of(st.none(), st.integers(0, len(found) - 1)) if found else st.none()
    ips = draw(st.lists(st.builds(IpConfig, cidrs, gateways, index), max_size=3, unique=True))
    return Result(found, tuple(ips), tuple(draw(st.lists(routes, max_size=3, unique=True))), draw(dns))


@given(results(), st.sampled_from(spec.SUPPORTED_VERSIONS))
def test_results_come_back_from_json_without_what_their_version_does_not_have(
    result: Result, version: str
) -> None:
    back = parse_result(json.loads(result_json(result, version)))
    if version != "1.1.0":
        result = Result(
            tuple(Interface(one.name, one.mac, one.sandbox) for one in result.interfaces),
            result.ips,
            tuple(Route(route.dst, route.gw) for route in result.routes),
            result.dns,
        )
    assert back == result


@given(results(), results())
def test_a_merged_result_has_all_of_the_one_before_first_and_points_at_the_right_interfaces(
    before: Result, ours: Result
) -> None:
    whole = merged(before, ours)
    named = [(one.name, one.sandbox) for one in whole.interfaces]
    assert named[: len(before.interfaces)] == [(one.name, one.sandbox) for one in before.interfaces]
    assert len(set(named)) == len(named)
    assert whole.ips[: len(before.ips)] == before.ips
    assert whole.routes[: len(before.routes)] == before.routes
    assert {*ours.routes} <= {*whole.routes}

    def ends(result: Result) -> set[tuple[str, str, str, str]]:
        return {
            (
                ip.address,
                ip.gateway,
                result.interfaces[ip.interface].name,
                result.interfaces[ip.interface].sandbox,
            )
            for ip in result.ips
            if ip.interface is not None
        }

    assert ends(whole) == ends(before) | ends(ours)
    assert merged(whole, ours) == whole
