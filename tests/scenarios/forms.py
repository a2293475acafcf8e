"""The labs that the scenarios run on, chosen so that backends, families and wirings all occur."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lab.cases import Case, possible
from lab.topology import Backend, Between, IpFamily, Mode, ProxyMode, Topology, plan
from netlink.family import Family

View = tuple[Topology, Family]


def _form(
    mode: Mode,
    ip_family: IpFamily,
    backend: Backend,
    underlay: IpFamily | None = None,
    proxy_mode: ProxyMode = ProxyMode.NFTABLES,
) -> Topology:
    over = underlay.value if underlay else ""
    proxy = "" if proxy_mode is ProxyMode.NFTABLES else proxy_mode.value
    name = f"s{mode.value[0]}{backend.value}{ip_family.value}{over}{proxy}"
    found = plan(name, mode=mode, ip_family=ip_family, between=Between(backend, underlay))
    return replace(found, proxy_mode=proxy_mode)


MAIN = (
    _form(Mode.ROUTED, IpFamily.DUAL, Backend.AUTO),
    _form(Mode.BRIDGE, IpFamily.DUAL, Backend.VXLAN),
    _form(Mode.ROUTED, IpFamily.IPV6, Backend.DIRECT),
)
"""All scenarios run on these."""

MORE = (
    _form(Mode.BRIDGE, IpFamily.IPV4, Backend.DIRECT),
    _form(Mode.ROUTED, IpFamily.IPV6, Backend.AUTO, IpFamily.IPV4),
    _form(Mode.BRIDGE, IpFamily.IPV4, Backend.AUTO, IpFamily.IPV6),
    _form(Mode.ROUTED, IpFamily.DUAL, Backend.VXLAN, IpFamily.IPV6),
)
"""On these it is about the network between nodes: scenarios B and C."""

IPTABLES = _form(Mode.ROUTED, IpFamily.DUAL, Backend.AUTO, proxy_mode=ProxyMode.IPTABLES)
"""On this one it is about services: scenarios C to F, and H."""


def views(*forms: Topology) -> tuple[View, ...]:
    """Return each lab seen in each of its families."""
    return tuple((form, family) for form in forms for family in form.families)


def view_id(view: View) -> str:
    """Return a view's name, as tests have it."""
    form, family = view
    over = f"-over-{form.underlay.value}" if form.underlay is not form.ip_family else ""
    proxy = "" if form.proxy_mode is ProxyMode.NFTABLES else f"{form.proxy_mode.value}-"
    return f"{proxy}{form.mode.value}-{form.backend.value}-{form.ip_family.value}{over}-v{family.value}"


def each(cases: tuple[Case, ...], *forms: Topology) -> pytest.MarkDecorator:
    """Run a test of a world and a case for each case that each of these labs can have."""
    pairs = [(view, case) for view in views(*forms) for case in cases if possible(case, *view)]
    return pytest.mark.parametrize(
        ("world", "case"),
        pairs,
        indirect=["world"],
        ids=[f"{view_id(view)}-{case.name}" for view, case in pairs],
    )
