"""Address plan: podCIDRs 10.1.0.0/28 and fd00:1::/64; pool dmz in the podCIDR, pool lan outside of it."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from netaddr import IPAddress

from ipam.pools import Demand, IpamConfig, Pool, Wish, demands, groups, parse_duration
from ipam.ranges import LARGEST_POOL, RangeError, parse_pod_cidrs, parse_range, total

CIDRS = parse_pod_cidrs(["10.1.0.0/28", "fd00:1::/64"])
FOUR = CIDRS[:1]
CONFIG = IpamConfig.parse(
    {
        "pools": [
            {"name": "dmz", "ranges": ["10.1.0.8-10.1.0.10"], "namespaces": ["front", "edge-*"]},
            {"name": "lan", "ranges": ["192.168.7.0/30", "fd00:2::/64"], "namespaces": ["edge-lan"]},
        ],
        "exclude": ["10.1.0.4"],
        "reserve": ["10.1.0.12-10.1.0.14", "10.1.0.10", "10.9.0.1"],
        "quarantine": "30s",
    }
)


def got(config: IpamConfig, wish: Wish, cidrs: Any = CIDRS) -> list[tuple[str, str]]:
    """Return sources and ranges of the demands; a requested address with an exclamation mark."""
    found = []
    for demand in demands(config, cidrs, wish):
        text = ", ".join(map(str, demand.ranges))
        found.append((demand.source, f"{text}!" if demand.requested is not None else text))
    return found


def addresses(*texts: str) -> tuple[IPAddress, ...]:
    return tuple(map(IPAddress, texts))


def test_without_any_configuration_a_pod_gets_an_address_of_each_podcidr() -> None:
    assert got(IpamConfig(), Wish()) == [
        ("podCIDR 10.1.0.0/28", "10.1.0.2-10.1.0.14"),
        ("podCIDR fd00:1::/64", "fd00:1::2-fd00:1::1:1"),
    ]
    assert got(IpamConfig(), Wish(), ()) == []


def test_pools_exclusions_and_reservations_are_not_given_to_others() -> None:
    assert got(CONFIG, Wish(namespace="other"), FOUR) == [
        ("podCIDR 10.1.0.0/28", "10.1.0.2-10.1.0.3, 10.1.0.5-10.1.0.7, 10.1.0.11")
    ]


@pytest.mark.parametrize(
    ("wish", "source"),
    [
        (Wish(namespace="front"), "pool 'dmz'"),
        (Wish(namespace="edge-1"), "pool 'dmz'"),
        (Wish(namespace="edge-lan"), "pool 'lan'"),  # by name, although a pattern comes before it
        (Wish(namespace="front", pool="lan"), "pool 'lan'"),
        (Wish(pool="dmz"), "pool 'dmz'"),
        (Wish(namespace="fronts"), "podCIDR 10.1.0.0/28"),
        (Wish(), "podCIDR 10.1.0.0/28"),
    ],
)
def test_a_pool_is_chosen_by_name_else_by_namespace(wish: Wish, source: str) -> None:
    assert demands(CONFIG, CIDRS, wish)[0].source == source


def test_a_pod_of_no_known_namespace_is_among_all_but_matches_no_other_pattern() -> None:
    """Not every runtime says the namespace; where pods have nothing but a pool, they get it all the same."""
    config = IpamConfig(pools=(Pool("all", (parse_range("10.2.0.0/24"),), ("*",)),))
    for namespace in ("any", ""):
        assert got(config, Wish(namespace), ()) == [("pool 'all'", "10.2.0.0-10.2.0.255")]
    config = IpamConfig(pools=(Pool("some", (parse_range("10.2.0.0/24"),), ("?*", "x")),))
    assert got(config, Wish(), FOUR)[0][0] == "podCIDR 10.1.0.0/28"


def test_a_family_that_the_pool_lacks_comes_from_the_podcidr() -> None:
    assert got(CONFIG, Wish(pool="dmz")) == [
        ("pool 'dmz'", "10.1.0.8-10.1.0.9"),
        ("podCIDR fd00:1::/64", "fd00:1::2-fd00:1::1:1"),
    ]
    assert [source for source, _ in got(CONFIG, Wish(pool="lan"), FOUR)] == ["pool 'lan'", "pool 'lan'"]


def test_of_a_huge_range_only_the_first_addresses_count() -> None:
    six = demands(CONFIG, CIDRS, Wish(pool="lan"))[1]
    assert total(six.ranges) == LARGEST_POOL and str(six.ranges[0].first) == str(int(IPAddress("fd00:2::")))
    config = IpamConfig(exclude=(parse_range("fd00:1::/80"),))
    (_, rest) = demands(config, CIDRS, Wish())
    assert str(rest.ranges[0]) == "fd00:1:0:0:1::-fd00:1::1:0:0:ffff", "after what is excluded"


def test_a_pool_never_gives_the_podcidrs_gateway() -> None:
    config = IpamConfig(pools=(Pool("low", (parse_range("10.1.0.0/29"),)),))
    assert got(config, Wish(pool="low"), FOUR) == [("pool 'low'", "10.1.0.2-10.1.0.7")]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (("10.1.0.5",), [("podCIDR 10.1.0.0/28", "10.1.0.5!"), ("podCIDR fd00:1::/64", None)]),
        (("10.1.0.13",), [("reserve 10.1.0.12-10.1.0.14", "10.1.0.13!"), ("podCIDR fd00:1::/64", None)]),
        (("10.9.0.1",), [("reserve 10.9.0.1", "10.9.0.1!"), ("podCIDR fd00:1::/64", None)]),
        (("10.1.0.10",), [("pool 'dmz'", "10.1.0.10!"), ("podCIDR fd00:1::/64", None)]),
        (("fd00:2::77",), [("podCIDR 10.1.0.0/28", None), ("pool 'lan'", "fd00:2::77!")]),
        (
            ("fd00:1::ffff:0:1", "192.168.7.0"),
            [("pool 'lan'", "192.168.7.0!"), ("podCIDR fd00:1::/64", "fd00:1::ffff:0:1!")],
        ),
    ],
)
def test_a_requested_address_replaces_its_familys_choice(
    asked: tuple[str, ...], expected: list[tuple[str, str | None]]
) -> None:
    found = got(CONFIG, Wish(addresses=addresses(*asked)))
    assert [source for source, _ in found] == [source for source, _ in expected]
    assert [text for _, text in found if "!" in text] == [text for _, text in expected if text]


def test_a_requested_address_of_a_family_without_podcidr_comes_in_addition() -> None:
    found = got(CONFIG, Wish(addresses=addresses("fd00:2::77")), FOUR)
    assert [text for _, text in found][1:] == ["fd00:2::77!"]


def test_a_fully_reserved_podcidr_serves_pods_that_ask_by_name() -> None:
    config = IpamConfig(reserve=(parse_range("10.1.0.0/28"),))
    assert got(config, Wish(addresses=addresses("10.1.0.9")), FOUR) == [
        ("reserve 10.1.0.0-10.1.0.15", "10.1.0.9!")
    ]
    with pytest.raises(RangeError, match=r"podCIDR 10\.1\.0\.0/28 has no address to give"):
        demands(config, FOUR, Wish())


def test_range_sets_give_one_address_each_and_replace_everything_else() -> None:
    sets = tuple(
        tuple(map(parse_range, texts)) for texts in (["10.1.0.3-10.1.0.5", "10.4.0.0/30"], ["fd00:5::/64"])
    )
    assert got(CONFIG, Wish(pool="lan", range_sets=sets)) == [
        (
            "ipRanges[0] 10.1.0.3-10.1.0.5, 10.4.0.0-10.4.0.3",
            "10.1.0.3, 10.1.0.5, 10.4.0.0-10.4.0.3",
        ),
        ("ipRanges[1] fd00:5::-fd00:5::ffff:ffff:ffff:ffff", "fd00:5::-fd00:5::ffff"),
    ]
    twice = (sets[0], (parse_range("10.6.0.0/30"),))
    asked = got(CONFIG, Wish(range_sets=twice, addresses=addresses("10.6.0.2")))
    assert [text for _, text in asked if "!" in text] == ["10.6.0.2!"]
    assert asked[1][0].startswith("ipRanges[1]"), "the set it lies in, not the first of its family"


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (Wish(pool="dmzz"), "pool: the node has no pool 'dmzz'; the node has 'dmz', 'lan'"),
        (Wish(addresses=addresses("10.1.0.4")), "10.1.0.4 is never given, it lies in exclude 10.1.0.4"),
        (Wish(addresses=addresses("10.1.0.0")), "10.1.0.0 is the network, gateway or broadcast address"),
        (Wish(addresses=addresses("10.1.0.1")), "of podCIDR 10.1.0.0/28"),
        (Wish(addresses=addresses("10.1.0.15")), "10.1.0.15 is the network, gateway or broadcast"),
        (Wish(addresses=addresses("fd00:1::1")), "of podCIDR fd00:1::/64"),
        (
            Wish(addresses=addresses("10.7.0.1")),
            "10.7.0.1 lies in no range of this node (pool 'dmz',",
        ),
        (
            Wish(addresses=addresses("10.1.0.5", "10.1.0.6")),
            "addresses: 10.1.0.6 is a second IPv4 address beside 10.1.0.5",
        ),
        (Wish(range_sets=((),)), "ipRanges[0]: nothing is not a set of ranges of one family"),
        (
            Wish(range_sets=((parse_range("10.4.0.1"), parse_range("fd00::1")),)),
            "ipRanges[0]: 10.4.0.1, fd00::1 is not a set of ranges of one family",
        ),
        (Wish(range_sets=((parse_range("127.0.0.5"),),)), "ipRanges[0]: 127.0.0.5 has addresses that no pod"),
        (Wish(range_sets=((parse_range("10.1.0.4"),),)), "ipRanges[0] 10.1.0.4 has no address to give"),
    ],
)
def test_a_wish_that_cannot_be_met_is_a_sentence(wish: Wish, message: str) -> None:
    with pytest.raises(RangeError) as caught:
        demands(CONFIG, CIDRS, wish)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_node_without_pools_says_so() -> None:
    with pytest.raises(RangeError, match="the node has no pool 'dmz'; it has none"):
        demands(IpamConfig(), CIDRS, Wish(pool="dmz"))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"pool": []}, "ipam: 'pool' is not a known key; did you mean 'pools'?"),
        ({"zzz": 1}, "ipam: 'zzz' is not a known key; known are pools, exclude,"),
        ({"pools": {"name": "a"}}, "pools: {'name': 'a'} is not a list"),
        ({"pools": ["a"]}, "pools[0]: 'a' is not a mapping with the keys name, ranges, namespaces"),
        (
            {"pools": [{"name": "a", "range": []}]},
            "pools[0]: 'range' is not a known key; did you mean 'ran",
        ),
        ({"pools": [{"ranges": ["10.0.0.1"]}]}, "pools[0].name: None is not a name"),
        ({"pools": [{"name": "A b", "ranges": ["10.0.0.1"]}]}, "pools[0].name: 'A b' is not a name"),
        ({"pools": [{"name": "a"}]}, "pools[0].ranges: the pool 'a' has no ranges"),
        ({"pools": [{"name": "a", "ranges": "10.0.0.1"}]}, "pools[0].ranges: '10.0.0.1' is not a list"),
        ({"pools": [{"name": "a", "ranges": [7]}]}, "pools[0].ranges: 7 is not an address"),
        ({"pools": [{"name": "a", "ranges": ["10.0.0.x"]}]}, "pools[0].ranges: '10.0.0.x' is not an address"),
        (
            {"pools": [{"name": "a", "ranges": ["169.254.1.0/24"]}]},
            "pools[0].ranges: 169.254.1.0-169.254.1.255 has addresses that no pod can have",
        ),
        (
            {"pools": [{"name": "a", "ranges": ["10.0.0.0/24", "10.0.0.9"]}]},
            "pools[0].ranges: 10.0.0.0-10.0.0.255 overlaps 10.0.0.9",
        ),
        (
            {"pools": [{"name": "a", "ranges": ["10.0.0.0/24"], "namespaces": ["x", 3]}]},
            "pools[0].namespaces: 3 is not a namespace's name or pattern",
        ),
        (
            {"pools": [{"name": "a", "ranges": ["10.0.0.1"]}, {"name": "a", "ranges": ["10.0.0.2"]}]},
            "pools[1].name: 'a' is the name of two pools",
        ),
        (
            {"pools": [{"name": "a", "ranges": ["10.0.0.1"]}, {"name": "b", "ranges": ["10.0.0.1"]}]},
            "pools: 10.0.0.1 of pool 'a' overlaps 10.0.0.1 of pool 'b'",
        ),
        (
            {
                "pools": [
                    {"name": "a", "ranges": ["10.0.0.1"], "namespaces": ["web"]},
                    {"name": "b", "ranges": ["10.0.0.2"], "namespaces": ["web"]},
                ]
            },
            "pools[1].namespaces: 'web' is claimed by pool 'a' already",
        ),
        ({"exclude": ["10.0.0.5/8"]}, "exclude: '10.0.0.5/8' has host bits set"),
        ({"reserve": None}, "reserve: None is not a list"),
        ({"quarantine": "soon"}, "quarantine: 'soon' is not a time such as 10, '10s', '5m' or '1h'"),
        ({"quarantine": -1}, "quarantine: -1 is not a time"),
        ({"exhausted_status": "yes"}, "exhausted_status: 'yes' is neither true nor false"),
        ([], "ipam: [] is not a mapping"),
    ],
)
def test_a_fault_of_the_configuration_is_named_with_field_and_value(raw: Any, message: str) -> None:
    with pytest.raises(RangeError) as caught:
        IpamConfig.parse(raw)
    assert message in str(caught.value)


json_keys = st.sampled_from(["name", "ranges", "namespaces", "pools", "x"]) | st.text()
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(json_keys, inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["pools", "exclude", "reserve", "quarantine"]), json_values))
def test_any_json_is_a_configuration_or_a_range_error(raw: dict[str, Any]) -> None:
    try:
        config = IpamConfig.parse(raw)
    except RangeError:
        return
    assert IpamConfig.from_json(config.to_json()) == config


def test_a_configuration_survives_the_ledger() -> None:
    assert IpamConfig.from_json(CONFIG.to_json()) == CONFIG
    assert json.loads(CONFIG.to_json())["quarantine"] == 30
    assert IpamConfig.from_json("") == IpamConfig.parse({}) == IpamConfig()
    with pytest.raises(RangeError, match="not JSON"):
        IpamConfig.from_json("{")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (10, 10.0),
        (0, 0.0),
        (0.5, 0.5),
        ("10s", 10.0),
        ("5m", 300.0),
        ("1h", 3600.0),
        ("1h30m", 5400.0),
        ("1.5s", 1.5),
        ("90", 90.0),
    ],
)
def test_a_duration_is_a_number_of_seconds_or_a_text(value: object, seconds: float) -> None:
    assert parse_duration(value) == seconds


@pytest.mark.parametrize(
    "value",
    [True, None, "", "s", "-5s", "5 s", "1d", "٣s", 1e400, float("nan"), 10**400, "9" * 400, [1]],
)
def test_what_is_no_duration_is_refused(value: object) -> None:
    with pytest.raises(RangeError, match=r"podwire\.io/sticky: .* is not a time"):
        parse_duration(value, "podwire.io/sticky")


def test_figures_are_kept_of_each_podcidr_and_of_each_pool_and_family() -> None:
    found = groups(CONFIG, CIDRS)
    assert [(g.name, g.version, total(g.ranges), total(g.reserved), total(g.excluded)) for g in found] == [
        ("10.1.0.0/28", 4, 6, 3, 1),
        ("fd00:1::/64", 6, LARGEST_POOL, 0, 0),
        ("dmz", 4, 2, 1, 0),
        ("lan", 4, 4, 0, 0),
        ("lan", 6, LARGEST_POOL, 0, 0),
    ]


@given(
    st.lists(st.integers(0, 15), max_size=4),
    st.lists(st.integers(0, 15), max_size=4),
    st.lists(st.integers(0, 15), max_size=4, unique=True),
    st.sampled_from(["", "p"]),
)
def test_every_address_is_given_by_one_source_at_most(
    exclude: list[int], reserve: list[int], pool: list[int], wished: str
) -> None:
    """Whatever is configured: no gateway, nothing excluded or reserved, and pools share nothing."""

    def at(number: int) -> Any:
        return parse_range(f"10.1.0.{number}")

    pools = (Pool("p", tuple(map(at, pool))),) if pool else ()
    config = IpamConfig(pools, tuple(map(at, exclude)), tuple(map(at, reserve)))
    wish = Wish(pool=wished if pools else "")
    wanted = set(pool) if wish.pool else set(range(16)) - set(pool)
    wanted -= {0, 1, 15, *exclude, *reserve}
    try:
        (demand,) = demands(config, FOUR, wish)
    except RangeError:
        assert not wanted
    else:
        given_ = {n for n in range(16) if demand.allows(IPAddress(f"10.1.0.{n}"))}
        assert given_ == wanted and isinstance(demand, Demand)
