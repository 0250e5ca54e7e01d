"""The state folder: every change is durable or refused, and nothing that was good is ever lost."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading

import pytest

from dmpy import state
from dmpy.errors import DeviceError
from dmpy.state import Journal


def entry(minor: int = 0, name: str = "r0", **changes: object) -> dict:
    return {
        "minor": minor,
        "name": name,
        "uuid": "",
        "readonly": False,
        "suspended": False,
        "live": "0 8 zero \n",
        "inactive": None,
        "inactive_readonly": None,
    } | changes


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def journal(folder):
    with Journal(folder) as opened:
        yield opened


def reopened(folder) -> list[dict]:
    with Journal(folder) as journal:
        return journal.entries()


def test_what_was_recorded_comes_back_in_order_of_minors(folder):
    with Journal(folder) as journal:
        journal.record(entry(11, "b", inactive="0 16 zero \n", readonly=True))
        journal.record(entry(2, "a", live=None, suspended=True, uuid="LVM-x"))
    assert reopened(folder) == [
        entry(2, "a", live=None, suspended=True, uuid="LVM-x"),
        entry(11, "b", inactive="0 16 zero \n", readonly=True),
    ]


def test_the_newest_entry_of_a_minor_counts(journal):
    journal.record(entry())
    journal.record(entry(name="r1"))
    assert journal.entries() == [entry(name="r1")]


def test_a_forgotten_entry_is_gone(journal, folder):
    journal.record(entry())
    journal.forget(0)
    assert journal.entries() == []
    assert os.listdir(folder / "devices") == []


def test_forgetting_what_was_never_recorded_is_fine(journal):
    journal.forget(7)


def test_names_of_any_characters_survive(journal):
    odd = entry(name="\udcff näme\n", live="0 8 linear /a b/\udc80 0\n")
    journal.record(odd)
    assert journal.entries() == [odd]


def test_the_folder_is_for_its_owner_only(journal, folder):
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "devices").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("keep", [0, 1, 40, 0.5, -2])
def test_a_file_cut_short_is_reported_and_the_others_load(journal, folder, keep):
    journal.record(entry(0, "cut"))
    journal.record(entry(1, "whole"))
    path = folder / "devices" / "0.json"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    damaged, whole = journal.entries()
    assert damaged["minor"] == 0
    assert damaged["error"] == f"{path}: not a JSON document: damaged, or cut short"
    assert whole == entry(1, "whole")
    assert path.exists()


def test_every_flipped_bit_is_noticed_or_harmless(journal, folder):
    journal.record(entry(0, "r0", live="0 2048 linear /d/a.img 0\n"))
    path = folder / "devices" / "0.json"
    content = path.read_bytes()
    for position in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        (found,) = journal.entries()
        assert "error" in found or found == entry(0, "r0", live="0 2048 linear /d/a.img 0\n")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": "else"}, "not an entry of a device (expected format 'dmpy device')"),
        ({"version": 2}, "format version is not one this dmpy reads (got 2, expected 1)"),
        ({"crc32": 1}, "checksum does not match: damaged, or edited by hand"),
        ({"entry": [1]}, "checksum does not match: damaged, or edited by hand"),
    ],
)
def test_a_foreign_file_is_named_with_its_fault(journal, folder, change, sentence):
    journal.record(entry())
    path = folder / "devices" / "0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert journal.entries()[0]["error"] == f"{path}: {sentence}"


@pytest.mark.parametrize("text", ["[" * 100_000, "7", '"x"', "null", "\x00" * 512])
def test_senseless_files_are_reported(journal, folder, text):
    (folder / "devices" / "3.json").write_text(text)
    assert journal.entries()[0]["minor"] == 3
    assert "error" in journal.entries()[0]


def test_an_entry_under_another_minors_name_is_refused(journal, folder):
    journal.record(entry(0))
    (folder / "devices" / "0.json").rename(folder / "devices" / "5.json")
    assert "holds another device (got minor 0, expected 5)" in journal.entries()[0]["error"]


def test_a_damaged_file_is_kept_when_its_minor_is_recorded_or_forgotten(folder):
    devices = folder / "devices"
    with Journal(folder) as journal:
        (devices / "0.json").write_text("precious")
        journal.record(entry())
        (devices / "1.json").write_text("dear")
        journal.forget(1)
        assert journal.entries() == [entry()]
    assert (devices / "0.json.damaged-1").read_text() == "precious"
    assert (devices / "1.json.damaged-1").read_text() == "dear"
    assert not (devices / "1.json").exists()


def test_foreign_files_in_the_folder_are_left_alone(journal, folder):
    for name in ["README", "01.json", "x.json", "-1.json"]:
        (folder / "devices" / name).write_text("mine")
    assert journal.entries() == []
    assert sorted(os.listdir(folder / "devices")) == ["-1.json", "01.json", "README", "x.json"]


@pytest.mark.parametrize("broken", [{"minor": -1}, {"minor": True}, {"live": 3}, {"more": 1}])
def test_an_entry_that_could_not_be_read_back_is_not_written(journal, folder, broken):
    with pytest.raises(ValueError, match="minor|live|more"):
        journal.record(entry() | broken)
    assert os.listdir(folder / "devices") == []


def test_changes_from_several_threads_leave_whole_entries(journal, folder):
    def record(number: int) -> None:
        for n in range(20):
            journal.record(entry(name=f"r{number}", live=f"0 {8 * n + 8} zero \n" * 1000))

    threads = [threading.Thread(target=record, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (found,) = journal.entries()
    assert "error" not in found
    assert os.listdir(folder / "devices") == ["0.json"]


# Every system call of a change, by the name under which dmpy.state reaches it.
CALLS = ["open", "write", "fsync", "rename"]


@pytest.mark.parametrize("call", CALLS)
def test_a_failing_call_surfaces_and_leaves_the_older_entry(journal, folder, monkeypatch, call):
    """Fail the n-th call of each kind, n = 1, 2 ... until nothing fails."""
    journal.record(entry())
    real = getattr(os, call)
    for n in range(1, 20):
        count = 0

        def failing(*args, **kwargs):
            nonlocal count
            count += 1
            if count == n:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        monkeypatch.setattr(state.os, call, failing)
        try:
            journal.record(entry(name="new"))
        except DeviceError as error:
            monkeypatch.setattr(state.os, call, real)
            assert error.errno == errno.ENOSPC
            assert str(error) == (
                f"state folder {folder}: device new cannot be recorded: No space left on device"
            )
            assert journal.entries() == [entry()]
            assert os.listdir(folder / "devices") == ["0.json"]
        else:
            monkeypatch.setattr(state.os, call, real)
            assert n > 1
            assert journal.entries() == [entry(name="new")]
            return
    pytest.fail("the calls never ended")


class Cut(BaseException):
    """The power goes: nothing of the process runs any more, not even its clean-up."""


@pytest.mark.parametrize("before", [True, False])
def test_a_cut_around_any_call_leaves_the_older_or_the_newer_entry(tmp_path, monkeypatch, before):
    for call in CALLS:
        for n in range(1, 5):
            folder = tmp_path / f"{call}{n}"
            with Journal(folder) as journal:
                journal.record(entry())
                _record_with_a_cut(journal, monkeypatch, call, n, before)
            assert reopened(folder) in ([entry()], [entry(name="new")])
            assert os.listdir(folder / "devices") == ["0.json"]


def _record_with_a_cut(journal, monkeypatch, call, n, before):
    count = 0
    dead = False

    def wrap(name, real):
        def wrapped(*args, **kwargs):
            nonlocal count, dead
            if dead:
                raise Cut
            count += name == call
            cut = name == call and count == n
            dead = cut
            if cut and before:
                raise Cut
            result = real(*args, **kwargs)
            if cut:
                raise Cut
            return result

        return wrapped

    with monkeypatch.context() as patch:
        for name in [*CALLS, "unlink"]:
            patch.setattr(state.os, name, wrap(name, getattr(os, name)))
        try:
            journal.record(entry(name="new"))
        except Cut:
            pass


def test_the_data_is_synced_before_the_rename_and_the_folder_after_it(journal, monkeypatch):
    trace = []
    for name in ["fsync", "rename"]:
        real = getattr(os, name)

        def traced(*args, _real=real, _name=name):
            trace.append(_name)
            return _real(*args)

        monkeypatch.setattr(state.os, name, traced)
    journal.record(entry())
    assert trace == ["fsync", "rename", "fsync"]


HOLD = """
import sys
from dmpy.state import Journal
with Journal(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_server_is_refused_with_folder_and_pid_until_the_first_dies(folder):
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(DeviceError) as caught:
                Journal(folder)
            assert caught.value.errno == errno.EBUSY
            assert str(caught.value) == (
                f"state folder {folder} is in use by the server with pid {holder.pid}: "
                "two cannot share it"
            )
        finally:
            holder.kill()
    assert reopened(folder) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DeviceError, match=f"state folder {tmp_path}/file/x: cannot be used"):
        Journal(tmp_path / "file" / "x")


def test_refused_folders_leave_no_descriptor_open(folder):
    with Journal(folder):
        count = len(os.listdir("/proc/self/fd"))
        for _ in range(10):
            with pytest.raises(DeviceError):
                Journal(folder)
        assert len(os.listdir("/proc/self/fd")) == count
