"""linear: the bytes of the target are a section of one leg.

Table: begin len linear device start_sector

Source: Linux v6.12 drivers/md/dm-linear.c, linear_ctr(), linear_map_sector().
"""

from __future__ import annotations

from dmpy.target import Args, Leg, MapTarget, Op, Run

__all__ = ["Linear"]


class Linear(MapTarget):
    """Byte b of the target is byte b of its one leg.

    Devices below that are linear themselves are passed over when the table is put to use.
    """

    type_name = "linear"
    version = (1, 4, 0)
    transparent = True
    pure = True

    def __init__(self, leg: Leg) -> None:
        super().__init__(leg.length, [leg])

    @classmethod
    def parse(cls, args: Args, length: int) -> Linear:
        """Read `device start_sector`."""
        return cls(args.leg(length))

    def table(self) -> str:
        """Return `device start_sector`."""
        return self.legs[0].table()

    def map(self, op: Op, offset: int, length: int) -> list[Run]:
        """Return the one run that there is."""
        return [(0, offset, length)]
