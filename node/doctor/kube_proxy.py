"""The check `kube-proxy`: what it left behind, and whether it runs."""

from __future__ import annotations

from node.doctor.findings import Check, Finding
from node.doctor.view import Context
from node.leftovers import Survey, survey

NAME = "kube-proxy"


def judge(found: Survey) -> Check:
    """Return a finding for each leftover, and for each process."""
    stop = "remove it from this node (its DaemonSet, its static pod or its service), then clean up after it"
    findings = [Finding(f"kube-proxy runs (process {pid})", stop) for pid in found.running]
    remedy = "podwire cleanup --kube-proxy"
    findings += [Finding(f"kube-proxy left {leftover}", remedy) for leftover in found.leftovers]
    return Check(NAME, tuple(findings), found.remarks)


def check(context: Context) -> Check:
    """Look for what kube-proxy left, and for kube-proxy."""
    return judge(survey())
