"""Requests under way while tables change: nothing is torn, lost, or stuck.

No test waits for time to pass: calls hang on devices that are told to, and every wait has a limit
that only a bug reaches.
"""

import errno
import faulthandler
import random
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from dmpy.errors import DeviceError, TableError
from dmpy.opening import Opening
from dmpy.mapper import Mapper
from dmpy.testing import FaultyDevice, PatternDevice, expect_equal, pattern
from dmpy.testing.leaves import GivenLeaves

SECTOR = 512
# What a call may take before the test says that it hangs.
LIMIT = 20


class Caller(threading.Thread):
    """A call in a thread of its own, and what came of it."""

    def __init__(self, call, *args, **how):
        super().__init__(daemon=True)
        self.call = lambda: call(*args, **how)
        self.result = self.error = None
        self.start()

    def run(self):
        try:
            self.result = self.call()
        except BaseException as error:
            self.error = error

    def done(self, limit=LIMIT):
        """Wait for the end; what the call raised is raised here."""
        self.join(limit)
        if self.is_alive():
            faulthandler.dump_traceback(all_threads=True)
            raise AssertionError("the call hangs")
        if self.error is not None:
            raise self.error
        return self.result

    def stuck(self, seconds=0.05):
        """Say whether the call is still under way after a moment."""
        self.join(seconds)
        return self.is_alive()


def read(device, sector, count=1):
    data = bytearray(count * SECTOR)
    device.preadv([memoryview(data)], sector * SECTOR)
    return data


def write(device, sector, data):
    device.pwritev([memoryview(data)], sector * SECTOR)


@contextmanager
def mapper_on(*names, sectors=256):
    """A mapper whose leaves are faulty devices of these names, as attributes of `leaves`."""
    devices = {
        name: FaultyDevice(PatternDevice(sectors * SECTOR, name, salt=number + 1))
        for number, name in enumerate(names)
    }
    leaves = GivenLeaves(devices)
    mapper = Mapper(leaves=leaves)
    try:
        yield mapper, devices
    finally:
        for device in devices.values():
            device.heal()
            device.release()
        Caller(mapper.close).done()
    assert not leaves.opened, "leaves that were not given back"


# Suspend waits for what is under way, and only for that.


def test_a_suspend_waits_for_the_request_under_way():
    with mapper_on("disk") as (dm, disks):
        device = dm.create("a", "0 256 linear disk 0")
        disks["disk"].hang(["read"])
        reader = Caller(read, device, 0)
        disks["disk"].wait_hanging()
        suspender = Caller(dm.suspend, "a")
        assert suspender.stuck()
        disks["disk"].release()
        reader.done()
        suspender.done()


def test_a_request_to_a_suspended_device_waits_for_the_resume():
    with mapper_on("disk") as (dm, disks):
        device = dm.create("a", "0 256 linear disk 0")
        dm.suspend("a")
        callers = [
            Caller(read, device, 7),
            Caller(write, device, 8, bytes(SECTOR)),
            Caller(device.flush),
            Caller(device.discard, 4096, 512),
            Caller(device.write_zeroes, 0, 512),
            Caller(lambda: list(device.extents(0, 512))),
        ]
        assert all(caller.stuck() for caller in callers)
        assert disks["disk"].calls["read"] == disks["disk"].calls["write"] == 0
        dm.resume("a")
        for caller in callers:
            caller.done()
        assert callers[0].result == pattern(7 * SECTOR, SECTOR, 1).tobytes()


def test_a_waiting_request_goes_to_the_new_table():
    with mapper_on("old", "new") as (dm, disks):
        device = dm.create("a", "0 256 linear old 0")
        dm.suspend("a")
        reader = Caller(read, device, 3)
        assert reader.stuck()
        dm.load("a", "0 256 linear new 0")
        dm.resume("a")
        assert reader.done() == pattern(3 * SECTOR, SECTOR, 2).tobytes()


def test_a_suspended_lower_device_stops_the_requests_to_its_part_only():
    with mapper_on("left", "right") as (dm, disks):
        dm.create("l", "0 100 linear left 0")
        dm.create("r", "0 100 linear right 0")
        top = dm.create("top", "0 100 linear /dev/mapper/l 0\n100 100 linear /dev/mapper/r 0")
        dm.suspend("l")
        waiting = Caller(read, top, 5)
        assert Caller(read, top, 150).done() == pattern(50 * SECTOR, SECTOR, 2).tobytes()
        assert waiting.stuck()
        across = Caller(read, top, 99, 2)
        assert across.stuck()
        dm.load("l", "0 100 linear right 100")
        dm.resume("l")
        assert waiting.done() == pattern(105 * SECTOR, SECTOR, 2).tobytes()
        across.done()


def test_a_change_at_the_bottom_reaches_the_top_of_a_high_stack():
    with mapper_on("old", "new") as (dm, disks):
        dm.create("d0", "0 64 linear old 0")
        for n in range(1, 6):
            top = dm.create(f"d{n}", f"0 64 linear /dev/mapper/d{n - 1} 0")
        # A short way to the bottom besides, so that the order of the layers matters.
        top = dm.create("top", "0 64 linear /dev/mapper/d5 0\n64 64 linear /dev/mapper/d0 0")
        assert read(top, 1) == pattern(SECTOR, SECTOR, 1).tobytes()
        dm.suspend("d0")
        callers = [Caller(read, top, sector) for sector in (1, 65)]
        assert all(caller.stuck() for caller in callers)
        dm.load("d0", "0 64 linear new 0")
        dm.resume("d0")
        for caller in callers:
            assert caller.done() == pattern(SECTOR, SECTOR, 2).tobytes()
        assert read(top, 1) == read(top, 65) == pattern(SECTOR, SECTOR, 2).tobytes()


@pytest.mark.parametrize("layer", ["linear /dev/mapper/low 0", "striped 1 8 /dev/mapper/low 0"])
def test_a_lower_device_that_becomes_read_only_refuses_the_writes_from_above(layer):
    with mapper_on("disk") as (dm, disks):
        dm.create("low", "0 64 linear disk 0")
        top = dm.create("top", f"0 64 {layer}")
        write(top, 0, bytes(SECTOR))
        dm.load("low", "0 64 linear disk 0", readonly=True)
        dm.resume("low")
        for call in (
            lambda: write(top, 0, b"x" * SECTOR),
            lambda: top.write_zeroes(0, SECTOR),
            lambda: top.discard(0, SECTOR),
        ):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == errno.EROFS
        assert read(top, 0) == bytes(SECTOR)


def test_a_suspended_leg_of_a_stripe_stops_the_chunks_on_it_only():
    with mapper_on("left", "right") as (dm, disks):
        dm.create("l", "0 64 linear left 0")
        dm.create("r", "0 64 linear right 0")
        dm.create("s", "0 128 striped 2 8 /dev/mapper/l 0 /dev/mapper/r 0")
        top = dm.create("top", "0 128 linear /dev/mapper/s 0")
        dm.suspend("l")
        waiting = Caller(read, top, 0)
        assert Caller(read, top, 8).done() == pattern(0, SECTOR, 2).tobytes()
        assert waiting.stuck()
        dm.resume("l")
        assert waiting.done() == pattern(0, SECTOR, 1).tobytes()


def test_a_lower_suspend_waits_for_requests_that_pass_over_it():
    with mapper_on("disk") as (dm, disks):
        dm.create("low", "0 100 linear disk 0")
        dm.create("mid", "0 100 linear /dev/mapper/low 0")
        top = dm.create("top", "0 100 linear /dev/mapper/mid 0")
        disks["disk"].hang(["read"])
        reader = Caller(read, top, 0)
        disks["disk"].wait_hanging()
        suspender = Caller(dm.suspend, "low")
        assert suspender.stuck()
        disks["disk"].release()
        reader.done()
        suspender.done()


def test_a_lower_suspend_waits_for_requests_on_the_legs_of_a_stripe_above():
    with mapper_on("left", "right") as (dm, disks):
        dm.create("l", "0 64 linear left 0")
        top = dm.create("s", "0 128 striped 2 8 /dev/mapper/l 0 right 0")
        disks["left"].hang(["read"])
        reader = Caller(read, top, 0)
        disks["left"].wait_hanging()
        suspender = Caller(dm.suspend, "l")
        assert suspender.stuck()
        disks["left"].release()
        reader.done()
        suspender.done()


def test_neighbours_on_one_disk_that_belong_to_two_devices_are_suspended_apart():
    """They are one stretch of the disk, and still two ways to it."""
    with mapper_on("disk") as (dm, disks):
        dm.create("l", "0 64 linear disk 0")
        dm.create("r", "0 64 linear disk 64")
        top = dm.create("top", "0 64 linear /dev/mapper/l 0\n64 64 linear /dev/mapper/r 0")
        disks["disk"].hang(["read"], [(64 * SECTOR, SECTOR)])
        reader = Caller(read, top, 64)
        disks["disk"].wait_hanging()
        Caller(dm.suspend, "l").done()
        suspender = Caller(dm.suspend, "r")
        assert suspender.stuck()
        disks["disk"].release()
        reader.done()
        suspender.done()
        dm.resume("l")
        dm.resume("r")


@pytest.mark.parametrize("layer", ["linear /dev/mapper/b 0", "striped 1 8 /dev/mapper/b 0"])
def test_a_suspend_waits_for_requests_on_plans_from_before_somebody_elses_suspend(layer):
    """A neighbour's suspend gives the holder a new plan; the old one is still in use."""
    with mapper_on("one", "two") as (dm, disks):
        dm.create("b", "0 64 linear one 0")
        dm.create("c", "0 64 linear two 0")
        top = dm.create("top", f"0 64 {layer}\n64 64 linear /dev/mapper/c 0")
        disks["one"].hang(["read"])
        reader = Caller(read, top, 0)
        disks["one"].wait_hanging()
        Caller(dm.suspend, "c").done()
        Caller(dm.resume, "c").done()
        suspenders = [Caller(dm.suspend, "b"), Caller(dm.suspend, "top", noflush=True)]
        assert all(suspender.stuck() for suspender in suspenders)
        disks["one"].release()
        reader.done()
        for suspender in suspenders:
            suspender.done()


@pytest.mark.parametrize("layer", ["linear /dev/mapper/b 0", "striped 1 8 /dev/mapper/b 0"])
def test_a_lower_suspend_waits_for_a_holder_that_is_being_suspended(layer):
    """The holder's requests are still draining, over the device that is suspended second."""
    with mapper_on("disk") as (dm, disks):
        dm.create("b", "0 64 linear disk 0")
        top = dm.create("top", f"0 64 {layer}")
        disks["disk"].hang(["read"])
        reader = Caller(read, top, 0)
        disks["disk"].wait_hanging()
        upper = Caller(dm.suspend, "top")
        assert upper.stuck()
        lower = Caller(dm.suspend, "b")
        assert lower.stuck()
        disks["disk"].release()
        for caller in (reader, upper, lower):
            caller.done()


class PausingSegment:
    """Stands in for a segment of a plan; who is the first to look at its lane is held there.

    That is the moment between picking a segment and entering its lane.
    """

    def __init__(self, segment):
        self.segment = segment
        self.reached, self.go_on = threading.Event(), threading.Event()

    @property
    def lane(self):
        if not self.reached.is_set():
            self.reached.set()
            assert self.go_on.wait(LIMIT)
        return self.segment.lane

    def __getattr__(self, name):
        return getattr(self.segment, name)


class PausingPlan:
    """Stands in for the plan of an opening; who is the first to enter it is held there.

    That is the moment between looking at the plan and being counted on it.
    """

    def __init__(self, plan):
        self.plan = plan
        self.reached, self.go_on = threading.Event(), threading.Event()

    @property
    def entered(self):
        if not self.reached.is_set():
            self.reached.set()
            assert self.go_on.wait(LIMIT)
        return self.plan.entered

    @entered.setter
    def entered(self, number):
        self.plan.entered = number

    def __getattr__(self, name):
        return getattr(self.plan, name)


def opening_of(device):
    """An opening that has made requests, and whose next ones are not timed."""
    opening = Opening(device, 1 << 20)
    data = memoryview(bytearray(SECTOR))
    opening.read(data, 0)
    opening.write(data, 0)
    return opening


@pytest.mark.parametrize("way", ["read", "write", "zero", "open read", "open write"])
def test_a_request_that_has_only_picked_its_segment_does_not_use_it_after_a_suspend(way, tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).write_bytes(bytes(64 * SECTOR))
    with Mapper() as dm:
        device = dm.create("m", "0 64 linear old 0", cwd=str(tmp_path))
        opening = opening_of(device)
        (tmp_path / "old").write_bytes(b"o" * 64 * SECTOR)
        (tmp_path / "new").write_bytes(b"n" * 64 * SECTOR)
        data = bytearray(b"w" * SECTOR)
        view = memoryview(data)
        if way.startswith("open"):
            pausing = opening.plan = PausingPlan(opening.plan)
        else:
            segments = device.plan_to_pass.segments
            pausing = segments[0] = PausingSegment(segments[0])
        calls = {
            "read": lambda: device.preadv([view], 0),
            "write": lambda: device.pwritev([view], 0),
            "zero": lambda: device.write_zeroes(0, SECTOR),
            "open read": lambda: opening.read(view, 0),
            "open write": lambda: opening.write(view, 0),
        }
        caller = Caller(calls[way])
        assert pausing.reached.wait(LIMIT)
        Caller(dm.suspend, "m").done()
        pausing.go_on.set()
        assert caller.stuck(), "it went on although the device was suspended"
        dm.load("m", "0 64 linear new 0", cwd=str(tmp_path))
        dm.resume("m")
        caller.done()
        assert (tmp_path / "old").read_bytes() == b"o" * 64 * SECTOR
        after = {"read": b"n", "open read": b"n", "zero": b"\0"}.get(way, b"w")
        assert (tmp_path / "new").read_bytes()[:SECTOR] == after * SECTOR
        if "read" in way:
            assert data == b"n" * SECTOR


@pytest.mark.parametrize("op", ["read", "write", "flush", "discard", "zero", "extents"])
def test_a_leg_that_has_only_picked_its_segment_does_not_use_it_after_a_suspend(op):
    with mapper_on("old", "new") as (dm, disks):
        dm.create("low", "0 64 linear old 0")
        top = dm.create("top", "0 64 striped 1 8 /dev/mapper/low 0")
        (leg,) = top.live.lines[0].target.legs
        pausing = leg.segment = PausingSegment(leg.segment)
        calls = {
            "read": lambda: read(top, 3),
            "write": lambda: write(top, 3, bytes(SECTOR)),
            "flush": top.flush,
            "discard": lambda: top.discard(0, SECTOR),
            "zero": lambda: top.write_zeroes(0, SECTOR),
            "extents": lambda: list(top.extents(0, SECTOR)),
        }
        caller = Caller(calls[op])
        assert pausing.reached.wait(LIMIT)
        Caller(dm.suspend, "low").done()
        pausing.go_on.set()
        assert caller.stuck(), "it went on although the device was suspended"
        assert not disks["old"].calls[op]
        dm.load("low", "0 64 linear new 0")
        dm.resume("low")
        caller.done()
        assert not disks["old"].calls[op]
        assert disks["new"].calls[op]


@pytest.mark.parametrize("way", ["read", "write"])
def test_a_short_cut_to_a_file_does_not_outlive_the_device_that_it_passes_over(way, tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).write_bytes(bytes(64 * SECTOR))
    with Mapper() as dm:
        dm.create("low", "0 64 linear old 0", cwd=str(tmp_path))
        top = dm.create("top", "0 64 striped 1 8 /dev/mapper/low 0")
        opening = opening_of(top)
        (tmp_path / "old").write_bytes(b"o" * 64 * SECTOR)
        (tmp_path / "new").write_bytes(b"n" * 64 * SECTOR)
        reached, go_on = threading.Event(), threading.Event()
        segment = top.plan_to_pass.segments[0]
        spot = getattr(segment, f"{way}_spot")

        def slow_spot(offset, length):
            found = spot(offset, length)
            reached.set()
            assert go_on.wait(LIMIT)
            return found

        setattr(segment, f"{way}_spot", slow_spot)
        view = memoryview(bytearray(b"w" * SECTOR))
        caller = Caller(getattr(opening, way), view, 0)
        assert reached.wait(LIMIT)
        dm.load("low", "0 64 linear new 0", cwd=str(tmp_path))
        mover = Caller(dm.resume, "low")
        assert mover.stuck(), "the move did not wait for the request"
        # The numbers of descriptors that were closed have new owners at once.
        (tmp_path / "stranger").write_bytes(b"s" * 64 * SECTOR)
        strangers = [open(tmp_path / "stranger", "r+b") for _ in range(8)]
        go_on.set()
        mover.done()
        caller.done()
        for stranger in strangers:
            stranger.close()
        assert (tmp_path / "stranger").read_bytes() == b"s" * 64 * SECTOR
        # It found that the plan had changed, and went to the new place.
        if way == "read":
            assert view == b"n" * SECTOR
        else:
            assert (tmp_path / "new").read_bytes()[:SECTOR] == b"w" * SECTOR
            assert (tmp_path / "old").read_bytes() == b"o" * 64 * SECTOR


def test_a_flush_that_waits_below_does_not_block_reads_elsewhere():
    with mapper_on("one", "two") as (dm, disks):
        dm.create("b", "0 64 linear one 0")
        top = dm.create("top", "0 64 linear /dev/mapper/b 0\n64 64 linear two 0")
        dm.suspend("b")
        flusher = Caller(top.flush)
        assert flusher.stuck()
        Caller(read, top, 100).done()
        dm.resume("b")
        flusher.done()
        assert disks["one"].calls["flush"] and disks["two"].calls["flush"]


def test_an_upper_suspend_over_a_suspended_device_ends_when_that_is_resumed():
    with mapper_on("disk") as (dm, disks):
        dm.create("low", "0 64 linear disk 0")
        top = dm.create("top", "0 64 linear /dev/mapper/low 0")
        dm.suspend("low")
        reader = Caller(read, top, 0)
        assert reader.stuck()
        upper = Caller(dm.suspend, "top")
        assert upper.stuck()
        # Meanwhile the rest of the mapper answers.
        Caller(dm.devices).done()
        Caller(top.info).done()
        Caller(top.status_text).done()
        Caller(dm.create, "other", "0 8 zero").done()
        Caller(dm.resume, "low").done()
        reader.done()
        upper.done()


def test_an_idle_device_over_a_suspended_one_is_suspended_at_once():
    """As in the kernel, in any order: a suspend asks nothing of the devices below."""
    with mapper_on("disk") as (dm, disks):
        dm.create("low", "0 64 linear disk 0")
        dm.create("mid", "0 64 striped 1 8 /dev/mapper/low 0")
        dm.create("top", "0 64 linear /dev/mapper/mid 0")
        for name in ("low", "mid", "top"):
            try:
                Caller(dm.suspend, name).done(5)
            except AssertionError:
                dm.resume("low")
                raise


# Failing and vanishing devices.


def test_a_device_on_a_dead_disk_can_be_moved_to_another():
    with mapper_on("disk") as (dm, disks):
        device = dm.create("a", "0 64 linear disk 0")
        disks["disk"].fail(forever=True)
        with pytest.raises(OSError):
            read(device, 0)
        Caller(dm.suspend, "a").done()
        dm.load("a", "0 64 zero")
        dm.resume("a")
        assert read(device, 0) == bytes(SECTOR)


def test_a_failing_request_leaves_nothing_to_wait_for():
    with mapper_on("disk") as (dm, disks):
        top = dm.create("top", "0 64 striped 1 8 disk 0\n64 64 linear disk 64")
        disks["disk"].fail(forever=True)
        for call in (
            lambda: read(top, 0),
            lambda: read(top, 60, 8),
            lambda: write(top, 100, bytes(SECTOR)),
            lambda: top.discard(0, 128 * SECTOR),
            lambda: top.write_zeroes(0, 128 * SECTOR),
            top.flush,
            lambda: list(top.extents(0, 128 * SECTOR)),
        ):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == errno.EIO
        Caller(dm.suspend, "top").done()
        assert top.stats.in_flight == 0
        assert top.stats.errors == 7


def test_removal_of_a_device_that_is_held_is_refused():
    with mapper_on("disk") as (dm, disks):
        low = dm.create("low", "0 64 linear disk 0")
        top = dm.create("top", "0 64 linear /dev/mapper/low 0")
        with pytest.raises(OSError) as caught:
            dm.remove("low")
        assert caught.value.errno == errno.EBUSY
        assert "top" in str(caught.value)
        top.open()
        with pytest.raises(OSError) as caught:
            dm.remove("top")
        assert caught.value.errno == errno.EBUSY
        top.release()
        assert read(top, 1) == read(low, 1) == pattern(SECTOR, SECTOR, 1).tobytes()
        dm.remove("top")
        dm.remove("low")


def test_requests_that_wait_on_a_removed_device_fail():
    with mapper_on("disk") as (dm, disks):
        device = dm.create("a", "0 64 linear disk 0")
        dm.suspend("a")
        callers = [Caller(read, device, 0), Caller(device.flush)]
        assert all(caller.stuck() for caller in callers)
        Caller(dm.remove, "a").done()
        for caller in callers:
            with pytest.raises(OSError) as caught:
                caller.done()
            assert caught.value.errno == errno.ENXIO


def test_a_removal_waits_for_the_request_under_way():
    with mapper_on("disk") as (dm, disks):
        device = dm.create("a", "0 64 linear disk 0")
        disks["disk"].hang(["read"])
        reader = Caller(read, device, 0)
        disks["disk"].wait_hanging()
        remover = Caller(dm.remove, "a")
        assert remover.stuck()
        disks["disk"].release()
        reader.done()
        remover.done()


def test_closing_the_mapper_ends_requests_that_wait_on_a_suspended_device():
    with mapper_on("disk") as (dm, disks):
        dm.create("low", "0 64 linear disk 0")
        top = dm.create("top", "0 64 linear /dev/mapper/low 0")
        dm.suspend("low")
        reader = Caller(read, top, 0)
        assert reader.stuck()
        closer = Caller(dm.close)
        try:
            closer.done(5)
        except OSError:
            # The first flush that failed may be reported; that it ends is what counts.
            pass
        except AssertionError:
            dm.resume("low")
            raise
        with pytest.raises(OSError):
            reader.done()


def test_closing_the_mapper_while_a_lower_device_is_suspended_does_not_hang():
    with mapper_on("disk") as (dm, disks):
        dm.create("low", "0 64 linear disk 0")
        dm.create("top", "0 64 striped 1 8 /dev/mapper/low 0")
        dm.suspend("low")
        closer = Caller(dm.close)
        try:
            closer.done(5)
        except OSError:
            pass
        except AssertionError:
            dm.resume("low")
            raise


def test_a_table_that_was_parsed_for_a_device_now_gone_is_given_back():
    with mapper_on("disk") as (dm, disks):
        low = dm.create("low", "0 64 linear disk 0")
        device = dm.create("a", "0 8 zero")
        open_leaf = dm._leaves.open

        def remove_meanwhile(word, **how):
            dm.remove("a")
            return open_leaf(word, **how)

        dm._leaves.open = remove_meanwhile
        with pytest.raises(OSError) as caught:
            dm.load("a", "0 8 linear /dev/mapper/low 0\n8 8 linear disk 0")
        assert caught.value.errno == errno.ENXIO
        assert device.removed
        assert low.open_count == 0


def test_two_tables_that_would_make_a_loop_together_are_not_both_loaded():
    with mapper_on("disk") as (dm, disks):
        dm.create("a", "0 16 zero")
        dm.create("b", "0 16 zero")
        open_leaf = dm._leaves.open

        def load_meanwhile(word, **how):
            dm._leaves.open = open_leaf
            dm.load("b", "0 16 linear /dev/mapper/a 0")
            return open_leaf(word, **how)

        dm._leaves.open = load_meanwhile
        with pytest.raises((TableError, OSError)) as caught:
            dm.load("a", "0 8 linear /dev/mapper/b 0\n8 8 linear disk 0")
        assert getattr(caught.value, "errno", None) == errno.ELOOP or "itself" in str(caught.value)


# The journal.


class Journal:
    """Keeps entries in a dict; may be told to wait, or to fail."""

    def __init__(self):
        self.kept = {}
        self.error = None
        self.before_record = lambda entry: None
        self.before_forget = lambda minor: None

    def record(self, entry):
        self.before_record(entry)
        if self.error is not None:
            raise DeviceError(self.error, "journal: no space")
        self.kept[entry["minor"]] = entry

    def forget(self, minor):
        self.before_forget(minor)
        if self.error is not None:
            raise DeviceError(self.error, "journal: no space")
        self.kept.pop(minor, None)

    def entries(self):
        return [self.kept[minor] for minor in sorted(self.kept)]


def test_the_journal_has_the_last_state_when_two_threads_change_it():
    journal = Journal()
    with Mapper(journal=journal) as dm:
        device = dm.create("a", "0 8 zero")
        waiting, go_on = threading.Event(), threading.Event()

        def hold_the_first(entry):
            if entry["suspended"]:
                waiting.set()
                go_on.wait(LIMIT)

        journal.before_record = hold_the_first
        suspender = Caller(dm.suspend, "a")
        assert waiting.wait(LIMIT)
        resumer = Caller(dm.resume, "a")
        resumer.stuck()
        go_on.set()
        suspender.done()
        resumer.done()
        assert journal.kept[device.minor]["suspended"] == device.suspended


def test_a_removed_device_does_not_come_back_to_the_journal():
    journal = Journal()
    with Mapper(journal=journal) as dm:
        device = dm.create("a", "0 8 zero")
        waiting, go_on = threading.Event(), threading.Event()

        def hold(entry):
            waiting.set()
            go_on.wait(LIMIT)

        journal.before_record = hold
        loader = Caller(dm.load, "a", "0 16 zero")
        assert waiting.wait(LIMIT)
        remover = Caller(dm.remove, "a")
        remover.stuck()
        go_on.set()
        remover.done()
        try:
            loader.done()
        except OSError as error:
            assert error.errno == errno.ENXIO
        assert device.minor not in journal.kept


def test_a_number_is_not_given_away_before_the_journal_has_forgotten_it():
    journal = Journal()
    with Mapper(journal=journal) as dm:
        dm.create("a", "0 8 zero")
        journal.before_forget = lambda minor: Caller(dm.create, "b", "0 8 zero").done()
        dm.remove("a")
        assert list(journal.kept) == [dm.device("b").minor]


def test_a_change_that_cannot_be_noted_is_reported_and_not_made():
    journal = Journal()
    with Mapper(journal=journal) as dm:
        device = dm.create("a", "0 8 zero")
        noted = dict(journal.kept)
        journal.error = errno.ENOSPC
        for call in (
            lambda: dm.load("a", "0 16 zero"),
            lambda: dm.suspend("a"),
            lambda: dm.rename("a", "b"),
            lambda: dm.set_uuid("a", "u"),
            lambda: dm.create("c", "0 8 zero"),
            lambda: dm.remove("a"),
        ):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == errno.ENOSPC
            assert [d.name for d in dm.devices()] == ["a"]
            assert not device.suspended
            assert device.inactive is None
            assert device.uuid == ""
        assert journal.kept == noted
        journal.error = None


def state_of(device):
    """A device as its entry in the journal should have it."""
    return {
        "minor": device.minor,
        "name": device.name,
        "uuid": device.uuid,
        "readonly": device.readonly,
        "suspended": device.suspended,
        "live": device.table_text() or None,
        "inactive": device.table_text(inactive=True) or None,
    }


def test_the_journal_is_true_after_many_threads_have_changed_everything():
    journal = Journal()
    allowed = (errno.EBUSY, errno.ENXIO, errno.EINVAL, errno.ELOOP)
    with Mapper(journal=journal) as dm:
        swarm = Swarm()

        def change(rng):
            name = f"d{rng.randrange(3)}"
            table = f"0 {rng.randrange(1, 9)} zero"
            if rng.random() < 0.3:
                table = f"0 1 linear /dev/mapper/d{rng.randrange(3)} 0"
            steps = [
                lambda: dm.create(name, rng.choice([None, table]), readonly=rng.random() < 0.2),
                lambda: dm.load(name, table, readonly=rng.choice([None, True, False])),
                lambda: dm.clear(name),
                lambda: dm.suspend(name),
                lambda: dm.resume(name),
                lambda: dm.rename(name, f"d{rng.randrange(3)}"),
                lambda: dm.set_uuid(name, f"u{rng.randrange(3)}"),
                lambda: dm.remove(name, force=rng.random() < 0.3, deferred=rng.random() < 0.2),
            ]
            try:
                rng.choice(steps)()
            except OSError as error:
                assert error.errno in (*allowed, errno.EACCES), error
            except TableError:
                pass

        for n in range(4):
            swarm.add(f"changer {n}", change)
        swarm.run(1.5)
        devices = {device.minor: device for device in dm.devices()}
        assert journal.kept.keys() == devices.keys()
        for minor, entry in journal.kept.items():
            assert {key: entry[key] for key in state_of(devices[minor])} == state_of(
                devices[minor]
            )
        # No device is held by one that is gone.
        for device in devices.values():
            assert set(device.holders) <= set(devices.values())
        for device in devices.values():
            tables = [table for table in (device.live, device.inactive) if table is not None]
            for table in tables:
                assert all(below.holders[device] for below in table.devices)


# Everything at once.


class Swarm:
    """Threads that work until told to stop, and the first thing that went wrong."""

    def __init__(self):
        self.stop = threading.Event()
        self.failures = []
        self.rounds = {}
        self.threads = []

    def add(self, name, step):
        def run():
            rng = random.Random(name)
            try:
                while not self.stop.is_set():
                    step(rng)
                    self.rounds[name] = self.rounds.get(name, 0) + 1
            except BaseException as error:
                self.failures.append(error)
                self.stop.set()

        self.threads.append(threading.Thread(target=run, name=name, daemon=True))

    def run(self, seconds):
        # Threads take turns far more often than Python lets them, to meet in the worst places.
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            for thread in self.threads:
                thread.start()
            self.stop.wait(seconds)
            self.stop.set()
            for thread in self.threads:
                thread.join(LIMIT)
                if thread.is_alive():
                    faulthandler.dump_traceback(all_threads=True)
                    raise AssertionError(f"{thread.name} hangs")
        finally:
            sys.setswitchinterval(interval)
        if self.failures:
            raise self.failures[0]
        assert all(self.rounds.get(thread.name) for thread in self.threads), self.rounds


def worker(device, model, begin, count):
    """A step that reads or writes a region nobody else writes, and compares with a model."""

    def step(rng):
        sector = begin + rng.randrange(count)
        length = rng.randint(1, min(32, begin + count - sector))
        window = slice(sector * SECTOR, (sector + length) * SECTOR)
        op = rng.choice(("read", "write", "write", "zero", "flush"))
        if op == "read":
            expect_equal(memoryview(read(device, sector, length)), model[window], window.start)
        elif op == "write":
            model[window] = pattern(window.start, length * SECTOR, rng.randrange(1, 60000))
            write(device, sector, model[window])
        elif op == "zero":
            model[window] = 0
            device.write_zeroes(window.start, length * SECTOR)
        else:
            device.flush()

    return step


def test_four_threads_of_requests_survive_suspend_resume_load_and_rename():
    """The tables that are loaded all lead to the same place, by different ways."""
    with mapper_on("one", "two", sectors=512) as (dm, disks):
        top = dm.create("top", "0 256 linear one 0\n256 256 linear two 0")
        tables = [
            "0 256 linear one 0\n256 256 linear two 0",
            "0 256 striped 1 8 one 0\n256 256 linear two 0",
            "0 128 linear one 0\n128 128 linear one 128\n256 256 striped 1 64 two 0",
            "0 256 linear one 0\n256 256 unstriped 1 4 0 two 0",
        ]
        names = ["top", "other"]
        model = np.frombuffer(read(top, 0, 512), np.uint8).copy()
        swarm = Swarm()
        for n in range(4):
            swarm.add(f"worker {n}", worker(top, model, n * 128, 128))

        def change(rng):
            name = top.name
            what = rng.choice(("suspend", "load", "rename", "clear", "noflush"))
            if what in ("suspend", "noflush"):
                dm.suspend(name, noflush=what == "noflush")
                if rng.random() < 0.5:
                    dm.load(name, rng.choice(tables))
                dm.resume(name)
            elif what == "load":
                dm.load(name, rng.choice(tables))
                dm.resume(name)
            elif what == "clear":
                dm.load(name, rng.choice(tables))
                dm.clear(name)
            else:
                dm.rename(name, names[name == "top"])
            top.info()
            top.status_text()

        swarm.add("changer", change)
        swarm.run(1.0)
        expect_equal(memoryview(read(top, 0, 512)), model, 0, "at the end")
        assert top.stats.in_flight == 0 and top.stats.errors == 0


def test_four_threads_on_a_stack_survive_changes_of_every_device_in_it():
    """Lower devices are suspended, moved between equal places and resumed under holders."""
    with mapper_on("one", "two", sectors=256) as (dm, disks):
        dm.create("a", "0 256 linear one 0")
        dm.create("b", "0 256 linear two 0")
        dm.create("s", "0 256 striped 2 8 /dev/mapper/a 0 /dev/mapper/b 0")
        dm.create("m", "0 256 linear /dev/mapper/s 0")
        top = dm.create(
            "top",
            "0 256 linear /dev/mapper/m 0\n"
            "256 128 linear /dev/mapper/a 128\n"
            "384 128 linear /dev/mapper/b 128",
        )
        tables = {
            "a": ["0 256 linear one 0", "0 256 striped 1 8 one 0"],
            "b": ["0 256 linear two 0", "0 100 linear two 0\n100 156 linear two 100"],
            "s": ["0 256 striped 2 8 /dev/mapper/a 0 /dev/mapper/b 0"],
            "m": [
                "0 256 linear /dev/mapper/s 0",
                "0 64 linear /dev/mapper/s 0\n64 192 linear /dev/mapper/s 64",
                "0 256 unstriped 1 8 0 /dev/mapper/s 0",
            ],
        }
        model = np.frombuffer(read(top, 0, 512), np.uint8).copy()
        swarm = Swarm()
        for n in range(4):
            swarm.add(f"worker {n}", worker(top, model, n * 128, 128))

        def change(rng):
            name = rng.choice([*tables, "top"])
            dm.suspend(name)
            if name in tables and rng.random() < 0.5:
                dm.load(name, rng.choice(tables[name]))
            dm.resume(name)

        swarm.add("changer 1", change)
        swarm.add("changer 2", change)
        swarm.run(1.5)
        expect_equal(memoryview(read(top, 0, 512)), model, 0, "at the end")
        assert top.stats.in_flight == 0 and top.stats.errors == 0


def test_requests_by_file_descriptor_go_to_the_right_file_while_files_are_exchanged(tmp_path):
    """A descriptor that was closed has a new owner at once; nobody may still use the number."""
    content = {}
    for name, salt in (("a", 0x5A01), ("b", 0x5A01), ("stranger", 0x7777)):
        content[name] = pattern(0, 64 * SECTOR, salt).tobytes()
        (tmp_path / name).write_bytes(content[name])
    with Mapper() as dm:
        dm.create("low", "0 64 linear a 0", cwd=str(tmp_path))
        device = dm.create("m", "0 64 linear /dev/mapper/low 0", cwd=str(tmp_path))
        opening = Opening(device, 1 << 20)
        swarm = Swarm()

        def reader(rng):
            sector = rng.randrange(64)
            data = bytearray(SECTOR)
            opening.read(memoryview(data), sector * SECTOR)
            assert data == content["a"][sector * SECTOR : (sector + 1) * SECTOR]

        def writer(rng):
            sector = rng.randrange(64)
            view = memoryview(content["a"])[sector * SECTOR : (sector + 1) * SECTOR]
            opening.write(view, sector * SECTOR)

        def exchange(rng):
            name, below = rng.choice([("low", ""), ("m", ""), ("m", "/dev/mapper/low")])
            target = rng.choice(["linear", "striped 1 8", "unstriped 1 64 0"])
            dm.load(name, f"0 64 {target} {below or rng.choice('ab')} 0", cwd=str(tmp_path))
            dm.resume(name)

        def stranger(rng):
            with open(tmp_path / "stranger", "r+b") as file:
                time.sleep(0)
                file.seek(0)
                assert file.read() == content["stranger"]

        swarm.add("reader 1", reader)
        swarm.add("reader 2", reader)
        swarm.add("writer", writer)
        swarm.add("exchange", exchange)
        swarm.add("stranger", stranger)
        swarm.run(1.5)
    for name, expected in content.items():
        assert (tmp_path / name).read_bytes() == expected


def test_a_suspended_lower_device_is_quiet_whatever_happens_above():
    """Between suspend() and resume() nothing reaches the disk below, from any plan."""
    with mapper_on("one", "two", sectors=256) as (dm, disks):
        dm.create("a", "0 256 linear one 0")
        dm.create("b", "0 256 linear two 0")
        dm.create("s", "0 256 striped 2 8 /dev/mapper/a 0 /dev/mapper/b 0")
        top = dm.create("top", "0 256 linear /dev/mapper/s 0\n256 128 linear /dev/mapper/a 128")
        disks["one"].delay = 0.0002
        swarm = Swarm()
        for n in range(3):
            swarm.add(f"reader {n}", lambda rng: read(top, rng.randrange(384)))

        def churn(rng):
            name = rng.choice(["b", "s", "top"])
            dm.suspend(name, noflush=True)
            dm.resume(name)

        def check(rng):
            dm.suspend("a", noflush=True)
            before = disks["one"].calls.total(), len(disks["one"].device.log)
            time.sleep(0.002)
            after = disks["one"].calls.total(), len(disks["one"].device.log)
            dm.resume("a")
            assert before == after, "a request reached the disk under a suspended device"

        swarm.add("checker", check)
        swarm.add("churn", churn)
        swarm.run(1.5)


def test_devices_made_and_removed_by_many_threads_leave_nothing_behind():
    with mapper_on("disk") as (dm, disks):
        swarm = Swarm()

        def live(rng):
            number = rng.randrange(4)
            try:
                device = dm.create(f"d{number}", "0 64 linear disk 0")
                dm.create(f"u{number}", f"0 64 linear /dev/mapper/d{number} 0")
                read(device, 0)
            except OSError as error:
                assert error.errno in (errno.EBUSY, errno.ENXIO), error
            except TableError as error:
                assert "disk" not in str(error)
            for name in (f"u{number}", f"d{number}"):
                try:
                    dm.remove(name, deferred=rng.random() < 0.2)
                except OSError as error:
                    assert error.errno in (errno.EBUSY, errno.ENXIO), error

        for n in range(4):
            swarm.add(f"life {n}", live)
        swarm.run(1.0)
        for prefix in "ud":
            for device in dm.devices():
                if device.name.startswith(prefix):
                    dm.remove(device.name)
        assert dm.devices() == []
        assert not dm._leaves.opened
