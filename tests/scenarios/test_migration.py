"""docs/migration.md, executed: from kube-proxy and flannel to podwire, without a connection that fails.

The scripts below are the documentation's, for the folders of a test.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cni.install import install_binary
from cni.plugin import ledger_of
from cni.settings import NodeSettings
from ipam.pools import IpamConfig
from lab import probe
from lab.probe import Answer
from netlink import netns
from netlink.xtables import Variant
from tests.node.flannel import (
    CLUSTER_IP,
    FLANNEL,
    NODE_PORT,
    PODWIRE,
    PORT,
    Cluster,
    Node,
    Pod,
    Road,
    Traffic,
    cluster,
)
from tests.node.world import podwire, wait_until

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/migration.md"
NOTHING_YET = """\
printf 'exclude: [0.0.0.0/0, "::/0"]\\nexhausted_status: false\\n' > /var/lib/podwire/ipam.yaml
"""
HELD = """\
used=$(ls /var/lib/cni/networks/cbr0 | grep '^[0-9]' | paste -sd, -)
printf 'exclude: [%s]\\n' "$used" > /var/lib/podwire/ipam.yaml
"""
SWITCH = """\
sysctl -w net.ipv4.conf.cni0.proxy_arp=1 net.ipv4.neigh.cni0.proxy_delay=0
mv /etc/cni/net.d/10-flannel.conflist /etc/cni/net.d/10-flannel.conflist.off
"""
ROUTES = """\
podwire routes | awk '$3 == "direct" {print $1, $4}' | while read range node; do
    ip route replace $range via $node proto 112
done
"""
REST = """\
ip link delete flannel.1
ip link delete cni0
iptables -t nat -D POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
iptables -t nat -F FLANNEL-POSTRTG
iptables -t nat -X FLANNEL-POSTRTG
iptables -D FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
iptables -F FLANNEL-FWD
iptables -X FLANNEL-FWD
rm -r /var/lib/cni/networks/cbr0
"""
BACK = """\
nft list tables | grep podwire | sed 's/^/delete /' | nft -f -
"""
MEND = """\
ip route delete unreachable {range} proto 112
"""


@pytest.fixture
def found(namespaces: Callable[[], str], tmp_path: Path) -> Iterator[Cluster]:
    with cluster(namespaces, tmp_path) as made:
        yield made


@pytest.mark.parametrize("script", (NOTHING_YET, HELD, SWITCH, ROUTES, REST, BACK))
def test_the_scripts_are_those_of_the_documentation(script: str) -> None:
    text = DOCUMENT.read_text()
    assert not [line for line in script.splitlines() if f"    {line}\n" not in text]


def run(node: Node, script: str) -> str:
    """Run one of the documentation's scripts in the folders of a test."""
    for there, here in (
        ("/var/lib/podwire/", f"{node.root}/state/"),
        ("/var/lib/cni/networks/cbr0", str(node.held)),
        ("/etc/cni/net.d/", f"{node.conflists}/"),
        ("podwire routes", f"podwire routes --socket {node.socket}"),
    ):
        script = script.replace(there, here)
    return node.sh(script)


def configure(node: Node, *, beside: bool) -> None:
    """Write the configuration; `beside` a kube-proxy that runs, which has the usual ports."""
    values: dict[str, Any] = {
        "apiVersion": "podwire.io/v1alpha1",
        "kind": "Configuration",
        "source": str(node.root / "manifests"),
        "nodeName": node.name,
        "pods": {"mtu": 1450, "cniConfDir": str(node.conflists)},
        "ipam": {"file": str(node.root / "state/ipam.yaml")},
        "paths": {"stateDir": str(node.root / "state"), "socket": node.socket},
    }
    if beside:
        values |= {"metrics": {"bindAddress": "127.0.0.1:11249"}, "healthz": {"bindAddress": "[::]:11256"}}
    (node.root / "config.yaml").write_text(json.dumps(values))


def begin(node: Node, *, beside: bool = False) -> None:
    """Start podwire for services: what it may give to pods is nothing yet."""
    run(node, NOTHING_YET)
    install_binary(node.root / "bin", socket=node.socket, state_dir=str(node.root / "state"))
    configure(node, beside=beside)
    node.start(beside=beside)
    wait_until(lambda: bool(frontends(node)), "the service")


def services(node: Node) -> None:
    """Step 1: kube-proxy has been stopped, its rules are there yet; podwire comes, and they go."""
    begin(node)
    clean(node)


def clean(node: Node) -> None:
    status, out, err = netns.run(node.namespace, podwire, "cleanup", "--kube-proxy")
    assert (status, err) == (0, ""), out
    assert netns.run(node.namespace, podwire, "doctor", "--check", "kube-proxy")[0] == 0


def reload(node: Node) -> None:
    """Have the daemon read its configuration, and wait until pods are given addresses by it."""
    assert node.daemon
    node.daemon.send_signal(signal.SIGHUP)
    wanted = IpamConfig.parse(yaml.safe_load((node.root / "state/ipam.yaml").read_text()))

    def counts() -> bool:
        with ledger_of(node.root / "state") as ledger:
            settings = NodeSettings.from_mapping(ledger.settings())
        return settings is not None and settings.ipam == wanted

    wait_until(counts, "the reload")
    assert "reloaded: ipam.exclude" in node.log


def network(node: Node) -> None:
    """Step 2: new pods are podwire's."""
    wait_until((node.conflists / PODWIRE).exists, "the conflist")
    assert node.conflist == FLANNEL, "until it is moved away, flannel's counts"
    run(node, SWITCH)
    assert node.conflist == PODWIRE
    run(node, HELD)
    reload(node)


def frontends(node: Node) -> Any:
    return json.loads(ask(node, "frontends", "-o", "json"))


def problems(node: Node) -> str:
    return str(json.loads(ask(node, "status", "-o", "json")))


def ask(node: Node, *words: str) -> str:
    return netns.run(node.namespace, podwire, *words, "--socket", node.socket)[1]


def migrate_services(found: Cluster) -> None:
    for node in found.nodes:
        services(node)


@pytest.mark.parametrize("variant", Variant, ids=lambda v: v.value)
def test_node_by_node_without_a_connection_that_fails(found: Cluster, variant: Variant) -> None:
    one, two = found.nodes
    web1, web2, user1, user2 = old_pods(found)
    found.lay_kube_proxy(variant, web1.address, web2.address)
    masqueraded: list[Traffic] = []
    with Road() as road:
        for node, user, here, there in ((one, user1, web1, web2), (two, user2, web2, web1)):
            masqueraded.append(road.knock(f"client to {node.name}", found.client, node.address, NODE_PORT))
            masqueraded.append(road.knock(f"{node.name} itself", node.namespace, CLUSTER_IP))
            road.knock(user.name, user.namespace, CLUSTER_IP)
            road.knock(f"{user.name} to {there.name}", user.namespace, there.address)
            road.hold(f"client to {node.name}", found.client, node.address, NODE_PORT, here.name)
            road.hold(f"{user.name} to {here.name}", user.namespace, CLUSTER_IP, PORT, here.name)
            road.hold(f"{user.name} to {there.name}", user.namespace, CLUSTER_IP, PORT, there.name)
            road.hold(f"{user.name} to {there.name}, direct", user.namespace, there.address)
        for node in found.nodes:
            begin(node)
            road.goes_on()
            clean(node)
            road.goes_on()
        for node, old in ((one, user1), (two, user2)):
            network(node)
            road.goes_on()
            new = node.add(f"new-{node.number}", found.make())
            assert new.address not in {p.address for p in node.pods.values() if p is not new}
            road.knock(f"{new.name} to the service", new.namespace, CLUSTER_IP)
            road.hold(f"{new.name} to {web1.name}", new.namespace, CLUSTER_IP, PORT, web1.name)
            road.hold(f"{new.name} to {web2.name}", new.namespace, CLUSTER_IP, PORT, web2.name)
            for pod in (web1, web2, old):
                road.knock(f"{new.name} to {pod.name}", new.namespace, pod.address)
            road.knock(f"{old.name} to {new.name}", old.namespace, new.address)
            road.goes_on()
        for traffic in masqueraded:  # what test_what_is_masqueraded_… is about
            traffic.spare = 1
        for node in found.nodes:
            run(node, ROUTES)
            road.goes_on(100)
        assert not any("flannel.1" in node.sh("ip route") for node in found.nodes)
    pods_and_rest(found)


def pods_and_rest(found: Cluster) -> None:
    """Steps 4 and 5: pods are made again, then what nobody uses goes; clients of the service see nothing."""
    one, two = found.nodes
    with Road() as road:
        for node in found.nodes:
            road.knock(f"client to {node.name}", found.client, node.address, NODE_PORT)
            new = node.pods[f"new-{node.number}"]
            road.knock(new.name, new.namespace, CLUSTER_IP)
        webs = [one.pods["web-1"], two.pods["web-2"]]
        for node in found.nodes:
            web = node.add(f"web-{node.number + 2}", found.make())
            webs.append(web)
            publish(found, *webs)
            road.goes_on()
            old = webs.pop(0)
            publish(found, *webs)
            road.goes_on()
            node.delete(old.name)
            node.delete(f"user-{node.number}")
            assert (node.held / old.address).exists(), "host-local is not told: containerd asks podwire"
            road.goes_on()
        for node in found.nodes:
            assert "master cni0" not in node.sh("ip link")
            run(node, REST)
            run(node, "echo 'exclude: []' > /var/lib/podwire/ipam.yaml")
            reload(node)
            road.goes_on()
        for node in found.nodes:
            wait_until(lambda n=node: f"unreachable {n.range} proto 112" in n.sh("ip route"), "its own range")  # type: ignore[misc]
            wait_until(lambda n=node: "no route" not in problems(n), "no complaints")  # type: ignore[misc]
            left = node.sh("ip link; ip route; iptables-save")
            assert not any(word in left for word in ("flannel", "FLANNEL", "cni0", "KUBE-SVC"))
        road.goes_on()


@pytest.mark.parametrize("variant", Variant, ids=lambda v: v.value)
def test_who_comes_last_translates_first(found: Cluster, variant: Variant) -> None:
    """Hooks of one priority are asked in the reverse order of their making."""
    _, web2, user1, _ = old_pods(found)
    found.lay_kube_proxy(variant, "10.244.2.250")  # where nobody is
    user = user1.namespace
    assert not isinstance(probe.fetch(user, CLUSTER_IP, PORT, timeout=0.3)[0], Answer)
    publish(found, web2)
    begin(found.nodes[0], beside=True)
    assert {a.server for a in probe.fetch(user, CLUSTER_IP, PORT, 20) if isinstance(a, Answer)} == {"web-2"}


def test_without_exclusions_a_pod_takes_an_address_in_use(found: Cluster) -> None:
    """That is what the list is for: podwire's ledger does not know what host-local has given."""
    one, _ = found.nodes
    web1, *_ = old_pods(found)
    begin(one)
    run(one, "echo 'exclude: []' > /var/lib/podwire/ipam.yaml")
    reload(one)
    run(one, SWITCH.replace("mv ", "touch /etc/cni/net.d/10-podwire.conflist; mv "))
    assert probe.fetch(one.namespace, web1.address, PORT) == [Answer("web-1", "10.244.1.1")]
    new = one.add("new", found.make())
    assert new.address == web1.address
    assert probe.fetch(one.namespace, web1.address, PORT)[0] != Answer("web-1", "10.244.1.1")


def test_without_proxy_arp_pods_of_before_and_after_do_not_meet(found: Cluster) -> None:
    """A pod on cni0 takes its node's whole range for its own link, and asks there who a new pod is."""
    one, _ = found.nodes
    web1, _, user1, _ = old_pods(found)
    publish(found, web1)
    begin(one)
    run(one, HELD)
    reload(one)
    run(one, "touch /etc/cni/net.d/10-podwire.conflist; " + SWITCH.splitlines()[1])
    new = one.add("new", found.make())
    assert not isinstance(probe.fetch(new.namespace, CLUSTER_IP, PORT, timeout=0.5)[0], Answer)
    assert not isinstance(probe.fetch(user1.namespace, new.address, PORT, timeout=0.5)[0], Answer)
    run(one, SWITCH.splitlines()[0])
    assert isinstance(probe.fetch(new.namespace, CLUSTER_IP, PORT)[0], Answer)
    assert isinstance(probe.fetch(user1.namespace, new.address, PORT)[0], Answer)


def test_what_is_masqueraded_on_flannels_interface_ends_with_the_route(found: Cluster) -> None:
    """The one kind of connection that does not survive: masquerade is bound to the interface it left by."""
    one, _ = found.nodes
    _, web2, user1, _ = old_pods(found)
    publish(found, web2)
    migrate_services(found)
    with Road() as road:
        ends = road.hold("client", found.client, one.address, NODE_PORT)
        stays = road.hold("pod", user1.namespace, CLUSTER_IP)
        road.goes_on()
        run(one, ROUTES)
        wait_until(lambda: bool(ends.failed), "its end")
        road.leave(ends)
        road.goes_on()
        assert not stays.failed
        assert isinstance(probe.fetch(found.client, one.address, NODE_PORT)[0], Answer)


def test_back_to_kube_proxy(found: Cluster) -> None:
    """Rollback of step 1: kube-proxy first, then podwire's tables go."""
    one, _ = found.nodes
    web1, web2, user1, _ = old_pods(found)
    found.lay_kube_proxy(Variant.NFT, web1.address, web2.address)
    with Road() as road:
        road.knock("client", found.client, one.address, NODE_PORT)
        road.knock("pod", user1.namespace, CLUSTER_IP)
        migrate_services(found)
        for server in ("web-1", "web-2"):
            road.hold(f"client to {server}", found.client, one.address, NODE_PORT, server)
            road.hold(f"pod to {server}", user1.namespace, CLUSTER_IP, PORT, server)
        road.goes_on()
        found.lay_kube_proxy(Variant.NFT, web1.address, web2.address)
        one.stop()
        run(one, BACK)
        road.goes_on()
    assert "podwire" not in one.sh("nft list tables")


def test_back_to_flannel(found: Cluster) -> None:
    """Rollback of step 2: the pods that podwire has connected go first, as host-local knows none of them."""
    one, _ = found.nodes
    web1, *_ = old_pods(found)
    migrate_services(found)
    network(one)
    one.add("new", found.make())
    one.delete("new")
    run(one, "mv /etc/cni/net.d/10-flannel.conflist.off /etc/cni/net.d/10-flannel.conflist")
    assert one.conflist == FLANNEL
    again = one.add("again", found.make())
    assert (one.held / again.address).exists()
    assert isinstance(probe.fetch(again.namespace, web1.address, PORT)[0], Answer)


def test_a_bridge_that_comes_after_podwire_is_reached(found: Cluster) -> None:
    """As on a node that reboots between the steps 1 and 2, or had no pod yet when podwire came."""
    one, _ = found.nodes
    found.publish()
    begin(one)
    pod = one.add("first", found.make())
    assert isinstance(probe.fetch(one.namespace, pod.address, PORT)[0], Answer)


def test_what_mends_a_bridge_that_came_after_podwire(found: Cluster) -> None:
    one, _ = found.nodes
    found.publish()
    begin(one)
    pod = one.add("first", found.make())
    run(one, MEND.format(range=one.range))
    assert isinstance(probe.fetch(one.namespace, pod.address, PORT)[0], Answer)


def old_pods(found: Cluster) -> list[Pod]:
    """Make a server and a user on each node, by flannel's network, and publish the servers."""
    one, two = found.nodes
    pods = [
        node.add(f"{kind}-{node.number}", found.make()) for kind in ("web", "user") for node in (one, two)
    ]
    found.publish(*pods[:2])
    return pods


def publish(found: Cluster, *webs: Pod) -> None:
    """Make these the service's endpoints, and wait until both nodes go by that."""
    found.publish(*webs)
    wanted = {f"{web.address}:{PORT}" for web in webs}
    for node in found.nodes:
        if node.daemon:
            wait_until(lambda n=node: set(frontends(n)[0]["endpoints"]) == wanted, "the endpoints")  # type: ignore[misc]
