"""Scenario G: what a node tells, asked on each node of the lab."""

from __future__ import annotations

import http.client
import json

from lab.demo import World
from netlink import netns


def get(world: World, node: str, port: int, path: str) -> tuple[int, str]:
    def ask() -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    return netns.run(world.namespace(node), ask)


def test_every_node_names_its_dataplane(world: World) -> None:
    for node in world.lab.plan.nodes:
        assert get(world, node.name, 10249, "/proxyMode") == (200, "nftables")


def test_every_node_has_figures_for_prometheus(world: World) -> None:
    for node in world.lab.plan.nodes:
        status, text = get(world, node.name, 10249, "/metrics")
        assert status == 200
        assert "kubeproxy_sync_proxy_rules_duration_seconds_count" in text


def test_every_node_is_healthy_and_shows_strangers_no_figures(world: World) -> None:
    for node in world.lab.plan.nodes:
        status, text = get(world, node.name, 10256, "/healthz")
        assert (status, json.loads(text)["nodeEligible"]) == (200, True)
        assert get(world, node.name, 10256, "/metrics")[0] == 404
