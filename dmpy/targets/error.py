"""error: every request fails with EIO.

Table: begin len error

Source: Linux v6.1 drivers/md/dm-target.c, io_err_ctr(), io_err_map().
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import NoReturn

from dmpy.device import Buffers, Extent
from dmpy.errors import DeviceError
from dmpy.target import Args, Target

__all__ = ["Error"]


class Error(Target):
    """A range that is broken.

    Args:
        length: bytes.
    """

    type_name = "error"
    version = (1, 5, 0)

    @classmethod
    def parse(cls, args: Args, length: int) -> Error:
        """Take any arguments and forget them, as the kernel does."""
        args.rest()
        return cls(length)

    def table(self) -> str:
        """Return nothing."""
        return ""

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
