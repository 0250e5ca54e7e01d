"""unstriped: one leg of a striped device, picked out of the whole.

Table: begin len unstriped stripes chunk_size_sectors stripe device start_sector

Source: Linux v6.12 drivers/md/dm-unstripe.c, unstripe_ctr(), map_to_core().
"""

from __future__ import annotations

from dmpy.target import Args, Leg, MapTarget, Op, Run
from dmpy.units import SECTOR_SHIFT, ceil_div, exact_div

__all__ = ["Unstriped"]

_MOST = (1 << 32) - 1


class Unstriped(MapTarget):
    """Chunk c of the target is chunk c * n + i of its leg, of n stripes the one with number i.

    Args:
        length: bytes, a multiple of the chunk.
        stripes: how many stripes the leg's bytes were dealt to.
        chunk_size: bytes, a multiple of the sector.
        stripe: number of the stripe to pick, from 0.
        leg: reaches to the end of the last chunk that is picked, at least.
    """

    type_name = "unstriped"
    version = (1, 1, 0)
    pure = True

    def __init__(
        self, length: int, stripes: int, chunk_size: int, stripe: int, leg: Leg
    ) -> None:
        super().__init__(length, [leg])
        self.stripes = stripes
        self.chunk_size = chunk_size
        self.stripe = stripe

    @classmethod
    def parse(cls, args: Args, length: int) -> Unstriped:
        """Read `stripes chunk_size_sectors stripe device start_sector`."""
        if args.remaining != 5:
            args.fail(
                "5 arguments: stripes, chunk size, stripe, device, start sector "
                f"(got {args.remaining})",
                "arguments",
            )
        stripes = args.integer("number of stripes", 1, _MOST, plus=True)
        chunk_size_sectors = args.integer("chunk size in sectors", 1, _MOST, plus=True)
        # The kernel takes the number of stripes itself too, and any where there is one stripe.
        most = stripes if stripes > 1 else _MOST
        stripe = args.integer("number of the stripe to pick", 0, most, plus=True)
        length_sectors = length >> SECTOR_SHIFT
        if length_sectors % chunk_size_sectors:
            args.fail(
                f"length must be a multiple of the chunk size "
                f"(got {length_sectors} sectors for chunks of {chunk_size_sectors})",
                "length",
            )
        chunk_size = chunk_size_sectors << SECTOR_SHIFT
        last_chunk = (exact_div(length, chunk_size) - 1) * stripes + stripe
        leg = args.leg((last_chunk + 1) * chunk_size)
        unstriped = cls(length, stripes, chunk_size, stripe, leg)
        args.check_chunk(chunk_size, unstriped.block_size.minimum)
        return unstriped

    def table(self) -> str:
        """Return `stripes chunk_size_sectors stripe device start_sector`."""
        chunk_size_sectors = exact_div(self.chunk_size, 1 << SECTOR_SHIFT)
        return f"{self.stripes} {chunk_size_sectors} {self.stripe} {self.legs[0].table()}"

    def map(self, op: Op, offset: int, length: int) -> list[Run]:
        """Return a run for each chunk, or one for all where nothing lies between them."""
        chunk_size = self.chunk_size
        chunk, within = divmod(offset, chunk_size)
        row = self.stripes * chunk_size
        place = chunk * row + self.stripe * chunk_size + within
        if self.stripes == 1:
            return [(0, place, length)]
        runs = []
        for _ in range(ceil_div(within + length, chunk_size)):
            piece = min(chunk_size - within, length)
            runs.append((0, place, piece))
            length -= piece
            place += row - within
            within = 0
        return runs
