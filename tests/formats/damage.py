"""Strategies for records of dmpy/formats: any values, and bytes that something has happened to."""

from __future__ import annotations

from hypothesis import strategies as st

from dmpy.errors import FormatError

__all__ = ["damaged", "decodes_or_says_why", "records"]

_RANGES = {
    "B": (0, 0xFF),
    "H": (0, 0xFFFF),
    "I": (0, 0xFFFFFFFF),
    "Q": (0, 0xFFFFFFFFFFFFFFFF),
    "h": (-0x8000, 0x7FFF),
    "i": (-0x80000000, 0x7FFFFFFF),
}


def records(kind, **given):
    """Records of a kind with any values in their fields.

    Args:
        kind: the class.
        given: strategies or values for fields that may not have just any.
    """
    fields = {}
    for name, code in kind.codes.items():
        if name in given:
            continue
        if code.letter == "s":
            fields[name] = st.binary(min_size=code.count, max_size=code.count)
            continue
        low, high = _RANGES[code.letter]
        number = st.integers(low, high)
        many = st.lists(number, min_size=code.count, max_size=code.count)
        fields[name] = many if code.many else number
    for name, value in given.items():
        fields[name] = value if isinstance(value, st.SearchStrategy) else st.just(value)
    return st.builds(kind, **fields)


@st.composite
def damaged(draw, sound):
    """Bytes with some of them overwritten, and perhaps cut short; or any bytes at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=600))
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, min(len(data), 640) - 1))
        patch = draw(st.one_of(st.binary(min_size=1, max_size=8), st.just(b"\xff" * 8)))
        data[at : at + len(patch)] = patch[: len(data) - at]
    if draw(st.integers(0, 4)) == 0:
        del data[draw(st.integers(0, len(data))) :]
    return bytes(data)


def decodes_or_says_why(decode, data, *, device="disk7", byte=0):
    """Decode damaged bytes: whatever they are, FormatError is the only way out, and tells where.

    Returns:
        What was decoded, or None.
    """
    try:
        return decode(data, device=device, byte=byte)
    except FormatError as error:
        assert error.device == device
        assert byte <= error.byte <= byte + max(len(data), 4096)
        assert str(error).startswith(f"{device}: byte {error.byte}: ")
        return None
