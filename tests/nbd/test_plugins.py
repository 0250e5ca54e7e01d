"""The plugins by themselves: what they serve, and what they say to bad arguments."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from dmpy.client import Client
from tests import needs
from tests.nbd.conftest import FIO, MIB, ROOT

pytest.importorskip("nbd", reason="the Python module nbd is missing (package python3-libnbd)")
import nbd

PLUGINS = ROOT / "plugins"


# --- one table ---------------------------------------------------------------------------------


def test_linear_puts_files_one_after_the_other(serve, images):
    a, b = images(2 * MIB, 3 * MIB + 512)
    server = serve("linear.py", a, b)
    handle = server.connect()
    assert handle.get_size() == 5 * MIB + 512
    handle.pwrite(b"\1" * 1024, 2 * MIB - 512)
    assert a.read_bytes()[-512:] == b.read_bytes()[:512] == b"\1" * 512


def test_striped_deals_chunks_out(serve, images):
    a, b, c = images(MIB, 2 * MIB, MIB + 4096)
    handle = serve("striped.py", "chunk=128K", a, b, c).connect()
    assert handle.get_size() == 3 * MIB
    for chunk in range(6):
        handle.pwrite(bytes([chunk + 1]) * 131072, chunk * 131072)
    for leg, path in enumerate((a, b, c)):
        expected = bytes([leg + 1]) * 131072 + bytes([leg + 4]) * 131072
        assert path.read_bytes()[:262144] == expected


def test_table_from_a_file_with_several_lines_and_relative_paths(serve, images, tmp_path):
    images(MIB)
    text = "# two lines\n0 1000 linear a.img 24\n\n1000 1000 error\n"
    (tmp_path / "t").write_text(text)
    handle = serve("table.py", "file=t", cwd=tmp_path).connect("table")
    assert handle.get_size() == 2000 * 512
    handle.pwrite(b"\1" * 512, 0)
    assert (tmp_path / "a.img").read_bytes()[24 * 512 :][:512] == b"\1" * 512
    with pytest.raises(nbd.Error) as caught:
        handle.pread(512, 1000 * 512)
    assert caught.value.errno == "EIO"


def test_files_with_blanks_and_equal_signs_in_their_names(serve, tmp_path):
    for name in ("a b.img", "x=y.img", "back\\slash.img"):
        (tmp_path / name).write_bytes(bytes(MIB))
    words = ["a b.img", "./x=y.img", "file=back\\slash.img"]
    assert serve("linear.py", *words, cwd=tmp_path).connect().get_size() == 3 * MIB


def test_memory_and_other_servers_can_be_legs(serve, images):
    lower = serve("linear.py", *images(MIB))
    handle = serve("striped.py", "chunk=4K", lower.uri(), "mem:1M").connect()
    handle.pwrite(b"\1" * 4096 + b"\2" * 4096, 0)
    handle.flush()
    assert lower.connect().pread(4096, 0) == b"\1" * 4096
    assert handle.pread(8192, 0) == b"\1" * 4096 + b"\2" * 4096


def test_read_only_option_opens_files_that_cannot_be_written(serve, images):
    (path,) = images(MIB)
    path.chmod(0o444)
    handle = serve("linear.py", path, options=("-t", "1", "-r")).connect()
    assert handle.is_read_only()
    assert handle.pread(512, 0) == bytes(512)


def test_the_name_can_be_chosen_and_others_are_refused(serve):
    server = serve("linear.py", "mem:1M", "name=disk 0")
    assert server.connect("disk 0").get_size() == MIB
    with pytest.raises(nbd.Error):
        server.connect("linear")


BAD = [
    ("linear.py", [], "linear: no files given"),
    ("linear.py", ["nothing.img"], "nothing.img: no such file or directory"),
    ("linear.py", ["/"], "/: a folder, not a disk"),
    ("linear.py", ["empty.img"], "empty.img: too small (got 0 bytes, expected at least 512)"),
    ("linear.py", ["mem:1M", "size=3"], "size: unknown argument (known are file, loglevel, name)"),
    ("linear.py", ["mem:1M", "loglevel=loud"], "loglevel must be one of debug, info, warning, err"),
    ("linear.py", ["mem:1M", "name=a/b"], "device name must not contain / or NUL (got 'a/b')"),
    ("striped.py", ["chunk=6K", "mem:1M"], "chunk must be a multiple of 4096 bytes (got 6144)"),
    ("striped.py", ["chunk=0", "mem:1M"], "chunk must be a multiple of 4096 bytes (got 0)"),
    ("striped.py", ["chunk=many", "mem:1M"], "chunk: 'many' is not a size such as 512, 8s, 64K"),
    ("striped.py", ["chunk=2M", "mem:1M"], "mem:1M: too small"),
    ("table.py", [], "table: give one of table=TEXT and file=PATH"),
    ("table.py", ["file=nothing"], "nothing: No such file or directory"),
    ("table.py", ["table=0 8 linaer mem:1M 0"], "unknown target type 'linaer' (did you mean lin"),
    ("table.py", ["table=0 8 linear mem:1K 0"], "line 1, linear: leg mem:1K has 2 sectors"),
    ("table.py", ["table=8 8 zero"], "line 1, zero: gap before sector 8"),
    ("dmpy.py", ["runtime=."], "state: missing (expected state=FOLDER)"),
    ("dmpy.py", ["size=3"], "size: unknown argument"),
    ("dmpy.py", ["metrics=0.0.0.0:1"], "metrics: host must be localhost"),
    ("proxy.py", [], "socket: missing (expected socket=PATH, see dmpy.serve)"),
]


@pytest.mark.parametrize(("script", "arguments", "sentence"), BAD)
def test_bad_arguments_are_one_sentence_and_status_1(tmp_path, script, arguments, sentence):
    needs.nbdkit_plugin("python")
    (tmp_path / "empty.img").touch()
    done = subprocess.run(
        ["nbdkit", "-f", "-U", "s", "python", PLUGINS / script, *arguments],
        capture_output=True, text=True, timeout=20, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert sentence in line, line
    assert "Traceback" not in line


def test_loglevel_info_tells_what_happens(serve):
    server = serve("linear.py", "mem:1M", "loglevel=info")
    server.connect().shutdown()
    assert server.stop() == 0
    assert "info: shutting down" in server.log


# --- where dmpy is found -----------------------------------------------------------------------


# A checkout without an environment.
def _copy(tmp_path):
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns("__pycache__", "plugins")
    shutil.copytree(ROOT / "dmpy", tree / "dmpy", ignore=ignore)
    shutil.copytree(PLUGINS, tree / "plugins", ignore=shutil.ignore_patterns("__pycache__"))
    return tree


def _start(script, **environment):
    return subprocess.run(
        ["nbdkit", "-U", "-", "python", script, "mem:1M", "--run", 'nbdinfo --size "$uri"'],
        capture_output=True, text=True, timeout=30, check=False,
        env={"PATH": "/usr/bin:/bin:/usr/sbin", "HOME": "/nonexistent"} | environment,
    )  # fmt: skip


def test_plugins_work_from_a_checkout_without_an_activated_environment():
    needs.nbdkit_plugin("python")
    assert _start(PLUGINS / "linear.py").stdout.strip() == str(MIB)


def test_plugins_work_from_an_activated_environment():
    needs.nbdkit_plugin("python")
    path = f"{os.path.dirname(sys.executable)}:/usr/bin:/bin"
    assert _start(PLUGINS / "linear.py", PATH=path).stdout.strip() == str(MIB)


def test_plugins_work_where_they_are_installed(tmp_path):
    """In a wheel plugins/ is inside dmpy/, in site-packages."""
    needs.nbdkit_plugin("python")
    tree = _copy(tmp_path)
    shutil.move(tree / "plugins", tree / "dmpy" / "plugins")
    done = _start(tree / "dmpy" / "plugins" / "linear.py")
    assert done.stdout.strip() == str(MIB), done.stderr


def test_an_environment_of_another_python_is_told_in_one_sentence(tmp_path):
    tree = _copy(tmp_path)
    (tree / ".venv" / "lib" / "python3.5").mkdir(parents=True)
    done = _start(tree / "plugins" / "linear.py")
    assert done.returncode == 1
    assert "is of python3.5, nbdkit runs python3" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_tree_that_cannot_be_imported_is_told_in_one_sentence(tmp_path):
    tree = _copy(tmp_path)
    (tree / "dmpy" / "units.py").write_text("import a_package_that_is_not_there\n")
    done = _start(tree / "plugins" / "linear.py")
    assert done.returncode == 1
    assert "No module named 'a_package_that_is_not_there'" in done.stderr
    assert "Traceback" not in done.stderr


# --- the server --------------------------------------------------------------------------------


@pytest.fixture
def server(serve, folder):
    """plugins/dmpy.py and a control connection."""
    for name in ("run", "state"):
        os.mkdir(f"{folder}/{name}", 0o700)
    server = serve("dmpy.py", f"runtime={folder}/run", f"state={folder}/state")
    with Client(f"{folder}/run/control.sock", timeout=30) as client:
        server.call = client.call
        yield server


def test_devices_come_and_go_as_exports(server, run):
    server.call("create", name="r0", table="0 2048 zero")
    server.call("create", name="r1", table="0 4096 linear mem:4M 0\n4096 8 error")
    listed = json.loads(run("nbdinfo", "--list", "--json", server.uri()))["exports"]
    assert {(e["export-name"], e["export-size"], e["description"]) for e in listed} == {
        ("r0", MIB, "0 2048 zero"), ("r1", 4104 * 512, "2 lines of error, linear")
    }  # fmt: skip
    with pytest.raises(nbd.Error):
        server.connect()  # two devices: none is the default
    server.call("remove", name="r1")
    assert server.connect().get_size() == MIB  # the only one


def test_names_and_paths_that_are_not_utf_8_do_not_spoil_the_listing(server, tmp_path):
    """NBD carries UTF-8 only; the device can still be used from the inside."""
    path = os.fsencode(tmp_path) + b"/\xff.img"
    with open(path, "wb") as file:
        file.truncate(MIB)
    table = f"0 2048 linear {os.fsdecode(path)} 0"
    server.call("create", name="r0", table=table)
    server.call("create", name=os.fsdecode(b"\xfe"), table="0 8 zero")
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(server.uri())
    found = []
    handle.opt_list(lambda name, description: found.append((name, description)) or 0)
    handle.opt_abort()
    assert found == [("r0", table.replace("\udcff", "?"))]
    assert server.connect("r0").get_size() == MIB


def test_a_device_without_a_table_has_no_bytes(server):
    server.call("create", name="r0", table=None)
    assert server.connect("r0").get_size() == 0


def test_a_client_is_an_opener(server):
    server.call("create", name="r0", table="0 2048 zero")
    handle = server.connect("r0")
    assert server.call("info", name="r0")["open_count"] == 1
    with pytest.raises(OSError, match="in use"):
        server.call("remove", name="r0")
    handle.shutdown()
    while server.call("info", name="r0")["open_count"]:
        pass
    server.call("remove", name="r0")


def test_an_attachment_is_no_opener(server):
    """What attaches a device must not keep it from being removed."""
    server.call("create", name="r0", table="0 2048 linear mem:1M 0", minor=7)
    handle = server.connect("attached/7")
    handle.pwrite(b"\1" * 512, 0)
    assert server.call("info", name="r0")["open_count"] == 0
    handle.shutdown()
    for name in ("attached/8", "attached/r0", "attached/", "attached/-7", "attached/7x"):
        with pytest.raises(nbd.Error):
            server.connect(name)
    server.call("remove", name="r0")


def test_forced_removal_fails_the_requests_of_clients(server):
    server.call("create", name="r0", table="0 2048 zero")
    handle = server.connect("r0")
    with pytest.raises(OSError, match="in use"):
        server.call("remove", name="r0", force=True)
    with pytest.raises(nbd.Error) as caught:
        handle.pread(512, 0)
    assert caught.value.errno == "EIO"


def test_read_only_devices_refuse_writes(server):
    server.call("create", name="r0", table="0 2048 linear mem:1M 0", readonly=True)
    handle = server.connect("r0")
    assert handle.is_read_only()
    with pytest.raises(nbd.Error):
        handle.pwrite(bytes(512), 0)


def test_devices_that_become_read_only_refuse_writes(server):
    server.call("create", name="r0", table="0 2048 linear mem:1M 0")
    handle = server.connect("r0")
    server.call("load", name="r0", table="0 2048 linear mem:1M 0", readonly=True)
    server.call("resume", name="r0")
    with pytest.raises(nbd.Error) as caught:
        handle.pwrite(bytes(512), 0)
    assert caught.value.errno == "EPERM"


def test_requests_wait_while_a_device_is_suspended(server):
    server.call("create", name="r0", table="0 2048 linear mem:1M 0")
    handle = server.connect("r0")
    server.call("suspend", name="r0")
    done = []
    handle.aio_pread(nbd.Buffer(512), 0, completion=lambda error: done.append(error.value) or 1)
    handle.poll(200)
    assert not done
    server.call("resume", name="r0")
    while not done:
        assert handle.poll(5000) == 1
    assert done == [0]


def test_fio_verifies_while_the_server_moves_a_device_to_another_leg(server, images):
    """Through the control socket, as `dmpy load`, `suspend` and `resume` do it."""
    here, there = images(32 * MIB, 32 * MIB)
    server.call("create", name="low", table=f"0 65536 linear {here} 0")
    server.call("create", name="r0", table="0 32768 linear low 0\n32768 32768 linear low 32768")
    fio = subprocess.Popen(
        [
            needs.tool("fio"), *FIO, f"--uri={server.uri('r0')}", "--rw=randrw", "--numjobs=4",
            "--size=8M", "--offset_increment=8M", "--time_based", "--runtime=3",
            "--verify_backlog=64",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    moves = 0
    while fio.poll() is None and moves < 8:
        time.sleep(0.2)
        server.call("load", name="low", table=f"0 65536 linear {there} 0")
        server.call("suspend", name="low")  # r0 passes over it, and has to wait too
        there.write_bytes(here.read_bytes())
        server.call("resume", name="low")
        here, there = there, here
        moves += 1
    output, _ = fio.communicate(timeout=60)
    assert fio.returncode == 0 and "err= 0" in output and "verify:" not in output, output
    assert moves >= 3
    stats = server.call("stats", name="r0")
    assert stats["errors"] == 0 and stats["writes"] > 1000


def test_a_server_with_suspended_devices_and_waiting_requests_ends(server):
    server.call("create", name="low", table="0 2048 linear mem:1M 0")
    server.call("create", name="top", table="0 2048 linear low 0")
    handles = [server.connect("low"), server.connect("top")]
    server.call("suspend", name="low")
    for handle in handles:
        handle.aio_pread(nbd.Buffer(512), 0)
        handle.poll(100)
    assert server.stop() == 0


def test_a_device_that_shrinks_refuses_what_is_beyond(server):
    server.call("create", name="r0", table="0 2048 linear mem:1M 0")
    handle = server.connect("r0")
    server.call("load", name="r0", table="0 1024 linear mem:1M 0")
    server.call("resume", name="r0")
    assert handle.pread(512, 1023 * 512) == bytes(512)
    for offset, length in ((1024 * 512, 512), (1023 * 512, 1024)):
        for send in (handle.pread, lambda size, place: handle.pwrite(bytes(size), place)):
            with pytest.raises(nbd.Error):
                send(length, offset)
    assert server.connect("r0").get_size() == 1024 * 512


def test_shutdown_through_the_control_socket_ends_the_server(server):
    server.call("create", name="r0", table="0 2048 zero")
    idle = server.connect("r0")
    server.call("shutdown")
    assert server.process.wait(20) == 0
    assert idle


def test_devices_come_back_after_a_kill(serve, folder, images):
    (image,) = images(MIB)
    for name in ("run", "state"):
        os.mkdir(f"{folder}/{name}", 0o700)
    words = ("dmpy.py", f"runtime={folder}/run", f"state={folder}/state")
    first = serve(*words)
    with Client(f"{folder}/run/control.sock") as client:
        client.call("create", name="r0", table=f"0 2048 linear {image} 0")
    handle = first.connect("r0")
    handle.pwrite(b"\1" * 512, 0, nbd.CMD_FLAG_FUA)
    first.kill()
    assert serve(*words).connect("r0").pread(512, 0) == b"\1" * 512


def test_a_server_whose_threads_cannot_start_ends_with_one_sentence(serve, folder):
    """The control socket is made after the fork; here another server answers on it."""
    for name in ("run", "state", "state2"):
        os.mkdir(f"{folder}/{name}", 0o700)
    serve("dmpy.py", f"runtime={folder}/run", f"state={folder}/state")
    words = [PLUGINS / "dmpy.py", f"runtime={folder}/run", f"state={folder}/state2"]
    done = subprocess.run(
        ["nbdkit", "-f", "-U", f"{folder}/s2", "python", *words],
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "control.sock" in line


def test_a_second_server_on_one_state_folder_is_refused(server, folder):
    os.mkdir(f"{folder}/run2", 0o700)
    words = [PLUGINS / "dmpy.py", f"runtime={folder}/run2", f"state={folder}/state"]
    done = subprocess.run(
        ["nbdkit", "-f", "-U", f"{folder}/s2", "python", *words],
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "two cannot share it" in done.stderr
