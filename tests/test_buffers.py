"""Scratch memory, and the decision when a read goes through it."""

from __future__ import annotations

import ctypes
import threading

import pytest

from dmpy import buffers


def address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def view_at(shift: int, length: int) -> memoryview:
    """A view that begins `shift` bytes into a page."""
    whole = memoryview(bytearray(length + 8192))
    begin = (shift - address(whole)) % 4096
    return whole[begin : begin + length]


@pytest.mark.parametrize("length", [1, 511, 65536, 65537, 1 << 20, (4 << 20) + 1, 64 << 20])
def test_scratch_has_the_length_asked_for_and_begins_64_bytes_into_a_page(length):
    with buffers.scratch(length) as view:
        assert len(view) == length
        assert view.format == "B"
        assert not view.readonly
        assert address(view) % 4096 == 64
        view[0] = view[-1] = 1


def test_scratch_is_lent_again_after_it_was_given_back():
    with buffers.scratch(70000) as view:
        first = address(view)
    with buffers.scratch(90000) as view:
        assert address(view) == first


def test_scratch_that_is_in_use_is_not_lent_twice():
    with buffers.scratch(70000) as one, buffers.scratch(70000) as two:
        one[:] = b"1" * 70000
        two[:] = b"2" * 70000
        assert one[0] == one[-1] == ord("1")


def test_scratch_is_given_back_when_the_block_fails():
    with pytest.raises(KeyError), buffers.scratch(70000) as view:
        first = address(view)
        raise KeyError
    with buffers.scratch(70000) as view:
        assert address(view) == first


def test_memory_kept_for_later_is_bounded():
    loans = [buffers.scratch(100_000) for _ in range(50)]
    for loan in loans:
        loan.__enter__()
    for loan in loans:
        loan.__exit__(None, None, None)
    with buffers.scratch(64 << 20):
        pass
    kept = {size: len(free) for size, free in buffers._free.items()}
    assert max(kept) <= 4 << 20
    assert max(kept.values()) <= 8


def test_threads_get_scratch_of_their_own():
    failures = []

    def work(number: int) -> None:
        for _ in range(500):
            with buffers.scratch(70000) as view:
                view[:16] = bytes([number]) * 16
                if bytes(view[:16]) != bytes([number]) * 16:
                    failures.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_processor_is_measured_once(monkeypatch):
    monkeypatch.setattr(buffers, "_width", None)
    width = buffers.slow_copy_width()
    assert width in (0, 16, 32)
    monkeypatch.setattr(buffers, "_measured_width", lambda: pytest.fail("measured twice"))
    assert buffers.slow_copy_width() == width


@pytest.mark.parametrize(
    ("slow", "width"),
    [((), 0), ((8,), 16), ((8, 24), 32)],
)
def test_the_width_of_the_trap_is_told_from_times(monkeypatch, slow, width):
    monkeypatch.setattr(
        buffers, "_read_time", lambda file, memory, shift, length: 5000 if shift in slow else 1000
    )
    assert buffers._measured_width() == width


def test_noise_in_single_measurements_does_not_decide(monkeypatch):
    calls = iter(range(1000))
    monkeypatch.setattr(
        buffers, "_read_time", lambda *_: 1000 if next(calls) % 7 == 0 else 90000
    )
    assert buffers._measured_width() == 0


@pytest.mark.parametrize(
    ("shift", "offset", "answer"),
    [
        (0, 0, False),
        (1, 0, True),
        (16, 0, True),
        (31, 0, True),
        (32, 0, False),
        (64, 0, False),
        (4095, 0, False),
        (16, 512, False),
        (528, 512, True),
        (16, 4096, True),
    ],
)
def test_scratch_is_needed_just_above_the_source_only(monkeypatch, shift, offset, answer):
    monkeypatch.setattr(buffers, "_width", 32)
    assert buffers.needs_scratch(view_at(shift, 128 << 10), offset) is answer


def test_short_reads_never_need_scratch(monkeypatch):
    monkeypatch.setattr(buffers, "_width", 32)
    assert not buffers.needs_scratch(view_at(16, (32 << 10) - 1), 0)
    assert buffers.needs_scratch(view_at(16, 32 << 10), 0)


def test_processors_without_the_trap_never_need_scratch(monkeypatch):
    monkeypatch.setattr(buffers, "_width", 0)
    assert not buffers.needs_scratch(view_at(16, 1 << 20), 0)


@pytest.mark.parametrize("length", [1, 1 << 20, (1 << 20) + 512, (3 << 20) + 5])
def test_a_read_through_scratch_fills_the_view(length):
    content = memoryview(bytes(range(251)) * (length // 251 + 40))

    def read(views, offset):
        (view,) = views
        assert address(view) % 4096 == 64
        view[:] = content[offset : offset + len(view)]

    view = memoryview(bytearray(length))
    buffers.read_through_scratch(read, view, 7)
    assert view == content[7 : 7 + length]


def test_an_error_of_the_device_passes_through_scratch():
    def read(views, offset):
        raise OSError(5, "x")

    with pytest.raises(OSError, match="x"):
        buffers.read_through_scratch(read, memoryview(bytearray(4096)), 0)
