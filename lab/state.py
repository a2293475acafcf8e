"""What a lab keeps on disk: `/run/podwire/lab/<name>/`, written atomically, gone with the lab.

lab.json                     the topology's parameters
manifests/*.yaml             the cluster, as every daemon reads it (written as JSON, which is YAML)
<node>/cni/net.d, cni/bin    what a container runtime is pointed at
<node>/state, podwire.sock, daemon.log, daemon.pid
<node>/pods/<pod>.json       a pod's record: the results the runtime keeps for CHECK and DEL
hosts/<name>.pid, .log       the echo servers outside the cluster
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import yaml

from lab.machines import Here, Machines
from lab.topology import (
    Backend,
    Between,
    Driver,
    IpFamily,
    LabError,
    Mode,
    ProxyMode,
    Topology,
    apart,
    plan,
)

ROOT = Path("/run/podwire/lab")

ON_NODES = Path("/etc/podwire/manifests")
"""The folder of manifests of a node that is a machine of its own."""

Json = dict[str, Any]
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Lab:
    """A lab's plan, its directory, and where its functions run.

    The directory has the same name on all machines; on each is what its own processes need.
    """

    plan: Topology
    root: Path
    machines: Machines = field(default_factory=Here)

    @property
    def apart(self) -> bool:
        """Whether nodes are machines of their own, with podwire where the documentation puts it."""
        return self.plan.driver is not Driver.NETNS

    @property
    def manifests(self) -> Path:
        """The folder of Kubernetes objects that every daemon watches."""
        return self.root / "manifests"

    def node_dir(self, node: str) -> Path:
        """Everything that belongs to one node."""
        return self.root / node

    def log(self, node: str) -> Path:
        """What the node's daemon wrote."""
        return self.node_dir(node) / "daemon.log"

    def socket(self, node: str) -> Path:
        """Where the node's daemon answers the CNI binary and `podwire status`."""
        return Path("/run/podwire/podwire.sock") if self.apart else self.node_dir(node) / "podwire.sock"

    def cni_conf(self, node: str) -> Path:
        """Where the node's container runtime finds the conflist."""
        return Path("/etc/cni/net.d") if self.apart else self.node_dir(node) / "cni/net.d"

    def cni_bin(self, node: str) -> Path:
        """Where the node's container runtime finds plugins."""
        return Path("/opt/cni/bin") if self.apart else self.node_dir(node) / "cni/bin"

    def call(self, place: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function on the machine of the router or a host."""
        return self.machines.call(self.plan.machine(place), function, *args, **kwargs)


def directory(name: str, root: Path = ROOT) -> Path:
    """Return where the lab of that name keeps its state, whether it exists or not."""
    plan(name)  # raises LabError for a name that no lab can have: it could point outside the root
    return root / name


def save(lab: Lab) -> None:
    """Write `lab.json`, from which `load` makes the same lab."""
    fields = {
        "name": lab.plan.name,
        "nodes": len(lab.plan.nodes),
        "far": lab.plan.far_nodes,
        "mode": lab.plan.mode.value,
        "ip_family": lab.plan.ip_family.value,
        "backend": lab.plan.backend.value,
        "underlay": lab.plan.underlay.value,
        "proxy_mode": lab.plan.proxy_mode.value,
        "driver": lab.plan.driver.value,
    }
    write_json(lab.root / "lab.json", fields)


def load(name: str, root: Path = ROOT) -> Lab:
    """Return the lab that is up under this name, or raise LabError."""
    path = directory(name, root)
    try:
        fields = json.loads((path / "lab.json").read_text())
    except FileNotFoundError:
        raise LabError(f"there is no lab named {name!r}; `podwire lab up --name {name}` makes it") from None
    mode, ip_family = Mode(fields["mode"]), IpFamily(fields["ip_family"])
    between = Between(Backend(fields["backend"]), IpFamily(fields["underlay"]))
    found = plan(fields["name"], fields["nodes"], fields["far"], mode, ip_family, between)
    found = replace(found, proxy_mode=ProxyMode(fields["proxy_mode"]))
    driver = Driver(fields["driver"])
    if driver is Driver.NETNS:
        return Lab(found, path)
    from lab.remote import Remote

    return Lab(apart(found, driver), path, Remote(partial(agent_command, path)))


def agent_command(root: Path, machine: str) -> list[str]:
    """Return what starts a machine's agent."""
    return [*ssh_command(root, machine), "/opt/podwire/bin/python", "-m", "lab.agent"]


def ssh_command(root: Path, machine: str, *options: str) -> list[str]:
    """Return how a lab's machine is reached."""
    return ["ssh", "-F", str(root / "ssh_config"), *options, machine]


def names(root: Path = ROOT) -> list[str]:
    """The names of all labs that have a directory, also half-made ones."""
    return sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []


def write(path: Path, text: str) -> None:
    """Replace a file in one step: a reader or watcher sees the old text or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name that starts with a dot and does not end in .yaml is not taken for a manifest.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)


def write_json(path: Path, value: Json) -> None:
    """Replace a file with the value as indented JSON."""
    write(path, json.dumps(value, indent=2) + "\n")


def write_manifest(lab: Lab, document: Json) -> None:
    """Put one Kubernetes object into the manifests folder, in a file of its own, unless it is there."""
    meta = document["metadata"]
    parts = [document["kind"].lower(), meta.get("namespace", ""), meta["name"]]
    path = lab.manifests / f"{'-'.join(filter(None, parts))}.yaml"
    if path.exists() and json.loads(path.read_text()) == document:
        return
    write_json(path, document)
    if lab.apart:
        with ThreadPoolExecutor(len(lab.plan.nodes)) as pool:
            list(
                pool.map(
                    lambda node: lab.call(node.name, write_json, ON_NODES / path.name, document),
                    lab.plan.nodes,
                )
            )


def manifests(lab: Lab, kind: str) -> Iterable[Json]:
    """Return the objects of one kind in the manifests folder, by file name."""
    documents = (d for path in sorted(lab.manifests.glob("[!.]*.yaml")) for d in documents_of(path))
    return [document for document in documents if document.get("kind") == kind]


def documents_of(path: Path) -> list[Json]:
    """Return the objects in a YAML file, or raise LabError saying what is wrong with it."""
    try:
        found = list(yaml.safe_load_all(path.read_text()))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise LabError(f"{path}: cannot be read as YAML: {error}") from None
    documents = [document for document in found if document is not None]
    for document in documents:
        if not isinstance(document, dict) or not isinstance(document.get("metadata"), dict):
            raise LabError(f"{path}: every document must be a Kubernetes object with kind and metadata")
    return documents
