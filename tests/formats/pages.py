"""Reads the pages of dmpy/formats: their tables and their worked examples are tests too."""

from __future__ import annotations

import re
from pathlib import Path

import dmpy.formats

__all__ = ["Row", "example", "layout", "said"]

_PAGES = Path(dmpy.formats.__file__).parent

Row = tuple[int, int, str, str]


def _section(name: str, heading: str) -> str:
    text = (_PAGES / f"{name}.md").read_text()
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"{name}.md has no section {heading}"
    return found[1]


def layout(name: str, first: str) -> list[Row]:
    """Return the rows of the table that begins with field `first`: offset, size, type, name."""
    rows: list[Row] = []
    pattern = r"^\| (\d+) \| (\d+) \| (\S+) \| `(\w+)` \| .+ \|$"
    for line in _section(name, "Layout").splitlines():
        found = re.match(pattern, line)
        if found:
            row = (int(found[1]), int(found[2]), found[3], found[4])
            if row[3] == first:
                rows = []
            elif not rows:
                continue
            rows.append(row)
        elif rows:
            break
    assert rows, f"{name}.md has no table that begins with {first}"
    return rows


def example(name: str, number: int = 0) -> bytes:
    """Return the bytes of an example: lines of an offset and 16 bytes.

    Zero lines are left out. A line with * repeats the one before up to the next offset.
    """
    blocks: list[bytearray] = []
    inside = repeat = False
    for line in _section(name, "Example").splitlines():
        found = re.match(r"^    (?:(\*)|([0-9a-f]{4})(?:  ([0-9a-f ]+))?)$", line)
        if found and found[1]:
            repeat = True
        elif found:
            if not inside:
                blocks.append(bytearray())
            gap = int(found[2], 16) - len(blocks[-1])
            blocks[-1] += blocks[-1][-16:] * (gap // 16) if repeat else bytes(gap)
            blocks[-1] += bytes.fromhex(found[3] or "")
            repeat = False
        inside = bool(found)
    return bytes(blocks[number])


def said(name: str, number: int = 0) -> dict[str, str]:
    """Return what an example is said to mean: lines of `field` and value in the page's table."""
    tables: list[dict[str, str]] = []
    inside = False
    for line in _section(name, "Example").splitlines():
        found = re.match(r"^\| `(\w+)` \| (\S.*?) \|$", line)
        if found:
            if not inside:
                tables.append({})
            tables[-1][found[1]] = found[2]
        inside = bool(found)
    return tables[number]
