"""Handle one execution of the plugin: the same code in the daemon and, while it is down, in the binary.

The ledger comes first: an address is reserved before anything is made in the kernel and is free again
only after all of it is gone, so that dying at any point leaves something that the next try, or the next
start of the daemon, finishes or takes back.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from cni import checks, flat, flows, spec, wiring
from cni.attachments import Wired, link_of, rules_of, wired
from cni.options import Options, parse_options
from cni.rules import Rules, RulesError
from cni.settings import Mode, NodeSettings
from cni.spec import CniError, Command, Request, Result
from ipam.ledger import (
    AlreadyAttached,
    Attachment,
    Claim,
    HostPortTaken,
    InTheWay,
    Key,
    Ledger,
    LedgerBusy,
    LedgerError,
    State,
    read_boot_id,
)
from ipam.lock import LockTimeout, container_lock
from ipam.pools import Wish, demands
from ipam.ranges import RangeError
from netlink.errors import NetlinkError

log = logging.getLogger("podwire.cni")

LEDGER_FILE = "ledger.db"
LOCK_SECONDS = 10.0
RESERVE_TRIES = 8
"""How often an ADD makes room in a full range; another ADD may take what it made."""

Step = Callable[[str], None]
"""Called with the name of each step when it is done; tests end the process there."""


def ledger_of(state_dir: Path, *, background_checkpoints: bool = False) -> Ledger:
    """Return the node's ledger, not yet open."""
    return Ledger(
        state_dir / LEDGER_FILE, boot_id=read_boot_id(), background_checkpoints=background_checkpoints
    )


def in_process(env: Mapping[str, str], stdin: bytes, state_dir: str) -> tuple[int, bytes]:
    """Handle a request without the daemon."""

    def work(request: Request) -> bytes:
        if request.command is Command.VERSION:
            return _version(request)
        with ledger_of(Path(state_dir)) as ledger:
            return Plugin(ledger, Path(state_dir)).dispatch(request)

    return _answer(env, stdin, work)


def rules_for(ledger: Ledger) -> Rules:
    """Return the node's rules for pods, not yet open; what they should be is what the ledger has."""
    return Rules(lambda: [rules_of(a) for a in ledger.attachments() if a.state is not State.RELEASED])


def take_back(
    ledger: Ledger, attachment: Attachment, step: Step = lambda _: None, rules: Rules | None = None
) -> None:
    """Remove what a released attachment has in the kernel, then free its addresses.

    `rules` are open already; without them, rules of its own are used.
    """
    how = wired(attachment)
    if how.mode is Mode.FLAT:
        flat.answer_no_more(how.uplink, map(str, attachment.addresses))
    wiring.remove(attachment.host_ifname)
    step("link removed")
    with contextlib.nullcontext(rules) if rules else rules_for(ledger) as opened:
        _remove_rules(opened, attachment)
    flows.forget_stale(attachment.host_ports, attachment.addresses, served=False)
    ledger.forget(attachment.key)


def _remove_rules(rules: Rules, attachment: Attachment) -> None:
    """Remove an attachment's rules. DEL succeeds without: the daemon sets right what stays behind."""
    try:
        rules.remove(rules_of(attachment))
    except (NetlinkError, RulesError) as error:
        log.error("the rules of %s could not be removed: %s", attachment.key, error)


def forget_stale_flows(attachment: Attachment) -> None:
    """Forget connections to an attachment's host ports that do not lead to it."""
    flows.forget_stale(attachment.host_ports, attachment.addresses, served=True)


def finish(
    ledger: Ledger, state_dir: Path, key: Key, timeout: float = LOCK_SECONDS, rules: Rules | None = None
) -> None:
    """Take back another container's attachment, unless it is gone by now, or its container was added anew."""
    with container_lock(state_dir, key.container_id, timeout):
        attachment = ledger.get(key)
        if attachment and attachment.state is State.RELEASED:
            take_back(ledger, attachment, rules=rules)


@dataclass(frozen=True, slots=True)
class Plugin:
    """The plugin, working on a node's ledger.

    `defer` takes over the removal of a released attachment's interface, which costs 20 ms of kernel time;
    without it the removal is done before DEL answers. `settle` has connections forgotten that do not lead to
    an added pod's host ports. `shared_rules` are open already: so that many requests
    at once do not disturb each other's comparisons.
    """

    ledger: Ledger
    state_dir: Path
    defer: Callable[[Attachment], None] | None = None
    settle: Callable[[Attachment], None] = forget_stale_flows
    shared_rules: Rules | None = None
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
                self._status()
            case Command.VERSION:
                return _version(request)
        return b""

    def give_up(self, key: Key) -> None:
        """Take an attachment back without the runtime's DEL, as GC does."""
        with container_lock(self.state_dir, key.container_id):
            self._undo(key)

    def _locked(self, work: Callable[[Request], Result], request: Request) -> Result:
        """Work on a container while nobody else does."""
        with container_lock(self.state_dir, request.container_id):
            return work(request)

    def _add(self, request: Request) -> Result:
        options = parse_options(request)
        settings = self._settings()
        attachment, finished = self._reserve(request, options, settings)
        if finished:
            return _after_previous(request, spec.parse_result(json.loads(attachment.result)))
        self.step("reserved")
        with ExitStack() as undo:
            undo.callback(self._undo, attachment.key)
            with self._rules() as rules:
                rules.add(rules_of(attachment))
            self.settle(attachment)
            self.step("rules set")
            link = link_of(attachment, settings)
            routed = wiring.attach(link, request.netns, self.step)
            if settings.mode is Mode.FLAT:
                flat.answer_for(settings.uplink, [a.ip for a in link.addresses])
            result = _result(link, routed, request)
            self.ledger.commit(attachment.key, spec.result_json(result, spec.LATEST_VERSION).decode())
            undo.pop_all()
        self.step("committed")
        _log("ADD", attachment.key, addresses=",".join(map(str, attachment.addresses)))
        return _after_previous(request, result)

    def _reserve(self, request: Request, options: Options, settings: NodeSettings) -> tuple[Attachment, bool]:
        """Return the request's attachment, and whether an earlier try of the same execution finished it.

        Links that are still on their way out are removed here if the request has to wait for them.
        """
        key = Key(request.container_id, request.ifname)
        claim = _claim(request, options, settings)
        wanted = demands(settings.ipam, settings.pod_cidrs, options.wish)
        tried_before = self.ledger.get(key) is not None
        failure: LedgerError | None = None
        for _ in range(RESERVE_TRIES):
            try:
                attachment = self.ledger.reserve(key, claim, wanted, settings.ipam.quarantine)
            except AlreadyAttached as error:
                if not request.request_id or error.attachment.request_id != request.request_id:
                    raise
                return error.attachment, True
            except InTheWay as error:
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
                return take_back(self.ledger, attachment, rules=self.shared_rules)
            with contextlib.suppress(LockTimeout):
                return finish(self.ledger, self.state_dir, attachment.key, 0, self.shared_rules)
        return finish(self.ledger, self.state_dir, releasing[0].key, rules=self.shared_rules)

    def _undo(self, key: Key) -> None:
        attachment = self.ledger.release(key)
        if attachment:
            take_back(self.ledger, attachment, rules=self.shared_rules)

    def _delete(self, request: Request) -> Result:
        attachment = self.ledger.release(Key(request.container_id, request.ifname))
        self.step("released")
        if attachment is None:
            # Nothing is recorded; a link can still be there if the ledger was lost.
            wiring.remove(wiring.host_ifname(request.container_id, request.ifname))
            return Result()
        if attachment.host_ports:  # the next pod with these ports does not wait for the link's end
            with self._rules() as rules:
                _remove_rules(rules, attachment)
        self.step("rules removed")
        if self.defer:
            self.defer(attachment)
        else:
            take_back(self.ledger, attachment, self.step, self.shared_rules)
        self.step("forgotten")
        _log("DEL", attachment.key)
        return Result()

    def _check(self, request: Request) -> Result:
        attachment = self.ledger.get(Key(request.container_id, request.ifname))
        if attachment is None or attachment.state is not State.ATTACHED:
            raise CniError(spec.UNKNOWN_CONTAINER, f"the ledger has no attachment of {request.container_id}")
        if request.config.prev_result is None:
            expected = spec.parse_result(json.loads(attachment.result))
        else:
            expected = spec.parse_result(request.config.prev_result)
            _compare(expected, attachment)
        checks.check(link_of(attachment, self._settings()), request.netns, expected)
        with self._rules() as rules:
            rules.check(rules_of(attachment))
        return Result()

    def _status(self) -> None:
        """Raise what would keep an ADD from being served now."""
        settings = self._settings(otherwise=spec.NOT_AVAILABLE)
        if settings.ipam.exhausted_status:
            wanted = demands(settings.ipam, settings.pod_cidrs, Wish())
            if full := self.ledger.shortage(wanted, settings.ipam.quarantine):
                raise CniError(spec.NOT_AVAILABLE, f"exhausted: {full}")

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
                _log("GC", attachment.key)
            except (OSError, LedgerError, LockTimeout) as error:
                failures.append(str(error))
        try:
            self._remove_strays({wiring.host_ifname(*key) for key in valid})
        except OSError as error:
            failures.append(str(error))
        if failures:
            raise CniError(spec.IO_FAILURE, "; ".join(failures))

    def _remove_strays(self, keep: set[str]) -> None:
        """Remove pod interfaces that neither the runtime nor the ledger knows, as after a lost ledger.

        Interfaces are listed first: an attachment is in the ledger before its interface is made.
        """
        there = {name for _, name in socket.if_nameindex() if name.startswith(wiring.HOST_PREFIX)}
        known = {attachment.host_ifname for attachment in self.ledger.attachments()}
        for name in sorted(there - known - keep):
            wiring.remove(name)
            log.info("GC removed the interface %s, which nobody knows", name)

    @contextlib.contextmanager
    def _rules(self) -> Iterator[Rules]:
        """Open the rules for one use, in the thread's network namespace, unless they are shared."""
        if self.shared_rules:
            yield self.shared_rules
        else:
            with rules_for(self.ledger) as rules:
                yield rules

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
        (flat.NoUplink, spec.TRY_AGAIN),
        (wiring.WiringError, spec.CHECK_FAILED),
        (RulesError, spec.CHECK_FAILED),
        (RangeError, spec.BAD_CONFIG),
        (AlreadyAttached, spec.ALREADY_EXISTS),
        (InTheWay, spec.TRY_AGAIN),
        (HostPortTaken, spec.TRY_AGAIN),
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


def _claim(request: Request, options: Options, settings: NodeSettings) -> Claim:
    """Return what the ledger is to keep of a request beside its addresses."""
    how = Wired(settings.mode, settings.uplink, options.bandwidth)
    return Claim(
        network=request.config.name,
        netns=request.netns,
        host_ifname=wiring.host_ifname(request.container_id, request.ifname),
        request_id=request.request_id,
        pod=options.pod,
        mac=options.mac,
        host_ports=options.host_ports,
        wiring=how.text(),
        sticky=options.sticky,
    )


def _compare(expected: Result, attachment: Attachment) -> None:
    """Raise CniError for an address of prevResult on our interface that the ledger does not have."""
    addresses = tuple(map(str, attachment.addresses))
    ours = [i for i, face in enumerate(expected.interfaces) if face.name == attachment.key.ifname]
    for ip in expected.ips:
        address = ip.address.split("/")[0]
        if ip.interface in ours and address not in addresses:
            raise CniError(spec.CHECK_FAILED, f"prevResult has {address}, which the ledger does not")


def _result(link: wiring.PodLink, routed: tuple[wiring.PodAddress, ...], request: Request) -> Result:
    """Return what the specification wants to hear of an attachment."""
    inside = 1
    return Result(
        interfaces=(
            spec.Interface(link.host_ifname, link.host_mac, mtu=link.mtu),
            spec.Interface(link.ifname, link.pod_mac, sandbox=request.netns, mtu=link.mtu),
        ),
        ips=tuple(spec.IpConfig(a.cidr, a.gateway, inside) for a in link.addresses),
        routes=tuple(spec.Route(a.default, a.gateway) for a in routed),
        dns=request.config.dns,
    )


def _log(command: str, key: Key, **more: str) -> None:
    """Log what was done, its facts apart from the words for a log in JSON (node.logs)."""
    facts = {"container": key.container_id, "interface": key.ifname, **more}
    log.info("%s", command, extra={"fields": facts})


def _after_previous(request: Request, ours: Result) -> Result:
    """Return our result after those of earlier plugins, if we are not the first."""
    previous = request.config.prev_result
    return ours if previous is None else spec.merged(spec.parse_result(previous), ours)
