"""Whose a chain is, decided by its name, and what of a table goes."""

from __future__ import annotations

import pytest

from netlink.family import Family
from netlink.xtables import Variant, parse_save
from node.leftover_chains import is_kube_proxys, select, some_of


@pytest.mark.parametrize(
    "name",
    [
        "KUBE-SERVICES",
        "KUBE-PROXY-CANARY",
        "KUBE-MARK-MASQ",
        "KUBE-IPVS-OUT-FILTER",
        "KUBE-PORTALS-HOST",
        "KUBE-SVC-NPX46M4PTMTKRN6Y",
        "KUBE-XLB-NPX46M4PTMTKRN6Y",
    ],
)
def test_chains_of_kube_proxy(name: str) -> None:
    assert is_kube_proxys("nat", name)
    assert is_kube_proxys("filter", name)


@pytest.mark.parametrize(
    "name",
    [
        "KUBE-KUBELET-CANARY",
        "KUBE-IPTABLES-HINT",
        "KUBE-MARK-DROP",
        "KUBE-ROUTER-INPUT",
        "KUBE-POD-FW-NPX46M4PTMTKRN6Y",
        "KUBE-NWPLCY-NPX46M4PTMTKRN6Y",
        "KUBE-SVC-NPX46M4PTMTKRN6",
        "KUBE-SVC-NPX46M4PTMTKRN61",
        "KUBE-SERVICES-2",
        "DOCKER",
        "CNI-HOSTPORT-DNAT",
        "PREROUTING",
    ],
)
def test_chains_of_others(name: str) -> None:
    assert not is_kube_proxys("nat", name)


def test_kube_firewall_is_kubelets_but_in_nat() -> None:
    assert is_kube_proxys("nat", "KUBE-FIREWALL")
    assert not is_kube_proxys("filter", "KUBE-FIREWALL")


TABLE = """
*nat
:PREROUTING ACCEPT [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-MINE - [0:0]
-A PREROUTING -m comment --comment "first \\"one\\"" -j KUBE-SERVICES
-A PREROUTING -m comment --comment "first \\"one\\"" -j KUBE-SERVICES
-A PREROUTING -j KUBE-MINE
-A KUBE-SERVICES -j KUBE-MARK-MASQ
COMMIT
"""


def test_what_goes_is_said_and_written_for_iptables_restore() -> None:
    (state,) = parse_save(TABLE, Variant.NFT, Family.V4)
    remarks: list[str] = []
    chains = select(state, remarks)
    assert chains
    where = "table nat of iptables-nft (IPv4)"
    assert str(chains) == f"2 chains with 1 rule and 2 jumps from PREROUTING in {where}"
    assert remarks == [f"left alone in {where}, not known to be kube-proxy's: KUBE-MINE"]
    jump = '-D PREROUTING -m comment --comment "first \\"one\\"" -j KUBE-SERVICES'
    assert chains.restore_text().splitlines() == [
        "*nat",
        jump,
        jump,
        ":KUBE-MARK-MASQ - [0:0]",
        ":KUBE-SERVICES - [0:0]",
        "-X KUBE-MARK-MASQ",
        "-X KUBE-SERVICES",
        "COMMIT",
    ]


def test_a_table_of_others_has_nothing_to_go() -> None:
    (state,) = parse_save("*nat\n:DOCKER - [0:0]\nCOMMIT\n", Variant.LEGACY, Family.V6)
    remarks: list[str] = []
    assert select(state, remarks) is None
    assert remarks == []


def test_a_kube_mark_masq_that_others_use_keeps_the_masquerade() -> None:
    lines = (
        ":DOCKER - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-POSTROUTING - [0:0]\n-A DOCKER -j KUBE-MARK-MASQ\n"
    )
    (state,) = parse_save(f"*nat\n{lines}COMMIT\n", Variant.LEGACY, Family.V4)
    remarks: list[str] = []
    assert select(state, remarks) is None
    where = "table nat of iptables-legacy (IPv4)"
    names = "KUBE-MARK-MASQ, KUBE-POSTROUTING"
    assert remarks == [f"left alone in {where}, for rules of others use them: {names}"]


def test_many_names_are_cut() -> None:
    assert some_of("edcba") == "a, b, c, d, e"
    assert some_of("gfedcba") == "a, b, c, d, e and 2 more"
