"""Kubernetes documents become model values, nothing, or one sentence about what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netlink.family import Family
from node.sources.objects import ObjectError, identity, parse
from proxy.model import (
    Endpoint,
    EndpointPort,
    EndpointSlice,
    Node,
    ObjectName,
    Protocol,
    Service,
    ServicePort,
    TrafficPolicy,
)

WEB = ObjectName("shop", "web")


def service(labels: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    metadata = {"name": "web", "namespace": "shop", "labels": labels}
    whole = {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]} | spec
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": whole}


def piece(**fields: Any) -> dict[str, Any]:
    labels = {"kubernetes.io/service-name": "web"}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "web-x7k2p", "namespace": "shop", "labels": labels},
        "addressType": "IPv4",
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
        "endpoints": [{"addresses": ["10.244.1.10"]}],
    } | fields


def node(spec: Any = None, status: Any = None, **metadata: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": "node1"} | metadata,
        "spec": spec,
        "status": status,
    }


def only_endpoint(**fields: Any) -> Endpoint:
    found = parse(piece(endpoints=[{"addresses": ["10.244.1.10"]} | fields]))
    assert isinstance(found, EndpointSlice)
    return found.endpoints[0]


def test_a_service_as_the_api_server_returns_it() -> None:
    document = service(
        type="NodePort",
        clusterIP="10.96.0.1",
        clusterIPs=["10.96.0.1", "FD00:96::1"],
        ipFamilyPolicy="PreferDualStack",
        internalTrafficPolicy="Local",
        externalTrafficPolicy="Local",
        sessionAffinity="None",
        selector={"app": "web"},
        ports=[
            {"name": "http", "port": 80, "protocol": "TCP", "targetPort": "http", "nodePort": 30080},
            {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": 5353},
        ],
    )
    assert parse(document | {"status": {"loadBalancer": {}}}) == Service(
        WEB,
        ("10.96.0.1", "fd00:96::1"),
        (ServicePort("http", Protocol.TCP, 80, 30080), ServicePort("dns", Protocol.UDP, 53)),
        TrafficPolicy.LOCAL,
        TrafficPolicy.LOCAL,
    )


def test_what_a_service_leaves_out_is_the_default() -> None:
    document = {
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]},
    }
    assert parse(document) == Service(
        ObjectName("default", "web"), ("10.96.0.1",), (ServicePort("", Protocol.TCP, 80),)
    )


def test_nulls_stand_for_absent() -> None:
    document = service(clusterIPs=None, type=None, internalTrafficPolicy=None, externalTrafficPolicy=None)
    assert parse(document) == parse(service())
    assert parse(service(ports=None)) == Service(WEB, ("10.96.0.1",), ())


@pytest.mark.parametrize(
    "document",
    [
        service(clusterIP="None", clusterIPs=["None"]),
        service(clusterIP="None"),
        service(clusterIP=""),
        service(clusterIP=None),
        service(type="ExternalName", clusterIP=None, externalName="example.com", ports=None),
        service(labels={"service.kubernetes.io/service-proxy-name": "other"}),
        service(labels={"service.kubernetes.io/headless": ""}),
        piece(metadata={"name": "orphan"}),
        piece(addressType="FQDN", endpoints=[{"addresses": ["example.com"]}]),
        {"kind": "Deployment", "metadata": {"name": "web"}},
        {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "metadata": {"name": "w"}, "spec": {}},
        {},
        [],
        "text",
        None,
    ],
    ids=repr,
)
def test_what_is_none_of_the_proxys_business_is_skipped(document: Any) -> None:
    assert parse(document) is None


def test_a_slice_as_the_api_server_returns_it() -> None:
    document = piece(
        addressType="IPv6",
        ports=[{"name": "http", "port": 8080, "protocol": "TCP", "appProtocol": "http"}, {"name": "all"}],
        endpoints=[
            {
                "addresses": ["FD00::A", "fd00::b"],
                "conditions": {"ready": False, "serving": True, "terminating": True},
                "nodeName": "node2",
                "zone": "a",
                "targetRef": {"kind": "Pod", "name": "web-0"},
            }
        ],
    )
    assert parse(document) == EndpointSlice(
        ObjectName("shop", "web-x7k2p"),
        WEB,
        Family.V6,
        (EndpointPort("http", Protocol.TCP, 8080),),
        (Endpoint("fd00::a", "node2", ready=False, serving=True, terminating=True),),
    )


@pytest.mark.parametrize(
    ("conditions", "ready", "serving", "terminating"),
    [
        (None, True, True, False),
        ({}, True, True, False),
        ({"ready": None}, True, True, False),
        ({"ready": False}, False, False, False),
        ({"ready": False, "serving": True}, False, True, False),
        ({"ready": True, "serving": None, "terminating": None}, True, True, False),
        ({"ready": False, "serving": True, "terminating": True}, False, True, True),
    ],
)
def test_an_absent_condition_means_what_the_api_says(
    conditions: dict[str, Any] | None, ready: bool, serving: bool, terminating: bool
) -> None:
    found = only_endpoint(conditions=conditions)
    assert (found.ready, found.serving, found.terminating) == (ready, serving, terminating)


def test_a_node_as_the_api_server_returns_it() -> None:
    document = node(
        {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "FD00:1::/64"], "taints": []},
        {
            "addresses": [
                {"type": "ExternalIP", "address": "203.0.113.7"},
                {"type": "InternalIP", "address": "192.168.50.11"},
                {"type": "Hostname", "address": "node1"},
                {"type": "InternalIP", "address": "FD00:50::11"},
            ]
        },
        deletionTimestamp=None,
    )
    assert parse(document) == Node(
        "node1", ("10.244.1.0/24", "fd00:1::/64"), ("192.168.50.11", "fd00:50::11")
    )


def test_a_node_with_external_addresses_only_is_reached_by_these() -> None:
    addresses = [
        {"type": "Hostname", "address": "node1"},
        {"type": "ExternalIP", "address": "203.0.113.7"},
        {"type": "ExternalIP", "address": "2001:db8::7"},
    ]
    found = parse(node(status={"addresses": addresses}))
    assert found == Node("node1", addresses=("203.0.113.7", "2001:db8::7"))


TUNNEL_ADDRESS, TUNNEL_MAC = "podwire.io/tunnel-address", "podwire.io/tunnel-mac"
EGRESS_ADDRESS = "podwire.io/egress-address"
FIELDS = {TUNNEL_ADDRESS: "tunnel_addresses", TUNNEL_MAC: "tunnel_mac", EGRESS_ADDRESS: "egress_addresses"}


def test_a_node_says_where_its_tunnel_ends() -> None:
    annotations = {TUNNEL_ADDRESS: "192.168.50.11, FD00:50::11", TUNNEL_MAC: "02:AB:cd:00:00:01"}
    left_out: list[str] = []
    assert parse(node(uid="9a-1", annotations=annotations), left_out) == Node(
        "node1",
        uid="9a-1",
        tunnel_addresses=("192.168.50.11", "fd00:50::11"),
        tunnel_mac="02:ab:cd:00:00:01",
    )
    assert not left_out


def test_a_node_says_which_addresses_its_pods_get_towards_the_outside() -> None:
    left_out: list[str] = []
    found = parse(node(annotations={EGRESS_ADDRESS: " 203.0.113.7 , FD00:60::7"}), left_out)
    assert found == Node("node1", egress_addresses=("203.0.113.7", "fd00:60::7"))
    assert not left_out


@pytest.mark.parametrize(
    ("annotation", "value", "kept", "sentence"),
    [
        (TUNNEL_ADDRESS, "", (), ""),
        (TUNNEL_ADDRESS, "10.0.0.1,node1", ("10.0.0.1",), "'node1' is not an IP address: left out"),
        (TUNNEL_ADDRESS, "10.0.0.1,", ("10.0.0.1",), "'' is not an IP address: left out"),
        (TUNNEL_ADDRESS, "10.0.0.1,10.0.0.2", ("10.0.0.1",),
         "'10.0.0.2' is a second address beside '10.0.0.1': left out"),
        (TUNNEL_ADDRESS, "10.0.0.1,10.0.0.1", ("10.0.0.1",), ""),
        (TUNNEL_ADDRESS, "127.0.0.1,fd00::1", ("fd00::1",),
         "'127.0.0.1' is no address that a tunnel can have: left out"),
        (TUNNEL_ADDRESS, "fe80::1%eth0", (), "'fe80::1%eth0' is not an IP address: left out"),
        (EGRESS_ADDRESS, "", (), ""),
        (EGRESS_ADDRESS, "auto", (), "'auto' is not an IP address: left out"),
        (EGRESS_ADDRESS, "203.0.113.0/24,fd00::7", ("fd00::7",),
         "'203.0.113.0/24' is not an IP address: left out"),
        (EGRESS_ADDRESS, "203.0.113.7,203.0.113.8", ("203.0.113.7",),
         "'203.0.113.8' is a second address beside '203.0.113.7': left out"),
        (EGRESS_ADDRESS, "169.254.1.1", (),
         "'169.254.1.1' is no address that pods on their way out can have: left out"),
        (TUNNEL_MAC, "", "", ""),
        (TUNNEL_MAC, "02:00:00:00:00", "", "'02:00:00:00:00' is not a unicast MAC address: left out"),
        (TUNNEL_MAC, "03:00:00:00:00:01", "", "'03:00:00:00:00:01' is not a unicast MAC address: left out"),
        (TUNNEL_MAC, "00:00:00:00:00:00", "", "'00:00:00:00:00:00' is not a unicast MAC address: left out"),
        (TUNNEL_MAC, "02-00-00-00-00-01", "", "'02-00-00-00-00-01' is not a unicast MAC address: left out"),
    ],
)  # fmt: skip
def test_a_wrong_annotation_of_a_node_is_left_out_with_a_sentence(
    annotation: str, value: str, kept: Any, sentence: str
) -> None:
    left_out: list[str] = []
    found = parse(node({"podCIDR": "10.244.1.0/24"}, annotations={annotation: value}), left_out)
    assert isinstance(found, Node) and found.pod_cidrs
    assert getattr(found, FIELDS[annotation]) == kept
    assert left_out == ([f"Node node1: metadata.annotations[{annotation}] {sentence}"] if sentence else [])


def test_a_node_before_it_has_anything() -> None:
    assert parse(node()) == Node("node1")
    assert parse({"kind": "Node", "metadata": {"name": "node1"}}) == Node("node1")


def test_an_old_nodes_single_pod_cidr_counts() -> None:
    assert parse(node({"podCIDR": "10.244.1.0/24"})) == Node("node1", ("10.244.1.0/24",))


@pytest.mark.parametrize(
    "document",
    [
        node(deletionTimestamp="2024-05-01T10:00:00Z"),
        node({"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "value": "1", "effect": "NoSchedule"}]}),
    ],
)
def test_a_node_on_its_way_out_is_deleting(document: Any) -> None:
    assert parse(document) == Node("node1", deleting=True)


WRONG = [
    (service(clusterIP="10.96.0.256"), "spec.clusterIPs '10.96.0.256' is not an IP address"),
    (service(clusterIP="fe80::1%eth0"), "spec.clusterIPs 'fe80::1%eth0' is not an IP address"),
    (service(clusterIP=7), "spec.clusterIP 7: Expected `str | null`, got `int`"),
    (service(ports=[{"port": 80}, {"port": 70000}]), "spec.ports[1].port 70000 is not a port (1 to 65535)"),
    (service(ports=[{"port": 0}]), "spec.ports[0].port 0 is not a port (1 to 65535)"),
    (service(ports=[{"port": "80"}]), "spec.ports[0].port '80': Expected `int`, got `str`"),
    (service(ports=[{}]), "spec.ports[0]: Object missing required field `port`"),
    (service(ports=[{"port": 80, "nodePort": -1}]), "spec.ports[0].nodePort -1 is not a port (1 to 65535)"),
    (service(ports=[{"port": 80, "protocol": "ICMP"}]), "spec.ports[0].protocol 'ICMP' is none of TCP, UDP"),
    (service(ports=[{"port": 80, "name": "a:b"}]), "spec.ports[0].name 'a:b' is not a name"),
    (service(ports="none"), "spec.ports 'none': Expected `array | null`, got `str`"),
    (service(internalTrafficPolicy="local"), "spec.internalTrafficPolicy 'local' is none of Cluster, Local"),
    (service(externalTrafficPolicy="Any"), "spec.externalTrafficPolicy 'Any' is none of Cluster, Local"),
    (piece(addressType="ipv4"), "addressType 'ipv4' is none of IPv4, IPv6, FQDN"),
    (service(clusterIP=10**5000), "spec.clusterIP: Expected `str | null`, got `int`"),
    (service(ports=[{"port": 10**5000}]), ""),
    (piece(addressType=None), "addressType: Expected `str`, got `null`"),
    (piece(endpoints=[{"addresses": []}]), "endpoints[0].addresses is empty"),
    (piece(endpoints=[{}]), "endpoints[0]: Object missing required field `addresses`"),
    (piece(endpoints=[{"addresses": ["fd00::1"]}]), "endpoints[0].addresses[0] 'fd00::1' is not an IPv4"),
    (piece(endpoints=[{"addresses": ["web-0"]}]), "endpoints[0].addresses[0] 'web-0' is not an IP address"),
    (piece(endpoints=[{"addresses": ["10.0.0.1"], "conditions": {"ready": "no"}}]),
     "endpoints[0].conditions.ready 'no': Expected `bool | null`, got `str`"),
    (piece(ports=[{"port": 65536}]), "ports[0].port 65536 is not a port (1 to 65535)"),
    (piece(ports=[{"port": 1, "protocol": "tcp"}]), "ports[0].protocol 'tcp' is none of TCP, UDP, SCTP"),
    (node({"podCIDRs": ["10.244.1.0"]}), "podCIDRs: '10.244.1.0' is not a CIDR"),
    (node({"podCIDRs": ["10.244.1.7/24"]}), "podCIDRs: '10.244.1.7/24' has host bits set"),
    (node({"podCIDRs": [5]}), "spec.podCIDRs[0] 5: Expected `str`, got `int`"),
    (node({"podCIDR": "all"}), "podCIDRs: 'all' is not a CIDR"),
    (node(uid="a\nb"), r"metadata.uid 'a\nb' is not a name of letters"),
    (node(status={"addresses": [{"type": "InternalIP", "address": "node1"}]}),
     "status.addresses[0].address 'node1' is not an IP address"),
]  # fmt: skip


@pytest.mark.parametrize(("document", "sentence"), WRONG, ids=[s or "an endless number" for _, s in WRONG])
def test_a_wrong_field_is_one_sentence_with_object_field_and_value(document: Any, sentence: str) -> None:
    with pytest.raises(ObjectError) as caught:
        parse(document)
    kind, name = identity(document)
    assert str(caught.value).startswith(f"{kind} {name}: {sentence}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"name": 5}, "Service default/?: metadata.name 5: Expected `str`, got `int`"),
        ({"name": "a\nb"}, r"Service default/?: metadata.name 'a\nb' is not a name"),
        ({"name": "a/b"}, "Service default/a/b: metadata.name 'a/b' is not a name"),
        ({"name": "a", "namespace": "x:y"}, "Service x:y/a: metadata.namespace 'x:y' is not a name"),
        ({"name": "a", "labels": {"b": 1}}, "Service default/a: metadata.labels[...]: Expected `str`, got"),
        ("a", "Service default/?: metadata 'a': Expected `object`, got `str`"),
        ({}, "Service default/?: metadata: Object missing required field `name`"),
    ],
)
def test_wrong_metadata_is_named_too(metadata: Any, sentence: str) -> None:
    with pytest.raises(ObjectError) as caught:
        parse(service() | {"metadata": metadata})
    assert str(caught.value).startswith(sentence)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.dates()
    | st.sampled_from(["10.0.0.1", "fd00::1", "10.0.0.0/24", "TCP", "IPv4", "Local", "None", 80])
)
WORDS = sorted(
    {"clusterIP", "clusterIPs", "ports", "port", "protocol", "nodePort", "metadata", "name", "labels"}
    | {"endpoints", "addresses", "conditions", "ready", "podCIDR", "podCIDRs", "status", "taints", "key"}
    | {"annotations", "uid", "podwire.io/tunnel-mac", "podwire.io/tunnel-address"}
    | {EGRESS_ADDRESS}
    | {"kubernetes.io/service-name", "spec", "type", "addressType", "address", "namespace"}
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(WORDS) | st.text() | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)
kinds = st.sampled_from(["Service", "EndpointSlice", "Node"])


def good_or_one_sentence(document: Any) -> None:
    try:
        found = parse(document)
    except ObjectError as error:
        assert "\n" not in str(error)
    else:
        assert found is None or isinstance(found, Service | EndpointSlice | Node)
    kind, name = identity(document)
    assert (kind + name).isprintable()


@given(values)
def test_any_document_is_a_value_nothing_or_an_error(document: Any) -> None:
    good_or_one_sentence(document)


@given(st.dictionaries(st.sampled_from(WORDS), values), kinds | scalars)
def test_any_document_of_our_kinds_is_a_value_nothing_or_an_error(document: Any, kind: Any) -> None:
    good_or_one_sentence(document | {"kind": kind})


def places(document: Any) -> list[tuple[Any, Any]]:
    """Every place in a document: the container and the key in it."""
    pairs = document.items() if isinstance(document, dict) else enumerate(document)
    found = []
    for key, value in list(pairs):
        found.append((document, key))
        if isinstance(value, dict | list):
            found += places(value)
    return found


@given(st.data())
def test_a_good_document_with_one_place_changed_is_a_value_nothing_or_an_error(data: st.DataObject) -> None:
    document = data.draw(
        st.builds(service, externalTrafficPolicy=st.just("Local"), clusterIPs=st.just(["10.0.0.1"]))
        | st.builds(piece)
        | st.builds(lambda: node({"podCIDRs": ["10.0.0.0/24"]}, {"addresses": [{"type": "InternalIP"}]}))
    )
    container, key = data.draw(st.sampled_from(places(document)))
    container[key] = data.draw(values)
    good_or_one_sentence(document)
