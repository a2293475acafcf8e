"""What this machine's kernel may lack is tested in a machine that has it: WireGuard and IPVS."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lab.qemu import kernels, throwaway

CHECKOUT = Path(__file__).parents[2]
SECONDS = 600.0
QUICK = {
    "wireguard": "tests/netlink/test_wireguard.py tests/node/test_wireguard.py"
    " -k 'either_underlay or keys_change or back'",
    "ipvs": "tests/netlink/test_ipvs.py tests/proxy/test_ipvs_kernel.py",
}


@pytest.mark.parametrize("subject", QUICK)
def test_it_passes_on_debians_kernel(subject: str) -> None:
    """None is skipped: what is said to need such a kernel must find it in there."""
    pytest_ = f"{sys.executable} -m pytest -q -p no:cacheprovider {QUICK[subject]}"
    kernel = kernels.prepare("stable", print)
    status, output = throwaway.run(f"cd {CHECKOUT} && {pytest_}", kernel, memory_mb=1536, seconds=SECONDS)
    assert status == 0, output[-4000:]
    assert " passed" in output and "skipped" not in output, output[-4000:]
