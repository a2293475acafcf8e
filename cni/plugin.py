"""Handle one execution of the plugin: the same code in the daemon and, while it is down, in the binary.

The ledger comes first: an address is reserved before anything is made in the kernel and is free again
only after all of it is gone, so that dying at any point leaves something that the next try, or the next
start of the daemon, finishes or takes back.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from cni import spec, wiring
from cni.spec import CniError, Command, Request, Result
from cni.wiring import NodeSettings
from ipam.ledger import (
    AlreadyAttached,
    Attachment,
    Claim,
    Exhausted,
    Key,
    Ledger,
    LedgerBusy,
    LedgerError,
    State,
    StillReleasing,
    read_boot_id,
)
from ipam.lock import LockTimeout, container_lock
from netlink.errors import NetlinkError
from netlink.family import Family

log = logging.getLogger("podwire.cni")

LEDGER_FILE = "ledger.db"
LOCK_SECONDS = 10.0
RESERVE_TRIES = 8
"""How often an ADD makes room in a full range; another ADD may take what it made."""

Step = Callable[[str], None]
"""Called with the name of each step when it is done; tests end the process there."""


def ledger_of(state_dir: Path) -> Ledger:
    """Return the node's ledger, not yet open."""
    return Ledger(state_dir / LEDGER_FILE, boot_id=read_boot_id())


def in_process(env: Mapping[str, str], stdin: bytes, state_dir: str) -> tuple[int, bytes]:
    """Handle a request without the daemon."""

    def work(request: Request) -> bytes:
        if request.command is Command.VERSION:
            return _version(request)
        with ledger_of(Path(state_dir)) as ledger:
            return Plugin(ledger, Path(state_dir)).dispatch(request)

    return _answer(env, stdin, work)


def take_back(ledger: Ledger, attachment: Attachment) -> None:
    """Remove what a released attachment has in the kernel, then free its addresses."""
    wiring.remove(attachment.host_ifname)
    ledger.forget(attachment.key)


def finish(ledger: Ledger, state_dir: Path, key: Key, timeout: float = LOCK_SECONDS) -> None:
    """Take back another container's attachment, unless it is gone by now, or its container was added anew."""
    with container_lock(state_dir, key.container_id, timeout):
        attachment = ledger.get(key)
        if attachment and attachment.state is State.RELEASED:
            take_back(ledger, attachment)


@dataclass(frozen=True, slots=True)
class Plugin:
    """The plugin, working on a node's ledger.

    `defer` takes over the removal of a released attachment's interface, which costs 20 ms of kernel time;
    without it the removal is done before DEL answers.
    """

    ledger: Ledger
    state_dir: Path
    defer: Callable[[Attachment], None] | None = None
    step: Step = lambda _: None

    def handle(self, env: Mapping[str, str], stdin: bytes) -> tuple[int, bytes]:
        """Return the exit status and what goes to standard output. Never raises."""
        return _answer(env, stdin, self.dispatch)

    def dispatch(self, request: Request) -> bytes:
        """Do what a parsed request asks; return what goes to standard output. Raises what went wrong."""
        match request.command:
            case Command.ADD:
                return spec.result_json(self._locked(self._add, request), request.config.cni_version)
            case Command.DEL:
                self._locked(self._delete, request)
            case Command.CHECK:
                self._locked(self._check, request)
            case Command.GC:
                self._collect_garbage(request)
            case Command.STATUS:
                self._settings(otherwise=spec.NOT_AVAILABLE)
            case Command.VERSION:
                return _version(request)
        return b""

    def _locked(self, work: Callable[[Request], Result], request: Request) -> Result:
        """Work on a container while nobody else does."""
        with container_lock(self.state_dir, request.container_id):
            return work(request)

    def _add(self, request: Request) -> Result:
        settings = self._settings()
        attachment, finished = self._reserve(request, settings)
        if finished:
            return spec.parse_result(json.loads(attachment.result))
        self.step("reserved")
        with ExitStack() as undo:
            undo.callback(self._undo, attachment.key)
            link = wiring.plan(request.container_id, request.ifname, attachment.addresses, settings)
            wiring.attach(link, request.netns, self.step)
            result = _result(link, request)
            self.ledger.commit(attachment.key, spec.result_json(result, spec.LATEST_VERSION).decode())
            undo.pop_all()
        self.step("committed")
        log.info(
            "ADD %s %s: %s", request.container_id, request.ifname, ", ".join(map(str, attachment.addresses))
        )
        return result

    def _reserve(self, request: Request, settings: NodeSettings) -> tuple[Attachment, bool]:
        """Return the request's attachment, and whether an earlier try of the same execution finished it.

        Links that are still on their way out are removed here if the request has to wait for them.
        """
        key = Key(request.container_id, request.ifname)
        name = wiring.host_ifname(request.container_id, request.ifname)
        claim = Claim(request.config.name, request.netns, name, request.request_id)
        tried_before = self.ledger.get(key) is not None
        failure: LedgerError | None = None
        for _ in range(RESERVE_TRIES):
            try:
                attachment = self.ledger.reserve(key, claim, settings.pod_cidrs)
            except AlreadyAttached as error:
                if not request.request_id or error.attachment.request_id != request.request_id:
                    raise
                return error.attachment, True
            except StillReleasing as error:
                failure = error
                take_back(self.ledger, error.attachment)
            except Exhausted as error:
                failure = error
                if not error.releasing:
                    raise
                self._make_room(key, error.releasing)
            else:
                if tried_before:  # and died: its link may be there
                    wiring.remove(attachment.host_ifname)
                return attachment, False
        assert failure
        raise failure

    def _make_room(self, key: Key, releasing: tuple[Attachment, ...]) -> None:
        """Take back one released attachment, if possible one that nobody else is working on."""
        for attachment in releasing:
            if attachment.key.container_id == key.container_id:
                return take_back(self.ledger, attachment)
            with contextlib.suppress(LockTimeout):
                return finish(self.ledger, self.state_dir, attachment.key, timeout=0)
        return finish(self.ledger, self.state_dir, releasing[0].key)

    def _undo(self, key: Key) -> None:
        attachment = self.ledger.release(key)
        if attachment:
            take_back(self.ledger, attachment)

    def _delete(self, request: Request) -> Result:
        attachment = self.ledger.release(Key(request.container_id, request.ifname))
        self.step("released")
        if attachment is None:
            # Nothing is recorded; a link can still be there if the ledger was lost.
            wiring.remove(wiring.host_ifname(request.container_id, request.ifname))
            return Result()
        if self.defer:
            self.defer(attachment)
        else:
            wiring.remove(attachment.host_ifname)
            self.step("link removed")
            self.ledger.forget(attachment.key)
        self.step("forgotten")
        log.info("DEL %s %s", request.container_id, request.ifname)
        return Result()

    def _check(self, request: Request) -> Result:
        attachment = self.ledger.get(Key(request.container_id, request.ifname))
        if attachment is None or attachment.state is not State.ATTACHED:
            raise CniError(spec.UNKNOWN_CONTAINER, f"the ledger has no attachment of {request.container_id}")
        addresses = tuple(map(str, attachment.addresses))
        if request.config.prev_result is not None:
            expected = spec.parse_result(request.config.prev_result)
            ours = [i for i, interface in enumerate(expected.interfaces) if interface.name == request.ifname]
            for ip in expected.ips:
                address = ip.address.split("/")[0]
                if ip.interface in ours and address not in addresses:
                    raise CniError(spec.CHECK_FAILED, f"prevResult has {address}, which the ledger does not")
        link = wiring.plan(request.container_id, request.ifname, attachment.addresses, self._settings())
        wiring.check(link, request.netns)
        return Result()

    def _collect_garbage(self, request: Request) -> None:
        """Remove the attachments that are not valid any more; an absent list removes nothing."""
        valid = request.config.valid_attachments
        if valid is None:
            return
        keep = {Key(container, ifname) for container, ifname in valid}
        failures = []
        for attachment in self.ledger.attachments():
            if attachment.key in keep or attachment.network != request.config.name:
                continue
            try:
                with container_lock(self.state_dir, attachment.key.container_id):
                    if self.ledger.get(attachment.key) != attachment:
                        continue  # somebody was at work on it when the list was made
                    self._undo(attachment.key)
                log.info("GC %s %s", attachment.key.container_id, attachment.key.ifname)
            except (OSError, LedgerError, LockTimeout) as error:
                failures.append(str(error))
        if failures:
            raise CniError(spec.IO_FAILURE, "; ".join(failures))

    def _settings(self, otherwise: int = spec.TRY_AGAIN) -> NodeSettings:
        """Return the node's settings; while there are none, raise the code given."""
        settings = NodeSettings.from_mapping(self.ledger.settings())
        if settings is None:
            raise CniError(otherwise, "no podCIDR is known: the daemon has not synced yet")
        return settings


def _answer(env: Mapping[str, str], stdin: bytes, work: Callable[[Request], bytes]) -> tuple[int, bytes]:
    """Run a request; every failure becomes the error object of the CNI specification."""
    try:
        return 0, work(spec.parse_request(env, stdin))
    except Exception as error:
        failure = _as_cni_error(error)
        log.warning("%s %s: %s", env.get("CNI_COMMAND", "?"), env.get("CNI_CONTAINERID", ""), failure.msg)
        return 1, spec.error_json(failure, spec.version_of(stdin))


def _as_cni_error(error: Exception) -> CniError:
    """Return the CNI error for what went wrong: the one table from our exceptions to codes."""
    if isinstance(error, CniError):
        return error
    table: tuple[tuple[type[Exception], int], ...] = (
        (wiring.NoNamespace, spec.UNKNOWN_CONTAINER),
        (wiring.InterfaceExists, spec.ALREADY_EXISTS),
        (wiring.NotReady, spec.TRY_AGAIN),
        (wiring.WiringError, spec.CHECK_FAILED),
        (AlreadyAttached, spec.ALREADY_EXISTS),
        (Exhausted, spec.TRY_AGAIN),
        (LockTimeout, spec.TRY_AGAIN),
        (LedgerBusy, spec.TRY_AGAIN),
        (LedgerError, spec.IO_FAILURE),
        (NetlinkError, spec.IO_FAILURE),
        (OSError, spec.IO_FAILURE),
    )
    for kind, code in table:
        if isinstance(error, kind):
            return CniError(code, str(error))
    log.debug("a fault of podwire's own", exc_info=error)
    return CniError(spec.INTERNAL, f"internal error: {type(error).__name__}: {error}")


def _version(request: Request) -> bytes:
    return spec.version_json(request.config.cni_version)


def _result(link: wiring.PodLink, request: Request) -> Result:
    """Return what the specification wants to hear of an attachment."""
    inside = 1
    return Result(
        interfaces=(
            spec.Interface(link.host_ifname, link.host_mac, mtu=link.mtu),
            spec.Interface(link.ifname, link.pod_mac, sandbox=request.netns, mtu=link.mtu),
        ),
        ips=tuple(spec.IpConfig(a.cidr, a.gateway, inside) for a in link.addresses),
        routes=tuple(
            spec.Route("0.0.0.0/0" if a.family is Family.V4 else "::/0", a.gateway) for a in link.addresses
        ),
        dns=request.config.dns,
    )
