"""A disk whose power can be cut keeps its promise about flushes, and no other."""

import numpy as np

from dmpy.testing.powercut import Power, PowerCutDevice


def write(device, sector, fill, count=1, **how):
    device.pwritev([memoryview(bytes([fill]) * (512 * count))], sector * 512, **how)


def sectors(image):
    """One number per sector; a sector is whole, so its first byte stands for all."""
    rows = image.reshape(-1, 512)
    assert (rows == rows[:, :1]).all(), "a sector is torn"
    return tuple(rows[:, 0].tolist())


def states(device, **how):
    return [sectors(image) for image in device.crash_images(**how)]


def test_reads_see_unflushed_writes():
    device = PowerCutDevice.alone(4096)
    write(device, 1, 7)
    data = bytearray(512)
    device.preadv([memoryview(data)], 512)
    assert data == bytes([7]) * 512


def test_one_unflushed_sector_is_there_or_not():
    device = PowerCutDevice.alone(1024)
    write(device, 0, 1)
    assert sorted(states(device)) == [(0, 0), (1, 0)]


def test_few_sectors_are_enumerated_in_every_combination():
    device = PowerCutDevice.alone(2048)
    write(device, 0, 1, count=2)
    write(device, 3, 2)
    found = states(device)
    assert len(found) == len(set(found)) == 8


def test_an_older_write_to_the_same_sector_may_win_by_loss_of_the_newer():
    device = PowerCutDevice.alone(512)
    write(device, 0, 1)
    write(device, 0, 2)
    assert set(states(device)) == {(0,), (1,), (2,)}


def test_flushed_writes_are_always_there():
    device = PowerCutDevice.alone(1024)
    write(device, 0, 1)
    device.flush()
    write(device, 1, 2)
    assert set(states(device)) == {(1, 0), (1, 2)}


def test_a_fua_write_is_there_and_takes_nothing_else_with_it():
    device = PowerCutDevice.alone(1536)
    write(device, 0, 1, count=3)
    write(device, 1, 9, fua=True)
    assert set(states(device)) == {(a, 9, b) for a in (0, 1) for b in (0, 1)}


def test_zeroes_and_discards_are_unflushed_too():
    device = PowerCutDevice.alone(1024)
    write(device, 0, 1, count=2)
    device.flush()
    device.write_zeroes(0, 512)
    device.discard(512, 512)
    assert set(states(device)) == {(a, b) for a in (0, 1) for b in (0, 1)}


def test_a_write_of_part_of_a_sector_moves_the_whole_sector():
    device = PowerCutDevice.alone(512)
    device.pwritev([memoryview(b"x")], 100)
    images = list(device.crash_images())
    assert sorted(image.sum() for image in images) == [0, ord("x")]


def test_many_writes_give_a_limited_seeded_choice_with_the_extremes():
    device = PowerCutDevice.alone(512 * 100)
    for sector in range(100):
        write(device, sector, 1)
    found = states(device, seed=5, limit=32)
    assert len(found) == 32
    assert (0,) * 100 in found and (1,) * 100 in found
    assert found == states(device, seed=5, limit=32)
    assert found != states(device, seed=6, limit=32)


def test_a_big_write_is_torn():
    device = PowerCutDevice.alone(512 * 64)
    write(device, 0, 1, count=64)
    assert any(0 < sum(state) < 64 for state in states(device, limit=16))


def test_devices_on_one_plug_are_cut_together_and_flushed_apart():
    power = Power()
    data, metadata = power.device(512, "data"), power.device(512, "metadata")
    write(data, 0, 1)
    write(metadata, 0, 2)
    data.flush()
    found = {tuple(sectors(image)[0] for image in crash.images) for crash in power.crashes()}
    assert found == {(1, 0), (1, 2)}


def test_the_past_can_be_cut_at_every_flush():
    power = Power()
    device = power.device(1024)
    write(device, 0, 1)
    device.flush()
    write(device, 0, 2)
    device.flush()
    write(device, 1, 3)
    assert power.boundaries == [2, 4]
    seen = {(crash.position, sectors(crash.images[0])) for crash in power.every_crash()}
    assert seen == {
        (0, (0, 0)),
        (1, (0, 0)),
        (1, (1, 0)),
        (2, (1, 0)),
        (3, (1, 0)),
        (3, (2, 0)),
        (4, (2, 0)),
        (5, (2, 0)),
        (5, (2, 3)),
    }


def test_a_crash_knows_what_was_flushed():
    power = Power()
    first, second = power.device(512), power.device(512)
    write(first, 0, 1)
    first.flush()
    write(second, 0, 1)
    crash = next(power.crashes())
    assert crash.flushed == [2, 0]


def test_after_power_on_the_disks_hold_the_image_and_can_crash_again():
    power = Power()
    device = power.device(1024, "disk")
    write(device, 0, 1)
    for crash in power.crashes():
        (again,) = crash.devices
        assert again.name == "disk"
        assert np.array_equal(again.content(), crash.images[0])
        write(again, 1, 5)
        assert {state[1] for state in states(again)} == {0, 5}


def test_no_unflushed_write_gives_exactly_one_image():
    device = PowerCutDevice.alone(512, image=bytes([4]) * 512)
    assert states(device) == [(4,)]
