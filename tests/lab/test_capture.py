"""Pods' packets where they must not be are noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from lab import capture, probe
from lab.state import Lab
from lab.topology import Backend
from netlink.family import Family

POD = {Family.V4: "10.244.9.9", Family.V6: "fd00:10:244:9::9"}


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("backend", [Backend.AUTO, Backend.VXLAN])
def test_a_packet_with_a_pods_address_is_counted_at_the_router_and_others_are_not(
    make_lab: Callable[[], Lab], backend: Backend, family: Family
) -> None:
    lab = make_lab()
    plan = replace(lab.plan, backend=backend)
    capture.count_bare(plan)
    node, other = plan.nodes
    assert probe.fetch(node.namespace, other.address(family), 9) == [probe.Failure("refused")]
    assert capture.bare(plan, family) == 0
    probe.fetch(node.namespace, POD[family], 80, timeout=0.1)
    assert capture.bare(plan, family) > 0
    assert [capture.bare(plan, f) for f in Family if f is not family] == [0]
