"""A worker boots again: its pods are gone, what they had is free, and services work as soon as it is up."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from shlex import quote

from cni.wiring import HOST_PREFIX
from lab.qemu import driver
from lab.qemu.scenarios.base import Trial, Verdict
from lab.runtime import Pod

NODE = "node2"
WITHIN_SECONDS = 15.0
BOOT_SECONDS = 300.0
FIRST = "/var/lib/first-answer"

# Asks services, one after the other, until they answer. A try is a fork and no program: an emulated processor
# would be slower by what measures it. A connection that is begun too early is not waited for.
ASK = """exec 4<> <(:)
reach() {
    (exec 3<> "/dev/tcp/$1/$2" && echo >&4) 2> /dev/null &
    read -r -t 0.4 -u 4 && return
    kill $!
    wait $!
    return 1
}
while read -r address port; do
    until reach "$address" "$port"; do :; done
    exec 3<> "/dev/tcp/$address/$port"
    printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3
    read -r -t 5 _ status _ <&3
    read -r uptime _ < /proc/uptime
    echo "$address $status $uptime" >> FIRST
done << END
TARGETS
END
"""
UNIT = """[Unit]
Description=how soon after its boot this node reaches services
After=systemd-networkd.service
[Service]
ExecStart=/bin/bash /root/ask
[Install]
WantedBy=multi-user.target
"""


def reboot(trial: Trial) -> Iterator[Verdict]:
    """Boot a worker again, in the middle of its work."""
    lab, world = trial.world.lab, trial.world
    gone = {address for pod in trial.pods_on(NODE) for address in pod.addresses}
    targets = [
        world.services[family][name]
        for family in lab.plan.families
        for name in ("customer", "database")  # their endpoints are on another node
    ]
    lines = "\n".join(f"{address} {port}" for address, port in targets)
    ask = ASK.replace("FIRST", FIRST).replace("TARGETS", lines)
    trial.shell(NODE, f"rm -f {FIRST}; printf %s {quote(ask)} > /root/ask;"
                      f" printf %s {quote(UNIT)} > /etc/systemd/system/lab-ask.service;"
                      " systemctl enable -q lab-ask")  # fmt: skip
    before = trial.shell(NODE, "cat /proc/sys/kernel/random/boot_id")
    trial.try_shell(NODE, "systemctl reboot")
    driver.wait_gone(lab, NODE, before)
    driver.wait_reached(lab, NODE, "node1")
    driver.wait_answer(lab, NODE, time.monotonic() + BOOT_SECONDS)
    trial.wait("services answer", lambda: len(_answers(trial)) == len(targets))
    last = max(_answers(trial).values())
    start = trial.shell(NODE, "systemd-analyze | head -1")
    saw, expected = f"{last:.1f} s ({start})", f"within {WITHIN_SECONDS:.0f} s"
    yield trial.verdict("services reached after its boot", saw, expected, last <= WITHIN_SECONDS)
    # Services of other nodes only: who asks for a pod that is gone keeps a connection that leads to it.
    others = trial.cases("C", only=lambda case: case.source != "summary-1" and "/database" in case.via)
    yield trial.judged("services reached from every node", others)
    yield from _clean(trial, "before it makes pods", [])
    trial.replace_pods(NODE)
    pods = trial.pods_on(NODE)
    yield from _clean(trial, "with its pods again", pods)
    stale = gone - {address for pod in pods for address in pod.addresses}
    # Only now: before, the Endpoints of the lab's control plane named the pods that are gone.
    said = trial.shell(NODE, "ip -4 route; ip -6 route; nft list ruleset")
    words = set(said.replace("/", " ").split())
    yield trial.verdict("routes and rules of pods that are gone", sorted(stale & words), [])
    yield trial.judged("pods, services and node ports again", trial.cases("B", "C", "D"))
    trial.shell(NODE, "systemctl disable -q lab-ask; rm -f /etc/systemd/system/lab-ask.service /root/ask")


def _answers(trial: Trial) -> dict[str, float]:
    """Return how long after the boot each service answered (seconds)."""
    lines = [line.split() for line in trial.try_shell(NODE, f"cat {FIRST}")[1].splitlines()]
    return {line[0]: float(line[2]) for line in lines if line[1:2] == ["200"]}


def _clean(trial: Trial, when: str, pods: list[Pod]) -> Iterator[Verdict]:
    """Yield what the node, which has these pods, still has of pods that it lost."""
    now = {address for pod in pods for address in pod.addresses}
    shown = json.loads(trial.shell(NODE, "podwire ipam show -o json"))
    held = {row["address"] for row in shown["addresses"]}
    yield trial.verdict(f"addresses held by pods that are gone, {when}", sorted(held - now), [])
    links = trial.shell(NODE, f"ip -o link | grep -c {HOST_PREFIX} || true")
    yield trial.verdict(f"pods' interfaces, {when}", int(links), len(pods))
    code, said = trial.try_shell(NODE, "podwire ipam check")
    yield trial.verdict(
        "podwire ipam check", f"status {code}" + (f": {said[-200:]}" if code else ""), "status 0"
    )
