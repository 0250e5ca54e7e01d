"""The account of every sector: what a read may return now, and what after a cut of the power.

Content is told apart by a number: 0 is zeroes, every write has a number of its own. The first
words of a sector hold its place and the number, so that wrong bytes say where they come from; the
rest is noise of both, so that no two sectors cancel each other out in a parity.

Of each sector two sets are kept:

- `now`: what a read may return. One number as a rule, more after a write that was not
  acknowledged. A read pins the number that it returned: who has read a byte may rely on it.
- `floor`: what may be there after the power was cut: everything that was there since the last
  flush, or write with FUA, that was acknowledged.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import NamedTuple

import numpy as np

from dmpy.units import SECTOR_SIZE

__all__ = ["Damage", "Model", "content"]

_WORDS = SECTOR_SIZE // 8
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT = np.uint64(29)
# How many damages are kept one by one; all are counted.
_KEPT = 20


def content(sector: int, count: int, number: int) -> np.ndarray:
    """Make the bytes of a write.

    Args:
        sector: the first one.
        count: sectors.
        number: of the write, 0 for zeroes.

    Returns:
        uint8[count * SECTOR_SIZE], a fresh array.
    """
    if not number:
        return np.zeros(count * SECTOR_SIZE, np.uint8)
    words = np.arange(sector * _WORDS, (sector + count) * _WORDS, dtype=np.uint64)
    words += np.uint64(number) << np.uint64(40)
    words *= _STEP
    words ^= words >> _SHIFT
    words *= _MIX
    rows = words.reshape(count, _WORDS)
    rows[:, 0] = np.arange(sector, sector + count, dtype=np.uint64)
    rows[:, 1] = np.uint64(number)
    return words.view(np.uint8)


class Damage(NamedTuple):
    """A sector that holds what it must not.

    `kind` is "lost" (an older content that a later one had replaced for certain), "misplaced"
    (that of another sector) or "wrong" (no content of ours at all).
    """

    sector: int
    kind: str
    found: str
    allowed: str


class Model:
    """The account of a device.

    All methods may be called from any thread; two requests that are under way at once must not
    touch the same sector.

    Args:
        sectors: of the device; all zeroes.

    Attributes:
        damages: the first few.
        counts: how many damages there were, by kind.
        acknowledged: bytes of the writes that were acknowledged.
        verified: bytes that were read and compared.
    """

    def __init__(self, sectors: int) -> None:
        self.sectors = sectors
        self.damages: list[Damage] = []
        self.counts: Counter[str] = Counter()
        self.acknowledged = 0
        self.verified = 0
        self._number = 0
        # int64[sectors]: the one content that a read may return, where `_more` has no set.
        self._now = np.zeros(sectors, np.int64)
        self._more: dict[int, set[int]] = {}
        # Sectors that were written since the last flush: what may be there after a cut.
        self._floor: dict[int, set[int]] = {}
        # When a sector's content became certain: its last write was acknowledged, or a read has
        # pinned it; by a clock that counts those.
        self._ended: dict[int, int] = {}
        self._clock = 0
        # Protects everything above; nothing is called while it is held.
        self._lock = threading.Lock()

    def write_begins(self, sector: int, count: int, *, zero: bool = False) -> int:
        """Note a write before it is sent and return its number, 0 for zeroes."""
        with self._lock:
            number = 0
            if not zero:
                self._number += 1
                number = self._number
            for place in range(sector, sector + count):
                now = self._allowed(place)
                self._floor.setdefault(place, set(now)).add(number)
                self._more[place] = now | {number}
            return number

    def write_ends(self, sector: int, count: int, number: int, *, fua: bool = False) -> None:
        """Note that a write was acknowledged; one that was not needs no call."""
        with self._lock:
            self._clock += 1
            self._now[sector : sector + count] = number
            for place in range(sector, sector + count):
                del self._more[place]
                self._ended[place] = self._clock
                if fua:
                    del self._floor[place]
            self.acknowledged += count * SECTOR_SIZE

    def flush_begins(self) -> int:
        """Note that a flush is sent; returns what `flush_ends` needs."""
        with self._lock:
            return self._clock

    def flush_ends(self, began: int) -> None:
        """Note that a flush was acknowledged: what ended before it began is durable.

        A write that was not acknowledged and one that ended while the flush ran may still be
        there or not.
        """
        with self._lock:
            for place in self._floor.keys() - self._more.keys():
                if self._ended[place] <= began:
                    del self._floor[place]

    def power_cut(self) -> None:
        """Note that the power was cut; no request is under way any more."""
        with self._lock:
            for place, numbers in self._floor.items():
                self._more[place] = set(numbers)
            self._floor.clear()

    def check(self, sector: int, data: np.ndarray) -> int:
        """Compare what a read returned.

        Args:
            sector: the first one.
            data: uint8[whole sectors]; kept by nobody.

        Returns:
            How many sectors hold what they must not.
        """
        rows = data.reshape(-1, SECTOR_SIZE)
        count = len(rows)
        with self._lock:
            self.verified += len(data)
            now = self._now[sector : sector + count].copy()
            loose = {at: self._more[at] for at in range(sector, sector + count) if at in self._more}
            right = _compare(sector, now, rows)
            bad = 0
            for place in range(sector, sector + count):
                index = place - sector
                if place not in loose and right[index]:
                    continue
                allowed = loose.get(place, {int(now[index])})
                found, kind, words = _identify(place, rows[index])
                if kind == "ours" and found in allowed:
                    self._pin(place, found)
                    continue
                bad += 1
                self._damage(place, "lost" if kind == "ours" else kind, words, allowed)
            return bad

    # What a read of a sector may return, as a fresh set.
    def _allowed(self, place: int) -> set[int]:
        more = self._more.get(place)
        return {int(self._now[place])} if more is None else set(more)

    # A content that was read stays.
    def _pin(self, place: int, number: int) -> None:
        self._more.pop(place, None)
        self._now[place] = number
        self._clock += 1
        self._ended[place] = self._clock

    def _damage(self, place: int, kind: str, found: str, allowed: set[int]) -> None:
        self.counts[kind] += 1
        if len(self.damages) < _KEPT:
            words = " or ".join(_called(number) for number in sorted(allowed))
            self.damages.append(Damage(place, kind, found, words))


def _called(number: int) -> str:
    return f"write {number}" if number else "zeroes"


# bool[n]: which sectors hold the content of a number each.
def _compare(sector: int, numbers: np.ndarray, rows: np.ndarray) -> np.ndarray:
    right = np.empty(len(rows), bool)
    edges = np.flatnonzero(np.diff(numbers)) + 1
    begin = 0
    for end in [*edges.tolist(), len(rows)]:
        expected = content(sector + begin, end - begin, int(numbers[begin]))
        same = expected.reshape(-1, SECTOR_SIZE) == rows[begin:end]
        right[begin:end] = same.all(axis=1)
        begin = end
    return right


# What a sector holds: (number, "ours" | "misplaced" | "wrong", in words).
def _identify(place: int, row: np.ndarray) -> tuple[int, str, str]:
    if not row.any():
        return 0, "ours", _called(0)
    words = row.view("<u8")
    sector, number = int(words[0]), int(words[1])
    if sector < 1 << 39 and number < 1 << 23 and number:
        if np.array_equal(content(sector, 1, number), row):
            if sector == place:
                return number, "ours", _called(number)
            return number, "misplaced", f"{_called(number)} of sector {sector}"
    return 0, "wrong", f"bytes {row[:16].tobytes().hex(' ')}..."
