"""A connection to the Kubernetes API server: bytes there and back.

The `kubernetes` package reads configuration and credentials (kubeconfig, exec plugins, service account
tokens) and sets up TLS and transport (urllib3). Its models are not used: they cost milliseconds an object.
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import msgspec

log = logging.getLogger("podwire.api")

CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 30.0
KEEPALIVE = {"idle": 15, "interval": 5, "count": 3}
UNACKNOWLEDGED_MS = 30_000
"""Seconds and milliseconds after which a silent peer's connection is given up by the kernel."""
MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_MERGE_PATCH = "application/strategic-merge-patch+json"
SERVER = re.compile(r"https?://[^/\s]+")


class ApiError(Exception):
    """The API server refused, or did not answer (status 0). The text is one sentence.

    `reason` is the one of its Status object, `retry_after` the seconds that it asks to wait.
    """

    def __init__(
        self, text: str, status: int = 0, reason: str = "", retry_after: float | None = None
    ) -> None:
        super().__init__(text)
        self.status, self.reason, self.retry_after = status, reason, retry_after

    @property
    def expired(self) -> bool:
        """Whether the resourceVersion asked for is not to be had (any more, or yet)."""
        return self.status == 410 or self.reason in ("Expired", "Gone") or self.too_new

    @property
    def too_new(self) -> bool:
        """Whether the resourceVersion is from the future, as after a restore of etcd."""
        return self.status == 504 and "Too large resource version" in str(self)


class Credentials(NamedTuple):
    """Where the server is and who we are: what the `kubernetes` package calls Configuration."""

    kubeconfig: Path | None
    server: str = ""

    def load(self) -> Any:
        """Read it anew from kubeconfig, or from the pod's service account. Raises ApiError."""
        import yaml
        from kubernetes.client import Configuration
        from kubernetes.config import ConfigException, kube_config, load_incluster_config

        found = Configuration()
        try:
            if self.kubeconfig:
                # Read here, as the package's own reader does not say what is wrong with a file.
                content = yaml.safe_load(self.kubeconfig.read_text())
                loader = kube_config.KubeConfigLoader(content, config_base_path=str(self.kubeconfig.parent))
                loader.load_and_set(found)
            else:
                load_incluster_config(client_configuration=found)
        except (ConfigException, OSError, yaml.YAMLError, ValueError, TypeError, KeyError) as error:
            where = f"kubeconfig {self.kubeconfig}" if self.kubeconfig else "the pod's service account"
            raise ApiError(f"{where} cannot be used: {_one_line(error)}") from None
        found.host = (self.server or found.host).rstrip("/")
        if not SERVER.match(found.host):
            raise ApiError(f"server {found.host!r} is not a URL like https://10.0.0.1:6443")
        found.socket_options = _socket_options()
        found.connection_pool_maxsize = 8
        return found


class Api:
    """Requests to one API server; for any thread. Connects when it is first asked for something."""

    def __init__(self, credentials: Credentials, agent: str = "") -> None:
        self._credentials = credentials
        self._agent = f"podwire/{version('podwire')} {agent}".strip()
        self._lock = threading.Lock()
        self._configuration: Any = None
        self._host = ""
        self._pool: Any = None

    @property
    def server(self) -> str:
        """The server's URL; before the first request where it will be found."""
        return (
            self._host
            or self._credentials.server
            or str(self._credentials.kubeconfig or "of this pod's cluster")
        )

    def get(self, path: str, query: Mapping[str, str] | None = None) -> bytes:
        """Return what is at a path. Raises ApiError."""
        return self._request("GET", path, query)

    def post(self, path: str, document: object) -> bytes:
        """Create an object; return it as it is then. Raises ApiError, status 409 if there is one already."""
        return self._request("POST", path, None, document, "application/json")

    def put(self, path: str, document: object) -> bytes:
        """Replace an object; status 409 if its resourceVersion is not the current one. Raises ApiError."""
        return self._request("PUT", path, None, document, "application/json")

    def patch(self, path: str, document: object, kind: str = MERGE_PATCH) -> bytes:
        """Change parts of an object; return it as it is then. Raises ApiError."""
        return self._request("PATCH", path, None, document, kind)

    def delete(self, path: str, document: object = None) -> bytes:
        """Delete an object; `document` is a DeleteOptions. Raises ApiError."""
        return self._request("DELETE", path, None, document, "application/json" if document else "")

    @contextlib.contextmanager
    def stream(self, path: str, query: Mapping[str, str], silence: float) -> Iterator[Stream]:
        """Open a stream; reading raises ApiError when nothing comes for `silence` seconds."""
        response = self._open("GET", path, query, silence)
        try:
            yield Stream(response)
        finally:
            response.close()

    def forget(self) -> None:
        """Read configuration and credentials anew before the next request."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool:
            pool.clear()

    def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        document: object = None,
        content_type: str = "",
    ) -> bytes:
        body = None if document is None else msgspec.json.encode(document)
        response = self._open(method, path, query, ANSWER_SECONDS, (body, content_type) if body else None)
        with _plain_errors(method, path), contextlib.closing(response):
            data: bytes = response.read(decode_content=True)
            response.release_conn()
            return data

    def _open(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        silence: float,
        content: tuple[bytes, str] | None = None,
    ) -> Any:
        """Send a request and return the response, its body unread. Raises ApiError."""
        from urllib3 import Timeout
        from urllib3.exceptions import SSLError

        pool, host, token = self._connection()

        headers = {"accept": "application/json", "accept-encoding": "gzip", "user-agent": self._agent}
        body, kind = content or (None, "")
        if kind:
            headers["content-type"] = kind
        if token:
            headers["authorization"] = token
        url = f"{host}{path}" + (f"?{urlencode(query)}" if query else "")
        timeout = Timeout(connect=CONNECT_SECONDS, read=silence)
        try:
            with _plain_errors(method, path):
                response = pool.request(
                    method,
                    url,
                    body=body,
                    headers=headers,
                    timeout=timeout,
                    retries=False,
                    preload_content=False,
                )
                if response.status < 300:
                    return response
                error = _refusal(method, path, response)
            response.release_conn()
            raise error
        except ApiError as failure:
            # Another token, or another authority's certificate, may be in its file by now.
            if failure.status == 401 or isinstance(failure.__cause__, SSLError):
                self.forget()
            raise

    def _connection(self) -> tuple[Any, str, str | None]:
        """Return urllib3's connections, the server's URL, and what to authenticate with."""
        from kubernetes.client.rest import RESTClientObject

        with self._lock:
            if self._pool is None:
                self._configuration = self._credentials.load()
                self._host = self._configuration.host  # reading a token anew sets it back to kubeconfig's
                with _plain_errors("connect to", self._host):
                    self._pool = RESTClientObject(self._configuration).pool_manager
            with _plain_errors("authenticate at", self._host):
                # Reads files and runs plugins if it must.
                token = self._configuration.get_api_key_with_prefix("BearerToken")
            return self._pool, self._host, token


class Stream:
    """The body of an answer that goes on."""

    def __init__(self, response: Any) -> None:
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        """Yield pieces as they come. Raises ApiError."""
        with _plain_errors("watch", "the API server"):
            yield from self._response.stream(1 << 16, decode_content=True)

    def end(self) -> None:
        """Let whoever reads come to an end; for any thread."""
        with contextlib.suppress(Exception):  # it may have ended by itself, in many ways
            self._response.shutdown()


class WireStatus(msgspec.Struct):
    """Status (meta/v1): what an API server says when it refuses."""

    message: str = ""
    reason: str = ""
    code: int = 0


_STATUS = msgspec.json.Decoder(WireStatus)
DOCUMENT = msgspec.json.Decoder(dict[str, Any])
"""Any object, as it is."""


def refused(data: bytes | msgspec.Raw, what: str, status: int = 0, after: float | None = None) -> ApiError:
    """Return the error that a Status object tells of."""
    try:
        found = _STATUS.decode(data)
    except msgspec.MsgspecError:
        found = WireStatus(bytes(data[:200]).decode(errors="replace"))
    code = status or found.code
    text = f"{what}: {code} {found.reason} {_one_line(found.message)}"
    return ApiError(" ".join(text.split()), code, found.reason, after)


def _refusal(method: str, path: str, response: Any) -> ApiError:
    after = response.headers.get("retry-after", "")
    seconds = float(after) if after.isdecimal() and len(after) < 6 else None
    body = response.read(1 << 16, decode_content=True)
    return refused(body, f"{method} {path}", response.status, seconds)


@contextlib.contextmanager
def _plain_errors(method: str, path: str) -> Iterator[None]:
    """Turn whatever transport and TLS raise into an ApiError with one sentence."""
    from http.client import HTTPException

    from kubernetes.config import ConfigException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except (HTTPError, HTTPException, OSError, ConfigException, ValueError) as error:
        raise ApiError(f"{method} {path}: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """Return what is at the bottom of an error: urllib3 and TLS wrap them in several layers."""
    from urllib3.exceptions import NewConnectionError, ReadTimeoutError

    if isinstance(error, ReadTimeoutError):
        return "no answer in time"
    while isinstance(error, NewConnectionError | OSError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return _one_line(error)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def _socket_options() -> list[tuple[int, int, int]]:
    from kubernetes.utils.keepalive import tcp_keepalive_socket_options

    return [
        *tcp_keepalive_socket_options(**KEEPALIVE),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS),
    ]
