"""Sector and byte arithmetic."""

import pytest

from dmpy.units import ceil_div, exact_div, parse_size, round_down, round_up


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("512b", 512),
        ("8s", 4096),
        ("64K", 65536),
        ("64k", 65536),
        ("1M", 1 << 20),
        ("1MB", 1 << 20),
        ("2GiB", 2 << 30),
        (" 3T ", 3 << 40),
        ("7E", 7 << 60),
    ],
)
def test_a_size_is_read_with_its_unit(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "K", "-1", "+1", "1.5G", "1 K", "0x10", "1KK", "8E", "١"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


def test_division_says_what_it_means():
    assert exact_div(1024, 512) == 2
    with pytest.raises(AssertionError):
        exact_div(1000, 512)
    assert ceil_div(1, 512) == 1
    assert ceil_div(512, 512) == 1
    assert ceil_div(0, 512) == 0
    assert round_down(1023, 512) == 512
    assert round_up(513, 512) == 1024
    assert round_up(512, 512) == 512
