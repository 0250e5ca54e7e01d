"""The short way of requests does what the device does, and passes on what it cannot."""

import errno
import os

import pytest

from dmpy.mapper import Mapper
from dmpy.opening import Opening
from dmpy.stats import SAMPLE

SECTOR = 512


class Noting(Opening):
    """An opening that notes what it did not do by itself."""

    __slots__ = ("slow",)

    def __init__(self, device, largest=1 << 20):
        super().__init__(device, largest)
        self.slow = []

    def read_slowly(self, view, offset):
        self.slow.append(("read", offset, len(view)))
        super().read_slowly(view, offset)

    def write_slowly(self, view, offset, fua):
        self.slow.append(("write", offset, len(view), fua))
        super().write_slowly(view, offset, fua)


@pytest.fixture
def dm(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(os.urandom(64 * SECTOR))
    with Mapper() as mapper:
        yield mapper


def make(dm, tmp_path, table, **how):
    return dm.create("d", table, cwd=str(tmp_path), **how)


TABLES = {
    "one segment": "0 64 linear a 0",
    "two segments": "0 16 linear a 8\n16 16 linear b 24",
    "over a device": "0 48 linear low 8",
    "striped": "0 64 striped 2 8 a 0 b 0",
    "striped over a device": "0 64 striped 2 8 low 0 low 32",
    "unstriped": "0 32 unstriped 2 8 1 a 0",
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_requests_within_a_file_take_the_short_way_and_move_the_right_bytes(dm, tmp_path, table):
    if "low" in table:
        dm.create("low", "0 64 linear b 0", cwd=str(tmp_path))
    device = make(dm, tmp_path, table)
    opening = Noting(device)
    for sector in range(0, device.size // SECTOR, 4):
        data = os.urandom(4 * SECTOR)
        opening.write(memoryview(data), sector * SECTOR)
        whole, part = bytearray(4 * SECTOR), bytearray(100)
        device.preadv([memoryview(whole)], sector * SECTOR)
        assert whole == data
        opening.read(memoryview(part), sector * SECTOR + 300)
        assert part == data[300:400]
    assert opening.slow == []


@pytest.mark.parametrize(
    ("offset", "length"), [(15 * SECTOR, 2 * SECTOR), (0, (1 << 20) + 1), (31 * SECTOR, 1024)]
)
def test_what_is_more_than_one_request_goes_the_slow_way(dm, tmp_path, offset, length):
    device = make(dm, tmp_path, "0 16 linear a 0\n16 16 linear b 0\n32 4096 zero")
    opening = Noting(device)
    data = os.urandom(length)
    opening.write(memoryview(data), offset)
    back = bytearray(length)
    opening.read(memoryview(back), offset)
    in_files = 32 * SECTOR - offset
    assert back[:in_files] == data[:in_files]
    assert opening.slow == [("write", offset, length, False), ("read", offset, length)]


def test_durable_writes_and_writes_to_read_only_devices_go_the_slow_way(dm, tmp_path):
    opening = Noting(make(dm, tmp_path, "0 64 linear a 0"))
    opening.write(memoryview(bytes(SECTOR)), 0, 2)
    assert opening.slow == [("write", 0, SECTOR, True)]
    fixed = dm.create("r", "0 64 linear b 0", cwd=str(tmp_path), readonly=True)
    opening = Noting(fixed)
    with pytest.raises(OSError) as refusal:
        opening.write(memoryview(bytes(SECTOR)), 0)
    assert refusal.value.errno == errno.EROFS


@pytest.mark.parametrize("table", ["0 64 linear a 0", "0 64 striped 2 8 a 0 b 0"])
def test_a_file_that_was_cut_short_fails_where_it_ends_and_stays_short(dm, tmp_path, table):
    device = make(dm, tmp_path, table)
    opening = Noting(device)
    os.truncate(tmp_path / "a", 4 * SECTOR)
    view = memoryview(bytearray(SECTOR))
    opening.read(view, 0)
    opening.write(view, 0)
    assert opening.slow == []
    for request in (opening.read, opening.write):
        with pytest.raises(OSError, match="a: ") as refusal:
            request(view, 5 * SECTOR)
        assert refusal.value.errno == errno.EIO
    assert (tmp_path / "a").stat().st_size == 4 * SECTOR
    assert device.stats.errors == 2


def test_an_opening_follows_its_device_through_changes(dm, tmp_path):
    device = make(dm, tmp_path, "0 64 linear a 0")
    opening = Noting(device)
    dm.load("d", "0 64 linear b 0", cwd=str(tmp_path))
    dm.resume("d")
    back = bytearray(64 * SECTOR)
    opening.read(memoryview(back), 0)
    assert back == (tmp_path / "b").read_bytes()
    assert opening.slow == []


def test_counts_of_openings_are_those_of_the_device_and_stay_when_they_close(dm, tmp_path):
    device = make(dm, tmp_path, "0 64 linear a 0")
    opening = Noting(device)
    view = memoryview(bytearray(SECTOR))
    for _ in range(2 * SAMPLE):
        opening.read(view, 0)
    opening.write(view, 0)
    device.preadv([view], 0)
    before = device.stats.snapshot()
    assert (before["reads"], before["read_bytes"]) == (2 * SAMPLE + 1, (2 * SAMPLE + 1) * SECTOR)
    assert (before["writes"], before["write_bytes"]) == (1, SECTOR)
    # Every sixteenth request stands for sixteen; those of the device for themselves.
    assert sum(before["read_histogram"]) == 2 * SAMPLE + 1
    opening.close()
    assert device.stats.snapshot() == before
