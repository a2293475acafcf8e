"""Virtual machines take minutes on an emulated processor: `make test-vm` asks for them."""

from __future__ import annotations

import os

import pytest

VARIABLE = "PODWIRE_VM_TESTS"


@pytest.fixture(scope="session", autouse=True)
def _asked_for() -> None:
    if not os.environ.get(VARIABLE):
        pytest.skip(f"{VARIABLE} is not set: `make test-vm` runs these")
