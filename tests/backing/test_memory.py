"""Memory as a leaf."""

from __future__ import annotations

import errno
import os

import pytest

from dmpy.backing import Leaves, leaf_identity, open_leaf
from dmpy.device import DATA, HOLE, Extent
from dmpy.testing.conformance import LeafTests
from tests.backing.test_file import raises, read


class TestMemory(LeafTests):
    """The conformance suite."""

    fast_zeroes = True
    keeps_content = False

    def build(self, folder):
        return open_leaf("mem:1M")


def resident():
    with open("/proc/self/statm", encoding="ascii") as line:
        return int(line.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_room_is_taken_only_where_it_was_written():
    leaf = open_leaf("mem:64T")
    assert leaf.size == 64 << 40
    leaf.pwritev([memoryview(b"x" * 4096)], 40 << 40)
    assert list(leaf.extents(0, 64 << 40)) == [
        Extent(0, 40 << 40, HOLE),
        Extent(40 << 40, 4096, DATA),
        Extent((40 << 40) + 4096, (24 << 40) - 4096, HOLE),
    ]
    assert os.fstat(leaf.fd).st_blocks == 8
    leaf.discard(0, 64 << 40)
    assert os.fstat(leaf.fd).st_blocks == 0
    leaf.close()


def test_each_opening_gets_memory_of_its_own():
    leaves = Leaves()
    one, two = leaves.open("mem:1M"), leaves.open("mem:1M")
    assert one is not two
    one.pwritev([memoryview(b"x" * 512)], 0)
    assert read(two, 0, 512) == bytes(512)
    assert leaf_identity("mem:1M") != leaf_identity("mem:1M")
    leaves.release(one)
    assert read(two, 0, 512) == bytes(512)
    leaves.close()


def test_its_names_are_the_word():
    leaf = open_leaf("mem:8s")
    assert (leaf.name, leaf.table_name, leaf.size) == ("mem:8s", "mem:8s", 4096)
    leaf.close()


@pytest.mark.parametrize("word", ["mem:512", "mem:1s", "mem:7E"])
def test_the_smallest_and_largest_sizes_are_accepted(word):
    open_leaf(word).close()


@pytest.mark.parametrize(
    "word", ["mem:", "mem:0", "mem:511", "mem:513", "mem:-512", "mem:1X", "mem:8E", "mem:99999999E"]
)
def test_sizes_that_are_none_are_refused(word):
    with raises(errno.EINVAL, f"^{word}: "):
        open_leaf(word)


def test_read_only_memory_is_empty_and_refuses_writes():
    leaf = open_leaf("mem:1M", readonly=True)
    for change in (
        lambda: leaf.pwritev([memoryview(b"y" * 512)], 0),
        lambda: leaf.pwritev([memoryview(b"y" * 512)], 0, fua=True),
        lambda: leaf.discard(0, 512),
        lambda: leaf.write_zeroes(0, 512),
    ):
        with raises(errno.EROFS, "opened for reading only"):
            change()
    leaf.flush()
    assert read(leaf, 0, 1 << 20) == bytes(1 << 20)
    leaf.make_writable()
    leaf.pwritev([memoryview(b"y" * 512)], 0)
    assert read(leaf, 0, 513) == b"y" * 512 + b"\0"
    leaf.close()


def test_its_memory_is_given_back_when_it_is_closed():
    before = len(os.listdir("/proc/self/fd"))
    leaf = open_leaf("mem:16M")
    leaf.close()
    leaf.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with raises(errno.EBADF, "mem:16M: closed"):
        read(leaf, 0, 512)
