"""Labs with real daemons and the sample application, for all scenarios, and each seen in its families."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from lab import capture, network
from lab.topology import Topology
from lab.world import World, deploy
from tests.scenarios.forms import IPTABLES, MAIN, MORE, view_id, views

LINES = 40
"""Of each daemon's log, that a failure shows."""


class Labs:
    """One lab at a time: it stays until another is asked for."""

    def __init__(self) -> None:
        self._world: World | None = None

    def world(self, form: Topology) -> World:
        """Return that lab with the sample deployed."""
        if self._world is None or self._world.lab.plan != form:
            self.close()
            network.remove(form.name)
            lab = network.up(form)
            try:
                self._world = deploy(lab)
            except BaseException:
                network.remove(form.name)
                raise
        return self._world

    def told(self) -> str:
        """Say how the daemons of the lab that is up are, and what they logged last."""
        if self._world is None:
            return ""
        lab, found = self._world.lab, list[str]()
        for node in lab.plan.nodes:
            log = lab.log(node.name)
            running = "runs" if network.daemon(lab, node.name) else "has ended"
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            found += [f"{node.name}: its daemon {running}", *lines[-LINES:]]
        return "\n".join(found)

    def close(self) -> None:
        """Take down what is up."""
        if self._world is not None:
            network.remove(self._world.lab.plan.name)
            self._world = None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run what is on one lab together: pytest itself goes by a parameter's position, which is no lab's."""
    order = {view: position for position, view in enumerate(views(*MAIN, *MORE, IPTABLES))}
    found = {
        i: item.callspec.params.get("world") for i, item in enumerate(items) if hasattr(item, "callspec")
    }
    placed = {i: order[view] for i, view in found.items() if view in order}
    by_lab = [items[i] for i in sorted(placed, key=placed.__getitem__)]
    for i, item in zip(placed, by_lab, strict=True):
        items[i] = item


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a failure in a lab how its daemons are."""
    report = yield
    labs = getattr(item, "funcargs", {}).get("labs")
    if report.failed and isinstance(labs, Labs):
        report.sections.append(("daemons", labs.told()))
    return report


@pytest.fixture(scope="session")
def labs() -> Iterator[Labs]:
    found = Labs()
    try:
        with capture.stamping():
            yield found
    finally:
        found.close()


@pytest.fixture(scope="session", params=views(*MAIN), ids=view_id)
def world(request: pytest.FixtureRequest, labs: Labs) -> World:
    form, family = request.param
    return labs.world(form).of(family)
