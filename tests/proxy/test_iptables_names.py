"""Names of chains are kube-proxy's, and those of others are nobody's to touch."""

from __future__ import annotations

import pytest

from proxy.frontends import Backend
from proxy.iptables.names import SHARED, ChainId, PortName, endpoint_chain, is_ours, service_chain
from proxy.model import Protocol

TCP, UDP = Protocol.TCP, Protocol.UDP
DOCUMENTED_SERVICES = (
    ("default/my-nginx", TCP, "KUBE-SVC-BEPXDJBUHFCSYIC3"),
    ("default/kubernetes:https", TCP, "KUBE-SVC-NPX46M4PTMTKRN6Y"),
    ("kube-system/kube-dns:dns", UDP, "KUBE-SVC-TCOU7JCQXEZGVUNU"),
    ("kube-system/kube-dns:dns-tcp", TCP, "KUBE-SVC-ERIFXISQEP7F7OF4"),
    ("kube-system/kube-dns:metrics", TCP, "KUBE-SVC-JD5MR3NA4I4DYORP"),
    ("default/nginx", TCP, "KUBE-SVC-4N57TFCL4MD7ZTDA"),
    ("yaobank/summary:http", TCP, "KUBE-SVC-OIQIZJVJK6E34BR4"),
    ("yaobank/customer:http", TCP, "KUBE-SVC-PX5FENG4GZJTCELT"),
    ("yaobank/database:http", TCP, "KUBE-SVC-AE2X4VPDA5SRYCA6"),
    ("kube-system/kubernetes-dashboard", TCP, "KUBE-SVC-XGLOHA7QRQ3V22RZ"),
)
"""Service ports and the chains that they have on documented clusters; some ports have no name."""
DOCUMENTED_ENDPOINTS = (
    ("default/my-nginx", "192.168.155.193", "KUBE-SEP-5QJQLOAYBTXEYYW5"),
    ("default/my-nginx", "192.168.36.129", "KUBE-SEP-OJZLCJUDW7QMREOS"),
    ("default/nginx", "10.244.0.16", "KUBE-SEP-IPTMJGQD74YPEYY6"),
    ("yaobank/customer:http", "10.48.0.128", "KUBE-SEP-DES65NIG7LUKIP6J"),
    ("yaobank/customer:http", "198.19.22.129", "KUBE-SEP-5ACZIZ6RUWUYDTM3"),
    ("yaobank/summary:http", "10.48.0.65", "KUBE-SEP-QBQ2ZLCSJLFEASMX"),
    ("yaobank/summary:http", "10.48.0.67", "KUBE-SEP-BS2BXDAXX5ZBJNP2"),
)
"""Endpoints at port 80, over TCP."""


@pytest.mark.parametrize(("title", "protocol", "chain"), DOCUMENTED_SERVICES)
def test_a_service_port_has_the_documented_chain(title: str, protocol: Protocol, chain: str) -> None:
    assert service_chain("SVC", PortName(title, protocol)) == ("nat", chain)


@pytest.mark.parametrize(("title", "address", "chain"), DOCUMENTED_ENDPOINTS)
def test_an_endpoint_has_the_documented_chain(title: str, address: str, chain: str) -> None:
    assert endpoint_chain(PortName(title, TCP), Backend(address, 80, False)) == ("nat", chain)


@pytest.mark.parametrize(
    "chain",
    [
        ("filter", "KUBE-FIREWALL"),
        ("nat", "KUBE-KUBELET-CANARY"),
        ("mangle", "KUBE-IPTABLES-HINT"),
        ("nat", "KUBE-MARK-DROP"),
        ("nat", "KUBE-PROXY-CANARY"),
        ("mangle", "KUBE-SVC-OIQIZJVJK6E34BR4"),
        ("nat", "KUBE-SVC-short"),
        ("filter", "KUBE-ROUTER-INPUT"),
        ("nat", "PREROUTING"),
        ("mangle", "KUBE-SERVICES"),
    ],
)
def test_chains_of_others_are_not_ours(chain: tuple[str, str]) -> None:
    assert not is_ours(ChainId(*chain))


def test_all_that_is_written_is_ours_and_fits_the_kernel() -> None:
    """linux/netfilter/x_tables.h: XT_EXTENSION_MAXNAMELEN is 29, with the byte that ends a name."""
    port = PortName("a/b", TCP)
    chains = [*SHARED, *(service_chain(kind, port) for kind in ("SVC", "SVL", "EXT", "FW"))]
    assert all(is_ours(chain) and len(chain.name) <= 28 for chain in chains)
