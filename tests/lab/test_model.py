"""The account of sectors: what reads may return, before and after a power cut."""

from __future__ import annotations

import numpy as np
import pytest

from dmpy.lab.model import Model, content

SECTORS = 32


@pytest.fixture
def model():
    return Model(SECTORS)


def write(model, sector, count=1, **how):
    number = model.write_begins(sector, count)
    model.write_ends(sector, count, number, **how)
    return number


def flush(model):
    model.flush_ends(model.flush_begins())


def is_right(model, sector, number):
    return model.check(sector, content(sector, 1, number)) == 0


def test_a_new_device_is_zeroes(model):
    assert model.check(0, np.zeros(SECTORS * 512, np.uint8)) == 0
    assert not is_right(model, 0, 1)


def test_what_was_acknowledged_is_there_and_nothing_older(model):
    first = write(model, 3, 2)
    second = write(model, 4)
    assert is_right(model, 3, first)
    assert is_right(model, 4, second)
    assert not is_right(model, 4, first)
    assert model.counts == {"lost": 1}
    assert model.damages[0][:2] == (4, "lost")
    assert (model.damages[0].found, model.damages[0].allowed) == ("write 1", "write 2")


def test_a_write_that_was_not_acknowledged_may_be_there_or_not(model):
    first = write(model, 0)
    for found in (first, first + 1):
        fresh = Model(SECTORS)
        write(fresh, 0)
        fresh.write_begins(0, 1)
        assert is_right(fresh, 0, found)


def test_a_read_pins_what_it_returned(model):
    first = write(model, 0)
    second = model.write_begins(0, 1)
    assert is_right(model, 0, first)
    assert not is_right(model, 0, second)


def test_a_cut_leaves_what_was_flushed_or_anything_since(model):
    numbers = [write(model, 0)]
    flush(model)
    numbers += [write(model, 0), write(model, 0)]
    for number in numbers:
        fresh = Model(SECTORS)
        write(fresh, 0)
        flush(fresh)
        write(fresh, 0)
        write(fresh, 0)
        fresh.power_cut()
        assert is_right(fresh, 0, number)
    model.power_cut()
    assert not model.check(0, content(0, 1, 0)) == 0


def test_a_flush_makes_the_last_write_certain(model):
    first, second = write(model, 0), write(model, 0)
    flush(model)
    model.power_cut()
    assert not is_right(model, 0, first)
    assert is_right(model, 0, second)


def test_a_write_that_ends_while_a_flush_runs_is_not_certain(model):
    began = model.flush_begins()
    write(model, 0)
    model.flush_ends(began)
    model.power_cut()
    assert model.check(0, np.zeros(512, np.uint8)) == 0


def test_a_flush_after_a_read_makes_what_was_read_certain(model):
    first = write(model, 0)
    second = model.write_begins(0, 1)
    assert is_right(model, 0, second)
    flush(model)
    model.power_cut()
    assert not is_right(model, 0, first)


def test_a_durable_write_is_certain_by_itself(model):
    write(model, 0)
    last = write(model, 0, fua=True)
    model.power_cut()
    assert not model.check(0, np.zeros(512, np.uint8)) == 0
    assert is_right(model, 0, last)


def test_zeroes_are_a_content_like_others(model):
    write(model, 0)
    number = model.write_begins(0, 1, zero=True)
    model.write_ends(0, 1, number)
    assert number == 0
    assert model.check(0, np.zeros(512, np.uint8)) == 0


def test_content_of_another_sector_is_misplaced(model):
    number = write(model, 0, 8)
    assert model.check(5, content(3, 1, number)) == 1
    assert model.damages[0][1:3] == ("misplaced", "write 1 of sector 3")


def test_one_wrong_bit_is_wrong(model):
    number = write(model, 7)
    data = content(7, 1, number)
    data[300] ^= 1
    assert model.check(7, data) == 1
    assert model.counts == {"wrong": 1}


def test_all_damages_are_counted_and_a_few_are_kept(model):
    write(model, 0, SECTORS)
    assert model.check(0, np.full(SECTORS * 512, 7, np.uint8)) == SECTORS
    assert model.counts["wrong"] == SECTORS
    assert len(model.damages) < SECTORS


def test_contents_of_two_writes_or_places_do_not_cancel_out():
    seen = {content(sector, 1, number).tobytes() for sector in range(8) for number in range(1, 8)}
    assert len(seen) == 56
    mixed = content(0, 1, 1) ^ content(8, 1, 2) ^ content(16, 1, 3)
    assert len(np.unique(mixed)) > 100
