"""Where everything of an array lies, against a model that places one sector after the other.

The model draws rows of chunks by the rules as people say them ("P moves one member to the left in
each stripe, data goes on behind it") and takes sectors from left to right.
"""

import itertools
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmpy.raid.levels import (
    LEVELS,
    RAID0_ALT_MULTIZONE_LAYOUT,
    RAID0_ORIG_LAYOUT,
    Geometry,
    find_level,
    raid10_layout,
    raid10_parameters,
)

SECTOR = 512
CHUNK_SECTORS = 2
CHUNK = CHUNK_SECTORS * SECTOR
PARITY = sorted(name for name, level in LEVELS.items() if level.parity)
MOST = 8


# The model of parity levels: a stripe is a list of what each member holds.


def drawing(name, members, stripe):
    """One stripe: "P", "Q" and the data's numbers within the stripe, member by member."""
    number, _, layout = name.partition("_")
    if layout.endswith("_6") and layout != "n_6":
        return drawing(f"raid5_{layout[:-2]}", members - 1, stripe) + ["Q"]
    if name == "raid4":
        layout = "0"
    if layout == "n_6":
        layout = "n"
    row = [None] * members
    p = place_of_p(layout, members, stripe)
    row[p] = "P"
    if number == "raid6":
        # Q is to the right of P and comes in again at the left; N continue has it to the left.
        if layout == "n":
            row[p - 1], row[p] = "P", "Q"
        elif layout == "nc":
            row[p - 1] = "Q"
        elif p == members - 1:
            row[0] = "Q"
        else:
            row[p + 1] = "Q"
    # Data begins at the left, or behind the parity and comes in again at the left.
    member = p if layout in ("ls", "rs", "nc") else 0
    for datum in range(row.count(None)):
        while row[member] is not None:
            member = member + 1 if member + 1 < members else 0
        row[member] = datum
    return row


def place_of_p(layout, members, stripe):
    """P stays, or moves one member each stripe; each stripe before is walked through."""
    if layout == "0":
        return 0
    if layout == "n":
        return members - 1
    to_the_right = layout in ("ra", "rs", "zr")
    p = 0 if to_the_right else members - 1
    if layout == "nr":
        # DDF has the first stripe as D D P Q: one step further than Q D D P.
        p = members - 2
    for _ in range(stripe):
        p += 1 if to_the_right else -1
        p = {members: 0, -1: members - 1}.get(p, p)
    return p


def syndrome(name, row):
    """The members of a row in the order in which they enter Q; None for what enters as zeroes."""
    if name in ("raid6_zr", "raid6_nr", "raid6_nc"):
        return [None if row[member] in ("P", "Q") else member for member in range(len(row))]
    members = list(range(len(row)))
    if "Q" in row:
        after = row.index("Q") + 1
        members = members[after:] + members[:after]
        return [member for member in members if row[member] not in ("P", "Q")]
    return [row.index(datum) for datum in range(len(row) - 1)]


def member_counts(name):
    return range(LEVELS[name].minimum, MOST + 1)


def parity_cases():
    return [(name, members) for name in PARITY for members in member_counts(name)]


@pytest.mark.parametrize(("name", "members"), parity_cases())
def test_every_sector_lies_where_the_model_puts_it(name, members):
    rows = 2 * members + 1
    geometry = Geometry(LEVELS[name], members, CHUNK, member_size=rows * CHUNK)
    sector = 0
    for stripe in range(rows):
        row = drawing(name, members, stripe)
        for datum in range(members - LEVELS[name].parity):
            for within in range(CHUNK_SECTORS):
                chunk = sector * SECTOR // CHUNK
                found_stripe, member = geometry.locate(chunk)
                offset = found_stripe * CHUNK + sector * SECTOR % CHUNK
                assert member == row.index(datum)
                assert offset == stripe * CHUNK + within * SECTOR
                assert geometry.chunk_at(found_stripe, member) == chunk
                sector += 1
    assert geometry.size == sector * SECTOR


@pytest.mark.parametrize(("name", "members"), parity_cases())
def test_stripes_are_those_of_the_model(name, members):
    geometry = Geometry(LEVELS[name], members, CHUNK, member_size=100 * CHUNK)
    for stripe in range(3 * members):
        row = drawing(name, members, stripe)
        found = geometry.stripe(stripe)
        assert [row[member] for member in found.data] == list(range(geometry.data_members))
        assert row[found.p] == "P"
        assert geometry.chunk_at(stripe, found.p) is None
        if LEVELS[name].parity == 2:
            assert row[found.q] == "Q"
            assert geometry.chunk_at(stripe, found.q) is None
        else:
            assert found.q is None
        assert list(found.syndrome) == syndrome(name, row)


@pytest.mark.parametrize(("name", "members"), parity_cases())
def test_data_and_parity_fill_every_place_once(name, members):
    rows = 2 * members
    geometry = Geometry(LEVELS[name], members, CHUNK, member_size=rows * CHUNK)
    places = [geometry.locate(chunk) for chunk in range(geometry.size // CHUNK)]
    for stripe in range(rows):
        layout = geometry.stripe(stripe)
        places += [(stripe, member) for member in (layout.p, layout.q) if member is not None]
    assert sorted(places) == sorted(itertools.product(range(rows), range(members)))


# Drawn by hand from the tables of md and of DDF: two stripes more than a turn would need.
DRAWN = {
    ("raid5_la", 3): "0 1 P / 2 P 3 / P 4 5 / 6 7 P",
    ("raid5_ra", 3): "P 0 1 / 2 P 3 / 4 5 P / P 6 7",
    ("raid5_ls", 3): "0 1 P / 3 P 2 / P 4 5 / 6 7 P",
    ("raid5_rs", 3): "P 0 1 / 3 P 2 / 4 5 P / P 6 7",
    ("raid5_n", 3): "0 1 P / 2 3 P / 4 5 P",
    ("raid5_0", 3): "P 0 1 / P 2 3 / P 4 5",
    ("raid4", 3): "P 0 1 / P 2 3 / P 4 5",
    ("raid4_n", 3): "0 1 P / 2 3 P / 4 5 P",
    ("raid5_ls", 5): "0 1 2 3 P / 5 6 7 P 4 / 10 11 P 8 9 / 15 P 12 13 14 / P 16 17 18 19",
    ("raid6_la", 5): "Q 0 1 2 P / 3 4 5 P Q / 6 7 P Q 8 / 9 P Q 10 11 / P Q 12 13 14",
    ("raid6_ra", 5): "P Q 0 1 2 / 3 P Q 4 5 / 6 7 P Q 8 / 9 10 11 P Q / Q 12 13 14 P",
    ("raid6_ls", 5): "Q 0 1 2 P / 3 4 5 P Q / 7 8 P Q 6 / 11 P Q 9 10 / P Q 12 13 14",
    ("raid6_rs", 5): "P Q 0 1 2 / 5 P Q 3 4 / 7 8 P Q 6 / 9 10 11 P Q / Q 12 13 14 P",
    ("raid6_0", 5): "P Q 0 1 2 / P Q 3 4 5",
    ("raid6_n_6", 5): "0 1 2 P Q / 3 4 5 P Q",
    ("raid6_zr", 5): "P Q 0 1 2 / 3 P Q 4 5 / 6 7 P Q 8 / 9 10 11 P Q / Q 12 13 14 P",
    ("raid6_nr", 5): "0 1 2 P Q / 3 4 P Q 5 / 6 P Q 7 8 / P Q 9 10 11 / Q 12 13 14 P",
    ("raid6_nc", 5): "0 1 2 Q P / 4 5 Q P 3 / 8 Q P 6 7 / Q P 9 10 11 / P 12 13 14 Q",
    ("raid6_la_6", 5): "0 1 2 P Q / 3 4 P 5 Q / 6 P 7 8 Q / P 9 10 11 Q / 12 13 14 P Q",
    ("raid6_ra_6", 5): "P 0 1 2 Q / 3 P 4 5 Q / 6 7 P 8 Q / 9 10 11 P Q / P 12 13 14 Q",
    ("raid6_ls_6", 5): "0 1 2 P Q / 4 5 P 3 Q / 8 P 6 7 Q / P 9 10 11 Q / 12 13 14 P Q",
    ("raid6_rs_6", 5): "P 0 1 2 Q / 5 P 3 4 Q / 7 8 P 6 Q / 9 10 11 P Q / P 12 13 14 Q",
    ("raid6_0_6", 5): "P 0 1 2 Q / P 3 4 5 Q",
}


def drawn(text):
    """Rows of chunk numbers, P and Q."""
    return [
        [word if word in "PQ" else int(word) for word in row.split()] for row in text.split("/")
    ]


@pytest.mark.parametrize(("name", "members"), DRAWN)
def test_layouts_are_as_drawn(name, members):
    geometry = Geometry(LEVELS[name], members, CHUNK, member_size=100 * CHUNK)
    for stripe, row in enumerate(drawn(DRAWN[name, members])):
        layout = geometry.stripe(stripe)
        for member, what in enumerate(row):
            if what in ("P", "Q"):
                assert member == (layout.p if what == "P" else layout.q)
            else:
                assert geometry.locate(what) == (stripe, member)


def test_every_parity_level_has_a_drawing():
    assert {name for name, _ in DRAWN} == set(PARITY)


# RAID 10. The model is a list of rows; each is a list of chunk numbers, member by member.


def near_rows(members, near, rows):
    """Write each chunk `near` times, from left to right and on in the next row."""
    written = [place // near for place in range(rows * members)]
    # A chunk that did not get all its copies is not there.
    whole = len(written) // near
    written = [chunk if chunk < whole else None for chunk in written]
    return [written[row * members : (row + 1) * members] for row in range(rows)]


def moved(row, sets, steps):
    """Move each chunk some members to the right, coming in again at the left of its set."""
    result = [None] * len(row)
    for members in sets:
        for index, member in enumerate(members):
            result[members[(index + steps) % len(members)]] = row[member]
    return result


def sets_of(members, size):
    """Sets of so many members; the last one has those too that are left over."""
    whole = members // size
    sets = [list(range(number * size, (number + 1) * size)) for number in range(whole)]
    sets[-1] += range(whole * size, members)
    return sets


def raid10_rows(members, near, far, far_offset, far_sets, part):
    """All rows of a RAID 10 whose first copies take `part` rows."""
    size = {0: members, 1: members // far, 2: near * far}[far_sets]
    sets = sets_of(members, size)
    first = near_rows(members, near, part)
    copies = [[moved(row, sets, near * copy) for row in first] for copy in range(far)]
    if far_offset:
        return [copies[copy][row] for row in range(part) for copy in range(far)]
    return [row for rows in copies for row in rows]


def raid10_cases():
    return [
        (members, near, far, far_offset, far_sets)
        for members in range(2, MOST + 1)
        for near in range(1, members + 1)
        for far in range(1, members // near + 1)
        for far_offset in (False, True)
        for far_sets in (0, 1, 2)
        if far > 1 or not (far_offset or far_sets)
    ]


def two_in_one_place(members, near, far, far_offset, far_sets):
    """Whether md itself goes wrong: near and far copies together, that do not divide evenly."""
    if near == 1 or far == 1:
        return False
    # A near copy that goes on in the next row meets the far copies there; and in the step to the
    # last, larger set md takes members before it for its own.
    return far_offset and members % near > 0 or far_sets == 1 and members % (members // far) > 0


def places_of(rows):
    """Chunk -> its places (row, member)."""
    places = {}
    for row, chunks in enumerate(rows):
        for member, chunk in enumerate(chunks):
            if chunk is not None:
                places.setdefault(chunk, set()).add((row, member))
    return places


@pytest.mark.parametrize(("members", "near", "far", "far_offset", "far_sets"), raid10_cases())
def test_all_copies_lie_where_the_model_puts_them(members, near, far, far_offset, far_sets):
    part = 2 * members + 1
    member_size = far * part * CHUNK + SECTOR
    keywords = dict(near=near, far=far, far_offset=far_offset, far_sets=far_sets)
    if two_in_one_place(members, near, far, far_offset, far_sets):
        with pytest.raises(ValueError, match="two chunks in one place"):
            Geometry(LEVELS["raid10"], members, CHUNK, member_size=member_size, **keywords)
        return
    geometry = Geometry(LEVELS["raid10"], members, CHUNK, member_size=member_size, **keywords)
    rows = raid10_rows(members, near, far, far_offset, far_sets, part)
    places = places_of(rows)
    assert geometry.rows == len(rows)
    assert geometry.size == len(places) * CHUNK
    for sector in range(geometry.size // SECTOR):
        chunk, within = divmod(sector * SECTOR, CHUNK)
        [copies] = geometry.copies(sector * SECTOR, SECTOR)
        assert len(copies) == near * far
        assert {length for _, _, length in copies} == {SECTOR}
        found = {((offset - within) // CHUNK, member) for member, offset, _ in copies}
        assert found == places[chunk]
        assert (copies[0][1] // CHUNK, copies[0][0]) == min(found)
    for row, chunks in enumerate(rows):
        for member, chunk in enumerate(chunks):
            assert geometry.chunk_at(row, member) == chunk
    assert geometry.chunk_at(len(rows), 0) is None


DRAWN_RAID10 = {
    (3, 2, 1, False, 0): "0 0 1 / 1 2 2 / 3 3 4 / 4 5 5",
    (5, 3, 1, False, 0): "0 0 0 1 1 / 1 2 2 2 3 / 3 3 4 4 4",
    (4, 1, 2, False, 0): "0 1 2 3 / 4 5 6 7 / 3 0 1 2 / 7 4 5 6",
    (4, 1, 2, False, 2): "0 1 2 3 / 4 5 6 7 / 1 0 3 2 / 5 4 7 6",
    (5, 1, 2, False, 2): "0 1 2 3 4 / 5 6 7 8 9 / 1 0 4 2 3 / 6 5 9 7 8",
    (3, 1, 2, True, 0): "0 1 2 / 2 0 1 / 3 4 5 / 5 3 4",
    (4, 1, 2, True, 2): "0 1 2 3 / 1 0 3 2 / 4 5 6 7 / 5 4 7 6",
    (4, 1, 3, True, 0): "0 1 2 3 / 3 0 1 2 / 2 3 0 1",
    (4, 2, 2, False, 0): "0 0 1 1 / 2 2 3 3 / 1 1 0 0 / 3 3 2 2",
}


@pytest.mark.parametrize("numbers", DRAWN_RAID10)
def test_copies_are_as_drawn(numbers):
    members, near, far, far_offset, far_sets = numbers
    rows = drawn(DRAWN_RAID10[numbers])
    geometry = Geometry(
        LEVELS["raid10"], members, CHUNK, near=near, far=far, far_offset=far_offset,
        far_sets=far_sets, member_size=len(rows) * CHUNK,
    )
    assert [
        [geometry.chunk_at(row, member) for member in range(members)] for row in range(len(rows))
    ] == rows


@pytest.mark.parametrize("far_sets", [0, 1, 2])
def test_numbers_that_put_two_chunks_in_one_place_are_refused(far_sets):
    """md would take them, and lose data."""
    with pytest.raises(ValueError, match="RAID 10 layout 0x.*202 of 5 members would have two"):
        Geometry(
            LEVELS["raid10"], 5, CHUNK, near=2, far=2, far_offset=True, far_sets=far_sets,
            member_size=8 * CHUNK,
        )


def test_a_layout_number_holds_all_parameters_of_a_raid10():
    assert raid10_layout(2, 1) == 0x102
    assert raid10_layout(1, 2) == 0x201
    assert raid10_layout(1, 3, True) == 0x10301
    assert raid10_layout(1, 2, False, 2) == LEVELS["raid10_far"].layout
    assert raid10_layout(1, 2, True, 2) == LEVELS["raid10_offset"].layout
    for _, near, far, far_offset, far_sets in raid10_cases():
        layout = raid10_layout(near, far, far_offset, far_sets)
        assert raid10_parameters(layout) == dict(
            near=near, far=far, far_offset=far_offset, far_sets=far_sets
        )


@pytest.mark.parametrize("layout", [0, 0x100, 0x002, 0x60102, 0x80102, -1])
def test_a_layout_number_that_means_nothing_is_refused(layout):
    with pytest.raises(ValueError, match="RAID 10 has no layout"):
        raid10_parameters(layout)


# RAID 1.


def test_raid1_has_a_copy_on_every_member():
    geometry = Geometry(LEVELS["raid1"], 3, 0, member_size=10 * SECTOR)
    assert geometry.size == 10 * SECTOR
    assert geometry.copies(SECTOR, 3 * SECTOR) == [
        [(member, SECTOR, 3 * SECTOR) for member in range(3)]
    ]


# RAID 0.


def raid0_rows(rows, layout):
    """Chunk -> (row, member), zone by zone; `rows` are the chunks that each member has."""
    places = {}
    top = chunk = 0
    while any(top < last for last in rows):
        members = [member for member, last in enumerate(rows) if top < last]
        bottom = min(rows[member] for member in members)
        begin = chunk
        while chunk < begin + (bottom - top) * len(members):
            counted_from = 0 if layout == RAID0_ORIG_LAYOUT else begin
            member = members[(chunk - counted_from) % len(members)]
            places[chunk] = (top + (chunk - begin) // len(members), member)
            chunk += 1
        top = bottom
    return places


def check_raid0(rows, layout, geometry):
    places = raid0_rows(rows, layout)
    assert geometry.size == len(places) * CHUNK
    assert len(set(places.values())) == sum(rows)
    for sector in range(geometry.size // SECTOR):
        chunk, within = divmod(sector * SECTOR, CHUNK)
        row, member = places[chunk]
        assert geometry.locate(chunk) == (row, member)
        assert geometry.copies(sector * SECTOR, SECTOR) == [
            [(member, row * CHUNK + within, SECTOR)]
        ]
    held = {place: chunk for chunk, place in places.items()}
    for row in range(max(rows) + 1):
        for member in range(len(rows)):
            assert geometry.chunk_at(row, member) == held.get((row, member))


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=MOST).filter(any),
    st.sampled_from([RAID0_ORIG_LAYOUT, RAID0_ALT_MULTIZONE_LAYOUT]),
)
def test_raid0_of_members_of_any_sizes_is_that_of_the_model(rows, layout):
    sizes = [row * CHUNK + SECTOR * (index % CHUNK_SECTORS) for index, row in enumerate(rows)]
    geometry = Geometry(LEVELS["raid0"], len(rows), CHUNK, sizes=sizes, raid0_layout=layout)
    check_raid0(rows, layout, geometry)


@pytest.mark.parametrize("layout", [RAID0_ORIG_LAYOUT, RAID0_ALT_MULTIZONE_LAYOUT])
@pytest.mark.parametrize("members", range(1, MOST + 1))
def test_raid0_of_equal_members_is_that_of_the_model(members, layout):
    geometry = Geometry(
        LEVELS["raid0"], members, CHUNK, member_size=5 * CHUNK + SECTOR, raid0_layout=layout
    )
    check_raid0([5] * members, layout, geometry)


def test_the_two_layouts_of_raid0_are_as_drawn():
    """After a first zone whose length is not whole rows of the second one."""
    sizes = [CHUNK, 3 * CHUNK, 3 * CHUNK]
    drawings = {
        RAID0_ORIG_LAYOUT: [[0, 1, 2], [None, 4, 3], [None, 6, 5]],
        RAID0_ALT_MULTIZONE_LAYOUT: [[0, 1, 2], [None, 3, 4], [None, 5, 6]],
    }
    for layout, rows in drawings.items():
        geometry = Geometry(LEVELS["raid0"], 3, CHUNK, sizes=sizes, raid0_layout=layout)
        assert [[geometry.chunk_at(row, m) for m in range(3)] for row in range(3)] == rows


# Ranges.


@given(st.sampled_from([dict(near=2), dict(far=3), dict(far=2, far_offset=True)]), st.data())
def test_pieces_of_a_range_cover_it_once_in_order(keywords, draw):
    geometry = Geometry(LEVELS["raid10"], 5, CHUNK, member_size=12 * CHUNK, **keywords)
    offset = draw.draw(st.integers(0, geometry.size - 1))
    length = draw.draw(st.integers(1, geometry.size - offset))
    done = offset
    for copies in geometry.copies(offset, length):
        [piece] = {length for _, _, length in copies}
        chunk, within = divmod(done, CHUNK)
        assert within + piece <= CHUNK
        for member, place, _ in copies:
            assert place % CHUNK == within
            assert geometry.chunk_at(place // CHUNK, member) == chunk
        done += piece
    assert done == offset + length


# Losses.


def subsets(members):
    return (
        set(chosen)
        for count in range(members + 1)
        for chosen in itertools.combinations(range(members), count)
    )


@pytest.mark.parametrize(("members", "near", "far", "far_offset", "far_sets"), raid10_cases())
def test_enough_members_are_those_that_have_a_copy_of_everything(
    members, near, far, far_offset, far_sets
):
    try:
        geometry = Geometry(
            LEVELS["raid10"], members, CHUNK, near=near, far=far, far_offset=far_offset,
            far_sets=far_sets, member_size=far * members * CHUNK,
        )
    except ValueError:
        return
    rows = raid10_rows(members, near, far, far_offset, far_sets, members)
    holders = [{member for _, member in places} for places in places_of(rows).values()]
    most = members
    for working in subsets(members):
        enough = all(working & members for members in holders)
        assert geometry.enough(working) == enough
        if not enough:
            most = min(most, members - len(working) - 1)
    assert geometry.redundancy == most


@pytest.mark.parametrize("name", ["raid0", "raid1", *PARITY])
def test_as_many_members_may_be_lost_as_the_level_says(name):
    level = LEVELS[name]
    geometry = Geometry(level, 5, CHUNK, member_size=8 * CHUNK)
    may = {"raid0": 0, "raid1": 4}.get(name, level.parity)
    assert geometry.redundancy == may
    for working in subsets(5):
        assert geometry.enough(working) == (5 - len(working) <= may)


# The table of levels.


def test_names_and_numbers_are_those_of_dm_raid():
    """Name, parity devices, fewest members that the kernel takes, md level and layout."""
    wanted = {
        "raid0": (0, 1, 0), "raid1": (0, 1, 1), "raid10": (0, 2, 10),
        "raid10_near": (0, 2, 10), "raid10_far": (0, 2, 10), "raid10_offset": (0, 2, 10),
        "raid4": (1, 2, 5, 4), "raid5_n": (1, 2, 5, 5), "raid5_ls": (1, 2, 5, 2),
        "raid5_rs": (1, 2, 5, 3), "raid5_la": (1, 2, 5, 0), "raid5_ra": (1, 2, 5, 1),
        "raid6_zr": (2, 4, 6, 8), "raid6_nr": (2, 4, 6, 9), "raid6_nc": (2, 4, 6, 10),
        "raid6_n_6": (2, 4, 6, 5), "raid6_ls_6": (2, 4, 6, 18), "raid6_rs_6": (2, 4, 6, 19),
        "raid6_la_6": (2, 4, 6, 16), "raid6_ra_6": (2, 4, 6, 17),
    }
    for name, numbers in wanted.items():
        level = LEVELS[name]
        found = (level.parity, level.minimum, level.number, level.layout)
        assert found[: len(numbers)] == numbers, name


def test_levels_are_found_by_the_numbers_of_md():
    for name, level in LEVELS.items():
        found = find_level(level.number, level.layout)
        assert found._replace(name="") == level._replace(name=""), name
    assert find_level(5, 4).name == "raid5_0"
    assert find_level(4, 5).name == "raid4_n"
    assert find_level(10, 0x10301) == LEVELS["raid10"]._replace(layout=0x10301, redundancy=2)


@pytest.mark.parametrize(("number", "layout"), [(5, 6), (5, 8), (6, 6), (6, 11), (6, 15), (6, 21)])
def test_layouts_that_md_does_not_have_are_refused(number, layout):
    with pytest.raises(ValueError, match=f"RAID {number} has no layout {layout}"):
        find_level(number, layout)


@pytest.mark.parametrize("number", [-1, 2, 3, 7])
def test_levels_that_are_not_there_are_refused(number):
    with pytest.raises(ValueError, match=f"there is no RAID level {number}"):
        find_level(number, 0)


# Limits.


@pytest.mark.parametrize("name", LEVELS)
def test_fewest_members_are_accepted(name):
    Geometry(LEVELS[name], LEVELS[name].minimum, CHUNK, near=1, member_size=8 * CHUNK)


@pytest.mark.parametrize("name", ["raid0", "raid1", "raid10", "raid4", "raid5_ls", "raid6_nc"])
def test_a_member_less_than_needed_is_refused(name):
    few = LEVELS[name].minimum - 1
    with pytest.raises(ValueError, match=f"{name} needs at least {few + 1} members .got {few}."):
        Geometry(LEVELS[name], few, CHUNK, member_size=8 * CHUNK)


def test_smallest_and_largest_chunk_size():
    Geometry(LEVELS["raid5_ls"], 3, 512, member_size=1 << 30)
    huge = Geometry(LEVELS["raid5_ls"], 3, 1 << 30, member_size=3 << 30)
    assert huge.size == 6 << 30
    assert Geometry(LEVELS["raid5_ls"], 3, 1 << 30, member_size=(1 << 30) - 512).size == 0


@pytest.mark.parametrize("chunk_size", [0, -512, 511, 513])
@pytest.mark.parametrize("name", ["raid0", "raid5_ls", "raid10"])
def test_chunk_sizes_that_are_not_whole_sectors_are_refused(name, chunk_size):
    with pytest.raises(ValueError, match="chunk size must be a multiple of 512 bytes"):
        Geometry(LEVELS[name], 3, chunk_size, member_size=1 << 20)


@pytest.mark.parametrize(("near", "far"), [(0, 1), (1, 0), (4, 1), (1, 4), (2, 2)])
def test_more_copies_than_members_or_none_are_refused(near, far):
    with pytest.raises(ValueError, match="RAID 10 of 3 members cannot hold"):
        Geometry(LEVELS["raid10"], 3, CHUNK, near=near, far=far, member_size=8 * CHUNK)


def test_wrong_numbers_of_sizes_and_wrong_layouts_are_refused():
    with pytest.raises(ValueError, match="there are 3 members and 2 sizes"):
        Geometry(LEVELS["raid0"], 3, CHUNK, sizes=(CHUNK, CHUNK))
    with pytest.raises(ValueError, match="RAID 0 has no layout 3"):
        Geometry(LEVELS["raid0"], 2, CHUNK, member_size=CHUNK, raid0_layout=3)
    with pytest.raises(ValueError, match="RAID 10 has no layout 0x60201"):
        Geometry(LEVELS["raid10"], 2, CHUNK, far=2, far_sets=3, member_size=8 * CHUNK)


def test_a_partial_last_chunk_holds_nothing():
    for name in ("raid0", "raid5_ls", "raid6_nc", "raid10"):
        whole = Geometry(LEVELS[name], 4, CHUNK, member_size=8 * CHUNK)
        more = Geometry(LEVELS[name], 4, CHUNK, member_size=9 * CHUNK - SECTOR)
        assert more.size == whole.size
        assert more.rows == whole.rows


def test_places_beyond_64_bits_of_bytes_are_exact():
    geometry = Geometry(LEVELS["raid6_nc"], 8, 65536, member_size=1 << 62)
    chunk = geometry.size // 65536 - 1
    stripe, member = geometry.locate(chunk)
    assert geometry.chunk_at(stripe, member) == chunk


def test_a_geometry_is_a_value():
    geometry = Geometry(LEVELS["raid5_ls"], 3, CHUNK, member_size=8 * CHUNK)
    assert geometry == Geometry(LEVELS["raid5_ls"], 3, CHUNK, member_size=8 * CHUNK)
    assert hash(geometry) == hash(replace(geometry))
    assert replace(geometry, member_size=9 * CHUNK).size == 18 * CHUNK
    assert geometry.layout == 2
    with pytest.raises(FrozenInstanceError):
        geometry.size = 0
