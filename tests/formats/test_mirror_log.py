"""dm-mirror's disk log against what Linux wrote."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmpy.errors import FormatError
from dmpy.formats import mirror_log
from dmpy.formats.mirror_log import Bits, LogHeader, MirrorLog, log_size
from tests.data.md.record import golden
from tests.formats import pages
from tests.formats.damage import damaged, decodes_or_says_why

GOLDEN = {name: disk for name, disk in golden().items() if name.startswith("mirror-")}
SOUND = GOLDEN["mirror-failed"].read(0, 1536)


def test_the_table_of_the_page_is_the_layout():
    rows = pages.layout("mirror_log", "magic")
    assert [(row[0], row[3]) for row in rows] == [
        (at, name) for name, at in LogHeader.offsets.items()
    ]
    assert rows[-1][0] + rows[-1][1] == LogHeader.SIZE


def test_the_example_of_the_page_holds():
    data = pages.example("mirror_log")
    header = LogHeader.decode(data)
    for field, value in pages.said("mirror_log").items():
        assert getattr(header, field) == int(value, 0), field
    assert MirrorLog.decode(data).encode()[: len(data)] == data


@pytest.mark.parametrize("name", GOLDEN)
def test_what_linux_wrote_is_written_again_byte_for_byte(name):
    log = MirrorLog.decode(GOLDEN[name].read(0, 16384), device=name)
    ours = log.encode()
    assert ours == GOLDEN[name].read(0, len(ours))
    assert not any(GOLDEN[name].read(len(ours), 4096))


def test_a_new_log_with_nosync_is_clean():
    log = MirrorLog.decode(GOLDEN["mirror-nosync"].read(0, 4096))
    assert log == MirrorLog.new(315, clean=True)


def test_a_region_that_is_not_on_all_legs_is_not_clean():
    """Linux counts 314 of 315 regions in sync; sector 8008 could not be written on one leg."""
    log = MirrorLog.decode(SOUND)
    assert len(log.clean) == 315 and log.clean.total() == 314
    assert 8008 // 64 not in log.clean
    assert " 314/315 " in GOLDEN["mirror-failed"].text["status"]


def test_a_mirror_that_has_synced_is_clean():
    log = MirrorLog.decode(GOLDEN["mirror-synced"].read(0, 4096))
    assert log.clean.total() == len(log.clean) == 40
    assert " 40/40 " in GOLDEN["mirror-synced"].text["status"]


def test_bits_take_whole_words_and_blocks():
    assert [log_size(regions) for regions in (0, 1, 64, 4096, 4097)] == [
        1024, 1536, 1536, 1536, 2048,
    ]  # fmt: skip
    assert log_size(1, 4096) == 4096
    assert len(MirrorLog.new(65, clean=True).encode(4096)) == 4096


@given(st.integers(0, 3000), st.data())
def test_any_log_comes_back(regions, data):
    log = MirrorLog.new(regions, clean=data.draw(st.booleans()))
    if regions:
        log.clean.clear(data.draw(st.sets(st.integers(0, regions - 1), max_size=20)))
    packed = log.encode()
    assert MirrorLog.is_there(packed)
    assert MirrorLog.decode(packed) == log


@given(damaged(SOUND))
def test_damaged_bytes_never_crash(data):
    decodes_or_says_why(MirrorLog.decode, data)


@pytest.mark.parametrize("clean", [False, True])
def test_new_regions_of_a_mirror_that_has_grown_are_as_said(clean):
    log = MirrorLog(Bits(10))
    log.clean.set([3])
    grown = log.resized(20, clean=clean)
    assert grown.clean.regions().tolist() == [3, *(range(10, 20) if clean else ())]
    assert grown.resized(10) == log


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("magic", 0, "not a mirror log: magic is 0x00000000, expected 0x4d695272"),
        ("version", 3, "mirror log: version is 3, expected 2"),
        ("nr_regions", 4097, "mirror log: nr_regions is 4097, expected at most 4096 in 1536 bytes"),
        (
            "nr_regions",
            1 << 32,
            "mirror log: nr_regions is 4294967296, expected at most 4294967295",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(field, value, sentence):
    header = dataclasses.replace(LogHeader.decode(SOUND), **{field: value})
    damaged_log = bytes(header.pack()) + SOUND[LogHeader.SIZE :]
    with pytest.raises(FormatError) as caught:
        MirrorLog.decode(damaged_log, device="log")
    assert str(caught.value) == f"log: byte {LogHeader.offsets[field]}: {sentence}"


def test_as_many_regions_as_the_view_holds_are_accepted():
    header = LogHeader(nr_regions=4096)
    log = MirrorLog.decode(bytes(header.pack()) + SOUND[LogHeader.SIZE :])
    assert len(log.clean) == 4096


def test_version_1_is_taken_for_2():
    header = LogHeader(version=1, nr_regions=315)
    old = bytes(header.pack()) + SOUND[LogHeader.SIZE :]
    assert MirrorLog.decode(old) == MirrorLog.decode(SOUND)


def test_a_log_without_the_magic_is_new():
    assert MirrorLog.is_there(SOUND)
    assert not MirrorLog.is_there(bytes(4096))
    assert mirror_log.BITS_OFFSET == 1024
