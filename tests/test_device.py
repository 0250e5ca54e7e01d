"""What every device gets from the base class, and cutting buffers."""

import errno

import pytest

from dmpy.device import (
    DATA,
    HOLE,
    ZERO,
    BlockDevice,
    BlockSize,
    Cutter,
    Extent,
    merge_extents,
    slices,
    total,
    zero_chunks,
)


class Plain(BlockDevice):
    """Bytes in memory, and nothing that the base class can do."""

    def __init__(self, size):
        self.name = "plain"
        self.size = size
        self.bytes = bytearray(b"x" * size)

    def preadv(self, buffers, offset):
        for buffer in buffers:
            buffer[:] = self.bytes[offset : offset + len(buffer)]
            offset += len(buffer)

    def pwritev(self, buffers, offset, *, fua=False):
        for buffer in buffers:
            self.bytes[offset : offset + len(buffer)] = buffer
            offset += len(buffer)

    def flush(self):
        pass


def views(*pieces):
    return [memoryview(piece) for piece in pieces]


def test_slices_give_every_part_of_a_list_of_buffers():
    buffers = views(b"abc", b"", b"defg", b"h")
    for begin in range(8):
        for length in range(9 - begin):
            cut = slices(buffers, begin, length)
            assert b"".join(cut) == b"abcdefgh"[begin : begin + length]
            assert all(cut)
    assert total(buffers) == 8
    assert total(buffers[:1]) == 3


def test_slices_are_views():
    data = bytearray(b"abcdef")
    slices([memoryview(data)[:3], memoryview(data)[3:]], 2, 2)[1][:] = b"X"
    assert data == b"abcXef"


def test_a_cutter_goes_through_the_buffers_once():
    cutter = Cutter(views(b"abc", b"defg"))
    assert [b"".join(cutter.take(length)) for length in (2, 0, 3, 2)] == [b"ab", b"", b"cde", b"fg"]


def test_zeroes_are_written_where_a_device_knows_no_better():
    device = Plain(10)
    device.write_zeroes(2, 5)
    assert device.bytes == b"xx\0\0\0\0\0xxx"


def test_zeroes_larger_than_a_request_are_written_in_pieces():
    device = Plain(100)
    device.block_size = BlockSize(1, 4, 7)
    device.write_zeroes(3, 90)
    assert device.bytes == b"xxx" + bytes(90) + b"x" * 7
    pieces = [(place, len(zeroes)) for place, zeroes in zero_chunks(3, 15, 7)]
    assert pieces == [(3, 7), (10, 7), (17, 1)]


def test_fast_zeroes_are_refused_where_they_would_be_written():
    device = Plain(10)
    with pytest.raises(OSError) as refusal:
        device.write_zeroes(0, 10, fast_only=True)
    assert refusal.value.errno == errno.EOPNOTSUPP
    assert device.bytes == b"x" * 10


def test_discard_is_refused_where_a_device_has_none():
    with pytest.raises(OSError) as refusal:
        Plain(10).discard(0, 10)
    assert refusal.value.errno == errno.EOPNOTSUPP


def test_a_device_that_does_not_know_says_data():
    assert list(Plain(10).extents(2, 3)) == [Extent(2, 3, DATA)]


def test_neighbouring_extents_of_a_kind_are_merged():
    extents = [Extent(0, 2, DATA), Extent(2, 3, DATA), Extent(5, 1, HOLE), Extent(6, 1, ZERO)]
    assert list(merge_extents(iter(extents))) == [
        Extent(0, 5, DATA),
        Extent(5, 1, HOLE),
        Extent(6, 1, ZERO),
    ]
    assert list(merge_extents(iter([]))) == []


def test_block_sizes_join_to_what_suits_both():
    joined = BlockSize(512, 4096, 1 << 20).joined(BlockSize(4096, 512, 1 << 25))
    assert joined == BlockSize(4096, 4096, 1 << 20)
