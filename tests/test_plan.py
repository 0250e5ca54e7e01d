"""Lanes, segments, and what a plan makes of the tables below it."""

import sys
import threading

import pytest

from dmpy.backing import open_leaf
from dmpy.errors import DeviceError
from dmpy.mapper import Mapper
from dmpy.plan import Gate, Lane, Plan, Segment, drain


@pytest.fixture
def dm():
    with Mapper() as mapper:
        yield mapper


def shape(device):
    """(begin, end, name below, offset below) of each segment, bytes."""
    return [
        (segment.begin, segment.end, segment.device.name, segment.begin + segment.skew)
        for segment in device._plan.segments[:-1]
    ]


def test_a_lane_counts_who_is_on_it():
    lane = Lane()
    assert lane.in_flight == 0
    lane.entered += 2
    assert lane.in_flight == 2
    lane.left += 2
    assert lane.in_flight == 0


def test_a_lane_loses_no_count_to_other_threads():
    lane = Lane()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def hurry():
        for _ in range(50_000):
            lane.entered += 1
            lane.left += 1

    try:
        threads = [threading.Thread(target=hurry) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert (lane.entered, lane.left) == (200_000, 200_000)


def test_drain_waits_until_the_last_one_has_left():
    lane = Lane()
    lane.entered += 1
    drained = threading.Event()
    thread = threading.Thread(target=lambda: (drain({lane}), drained.set()))
    thread.start()
    assert not drained.wait(0.02)
    lane.left += 1
    assert drained.wait(5)
    thread.join()


def test_neighbours_that_are_one_stretch_below_become_one_segment():
    leaf = open_leaf("mem:64K")
    lane = Lane()
    plan = Plan(leaf, [Segment(0, 512, leaf, 1024, lane), Segment(512, 2048, leaf, 1024, lane)])
    assert [(segment.begin, segment.end) for segment in plan.segments[:-1]] == [(0, 2048)]
    assert plan.ends == [2048]
    assert plan.size == 2048


def test_whoever_waits_at_a_gate_goes_on_when_it_opens():
    gate = Gate(open_leaf("mem:64K"))
    passed = threading.Event()
    thread = threading.Thread(target=lambda: (gate.wait(), passed.set()))
    thread.start()
    assert not passed.wait(0.02)
    assert gate.in_flight == 1
    gate.open()
    assert passed.wait(5)
    thread.join()
    assert gate.in_flight == 0


def test_a_gate_that_refuses_fails_whoever_comes():
    gate = Gate(open_leaf("mem:64K"))
    gate.refuse(DeviceError(5, "no way"))
    with pytest.raises(OSError, match="no way"):
        gate.wait()
    assert gate.in_flight == 0


def test_linear_over_anything_takes_over_the_lower_segments(dm):
    dm.create("low", "0 8 linear mem:64K 3\n8 8 zero\n16 16 linear mem:32K 0")
    top = dm.create("top", "0 20 linear low 4")
    assert shape(top) == [
        (0, 2048, "mem:64K", 7 * 512),
        (2048, 6144, "zero", 0),
        (6144, 10240, "mem:32K", 0),
    ]


def test_a_stack_of_ten_is_one_segment(dm):
    dm.create("d0", "0 100 linear mem:64K 1")
    for level in range(1, 10):
        dm.create(f"d{level}", f"0 {100 - level} linear d{level - 1} 1")
    assert shape(dm.device("d9")) == [(0, 91 * 512, "mem:64K", 10 * 512)]


def test_a_leg_in_one_lower_segment_becomes_that_segments_leg(dm):
    dm.create("low", "0 64 linear mem:64K 8\n64 64 linear mem:64K 0")
    dm.create("one", "0 16 striped 2 8 low 0 low 8")
    dm.create("two", "0 128 striped 1 8 low 0")
    leg = dm.device("one").live.lines[0].target.legs[1]
    assert (leg.segment.device.name, leg.segment.skew) == ("mem:64K", 16 * 512)
    assert (leg.device.name, leg.start) == ("low", 8 * 512)
    leg = dm.device("two").live.lines[0].target.legs[0]
    assert leg.segment.device is dm.device("low")


def test_a_suspended_or_read_only_device_is_not_passed_over(dm):
    low = dm.create("low", "0 64 linear mem:64K 0")
    top = dm.create("top", "0 64 linear low 0")
    assert shape(top)[0][2] == "mem:64K"
    dm.suspend("low")
    assert shape(top)[0][2] == "low"
    dm.resume("low")
    assert shape(top)[0][2] == "mem:64K"
    dm.create("fixed", "0 64 linear mem:64K 0", readonly=True)
    assert shape(dm.create("over", "0 64 linear fixed 0", readonly=True))[0][2] == "fixed"
    assert low.holders.total() == 1


def test_a_table_loaded_below_changes_the_plans_above(dm):
    dm.create("low", "0 64 linear mem:64K 0")
    dm.create("mid", "0 64 linear low 0")
    top = dm.create("top", "0 64 striped 2 8 mid 0 mid 32")
    dm.load("low", "0 64 linear mem:128K 5")
    dm.resume("low")
    assert shape(dm.device("mid")) == [(0, 64 * 512, "mem:128K", 5 * 512)]
    legs = top.live.lines[0].target.legs
    assert [leg.segment.skew for leg in legs] == [5 * 512, 37 * 512]


def test_what_a_smaller_table_no_longer_has_is_refused_above(dm):
    dm.create("low", "0 64 linear mem:64K 0")
    top = dm.create("top", "0 64 linear low 0")
    dm.load("low", "0 32 linear mem:64K 0")
    dm.resume("low")
    buffer = memoryview(bytearray(512))
    top.preadv([buffer], 31 * 512)
    with pytest.raises(OSError, match="low: request at byte 16384 is outside"):
        top.preadv([buffer], 32 * 512)
