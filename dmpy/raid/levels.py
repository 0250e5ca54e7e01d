"""RAID levels as data, and the arithmetic of where the chunks of an array lie on its members.

No I/O. A `Level` says what a level is: members needed, members that may be lost, layout number.
A `Geometry` is a level with its numbers, and answers where a chunk is. All that is md's:

- a *member* is a leg of the array, by its index (md's `raid_disk`);
- a *stripe* of a parity level is one chunk on each member at the same place: data, P and Q. Places
  of stripes and rows are counted in chunks: row r of a member begins at byte r * chunk_size;
- the layout says which member of a stripe holds P, which Q, where the data begins and in which
  order its chunks enter the Q syndrome.

RAID 5 with three members, left-symmetric, and RAID 6 with four, left-symmetric of md:

    member    0   1   2        member    0   1   2   3
    stripe 0  D0  D1  P        stripe 0  Q   D0  D1  P
    stripe 1  D3  P   D2       stripe 1  D2  D3  P   Q
    stripe 2  P   D4  D5       stripe 2  D5  P   Q   D4

RAID 10 with three members, two copies near, far and offset:

    member    0   1   2        member    0   1   2        member    0   1   2
    row 0     D0  D0  D1       row 0     D0  D1  D2       row 0     D0  D1  D2
    row 1     D1  D2  D2       row 1     D3  D4  D5       row 1     D2  D0  D1
    row 2     D3  D3  D4       row 2     D2  D0  D1       row 2     D3  D4  D5
    row 3     D4  D5  D5       row 3     D5  D3  D4       row 3     D5  D3  D4

Source: Linux v6.1 drivers/md/raid5.c, raid5_compute_sector(), raid6_d0(), raid6_idx_to_slot();
drivers/md/raid10.c, __raid10_find_phys(), setup_geo(), calc_sectors(); drivers/md/raid0.c,
create_strip_zones(), map_sector(); drivers/md/dm-raid.c, raid_types.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection
from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple

from dmpy.units import SECTOR_SIZE

__all__ = [
    "ALGORITHM_LEFT_ASYMMETRIC",
    "ALGORITHM_LEFT_ASYMMETRIC_6",
    "ALGORITHM_LEFT_SYMMETRIC",
    "ALGORITHM_LEFT_SYMMETRIC_6",
    "ALGORITHM_PARITY_0",
    "ALGORITHM_PARITY_0_6",
    "ALGORITHM_PARITY_N",
    "ALGORITHM_RIGHT_ASYMMETRIC",
    "ALGORITHM_RIGHT_ASYMMETRIC_6",
    "ALGORITHM_RIGHT_SYMMETRIC",
    "ALGORITHM_RIGHT_SYMMETRIC_6",
    "ALGORITHM_ROTATING_N_CONTINUE",
    "ALGORITHM_ROTATING_N_RESTART",
    "ALGORITHM_ROTATING_ZERO_RESTART",
    "LEVELS",
    "RAID0_ALT_MULTIZONE_LAYOUT",
    "RAID0_ORIG_LAYOUT",
    "Geometry",
    "Level",
    "Run",
    "StripeMap",
    "find_level",
    "raid10_layout",
    "raid10_parameters",
]

# md's layout numbers of RAID 5 and RAID 6.
ALGORITHM_LEFT_ASYMMETRIC = 0
ALGORITHM_RIGHT_ASYMMETRIC = 1
ALGORITHM_LEFT_SYMMETRIC = 2
ALGORITHM_RIGHT_SYMMETRIC = 3
ALGORITHM_PARITY_0 = 4
ALGORITHM_PARITY_N = 5
# RAID 6 of DDF: syndromes over all members, with zeroes for P and Q themselves.
ALGORITHM_ROTATING_ZERO_RESTART = 8
ALGORITHM_ROTATING_N_RESTART = 9
ALGORITHM_ROTATING_N_CONTINUE = 10
# RAID 6 that is RAID 5 on all members but the last, which holds Q.
ALGORITHM_LEFT_ASYMMETRIC_6 = 16
ALGORITHM_RIGHT_ASYMMETRIC_6 = 17
ALGORITHM_LEFT_SYMMETRIC_6 = 18
ALGORITHM_RIGHT_SYMMETRIC_6 = 19
ALGORITHM_PARITY_0_6 = 20

# md's layout numbers of RAID 0 with members of several sizes: from the second zone on, which
# member comes first is counted from the start of the array (ORIG) or of the zone (ALT).
RAID0_ORIG_LAYOUT = 1
RAID0_ALT_MULTIZONE_LAYOUT = 2

_DDF = (
    ALGORITHM_ROTATING_ZERO_RESTART,
    ALGORITHM_ROTATING_N_RESTART,
    ALGORITHM_ROTATING_N_CONTINUE,
)

# A place on a member: index of the member, bytes from the start of its data, length in bytes.
Run = tuple[int, int, int]


class Level(NamedTuple):
    """What a level is, whatever the number of members.

    Attributes:
        name: dm-raid's word (`raid5_ls`), or one in its manner for what only md has.
        number: md's level: 0, 1, 4, 5, 6 or 10.
        minimum: members without which there is no such array.
        redundancy: members that may be lost in any case: of RAID 1 and RAID 10, with two copies.
        parity: chunks of a stripe that are not data: 0, 1 (P) or 2 (P and Q).
        layout: md's layout number; of RAID 10 that of two copies, far and offset in far sets.
    """

    name: str
    number: int
    minimum: int
    redundancy: int
    parity: int
    layout: int


class StripeMap(NamedTuple):
    """Which member holds what in a stripe of a parity level.

    Attributes:
        data: the member of each data chunk, in the array's order.
        p: the member with P, the xor of all data.
        q: the member with Q, or None in levels without.
        syndrome: the members in the order in which their data enters Q, so that a member's index
            here is its power of the generator. **None where nothing enters**: in layouts of DDF
            the members with P and Q have their powers too, and count as zeroes.
    """

    data: tuple[int, ...]
    p: int
    q: int | None
    syndrome: tuple[int | None, ...]


def _levels() -> dict[str, Level]:
    levels = [
        Level("raid0", 0, 1, 0, 0, 0),
        Level("raid1", 1, 1, 1, 0, 0),
        Level("raid10", 10, 2, 1, 0, 0x102),
        Level("raid10_near", 10, 2, 1, 0, 0x102),
        Level("raid10_far", 10, 2, 1, 0, 0x40201),
        Level("raid10_offset", 10, 2, 1, 0, 0x50201),
        # dm-raid's raid4 has its parity first and is a RAID 5 to md; md's own has it last.
        Level("raid4", 5, 2, 1, 1, ALGORITHM_PARITY_0),
        Level("raid4_n", 4, 2, 1, 1, 0),
    ]
    rotating = {
        "la": ALGORITHM_LEFT_ASYMMETRIC,
        "ra": ALGORITHM_RIGHT_ASYMMETRIC,
        "ls": ALGORITHM_LEFT_SYMMETRIC,
        "rs": ALGORITHM_RIGHT_SYMMETRIC,
        "0": ALGORITHM_PARITY_0,
    }
    raid5 = {**rotating, "n": ALGORITHM_PARITY_N}
    raid6 = {
        **rotating,
        "zr": ALGORITHM_ROTATING_ZERO_RESTART,
        "nr": ALGORITHM_ROTATING_N_RESTART,
        "nc": ALGORITHM_ROTATING_N_CONTINUE,
        "n_6": ALGORITHM_PARITY_N,
        "la_6": ALGORITHM_LEFT_ASYMMETRIC_6,
        "ra_6": ALGORITHM_RIGHT_ASYMMETRIC_6,
        "ls_6": ALGORITHM_LEFT_SYMMETRIC_6,
        "rs_6": ALGORITHM_RIGHT_SYMMETRIC_6,
        "0_6": ALGORITHM_PARITY_0_6,
    }
    levels += [Level(f"raid5_{word}", 5, 2, 1, 1, layout) for word, layout in raid5.items()]
    levels += [Level(f"raid6_{word}", 6, 4, 2, 2, layout) for word, layout in raid6.items()]
    return {level.name: level for level in levels}


# All levels by name. Only md has raid4_n, raid5_0, raid6_{la,ra,ls,rs,0,0_6}; RAID 5 in the manner
# of DDF is raid5_ra (zero restart), raid5_la (N restart) and raid5_ls (N continue).
LEVELS: dict[str, Level] = _levels()


def find_level(number: int, layout: int) -> Level:
    """Return the level that md's two numbers mean; of RAID 10 with the layout as given.

    Args:
        number: md's level.
        layout: md's layout; ignored for levels that have no parity or, as RAID 4, only one place
            for it.

    Raises:
        ValueError: there is no such level, or the level has no such layout.
    """
    if number == 10:
        copies = raid10_parameters(layout)
        redundancy = copies["near"] * copies["far"] - 1
        return LEVELS["raid10"]._replace(layout=layout, redundancy=redundancy)
    if number in (0, 1, 4):
        return LEVELS[{0: "raid0", 1: "raid1", 4: "raid4_n"}[number]]
    of_number = [level for level in LEVELS.values() if level.number == number]
    if not of_number:
        raise ValueError(f"there is no RAID level {number}")
    for level in reversed(of_number):
        if level.layout == layout:
            return level
    raise ValueError(f"RAID {number} has no layout {layout}")


def raid10_layout(near: int, far: int, far_offset: bool = False, far_sets: int = 0) -> int:
    """Return md's layout number of a RAID 10; the arguments are those of `Geometry`."""
    return near | far << 8 | far_offset << 16 | far_sets << 17


def raid10_parameters(layout: int) -> dict[str, int]:
    """Take md's layout number of a RAID 10 apart.

    Returns:
        The arguments `near`, `far`, `far_offset` and `far_sets` of `Geometry`.

    Raises:
        ValueError: the number has bits that mean nothing, or no copies.
    """
    near, far = layout & 255, layout >> 8 & 255
    far_sets = layout >> 17
    if not 0 <= far_sets <= 2 or not near or not far:
        raise ValueError(f"RAID 10 has no layout {layout:#x}")
    far_offset = bool(layout >> 16 & 1)
    return {"near": near, "far": far, "far_offset": far_offset, "far_sets": far_sets}


# A part of a RAID 0 in which the same members take turns.
class _Zone(NamedTuple):
    begin: int  # first chunk of the array
    row: int  # first row on the members
    members: tuple[int, ...]
    first: int  # which of them has chunk `begin`


@dataclass(frozen=True)
class Geometry:
    """A level with its numbers. Immutable; everything in bytes, counted from where the data begins.

    Args:
        level: one of LEVELS.
        members: how many, those that are missing included.
        chunk_size: bytes, a multiple of the sector; without meaning in RAID 1, where it may be 0.
        near: RAID 10: copies of a chunk on neighbouring members.
        far: RAID 10: copies of those in other parts of the members.
        far_offset: RAID 10: the far copies lie in the next row, not in the next part.
        far_sets: RAID 10: far copies rotate among all members (0), or within sets of far * near
            members (2, as dm-raid and new mdadm do), or within `far` sets (1, a former mistake).
        member_size: bytes used of each member; whole chunks of it hold data.
        sizes: RAID 0 with members of several sizes: bytes of each member, instead of `member_size`.
        raid0_layout: RAID0_ORIG_LAYOUT or RAID0_ALT_MULTIZONE_LAYOUT; all the same where members
            are of one size.

    Raises:
        ValueError: the numbers do not make an array.
    """

    level: Level
    members: int
    chunk_size: int
    _: KW_ONLY
    near: int = 1
    far: int = 1
    far_offset: bool = False
    far_sets: int = 0
    member_size: int = 0
    sizes: tuple[int, ...] | None = None
    raid0_layout: int = RAID0_ALT_MULTIZONE_LAYOUT
    # Bytes of the array.
    size: int = field(init=False, compare=False)
    # Data chunks in a stripe: members less parity; in RAID 1 one, in RAID 10 members in a row.
    data_members: int = field(init=False, compare=False)
    # Parity levels: the stripes of one turn, after which the layout begins anew.
    _stripes: tuple[StripeMap, ...] = field(init=False, compare=False, repr=False, default=())
    # RAID 0: its zones, and the chunk at which each begins.
    _zones: tuple[_Zone, ...] = field(init=False, compare=False, repr=False, default=())
    _begins: tuple[int, ...] = field(init=False, compare=False, repr=False, default=())
    # RAID 10: for each member that may have the first copy of a chunk, all its copies: member and
    # bytes from the first copy's place.
    _copies: tuple[tuple[tuple[int, int], ...], ...] = field(
        init=False, compare=False, repr=False, default=()
    )

    def __post_init__(self) -> None:
        level, members = self.level, self.members
        if members < level.minimum:
            raise ValueError(
                f"{level.name} needs at least {level.minimum} members (got {members})"
            )
        if level.number == 1:
            found = {"size": self.member_size, "data_members": 1}
        else:
            if self.chunk_size <= 0 or self.chunk_size % SECTOR_SIZE:
                raise ValueError(
                    f"chunk size must be a multiple of {SECTOR_SIZE} bytes (got {self.chunk_size})"
                )
            find = {0: self._find_zones, 10: self._find_copies}.get(level.number, self._find_parity)
            found = find()
        for name, value in found.items():
            object.__setattr__(self, name, value)

    @property
    def redundancy(self) -> int:
        """Members that may be lost, whichever they are."""
        if self.level.number == 1:
            return self.members - 1
        if self.level.number == 10:
            fewest = min(len({member for member, _ in copies}) for copies in self._copies)
            return fewest - 1
        return self.level.redundancy

    @property
    def layout(self) -> int:
        """md's layout number, as a superblock holds it."""
        if self.level.number == 10:
            return raid10_layout(self.near, self.far, self.far_offset, self.far_sets)
        return self.raid0_layout if self.level.number == 0 else self.level.layout

    @property
    def rows(self) -> int:
        """Chunks of a member that are used: stripes of a parity level. Not for RAID 1."""
        if self.sizes is not None:
            return max(self.sizes) // self.chunk_size
        rows = self.member_size // self.chunk_size
        return rows - rows % self.far

    def locate(self, chunk: int) -> tuple[int, int]:
        """Return the stripe (the row) and the member of a data chunk: parity levels and RAID 0.

        Args:
            chunk: index of a chunk of the array, within its size.
        """
        stripes = self._stripes
        if stripes:
            stripe, index = divmod(chunk, self.data_members)
            return stripe, stripes[stripe % len(stripes)].data[index]
        zone = self._zones[bisect_right(self._begins, chunk) - 1]
        row, index = divmod(chunk - zone.begin, len(zone.members))
        return zone.row + row, zone.members[(index + zone.first) % len(zone.members)]

    def stripe(self, number: int) -> StripeMap:
        """Return what each member holds in a stripe of a parity level."""
        return self._stripes[number % len(self._stripes)]

    def copies(self, offset: int, length: int) -> list[list[Run]]:
        """Return the pieces of a range, each as the places of all its copies: RAID 0, 1, 10.

        The first copy is the one that md takes for the original. RAID 0 has one copy, RAID 1 one
        piece; else a piece ends where the chunk does.

        Args:
            offset: bytes from the start of the array.
            length: bytes, more than 0; the range lies within the array.
        """
        if self.level.number == 1:
            return [[(member, offset, length) for member in range(self.members)]]
        chunk_size, members = self.chunk_size, self.members
        chunk, within = divmod(offset, chunk_size)
        step = chunk_size * self.far if self.far_offset else chunk_size
        pieces = []
        while length:
            piece = min(length, chunk_size - within)
            if self._zones:
                row, member = self.locate(chunk)
                pieces.append([(member, row * chunk_size + within, piece)])
            else:
                row, first = divmod(chunk * self.near, members)
                place = row * step + within
                pieces.append([(m, place + more, piece) for m, more in self._copies[first]])
            length -= piece
            within = 0
            chunk += 1
        return pieces

    def chunk_at(self, row: int, member: int) -> int | None:
        """Return which chunk of the array a member holds in a row: all levels but RAID 1.

        Returns:
            The index of the chunk; None for parity and for a row that holds nothing.
        """
        if self._stripes:
            data = self.stripe(row).data
            if member not in data:
                return None
            return row * self.data_members + data.index(member)
        chunk = self._chunk_in_zone(row, member) if self._zones else self._copied(row, member)
        return chunk if chunk is not None and chunk * self.chunk_size < self.size else None

    def enough(self, working: Collection[int]) -> bool:
        """Tell whether all data is to be had from these members.

        For RAID 10 every chunk must have a copy on one of them. md's own test, which looks at
        neighbours only, is stricter for far sets: it takes them for one set of all members.
        """
        working = set(working)
        if self.level.number == 1:
            return bool(working)
        if self.level.number == 10:
            return all(any(member in working for member, _ in copies) for copies in self._in_use())
        return len(working) >= self.members - self.level.parity

    # The copies of those members that a first copy falls on.
    def _in_use(self) -> list[tuple[tuple[int, int], ...]]:
        firsts = {chunk * self.near % self.members for chunk in range(self.members)}
        return [self._copies[first] for first in sorted(firsts)]

    # Parity levels.
    def _find_parity(self) -> dict[str, object]:
        number, layout, members = self.level.number, self.level.layout, self.members
        if number == 4:
            number, layout = 5, ALGORITHM_PARITY_N
        turn = members
        if layout in (ALGORITHM_PARITY_0, ALGORITHM_PARITY_N, ALGORITHM_PARITY_0_6):
            turn = 1
        elif layout > ALGORITHM_ROTATING_N_CONTINUE:
            turn = members - 1
        stripes = tuple(_stripe(number, layout, members, stripe) for stripe in range(turn))
        data_members = members - self.level.parity
        size = self.member_size // self.chunk_size * self.chunk_size * data_members
        return {"size": size, "data_members": data_members, "_stripes": stripes}

    # RAID 0. A zone ends where a member does; the members that go on make the next one.
    def _find_zones(self) -> dict[str, object]:
        sizes = self.sizes
        if sizes is None:
            sizes = (self.member_size,) * self.members
        if len(sizes) != self.members:
            raise ValueError(f"there are {self.members} members and {len(sizes)} sizes")
        if self.raid0_layout not in (RAID0_ORIG_LAYOUT, RAID0_ALT_MULTIZONE_LAYOUT):
            raise ValueError(f"RAID 0 has no layout {self.raid0_layout}")
        rows = [size // self.chunk_size for size in sizes]
        zones = []
        begin = row = 0
        for end in sorted(set(rows)):
            members = tuple(member for member, last in enumerate(rows) if last > row)
            first = 0
            if self.raid0_layout == RAID0_ORIG_LAYOUT:
                first = begin % len(members)
            if end > row:
                zones.append(_Zone(begin, row, members, first))
            begin += (end - row) * len(members)
            row = end
        return {
            "size": begin * self.chunk_size,
            "data_members": self.members,
            "sizes": None if self.sizes is None else tuple(sizes),
            "_zones": tuple(zones),
            "_begins": tuple(zone.begin for zone in zones),
        }

    # The chunk that a member of a RAID 0 holds.
    def _chunk_in_zone(self, row: int, member: int) -> int | None:
        zone = self._zones[bisect_right(self._zones, row, key=lambda zone: zone.row) - 1]
        if member not in zone.members:
            return None
        turn = len(zone.members)
        index = (zone.members.index(member) - zone.first) % turn
        return zone.begin + (row - zone.row) * turn + index

    # RAID 10.
    def _find_copies(self) -> dict[str, object]:
        near, far, members = self.near, self.far, self.members
        if near < 1 or far < 1 or near * far > members:
            raise ValueError(
                f"RAID 10 of {members} members cannot hold {near * far} copies of each chunk"
            )
        if self.far_sets not in (0, 1, 2):
            raise ValueError(f"RAID 10 has no layout {self.layout:#x}")
        part = self.member_size // self.chunk_size // far
        size = part * members // near * self.chunk_size
        copies = tuple(self._copies_of(first, part) for first in range(members))
        found = {"size": size, "data_members": members, "_copies": copies}
        object.__setattr__(self, "_copies", copies)
        self._check_places()
        return found

    # All copies of a chunk whose first one is on member `first`: near copies from left to right,
    # each with its far ones.
    def _copies_of(self, first: int, part: int) -> tuple[tuple[int, int], ...]:
        stride = self.chunk_size if self.far_offset else part * self.chunk_size
        copies = []
        for index in range(self.near):
            wrapped, member = divmod(first + index, self.members)
            place = wrapped * self.chunk_size
            for _ in range(self.far):
                copies.append((member, place))
                member = self._next_far(member)
                place += stride
        return tuple(copies)

    # The member with the next far copy.
    def _next_far(self, member: int) -> int:
        members = self.members
        if not self.far_sets:
            return (member + self.near) % members
        size = self.far * self.near if self.far_sets == 2 else members // self.far
        begin = member // size * size
        member += self.near
        # The members that are left over belong to the last set.
        last = (members // size - 1) * size
        if members % size and member > last:
            return (member - last) % (size + members % size) + last
        return member % size + begin

    # Near and far copies together can meet in one place (in md as here): refuse such numbers.
    def _check_places(self) -> None:
        if self.near == 1 and self.far_sets == 0:
            return
        places = set()
        step = self.far if self.far_offset else 1
        for chunk in range(3 * self.members):
            row, first = divmod(chunk * self.near, self.members)
            # Places modulo a part are enough: a copy is in the part of its own number.
            for index, (member, more) in enumerate(self._copies[first]):
                part = 0 if self.far_offset else index % self.far
                extra = more // self.chunk_size
                if not self.far_offset:
                    extra = (first + index // self.far) // self.members
                place = part, row * step + extra, member
                if place in places:
                    raise ValueError(
                        f"RAID 10 layout {self.layout:#x} of {self.members} members would have "
                        f"two chunks in one place"
                    )
                places.add(place)

    # The chunk that a member of a RAID 10 holds.
    def _copied(self, row: int, member: int) -> int | None:
        members, near, far = self.members, self.near, self.far
        if self.far_offset:
            row, part = divmod(row, far)
        else:
            part, row = divmod(row, self.member_size // self.chunk_size // far)
        if part >= far:
            return None
        for first in range(members):
            for index, (copy, _) in enumerate(self._copies[first]):
                wrapped = (first + index // far) // members
                position = (row - wrapped) * members + first
                if copy == member and index % far == part and position >= 0:
                    if position % near == 0:
                        return position // near
        return None


# What the members hold in one stripe of RAID 5 or RAID 6.
def _stripe(number: int, layout: int, members: int, stripe: int) -> StripeMap:
    # RAID 6 with Q on the last member is RAID 5 on the others.
    if number == 6 and layout >= ALGORITHM_LEFT_ASYMMETRIC_6:
        inner = _stripe(5, layout - ALGORITHM_LEFT_ASYMMETRIC_6, members - 1, stripe)
        q = members - 1
        return StripeMap(inner.data, inner.p, q, _syndrome(layout, members, inner.p, q))
    from_right = layout in (
        ALGORITHM_LEFT_ASYMMETRIC, ALGORITHM_LEFT_SYMMETRIC, ALGORITHM_ROTATING_N_CONTINUE
    )
    if layout == ALGORITHM_PARITY_0:
        p = 0
    elif layout == ALGORITHM_PARITY_N:
        p = members - number + 4
    elif from_right:
        p = members - 1 - stripe % members
    elif layout == ALGORITHM_ROTATING_N_RESTART:
        p = members - 1 - (stripe + 1) % members
    else:
        p = stripe % members
    q = None
    if number == 6:
        q = (p - 1 if layout == ALGORITHM_ROTATING_N_CONTINUE else p + 1) % members
    # Data goes on behind the parity and round, or begins at member 0 again in each stripe.
    goes_on = layout in (
        ALGORITHM_LEFT_SYMMETRIC, ALGORITHM_RIGHT_SYMMETRIC, ALGORITHM_ROTATING_N_CONTINUE
    )
    begin = p + 1 if goes_on else 0
    order = [(begin + index) % members for index in range(members)]
    data = tuple(member for member in order if member not in (p, q))
    return StripeMap(data, p, q, data if q is None else _syndrome(layout, members, p, q))


# The order of Q's syndrome: from the member behind Q and round; DDF: all members in their places.
def _syndrome(layout: int, members: int, p: int, q: int) -> tuple[int | None, ...]:
    if layout in _DDF:
        return tuple(None if member in (p, q) else member for member in range(members))
    order = [(q + 1 + index) % members for index in range(members)]
    return tuple(member for member in order if member not in (p, q))
