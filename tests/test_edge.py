"""What stands between clients and devices, without NBD: sizes, widening, exclusion."""

from __future__ import annotations

import errno
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmpy.device import DATA, HOLE, BlockDevice, BlockSize, Extent, total
from dmpy.edge import Edge, RangeLock, advertised
from dmpy.errors import DeviceError


class Blocks(BlockDevice):
    """Memory in blocks of `unit` bytes that refuses everything else, and counts."""

    def __init__(self, unit, maximum=0xFFFFFFFF, size=256):
        self.name = "blocks"
        self.size = size
        self.block_size = BlockSize(unit, unit, maximum)
        self.data = bytearray(range(256)) * (size // 256)
        self.calls = []
        self.trims = False

    def _check(self, offset, length):
        unit, _, maximum = self.block_size
        assert offset % unit == 0 and 0 < length and offset + length <= self.size
        assert length % unit == 0 or offset + length == self.size
        return length <= maximum

    def preadv(self, buffers, offset):
        assert self._check(offset, total(buffers))
        self.calls.append(("read", offset, total(buffers)))
        for buffer in buffers:
            buffer[:] = self.data[offset : offset + len(buffer)]
            offset += len(buffer)

    def pwritev(self, buffers, offset, *, fua=False):
        assert self._check(offset, total(buffers))
        self.calls.append(("write", offset, total(buffers), fua))
        for buffer in buffers:
            self.data[offset : offset + len(buffer)] = buffer
            offset += len(buffer)

    def flush(self):
        self.calls.append(("flush",))

    def discard(self, offset, length):
        self._check(offset, length)
        if not self.trims:
            super().discard(offset, length)
        self.data[offset : offset + length] = b"\xdd" * length

    def write_zeroes(self, offset, length, *, may_unmap=True, fast_only=False):
        self._check(offset, length)
        self.calls.append(("zero", offset, length))
        self.data[offset : offset + length] = bytes(length)

    def extents(self, offset, length):
        self._check(offset, length)
        half = self.size // 2
        if offset < half:
            piece = min(half - offset, length)
            yield Extent(offset, piece, DATA)
            offset, length = offset + piece, length - piece
        if length:
            yield Extent(offset, length, HOLE)


ranges = st.tuples(st.integers(0, 255), st.integers(1, 256)).map(
    lambda pair: (pair[0], min(pair[1], 256 - pair[0]))
)
units = st.sampled_from([1, 2, 8, 16, 64, 128])


@given(units, st.integers(1, 4), ranges)
def test_any_read_gives_the_bytes_of_its_range(unit, blocks, place):
    offset, length = place
    edge = Edge(Blocks(unit, maximum=unit * blocks))
    buffer = bytearray(length)
    edge.read(memoryview(buffer), offset)
    assert buffer == bytes(range(offset, offset + length))


@given(units, st.integers(1, 4), ranges, st.booleans())
def test_any_write_changes_its_range_and_nothing_else(unit, blocks, place, fua):
    offset, length = place
    device = Blocks(unit, maximum=unit * blocks)
    Edge(device).write(memoryview(b"\xaa" * length), offset, fua)
    expected = bytearray(range(256))
    expected[offset : offset + length] = b"\xaa" * length
    assert device.data == expected
    assert all(call[3] == fua for call in device.calls if call[0] == "write")


@given(units, ranges, st.booleans())
def test_any_zero_clears_its_range_and_nothing_else(unit, place, fua):
    offset, length = place
    device = Blocks(unit)
    Edge(device).zero(offset, length, may_unmap=True, fast_only=False, fua=fua)
    expected = bytearray(range(256))
    expected[offset : offset + length] = bytes(length)
    assert device.data == expected
    assert (("flush",) in device.calls) == fua


@given(units, ranges)
def test_any_trim_stays_inside_its_range(unit, place):
    offset, length = place
    device = Blocks(unit)
    device.trims = True
    Edge(device).trim(offset, length, fua=False)
    assert device.data[:offset] == bytes(range(offset))
    assert device.data[offset + length :] == bytes(range(offset + length, 256))


@given(units, ranges, st.booleans())
def test_extents_lie_inside_the_range_and_begin_where_it_begins(unit, place, only_one):
    offset, length = place
    answer = Edge(Blocks(unit)).extents(offset, length, only_one)
    assert answer[0][0] == offset
    end = offset
    for first, size, kind in answer:
        assert first == end and size > 0 and kind == (DATA if first < 128 else HOLE)
        end = first + size
    assert end <= offset + length
    assert len(answer) == 1 if only_one else end == offset + length


def test_trim_that_the_device_refuses_for_another_reason_fails():
    device = Blocks(1)
    device.discard = lambda *_: (_ for _ in ()).throw(DeviceError(errno.EIO, "broken"))
    with pytest.raises(OSError, match="broken"):
        Edge(device).trim(0, 10, fua=False)


@pytest.mark.parametrize("call", [
    lambda edge: edge.read(memoryview(bytearray(2)), 255),
    lambda edge: edge.write(memoryview(bytes(2)), 255, False),
    lambda edge: edge.zero(255, 2, may_unmap=True, fast_only=False, fua=False),
    lambda edge: edge.trim(256, 1, fua=False),
    lambda edge: edge.extents(0, 257, False),
])  # fmt: skip
def test_requests_that_pass_the_end_are_refused(call):
    device = Blocks(16)
    with pytest.raises(OSError, match=r"blocks: .* passes the end \(size 256\)"):
        call(Edge(device))
    assert not device.calls


def test_masks_tell_what_a_device_takes_as_it_is():
    edge = Edge(Blocks(16, maximum=64))
    assert not 32 & edge.odd_read and not 48 & edge.odd_offset
    for length in (1, 33, 64, 80, 1 << 20):
        assert length & edge.odd_read
    assert 16 & edge.odd_write, "whole blocks too have to look at the range lock"
    edge = Edge(Blocks(1))
    assert not edge.odd_offset and not edge.odd_write


def test_masks_follow_a_device_that_changes():
    device = Blocks(1)
    edge = Edge(device)
    device.block_size = BlockSize(64, 64, 128)
    edge.refresh()
    assert 32 & edge.odd_offset
    edge.write(memoryview(b"\xaa" * 8), 8, False)
    assert device.data[8:16] == b"\xaa" * 8


@given(st.integers(1, 1 << 20), st.integers(1, 1 << 30), st.integers(1, 1 << 33))
def test_advertised_sizes_are_what_nbd_allows(minimum, preferred, maximum):
    sizes = advertised(BlockSize(minimum, preferred, max(maximum, minimum)))
    assert 1 <= sizes.minimum <= 65536 and sizes.minimum.bit_count() == 1
    assert 512 <= sizes.preferred <= 32 << 20 and sizes.preferred.bit_count() == 1
    assert sizes.preferred >= sizes.minimum and sizes.maximum >= sizes.preferred
    assert sizes.maximum % sizes.minimum == 0 and sizes.maximum <= 64 << 20
    assert minimum % sizes.minimum == 0


@pytest.mark.parametrize(("first", "second", "waits"), [
    ((0, 16, False), (0, 16, False), False),
    ((0, 16, True), (0, 16, False), True),
    ((0, 16, False), (0, 16, True), True),
    ((0, 16, True), (15, 32, True), True),
    ((0, 16, True), (16, 32, True), False),
])  # fmt: skip
def test_range_lock_lets_in_who_is_not_in_the_way(first, second, waits):
    lock = RangeLock()
    held = lock.enter(*first[:2], alone=first[2])
    entered = threading.Event()

    def other():
        entry = lock.enter(*second[:2], alone=second[2])
        entered.set()
        lock.leave(entry)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(0.05 if waits else 10) != waits
    lock.leave(held)
    thread.join(10)
    assert entered.is_set()


def test_who_wants_a_range_alone_is_not_overtaken():
    """Writers of whole blocks that keep coming must not keep a writer of a part waiting."""
    lock = RangeLock()
    order = []
    held = lock.enter(0, 16, alone=False)

    def come(name, alone):
        entry = lock.enter(0, 16, alone=alone)
        order.append(name)
        lock.leave(entry)

    threads = []
    for count, (name, alone) in enumerate([("part", True), ("whole", False)], 2):
        threads.append(threading.Thread(target=come, args=(name, alone)))
        threads[-1].start()
        while len(lock._entries) < count:
            threading.Event().wait(0.001)
    lock.leave(held)
    for thread in threads:
        thread.join(10)
    assert order == ["part", "whole"]
