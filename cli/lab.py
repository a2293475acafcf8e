"""`podwire lab`: a cluster of network namespaces on this machine, and the demo on it."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lab import controller, demo, drivers, runtime, state
from lab.runtime import Pod, PodSpec
from lab.state import Lab
from lab.table import aligned
from lab.topology import (
    Backend,
    Between,
    Driver,
    IpFamily,
    LabError,
    Mode,
    Node,
    ProxyMode,
    Topology,
    apart,
    plan,
)

DEFAULT_NAME = "default"
DEMO_NAME = "demo"
SCENARIOS_NAME = "scenarios"

LAB = """\
A lab is a small cluster on one machine. Every node is a network namespace with its own real `podwire
daemon`; the nodes hang on a shared segment, the last one on another segment across a router. Behind the
router are an `internet` host and an external `client`; a `neighbour` on the nodes' segment is no node.
Everything lives in namespaces named pw-NAME-*, and in /run/podwire/lab/NAME; labs of different names do
not meet. Needs root."""
LAB_EXAMPLES = """\
examples:
  podwire lab up                                   three nodes
  podwire lab up --name big --nodes 5 --mode bridge
  podwire lab apply lab/samples/yaobank.yaml       run the Pods and Services of a file
  podwire lab exec node1 -- ip route
  podwire lab down --all
  podwire lab demo"""
UP_EXAMPLES = """\
examples:
  podwire lab up
  podwire lab up --name flat --nodes 4 --far 0     all nodes on one segment
  podwire lab up --mode bridge
  podwire lab up --name six --ip-family ipv6       no IPv4 address on any interface but lo
  podwire lab up --backend vxlan                   pods' packets cross the network inside UDP
  podwire lab up --proxy-mode iptables             services as chains that iptables lists
  podwire lab up --name over --ip-family ipv6 --underlay ipv4"""
EXEC_EXAMPLES = """\
examples:
  podwire lab exec node1 -- nft list table ip podwire
  podwire lab exec customer -- ip address
  podwire lab exec client -- bash

The exit status is the command's; 127 when it cannot be found."""
POD_EXAMPLES = """\
examples:
  podwire lab pod run --node node2 --label app=summary --serve 80 summary-3
  podwire lab pod check summary-3                  CNI CHECK; silent when all is well
  podwire lab pod rm summary-3"""
DEMO_EXAMPLES = """\
examples:
  podwire lab demo
  podwire lab demo --keep                          leave the lab up and say what to try
  podwire lab demo --mode bridge -o json

The exit status is 1 when anything was not as expected."""
SCENARIOS_EXAMPLES = """\
examples:
  podwire lab scenarios --list
  podwire lab scenarios                            all of them, on virtual machines
  podwire lab scenarios reboot wireguard

The exit status is 1 when anything was not as expected."""

Run = Callable[[argparse.Namespace], int]


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add `lab` and its verbs to the command line; each parser sets `run`, which returns an exit status."""
    lab = _add(subparsers, "lab", "a cluster of network namespaces on this machine", LAB_EXAMPLES, about=LAB)
    verbs = lab.add_subparsers(metavar="VERB", required=True)

    up = _verb(verbs, "up", "make a lab and wait until its daemons are ready", UP_EXAMPLES, run=_up)
    _plan_options(up)

    down = _verb(verbs, "down", "take a lab down; nothing of it is left", "", run=_down)
    down.add_argument("--all", action="store_true", help="take down every lab")

    status = _verb(verbs, "status", "show nodes, daemons and pods", "", run=_status)
    _output_option(status)

    into = _verb(verbs, "exec", "run a command on a host or in a pod", EXEC_EXAMPLES, run=_exec)
    into.add_argument(
        "where", metavar="WHERE", help="node1, router, internet, client, neighbour, POD or NODE/POD"
    )
    into.add_argument("command", metavar="CMD", nargs="+", help="the command, after --")

    apply = _verb(verbs, "apply", "run the Pods and Services of a YAML file", "", run=_apply)
    apply.add_argument("file", metavar="FILE", type=Path, help="Kubernetes YAML; Pods need spec.nodeName")

    _add_pod(verbs)
    _add_scenarios(verbs)

    show = _verb(verbs, "demo", "run the scenarios on a lab of their own", DEMO_EXAMPLES, run=_demo)
    show.set_defaults(name=DEMO_NAME)
    _plan_options(show)
    _output_option(show)
    show.add_argument("--keep", action="store_true", help="leave the lab up and say what to try")


def _add_scenarios(verbs: argparse._SubParsersAction[Any]) -> None:
    verb = _verb(
        verbs,
        "scenarios",
        "run what only real machines can show, each with a verdict",
        SCENARIOS_EXAMPLES,
        run=_scenarios,
    )
    verb.set_defaults(name=SCENARIOS_NAME, driver=Driver.QEMU.value)
    verb.add_argument("names", metavar="NAME", nargs="*", help="which ones (default: all; see --list)")
    verb.add_argument("--list", action="store_true", help="say which there are")
    verb.add_argument("--keep", action="store_true", help="leave the lab up")
    _output_option(verb)


def _scenarios(args: argparse.Namespace) -> int:
    from lab.qemu.scenarios import catalogue

    if args.list:
        print("\n".join(catalogue.NAMES))
        return 0
    return catalogue.main(args.name, args.names, keep=args.keep, as_json=args.output == "json")


def _add_pod(verbs: argparse._SubParsersAction[Any]) -> None:
    pod = _add(verbs, "pod", "run, check and remove pods, as a container runtime does", POD_EXAMPLES)
    pod_verbs = pod.add_subparsers(metavar="VERB", required=True)
    run = _verb(
        pod_verbs, "run", "make a pod: namespace, CNI ADD, an echo server", POD_EXAMPLES, run=_pod_run
    )
    run.add_argument("pod", metavar="POD", help="its name")
    run.add_argument("--node", default="node1", help="the node it runs on (default: %(default)s)")
    run.add_argument("--namespace", default="default", help="its Kubernetes namespace (default: %(default)s)")
    run.add_argument(
        "--label",
        metavar="KEY=VALUE",
        type=_label,
        action="append",
        default=[],
        help="for Services to select it by; can be given again",
    )
    run.add_argument(
        "--serve",
        metavar="PORT",
        type=_port,
        action="append",
        default=[],
        help="serve HTTP and UDP on a port; can be given again",
    )
    for name, what, handler in (
        ("rm", "take a pod out of its Services, CNI DEL, remove its namespace", _pod_rm),
        ("check", "CNI CHECK: is the pod still as it was made?", _pod_check),
    ):
        verb = _verb(pod_verbs, name, what, POD_EXAMPLES, run=handler)
        verb.add_argument("pod", metavar="POD", help="its name")
        verb.add_argument("--node", help="which one, where several nodes have a pod of this name")


def _add(
    subparsers: argparse._SubParsersAction[Any], name: str, what: str, examples: str, about: str = ""
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=what,
        description=about or f"{what[0].upper()}{what[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _verb(
    subparsers: argparse._SubParsersAction[Any], name: str, what: str, examples: str, *, run: Run
) -> argparse.ArgumentParser:
    """Add a verb whose errors are one sentence on stderr and exit status 1."""

    def guarded(args: argparse.Namespace) -> int:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _interrupt)  # so that a terminated `up` or `demo` cleans up too
        try:
            if os.geteuid() != 0:
                raise LabError("a lab is made of network namespaces, which needs root")
            return run(args)
        except (LabError, OSError) as error:
            print(f"podwire lab: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("podwire lab: interrupted", file=sys.stderr)
            return 130
        return 1

    parser = _add(subparsers, name, what, examples)
    parser.add_argument("--name", default=DEFAULT_NAME, help="which lab (default: %(default)s)")
    parser.set_defaults(run=guarded)
    return parser


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=3, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument(
        "--far", type=int, metavar="N", help="how many of them, the last ones, are across the router"
        " (default: 1 of three or more, else 0)",
    )  # fmt: skip
    parser.add_argument(
        "--driver",
        choices=[driver.value for driver in Driver],
        default="netns",
        help="what the hosts are: namespaces of this machine, or virtual machines (default: %(default)s)",
    )
    modes = [mode.value for mode in Mode]
    parser.add_argument("--mode", choices=modes, default="routed", help="pod wiring (default: %(default)s)")
    parser.add_argument(
        "--backend",
        choices=[backend.value for backend in Backend],
        default="auto",
        help="how to reach other nodes' pods; only with direct the router knows them (default: %(default)s)",
    )
    parser.add_argument(
        "--proxy-mode",
        choices=[proxy_mode.value for proxy_mode in ProxyMode],
        default="nftables",
        help="what services are made of in the kernel (default: %(default)s)",
    )
    families = [ip_family.value for ip_family in IpFamily]
    parser.add_argument(
        "--ip-family",
        choices=families,
        default="dual",
        help="the addresses of pods and services (default: %(default)s)",
    )
    parser.add_argument(
        "--underlay", choices=families, help="the addresses of nodes and other hosts (default: as the pods)"
    )


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} must be KEY=VALUE")
    return key, value


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} must be a port from 1 to 65535")
    return int(text)


def _output_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table", help="default: table")


def _plan(args: argparse.Namespace) -> Topology:
    between = Between(Backend(args.backend), IpFamily(args.underlay) if args.underlay else None)
    found = plan(args.name, args.nodes, args.far, Mode(args.mode), IpFamily(args.ip_family), between)
    found = replace(found, proxy_mode=ProxyMode(args.proxy_mode))
    driver = Driver(args.driver)
    return found if driver is Driver.NETNS else apart(found, driver)


def _up(args: argparse.Namespace) -> int:
    made = _plan(args)
    lab = drivers.of(made.driver).up(made)
    print(f"lab {lab.plan.name} is up: {', '.join(node.name for node in lab.plan.nodes)}")
    return 0


def _demo(args: argparse.Namespace) -> int:
    return demo.demo(_plan(args), keep=args.keep, as_json=args.output == "json")


def _down(args: argparse.Namespace) -> int:
    for name in state.names() if args.all else [args.name]:
        if not drivers.remove(name):
            raise LabError(f"there is no lab named {name!r}")
        print(f"lab {name} is down")
    return 0


def _status(args: argparse.Namespace) -> int:
    lab = state.load(args.name)
    nodes = [_node_status(lab, node) for node in lab.plan.nodes]
    pods = [_pod_status(pod) for pod in runtime.pods(lab)]
    if args.output == "json":
        about = {
            "name": lab.plan.name,
            "mode": lab.plan.mode.value,
            "backend": lab.plan.backend.value,
            "ipFamily": lab.plan.ip_family.value,
            "underlay": lab.plan.underlay.value,
            "proxyMode": lab.plan.proxy_mode.value,
            "driver": lab.plan.driver.value,
        }
        print(json.dumps(about | {"nodes": nodes, "pods": pods}, indent=2))
    else:
        print(f"lab {lab.plan.name}, {lab.plan.about}, state in {lab.root}\n")
        print(_table(nodes))
        print(f"\n{_table(pods)}" if pods else "\nno pods")
    return 0 if all(node["daemon"] != "down" for node in nodes) else 1


def _exec(args: argparse.Namespace) -> int:
    lab = state.load(args.name)
    place, namespace = _place(lab, args.where)
    # Ctrl-C is for the command, which has the terminal; a handler, unlike SIG_IGN, is not inherited.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        return drivers.of(lab.plan.driver).execute(lab, place, namespace, args.command)
    except FileNotFoundError:
        print(f"podwire lab: command {args.command[0]!r} is not found", file=sys.stderr)
        return 127
    finally:
        signal.signal(signal.SIGINT, before)


def _apply(args: argparse.Namespace) -> int:
    for applied in controller.apply(state.load(args.name), args.file):
        print(f"{_about(applied.pod)}: {applied.what}")
    return 0


def _pod_run(args: argparse.Namespace) -> int:
    spec = PodSpec(args.pod, args.node, args.namespace, dict(args.label), tuple(args.serve))
    (pod,) = controller.run(state.load(args.name), [spec])
    print(_about(pod))
    return 0


def _pod_rm(args: argparse.Namespace) -> int:
    lab = state.load(args.name)
    controller.remove(lab, runtime.find(lab, args.pod, args.node))
    return 0


def _pod_check(args: argparse.Namespace) -> int:
    lab = state.load(args.name)
    runtime.check(lab, runtime.find(lab, args.pod, args.node))
    return 0


def _place(lab: Lab, where: str) -> tuple[str, str]:
    """Return the host and the namespace of a host, the router, or a pod (NODE/POD where several have one)."""
    if where == "router":
        return where, lab.plan.router
    if any(host.name == where for host in lab.plan.hosts):
        return where, lab.plan.host(where).namespace
    node, _, pod = where.rpartition("/")
    found = runtime.find(lab, pod, node or None)
    return found.spec.node, found.netns


def _node_status(lab: Lab, node: Node) -> dict[str, str]:
    pid = drivers.of(lab.plan.driver).pid(lab, node.name)
    return {
        "node": node.name,
        "addresses": ",".join(node.addresses),
        "podCIDRs": ",".join(node.pod_cidrs),
        "segment": node.segment,
        "daemon": f"pid {pid}" if pid else "down",
        "namespace": node.namespace,
    }


def _about(pod: Pod) -> str:
    return f"pod {pod.spec.name} on {pod.spec.node} has {', '.join(pod.addresses) or 'no address'}"


def _pod_status(pod: Pod) -> dict[str, str]:
    return {
        "pod": pod.spec.name,
        "node": pod.spec.node,
        "addresses": ",".join(pod.addresses) or "-",
        "labels": ",".join(f"{key}={value}" for key, value in pod.spec.labels.items()) or "-",
        "namespace": pod.netns,
    }


def _table(rows: list[dict[str, str]]) -> str:
    """Return rows that have the same keys as aligned columns under their names."""
    return "\n".join(aligned([list(rows[0]), *(list(row.values()) for row in rows)]))
