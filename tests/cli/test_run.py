"""`dmpy run`: a command with a server of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests import needs


@pytest.fixture
def own_dmpy(own_dmpy, monkeypatch):
    """The command line; its runs have a temporary folder of their own, and leave nothing there."""
    folder = own_dmpy.runtime.parent / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    yield own_dmpy
    assert os.listdir(folder) == []


def test_the_command_finds_the_device_by_its_uri(own_dmpy, images):
    needs.tool("nbdinfo", package="libnbd-bin")
    done = own_dmpy.process("run", "--table", f"0 2048 linear {images}/a.img 0", "--",
                            'nbdinfo --size "$uri"')
    assert (done.returncode, done.stdout, done.stderr) == (0, "1048576\n", "")


def test_several_devices_have_their_names(own_dmpy, images):
    done = own_dmpy.process(
        "run", "--device", f"low-er=0 2048 linear {images}/a.img 0",
        "--device", "upper=0 1024 linear low-er 0", "--", "sh", "-c",
        'echo "$low_er" "$upper" "$uri" "$exportname"; nbdinfo --size "$low_er"')
    assert done.returncode == 0, done
    words = done.stdout.split()
    assert [uri.split("?")[0] for uri in words[:2]] == ["nbd+unix:///low-er", "nbd+unix:///upper"]
    assert words[2:] == [words[1], "upper", "1048576"]


def test_dmpy_in_the_command_talks_to_that_server(own_dmpy):
    done = own_dmpy.process("run", "--table", "0 8 zero", "--name", "z", "--",
                            sys.executable, "-m", "dmpy.cli.main", "ls")
    assert (done.returncode, done.stdout) == (0, "z\t(253:0)\n")


def test_tables_come_from_files_and_from_standard_input(own_dmpy, tmp_path):
    (tmp_path / "t").write_text("# zeroes\n0 16 zero\n")
    for words, stdin in ((["--table-file", f"{tmp_path}/t"], ""),
                         (["--table-file", "-"], "0 16 zero"), (["--table", f"{tmp_path}/t"], ""),
                         (["--device", f"disk={tmp_path}/t"], "")):
        done = own_dmpy.process("run", *words, "--", 'nbdinfo --size "$uri"', input=stdin)
        assert (done.returncode, done.stdout) == (0, "8192\n"), done


def test_a_device_named_path_does_not_replace_the_path(own_dmpy):
    done = own_dmpy.process("run", "--table", "0 8 zero", "--name", "PATH", "--", "true")
    assert done.returncode == 0


@pytest.mark.parametrize(("command", "status"), [
    (["exit 7"], 7), (["true"], 0), (["kill -TERM $$"], 128 + 15), (["/nosuch", "x"], 127),
    (["/etc/passwd", "x"], 126)])
def test_the_exit_status_is_the_commands(own_dmpy, command, status):
    done = own_dmpy.process("run", "--table", "0 8 zero", "--", *command)
    assert done.returncode == status


def test_a_table_that_is_refused_runs_nothing(own_dmpy, tmp_path):
    done = own_dmpy.process("run", "--table", "0 8 nosuch", "--", f"touch {tmp_path}/ran")
    assert done.returncode == 1
    assert "nosuch" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "ran").exists()


def test_read_only_is_refused_writes(own_dmpy):
    done = own_dmpy.process("run", "-r", "--table", "0 8 zero", "--",
                            'nbdinfo --is readonly "$uri"')
    assert done.returncode == 0, done


def test_a_signal_reaches_the_command_and_its_status_comes_back(own_dmpy, tmp_path):
    script = (f"trap 'echo got it; exit 9' TERM; touch {tmp_path}/ready; "
              "while :; do sleep 0.05; done")
    process = subprocess.Popen(
        [sys.executable, "-m", "dmpy.cli.main", "run", "--table", "0 8 zero", "--", "sh", "-c",
         script], env=own_dmpy.environment(), stdout=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "ready").exists():
            assert process.poll() is None
            os.sched_yield()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 9
        assert process.stdout.read() == "got it\n"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
