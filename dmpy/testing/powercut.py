"""A disk whose power can be cut: it keeps what was not flushed apart from what was.

A write is on the platter when a flush that began after it has returned, or when it carried FUA.
Until then a cut may keep it, drop it, or tear it: any subset of its 512-byte sectors may be there
(a sector itself is whole, old or new). Nothing orders unflushed writes among each other.

    power = Power()
    data, metadata = power.device(1 << 20, "data"), power.device(1 << 20, "metadata")
    work(data, metadata)                  # remember what was flushed when, by power.position
    for crash in power.every_crash(seed=1):
        reopened = crash.devices          # the same two, as after power-on
        check(reopened, crash.position)

One `Power` may feed several devices: they lose it at the same moment.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dmpy.device import BlockDevice, BlockSize, Buffers, total
from dmpy.units import SECTOR_SIZE, ceil_div, round_down, round_up

__all__ = ["Crash", "Power", "PowerCutDevice"]


# One thing that happened. `kind` is write (data to the cache), durable (FUA) or flush; `sector`
# counts from the start of the device; `data` is uint8[sectors, SECTOR_SIZE], or None for a flush.
class _Event(NamedTuple):
    device: int
    kind: str
    sector: int
    data: np.ndarray | None


class Crash:
    """What the disks may hold after one cut.

    Attributes:
        position: the cut came after this many events of `Power`.
        flushed: for each device the position after its last flush before the cut, 0 for none:
            whatever was written before that position is there for certain.
        images: for each device its bytes, uint8[size], fresh arrays.
        story: what became of the unflushed writes, for messages.
    """

    def __init__(
        self, power: Power, position: int, flushed: list[int], images: list[np.ndarray], story: str
    ) -> None:
        self._power = power
        self.position = position
        self.flushed = flushed
        self.images = images
        self.story = story

    def __repr__(self) -> str:
        return f"<Crash after {self.position} events, {self.story}>"

    @property
    def devices(self) -> list[PowerCutDevice]:
        """Fresh devices on a `Power` of their own, holding the images; in order of creation."""
        power = Power()
        return [
            power.device(len(image), old.name, image=image, block_size=old.block_size)
            for image, old in zip(self.images, self._power.devices)
        ]


class Power:
    """The plug: a record of everything that reached its devices, in one order.

    Attributes:
        devices: in order of creation.
    """

    def __init__(self) -> None:
        self.devices: list[PowerCutDevice] = []
        self._events: list[_Event] = []
        self._initial: list[np.ndarray] = []
        # Protects the record and the content of every device. Nothing is called while it is held.
        self._lock = threading.Lock()

    def device(
        self,
        size: int,
        name: str = "disk",
        *,
        image: np.ndarray | bytes | None = None,
        block_size: BlockSize = BlockSize(),
    ) -> PowerCutDevice:
        """Add a device.

        Args:
            size: bytes, a multiple of SECTOR_SIZE.
            name: what it is called.
            image: what is on the platter at the start (copied); default zeroes.
            block_size: as of any device.
        """
        assert size % SECTOR_SIZE == 0, f"{name}: {size} bytes is not a whole number of sectors"
        content = np.zeros(size, np.uint8)
        if image is not None:
            content[:] = np.frombuffer(image, np.uint8)
        with self._lock:
            device = PowerCutDevice(self, len(self.devices), name, content, block_size)
            self.devices.append(device)
            self._initial.append(content.copy())
        return device

    @property
    def position(self) -> int:
        """The number of events so far; a later cut at this position sees exactly those."""
        return len(self._events)

    @property
    def boundaries(self) -> list[int]:
        """The positions right after each flush or FUA write, ascending."""
        return [n for n, event in enumerate(self._events, 1) if event.kind != "write"]

    def crashes(
        self, position: int | None = None, *, seed: int = 0, limit: int = 64
    ) -> Iterator[Crash]:
        """Cut the power at one position, in as many ways as there are, or as `limit` allows.

        All ways, sector by sector, when there are at most `limit`. Otherwise: nothing kept,
        everything kept, each write alone dropped, each alone kept, each torn, then random subsets.

        Args:
            position: a position of the past; default now.
            seed: of the random choice.
            limit: the largest number of crashes.
        """
        position = self.position if position is None else position
        platters, flushed, pending = self._replay(position)
        rng = random.Random(f"{seed} {position}")
        for masks, story in itertools.islice(_choices(pending, rng, limit), limit):
            images = [platter.copy() for platter in platters]
            for event, mask in zip(pending, masks):
                sectors = images[event.device].reshape(-1, SECTOR_SIZE)
                sectors[event.sector : event.sector + len(event.data)][mask] = event.data[mask]
            yield Crash(self, position, flushed, images, story)

    def every_crash(self, *, seed: int = 0, limit: int = 16) -> Iterator[Crash]:
        """Cut right before each flush or FUA write, right after it, and now.

        Args:
            seed: of the random choice.
            limit: crashes at each cut.
        """
        cuts = {0, self.position}
        for boundary in self.boundaries:
            cuts |= {boundary - 1, boundary}
        for position in sorted(cuts):
            yield from self.crashes(position, seed=seed, limit=limit)

    # Appends to the record; the caller holds the lock.
    def _record(self, event: _Event) -> None:
        self._events.append(event)

    # Returns what is on the platters for certain at a position, the position of each device's last
    # flush, and the events that are still in the air: copies cut to the sectors that count.
    def _replay(self, position: int) -> tuple[list[np.ndarray], list[int], list[_Event]]:
        platters = [image.copy() for image in self._initial]
        flushed = [0] * len(platters)
        pending: list[_Event] = []
        for number, event in enumerate(self._events[:position], 1):
            if event.kind == "write":
                pending.append(event)
                continue
            sectors = platters[event.device].reshape(-1, SECTOR_SIZE)
            if event.kind == "durable":
                _put(sectors, event)
                pending = [p for old in pending for p in _without(old, event)]
                continue
            for old in pending:
                if old.device == event.device:
                    _put(sectors, old)
            pending = [old for old in pending if old.device != event.device]
            flushed[event.device] = number
        return platters, flushed, pending


class PowerCutDevice(BlockDevice):
    """A disk in memory with a volatile write cache, fed by a `Power`.

    `PowerCutDevice.alone(size)` makes one with a `Power` of its own.

    Attributes:
        power: what it hangs on.
        calls: counts by name: read, write, fua, flush, discard, zero.
    """

    def __init__(
        self, power: Power, index: int, name: str, content: np.ndarray, block_size: BlockSize
    ) -> None:
        self.power = power
        self.name = name
        self.size = len(content)
        self.block_size = block_size
        self.calls: Counter[str] = Counter()
        self._index = index
        self._content = content

    @classmethod
    def alone(cls, size: int, name: str = "disk", **how: object) -> PowerCutDevice:
        """Make a device with a `Power` of its own; arguments as `Power.device`."""
        return Power().device(size, name, **how)

    def crash_images(self, *, seed: int = 0, limit: int = 64) -> Iterator[np.ndarray]:
        """Yield what this device may hold if the power went now: uint8[size] each."""
        for crash in self.power.crashes(seed=seed, limit=limit):
            yield crash.images[self._index]

    def preadv(self, buffers: Buffers, offset: int) -> None:
        """Read what was written last, durable or not."""
        self._check("read", offset, total(buffers))
        with self.power._lock:
            for buffer in buffers:
                np.frombuffer(buffer, np.uint8)[:] = self._content[offset : offset + len(buffer)]
                offset += len(buffer)

    def pwritev(self, buffers: Buffers, offset: int, *, fua: bool = False) -> None:
        """Write to the cache, or to the platter with `fua`."""
        self._check("write", offset, total(buffers))
        self.calls["fua"] += fua
        with self.power._lock:
            begin = offset
            for buffer in buffers:
                self._content[offset : offset + len(buffer)] = np.frombuffer(buffer, np.uint8)
                offset += len(buffer)
            self._note(begin, offset - begin, fua)

    def flush(self) -> None:
        """Move the cache to the platter."""
        self.calls["flush"] += 1
        with self.power._lock:
            self.power._record(_Event(self._index, "flush", 0, None))

    def discard(self, offset: int, length: int) -> None:
        """Make the range zeroes, in the cache."""
        self._zero("discard", offset, length)

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        """Make the range zeroes, in the cache; always fast."""
        self._zero("zero", offset, length)

    def content(self) -> np.ndarray:
        """Return uint8[size], a copy of what reads would give now."""
        with self.power._lock:
            return self._content.copy()

    def _zero(self, name: str, offset: int, length: int) -> None:
        self._check(name, offset, length)
        with self.power._lock:
            self._content[offset : offset + length] = 0
            self._note(offset, length, False)

    # Records the whole sectors round a range that has changed; the caller holds the lock.
    def _note(self, offset: int, length: int, fua: bool) -> None:
        if not length:
            return
        begin = round_down(offset, SECTOR_SIZE)
        end = round_up(offset + length, SECTOR_SIZE)
        data = self._content[begin:end].copy().reshape(-1, SECTOR_SIZE)
        kind = "durable" if fua else "write"
        self.power._record(_Event(self._index, kind, begin // SECTOR_SIZE, data))

    # A request that is not inside the device is a bug of the caller.
    def _check(self, name: str, offset: int, length: int) -> None:
        assert 0 <= offset <= offset + length <= self.size, (
            f"{self.name}: {name} of {length} bytes at {offset} leaves the {self.size} bytes"
        )
        self.calls[name] += 1


# Writes an event's sectors.
def _put(sectors: np.ndarray, event: _Event) -> None:
    sectors[event.sector : event.sector + len(event.data)] = event.data


# What is left of an unflushed write once a later durable one covers part of it: the disk knows one
# content for a sector, so the older one can no longer come back.
def _without(old: _Event, durable: _Event) -> list[_Event]:
    begin, end = durable.sector, durable.sector + len(durable.data)
    old_end = old.sector + len(old.data)
    if old.device != durable.device or end <= old.sector or old_end <= begin:
        return [old]
    pieces = []
    if old.sector < begin:
        pieces.append(old._replace(data=old.data[: begin - old.sector]))
    if end < old_end:
        pieces.append(old._replace(sector=end, data=old.data[end - old.sector :]))
    return pieces


# Yields (masks, story): for each pending write which of its sectors reached the platter.
def _choices(
    pending: Sequence[_Event], rng: random.Random, limit: int
) -> Iterator[tuple[list[np.ndarray], str]]:
    lengths = [len(event.data) for event in pending]
    atoms = sum(lengths)

    def masks(bits: int) -> list[np.ndarray]:
        raw = np.frombuffer(bits.to_bytes(ceil_div(atoms, 8) or 1, "little"), np.uint8)
        flat = np.unpackbits(raw, bitorder="little", count=atoms).astype(bool)
        return np.split(flat, np.cumsum(lengths)[:-1])

    def whole(kept: Sequence[bool]) -> list[np.ndarray]:
        return [np.full(length, keep) for length, keep in zip(lengths, kept)]

    if not pending:
        yield [], "nothing unflushed"
        return
    if atoms < 24 and 1 << atoms <= limit:
        for bits in range(1 << atoms):
            yield masks(bits), f"sectors {bits:0{atoms}b} kept, the first rightmost"
        return
    count = len(pending)
    yield whole([False] * count), f"none of {count} unflushed writes kept"
    yield whole([True] * count), f"all {count} unflushed writes kept"
    if count < 24 and 1 << count <= limit // 2:
        for bits in range(1, (1 << count) - 1):
            kept = [bool(bits >> n & 1) for n in range(count)]
            yield whole(kept), f"writes {bits:0{count}b} kept, the first rightmost"
    else:
        for n in rng.sample(range(count), min(count, limit // 8)):
            yield whole([m != n for m in range(count)]), f"write {n} of {count} dropped"
            yield whole([m == n for m in range(count)]), f"only write {n} of {count} kept"
    while True:
        if rng.random() < 0.3:
            # One write torn in two, the others whole: the classic.
            chosen = whole([rng.random() < 0.5 for _ in pending])
            n = rng.randrange(count)
            chosen[n] = np.arange(lengths[n]) < rng.randint(0, lengths[n])
            if rng.random() < 0.5:
                chosen[n] = ~chosen[n]
            yield chosen, f"write {n} of {count} torn"
        else:
            bits = rng.getrandbits(atoms) | (rng.getrandbits(atoms) if rng.random() < 0.5 else 0)
            yield masks(bits), f"random sectors {bits:#x} kept"
