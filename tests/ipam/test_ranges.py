import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from netaddr import IPAddress, IPNetwork

from ipam.ranges import (
    LARGEST_POOL,
    RangeError,
    capacity,
    gateway,
    parse_pod_cidrs,
    pod_addresses,
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
    pods = pod_addresses(cidr)
    assert (IPAddress(pods.first, pods.version), IPAddress(pods.last, pods.version)) == (
        IPAddress(first),
        IPAddress(last),
    )
    assert capacity(cidr) == pods.size == size
    assert gateway(cidr) == IPAddress(first) - 1
