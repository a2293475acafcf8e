"""What ledger, kernel and runtime say differently, in sentences."""

from dataclasses import replace

import pytest

from cni import wiring
from cni.audit import Finding, Seen, findings, observe
from cni.plugin import rules_for
from ipam.ledger import Attachment, Key, State
from netlink import netns
from netlink.requests import Route, link_delete, route_delete
from tests.cni.world import Runtime, commit, link


def look(runtime: Runtime, sandboxes: dict[str, bool] | None = None) -> tuple[Finding, ...]:
    def work() -> tuple[Finding, ...]:
        attachments = runtime.ledger.attachments()
        with rules_for(runtime.ledger) as rules:
            return findings(attachments, observe(attachments, rules, sandboxes))

    return netns.run(runtime.node.namespace, work)


def whats(found: tuple[Finding, ...]) -> list[str]:
    return [finding.what for finding in found]


def test_a_node_in_order_has_no_findings(runtime: Runtime) -> None:
    runtime.add("c1")
    runtime.add("c2")
    assert look(runtime) == ()
    assert look(runtime, {"c1": True, "c2": True}) == ()


def test_a_pod_whose_namespace_is_gone_got_no_del(runtime: Runtime) -> None:
    runtime.add()
    path = netns.path(runtime.node.pods["c1"])
    netns.delete(runtime.node.pods.pop("c1"))
    (finding,) = look(runtime)
    assert finding.what == f"its network namespace {path} is gone: it got no DEL"
    assert finding.address == "10.1.0.2, fd00:1::2"
    assert "podwire ipam release c1" in finding.remedy


def test_an_interface_that_is_gone_is_named(runtime: Runtime) -> None:
    runtime.add()
    host = wiring.host_ifname("c1", "eth0")
    netns.run(runtime.node.namespace, commit, link_delete(host))
    assert whats(look(runtime)) == [f"its host interface {host} is gone"]


def test_a_route_that_is_gone_is_named(runtime: Runtime) -> None:
    runtime.add()
    host = netns.run(runtime.node.namespace, link, wiring.host_ifname("c1", "eth0"))
    assert host
    netns.run(runtime.node.namespace, commit, route_delete(Route("10.1.0.2/32", oif=host.index)))
    assert whats(look(runtime)) == ["the host route to 10.1.0.2 is gone"]


def test_what_the_runtime_does_not_know_is_named(runtime: Runtime) -> None:
    for name in ("c1", "c2", "c3"):
        runtime.add(name)
    assert whats(look(runtime, {"c1": True, "c2": False})) == [
        "the runtime has stopped its sandbox without a DEL",
        "the runtime has no such sandbox: it got no DEL",
    ]


def test_what_the_ledger_does_not_know_is_named(runtime: Runtime) -> None:
    runtime.add()
    runtime.ledger.forget(Key("c1", "eth0"))
    host = wiring.host_ifname("c1", "eth0")
    found = look(runtime)
    assert whats(found) == [f"the interface {host} is in no attachment of the ledger"]
    assert found[0].address in ("10.1.0.2", "fd00:1::2")


@pytest.mark.parametrize(
    ("state", "what"),
    [
        (State.PENDING, "an ADD is under way, or died"),
        (State.RELEASED, "its DEL is done, its interface is on its way out"),
    ],
)
def test_an_unfinished_attachment_is_said_to_be_one(runtime: Runtime, state: State, what: str) -> None:
    runtime.add()
    (attachment,) = runtime.ledger.attachments()
    unfinished: Attachment = replace(attachment, state=state)
    nothing = Seen(interfaces={}, routes={}, namespaces=frozenset(), missing_rules={})
    assert whats(findings([unfinished], nothing)) == [what]


def test_a_rule_that_is_missing_is_named(runtime: Runtime) -> None:
    runtime.add()
    (attachment,) = runtime.ledger.attachments()
    host = attachment.host_ifname
    seen = Seen(
        interfaces={host: 5},
        routes={"10.1.0.2": 5, "fd00:1::2": 6},
        namespaces=frozenset({attachment.netns}),
        missing_rules={host: "the nftables table ip podwire_pods is missing"},
    )
    assert whats(findings([attachment], seen)) == [
        "the host route to fd00:1::2 leads to another interface",
        "the nftables table ip podwire_pods is missing",
    ]
