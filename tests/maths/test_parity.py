"""P and Q and what is recovered from them, against a model that takes one byte at a time."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmpy.maths.parity import locate_error, pq, q_update, recover, xor_into, xor_update

# Both sides of the lengths at which the methods change, and one odd one.
LENGTHS = [1, 512, 8192, 8704, (128 << 10) + 512, 4097]


def times(left, right):
    """The product of two bytes in the field, by shifting and adding."""
    result = 0
    while right:
        if right & 1:
            result ^= left
        left = left << 1 ^ (0x11D if left & 0x80 else 0)
        right >>= 1
    return result


def parities(data):
    """P and Q of lists of bytes, one byte after the other; None is zeroes."""
    length = next(len(datum) for datum in data if datum is not None)
    p, q = [0] * length, [0] * length
    coefficient = 1
    for datum in data:
        for place, byte in enumerate(datum or []):
            p[place] ^= byte
            q[place] ^= times(coefficient, byte)
        coefficient = times(coefficient, 2)
    return p, q


def array(numbers):
    return np.array(numbers, np.uint8)


def noise(length, seed):
    return np.frombuffer(random.Random(seed).randbytes(length), np.uint8)


def garbage(length):
    return np.full(length, 0xAA, np.uint8)


def stripe(count, length, zeroes=()):
    """Data in syndrome order, with None in some places, and their P and Q."""
    data = [None if i in zeroes else noise(length, f"{count}/{i}") for i in range(count)]
    p, q = garbage(length), garbage(length)
    pq(data, p, q)
    return data, p, q


def stripes():
    """Strategy: up to eight data of equal length, as lists of bytes; some are None."""
    def of(length):
        datum = st.binary(min_size=length, max_size=length).map(list)
        return st.lists(datum | st.none(), min_size=1, max_size=8).filter(any)
    return st.integers(1, 40).flatmap(of)


def check_losses(data, p, q):
    """Lose every one and every two members, and have them back."""
    members = [index for index, datum in enumerate(data) if datum is not None] + ["p", "q"]
    originals = {"p": p, "q": q, **dict(enumerate(data))}
    before = {member: originals[member].copy() for member in members}
    losses = [(member,) for member in members] + list(itertools.combinations(members, 2))
    for lost in losses:
        missing = {member: garbage(len(p)) for member in lost}
        recover(
            [None if index in lost else datum for index, datum in enumerate(data)],
            None if "p" in lost else p,
            None if "q" in lost else q,
            missing,
        )
        for member in lost:
            assert np.array_equal(missing[member], originals[member]), lost
    assert all(np.array_equal(originals[member], before[member]) for member in members)


# Making parity.


@given(stripes())
def test_p_and_q_are_those_of_the_model(data):
    p, q = parities(data)
    found_p, found_q = garbage(len(p)), garbage(len(q))
    arrays = [None if datum is None else array(datum) for datum in data]
    pq(arrays, found_p, found_q)
    assert (found_p.tolist(), found_q.tolist()) == (p, q)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("count", range(1, 9))
def test_long_arrays_have_the_parity_of_their_pieces(count, length):
    data, p, q = stripe(count, length)
    for place in sorted({0, 1, length // 2, length - 1} & set(range(length))):
        want = parities([[int(datum[place])] for datum in data])
        assert ([int(p[place])], [int(q[place])]) == want
    assert np.array_equal(p, np.bitwise_xor.reduce(data))


def test_either_parity_may_be_left_out():
    data, p, q = stripe(4, 4096)
    only_p, only_q = garbage(4096), garbage(4096)
    pq(data, only_p, None)
    pq(data, None, only_q)
    pq(data, None, None)
    assert np.array_equal(only_p, p)
    assert np.array_equal(only_q, q)


def test_no_data_at_all_has_parity_of_zeroes():
    p, q = garbage(512), garbage(512)
    pq([None, None], p, q)
    assert not p.any() and not q.any()
    p = garbage(512)
    pq([None], p, None)
    assert not p.any()


@pytest.mark.parametrize("count", range(1, 9))
def test_xor_of_any_number_of_sources(count):
    sources = [noise(4096, index) for index in range(count)]
    out = garbage(4096)
    xor_into(out, sources)
    assert np.array_equal(out, np.bitwise_xor.reduce(sources))


@pytest.mark.parametrize("position", [0, 1])
def test_the_first_or_second_source_may_be_the_result(position):
    sources = [noise(512, index).copy() for index in range(4)]
    want = np.bitwise_xor.reduce(sources)
    xor_into(sources[position], sources)
    assert np.array_equal(sources[position], want)


# Updating parity.


@pytest.mark.parametrize("length", LENGTHS)
def test_updates_give_the_parity_of_the_new_data(length):
    data, p, q = stripe(8, length)
    for index in range(8):
        old, new = data[index], noise(length, f"new {index}")
        xor_update(p, old, new)
        q_update(q, old, new, index)
        data[index] = new
        want_p, want_q = garbage(length), garbage(length)
        pq(data, want_p, want_q)
        assert np.array_equal(p, want_p)
        assert np.array_equal(q, want_q)


# Recovery.


@settings(max_examples=60)
@given(stripes())
def test_every_one_and_two_losses_of_any_data_are_recovered(data):
    p, q = map(array, parities(data))
    check_losses([None if datum is None else array(datum) for datum in data], p, q)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("count", range(1, 9))
def test_every_one_and_two_losses_of_long_arrays_are_recovered(count, length):
    check_losses(*stripe(count, length))


@pytest.mark.parametrize("zeroes", [(0, 1), (0, 5), (2, 3), (4, 5)])
def test_every_one_and_two_losses_are_recovered_beside_places_of_zeroes(zeroes):
    """DDF's layouts, whose P and Q have places in the syndrome."""
    check_losses(*stripe(6, 4096, zeroes))


def test_one_loss_needs_either_parity():
    data, p, q = stripe(4, 4096)
    for left_p, left_q in ((p, q), (p, None), (None, q)):
        found = garbage(4096)
        recover([data[0], None, data[2], data[3]], left_p, left_q, {1: found})
        assert np.array_equal(found, data[1])


@pytest.mark.parametrize("lost", [[0], [0, 1], [0, 1, 2]])
def test_more_losses_than_parities_are_refused(lost):
    data, p, _ = stripe(4, 512)
    for index in lost:
        data[index] = None
    left_p = p if len(lost) > 1 else None
    with pytest.raises(ValueError, match=f"{len(lost)} data cannot be computed from"):
        recover(data, left_p, None, {index: garbage(512) for index in lost})


def test_nothing_lost_is_nothing_done():
    data, p, q = stripe(3, 512)
    recover(data, p, q, {})


# Finding the wrong member.


@pytest.mark.parametrize("damage", [[0], [511], [100], [7, 8, 300], range(512)])
@pytest.mark.parametrize("count", range(1, 9))
def test_a_single_wrong_member_is_found(count, damage):
    for wrong in [*range(count), "p", "q"]:
        data, p, q = stripe(count, 512)
        members = {"p": p, "q": q, **{index: datum.copy() for index, datum in enumerate(data)}}
        for place in damage:
            members[wrong][place] ^= 1 + place % 255
        data = [members[index] for index in range(count)]
        assert locate_error(data, members["p"], members["q"]) == wrong


@settings(max_examples=60)
@given(stripes(), st.data())
def test_a_single_wrong_member_of_any_data_is_found(data, draw):
    p, q = map(array, parities(data))
    arrays = [None if datum is None else array(datum) for datum in data]
    members = {index: datum for index, datum in enumerate(arrays) if datum is not None}
    members |= {"p": p, "q": q}
    wrong = draw.draw(st.sampled_from(list(members)))
    errors = draw.draw(st.binary(min_size=len(p), max_size=len(p)).filter(any))
    members[wrong] ^= np.frombuffer(errors, np.uint8)
    assert locate_error(arrays, p, q) == wrong


def test_a_consistent_stripe_has_no_wrong_member():
    assert locate_error(*stripe(4, 4096)) is None


def test_two_wrong_members_are_not_taken_for_one():
    for first, second in itertools.combinations([0, 1, 2, 3, "p", "q"], 2):
        data, p, q = stripe(4, 512)
        members = {"p": p, "q": q, **{index: datum.copy() for index, datum in enumerate(data)}}
        members[first][10] ^= 0x5A
        members[second][20] ^= 0x5A
        found = locate_error([members[index] for index in range(4)], members["p"], members["q"])
        assert found is None, (first, second)


def test_an_error_that_points_to_a_place_of_zeroes_is_nobodys():
    data, p, q = stripe(4, 512, zeroes=(1,))
    p[3] ^= 1
    q[3] ^= 2
    assert locate_error(data, p, q) is None


def test_an_error_that_points_beyond_the_last_member_is_nobodys():
    data, p, q = stripe(4, 512)
    p[3] ^= 1
    q[3] ^= 16
    assert locate_error(data, p, q) is None
