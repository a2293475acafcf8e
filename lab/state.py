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
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lab.topology import IpFamily, LabError, Mode, Topology, plan

ROOT = Path("/run/podwire/lab")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Lab:
    """A lab's plan and its directory."""

    plan: Topology
    root: Path

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
        return self.node_dir(node) / "podwire.sock"


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
    return Lab(plan(fields["name"], fields["nodes"], fields["far"], mode, ip_family), path)


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
    if not path.exists() or json.loads(path.read_text()) != document:
        write_json(path, document)


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
