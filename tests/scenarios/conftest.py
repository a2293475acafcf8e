"""One lab with real daemons and the sample application, for all scenarios."""

from collections.abc import Iterator

import pytest

from lab import capture, demo, network
from lab.demo import World
from lab.topology import Mode, plan


@pytest.fixture(scope="session", params=list(Mode), ids=lambda mode: mode.value)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    name = f"scenarios{request.param.value}"
    network.remove(name)
    lab = network.up(plan(name, mode=request.param))
    try:
        with capture.stamping():
            yield demo.deploy(lab)
    finally:
        network.remove(name)
