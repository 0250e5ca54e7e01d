"""Arrays of Linux MD: what mdadm and the kernel make is used by dmpy, and the other way round.

mdadm makes an array of every level and layout, with every version of superblocks, and fills it;
some lose members, of some the power is cut while they are written. A program that knows only where
the layouts put things reads all data from the members. dmpy assembles copies of these arrays,
writes them and makes arrays of its own; mdadm examines all of them, the kernel assembles them,
compares, checks, and writes again; and dmpy reads that.

The tests share two boots.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import dmpy
from dmpy.formats import md_superblock
from dmpy.maths import parity
from dmpy.md.assemble import assemble, open_disks, table_text
from dmpy.md.create import Recipe, create, layout_number
from tests import needs
from tests.kernel import guest
from tests.kernel.array_steps import BLOCK, block, content

pytestmark = pytest.mark.kernel

SECTOR_SIZE = 512
# Of each member; raid0 can have members of several sizes.
MEMBER_SECTORS = 1280
CHUNK = 8 << 10
MODULES = ["dm-mod", "raid0", "raid1", "raid10", "raid456"]
# The first minor of an array; mdadm would rather count down from 127.
_FIRST = 0


class Array(NamedTuple):
    """An array of the tests.

    Attributes:
        level: md's number.
        devices: how many members.
        layout: mdadm's word, "" where there is none.
        metadata: version of the superblocks.
        bitmap: it has a write-intent bitmap.
        lost: places of members that it loses after it was filled.
        dirty: the power is cut while it is written.
        unequal: its members are of several sizes.
        ours: dmpy makes it.
    """

    level: int
    devices: int
    layout: str = ""
    metadata: str = "1.2"
    bitmap: bool = False
    lost: tuple[int, ...] = ()
    dirty: bool = False
    unequal: bool = False
    ours: bool = False

    @property
    def name(self) -> str:
        words = [f"raid{self.level}", str(self.devices), self.layout, self.metadata]
        words += [f"lost{place}" for place in self.lost]
        for word in ("bitmap", "dirty", "unequal", "ours"):
            words += [word] if getattr(self, word) else []
        return "-".join(filter(None, words))

    def member(self, place: int) -> str:
        """Return what the device of a place is called."""
        return f"{self.name}.{place}"

    def sectors(self, place: int) -> int:
        return MEMBER_SECTORS - 256 * place if self.unequal else MEMBER_SECTORS

    def members(self) -> list[str]:
        return [f"/dev/mapper/{self.member(place)}" for place in range(self.devices)]

    def left(self) -> list[str]:
        """Return the members that are not lost."""
        return [word for place, word in enumerate(self.members()) if place not in self.lost]


def _arrays() -> list[Array]:
    arrays = [
        Array(0, 3),
        Array(0, 4, metadata="1.0"),
        Array(0, 3, "original", unequal=True),
        Array(0, 3, "alternate", unequal=True),
        Array(1, 2, metadata="0.90"),
        Array(1, 3, bitmap=True),
        Array(4, 4, metadata="1.1"),
    ]
    raid5 = ["left-symmetric", "right-symmetric", "left-asymmetric", "right-asymmetric"]
    raid5 += ["parity-first", "parity-last", "ddf-zero-restart", "ddf-N-restart", "ddf-N-continue"]
    raid6 = [*raid5, *(f"{word}-6" for word in [*raid5[:4], "parity-first"])]
    versions = ("1.2", "1.0", "1.1", "0.90")
    for index, layout in enumerate(raid5):
        arrays.append(Array(5, 3 + index % 3, layout, versions[index % 4]))
    for index, layout in enumerate(raid6):
        arrays.append(Array(6, 4 + index % 3, layout, versions[index % 4]))
    for devices, layout in ((4, "n2"), (3, "n2"), (5, "n3"), (4, "f2"), (5, "f2"), (3, "o2")):
        arrays.append(Array(10, devices, layout))
    arrays += [Array(10, 5, "o3", bitmap=True), Array(10, 6, "f3", "1.0")]
    return arrays


WHOLE = _arrays()
DEGRADED = [
    Array(1, 3, bitmap=True, lost=(0,)),
    Array(4, 4, lost=(3,)),
    Array(5, 4, "left-symmetric", "0.90", lost=(1,)),
    Array(5, 5, "right-asymmetric", "1.0", True, (4,)),
    Array(6, 5, "ddf-N-continue", lost=(0, 2)),
    Array(6, 5, "left-symmetric", "1.1", True, (1, 3)),
    Array(6, 6, "right-asymmetric-6", lost=(5,)),
    Array(10, 4, "n2", bitmap=True, lost=(0, 3)),
    Array(10, 5, "f2", lost=(2,)),
]
DIRTY = [
    Array(1, 2, bitmap=True, dirty=True),
    Array(1, 3, metadata="0.90", dirty=True),
    Array(4, 3, dirty=True),
    Array(5, 4, "left-symmetric", bitmap=True, dirty=True),
    Array(5, 5, "left-asymmetric", "1.0", dirty=True),
    Array(6, 5, "left-symmetric", "1.1", True, dirty=True),
    Array(6, 4, "ddf-zero-restart", dirty=True),
    Array(10, 4, "n2", bitmap=True, dirty=True),
    Array(10, 5, "o2", dirty=True),
]
ALL = WHOLE + DEGRADED + DIRTY
# Arrays that dmpy makes, and that are as they were in the middle of a write.
CRASHED = [one._replace(ours=True) for one in DIRTY[::2]]
# Who brings the lost members back.
ADDED_BY_DMPY, ADDED_BY_KERNEL = DEGRADED[::2], DEGRADED[1::2]
OURS = [
    Array(0, 3, ours=True),
    Array(1, 2, metadata="0.90", ours=True),
    Array(1, 3, bitmap=True, ours=True),
    Array(4, 4, metadata="1.0", ours=True),
    Array(5, 3, "left-symmetric", ours=True),
    Array(5, 4, "right-asymmetric", "0.90", ours=True),
    Array(5, 5, "parity-first", "1.1", True, ours=True),
    Array(6, 4, "left-symmetric", "1.2", True, ours=True),
    Array(6, 5, "ddf-N-restart", "1.0", ours=True),
    Array(6, 6, "left-asymmetric-6", ours=True),
    Array(10, 4, "n2", "1.2", True, ours=True),
    Array(10, 5, "f2", ours=True),
    Array(10, 3, "o2", "1.0", ours=True),
]


def _node(arrays: list[Array], one: Array) -> str:
    return f"/dev/md{_FIRST + arrays.index(one)}"


def _places(arrays: list[Array]) -> dict[tuple[str, int], int]:
    # The sector of the disk at which each member of each array begins.
    found, sector = {}, 0
    for one in arrays:
        for place in range(one.devices):
            found[one.name, place] = sector
            sector += MEMBER_SECTORS
    return found


def _disk_size(arrays: list[Array]) -> int:
    return sum(one.devices for one in arrays) * MEMBER_SECTORS * SECTOR_SIZE


def _slices(arrays: list[Array], disk: str) -> dict[str, str]:
    places = _places(arrays)
    return {
        one.member(place): f"0 {one.sectors(place)} linear {disk} {places[one.name, place]}"
        for one in arrays
        for place in range(one.devices)
    }


def _seed(one: Array, times: int) -> int:
    # What an array is filled with for the first, second ... time.
    return int.from_bytes(hashlib.sha256(f"{one.name} {times}".encode()).digest()[:4], "little")


# A degraded array is overwritten here after it has lost members.
_OVER_OFFSET, _OVER_LENGTH = 24 << 10, 100 << 10


def _over(one: Array) -> list[int]:
    return [_OVER_OFFSET, _seed(one, 9), _OVER_LENGTH]


def _as_filled(one: Array, size: int) -> bytes:
    data = bytearray(content(_seed(one, 1), size))
    if one.lost:
        data[_OVER_OFFSET : _OVER_OFFSET + _OVER_LENGTH] = content(_seed(one, 9), _OVER_LENGTH)
    return bytes(data)


def _make(arrays: list[Array], one: Array) -> list:
    words = ["mdadm", "--create", _node(arrays, one), "--run", "--assume-clean", "--force"]
    words += [f"--level={one.level}", f"--raid-devices={one.devices}"]
    words += [f"--metadata={one.metadata}"]
    words += [f"--layout={one.layout}"] if one.layout else []
    words += [f"--chunk={CHUNK >> 10}"] if one.level != 1 else []
    words += ["--bitmap=internal", "--bitmap-chunk=64K"] if one.bitmap else []
    words += ["--bitmap=none"] if one.level and not one.bitmap else []
    words += ["--data-offset=128K"] if one.metadata in ("1.1", "1.2") else []
    return ["run", [*words, *one.members()]]


def _assemble(arrays: list[Array], one: Array, members: list[str]) -> list:
    return ["try", ["mdadm", "--assemble", "--run", _node(arrays, one), *members]]


_STOP = ["run", ["mdadm", "--stop", "--scan"]]


def _do_in_guest(folder: Path, disks: list[Path], steps: list[list]) -> list:
    folder.mkdir()
    steps = [[verb, *(rest[0] if verb in ("run", "try") else rest)] for verb, *rest in steps]
    (folder / "plan").write_text(json.dumps(steps))
    shutil.copy(Path(__file__).with_name("array_steps.py"), folder)
    result = guest.run(
        "/usr/bin/python3 -I array_steps.py plan answers",
        folder,
        disks=disks,
        modules=MODULES,
        memory="768M",
        seconds=70,
    )
    if result.status:
        pytest.fail(f"guest ended with {result.status}: {result.output[-3000:]}", pytrace=False)
    print(f"{folder.name}: {result.seconds:.1f} s")
    return json.loads(result.read("answers"))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Let mdadm and the kernel make all arrays; returns the disk."""
    needs.tool(guest.KERNEL, package="user-mode-linux")
    needs.tool("mdadm", package="mdadm")
    folder = tmp_path_factory.mktemp("md")
    disk = folder / "made.img"
    with disk.open("wb") as file:
        file.truncate(_disk_size(ALL))
    whole = WHOLE + DEGRADED
    steps = [
        ["create", _slices(ALL, guest.ubd(0))],
        *(_make(ALL, one) for one in whole),
        *(["fill", _node(ALL, one), _seed(one, 1)] for one in whole),
        _STOP,
        *(_assemble(ALL, one, one.left()) for one in DEGRADED),
        *(["write", _node(ALL, one), *_over(one)] for one in DEGRADED),
        _STOP,
        *(_make(ALL, one) for one in DIRTY),
        *(["fill", _node(ALL, one), _seed(one, 1)] for one in DIRTY),
        ["scribble", [_node(ALL, one) for one in DIRTY], 1],
        ["sleep", 0.5],
        ["cut"],
    ]
    _do_in_guest(folder / "make", [disk], steps)
    return disk


class _Opened:
    """An array of a disk, opened by dmpy."""

    def __init__(self, arrays: list[Array], image: Path) -> None:
        self.mapper = dmpy.Mapper()
        for name, table in _slices(arrays, str(image)).items():
            self.mapper.create(name, table)

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *exception: object) -> None:
        self.mapper.close()

    def legs(self, one: Array, *, shuffled: bool = True, whole: bool = False) -> list:
        """Return the members that are not lost, or all, in another order than theirs."""
        words = [Path(word).name for word in (one.members() if whole else one.left())]
        if shuffled:
            random.Random(_seed(one, 0)).shuffle(words)
        return [self.mapper.device(word) for word in words]

    def open(self, one: Array, *, whole: bool = False):
        """Return the array as a mapped device, of the members that are not lost or of all."""
        disks = open_disks(self.legs(one, whole=whole))
        text = table_text(assemble(disks), lambda disk: f"/dev/mapper/{disk.name}")
        return self.mapper.create(one.name, text)

    def open_with_lost(self, one: Array):
        """Return the array as a mapped device whose table names the lost members too."""
        text = table_text(
            assemble(open_disks(self.legs(one))), lambda disk: f"/dev/mapper/{disk.name}"
        )
        words = text.split()
        words[4] = str(int(words[4]) + len(one.lost))
        words += [one.members()[place] for place in one.lost]
        return self.mapper.create(one.name, " ".join(words))

    def close(self, one: Array) -> None:
        self.mapper.suspend(one.name)
        self.mapper.remove(one.name)


@pytest.mark.parametrize("one", WHOLE, ids=lambda one: one.name)
def test_layout_is_where_the_kernel_put_the_data(made, one):
    with _Opened(ALL, made) as opened:
        found = assemble(open_disks(opened.legs(one)))
        members = []
        for disk, leg in zip(found.slots, opened.legs(one, shuffled=False), strict=True):
            data = bytearray(leg.size - disk.data_offset)
            leg.preadv([memoryview(data)], disk.data_offset)
            members.append(np.frombuffer(data, np.uint8))
    geometry = found.geometry
    data = np.frombuffer(content(_seed(one, 1), geometry.size), np.uint8)
    if geometry.level.parity == 0:
        done = 0
        for copies in geometry.copies(0, geometry.size):
            for member, offset, length in copies:
                there = members[member][offset : offset + length]
                expected = data[done : done + length]
                assert np.array_equal(there, expected), f"byte {done} on member {member}"
            done += length
        return
    for row in range(geometry.rows):
        chunks = [member[row * CHUNK : (row + 1) * CHUNK] for member in members]
        stripe = geometry.stripe(row)
        for index, member in enumerate(stripe.data):
            number = row * geometry.data_members + index
            expected = data[number * CHUNK : (number + 1) * CHUNK]
            assert np.array_equal(chunks[member], expected), f"chunk {number}"
        p = np.empty(CHUNK, np.uint8)
        q = None if stripe.q is None else np.empty(CHUNK, np.uint8)
        parity.pq([None if m is None else chunks[m] for m in stripe.syndrome], p, q)
        assert np.array_equal(p, chunks[stripe.p]), f"P of row {row}"
        if stripe.q is not None:
            assert np.array_equal(q, chunks[stripe.q]), f"Q of row {row}"


@pytest.mark.parametrize("one", DIRTY, ids=lambda one: one.name)
def test_power_is_cut_while_members_may_disagree(made, one):
    with _Opened(ALL, made) as opened:
        found = assemble(open_disks(opened.legs(one)))
    dirty = bool(found.bits.data.any()) if one.bitmap else found.resync_offset is not None
    assert dirty


def _read(device) -> bytes:
    data = bytearray(device.size)
    device.preadv([memoryview(data)], 0)
    return bytes(data)


# Words of the status of an md line.
_HEALTH, _ACTION, _MISMATCHES = 7, 9, 10


def _wait_idle(device, seconds: float = 20.0) -> list[str]:
    end = time.monotonic() + seconds
    while True:
        words = device.status_text().split()
        if words[_ACTION] == "idle":
            return words
        assert time.monotonic() < end, f"not idle after {seconds} s: {' '.join(words)}"
        time.sleep(0.01)


def _write_here_and_there(device, data: bytearray, seed: int) -> None:
    # Small and large, aligned and not, so that all ways to bring parity up to date are taken.
    rng = random.Random(seed)
    sectors = device.size // SECTOR_SIZE
    for _ in range(40):
        length = min(rng.choice((1, 3, 8, 17, 64, 200)), sectors)
        offset = rng.randrange(sectors - length + 1) * SECTOR_SIZE
        new = rng.randbytes(length * SECTOR_SIZE)
        device.pwritev([memoryview(new)], offset)
        data[offset : offset + len(new)] = new


def _as_it_was(one: Array, found: bytes) -> str:
    # What is wrong with the first bytes that we read of an array of the kernel's.
    expected = _as_filled(one, len(found))
    for offset in range(0, len(found), BLOCK):
        piece = found[offset : offset + BLOCK]
        written = one.dirty and piece == block(1 + DIRTY.index(one), offset // BLOCK)
        if not written and piece != expected[offset : offset + BLOCK]:
            return f"byte {offset} and on differ"
    return ""


@dataclass
class Ours:
    """What dmpy did.

    Attributes:
        disk: a copy of what the kernel made, opened and written by dmpy.
        made: a disk with OURS.
        crashed: a disk with CRASHED.
        data: what is in each array at last, by name.
        wrong: what went wrong, by name of the array.
    """

    disk: Path
    made: Path
    crashed: Path
    data: dict[str, bytes] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)


def _recipe(one: Array) -> Recipe:
    return Recipe(
        one.level,
        layout=layout_number(one.level, one.layout or None),
        chunk_size=0 if one.level == 1 else CHUNK,
        version=one.metadata,
        data_offset=256 if one.metadata in ("1.1", "1.2") else None,
        bitmap=one.bitmap,
        bitmap_chunk=64 << 10 if one.bitmap else 0,
        name=one.name,
    )


# What is being written when an array crashes.
_TORN_OFFSET, _TORN_LENGTH = 64 << 10, 12 << 10


def _tear(opened: _Opened, one: Array, place: int) -> None:
    # Damage what makes an array redundant at `place` bytes: P, or the second copy.
    found = assemble(open_disks(opened.legs(one)))
    geometry = found.geometry
    if geometry.level.parity:
        row, _ = geometry.locate(place // CHUNK)
        member, offset = geometry.stripe(row).p, row * CHUNK
    else:
        member, offset, _ = geometry.copies(place, BLOCK)[0][1]
    offset += found.slots[member].data_offset
    leg = opened.mapper.device(one.member(member))
    leg.pwritev([memoryview(b"torn" * (BLOCK // 4))], offset)


def _dirty_place(opened: _Opened, one: Array) -> int:
    # A byte of the array that the superblocks say was being written.
    found = assemble(open_disks(opened.legs(one)))
    if not one.bitmap:
        return 0
    bits = np.unpackbits(found.bits.data, bitorder="little")
    region = int(bits.nonzero()[0][-1])
    place = region * found.bitmap.chunksize
    return place * found.geometry.data_members if found.geometry.level.parity else place


def _crash(found: Ours) -> None:
    # Make CRASHED and write to them; what counts is the disk in the middle of that.
    disk = found.crashed.with_suffix(".running")
    with disk.open("wb") as file:
        file.truncate(_disk_size(CRASHED))
    with _Opened(CRASHED, disk) as opened:
        for one in CRASHED:
            create(opened.legs(one, shuffled=False), [], _recipe(one))
            device = opened.open(one)
            data = bytearray(content(_seed(one, 1), device.size))
            device.pwritev([memoryview(data)], 0)
            _wait_idle(device)
            opened.mapper.suspend(one.name)
            opened.mapper.resume(one.name)
            new = content(_seed(one, 5), _TORN_LENGTH)
            device.pwritev([memoryview(new)], _TORN_OFFSET)
            data[_TORN_OFFSET : _TORN_OFFSET + _TORN_LENGTH] = new
            found.data[one.name] = bytes(data)
        shutil.copy(disk, found.crashed)
    with _Opened(CRASHED, found.crashed) as opened:
        for one in CRASHED:
            _tear(opened, one, _TORN_OFFSET)


def _add(opened: _Opened, one: Array, data: bytes) -> None:
    # Bring the lost members back, check, close.
    device = opened.open_with_lost(one)
    try:
        for place in one.lost:
            word = opened.mapper.device(one.member(place)).table_name
            opened.mapper.message(one.name, 0, f"add {word} force")
        assert _read(device) == data, "reads otherwise with members to be rebuilt"
        # A spare takes its place a moment later.
        end = time.monotonic() + 20
        while (status := _wait_idle(device))[_HEALTH] != "U" * one.devices:
            assert time.monotonic() < end, " ".join(status)
            time.sleep(0.01)
        opened.mapper.message(one.name, 0, "check")
        status = _wait_idle(device)
        assert status[_MISMATCHES] == "0", " ".join(status)
        assert _read(device) == data, "reads otherwise when it is rebuilt"
    finally:
        opened.close(one)


def _use(opened: _Opened, one: Array, found: Ours) -> None:
    # Make or open an array, compare, write, check, close.
    if one.ours:
        create(opened.legs(one, shuffled=False), [], _recipe(one))
    device = opened.open(one)
    try:
        if one.ours:
            data = bytearray(content(_seed(one, 1), device.size))
            device.pwritev([memoryview(data)], 0)
        else:
            first = _read(device)
            _wait_idle(device)
            data = bytearray(_read(device))
            assert one.dirty or first == data, "reads otherwise when it is idle"
            problem = _as_it_was(one, data)
            assert not problem, f"as the kernel left it: {problem}"
        _write_here_and_there(device, data, _seed(one, 3))
        assert _read(device) == data, "reads otherwise than what was written"
        found.data[one.name] = bytes(data)
        if one.level and (not one.ours or one.devices % 2):
            _wait_idle(device)
            opened.mapper.message(one.name, 0, "check")
            status = _wait_idle(device)
            assert status[_MISMATCHES] == "0", " ".join(status)
        assert _read(device) == data, "reads otherwise at last"
    finally:
        opened.close(one)


@pytest.fixture(scope="module")
def ours(made) -> Ours:
    """Let dmpy use what the kernel made, and make the same."""
    names = ("used.img", "ours.img", "crashed.img")
    found = Ours(*(made.with_name(name) for name in names))
    shutil.copy(made, found.disk)
    with found.made.open("wb") as file:
        file.truncate(_disk_size(OURS))
    begin = time.monotonic()
    for arrays, image in ((ALL, found.disk), (OURS, found.made)):
        with _Opened(arrays, image) as opened:
            for one in arrays:
                try:
                    if one.dirty:
                        _tear(opened, one, _dirty_place(opened, one))
                    _use(opened, one, found)
                    if one in ADDED_BY_DMPY:
                        _add(opened, one, found.data[one.name])
                except (AssertionError, ValueError, OSError) as error:
                    found.wrong[one.name] = f"{type(error).__name__}: {error}"
    _crash(found)
    print(f"dmpy: {time.monotonic() - begin:.1f} s")
    return found


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.name)
def test_array_of_the_kernel_is_read_and_written(ours, one):
    assert ours.wrong.get(one.name) is None


@pytest.mark.parametrize("one", OURS, ids=lambda one: one.name)
def test_array_is_made_and_written(ours, one):
    assert ours.wrong.get(one.name) is None


@dataclass
class Judged:
    """What mdadm and the kernel say of what dmpy left, by name of the array.

    Attributes:
        assembled: exit status and words of mdadm --assemble.
        examined: what mdadm --examine says of the first member that is not lost.
        states: what /proc/mdstat says of the members when it is idle: U or _ for each.
        at_last: the same at last.
        digest: of its data.
        mismatches: what a check found; not for RAID 0.
        last: what a check found after the kernel had written the array whole.
    """

    assembled: dict[str, list] = field(default_factory=dict)
    examined: dict[str, str] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    at_last: dict[str, str] = field(default_factory=dict)
    digest: dict[str, str] = field(default_factory=dict)
    mismatches: dict[str, int] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)


def _members(one: Array) -> list[str]:
    # The members that an array has when the kernel sees it again.
    return one.members() if one in ADDED_BY_DMPY else one.left()


def _judge_steps(arrays: list[Array], disk: str) -> list[list]:
    nodes = [_node(arrays, one) for one in arrays]
    added = [
        ["run", ["mdadm", _node(arrays, one), "--add", *(one.members()[at] for at in one.lost)]]
        for one in arrays
        if one in ADDED_BY_KERNEL
    ]
    return [
        ["create", _slices(arrays, disk)],
        ["try", ["mdadm", "--examine", *(one.left()[0] for one in arrays)]],
        *(_assemble(arrays, one, _members(one)) for one in arrays),
        ["sysfs", nodes, "array_state", "active"],
        ["idle", nodes],
        ["run", ["cat", "/proc/mdstat"]],
        *(["digest", node] for node in nodes),
        ["sysfs", nodes, "sync_action", "check"],
        ["idle", nodes],
        *(["fill", node, _seed(one, 2)] for node, one in zip(nodes, arrays, strict=True)),
        *added,
        ["sleep", 0.2 if added else 0],
        ["idle", nodes],
        ["sysfs", nodes, "sync_action", "check"],
        ["idle", nodes],
        ["run", ["cat", "/proc/mdstat"]],
        _STOP,
        ["run", ["dmsetup", "remove_all"]],
    ]


def _examined(arrays: list[Array], output: str) -> dict[str, str]:
    # What is said of each device comes behind a line with its name and a colon.
    found: dict[str, str] = {}
    by_line = {f"{one.left()[0]}:": one.name for one in arrays}
    name = ""
    for line in output.splitlines():
        name = by_line.get(line, name)
        found[name] = found.get(name, "") + line + "\n"
    return found


def _mdstat(text: str) -> dict[str, str]:
    # The states of the members by node; RAID 0 has none.
    found, node = {}, ""
    for line in text.splitlines():
        if line.startswith("md"):
            node = f"/dev/{line.split()[0]}"
        elif states := re.search(r"\[([U_]+)\]", line):
            found[node] = states[1]
    return found


@pytest.fixture(scope="module")
def judged(ours) -> Judged:
    """Let mdadm and the kernel open all that dmpy has used and made."""
    parts = (ALL, guest.ubd(0)), (OURS, guest.ubd(1)), (CRASHED, guest.ubd(2))
    disks = [ours.disk, ours.made, ours.crashed]
    steps = [_judge_steps(*part) for part in parts]
    answers = _do_in_guest(ours.disk.with_name("judge"), disks, sum(steps, []))
    found = Judged()
    for (arrays, _), own in zip(parts, steps, strict=True):
        mine, answers = answers[: len(own)], answers[len(own) :]
        names = [one.name for one in arrays]
        count = len(names)
        by_node = {_node(arrays, one): one.name for one in arrays}
        found.examined.update(_examined(arrays, mine[1][1]))
        found.assembled.update(zip(names, mine[2 : 2 + count], strict=True))
        rest = mine[4 + count :]
        found.states.update(
            {by_node[node]: states for node, states in _mdstat(rest[0][1]).items()}
        )
        found.digest.update(zip(names, rest[1 : 1 + count], strict=True))
        found.at_last.update(
            {by_node[node]: states for node, states in _mdstat(rest[-3][1]).items()}
        )
        checks = rest[2 + count], rest[-4]
        for target, check in zip((found.mismatches, found.last), checks, strict=True):
            target.update({by_node[node]: number for node, number in check.items()})
    return found


_BOTH = pytest.mark.parametrize("one", ALL + OURS + CRASHED, ids=lambda one: one.name)
_CHECKED = pytest.mark.parametrize(
    "one", [one for one in ALL + OURS + CRASHED if one.level], ids=lambda one: one.name
)


def _here(one: Array, ours: Ours, judged: Judged) -> None:
    # Say why there is nothing to be compared.
    if one.name in ours.wrong:
        pytest.fail(f"dmpy could not use it: {ours.wrong[one.name]}", pytrace=False)
    status, output = judged.assembled[one.name]
    if status:
        pytest.fail(f"mdadm --assemble ends with {status}: {output}", pytrace=False)


@_BOTH
def test_mdadm_examines_what_dmpy_left(judged, ours, one):
    output = judged.examined[one.name]
    assert "correct" in output
    assert f"Raid Devices : {one.devices}" in output


@_CHECKED
def test_kernel_has_every_member_in_sync(judged, ours, one):
    _here(one, ours, judged)
    there = _members(one)
    expected = "".join("U" if member in there else "_" for member in one.members())
    assert judged.states[one.name] == expected
    assert judged.at_last[one.name] == "U" * one.devices


@_BOTH
def test_kernel_finds_the_data_that_dmpy_wrote(judged, ours, one):
    _here(one, ours, judged)
    assert judged.digest[one.name] == hashlib.sha256(ours.data[one.name]).hexdigest()


@_CHECKED
def test_kernel_finds_no_mismatch_in_what_dmpy_left(judged, ours, one):
    _here(one, ours, judged)
    assert (judged.mismatches[one.name], judged.last[one.name]) == (0, 0)


@pytest.fixture(scope="module")
def again(judged, ours) -> dict[str, str]:
    """Read once more by dmpy what the kernel wrote last: what is wrong."""
    found = {}
    for arrays, image in ((ALL, ours.disk), (OURS, ours.made), (CRASHED, ours.crashed)):
        with _Opened(arrays, image) as opened:
            for one in arrays:
                try:
                    device = opened.open(one, whole=True)
                    same = _read(device) == content(_seed(one, 2), device.size)
                    found[one.name] = "" if same else "the data differ"
                    opened.close(one)
                except (ValueError, OSError) as error:
                    found[one.name] = str(error)
    return found


@_BOTH
def test_dmpy_finds_what_the_kernel_wrote_last(again, judged, ours, one):
    _here(one, ours, judged)
    assert again[one.name] == ""


def test_versions_are_all_there():
    assert {one.metadata for one in ALL} == set(md_superblock.VERSIONS)
