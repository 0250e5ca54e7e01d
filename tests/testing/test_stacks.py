"""The stack generator is deterministic, deep enough, and never maps two sectors to one."""

from dmpy.testing.stacks import Place, RandomStack, StackLine


def hand_made(**devices):
    """A stack with these lines, the last device on top."""
    stack = RandomStack("hand made")
    stack.devices = devices
    stack.leaf_sectors = [1000, 1000]
    stack.top = list(devices)[-1]
    stack._sectors = {name: sum(line.len for line in lines) for name, lines in devices.items()}
    return stack


def test_the_same_seed_gives_the_same_tables():
    first, second = RandomStack(7), RandomStack(7)
    assert first.devices == second.devices
    assert any(RandomStack(seed).devices != first.devices for seed in range(3))


def test_every_target_and_the_full_depth_come_up():
    stacks = [RandomStack(seed) for seed in range(40)]
    seen = {line.target for s in stacks for lines in s.devices.values() for line in lines}
    assert seen == {"linear", "striped", "unstriped", "zero"}
    assert max(len({name.split("-")[0] for name in s.devices}) for s in stacks) == 6


def test_no_two_sectors_share_a_place():
    for seed in range(20):
        stack = RandomStack(seed)
        places = [stack.locate(sector) for sector in range(stack.sectors)]
        places = [place for place in places if place is not None]
        assert len(places) == len(set(places))


def test_aliases_occur_when_asked_for():
    shared = 0
    for seed in range(20):
        stack = RandomStack(seed, alias=True)
        places = [stack.locate(sector) for sector in range(stack.sectors)]
        shared += len(places) - len(set(places)) > 0
    assert shared


def test_the_oracle_deals_chunks_like_the_kernel_manual_says():
    stack = hand_made(
        a=[StackLine(0, 24, "striped", ((0, 100), (1, 0), (0, 200)), chunk=4)],
        b=[StackLine(0, 10, "zero"), StackLine(10, 8, "linear", (("a", 2),))],
        c=[StackLine(0, 8, "unstriped", (("a", 0),), chunk=4, stripes=3, stripe=1)],
    )
    dealt = [stack.locate(sector, "a") for sector in (0, 3, 4, 8, 12, 23)]
    assert dealt == [
        Place(0, 100),
        Place(0, 103),
        Place(1, 0),
        Place(0, 200),
        Place(0, 104),
        Place(0, 207),
    ]
    assert stack.locate(9, "b") is None
    assert stack.locate(10, "b") == Place(0, 102)
    assert stack.locate(12, "b") == Place(1, 0)
    assert [stack.locate(s, "c") for s in range(8)] == [Place(1, s) for s in range(8)]


def test_tables_name_devices_and_leaves(tmp_path):
    stack = RandomStack(1, folder=tmp_path)
    stack.devices = {"a": [StackLine(0, 8, "striped", ((0, 1), ("b", 2)), chunk=4)]}
    assert stack.table("a") == f"0 8 striped 2 4 {tmp_path}/leaf0.img 1 /dev/mapper/b 2"
