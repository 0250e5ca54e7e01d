"""zero: reads give zeroes, writes are dropped.

Table: begin len zero

Source: Linux v6.12 drivers/md/dm-zero.c, zero_ctr(), zero_map().
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from dmpy.device import HOLE, Buffers, Extent
from dmpy.errors import DeviceError
from dmpy.target import Args, Target

__all__ = ["Zero"]

_ZEROES = memoryview(bytes(1 << 20))


class Zero(Target):
    """A hole of any size that takes whatever is written to it.

    Args:
        length: bytes.
    """

    type_name = "zero"
    version = (1, 2, 0)

    @classmethod
    def parse(cls, args: Args, length: int) -> Zero:
        """Read no arguments."""
        return cls(length)

    def table(self) -> str:
        """Return nothing."""
        return ""

    def preadv(self, buffers: Buffers, offset: int) -> None:
        for buffer in buffers:
            for begin in range(0, len(buffer), len(_ZEROES)):
                piece = buffer[begin : begin + len(_ZEROES)]
                piece[:] = _ZEROES[: len(piece)]

    def pwritev(self, buffers: Buffers, offset: int, *, fua: bool = False) -> None:
        """Drop the bytes."""

    def discard(self, offset: int, length: int) -> None:
        """There is nothing to give back."""

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        """The range reads as zeroes already; only a range that must be allocated cannot be had."""
        if fast_only and not may_unmap:
            raise DeviceError(errno.EOPNOTSUPP, "zero: nothing can be allocated")

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        yield Extent(offset, length, HOLE)
