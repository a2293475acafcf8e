"""What FROM and TO name."""

from __future__ import annotations

import pytest

from netlink.family import Family
from node.trace import ask
from node.trace.ask import AskError, Host, Known, Pod, Service, ServicePort
from node.trace.why import Front, Names

V4, V6 = Family.V4, Family.V6
KNOWN = Known(
    "node1",
    (
        Service(
            "shop/db", ("10.96.0.20", "fd00:96::20", "198.18.0.2"), (ServicePort("sql", 6, 5432, 30180),)
        ),
        Service("shop/dns", ("10.96.0.21",), (ServicePort("udp", 17, 53), ServicePort("tcp", 6, 53))),
        Service("shop/two", ("10.96.0.22",), (ServicePort("a", 6, 80), ServicePort("b", 6, 81))),
        Service("default/web", ("10.96.0.23",), (ServicePort("", 6, 80),)),
    ),
    (
        Pod("shop/a", "node1", ("10.244.1.2", "fd00:244:1::2"), "pwpoda"),
        Pod("default/web-1", "node2", ("10.244.2.2",)),
        Pod("shop/twin", "node1", ("10.244.1.3",), "pwpodt"),
        Pod("test/twin", "node1", ("10.244.1.4",), "pwpodu"),
    ),
    (Host("node1", ("192.168.50.11", "fd00:192::11")), Host("node2", ("192.168.50.12",), ("10.244.2.0/24",))),
    Names((Front("shop/db:sql", "10.96.0.20", 6, 5432), Front("shop/db:sql", "", 6, 30180))),
)


@pytest.mark.parametrize(
    ("text", "address", "place", "outside"),
    [
        ("shop/a", "10.244.1.2", "node1", False),
        ("pod:shop/a", "10.244.1.2", "node1", False),
        ("a", "10.244.1.2", "node1", False),
        ("10.244.1.2", "10.244.1.2", "node1", False),
        ("web-1", "10.244.2.2", "node2", False),
        ("node", "", "node1", False),
        ("node:node2", "", "node2", False),
        ("node2", "", "node2", False),
        ("192.168.50.12", "192.168.50.12", "node2", False),
        ("198.51.100.10", "198.51.100.10", "node1", True),
        ("10.244.2.9", "10.244.2.9", "node2", True),
    ],
)
def test_from_names_a_pod_a_node_or_an_address(text: str, address: str, place: str, outside: bool) -> None:
    found = ask.source(text, KNOWN, V4)
    assert (found.address, found.place, found.outside) == (address, place, outside)


@pytest.mark.parametrize(
    ("text", "family", "protocol", "address", "port", "number"),
    [
        ("shop/db", V4, None, "10.96.0.20", 5432, 6),
        ("svc:shop/db:sql", V6, None, "fd00:96::20", 5432, 6),
        ("shop/db:5432", V4, None, "10.96.0.20", 5432, 6),
        ("shop/db:99", V4, None, "10.96.0.20", 99, 6),
        ("shop/dns:53", V4, 17, "10.96.0.21", 53, 17),
        ("shop/two:b", V4, None, "10.96.0.22", 81, 6),
        ("web", V4, None, "10.96.0.23", 80, 6),
        ("node:30180", V4, None, "192.168.50.11", 30180, 6),
        ("node2:30180", V4, 17, "192.168.50.12", 30180, 17),
        ("pod:shop/a:8080", V6, None, "fd00:244:1::2", 8080, 6),
        ("shop/a:8080", V4, None, "10.244.1.2", 8080, 6),
        ("10.96.0.20:5432", V4, None, "10.96.0.20", 5432, 6),
        ("[fd00:96::20]:5432", V6, None, "fd00:96::20", 5432, 6),
    ],
)
def test_to_names_a_service_a_node_port_a_pod_or_an_address(
    text: str, family: Family, protocol: int | None, address: str, port: int, number: int
) -> None:
    found = ask.target(text, KNOWN, family, protocol)
    assert (found.address, found.port, found.protocol) == (address, port, number)


def test_what_a_target_is_is_said_in_words() -> None:
    assert ask.target("10.96.0.20:5432", KNOWN, V4, None).words == "service shop/db:sql (10.96.0.20:5432/tcp)"
    assert (
        ask.target("node:30180", KNOWN, V4, None).words == "port 30180/tcp of node1, node port of shop/db:sql"
    )
    assert ask.target("10.244.1.2:80", KNOWN, V4, 17).words == "pod shop/a (10.244.1.2:80/udp)"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("shop/two", "TO: say which port of service shop/two: a, b"),
        ("shop/two:c", "TO: say which port of service shop/two: a, b"),
        ("svc:shop/none", "TO: there is no service 'shop/none' on this node"),
        ("10.96.0.20", "TO: '10.96.0.20' needs a port: 10.96.0.20:PORT"),
        ("10.96.0.20:0", "port '0' must be a number from 1 to 65535"),
        ("10.96.0.20:http", "port 'http' must be a number from 1 to 65535"),
        ("node:", "port '' must be a number from 1 to 65535"),
        ("node:nowhere:80", "TO: there is no node 'nowhere'; there is node1, node2"),
        ("elsewhere:80", "TO: 'elsewhere' is no service, pod, node or address that is known here"),
        ("pod:shop/a", "TO: pod 'shop/a' needs a port: shop/a:PORT"),
        ("shop/dns", "TO: service shop/dns has no address of IPv6"),
    ],
)
def test_what_cannot_be_found_is_a_sentence(text: str, sentence: str) -> None:
    family = V6 if "IPv6" in sentence else V4
    with pytest.raises(AskError) as refused:
        ask.target(text, KNOWN, family, None)
    assert str(refused.value) == sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("node:node9", "FROM: there is no node 'node9'; there is node1, node2"),
        ("shop/none", "FROM: no pod 'shop/none' is known on this node; its address works too"),
        ("twin", "FROM: 'twin' is a pod of several names: shop/twin, test/twin"),
    ],
)
def test_a_source_that_is_not_there_is_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(AskError) as refused:
        ask.source(text, KNOWN, V4)
    assert str(refused.value) == sentence


def test_without_a_daemon_it_says_why_services_are_not_known() -> None:
    unknown = Known("node1", services_known=False)
    with pytest.raises(AskError, match="the daemon, which knows services, does not answer"):
        ask.target("shop/db", unknown, V4, None)


def test_addresses_say_the_family() -> None:
    assert ask.family_of("shop/a", "[fd00::1]:80") is V6
    assert ask.family_of("shop/a", "10.0.0.1:80") is V4
    assert ask.family_of("shop/a", "node:80") is None
