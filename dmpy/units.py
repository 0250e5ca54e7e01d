"""Sector and byte arithmetic: the one place where units are converted."""

from __future__ import annotations

import re

__all__ = [
    "SECTOR_SHIFT",
    "SECTOR_SIZE",
    "ceil_div",
    "exact_div",
    "parse_size",
    "round_down",
    "round_up",
]

SECTOR_SHIFT = 9
SECTOR_SIZE = 1 << SECTOR_SHIFT

_SIZE = re.compile(r"([0-9]+)(?:([kmgtpe])(?:i?b)?|([bs]))?", re.IGNORECASE | re.ASCII)
_POWERS = "kmgtpe"


def exact_div(number: int, divisor: int) -> int:
    """Divide where a remainder would be a bug of ours."""
    quotient, remainder = divmod(number, divisor)
    assert remainder == 0, f"{number} is not a multiple of {divisor}"
    return quotient


def ceil_div(number: int, divisor: int) -> int:
    """Divide and round towards plus infinity."""
    return -(-number // divisor)


def round_down(number: int, unit: int) -> int:
    """Return the largest multiple of `unit` that is not above `number`."""
    return number - number % unit


def round_up(number: int, unit: int) -> int:
    """Return the smallest multiple of `unit` that is not below `number`."""
    return ceil_div(number, unit) * unit


def parse_size(text: str) -> int:
    """Read a size as people write it.

    Args:
        text: digits and an optional suffix: b (bytes, the default), s (sectors of 512 bytes), or
            one of K M G T P E, powers of 1024, also as KB or KiB; case does not matter.

    Returns:
        The size in bytes.

    Raises:
        ValueError: the text is not a size, or does not fit in 63 bits.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size such as 512, 8s, 64K or 10G")
    digits, power, unit = match.groups()
    size = int(digits)
    if power:
        size <<= 10 * (_POWERS.index(power.lower()) + 1)
    elif unit and unit.lower() == "s":
        size *= SECTOR_SIZE
    if size >= 1 << 63:
        raise ValueError(f"{text!r} is a size of more than 63 bits")
    return size
