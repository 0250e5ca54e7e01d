"""Pattern data: every 8-byte word holds its own offset, so that a misplaced byte says where it
came from.

A salt in the top 16 bits of each word tells several devices, or several writes, apart.
"""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np

from dmpy.device import BlockDevice, BlockSize, Buffers, total

__all__ = [
    "PatternDevice",
    "PatternMismatch",
    "check_pattern",
    "expect_equal",
    "fill_pattern",
    "pattern",
]

_SALT_SHIFT = 48
_OFFSET_MASK = (1 << _SALT_SHIFT) - 1
# Content is kept in pages of this many bytes, only where something was written.
_PAGE = 4096


class PatternMismatch(AssertionError):
    """Bytes that are not what they should be; names the first wrong one and what is there."""


def pattern(offset: int, length: int, salt: int = 0) -> np.ndarray:
    """Make pattern data.

    Args:
        offset: bytes from the start of the device, below 2**48.
        length: bytes.
        salt: 0 .. 65535, the top 16 bits of every word.

    Returns:
        uint8[length], a fresh array: little-endian words, each `salt << 48 | its offset`.
    """
    first = offset - offset % 8
    words = np.arange(first, offset + length, 8, dtype="<u8")
    if salt:
        words |= np.uint64(salt << _SALT_SHIFT)
    return words.view(np.uint8)[offset - first : offset - first + length]


def fill_pattern(view: memoryview, offset: int, salt: int = 0) -> None:
    """Overwrite a writable view with the pattern of `offset` (bytes)."""
    np.frombuffer(view, np.uint8)[:] = pattern(offset, len(view), salt)


def check_pattern(view: memoryview, offset: int, salt: int = 0, what: str = "data") -> None:
    """Assert that a view holds the pattern of `offset` (bytes).

    Raises:
        PatternMismatch: names the first wrong byte and which pattern word is there instead.
    """
    expect_equal(view, pattern(offset, len(view), salt), offset, what)


def expect_equal(view: memoryview, expected: np.ndarray, offset: int, what: str = "data") -> None:
    """Assert that a view holds exactly these bytes.

    Args:
        view: bytes found.
        expected: uint8 of the same length.
        offset: bytes from the start of the device, for the message only.
        what: the thing, for the message.

    Raises:
        PatternMismatch: they differ; says where first and how.
    """
    found = np.frombuffer(view, np.uint8)
    expected = np.frombuffer(expected, np.uint8)
    if len(found) != len(expected):
        raise PatternMismatch(f"{what}: {len(found)} bytes (expected {len(expected)})")
    wrong = np.flatnonzero(found != expected)
    if not len(wrong):
        return
    at = int(wrong[0])
    raise PatternMismatch(
        f"{what}: byte {offset + at} is wrong, the first of {len(wrong)} in"
        f" [{offset}, {offset + len(found)}): {_describe(found, at, offset)}"
        f" (expected {_describe(expected, at, offset)})"
    )


# Says in words what the 8-byte word round byte `at` of an array holds.
def _describe(array: np.ndarray, at: int, offset: int) -> str:
    start = max(at - (offset + at) % 8, 0)
    word = array[start : start + 8]
    if len(word) < 8:
        return f"bytes {word.tobytes().hex(' ')}"
    number = int(word.view("<u8")[0])
    if number == 0:
        return "zeroes"
    return f"pattern of byte {number & _OFFSET_MASK}, salt {number >> _SALT_SHIFT}"


class PatternDevice(BlockDevice):
    """A device of any size that reads as the pattern where nothing was written.

    Writes are kept, sparsely. With `check_writes` they must carry the pattern themselves and are
    not kept. A request that is not inside the device is a bug of the caller: AssertionError.

    Args:
        size: bytes.
        name: what it is called, in tables too.
        salt: of the pattern, 0 .. 65535.
        check_writes: every write must carry the pattern of its own place.
        zeroed: start as zeroes instead of the pattern.
        block_size: as of any device; requests that are not multiples of the minimum are refused
            with AssertionError.

    Attributes:
        calls: counts by name: read, write, fua, flush, discard, zero.
        log: tuples (name, offset, length) of every call in order, bytes.
        unflushed: True when a write has completed since the last flush began.
    """

    def __init__(
        self,
        size: int,
        name: str = "pattern",
        *,
        salt: int = 0,
        check_writes: bool = False,
        zeroed: bool = False,
        block_size: BlockSize = BlockSize(),
    ) -> None:
        self.name = name
        self.size = size
        self.block_size = block_size
        self.salt = salt
        self.check_writes = check_writes
        self.zeroed = zeroed
        self.calls: Counter[str] = Counter()
        self.log: list[tuple[str, int, int]] = []
        self.unflushed = False
        self._pages: dict[int, np.ndarray] = {}
        # Protects everything above; nothing is called while it is held.
        self._lock = threading.Lock()

    def preadv(self, buffers: Buffers, offset: int) -> None:
        """Fill the buffers with the pattern, or with what was written."""
        length = total(buffers)
        with self._lock:
            self._note("read", offset, length)
            for buffer in buffers:
                assert not buffer.readonly, f"{self.name}: read into a read-only view"
                self._read(np.frombuffer(buffer, np.uint8), offset)
                offset += len(buffer)

    def pwritev(self, buffers: Buffers, offset: int, *, fua: bool = False) -> None:
        """Keep the buffers, or check them with `check_writes`."""
        with self._lock:
            self._note("write", offset, total(buffers))
            self.calls["fua"] += fua
            self.unflushed = True
            for buffer in buffers:
                if self.check_writes:
                    check_pattern(buffer, offset, self.salt, f"{self.name}: write")
                else:
                    self._write(np.frombuffer(buffer, np.uint8), offset)
                offset += len(buffer)

    def flush(self) -> None:
        """Count."""
        with self._lock:
            self.calls["flush"] += 1
            self.log.append(("flush", 0, 0))
            self.unflushed = False

    def discard(self, offset: int, length: int) -> None:
        """Make the range zeroes: what a discarded range holds is for the device to say."""
        with self._lock:
            self._note("discard", offset, length)
            self._write(np.zeros(length, np.uint8), offset)

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        """Make the range zeroes; always fast."""
        with self._lock:
            self._note("zero", offset, length)
            self.unflushed = True
            self._write(np.zeros(length, np.uint8), offset)

    def content(self, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Return uint8[length] of what is there now, without counting a call."""
        array = np.empty(self.size - offset if length is None else length, np.uint8)
        with self._lock:
            self._read(array, offset)
        return array

    # Counts a call and asserts that it is inside the device.
    def _note(self, name: str, offset: int, length: int) -> None:
        assert 0 <= offset <= offset + length <= self.size, (
            f"{self.name}: {name} of {length} bytes at {offset} leaves the {self.size} bytes"
        )
        unit = self.block_size.minimum
        assert offset % unit == length % unit == 0, (
            f"{self.name}: {name} of {length} bytes at {offset} is not in blocks of {unit}"
        )
        assert name not in ("read", "write") or length <= self.block_size.maximum, (
            f"{self.name}: {name} of {length} bytes is above {self.block_size.maximum}"
        )
        self.calls[name] += 1
        self.log.append((name, offset, length))

    # The original bytes of a range.
    def _fresh(self, offset: int, length: int) -> np.ndarray:
        if self.zeroed:
            return np.zeros(length, np.uint8)
        return pattern(offset, length, self.salt)

    def _read(self, array: np.ndarray, offset: int) -> None:
        array[:] = self._fresh(offset, len(array))
        if not self._pages:
            return
        for number, within, at, piece in _pages(offset, len(array)):
            page = self._pages.get(number)
            if page is not None:
                array[at : at + piece] = page[within : within + piece]

    def _write(self, array: np.ndarray, offset: int) -> None:
        for number, within, at, piece in _pages(offset, len(array)):
            page = self._pages.get(number)
            if page is None:
                page = self._pages[number] = self._fresh(number * _PAGE, _PAGE)
            page[within : within + piece] = array[at : at + piece]


# Cuts a range into (page number, byte in the page, byte in the range, length).
def _pages(offset: int, length: int):
    at = 0
    while at < length:
        number, within = divmod(offset + at, _PAGE)
        piece = min(length - at, _PAGE - within)
        yield number, within, at, piece
        at += piece
