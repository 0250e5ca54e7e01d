"""`attach` and `detach` for real: nbdfuse and loop devices here, nbd-client in tests/kernel/."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dmpy import attach
from tests import needs


@pytest.fixture
def block(dmpy, images):
    """A device r0 of 1 MiB, where devices can be attached as block devices."""
    needs.root()
    needs.tool("nbdfuse", package="libnbd-bin")
    needs.path("/dev/fuse")
    needs.path("/dev/loop-control")
    dmpy.ok("create", "r0", "--table", f"0 2048 linear {images}/a.img 0")
    return dmpy


@pytest.fixture
def as_file(dmpy, images):
    """A device r0 of 1 MiB, where devices can be attached as files."""
    needs.tool("nbdfuse", package="libnbd-bin")
    needs.path("/dev/fuse")
    dmpy.ok("create", "r0", "--table", f"0 2048 linear {images}/a.img 0")
    return dmpy


def _nothing_is_left(runtime):
    mounts = Path("/proc/self/mounts").read_text()
    loops = [path.read_text() for path in Path("/sys/block").glob("loop*/loop/backing_file")]
    assert str(runtime) not in mounts
    assert not [text for text in loops if str(runtime) in text]
    assert [path.name for path in (runtime / "attached").iterdir()] == ["lock"]


def _wait(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_attach_prints_a_block_device_of_the_right_size(block):
    node = block.ok("attach", "r0").out.strip()
    assert node.startswith(("/dev/loop", "/dev/nbd"))
    with open(node, "rb") as file:
        assert file.seek(0, os.SEEK_END) == 1 << 20
    assert block.ok("info", "r0", "--json").json()["attached"] == node
    assert block.ok("attach", "r0", "--json").json() == {"node": node}
    block.ok("detach", "r0")
    _nothing_is_left(block.runtime)


def test_what_is_written_to_the_node_is_in_the_leg_after_detach(block, images):
    node = block.ok("attach", "r0").out.strip()
    with open(node, "r+b") as file:
        file.seek(4096)
        file.write(b"dmpy" * 1024)
    assert block.ok("detach", "r0", "--json").json() == {"node": node}
    assert (images / "a.img").read_bytes()[4096:8192] == b"dmpy" * 1024


def test_a_file_system_on_the_node_is_mounted_and_not_detached_meanwhile(block, images, tmp_path):
    needs.tool("mkfs.ext4", package="e2fsprogs")
    block.ok("create", "big", "--table",
             f"0 2048 linear {images}/b.img 0\n2048 2048 linear {images}/c.img 0")
    node = block.ok("attach", "big").out.strip()
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", node], check=True, timeout=60)
    mount = tmp_path / "mnt"
    mount.mkdir()
    subprocess.run(["mount", node, mount], check=True, timeout=60)
    try:
        (mount / "file").write_bytes(b"x" * 100_000)
        for words in (["detach", "big"], ["remove", "big"], ["shutdown"]):
            message = block.refused(*words)
            assert "big" in message
        assert f"mounted on {mount}: unmount it first" in block.refused("detach", "big")
        assert block.ok("info", "big", "--json").json()["open_count"] == 1
    finally:
        subprocess.run(["umount", mount], check=True, timeout=60)
    block.ok("detach", "big")
    _nothing_is_left(block.runtime)
    node = block.ok("attach", "big").out.strip()
    done = subprocess.run(["fsck.ext4", "-fn", node], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done
    block.ok("detach", "big")


def test_a_node_that_a_process_has_open_is_not_detached(block):
    node = block.ok("attach", "r0").out.strip()
    with open(node, "rb"):
        message = block.refused("detach", "r0")
        assert f"open in process {os.getpid()}" in message
        assert node in message
    block.ok("detach", "r0")


def test_a_read_only_device_has_a_read_only_node(block, images):
    block.ok("create", "ro", "-r", "--table", f"0 2048 linear {images}/b.img 0")
    node = block.ok("attach", "ro").out.strip()
    assert Path(f"/sys/block/{Path(node).name}/ro").read_text().strip() == "1"
    with pytest.raises(OSError) as caught, open(node, "r+b", buffering=0) as file:
        file.write(bytes(512))                          # some kernels say so only now
    assert caught.value.errno in (errno.EACCES, errno.EROFS, errno.EPERM)
    block.ok("detach", "ro")


def test_a_file_is_a_node_that_needs_no_block_device(as_file, images):
    node = as_file.ok("attach", "--file", "r0").out.strip()
    assert Path(node).stat().st_size == 1 << 20
    with open(node, "r+b") as file:
        file.write(b"through the file")
        os.fsync(file.fileno())
        assert "in use by process" in as_file.refused("detach", "r0")
    as_file.ok("detach", "r0")
    _nothing_is_left(as_file.runtime)
    assert (images / "a.img").read_bytes()[:16] == b"through the file"


def test_an_odd_name_is_attached_too(as_file):
    for name in (".hidden", "with blank", "a%2Fb", "ü.json"):
        as_file.ok("create", name, "--table", "0 8 zero")
        node = as_file.ok("attach", "--file", name).out.strip("\n")
        assert Path(node).stat().st_size == 4096
        assert Path(node).is_relative_to(as_file.runtime / "attached")
        as_file.ok("detach", name)
    _nothing_is_left(as_file.runtime)


def test_removing_a_device_takes_its_unused_node_along(as_file):
    as_file.ok("attach", "--file", "r0")
    as_file.ok("remove", "r0")
    _nothing_is_left(as_file.runtime)


def test_shutdown_detaches_what_nobody_uses(own_dmpy, images):
    needs.tool("nbdfuse", package="libnbd-bin")
    needs.path("/dev/fuse")
    own_dmpy.ok("create", "r0", "--table", f"0 2048 linear {images}/a.img 0")
    own_dmpy.ok("attach", "--file", "r0")
    own_dmpy.ok("shutdown")
    _nothing_is_left(own_dmpy.runtime)


def test_what_a_dead_server_left_attached_is_cleaned_up_by_the_next(own_dmpy, images):
    needs.root()
    needs.tool("nbdfuse", package="libnbd-bin")
    needs.path("/dev/loop-control")
    own_dmpy.ok("create", "r0", "--table", f"0 2048 linear {images}/a.img 0")
    node = own_dmpy.ok("attach", "r0").out.strip()
    pid = own_dmpy.pid()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    record, = attach.attached(own_dmpy.runtime)
    assert (record["name"], record["node"], record["stale"]) == ("r0", node, True)
    assert any(f["what"] == "attached r0" for f in own_dmpy("doctor", "--json").json())
    assert own_dmpy.process("serve", "--background").returncode == 0
    own_dmpy.ok("ls")
    _nothing_is_left(own_dmpy.runtime)


def test_devdir_links_each_device_while_it_is_there(own_dmpy, tmp_path):
    needs.root()
    needs.tool("nbdfuse", package="libnbd-bin")
    needs.path("/dev/loop-control")
    folder = tmp_path / "mapper"
    assert own_dmpy.process("serve", "-b", "--devdir", str(folder)).returncode == 0
    own_dmpy.ok("create", "r0", "--table", "0 2048 zero")
    assert (folder / "r0").is_symlink()
    with open(folder / "r0", "rb") as file:
        assert file.seek(0, os.SEEK_END) == 1 << 20
    own_dmpy.ok("rename", "r0", "r1")
    assert os.listdir(folder) == ["r1"]
    own_dmpy.ok("remove", "r1")
    assert os.listdir(folder) == []
    own_dmpy.ok("shutdown")


# -- dmpy.attach by itself: two servers' worth of trouble without a server of ours --------------


@pytest.fixture
def plain_server(tmp_path):
    """nbdkit's memory plugin on a socket, and a folder for records."""
    needs.tool("nbdkit", package="nbdkit")
    needs.tool("nbdfuse", package="libnbd-bin")
    needs.path("/dev/fuse")
    socket = Path(f"/tmp/dmpy-attach-{os.getpid()}.sock")
    process = subprocess.Popen(["nbdkit", "-f", "-U", str(socket), "memory", "1M"])
    _wait(socket.exists)
    yield socket, tmp_path / "run", process
    process.kill()
    process.wait()
    socket.unlink()


def test_attach_twice_gives_the_same_node(plain_server):
    socket, runtime, _ = plain_server
    node = attach.attach("m", socket, runtime, as_file=True)
    assert attach.attach("m", socket, runtime, as_file=True) == node
    assert attach.in_use(node) is None
    attach.detach("m", runtime)
    with pytest.raises(FileNotFoundError, match="m is not attached"):
        attach.detach("m", runtime)


def test_an_export_that_is_not_there_leaves_nothing(tmp_path):
    needs.tool("nbdfuse", package="libnbd-bin")
    needs.path("/dev/fuse")
    with pytest.raises(OSError, match="nbdfuse cannot show m: ") as caught:
        attach.attach("m", tmp_path / "nosuch.sock", tmp_path / "run", as_file=True)
    assert caught.value.errno == errno.EIO
    _nothing_is_left(tmp_path / "run")


def test_clean_up_leaves_what_is_in_use_and_says_so(plain_server):
    needs.root()
    needs.path("/dev/loop-control")
    socket, runtime, server = plain_server
    node = attach.attach("m", socket, runtime, server_pid=server.pid)
    server.kill()
    server.wait()
    with open(node, "rb", buffering=0):
        complaint, = attach.clean_up(runtime)
        assert node in complaint
        assert f"open in process {os.getpid()}" in complaint
    assert attach.clean_up(runtime) == []
    _nothing_is_left(runtime)


def test_without_root_it_says_what_is_needed(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PermissionError, match="needs root.*`dmpy attach --file m`"):
        attach.attach("m", tmp_path / "s", tmp_path / "run")


def test_without_nbdfuse_it_says_which_package_has_it(monkeypatch, tmp_path):
    monkeypatch.setattr(attach, "_tool", lambda program: None)
    with pytest.raises(FileNotFoundError, match=r"nbdfuse is not installed \(package libnbd-bin"):
        attach.attach("m", tmp_path / "s", tmp_path / "run", as_file=True)


def test_without_root_and_fusermount_it_says_which_package_has_it(monkeypatch, tmp_path):
    found = attach._tool
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(attach, "_tool", lambda program: None if "fusermount" in program else
                        found(program) or f"/usr/bin/{program}")
    with pytest.raises(FileNotFoundError, match=r"fusermount3 is not installed \(package fuse3"):
        attach.attach("m", tmp_path / "s", tmp_path / "run", as_file=True)
    assert [path.name for path in (tmp_path / "run" / "attached").iterdir()] == ["lock"]


def test_export_uris_quote_what_has_a_meaning():
    assert attach.export_uri("a b/c?", "/run/x y.sock") == (
        "nbd+unix:///a%20b%2Fc%3F?socket=/run/x%20y.sock")


def test_attachments_of_two_threads_of_one_name_are_one(plain_server):
    socket, runtime, _ = plain_server
    script = ("import sys; from dmpy import attach; "
              f"print(attach.attach('m', {str(socket)!r}, {str(runtime)!r}, as_file=True, "
              "server_pid=int(sys.argv[1])))")
    environment = os.environ | {"PYTHONPATH": str(Path(attach.__file__).parents[1])}
    processes = [subprocess.Popen([sys.executable, "-c", script, str(os.getpid())],
                                  env=environment, stdout=subprocess.PIPE, text=True)
                 for _ in range(2)]
    nodes = {process.communicate(timeout=30)[0] for process in processes}
    assert len(nodes) == 1
    assert nodes.pop().endswith("disk\n")
    attach.detach("m", runtime)
    _nothing_is_left(runtime)
