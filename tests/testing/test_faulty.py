"""Devices that fail, hang or crawl when told to."""

import errno
import threading

import pytest

from dmpy.testing.faulty import Fault, FaultyDevice, every_fault
from dmpy.testing.pattern import PatternDevice, pattern


def read(device, offset=0, length=512):
    device.preadv([memoryview(bytearray(length))], offset)


def outcomes(device, calls, action=read):
    """Say for each of some calls whether it failed."""
    seen = []
    for _ in range(calls):
        try:
            action(device)
        except OSError:
            seen.append("fail")
        else:
            seen.append("pass")
    return seen


def test_nothing_fails_until_asked():
    assert outcomes(FaultyDevice(PatternDevice(4096)), 3) == ["pass"] * 3


def test_the_nth_call_fails_once():
    device = FaultyDevice(PatternDevice(4096), Fault(2))
    assert outcomes(device, 4) == ["pass", "fail", "pass", "pass"]


def test_the_nth_call_and_all_after_it_fail_for_ever():
    device = FaultyDevice(PatternDevice(4096), Fault(2, forever=True))
    assert outcomes(device, 4) == ["pass", "fail", "fail", "fail"]


def test_healing_ends_it():
    device = FaultyDevice(PatternDevice(4096))
    device.fail(forever=True)
    assert outcomes(device, 2) == ["fail", "fail"]
    device.heal()
    assert outcomes(device, 2) == ["pass", "pass"]


def test_the_error_carries_the_chosen_errno_and_the_place():
    device = FaultyDevice(PatternDevice(4096, "leg"), Fault(1, error=errno.ENOSPC))
    with pytest.raises(OSError) as caught:
        read(device, 1024)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.offset == 1024
    assert str(caught.value) == "leg: read of 512 bytes at 1024: No space left on device"


def test_only_chosen_operations_count():
    device = FaultyDevice(PatternDevice(4096), Fault(1, ops=["flush"]))
    read(device)
    device.discard(0, 512)
    device.write_zeroes(0, 512)
    assert list(device.extents(0, 512))
    with pytest.raises(OSError):
        device.flush()
    assert device.calls == {"read": 1, "discard": 1, "zero": 1, "extents": 1, "flush": 1}


@pytest.mark.parametrize("offset, fails", [(0, False), (512, True), (1024, True), (1536, False)])
def test_only_chosen_ranges_count(offset, fails):
    device = FaultyDevice(PatternDevice(4096), Fault(1, ranges=[(1000, 100)]))
    assert outcomes(device, 1, lambda d: read(d, offset)) == ["fail" if fails else "pass"]


def test_a_partial_failure_writes_the_first_half():
    below = PatternDevice(4096, zeroed=True)
    device = FaultyDevice(below, Fault(1, partial=True))
    with pytest.raises(OSError):
        device.pwritev([memoryview(pattern(0, 4096))], 0)
    content = below.content()
    assert content[:2048].tobytes() == pattern(0, 2048).tobytes()
    assert not content[2048:].any()


def test_one_fault_counts_over_several_devices():
    fault = Fault(2)
    first, second = (FaultyDevice(PatternDevice(4096), fault) for _ in range(2))
    read(first)
    with pytest.raises(OSError):
        read(second)


def test_every_fault_walks_until_nothing_fails():
    taken = []
    for fault in every_fault():
        device = FaultyDevice(PatternDevice(4096), fault)
        try:
            for step in range(3):
                read(device)
        except OSError:
            taken.append((step, fault.forever))
    assert taken == [(0, False), (1, False), (2, False), (0, True), (1, True), (2, True)]


def test_every_fault_gives_up_on_work_that_never_ends():
    with pytest.raises(AssertionError, match="still fail after 5 rounds"):
        for fault in every_fault(limit=5):
            fault.strikes("read", 0, 1)
            fault.hits += 1


def test_a_call_hangs_until_released():
    device = FaultyDevice(PatternDevice(65536))
    device.hang(["read"], [(0, 4096)])
    done = threading.Event()

    def work():
        read(device)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    device.wait_hanging()
    read(device, 8192)
    device.flush()
    assert not done.is_set()
    device.release()
    assert done.wait(10)
    thread.join()
    assert device.hanging == 0


def test_waiting_for_a_hang_that_does_not_come_times_out():
    with pytest.raises(TimeoutError):
        FaultyDevice(PatternDevice(4096)).wait_hanging(timeout=0.01)


def test_it_goes_by_the_name_of_the_device_below():
    below = PatternDevice(4096, "leg")
    assert FaultyDevice(below).table_name == "leg"
    assert FaultyDevice(below, name="bad").table_name == "bad"
