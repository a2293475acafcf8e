import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from netaddr import IPAddress

from cni import options
from cni.options import Bandwidth, Options, Rate, parse_options
from cni.spec import BAD_CONFIG, BAD_ENVIRONMENT, CniError, Request, parse_request
from ipam.pools import Wish
from ipam.ranges import AddressRange, parse_range
from ipam.records import HostPort

ENV = {"CNI_CONTAINERID": "c0ffee", "CNI_NETNS": "/run/netns/blue", "CNI_IFNAME": "eth0"}
ANNOTATIONS = "io.kubernetes.cri.pod-annotations"


def request(
    runtime: dict[str, Any] | None = None, cni_args: str = "", command: str = "ADD", **config: Any
) -> Request:
    document = {"cniVersion": "1.1.0", "name": "podwire", "runtimeConfig": runtime or {}} | config
    env = ENV | {"CNI_COMMAND": command, "CNI_ARGS": cni_args}
    return parse_request(env, json.dumps(document).encode())


def parsed(runtime: dict[str, Any] | None = None, cni_args: str = "", **config: Any) -> Options:
    return parse_options(request(runtime, cni_args, **config))


def refusal(runtime: dict[str, Any] | None = None, cni_args: str = "", **config: Any) -> CniError:
    with pytest.raises(CniError) as caught:
        parsed(runtime, cni_args, **config)
    return caught.value


def annotated(**values: object) -> dict[str, Any]:
    return {ANNOTATIONS: {f"podwire.io/{key}": value for key, value in values.items()}}


def ranges(*texts: str) -> tuple[AddressRange, ...]:
    return tuple(parse_range(text) for text in texts)


def test_a_plain_add_asks_for_nothing() -> None:
    assert parsed() == Options()
    nulls = {"portMappings": None, "bandwidth": None, "ips": None, "mac": None, "ipRanges": None}
    assert parsed({**nulls, ANNOTATIONS: None}, args={"cni": None}) == Options()
    empty = {"portMappings": [], "bandwidth": {}, "ips": [], "mac": "", "ipRanges": [], ANNOTATIONS: {}}
    assert parsed(empty) == Options()


def test_everything_at_once_is_parsed() -> None:
    wanted = parsed(
        {
            "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}],
            "bandwidth": {"ingressRate": 1000, "ingressBurst": 200},
            "ips": ["10.1.0.5"],
            "mac": "02-00-0A-01-00-05",
            "ipRanges": [[{"subnet": "10.1.0.0/29"}]],
            **annotated(pool="dmz", sticky="30m"),
        },
        "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0",
    )
    assert wanted == Options(
        host_ports=(HostPort(6, 8080, 80),),
        bandwidth=Bandwidth(ingress=Rate(1000, 200)),
        mac="02:00:0a:01:00:05",
        wish=Wish("shop", "dmz", (IPAddress("10.1.0.5"),), (ranges("10.1.0.2-10.1.0.6"),)),
        pod="shop/web-0",
        sticky=1800.0,
    )


def test_what_podwire_does_not_know_of_the_runtime_is_ignored() -> None:
    runtime = {"dns": {"Servers": 5}, "cgroupPath": "/kubelet", "aliases": [1], "mode": "x"}
    assert parsed({**runtime, ANNOTATIONS: {"example.com/x": 5}}, args={"cni": {"labels": 5}}) == Options()


# Host ports.


@pytest.mark.parametrize(("protocol", "number"), [("tcp", 6), ("UDP", 17), ("Sctp", 132), ("", 6), (None, 6)])
def test_protocols_count_in_any_case_and_tcp_is_the_default(protocol: str | None, number: int) -> None:
    entry = {"hostPort": 1, "containerPort": 65535, "protocol": protocol}
    assert parsed({"portMappings": [entry]}).host_ports == (HostPort(number, 1, 65535),)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("", ""),
        (None, ""),
        ("192.0.2.1", "192.0.2.1"),
        ("0.0.0.0", "0.0.0.0"),
        ("::", "::"),
        ("FD00:0::1", "fd00::1"),
    ],
)
def test_a_host_address_is_kept_in_its_usual_form(given: str | None, kept: str) -> None:
    entry = {"hostPort": 80, "containerPort": 8080, "hostIP": given}
    assert parsed({"portMappings": [entry]}).host_ports == (HostPort(6, 80, 8080, kept),)


def test_containerd_writes_keys_with_a_capital_letter() -> None:
    """Its Go values go into the configuration as they are, with zeros for what was not set."""
    wanted = parsed(
        {
            "portMappings": [{"HostPort": 80, "ContainerPort": 8080, "Protocol": "udp", "HostIP": ""}],
            "bandwidth": {"IngressRate": 0, "IngressBurst": 0, "EgressRate": 5, "EgressBurst": 2**32 - 1},
        }
    )
    assert wanted.host_ports == (HostPort(17, 80, 8080),)
    assert wanted.bandwidth == Bandwidth(egress=Rate(5, 2**32 - 1))


def test_the_exact_name_of_a_key_counts_more_than_another_spelling() -> None:
    entry = {"HOSTPORT": 1, "hostPort": 2, "hostport": 3, "containerPort": 80}
    assert parsed({"portMappings": [entry]}).host_ports == (HostPort(6, 2, 80),)


def test_an_entry_without_a_host_port_is_no_host_port() -> None:
    entries = [{"hostPort": 0, "containerPort": 0}, {"containerPort": 80}, {"hostPort": None}]
    assert parsed({"portMappings": entries}).host_ports == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hostPort": 65536}, "hostPort is 65536, which is not a port (1 to 65535)"),
        ({"hostPort": -1}, "hostPort is -1, which is not a port (1 to 65535)"),
        ({"hostPort": "80"}, "hostPort is '80', which is not a number"),
        ({"hostPort": True}, "hostPort is True, which is not a number"),
        ({"containerPort": 0}, "containerPort is 0, which is not a port (1 to 65535)"),
        ({"containerPort": None}, "containerPort is missing"),
        ({"containerPort": 80.5}, "containerPort is 80.5, which is not a number"),
        ({"protocol": "icmp"}, "protocol is 'icmp', which is not one of tcp, udp, sctp"),
        ({"protocol": 6}, "protocol is 6, which is not a string"),
        ({"hostIP": "node1"}, "hostIP is 'node1', which is not an address"),
        ({"hostIP": "10.0.0.0/8"}, "hostIP is '10.0.0.0/8', which is not an address"),
        ({"hostIP": "fe80::1%eth0"}, "hostIP is 'fe80::1%eth0', which is not an address"),
    ],
)
def test_a_wrong_port_mapping_is_refused_by_field_and_value(change: dict[str, Any], message: str) -> None:
    entries = [{"hostPort": 1, "containerPort": 1}, {"hostPort": 80, "containerPort": 80} | change]
    error = refusal({"portMappings": entries})
    assert (error.code, error.msg) == (BAD_CONFIG, f"runtimeConfig.portMappings[1].{message}")


@pytest.mark.parametrize("value", [{}, "80:80", [80]])
def test_port_mappings_that_are_no_list_of_objects_are_refused(value: object) -> None:
    assert refusal({"portMappings": value}).msg.startswith("runtimeConfig.portMappings")


def mapping(host_ip: str = "", protocol: str = "tcp", port: int = 80) -> dict[str, Any]:
    return {"hostPort": port, "containerPort": 80, "protocol": protocol, "hostIP": host_ip}


@pytest.mark.parametrize("other", ["", "0.0.0.0", "::", "192.0.2.1"])
def test_one_host_port_twice_is_refused_naming_both(other: str) -> None:
    error = refusal({"portMappings": [mapping(), mapping(port=81), mapping(other)]})
    where = f" on {other}" if other else ""
    assert error.msg == (
        f"runtimeConfig.portMappings[2] asks for host port 80/tcp{where}, "
        "as runtimeConfig.portMappings[0] does with 80/tcp"
    )


def test_different_protocols_ports_and_addresses_do_not_collide() -> None:
    entries = [
        mapping("192.0.2.1"),
        mapping("192.0.2.2"),
        mapping("::"),
        mapping("", "udp"),
        mapping("", port=81),
    ]
    assert len(parsed({"portMappings": entries}).host_ports) == len(entries)


# Bandwidth.


@pytest.mark.parametrize("burst", [1, 2**31 - 1, 2**32 - 1, 2**35 - 9, 2**64 - 1])
def test_bursts_of_any_size_are_accepted_for_runtimes_send_vast_ones(burst: int) -> None:
    limits = {"ingressRate": 2**64 - 1, "ingressBurst": burst, "egressRate": 1, "egressBurst": burst}
    assert parsed({"bandwidth": limits}).bandwidth == Bandwidth(Rate(2**64 - 1, burst), Rate(1, burst))


def test_a_rate_without_a_burst_leaves_the_burst_to_the_one_who_limits() -> None:
    assert parsed({"bandwidth": {"egressRate": 1000}}).bandwidth == Bandwidth(egress=Rate(1000, 0))


@pytest.mark.parametrize("limits", [{"ingressRate": 0}, {"ingressRate": None, "egressBurst": 0}])
def test_no_rate_is_no_limit(limits: dict[str, Any]) -> None:
    assert parsed({"bandwidth": limits}).bandwidth is None


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"ingressBurst": 5}, "ingressBurst is 5, but there is no ingressRate for it"),
        ({"egressRate": 0, "egressBurst": 5}, "egressBurst is 5, but there is no egressRate for it"),
        ({"ingressRate": -1}, "ingressRate is -1, which is not a number of bits"),
        ({"ingressRate": 1, "ingressBurst": -1}, "ingressBurst is -1, which is not a number of bits"),
        ({"ingressRate": 2**64}, f"ingressRate is {2**64}, which is not a number of bits"),
        ({"egressRate": "1M"}, "egressRate is '1M', which is not a number"),
    ],
)
def test_a_wrong_limit_is_refused_by_field_and_value(limits: dict[str, Any], message: str) -> None:
    error = refusal({"bandwidth": limits})
    assert (error.code, error.msg) == (BAD_CONFIG, f"runtimeConfig.bandwidth.{message}")


# MAC addresses and addresses: who is asked first.


def test_the_runtime_beats_args_and_args_beat_cni_args() -> None:
    """CNI conventions: a plugin that understands `args` ignores the same field of CNI_ARGS."""
    runtime = {"mac": "02:00:00:00:00:01", "ips": ["10.1.0.1"]}
    args = {"cni": {"mac": "02:00:00:00:00:02", "ips": ["10.1.0.2"]}}
    text = "MAC=02:00:00:00:00:03;IP=10.1.0.3"

    def of(wanted: Options) -> tuple[str, tuple[str, ...]]:
        return wanted.mac, tuple(map(str, wanted.wish.addresses))

    annotation = annotated(ip="10.1.0.4")
    assert of(parsed(runtime | annotation, text, args=args)) == ("02:00:00:00:00:01", ("10.1.0.1",))
    assert of(parse_options(request(annotation, text, args=args))) == (
        "02:00:00:00:00:02",
        ("10.1.0.2",),
    )
    assert of(parsed(annotation, text)) == ("02:00:00:00:00:03", ("10.1.0.3",))
    assert of(parsed(annotation)) == ("", ("10.1.0.4",))


def test_a_source_that_is_not_asked_is_not_even_read() -> None:
    runtime = {"mac": "02:00:00:00:00:01", "ips": ["10.1.0.1"], **annotated(ip="junk")}
    wanted = parse_options(request(runtime, "MAC=junk;IP=junk", args={"cni": {"mac": 5, "ips": 5}}))
    assert (wanted.mac, wanted.wish.addresses) == ("02:00:00:00:00:01", (IPAddress("10.1.0.1"),))


@pytest.mark.parametrize("text", ["02:00:0a:01:00:FF", "02-00-0A-01-00-ff", "02:00:0A:01:00:ff"])
def test_a_mac_address_comes_out_in_one_form(text: str) -> None:
    assert parsed({"mac": text}).mac == "02:00:0a:01:00:ff"
    assert parsed(cni_args=f"MAC={text}").mac == "02:00:0a:01:00:ff"


FORM = "which is not a MAC address such as 02:00:0a:01:00:05"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("00:00:00:00:00:00", "which is not a unicast address"),
        ("ff:ff:ff:ff:ff:ff", "which is not a unicast address"),
        ("01:00:5e:00:00:01", "which is not a unicast address"),
        ("02:00:00:00:00", FORM),
        ("02:00:00:00:00:01:02", FORM),
        ("02:00-00:00:00:01", FORM),
        ("0200.0000.0001", FORM),
        ("2:0:0:0:0:1", FORM),
        ("02:00:00:00:00:01\n", FORM),
        ("02:00:00:00:00:0g", FORM),
        ("٠٢:00:00:00:00:01", FORM),
    ],
)
def test_what_is_no_unicast_mac_address_is_refused(text: str, fault: str) -> None:
    error = refusal({"mac": text})
    assert (error.code, error.msg) == (BAD_CONFIG, f"runtimeConfig.mac is {text!r}, {fault}")
    error = refusal(cni_args=f"MAC={text}")
    assert (error.code, error.msg) == (BAD_ENVIRONMENT, f"CNI_ARGS MAC is {text!r}, {fault}")


def addresses(wanted: Options) -> list[str]:
    return [str(address) for address in wanted.wish.addresses]


def test_addresses_are_taken_with_a_prefix_length_and_without() -> None:
    both = ["10.1.0.5/24", "fd00:1:0::5"]
    assert addresses(parsed({"ips": both})) == ["10.1.0.5", "fd00:1::5"]
    assert addresses(parse_options(request(args={"cni": {"ips": both}}))) == ["10.1.0.5", "fd00:1::5"]
    assert addresses(parsed(cni_args="IP=10.1.0.5/24,fd00:1::5/64")) == ["10.1.0.5", "fd00:1::5"]
    assert addresses(parsed(annotated(ip=" 10.1.0.5, fd00:1::5 "))) == ["10.1.0.5", "fd00:1::5"]


BAD_ADDRESSES = [
    "10.1.0",
    "10",
    "010.1.0.5",
    "10.1.0.5/33",
    "10.1.0.5/",
    "10.1.0.5/x",
    "fd00::1%eth0",
    "web",
    "",
]


@pytest.mark.parametrize("text", BAD_ADDRESSES)
def test_what_is_no_address_is_refused_with_where_it_was(text: str) -> None:
    fault = f"{text!r} in it, which is not an address, with or without a prefix length"
    assert refusal({"ips": ["10.1.0.9", text]}).msg == f"runtimeConfig.ips has {fault}"
    error = refusal(annotated(ip=f"10.1.0.9,{text}"))
    assert (error.code, error.msg) == (BAD_CONFIG, f"the annotation podwire.io/ip has {fault}")
    error = refusal(cni_args=f"IP=10.1.0.9,{text}")
    assert (error.code, error.msg) == (BAD_ENVIRONMENT, f"CNI_ARGS IP has {fault}")


def test_addresses_that_are_no_strings_or_come_twice_are_refused() -> None:
    assert refusal({"ips": "10.1.0.5"}).msg == "runtimeConfig.ips is '10.1.0.5', which is not a list"
    assert refusal({"ips": ["10.1.0.5", 5]}).msg == "runtimeConfig.ips[1] is 5, which is not a string"
    assert refusal({"ips": ["fd00::5", "fd00:0::5/64"]}).msg == "runtimeConfig.ips names fd00::5 twice"


# Ranges.


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        ({"subnet": "10.1.0.0/29"}, ("10.1.0.2-10.1.0.6",)),
        ({"subnet": "10.1.0.0/29", "gateway": "10.1.0.4"}, ("10.1.0.1-10.1.0.3", "10.1.0.5-10.1.0.6")),
        ({"subnet": "10.1.0.0/29", "rangeStart": "10.1.0.4"}, ("10.1.0.4-10.1.0.6",)),
        ({"subnet": "10.1.0.0/29", "rangeEnd": "10.1.0.4"}, ("10.1.0.2-10.1.0.4",)),
        ({"subnet": "10.1.0.3/29", "rangeStart": "10.1.0.3", "rangeEnd": "10.1.0.3"}, ("10.1.0.3",)),
        ({"subnet": "fd00::/125"}, ("fd00::2-fd00::7",)),
        ({"Subnet": "fd00::/125", "RangeStart": "", "RangeEnd": "", "Gateway": ""}, ("fd00::2-fd00::7",)),
    ],
)
def test_a_range_is_what_pods_may_have_of_its_subnet(entry: dict[str, Any], wanted: tuple[str, ...]) -> None:
    assert parsed({"ipRanges": [[entry]]}).wish.range_sets == (ranges(*wanted),)


def test_each_set_is_one_address_and_has_one_family() -> None:
    sets = [[{"subnet": "10.1.0.0/30"}, {"subnet": "10.2.0.0/30"}], [{"subnet": "fd00::/126"}]]
    assert parsed({"ipRanges": sets}).wish.range_sets == (
        ranges("10.1.0.2", "10.2.0.2"),
        ranges("fd00::2-fd00::3"),
    )
    mixed = [[{"subnet": "10.1.0.0/30"}, {"subnet": "fd00::/126"}]]
    assert refusal({"ipRanges": mixed}).msg == (
        "runtimeConfig.ipRanges[0] has ranges of both families in it; make it two sets"
    )


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([{"subnet": "10.1.0.0/24"}], "[0] is {'subnet': '10.1.0.0/24'}, which is not a list"),
        ([[]], "[0] has no ranges in it"),
        ([["10.1.0.0/24"]], "[0][0] is '10.1.0.0/24', which is not an object"),
        ([[{}]], "[0][0].subnet is missing"),
        ([[{"subnet": "10.1.0.0"}]], "[0][0].subnet is '10.1.0.0', which is not an address with a prefix"),
        ([[{"subnet": "10.1.0.0/255.0.0.0"}]], "[0][0].subnet is '10.1.0.0/255.0.0.0', which is not an"),
        ([[{"subnet": "10.1.0.0/31"}]], "[0][0] (10.1.0.0/31) has no address for a pod in it"),
        (
            [[{"subnet": "10.1.0.0/24", "gateway": "10.2.0.1"}]],
            "[0][0].gateway is '10.2.0.1', which is not in the subnet 10.1.0.0/24",
        ),
        (
            [[{"subnet": "10.1.0.0/24", "rangeEnd": "fd00::1"}]],
            "[0][0].rangeEnd is 'fd00::1', which is not in the subnet 10.1.0.0/24",
        ),
        (
            [[{"subnet": "10.1.0.0/24", "rangeStart": "10.1.0.9", "rangeEnd": "10.1.0.8"}]],
            "[0][0].rangeStart is '10.1.0.9', which comes after the range's end, 10.1.0.8",
        ),
    ],
)
def test_a_wrong_range_is_refused_by_field_and_value(sets: list[Any], message: str) -> None:
    error = refusal({"ipRanges": sets})
    assert error.code == BAD_CONFIG
    assert error.msg.startswith(f"runtimeConfig.ipRanges{message}")


# The pod.


@pytest.mark.parametrize(
    ("text", "pod", "namespace"),
    [
        ("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0", "shop/web-0", "shop"),
        ("K8S_POD_NAMESPACE=shop", "", "shop"),
        ("K8S_POD_NAME=web-0", "", ""),
        ("K8S_POD_NAMESPACE=;K8S_POD_NAME=", "", ""),
    ],
)
def test_a_pod_is_known_by_namespace_and_name(text: str, pod: str, namespace: str) -> None:
    wanted = parsed(cni_args=text)
    assert (wanted.pod, wanted.wish.namespace) == (pod, namespace)


@pytest.mark.parametrize("key", ["K8S_POD_NAMESPACE", "K8S_POD_NAME"])
def test_a_pod_whose_name_could_be_taken_for_anothers_is_refused(key: str) -> None:
    error = refusal(cni_args=f"{key}=shop/web")
    assert error.code == BAD_ENVIRONMENT
    assert error.msg.startswith(f"CNI_ARGS {key} is 'shop/web', not a letter or digit")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90.0), ("90s", 90.0), ("30m", 1800.0), ("1h30m", 5400.0), ("0", 0.0), ("", 0.0)],
)
def test_sticky_is_a_time(text: str, seconds: float) -> None:
    assert parsed(annotated(sticky=text)).sticky == seconds


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("pool", "my pool", "not a letter or digit, then"),
        ("pool", 5, "which is not a string"),
        ("ip", "10.1.0.x", "which is not an address, with or without a prefix length"),
        ("ip", ["10.1.0.5"], "which is not a string"),
        ("sticky", "for ever", "which is not a time such as 90s, 30m or 1h30m"),
        ("sticky", "-5s", "which is not a time such as 90s, 30m or 1h30m"),
        ("sticky", "721h", "which is more than 720h"),
        ("sticky", 30, "which is not a string"),
    ],
)
def test_a_bad_annotation_is_named_with_its_value(key: str, value: object, fault: str) -> None:
    error = refusal(annotated(**{key: value}))
    assert error.code == BAD_CONFIG
    assert error.msg.startswith(f"the annotation podwire.io/{key} is {value!r}, {fault}")


@pytest.mark.parametrize("value", ["x", [], 5])
def test_annotations_and_args_that_are_no_mapping_are_refused(value: object) -> None:
    assert refusal({ANNOTATIONS: value}).msg.startswith(f"runtimeConfig.{ANNOTATIONS} is ")
    with pytest.raises(CniError, match=r"^args\.cni is "):
        parse_options(request(args={"cni": value}))


def test_a_del_after_a_refused_add_is_parsed_without_its_options() -> None:
    runtime = {"portMappings": 5, "bandwidth": 5, "ips": 5, "mac": 5, "ipRanges": 5, ANNOTATIONS: 5}
    assert request(runtime, "IP=x;K8S_POD_NAME=a/b", command="DEL").container_id == "c0ffee"


# Whatever comes in.

texts = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["10.1.0.5", "10.1.0.0/24", "fd00::/64", "fd00::5%1", "02:00:00:00:00:01", "tcp", "1h", "a"]
    ),
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), texts
)
anything = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3))
)
KEYS = ["hostPort", "HostPort", "containerPort", "protocol", "hostIP", "subnet", "rangeStart", "rangeEnd"]
KEYS += ["gateway", "ingressRate", "ingressBurst", "egressRate", "podwire.io/pool", "podwire.io/ip"]
KEYS += ["podwire.io/sticky", "ips", "mac"]
ports = st.integers(0, 70000)
entries = st.dictionaries(st.sampled_from(KEYS), st.one_of(ports, scalars), max_size=8)
shaped = st.one_of(anything, entries, st.lists(entries, max_size=3), st.lists(st.lists(entries, max_size=2)))
CAPABILITIES = ["portMappings", "bandwidth", "ips", "mac", "ipRanges", ANNOTATIONS]
argument_keys = st.sampled_from(["IP", "MAC", "K8S_POD_NAMESPACE", "K8S_POD_NAME", "IgnoreUnknown"])
arguments = st.dictionaries(argument_keys, texts).map(lambda d: ";".join(f"{k}={v}" for k, v in d.items()))


@given(st.dictionaries(st.sampled_from(CAPABILITIES), shaped), arguments, shaped)
@example({"ipRanges": [[{"subnet": "0.0.0.0/0"}, {"subnet": "10.0.0.0/8"}]]}, "", {})
@example({"ipRanges": [[{"subnet": "::/0", "rangeEnd": "::ffff:1.2.3.4"}]]}, "IP=::ffff:1.2.3.4", {})
@example({"ips": ["1" * 400]}, "", {"ips": ["/"]})
def test_whatever_a_runtime_passes_is_parsed_or_refused(
    runtime: dict[str, Any], text: str, args: object
) -> None:
    try:
        wanted = parse_options(request(runtime, text, args={"cni": args}))
    except CniError as error:
        assert error.code in (BAD_CONFIG, BAD_ENVIRONMENT)
        assert "\n" not in error.msg
    else:
        assert all(1 <= port.host_port <= 65535 for port in wanted.host_ports)
        assert 0 <= wanted.sticky <= options.LONGEST_STICKY
