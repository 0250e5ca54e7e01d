"""error: every request fails with EIO.

Table: begin len error [device start_sector]

Source: Linux v6.12 drivers/md/dm-target.c, io_err_ctr(), io_err_map().
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import NoReturn

from dmpy.device import Buffers, Extent
from dmpy.errors import DeviceError
from dmpy.target import Args, Leg, Target

__all__ = ["Error"]


class Error(Target):
    """A range that is broken.

    Args:
        length: bytes.
        legs: none, or one that is held and never used.
    """

    type_name = "error"
    version = (1, 7, 0)

    def __init__(self, length: int, legs: Sequence[Leg] = ()) -> None:
        super().__init__(length, legs)

    @classmethod
    def parse(cls, args: Args, length: int) -> Error:
        """Read no arguments, or a device and its start sector, as Linux does from v6.7 on."""
        if not args.remaining:
            return cls(length)
        if args.remaining != 2:
            args.fail(
                f"no arguments, or a device and a start sector (got {args.remaining})",
                "arguments",
            )
        return cls(length, [args.leg(length)])

    def table(self) -> str:
        """Return nothing, or the device and its start sector."""
        return self.legs[0].table() if self.legs else ""

    # Refuse a request.
    def _fail(self, offset: int) -> NoReturn:
        raise DeviceError(
            errno.EIO, f"error: byte {offset} of the target", device="error", offset=offset
        )

    def preadv(self, buffers: Buffers, offset: int) -> None:
        self._fail(offset)

    def pwritev(self, buffers: Buffers, offset: int, *, fua: bool = False) -> None:
        self._fail(offset)

    def flush(self) -> None:
        """Succeed: the kernel sends no flush to this target."""

    def discard(self, offset: int, length: int) -> None:
        self._fail(offset)

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        self._fail(offset)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Say that there is data: whoever wants it has to try, and fail."""
        return super().extents(offset, length)
