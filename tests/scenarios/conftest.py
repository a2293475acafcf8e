"""Labs with real daemons and the sample application, for all scenarios, and each seen in its families."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab import capture, demo, network
from lab.demo import World
from lab.topology import IpFamily, Mode, plan
from netlink.family import Family

LABS = ((Mode.ROUTED, IpFamily.DUAL), (Mode.BRIDGE, IpFamily.DUAL), (Mode.ROUTED, IpFamily.IPV6))
VIEWS = tuple((mode, ip_family, family) for mode, ip_family in LABS for family in ip_family.families)

View = tuple[Mode, IpFamily, Family]


class Labs:
    """One lab at a time: it stays until another is asked for."""

    def __init__(self) -> None:
        self._world: World | None = None

    def world(self, mode: Mode, ip_family: IpFamily) -> World:
        """Return that lab with the sample deployed."""
        name = f"scenarios{mode.value}{ip_family.value}"
        if self._world is None or self._world.lab.plan.name != name:
            self.close()
            network.remove(name)
            lab = network.up(plan(name, mode=mode, ip_family=ip_family))
            try:
                self._world = demo.deploy(lab)
            except BaseException:
                network.remove(name)
                raise
        return self._world

    def close(self) -> None:
        """Take down what is up."""
        if self._world is not None:
            network.remove(self._world.lab.plan.name)
            self._world = None


@pytest.fixture(scope="session")
def labs() -> Iterator[Labs]:
    found = Labs()
    try:
        with capture.stamping():
            yield found
    finally:
        found.close()


def view_id(view: View) -> str:
    mode, ip_family, family = view
    return f"{mode.value}-{ip_family.value}-v{family.value}"


@pytest.fixture(scope="session", params=VIEWS, ids=view_id)
def world(request: pytest.FixtureRequest, labs: Labs) -> World:
    mode, ip_family, family = request.param
    return labs.world(mode, ip_family).of(family)
