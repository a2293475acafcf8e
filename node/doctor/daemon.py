"""The check `daemon`: does it run, is it ready, and what does it say is wrong."""

from __future__ import annotations

from node.doctor.findings import Check, Finding, Severity
from node.doctor.view import Context, View

NAME = "daemon"
STALE_SECONDS = 300.0
"""It compares the kernel with what it should hold every 30 s; a sync of 44,000 services takes seconds."""


def judge(view: View | None, absence: str, version: str, now: float) -> Check:
    """Return what is wrong; `version` is that of this command, `now` is in seconds since the epoch."""
    if view is None:
        return Check(NAME, (Finding(absence, "systemctl start podwire, or see why its pod does not run"),))
    findings = []
    if not view.ready:
        words = f"the daemon of node {view.node} is not ready: pods cannot be added"
        findings.append(Finding(words, "see its other sentences here, and its log"))
    if not view.last_sync:
        words = f"the daemon of node {view.node} has brought nothing to the kernel yet"
        findings.append(Finding(words, f"see whether its source answers: {view.source or 'unknown'}"))
    elif now - view.last_sync > STALE_SECONDS:
        words = f"the daemon last looked at the kernel {now - view.last_sync:.0f} s ago"
        findings.append(Finding(words, "see its log, then restart it; traffic goes on meanwhile"))
    if version and view.version != version:
        words = f"the daemon is podwire {view.version}, this command {version}"
        findings.append(Finding(words, "restart the daemon after an upgrade", Severity.WARNING))
    remedy = "docs/operations.md has what each sentence means"
    findings += [Finding(problem, remedy) for problem in view.problems]
    return Check(NAME, tuple(findings))


def check(context: Context) -> Check:
    """Judge what the daemon has answered."""
    return judge(context.view, context.absence, context.version, context.clock())
