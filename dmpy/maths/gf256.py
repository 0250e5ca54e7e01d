"""The field GF(256) of RAID 6: polynomials over two elements modulo x^8 + x^4 + x^3 + x^2 + 1.

A byte is an element, its bits the coefficients. Adding is xor. The generator is x, the byte 2: its
powers are all elements but 0. Doubling and halving are multiplying and dividing by it.

Arrays are numpy uint8, one dimension, contiguous, all of one call equally long; there is no Python
loop over bytes.

Source: H. P. Anvin, "The mathematics of RAID-6"; Linux v6.1 lib/raid6/mktables.c, gfmul().
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

__all__ = [
    "EXP",
    "LOG",
    "POLYNOMIAL",
    "add_product",
    "double",
    "halve",
    "inverse",
    "multiply",
    "power",
    "product",
]

# The modulus, and what is added where doubling carries out of (halving: out below) the byte.
POLYNOMIAL = 0x11D
_CARRY = np.uint8(POLYNOMIAL & 0xFF)
_BORROW = np.uint8(POLYNOMIAL >> 1)

_ZERO = np.int8(0)
_ONE = np.uint8(1)


# The powers of the generator and their logarithms.
def _tables() -> tuple[tuple[int, ...], tuple[int, ...]]:
    exp, log = [], [0] * 256
    element = 1
    for exponent in range(255):
        exp.append(element)
        log[element] = exponent
        element <<= 1
        if element > 255:
            element ^= POLYNOMIAL
    return tuple(exp), tuple(log)


# EXP[i]: the generator to the power i, 0 <= i < 255. LOG[EXP[i]] == i; LOG[0] means nothing.
EXP, LOG = _tables()

# Up to this many bytes bytes.translate() beats numpy's take(), whose table is 128 KiB.
_SMALL = 8 << 10
# take() makes 64-bit numbers of its indexes: pieces whose numbers stay in the cache.
_PIECE = 32 << 10
# Multiplying a large array by so small a power is faster by doubling.
_FEW_DOUBLINGS = 2


def power(exponent: int) -> int:
    """Return the generator to the power `exponent`, which may be negative."""
    return EXP[exponent % 255]


def product(left: int, right: int) -> int:
    """Return the product of two elements."""
    if left == 0 or right == 0:
        return 0
    return EXP[(LOG[left] + LOG[right]) % 255]


def inverse(element: int) -> int:
    """Return the element that times this one is 1.

    Raises:
        ZeroDivisionError: of 0.
    """
    if element == 0:
        raise ZeroDivisionError("0 has no inverse")
    return EXP[-LOG[element] % 255]


def double(array: np.ndarray, spare: np.ndarray) -> None:
    """Multiply each byte by the generator.

    Args:
        array: uint8[n], changed in place.
        spare: uint8[n], overwritten with nothing of use.
    """
    np.less(array.view(np.int8), _ZERO, spare.view(np.bool_))
    np.multiply(spare, _CARRY, spare)
    np.add(array, array, array)
    np.bitwise_xor(array, spare, array)


def halve(array: np.ndarray, spare: np.ndarray) -> None:
    """Divide each byte by the generator; the arguments are those of `double`."""
    np.bitwise_and(array, _ONE, spare)
    np.multiply(spare, _BORROW, spare)
    np.right_shift(array, _ONE, array)
    np.bitwise_xor(array, spare, array)


def multiply(constant: int, source: np.ndarray, out: np.ndarray) -> None:
    """Multiply each byte by a constant.

    Args:
        constant: an element, 0 to 255.
        source: uint8[n], kept.
        out: uint8[n], overwritten; may be `source` itself, else they must not overlap.
    """
    length = len(source)
    if constant < 2:
        if constant == 0:
            out[...] = 0
        elif out is not source:
            np.positive(source, out)
    elif length <= _SMALL or length % 2:
        np.positive(_translated(constant, source), out)
    elif LOG[constant] <= _FEW_DOUBLINGS:
        np.positive(source, out)
        spare = np.empty(length, np.uint8)
        for _ in range(LOG[constant]):
            double(out, spare)
    else:
        table = _pair_products(constant)
        pairs, found = source.view(np.uint16), out.view(np.uint16)
        for begin in range(0, len(pairs), _PIECE):
            end = begin + _PIECE
            table.take(pairs[begin:end], out=found[begin:end], mode="clip")


def add_product(constant: int, source: np.ndarray, out: np.ndarray) -> None:
    """Add a constant times each byte of `source` to `out`.

    Args:
        constant: an element, 0 to 255.
        source: uint8[n], overwritten with nothing of use.
        out: uint8[n], changed in place.
    """
    if len(source) <= _SMALL:
        np.bitwise_xor(out, _translated(constant, source), out)
    else:
        multiply(constant, source, source)
        np.bitwise_xor(out, source, out)


# A new array of the products, by way of bytes.
def _translated(constant: int, source: np.ndarray) -> np.ndarray:
    return np.frombuffer(source.tobytes().translate(_products(constant)), np.uint8)


# The products of a constant and each byte: 256 bytes for bytes.translate().
@lru_cache(maxsize=None)
def _products(constant: int) -> bytes:
    return bytes(product(constant, element) for element in range(256))


# The products of a constant and each pair of bytes: uint16[65536]. 128 KiB each, of which an array
# needs one for each distance between two members that are lost: 32 keep the memory bounded.
@lru_cache(maxsize=32)
def _pair_products(constant: int) -> np.ndarray:
    single = np.frombuffer(_products(constant), np.uint8).astype(np.uint16)
    return (single[np.newaxis, :] | single[:, np.newaxis] << np.uint16(8)).reshape(-1)
