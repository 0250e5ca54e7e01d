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
    array = make_array(
        geometry,
        [Member(place, Leg(disk, 0, MEMBER)) for place, disk in enumerate(disks)],
        NoStore(),
        region_size=CHUNK * 4,
        name=word,
    )
    syncer = Syncer(array, daemon_sleep=0.01)
    background = threading.Thread(target=syncer.run, daemon=True)
    background.start()
    stop = threading.Event()
    failures = []
    share = array.size // 4 // 512 * 512

    def work(number):
        rng = random.Random(number)
        base = share * number
        model = bytearray(share)
        try:
            while not stop.is_set():
                offset = rng.randrange(share // 512) * 512
                length = min(512 * rng.randint(1, 24), share - offset)
                if rng.random() < 0.6:
                    data = rng.randbytes(length)
                    array.pwritev([memoryview(data)], base + offset)
                    model[offset : offset + length] = data
                else:
                    back = bytearray(length)
                    array.preadv([memoryview(back)], base + offset)
                    assert back == model[offset : offset + length]
            back = bytearray(share)
            array.preadv([memoryview(back)], base)
            assert back == model
        except BaseException as error:
            failures.append(error)
            stop.set()

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
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
            disks[place] = FaultyDevice(open_leaf(f"mem:{MEMBER}"))
            disks[place].pwritev([memoryview(b"\xa5" * MEMBER)], 0)
            array.add(place, Leg(disks[place], 0, MEMBER))
            assert syncer.wait_idle(20)
            assert array.members[place].state == IN_SYNC
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
    assert not failures
    syncer.request("check")
    assert syncer.wait_idle(20)
    assert array.mismatches == 0
    syncer.stop()
    background.join(10)
    assert not background.is_alive()
