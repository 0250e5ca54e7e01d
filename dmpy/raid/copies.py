"""RAID 1 and RAID 10: every byte is on several members.

Source: Linux v6.1 drivers/md/raid1.c, read_balance(), fix_read_error(), sync_request_write();
raid10.c, the same.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence

import numpy as np

from dmpy import buffers as scratch
from dmpy.device import Buffers, slices, total
from dmpy.errors import DeviceError
from dmpy.raid.array import IN_SYNC, REBUILDING, Array, Member
from dmpy.target import by_leg

__all__ = ["CopiesArray"]

# What is synced at once, as RESYNC_BLOCK_SIZE times a few; bytes of the array.
_WINDOW = 1 << 20
# RESYNC_BLOCK_SIZE: a check counts all of such a block when the copies of it differ.
_CHECK_BLOCK = 64 << 10


class CopiesArray(Array):
    """Where a write goes to all copies and a read to one.

    The array is synced in its own order, and stripes for locking are windows of it.
    """

    def sync_range(self, offset: int, length: int) -> tuple[int, int]:
        """Say which bytes of what is synced a piece lies in."""
        return offset, offset + length

    @property
    def sync_size(self) -> int:
        """Bytes of what is synced."""
        return self.size

    def is_last(self, member: Member) -> bool:
        """Say whether a member has the only copy of something, and is kept although it fails."""
        others = {other.index for other in self.members if other.state == IN_SYNC}
        return not self.geometry.enough(others - {member.index})

    # Requests

    def preadv(self, buffers: Buffers, offset: int) -> None:
        """Read as Array.preadv() says."""
        self.requests += 1
        pieces = self.geometry.copies(offset, total(buffers))
        # Those that are looked at are those that are read, whoever takes their places meanwhile.
        members = tuple(self.members)
        runs = []
        for copies in pieces:
            chosen = self._choose(copies, offset, members)
            if chosen is None:
                self._lost(offset)
            runs.append(chosen)
        for index, place, views in by_leg(runs, buffers):
            try:
                members[index].leg.preadv(views, place)
            except OSError:
                # One by one, and from another copy where one fails.
                self._read_again(pieces, buffers, offset)
                return

    # The copy to read: one that is right, and not on a member that is mostly for writing.
    def _choose(
        self,
        copies: list[tuple[int, int, int]],
        offset: int,
        members: Sequence[Member],
        besides: frozenset[int] = frozenset(),
    ) -> tuple[int, int, int] | None:
        # Readers of different places are sent to different members, so that these share the work.
        turn = (offset >> 20) % len(copies)
        # Fast path: the one whose turn it is will do.
        run = copies[turn]
        member = members[run[0]]
        if member.state == IN_SYNC and not member.write_mostly and run[0] not in besides:
            return run
        second = None
        for run in copies[turn:] + copies[:turn]:
            member = members[run[0]]
            if run[0] in besides or not member.readable(run[1] + run[2]):
                continue
            if not member.write_mostly:
                return run
            second = second or run
        return second

    # Read piece by piece; a copy that cannot be read is written anew from one that can.
    def _read_again(
        self, pieces: list[list[tuple[int, int, int]]], buffers: Buffers, offset: int
    ) -> None:
        done = 0
        for copies in pieces:
            length = copies[0][2]
            views = slices(buffers, done, length)
            self._read_piece(copies, views, offset + done)
            done += length

    # Join a piece from the copies that can be read, and write it anew where it cannot.
    def _read_piece(
        self, copies: list[tuple[int, int, int]], views: list[memoryview], offset: int
    ) -> None:
        length = copies[0][2]
        first, last = self.lock_numbers(offset, offset + length)
        self.locks.take(first, last)
        try:
            with scratch.scratch(length) as good:
                self._read_good(copies, good, offset)
                done = 0
                for view in views:
                    view[:] = good[done : done + len(view)]
                    done += len(view)
        finally:
            self.locks.give_back(first, last)

    def _lost(self, offset: int) -> None:
        raise DeviceError(
            errno.EIO, f"{self.name}: no copy of byte {offset} can be read",
            device=self.name, offset=offset,
        )  # fmt: skip

    def pwritev(self, buffers: Buffers, offset: int, *, fua: bool = False) -> None:
        """Write as Array.pwritev() says."""
        self.refuse_if_failed(offset)
        length = total(buffers)
        self.requests += 1
        first, last = self.lock_numbers(offset, offset + length)
        self.locks.take(first, last)
        try:
            self.begin_write(offset, length)
            pieces = self.geometry.copies(offset, length)
            if len(pieces) == 1:
                for index, place, _ in pieces[0]:
                    if self.members[index].writable:
                        self.write_member(self.members[index], buffers, place, fua=fua)
            else:
                self._write_pieces(pieces, buffers, fua)
        finally:
            self.end_write(offset, length)
            self.locks.give_back(first, last)
        self.refuse_if_failed(offset)

    # Write several pieces, all copies of them.
    def _write_pieces(
        self, pieces: list[list[tuple[int, int, int]]], buffers: Buffers, fua: bool
    ) -> None:
        for copy in range(max(map(len, pieces))):
            for index, place, views in by_leg([run[copy] for run in pieces], buffers):
                if self.members[index].writable:
                    self.write_member(self.members[index], views, place, fua=fua)

    def lock_numbers(self, begin: int, end: int) -> tuple[int, int]:
        """Say which windows bytes of the array lie in."""
        return begin // _WINDOW, (end - 1) // _WINDOW

    def read_place(self, offset: int, length: int) -> tuple[Member, int] | None:
        """Say where a piece can be read as it is."""
        geometry = self.geometry
        if geometry.level.number == 1:
            # Fast path: all copies are at the same place, and the one whose turn it is will do.
            member = self.members[(offset >> 20) % geometry.members]
            if member.state == IN_SYNC and not member.write_mostly:
                return member, offset
        elif offset % geometry.chunk_size + length > geometry.chunk_size:
            return None
        members = tuple(self.members)
        run = self._choose(geometry.copies(offset, length)[0], offset, members)
        return (members[run[0]], run[1]) if run is not None else None

    # Sync

    def sync_windows(self, begin: int) -> Iterator[tuple[int, int]]:
        """Cut what is synced into windows."""
        while begin < self.size:
            end = min(begin - begin % _WINDOW + _WINDOW, self.size)
            yield begin, end
            begin = end

    def sync_window(self, action: str, begin: int, end: int) -> int:
        """Make the members agree on a window."""
        first, last = self.lock_numbers(begin, end)
        self.locks.take(first, last)
        try:
            with scratch.scratch(end - begin) as good, scratch.scratch(end - begin) as other:
                return self._sync(action, begin, good, other)
        finally:
            self.locks.give_back(first, last)

    # Bring every copy in line with the one that a read would get.
    def _sync(self, action: str, begin: int, good: memoryview, other: memoryview) -> int:
        mismatches = done = 0
        for copies in self.geometry.copies(begin, len(good)):
            length = copies[0][2]
            if action != "recover" or self._any_rebuilding(copies):
                piece = slice(done, done + length)
                source = self._read_good(copies, good[piece], begin + done)
                for run in copies:
                    if run is not source:
                        mismatches += self._sync_copy(action, run, good[piece], other[piece])
            done += length
        return mismatches

    def _any_rebuilding(self, copies: list[tuple[int, int, int]]) -> bool:
        return any(self.members[index].state == REBUILDING for index, _, _ in copies)

    # Read a copy that is right, of those that can be read; the caller has the window.
    def _read_good(
        self, copies: list[tuple[int, int, int]], view: memoryview, offset: int
    ) -> tuple[int, int, int]:
        bad: list[tuple[int, int, int]] = []
        members = tuple(self.members)
        while True:
            besides = frozenset(index for index, _, _ in bad)
            run = self._choose(copies, offset, members, besides)
            if run is None:
                self._lost(offset)
            try:
                members[run[0]].leg.preadv([view], run[1])
            except OSError:
                bad.append(run)
                continue
            for index, place, _ in bad:
                self.corrected(members[index], [view], place)
            return run

    # Compare or write one copy of a piece.
    def _sync_copy(
        self, action: str, run: tuple[int, int, int], good: memoryview, other: memoryview
    ) -> int:
        index, place, _ = run
        member = self.members[index]
        if not member.writable:
            return 0
        if member.state != REBUILDING:
            return 0 if action == "recover" else self._compare(action, member, good, other, place)
        if action == "recover":
            self.write_member(member, [good], place)
        return 0

    # Read a copy and compare it, block by block; unless this is a check, mend what differs.
    def _compare(
        self, action: str, member: Member, good: memoryview, other: memoryview, place: int
    ) -> int:
        try:
            member.leg.preadv([other], place)
        except OSError:
            self.corrected(member, [good], place)
            return 0
        if np.array_equal(np.frombuffer(good, np.uint8), np.frombuffer(other, np.uint8)):
            return 0
        mismatches = 0
        for begin in range(0, len(good), _CHECK_BLOCK):
            block = slice(begin, begin + _CHECK_BLOCK)
            if good[block] != other[block]:
                mismatches += len(good[block]) >> 9
                if action != "check":
                    self.write_member(member, [good[block]], place + begin)
        return mismatches
