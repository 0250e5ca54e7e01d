"""Random stacks of tables, and an oracle that says where each sector of them lives.

The oracle walks down one sector at a time, in the plainest words, and shares no code with the
engine: what it says is compared with what the engine does.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dmpy.testing.pattern import pattern

if TYPE_CHECKING:
    from dmpy.mapped import MappedDevice
    from dmpy.mapper import Mapper

__all__ = ["Place", "RandomStack", "StackLine"]

_SECTOR = 512
# Sectors of a leaf, and the most one line takes of a leg.
_LEAF_SECTORS = (1024, 4096)
_PIECE_SECTORS = 256
# Salt of what is on leaf 0: no end of a word is zero, so a byte too few or too many shows.
_SALT = 0x5A01
_CHUNKS = (1, 2, 3, 8, 16, 24, 64)


class Place(NamedTuple):
    """Where a sector lives: the number of a leaf and the sector on it."""

    leaf: int
    sector: int


class StackLine(NamedTuple):
    """One table line as the oracle sees it; all numbers are sectors or counts.

    `legs` are pairs (what, start): `what` is the name of a device of the stack or the number of a
    leaf. `chunk`, `stripes` and `stripe` are 0 where the target has none.
    """

    begin: int
    len: int
    target: str
    legs: tuple[tuple[str | int, int], ...] = ()
    chunk: int = 0
    stripes: int = 0
    stripe: int = 0


class RandomStack:
    """Devices upon devices, a tree that is the same for the same seed.

    No two sectors of a device share a sector of a leaf, unless `alias`; so a device can be
    written whole and read back.

    Args:
        seed: anything that has a repr.
        depth: at most this many layers of devices above the leaves.
        folder: leaves are files in it; without one they are devices on `mem:` that the stack
            makes first.
        alias: lines may overlap each other on their legs (for reading only).
        targets: the targets to choose from.

    Attributes:
        devices: name -> lines, in order of creation.
        leaf_sectors: the size of each leaf.
        top: the name of the last device; its lines use those below.
    """

    def __init__(
        self,
        seed: object,
        *,
        depth: int = 6,
        folder: Path | None = None,
        alias: bool = False,
        targets: tuple[str, ...] = ("linear", "linear", "striped", "striped", "unstriped", "zero"),
    ) -> None:
        self.seed = seed
        self.folder = folder
        self.alias = alias
        self.devices: dict[str, list[StackLine]] = {}
        self._rng = random.Random(repr(seed))
        self.leaf_sectors = [
            self._rng.randint(*_LEAF_SECTORS) for _ in range(self._rng.randint(1, 4))
        ]
        # What is still free of everything that may be a leg: next sector and size.
        self._next: dict[str | int, int] = dict.fromkeys(range(len(self.leaf_sectors)), 0)
        self._sectors: dict[str | int, int] = dict(enumerate(self.leaf_sectors))
        layers = self._rng.randint(1, depth)
        for layer in range(layers):
            for number in range(1 if layer == layers - 1 else self._rng.randint(1, 2)):
                self._add_device(f"layer{layer}-{number}", targets)
        self.top = next(reversed(self.devices))

    def __repr__(self) -> str:
        return f"<RandomStack seed={self.seed!r} {len(self.devices)} devices>"

    @property
    def sectors(self) -> int:
        """The size of the top device."""
        return self._sectors[self.top]

    def size_sectors(self, name: str) -> int:
        """The size of a device."""
        return self._sectors[name]

    def locate(self, sector: int, name: str | int | None = None) -> Place | None:
        """Say where one sector lives: the oracle.

        Args:
            sector: of the device.
            name: which device; default the top.

        Returns:
            The place, or None where the sector reads as zeroes and swallows what is written.
        """
        name = self.top if name is None else name
        if isinstance(name, int):
            assert 0 <= sector < self.leaf_sectors[name]
            return Place(name, sector)
        for line in self.devices[name]:
            if line.begin <= sector < line.begin + line.len:
                return self._locate_in(line, sector - line.begin)
        raise AssertionError(f"{name}: no line holds sector {sector}")

    # Where the sector of a line lives.
    def _locate_in(self, line: StackLine, sector: int) -> Place | None:
        if line.target == "zero":
            return None
        chunk_size = line.chunk
        if line.target == "linear":
            (leg, start), below = line.legs[0], sector
        elif line.target == "striped":
            # Deal the chunks out like cards, and count the rounds.
            chunk, within = sector // chunk_size, sector % chunk_size
            leg, start = line.legs[chunk % len(line.legs)]
            below = chunk // len(line.legs) * chunk_size + within
        else:
            # Chunk c of one player is card c * players + player of the deck.
            chunk, within = sector // chunk_size, sector % chunk_size
            leg, start = line.legs[0]
            below = (chunk * line.stripes + line.stripe) * chunk_size + within
        return self.locate(start + below, leg)

    def expected(self, leaves: list[np.ndarray], name: str | None = None) -> np.ndarray:
        """Put a device's content together, sector by sector.

        Args:
            leaves: uint8 content of each leaf.
            name: which device; default the top.

        Returns:
            uint8, fresh.
        """
        name = self.top if name is None else name
        data = np.zeros(self._sectors[name] * _SECTOR, np.uint8)
        for sector in range(self._sectors[name]):
            place = self.locate(sector, name)
            if place is not None:
                data[sector * _SECTOR : (sector + 1) * _SECTOR] = leaves[place.leaf][
                    place.sector * _SECTOR : (place.sector + 1) * _SECTOR
                ]
        return data

    def expected_leaves(self, leaves: list[np.ndarray], data: np.ndarray) -> list[np.ndarray]:
        """Say what the leaves hold after `data` was written to the whole top device.

        Args:
            leaves: uint8 content of each leaf before.
            data: uint8, all of the device.

        Returns:
            uint8 content of each leaf, fresh.
        """
        assert not self.alias
        after = [leaf.copy() for leaf in leaves]
        for sector in range(self.sectors):
            place = self.locate(sector)
            if place is not None:
                after[place.leaf][place.sector * _SECTOR : (place.sector + 1) * _SECTOR] = data[
                    sector * _SECTOR : (sector + 1) * _SECTOR
                ]
        return after

    def leaf_pattern(self) -> list[np.ndarray]:
        """Return what `create` puts on the leaves: the pattern, salted with the leaf's number."""
        return [pattern(0, s * _SECTOR, _SALT + leaf) for leaf, s in enumerate(self.leaf_sectors)]

    def table(self, name: str) -> str:
        """Return the table text of a device, one line per target."""
        return "\n".join(self._text(line) for line in self.devices[name])

    def create(self, mapper: Mapper) -> MappedDevice:
        """Make the leaves, filled with the pattern, and all devices; return the top one."""
        for leaf, content in enumerate(self.leaf_pattern()):
            if self.folder is not None:
                self._leaf_path(leaf).write_bytes(content)
                continue
            device = mapper.create(
                f"leaf{leaf}", f"0 {self.leaf_sectors[leaf]} linear mem:{len(content)} 0"
            )
            device.pwritev([memoryview(content)], 0)
        for name in self.devices:
            device = mapper.create(name, self.table(name))
        return device

    def leaf_content(self, mapper: Mapper) -> list[np.ndarray]:
        """Return what is on the leaves now: uint8 each."""
        contents = []
        for leaf, sectors in enumerate(self.leaf_sectors):
            if self.folder is not None:
                contents.append(np.fromfile(self._leaf_path(leaf), np.uint8))
                continue
            content = np.empty(sectors * _SECTOR, np.uint8)
            mapper.device(f"leaf{leaf}").preadv([memoryview(content)], 0)
            contents.append(content)
        return contents

    def remove(self, mapper: Mapper) -> None:
        """Remove all devices, the top first."""
        for name in reversed(self.devices):
            mapper.remove(name)
        if self.folder is None:
            for leaf in range(len(self.leaf_sectors)):
                mapper.remove(f"leaf{leaf}")

    # The file of a leaf.
    def _leaf_path(self, leaf: int) -> Path:
        return self.folder / f"leaf{leaf}.img"

    # The word for a leg in a table.
    def _word(self, what: str | int) -> str:
        if isinstance(what, str):
            return f"/dev/mapper/{what}"
        if self.folder is not None:
            return str(self._leaf_path(what))
        return f"/dev/mapper/leaf{what}"

    def _text(self, line: StackLine) -> str:
        words = [line.begin, line.len, line.target]
        if line.target == "striped":
            words += [len(line.legs), line.chunk]
        if line.target == "unstriped":
            words += [line.stripes, line.chunk, line.stripe]
        for what, start in line.legs:
            words += [self._word(what), start]
        return " ".join(map(str, words))

    # Makes a device of one to five lines out of what is there.
    def _add_device(self, name: str, targets: tuple[str, ...]) -> None:
        lines: list[StackLine] = []
        begin = 0
        for _ in range(self._rng.randint(1, 5)):
            line = self._line(begin, self._rng.choice(targets))
            lines.append(line)
            begin += line.len
        self.devices[name] = lines
        self._next[name] = 0
        self._sectors[name] = begin

    def _line(self, begin: int, target: str) -> StackLine:
        rng = self._rng
        if target == "linear":
            leg, start, room = self._take(rng.randint(1, _PIECE_SECTORS), 1)
            if room:
                return StackLine(begin, room, target, ((leg, start),))
        elif target == "striped":
            chunk, rows = rng.choice(_CHUNKS), rng.randint(1, 6)
            legs = []
            for _ in range(rng.randint(1, 4)):
                leg, start, room = self._take(chunk * rows, chunk * rows)
                if room:
                    legs.append((leg, start))
            if legs:
                return StackLine(begin, chunk * rows * len(legs), target, tuple(legs), chunk)
        elif target == "unstriped":
            chunk, stripes, rows = rng.choice(_CHUNKS), rng.randint(1, 4), rng.randint(1, 6)
            need = chunk * stripes * rows
            leg, start, room = self._take(need, need)
            if room:
                stripe = rng.randrange(stripes)
                return StackLine(
                    begin, chunk * rows, target, ((leg, start),), chunk, stripes, stripe
                )
        return StackLine(begin, rng.randint(1, 64), "zero")

    # Takes up to `most` sectors of some leg that has at least `least`: (leg, start, sectors), with
    # no sectors where none has.
    def _take(self, most: int, least: int) -> tuple[str | int, int, int]:
        rng = self._rng
        choices = list(self._next)
        # The newest devices most often: stacks shall be deep.
        choices = choices[-3:] * 3 + choices
        rng.shuffle(choices)
        for leg in choices:
            start = self._next[leg] + rng.choice((0, 0, 1, 8, 13))
            if self.alias:
                start = rng.randint(0, self._sectors[leg] - 1)
            room = min(most, self._sectors[leg] - start)
            if room >= least:
                self._next[leg] = start + room
                return leg, start, room
        return choices[0], 0, 0
