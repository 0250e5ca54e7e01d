"""Requests as clients send them, made fit for a device.

NBD's block sizes are advice, and clients differ in whether they take it. So what arrives may begin
in the middle of a block, be larger than the device allows, or lie beyond the end of a device that
has shrunk since the client asked for its size. Here is where that is put right, once for all
devices; the devices themselves see whole blocks inside their size.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from itertools import islice
from threading import Condition, Lock

from dmpy import buffers
from dmpy.device import BlockDevice, BlockSize, Extent, merge_extents
from dmpy.errors import DeviceError
from dmpy.units import round_down, round_up

__all__ = ["BIG_READ", "Edge", "Edges", "RangeLock", "advertised"]

BIG_READ = 128 << 10
"""Bytes from which on a read asks whether it is better done through scratch."""

# What NBD allows in a block size, and nbdkit in one read or write, in bytes.
_MINIMUM_LIMIT = 64 << 10
_PREFERRED_RANGE = 512, 32 << 20
_REQUEST_LIMIT = 64 << 20

# One answer to a block status request has at most so many extents, and the device is asked about
# so many bytes at a time: a client asks again from where it ends, and no answer takes long.
_EXTENTS_IN_REPLY = 8192
_EXTENTS_WINDOW = 64 << 20


def advertised(block_size: BlockSize) -> BlockSize:
    """Return block sizes that NBD can carry and that suit the device.

    NBD wants a minimum that is a power of two of at most 64 KiB, a preferred size that is one of
    512 bytes to 32 MiB, and a maximum that is a multiple of the minimum. Where a device cannot be
    described like this, what does not fit is put right by Edge.
    """
    # The largest power of two that divides the device's minimum.
    minimum = min(block_size.minimum & -block_size.minimum, _MINIMUM_LIMIT)
    low, high = _PREFERRED_RANGE
    preferred = 1 << (max(block_size.preferred, 1).bit_length() - 1)
    preferred = max(min(max(preferred, low), high), minimum)
    maximum = round_down(min(block_size.maximum, _REQUEST_LIMIT), minimum)
    return BlockSize(minimum, preferred, max(maximum, preferred))


class RangeLock:
    """Keeps those who write part of a block apart from all who write to that block.

    Writers of whole blocks share, as the device sorts them out; a writer of part of a block reads
    it, changes it and writes it back, and must be alone on it. Who comes waits for those who came
    before, so nobody waits for ever.
    """

    __slots__ = ("_changed", "_entries")

    def __init__(self) -> None:
        # Protects _entries, held for a moment only; nothing is taken under it.
        self._changed = Condition(Lock())
        # [begin, end, alone] in the order in which they came, those who wait among them.
        self._entries: list[tuple[int, int, bool]] = []

    def enter(self, begin: int, end: int, *, alone: bool) -> object:
        """Wait for the range and hold it; returns what to hand to leave().

        Args:
            begin: bytes, a multiple of the block.
            end: bytes, a multiple of the block.
            alone: exclude everybody else from the range, not only those who want it alone.
        """
        entry = (begin, end, alone)
        with self._changed:
            self._entries.append(entry)
            while self._is_blocked(entry):
                self._changed.wait()
        return entry

    def leave(self, entry: object) -> None:
        """Give the range back."""
        with self._changed:
            for place, other in enumerate(self._entries):
                if other is entry:
                    del self._entries[place]
                    break
            self._changed.notify_all()

    # Whether somebody who came before is in the way.
    def _is_blocked(self, entry: tuple[int, int, bool]) -> bool:
        begin, end, alone = entry
        for other in self._entries:
            if other is entry:
                return False
            if (alone or other[2]) and other[0] < end and begin < other[1]:
                return True
        raise AssertionError("the entry is not in the list")


class Edge:
    """What stands between clients and a device; one for all clients of the device.

    Every method takes any offset and length in bytes and raises OSError as devices do.

    Args:
        device: where requests go.
    """

    __slots__ = ("_maximum", "_ranges", "_unit", "device")

    def __init__(self, device: BlockDevice) -> None:
        self.device = device
        self._ranges = RangeLock()
        self.refresh()

    def refresh(self) -> None:
        """Take the device's block sizes anew: it has another table."""
        self._unit, _, maximum = self.device.block_size
        self._maximum = max(round_down(maximum, self._unit), self._unit)

    @property
    def odd_offset(self) -> int:
        """A mask: an offset that has one of these bits needs read() and write()."""
        unit = self._unit
        return unit - 1 if unit & (unit - 1) == 0 else -1

    @property
    def odd_read(self) -> int:
        """A mask: a length that has one of these bits needs read()."""
        # nbdkit's buffers begin at multiples of 16 bytes, so a trap of 16 is none for them.
        big = -BIG_READ if buffers.slow_copy_width() > 16 else 0
        return self.odd_offset | self._odd_size | big

    @property
    def odd_write(self) -> int:
        """A mask: a length that has one of these bits needs write().

        Where blocks are larger than a byte every write has to look at the range lock.
        """
        return -1 if self._unit > 1 else self._odd_size

    @property
    def largest(self) -> int:
        """Bytes of the largest request that needs neither read() nor write(), or 0 for none."""
        if self.odd_offset:
            return 0
        odd = self.odd_read | self.odd_write
        return (odd & -odd) - 1 if odd else _REQUEST_LIMIT

    # The bits of lengths above the maximum; none where no request can be so large.
    @property
    def _odd_size(self) -> int:
        if self._maximum >= _REQUEST_LIMIT:
            return 0
        return -(1 << (self._maximum.bit_length() - 1))

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer from `offset`."""
        length = len(buffer)
        self._check(offset, length, "read", errno.EINVAL)
        if length <= self._maximum and not (offset | length) % self._unit:
            self._read_blocks(buffer, offset)
            return
        for place, size, whole in self._pieces(offset, length):
            target = buffer[place - offset : place - offset + size]
            if whole:
                self._read_blocks(target, place)
            else:
                self._read_part(target, place)

    def write(self, buffer: memoryview, offset: int, fua: bool) -> None:
        """Write the buffer at `offset`."""
        length = len(buffer)
        self._check(offset, length, "write", errno.ENOSPC)
        if self._unit == 1 and length <= self._maximum:
            self.device.pwritev([buffer], offset, fua=fua)
            return
        begin, end, alone = self._blocks(offset, length)
        held = self._ranges.enter(begin, end, alone=alone)
        try:
            for place, size, whole in self._pieces(offset, length):
                source = buffer[place - offset : place - offset + size]
                if whole:
                    self.device.pwritev([source], place, fua=fua)
                else:
                    self._write_part(source, place, fua)
        finally:
            self._ranges.leave(held)

    def zero(
        self, offset: int, length: int, *, may_unmap: bool, fast_only: bool, fua: bool
    ) -> None:
        """Make the range read as zeroes.

        Raises:
            OSError: EOPNOTSUPP where `fast_only` cannot be had; nothing happened.
        """
        self._check(offset, length, "zero", errno.ENOSPC)
        device = self.device
        begin, end, alone = self._blocks(offset, length)
        if not alone and self._unit == 1:
            device.write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)
        else:
            held = self._ranges.enter(begin, end, alone=alone)
            try:
                self._zero_blocks(offset, length, may_unmap, fast_only)
            finally:
                self._ranges.leave(held)
        if fua:
            device.flush()

    def trim(self, offset: int, length: int, *, fua: bool) -> None:
        """Give the whole blocks of the range back, where the device can."""
        self._check(offset, length, "trim", errno.ENOSPC)
        begin = round_up(offset, self._unit)
        end = round_down(offset + length, self._unit)
        if begin < end:
            held = self._ranges.enter(begin, end, alone=False) if self._unit > 1 else None
            try:
                self.device.discard(begin, end - begin)
            except OSError as error:
                # A trim is a hint: a device that cannot is no reason to fail.
                if error.errno != errno.EOPNOTSUPP:
                    raise
            finally:
                if held is not None:
                    self._ranges.leave(held)
        if fua:
            self.device.flush()

    def extents(self, offset: int, length: int, only_one: bool) -> list[tuple[int, int, int]]:
        """Say what is where, as (offset, length, kind): at least one, from `offset` on.

        The extents lie inside the range, as nbdkit demands, but may end before its end.
        """
        self._check(offset, length, "block status", errno.EINVAL)
        begin, end, _ = self._blocks(offset, length)
        answer = []
        for place, size, kind in islice(
            merge_extents(self._windows(begin, end)), 1 if only_one else _EXTENTS_IN_REPLY
        ):
            first = max(place, offset)
            last = min(place + size, offset + length)
            if first < last:
                answer.append((first, last - first, kind))
        return answer

    # The extents of a range of whole blocks, asked for only as far as they are looked at.
    def _windows(self, begin: int, end: int) -> Iterator[Extent]:
        step = max(round_down(_EXTENTS_WINDOW, self._unit), self._unit)
        for place in range(begin, end, step):
            yield from self.device.extents(place, min(step, end - place))

    # Refuse what lies beyond the end of a device that has shrunk since the client asked.
    def _check(self, offset: int, length: int, what: str, number: int) -> None:
        device = self.device
        if offset + length > device.size:
            raise DeviceError(
                number,
                f"{device.name}: {what} of {length} bytes at byte {offset} passes the end "
                f"(size {device.size})",
                device=device.name,
                offset=offset,
            )

    # The whole blocks that a range touches, inside the device, and whether it leaves some partly
    # untouched.
    def _blocks(self, offset: int, length: int) -> tuple[int, int, bool]:
        begin = round_down(offset, self._unit)
        end = min(round_up(offset + length, self._unit), self.device.size)
        return begin, end, begin != offset or end != offset + length

    # Cut a range into (offset, length, whole blocks) of at most the device's maximum: part of a
    # block, whole blocks, part of a block.
    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        unit = self._unit
        end = offset + length
        while offset < end:
            block_end = min(round_down(offset, unit) + unit, self.device.size)
            last = round_down(end, unit) if end < self.device.size else end
            if offset % unit or last <= offset:
                piece, whole = min(block_end, end) - offset, False
            else:
                piece, whole = min(last - offset, self._maximum), True
            yield offset, piece, whole
            offset += piece

    def _read_blocks(self, target: memoryview, offset: int) -> None:
        if buffers.needs_scratch(target, offset):
            buffers.read_through_scratch(self.device.preadv, target, offset)
        else:
            self.device.preadv([target], offset)

    # Read less than a block.
    def _read_part(self, target: memoryview, offset: int) -> None:
        begin, end, _ = self._blocks(offset, len(target))
        with buffers.scratch(end - begin) as block:
            self.device.preadv([block], begin)
            target[:] = block[offset - begin : offset - begin + len(target)]

    # Write less than a block; the caller is alone on it.
    def _write_part(self, source: memoryview, offset: int, fua: bool) -> None:
        begin, end, _ = self._blocks(offset, len(source))
        with buffers.scratch(end - begin) as block:
            self.device.preadv([block], begin)
            block[offset - begin : offset - begin + len(source)] = source
            self.device.pwritev([block], begin, fua=fua)

    # Zero whole blocks by the device and parts of blocks by writing; the caller holds the range.
    def _zero_blocks(self, offset: int, length: int, may_unmap: bool, fast_only: bool) -> None:
        unit, size = self._unit, self.device.size
        begin = min(round_up(offset, unit), size)
        end = offset + length
        end = end if end == size else round_down(end, unit)
        if begin < end:
            # First, so that nothing has happened yet when it turns out not to be fast.
            self.device.write_zeroes(begin, end - begin, may_unmap=may_unmap, fast_only=fast_only)
        elif fast_only:
            raise DeviceError(
                errno.EOPNOTSUPP, f"{self.device.name}: part of a block has to be written"
            )
        zeroes = memoryview(bytes(unit))
        for place, piece, whole in self._pieces(offset, length):
            if not whole:
                self._write_part(zeroes[:piece], place, False)


class Edges:
    """The edges of the devices that are in use: one for each device, whoever uses it.

    All methods may be called from any thread.
    """

    def __init__(self) -> None:
        # Protects _users, held for a moment only; nothing is taken under it.
        self._lock = Lock()
        # By id of the device: its edge and how many use it.
        self._users: dict[int, tuple[Edge, int]] = {}

    def take(self, device: BlockDevice) -> Edge:
        """Return the edge of a device and count its user."""
        with self._lock:
            edge, users = self._users.get(id(device)) or (Edge(device), 0)
            self._users[id(device)] = (edge, users + 1)
            return edge

    def give_back(self, edge: Edge) -> None:
        """Undo one take()."""
        with self._lock:
            key = id(edge.device)
            _, users = self._users.pop(key)
            if users > 1:
                self._users[key] = (edge, users - 1)

    def refresh(self, device: BlockDevice) -> None:
        """Take the block sizes of a device anew, if it is in use."""
        with self._lock:
            edge, _ = self._users.get(id(device), (None, 0))
        if edge is not None:
            edge.refresh()
