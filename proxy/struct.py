"""The base of the model's values."""

from __future__ import annotations

import msgspec


class Struct(msgspec.Struct, frozen=True, gc=False):
    """A frozen value; msgspec makes one in a tenth of a dataclass's time, and there are 100,000 of them."""
