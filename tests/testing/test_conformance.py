"""The suites notice targets and leaves that are broken, each in one way."""

import errno
import inspect
import itertools

import numpy as np
import pytest

from dmpy.device import DATA, BlockSize, Extent
from dmpy.errors import DeviceError
from dmpy.target import Leg, MapTarget, Target
from dmpy.testing import PatternDevice
from dmpy.testing.conformance import LeafTests, TargetTests, check_extents, guarded

SECTOR = 512
CHUNK = 8 * SECTOR


class Good(MapTarget):
    """Two legs in turn, eight sectors each; all that follow break it."""

    type_name = "good"
    version = (1, 0, 0)

    def __init__(self, length, legs):
        super().__init__(length, legs)

    @classmethod
    def parse(cls, args, length):
        return cls(length, [args.leg(length // 2) for _ in range(2)])

    def table(self):
        return " ".join(leg.table() for leg in self.legs)

    def map(self, op, offset, length):
        runs = []
        while length:
            chunk, within = divmod(offset, CHUNK)
            piece = min(length, CHUNK - within)
            runs.append((chunk % 2, chunk // 2 * CHUNK + within, piece))
            offset += piece
            length -= piece
        return runs


class WrongAtTheLastSector(Good):
    def map(self, op, offset, length):
        runs = super().map(op, offset, length)
        if offset + length == self.size:
            leg, place, piece = runs[-1]
            runs[-1] = (leg, place - SECTOR, piece)
        return runs


class ForgetsTheTail(Good):
    def pwritev(self, buffers, offset, *, fua=False):
        buffers = list(buffers)
        if sum(map(len, buffers)) > 2 * CHUNK:
            buffers[-1] = buffers[-1][:-1]
        super().pwritev([buffer for buffer in buffers if len(buffer)], offset, fua=fua)


class WritesBehindItsEnd(Good):
    def pwritev(self, buffers, offset, *, fua=False):
        super().pwritev(buffers, offset, fua=fua)
        leg = self.legs[0]
        if offset == 0:
            leg.device.pwritev([memoryview(b"!")], leg.start + leg.length)


class KeepsAView(Good):
    def preadv(self, buffers, offset):
        super().preadv(buffers, offset)
        self.kept = buffers[0][:]


class KeepsAnArray(Good):
    def pwritev(self, buffers, offset, *, fua=False):
        super().pwritev(buffers, offset, fua=fua)
        self.kept = np.frombuffer(buffers[-1], np.uint8)


class FlushesTheFirstLegOnly(Good):
    def flush(self):
        self.legs[0].flush()


class StopsFlushingAtAnError(Good):
    def flush(self):
        for leg in self.legs:
            leg.flush()


class ForgetsFua(Good):
    def pwritev(self, buffers, offset, *, fua=False):
        super().pwritev(buffers, offset)


class SwallowsReadErrors(Good):
    def preadv(self, buffers, offset):
        try:
            super().preadv(buffers, offset)
        except OSError:
            pass


class SaysEIOForAll(Good):
    def pwritev(self, buffers, offset, *, fua=False):
        try:
            super().pwritev(buffers, offset, fua=fua)
        except OSError:
            raise DeviceError(errno.EIO, "broken") from None


class NeedsAllLegs(Good):
    def preadv(self, buffers, offset):
        for leg in self.legs:
            leg.preadv([memoryview(bytearray(SECTOR))], 0)
        super().preadv(buffers, offset)


class DiscardsTooMuch(Good):
    def discard(self, offset, length):
        super().discard(offset, min(length + SECTOR, self.size - offset))


class ZeroesTooLittle(Good):
    def write_zeroes(self, offset, length, *, may_unmap=True, fast_only=False):
        if length > SECTOR:
            length -= 1
        super().write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)


class FastWhenItIsNot(Good):
    def write_zeroes(self, offset, length, *, may_unmap=True, fast_only=False):
        for begin in range(offset, offset + length, CHUNK):
            piece = min(CHUNK, offset + length - begin)
            self.pwritev([memoryview(bytes(piece))], begin)


class ExtentsAllData(Good):
    def extents(self, offset, length):
        yield Extent(offset, length, DATA)


class ExtentsWithAGap(Good):
    def extents(self, offset, length):
        yield from itertools.islice(super().extents(offset, length), 1, None)


class TableLosesTheStart(Good):
    def table(self):
        return " ".join(f"{leg.device.table_name} 0" for leg in self.legs)


class StatusOnTwoLines(Good):
    def status(self):
        return "a\nb"


class TakesAnyMessage(Good):
    def message(self, *words):
        return "fine"


class TakesSmallBlocks(Good):
    def __init__(self, length, legs):
        super().__init__(length, legs)
        self.block_size = BlockSize()


class NotThreadSafe(Good):
    def preadv(self, buffers, offset):
        self.scratch = bytearray(sum(map(len, buffers)))
        super().preadv([memoryview(self.scratch)], offset)
        for buffer in buffers:
            buffer[:] = self.scratch[: len(buffer)].ljust(len(buffer), b"?")
            del self.scratch[: len(buffer)]


class SuiteOfGood(TargetTests):
    __test__ = False
    leg_sizes = (60 * SECTOR, 70 * SECTOR)
    kind: type[Target] = Good

    def build(self, devices):
        legs = [
            Leg(devices[0], 5 * SECTOR, 48 * SECTOR),
            Leg(devices[1], 7 * SECTOR, 48 * SECTOR),
        ]
        return self.kind(96 * SECTOR, legs)

    def oracle(self, sector):
        chunk, within = divmod(sector, 8)
        return chunk % 2, (5, 7)[chunk % 2] + chunk // 2 * 8 + within


def failures(kind):
    """The names of the tests of the suite that a target fails."""
    failed = set()
    for name, test in inspect.getmembers(SuiteOfGood, inspect.isfunction):
        if not name.startswith("test_"):
            continue
        choices = [dict()]
        for mark in getattr(test, "pytestmark", []):
            if mark.name == "parametrize":
                choices = [c | {mark.args[0]: v} for c in choices for v in mark.args[1]]
        for how in choices:
            suite = SuiteOfGood()
            suite.kind = kind
            try:
                suite.setup_method()
                test(suite, **how)
            except pytest.skip.Exception:
                continue
            except (Exception, pytest.fail.Exception):
                failed.add(name)
    return failed


def test_a_good_target_passes():
    assert failures(Good) == set()


@pytest.mark.parametrize(
    "kind, test",
    [
        (WrongAtTheLastSector, "test_the_whole_device_reads_as_the_oracle_says"),
        (WrongAtTheLastSector, "test_runs_fill_the_request_as_the_oracle_says"),
        (ForgetsTheTail, "test_a_write_of_the_whole_device_goes_where_the_oracle_says"),
        (WritesBehindItsEnd, "test_a_write_of_the_whole_device_goes_where_the_oracle_says"),
        (KeepsAView, "test_the_whole_device_reads_as_the_oracle_says"),
        (KeepsAnArray, "test_a_write_of_the_whole_device_goes_where_the_oracle_says"),
        (FlushesTheFirstLegOnly, "test_a_flush_reaches_every_leg"),
        (FlushesTheFirstLegOnly, "test_what_was_made_durable_survives_a_power_cut"),
        (StopsFlushingAtAnError, "test_a_flush_that_fails_on_one_leg_fails"),
        (ForgetsFua, "test_what_was_made_durable_survives_a_power_cut"),
        (SwallowsReadErrors, "test_an_error_of_a_leg_surfaces_with_its_errno"),
        (SaysEIOForAll, "test_an_error_of_a_leg_surfaces_with_its_errno"),
        (NeedsAllLegs, "test_a_dead_leg_takes_its_own_sectors_only"),
        (DiscardsTooMuch, "test_a_discard_touches_the_sectors_of_its_range_only"),
        (ZeroesTooLittle, "test_zeroes_go_where_the_oracle_says_and_nowhere_else"),
        (FastWhenItIsNot, "test_zeroes_that_cannot_be_fast_on_a_leg_are_refused"),
        (ExtentsAllData, "test_extents_fill_the_range_and_tell_what_the_legs_tell"),
        (ExtentsWithAGap, "test_extents_fill_the_range_and_tell_what_the_legs_tell"),
        (TableLosesTheStart, "test_its_table_parses_to_an_equal_target"),
        (StatusOnTwoLines, "test_table_and_status_are_words_on_one_line"),
        (TakesAnyMessage, "test_an_unknown_message_is_refused"),
        (TakesSmallBlocks, "test_it_takes_no_smaller_blocks_than_its_legs"),
        (NotThreadSafe, "test_threads_do_not_disturb_each_other"),
    ],
)
def test_a_broken_target_fails(kind, test):
    assert any(name.startswith(test) for name in failures(kind)), failures(kind)


def test_a_view_that_is_kept_is_noticed():
    kept = []
    with pytest.raises(AssertionError, match="a view outlives the call"):
        with guarded([16]) as buffers:
            kept.append(buffers[0][4:])
            del buffers


def test_buffers_that_are_let_go_are_fine():
    with guarded([16, 8], np.arange(24, dtype=np.uint8)) as buffers:
        assert bytes(buffers[1]) == bytes(range(16, 24))
        del buffers


@pytest.mark.parametrize(
    "extents",
    [
        [],
        [Extent(0, 100, DATA)],
        [Extent(0, 513, DATA)],
        [Extent(1, 511, DATA)],
        [Extent(0, 256, DATA), Extent(255, 257, DATA)],
        [Extent(0, 256, DATA), Extent(256, 0, DATA), Extent(256, 256, DATA)],
        [Extent(0, 512, 1)],
    ],
)
def test_extents_that_do_not_fill_the_range_are_noticed(extents):
    with pytest.raises(AssertionError):
        check_extents(extents, 0, 512)


class TestAPatternDeviceIsALeaf(LeafTests):
    """The leaf suite on the simplest leaf there is."""

    fast_zeroes = True
    keeps_content = False

    def build(self, folder):
        return PatternDevice(self.size, zeroed=True)


class TestALeafWithBlocks(LeafTests):
    keeps_content = False

    def build(self, folder):
        return PatternDevice(self.size, zeroed=True, block_size=BlockSize(512, 4096, 1 << 20))
