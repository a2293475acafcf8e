"""What the L7 proxy leaves on a node: HAProxy, which goes on without the daemon, its folder, its routes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from netlink.family import Family
from node import l7_network
from node.leftovers import Leftover
from proxy.l7.engine import Engine
from proxy.l7.render import Settings


@dataclass(frozen=True, slots=True)
class Proxy:
    """HAProxy, if it runs, and the folder with its files."""

    folder: Path
    kind = "L7 proxy"

    @property
    def names(self) -> tuple[str, ...]:
        """The folder."""
        return (str(self.folder),)

    def __str__(self) -> str:
        return f"HAProxy of {self.folder}"

    def remove(self) -> None:
        """End it, with all its connections, and remove the folder."""
        engine = Engine(Settings(self.folder))
        if engine.adopt():
            engine.stop()
        shutil.rmtree(self.folder)


@dataclass(frozen=True, slots=True)
class Ways:
    """What leads packets to HAProxy: local routes, a policy rule, the tables `podwire_l7`."""

    names: tuple[str, ...]
    kind = "L7 network"

    def __str__(self) -> str:
        return f"the L7 proxy's {', '.join(self.names)}"

    def remove(self) -> None:
        """Take all of it away."""
        l7_network.remove()


def find(folder: Path) -> Iterator[Leftover]:
    """Yield what is there, in the order in which it goes. Raises NetlinkError."""
    if folder.is_dir():
        yield Proxy(folder)
    if found := tuple(dict.fromkeys(name for family in Family for name in l7_network.kept(family))):
        yield Ways(found)
