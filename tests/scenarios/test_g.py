"""Scenario G: what a node tells, asked on each node of the lab."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys

import pytest

from lab.world import World
from netlink import netns
from tests.scenarios.forms import IPTABLES, MAIN, MORE, view_id


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


@pytest.mark.parametrize(
    "world", [(form, form.families[0]) for form in (*MAIN, IPTABLES)], ids=view_id, indirect=True
)
def test_every_node_names_its_dataplane(world: World) -> None:
    for node in world.lab.plan.nodes:
        assert get(world, node.name, 10249, "/proxyMode") == (200, world.lab.plan.proxy_mode.value)


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


@pytest.mark.parametrize(
    "world", [(form, form.families[-1]) for form in (*MAIN, *MORE)], ids=view_id, indirect=True
)
def test_the_doctor_finds_no_fault_in_any_form_of_the_network(world: World) -> None:
    command = [sys.executable, "-m", "cli.main", "doctor", "--socket", str(world.lab.socket("node1"))]
    checks = ("daemon", "podcidrs", "routes", "peers", "mtu")
    command += [word for check in checks for word in ("--check", check)]
    done = netns.run(
        world.namespace("node1"),
        lambda: subprocess.run(command, capture_output=True, text=True, timeout=60, check=False),
    )
    assert done.returncode == 0, done.stdout + done.stderr
