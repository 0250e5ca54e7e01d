"""Arrays of every level and layout that mdadm makes and the kernel fills: all is where levels say.

Nothing of the engine takes part: the members' bytes are compared with the content that was written,
and parity is computed anew from what lies on the members.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from dmpy.maths.parity import pq
from dmpy.raid.levels import (
    RAID0_ALT_MULTIZONE_LAYOUT,
    RAID0_ORIG_LAYOUT,
    Geometry,
    find_level,
    raid10_parameters,
)
from tests import needs
from tests.kernel import guest

pytestmark = pytest.mark.kernel

CHUNK = 4096
# Members of several sizes, for RAID 0; the other levels use a part of each.
SIZES = [(8 + 3 * index) * 32 << 10 for index in range(7)]
USED_KIB = 192
CONTENT = 4 << 20
MODULES = ["dm-mod", "raid0", "raid1", "raid10", "raid456"]


class Array(NamedTuple):
    """An array to make.

    Attributes:
        level: as mdadm names it.
        layout: as mdadm names it; "" for levels without.
        members: how many.
    """

    level: str
    layout: str
    members: int

    @property
    def name(self) -> str:
        return f"{self.level}-{self.layout}-{self.members}"


RAID5 = [f"{side}-{kind}" for side in ("left", "right") for kind in ("asymmetric", "symmetric")]
RAID5 += ["parity-first", "parity-last"]
RAID6 = [*RAID5, "ddf-zero-restart", "ddf-N-restart", "ddf-N-continue", "parity-first-6"]
RAID6 += [f"{layout}-6" for layout in RAID5[:4]]
ARRAYS = [
    Array("4", "", 4),
    *(Array("5", layout, 4) for layout in RAID5),
    *(Array("6", layout, 5) for layout in RAID6),
    *(Array("10", f"{kind}2", members) for kind in "nfo" for members in (3, 4)),
    *(Array("10", f"{kind}3", 5) for kind in "nfo"),
    *(Array("0", layout, members) for layout in ("original", "alternate") for members in (3, 7)),
    Array("1", "", 3),
]

# Superblock 1.x: byte of each field that is read.
MAGIC = 0xA92B4EFC


class Superblock(NamedTuple):
    """What is read of a member's superblock."""

    level: int
    layout: int
    size: int
    chunk_size: int
    data_size: int
    role: int


def superblock(image: bytes) -> Superblock:
    """Read a superblock 1.0, which lies 8 to 12 KiB before the end."""
    at = ((len(image) >> 9) - 16 & ~7) << 9
    assert struct.unpack_from("<I", image, at) == (MAGIC,)
    level, layout, size, chunk = struct.unpack_from("<iIQI", image, at + 72)
    data_offset, data_size = struct.unpack_from("<QQ", image, at + 128)
    assert data_offset == 0
    number = struct.unpack_from("<I", image, at + 160)[0]
    role = struct.unpack_from("<H", image, at + 256 + 2 * number)[0]
    return Superblock(level, layout, size << 9, chunk << 9, data_size << 9, role)


def places() -> dict[tuple[Array, int], int]:
    """Return where on the one disk each member of each array begins, in bytes."""
    found, offset = {}, 0
    for array in ARRAYS:
        for index in range(array.members):
            found[array, index] = offset
            offset += SIZES[index]
    return found


def script() -> str:
    """Make, fill and stop each array; its members hold zeroes before, so parity agrees."""
    concise = [
        f"{array.name}.{index},,,,0 {SIZES[index] >> 9} linear {guest.ubd(0)} {offset >> 9}"
        for (array, index), offset in places().items()
    ]
    lines = ["set -e", f"dmsetup create --concise '{';'.join(concise)}'"]
    for array in ARRAYS:
        words = ["mdadm --create /dev/md0 --run --force --quiet --metadata=1.0"]
        words += [f"--level={array.level}", f"--raid-devices={array.members}"]
        if array.level != "1":
            words += [f"--chunk={CHUNK >> 10}"]
        if array.layout:
            words += [f"--layout={array.layout}"]
        if array.level != "0":
            words += [f"--size={USED_KIB}", "--assume-clean", "--bitmap=none"]
        words += [f"/dev/mapper/{array.name}.{index}" for index in range(array.members)]
        lines += [
            " ".join(words),
            "size=$(cat /sys/block/md0/size)",
            "dd if=content of=/dev/md0 bs=32K count=$((size * 512)) iflag=count_bytes "
            "oflag=direct status=none",
            "mdadm --stop --quiet /dev/md0",
            f"echo $((size * 512)) >{array.name}.size",
        ]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def content() -> bytes:
    """What every array is filled with, as far as it goes."""
    return random.Random(1).randbytes(CONTENT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> Path:
    """The arrays' sizes, and `disk` with all members of all arrays, one after the other."""
    needs.tool(guest.KERNEL, package="user-mode-linux")
    needs.tool("mdadm", package="mdadm")
    folder = tmp_path_factory.mktemp("levels")
    (folder / "content").write_bytes(content)
    with (folder / "disk").open("wb") as disk:
        disk.truncate(sum(sum(SIZES[: array.members]) for array in ARRAYS))
    disks = [folder / "disk"]
    result = guest.run(script(), folder, disks=disks, modules=MODULES, seconds=120)
    assert result.status == 0, result.output + result.dmesg
    return folder


def load(folder: Path, array: Array) -> tuple[Geometry, list[bytes]]:
    """Return an array's geometry, by its superblocks, and its members' bytes."""
    images = []
    with (folder / "disk").open("rb") as disk:
        for index in range(array.members):
            disk.seek(places()[array, index])
            images.append(disk.read(SIZES[index]))
    found = [superblock(image) for image in images]
    assert [each.role for each in found] == list(range(array.members))
    first = found[0]
    level = find_level(first.level, first.layout)
    keywords: dict = {"member_size": first.size}
    if level.number == 10:
        keywords |= raid10_parameters(first.layout)
    if level.number == 0:
        keywords = {"sizes": tuple(each.data_size for each in found), "raid0_layout": first.layout}
    return Geometry(level, array.members, first.chunk_size, **keywords), images


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: array.name)
def test_the_kernel_puts_everything_where_levels_say(
    folder: Path, content: bytes, array: Array
) -> None:
    geometry, members = load(folder, array)
    size = int((folder / f"{array.name}.size").read_text())
    assert geometry.size == size
    assert size <= CONTENT
    if geometry.level.parity:
        check_parity(geometry, members, content)
        return
    offset = 0
    for copies in geometry.copies(0, size):
        for member, place, length in copies:
            assert members[member][place : place + length] == content[offset : offset + length]
        offset += length
    assert offset == size


def check_parity(geometry: Geometry, members: list[bytes], content: bytes) -> None:
    """Compare all data and compute P and Q of every stripe."""
    for chunk in range(geometry.size // CHUNK):
        stripe, member = geometry.locate(chunk)
        held = members[member][stripe * CHUNK : (stripe + 1) * CHUNK]
        assert held == content[chunk * CHUNK : (chunk + 1) * CHUNK], chunk
    for stripe in range(geometry.rows):
        layout = geometry.stripe(stripe)
        chunks = [
            np.frombuffer(member, np.uint8, CHUNK, stripe * CHUNK) for member in members
        ]
        p, q = np.empty(CHUNK, np.uint8), np.empty(CHUNK, np.uint8)
        pq([None if member is None else chunks[member] for member in layout.syndrome], p, q)
        assert np.array_equal(chunks[layout.p], p), stripe
        if layout.q is not None:
            assert np.array_equal(chunks[layout.q], q), stripe


def test_both_layouts_of_raid0_were_made(folder: Path) -> None:
    """They differ, or the arrays above prove nothing about them."""
    layouts = {
        load(folder, array)[0].raid0_layout for array in ARRAYS if array.level == "0"
    }
    assert layouts == {RAID0_ORIG_LAYOUT, RAID0_ALT_MULTIZONE_LAYOUT}
    original, other = (
        load(folder, Array("0", layout, 7))[0] for layout in ("original", "alternate")
    )
    chunks = range(original.size // CHUNK)
    assert any(original.locate(chunk) != other.locate(chunk) for chunk in chunks)
