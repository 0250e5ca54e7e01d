"""striped: chunks of the target dealt out to the legs in turn.

Table: begin len striped legs chunk_size_sectors [device start_sector]...

Source: Linux v6.12 drivers/md/dm-stripe.c, stripe_ctr(), stripe_map_sector(), stripe_status().
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from dmpy.target import Args, Leg, MapTarget, Op, Run
from dmpy.units import SECTOR_SHIFT, exact_div

__all__ = ["Striped"]

_MOST = (1 << 32) - 1
# DM_IO_ERROR_THRESHOLD
_ERRORS_THAT_ARE_EVENTS = 15


class Striped(MapTarget):
    """Chunk c of the target is chunk c // n of leg c % n, where n is the number of legs.

    Args:
        chunk_size: bytes, a multiple of the sector.
        legs: sections of equal length, a multiple of the chunk.
    """

    type_name = "striped"
    version = (1, 6, 0)
    pure = True

    def __init__(self, chunk_size: int, legs: Sequence[Leg]) -> None:
        super().__init__(sum(leg.length for leg in legs), legs)
        self.chunk_size = chunk_size
        # Errors on each leg since the table was loaded, as stripe_end_io() counts them.
        self.errors = [0] * len(self.legs)

    @classmethod
    def parse(cls, args: Args, length: int) -> Striped:
        """Read `legs chunk_size_sectors [device start_sector]...`."""
        count = args.integer("number of legs", 1, _MOST, plus=True)
        chunk_size_sectors = args.integer("chunk size in sectors", 1, _MOST, plus=True)
        length_sectors = length >> SECTOR_SHIFT
        if length_sectors % count:
            args.fail(
                f"length must be divisible by the number of legs "
                f"(got {length_sectors} sectors for {count} legs)",
                "length",
            )
        leg_sectors = length_sectors // count
        if leg_sectors % chunk_size_sectors:
            args.fail(
                f"length of a leg must be a multiple of the chunk size "
                f"(got {leg_sectors} sectors for chunks of {chunk_size_sectors})",
                "length",
            )
        if args.remaining != 2 * count:
            args.fail(
                f"{count} legs need {2 * count} arguments, device and start sector each "
                f"(got {args.remaining})",
                "legs",
            )
        legs = [args.leg(leg_sectors << SECTOR_SHIFT) for _ in range(count)]
        striped = cls(chunk_size_sectors << SECTOR_SHIFT, legs)
        args.check_chunk(striped.chunk_size, striped.block_size.minimum)
        return striped

    def table(self) -> str:
        """Return `legs chunk_size_sectors [device start_sector]...`."""
        chunk_size_sectors = exact_div(self.chunk_size, 1 << SECTOR_SHIFT)
        legs = " ".join(leg.table() for leg in self.legs)
        return f"{len(self.legs)} {chunk_size_sectors} {legs}"

    def status(self) -> str:
        """Return `legs [device]... 1 health`, an A for each leg that has not failed."""
        devices = " ".join(leg.device.table_name for leg in self.legs)
        health = "".join("D" if errors else "A" for errors in self.errors)
        return f"{len(self.legs)} {devices} 1 {health}"

    def leg_error(self, leg: int, error: OSError) -> None:
        """Count the error for every leg on that device; the first few are events."""
        if error.errno == errno.EOPNOTSUPP:
            return
        device = self.legs[leg].device
        for other, candidate in enumerate(self.legs):
            if candidate.device is device:
                self.errors[other] += 1
                if self.errors[other] < _ERRORS_THAT_ARE_EVENTS:
                    self.event()

    def map(self, op: Op, offset: int, length: int) -> list[Run]:
        """Return a run for each chunk, or the whole piece at once where there is one leg."""
        chunk_size = self.chunk_size
        legs = len(self.legs)
        chunk, within = divmod(offset, chunk_size)
        row, leg = divmod(chunk, legs)
        if within + length <= chunk_size:
            return [(leg, row * chunk_size + within, length)]
        if legs == 1:
            return [(0, offset, length)]
        runs = []
        piece = chunk_size - within
        place = row * chunk_size + within
        while length:
            if piece > length:
                piece = length
            runs.append((leg, place, piece))
            length -= piece
            piece = chunk_size
            leg += 1
            if leg == legs:
                leg = 0
                row += 1
            place = row * chunk_size
        return runs
