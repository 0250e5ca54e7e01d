"""NBD exports as leaves, against a real nbdkit."""

from __future__ import annotations

import errno
import gc
import importlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest

from dmpy.backing import Leaves, leaf_identity, open_leaf
from dmpy.backing import remote as remote_module
from dmpy.backing.remote import absolute_uri
from dmpy.device import DATA, HOLE, ZERO, Extent
from dmpy.testing.conformance import LeafTests
from tests import needs
from tests.backing.test_file import MIB, raises, read

pytestmark = pytest.mark.nbd


class Server:
    """An nbdkit on a Unix socket in a short folder of its own, to be killed and started again."""

    def __init__(self):
        needs.tool("nbdkit", package="nbdkit")
        needs.module("nbd", package="python3-libnbd")
        self.folder = Path(tempfile.mkdtemp(prefix="dmpy"))
        self.socket = self.folder / "s"
        self.process = None

    def start(self, *words):
        """Start it, and return the URI once it answers."""
        self.words = words or self.words
        self.socket.unlink(missing_ok=True)
        # nbdkit writes it after it began to listen.
        pid = self.folder / "pid"
        pid.unlink(missing_ok=True)
        command = ["nbdkit", "-f", "-t", "1", "-P", str(pid), "-U", str(self.socket), *self.words]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE)
        end = time.monotonic() + 20
        while not pid.exists():
            if self.process.poll() is not None:
                pytest.fail(self.process.stderr.read().decode())
            assert time.monotonic() < end, "nbdkit does not start"
            time.sleep(0.005)
        return f"nbd+unix:///?socket={self.socket}"

    def kill(self):
        """End it as a crash does."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(30)
            self.process.stderr.close()
            self.process = None

    def remove(self):
        self.kill()
        shutil.rmtree(self.folder)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.remove()


class RemoteTests(LeafTests):
    """The conformance suite over a socket."""

    words = ("memory", "1M")

    @pytest.fixture(autouse=True)
    def _leaf(self, server, tmp_path):
        self.folder = tmp_path
        self.uri = server.start(*[word.replace("FOLDER", str(tmp_path)) for word in self.words])
        self.leaf = self.reopen(tmp_path)
        yield
        self.leaf.close()

    def reopen(self, folder):
        return open_leaf(self.uri)


class TestMemoryExport(RemoteTests):
    """A server that can do everything."""

    fast_zeroes = True


class TestExportWithoutZeroesAndExtents(RemoteTests):
    """A server that can do little more than read and write."""

    words = ("--filter=nozero", "--filter=noextents", "memory", "1M")
    fast_zeroes = False


class TestExportWithNarrowBlockSizes(RemoteTests):
    """A server that refuses what is smaller than 2 KiB, longer than 64 KiB or not aligned."""

    words = (
        "--filter=blocksize-policy",
        "memory",
        "1M",
        "blocksize-minimum=2048",
        "blocksize-preferred=8192",
        "blocksize-maximum=64K",
        "blocksize-error-policy=error",
    )

    def test_block_sizes_are_the_servers(self):
        assert self.leaf.block_size[:2] == (2048, 8192)


class TestExportForOneConnection(RemoteTests):
    """A server whose connections may see different content: only one is used."""

    words = ("--filter=multi-conn", "memory", "1M", "multi-conn-mode=disable")

    def test_one_connection_is_used(self):
        self.test_threads_do_not_disturb_each_other()
        assert len(self.leaf._idle) == 1


class TestExportOfAServerThatIsFull(RemoteTests):
    """A server that promises several connections and then takes only one."""

    words = ("--filter=limit", "memory", "1M", "limit=1")

    def reopen(self, folder):
        if hasattr(self, "leaf"):
            # The server counts a connection as long as it has not noticed that it ended.
            time.sleep(0.1)
        return open_leaf(self.uri)


class TestExportWithoutFUA(RemoteTests):
    """Durable writes are a write and a flush."""

    words = ("--filter=fua", "memory", "1M")


# Connecting.


def test_a_server_that_does_not_run_is_named(tmp_path):
    with raises(errno.ENOENT, r"^nbd\+unix:///x\?socket=/.*/s: no connection: .*No such file"):
        open_leaf("nbd+unix:///x?socket=s", cwd=str(tmp_path))


def test_a_port_that_nobody_listens_on_is_refused():
    with raises(errno.ECONNREFUSED, "^nbd://localhost:1/: no connection: .*refused"):
        open_leaf("nbd://localhost:1/")


def test_a_socket_without_a_path_is_refused():
    with raises(errno.EINVAL, "socket=PATH is missing"):
        open_leaf("nbd+unix:///x")


def test_a_server_that_says_nothing_is_given_up(monkeypatch, server):
    monkeypatch.setattr(remote_module, "_CONNECT_TIMEOUT", 0.2)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(server.socket))
        listener.listen()
        with raises(errno.ETIMEDOUT, "the server does not answer"):
            open_leaf(f"nbd+unix:///?socket={server.socket}")


def test_an_unknown_export_is_refused(server, tmp_path):
    (tmp_path / "known").write_bytes(bytes(4096))
    uri = server.start("file", f"dir={tmp_path}")
    open_leaf(uri.replace("///", "///known")).close()
    with raises(errno.ENOENT, "no connection"):
        open_leaf(uri.replace("///", "///unknown"))


def test_a_machine_without_libnbd_says_what_to_install(monkeypatch):
    def refuse(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with raises(errno.ENOPKG, "package python3-libnbd"):
        open_leaf("nbd://localhost/")


def test_a_server_that_only_lets_read_is_refused_for_writing(server):
    uri = server.start("-r", "memory", "1M")
    with raises(errno.EACCES, "the server permits reading only"):
        open_leaf(uri)
    leaf = open_leaf(uri, readonly=True)
    assert read(leaf, 0, 512) == bytes(512)
    for change in (
        lambda: leaf.pwritev([memoryview(b"y" * 512)], 0),
        lambda: leaf.discard(0, 512),
        lambda: leaf.write_zeroes(0, 512),
    ):
        with raises(errno.EROFS, "opened for reading only"):
            change()
    with raises(errno.EACCES, "the server permits reading only"):
        leaf.make_writable()
    leaf.flush()
    leaf.close()


def test_a_reader_and_then_a_writer_share_one_leaf(server):
    uri = server.start("memory", "1M")
    leaves = Leaves()
    reader = leaves.open(uri, readonly=True)
    assert leaves.open(uri) is reader
    reader.pwritev([memoryview(b"y" * 512)], 0)
    assert read(reader, 0, 512) == b"y" * 512
    leaves.close()


def test_an_export_is_told_from_others_by_its_uri(server):
    uri = server.start("memory", "1M")
    relative = f"NBD+UNIX:///?socket={server.socket.name}"
    assert leaf_identity(relative, str(server.folder)) == leaf_identity(uri)
    assert leaf_identity(uri) != leaf_identity(uri.replace("///", "///x"))
    leaf = open_leaf(relative, cwd=str(server.folder))
    assert leaf.table_name == uri
    leaf.close()


def test_sizes_that_are_not_whole_sectors_are_rounded_down(server):
    leaf = open_leaf(server.start("memory", "1000"))
    assert leaf.size == 512
    leaf.close()


def test_an_export_that_grew_is_seen_after_a_refresh(server, tmp_path):
    path = tmp_path / "a.img"
    path.write_bytes(bytes(4096))
    leaf = open_leaf(server.start("file", str(path)))
    os.truncate(path, 8192)
    leaf.refresh()
    assert leaf.size == 8192
    assert read(leaf, 4096, 4096) == bytes(4096)
    leaf.close()


# Secrets.


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("nbd://bob@host:1/exp", "nbd://host:1/exp"),
        ("nbds://bob:pw@host/exp?tls-psk-file=/key", "nbds://host/exp"),
        ("nbds+unix://bob@/e?tls-certificates=/c&socket=/s", "nbds+unix:///e?socket=/s"),
    ],
)
def test_its_name_is_its_place_without_who_asks_and_key_files(uri, name):
    assert remote_module._public_name(uri) == name


def test_errors_do_not_repeat_what_may_be_secret():
    for uri in (
        "nbd://hush:hush@localhost:1/?tls-psk-file=/hush",
        "nbds+unix://hush@/?socket=/nowhere&tls-psk-file=/hush",
        "nbd://hush@bad host/?hush=hush",
    ):
        with pytest.raises(OSError) as info:
            open_leaf(uri)
        assert "hush" not in str(info.value)
        assert "hush" not in str(info.value.device)


def test_relative_paths_of_a_uri_begin_in_the_users_folder():
    uri = "nbds+unix://a@/e?socket=x%20y&tls-psk-file=../k&tls-certificates=/c&other=z"
    assert absolute_uri(uri, "/d") == (
        "nbds+unix://a@/e?socket=/d/x%20y&tls-psk-file=/d/../k&tls-certificates=/c&other=z"
    )


def test_a_connection_with_a_shared_key_is_encrypted(server):
    key = server.folder / "key"
    key.touch(0o600)
    key.write_text("alice:" + "0123456789abcdef" * 2 + "\n")
    uri = server.start("--tls=require", f"--tls-psk={key}", "memory", "1M")
    with pytest.raises(OSError):
        open_leaf(uri)
    secure = uri.replace("nbd+unix:///", "nbds+unix://alice@/") + "&tls-psk-file=key"
    leaf = open_leaf(secure, cwd=str(server.folder))
    leaf.pwritev([memoryview(b"y" * 512)], 0)
    assert read(leaf, 0, 512) == b"y" * 512
    leaf.close()


# Requests.


def test_threads_use_several_connections_at_once(server):
    leaf = open_leaf(server.start("--filter=delay", "memory", "1M", "rdelay=200ms"))
    threads = [threading.Thread(target=read, args=(leaf, n * 512, 512)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(leaf._idle) == 4
    leaf.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.ENOMEM, errno.EPERM])
def test_errors_of_the_server_keep_their_number(server, code):
    name = errno.errorcode[code]
    uri = server.start(
        "--filter=error", "memory", "1M", f"error={name}", "error-rate=100%", "error-pread-rate=0"
    )
    leaf = open_leaf(uri)
    with raises(code, "write at byte 512: "):
        leaf.pwritev([memoryview(b"y" * 512)], 512)
    assert read(leaf, 0, 512) == bytes(512)
    leaf.close()


def test_an_error_tells_device_and_offset(server):
    leaf = open_leaf(server.start("--filter=error", "memory", "1M", "error-pread-rate=100%"))
    with pytest.raises(OSError) as info:
        read(leaf, 1024, 512)
    assert (info.value.device, info.value.offset) == (leaf.name, 1024)
    leaf.close()


def test_holes_and_zeroes_are_told_by_extents(server, tmp_path):
    path = tmp_path / "a.img"
    with open(path, "wb") as file:
        file.truncate(4 * MIB)
        file.seek(MIB)
        file.write(b"x" * MIB)
    leaf = open_leaf(server.start("file", str(path)))
    assert list(leaf.extents(0, 4 * MIB)) == [
        Extent(0, MIB, HOLE),
        Extent(MIB, MIB, DATA),
        Extent(2 * MIB, 2 * MIB, HOLE),
    ]
    assert list(leaf.extents(MIB - 512, 1024)) == [
        Extent(MIB - 512, 512, HOLE),
        Extent(MIB, 512, DATA),
    ]
    leaf.close()


def test_a_hole_that_does_not_read_as_zeroes_is_data():
    assert [remote_module._kind(flags) for flags in range(5)] == [DATA, DATA, ZERO, HOLE, DATA]


@pytest.mark.parametrize("may_unmap", [True, False])
def test_zeroes_of_more_than_4_gib_are_complete(server, may_unmap):
    leaf = open_leaf(server.start("memory", "5G"))
    places = [0, (64 * MIB) - 512, (1 << 32) - 512, 1 << 32, (5 << 30) - 512]
    for place in places:
        leaf.pwritev([memoryview(b"x" * 512)], place)
    if may_unmap:
        leaf.write_zeroes(0, 5 << 30)
    else:
        for place in places:
            leaf.write_zeroes(place, 512, may_unmap=False)
    for place in places:
        assert read(leaf, place, 512) == bytes(512)
    leaf.pwritev([memoryview(b"x" * 512)], (1 << 32) - 512)
    leaf.discard(0, 5 << 30)
    assert sum(extent.length for extent in leaf.extents(0, 5 << 30)) == 5 << 30
    leaf.close()


def test_reads_and_writes_longer_than_64_mib_are_cut(server):
    leaf = open_leaf(server.start("memory", "130M"))
    data = memoryview(bytearray(os.urandom(MIB) * 130))
    leaf.pwritev([data], 0)
    found = memoryview(bytearray(130 * MIB))
    leaf.preadv([found[:1000], found[1000:]], 0)
    assert found == data
    leaf.close()


# A server that goes away.


@pytest.fixture
def slow(server):
    """A leaf on a server that takes a minute for a request at byte 0, and is killed meanwhile."""
    uri = server.start("--filter=delay", "memory", "1M", "rdelay=60", "wdelay=60")
    leaf = open_leaf(uri)
    yield leaf
    leaf.close()


def in_background(call):
    """Start a call and return a function that waits and gives its error, or None."""
    errors = []

    def work():
        try:
            call()
            errors.append(None)
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def result():
        thread.join(30)
        assert errors, "the call hangs"
        return errors[0]

    return result


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_write_in_flight_gets_eio_when_the_server_dies(server, slow, monkeypatch):
    # A connection in use may not have sent anything yet: what waits for a reply has.
    sent = threading.Event()
    finish = slow._finish

    def note_and_finish(handle, cookie):
        sent.set()
        finish(handle, cookie)

    monkeypatch.setattr(slow, "_finish", note_and_finish)
    result = in_background(lambda: slow.pwritev([memoryview(b"y" * 512)], 0))
    assert sent.wait(20)
    server.kill()
    error = result()
    assert error.errno == errno.EIO
    assert "write at byte 0: the server is gone" in str(error)


def test_a_read_in_flight_gets_eio_when_the_server_stays_away(server, slow):
    result = in_background(lambda: read(slow, 0, 512))
    wait_until(lambda: slow._in_use == 1)
    server.kill()
    assert result().errno == errno.EIO


def test_a_read_in_flight_is_tried_once_more_when_the_server_is_there_again(server, slow):
    # The name of the socket leads to the next server before the first one dies.
    data = bytearray(b"?" * 512)
    result = in_background(lambda: slow.preadv([memoryview(data)], 0))
    wait_until(lambda: slow._in_use == 1)
    first, server.process = server.process, None
    server.start("memory", "1M")
    first.kill()
    first.wait(30)
    first.stderr.close()
    assert result() is None
    assert data == bytes(512)


def test_later_requests_connect_again(server):
    leaf = open_leaf(server.start("memory", "1M"))
    leaf.pwritev([memoryview(b"y" * 512)], 0)
    leaf.flush()
    server.kill()
    for call in (
        lambda: read(leaf, 0, 512),
        lambda: leaf.pwritev([memoryview(b"y" * 512)], 0),
        lambda: leaf.flush(),
        lambda: leaf.discard(0, 512),
        lambda: leaf.write_zeroes(0, 512),
        lambda: list(leaf.extents(0, 512)),
    ):
        # How long it is left in peace depends on how long it took to find nobody there.
        with raises(errno.EIO, "no connection|did not answer a moment ago"):
            call()
    server.start()
    wait_until(lambda: time.monotonic() >= leaf._quiet_until)
    # Neither of these was in flight when the server died: both find the new one.
    leaf.pwritev([memoryview(b"z" * 512)], 512)
    assert read(leaf, 0, 1024) == bytes(512) + b"z" * 512
    leaf.flush()
    leaf.close()


def test_a_flush_does_not_hide_that_the_server_died_with_unflushed_writes(server):
    leaf = open_leaf(server.start("memory", "1M"))
    leaf.pwritev([memoryview(b"y" * 512)], 0)
    server.kill()
    server.start()
    assert read(leaf, 0, 512) == bytes(512)
    with raises(errno.EIO, "the server was gone and may have lost writes"):
        leaf.flush()
    leaf.flush()
    leaf.pwritev([memoryview(b"y" * 512)], 0, fua=True)
    server.kill()
    server.start()
    leaf.flush()
    leaf.close()


def test_an_export_that_came_back_smaller_is_refused(server):
    leaf = open_leaf(server.start("memory", "1M"))
    server.kill()
    server.start("memory", "512K")
    with raises(errno.EIO, r"came back with 524288 bytes \(expected 1048576\)"):
        read(leaf, 0, 512)
    leaf.close()


def test_an_export_that_came_back_read_only_is_refused(server):
    leaf = open_leaf(server.start("memory", "1M"))
    server.kill()
    server.start("-r", "memory", "1M")
    with raises(errno.EIO, "came back read-only"):
        leaf.pwritev([memoryview(b"y" * 512)], 0)
    leaf.close()


def test_many_threads_survive_a_server_that_dies_again_and_again(server):
    leaf = open_leaf(server.start("memory", "1M"))
    stop = threading.Event()
    failures = []
    done = []

    def work(number):
        try:
            while not stop.is_set():
                try:
                    leaf.pwritev([memoryview(bytes([number]) * 4096)], number * 4096)
                    read(leaf, number * 4096, 4096)
                    done.append(number)
                except OSError as error:
                    assert error.errno == errno.EIO, error
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        before = len(done)
        wait_until(lambda before=before: len(done) > before + 50)
        server.kill()
        server.start()
    before = len(done)
    wait_until(lambda: len(done) > before + 50)
    stop.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a thread hangs"
    assert not failures
    assert leaf._in_use == 0
    leaf.close()


def test_a_server_that_stops_answering_is_given_up(monkeypatch, server, slow):
    monkeypatch.setattr(remote_module, "_REQUEST_TIMEOUT", 0.2)
    with raises(errno.EIO, "read at byte 0: the server is gone .no answer in 0.2 s"):
        read(slow, 0, 512)
    assert slow._in_use == 0
    assert not slow._idle


def test_a_closed_leaf_says_so(server):
    leaf = open_leaf(server.start("memory", "1M"))
    leaf.close()
    leaf.close()
    with raises(errno.EBADF, "closed"):
        read(leaf, 0, 512)


def test_closing_leaves_no_descriptor_open(server):
    uri = server.start("memory", "1M")
    before = len(os.listdir("/proc/self/fd"))
    leaf = open_leaf(uri)
    leaf.pwritev([memoryview(b"y" * 512)], 0)
    leaf.refresh()
    leaf.close()
    del leaf
    assert len(os.listdir("/proc/self/fd")) == before


def test_requests_leave_nothing_behind(server):
    leaf = open_leaf(server.start("memory", "1M"))
    data = memoryview(bytearray(4096))
    for _ in range(2):
        gc.collect()
        before = len(gc.get_objects())
        for _ in range(200):
            leaf.preadv([data], 0)
            leaf.pwritev([data], 0)
        gc.collect()
        grown = len(gc.get_objects()) - before
    assert grown < 50
    leaf.close()
