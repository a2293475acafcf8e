"""The marks of the IPVS dataplane on packets, on the kernel; what is shown needs no IPVS."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Callable

import pytest

from netlink import netns
from netlink.family import Family
from netlink.nftables.batch import Nft
from proxy.ipvs import places, ruleset

LATER = """
table inet later {
    counter marked { }
    counter others { }
    chain output {
        type filter hook output priority filter;
        meta l4proto udp meta mark & 0xf0000000 == 0x70000000 counter name marked
        meta l4proto udp meta mark 0x4000 counter name others
    }
}
"""


@pytest.mark.parametrize("family", Family)
def test_what_leaves_with_a_mark_already_is_not_taken_for_a_virtual_servers(
    namespaces: Callable[[], str], family: Family
) -> None:
    """As a tunnel's outer packet does: IPVS, which comes after, would lead it into the tunnel for ever."""

    def look() -> tuple[str, str]:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        _nft("-f", "-", text=LATER)
        before = _counted(family)
        with Nft(family, places.TABLE) as rules:
            rules.commit(ruleset.base(family))
        return before, _counted(family)

    before, after = netns.run(namespaces(), look)
    assert before == "2 of ours, 1 of others"
    assert after == "0 of ours, 1 of others"


def _counted(family: Family) -> str:
    """Send packets with two of our marks and one of others; return how many were seen after IPVS's place."""
    _nft("reset", "counters")
    for mark in (places.mark_of(7), places.MARK, 0x4000):
        with socket.socket(family.af, socket.SOCK_DGRAM) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            client.sendto(b"", ("127.0.0.1" if family is Family.V4 else "::1", 9))
    packets = re.findall(r"packets (\d+)", _nft("list", "counters"))
    return "{} of ours, {} of others".format(*packets)


def _nft(*words: str, text: str = "") -> str:
    return subprocess.run(["nft", *words], input=text, capture_output=True, text=True, check=True).stdout
