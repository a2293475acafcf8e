"""What the daemon says of itself becomes findings."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from api import podwire_pb2 as pb
from node.doctor.daemon import judge
from node.doctor.findings import Finding, Severity, few, shown
from node.doctor.view import PeerRoute, View, view_of

GOOD = View("node1", version="1", last_sync=1000.0)


def sentences(view: View | None, now: float = 1010.0) -> list[str]:
    return [finding.sentence for finding in judge(view, "no daemon", "1", now).findings]


def test_a_daemon_that_works_is_no_finding() -> None:
    assert sentences(GOOD) == []


def test_what_is_wrong_with_it_is_told() -> None:
    assert sentences(None) == ["no daemon"]
    assert sentences(replace(GOOD, ready=False)) == [
        "the daemon of node node1 is not ready: pods cannot be added"
    ]
    assert sentences(replace(GOOD, last_sync=0)) == [
        "the daemon of node node1 has brought nothing to the kernel yet"
    ]
    assert sentences(GOOD, 2000.0) == ["the daemon last looked at the kernel 1000 s ago"]
    assert sentences(replace(GOOD, problems=("a problem",))) == ["a problem"]
    [old] = judge(replace(GOOD, version="0.9"), "", "1", 1010.0).findings
    assert (old.sentence, old.severity) == ("the daemon is podwire 0.9, this command 1", Severity.WARNING)


def test_a_view_is_made_of_answers_of_older_daemons_too() -> None:
    health = pb.HealthReply(node="node1", mode="routed", version="1")
    new = pb.Route(destination="10.244.2.0/24", via="192.0.2.2", node="node2")
    old = SimpleNamespace(destination="10.244.2.0/24", via="192.0.2.2", node="node2")
    for route in (old, new):
        view = view_of(health, [route], [pb.Service(name="a/b", cluster_ips=["10.96.0.1"])])
        assert view.routes == (PeerRoute("10.244.2.0/24", "node2", "192.0.2.2", peer="192.0.2.2"),)
        assert view.vxlan_port == 8472
        assert view.service_addresses == (("a/b", "10.96.0.1"),)


def test_very_many_findings_are_cut_short() -> None:
    found = few([Finding(str(n), "x") for n in range(100)], "nodes")
    assert len(found) == 21
    assert found[-1].sentence == "and 80 more nodes"
    assert shown(map(str, range(12))).endswith("9 and 2 more")
