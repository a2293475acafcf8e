"""The watch over nftables: a look when something changed, and never too often."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from cni.rules import Rules
from node.keeper import LOOK_SECONDS, Keeper


@dataclass
class Scene:
    """What the keeper sees: a clock, the kernel's generation, rules that note each look."""

    now: float = 0.0
    generation: int = 1
    intact: bool = True
    changed: int = 0
    looks: list[float] = field(default_factory=list)
    mended: int = 0
    suspected: int = 0
    own: int = 0
    services: int = 0

    def mend(self) -> None:
        self.mended += 1

    def suspect(self) -> None:
        self.suspected += 1

    def keeper(self) -> Keeper:
        clock: Callable[[], float] = lambda: self.now  # noqa: E731
        return Keeper(
            cast(Rules, FakeRules(self)),
            lambda: self.intact,
            lambda: self.services,
            self.mend,
            self.suspect,
            clock,
        )


class FakeRules:
    """Stands for the real ones, whose own tests are elsewhere: here time and changes are what counts."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene

    def generation(self) -> tuple[int, int]:
        return self._scene.generation, self._scene.own

    def reconcile(self) -> int:
        self._scene.looks.append(self._scene.now)
        return self._scene.changed


def test_the_first_look_is_taken_and_the_next_only_after_a_change() -> None:
    scene = Scene()
    keeper = scene.keeper()
    for now in (0.0, 10.0, 20.0):
        scene.now = now
        assert keeper.look()
    scene.generation += 1
    assert keeper.look()
    assert scene.looks == [0.0, 20.0]


def test_changes_in_quick_succession_are_one_look_later() -> None:
    scene = Scene()
    keeper = scene.keeper()
    keeper.look()
    for step in range(1, 6):
        scene.now = step * LOOK_SECONDS / 5
        scene.generation += 1
        keeper.look()
    assert scene.looks == [0.0, LOOK_SECONDS]


def test_a_damaged_service_table_is_told() -> None:
    scene = Scene(intact=False)
    keeper = scene.keeper()
    assert not keeper.look()
    scene.now, scene.intact, scene.generation = 5.0, True, 2
    assert keeper.look()


def test_what_had_to_be_set_again_is_told_but_not_the_first_making() -> None:
    scene = Scene(changed=5)
    keeper = scene.keeper()
    keeper.look()
    assert scene.mended == 0
    scene.now, scene.generation = 5.0, 2
    keeper.look()
    assert scene.mended == 1


def test_only_changes_of_others_make_elements_suspect() -> None:
    scene = Scene(generation=7, own=2, services=3)
    keeper = scene.keeper()
    keeper.look()
    scene.now, scene.generation, scene.own, scene.services = 5.0, 12, 5, 5
    keeper.look()
    assert scene.suspected == 0
    scene.now, scene.generation = 10.0, 13
    keeper.look()
    assert scene.suspected == 1
