"""Sets of the kernel's dm-raid and of ours, on the same disks, in both directions.

The kernel makes sets of every type: some are stopped in order, some lose devices, and of some the
power is cut while they are written. A program that knows only where the layouts put things reads
all data from the devices. dmpy opens copies of the same sets, writes and closes them, and makes
sets of its own; then the kernel opens all these, compares, checks all parity and copies, and writes
again; and dmpy reads that.

In a second's boot there is time for all sets, so the tests share two boots.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import dmpy
from dmpy.maths import parity
from dmpy.raid.levels import LEVELS, Geometry
from tests import needs
from tests.kernel import guest
from tests.kernel.array_steps import BLOCK, block, content

pytestmark = pytest.mark.kernel

SECTOR_SIZE = 512
# Of each metadata and each data device.
META_SECTORS = 64
DATA_SECTORS = 512
MODULES = ["dm-mod", "raid0", "raid1", "raid10", "raid456", "dm-raid"]


class Set(NamedTuple):
    """A RAID set of the tests.

    Attributes:
        type: dm-raid's word.
        devices: how many.
        chunk: sectors.
        copies: raid10: copies of everything.
        format: raid10: near, far or offset.
        near_sets: raid10: far copies rotate among all devices.
        params: parameters besides those.
        lost: places of devices that it loses after it was filled.
        dirty: the power is cut while it is written.
        ours: dmpy makes it.
    """

    type: str
    devices: int
    chunk: int
    copies: int = 1
    format: str = ""
    near_sets: bool = False
    params: str = ""
    lost: tuple[int, ...] = ()
    dirty: bool = False
    ours: bool = False

    @property
    def name(self) -> str:
        words = [self.type, str(self.devices), str(self.chunk)]
        words += [f"{self.format}{self.copies}"] if self.format else []
        words += ["nearsets"] if self.near_sets else []
        words += [f"lost{place}" for place in self.lost]
        words += ["dirty"] if self.dirty else []
        words += ["ours"] if self.ours else []
        return "-".join(words)

    @property
    def rows(self) -> int:
        """Chunks of each device that are used."""
        rows = DATA_SECTORS // self.chunk
        return rows - rows % self.copies

    @property
    def sectors(self) -> int:
        """Length of the set."""
        parity_devices = LEVELS[self.type].parity
        if self.type == "raid1":
            return DATA_SECTORS
        return self.rows * (self.devices - parity_devices) // self.copies * self.chunk

    @property
    def size(self) -> int:
        return self.sectors * SECTOR_SIZE

    @property
    def redundant(self) -> bool:
        return self.type != "raid0"

    @property
    def geometry(self) -> Geometry:
        found = {"near": self.copies} if self.format == "near" else {}
        if self.format in ("far", "offset"):
            found = {"far": self.copies, "far_offset": self.format == "offset"}
            found["far_sets"] = 0 if self.near_sets else 2
        return Geometry(
            LEVELS[self.type],
            self.devices,
            self.chunk * SECTOR_SIZE,
            member_size=(DATA_SECTORS if self.type == "raid1" else self.rows * self.chunk)
            * SECTOR_SIZE,
            **found,
        )

    def node(self) -> str:
        return f"/dev/mapper/{self.name}"

    def table(self, without: Iterable[int] = (), rebuild: Iterable[int] = ()) -> str:
        """Return its table, with `- -` in place of some devices, and others to be rebuilt."""
        params = [str(0 if self.type == "raid1" else self.chunk)]
        if self.format:
            params += ["raid10_copies", str(self.copies), "raid10_format", self.format]
        params += ["raid10_use_near_sets"] if self.near_sets else []
        params += self.params.split()
        for place in rebuild:
            params += ["rebuild", str(place)]
        pairs = [
            "- -" if place in without else f"{self.node()}-m{place} {self.node()}-d{place}"
            for place in range(self.devices)
        ]
        return (
            f"0 {self.sectors} raid {self.type} {len(params)} {' '.join(params)} "
            f"{self.devices} {' '.join(pairs)}"
        )


def _sets() -> list[Set]:
    sets = [
        Set("raid0", 2, 8),
        Set("raid0", 5, 16),
        Set("raid1", 2, 8),
        Set("raid1", 3, 8, params="region_size 32"),
        Set("raid4", 4, 16),
        Set("raid5_ls", 2, 8),
        Set("raid5_ls", 3, 64),
    ]
    sets += [Set(f"raid5_{word}", 5, 8) for word in ("n", "la", "ra", "ls", "rs")]
    raid6 = ("zr", "nr", "nc", "n_6", "la_6", "ra_6", "ls_6", "rs_6")
    sets += [Set(f"raid6_{word}", 5 + index % 2, 8) for index, word in enumerate(raid6)]
    sets += [Set("raid6_zr", 4, 32), Set("raid6_nc", 6, 16), Set("raid6_nr", 6, 16)]
    for devices, copies in ((2, 2), (3, 2), (4, 2), (5, 3), (6, 3)):
        sets.append(Set("raid10", devices, 8, copies, "near"))
    for devices, copies in ((2, 2), (3, 2), (4, 2), (5, 2), (5, 3), (6, 3)):
        sets.append(Set("raid10", devices, 8, copies, "far"))
        sets.append(Set("raid10", devices, 8, copies, "offset"))
    return sets


_REGIONS = "region_size 32"
SETS = _sets()
# Of these only the layout is compared: they are not for the raid target.
NEAR_SETS = [Set("raid10", 5, 8, 2, "far", True), Set("raid10", 5, 8, 3, "offset", True)]
DEGRADED = [
    Set("raid1", 3, 8, lost=(0,), params=_REGIONS),
    Set("raid4", 4, 8, lost=(0,)),
    Set("raid4", 4, 8, lost=(2,), params=_REGIONS),
    Set("raid5_ls", 4, 8, lost=(1,), params=_REGIONS),
    Set("raid5_ra", 5, 16, lost=(4,)),
    Set("raid6_zr", 5, 8, lost=(1, 3), params=_REGIONS),
    Set("raid6_nr", 5, 8, lost=(0,)),
    Set("raid6_nc", 5, 8, lost=(0, 4)),
    Set("raid6_ls_6", 5, 8, lost=(2, 4)),
    Set("raid10", 4, 8, 2, "near", lost=(0, 3), params=_REGIONS),
    Set("raid10", 5, 8, 2, "far", lost=(1,)),
    Set("raid10", 5, 8, 3, "offset", lost=(2,)),
]
DIRTY = [
    Set("raid1", 2, 8, dirty=True, params=_REGIONS),
    Set("raid4", 4, 8, dirty=True),
    Set("raid5_ls", 4, 16, dirty=True, params=_REGIONS),
    Set("raid5_la", 3, 64, dirty=True, params="region_size 128"),
    Set("raid6_nc", 5, 8, dirty=True, params=_REGIONS),
    Set("raid10", 4, 8, 2, "near", dirty=True, params=_REGIONS),
    Set("raid10", 5, 8, 2, "offset", dirty=True),
]
# Who brings the lost devices back.
REBUILT_BY_DMPY, REBUILT_BY_KERNEL = DEGRADED[::2], DEGRADED[1::2]
ALL = SETS + DEGRADED + DIRTY
MADE = ALL + NEAR_SETS
# Sets that dmpy makes; some stop before they are synced.
OURS = [
    one._replace(ours=True)
    for one in SETS
    if one.devices in (3, 5) or one.name in ("raid1-2-8", "raid4-4-16", "raid6_nc-6-16")
]


def _places(sets: list[Set]) -> dict[tuple[str, int], int]:
    # The sector of the disk at which each device of each set has its metadata; the data follow.
    found, sector = {}, 0
    for one in sets:
        for place in range(one.devices):
            found[one.name, place] = sector
            sector += META_SECTORS + DATA_SECTORS
    return found


def _disk_size(sets: list[Set]) -> int:
    return sum(one.devices for one in sets) * (META_SECTORS + DATA_SECTORS) * SECTOR_SIZE


def _slices(sets: list[Set], disk: str) -> dict[str, str]:
    # The devices that the sets lie on: name and table.
    found = {}
    for (name, place), sector in _places(sets).items():
        found[f"{name}-m{place}"] = f"0 {META_SECTORS} linear {disk} {sector}"
        found[f"{name}-d{place}"] = f"0 {DATA_SECTORS} linear {disk} {sector + META_SECTORS}"
    return found


def _seed(one: Set, times: int) -> int:
    # What a set is filled with for the first, second ... time.
    return int.from_bytes(hashlib.sha256(f"{one.name} {times}".encode()).digest()[:4], "little")


def _first(one: Set) -> bytes:
    return content(_seed(one, 1), one.size)


def _sha(data: bytes | bytearray | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


# A degraded set is overwritten here after it has lost devices.
_OVER_OFFSET, _OVER_LENGTH = 24 << 10, 100 << 10


def _overwritten(one: Set) -> bytes:
    data = bytearray(_first(one))
    data[_OVER_OFFSET : _OVER_OFFSET + _OVER_LENGTH] = content(_seed(one, 9), _OVER_LENGTH)
    return bytes(data)


def _remove(sets: list[Set]) -> list:
    return ["run", ["dmsetup", "remove", *(one.name for one in sets)]]


def _create(tables: dict[str, str]) -> list:
    return ["create", tables]


def _scrub(sets: list[Set]) -> list:
    return ["scrub", [one.name for one in sets if one.redundant]]


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
        memory="512M",
        seconds=60,
    )
    if result.status:
        pytest.fail(f"guest ended with {result.status}: {result.output[-3000:]}", pytrace=False)
    answers = json.loads(result.read("answers"))
    print(f"{folder.name}: {result.seconds:.1f} s")
    return answers


@dataclass
class Made:
    """What the kernel made.

    Attributes:
        disk: with all of MADE, as the kernel left it.
        scrubbed: status of the sets by name, after a check of each.
    """

    disk: Path
    scrubbed: dict[str, str]

    def data(self, one: Set, place: int) -> np.ndarray:
        """Return all bytes of a data device."""
        sector = _places(MADE)[one.name, place] + META_SECTORS
        return np.fromfile(
            self.disk, np.uint8, DATA_SECTORS * SECTOR_SIZE, offset=sector * SECTOR_SIZE
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    """Let the kernel make all sets."""
    needs.tool(guest.KERNEL, package="user-mode-linux")
    needs.tool("dmsetup", package="dmsetup")
    folder = tmp_path_factory.mktemp("raid")
    disk = folder / "made.img"
    with disk.open("wb") as file:
        file.truncate(_disk_size(MADE))
    whole = SETS + NEAR_SETS + DEGRADED
    steps = [
        _create(_slices(MADE, guest.ubd(0))),
        _create({one.name: one.table() for one in whole}),
        ["settle"],
        *(["fill", one.node(), _seed(one, 1)] for one in whole),
        _scrub(whole),
        _remove(whole),
        _create({one.name: one.table(one.lost) for one in DEGRADED}),
        *(["write", one.node(), _OVER_OFFSET, _seed(one, 9), _OVER_LENGTH] for one in DEGRADED),
        _remove(DEGRADED),
        _create({one.name: one.table() for one in DIRTY}),
        ["settle"],
        *(["fill", one.node(), _seed(one, 1)] for one in DIRTY),
        ["scribble", [one.node() for one in DIRTY], 1],
        ["sleep", 0.5],
        ["cut"],
    ]
    answers = _do_in_guest(folder / "make", [disk], steps)
    return Made(disk, answers[3 + len(whole)])


def _mismatches(status: str) -> int:
    return int(status.split()[8])


@pytest.mark.parametrize("one", SETS + NEAR_SETS, ids=lambda one: one.name)
def test_layout_is_where_the_kernel_put_the_data(made, one):
    geometry = one.geometry
    assert geometry.size == one.size
    members = [made.data(one, place) for place in range(one.devices)]
    data = np.frombuffer(_first(one), np.uint8)
    chunk = one.chunk * SECTOR_SIZE
    if LEVELS[one.type].parity == 0:
        done = 0
        for copies in geometry.copies(0, one.size):
            for member, offset, length in copies:
                expected = data[done : done + length]
                found = members[member][offset : offset + length]
                assert np.array_equal(found, expected), f"byte {done} on device {member}"
            done += length
        assert done == one.size
        return
    for number in range(one.size // chunk):
        row, member = geometry.locate(number)
        found = members[member][row * chunk : (row + 1) * chunk]
        assert np.array_equal(found, data[number * chunk : (number + 1) * chunk]), f"chunk {number}"


@pytest.mark.parametrize(
    "one", [one for one in SETS if LEVELS[one.type].parity], ids=lambda one: one.name
)
def test_parity_is_what_the_kernel_computed(made, one):
    members = [made.data(one, place) for place in range(one.devices)]
    chunk = one.chunk * SECTOR_SIZE
    for row in range(one.rows):
        chunks = [member[row * chunk : (row + 1) * chunk] for member in members]
        stripe = one.geometry.stripe(row)
        data = [None if member is None else chunks[member] for member in stripe.syndrome]
        p = np.empty(chunk, np.uint8)
        q = None if stripe.q is None else np.empty(chunk, np.uint8)
        parity.pq(data, p, q)
        assert np.array_equal(p, chunks[stripe.p]), f"P of row {row}"
        if stripe.q is not None:
            assert np.array_equal(q, chunks[stripe.q]), f"Q of row {row}"


@pytest.mark.parametrize(
    "one", [one for one in DIRTY if one.params], ids=lambda one: one.name
)
def test_power_is_cut_while_regions_are_dirty(made, one):
    with made.disk.open("rb") as file:
        file.seek(_places(MADE)[one.name, 0] * SECTOR_SIZE + 4096 + 256)
        assert any(file.read(64))


def test_sets_of_the_kernel_are_consistent_to_begin_with(made):
    for name, status in made.scrubbed.items():
        assert _mismatches(status) == 0, f"{name}: {status}"


# What a program sees of a set by our means.


def _read(device: dmpy.device.BlockDevice) -> bytes:
    data = bytearray(device.size)
    device.preadv([memoryview(data)], 0)
    return bytes(data)


def _wait_idle(device, seconds: float = 20.0) -> str:
    end = time.monotonic() + seconds
    while True:
        status = device.status_text()
        if status.split()[7] == "idle":
            return status
        assert time.monotonic() < end, f"not idle after {seconds} s: {status}"
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


def _as_it_was(one: Set, found: bytes) -> str:
    # What is wrong with the first bytes that we read of a set of the kernel's.
    expected = _first(one)
    if one.lost:
        expected = _overwritten(one)
    for offset in range(0, one.size, BLOCK):
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
        data: what is in each set at last, by name.
        wrong: what went wrong, by name of the set.
        status: status by name: before anything was done, and at last.
        tables: by name, with devices by the kernel's name of them.
    """

    disk: Path
    made: Path
    data: dict[str, bytes]
    wrong: dict[str, str]
    status: dict[str, tuple[str, str]]
    tables: dict[str, str]


def _rebuild(mapper: dmpy.Mapper, one: Set, data: bytes) -> None:
    # Bring the lost devices back, check, close.
    device = mapper.create(one.name, one.table(rebuild=one.lost))
    try:
        assert _read(device) == data, "reads otherwise with devices to be rebuilt"
        _wait_idle(device)
        mapper.message(one.name, 0, "check")
        status = _wait_idle(device)
        assert status.split()[5] == "A" * one.devices, status
        assert _mismatches(status) == 0, status
        assert _read(device) == data, "reads otherwise when it is rebuilt"
    finally:
        mapper.suspend(one.name)
        mapper.remove(one.name)


def _tear(one: Set, disk: Path) -> None:
    # Damage what makes a set redundant, in a region that was being written when the power was cut.
    geometry, sector = one.geometry, _places(MADE)[one.name, 0]
    region_size = int(one.params.split()[-1]) * SECTOR_SIZE if one.params else one.size
    with disk.open("r+b") as file:
        file.seek(sector * SECTOR_SIZE + 4096 + 256)
        bits = np.unpackbits(np.frombuffer(file.read(16), np.uint8), bitorder="little")
        # Bits are set beyond the last region too.
        synced = one.size if one.type == "raid10" else geometry.member_size
        place = int(bits[: -(-synced // region_size)].nonzero()[0][-1]) * region_size
        if LEVELS[one.type].parity:
            row = place // (one.chunk * SECTOR_SIZE)
            member, offset = geometry.stripe(row).p, row * one.chunk * SECTOR_SIZE
        else:
            member, offset, _ = geometry.copies(place, BLOCK)[0][1]
        sector = _places(MADE)[one.name, member] + META_SECTORS
        file.seek(sector * SECTOR_SIZE + offset)
        file.write(b"torn" * (BLOCK // 4))


def _use(mapper: dmpy.Mapper, one: Set, found: Ours) -> None:
    # Open or make a set, compare, write, check, close.
    device = mapper.create(one.name, one.table(one.lost))
    before = device.status_text()
    try:
        found.tables[one.name] = device.table_text()
        if one.ours:
            first = _first(one)
            device.pwritev([memoryview(first)], 0)
            data = bytearray(first)
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
        status = _wait_idle(device) if not one.ours or one.devices % 2 else device.status_text()
        if one.redundant and status.split()[7] == "idle":
            mapper.message(one.name, 0, "check")
            status = _wait_idle(device)
        found.status[one.name] = (before, status)
        assert _read(device) == data, "reads otherwise at last"
    finally:
        mapper.suspend(one.name)
        mapper.remove(one.name)


@pytest.fixture(scope="module")
def ours(made) -> Ours:
    """Let dmpy use what the kernel made, and make the same."""
    disk = made.disk.with_name("used.img")
    shutil.copy(made.disk, disk)
    own = made.disk.with_name("ours.img")
    with own.open("wb") as file:
        file.truncate(_disk_size(OURS))
    found = Ours(disk, own, {}, {}, {}, {})
    for one in DIRTY:
        _tear(one, disk)
    begin = time.monotonic()
    for sets, image in ((ALL, disk), (OURS, own)):
        with dmpy.Mapper() as mapper:
            for name, table in _slices(sets, str(image)).items():
                mapper.create(name, table)
            for one in sets:
                try:
                    _use(mapper, one, found)
                    if one in REBUILT_BY_DMPY:
                        _rebuild(mapper, one, found.data[one.name])
                except (AssertionError, ValueError, OSError) as error:
                    found.wrong[one.name] = f"{type(error).__name__}: {error}"
    print(f"dmpy: {time.monotonic() - begin:.1f} s")
    return found


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.name)
def test_set_of_the_kernel_is_read_and_written(ours, one):
    assert ours.wrong.get(one.name) is None


@pytest.mark.parametrize("one", OURS, ids=lambda one: one.name)
def test_set_is_made_and_written(ours, one):
    assert ours.wrong.get(one.name) is None


@dataclass
class Judged:
    """What the kernel says of what dmpy left, by name of the set.

    Attributes:
        refused: the kernel's complaint about sets that it does not load.
        first: status when it was opened and idle.
        digest: of its data.
        scrubbed: status after a check.
        last: status after it was written whole and checked again.
        tables: by name.
    """

    refused: dict[str, str]
    first: dict[str, str]
    digest: dict[str, str]
    scrubbed: dict[str, str]
    last: dict[str, str]
    tables: dict[str, str]


def _lost(one: Set) -> tuple[int, ...]:
    # The devices that a set lacks when the kernel sees it again.
    return () if one in REBUILT_BY_DMPY else one.lost


def _judge_steps(sets: list[Set], slices: dict[str, str]) -> list[list]:
    rebuilt = [one for one in sets if one in REBUILT_BY_KERNEL]
    return [
        _create(slices),
        _create({one.name: one.table(_lost(one)) for one in sets}),
        ["settle"],
        ["run", ["dmsetup", "table", "--target", "raid"]],
        *(["digest", one.node()] for one in sets),
        _scrub(sets),
        *(["fill", one.node(), _seed(one, 2)] for one in sets),
        _remove(rebuilt) if rebuilt else ["settle"],
        _create({one.name: one.table(rebuild=one.lost) for one in rebuilt}),
        ["settle"],
        _scrub(sets),
        ["run", ["dmsetup", "remove_all"]],
    ]


@pytest.fixture(scope="module")
def judged(ours) -> Judged:
    """Let the kernel open all that dmpy has used and made."""
    parts = [
        ([one for one in sets if one.name not in ours.wrong], _slices(sets, guest.ubd(index)))
        for index, sets in enumerate((ALL, OURS))
    ]
    steps = [step for part in parts for step in _judge_steps(*part)]
    disks = [ours.disk, ours.made]
    answers = _do_in_guest(ours.disk.with_name("judge"), disks, steps)
    found = Judged({}, {}, {}, {}, {}, {})
    for sets, _ in parts:
        part, answers = answers[: 10 + 2 * len(sets)], answers[10 + 2 * len(sets) :]
        found.refused.update(part[1])
        found.first.update(part[2])
        found.tables.update(line.split(": ", 1) for line in part[3][1].splitlines())
        found.digest.update(
            zip((one.name for one in sets), part[4 : 4 + len(sets)], strict=True)
        )
        found.scrubbed.update(part[4 + len(sets)])
        found.last.update(part[-2])
    return found


def _here(one: Set, ours: Ours, judged: Judged) -> None:
    # Say why there is nothing to be compared.
    if one.name in ours.wrong:
        pytest.fail(f"dmpy could not use it: {ours.wrong[one.name]}", pytrace=False)
    if one.name in judged.refused:
        pytest.fail(f"the kernel refuses it: {judged.refused[one.name]}", pytrace=False)


_BOTH = pytest.mark.parametrize("one", ALL + OURS, ids=lambda one: one.name)


@_BOTH
def test_kernel_finds_the_data_that_dmpy_wrote(judged, ours, one):
    _here(one, ours, judged)
    assert judged.digest[one.name] == _sha(ours.data[one.name])


@_BOTH
def test_kernel_finds_no_mismatch_in_what_dmpy_left(judged, ours, one):
    _here(one, ours, judged)
    assert _mismatches(judged.scrubbed[one.name]) == 0, judged.scrubbed[one.name]
    assert _mismatches(judged.last[one.name]) == 0, judged.last[one.name]


@_BOTH
def test_kernel_takes_every_device_for_in_sync(judged, ours, one):
    _here(one, ours, judged)
    health = judged.first[one.name].split()[5]
    lost = _lost(one)
    expected = "".join("-" if place in lost else "A" for place in range(one.devices))
    assert health == expected, judged.first[one.name]
    assert judged.last[one.name].split()[5] == "A" * one.devices, judged.last[one.name]


@_BOTH
def test_status_and_table_are_the_kernels(judged, ours, one):
    _here(one, ours, judged)
    assert ours.tables[one.name].split()[:-2 * one.devices] == (
        judged.tables[one.name].split()[:-2 * one.devices]
    )
    if " idle " in ours.status[one.name][1] and _lost(one) == one.lost:
        assert ours.status[one.name][1].split() == judged.scrubbed[one.name].split()


@pytest.fixture(scope="module")
def again(judged, ours) -> dict[str, str]:
    """Read once more by dmpy what the kernel wrote last: digests, or what went wrong."""
    found = {}
    for sets, image in ((ALL, ours.disk), (OURS, ours.made)):
        with dmpy.Mapper() as mapper:
            for name, table in _slices(sets, str(image)).items():
                mapper.create(name, table)
            for one in sets:
                if one.name in ours.wrong:
                    continue
                try:
                    device = mapper.create(one.name, one.table())
                    found[one.name] = _sha(_read(device))
                    mapper.remove(one.name)
                except (ValueError, OSError) as error:
                    found[one.name] = str(error)
    return found


@_BOTH
def test_dmpy_finds_what_the_kernel_wrote_last(again, judged, ours, one):
    _here(one, ours, judged)
    assert again[one.name] == _sha(content(_seed(one, 2), one.size))
