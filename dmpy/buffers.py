"""Aligned scratch memory, and the one decision when a big read goes through it.

Some AMD processors copy five to seven times slower when the destination lies 1 to 15 (Zen 4) or
1 to 31 (Zen 3) bytes above the source modulo 4096: `rep movsb`, which the kernel uses to hand out
the page cache, falls to about 3 (1.4) GB/s. The buffers of big NBD requests come from malloc and
begin 16 bytes into a page, so on Zen 3 every one of them meets it. There a read into scratch at
page + 64 and one more copy is four times faster than the direct read; everywhere else it is a
third slower. So the processor is asked once, by a measurement of less than a millisecond, at the
first big read.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager

__all__ = ["needs_scratch", "read_through_scratch", "scratch", "slow_copy_width"]

_PAGE_SIZE = 4096
# Scratch begins this far into a page: outside the trap for every offset that is whole sectors.
_SHIFT = 64
# Below this the second copy and its Python cost more than the slow first one.
_MINIMUM_LENGTH = 32 << 10
# Longer reads pass through scratch in pieces of this size, which bounds the memory at no cost.
_PIECE = 1 << 20
# Scratch is kept for the next caller in classes of powers of two up to the largest, this many each.
_SMALLEST_CLASS = 64 << 10
_LARGEST_CLASS = 4 << 20
_KEPT = 8

# Free scratch by class. Deques, because append and pop are atomic; nothing thread-local, because
# the threads of an NBD server may lose that between two calls.
_free: dict[int, deque[memoryview]] = {}

# Destinations of 1 .. width - 1 bytes above the source copy slowly; None: not measured yet.
_width: int | None = None


# One loan of scratch memory; what `scratch` returns.
class _Loan:
    __slots__ = ("_class", "_length", "_whole")

    def __init__(self, length: int) -> None:
        self._length = length
        self._class = max(_SMALLEST_CLASS, 1 << (length - 1).bit_length())

    def __enter__(self) -> memoryview:
        try:
            self._whole = _free[self._class].pop()
        except (KeyError, IndexError):
            # An anonymous mmap: page-aligned, and no page of it exists before it is touched.
            self._whole = memoryview(mmap.mmap(-1, _SHIFT + self._class))[_SHIFT:]
        return self._whole[: self._length]

    def __exit__(self, *exception: object) -> None:
        if self._class <= _LARGEST_CLASS:
            free = _free.setdefault(self._class, deque(maxlen=_KEPT))
            free.append(self._whole)


def scratch(length: int) -> AbstractContextManager[memoryview]:
    """Lend a writable view of `length` bytes that begins 64 bytes into a page.

    The content is whatever the last user left, and the view must not be used after the `with`
    block. Any thread may call this.

    Args:
        length: bytes, at least 1.
    """
    return _Loan(length)


def slow_copy_width() -> int:
    """Return how many bytes above its source, modulo a page, a destination copies slowly.

    Returns:
        0 where there is no such trap, else the first distance that is fast again: 16 or 32. The
        answer is measured once in the life of the process.
    """
    global _width
    if _width is None:
        _width = _measured_width()
    return _width


def needs_scratch(view: memoryview, offset: int) -> bool:
    """Tell whether reading into `view` directly would be slower than by way of scratch.

    Args:
        view: writable view of bytes, the destination.
        offset: bytes from the start of the device that is read.
    """
    if len(view) < _MINIMUM_LENGTH:
        return False
    width = slow_copy_width()
    return width != 0 and 0 < (_address(view) - offset) % _PAGE_SIZE < width


def read_through_scratch(
    read: Callable[[list[memoryview], int], None], view: memoryview, offset: int
) -> None:
    """Fill `view` by way of scratch.

    Args:
        read: a device's `preadv`.
        view: writable view of bytes, overwritten; on an error the first part may be.
        offset: bytes from the start of the device.

    Raises:
        OSError: whatever `read` raised.
    """
    length = len(view)
    with scratch(min(length, _PIECE)) as space:
        for begin in range(0, length, _PIECE):
            piece = space[: min(_PIECE, length - begin)]
            read([piece], offset + begin)
            view[begin : begin + len(piece)] = piece


# The address of a writable view. ctypes is twice as fast as numpy here (140 ns).
def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


# Read 64 KiB of page cache to three places in turn, several times; noise can only add time, so
# the minimum of each place counts. Where the trap exists the ratio is 5 or more.
def _measured_width() -> int:
    length = 64 << 10
    file = os.memfd_create("dmpy-copy-speed", os.MFD_CLOEXEC)
    try:
        with mmap.mmap(-1, length + _PAGE_SIZE) as memory:
            # Written, not only sized: a hole would be cleared, not copied, into the buffer.
            os.pwrite(file, b"\xa5" * length, 0)
            best = {0: 1 << 62, 8: 1 << 62, 24: 1 << 62}
            for _ in range(9):
                for shift in best:
                    best[shift] = min(best[shift], _read_time(file, memory, shift, length))
    finally:
        os.close(file)
    fast = best[0]
    if best[24] > 2.5 * fast:
        return 32
    return 16 if best[8] > 2.5 * fast else 0


# Nanoseconds for one read to `shift` bytes into the memory.
def _read_time(file: int, memory: mmap.mmap, shift: int, length: int) -> int:
    with memoryview(memory) as whole, whole[shift : shift + length] as view:
        begin = time.perf_counter_ns()
        os.preadv(file, [view], 0)
        return time.perf_counter_ns() - begin
