"""Pattern data and the device that serves it."""

import numpy as np
import pytest

from dmpy.device import BlockSize
from dmpy.testing.pattern import (
    PatternDevice,
    PatternMismatch,
    check_pattern,
    fill_pattern,
    pattern,
)


def read(device, offset, length):
    data = bytearray(length)
    device.preadv([memoryview(data)], offset)
    return data


def test_every_word_holds_its_own_offset():
    words = pattern(4096, 64).view("<u8")
    assert words.tolist() == list(range(4096, 4096 + 64, 8))


def test_the_salt_is_the_top_of_every_word():
    assert int(pattern(8, 8, salt=3).view("<u8")[0]) == 3 << 48 | 8


@pytest.mark.parametrize("offset", range(9))
@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 17])
def test_an_unaligned_piece_is_a_piece_of_the_whole(offset, length):
    assert pattern(offset, length).tobytes() == pattern(0, 64).tobytes()[offset : offset + length]


def test_a_mismatch_names_the_byte_and_where_it_came_from():
    data = bytearray(64)
    fill_pattern(memoryview(data), 1024)
    data[16:24] = pattern(2048, 8, salt=5).tobytes()
    with pytest.raises(PatternMismatch) as caught:
        check_pattern(memoryview(data), 1024, what="leg 1")
    assert "leg 1: byte 1040 is wrong" in str(caught.value)
    assert "pattern of byte 2048, salt 5 (expected pattern of byte 1040, salt 0)" in str(
        caught.value
    )


def test_a_device_reads_as_the_pattern_until_it_is_written():
    device = PatternDevice(1 << 40, salt=1)
    place = (1 << 39) + 4000
    assert read(device, place, 200) == pattern(place, 200, 1).tobytes()
    device.pwritev([memoryview(b"ab"), memoryview(b"cdef")], place + 90)
    expected = bytearray(pattern(place, 200, 1).tobytes())
    expected[90:96] = b"abcdef"
    assert read(device, place, 200) == expected
    assert device.unflushed
    device.flush()
    assert not device.unflushed


def test_zeroes_and_discards_are_kept():
    device = PatternDevice(65536)
    device.write_zeroes(4090, 20)
    device.discard(512, 1)
    expected = pattern(0, 65536).copy()
    expected[4090:4110] = 0
    expected[512] = 0
    assert np.array_equal(device.content(), expected)


def test_checked_writes_must_carry_the_pattern():
    device = PatternDevice(65536, check_writes=True)
    device.pwritev([memoryview(pattern(512, 1024))], 512)
    with pytest.raises(PatternMismatch, match="byte 513 is wrong"):
        device.pwritev([memoryview(pattern(0, 512))], 512)


@pytest.mark.parametrize("offset, length", [(65535, 2), (-1, 1), (65536, 1)])
def test_a_request_outside_the_device_is_a_bug(offset, length):
    with pytest.raises(AssertionError, match="leaves the 65536 bytes"):
        read(PatternDevice(65536), offset, length)


def test_a_request_smaller_than_a_block_is_a_bug():
    with pytest.raises(AssertionError, match="not in blocks of 512"):
        read(PatternDevice(65536, block_size=BlockSize(512)), 0, 100)


def test_calls_are_counted_and_logged():
    device = PatternDevice(65536)
    read(device, 0, 512)
    device.pwritev([memoryview(bytes(8))], 8, fua=True)
    device.flush()
    assert device.calls == {"read": 1, "write": 1, "fua": 1, "flush": 1}
    assert device.log == [("read", 0, 512), ("write", 8, 8), ("flush", 0, 0)]
