"""All that a Service, an EndpointSlice and a Node say about addresses, affinity, health and topology."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.sources.objects import ObjectError, parse
from proxy.model import Endpoint, EndpointSlice, Node, Service, TrafficPolicy
from tests.node.test_objects import node, only_endpoint, piece, places, service, values

SOURCE_RANGES = "service.beta.kubernetes.io/load-balancer-source-ranges"


def balanced(*ingress: dict[str, Any], annotation: str | None = None, **spec: Any) -> dict[str, Any]:
    document = service(**({"type": "LoadBalancer"} | spec))
    document["status"] = {"loadBalancer": {"ingress": [*ingress]}}
    if annotation is not None:
        document["metadata"]["annotations"] = {SOURCE_RANGES: annotation}
    return document


def sticky(timeout: Any) -> dict[str, Any]:
    config = {"clientIP": {"timeoutSeconds": timeout}}
    return service(sessionAffinity="ClientIP", sessionAffinityConfig=config)


def labelled(label: str) -> dict[str, Any]:
    return piece(metadata={"name": "p", "labels": {"kubernetes.io/service-name": "web", label: ""}})


def read(document: Any) -> Service:
    """The service of a document with nothing wrong in it."""
    left_out: list[str] = []
    found = parse(document, left_out)
    assert isinstance(found, Service)
    assert left_out == []
    return found


def what_is_left_out(document: Any) -> tuple[Service, list[str]]:
    left_out: list[str] = []
    found = parse(document, left_out)
    assert isinstance(found, Service)
    return found, left_out


def test_a_load_balancer_service_as_the_api_server_returns_it() -> None:
    document = balanced(
        {"ip": "203.0.113.10", "ipMode": "VIP", "ports": [{"port": 80, "protocol": "TCP"}]},
        {"ip": "2001:DB8::10"},
        clusterIPs=["10.96.0.1", "fd00:96::1"],
        externalIPs=["198.51.100.7", "2001:DB8:0::7", "198.51.100.7"],
        externalTrafficPolicy="Local",
        healthCheckNodePort=32100,
        allocateLoadBalancerNodePorts=True,
        loadBalancerSourceRanges=["192.0.2.0/24", "2001:DB8:1::/48"],
        sessionAffinity="ClientIP",
        sessionAffinityConfig={"clientIP": {"timeoutSeconds": 600}},
        ports=[{"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30080}],
    )
    found = read(document)
    assert found.balancer_ips == ("203.0.113.10", "2001:db8::10")
    assert found.external_ips == ("198.51.100.7", "2001:db8::7")
    assert found.source_ranges == ("192.0.2.0/24", "2001:db8:1::/48")
    assert (found.affinity_seconds, found.health_port) == (600, 32100)
    assert found.external_policy is TrafficPolicy.LOCAL


def test_without_allocated_node_ports_a_balancer_is_served_all_the_same() -> None:
    found = read(balanced({"ip": "203.0.113.10"}, allocateLoadBalancerNodePorts=False))
    assert [port.node_port for port in found.ports] == [0]
    assert found.balancer_ips == ("203.0.113.10",)


@pytest.mark.parametrize(
    ("ingress", "addresses"),
    [
        ({"ip": "203.0.113.10", "ipMode": None}, ("203.0.113.10",)),
        ({"ip": "203.0.113.10", "ipMode": "VIP"}, ("203.0.113.10",)),
        ({"ip": "203.0.113.10", "ipMode": "Proxy"}, ()),
        ({"hostname": "lb.example.com"}, ()),
        ({"hostname": "lb.example.com", "ip": None}, ()),
        ({"ip": ""}, ()),
        ({"hostname": "lb.example.com", "ip": "203.0.113.10"}, ("203.0.113.10",)),
        ({}, ()),
    ],
)
def test_only_addresses_that_a_balancer_leaves_in_the_packet_count(
    ingress: dict[str, Any], addresses: tuple[str, ...]
) -> None:
    assert read(balanced(ingress)).balancer_ips == addresses


@pytest.mark.parametrize("status", [None, {}, {"loadBalancer": None}, {"loadBalancer": {"ingress": None}}])
def test_a_balancer_that_is_not_there_yet_has_no_address(status: Any) -> None:
    assert read(balanced() | {"status": status}).balancer_ips == ()


@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort", None])
def test_what_belongs_to_a_balancer_counts_for_type_load_balancer_only(kind: str | None) -> None:
    found = read(
        balanced(
            {"ip": "203.0.113.10"},
            annotation="192.0.2.0/24",
            type=kind,
            externalTrafficPolicy="Local",
            healthCheckNodePort=32100,
            loadBalancerSourceRanges=["192.0.2.0/24"],
        )
    )
    assert (found.balancer_ips, found.source_ranges, found.health_port) == ((), (), 0)


@pytest.mark.parametrize(
    ("ranges", "annotation", "expected"),
    [
        (None, None, ()),
        ([], None, ()),
        ([" 192.0.2.0/24\t", "\n198.51.100.0/25 "], None, ("192.0.2.0/24", "198.51.100.0/25")),
        (["192.0.2.77/24", "192.0.2.0/24"], None, ("192.0.2.0/24",)),
        (["2001:DB8:0:0::/32", "0.0.0.0/0"], None, ("2001:db8::/32", "0.0.0.0/0")),
        (["192.0.2.0/24"], "198.51.100.0/24", ("192.0.2.0/24",)),
        ([], "192.0.2.0/24, 2001:db8::/32 ,192.0.2.0/24", ("192.0.2.0/24", "2001:db8::/32")),
        (None, "  ", ()),
        (None, "0.0.0.0/0", ()),
        (None, "192.0.2.0/24, 0.0.0.0/0", ()),
    ],
)
def test_source_ranges_are_canonical_and_the_annotation_stands_in_for_the_field(
    ranges: list[str] | None, annotation: str | None, expected: tuple[str, ...]
) -> None:
    document = balanced({"ip": "203.0.113.10"}, annotation=annotation, loadBalancerSourceRanges=ranges)
    assert read(document).source_ranges == expected


@pytest.mark.parametrize(
    ("document", "seconds"),
    [
        (service(), 0),
        (service(sessionAffinity="None", sessionAffinityConfig=None), 0),
        (service(sessionAffinity="None", sessionAffinityConfig={"clientIP": {"timeoutSeconds": 60}}), 0),
        (service(sessionAffinity="ClientIP"), 10800),
        (service(sessionAffinity="ClientIP", sessionAffinityConfig={}), 10800),
        (service(sessionAffinity="ClientIP", sessionAffinityConfig={"clientIP": None}), 10800),
        (sticky(None), 10800),
        (sticky(1), 1),
        (sticky(86400), 86400),
    ],
)
def test_affinity_lasts_as_long_as_the_service_says_or_three_hours(document: Any, seconds: int) -> None:
    assert read(document).affinity_seconds == seconds


@pytest.mark.parametrize(
    ("policy", "port", "expected"),
    [("Local", 32100, 32100), ("Cluster", 32100, 0), (None, 32100, 0), ("Local", 0, 0), ("Local", None, 0)],
)
def test_a_health_check_port_counts_under_policy_local_only(policy: Any, port: Any, expected: int) -> None:
    assert read(balanced(externalTrafficPolicy=policy, healthCheckNodePort=port)).health_port == expected


@pytest.mark.parametrize(
    "document",
    [
        balanced({"ip": "203.0.113.10"}, clusterIP="None", externalIPs=["198.51.100.7"]),
        service(clusterIP="", clusterIPs=[""]),
        service(type="ExternalName", clusterIP="10.96.0.1", externalIPs=["not an address"]),
        labelled("service.kubernetes.io/headless"),
        labelled("service.kubernetes.io/service-proxy-name"),
    ],
)
def test_kube_proxys_selectors_leave_out_services_and_slices_alike(document: Any) -> None:
    left_out: list[str] = []
    assert parse(document, left_out) is None
    assert left_out == []


def test_published_not_ready_addresses_are_ready_in_the_slice_and_that_is_what_counts() -> None:
    """With publishNotReadyAddresses the EndpointSlice controller writes ready: true, also while a pod
    terminates; the Service's field itself changes nothing here.
    """
    assert parse(service(publishNotReadyAddresses=True)) == parse(service())
    found = only_endpoint(conditions={"ready": True, "serving": False, "terminating": True})
    assert found == Endpoint("10.244.1.10", "", ready=True, serving=False, terminating=True)


@pytest.mark.parametrize(
    ("hints", "zones", "nodes"),
    [
        (None, (), ()),
        ({}, (), ()),
        ({"forZones": None, "forNodes": None}, (), ()),
        ({"forZones": [{"name": "zone-a"}, {"name": "zone-b"}]}, ("zone-a", "zone-b"), ()),
        ({"forNodes": [{"name": "node1"}], "forZones": [{"name": "zone-a"}]}, ("zone-a",), ("node1",)),
        ({"forZones": [{"name": ""}]}, (), ()),
    ],
)
def test_hints_name_zones_and_nodes(hints: Any, zones: tuple[str, ...], nodes: tuple[str, ...]) -> None:
    found = only_endpoint(hints=hints)
    assert (found.zone_hints, found.node_hints) == (zones, nodes)


@pytest.mark.parametrize("fields", [{}, {"nodeName": None}, {"nodeName": ""}])
def test_an_endpoint_may_be_on_no_node(fields: dict[str, Any]) -> None:
    assert only_endpoint(**fields).node == ""


@pytest.mark.parametrize(
    ("labels", "zone"),
    [
        (None, ""),
        ({}, ""),
        ({"topology.kubernetes.io/zone": ""}, ""),
        ({"topology.kubernetes.io/zone": "eu-west-1a", "topology.kubernetes.io/region": "eu"}, "eu-west-1a"),
    ],
)
def test_a_nodes_zone_is_its_label(labels: Any, zone: str) -> None:
    assert parse(node(labels=labels)) == Node("node1", zone=zone)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "::1", "0.0.0.0", "::", "169.254.169.254", "fe80::1", "224.0.0.1", "ff02::1"),
        *(
            "255.255.255.255",
            "::ffff:10.0.0.1",
            "010.0.0.1",
            "10.0.0.0/8",
            "fe80::1%eth0",
            "a.example",
            "\n",
            "1",
        ),
    ],
)
def test_an_outside_address_nobody_can_have_is_left_out_alone(address: str) -> None:
    """The rest of the service is served: addresses of balancers are written by others than its owner."""
    found, left_out = what_is_left_out(
        balanced({"ip": address}, {"ip": "203.0.113.10"}, externalIPs=["198.51.100.7", address])
    )
    assert found.cluster_ips == ("10.96.0.1",)
    assert (found.balancer_ips, found.external_ips) == (("203.0.113.10",), ("198.51.100.7",))
    places = ("spec.externalIPs[1]", "status.loadBalancer.ingress[0].ip")
    assert len(left_out) == len(places)
    for sentence, place in zip(left_out, places, strict=True):
        assert sentence.startswith(f"Service shop/web: {place} {address!r} is ")
        assert sentence.endswith(": left out")
        assert sentence.isprintable()


def test_a_mode_that_is_not_known_leaves_its_address_out() -> None:
    found, left_out = what_is_left_out(balanced({"ip": "203.0.113.10", "ipMode": "Tunnel\n"}))
    assert found.balancer_ips == ()
    sentence = r"status.loadBalancer.ingress[0].ipMode 'Tunnel\n' is none of VIP, Proxy: left out"
    assert left_out == [f"Service shop/web: {sentence}"]


def test_what_is_left_out_need_not_be_asked_for() -> None:
    assert parse(service(externalIPs=["::1"])) == parse(service())


def ranged(*ranges: Any, annotation: str | None = None) -> dict[str, Any]:
    return balanced({"ip": "203.0.113.10"}, annotation=annotation, loadBalancerSourceRanges=[*ranges])


AFFINITY = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
RANGES = "spec.loadBalancerSourceRanges"
ZONE = "topology.kubernetes.io/zone"
WRONG = [
    (ranged("10.0.0.1"), f"{RANGES} '10.0.0.1' is not a CIDR"),
    (ranged("10.0.0.0/33"), f"{RANGES} '10.0.0.0/33' is not a CIDR"),
    (ranged("10.0.0.0/255.0.0.0"), f"{RANGES} '10.0.0.0/255.0.0.0' is not a CIDR"),
    (ranged("10.0.0.0/-1"), f"{RANGES} '10.0.0.0/-1' is not a CIDR"),
    (ranged("fe80::%eth0/64"), f"{RANGES} 'fe80::%eth0/64' is not a CIDR"),
    (ranged("10.0.0.0/٨"), f"{RANGES} '10.0.0.0/٨' is not a CIDR"),
    (ranged(""), f"{RANGES} '' is not a CIDR"),
    (ranged("10.0.0.0/8", "all"), f"{RANGES} 'all' is not a CIDR"),
    (ranged("10.0.0.0/8", None), f"{RANGES}[1]: Expected `str`, got `null`"),
    (ranged(annotation="10.0.0.0/8,,"), f"metadata.annotations[{SOURCE_RANGES}] '' is not a CIDR"),
    (ranged(annotation="a\x1b[2Jb"), rf"metadata.annotations[{SOURCE_RANGES}] 'a\x1b[2Jb' is not a CIDR"),
    (sticky(0), f"{AFFINITY} 0 is not in 1 to 86400"),
    (sticky(86401), f"{AFFINITY} 86401 is not in 1 to 86400"),
    (sticky(-(2**70)), f"{AFFINITY} -1180591620717411303424 is not in 1 to 86400"),
    (sticky(10**5000), ""),
    (sticky("60"), f"{AFFINITY} '60': Expected `int | null`, got `str`"),
    (sticky(True), f"{AFFINITY} True: Expected `int | null`, got `bool`"),
    (service(sessionAffinity="Cookie"), "spec.sessionAffinity 'Cookie' is none of None, ClientIP"),
    (balanced(externalTrafficPolicy="Local", healthCheckNodePort=65536),
     "spec.healthCheckNodePort 65536 is not a port (1 to 65535)"),
    (balanced(externalTrafficPolicy="Local", healthCheckNodePort=-1),
     "spec.healthCheckNodePort -1 is not a port (1 to 65535)"),
    (service(externalIPs="10.0.0.1"), "spec.externalIPs '10.0.0.1': Expected `array | null`, got `str`"),
    (service(externalIPs=[7]), "spec.externalIPs[0] 7: Expected `str`, got `int`"),
    (balanced({"ip": 7}), "status.loadBalancer.ingress[0].ip 7: Expected `str | null`, got `int`"),
    (balanced({"ip": "203.0.113.10", "ipMode": 1}),
     "status.loadBalancer.ingress[0].ipMode 1: Expected `str | null`, got `int`"),
    (service() | {"status": []}, "status: Expected `object | null`, got `array`"),
    (service(clusterIP="255.255.255.255"), "spec.clusterIPs '255.255.255.255' is no address that"),
    (service(clusterIP="::ffff:10.96.0.1"), "spec.clusterIPs '::ffff:10.96.0.1' is no address that"),
]  # fmt: skip
WRONG_ELSEWHERE = [
    (piece(endpoints=[{"addresses": ["10.0.0.1"], "hints": {"forZones": [{"name": "a b"}]}}]),
     "EndpointSlice shop/web-x7k2p: endpoints[0].hints.forZones[0].name 'a b' is not a name"),
    (piece(endpoints=[{"addresses": ["10.0.0.1"], "hints": {"forNodes": [{}]}}]),
     "EndpointSlice shop/web-x7k2p: endpoints[0].hints.forNodes[0]: Object missing required field `name`"),
    (piece(endpoints=[{"addresses": ["10.0.0.1"], "nodeName": "n\n"}]),
     r"EndpointSlice shop/web-x7k2p: endpoints[0].nodeName 'n\n' is not a name"),
    (piece(metadata={"name": "p", "namespace": "shop", "labels": {"kubernetes.io/service-name": "../web"}}),
     "EndpointSlice shop/p: metadata.labels[kubernetes.io/service-name] '../web' is not a name"),
    (node(labels={ZONE: "a;b"}), f"Node node1: metadata.labels[{ZONE}] 'a;b' is not a name"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("document", "sentence"),
    [(d, f"Service shop/web: {s}") for d, s in WRONG] + WRONG_ELSEWHERE,
    ids=[s or "an endless number" for _, s in WRONG + WRONG_ELSEWHERE],
)
def test_a_wrong_value_is_one_sentence_with_object_field_and_value(document: Any, sentence: str) -> None:
    left_out: list[str] = []
    with pytest.raises(ObjectError) as caught:
        parse(document, left_out)
    assert str(caught.value).startswith(sentence)
    assert str(caught.value).isprintable()
    assert left_out == []


def whole() -> dict[str, Any]:
    return balanced(
        {"ip": "203.0.113.10", "ipMode": "VIP"},
        annotation="10.0.0.0/8",
        externalIPs=["198.51.100.7"],
        externalTrafficPolicy="Local",
        healthCheckNodePort=32100,
        loadBalancerSourceRanges=["192.0.2.0/24"],
        sessionAffinity="ClientIP",
        sessionAffinityConfig={"clientIP": {"timeoutSeconds": 600}},
    )


def hinted() -> dict[str, Any]:
    hints = {"forZones": [{"name": "a"}], "forNodes": [{"name": "b"}]}
    conditions = {"ready": True, "serving": None, "terminating": False}
    return piece(
        endpoints=[{"addresses": ["10.0.0.1"], "nodeName": "n", "hints": hints, "conditions": conditions}]
    )


@given(st.data())
def test_any_one_place_changed_leaves_a_value_nothing_or_an_error(data: st.DataObject) -> None:
    document = data.draw(st.builds(whole) | st.builds(hinted))
    container, key = data.draw(st.sampled_from(places(document)))
    container[key] = data.draw(values | st.integers() | st.text())
    left_out: list[str] = []
    try:
        found = parse(document, left_out)
    except ObjectError as error:
        assert "\n" not in str(error)
        return
    assert found is None or isinstance(found, Service | EndpointSlice)
    assert all("\n" not in sentence for sentence in left_out)
    if isinstance(found, Service):
        assert found.affinity_seconds in range(86401)
        assert found.health_port in range(65536)
