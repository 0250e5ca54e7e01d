"""Random stacks of tables: flattened = stacked = an oracle that maps one sector at a time."""

import errno
import random

import numpy as np
import pytest

from dmpy.device import DATA
from dmpy.mapper import Mapper
from dmpy.testing import FaultyDevice, PatternDevice, every_fault
from dmpy.testing.conformance import check_extents
from dmpy.testing.leaves import GivenLeaves
from dmpy.testing.pattern import expect_equal, pattern
from dmpy.testing.stacks import RandomStack

SEEDS = range(80)
NIGHTLY_SEEDS = range(1000, 6000)
SECTOR = 512
CHANGING = ["read", "write", "flush", "zero"]


def stacked_read(device):
    """Read a device through the targets of its table, not through its plan."""
    data = bytearray(device.size)
    for line in device.live.lines:
        view = memoryview(data)[line.begin * SECTOR : (line.begin + line.len) * SECTOR]
        line.target.preadv([view], 0)
    return data


def check(stack, mapper):
    """All that must hold of a stack; the seed is in every message."""
    rng = random.Random(repr(stack))
    where = repr(stack)
    top = stack.create(mapper)
    leaves = stack.leaf_pattern()
    expected = stack.expected(leaves)
    assert top.size == len(expected), where

    flattened = bytearray(top.size)
    top.preadv([memoryview(flattened)], 0)
    expect_equal(memoryview(flattened), expected, 0, f"{where}: flattened")
    expect_equal(memoryview(stacked_read(top)), expected, 0, f"{where}: stacked")
    extents = list(top.extents(0, top.size))
    check_extents(extents, 0, top.size)
    for extent in extents:
        if extent.kind != DATA:
            assert not expected[extent.offset : extent.offset + extent.length].any(), where
    if stack.alias:
        return

    model = expected.copy()
    holes = np.repeat([stack.locate(s) is None for s in range(stack.sectors)], SECTOR)
    for step in range(60):
        offset = rng.randrange(top.size)
        length = min(rng.choice((1, 511, 512, 4096, 100_000)), top.size - offset)
        window = slice(offset, offset + length)
        op = rng.choice(("read", "write", "write", "zero", "flush"))
        if op == "read":
            half = rng.randint(0, length)
            data = bytearray(length)
            views = [memoryview(data)[:half], memoryview(data)[half:]]
            top.preadv([view for view in views if len(view)], offset)
            expect_equal(memoryview(data), model[window], offset, f"{where}: step {step}")
        elif op == "write":
            model[window] = pattern(offset, length, 0xC300 + step)
            top.pwritev([memoryview(model[window])], offset, fua=rng.random() < 0.1)
        elif op == "zero":
            model[window] = 0
            top.write_zeroes(offset, length)
        else:
            top.flush()
        model[holes] = 0
    after = stack.leaf_content(mapper)
    for number, content in enumerate(stack.expected_leaves(leaves, model)):
        expect_equal(memoryview(after[number]), content, 0, f"{where}: leaf {number}")
    expect_equal(memoryview(stacked_read(top)), model, 0, f"{where}: stacked, at the end")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_stack_on_memory_does_as_the_oracle_says(seed):
    with Mapper() as mapper:
        check(RandomStack(seed), mapper)


@pytest.mark.parametrize("seed", SEEDS[:10])
def test_a_stack_on_files_does_as_the_oracle_says(seed, tmp_path):
    with Mapper() as mapper:
        check(RandomStack(seed, folder=tmp_path), mapper)


@pytest.mark.parametrize("seed", SEEDS[:10])
def test_a_stack_whose_lines_overlap_reads_as_the_oracle_says(seed):
    with Mapper() as mapper:
        check(RandomStack(seed, alias=True), mapper)


def passes_over_devices(mapper, name):
    """Say whether all segments of a device lead to leaves or targets."""
    segments = mapper.device(name).plan_to_pass.segments[:-1]
    lower = {id(device) for device in mapper.devices()}
    return not any(id(segment.device) in lower for segment in segments)


@pytest.mark.parametrize("seed", SEEDS[:5])
def test_a_stack_of_linear_devices_only_is_flattened_to_the_leaves(seed, tmp_path):
    with Mapper() as mapper:
        stack = RandomStack(seed, folder=tmp_path, targets=("linear",))
        check(stack, mapper)
        assert passes_over_devices(mapper, stack.top)


@pytest.mark.parametrize("seed", SEEDS[:5])
def test_a_stack_is_flat_again_after_any_of_its_devices_was_suspended(seed):
    with Mapper() as mapper:
        stack = RandomStack(seed)
        stack.create(mapper)
        for name in stack.devices:
            mapper.suspend(name)
            mapper.load(name, mapper.device(name).table_text())
            mapper.resume(name)
            assert all(passes_over_devices(mapper, other) for other in stack.devices)


@pytest.mark.parametrize("seed", SEEDS[:10])
def test_suspending_and_resuming_any_device_changes_nothing(seed):
    with Mapper() as mapper:
        stack = RandomStack(seed)
        top = stack.create(mapper)
        expected = stack.expected(stack.leaf_pattern())
        for name in stack.devices:
            mapper.suspend(name)
            mapper.resume(name)
            data = bytearray(top.size)
            top.preadv([memoryview(data)], 0)
            expect_equal(memoryview(data), expected, 0, f"{stack!r}: after {name}")


@pytest.mark.parametrize("seed", SEEDS[:10])
def test_loading_the_tables_once_more_changes_nothing(seed):
    with Mapper() as mapper:
        stack = RandomStack(seed)
        top = stack.create(mapper)
        expected = stack.expected(stack.leaf_pattern())
        for name in stack.devices:
            mapper.load(name, mapper.device(name).table_text())
            mapper.resume(name)
        data = bytearray(top.size)
        top.preadv([memoryview(data)], 0)
        expect_equal(memoryview(data), expected, 0, repr(stack))


@pytest.mark.parametrize("seed", SEEDS[:10])
def test_a_stack_can_be_taken_down_from_the_top(seed):
    with Mapper() as mapper:
        stack = RandomStack(seed)
        stack.create(mapper)
        stack.remove(mapper)
        assert mapper.devices() == []


class Journal:
    """What dmpy.state keeps in files, kept in a dict."""

    def __init__(self):
        self.kept = {}

    def record(self, entry):
        self.kept[entry["minor"]] = entry

    def forget(self, minor):
        del self.kept[minor]

    def entries(self):
        return [self.kept[minor] for minor in sorted(self.kept)]


@pytest.mark.parametrize("seed", SEEDS[:10])
def test_a_stack_comes_back_from_its_journal(seed, tmp_path):
    journal = Journal()
    stack = RandomStack(seed, folder=tmp_path)
    rng = random.Random(seed)
    with Mapper(journal=journal) as mapper:
        stack.create(mapper)
        suspended = rng.choice(list(stack.devices))
        mapper.suspend(suspended)
        mapper.load(suspended, "0 8 error")
        before = {d.name: (d.minor, d.table_text(), d.suspended) for d in mapper.devices()}
    # Devices come back in any order of their numbers, upper ones first if need be.
    for entries in (journal.entries(), journal.entries()[::-1]):
        journal.entries = lambda entries=entries: entries
        with Mapper(journal=journal) as mapper:
            mapper.restore()
            assert not mapper.failed
            after = {d.name: (d.minor, d.table_text(), d.suspended) for d in mapper.devices()}
            assert after == before
            assert mapper.device(suspended).table_text(inactive=True) == "0 8 error"
            mapper.clear(suspended)
            mapper.resume(suspended)
            top = mapper.device(stack.top)
            data = bytearray(top.size)
            top.preadv([memoryview(data)], 0)
            expect_equal(memoryview(data), stack.expected(stack.leaf_pattern()), 0, repr(stack))
            mapper.suspend(suspended)
            mapper.load(suspended, "0 8 error")


@pytest.mark.parametrize("seed", SEEDS[:10])
def test_a_stack_whose_leaf_is_gone_comes_back_without_what_stood_on_it(seed, tmp_path):
    journal = Journal()
    stack = RandomStack(seed, folder=tmp_path)
    with Mapper(journal=journal) as mapper:
        stack.create(mapper)
    gone = random.Random(seed).randrange(len(stack.leaf_sectors))
    (tmp_path / f"leaf{gone}.img").unlink()

    def stands_on(name):
        legs = [what for line in stack.devices[name] for what, _ in line.legs]
        return gone in legs or any(stands_on(what) for what in legs if isinstance(what, str))

    with Mapper(journal=journal) as mapper:
        mapper.restore()
        assert {entry.name for entry in mapper.failed} == set(filter(stands_on, stack.devices))
        for name in stack.devices:
            if not stands_on(name):
                device = mapper.device(name)
                data = bytearray(device.size)
                device.preadv([memoryview(data)], 0)
                leaves = stack.leaf_pattern()
                expect_equal(memoryview(data), stack.expected(leaves, name), 0, repr(stack))


@pytest.mark.parametrize("seed", SEEDS[:6])
def test_every_single_failure_in_a_stack_is_told_and_nothing_hangs(seed):
    """Every call on every leaf fails once; the request on top must not claim success."""
    for fault in every_fault(limit=400, forever=False, error=errno.EREMOTEIO, ops=CHANGING):
        stack = RandomStack(seed, depth=4)
        leaves = {}
        for number, sectors in enumerate(stack.leaf_sectors):
            below = PatternDevice(sectors * SECTOR, f"disk{number}", salt=number + 1)
            leaves[f"disk{number}"] = FaultyDevice(below, fault)
        with Mapper(leaves=GivenLeaves(leaves)) as mapper:
            for number, sectors in enumerate(stack.leaf_sectors):
                mapper.create(f"leaf{number}", f"0 {sectors} linear disk{number} 0")
            for name in stack.devices:
                top = mapper.create(name, stack.table(name))
            at_first, failed = fault.hits, 0
            data = pattern(0, top.size, 0xC300)
            for step in (
                lambda: top.pwritev([memoryview(data)], 0),
                lambda: top.preadv([memoryview(bytearray(top.size))], 0),
                top.flush,
                lambda: top.write_zeroes(0, top.size),
            ):
                try:
                    step()
                except OSError as error:
                    assert error.errno == errno.EREMOTEIO, repr(stack)
                    failed += 1
            assert failed == fault.hits - at_first, repr(stack)
            assert top.stats.in_flight == 0
            assert top.stats.errors == failed
            fault.heal()


@pytest.mark.nightly
def test_thousands_of_stacks_do_as_the_oracle_says(tmp_path):
    for seed in NIGHTLY_SEEDS:
        print(f"seed {seed}")
        folder = tmp_path / str(seed)
        folder.mkdir()
        for where in (None, folder):
            with Mapper() as mapper:
                check(RandomStack(seed, folder=where), mapper)
