"""md's bitmap against what mdadm and Linux wrote, and against `mdadm -X`."""

from __future__ import annotations

import dataclasses
import re
import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmpy.errors import FormatError
from dmpy.formats import md_bitmap
from dmpy.formats.md_bitmap import Bits, BitmapSuper
from dmpy.formats.md_superblock import Superblock090, Superblock1, find
from tests import needs
from tests.data.md.record import golden
from tests.formats import pages
from tests.formats.damage import damaged, decodes_or_says_why, records

GOLDEN = {name: disk for name, disk in golden().items() if "bitmap" in disk.text}


def place(disk):
    """The byte where a member's bitmap begins."""
    found = find(disk.read, disk.sectors)[0]
    if isinstance(found.superblock, Superblock090):
        return (found.sector + 8) * 512
    return (found.sector + found.superblock.bitmap_offset) * 512


def decode(name):
    disk = GOLDEN[name]
    at = place(disk)
    view = disk.read(at, 65536)
    bitmap = BitmapSuper.decode(view, device=name, byte=at)
    return bitmap, Bits.decode(bitmap, view, device=name, byte=at)


SOUND = GOLDEN["raid1-degraded"].read(8192, 4096)


def test_the_table_of_the_page_is_the_layout():
    rows = pages.layout("md_bitmap", "magic")
    assert [(row[0], row[3]) for row in rows] == [
        (at, name) for name, at in BitmapSuper.offsets.items()
    ]
    assert rows[-1][0] + rows[-1][1] == BitmapSuper.SIZE


def test_the_example_of_the_page_holds():
    data = pages.example("md_bitmap")
    bitmap = BitmapSuper.decode(data)
    for field, value in pages.said("md_bitmap").items():
        ours = getattr(bitmap, field)
        assert (ours.hex() if isinstance(ours, bytes) else str(ours)) == value, field
    assert bitmap.encode() == data[: BitmapSuper.SIZE]


def words(text):
    """What `mdadm -X` prints, by its headings."""
    return dict(re.findall(r"^ *([A-Z][A-Za-z ]*?) : (.*?) *$", text, re.MULTILINE))


@pytest.mark.parametrize("name", GOLDEN)
def test_mdadm_says_the_same_of_what_linux_wrote(name):
    bitmap, bits = decode(name)
    says = words(GOLDEN[name].text["bitmap"])
    assert says["Version"] == str(bitmap.version)
    assert says["UUID"].replace(":", "") == bitmap.uuid.hex() or name == "raid5-0.90"
    assert says["Events"] == str(bitmap.events)
    assert says["Events Cleared"] == str(bitmap.events_cleared)
    assert says["Daemon"].startswith(f"{bitmap.daemon_sleep}s ")
    assert says["Sync Size"].split()[0] == str(bitmap.sync_size // 2)
    size, unit = says["Chunksize"].split()
    assert int(size) << {"KB": 10, "MB": 20}[unit] == bitmap.chunksize
    count, dirty = re.match(r"(\d+) bits \(chunks\), (\d+) dirty", says["Bitmap"]).groups()
    assert (int(count), int(dirty)) == (bits.count, bits.total())


def test_the_bits_are_where_data_was_written():
    """Sectors 100 to 107, 5000 to 5199 and 28000, in regions of 64 KiB."""
    _, bits = decode("raid1-degraded")
    assert bits.regions().tolist() == [0, 39, 40, 218]
    assert [region in bits for region in (0, 1, 218)] == [True, False, True]


def test_a_bitmap_of_raid10_stands_for_the_array():
    bitmap, _ = decode("raid10-1.2")
    disk = GOLDEN["raid10-1.2"]
    superblock = find(disk.read, disk.sectors)[0].superblock
    assert isinstance(superblock, Superblock1)
    assert bitmap.sync_size == superblock.size * 2


def test_events_cleared_stays_while_an_array_is_degraded():
    bitmap, _ = decode("raid1-degraded")
    assert bitmap.events_cleared < bitmap.events


@pytest.mark.parametrize("name", GOLDEN)
def test_what_linux_wrote_is_written_again(name):
    bitmap, bits = decode(name)
    view = GOLDEN[name].read(place(GOLDEN[name]), bitmap.size)
    ours = bits.encode(bitmap)
    assert len(ours) % 4096 == 0
    assert ours[: BitmapSuper.SIZE] == view[: BitmapSuper.SIZE]
    # All but what lies behind the last bit in its byte, of which mdadm leaves ones.
    assert ours[: bitmap.size - 1] == view[:-1]


def test_mdadm_reads_what_we_write(tmp_path):
    mdadm = needs.tool("mdadm", package="mdadm")
    needs.root()  # which mdadm wants for this, even of a plain file
    bitmap = BitmapSuper(
        uuid=bytes(range(16)), events=7, events_cleared=3, sync_size=1 << 20, chunksize=1 << 16
    )
    bits = Bits(bitmap.bits)
    bits.set([0, 1, 77, bitmap.bits - 1])
    path = tmp_path / "bitmap"
    path.write_bytes(bits.encode(bitmap))
    answer = subprocess.run(
        [mdadm, "-X", path], capture_output=True, text=True, timeout=30, check=False
    )
    says = words(answer.stdout)
    assert says["UUID"] == "00010203:04050607:08090a0b:0c0d0e0f"
    assert (says["Events"], says["Events Cleared"]) == ("7", "3")
    assert says["Chunksize"] == "64 KB"
    assert says["Bitmap"].startswith("8192 bits (chunks), 4 dirty")


HEADERS = records(
    BitmapSuper,
    magic=md_bitmap.BITMAP_MAGIC,
    version=st.integers(3, 5),
    sync_size=st.integers(0, 1 << 22),
    chunksize=st.integers(9, 20).map(lambda shift: 1 << shift),
    state=st.sampled_from([0, md_bitmap.BITMAP_WRITE_ERROR]),
    daemon_sleep=st.integers(1, 0x7FFFFFFF),
    write_behind=st.integers(0, 16383),
)


@given(HEADERS, st.data())
def test_any_bitmap_comes_back(bitmap, data):
    bits = Bits(bitmap.bits)
    if bitmap.bits:
        bits.set(data.draw(st.sets(st.integers(0, bitmap.bits - 1), max_size=20)))
    packed = bits.encode(bitmap)
    again = BitmapSuper.decode(packed)
    assert again == bitmap
    assert Bits.decode(again, packed) == bits
    assert len(packed) == bitmap.area


@given(damaged(SOUND))
def test_damaged_bytes_never_crash(data):
    bitmap = decodes_or_says_why(BitmapSuper.decode, data)
    if bitmap is not None:
        decodes_or_says_why(lambda view, **place: Bits.decode(bitmap, view, **place), data)


def test_a_stale_bitmap_has_all_bits_set():
    bitmap = BitmapSuper(sync_size=1000, chunksize=512, state=md_bitmap.BITMAP_STALE)
    bits = Bits.decode(bitmap, Bits(1000).encode(bitmap))
    assert bits.total() == 1000


def test_bits_are_not_looked_for_beyond_the_view():
    bitmap = BitmapSuper(sync_size=1 << 60, chunksize=512)
    with pytest.raises(FormatError) as caught:
        Bits.decode(bitmap, bytes(4096), device="disk0", byte=8192)
    assert str(caught.value) == (
        "disk0: byte 8232: bitmap needs 144115188075856128 bytes where 4096 are free: "
        "sync_size is 1152921504606846976, expected at most 30720"
    )


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("magic", 0, "0x6d746962"),
        ("version", 2, "3, 4 or 5"),
        ("version", 6, "3, 4 or 5"),
        ("chunksize", 256, "512 to 2147483648"),
        ("chunksize", 0, "512 to 2147483648"),
        ("chunksize", 65537, "a power of 2"),
        ("daemon_sleep", 0, "1 to 2147483647"),
        ("write_behind", 16384, "0 to 16383"),
    ],
)
def test_what_cannot_be_is_refused_by_name(field, value, expected):
    bitmap = dataclasses.replace(BitmapSuper.decode(SOUND), **{field: value})
    with pytest.raises(FormatError) as caught:
        BitmapSuper.decode(bitmap.pack(), device="disk0", byte=8192)
    assert (caught.value.field, caught.value.expected) == (field, expected)
    assert caught.value.byte == 8192 + BitmapSuper.offsets[field]


@pytest.mark.parametrize(
    ("field", "value"),
    [("chunksize", 512), ("chunksize", 1 << 31), ("write_behind", 16383), ("version", 5)],
)
def test_what_is_at_the_limit_is_accepted(field, value):
    bitmap = dataclasses.replace(BitmapSuper.decode(SOUND), **{field: value})
    assert BitmapSuper.decode(bitmap.encode()) == bitmap
    assert bitmap.clustered == (bitmap.version == 5)


def test_a_bitmap_of_another_array_is_refused():
    bitmap = BitmapSuper.decode(SOUND)
    bitmap.check_array(bitmap.uuid, device="disk0", byte=8192)
    sentence = "disk0: byte 8200: bitmap of another array: uuid is 0123"
    with pytest.raises(FormatError, match=sentence):
        bitmap.check_array(bytes(16), device="disk0", byte=8192)


@pytest.mark.parametrize(
    ("sync_size", "space", "chunksize"),
    [
        (30848, 4096, 64 << 20),
        (1 << 31, 4096, 64 << 20),  # 1 TiB: 16384 bits in 30720
        (1 << 33, 4096, 256 << 20),
    ],
)
def test_chunks_are_as_large_as_mdadm_makes_them(sync_size, space, chunksize):
    assert BitmapSuper.choose_chunksize(sync_size, space) == chunksize
    bits = BitmapSuper(sync_size=sync_size, chunksize=chunksize)
    bits.check_space(space, device="d", byte=0)


def test_a_bitmap_that_just_fits_is_accepted():
    bitmap = BitmapSuper(sync_size=16, chunksize=512)
    assert bitmap.size == 258
    bitmap.check_space(258, device="d", byte=0)
    with pytest.raises(FormatError, match="bitmap needs 258 bytes where 257 are free"):
        bitmap.check_space(257, device="d", byte=0)


def test_a_bitmap_that_cannot_fit_is_refused():
    with pytest.raises(ValueError, match="no bitmap for .* sectors fits in 512 bytes"):
        BitmapSuper.choose_chunksize(1 << 62, 512)


# Bits by themselves, against a set.


@given(st.integers(1, 200), st.data())
def test_bits_do_as_a_set_does(count, data):
    bits, model = Bits(count), set()
    numbers = st.integers(0, count - 1)
    for _ in range(data.draw(st.integers(1, 6))):
        step = data.draw(st.sampled_from(["set", "clear", "set_range", "clear_range", "fill"]))
        if step in ("set", "clear"):
            chosen = data.draw(st.sets(numbers))
            changed = getattr(bits, step)(chosen)
            new = model | chosen if step == "set" else model - chosen
            assert changed == {number // 8 for number in new ^ model}
            model = new
        elif step == "fill":
            value = data.draw(st.booleans())
            bits.fill(value)
            model = set(range(count)) if value else set()
        else:
            places = st.integers(0, count)
            begin, end = sorted((data.draw(places), data.draw(places)))
            getattr(bits, step)(begin, end)
            model = model | {*range(begin, end)} if "set" in step else model - {*range(begin, end)}
    assert bits.regions().tolist() == sorted(model)
    assert bits.total() == len(model) and len(bits) == count
    assert all((number in bits) == (number in model) for number in range(count))
    size, value = data.draw(st.integers(1, 250)), data.draw(st.booleans())
    resized = {*range(count, size)} if value else set()
    resized |= {number for number in model if number < size}
    assert bits.resized(size, value=value).regions().tolist() == sorted(resized)


def test_bits_beyond_the_last_mean_nothing():
    assert Bits(3, np.array([0xFF], np.uint8)).total() == 3
