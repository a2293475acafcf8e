"""Events: what a user must fix, told where `kubectl describe` shows it.

    sentences ── which object each is about, who tells it ── an event per object and reason ── the API

What is wrong on this node is told of its Node object. What is wrong with a Service is so on every node: one
tells it, the first in a hash of the object and the node's name. An event is repeated while it is true.
Nothing is said when it is over: it ages out within an hour, and the log has it. Source: Event v1.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any, NamedTuple

import msgspec

from node.kube.api import Api, ApiError

log = logging.getLogger("podwire.events")

COMPONENT = "podwire"
MESSAGE_BYTES, SENTENCES = 1024, 20
HOLD_SECONDS = 10.0
"""How long something has to be wrong: much is for a moment, while a node or a service is being set up."""
REPEAT_SECONDS = 600.0
BURST, REFILL_SECONDS = 25, 10.0
"""Events at once, and the time after which there may be one more; client-go has 25 and 300."""
TELLERS = 50
"""Objects for which the teller is found in one go: it takes 5 ms each in a cluster of 5,000 nodes."""


class Subject(NamedTuple):
    """The object that an event is about."""

    kind: str
    name: str
    namespace: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}".replace(" /", " ")


class Finding(NamedTuple):
    """What a sentence tells: of which object, why (a CamelCase word), and whether every node says it."""

    subject: Subject
    reason: str
    shared: bool = False


class Rule(NamedTuple):
    """What a sentence that begins so is about: this node, or where all say it, what the pattern names."""

    reason: str
    pattern: re.Pattern[str]
    shared: bool = False


NAME = r"(?P<namespace>[a-z0-9.-]+)/(?P<name>[a-z0-9.-]+)"
RULES = tuple(
    Rule(reason, re.compile(pattern), "(?P<kind>" in pattern)
    for reason, pattern in (
        ("HealthCheckPortUnavailable", r"Service \S+: its health check port "),
        ("InvalidField", rf"(?P<kind>Service|EndpointSlice) {NAME}: "),
        ("AddressConflict", rf"(?P<kind>service) {NAME}(:\S*)? gets no "),
        ("ServiceNotProgrammed", r"service \S+ is not served: "),
        ("NoInternalIP", r"(?P<kind>node) (?P<name>\S+): no way to its pods in \S+: it has no "),
        ("NoRouteToPods", r"node \S+: (no way to its )?pods in |no route to |and \d+ more routes "),
        ("NoTunnel", r"no tunnel device "),
        ("NotProgrammed", r"the kernel refuses to "),
        ("EgressAddress", r"pods' egress address "),
        ("PodCIDRChanged", r"node \S+: its podCIDR was "),
        ("NoPodCIDR", r"node \S+ (has|gets) no podCIDR\b"),
        ("PodCIDRMismatch", r"node \S+: podCIDRs? |cluster range "),
        ("NotPermitted", r"node \S+: the API server refuses "),
        ("SyncFailed", r"the last change is not in the kernel: "),
        ("NetworkProblem", r""),
    )
)
"""The first that fits counts."""
OVERLAP = re.compile(r"node (?P<loser>\S+): podCIDR \S+ overlaps \S+ of node (?P<winner>[^\s,]+)")
OF_A_NODE = re.compile(r"Node (?P<name>[^\s:]+): ")
OF_THE_SERVER = re.compile(
    r"(what was known at |the state of |nothing is known of the cluster|no answer|\w+ /api)"
)
KINDS = {"service": "Service", "node": "Node"}


def finding(sentence: str, me: str) -> Finding | None:
    """Return what a sentence is about; None for what is no event of this node's.

    What other nodes say of themselves is theirs to tell, and of the API server nothing can be told to it.
    """
    own = Subject("Node", me)
    if OF_THE_SERVER.match(sentence):
        return None
    if found := OVERLAP.match(sentence):  # each of the two sees the other as the loser
        return Finding(own, "PodCIDRConflict") if me in found.groups() else None
    if found := OF_A_NODE.match(sentence):
        return Finding(own, "InvalidField") if found["name"] == me else None
    rule, match = next((r, m) for r in RULES if (m := r.pattern.match(sentence)))
    if not rule.shared:
        return Finding(own, rule.reason)
    parts = match.groupdict()
    kind = KINDS.get(parts["kind"], parts["kind"])
    return Finding(Subject(kind, parts["name"], parts.get("namespace", "")), rule.reason, shared=True)


def gathered(sentences: Iterable[str], me: str) -> dict[Finding, list[str]]:
    """Return the sentences by what they tell."""
    found: dict[Finding, list[str]] = {}
    for sentence in sentences:
        if about := finding(sentence, me):
            found.setdefault(about, []).append(sentence)
    return found


def message(sentences: list[str], limit: int = MESSAGE_BYTES) -> str:
    """Return one text of as many sentences as fit, in bytes of UTF-8, and of how many there are besides."""
    texts = ["; ".join(sentences)] if len(sentences) <= SENTENCES else []
    for shown in range(min(len(sentences) - 1, SENTENCES), 0, -1):
        texts.append("; ".join(sentences[:shown]) + f"; and {len(sentences) - shown} more")
    fitting = next((text for text in texts if len(text.encode()) <= limit), "")
    return fitting or sentences[0].encode()[: limit - 3].decode(errors="ignore") + "…"


def teller(subject: Subject, nodes: Iterable[str]) -> str:
    """Return the node that tells of an object: the same on all nodes, and moved only when that one goes.

    Rendezvous hashing: every node has a weight for the object, the heaviest is it.
    """
    key = blake2b(str(subject).encode(), digest_size=16).digest()
    return max(nodes, key=lambda node: blake2b(node.encode(), key=key).digest(), default="")


class Bucket:
    """A token bucket: so many at once, then one more each so many seconds."""

    def __init__(
        self, clock: Callable[[], float], burst: int = BURST, seconds: float = REFILL_SECONDS
    ) -> None:
        self._clock, self._burst, self._seconds = clock, burst, seconds
        self._tokens, self._at = float(burst), clock()

    def take(self) -> bool:
        """Take a token if there is one."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._at) / self._seconds)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


@dataclass(slots=True)
class _Told:
    """What has become of a finding: since when it is there, when it was told last, how often."""

    since: float
    at: float | None = None
    count: int = 0

    @property
    def turn(self) -> tuple[bool, float]:
        """Where it is in the queue: what was never told comes first, then what was told longest ago."""
        return self.at is not None, self.since if self.at is None else self.at


class _Meta(msgspec.Struct):
    uid: str = ""
    name: str = ""


class _Item(msgspec.Struct):
    metadata: _Meta = msgspec.field(default_factory=_Meta)
    count: int | None = None


class _List(msgspec.Struct):
    items: list[_Item] | None = None


_ITEM, _LIST = msgspec.json.Decoder(_Item), msgspec.json.Decoder(_List)

COLLECTIONS = {
    "Service": ("v1", "/api/v1/namespaces/{}/services"),
    "EndpointSlice": ("discovery.k8s.io/v1", "/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices"),
    "Node": ("v1", "/api/v1/nodes"),
}


@dataclass(slots=True)
class Events:
    """Tells what is wrong. For one thread; the times are those of the API (UTC) and of a monotonic clock."""

    api: Api
    node: str
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    _told: dict[Finding, _Told] = field(default_factory=dict)
    _tellers: dict[Subject, str] = field(default_factory=dict)
    _nodes: frozenset[str] = frozenset()
    _failed: set[str] = field(default_factory=set)
    _bucket: Bucket = field(init=False)

    def __post_init__(self) -> None:
        self._bucket = Bucket(self.clock)

    def tell(self, sentences: Iterable[str], nodes: Collection[str]) -> None:
        """Tell what has been wrong for a while; `nodes` are the names of those that may tell.

        Raises ApiError when the API server cannot be asked now. What it refuses is logged once.
        """
        found = gathered(sentences, self.node)
        now = self.clock()
        # What comes and goes is repeated no sooner than what stays.
        resting = {a: t for a, t in self._told.items() if t.at is not None and now - t.at < REPEAT_SECONDS}
        self._told = resting | {a: self._told.get(a) or _Told(now) for a in found}
        self._elect(found, nodes)
        for about, told in sorted(self._told.items(), key=lambda item: item[1].turn):
            if about not in found:
                continue
            if about.shared and self._tellers.get(about.subject) != self.node:
                continue
            if not self._due(told):
                continue
            if not self._bucket.take():
                return
            try:
                self._write(about, message(found[about]), told)
            except ApiError as error:
                if error.status in (0, 401, 429) or error.status >= 500:
                    raise
                self._complain(about, error)
            told.at = self.clock()

    def _due(self, told: _Told) -> bool:
        if told.at is None:
            return self.clock() - told.since >= HOLD_SECONDS
        return self.clock() - told.at >= REPEAT_SECONDS

    def _elect(self, found: Mapping[Finding, object], nodes: Collection[str]) -> None:
        """Find out who tells of the objects that are new, or of all when nodes came or went."""
        names = frozenset(nodes)
        subjects = {about.subject for about in found if about.shared}
        if names != self._nodes:
            self._nodes, self._tellers = names, {}
        self._tellers = {s: t for s, t in self._tellers.items() if s in subjects}
        for subject in sorted(subjects - self._tellers.keys())[:TELLERS]:
            self._tellers[subject] = teller(subject, names)

    def _write(self, about: Finding, text: str, told: _Told) -> None:
        """Create the event, or count it up where it is still there."""
        path = f"/api/v1/namespaces/{about.subject.namespace or 'default'}/events"
        name = self._name(about)
        changes: dict[str, Any] = {"message": text, "lastTimestamp": self._time()}
        if told.count:
            told.count += 1
            try:
                self.api.patch(f"{path}/{name}", changes | {"count": told.count})
                return
            except ApiError as error:
                if error.status != 404:  # forgotten by the server by now
                    raise
        try:
            self.api.post(path, self._document(about, name, text))
            told.count = 1
        except ApiError as error:
            if error.status != 409:
                raise
            # Told before a restart, or by another node: the answer says how often.
            data = self.api.patch(f"{path}/{name}", changes)
            told.count = _ITEM.decode(data).count or 1

    def _document(self, about: Finding, name: str, text: str) -> dict[str, Any]:
        subject, now = about.subject, self._time()
        involved = {
            "apiVersion": COLLECTIONS[subject.kind][0],
            "kind": subject.kind,
            "name": subject.name,
            "namespace": subject.namespace,
            "uid": self._uid(subject),
        }
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": subject.namespace or "default"},
            "involvedObject": {key: value for key, value in involved.items() if value},
            "type": "Warning",
            "reason": about.reason,
            "message": text,
            "count": 1,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "source": {"component": COMPONENT, "host": self.node},
            "reportingComponent": COMPONENT,
            "reportingInstance": self.node,
        }

    def _name(self, about: Finding) -> str:
        """Return an event's name: the same after a restart, so that it is counted up instead of told anew."""
        whose = "" if about.shared else self.node
        digest = blake2b(f"{about.subject} {about.reason} {whose}".encode(), digest_size=8).hexdigest()
        return f"{about.subject.name[:230]}.{digest}"

    def _uid(self, subject: Subject) -> str:
        """Return an object's uid, by which `kubectl describe` finds its events; "" if it cannot be had.

        A Node's is its name, by kubelet's convention. Listing is what podwire may do with Services anyway.
        """
        if subject.kind == "Node":
            return subject.name
        path = COLLECTIONS[subject.kind][1].format(subject.namespace)
        try:
            data = self.api.get(path, {"fieldSelector": f"metadata.name={subject.name}", "limit": "1"})
        except ApiError as error:
            if error.status in (0, 401, 429) or error.status >= 500:
                raise
            return ""
        items = _LIST.decode(data).items or ()
        return next((i.metadata.uid for i in items if i.metadata.name == subject.name), "")

    def _complain(self, about: Finding, error: ApiError) -> None:
        if error.reason not in self._failed:
            self._failed.add(error.reason)
            log.warning("event %s of %s not written: %s", about.reason, about.subject, error)

    def _time(self) -> str:
        return self.now().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
