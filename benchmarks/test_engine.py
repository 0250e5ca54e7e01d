"""The engine alone, in this process: microseconds for a 4 KiB request beside a bare system call.

    python -m pytest benchmarks

Read `linear` minus `os.preadv` as what the engine costs. All requests of a group go to the same
bytes in the same random order, on tmpfs where there is one; the offsets are handed out by an
iterator, whose 50 ns every line of a group has.
"""
from __future__ import annotations

import itertools
import mmap
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.peers import linear_table, segments_table, striped_table
from dmpy import Mapper
from dmpy.backing import open_leaf
from dmpy.mapped import MappedDevice

REQUEST = 4096
LEGS = 4
# 1,000 segments of 64 KiB, which the legs of the striped device hold in whole chunks.
SIZE = 1000 * 64 << 10
DEPTH = 10


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder in memory for the files."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="dmpy-engine-", dir=parent) as path:
        yield Path(path)


@pytest.fixture(scope="module")
def disk(folder: Path) -> str:
    """Path of a file without holes."""
    return _file(folder / "disk.img", SIZE)


@pytest.fixture(scope="module")
def mapper() -> Iterator[Mapper]:
    """The registry of the devices that are timed."""
    with Mapper() as mapper:
        yield mapper


@pytest.fixture
def view() -> memoryview:
    """4 KiB to read into and write from, 64 bytes into a page: outside of any copy trap."""
    return memoryview(mmap.mmap(-1, 2 * REQUEST))[64 : 64 + REQUEST]


# A file of `size` bytes.
def _file(path: Path, size: int) -> str:
    path.write_bytes(os.urandom(1 << 16) * (size >> 16))
    return str(path)


# Times `move([view], offset)` over random offsets, one request a turn.
def _time(benchmark, kind: str, move: Callable[[list[memoryview], int], object], view) -> None:
    offsets = list(range(0, SIZE, REQUEST))
    random.Random(1).shuffle(offsets)
    following = itertools.cycle(offsets).__next__
    buffers = [view]
    benchmark.group = f"4 KiB {kind}"
    benchmark(lambda: move(buffers, following()))


# Times both directions of a device.
def _time_device(benchmark, kind: str, device, view: memoryview) -> None:
    _time(benchmark, kind, device.preadv if kind == "read" else device.pwritev, view)


kinds = pytest.mark.parametrize("kind", ["read", "write"])


@kinds
def test_bare_system_call(benchmark, kind, disk, view):
    file = os.open(disk, os.O_RDWR)
    call = os.preadv if kind == "read" else os.pwritev
    try:
        _time(benchmark, kind, lambda buffers, offset: call(file, buffers, offset), view)
    finally:
        os.close(file)


@kinds
def test_file_leaf(benchmark, kind, folder, view):
    # A file of its own: a leaf is locked against everybody who opens the file once more.
    leaf = open_leaf(_file(folder / "leaf.img", SIZE))
    try:
        _time_device(benchmark, kind, leaf, view)
    finally:
        leaf.close()


@kinds
def test_linear(benchmark, kind, mapper, disk, view):
    device = _device(mapper, "linear", linear_table(disk, SIZE))
    _time_device(benchmark, kind, device, view)


@kinds
def test_striped_over_4(benchmark, kind, mapper, folder, view):
    def table() -> str:
        legs = [_file(folder / f"leg{number}.img", SIZE // LEGS) for number in range(LEGS)]
        return striped_table(legs, SIZE)

    _time_device(benchmark, kind, _device(mapper, "striped", table), view)


@kinds
def test_ten_layers_flattened(benchmark, kind, mapper, disk, view):
    _time_device(benchmark, kind, _stack(mapper, "flattened", disk), view)


@kinds
def test_ten_layers_stacked(benchmark, kind, mapper, disk, view, monkeypatch):
    # What flattening saves: while these are made no device can be passed over.
    monkeypatch.setattr(MappedDevice, "plan_to_pass", None)
    device = _stack(mapper, "stacked", disk)
    monkeypatch.undo()
    _time_device(benchmark, kind, device, view)


@kinds
def test_1000_segments(benchmark, kind, mapper, disk, view):
    device = _device(mapper, "thousand", lambda: segments_table(disk, SIZE, 1000))
    _time_device(benchmark, kind, device, view)


# The device `name`, created with `table` (text, or what makes it) if it is not there yet.
def _device(mapper: Mapper, name: str, table):
    if all(device.name != name for device in mapper.devices()):
        mapper.create(name, table() if callable(table) else table)
    return mapper.device(name)


# The uppermost of ten linear devices over each other.
def _stack(mapper: Mapper, name: str, leg: str):
    for number in range(1, DEPTH + 1):
        device = _device(mapper, f"{name}{number}", linear_table(leg, SIZE))
        leg = device.name
    return device
