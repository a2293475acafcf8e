import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from netaddr import IPAddress, IPNetwork

from ipam.ranges import (
    LARGEST_POOL,
    AddressRange,
    RangeError,
    capacity,
    gateway,
    limit,
    overlapping,
    parse_pod_cidrs,
    parse_range,
    pod_addresses,
    single,
    subtract,
    total,
    whole,
)

small_ranges = st.builds(
    lambda version, first, size: AddressRange(version, first, first + size),
    st.sampled_from([4, 6]),
    st.integers(0, 30),
    st.integers(0, 10),
)


def test_one_range_per_family_keeps_the_order() -> None:
    assert parse_pod_cidrs(["fd00:1::/64", "10.1.0.0/24"]) == (
        IPNetwork("fd00:1::/64"),
        IPNetwork("10.1.0.0/24"),
    )
    assert parse_pod_cidrs([]) == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["10.1.0.7/24"], "podCIDRs: '10.1.0.7/24' has host bits set; write '10.1.0.0/24'"),
        (["fd00::1/64"], "podCIDRs: 'fd00::1/64' has host bits set; write 'fd00::/64'"),
        (["10.1.0.0"], "podCIDRs: '10.1.0.0' is not a CIDR such as 10.1.0.0/24 or fd00:1::/64"),
        (["10.1.0.0/255.255.0.0"], "'10.1.0.0/255.255.0.0' is not a CIDR"),
        (["10.1.0.0/24", "10.2.0.0/24"], "'10.2.0.0/24' is a second IPv4 range beside '10.1.0.0/24'"),
        (["10.1.0.0/31"], "'10.1.0.0/31' has no room for a pod address"),
        (["fd00::/127"], "'fd00::/127' has no room for a pod address"),
    ],
)
def test_a_wrong_value_is_named_in_the_error(values: list[str], message: str) -> None:
    with pytest.raises(RangeError) as caught:
        parse_pod_cidrs(values)
    assert message in str(caught.value)


@given(st.text() | st.builds("{}/{}".format, st.ip_addresses(), st.integers(-1, 130)))
@example("10.0.0.0\0/24")
@example("\ud800/24")
@example("10.0.0.0/²")
def test_any_text_is_a_range_or_a_range_error(value: str) -> None:
    try:
        (cidr,) = parse_pod_cidrs([value])
    except RangeError:
        return
    assert cidr.ip == cidr.network and capacity(cidr) >= 1


@pytest.mark.parametrize(
    ("value", "first", "last", "size"),
    [
        ("10.1.0.0/24", "10.1.0.2", "10.1.0.254", 253),
        ("10.1.0.0/30", "10.1.0.2", "10.1.0.2", 1),
        ("fd00::/126", "fd00::2", "fd00::3", 2),
        ("fd00::/64", "fd00::2", "fd00::1:1", LARGEST_POOL),
    ],
)
def test_pods_get_neither_network_nor_gateway_nor_broadcast(
    value: str, first: str, last: str, size: int
) -> None:
    (cidr,) = parse_pod_cidrs([value])
    (pods,) = limit(pod_addresses(cidr))
    assert pods == AddressRange(cidr.version, int(IPAddress(first)), int(IPAddress(last)))
    assert capacity(cidr) == pods.size == size
    assert gateway(cidr) == IPAddress(first) - 1


@pytest.mark.parametrize(
    ("text", "printed", "size"),
    [
        ("10.1.0.5", "10.1.0.5", 1),
        ("10.1.0.0/28", "10.1.0.0-10.1.0.15", 16),
        ("10.1.0.5-10.1.0.9", "10.1.0.5-10.1.0.9", 5),
        (" 10.1.0.5 - 10.1.0.9 ", "10.1.0.5-10.1.0.9", 5),
        ("fd00::5-fd00::5", "fd00::5", 1),
        ("fd00::/64", "fd00::-fd00::ffff:ffff:ffff:ffff", 2**64),
    ],
)
def test_a_range_is_an_address_a_cidr_or_two_addresses(text: str, printed: str, size: int) -> None:
    parsed = parse_range(text)
    assert (str(parsed), parsed.size) == (printed, size)
    assert parse_range(str(parsed)) == parsed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "exclude: '' is not an address, a CIDR or a range such as 10.1.0.5-10.1.0.9"),
        ("10.1", "exclude: '10.1' is not an address"),
        ("10.1.0.5-", "exclude: '10.1.0.5-' is not an address"),
        ("10.1.0.0/255.255.255.0", "is not an address, a CIDR"),
        ("10.1.0.5/24", "exclude: '10.1.0.5/24' has host bits set; write '10.1.0.0/24'"),
        ("10.1.0.9-10.1.0.5", "exclude: '10.1.0.9-10.1.0.5' does not go upwards"),
        ("10.1.0.9-fd00::1", "does not go upwards from one address to another of its family"),
    ],
)
def test_a_wrong_range_is_named_with_its_field(text: str, message: str) -> None:
    with pytest.raises(RangeError) as caught:
        parse_range(text, "exclude")
    assert message in str(caught.value)


@given(st.text() | st.builds("{}-{}".format, st.ip_addresses(), st.ip_addresses()))
@example("10.0.0.0\0-10.0.0.1")
@example("fe80::1%eth0")
def test_any_text_is_an_address_range_or_a_range_error(text: str) -> None:
    try:
        parsed = parse_range(text)
    except RangeError:
        return
    assert parsed.size >= 1 and parse_range(str(parsed)) == parsed


def members(ranges: object) -> set[tuple[int, int]]:
    return {(r.version, n) for r in ranges for n in range(r.first, r.last + 1)}  # type: ignore[attr-defined]


@given(st.lists(small_ranges, max_size=4), st.lists(small_ranges, max_size=4), st.integers(0, 40))
def test_range_arithmetic_is_set_arithmetic(
    ranges: list[AddressRange], without: list[AddressRange], size: int
) -> None:
    left = subtract(ranges, without)
    assert members(left) == members(ranges) - members(without)
    if overlapping(ranges) is None:
        assert overlapping(left) is None and total(left) == len(members(left))
        assert total(limit(left, size)) == min(size, total(left))
        assert subtract(limit(left, size), left) == ()
    else:
        one, other = overlapping(ranges) or (None, None)
        assert one and other and members([one]) & members([other])


def test_an_address_is_in_its_range_and_in_no_other() -> None:
    (cidr,) = parse_pod_cidrs(["10.1.0.0/29"])
    assert IPAddress("10.1.0.7") in whole(cidr) and IPAddress("10.1.0.8") not in whole(cidr)
    assert IPAddress(int(IPAddress("10.1.0.3")), 6) not in whole(cidr), "the same number in another family"
    assert single(IPAddress("10.1.0.3")) == parse_range("10.1.0.3")
