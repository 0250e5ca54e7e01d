"""The suites that a test of a target or a leaf inherits.

A subclass says how to build one and what an independent oracle says; it inherits the rest:

    class TestStriped(TargetTests):
        leg_sizes = (64 << 10,) * 3

        def build(self, devices):
            return Striped(...)

        def oracle(self, sector):           # -> (leg, sector on that device), or None for zeroes
            ...

Needs pytest. All numbers are bytes unless their name says sectors.
"""

from __future__ import annotations

import errno
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from dmpy.device import DATA, HOLE, ZERO, BlockDevice, BlockSize, Buffers, Extent
from dmpy.target import Args, MapTarget, Op, Target
from dmpy.testing.faulty import Fault, FaultyDevice, every_fault
from dmpy.testing.pattern import PatternDevice, expect_equal, pattern
from dmpy.testing.powercut import Power

__all__ = [
    "ExtentsDevice",
    "LeafTests",
    "TargetTests",
    "check_extents",
    "guarded",
    "run_threads",
]

_SECTOR = 512
# How many boundaries of a mapping are tried with every alignment: the first, the last, the rest
# evenly between.
_BOUNDARIES = 12
# Salts of what is on the legs at first and of what is written: words of which no end is zero, so
# that a byte too few or too many shows.
_LEG_SALT = 0x5A01
_SALT = 0xC300


class ExtentsDevice(PatternDevice):
    """A device whose sectors are data, hole and zero by turns, three sectors each."""

    KINDS = (DATA, HOLE, DATA, ZERO)

    def kind(self, sector: int) -> int:
        """Say what a sector is."""
        return self.KINDS[sector // 3 % len(self.KINDS)]

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield pieces of at most three sectors, cut to the range."""
        with self._lock:
            self._note("extents", offset, length)
        end = offset + length
        while offset < end:
            step = min(end, (offset // (3 * _SECTOR) + 1) * 3 * _SECTOR)
            yield Extent(offset, step - offset, self.kind(offset // _SECTOR))
            offset = step


# Lets other threads run in the middle of each request, as a device that waits for a disk does.
class _YieldingDevice(PatternDevice):
    def preadv(self, buffers: Buffers, offset: int) -> None:
        super().preadv(buffers, offset)
        time.sleep(0)

    def pwritev(self, buffers: Buffers, offset: int, *, fua: bool = False) -> None:
        time.sleep(0)
        super().pwritev(buffers, offset, fua=fua)


def check_extents(extents: Sequence[Extent], offset: int, length: int) -> None:
    """Assert that extents follow each other, are not empty and fill a range exactly."""
    at = offset
    for extent in extents:
        assert extent.offset == at, f"extents: {extent} does not begin at byte {at}"
        assert extent.length > 0, f"extents: {extent} is empty"
        assert extent.kind in (DATA, ZERO, HOLE), f"extents: {extent} is of no known kind"
        at += extent.length
    assert at == offset + length, f"extents: end at byte {at} (expected {offset + length})"


class guarded:
    """Buffers that notice when a view of them is kept.

        with guarded([100, 412]) as buffers:
            device.preadv(buffers, 0)

    Args:
        lengths: bytes of each buffer.
        fill: uint8 of their total length, what is in them at first.

    Raises:
        AssertionError: at the end, a view of a buffer is still held.
    """

    def __init__(self, lengths: Sequence[int], fill: np.ndarray | None = None) -> None:
        self._arrays = [bytearray(length) for length in lengths]
        at = 0
        for array in self._arrays:
            if fill is not None:
                array[:] = memoryview(fill[at : at + len(array)])
            at += len(array)
        self._views = [memoryview(array) for array in self._arrays]

    def __enter__(self) -> list[memoryview]:
        return list(self._views)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            # The traceback holds frames, and they hold views.
            return
        for view, array in zip(self._views, self._arrays):
            try:
                view.release()
                array.append(0)
            except BufferError as still_held:
                raise AssertionError(f"a view outlives the call: {still_held}") from None


def run_threads(work: Callable[[int], None], count: int = 4, limit: float = 60.0) -> None:
    """Run work(0), work(1), ... in threads that take turns as often as they can.

    Args:
        work: called with the number of the thread.
        count: how many threads.
        limit: seconds after which a thread that is still at it hangs.

    Raises:
        AssertionError: a thread hangs; or whatever the first one that failed has raised.
    """
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(count)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(limit)
            assert not thread.is_alive(), "a thread hangs"
    finally:
        sys.setswitchinterval(interval)
    if failures:
        raise failures[0]


class TargetTests:
    """What every target must hold.

    Set in a subclass:
        leg_sizes: the devices that `build` gets; name leg0, leg1, ...
        error: errno of every read and write, for a target that refuses I/O.
        discards: False when the target has no discard (EOPNOTSUPP).
        status_text: what status() must be, or None to check its form only.

    There for a subclass's own tests: `self.devices` (fresh PatternDevices for every test) and
    `self.target`, built on them.
    """

    leg_sizes: Sequence[int] = ()
    error: int | None = None
    discards = True
    status_text: str | None = None

    def build(self, devices: list[BlockDevice]) -> Target:
        """Return the target on these devices; called several times in a test."""
        raise NotImplementedError

    def oracle(self, sector: int) -> tuple[int, int] | None:
        """Say where a sector of the target lives: (device, sector), or None for zeroes."""
        raise NotImplementedError

    def setup_method(self) -> None:
        """Build a target on fresh devices before every test."""
        self.devices = self.make_devices()
        self.target = self.build(self.devices)
        self.sectors = self.target.size // _SECTOR

    def make_devices(self, kind: type[PatternDevice] = PatternDevice, **how) -> list[PatternDevice]:
        """Return fresh devices for `build`, each with the pattern, salted by its number."""
        return [
            kind(size, f"leg{n}", salt=_LEG_SALT + n, **how)
            for n, size in enumerate(self.leg_sizes)
        ]

    # What the tests are made of.

    def place(self, sector: int) -> tuple[int, int] | None:
        """The oracle, kept: it may be slow."""
        cache = self.__dict__.setdefault("_places", {})
        if sector not in cache:
            cache[sector] = self.oracle(sector)
        return cache[sector]

    def expected(self, devices: Sequence[PatternDevice] | None = None) -> np.ndarray:
        """Put together what the target must read as, by the oracle: uint8[size]."""
        contents = [device.content() for device in devices or self.devices]
        data = np.zeros((self.sectors, _SECTOR), np.uint8)
        for sector in range(self.sectors):
            place = self.place(sector)
            if place is not None:
                leg, below = place
                data[sector] = contents[leg][below * _SECTOR : (below + 1) * _SECTOR]
        return data.reshape(-1)

    def scatter(self, data: np.ndarray, contents: list[np.ndarray]) -> list[np.ndarray]:
        """Put all of a target's data where the oracle says, on copies of the legs' contents."""
        after = [content.copy() for content in contents]
        for sector in range(self.sectors):
            place = self.place(sector)
            if place is not None:
                leg, below = place
                after[leg][below * _SECTOR : (below + 1) * _SECTOR] = data[
                    sector * _SECTOR : (sector + 1) * _SECTOR
                ]
        return after

    def drop_unmapped(self, data: np.ndarray) -> np.ndarray:
        """Zero the sectors of a target's data that the oracle maps to nothing."""
        kept = data.copy().reshape(-1, _SECTOR)
        kept[[self.place(sector) is None for sector in range(self.sectors)]] = 0
        return kept.reshape(-1)

    def check_legs(self, expected: list[np.ndarray], when: str) -> None:
        """Assert the content of every leg, to the last byte of its guard zones."""
        for device, content in zip(self.devices, expected):
            expect_equal(memoryview(device.content()), content, 0, f"{device.name} {when}")

    def read(self, offset: int, length: int, cuts: Sequence[int] = ()) -> np.ndarray:
        """Read through guarded buffers, cut at these places: uint8[length]."""
        edges = [0, *cuts, length]
        with guarded([b - a for a, b in zip(edges, edges[1:])]) as buffers:
            self.target.preadv(buffers, offset)
            data = np.concatenate([np.frombuffer(buffer, np.uint8).copy() for buffer in buffers])
            del buffers
        return data

    def write(
        self, data: np.ndarray, offset: int, cuts: Sequence[int] = (), *, fua: bool = False
    ) -> None:
        """Write through guarded buffers, cut at these places."""
        edges = [0, *cuts, len(data)]
        with guarded([b - a for a, b in zip(edges, edges[1:])], data) as buffers:
            self.target.pwritev(buffers, offset, fua=fua)
            del buffers

    def boundaries(self) -> list[int]:
        """Sectors where the mapping jumps, both ends included; at most a dozen of them."""
        jumps = [0]
        for sector in range(1, self.sectors):
            last, place = self.place(sector - 1), self.place(sector)
            follows = last and place and place == (last[0], last[1] + 1)
            if not follows and (last is not None or place is not None):
                jumps.append(sector)
        jumps.append(self.sectors)
        if len(jumps) > _BOUNDARIES:
            step = (len(jumps) - 1) / (_BOUNDARIES - 1)
            jumps = [jumps[round(n * step)] for n in range(_BOUNDARIES)]
        return jumps

    def requests(self) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) in every alignment around each boundary, inside the target."""
        units = [_SECTOR] if self.target.block_size.minimum > 1 else [_SECTOR, 1]
        for boundary in self.boundaries():
            for unit in units:
                near = [boundary * _SECTOR + n * unit for n in (-2, -1, 0, 1, 2)]
                for begin in near:
                    for end in [*near, boundary * _SECTOR + 5 * _SECTOR]:
                        if 0 <= begin < end <= self.target.size:
                            yield begin, end - begin

    def needs_io(self) -> None:
        """Skip a test that has no meaning for a target that refuses all I/O."""
        if self.error is not None:
            pytest.skip("the target refuses all I/O")

    # Identity.

    def test_it_has_the_name_and_version_of_a_kernel_target(self):
        assert len(self.target.type_name.split()) == 1
        assert len(self.target.version) == 3
        assert all(isinstance(number, int) for number in self.target.version)

    def test_its_size_is_whole_sectors(self):
        assert self.target.size > 0
        assert self.target.size % _SECTOR == 0

    def test_its_table_parses_to_an_equal_target(self):
        words = self.target.table().split()
        by_name = {device.table_name: device for device in self.devices}
        again = type(self.target).parse(
            Args(words, by_name.__getitem__, target=self.target.type_name), self.target.size
        )
        assert again == self.target
        assert again.table() == self.target.table()

    def test_table_and_status_are_words_on_one_line(self):
        for text in (self.target.table(), self.target.status()):
            assert text == " ".join(text.split())
            assert text.isprintable()
        if self.status_text is not None:
            assert self.target.status() == self.status_text

    def test_an_unknown_message_is_refused(self):
        with pytest.raises(OSError) as caught:
            self.target.message("no-such-message", "1")
        assert caught.value.errno == errno.EINVAL

    def test_its_legs_lie_inside_their_devices(self):
        for leg in self.target.legs:
            assert leg.device in self.devices
            assert 0 <= leg.start < leg.start + leg.length <= leg.device.size

    def test_it_takes_no_smaller_blocks_than_its_legs(self):
        devices = self.make_devices(block_size=BlockSize(512, 8192, 1 << 20))
        target = self.build(devices)
        if target.legs:
            assert target.block_size.minimum == 512
            assert target.block_size.maximum <= 1 << 20

    def test_it_can_be_suspended_and_resumed(self):
        self.target.resume()
        self.target.presuspend()
        self.target.postsuspend()
        self.target.resume()
        if self.error is None:
            self.read(0, _SECTOR)

    # Reads and writes.

    def test_the_whole_device_reads_as_the_oracle_says(self):
        self.needs_io()
        expect_equal(memoryview(self.read(0, self.target.size)), self.expected(), 0, "read")

    def test_a_write_of_the_whole_device_goes_where_the_oracle_says_and_nowhere_else(self):
        self.needs_io()
        data = pattern(0, self.target.size, _SALT)
        after = self.scatter(data, [device.content() for device in self.devices])
        self.write(data, 0)
        self.check_legs(after, "after a write of everything")
        expected = self.drop_unmapped(data)
        expect_equal(memoryview(self.read(0, self.target.size)), expected, 0, "read back")

    def test_reads_of_every_alignment_around_each_boundary(self):
        self.needs_io()
        expected = self.expected()
        for offset, length in self.requests():
            cuts = [length // 3, length // 3] if length > 3 else []
            found = self.read(offset, length, cuts)
            expect_equal(memoryview(found), expected[offset : offset + length], offset, "read")

    def test_writes_of_every_alignment_around_each_boundary(self):
        self.needs_io()
        before = self.expected()
        contents = [device.content() for device in self.devices]
        data = pattern(0, self.target.size, _SALT)
        for number, (offset, length) in enumerate(self.requests()):
            piece = data[offset : offset + length] ^ np.uint8(number & 0x7F)
            self.write(piece, offset, [length // 2])
            before[offset : offset + length] = piece
        self.check_legs(self.scatter(before, contents), "after writes around boundaries")

    def test_buffers_may_be_cut_anywhere(self):
        self.needs_io()
        rng = random.Random(1)
        expected = self.expected()
        size = self.target.size
        for count in (1, 2, 17, min(1500, size - 1)):
            cuts = sorted(rng.sample(range(1, size), count))
            if self.target.block_size.minimum > 1:
                cuts = sorted({cut // _SECTOR * _SECTOR for cut in cuts} - {0})
            expect_equal(memoryview(self.read(0, size, cuts)), expected, 0, f"{count} cuts")
            self.write(expected, 0, cuts)
        self.check_legs(
            self.scatter(expected, [device.content() for device in self.devices]), "after cuts"
        )

    def test_random_requests_do_as_a_model_does(self):
        self.needs_io()
        rng = random.Random(2)
        model = self.expected()
        contents = [device.content() for device in self.devices]
        unit = max(1, self.target.block_size.minimum)
        for step in range(150):
            offset = rng.randrange(self.target.size // unit) * unit
            longest = min(self.target.size - offset, rng.choice((unit, 4096, 1 << 20)))
            length = rng.randint(1, longest // unit or 1) * unit
            window = slice(offset, offset + length)
            op = rng.choice(("read", "read", "write", "write", "zero", "flush"))
            if op == "read":
                expect_equal(memoryview(self.read(offset, length)), model[window], offset, op)
            elif op == "write":
                model[window] = pattern(offset, length, _SALT + step)
                self.write(model[window], offset, fua=rng.random() < 0.2)
            elif op == "zero":
                model[window] = 0
                self.target.write_zeroes(offset, length, may_unmap=rng.random() < 0.5)
            else:
                self.target.flush()
            model = self.drop_unmapped(model)
        self.check_legs(self.scatter(model, contents), "after random requests")

    def test_it_refuses_io_with_its_errno(self):
        if self.error is None:
            pytest.skip("the target serves I/O")
        calls: list[Callable[[], object]] = [
            lambda: self.read(0, _SECTOR),
            lambda: self.read(0, self.target.size),
            lambda: self.write(np.zeros(_SECTOR, np.uint8), self.target.size - _SECTOR),
            lambda: self.target.write_zeroes(0, _SECTOR),
        ]
        for call in calls:
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == self.error

    # Runs.

    def test_runs_fill_the_request_as_the_oracle_says(self):
        if not isinstance(self.target, MapTarget):
            pytest.skip("the target moves its bytes itself")
        for op in Op:
            for offset, length in [(0, self.target.size), *self.requests()]:
                runs = self.target.map(op, offset, length)
                assert sum(run[2] for run in runs) == length
                self._check_runs(runs, offset)

    # Compares runs with the oracle, at the first byte of each and wherever it enters a sector.
    def _check_runs(self, runs: Sequence[tuple[int, int, int]], offset: int) -> None:
        for index, below, length in runs:
            leg = self.target.legs[index]
            assert length > 0
            assert 0 <= below <= below + length <= leg.length
            for byte in (0, *range(-offset % _SECTOR, length, _SECTOR)):
                place = self.place((offset + byte) // _SECTOR)
                assert place is not None
                device, sector = place
                assert leg.device is self.devices[device]
                assert leg.start + below + byte == sector * _SECTOR + (offset + byte) % _SECTOR
            offset += length

    # Flush, FUA and power cuts.

    def test_a_flush_reaches_every_leg(self):
        self.target.flush()
        used = {id(leg.device) for leg in self.target.legs}
        for device in self.devices:
            assert device.calls["flush"] == (id(device) in used)

    def test_a_flush_that_fails_on_one_leg_fails_and_still_reaches_the_others(self):
        used = {id(leg.device) for leg in self.target.legs}
        for bad in range(len(self.devices)):
            devices = [FaultyDevice(device) for device in self.make_devices()]
            devices[bad].fail(error=errno.ENOSPC, ops=["flush"])
            target = self.build(devices)
            reached = {id(leg.device) for leg in target.legs}
            assert len(reached) == len(used)
            if id(devices[bad]) not in reached:
                continue
            with pytest.raises(OSError) as caught:
                target.flush()
            assert caught.value.errno == errno.ENOSPC
            for device in devices:
                assert device.calls["flush"] == (id(device) in reached)

    @pytest.mark.parametrize("how", ["flush", "fua"])
    def test_what_was_made_durable_survives_a_power_cut(self, how):
        self.needs_io()
        power = Power()
        devices = [
            power.device(size, f"leg{n}") for n, size in enumerate(self.leg_sizes)
        ]
        self.target = self.build(devices)
        data = pattern(0, self.target.size, _SALT)
        self.write(data, 0, fua=how == "fua")
        if how == "flush":
            self.target.flush()
        durable = power.position
        self.write(data[: self.target.size // 2 // _SECTOR * _SECTOR] ^ np.uint8(1), 0)
        for crash in power.crashes(durable, limit=8):
            self.target = self.build(crash.devices)
            found = self.read(0, self.target.size)
            expect_equal(memoryview(found), self.drop_unmapped(data), 0, repr(crash))

    # Discard, zeroes, extents.

    def test_a_discard_touches_the_sectors_of_its_range_only(self):
        self.needs_io()
        if not self.discards:
            with pytest.raises(OSError) as caught:
                self.target.discard(0, _SECTOR)
            assert caught.value.errno == errno.EOPNOTSUPP
            return
        self._check_zeroing(lambda offset, length: self.target.discard(offset, length), "discard")

    @pytest.mark.parametrize("may_unmap", [True, False])
    @pytest.mark.parametrize("fast_only", [True, False])
    def test_zeroes_go_where_the_oracle_says_and_nowhere_else(self, may_unmap, fast_only):
        self.needs_io()

        def call(offset: int, length: int) -> None:
            try:
                self.target.write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)
            except OSError as error:
                # A target without legs may have no place to allocate.
                if error.errno != errno.EOPNOTSUPP or not fast_only or self.target.legs:
                    raise

        self._check_zeroing(call, "zeroes")

    # Zeroes ranges around the boundaries one way or the other, and checks the legs.
    def _check_zeroing(self, call: Callable[[int, int], None], what: str) -> None:
        expected = self.expected()
        contents = [device.content() for device in self.devices]
        for offset, length in list(self.requests())[::5]:
            call(offset, length)
            expected[offset : offset + length] = 0
        self.check_legs(self.scatter(expected, contents), f"after {what}")
        call(0, self.target.size)
        self.check_legs(self.scatter(expected * 0, contents), f"after {what} of everything")

    def test_zeroes_that_cannot_be_fast_on_a_leg_are_refused(self):
        self.needs_io()
        devices = [FaultyDevice(device) for device in self.make_devices()]
        for device in devices:
            device.fail(forever=True, error=errno.EOPNOTSUPP, ops=["zero"])
        target = self.build(devices)
        if not target.legs:
            pytest.skip("the target has no legs")
        with pytest.raises(OSError) as caught:
            target.write_zeroes(0, target.size, fast_only=True)
        assert caught.value.errno == errno.EOPNOTSUPP

    def test_extents_fill_the_range_and_tell_what_the_legs_tell(self):
        self.needs_io()
        devices = self.make_devices(ExtentsDevice)
        target = self.build(devices)
        for offset, length in [(0, target.size), *self.requests()]:
            extents = list(target.extents(offset, length))
            check_extents(extents, offset, length)
            for extent in extents:
                end = extent.offset + extent.length
                for sector in range(extent.offset // _SECTOR, -(-end // _SECTOR)):
                    place = self.place(sector)
                    if place is None:
                        assert extent.kind in (ZERO, HOLE)
                    else:
                        assert extent.kind == devices[place[0]].kind(place[1])

    # Errors.

    @pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
    def test_an_error_of_a_leg_surfaces_with_its_errno(self, error):
        self.needs_io()
        data = pattern(0, self.target.size, _SALT)
        for fault in every_fault(error=error, ops=["read", "write", "flush", "zero", "discard"]):
            target = self.build([FaultyDevice(device, fault) for device in self.make_devices()])
            work = [
                lambda: target.pwritev([memoryview(data)], 0),
                lambda: target.preadv([memoryview(bytearray(target.size))], 0),
                lambda: target.flush(),
                lambda: target.write_zeroes(0, target.size),
                lambda: target.discard(0, target.size) if self.discards else None,
            ]
            failed = 0
            for step in work:
                try:
                    step()
                except OSError as caught:
                    assert caught.errno == error
                    failed += 1
            assert bool(failed) == bool(fault.hits), "a leg failed and nobody was told"

    def test_a_dead_leg_takes_its_own_sectors_only(self):
        self.needs_io()
        expected = self.expected()
        for bad in range(len(self.devices)):
            devices: list[BlockDevice] = list(self.make_devices())
            devices[bad] = FaultyDevice(devices[bad], Fault(1, forever=True, ops=["read"]))
            self.target = self.build(devices)
            for sector in range(self.sectors):
                place = self.place(sector)
                offset = sector * _SECTOR
                if place is not None and place[0] == bad:
                    with pytest.raises(OSError) as caught:
                        self.read(offset, _SECTOR)
                    assert caught.value.errno == errno.EIO
                else:
                    found = self.read(offset, _SECTOR)
                    expect_equal(
                        memoryview(found), expected[offset : offset + _SECTOR], offset, "read"
                    )

    # Threads.

    def test_threads_do_not_disturb_each_other(self):
        self.needs_io()
        share = self.sectors // 4 * _SECTOR
        if not share:
            pytest.skip("the target is too small to share")
        self.devices = self.make_devices(_YieldingDevice)
        self.target = self.build(self.devices)
        model = self.expected()

        def work(number: int) -> None:
            rng = random.Random(number)
            mine = model[number * share : (number + 1) * share]
            for step in range(60):
                begin = rng.randrange(share // _SECTOR) * _SECTOR
                length = rng.randint(1, (share - begin) // _SECTOR) * _SECTOR
                offset = number * share + begin
                if rng.random() < 0.5:
                    mine[begin : begin + length] = pattern(offset, length, _SALT + step)
                    self.target.pwritev([memoryview(mine[begin : begin + length])], offset)
                    mine[:] = self.drop_unmapped(model)[number * share : (number + 1) * share]
                else:
                    data = bytearray(length)
                    self.target.preadv([memoryview(data)], offset)
                    window = mine[begin : begin + length]
                    expect_equal(memoryview(data), window, offset, f"thread {number}")
                if step % 20 == 0:
                    self.target.flush()

        run_threads(work)


class LeafTests:
    """What every leaf must hold.

    Set in a subclass:
        size: bytes of the leaf.
        initially: 0 when a fresh leaf reads as zeroes, else None.
        fast_zeroes: True or False when the leaf must, or must not, have them; None: either.
        keeps_content: a leaf that is opened again has what was flushed.
    """

    size = 1 << 20
    initially: int | None = 0
    fast_zeroes: bool | None = None
    keeps_content = True

    def build(self, folder: Path) -> BlockDevice:
        """Make a fresh leaf of `size` bytes, whatever it needs in the folder, and open it."""
        raise NotImplementedError

    def reopen(self, folder: Path) -> BlockDevice:
        """Open the leaf that `build` has made there once more."""
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _leaf(self, tmp_path):
        self.folder = tmp_path
        self.leaf = self.build(tmp_path)
        yield
        self.leaf.close()

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """Read through guarded buffers."""
        length = self.size - offset if length is None else length
        with guarded([length]) as buffers:
            self.leaf.preadv(buffers, offset)
            data = bytes(buffers[0])
            del buffers
        return data

    def fill(self) -> np.ndarray:
        """Write the pattern to all of it and return it."""
        data = pattern(0, self.size, _LEG_SALT).copy()
        self.leaf.pwritev([memoryview(data)], 0)
        return data

    def test_its_size_and_blocks_are_told(self):
        assert self.leaf.size == self.size
        unit, preferred, maximum = self.leaf.block_size
        assert unit & (unit - 1) == 0
        assert unit <= preferred <= maximum
        assert self.leaf.table_name.split() == [self.leaf.table_name]

    def test_a_fresh_leaf_reads_as_it_should(self):
        if self.initially is None:
            pytest.skip("a fresh leaf may hold anything")
        assert self.read() == bytes([self.initially]) * self.size

    def test_random_requests_do_as_a_model_does(self):
        rng = random.Random(3)
        model = self.fill()
        unit = self.leaf.block_size.minimum
        for step in range(200):
            offset = rng.randrange(self.size // unit) * unit
            longest = min(self.size - offset, rng.choice((unit, 512, 65536, self.size)))
            length = rng.randint(1, max(1, longest // unit)) * unit
            window = slice(offset, offset + length)
            op = rng.choice(("read", "write", "zero", "discard", "flush"))
            if op == "read":
                expect_equal(memoryview(self.read(offset, length)), model[window], offset, op)
            elif op == "write":
                model[window] = pattern(offset, length, _SALT + step)
                with guarded([length], model[window]) as buffers:
                    self.leaf.pwritev(buffers, offset, fua=rng.random() < 0.1)
                    del buffers
            elif op == "zero":
                model[window] = 0
                self.leaf.write_zeroes(offset, length, may_unmap=rng.random() < 0.5)
            elif op == "discard":
                self._discard(offset, length, model)
            else:
                self.leaf.flush()
        expect_equal(memoryview(self.read()), model, 0, "after all")

    # Discards, and takes over into the model whatever is there then.
    def _discard(self, offset: int, length: int, model: np.ndarray) -> None:
        try:
            self.leaf.discard(offset, length)
        except OSError as error:
            assert error.errno == errno.EOPNOTSUPP
        model[offset : offset + length] = np.frombuffer(self.read(offset, length), np.uint8)

    @pytest.mark.parametrize("count", [1, 2, 1023, 1024, 1025, 2500])
    def test_lists_of_many_buffers_move_whole(self, count):
        unit = max(8, self.leaf.block_size.minimum)
        count = min(count, self.size // unit)
        data = pattern(0, count * unit, _SALT)
        with guarded([unit] * count, data) as buffers:
            self.leaf.pwritev(buffers, 0)
            del buffers
        with guarded([unit] * count) as buffers:
            self.leaf.preadv(buffers, 0)
            found = b"".join(buffers)
            del buffers
        expect_equal(memoryview(found), data, 0, f"{count} buffers")

    def test_the_last_bytes_can_be_read_and_written(self):
        unit = self.leaf.block_size.minimum
        self.leaf.pwritev([memoryview(b"z" * unit)], self.size - unit)
        assert self.read(self.size - unit) == b"z" * unit

    @pytest.mark.parametrize("may_unmap", [True, False])
    def test_zeroes_read_as_zeroes_and_leave_the_rest(self, may_unmap):
        model = self.fill()
        unit = max(512, self.leaf.block_size.minimum)
        for offset, length in [(0, unit), (3 * unit, 40 * unit), (self.size - unit, unit)]:
            self.leaf.write_zeroes(offset, length, may_unmap=may_unmap)
            model[offset : offset + length] = 0
        expect_equal(memoryview(self.read()), model, 0, "after zeroes")

    @pytest.mark.parametrize("may_unmap", [True, False])
    def test_fast_zeroes_are_done_or_refused_whole(self, may_unmap):
        model = self.fill()
        length = 64 << 10
        try:
            self.leaf.write_zeroes(0, length, may_unmap=may_unmap, fast_only=True)
        except OSError as error:
            assert error.errno == errno.EOPNOTSUPP
            assert self.fast_zeroes is not True
        else:
            assert self.fast_zeroes is not False
            model[:length] = 0
        expect_equal(memoryview(self.read()), model, 0, "after fast zeroes")

    def test_a_discard_leaves_the_rest(self):
        model = self.fill()
        self._discard(64 << 10, 128 << 10, model)
        expect_equal(memoryview(self.read()), model, 0, "after discard")

    def test_extents_fill_the_range_and_holes_read_as_zeroes(self):
        if self.initially == 0:
            self._check_extents()
        model = self.fill()
        self.leaf.write_zeroes(128 << 10, 256 << 10)
        model[128 << 10 : 384 << 10] = 0
        self._check_extents()

    # Asks for ranges of many alignments and compares with the content.
    def _check_extents(self) -> None:
        content = np.frombuffer(self.read(), np.uint8)
        unit = self.leaf.block_size.minimum
        ranges = [(0, self.size), (0, unit), (self.size - unit, unit)]
        ranges += [((128 << 10) + n * unit, (64 << 10) + unit) for n in (-1, 0, 1)]
        for offset, length in ranges:
            extents = list(self.leaf.extents(offset, length))
            check_extents(extents, offset, length)
            for extent in extents:
                if extent.kind != DATA:
                    assert not content[extent.offset : extent.offset + extent.length].any()

    def test_what_was_flushed_is_there_when_it_is_opened_again(self):
        if not self.keeps_content:
            pytest.skip("the leaf forgets")
        model = self.fill()
        self.leaf.flush()
        self.leaf.close()
        self.leaf = self.reopen(self.folder)
        expect_equal(memoryview(self.read()), model, 0, "opened again")

    def test_threads_do_not_disturb_each_other(self):
        share = self.size // 4 // 4096 * 4096

        def work(number: int) -> None:
            for step in range(50):
                data = pattern(number * share, share, _SALT + number * 50 + step)
                self.leaf.pwritev([memoryview(data)], number * share)
                found = bytearray(share)
                self.leaf.preadv([memoryview(found)], number * share)
                expect_equal(memoryview(found), data, number * share, f"thread {number}")

        run_threads(work)
