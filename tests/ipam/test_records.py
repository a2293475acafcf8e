import pytest
from netaddr import IPAddress

from ipam.records import Attachment, Exhausted, HostPort, Key, Shortage, State

TCP, UDP = 6, 17


@pytest.mark.parametrize(
    ("mine", "theirs", "both"),
    [
        ("", "", True),
        ("", "10.0.0.1", True),
        ("", "fd00::1", True),
        ("10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("0.0.0.0", "10.0.0.1", True),
        ("0.0.0.0", "0.0.0.0", True),
        ("0.0.0.0", "fd00::1", False),
        ("0.0.0.0", "::", False),
        ("::", "fd00::1", True),
        ("::", "10.0.0.1", False),
        ("::", "", True),
        ("fd00::1", "fd00:0:0::1", True),
        ("not an address", "not an address", True),
        ("not an address", "10.0.0.1", False),
    ],
)
def test_host_ports_conflict_where_some_packet_would_be_for_both(mine: str, theirs: str, both: bool) -> None:
    one, other = HostPort(TCP, 8080, 80, mine), HostPort(TCP, 8080, 81, theirs)
    assert one.conflicts(other) == other.conflicts(one) == both
    assert not one.conflicts(HostPort(UDP, 8080, 80, theirs))
    assert not one.conflicts(HostPort(TCP, 8081, 80, theirs))


def test_a_host_port_is_written_as_people_write_it() -> None:
    assert str(HostPort(TCP, 8080, 80)) == "8080/tcp"
    assert str(HostPort(132, 9, 9, "fd00::1")) == "9/sctp on fd00::1"
    assert str(HostPort(99, 9, 9)) == "9/99"


def test_a_holder_is_named_by_its_pod_if_that_is_known() -> None:
    key = Key("c1", "eth0")
    known = Attachment(key, "n", "", "pw0", (IPAddress(1, 4),), State.ATTACHED, "", "", "b", 1.0, pod="ns/a")
    assert known.holder == "pod ns/a (interface 'eth0' of container 'c1')"
    unknown = Attachment(key, "n", "", "pw0", (), State.ATTACHED, "", "", "b", 1.0)
    assert unknown.holder == "interface 'eth0' of container 'c1'"


def test_retrying_helps_only_when_every_source_has_an_address_on_its_way() -> None:
    soon, later, never = (Shortage("a", 1, 0, 0, wait) for wait in (2.0, 7.5, None))
    assert Exhausted([soon, later]).retry_after == 7.5
    assert Exhausted([soon, never]).retry_after is None
