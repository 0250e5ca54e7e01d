"""The one interface of everything that holds bytes: leaves, targets and mapped devices."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dmpy.errors import DeviceError

__all__ = [
    "DATA",
    "HOLE",
    "ZERO",
    "BlockDevice",
    "BlockSize",
    "Buffers",
    "Cutter",
    "Extent",
    "merge_extents",
    "slices",
    "total",
    "zero_chunks",
]

# Kinds of an extent. The bits are NBD's base:allocation flags (1 hole, 2 reads as zeroes), so that
# the NBD edge passes them on as they are.
DATA = 0
ZERO = 2
HOLE = 3

Buffers = Sequence[memoryview]

# Zeroes to write from, shared by all devices and never written to.
_ZEROES = memoryview(bytes(1 << 20))
# Above this no NBD request can be, and no device of ours needs less.
_LARGEST_REQUEST = 0xFFFFFFFF


class BlockSize(NamedTuple):
    """What sizes of request a device takes, in bytes.

    `minimum` is a power of two that divides every offset and length, `preferred` gives the best
    speed, `maximum` bounds one read or write.
    """

    minimum: int = 1
    preferred: int = 4096
    maximum: int = _LARGEST_REQUEST

    def joined(self, other: BlockSize) -> BlockSize:
        """Return what suits two devices at once."""
        return BlockSize(
            max(self.minimum, other.minimum),
            max(self.preferred, other.preferred),
            min(self.maximum, other.maximum),
        )


class Extent(NamedTuple):
    """A piece of a device, in bytes, and what is there: DATA, ZERO or HOLE."""

    offset: int
    length: int
    kind: int


class BlockDevice(ABC):
    """Bytes 0 .. size-1. Every call moves all its bytes or raises OSError with an errno.

    Offsets and lengths are bytes, multiples of `block_size.minimum`, and inside the device: who
    takes requests from outside checks them. Buffers are C-contiguous views of bytes and are not
    kept after the call. Calls may come from several threads at once.

    Attributes:
        name: what people call the device.
        size: bytes.
        block_size: sizes of request that the device takes.
        readonly: True when writes are refused with EROFS.
        fd: a file descriptor with the same bytes at the same offsets, or -1. Requests may be made
            on it instead, by preadv(2) and, inside the file's size, pwrite(2); what comes short or
            fails there is made again on the device, which says what is wrong.
    """

    name: str
    size: int
    fd: int = -1
    block_size: BlockSize = BlockSize()
    readonly: bool = False

    @property
    def table_name(self) -> str:
        """The word that names the device in a table: maj:min as the kernel prints, or a path."""
        return self.name

    @abstractmethod
    def preadv(self, buffers: Buffers, offset: int) -> None:
        """Fill the buffers, in order, from `offset`.

        Args:
            buffers: writable views of bytes, overwritten.
            offset: bytes from the start of the device.
        """

    @abstractmethod
    def pwritev(self, buffers: Buffers, offset: int, *, fua: bool = False) -> None:
        """Write the buffers, in order, at `offset`.

        Args:
            buffers: views of bytes.
            offset: bytes from the start of the device.
            fua: the bytes are durable when the call returns.
        """

    @abstractmethod
    def flush(self) -> None:
        """Make every write that completed before this call durable."""

    def discard(self, offset: int, length: int) -> None:
        """Give the range back; its content is undefined afterwards.

        Raises:
            OSError: EOPNOTSUPP where the device has no way to do so; nothing happened.
        """
        raise DeviceError(errno.EOPNOTSUPP, f"{self.name}: discard is not supported")

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        """Make the range read as zeroes.

        Args:
            offset: bytes from the start of the device.
            length: bytes, of any size.
            may_unmap: the range may become a hole.
            fast_only: fail rather than be as slow as a write.

        Raises:
            OSError: EOPNOTSUPP where `fast_only` cannot be had; nothing happened.
        """
        if fast_only:
            raise DeviceError(errno.EOPNOTSUPP, f"{self.name}: zeroes have to be written")
        for place, zeroes in zero_chunks(offset, length, self.block_size.maximum):
            self.pwritev([zeroes], place)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Say what is where, in pieces that follow each other and fill the range exactly."""
        yield Extent(offset, length, DATA)

    def read_spot(self, offset: int, length: int) -> tuple[int, int]:
        """Say where a piece is on the `fd` of a device below, for reads to be made there.

        Whoever asks is on the lane of a plan that leads here, until the request is done.

        Args:
            offset: bytes from the start of the device.
            length: bytes.

        Returns:
            A descriptor as `fd` has it and the place there in bytes, or -1 and 0 where there is
            none.
        """
        return -1, 0

    def write_spot(self, offset: int, length: int) -> tuple[int, int]:
        """Say the same for writes, where one is all that there is to do."""
        return -1, 0

    def close(self) -> None:
        """Give back what the device holds; nothing is flushed."""


def total(buffers: Buffers) -> int:
    """Count the bytes in a list of buffers."""
    return len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))


def slices(buffers: Buffers, begin: int, length: int) -> list[memoryview]:
    """Cut `length` bytes from `begin` on out of a list of buffers, as views.

    Args:
        buffers: views of bytes.
        begin: bytes from the start of the first buffer.
        length: bytes; all of them are in the list.
    """
    if len(buffers) == 1:
        return [buffers[0][begin : begin + length]]
    cutter = Cutter(buffers)
    cutter.take(begin)
    return cutter.take(length)


class Cutter:
    """Cuts a list of buffers into pieces, one behind the other, without copying.

    Args:
        buffers: views of bytes.
    """

    __slots__ = ("_buffers", "_index", "_within")

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._index = 0
        self._within = 0

    def take(self, length: int) -> list[memoryview]:
        """Return the next `length` bytes as views; so many are left."""
        pieces = []
        while length:
            piece = self._buffers[self._index][self._within : self._within + length]
            if piece:
                pieces.append(piece)
                length -= len(piece)
                self._within += len(piece)
            else:
                self._index += 1
                self._within = 0
        return pieces


def zero_chunks(offset: int, length: int, maximum: int) -> Iterator[tuple[int, memoryview]]:
    """Cut a range into pieces to be written from one shared, read-only stretch of zeroes.

    Args:
        offset: bytes, where the range begins.
        length: bytes of the range.
        maximum: bytes that one write may have.
    """
    step = min(len(_ZEROES), maximum)
    end = offset + length
    while offset < end:
        piece = min(step, end - offset)
        yield offset, _ZEROES[:piece]
        offset += piece


def merge_extents(extents: Iterator[Extent]) -> Iterator[Extent]:
    """Join neighbours of one kind; the extents follow each other without a gap."""
    offset = length = 0
    kind = None
    for extent in extents:
        if extent.kind == kind:
            length += extent.length
            continue
        if length:
            yield Extent(offset, length, kind)
        offset, length, kind = extent
    if length:
        yield Extent(offset, length, kind)
