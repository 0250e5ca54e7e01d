"""Arrays against an array of bytes: every level, with members that fail, come back, and lie."""

import errno
import random

import pytest

from dmpy.backing import open_leaf
from dmpy.raid import make_array
from dmpy.raid.array import FAULTY, IN_SYNC, REBUILDING, Member, NoStore
from dmpy.raid.levels import LEVELS, Geometry
from dmpy.raid.sync import Syncer
from dmpy.target import Leg
from dmpy.testing import FaultyDevice

CHUNK = 4096
STRIPES = 6

SHAPES = [
    ("raid1", 2, {}),
    ("raid1", 3, {}),
    ("raid10", 4, {"near": 2}),
    ("raid10", 3, {"near": 2}),
    ("raid10", 5, {"near": 3}),
    ("raid10", 4, {"far": 2}),
    ("raid10", 3, {"far": 2, "far_offset": True}),
    ("raid4", 3, {}),
    ("raid5_ls", 3, {}),
    ("raid5_la", 4, {}),
    ("raid5_rs", 5, {}),
    ("raid5_ra", 3, {}),
    ("raid5_n", 4, {}),
    ("raid6_zr", 4, {}),
    ("raid6_nr", 5, {}),
    ("raid6_nc", 6, {}),
    ("raid6_ls_6", 5, {}),
    ("raid6_rs_6", 5, {}),
    ("raid6_la_6", 4, {}),
    ("raid6_ra_6", 4, {}),
    ("raid6_n_6", 5, {}),
    ("raid6_ls", 5, {}),
]
IDS = [f"{word}-{members}" + "".join(f"-{key}" for key in more) for word, members, more in SHAPES]


class Set:
    """An array on memory, and the bytes that it should have."""

    def __init__(self, word, members, more):
        member_size = CHUNK * STRIPES * more.get("far", 1)
        geometry = Geometry(LEVELS[word], members, CHUNK, member_size=member_size, **more)
        self.disks = [FaultyDevice(open_leaf(f"mem:{member_size}")) for _ in range(members)]
        legs = [Leg(disk, 0, member_size) for disk in self.disks]
        self.array = make_array(
            geometry,
            [Member(place, leg) for place, leg in enumerate(legs)],
            NoStore(),
            region_size=CHUNK * 2,
            name=word,
        )
        self.syncer = Syncer(self.array)
        self.model = bytearray(self.array.size)

    def write(self, offset, data):
        self.array.pwritev([memoryview(data)], offset)
        self.model[offset : offset + len(data)] = data

    def check(self):
        data = bytearray(self.array.size)
        self.array.preadv([memoryview(data)], 0)
        assert data == self.model

    def sync(self, action):
        self.syncer._do(action)

    def replace(self, place):
        """Put a new disk full of rubbish in a place, and rebuild it."""
        array = self.array
        array.remove(place)
        size = self.disks[place].size
        self.disks[place] = FaultyDevice(open_leaf(f"mem:{size}"))
        self.disks[place].pwritev([memoryview(b"\xa5" * size)], 0)
        array.add(place, Leg(self.disks[place], 0, size))
        self.sync("recover")
        assert array.members[place].state == IN_SYNC


def some_writes(raid, rng, count=30):
    for _ in range(count):
        kind = rng.random()
        if kind < 0.3:
            offset = rng.randrange(raid.array.size // CHUNK) * CHUNK
            length = CHUNK * rng.randint(1, 9)
        else:
            offset = rng.randrange(raid.array.size // 512) * 512
            length = 512 * rng.randint(1, 20)
        length = min(length, raid.array.size - offset)
        raid.write(offset, rng.randbytes(length))


@pytest.fixture(params=range(len(SHAPES)), ids=IDS)
def raid(request):
    return Set(*SHAPES[request.param])


def test_what_is_written_is_read_and_members_agree(raid):
    rng = random.Random(1)
    some_writes(raid, rng, 60)
    raid.check()
    raid.sync("check")
    assert raid.array.mismatches == 0


def test_every_set_of_members_that_may_be_lost_can_be_lost_and_replaced(raid):
    rng = random.Random(2)
    members = len(raid.disks)
    some_writes(raid, rng)
    pairs = [(first,) for first in range(members)]
    pairs += [(first, second) for first in range(members) for second in range(first)]
    for lost in pairs:
        if not raid.array.geometry.enough(set(range(members)) - set(lost)):
            continue
        for place in lost:
            raid.array.fail(place)
        raid.check()
        some_writes(raid, rng, 12)
        raid.check()
        for place in lost:
            raid.replace(place)
        raid.check()
        raid.sync("check")
        assert raid.array.mismatches == 0


def test_one_loss_too_many_stops_writes_and_overwrites_nothing(raid):
    rng = random.Random(3)
    some_writes(raid, rng)
    place = 0
    while not raid.array.failed:
        raid.array.fail(place)
        place += 1
    before = [bytes(disk.device.size) for disk in raid.disks]
    for disk, data in zip(raid.disks, before, strict=True):
        disk.device.preadv([memoryview(bytearray(len(data)))], 0)
    writes = [disk.calls["write"] for disk in raid.disks]
    with pytest.raises(OSError, match="too many members are gone") as refusal:
        raid.array.pwritev([memoryview(bytes(512))], 0)
    assert refusal.value.errno == errno.EIO
    assert [disk.calls["write"] for disk in raid.disks] == writes


def test_a_read_error_is_made_up_for_and_the_bytes_are_written_anew(raid):
    rng = random.Random(4)
    some_writes(raid, rng)
    for place, disk in enumerate(raid.disks):
        disk.fail(1, ops=["read"], ranges=[(0, 512)], forever=True)
        raid.check()
        disk.heal()
        assert raid.array.members[place].state == IN_SYNC
    assert sum(member.errors for member in raid.array.members) > 0
    raid.check()
    raid.sync("check")
    assert raid.array.mismatches == 0


def test_a_member_with_too_many_read_errors_is_left_out(raid):
    member, _ = raid.array.read_place(0, 512)
    raid.disks[member.index].fail(1, ops=["read"], forever=True)
    for _ in range(200):
        raid.check()
    assert member.state == FAULTY
    raid.check()


def test_a_member_that_fails_a_write_is_left_out_and_the_write_succeeds(raid):
    rng = random.Random(5)
    some_writes(raid, rng)
    events = []
    raid.array.event = lambda: events.append(1)
    raid.disks[1].fail(1, ops=["write"], forever=True)
    some_writes(raid, rng, 40)
    assert raid.array.members[1].state == FAULTY
    assert raid.array.degraded == 1
    assert events
    raid.check()
    raid.replace(1)
    raid.check()
    raid.sync("check")
    assert raid.array.mismatches == 0


def test_a_check_counts_what_does_not_agree_and_a_repair_mends_it(raid):
    rng = random.Random(6)
    some_writes(raid, rng)
    raid.disks[1].device.pwritev([memoryview(b"!" * 512)], CHUNK)
    raid.sync("check")
    found = raid.array.mismatches
    assert found > 0
    raid.sync("repair")
    assert raid.array.mismatches == found
    raid.sync("check")
    assert raid.array.mismatches == 0


def test_a_rebuild_can_be_interrupted_and_reads_do_not_use_what_is_not_rebuilt(raid):
    rng = random.Random(7)
    some_writes(raid, rng)
    array = raid.array
    array.fail(1)
    array.remove(1)
    size = raid.disks[1].size
    disk = FaultyDevice(open_leaf(f"mem:{size}"))
    disk.pwritev([memoryview(b"\xa5" * size)], 0)
    array.add(1, Leg(disk, 0, size))
    assert array.members[1].state == REBUILDING
    raid.check()
    some_writes(raid, rng)
    raid.check()
    raid.sync("recover")
    raid.check()
    array.fail(0)
    raid.check()


@pytest.mark.parametrize("word", ["raid5_ls", "raid6_zr"])
def test_full_stripes_read_nothing_and_small_writes_read_little(word):
    raid = Set(word, 6, {})
    width = raid.array.geometry.data_members * CHUNK
    raid.write(0, bytes(width * 2))
    assert all(disk.calls["read"] == 0 for disk in raid.disks)
    raid.write(512, bytes(512))
    parity = raid.array.geometry.level.parity
    assert sum(disk.calls["read"] for disk in raid.disks) == 1 + parity
    before = sum(disk.calls["read"] for disk in raid.disks)
    raid.write(0, bytes(width - CHUNK))
    assert sum(disk.calls["read"] for disk in raid.disks) == before + 1


def test_a_member_that_is_added_during_a_recovery_is_rebuilt_whole():
    raid = Set("raid6_zr", 5, {})
    rng = random.Random(8)
    some_writes(raid, rng)
    array = raid.array
    for place in (0, 1):
        array.fail(place)
        array.remove(place)
        raid.disks[place] = FaultyDevice(open_leaf(f"mem:{raid.disks[place].size}"))
        raid.disks[place].pwritev([memoryview(b"\xa5" * raid.disks[place].size)], 0)
    array.add(0, Leg(raid.disks[0], 0, raid.disks[0].size))
    window = array.sync_window
    windows = array.sync_windows

    def add_another(action, begin, end):
        if begin and array.members[1].leg is None:
            array.add(1, Leg(raid.disks[1], 0, raid.disks[1].size))
        return window(action, begin, end)

    array.sync_windows = lambda begin: (
        (place, place + CHUNK) for place in range(begin, array.sync_size, CHUNK)
    )
    array.sync_window = add_another
    raid.sync("recover")
    assert [member.state for member in array.members[:2]] == [IN_SYNC, REBUILDING]
    raid.check()
    array.sync_windows, array.sync_window = windows, window
    raid.sync("recover")
    assert array.degraded == 0
    array.fail(2)
    array.fail(3)
    raid.check()


@pytest.mark.parametrize(("word", "members"), [("raid5_ls", 5), ("raid6_zr", 6)])
def test_a_small_write_that_loses_one_member_too_many_is_not_acknowledged(word, members):
    raid = Set(word, members, {})
    for disk in raid.disks:
        disk.fail(1, ops=["write"], forever=True)
    with pytest.raises(OSError, match="too many members are gone") as refusal:
        raid.array.pwritev([memoryview(bytes(512))], 0)
    assert refusal.value.errno == errno.EIO
