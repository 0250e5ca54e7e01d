"""The RAID engine under the `raid` target and Linux MD arrays.

`levels` says where bytes live, `dmpy.maths.parity` computes, `array` and its kinds move bytes and
survive the loss of members, `sync` makes members agree again in the background, and a Store keeps
what must be known after a restart.
"""

from __future__ import annotations

from collections.abc import Sequence

from dmpy.raid.array import Array, Member, Store
from dmpy.raid.copies import CopiesArray
from dmpy.raid.levels import Geometry
from dmpy.raid.parity import ParityArray
from dmpy.raid.striped import StripedArray

__all__ = ["make_array"]


def make_array(
    geometry: Geometry, members: Sequence[Member], store: Store, *, region_size: int, name: str
) -> Array:
    """Return the array of a geometry; the arguments are those of Array."""
    kinds: dict[int, type[Array]] = {0: StripedArray, 1: CopiesArray, 10: CopiesArray}
    kind = kinds.get(geometry.level.number, ParityArray)
    return kind(geometry, members, store, region_size=region_size, name=name)
