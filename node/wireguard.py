"""WireGuard's keys of a node over time: what others are to know of them, and when they change.

    Keys, Rotation ──▶ annotations of our Node             (node.kube.upkeep, or a file beside the ledger)
                   ──▶ Turning: which way, what is kept awake       (node.network)
    what the devices see ──tick──▶ node.backends.rotation ──▶ new keys; compare the network

The state of a change is on disk before it counts, so that a daemon that starts in the middle goes on.
"""

from __future__ import annotations

import logging
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from netlink.errors import NetlinkError
from node.backends.hops import Turning
from node.backends.rotation import Observed, Rotation, Step, advance
from node.sources.annotations import WIREGUARD_DETOUR, WIREGUARD_KEYS
from node.wireguard_keys import ROTATION, SLOTS, KeyFileError, Keys, put
from node.wireguard_tunnels import Seen
from proxy.model import Node

log = logging.getLogger("podwire.wireguard")

LOOK_SECONDS = 1.0
OTHERS_SECONDS = 300.0
"""So long after another node's second key has changed ours do not begin to, unless it has taken its detour
and come back: it may be about to take it."""
DAY = 86400.0
SPREAD = 0.1
"""By so much at most of the time between them changes of keys are later: not all nodes' at once."""

Annotations = Mapping[str, str | None]
"""What our Node is to have; None: it is not to have that one."""
NO_KEYS: Annotations = {WIREGUARD_KEYS: None, WIREGUARD_DETOUR: None}

_STATE = msgspec.json.Decoder(Rotation)


class Wireguard:
    """The keys of this node; used by one thread, but for what says otherwise."""

    def __init__(self, directory: Path, me: str, clock: Callable[[], float] = time.time) -> None:
        self.keys = Keys(directory)
        self._path = directory / ROTATION
        self._me = me
        self._clock = clock
        self._asked = threading.Event()
        self._rotation: Rotation | None = None
        self._looked = 0.0
        self._nodes: Mapping[str, Node] | None = None
        self._turning: dict[str, float] = {}
        """Other nodes that seem to have begun a change of keys, and when that was seen."""
        self._problem = ""
        self.used = False
        """Whether WireGuard is the node's backend."""

    @property
    def rotation(self) -> Rotation:
        """Where a change of keys is; for any thread."""
        if self._rotation is None:
            self._rotation = self._load()
        return self._rotation

    @property
    def turning(self) -> Turning:
        """What the network has to do for a change of keys."""
        return self.rotation.turning if self.used else Turning()

    @property
    def annotations(self) -> Annotations:
        """What our Node is to say of us; empty while that is not known. For any thread."""
        if not self.used:
            return NO_KEYS
        public = dict(self.keys.public)  # it may change meanwhile
        if public.keys() < set(SLOTS):
            return {}
        detour = "true" if self.rotation.detour else None
        return {WIREGUARD_KEYS: f"{public[0]},{public[1]}", WIREGUARD_DETOUR: detour}

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, in sentences."""
        found = (self._problem, self.rotation.problem) if self.used else ()
        return tuple(f"WireGuard: {sentence}" for sentence in found if sentence)

    def lacking(self, nodes: Mapping[str, Node]) -> str:
        """Return which annotation our Node object lacks, or has a wrong one of; "" for none."""
        me, wanted = nodes.get(self._me, Node(self._me)), self.annotations
        there = {
            WIREGUARD_KEYS: ",".join(me.wireguard_keys) or None,
            WIREGUARD_DETOUR: "true" if me.wireguard_detour else None,
        }
        return next((key for key, value in wanted.items() if there[key] != value), "")

    def ask(self) -> str:
        """Have the keys changed soon; return why that cannot be, "" if it can. For any thread."""
        if not self.used:
            return "this node's backend is not wireguard, so there are no keys to change"
        if self.rotation.step is not Step.IDLE:
            return "the keys are being changed already"
        self._asked.set()
        return ""

    def tick(self, nodes: Mapping[str, Node], days: int, look: Callable[[], Seen]) -> bool:
        """Go one step on if there is one to be done; whether the network is to be compared for it.

        `days` is how long keys are used, 0: until somebody asks for others.
        """
        now = self._clock()
        if not self.used or abs(now - self._looked) < LOOK_SECONDS:
            return False
        self._looked = now
        self._follow(nodes, now)
        rotation = self.rotation
        if rotation.step is Step.IDLE and (self._asked.is_set() or self._due(days, now)):
            rotation = Rotation(asked=True, finished=rotation.finished)
        if not rotation.active:
            return False
        try:
            seen = _observed(look(), self._busy(nodes, now), self.lacking(nodes) == "")
        except NetlinkError as error:
            self._problem = f"what its devices see is not known: {error}"
            return False
        return self._go(rotation, seen, now)

    def _go(self, rotation: Rotation, seen: Observed, now: float) -> bool:
        """Take the next step: first the key, then the state, so that no state counts without its key."""
        after, slot = advance(rotation, seen, now)
        turned = after.step is not rotation.step
        try:
            if slot is not None:
                self.keys.renew(slot)
            if turned:
                self._save(after)
        except (KeyFileError, OSError) as error:
            self._problem = f"keys cannot be changed: {error}"
            return False
        self._problem = ""
        self._rotation = after
        if turned:
            self._asked.clear()
            level = logging.WARNING if after.problem else logging.INFO
            log.log(level, "change of keys: %s", after.problem or after.step.value)
        return turned

    def _due(self, days: int, now: float) -> bool:
        """Whether the keys have been used for so long."""
        if not days:
            return False
        since = max(self.rotation.finished, self.keys.made(0))
        spread = 1 + SPREAD * (zlib.crc32(self._me.encode()) % 1000) / 1000
        return bool(since and now - since > days * DAY * spread)

    def _follow(self, nodes: Mapping[str, Node], now: float) -> None:
        """Note which others begin to change their keys, and which are through."""
        before, self._nodes = self._nodes, nodes
        if before is nodes or before is None:
            return
        for name, node in nodes.items():
            old = before.get(name)
            if old is None or old is node or name == self._me:
                continue
            if old.wireguard_detour and not node.wireguard_detour:
                self._turning.pop(name, None)
                continue
            was, is_ = old.wireguard_keys, node.wireguard_keys
            if was != is_ and was[:1] == is_[:1]:
                self._turning[name] = now

    def _busy(self, nodes: Mapping[str, Node], now: float) -> str:
        """Return why another node's keys are in the way of changing ours; "" if none are."""
        self._turning = {n: at for n, at in self._turning.items() if n in nodes and now - at < OTHERS_SECONDS}
        others = {name for name, node in nodes.items() if node.wireguard_detour and name != self._me}
        name = min((*others, *self._turning), default="")
        return f"node {name} is changing its own" if name else ""

    def _load(self) -> Rotation:
        try:
            return _STATE.decode(self._path.read_bytes())
        except FileNotFoundError:
            return Rotation()
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("%s cannot be used, so no change of keys goes on: %s", self._path, error)
            return Rotation()

    def _save(self, rotation: Rotation) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        put(self._path, msgspec.json.encode(rotation))


def _observed(seen: Seen, busy: str, published: bool) -> Observed:
    first, second = ({node: known.handshake for node, known in found.items()} for found in seen)
    return Observed(
        (first, second), {node: known.received for node, known in seen[0].items()}, busy, published
    )
