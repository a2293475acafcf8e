"""`podwire trace --lab` across two nodes and a router, and real packets beside it."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from cli import trace
from lab import controller, network
from lab.runtime import PodSpec
from lab.state import Lab
from lab.topology import IpFamily, plan


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Two nodes with the router between them, a pod on each."""
    form = plan(f"trace{os.getpid()}", nodes=2, far=1, ip_family=IpFamily.IPV4)
    made = network.up(form)
    try:
        controller.run(
            made, [PodSpec(name, node, ports=(8080,)) for name, node in (("a", "node1"), ("b", "node2"))]
        )
        yield made
    finally:
        network.remove(form.name)


def _traced(lab: Lab, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    top = argparse.ArgumentParser()
    trace.add_parser(top.add_subparsers())
    args = top.parse_args(["trace", "--lab", lab.plan.name, "-o", "json", *words])
    status = args.run(args)
    return status, json.loads(capsys.readouterr().out)


def test_a_packet_is_followed_through_the_tunnel_to_the_other_node_and_really_goes_that_way(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = _traced(lab, capsys, "default/a", "pod:default/b:8080", "--live")
    (branch,) = found["branches"]
    assert (status, branch["end"]["who"]) == (0, "pod default/b on node2, 10.244.2.2:8080")
    assert list(dict.fromkeys(step["place"] for step in branch["steps"])) == ["node1", "router", "node2"]
    assert any(step["kind"] == "tunnel" for step in branch["steps"])
    assert (found["live"]["answer"], found["live"]["agrees"]) == ("connected", True), found["live"]


def test_a_host_outside_sends_from_where_it_is(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = _traced(lab, capsys, "client", "node1:10256", "--live")
    (branch,) = found["branches"]
    assert (status, branch["end"]["verdict"]) == (0, "delivered")
    assert branch["end"]["who"].startswith("node1 itself")
    assert branch["back"][-1]["place"] == "client"
    assert found["live"]["agrees"], found["live"]


def test_what_a_pod_may_not_send_is_dropped_by_the_guard(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = _traced(lab, capsys, "default/a", "127.0.0.1:80")
    (branch,) = found["branches"]
    assert (status, branch["end"]["verdict"]) == (trace.NOT_ALL, "dropped")
    assert branch["end"]["reason"].startswith("the guard of pods drops it: loopback addresses of the node")
    assert branch["end"]["look"] == "kubectl get pod a -n default -o wide"
