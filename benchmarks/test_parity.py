"""Parity kernels beside memcpy of the same data.

    python -m pytest benchmarks/test_parity.py --benchmark-columns=min,median,ops

A copy of all data of a stripe is what any driver must at least do to write it. Promised is that
P takes no more than 1 / 0.9 and P and Q together no more than 1 / 0.15 of its time;
`test_ratio` races the two in turns of a few milliseconds, so that a machine which others use slows
both, and prints what it measured.
"""

from __future__ import annotations

import mmap
import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest

from dmpy.maths.parity import pq, q_update, recover, xor_into, xor_update

CHUNKS = [64 << 10, 512 << 10]
# What is promised, as a part of the speed of memcpy.
PROMISED = {"xor": 0.9, "P+Q": 0.15}
ROUNDS = 41
TURN_SECONDS = 0.004


# An array of `length` bytes, 64 bytes into a page, as scratch of dmpy is.
def _array(length: int) -> np.ndarray:
    array = np.frombuffer(mmap.mmap(-1, 64 + length), np.uint8)[64:]
    array[:] = np.random.default_rng(1).integers(0, 256, length, np.uint8)
    return array


# The kernels by name, over `count` data of `length` bytes each; a memcpy of the same data first.
def _kernels(count: int, length: int) -> dict[str, Callable[[], object]]:
    data = [_array(length) for _ in range(count)]
    copies = [_array(length) for _ in range(count)]
    p, q, first, second = (_array(length) for _ in range(4))
    pq(data, p, q)
    last = count - 1
    one_lost = [None, *data[1:]]
    two_lost = [None, *data[1:last], None]

    def memcpy() -> None:
        for source, copy in zip(data, copies, strict=True):
            np.copyto(copy, source)

    return {
        "memcpy": memcpy,
        "xor": lambda: xor_into(p, data),
        "P+Q": lambda: pq(data, p, q),
        "D": lambda: recover(one_lost, p, None, {0: first}),
        "D+P": lambda: recover(one_lost, None, q, {0: first, "p": second}),
        "D+Q": lambda: recover(one_lost, p, None, {0: first, "q": second}),
        "D+D": lambda: recover(two_lost, p, q, {0: first, last: second}),
    }


# Seconds a call, over a turn of some milliseconds.
def _turn(call: Callable[[], object], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


# How fast a call is beside another: the median of the ratios of all rounds.
def _ratio(call: Callable[[], object], beside: Callable[[], object]) -> float:
    counts = [max(1, round(TURN_SECONDS / _turn(one, 3))) for one in (call, beside)]
    ratios = []
    for _ in range(ROUNDS):
        took = _turn(call, counts[0])
        ratios.append(_turn(beside, counts[1]) / took)
    return statistics.median(ratios)


@pytest.mark.parametrize("length", CHUNKS, ids=lambda length: f"{length >> 10}K")
@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_ratio(capsys, count: int, length: int) -> None:
    """Print how fast each kernel is beside memcpy of the same data, and what is promised."""
    kernels = _kernels(count, length)
    memcpy = kernels.pop("memcpy")
    size = count * length
    speed = size / min(_turn(memcpy, 20) for _ in range(9)) / 1e9
    line = f"{count} x {length >> 10}K: memcpy {speed:.0f} GB/s"
    for name, call in kernels.items():
        promised = f" (promised {PROMISED[name]})" if name in PROMISED else ""
        line += f", {name} {_ratio(call, memcpy):.2f}{promised}"
    with capsys.disabled():
        print(f"\n{line}")


@pytest.mark.parametrize("name", ["memcpy", "xor", "P+Q", "D", "D+P", "D+Q", "D+D"])
@pytest.mark.parametrize("length", CHUNKS, ids=lambda length: f"{length >> 10}K")
@pytest.mark.parametrize("count", [4, 8])
def test_stripe(benchmark, count: int, length: int, name: str) -> None:
    """A stripe of so many data chunks; `D+P`, `D+Q`, `D+D` recover what was lost."""
    benchmark.group = f"{count} data of {length >> 10}K"
    benchmark(_kernels(count, length)[name])


@pytest.mark.parametrize("length", [4 << 10, 64 << 10], ids=lambda length: f"{length >> 10}K")
@pytest.mark.parametrize("index", [0, 1, 3, 7])
def test_update(benchmark, index: int, length: int) -> None:
    """P and Q brought up to date with one datum, by its place in the syndrome."""
    old, new, p, q = (_array(length) for _ in range(4))
    benchmark.group = f"update of {length >> 10}K"

    def update() -> None:
        xor_update(p, old, new)
        q_update(q, old, new, index)

    benchmark(update)
