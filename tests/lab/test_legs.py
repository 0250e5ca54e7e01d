"""Legs that do as they are told, alone."""

from __future__ import annotations

import errno

import pytest

from dmpy.errors import DeviceError
from dmpy.lab.legs import Plug

SIZE = 64 << 10


def read(leg, offset=0, length=512):
    data = bytearray(length)
    leg.preadv([memoryview(data)], offset)
    return bytes(data)


def write(leg, byte, offset=0, length=512, **how):
    leg.pwritev([memoryview(bytes([byte]) * length)], offset, **how)


@pytest.fixture(params=[False, True], ids=["memory", "volatile"])
def plug(request):
    plug = Plug(volatile=request.param)
    plug.add("a", SIZE)
    plug.add("b", SIZE)
    return plug


def test_bytes_go_through(plug):
    leg = plug.legs["a"]
    write(leg, 7, 1024)
    leg.write_zeroes(1024, 256)
    leg.flush()
    assert read(leg, 1024) == bytes(256) + b"\x07" * 256
    assert read(plug.legs["b"], 1024) == bytes(512)
    assert sum(extent.length for extent in leg.extents(0, SIZE)) == SIZE
    leg.discard(0, 4096)
    assert leg.calls == {"write": 1, "zero": 1, "flush": 1, "read": 1, "extents": 1, "discard": 1}


def test_a_dead_leg_fails_every_call_and_keeps_its_bytes(plug):
    leg = plug.legs["a"]
    write(leg, 7)
    leg.fail()
    assert leg.condition == "dead"
    for call in (lambda: read(leg), lambda: write(leg, 8), leg.flush,
                 lambda: leg.discard(0, 512), lambda: leg.write_zeroes(0, 512),
                 lambda: leg.extents(0, 512)):
        with pytest.raises(DeviceError, match="a: does not answer") as caught:
            call()
        assert caught.value.errno == errno.EIO
    leg.heal()
    assert (leg.condition, read(leg)) == ("", b"\x07" * 512)


def test_errors_strike_once_or_for_ever(plug):
    leg = plug.legs["a"]
    leg.errors(4096, 512, ["read"], count=1)
    read(leg)
    with pytest.raises(OSError, match="a: read error at byte 4096"):
        read(leg, 4096)
    read(leg, 4096)
    leg.errors(4096, 512, ["read"])
    for _ in range(3):
        with pytest.raises(OSError):
            read(leg, 4000, 512)
    write(leg, 1, 4096)
    assert leg.condition == "errors"


def test_corruption_flips_the_range_and_nothing_else(plug):
    leg = plug.legs["a"]
    write(leg, 0x0F, 0, 4096)
    leg.corrupt(1000, 24)
    assert read(leg, 0, 4096) == b"\x0f" * 1000 + b"\xf0" * 24 + b"\x0f" * 3072


def test_a_new_disk_is_empty_and_works(plug):
    leg = plug.legs["a"]
    write(leg, 1)
    leg.fail()
    leg.blank()
    assert read(leg) == bytes(512)


def test_no_power_no_answer(plug):
    plug.pull()
    for leg in plug.legs.values():
        assert leg.condition == "off"
        with pytest.raises(OSError, match="no power"):
            read(leg)


@pytest.mark.parametrize("keep", ["all", "none", "some"])
def test_after_a_cut_flushed_bytes_are_there_and_others_as_chosen(keep):
    plug = Plug(volatile=True)
    leg = plug.add("a", SIZE)
    write(leg, 1, 0)
    leg.flush()
    write(leg, 2, 512)
    write(leg, 3, 1024, fua=True)
    plug.pull()
    story = plug.push(5, keep)
    assert "sectors" in story or "writes" in story
    assert read(leg, 0) == b"\x01" * 512
    assert read(leg, 1024) == b"\x03" * 512
    found = read(leg, 512)[0]
    assert found in {"all": (2,), "none": (0,), "some": (0, 2)}[keep]


def test_without_caches_a_cut_loses_nothing():
    plug = Plug(volatile=False)
    leg = plug.add("a", SIZE)
    write(leg, 1)
    plug.pull()
    assert plug.push(0) == "no leg has a volatile cache"
    assert read(leg) == b"\x01" * 512
