"""The handle's side of the API: the same for the server of this package and for a real kube-apiserver."""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import msgspec
import yaml

from netlink import netns
from tests.kubeapi.resources import BY_KIND, RESOURCES, Resource
from tests.kubeapi.status import ApiError

Json = dict[str, Any]
PLURALS = {r.plural: r for r in RESOURCES}
PATCHES = {
    "merge": "application/merge-patch+json",
    "strategic": "application/strategic-merge-patch+json",
    "json": "application/json-patch+json",
}
SECONDS = 60.0


class Refused(ApiError):
    """What the server answered instead: its Status object."""

    def __init__(self, status: Json) -> None:
        super().__init__(status.get("code", 0), str(status.get("message")), reason=status.get("reason", ""))
        self.status = status

    @property
    def reason(self) -> str:
        """The machine's word for it."""
        return str(self.status.get("reason", ""))


@dataclass
class KubeClient:
    """A way to an API server; requests are made from the network namespace that it is in."""

    url: str
    token: str
    ca_file: Path | None
    namespace: str | None = None

    @cached_property
    def _trusted(self) -> ssl.SSLContext | None:
        return ssl.create_default_context(cafile=self.ca_file) if self.url.startswith("https") else None

    def connect(self, timeout: float = SECONDS) -> http.client.HTTPConnection:
        """Return a connection to the server, from within its namespace."""
        parts = urlsplit(self.url)
        host, port = parts.hostname or "", parts.port
        made: http.client.HTTPConnection
        if self._trusted:
            made = http.client.HTTPSConnection(host, port, timeout=timeout, context=self._trusted)
        else:
            made = http.client.HTTPConnection(host, port, timeout=timeout)
        if self.namespace:
            netns.run(self.namespace, made.connect)
        else:
            made.connect()
        return made

    def request(
        self, method: str, path: str, body: Any = None, *, headers: dict[str, str] | None = None, **query: Any
    ) -> tuple[int, bytes]:
        """Make a request; return its code and body."""
        if query:
            path += "?" + urlencode(query)
        sent = {
            "Content-Type": "application/json",
            "User-Agent": "test",
            **self.credentials,
            **(headers or {}),
        }
        data = body if body is None or isinstance(body, bytes) else msgspec.json.encode(body)
        connection = self.connect()
        try:
            connection.request(method, path, data, sent)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    @property
    def credentials(self) -> dict[str, str]:
        """The header that lets us in."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def call(self, method: str, path: str, body: Any = None, **query: Any) -> Json:
        """Make a request; return the object, or raise Refused. `headers` may be among the named ones."""
        code, data = self.request(method, path, body, **query)
        try:
            decoded: Json = msgspec.json.decode(data)
        except msgspec.DecodeError:
            decoded = {"message": data.decode(errors="replace"), "code": code}
        if code >= 400:
            raise Refused(decoded)
        return decoded

    # Shorthand: `plural` is as in "services"

    def path(self, plural: str, name: str = "", *, namespace: str | None = None, part: str = "") -> str:
        """Return the path of an object or a collection."""
        resource = PLURALS[plural]
        parts = ["/apis", resource.group, "v1"] if resource.group else ["/api", "v1"]
        if namespace is not None and resource.namespaced:
            parts += ["namespaces", namespace]
        return "/".join([*parts, plural, *filter(None, (name, part))])

    def create(self, obj: Json) -> Json:
        """Create an object, and its namespace where there is none yet; return what the server made of it."""
        resource, namespace = self._where(obj)
        path = self.path(resource.plural, namespace=namespace)
        try:
            return self.call("POST", path, obj)
        except Refused as error:
            if error.status.get("details", {}).get("kind") != "namespaces" or error.code != 404:
                raise
        self.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
        return self.call("POST", path, obj)

    def create_all(self, documents: str) -> list[Json]:
        """Create the objects of YAML text."""
        return [self.create(obj) for obj in yaml.safe_load_all(documents) if obj]

    def update(self, obj: Json, part: str = "") -> Json:
        """Replace an object (PUT), or its status with part="status"."""
        resource, namespace = self._where(obj)
        name = obj["metadata"]["name"]
        return self.call("PUT", self.path(resource.plural, name, namespace=namespace, part=part), obj)

    def patch(
        self,
        plural: str,
        name: str,
        patch: Any,
        *,
        namespace: str = "default",
        kind: str = "merge",
        part: str = "",
    ) -> Json:
        """Patch an object: `kind` is merge, strategic or json."""
        path = self.path(plural, name, namespace=namespace, part=part)
        return self.call("PATCH", path, patch, headers={"Content-Type": PATCHES[kind]})

    def delete(self, plural: str, name: str, *, namespace: str = "default", **preconditions: str) -> None:
        """Delete an object; `uid` and `resourceVersion` may be preconditions."""
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "preconditions": preconditions}
        self.call("DELETE", self.path(plural, name, namespace=namespace), body if preconditions else None)

    def get(self, plural: str, name: str, *, namespace: str = "default") -> Json:
        """Return an object."""
        return self.call("GET", self.path(plural, name, namespace=namespace))

    def list(self, plural: str, *, namespace: str | None = None, **query: Any) -> Json:
        """Return a list; `query` as in the API (labelSelector, limit, ...). `continue` is `continue_`."""
        parameters = {name.rstrip("_"): value for name, value in query.items()}
        return self.call("GET", self.path(plural, namespace=namespace), **parameters)

    def watch(self, plural: str, *, namespace: str | None = None, **query: Any) -> Stream:
        """Begin a watch; close it, or use it in a `with`."""
        parameters = urlencode({"watch": "1", **query})
        connection = self.connect()
        connection.request(
            "GET", f"{self.path(plural, namespace=namespace)}?{parameters}", headers=self.credentials
        )
        answer = connection.getresponse()
        if answer.status >= 400:
            body = answer.read()
            connection.close()
            raise Refused(msgspec.json.decode(body))
        return Stream(connection, answer)

    def kubeconfig(self, path: Path, *, token: str | None = None, token_file: Path | None = None) -> Path:
        """Write a kubeconfig file that leads here; return its path."""
        cluster: Json = {"server": self.url}
        if self.ca_file:
            cluster["certificate-authority"] = str(self.ca_file)
        user: Json = {"tokenFile": str(token_file)} if token_file else {"token": token or self.token}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": user}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "current-context": "test",
        }
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        path.chmod(0o600)
        return path

    def _where(self, obj: Json) -> tuple[Resource, str | None]:
        resource = BY_KIND[obj["apiVersion"], obj["kind"]]
        return resource, obj["metadata"].get("namespace", "default") if resource.namespaced else None


class Stream:
    """One watch's events."""

    def __init__(self, connection: http.client.HTTPConnection, answer: http.client.HTTPResponse) -> None:
        self._connection = connection
        self._answer = answer
        self._rest = b""

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[tuple[str, Json]]:
        """Yield type and object until the stream ends; raises what a broken connection raises."""
        while True:
            while b"\n" not in self._rest:  # readline() would take a cut in the middle for the end
                if not (data := self._answer.read1()):
                    return
                self._rest += data
            line, _, self._rest = self._rest.partition(b"\n")
            event = msgspec.json.decode(line)
            yield event["type"], event["object"]

    def next(self, *, bookmarks: bool = False) -> tuple[str, Json]:
        """Return the next event, without bookmarks; EOFError at the end."""
        for kind, obj in self:
            if bookmarks or kind != "BOOKMARK":
                return kind, obj
        raise EOFError("the watch ended")

    def close(self) -> None:
        """End the watch."""
        self._answer.close()
        self._connection.close()
