"""Parity of RAID 4, 5 and 6 over whole arrays: made, updated, used to recover, and checked.

P is the xor of all data. Q is the sum of each datum times the generator of GF(256) to the power of
its place in `data`, the *syndrome order*:

    P = D0 + D1 + D2 + ...           Q = D0 + g D1 + g^2 D2 + ...

so that any two of D, P and Q can be had from the others. Every array is numpy uint8[n], contiguous,
and all of one call are equally long; outputs must not overlap inputs unless it says so. A list of
data may have None for a place that holds zeroes, as the layouts of DDF have for P and Q themselves.

    lost        found by
    D           xor of P and the other data
    D, Q        the same, then Q
    D, P        the syndrome of all others and Q, divided by g^place: Horner's rule from both ends
    Dx, Dy      the same for x with P and the other data in place of Dy, which gives
                (1 + g^(y-x)) Dx; one multiplication; then Dy by xor

Source: H. P. Anvin, "The mathematics of RAID-6"; Linux v6.1 lib/raid6/.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np

from dmpy.maths import gf256

__all__ = ["locate_error", "pq", "q_update", "recover", "xor_into", "xor_update"]

# Horner's rule goes over its arrays several times for each datum: pieces that stay in the cache.
_PIECE = 128 << 10
# Spare arrays of one piece, kept for the next call from whatever thread: append and pop of a deque
# are atomic.
_spares: deque[np.ndarray] = deque(maxlen=8)


# Lend an array of one piece.
@contextmanager
def _spare():
    try:
        spare = _spares.pop()
    except IndexError:
        spare = np.empty(_PIECE, np.uint8)
    try:
        yield spare
    finally:
        _spares.append(spare)


def xor_into(out: np.ndarray, sources: Sequence[np.ndarray]) -> None:
    """Make `out` the xor of all sources.

    Args:
        out: uint8[n], overwritten; may be the first or the second source, no other.
        sources: one or more uint8[n], kept.
    """
    if len(sources) == 1:
        np.positive(sources[0], out)
        return
    np.bitwise_xor(sources[0], sources[1], out)
    for source in sources[2:]:
        np.bitwise_xor(out, source, out)


def xor_update(parity: np.ndarray, old: np.ndarray, new: np.ndarray) -> None:
    """Bring P up to date with a datum that changes.

    Args:
        parity: uint8[n], changed in place.
        old: uint8[n], what the datum was.
        new: uint8[n], what it becomes.
    """
    np.bitwise_xor(parity, old, parity)
    np.bitwise_xor(parity, new, parity)


def q_update(q: np.ndarray, old: np.ndarray, new: np.ndarray, index: int) -> None:
    """Bring Q up to date with a datum that changes.

    Args:
        q: uint8[n], changed in place.
        old: uint8[n], what the datum was.
        new: uint8[n], what it becomes.
        index: the datum's place in the syndrome order.
    """
    if index == 0:
        xor_update(q, old, new)
        return
    constant = gf256.power(index)
    if len(q) <= _PIECE:
        # Fast path: what a write changes of one chunk is one piece.
        gf256.add_product(constant, np.bitwise_xor(old, new), q)
        return
    for begin in range(0, len(q), _PIECE):
        part = slice(begin, begin + _PIECE)
        gf256.add_product(constant, np.bitwise_xor(old[part], new[part]), q[part])


def pq(
    data: Sequence[np.ndarray | None], p: np.ndarray | None, q: np.ndarray | None
) -> None:
    """Compute P and Q.

    Args:
        data: uint8[n] each, in syndrome order, kept; None for a place of zeroes.
        p: uint8[n], overwritten with P; None when it is not wanted.
        q: uint8[n], overwritten with Q; None when it is not wanted.
    """
    if q is None:
        if p is not None:
            _sum_into(p, data)
        return
    last = _last(data)
    if last is None:
        q[...] = 0
        if p is not None:
            p[...] = 0
        return
    with _spare() as spare:
        for begin in range(0, len(q), _PIECE):
            part = slice(begin, begin + _PIECE)
            _pq_piece(data[: last + 1], part, None if p is None else p[part], q[part], spare)


# P and Q of one piece; the last datum is there. By Horner's rule from the last to the first:
# double, add. P is begun with the first two data at once.
def _pq_piece(data, part, p, q, spare) -> None:
    spare = spare[: len(q)]
    begun = datum = data[-1][part]
    np.positive(datum, q)
    for source in data[-2::-1]:
        gf256.double(q, spare)
        if source is None:
            continue
        datum = source[part]
        np.bitwise_xor(q, datum, q)
        if p is not None:
            np.bitwise_xor(begun, datum, p)
            begun = p
    if p is not None and begun is not p:
        np.positive(begun, p)


def recover(
    data: Sequence[np.ndarray | None],
    p: np.ndarray | None,
    q: np.ndarray | None,
    missing: Mapping[int | Literal["p", "q"], np.ndarray],
) -> None:
    """Compute what is missing of a stripe.

    Args:
        data: uint8[n] each, in syndrome order, kept; None for what is missing and for places of
            zeroes.
        p: uint8[n], kept; None when it is missing or there is none.
        q: uint8[n], kept; None when it is missing or there is none.
        missing: for each index of a missing datum, and for "p" and "q" where they are wanted, a
            uint8[n] that is overwritten. All missing data must be here; P and Q need not.

    Raises:
        ValueError: more is missing than can be computed from the rest.
    """
    lost = sorted(index for index in missing if not isinstance(index, str))
    left = (p is not None) + (q is not None)
    if len(lost) > left:
        raise ValueError(f"{len(lost)} data cannot be computed from {left} parities")
    full = list(data)
    if len(lost) == 1:
        [x] = lost
        full[x] = missing[x]
        if p is not None:
            _sum_into(missing[x], [p, *_others(data, x)])
        else:
            _divide_syndrome(data, q, x, missing[x])
    elif len(lost) == 2:
        x, y = lost
        full[x], full[y] = missing[x], missing[y]
        _recover_two(data, p, q, x, y, missing[x], missing[y])
    if "p" in missing or "q" in missing:
        pq(full, missing.get("p"), missing.get("q"))


# Two lost data, x < y.
def _recover_two(data, p, q, x, y, at_x, at_y) -> None:
    _sum_into(at_y, [p, *_others(data, x, y)])
    with_sum = list(data)
    with_sum[x], with_sum[y] = None, at_y
    _divide_syndrome(with_sum, q, x, at_x)
    gf256.multiply(gf256.inverse(1 ^ gf256.power(y - x)), at_x, at_x)
    np.bitwise_xor(at_y, at_x, at_y)


# Make `out` the sum of Q and all data but the one in place x, Q's way, divided by g^x. Data above x
# by doubling from the last one down, Q and the data below by halving from the first one up.
def _divide_syndrome(data, q, x, out) -> None:
    above, below = data[x + 1 :], data[:x]
    last = _last(above)
    with _spare() as spare, _spare() as sum_above:
        for begin in range(0, len(out), _PIECE):
            part = slice(begin, begin + _PIECE)
            low = out[part]
            t, high = spare[: len(low)], sum_above[: len(low)]
            np.positive(q[part], low)
            for datum in below:
                if datum is not None:
                    np.bitwise_xor(low, datum[part], low)
                gf256.halve(low, t)
            if last is None:
                continue
            np.positive(above[last][part], high)
            for datum in above[:last][::-1]:
                gf256.double(high, t)
                if datum is not None:
                    np.bitwise_xor(high, datum[part], high)
            gf256.double(high, t)
            np.bitwise_xor(low, high, low)


def locate_error(
    data: Sequence[np.ndarray | None], p: np.ndarray, q: np.ndarray
) -> int | Literal["p", "q"] | None:
    """Find the one member of a RAID 6 stripe that is wrong.

    Every byte that is wrong must be of the same member for this to name it. A wrong datum x leaves
    an error e in P and g^x e in Q.

    Args:
        data: uint8[n] each, in syndrome order, kept; None for a place of zeroes.
        p: uint8[n], kept.
        q: uint8[n], kept.

    Returns:
        The index of the datum, "p" or "q"; None when the stripe is consistent and when more than
        one member is wrong.
    """
    in_p, in_q = np.empty_like(p), np.empty_like(q)
    pq(data, in_p, in_q)
    np.bitwise_xor(in_p, p, in_p)
    np.bitwise_xor(in_q, q, in_q)
    wrong_p, wrong_q = in_p.any(), in_q.any()
    if not wrong_p:
        return "q" if wrong_q else None
    if not wrong_q:
        return "p"
    first = int(in_p.argmax())
    if in_q[first] == 0:
        return None
    index = (gf256.LOG[in_q[first]] - gf256.LOG[in_p[first]]) % 255
    if index >= len(data) or data[index] is None:
        return None
    gf256.multiply(gf256.power(index), in_p, in_p)
    return index if np.array_equal(in_p, in_q) else None


# Make `out` the xor of those that are not None.
def _sum_into(out, sources) -> None:
    sources = [source for source in sources if source is not None]
    if sources:
        xor_into(out, sources)
    else:
        out[...] = 0


# All data but those at some places.
def _others(data, *places) -> list:
    return [datum for index, datum in enumerate(data) if index not in places]


# The last place that is not of zeroes.
def _last(data) -> int | None:
    return next((index for index in reversed(range(len(data))) if data[index] is not None), None)
