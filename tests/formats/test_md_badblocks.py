"""md's bad-block log against what Linux wrote, and against `mdadm --examine-badblocks`."""

from __future__ import annotations

import re
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmpy.errors import FormatError
from dmpy.formats import md_badblocks
from dmpy.formats.md_badblocks import BadRange
from dmpy.formats.md_superblock import Superblock1, find
from tests import needs
from tests.data.md.record import golden
from tests.formats import pages
from tests.formats.damage import damaged, decodes_or_says_why

DISK = golden()["badblocks"]
SUPERBLOCK = find(DISK.read, DISK.sectors)[0].superblock
PLACE = (SUPERBLOCK.super_offset + SUPERBLOCK.bblog_offset) * 512
SOUND = DISK.read(PLACE, SUPERBLOCK.bblog_size * 512)
ENTRY = re.compile(r"^ *(\d+) for (\d+) sectors$", re.MULTILINE)


def listed(text):
    """What `mdadm --examine-badblocks` prints."""
    return [BadRange(int(sector), int(length)) for sector, length in ENTRY.findall(text)]


def test_mdadm_says_the_same_of_what_linux_wrote():
    assert md_badblocks.decode(SOUND) == listed(DISK.text["list"])


def test_sectors_count_from_the_beginning_of_the_member():
    """2148, 4000 and 30001 were said to be bad, on a member whose data begins at 2048."""
    assert sorted(md_badblocks.decode(SOUND)) == [
        (2148, 8), (4000, 512), (4512, 88), (30001, 1),
    ]  # fmt: skip


def test_the_example_of_the_page_holds():
    data = pages.example("md_badblocks")
    assert data + b"\xff" * (4096 - len(data)) == SOUND
    assert len(md_badblocks.decode(data)) == 4


def test_long_ranges_are_cut_and_what_touches_is_joined():
    log = md_badblocks.encode([BadRange(1000, 600), BadRange(8, 8), BadRange(16, 8)], 8)
    assert md_badblocks.decode(log) == [(8, 16), (1000, 512), (1512, 88)]


def test_what_linux_wrote_is_written_again_in_ascending_order():
    ours = md_badblocks.encode(md_badblocks.decode(SOUND), 8)
    entries = sorted(SOUND[at : at + 8][::-1] for at in range(0, 32, 8))
    assert ours == b"".join(entry[::-1] for entry in entries) + SOUND[32:]


def test_mdadm_reads_what_we_write(tmp_path):
    mdadm = needs.tool("mdadm", package="mdadm")
    needs.root()  # which mdadm wants for this, even of a plain file
    ours = Superblock1.fresh(
        "1.2", 33000, data_offset=2048, level=1, raid_disks=2, size=1000, dev_roles=[0, 1]
    )
    ours.set_feature("BAD_BLOCKS")
    bad = [BadRange(2048, 1), BadRange(5000, 2000)]
    path = tmp_path / "member"
    with path.open("wb") as file:
        file.truncate(33000 * 512)
        file.seek(ours.super_offset * 512)
        file.write(ours.encode())
        file.seek((ours.super_offset + ours.bblog_offset) * 512)
        file.write(md_badblocks.encode(bad, ours.bblog_size))
    answer = subprocess.run(
        [mdadm, "--examine-badblocks", path],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert listed(answer.stdout) == [
        (2048, 1), (5000, 512), (5512, 512), (6024, 512), (6536, 464),
    ]  # fmt: skip


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 700)).map(lambda r: BadRange(*r)))
)
def test_the_same_sectors_come_back(ranges):
    sectors = {sector for begin, length in ranges for sector in range(begin, begin + length)}
    again = md_badblocks.decode(md_badblocks.encode(ranges, 8))
    assert sectors == {
        sector for begin, length in again for sector in range(begin, begin + length)
    }
    assert sum(length for _, length in again) == len(sectors)
    assert all(length <= md_badblocks.LARGEST_LENGTH for _, length in again)


def test_entries_count_in_units_of_the_shift():
    log = md_badblocks.encode([BadRange(3, 2)], 1)
    assert md_badblocks.decode(log, shift=3) == [(24, 16)]


@given(damaged(SOUND), st.integers(0, 63))
def test_damaged_bytes_never_crash(data, shift):
    decodes_or_says_why(
        lambda view, **place: md_badblocks.decode(view, shift=shift, **place), data, byte=12288
    )


def test_a_full_log_needs_no_end():
    bad = [BadRange(2 * number, 1) for number in range(64)]
    assert md_badblocks.capacity(1) == 64
    assert md_badblocks.decode(md_badblocks.encode(bad, 1)) == bad


def test_one_entry_too_many_is_refused():
    bad = [BadRange(2 * number, 1) for number in range(65)]
    with pytest.raises(ValueError, match="65 entries do not fit in a bad-block log of 1 sectors"):
        md_badblocks.encode(bad, 1)


def test_an_entry_without_a_length_is_refused():
    with pytest.raises(FormatError) as caught:
        md_badblocks.decode(SOUND[:8] + bytes(8), device="sdb", byte=12288)
    assert str(caught.value) == (
        "sdb: byte 12296: bad-block log: entry 1 is 0 sectors from 0, "
        "expected 1 or more that can be counted"
    )


def test_a_log_of_a_page_is_accepted_and_a_longer_one_refused():
    assert md_badblocks.decode(b"\xff" * 4096) == []
    with pytest.raises(FormatError, match="size is 4608 bytes, expected at most 4096"):
        md_badblocks.decode(b"\xff" * 4608)
