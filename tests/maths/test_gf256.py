"""GF(256), against multiplication as it is done by hand."""

import numpy as np
import pytest

from dmpy.maths import gf256


def by_hand(left, right):
    """Multiply polynomials over two elements bit by bit, and reduce."""
    result = 0
    for bit in range(8):
        if right >> bit & 1:
            result ^= left << bit
    for bit in range(14, 7, -1):
        if result >> bit & 1:
            result ^= 0x11D << (bit - 8)
    return result


def everything(length):
    """All bytes in turn, of that length."""
    return np.resize(np.arange(256, dtype=np.uint8), length)


def test_products_are_those_done_by_hand():
    for left in range(256):
        for right in range(256):
            assert gf256.product(left, right) == by_hand(left, right)


def test_an_element_times_its_inverse_is_one():
    for element in range(1, 256):
        assert by_hand(element, gf256.inverse(element)) == 1


def test_nought_has_no_inverse():
    with pytest.raises(ZeroDivisionError, match="0 has no inverse"):
        gf256.inverse(0)


def test_powers_of_the_generator_reach_every_element_but_nought():
    assert sorted(gf256.EXP) == list(range(1, 256))
    assert gf256.power(8) == 0x1D
    assert gf256.power(-1) == gf256.inverse(2)
    assert gf256.power(255) == 1


@pytest.mark.parametrize("length", [1, 255, 512, 8192, 8193, 8194, 65536, 65538, 200_001])
@pytest.mark.parametrize("constant", [0, 1, 2, 4, 8, 0x1D, 0x8E, 0xFF])
def test_every_byte_of_an_array_is_multiplied(constant, length):
    source = everything(length)
    table = np.array([by_hand(constant, element) for element in range(256)], np.uint8)
    out = np.full(length, 0xAA, np.uint8)
    gf256.multiply(constant, source, out)
    assert np.array_equal(out, table[source])
    assert np.array_equal(source, everything(length))
    gf256.multiply(constant, source, source)
    assert np.array_equal(source, out)


def test_every_constant_multiplies_small_and_large_arrays_alike():
    small, large = everything(256), everything(16384)
    for constant in range(256):
        of_small, of_large = np.empty_like(small), np.empty_like(large)
        gf256.multiply(constant, small, of_small)
        gf256.multiply(constant, large, of_large)
        assert of_small.tolist() == [by_hand(constant, element) for element in range(256)]
        assert np.array_equal(of_large.reshape(-1, 256), np.tile(of_small, (64, 1)))


def test_an_array_at_an_odd_address_is_multiplied():
    memory = everything(20001)
    out = np.empty(20001, np.uint8)
    gf256.multiply(0x1D, memory[1:], out[1:])
    assert out[1:257].tolist() == [by_hand(0x1D, element) for element in memory[1:257].tolist()]


def test_halving_undoes_doubling():
    array, spare = everything(512), np.empty(512, np.uint8)
    gf256.double(array, spare)
    assert array[:256].tolist() == [by_hand(2, element) for element in range(256)]
    gf256.halve(array, spare)
    assert np.array_equal(array, everything(512))
