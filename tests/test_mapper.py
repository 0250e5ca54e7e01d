"""The registry: names, numbers, stacks, removal, and what a restart brings back."""

import errno
import os

import pytest

from dmpy.errors import TableError
from dmpy.mapper import FailedEntry, Mapper


@pytest.fixture
def dm():
    with Mapper() as mapper:
        yield mapper


class Notes:
    """A journal in memory; fails when told to."""

    def __init__(self):
        self.kept = {}
        self.full = False

    def record(self, entry):
        if self.full:
            raise OSError(errno.ENOSPC, "no space left for the journal")
        self.kept[entry["minor"]] = dict(entry)

    def forget(self, minor):
        self.kept.pop(minor, None)

    def entries(self):
        return [self.kept[minor] for minor in sorted(self.kept)]


def refusal(act, number, sentence=None):
    with pytest.raises(OSError, match=sentence) as caught:
        act()
    assert caught.value.errno == number


def test_devices_are_found_by_name_uuid_and_number(dm):
    device = dm.create("a", "0 8 zero", uuid="U-1", minor=7)
    assert dm.device("a") is dm.device(uuid="U-1") is dm.device(minor=7) is device
    assert device.table_name == "253:7"
    refusal(lambda: dm.device("b"), errno.ENXIO, "device b does not exist")
    refusal(lambda: dm.device(uuid=""), errno.ENXIO)
    refusal(lambda: dm.device(minor=8), errno.ENXIO, "253:8")


def test_the_lowest_free_number_is_taken(dm):
    assert [dm.create(name, "0 8 zero").minor for name in "abc"] == [0, 1, 2]
    dm.remove("b")
    assert dm.create("d", "0 8 zero").minor == 1


def test_what_is_taken_is_refused_and_nothing_changes(dm):
    dm.create("a", "0 8 zero", uuid="U", minor=3)
    refusal(lambda: dm.create("a", "0 8 zero"), errno.EBUSY, "a exists already")
    refusal(lambda: dm.create("b", "0 8 zero", uuid="U"), errno.EBUSY, "that of device a")
    refusal(lambda: dm.create("b", "0 8 zero", minor=3), errno.ENXIO, "3 is taken")
    assert [device.name for device in dm.devices()] == ["a"]


@pytest.mark.parametrize("name", ["", "a/b", "/a", ".", "..", "control", "a\0b", "x" * 128])
def test_a_name_that_cannot_be_is_refused(dm, name):
    dm.create("ok", "0 8 zero")
    refusal(lambda: dm.create(name, "0 8 zero"), errno.EINVAL, "device name must")
    refusal(lambda: dm.rename("ok", name), errno.EINVAL, "device name must")


def test_the_longest_name_is_accepted(dm):
    assert dm.create("x" * 127, "0 8 zero").name == "x" * 127


@pytest.mark.parametrize("minor", [-1, 1 << 20])
def test_a_number_out_of_range_is_refused(dm, minor):
    refusal(lambda: dm.create("a", "0 8 zero", minor=minor), errno.EINVAL, "minor number")


def test_a_uuid_is_given_once(dm):
    dm.create("a", "0 8 zero")
    dm.create("b", "0 8 zero", uuid="B")
    refusal(lambda: dm.set_uuid("a", "B"), errno.EBUSY)
    refusal(lambda: dm.set_uuid("a", "x" * 129), errno.EINVAL)
    assert dm.set_uuid("a", "A").event_nr == 1
    refusal(lambda: dm.set_uuid("a", "C"), errno.EINVAL, "has the uuid A already")


def test_rename_keeps_the_device_and_is_an_event(dm):
    device = dm.create("a", "0 8 zero")
    dm.create("b", "0 8 linear a 0")
    assert dm.rename("a", "c") is device
    assert device.event_nr == 1
    assert dm.device("b").table_text() == "0 8 linear 253:0 0"
    refusal(lambda: dm.device("a"), errno.ENXIO)
    refusal(lambda: dm.rename("c", "b"), errno.EBUSY)
    refusal(lambda: dm.rename("c", "c"), errno.EBUSY)
    refusal(lambda: dm.rename("a", "x"), errno.ENXIO)


def test_a_table_that_cannot_be_loaded_leaves_nothing_behind(dm, tmp_path):
    dm.create("low", "0 8 zero")
    for table in ("0 4 linear low 0\n4 8 linear low 4", "0 8 nosuch", "0 8 linear low"):
        with pytest.raises(TableError):
            dm.create("a", table)
    assert [device.name for device in dm.devices()] == ["low"]
    assert dm.device("low").open_count == 0
    dm.create("a", "0 8 zero")
    with pytest.raises(TableError):
        dm.load("a", "0 9 linear low 0")
    assert dm.device("a").inactive is None


@pytest.mark.parametrize(
    ("word", "number"),
    [
        ("missing.img", errno.ENODEV),
        (".", errno.ENODEV),
        ("fifo", errno.ENODEV),
        ("/dev/null", errno.ENODEV),
        ("253:99", errno.ENXIO),
        ("/dev/mapper/nosuch", errno.ENODEV),
    ],
)
def test_a_leg_that_is_no_device_is_refused_by_name(dm, tmp_path, word, number):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(TableError) as caught:
        dm.create("a", f"0 8 zero\n8 8 linear {word} 0", cwd=str(tmp_path))
    error = caught.value
    assert (error.line, error.target, error.argument) == (2, "linear", "device")
    assert word in str(error)
    assert error.errno == number


def test_legs_are_found_by_path_name_number_and_folder(dm, tmp_path):
    (tmp_path / "img").write_bytes(bytes(4096))
    dm.device_dirs.append(str(tmp_path / "dev"))
    dm.create("low", "0 8 linear img 0", cwd=str(tmp_path))
    words = ["low", "253:0", "/dev/mapper/low", str(tmp_path / "dev" / "low")]
    table = "\n".join(f"{8 * line} 8 linear {word} 0" for line, word in enumerate(words))
    top = dm.create("top", table)
    assert top.deps() == [(253, 0, "low")]
    assert dm.device("low").open_count == 1
    assert dm.device("low").table_text() == f"0 8 linear {tmp_path}/img 0"
    # A device is meant before a file of that name is.
    (tmp_path / "low").write_bytes(bytes(512))
    assert dm.create("again", "0 8 linear low 0", cwd=str(tmp_path)).deps() == [(253, 0, "low")]


def test_a_device_under_itself_is_refused(dm):
    dm.create("a", "0 8 zero")
    dm.create("b", "0 8 linear a 0")
    dm.create("c", "0 8 linear b 0")
    for table, way in [("0 8 linear a 0", "a -> a"), ("0 8 linear c 0", "a -> c -> b -> a")]:
        with pytest.raises(TableError, match=way) as caught:
            dm.load("a", table)
        assert caught.value.errno == errno.ELOOP
    with pytest.raises(TableError, match="new -> new"):
        dm.create("new", "0 8 linear new 0")
    # Through an inactive table too: it may be put to use at any time.
    dm.create("d", "0 8 zero")
    dm.load("d", "0 8 linear c 0")
    with pytest.raises(TableError, match="a -> d -> c -> b -> a"):
        dm.load("a", "0 8 linear d 0")


def test_a_stack_may_be_a_hundred_devices_deep(dm):
    dm.create("d0", "0 8 linear mem:4096 0")
    for level in range(1, 100):
        dm.create(f"d{level}", f"0 8 striped 1 8 d{level - 1} 0")
    top = dm.device("d99")
    with pytest.raises(TableError, match="stack of 101 devices"):
        dm.create("d100", "0 8 linear d99 0")
    top.pwritev([memoryview(b"x" * 4096)], 0)
    dm.suspend("d0")
    dm.resume("d0")
    buffer = bytearray(4096)
    top.preadv([memoryview(buffer)], 0)
    assert buffer == b"x" * 4096


def test_a_read_only_device_is_no_leg_of_a_writable_one(dm):
    dm.create("low", "0 8 zero", readonly=True)
    with pytest.raises(TableError, match="low is read-only"):
        dm.create("a", "0 8 linear low 0")
    assert dm.create("a", "0 8 linear low 0", readonly=True).readonly


def test_a_device_in_use_is_not_removed(dm):
    device = dm.create("low", "0 8 zero")
    dm.create("top", "0 8 linear low 0")
    refusal(lambda: dm.remove("low"), errno.EBUSY, "low is in use by top")
    dm.remove("top")
    device.open()
    refusal(lambda: dm.remove("low"), errno.EBUSY, "in use by 1 client")
    device.release()
    dm.remove("low")
    refusal(lambda: dm.remove("low"), errno.ENXIO)
    refusal(device.open, errno.ENXIO, "low is gone")
    refusal(lambda: device.preadv([memoryview(bytearray(512))], 0), errno.ENXIO)


def test_a_deferred_removal_happens_at_the_last_close(dm):
    device = dm.create("low", "0 8 zero")
    dm.create("top", "0 8 linear low 0")
    device.open()
    dm.remove("low", deferred=True)
    assert device.info()["deferred_remove"]
    dm.remove("top")
    assert dm.device("low") is device
    device.release()
    refusal(lambda: dm.device("low"), errno.ENXIO)


def test_a_forced_removal_fails_requests_first(dm):
    device = dm.create("a", "0 8 linear mem:4096 0")
    device.open()
    refusal(lambda: dm.remove("a", force=True), errno.EBUSY)
    assert device.table_text() == "0 8 error"
    refusal(lambda: device.preadv([memoryview(bytearray(512))], 0), errno.EIO)
    device.release()
    dm.remove("a", force=True)
    assert dm.devices() == []


def test_listeners_hear_of_every_change(dm):
    heard = []
    dm.listeners.append(lambda event, device: heard.append((event, device.name)))
    dm.create("a", "0 8 zero")
    dm.load("a", "0 8 error")
    dm.suspend("a")
    dm.resume("a")
    dm.rename("a", "b")
    dm.remove("b")
    assert heard == [
        ("created", "a"),
        ("loaded", "a"),
        ("suspended", "a"),
        ("resumed", "a"),
        ("renamed", "b"),
        ("removed", "b"),
    ]


def test_targets_are_listed_with_their_versions(dm):
    targets = dict(dm.targets())
    assert targets["linear"] == (1, 4, 0)
    assert {"linear", "striped", "zero", "error", "unstriped"} <= set(targets)


def test_closing_flushes_and_tells_of_failure(tmp_path):
    dm = Mapper()
    dm.create("a", "0 8 linear mem:4096 0")

    def fail():
        raise OSError(errno.EIO, "the flush failed")

    dm.device("a").live.devices[0].flush = fail
    dm.device("a").resume()
    dm.device("a").suspend()
    dm.device("a").resume()
    refusal(dm.close, errno.EIO, "the flush failed")
    refusal(lambda: dm.create("b", "0 8 zero"), errno.ESHUTDOWN)
    dm.close()


# The journal


def test_devices_come_back_with_tables_numbers_and_state(tmp_path):
    (tmp_path / "img").write_bytes(bytes(8192))
    notes = Notes()
    with Mapper(notes) as dm:
        dm.create("top", "0 8 zero", uuid="T")
        dm.create("low", "0 16 linear img 0", cwd=str(tmp_path))
        dm.create("bare")
        dm.create("fixed", "0 8 zero", readonly=True)
        dm.create("gone", "0 8 zero")
        dm.load("top", "0 16 linear low 0")
        dm.resume("top")
        dm.load("low", "0 8 linear img 8", cwd=str(tmp_path))
        dm.suspend("fixed")
        dm.remove("gone")
        before = {device.name: (device.info(), device.table_text()) for device in dm.devices()}
    with Mapper(notes) as dm:
        dm.restore()
        assert dm.failed == []
        after = {device.name: (device.info(), device.table_text()) for device in dm.devices()}
        assert after == before
        assert dm.device("low").table_text(inactive=True) == f"0 8 linear {tmp_path}/img 8"


def test_what_cannot_be_rebuilt_fails_alone(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(8192))
    notes = Notes()
    with Mapper(notes) as dm:
        dm.create("a", "0 16 linear a 0", cwd=str(tmp_path), uuid="A")
        dm.create("b", "0 16 linear b 0", cwd=str(tmp_path))
        dm.create("on-a", "0 16 linear a 0")
        dm.create("on-b", "0 16 linear b 0")
    notes.kept[9] = {"minor": 9, "name": "", "uuid": "", "error": "9.json: damaged"}
    os.unlink(tmp_path / "a")
    with Mapper(notes) as dm:
        dm.restore()
        assert {entry.name for entry in dm.failed} == {"a", "on-a", "253:9"}
        assert any(
            entry[:3] == ("a", "A", 0) and f"{tmp_path}/a" in entry.error for entry in dm.failed
        )
        assert FailedEntry("253:9", "", 9, "9.json: damaged") in dm.failed
        assert dm.device("on-b").table_text() == "0 16 linear 253:1 0"
        assert dm.device("a").live is None
        # It can be mended, or given up.
        (tmp_path / "a").write_bytes(bytes(8192))
        dm.load("a", f"0 16 linear {tmp_path}/a 0")
        dm.resume("a")
        dm.remove("on-a")
        dm.remove("253:9")
        assert dm.failed == []
    assert sorted(notes.kept) == [0, 1, 3]


def test_the_number_of_a_failed_entry_is_not_given_away(tmp_path):
    notes = Notes()
    notes.kept[0] = {"minor": 0, "name": "", "uuid": "", "error": "0.json: damaged"}
    with Mapper(notes) as dm:
        dm.restore()
        assert dm.create("a", "0 8 zero").minor == 1


def test_a_change_that_cannot_be_noted_is_told():
    notes = Notes()
    with Mapper(notes) as dm:
        dm.create("a", "0 8 zero")
        notes.full = True
        refusal(lambda: dm.create("b", "0 8 zero"), errno.ENOSPC)
        refusal(lambda: dm.rename("a", "c"), errno.ENOSPC)
        refusal(lambda: dm.set_uuid("a", "U"), errno.ENOSPC)
        assert [(device.name, device.uuid) for device in dm.devices()] == [("a", "")]
        notes.full = False
        dm.create("b", "0 8 zero")
    assert sorted(notes.kept) == [0, 1]


@pytest.fixture
def offered(tmp_path, monkeypatch):
    """A package whose targets cannot be imported, or are wrong."""
    (tmp_path / "dmpy_half.py").write_text("raise RuntimeError('half installed')\n")
    (tmp_path / "dmpy_wrong.py").write_text(
        "from dmpy.targets.zero import Zero\n"
        "class Wrong(Zero):\n"
        "    type_name = 'wrong'\n"
        "    broken = False\n"
        "    @classmethod\n"
        "    def parse(cls, args, length):\n"
        "        return {}['a bug'] if cls.broken else super().parse(args, length)\n"
    )
    info = tmp_path / "half-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: half\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[dmpy.targets]\nhalf = dmpy_half:Half\nwrong = dmpy_wrong:Wrong\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("dmpy.target._found", {})


def test_a_target_of_another_package_that_cannot_be_loaded_spoils_no_other(dm, offered):
    names = [name for name, _ in dm.targets()]
    assert "zero" in names and "half" not in names
    with pytest.raises(TableError, match="unknown target type 'zerro'"):
        dm.create("x", "0 8 zerro")
    with pytest.raises(TableError, match="half: dmpy_half:Half cannot be loaded: .*half installed"):
        dm.create("x", "0 8 half")


def test_a_device_whose_target_has_a_bug_fails_alone_at_a_restart(offered, monkeypatch):
    notes = Notes()
    with Mapper(notes) as dm:
        dm.create("a", "0 8 wrong")
        dm.create("b", "0 8 zero")
    from dmpy.target import find_target

    monkeypatch.setattr(find_target("wrong"), "broken", True)
    with Mapper(notes) as dm:
        dm.restore()
        failed = [(entry.name, entry.error) for entry in dm.failed]
        assert failed == [("a", "bug: KeyError: 'a bug'")]
        assert dm.device("b").table_text() == "0 8 zero"


def test_a_suspended_device_goes_on_though_that_cannot_be_noted():
    notes = Notes()
    with Mapper(notes) as dm:
        device = dm.create("a", "0 8 zero")
        dm.suspend("a")
        notes.full = True
        dm.resume("a")
        assert not device.suspended
        notes.full = False


def test_what_a_forced_removal_left_is_noted():
    notes = Notes()
    with Mapper(notes) as dm:
        device = dm.create("a", "0 8 linear mem:4096 0")
        device.open()
        refusal(lambda: dm.remove("a", force=True), errno.EBUSY)
        assert notes.kept[0]["live"] == "0 8 error"
        device.release()


def test_closing_flushes_a_leaf_once_however_many_devices_lie_on_it(tmp_path):
    (tmp_path / "img").write_bytes(bytes(4096))
    dm = Mapper()
    for number in range(5):
        dm.create(f"d{number}", f"0 8 linear {tmp_path}/img 0")
    (leaf,) = dm.device("d0").live.devices
    flushes = []
    leaf.flush = lambda: flushes.append(1)
    dm.close()
    assert flushes == [1]
