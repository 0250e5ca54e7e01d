"""Bad input at the command line: one sentence that names the culprit, status 1, nothing changed."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys

import pytest

from tests import needs


def _unchanged(cli, before):
    return (cli.ok("ls").out, cli.ok("table").out, cli.ok("table", "--inactive").out) == before


@pytest.fixture
def base(dmpy, images):
    """A device `base`, and files: a.img, b.img of 2048 sectors, short.img of 8."""
    (images / "short.img").touch()
    os.truncate(images / "short.img", 4096)
    (images / "folder").mkdir()
    dmpy.ok("create", "base", "-u", "U", "--table", f"0 2048 linear {images}/a.img 0")
    return dmpy


# What is wrong, and the words that its sentence must have.
TABLES = {
    "an overlap": ("0 8 zero\n4 8 zero", ["line 2", "zero", "overlap", "sector 8"]),
    "a gap": ("0 8 zero\n16 8 zero", ["line 2", "zero", "gap", "sector"]),
    "a begin that is not 0": ("8 8 zero", ["line 1", "zero", "begin"]),
    "a length of zero": ("0 0 zero", ["line 1", "zero", "len", "0"]),
    "a begin that is no number": ("x 8 zero", ["line 1", "begin", "'x'"]),
    "a length that is no number": ("0 8k zero", ["line 1", "len", "'8k'"]),
    "a negative number": ("0 -8 zero", ["line 1", "len", "'-8'"]),
    "a length out of range": ("0 36028797018963968 zero", ["line 1", "zero", "sector"]),
    "a number of forty digits": (f"0 {'9' * 40} zero", ["line 1", "len"]),
    "too few words": ("0 8", ["line 1", "'0 8'"]),
    "no lines": ("# nothing\n\n", ["no lines"]),
    "an empty table": ("", ["no lines"]),
    "an argument too many": ("0 8 zero 1", ["line 1", "zero", "argument"]),
    "an argument too few": ("0 8 linear {images}/a.img", ["line 1", "linear"]),
    "a start that is no number": ("0 8 linear {images}/a.img x", ["line 1", "linear", "x"]),
    "a start out of range": ("0 8 linear {images}/a.img 99999999", ["line 1", "linear", "a.img"]),
    "a chunk of zero": (
        "0 240 striped 2 0 {images}/a.img 0 {images}/b.img 0", ["line 1", "striped", "chunk", "0"]),
    "a length that stripes do not divide": (
        "0 100 striped 3 8 {images}/a.img 0 {images}/b.img 0 {images}/c.img 0",
        ["line 1", "striped"]),
    "a leg too short": (
        "0 2048 linear {images}/short.img 0",
        ["line 1", "linear", "short.img", "8 sectors", "2048"]),
    "a leg too short in line 2": (
        "0 8 zero\n8 16 linear {images}/short.img 0", ["line 2", "linear", "short.img"]),
    "a missing file": ("0 8 linear {images}/nosuch.img 0", ["line 1", "linear", "nosuch.img"]),
    "a folder": ("0 8 linear {images}/folder 0", ["line 1", "linear", "folder"]),
    "a character device": ("0 8 linear /dev/null 0", ["line 1", "linear", "/dev/null"]),
    "an unknown target": ("0 8 liner {images}/a.img 0", ["line 1", "liner", "linear"]),
    "the device itself": ("0 8 linear {name} 0", ["{name}"]),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_with(base, images, case):
    """Refused by create and by load, in the same words."""
    text, words = TABLES[case]
    before = base.ok("ls").out, base.ok("table").out, base.ok("table", "--inactive").out
    for verb, name in (("create", "new"), ("load", "base")):
        table = text.format(images=images, name=name)
        message = base.refused(verb, name, stdin=table)
        for word in words:
            assert word.format(name=name) in message, message
        assert not message.endswith(".")
        assert _unchanged(base, before)


def test_a_file_without_permission(own_dmpy):
    """Root may read everything, so a server of nobody's tries."""
    file = own_dmpy.runtime.parent / "closed.img"
    own_dmpy.runtime.parent.chmod(0o755)
    file.touch()
    os.truncate(file, 1 << 20)
    file.chmod(0)
    nobody = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    done = own_dmpy.process("run", "--table", f"0 8 linear {file} 0", "--", "true", **nobody)
    assert done.returncode == 1
    for word in ("line 1", "linear", str(file), "ermission denied"):
        assert word in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_device_mapped_to_itself_through_others(base, images):
    base.ok("create", "upper", "--table", "0 2048 linear base 0")
    base.ok("create", "top", "--table", "0 2048 linear upper 0")
    before = base.ok("ls").out, base.ok("table").out, base.ok("table", "--inactive").out
    message = base.refused("load", "base", "--table", "0 2048 linear top 0")
    assert "base" in message
    assert "top" in message
    assert _unchanged(base, before)


@pytest.mark.parametrize(("words", "expected"), [
    (["create", "base", "--table", "0 8 zero"], ["base"]),
    (["create", "a/b", "--table", "0 8 zero"], ["a/b", "must not contain /"]),
    (["create", "", "--table", "0 8 zero"], ["name"]),
    (["create", "x" * 200, "--table", "0 8 zero"], ["name"]),
    (["create", "other", "-u", "U", "--table", "0 8 zero"], ["U", "base"]),
    (["create", "other", "--minor", "0", "--table", "0 8 zero"], ["minor", "0"]),
    (["create", "other", "--minor", "9999999", "--table", "0 8 zero"], ["minor"]),
    (["rename", "base", "a/b"], ["a/b", "must not contain /"]),
    (["load", "nosuch", "--table", "0 8 zero"], ["nosuch"]),
    (["suspend", "nosuch"], ["nosuch"]),
    (["resume", "nosuch"], ["nosuch"]),
    (["remove", "nosuch"], ["nosuch"]),
    (["rename", "nosuch", "x"], ["nosuch"]),
    (["message", "nosuch", "0", "x"], ["nosuch"]),
    (["info", "nosuch"], ["nosuch"]),
    (["table", "nosuch"], ["nosuch"]),
    (["status", "nosuch"], ["nosuch"]),
    (["deps", "nosuch"], ["nosuch"]),
    (["wait", "nosuch"], ["nosuch"]),
    (["stats", "nosuch"], ["nosuch"]),
    (["attach", "nosuch"], ["nosuch"]),
    (["detach", "nosuch"], ["nosuch"]),
    (["detach", "base"], ["base", "not attached"]),
    (["info", "-u", "nosuch"], ["nosuch"]),
    (["info", "-m", "77"], ["77"]),
    (["info", "-j", "8", "-m", "0"], ["8:0"]),
    (["message", "base", "999999", "x"], ["base", "999999"]),
    (["create", "x", "/nosuch/table"], ["/nosuch/table", "no such file"]),
    (["create", "x", "/"], ["/", "directory"]),
    (["create", "--concise", "x,,"], ["concise"]),
])
def test_a_device_or_name_that_cannot_be(base, words, expected):
    before = base.ok("ls").out, base.ok("table").out, base.ok("table", "--inactive").out
    message = base.refused(*words)
    for word in expected:
        assert word in message, message
    assert _unchanged(base, before)


def test_a_misspelt_device_names_the_nearest(base):
    assert base.refused("info", "bsae").endswith("(did you mean base?)")


def test_an_odd_name_is_carried_through_everywhere(base):
    for name in ("with blank", "ü;,\\", "-x"):
        base.ok("create", "--table", "0 8 zero", "--", name)
        assert base.ok("info", "--json", "--", name).json()["name"] == name
        base.ok("remove", "--", name)


def test_a_binary_file_for_a_table(base, tmp_path):
    (tmp_path / "t").write_bytes(b"\xff\xfe\x00\x01")
    assert "not a text file" in base.refused("create", "x", str(tmp_path / "t"))


def test_a_table_bigger_than_any_sensible_size(base):
    message = base.refused("create", "x", stdin="0 8 zero\n" * (8 << 20))
    assert "64 MiB" in message
    assert base.ok("ls").out == "base\t(253:0)\n"


def test_a_current_folder_that_is_gone(base, tmp_path):
    (tmp_path / "gone").mkdir()
    script = f"cd {tmp_path}/gone && rmdir {tmp_path}/gone && exec {sys.executable} -m " \
             "dmpy.cli.main create x --table '0 8 zero'"
    done = subprocess.run(["sh", "-c", script], env=base.environment(), capture_output=True,
                          text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("dmpy: ")


def test_removal_of_a_device_that_a_client_has_open(base):
    needs.tool("nbdsh", package="libnbd-bin")
    nbd = pytest.importorskip("nbd", reason="libnbd's Python module is missing")
    handle = nbd.NBD()
    handle.connect_uri(f"nbd+unix:///base?socket={base.runtime}/nbd.sock")
    try:
        assert base.ok("info", "base", "--json").json()["open_count"] == 1
        assert "base" in base.refused("remove", "base")
        assert base.ok("ls").out == "base\t(253:0)\n"
    finally:
        handle.shutdown()
    base.ok("remove", "--retry", "base")


def test_a_leg_truncated_while_in_use_fails_only_there(base, images):
    nbd = pytest.importorskip("nbd", reason="libnbd's Python module is missing")
    os.truncate(images / "a.img", 512 << 10)
    handle = nbd.NBD()
    handle.connect_uri(f"nbd+unix:///base?socket={base.runtime}/nbd.sock")
    assert handle.pread(4096, 0) == bytes(4096)
    with pytest.raises(nbd.Error) as caught:
        handle.pread(4096, 768 << 10)
    assert caught.value.errno == "EIO"
    assert handle.pread(4096, 4096) == bytes(4096)
    handle.shutdown()
    assert base.ok("stats", "base", "--json").json()["errors"] == 1


# -- the server ---------------------------------------------------------------------------------


def test_a_server_that_died_is_said_with_how_to_restart(own_dmpy):
    own_dmpy.ok("create", "x", "--table", "0 8 zero")
    pid = own_dmpy.pid()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    for words in (["ls"], ["create", "y", "--table", "0 8 zero"], ["shutdown"]):
        message = own_dmpy.refused(*words)
        assert f"pid {pid}" in message
        assert "died" in message
        assert "`dmpy serve` starts it again" in message
        assert "server.log" in message
    done = own_dmpy.process("serve", "--background")
    assert done.returncode == 0, done
    assert own_dmpy.ok("ls").out == "x\t(253:0)\n"


def test_two_servers_on_one_state_folder(own_dmpy, tmp_path):
    own_dmpy.ok("create", "x", "--table", "0 8 zero")
    other = str(own_dmpy.runtime.parent / "other")
    state = str(own_dmpy.runtime / "state")
    message = own_dmpy.refused("--runtime", other, "--state", state, "ls")
    assert state in message
    assert f"pid {own_dmpy.pid()}" in message
    assert own_dmpy.ok("ls").out == "x\t(253:0)\n"


def test_an_entry_that_cannot_be_rebuilt_is_shown_and_fails_alone(own_dmpy, images):
    own_dmpy.ok("create", "good", "--table", f"0 8 linear {images}/a.img 0")
    own_dmpy.ok("create", "bad", "--table", f"0 8 linear {images}/b.img 0")
    own_dmpy.ok("shutdown")
    (images / "b.img").unlink()
    bad, good = own_dmpy.ok("ls").out.splitlines()
    assert good == "good\t(253:0)"
    assert bad.startswith("bad\t(253:1)\tfailed: line 1, linear: ")
    assert "b.img" in bad
    last = own_dmpy.ok("ls", "--tree").out.splitlines()[-1]
    assert last.startswith("bad\t(failed: line 1, linear: ")
    bad, good = own_dmpy.ok("ls", "--json").json()
    assert "error" not in good
    assert "b.img" in bad["error"]
    assert own_dmpy.ok("table", "good").out.startswith("0 8 linear ")
    findings = own_dmpy("doctor", "--json")
    assert findings.status == 1
    assert any(f["what"] == "device bad" for f in findings.json())
    # Whoever has seen to it makes the device whole again, or removes it.
    own_dmpy.ok("load", "bad", "--table", "0 8 zero")
    own_dmpy.ok("resume", "bad")
    assert own_dmpy.ok("ls").out == "bad\t(253:1)\ngood\t(253:0)\n"


def test_a_runtime_folder_that_is_a_file(own_dmpy):
    own_dmpy.runtime.touch()
    message = own_dmpy.refused("ls")
    assert str(own_dmpy.runtime) in message
    own_dmpy.runtime.unlink()


def test_a_command_without_memory_for_its_table_still_ends_in_a_sentence():
    """Two gigabytes of table, and half of one to read it into."""
    done = subprocess.run(
        f"head -c 2G /dev/zero | {sys.executable} -m dmpy.cli.main create x", shell=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29)),
        capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
