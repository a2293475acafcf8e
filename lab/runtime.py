"""The container runtime of a lab: a pod is a namespace, the CNI plugin's work in it, and processes.

The plugin chain is whatever the conflist in the node's `cni/net.d` names, executed from its `cni/bin` in
the node's namespace, with the environment and input of the CNI specification 1.1.0, sections 2 to 4.
The configuration and result of ADD are kept with the pod and used for CHECK and DEL, as libcni does.
"""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from ipaddress import ip_address, ip_interface
from pathlib import Path

from lab import echo, process, state
from lab.state import Json, Lab
from lab.topology import LabError, title
from netlink import netns
from netlink.family import Family
from netlink.requests import link_up
from netlink.rtnl import Rtnl

PLUGIN_SECONDS = 60
SERVE_SECONDS = 20.0
POD_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?")


class PluginError(LabError):
    """A CNI plugin failed; `code` is the specification's (section 5), 0 when it gave none."""

    def __init__(self, sentence: str, code: int = 0) -> None:
        super().__init__(sentence)
        self.code = code


@dataclass(frozen=True, slots=True)
class PodSpec:
    """A pod to run: labels for Services to select by, and the ports an echo server is to serve."""

    name: str
    node: str
    namespace: str = "default"
    labels: dict[str, str] = field(default_factory=dict)
    ports: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod's record: `conflist` is what ADD was given, `result` what it gave (None: it never finished)."""

    spec: PodSpec
    netns: str  # the namespace's name
    container_id: str
    conflist: Json
    result: Json | None = None

    @property
    def addresses(self) -> tuple[str, ...]:
        """The pod's addresses, without prefix length."""
        return tuple(str(ip_interface(ip["address"]).ip) for ip in (self.result or {}).get("ips", ()))

    def address(self, family: Family) -> str:
        """Return the pod's first address of a family; LabError when it has none."""
        for address in self.addresses:
            if ip_address(address).version == family.value:
                return address
        raise LabError(f"pod {self.spec.name} has no {title(family)} address")


def add(lab: Lab, spec: PodSpec) -> Pod:
    """Make a pod: namespace, plugin chain, echo server on its ports. Returns when the ports answer.

    A failure leaves nothing: DEL, then the namespace goes. Raises LabError, PluginError for the plugin's.
    """
    namespace, record = _names(lab, spec)
    conflist = lab.call(spec.node, find_conflist, lab.cni_conf(spec.node))
    pod = Pod(spec, namespace, secrets.token_hex(32), conflist)
    if record.exists():
        raise LabError(f"{spec.node} has a pod {spec.name!r} already; `podwire lab pod rm` removes it")
    with ExitStack() as undo:
        try:
            lab.call(spec.node, netns.create, namespace)
        except FileExistsError:
            raise LabError(f"namespace {namespace} exists already, and no pod's record names it") from None
        undo.callback(_discard, lab, pod, record)
        lab.call(spec.node, netns.run, namespace, _loopback_up)
        _keep(pod, record)  # before ADD: should we die, `pod rm` still knows what to DEL
        pod = replace(pod, result=_chain(lab, pod, "ADD"))
        _keep(pod, record)
        serve(lab, pod, spec.ports)
        undo.pop_all()
    return pod


def remove(lab: Lab, pod: Pod) -> None:
    """End a pod's processes, DEL, and remove its namespace. A failed DEL keeps the record for another try."""
    _, record = _names(lab, pod.spec)
    _end_servers(lab, pod, record)
    _chain(lab, pod, "DEL")
    lab.call(pod.spec.node, netns.delete, pod.netns)
    record.unlink(missing_ok=True)


def check(lab: Lab, pod: Pod) -> None:
    """Ask the plugins whether the pod is still as ADD left it. Raises PluginError when it is not."""
    _chain(lab, pod, "CHECK")


def serve(lab: Lab, pod: Pod, ports: Sequence[int]) -> None:
    """Start one echo server in the pod on these ports and wait until it answers."""
    if not ports:
        return
    identity = pod.spec.name, pod.spec.node
    lab.call(pod.spec.node, serve_in, pod.netns, identity, ports, server_file(lab, pod, ports[0]))


def server_file(lab: Lab, pod: Pod, port: int) -> Path:
    """Return the pid file of the pod's server on that (first) port."""
    return _names(lab, pod.spec)[1].with_name(f"{pod.spec.name}@{port}.pid")


def serve_in(namespace: str, identity: tuple[str, str], ports: Sequence[int], pid_file: Path) -> None:
    """Start an echo server in any namespace; `identity` is the name and node it answers with.

    Returns when it serves. Raises LabError with its last words when it ends or is too late.
    """
    command = [sys.executable, "-I", "-S", echo.__file__, *identity, "--udp", *map(str, ports)]
    log = pid_file.with_suffix(".log")
    log.unlink(missing_ok=True)
    server = process.start(namespace, command, pid_file, log)
    deadline = time.monotonic() + SERVE_SECONDS
    while server.alive and time.monotonic() < deadline:
        if echo.READY in log.read_text():
            return
        time.sleep(0.005)
    process.stop([pid_file])
    said = log.read_text(errors="replace").strip().splitlines()[-1:]
    raise LabError(f"the server of {identity[0]} did not start: {''.join(said) or 'no word from it'}")


def pods(lab: Lab) -> list[Pod]:
    """All pods of a lab, by node and name."""
    return [
        _load(path) for node in lab.plan.nodes for path in sorted(_pods_dir(lab, node.name).glob("*.json"))
    ]


def find(lab: Lab, name: str, node: str | None = None) -> Pod:
    """Return the pod of that name, or raise LabError when there is none, or one on several nodes."""
    found = [pod for pod in pods(lab) if pod.spec.name == name and node in (None, pod.spec.node)]
    if not found:
        raise LabError(f"lab {lab.plan.name} has no pod {name!r}" + (f" on {node}" if node else ""))
    if len(found) > 1:
        raise LabError(f"pod {name!r} is on {', '.join(p.spec.node for p in found)}; say which with --node")
    return found[0]


def find_conflist(directory: Path) -> Json:
    """Return the network configuration a runtime would use: the first file by name in its directory."""
    files = sorted(path for path in directory.glob("*") if path.suffix in (".conflist", ".conf", ".json"))
    if not files:
        raise LabError(f"{directory}: there is no CNI configuration")
    try:
        found: Json = json.loads(files[0].read_text())
    except ValueError as error:
        raise LabError(f"{files[0]}: is not JSON: {error}") from None
    if files[0].suffix != ".conflist":
        found = {"cniVersion": found.get("cniVersion"), "name": found.get("name"), "plugins": [found]}
    return found


def plugin_input(conflist: Json, plugin: Json, previous: Json | None) -> Json:
    """Return what one plugin reads: its configuration with the list's name and version, and prevResult."""
    config = {key: value for key, value in plugin.items() if key != "capabilities"}
    config |= {"cniVersion": conflist["cniVersion"], "name": conflist["name"]}
    return config if previous is None else config | {"prevResult": previous}


def _chain(lab: Lab, pod: Pod, command: str) -> Json | None:
    """Execute the pod's plugins for one command; ADD returns the last one's result.

    DEL goes backwards. ADD hands each the result of the one before; CHECK and DEL hand all the kept one.
    """
    result = None if command == "ADD" else pod.result
    plugins = pod.conflist["plugins"]
    for plugin in reversed(plugins) if command == "DEL" else plugins:
        printed = _execute(lab, pod, command, plugin["type"], plugin_input(pod.conflist, plugin, result))
        if command == "ADD":
            result = json.loads(printed)
    return result


def _execute(lab: Lab, pod: Pod, command: str, binary: str, config: Json) -> str:
    """Execute one plugin in the node's namespace and return what it printed."""
    directory = lab.cni_bin(pod.spec.node)
    arguments = {
        "IgnoreUnknown": "1",
        "K8S_POD_NAMESPACE": pod.spec.namespace,
        "K8S_POD_NAME": pod.spec.name,
        "K8S_POD_INFRA_CONTAINER_ID": pod.container_id,
    }
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": pod.container_id,
        "CNI_NETNS": str(netns.path(pod.netns)),
        "CNI_IFNAME": "eth0",
        "CNI_ARGS": ";".join(f"{key}={value}" for key, value in arguments.items()),
        "CNI_PATH": str(directory),
    }
    who = f"CNI {command} of {pod.spec.name}: plugin {binary}"
    try:
        done = lab.call(
            pod.spec.node,
            netns.run,
            lab.plan.node(pod.spec.node).namespace,
            _run,
            directory / binary,
            environment,
            json.dumps(config),
        )
    except OSError as error:
        raise PluginError(f"{who} cannot be executed: {error.strerror}") from None
    if done is None:
        raise PluginError(f"{who} did not finish in {PLUGIN_SECONDS} s")
    code, stdout, stderr = done
    if code:
        raise _plugin_error(who, stdout, stderr)
    return stdout


def _run(program: Path, environment: dict[str, str], text: str) -> tuple[int, str, str] | None:
    """Run a plugin; return its exit status and what it printed, or None when it takes too long."""
    try:
        done = subprocess.run(
            [program],
            env=environment,
            input=text,
            capture_output=True,
            text=True,
            timeout=PLUGIN_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    return done.returncode, done.stdout, done.stderr


def _plugin_error(who: str, stdout: str, stderr: str) -> PluginError:
    try:
        said = json.loads(stdout)
        text = f"{said['msg']}: {said['details']}" if said.get("details") else said["msg"]
        return PluginError(f"{who} failed with code {said['code']}: {text}", said["code"])
    except (ValueError, KeyError, TypeError):
        words = (stderr or stdout).strip().splitlines()[-1:]
        return PluginError(f"{who} failed without a CNI error: {''.join(words) or 'no output'}")


def _discard(lab: Lab, pod: Pod, record: Path) -> None:
    """Undo a failed `add`, going on past a DEL that fails too: the first error is the one to report."""
    _end_servers(lab, pod, record)
    with _reported(f"pod {pod.spec.name}"):
        _chain(lab, pod, "DEL")
    lab.call(pod.spec.node, netns.delete, pod.netns)
    record.unlink(missing_ok=True)


def _end_servers(lab: Lab, pod: Pod, record: Path) -> None:
    lab.call(pod.spec.node, _stop_servers, record.parent, pod.spec.name)


def _stop_servers(directory: Path, pod: str) -> None:
    """End a pod's servers, and remove what they wrote."""
    process.stop(directory.glob(f"{pod}@*.pid"))
    for log in directory.glob(f"{pod}@*.log"):
        log.unlink(missing_ok=True)


@contextmanager
def _reported(what: str) -> Iterator[None]:
    """Say on stderr, instead of raising, what went wrong while undoing."""
    try:
        yield
    except LabError as error:
        print(f"lab: while removing {what}: {error}", file=sys.stderr)


def _names(lab: Lab, spec: PodSpec) -> tuple[str, Path]:
    """Return the pod's namespace and its record's path; LabError for a name or node that cannot be."""
    if not POD_NAME.fullmatch(spec.name):
        raise LabError(f"pod name {spec.name!r} must be lower-case letters, digits and dashes")
    node = lab.plan.node(spec.node).name
    return lab.plan.pod_namespace(node, spec.name), _pods_dir(lab, node) / f"{spec.name}.json"


def _pods_dir(lab: Lab, node: str) -> Path:
    return lab.node_dir(node) / "pods"


def _loopback_up() -> None:
    with Rtnl() as rtnl:
        lo = rtnl.link("lo")
        if lo is not None:
            rtnl.commit(link_up(lo.index))


def _keep(pod: Pod, record: Path) -> None:
    state.write_json(record, asdict(pod))


def _load(path: Path) -> Pod:
    fields = json.loads(path.read_text())
    spec = PodSpec(**(fields.pop("spec")))
    return Pod(spec=replace(spec, ports=tuple(spec.ports)), **fields)
