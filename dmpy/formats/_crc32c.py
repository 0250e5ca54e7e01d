"""CRC-32C (Castagnoli, reflected polynomial 0x82f63b78) at some hundred megabytes a second.

The checksum of a block is the exclusive or of what each of its bytes contributes, and that depends
on the byte and on how many follow it: one look-up in a table for all bytes at once. What came
before the block is mixed into its first four bytes.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

__all__ = ["crc32c"]

_POLYNOMIAL = 0x82F63B78
_BLOCK = 1024  # bytes; the table has 1 KiB for each of them


@functools.cache
def _table() -> np.ndarray:
    # uint32[_BLOCK * 256]: 256 for each place in a block, the last place last.
    row = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        row = row >> 1 ^ np.where(row & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    single, table = row, np.empty((_BLOCK, 256), np.uint32)
    for place in reversed(range(_BLOCK)):
        table[place] = row
        row = row >> 8 ^ single[row & 0xFF]
    return table.reshape(-1)


_ROWS = np.arange(0, _BLOCK * 256, 256)


def crc32c(data: Any, crc: int = 0) -> int:
    """Return the checksum of bytes.

    Args:
        data: bytes.
        crc: that of the bytes before them, 0 for none.
    """
    table = _table()
    data = np.frombuffer(memoryview(data).cast("B"), np.uint8)
    crc ^= 0xFFFFFFFF
    for begin in range(0, len(data), _BLOCK):
        block = data[begin : begin + _BLOCK]
        before = np.frombuffer(crc.to_bytes(4, "little"), np.uint8)[: len(block)]
        index = _ROWS[_BLOCK - len(block) :] + block
        index[:4] = _ROWS[_BLOCK - len(block) :][:4] + (block[:4] ^ before)
        # Of a block of less than four bytes, what came before goes on beyond it.
        crc = crc >> 8 * len(block) ^ int(np.bitwise_xor.reduce(table.take(index)))
    return crc ^ 0xFFFFFFFF
