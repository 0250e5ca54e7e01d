"""Arrays of bits as they lie on disks: bit n is bit n % 8 of byte n // 8."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from dmpy.units import ceil_div

__all__ = ["Bits"]


class Bits:
    """Bits in a numpy array.

    Args:
        count: number of bits.
        data: uint8[ceil(count / 8)], kept, not copied; None for all clear.
    """

    def __init__(self, count: int, data: np.ndarray | None = None) -> None:
        size = ceil_div(count, 8)
        self.count = count
        self.data = np.zeros(size, np.uint8) if data is None else data
        assert self.data.dtype == np.uint8 and self.data.shape == (size,), self.data.shape
        self.mask()

    def mask(self) -> None:
        """Clear what lies behind the last bit in its byte."""
        if self.count % 8:
            self.data[-1] &= (1 << self.count % 8) - 1

    def fill(self, value: bool) -> None:
        """Set or clear all bits."""
        self.data[:] = 0xFF if value else 0
        self.mask()

    def set(self, numbers: Iterable[int]) -> set[int]:
        """Set bits; return the bytes of `data` that changed."""
        return self._change(numbers, 0xFF)

    def clear(self, numbers: Iterable[int]) -> set[int]:
        """Clear bits; return the bytes of `data` that changed."""
        return self._change(numbers, 0)

    def _change(self, numbers: Iterable[int], value: int) -> set[int]:
        changed = set()
        for number in numbers:
            assert 0 <= number < self.count, f"no bit {number} of {self.count}"
            at, bit = number >> 3, 1 << (number & 7)
            old = int(self.data[at])
            new = old & ~bit | value & bit
            if new != old:
                self.data[at] = new
                changed.add(at)
        return changed

    def set_range(self, begin: int, end: int) -> None:
        """Set the bits from `begin` to before `end`."""
        self._change_range(begin, end, 0xFF)

    def clear_range(self, begin: int, end: int) -> None:
        """Clear the bits from `begin` to before `end`."""
        self._change_range(begin, end, 0)

    def _change_range(self, begin: int, end: int, value: int) -> None:
        assert 0 <= begin <= end <= self.count, f"no bits {begin} to {end} of {self.count}"
        first, last = begin + 7 >> 3, end >> 3
        if first > last:  # within one byte
            self._change(range(begin, end), value)
            return
        self._change(range(begin, first * 8), value)
        self.data[first:last] = value
        self._change(range(last * 8, end), value)

    def __contains__(self, number: int) -> bool:
        return bool(self.data[number >> 3] >> (number & 7) & 1)

    def __len__(self) -> int:
        return self.count

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Bits):
            return NotImplemented
        return self.count == other.count and bool((self.data == other.data).all())

    __hash__ = None

    def regions(self) -> np.ndarray:
        """Return the numbers of the bits that are set, int64, ascending."""
        return np.flatnonzero(np.unpackbits(self.data, count=self.count, bitorder="little"))

    def total(self) -> int:
        """Return how many bits are set."""
        return int(np.unpackbits(self.data, count=self.count, bitorder="little").sum())

    def resized(self, count: int, *, value: bool = False) -> Bits:
        """Return a copy with another number of bits; new ones have `value`."""
        kept = min(count, self.count)
        result = Bits(count)
        whole = ceil_div(kept, 8)
        result.data[:whole] = self.data[:whole]
        result.mask()
        if value:
            result.set_range(kept, count)
        return result
