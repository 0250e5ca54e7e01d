"""The drop-in dmsetup answers as the real one does on a real kernel.

tests/data/dmsetup/transcript.txt is what dmsetup 1.02.185 on Linux 6.1 said to commands.txt
(record.py there made it). The same commands are played here to ours, one after the other, and every
line of both streams and every exit status is compared.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmpy.cli import dmsetup, dmsetup_driver, dmsetup_options
from dmpy.client import Client
from dmpy.control import ControlServer
from dmpy.mapper import Mapper
from tests import needs

DATA = Path(__file__).parents[1] / "data" / "dmsetup"
ROOT = Path(__file__).parents[2]


# play.py is also run by itself, in the guest, where there is no package.
def _load_player():
    spec = importlib.util.spec_from_file_location("dmsetup_play", DATA / "play.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


player = _load_player()


class Drop:
    """A mapper with its control socket, and the drop-in first in PATH.

    Attributes:
        folder: for files.
        env: of a command that finds it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.legs = {}
        for leg in "abc":
            path = folder / f"{leg}.img"
            with path.open("wb") as file:
                file.truncate(8 << 20)
            self.legs[leg] = path
        bin_ = folder / "bin"
        bin_.mkdir()
        dmsetup = bin_ / "dmsetup"
        dmsetup.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
            "from dmpy.cli.dmsetup import main\nmain()\n")
        dmsetup.chmod(0o755)
        keep = {key: value for key, value in os.environ.items()
                if not key.startswith(("DM_", "LC_", "DMPY_", "PYTHON")) and key != "LANG"}
        self.env = {
            **keep, "PATH": f"{bin_}:{os.environ['PATH']}", "LC_ALL": "C", "MAJ": "253",
            "DMPY_RUNTIME_DIR": str(folder), "TMP": str(folder),
            "A": str(self.legs["a"]), "B": str(self.legs["b"]), "C": str(self.legs["c"]),
        }
        self.mapper = Mapper()
        self.server = ControlServer(self.mapper, folder / "control.sock",
                                    info={"runtime": str(folder), "state": str(folder)})
        self.server.start()

    def run(self, command: str, **env: str) -> tuple[str, str, int]:
        """Run a shell command; return its standard output, its standard error, its status."""
        done = subprocess.run(["/bin/sh", "-c", command], env=self.env | env, text=True,
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=30,
                              check=False)
        return done.stdout, done.stderr, done.returncode

    def close(self) -> None:
        self.server.stop()
        self.mapper.close()


@pytest.fixture
def drop() -> Iterator[Drop]:
    folder = Path(tempfile.mkdtemp(prefix="dmsetup-"))
    drop = Drop(folder)
    yield drop
    drop.close()
    shutil.rmtree(folder)


@pytest.fixture
def here(drop: Drop, monkeypatch: pytest.MonkeyPatch) -> Drop:
    """As `drop`; commands can be run in this process, too, by dmsetup.run."""
    monkeypatch.setenv("DMPY_RUNTIME_DIR", str(drop.folder))
    return drop


# Split a transcript into commands with their answers.
def _entries(transcript: str) -> list[tuple[str, list[str]]]:
    entries: list[tuple[str, list[str]]] = []
    for line in transcript.splitlines():
        if line.startswith("$ "):
            entries.append((line[2:], []))
        elif line and not line.startswith("#"):
            entries[-1][1].append(line)
    return entries


# -- The transcript -------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_command_is_answered_as_by_the_real_dmsetup(drop):
    commands = (DATA / "commands.txt").read_text().splitlines()
    names = {re.escape(str(path)): f"<{leg.upper()}>" for leg, path in drop.legs.items()}
    ours = _entries(player.play(commands, names, drop.env))
    theirs = _entries((DATA / "transcript.txt").read_text())
    assert [command for command, _ in ours] == [command for command, _ in theirs], \
        "commands.txt has changed: record the transcript anew"
    wrong = [
        "\n".join([f"$ {command}", "expected:", *expected, "got:", *got])
        for (command, got), (_, expected) in zip(ours, theirs, strict=True) if got != expected
    ]
    assert not wrong, "\n\n".join(wrong)


def test_the_transcript_covers_every_verb():
    commands = (DATA / "commands.txt").read_text()
    unasked = {verb for verb in dmsetup.VERBS if not re.search(rf"dmsetup .*\b{verb}\b", commands)}
    assert unasked == {"measure", "stats"}


# -- The command line, beside the real one where it is installed ----------------------------------

BAD_COMMAND_LINES = """
--frobnicate
--frobnicate=1
-Z
-vZ
--no
--table
--force=yes
--ver
-o
ls -u
ls --sort
create x -M 9
create x -M 0
create x -j 1
create x -n --table=0
--readahead=-2 ls
--manglename=odd ls
--count=-3 ls
--interval 0 ls
""".strip().splitlines()


@pytest.mark.parametrize("line", BAD_COMMAND_LINES)
def test_a_bad_command_line_is_refused_in_the_words_of_the_real_one(line, drop):
    real = needs.tool("dmsetup", package="dmsetup")
    expected = subprocess.run(["dmsetup", *line.split()], executable=real, env=drop.env, text=True,
                              capture_output=True, timeout=30, check=False)
    assert drop.run(f"dmsetup {line}") == (
        expected.stdout, expected.stderr, expected.returncode)


def test_options_stand_anywhere_and_may_be_shortened():
    options = dmsetup_options.parse("info -c x --noh -o name --sep=/ y -- --sort -z".split())
    assert options.words == ["info", "x", "y", "--sort", "-z"]
    assert options["columns"] and options["noheadings"] and not options["sort"]
    assert options.text("options") == "name" and options.text("separator") == "/"


def test_the_first_word_ends_the_options_where_posix_is_asked_for(monkeypatch):
    monkeypatch.setenv("POSIXLY_CORRECT", "1")
    options = dmsetup_options.parse("-f remove -v x".split())
    assert options["force"] and not options["verbose"]
    assert options.words == ["remove", "-v", "x"]


@pytest.mark.parametrize(("text", "number"), [
    ("", 0), ("12", 12), (" -3x", -3), ("+4", 4), ("x4", 0), ("-", 0), ("+-4", 0), ("0x10", 0),
])
def test_numbers_are_read_as_by_atoi(text, number):
    assert dmsetup_options.atoi(text) == number


# -- Names ----------------------------------------------------------------------------------------


@given(st.text(st.characters(codec="utf-8", exclude_characters="\\\0"), min_size=1, max_size=30))
def test_a_mangled_name_is_plain_and_comes_back(name):
    mangled = dmsetup_driver.mangle(name, "name", "auto", limit=1000)
    assert re.fullmatch(r"([A-Za-z0-9#+.:=@_-]|\\x[0-9a-f]{2})*", mangled)
    assert dmsetup_driver.unmangle(mangled, "name", "auto") == name
    assert dmsetup_driver.mangle(mangled, "name", "auto", limit=1000) == mangled


def test_a_path_of_a_device_node_names_the_device(drop):
    drop.run("dmsetup create a --table '0 8 zero'")
    nodes = drop.folder / "mapper"
    nodes.mkdir()
    for path in ("/dev/mapper/a", "mapper/a"):
        assert drop.run(f"dmsetup table {path}") == ("0 8 zero \n", "", 0)
    own = {"DM_DEV_DIR": str(drop.folder)}
    assert drop.run(f"dmsetup table {nodes}/a", **own) == ("0 8 zero \n", "", 0)
    assert drop.run("dmsetup table /tmp/a") == ("", "Device /tmp/a not found\nCommand failed.\n", 1)


# -- What the kernel does not have ----------------------------------------------------------------


def test_the_servers_sentence_is_told_when_asked_twice_for_more(drop):
    command = "dmsetup create a --table '0 8 linear /nonexistent 0'"
    _, plain, status = drop.run(command)
    _, verbose, _ = drop.run(command + " -vv")
    assert status == 1
    assert plain == ("device-mapper: reload ioctl on a (253:0) failed: No such device\n"
                     "Command failed.\n")
    assert "line 1, linear: device /nonexistent: no such file or directory\n" in verbose


def test_a_leg_that_is_no_block_device_is_shown_by_its_word(drop):
    leg = drop.env["A"]
    drop.run('dmsetup create a --table "0 8 linear $A 0"')
    assert drop.run("dmsetup deps a")[0] == f"1 dependencies\t: ({leg})\n"
    assert drop.run("dmsetup ls --tree")[0] == f"a (253:0)\n `- ({leg})\n"
    assert drop.run("dmsetup info -c --noheadings -o blkdevs_used")[0] == f"{leg}\n"


def test_relative_legs_start_from_the_callers_folder(drop):
    name = drop.legs["a"].name
    command = f"cd {drop.folder} && dmsetup create a --table '0 8 linear {name} 0'"
    assert drop.run(command) == ("", "", 0)


def test_backslashes_of_a_path_reach_the_target(drop):
    odd = drop.folder / "a b\\x20"
    drop.legs["a"].rename(odd)
    link = drop.folder / "plain\\x20"
    link.symlink_to(odd)
    table = f"0 8 linear {link} 0"
    assert drop.run('dmsetup create a --table "$T"', T=table) == ("", "", 0)
    assert len(drop.mapper.device("a").deps()) == 1


@pytest.mark.parametrize("words", ["stats list", "stats create a", "measure a"])
def test_what_dmpy_lacks_is_refused_in_plain_words(words, drop):
    out, err, status = drop.run(f"dmsetup {words}")
    assert (out, status) == ("", 1)
    assert f"dmsetup {words.split()[0]}: not supported by dmpy" in err


# -- Waiting and retrying -------------------------------------------------------------------------


def test_a_busy_device_is_tried_for_again_until_it_is_free(here, monkeypatch, capsys):
    monkeypatch.setattr(dmsetup_driver, "_REMOVE_DELAY", 0.01)
    here.mapper.create("low", "0 8 zero")
    here.mapper.create("high", "0 8 linear /dev/mapper/low 0")
    assert dmsetup.run(["remove", "low", "--retry"]) == 1
    busy = "device-mapper: remove ioctl on low  failed: Device or resource busy\n"
    assert capsys.readouterr().err == busy * 25 + "Command failed.\n"
    monkeypatch.setattr(dmsetup_driver, "_REMOVE_DELAY", 0.05)
    timer = threading.Timer(0.1, here.mapper.remove, ["high"])
    timer.start()
    assert dmsetup.run(["remove", "--retry", "low"]) == 0
    timer.join()
    assert set(capsys.readouterr().err.splitlines(keepends=True)) == {busy}


def test_a_wait_ends_when_the_event_number_changes(here):
    device = here.mapper.create("a", "0 8 zero")
    process = subprocess.Popen(["dmsetup", "wait", "a"], env=here.env)
    with Client(here.folder / "control.sock") as client:
        assert client.call("info", name="a")["event_nr"] == 0
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    device.trigger_event()
    assert process.wait(30) == 0


# -- The server -----------------------------------------------------------------------------------


def test_a_server_that_died_is_told_and_not_replaced(drop):
    drop.server.stop()
    (drop.folder / "server.pid").write_text("999999999\n")
    (drop.folder / "control.sock").unlink(missing_ok=True)
    out, err, status = drop.run("dmsetup ls")
    assert (out, status) == ("", 1)
    assert "died" in err and err.endswith("Command failed.\n")


def test_the_first_verb_starts_the_server(tmp_path):
    needs.nbdkit_plugin("python")
    runtime = Path(tempfile.mkdtemp(prefix="dmsetup-"))
    env = os.environ | {"DMPY_RUNTIME_DIR": str(runtime), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dmpy.cli.dmsetup"]
    try:
        done = subprocess.run([*command, "create", "a", "--table", "0 8 zero"], env=env, text=True,
                              capture_output=True, timeout=60, check=False)
        assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
        listed = subprocess.run([*command, "ls"], env=env, text=True, capture_output=True,
                                timeout=60, check=False)
        assert listed.stdout == "a\t(253:0)\n"
    finally:
        with Client(runtime / "control.sock") as client:
            client.call("shutdown", force=True)
        shutil.rmtree(runtime, ignore_errors=True)


def test_dmpy_called_dmsetup_is_dmsetup(drop):
    script = drop.folder / "bin" / "dmpy"
    script.write_text(f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                      "from dmpy.cli.entry import main\nmain()\n")
    script.chmod(0o755)
    other = drop.folder / "other"
    other.mkdir()
    (other / "dmsetup").symlink_to(script)
    out, err, status = drop.run(f"{other}/dmsetup splitname vg-lv --noheadings")
    assert (out, err, status) == ("vg:lv:\n", "", 0)


def test_a_reader_that_has_seen_enough_is_no_error(drop):
    for number in range(30):
        drop.mapper.create(f"{'n' * 100}{number}", "0 8 zero")
    out, err, _ = drop.run("dmsetup info | head -1")
    assert (out, err) == (f"Name:              {'n' * 100}0\n", "")


def test_an_interrupt_ends_it_as_a_program_that_does_not_catch_it(drop):
    drop.mapper.create("a", "0 8 zero")
    process = subprocess.Popen(["dmsetup", "wait", "a"], env=drop.env, stderr=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == b""
    assert process.returncode == -signal.SIGINT


def test_starting_up_imports_next_to_nothing():
    code = ("import sys; import dmpy.cli.dmsetup; "
            "print(*sorted({name.partition('.')[0] for name in sys.modules}))")
    loaded = subprocess.run([sys.executable, "-S", "-c", code], env=os.environ | {
        "PYTHONPATH": str(ROOT)}, text=True, capture_output=True, timeout=30, check=True)
    heavy = {"numpy", "click", "rich", "argparse", "asyncio", "subprocess", "difflib", "locale",
             "dataclasses", "inspect", "logging", "tempfile", "threading", "pathlib", "nbd"}
    assert not heavy & set(loaded.stdout.split())
