"""What the server says about itself: versions, groups, resources, health."""

from __future__ import annotations

from typing import Any

from tests.kubeapi.resources import GROUPS, RESOURCES, Resource

Json = dict[str, Any]

OPEN = ("/healthz", "/livez", "/readyz", "/version")
"""Paths that need no token (the cluster role system:public-info-viewer), and those below them."""

VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]

VERSION = {
    "major": "1",
    "minor": "34",
    "gitVersion": "v1.34.0+stand-in",
    "gitCommit": "",
    "gitTreeState": "clean",
    "buildDate": "1970-01-01T00:00:00Z",
    "goVersion": "none",
    "compiler": "none",
    "platform": "linux/amd64",
}


def document(path: str, address: str) -> Json | str | None:
    """Return what stands at a path outside the resources; None when nothing does."""
    path = path.rstrip("/")
    if path.startswith(("/healthz", "/livez", "/readyz")):
        return "ok"
    if path == "/version":
        return VERSION
    if path == "/api":
        servers = [{"clientCIDR": "0.0.0.0/0", "serverAddress": address}]
        return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": servers}
    if path == "/apis":
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(g) for g in GROUPS]}
    if path == "/api/v1":
        return _resources("", "v1")
    for group in GROUPS:
        if path == f"/apis/{group}":
            return {"kind": "APIGroup", "apiVersion": "v1", **_group(group)}
        if path == f"/apis/{group}/v1":
            return _resources(group, f"{group}/v1")
    return None


def _group(group: str) -> Json:
    version = {"groupVersion": f"{group}/v1", "version": "v1"}
    return {"name": group, "versions": [version], "preferredVersion": version}


def _resources(group: str, version: str) -> Json:
    found = [entry for r in RESOURCES if r.group == group for entry in _entries(r)]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": found}


def _entries(resource: Resource) -> list[Json]:
    common = {"namespaced": resource.namespaced, "kind": resource.kind}
    entry = {"name": resource.plural, "singularName": resource.kind.lower(), **common, "verbs": VERBS}
    if resource.short:
        entry["shortNames"] = list(resource.short)
    if not resource.status:
        return [entry]
    status = {"name": f"{resource.plural}/status", "singularName": "", **common}
    return [entry, {**status, "verbs": ["get", "patch", "update"]}]
