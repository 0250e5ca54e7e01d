"""The life of one device: requests, tables, suspend and resume, events."""

import errno
import logging
import threading

import pytest

from dmpy.device import DATA, HOLE, Extent
from dmpy.mapper import Mapper
from dmpy.testing import FaultyDevice, PatternDevice

SECTOR = 512


class Words:
    """Leaves that are devices of ours, by word."""

    def __init__(self, **devices):
        self.devices = devices

    def open(self, word, *, readonly, cwd):
        return self.devices[word]

    def release(self, device):
        pass

    def close(self):
        pass


@pytest.fixture
def dm():
    with Mapper() as mapper:
        yield mapper


def read(device, offset, length):
    data = bytearray(length)
    device.preadv([memoryview(data)], offset)
    return bytes(data)


def write(device, offset, data, **options):
    device.pwritev([memoryview(data)], offset, **options)


def in_background(act):
    """Run `act` in a thread; returns the thread and a list that gets what it raised."""
    raised = []

    def run():
        try:
            act()
        except OSError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


def until(condition):
    for _ in range(5000):
        if condition():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it never came to be")


def test_a_request_over_several_segments_moves_all_its_bytes(dm):
    device = dm.create("d", "0 1 linear mem:4096 3\n1 2 linear mem:8192 0\n3 1 zero")
    data = bytes(range(256)) * 8
    device.pwritev([memoryview(data)[:700], memoryview(data)[700:]], 0)
    assert read(device, 0, 2048) == data[:1536] + bytes(512)
    assert read(device, 511, 2) == data[511:513]


@pytest.mark.parametrize(
    ("offset", "length"), [(-512, 512), (0, 4608), (4096, 512), (1 << 70, 1), (4095, 2)]
)
def test_a_request_outside_the_device_moves_nothing(dm, offset, length):
    device = dm.create("d", "0 4 linear mem:64K 0\n4 4 linear mem:64K 64")
    write(device, 0, b"x" * 4096)
    for request in (
        lambda: read(device, offset, length),
        lambda: write(device, offset, b"y" * length),
        lambda: device.write_zeroes(offset, length),
        lambda: device.discard(offset, length),
        lambda: list(device.extents(offset, length)),
    ):
        with pytest.raises(OSError, match="outside the device") as refusal:
            request()
        assert refusal.value.errno == errno.EIO
    assert read(device, 0, 4096) == b"x" * 4096
    assert device.stats.errors == 5


def test_a_device_without_a_table_has_no_bytes(dm):
    device = dm.create("d")
    assert device.size == 0
    with pytest.raises(OSError, match="outside the device"):
        read(device, 0, 512)
    device.flush()
    assert device.table_text() == device.status_text() == ""


def test_zeroes_discards_and_extents_go_through_the_table(dm):
    device = dm.create("d", "0 128 linear mem:64K 0\n128 128 zero\n256 8 error")
    write(device, 0, b"x" * 65536)
    device.write_zeroes(4096, 8192)
    assert read(device, 0, 16384) == b"x" * 4096 + bytes(8192) + b"x" * 4096
    device.discard(0, 65536 * 2)
    assert list(device.extents(0, device.size)) == [
        Extent(0, 65536, HOLE),
        Extent(65536, 65536, HOLE),
        Extent(131072, 4096, DATA),
    ]
    with pytest.raises(OSError, match="error: byte 0"):
        device.write_zeroes(65536, 65536 + 512)


def test_a_read_only_device_refuses_whatever_writes(dm):
    device = dm.create("d", "0 8 linear mem:4096 0", readonly=True)
    for request in (
        lambda: write(device, 0, b"x"),
        lambda: device.discard(0, 512),
        lambda: device.write_zeroes(0, 512),
        lambda: device.open(writable=True),
    ):
        with pytest.raises(OSError, match="d is read-only") as refusal:
            request()
        assert refusal.value.errno == errno.EROFS
    assert read(device, 0, 4096) == bytes(4096)


def test_a_suspended_device_holds_requests_back_until_it_is_resumed(dm):
    device = dm.create("d", "0 8 linear mem:4096 0")
    device.suspend()
    thread, raised = in_background(lambda: write(device, 0, b"x" * 512))
    until(lambda: device.in_flight == 1)
    assert thread.is_alive()
    assert device.info()["suspended"]
    device.resume()
    thread.join(5)
    assert not raised
    assert read(device, 0, 512) == b"x" * 512
    assert device.in_flight == 0


def test_suspend_waits_for_the_requests_that_are_under_way():
    leaf = FaultyDevice(PatternDevice(4096))
    device = Mapper(leaves=Words(slow=leaf)).create("d", "0 8 linear slow 0")
    leaf.hang()
    reader, _ = in_background(lambda: read(device, 0, 512))
    leaf.wait_hanging()
    suspender, _ = in_background(device.suspend)
    suspender.join(0.05)
    assert suspender.is_alive()
    leaf.release()
    suspender.join(5)
    reader.join(5)
    assert not suspender.is_alive()
    assert device.suspended


def test_a_suspended_leg_stops_only_the_requests_that_need_it(dm):
    dm.create("a", "0 64 linear mem:32K 0")
    dm.create("b", "0 64 linear mem:32K 0")
    top = dm.create("top", "0 64 linear a 0\n64 64 linear b 0")
    striped = dm.create("striped", "0 128 striped 2 8 a 0 b 0")
    dm.suspend("b")
    waiting = [in_background(lambda: read(top, 65 * 512, 512))]
    waiting.append(in_background(lambda: read(striped, 0, 16 * 512)))
    until(lambda: dm.device("b").in_flight == 2)
    assert read(top, 0, 512) == bytes(512)
    assert read(striped, 0, 8 * 512) == bytes(8 * 512)
    # The second leg can be suspended although there are requests that wait for the first.
    dm.suspend("a")
    dm.load("a", "0 64 linear mem:64K 0")
    dm.resume("a")
    dm.resume("b")
    for thread, raised in waiting:
        thread.join(5)
        assert not raised
        assert not thread.is_alive()


def test_resume_puts_the_inactive_table_to_use(dm):
    device = dm.create("d", "0 8 zero")
    dm.load("d", "0 16 error")
    assert device.table_text() == "0 8 zero"
    assert device.table_text(inactive=True) == "0 16 error"
    assert device.size == 8 * SECTOR
    dm.resume("d")
    assert device.table_text() == "0 16 error"
    assert device.table_text(inactive=True) == ""
    assert device.size == 16 * SECTOR


def test_clear_drops_the_inactive_table_and_what_it_held(dm):
    low = dm.create("low", "0 8 zero")
    dm.create("d", "0 8 zero")
    dm.load("d", "0 8 linear low 0")
    assert low.open_count == 1
    dm.clear("d")
    dm.clear("d")
    assert low.open_count == 0


def test_a_suspended_device_without_a_table_cannot_be_resumed(dm):
    device = dm.create("d")
    dm.resume("d")
    dm.suspend("d")
    with pytest.raises(OSError, match="no table") as refusal:
        dm.resume("d")
    assert refusal.value.errno == errno.EINVAL
    assert device.suspended


def test_flush_reaches_every_leaf_and_tells_the_first_error():
    a, b = (FaultyDevice(PatternDevice(65536), name=name) for name in "ab")
    dm = Mapper(leaves=Words(a=a, b=b))
    dm.create("low", "0 8 linear a 0\n8 8 linear b 0\n16 8 linear a 8")
    device = dm.create("d", "0 16 linear low 0\n16 8 striped 2 4 a 16 b 8\n24 8 linear a 64")
    a.fail(ops=["flush"])
    with pytest.raises(OSError):
        device.flush()
    # Once for the segments and once for the legs of the striped target; the first time the
    # error of `a` does not keep `b` from being flushed.
    assert (a.calls["flush"], b.calls["flush"]) == (2, 2)
    device.flush()
    assert (a.calls["flush"], b.calls["flush"]) == (4, 4)


def test_a_failed_leg_is_logged_once_until_there_is_a_new_table(dm, caplog):
    device = dm.create("d", "0 8 error")
    with caplog.at_level(logging.ERROR, "dmpy"):
        for _ in range(3):
            with pytest.raises(OSError):
                read(device, 0, 512)
        assert len(caplog.records) == 1
        assert "d: error: " in caplog.text
        dm.load("d", "0 8 error")
        dm.resume("d")
        with pytest.raises(OSError):
            read(device, 0, 512)
    assert len(caplog.records) == 2


def test_figures_count_what_was_done(dm):
    device = dm.create("d", "0 128 linear mem:64K 0")
    write(device, 0, b"x" * 1000)
    read(device, 0, 300)
    read(device, 0, 200)
    device.flush()
    device.discard(0, 512)
    device.write_zeroes(0, 512)
    figures = device.stats.snapshot()
    assert (figures["reads"], figures["read_bytes"]) == (2, 500)
    assert (figures["writes"], figures["write_bytes"]) == (1, 1000)
    assert (figures["flushes"], figures["discards"], figures["zeroes"]) == (1, 1, 1)
    assert (figures["errors"], figures["in_flight"]) == (0, 0)
    assert sum(figures["read_histogram"]) == 2
    assert max(index for index, reads in enumerate(figures["read_histogram"]) if reads) < 32


def test_wait_returns_at_the_next_event(dm):
    device = dm.create("d", "0 8 zero")
    seen = []
    thread, _ = in_background(lambda: seen.append(device.wait(timeout=5)))
    until(lambda: device._events._waiters)
    device.trigger_event()
    thread.join(5)
    assert seen == [1]
    assert device.wait(0) == 1
    assert device.wait(99) == 1
    with pytest.raises(OSError) as refusal:
        device.wait(timeout=0.01)
    assert refusal.value.errno == errno.ETIMEDOUT


def test_wait_ends_when_the_device_is_removed(dm):
    device = dm.create("d", "0 8 zero")
    thread, raised = in_background(lambda: device.wait(timeout=60))
    until(lambda: device._events._waiters)
    dm.remove("d")
    thread.join(5)
    assert not thread.is_alive()
    assert not raised


def test_messages_find_their_target(dm):
    device = dm.create("d", "0 8 zero\n8 8 error")
    for sector, text, sentence in [
        (0, " ", "message is empty"),
        (16, "hello", "sector 16 of the message has no target"),
        (8, "hello world", r"error takes no messages \(got hello world\)"),
        (0, "@stats_list", "unknown message @stats_list"),
    ]:
        with pytest.raises(OSError, match=sentence) as refusal:
            device.message(sector, text)
        assert refusal.value.errno == errno.EINVAL
    device.deferred_remove = True
    assert device.message(0, "@cancel_deferred_remove") == ""
    assert not device.deferred_remove


def test_requests_that_wait_fail_when_the_mapper_closes():
    dm = Mapper()
    device = dm.create("d", "0 8 linear mem:4096 0")
    device.suspend()
    thread, raised = in_background(lambda: read(device, 0, 512))
    until(lambda: device.in_flight == 1)
    dm.close()
    thread.join(5)
    assert raised[0].errno == errno.ESHUTDOWN


@pytest.mark.parametrize("how", ["suspend", "remove", "close", "remove suspended"])
def test_targets_come_to_rest_once_io_has_ended(dm, how):
    """dm_destroy() suspends the targets of a device that goes; so does suspend."""
    device = dm.create("z", "0 8 zero")
    target = device.live.lines[0].target
    calls = []
    target.presuspend = lambda: calls.append("pre")
    target.postsuspend = lambda: calls.append("post")
    if "suspend" in how:
        dm.suspend("z")
    if "remove" in how:
        dm.remove("z")
    if how == "close":
        dm.close()
    assert calls[-2:] == ["pre", "post"]
    assert calls.count("post") == 1
