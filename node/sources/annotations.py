"""Annotations of a Node that say what its tunnels have; what is wrong with one is a sentence, and no more."""

from __future__ import annotations

import re
import reprlib
import sys

TUNNEL_MAC = "podwire.io/tunnel-mac"
WIREGUARD_KEYS, WIREGUARD_DETOUR = "podwire.io/wireguard-keys", "podwire.io/wireguard-detour"

MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
NO_MAC = "00:00:00:00:00:00"
KEY = re.compile(r"[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=")
"""32 bytes in base64; the last digit has only four bits of them."""


def tunnel_mac(text: str, problems: list[str]) -> str:
    """Return the MAC address of a node's tunnel interface; "" for one that no interface can have."""
    mac = text.strip().lower()
    if not mac:
        return ""
    if not MAC.fullmatch(mac) or mac == NO_MAC or int(mac[:2], 16) & 1:
        problems.append(f"metadata.annotations[{TUNNEL_MAC}] {text!r} is not a unicast MAC address: left out")
        return ""
    return mac


def wireguard_keys(text: str, problems: list[str]) -> tuple[str, ...]:
    """Return the public keys of a node's two WireGuard devices; none if one of them cannot be one."""
    keys = tuple(part.strip() for part in text.split(",")) if text.strip() else ()
    if keys and (len(keys) != 2 or keys[0] == keys[1] or not all(map(KEY.fullmatch, keys))):
        what = "two different keys of 32 bytes in base64, with a comma between them"
        problems.append(
            f"metadata.annotations[{WIREGUARD_KEYS}] {reprlib.repr(text)} is not {what}: left out"
        )
        return ()
    return tuple(map(sys.intern, keys))
