"""Leaves that a test chooses."""

import errno

import pytest

from dmpy.mapper import Mapper
from dmpy.testing import PatternDevice
from dmpy.testing.leaves import GivenLeaves


def test_a_table_reaches_the_devices_that_were_given():
    disk = PatternDevice(64 * 512, "disk")
    leaves = GivenLeaves({"disk": disk})
    with Mapper(leaves=leaves) as dm:
        dm.create("a", "0 32 linear disk 32").preadv([memoryview(bytearray(512))], 0)
        assert leaves.opened == {"disk": 1}
    assert disk.log == [("read", 32 * 512, 512), ("flush", 0, 0)]
    assert not leaves.opened


def test_a_word_that_was_not_given_does_not_exist():
    with pytest.raises(OSError) as caught:
        GivenLeaves({}).open("disk")
    assert caught.value.errno == errno.ENOENT


def test_a_device_that_is_given_back_twice_is_a_bug():
    disk = PatternDevice(512, "disk")
    leaves = GivenLeaves({"disk": disk})
    leaves.open("disk")
    leaves.release(disk)
    with pytest.raises(AssertionError, match="more often than opened"):
        leaves.release(disk)
