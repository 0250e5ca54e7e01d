"""`dmpy md`: arrays from the command line, against a real server."""

import hashlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests import needs

MIB = 1 << 20


@pytest.fixture
def disks(tmp_path):
    """Makes files of some MiB; returns their paths as words."""
    def make(count, mib=8, first=0):
        words = []
        for number in range(first, first + count):
            path = tmp_path / f"{chr(ord('a') + number)}.img"
            path.touch()
            os.truncate(path, mib * MIB)
            words.append(str(path))
        return words
    return make


def digests(words):
    return [hashlib.sha256(Path(word).read_bytes()).hexdigest() for word in words]


def states(found):
    return {each["device"]: (each["place"], each["state"]) for each in found["devices"]}


def test_an_array_is_made_used_degraded_mended_and_assembled_again(dmpy, disks):
    a, b, c, d = disks(4)
    made = dmpy.ok("md", "create", "r5", "--level", "5", "-x", "1", "-c", "64K", "--bitmap",
                   a, b, c, d, "--wait", "--json").json()
    assert (made["level"], made["health"], made["state"]) == ("raid5", "UUU", "clean")
    assert dmpy.ok("info", "r5", "--json").json()["size_sectors"] == made["size"] >> 9
    failed = dmpy.ok("md", "fail", "r5", b, "--wait", "--json").json()
    assert states(failed) == {
        a: (0, "in_sync"), b: (None, "unused"), c: (2, "in_sync"), d: (1, "in_sync"),
    }
    text = dmpy.ok("md", "detail", "r5").out
    assert "raid5 left-symmetric" in text and "3 [UUU]" in text
    dmpy.ok("md", "remove", "r5", b)
    assert dmpy.ok("table", "r5", "--json").json()["lines"][0][3].split()[1:] == ["3", a, c, d]
    assert dmpy.ok("md", "check", "r5", "--wait").out == "0 sectors disagree\n"
    dmpy.ok("md", "stop", "r5")
    again = dmpy("md", "assemble", "r5", d, b, a, c, "--json")
    assert again.status == 0
    assert f"dmpy: r5: {b} is left out: it is stale" in again.err
    assert again.json()["health"] == "UUU"
    dmpy.ok("md", "stop", "r5")


def test_a_member_is_added_re_added_and_replaced(dmpy, disks):
    a, b, c = disks(3)
    dmpy.ok("md", "create", "m", "-l", "1", "-b", "--bitmap-chunk", "64K", a, b, "--wait")
    dmpy.ok("md", "fail", "m", a)
    dmpy.ok("md", "remove", "m", "failed")
    assert dmpy.ok("md", "detail", "m", "--json").json()["health"] == "_U"
    back = dmpy.ok("md", "re-add", "m", a, "--wait", "--json").json()
    assert back["health"] == "UU"
    new = dmpy.ok("md", "replace", "m", b, "--with", c, "--wait", "--json").json()
    assert states(new)[c] == (1, "in_sync") and new["health"] == "UU"
    grown = dmpy.ok("md", "remove", "m", b, "--json").json()
    assert b not in states(grown)
    dmpy.ok("md", "add", "m", b, "--force")
    wide = dmpy.ok("md", "grow", "m", "-n", "3", "--wait", "--json").json()
    assert wide["health"] == "UUU"
    dmpy.ok("md", "stop", "m")


def test_more_of_each_member_is_seen_by_new_connections(dmpy, disks):
    a, b, c = disks(3)
    dmpy.ok("md", "create", "r", "-l", "5", "-c", "64K", "--size", "2M", "--assume-clean", a, b, c)
    before = dmpy.ok("info", "r", "--json").json()["size_sectors"]
    dmpy.ok("md", "grow", "r", "--size", "4M", "--wait")
    assert dmpy.ok("info", "r", "--json").json()["size_sectors"] == 2 * before
    dmpy.ok("md", "grow", "r", "--size", "max", "--wait")
    assert dmpy.ok("info", "r", "--json").json()["size_sectors"] > 2 * before
    assert "has" in dmpy.refused("md", "grow", "r", "--size", "1M")
    dmpy.ok("md", "stop", "r")


def test_members_that_have_become_larger_are_used(dmpy, disks):
    a, b = disks(2)
    dmpy.ok("md", "create", "m", "-l", "1", "--bitmap", "--assume-clean", a, b)
    before = dmpy.ok("info", "m", "--json").json()["size_sectors"]
    for word in (a, b):
        os.truncate(word, 24 * MIB)
    dmpy.ok("md", "grow", "m", "--size", "max", "--wait")
    assert dmpy.ok("info", "m", "--json").json()["size_sectors"] == before + (16 * MIB >> 9)
    assert dmpy.ok("md", "check", "m", "--wait").out == "0 sectors disagree\n"
    dmpy.ok("md", "stop", "m")
    found = dmpy.ok("md", "examine", a, "--json").json()
    assert (found["state"], found["bitmap"]["dirty"]) == ("clean", 0)


def test_the_servers_own_devices_are_disks_too(dmpy, disks):
    a, b = disks(2)
    for name, path in (("low0", a), ("low1", b)):
        dmpy.ok("create", name, "--table", f"0 {8 * MIB >> 9} linear {path} 0")
    dmpy.ok("md", "create", "high", "-l", "1", "--assume-clean", "low0", "low1")
    assert dmpy.ok("md", "detail", "high", "--json").json()["health"] == "UU"
    dmpy.ok("md", "stop", "high")
    assert dmpy.ok("md", "examine", "low1", "--json").json()["role"] == 1
    dmpy.ok("md", "assemble", "high", "low1", "low0")
    dmpy.ok("md", "stop", "high")


def test_examine_and_zero_superblock_work_without_a_server(own_dmpy, disks):
    (a,) = disks(1)
    assert "has no superblock" in own_dmpy.refused("md", "examine", a)
    assert "no superblock" in own_dmpy.refused("md", "zero-superblock", a)


def test_a_superblock_is_zeroed(dmpy, disks):
    a, b = disks(2)
    dmpy.ok("md", "create", "m", "-l", "1", "-e", "1.0", "--assume-clean", a, b)
    assert a in dmpy.refused("md", "zero-superblock", a)
    # Looking does no harm.
    assert dmpy.ok("md", "examine", a, "--json").json()["role"] == 0
    dmpy.ok("md", "stop", "m")
    assert "Array UUID" in dmpy.ok("md", "examine", a, b).out
    dmpy.ok("md", "zero-superblock", a)
    assert "has no superblock" in dmpy.refused("md", "examine", a)


def test_bad_input_is_one_sentence_and_writes_nothing(dmpy, disks):
    a, b, c = disks(3)
    before = digests([a, b, c])
    for words, sentence in (
        (("create", "m", "-l", "7", a, b), "level must be one of"),
        (("create", "m", "-l", "5", "-p", "zigzag", a, b), "layout of raid5 must be one of"),
        (("create", "m", "-l", "6", a, b, c), "needs at least 4 members"),
        (("create", "m", "-l", "1", a, a), "is named twice"),
        (("create", "m", "-l", "1", "-c", "lots", a, b), "is not a size"),
        (("create", "m", "-l", "1", a, f"{b}.nowhere"), "nowhere"),
        (("assemble", "m", a, b), "has no superblock of an MD array"),
        (("detail", "m"), "does not exist"),
    ):
        assert sentence in dmpy.refused("md", *words)
    for words, sentence in (
        (("create", "m", "-l", "1", "-n", "3", a, b), "2 devices are named (expected 3)"),
        (("grow", "m"), "one of --raid-devices and --size"),
        (("nonsense",), "nonsense"),
    ):
        assert sentence in dmpy.refused("md", *words, status=2)
    assert digests([a, b, c]) == before


def test_a_name_that_is_taken_is_refused_before_a_write(dmpy, disks):
    a, b = disks(2)
    dmpy.ok("create", "taken", "--notable")
    before = digests([a, b])
    assert "exists already" in dmpy.refused("md", "create", "taken", "-l", "1", a, b)
    assert "is no MD array" in dmpy.refused("md", "detail", "taken")
    assert digests([a, b]) == before


def test_a_disk_that_carries_something_is_refused_without_force(dmpy, disks):
    needs.tool("blkid")
    a, b, c = disks(3)
    subprocess.run([needs.tool("mkfs.ext4"), "-q", "-F", c], check=True, timeout=30)
    before = digests([c])
    assert "ext4 file system" in dmpy.refused("md", "create", "m", "-l", "1", a, c)
    dmpy.ok("md", "create", "m", "-l", "1", "--assume-clean", a, b)
    assert "ext4 file system" in dmpy.refused("md", "add", "m", c)
    assert digests([c]) == before
    assert c not in states(dmpy.ok("md", "detail", "m", "--json").json())
    dmpy.ok("md", "add", "m", c, "--force")
    assert states(dmpy.ok("md", "detail", "m", "--json").json())[c] == (None, "spare")
    dmpy.ok("md", "stop", "m")


def test_a_degraded_array_is_named_and_forced_only_when_asked(dmpy, disks):
    a, b, c = disks(3)
    dmpy.ok("md", "create", "r", "-l", "5", a, b, c, "--wait")
    dmpy.ok("md", "stop", "r")
    answer = dmpy("md", "assemble", "r", a, c)
    assert (answer.status, answer.err) == (
        0, "dmpy: r: the array is degraded: no disk for place 1\n"
    )
    dmpy.ok("md", "stop", "r")
    stale = dmpy.refused("md", "assemble", "r", a, b)
    assert "too few disks" in stale and b in stale
    forced = dmpy("md", "assemble", "r", a, b, "--force")
    assert forced.status == 0 and "is taken although it is stale" in forced.err
    dmpy.ok("md", "stop", "r")


def test_an_array_comes_back_with_the_server(own_dmpy, disks):
    a, b = disks(2)
    own_dmpy.ok("md", "create", "m", "-l", "1", a, b, "--wait")
    own_dmpy.ok("shutdown")
    assert own_dmpy("serve", "--background").status == 0
    found = own_dmpy.ok("md", "detail", "m", "--wait", "--json").json()
    assert (found["health"], found["degraded"]) == ("UU", 0)
    own_dmpy.ok("md", "stop", "m")


def test_a_server_that_is_killed_leaves_what_can_be_synced(own_dmpy, disks):
    a, b, c = disks(3, 64)
    own_dmpy.ok("md", "create", "r", "-l", "5", "--bitmap", "--bitmap-chunk", "64K", a, b, c)
    own_dmpy.ok("message", "r", "0", "sync_speed_max", "20000")
    assert own_dmpy.ok("md", "detail", "r", "--json").json()["action"] == "resync"
    os.kill(own_dmpy.pid(), signal.SIGKILL)
    assert own_dmpy("serve", "--background").status == 0
    found = own_dmpy.ok("md", "detail", "r", "--wait", "--json").json()
    assert (found["health"], found["action"]) == ("UUU", "idle")
    assert own_dmpy.ok("md", "check", "r", "--wait").out == "0 sectors disagree\n"
    own_dmpy.ok("md", "stop", "r")
    # Orderly: no resync the next time.
    assert own_dmpy.ok("md", "examine", a, "--json").json()["state"] == "clean"
