"""zero: reads give zeroes, writes are dropped."""

import errno

import pytest

from dmpy.device import HOLE, ZERO
from dmpy.errors import TableError
from dmpy.table import Table
from dmpy.target import find_target
from dmpy.targets.zero import Zero
from dmpy.testing.conformance import TargetTests


class TestZero(TargetTests):
    """No leg; every sector is nowhere."""

    status_text = ""

    def build(self, devices):
        return Zero(200 * 512)

    def oracle(self, sector):
        return None

    def test_its_table_has_no_arguments(self):
        assert self.target.table() == ""

    def test_it_is_one_hole(self):
        (extent,) = self.target.extents(512, 1024)
        assert extent.kind in (HOLE, ZERO)

    def test_buffers_full_of_something_come_back_as_zeroes(self):
        buffers = [bytearray(b"\xff" * n) for n in (1, 511, 4096)]
        self.target.preadv([memoryview(buffer) for buffer in buffers], 3)
        assert not any(any(buffer) for buffer in buffers)


def test_its_word_finds_it():
    assert find_target("zero") is Zero


def test_version_is_the_kernels():
    assert Zero.version == (1, 2, 0)


def test_buffers_bigger_than_any_shared_stretch_of_zeroes_are_filled():
    size = (3 << 20) + 5
    buffer = bytearray(b"\xff" * size)
    Zero(4 << 20).preadv([memoryview(buffer)], 0)
    assert buffer.count(0) == size


def test_arguments_are_refused():
    with pytest.raises(TableError) as caught:
        Table.parse("0 8 zero x", open_device=dict.__getitem__)
    assert (caught.value.line, caught.value.target) == (1, "zero")


def test_a_target_of_the_largest_size_reads_at_its_end():
    length_sectors = (1 << 54) - 8
    table = Table.parse(f"0 {length_sectors} zero", open_device=dict.__getitem__)
    buffer = bytearray(b"x" * 512)
    table.lines[0].target.preadv([memoryview(buffer)], (length_sectors << 9) - 512)
    assert not any(buffer)


def test_zeroes_that_must_be_allocated_fast_are_refused():
    with pytest.raises(OSError) as caught:
        Zero(512).write_zeroes(0, 512, may_unmap=False, fast_only=True)
    assert caught.value.errno == errno.EOPNOTSUPP
