"""RAID 0: chunks dealt out to the members; the loss of one is the loss of its bytes."""

from __future__ import annotations

from collections.abc import Iterator

from dmpy.device import Buffers, Extent, total
from dmpy.raid.array import Array, Member
from dmpy.target import by_leg, flush_all

__all__ = ["StripedArray"]


class StripedArray(Array):
    """Where every byte is on one member and nowhere else."""

    # The runs (member, place, length) of a piece.
    def _runs(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        return [copies[0] for copies in self.geometry.copies(offset, length)]

    def preadv(self, buffers: Buffers, offset: int) -> None:
        """Read as Array.preadv() says."""
        for index, place, views in by_leg(self._runs(offset, total(buffers)), buffers):
            self.members[index].leg.preadv(views, place)

    def pwritev(self, buffers: Buffers, offset: int, *, fua: bool = False) -> None:
        """Write as Array.pwritev() says."""
        self.refuse_if_failed(offset)
        for index, place, views in by_leg(self._runs(offset, total(buffers)), buffers):
            self.members[index].leg.pwritev(views, place, fua=fua)

    def flush(self) -> None:
        """Flush every member, all of them, and raise the first error: none can be left out."""
        flush_all(member.leg for member in self.members if member.leg is not None)

    def discard(self, offset: int, length: int) -> None:
        """Discard on the members."""
        for index, place, size in self._runs(offset, length):
            self.members[index].leg.discard(place, size)

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        """Write zeroes on the members."""
        for index, place, size in self._runs(offset, length):
            leg = self.members[index].leg
            leg.write_zeroes(place, size, may_unmap=may_unmap, fast_only=fast_only)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Say what is where on the members."""
        for index, place, size in self._runs(offset, length):
            for extent in self.members[index].leg.extents(place, size):
                yield Extent(offset + extent.offset - place, extent.length, extent.kind)
            offset += size

    def read_place(self, offset: int, length: int) -> tuple[Member, int] | None:
        """Say where a piece can be read as it is."""
        chunk_size = self.geometry.chunk_size
        chunk, within = divmod(offset, chunk_size)
        if within + length > chunk_size:
            return None
        row, index = self.geometry.locate(chunk)
        return self.members[index], row * chunk_size + within

    def lock_numbers(self, begin: int, end: int) -> tuple[int, int]:
        """There is nothing to lock."""
        return 0, 0

    def sync_range(self, offset: int, length: int) -> tuple[int, int]:
        """Say which bytes of what is synced a piece lies in."""
        return 0, 0

    @property
    def sync_size(self) -> int:
        """Bytes of what is synced."""
        return 0

    def sync_windows(self, begin: int) -> Iterator[tuple[int, int]]:
        """Cut what is synced into windows."""
        return iter(())

    def sync_window(self, action: str, begin: int, end: int) -> int:
        """Make the members agree on a window."""
        return 0
