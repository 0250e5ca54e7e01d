"""Legs that do as they are told: fail, return errors in a range, crawl, rot, lose their power.

All legs of a scenario hang on one `Plug`. With a volatile cache each (`Power` of dmpy.testing)
what was not flushed is lost, kept or torn when the plug is pulled, by a seeded choice.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from dmpy.backing import MemoryLeaf
from dmpy.device import BlockDevice, Buffers, Extent, total
from dmpy.errors import DeviceError
from dmpy.testing import Fault, Power
from dmpy.testing.faulty import OPS

__all__ = ["LabLeg", "Plug"]

# From so many ways to lose power one is chosen; each takes a copy of all legs.
_CRASHES = 8


class LabLeg(BlockDevice):
    """A disk of the lab: passes calls on to its medium as long as nothing is wrong with it.

    Args:
        name: the word that tables have for it.
        medium: what holds the bytes.
        plug: the power that it shares with the other legs.

    Attributes:
        medium: may be exchanged while no request is under way.
        dead: every call fails with EIO, as of a disk that was pulled.
        delay: seconds that each call sleeps first.
        faults: further reasons to fail.
        calls: counts of the calls that arrived, by operation.
    """

    def __init__(self, name: str, medium: BlockDevice, plug: Plug) -> None:
        self.name = name
        self.medium = medium
        self.size = medium.size
        self.block_size = medium.block_size
        self.dead = False
        self.delay = 0.0
        self.faults: list[Fault] = []
        self.calls: Counter[str] = Counter()
        self._plug = plug

    @property
    def condition(self) -> str:
        """What is physically the matter: "dead", "errors", "slow", "off", or "" for nothing."""
        if self._plug.off:
            return "off"
        if self.dead:
            return "dead"
        if any(fault.at is not None for fault in self.faults):
            return "errors"
        return "slow" if self.delay else ""

    def fail(self) -> None:
        """Fail every call from now on; the medium keeps its bytes."""
        self.dead = True

    def heal(self) -> None:
        """Work again, with the bytes that were there."""
        self.dead = False
        self.delay = 0.0
        self.faults = []

    def errors(
        self, offset: int, length: int, ops: Iterable[str], count: int | None = None
    ) -> None:
        """Fail calls that touch a range.

        Args:
            offset, length: the range, in bytes.
            ops: which calls, out of `dmpy.testing.faulty.OPS`.
            count: 1 for once, None for ever.
        """
        fault = Fault(1, forever=count is None, ops=ops, ranges=[(offset, length)])
        self.faults = [*self.faults, fault]

    def corrupt(self, offset: int, length: int) -> None:
        """Flip every bit of a range on the medium; nobody is told."""
        data = np.empty(length, np.uint8)
        self.medium.preadv([memoryview(data)], offset)
        np.bitwise_xor(data, 0xFF, data)
        self.medium.pwritev([memoryview(data)], offset, fua=True)

    def blank(self) -> None:
        """Put a new, empty disk in the place of this one; it works."""
        self.heal()
        self.medium = self._plug.medium(self.name, self.size)

    def preadv(self, buffers: Buffers, offset: int) -> None:
        self._pass("read", offset, total(buffers), lambda: self.medium.preadv(buffers, offset))

    def pwritev(self, buffers: Buffers, offset: int, *, fua: bool = False) -> None:
        self._pass("write", offset, total(buffers),
                   lambda: self.medium.pwritev(buffers, offset, fua=fua))

    def flush(self) -> None:
        """Flush the medium."""
        self._pass("flush", 0, 0, self.medium.flush)

    def discard(self, offset: int, length: int) -> None:
        self._pass("discard", offset, length, lambda: self.medium.discard(offset, length))

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        self._pass("zero", offset, length, lambda: self.medium.write_zeroes(
            offset, length, may_unmap=may_unmap, fast_only=fast_only))

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        found: list[Extent] = []
        self._pass("extents", offset, length,
                   lambda: found.extend(self.medium.extents(offset, length)))
        return iter(found)

    def close(self) -> None:
        """Keep the medium: a disk outlives those who open it."""

    # What every call does: count, crawl, fail or pass. A call that the plug overtakes has failed,
    # for whoever sent it is without power too.
    def _pass(self, op: str, offset: int, length: int, call: Callable[[], None]) -> None:
        self.calls[op] += 1
        if self.delay:
            time.sleep(self.delay)
        self._live(op, offset)
        for fault in self.faults:
            if fault.strikes(op, offset, length):
                raise self._error(f"{op} error at byte {offset}", offset)
        call()
        self._live(op, offset)

    def _live(self, op: str, offset: int) -> None:
        if self._plug.off or self.dead:
            raise self._error("no power" if self._plug.off else "does not answer", offset)

    def _error(self, what: str, offset: int) -> DeviceError:
        return DeviceError(errno.EIO, f"{self.name}: {what}", device=self.name, offset=offset)


class Plug:
    """Where all legs get their power from.

    Args:
        volatile: the legs have caches that a cut empties; without, what was written stays.

    Attributes:
        off: True between `pull` and `push`.
        legs: by name; whoever makes the legs adds them.
    """

    def __init__(self, *, volatile: bool) -> None:
        self.volatile = volatile
        self.off = False
        self.legs: dict[str, LabLeg] = {}
        self._power = Power()
        self._position = 0
        self._indexes: dict[str, int] = {}
        # Protects the three above while a medium is added.
        self._lock = threading.Lock()

    def add(self, name: str, size: int) -> LabLeg:
        """Make a leg of `size` bytes, all zeroes."""
        leg = self.legs[name] = LabLeg(name, self.medium(name, size), self)
        return leg

    def medium(self, name: str, size: int) -> BlockDevice:
        """Make the medium of a leg, all zeroes, in the place of the one it has."""
        if not self.volatile:
            return MemoryLeaf(f"mem:{size}")
        with self._lock:
            self._indexes[name] = len(self._power.devices)
            return self._power.device(size, name)

    def pull(self) -> None:
        """Cut the power of all legs at one moment."""
        # First the flag: what is recorded after this position was never acknowledged.
        self.off = True
        self._position = self._power.position

    def push(self, seed: int, keep: str = "some") -> str:
        """Let the power come back.

        Args:
            seed: of the choice.
            keep: what stays of the writes that were not flushed: "all", "none", "torn" for any
                sectors of them, or "some" for anything between none and all.

        Returns:
            What became of them, in words.
        """
        story = "no leg has a volatile cache"
        if self.volatile:
            # In the order of crashes(): none of the writes, all, all but one, one alone, torn ones.
            wanted = {"none": 0, "all": 1, "torn": 4 + seed % (_CRASHES - 4)}.get(
                keep, 2 + seed % (_CRASHES - 2))
            ways = self._power.crashes(self._position, seed=seed, limit=_CRASHES)
            for number, crash in enumerate(ways):
                if number == wanted:
                    break
            story = crash.story
            if len(story) > 80:
                story = f"{story[:77]}..."
            media = crash.devices
            self._power = media[0].power
            for name, leg in self.legs.items():
                leg.medium = media[self._indexes[name]]
        self.off = False
        return story
