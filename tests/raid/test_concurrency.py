"""Requests from several threads while members fail, are replaced, and are rebuilt."""

import random
import threading

import pytest

from dmpy.backing import open_leaf
from dmpy.raid import make_array
from dmpy.raid.array import IN_SYNC, Member, NoStore
from dmpy.raid.levels import LEVELS, Geometry
from dmpy.raid.sync import Syncer
from dmpy.target import Leg
from dmpy.testing import FaultyDevice

CHUNK = 4096
MEMBER = CHUNK * 64


def disk_of_rubbish():
    disk = FaultyDevice(open_leaf(f"mem:{MEMBER}"))
    disk.pwritev([memoryview(b"\xa5" * MEMBER)], 0)
    return disk


class Worker(threading.Thread):
    """Writes and reads its share of an array, and knows what it should hold."""

    def __init__(self, array, base, size, seed, stop):
        super().__init__(daemon=True)
        self.array, self.base, self.size, self.seed, self.stop = array, base, size, seed, stop
        self.error = None

    def run(self):
        try:
            self.work(random.Random(self.seed), bytearray(self.size))
        except BaseException as error:
            self.error = error
            self.stop.set()

    def work(self, rng, model):
        while not self.stop.is_set():
            offset = rng.randrange(self.size // 512) * 512
            length = min(512 * rng.randint(1, 24), self.size - offset)
            if rng.random() < 0.6:
                data = rng.randbytes(length)
                self.array.pwritev([memoryview(data)], self.base + offset)
                model[offset : offset + length] = data
            else:
                assert self.read(offset, length) == model[offset : offset + length]
        assert self.read(0, self.size) == model

    def read(self, offset, length):
        back = bytearray(length)
        self.array.preadv([memoryview(back)], self.base + offset)
        return back


@pytest.mark.parametrize(
    ("word", "members", "more"),
    [
        ("raid1", 3, {}),
        ("raid10", 4, {"near": 2}),
        ("raid5_ls", 4, {}),
        ("raid6_zr", 5, {}),
    ],
)
def test_nothing_is_lost_while_members_come_and_go(word, members, more):
    geometry = Geometry(LEVELS[word], members, CHUNK, member_size=MEMBER, **more)
    disks = [FaultyDevice(open_leaf(f"mem:{MEMBER}")) for _ in range(members)]
    places = [Member(place, Leg(disk, 0, MEMBER)) for place, disk in enumerate(disks)]
    array = make_array(geometry, places, NoStore(), region_size=CHUNK * 4, name=word)
    syncer = Syncer(array, daemon_sleep=0.01)
    background = threading.Thread(target=syncer.run, daemon=True)
    background.start()
    stop = threading.Event()
    share = array.size // 4 // 512 * 512
    workers = [Worker(array, share * number, share, number, stop) for number in range(4)]
    for worker in workers:
        worker.start()
    rng = random.Random(99)
    try:
        for _ in range(6):
            place = rng.randrange(members)
            if rng.random() < 0.5:
                array.fail(place)
            else:
                disks[place].fail(1, ops=["write"], forever=True)
                while array.members[place].state == IN_SYNC and not stop.wait(0.001):
                    pass
            if stop.is_set():
                break
            array.remove(place)
            disks[place] = disk_of_rubbish()
            array.add(place, Leg(disks[place], 0, MEMBER))
            assert syncer.wait_idle(20)
            assert array.members[place].state == IN_SYNC
    finally:
        stop.set()
        for worker in workers:
            worker.join(20)
    assert [worker.error for worker in workers if worker.error or worker.is_alive()] == []
    syncer.request("check")
    assert syncer.wait_idle(20)
    assert array.mismatches == 0
    syncer.stop()
    background.join(10)
    assert not background.is_alive()
