"""Block devices as leaves, shown on loop devices."""

from __future__ import annotations

import errno
import os
import subprocess

import pytest

from dmpy.backing import Leaves, leaf_identity, open_leaf
from dmpy.device import DATA, Extent
from dmpy.testing.conformance import LeafTests
from tests import needs
from tests.backing.test_file import MIB, raises, read


class TestBlockDevice(LeafTests):
    """The conformance suite on a loop device, in bytes of any alignment."""

    @pytest.fixture(autouse=True)
    def _loop(self, loop, _leaf):
        yield

    @pytest.fixture(autouse=True)
    def _leaf(self, tmp_path, loop):
        self.folder = tmp_path
        with open(tmp_path / "disk", "wb") as file:
            file.truncate(self.size)
        self.node = loop(tmp_path / "disk")
        self.leaf = self.reopen(tmp_path)
        yield
        self.leaf.close()

    def reopen(self, folder):
        return open_leaf(self.node)


@pytest.fixture
def disk(tmp_path, loop):
    (tmp_path / "disk").write_bytes(b"x" * MIB)
    return loop(tmp_path / "disk")


def number_of(node):
    rdev = os.stat(node).st_rdev
    return f"{os.major(rdev)}:{os.minor(rdev)}"


def test_its_table_name_is_its_number_as_the_kernel_prints_it(disk):
    leaf = open_leaf(disk)
    assert leaf.table_name == number_of(disk)
    assert leaf.name == disk
    assert leaf.size == MIB
    leaf.close()


def test_it_can_be_opened_by_its_number(disk):
    assert leaf_identity(number_of(disk)) == leaf_identity(disk)
    leaf = open_leaf(number_of(disk), readonly=True)
    assert read(leaf, 0, 1024) == b"x" * 1024
    leaf.close()


def test_it_is_claimed_as_the_kernels_mapper_claims_it(disk):
    leaf = open_leaf(disk)
    with pytest.raises(OSError, match="busy"):
        os.open(disk, os.O_RDONLY | os.O_EXCL)
    with raises(errno.EBUSY, "in use: mounted, or held by another program"):
        open_leaf(disk)
    leaf.close()
    open_leaf(disk).close()


def test_a_mounted_device_is_refused(tmp_path, disk):
    subprocess.run([needs.tool("mkfs.ext4"), "-q", disk], check=True, timeout=60)
    (tmp_path / "mnt").mkdir()
    subprocess.run(["mount", disk, str(tmp_path / "mnt")], check=True, timeout=60)
    try:
        with raises(errno.EBUSY, "mounted"):
            open_leaf(disk)
    finally:
        subprocess.run(["umount", str(tmp_path / "mnt")], check=True, timeout=60)


def test_a_device_that_is_set_read_only_is_refused_for_writing(disk):
    blockdev = needs.tool("blockdev")
    subprocess.run([blockdev, "--setro", disk], check=True, timeout=30)
    try:
        with raises(errno.EACCES, "the device is set read-only"):
            open_leaf(disk)
        leaf = open_leaf(disk, readonly=True)
        with raises(errno.EROFS, "opened for reading only"):
            leaf.pwritev([memoryview(b"y" * 512)], 0)
        with raises(errno.EACCES, "the device is set read-only"):
            leaf.make_writable()
        assert leaf.readonly
        leaf.close()
    finally:
        # It would stay so for whoever gets this loop device next.
        subprocess.run([blockdev, "--setrw", disk], check=True, timeout=30)


def test_a_reader_and_then_a_writer_share_it(disk):
    leaves = Leaves()
    reader = leaves.open(disk, readonly=True)
    writer = leaves.open(number_of(disk))
    assert reader is writer
    writer.pwritev([memoryview(b"y" * 512)], 512)
    assert read(reader, 511, 514) == b"x" + b"y" * 512 + b"x"
    with pytest.raises(OSError, match="busy"):
        os.open(disk, os.O_RDONLY | os.O_EXCL)
    leaves.close()
    os.close(os.open(disk, os.O_RDONLY | os.O_EXCL))


def test_everything_on_it_is_data(disk):
    leaf = open_leaf(disk)
    assert list(leaf.extents(100, 5000)) == [Extent(100, 5000, DATA)]
    leaf.close()


def test_a_discard_keeps_the_parts_of_blocks_at_its_ends(disk):
    leaf = open_leaf(disk)
    leaf.discard(100, 200)
    leaf.discard(700, 4096)
    assert read(leaf, 0, 1024) == b"x" * 1024
    assert read(leaf, 4608, 512) == b"x" * 512
    assert read(leaf, 1024, 3584) == bytes(3584)
    leaf.close()


@pytest.mark.parametrize("may_unmap", [True, False])
@pytest.mark.parametrize(("offset", "length"), [(0, MIB), (100, 200), (100, 5000), (512, 512)])
def test_zeroes_of_any_alignment(disk, offset, length, may_unmap):
    leaf = open_leaf(disk)
    # Dirty in the page cache only: nothing outside of the range may be dropped from it.
    leaf.pwritev([memoryview(b"y" * MIB)], 0)
    leaf.write_zeroes(offset, length, may_unmap=may_unmap)
    expected = bytearray(b"y" * MIB)
    expected[offset : offset + length] = bytes(length)
    assert read(leaf, 0, MIB) == expected
    leaf.flush()
    leaf.close()


def test_zeroes_that_have_to_be_written_leave_unflushed_data_alone_when_refused(disk):
    """The kernel's fallocate drops dirty pages before it finds that the device cannot zero."""
    leaf = open_leaf(disk)
    leaf._can_zero = False
    leaf.pwritev([memoryview(b"y" * MIB)], 0)
    for may_unmap in (True, False):
        with raises(errno.EOPNOTSUPP, "zeroes have to be written"):
            leaf.write_zeroes(0, MIB, may_unmap=may_unmap, fast_only=True)
    assert read(leaf, 0, MIB) == b"y" * MIB
    leaf.write_zeroes(0, MIB)
    assert read(leaf, 0, MIB) == bytes(MIB)
    leaf.close()


def test_blocks_of_4096_bytes_are_preferred_but_bytes_are_taken(tmp_path, loop):
    (tmp_path / "disk").write_bytes(b"x" * MIB)
    leaf = open_leaf(loop(tmp_path / "disk", "--sector-size", "4096"))
    assert leaf.block_size[:2] == (1, 4096)
    leaf.pwritev([memoryview(b"y")], 4095)
    leaf.write_zeroes(4097, 4096)
    assert read(leaf, 4094, 3) == b"xyx"
    assert read(leaf, 4097, 4097) == bytes(4096) + b"x"
    leaf.close()


def test_a_device_that_shrank_gives_an_io_error_at_its_end(tmp_path, disk):
    leaf = open_leaf(disk)
    os.truncate(tmp_path / "disk", 512 << 10)
    subprocess.run([needs.tool("losetup"), "--set-capacity", disk], check=True, timeout=30)
    assert read(leaf, 0, 512 << 10) == b"x" * (512 << 10)
    with raises(errno.EIO, "the device now ends before that"):
        read(leaf, 512 << 10, 512)
    with pytest.raises(OSError):
        leaf.pwritev([memoryview(b"y" * 512)], 512 << 10)
    leaf.refresh()
    assert leaf.size == 512 << 10
    leaf.close()
