"""Regular files as leaves."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from dmpy.backing import file as file_module
from dmpy.backing import leaf_identity, open_leaf
from dmpy.device import DATA, HOLE, Extent, slices, total
from dmpy.testing.conformance import LeafTests
from tests import needs

MIB = 1 << 20


class FileTests(LeafTests):
    """The conformance suite on a file."""

    def build(self, folder):
        with open(folder / "a.img", "wb") as file:
            file.truncate(self.size)
        return self.reopen(folder)

    def reopen(self, folder):
        return open_leaf("a.img", cwd=str(folder))


class TestFileOnTheTemporaryFileSystem(FileTests):
    """Whatever pytest's folder lies on: ext4 as a rule."""


class TestFileInMemory(FileTests):
    """tmpfs, which has no ZERO_RANGE."""

    fast_zeroes = True

    def build(self, folder):
        self.place = f"/dev/shm/dmpy-test-{os.getpid()}-{id(self)}.img"
        needs.path("/dev/shm", why="a tmpfs")
        with open(self.place, "wb") as file:
            file.truncate(self.size)
        return self.reopen(folder)

    def reopen(self, folder):
        return open_leaf(self.place)

    @pytest.fixture(autouse=True)
    def _no_file_is_left(self, _leaf):
        yield
        os.unlink(self.place)


class TestFileOnAFileSystemWithoutHoles(FileTests):
    """All zeroes have to be written."""

    fast_zeroes = False

    @pytest.fixture(autouse=True)
    def _no_fallocate(self, monkeypatch):
        def refuse(*_):
            ctypes.set_errno(errno.EOPNOTSUPP)
            return -1

        monkeypatch.setattr(file_module, "_fallocate", refuse)


class TestFileWithShortTransfers(FileTests):
    """A kernel that moves at most 50,001 bytes a call, as signals and network file systems do."""

    @pytest.fixture(autouse=True)
    def _short(self, monkeypatch, _leaf):
        def cut(buffers):
            if len(buffers) > 1024:
                raise OSError(errno.EINVAL, "too many")
            return slices(buffers, 0, min(total(buffers), 50_001))

        preadv, pwritev = os.preadv, os.pwritev
        monkeypatch.setattr(file_module, "_preadv", lambda fd, b, o: preadv(fd, cut(b), o))
        monkeypatch.setattr(
            file_module, "_pwritev", lambda fd, b, o, flags=0: pwritev(fd, cut(b), o, flags)
        )


def make(path, size=MIB, byte=b"x"):
    path.write_bytes(byte * size)
    return str(path)


def read(leaf, offset, length):
    data = bytearray(length)
    leaf.preadv([memoryview(data)], offset)
    return bytes(data)


@contextmanager
def raises(code, match):
    """Expect an OSError of that errno whose sentence holds the words."""
    with pytest.raises(OSError, match=match) as info:
        yield
    assert info.value.errno == code, info.value


# What open_leaf says to words that name no disk.


def test_a_missing_file_is_named(tmp_path):
    with raises(errno.ENOENT, "^gone.img: no such file or directory$"):
        open_leaf("gone.img", cwd=str(tmp_path))


def test_a_dangling_link_names_what_is_missing(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    with raises(errno.ENOENT, "^link: a symbolic link to nowhere, which does not exist$"):
        open_leaf("link", cwd=str(tmp_path))


def test_a_folder_is_refused(tmp_path):
    with raises(errno.EISDIR, "a folder, not a disk"):
        open_leaf(str(tmp_path))


def test_a_character_device_is_refused():
    with raises(errno.ENOTBLK, "^/dev/zero: a character device, neither"):
        open_leaf("/dev/zero")


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with raises(errno.ENOTBLK, "a pipe, neither"):
        open_leaf("pipe", cwd=str(tmp_path))


@pytest.mark.parametrize("word", ["", "a\0b", "\ud800"])
def test_what_cannot_be_a_path_is_refused(word):
    with raises(errno.EINVAL, "not a path"):
        open_leaf(word)


def test_an_unknown_scheme_is_refused():
    with raises(errno.EINVAL, "scheme is none of nbd, .*got http"):
        open_leaf("http://example.org/a.img")


def test_a_device_number_without_a_device_is_refused():
    with raises(errno.ENXIO, "^4095:1048575: no block device of that number$"):
        open_leaf("4095:1048575")


def test_a_file_that_permits_reading_only_is_refused_for_writing(tmp_path):
    path = make(tmp_path / "a.img")
    os.chmod(path, 0o444)
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[2])\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "from dmpy.backing import open_leaf\n"
        "open_leaf(sys.argv[1], readonly=True).close()\n"
        "try: open_leaf(sys.argv[1])\n"
        "except OSError as error: print(error.errno, error)\n"
    )
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.owner() != "root" or folder.stat().st_mode & stat.S_IXOTH == 0:
            os.chmod(folder, folder.stat().st_mode | stat.S_IXOTH)
        if folder.name.startswith("pytest-of"):
            break
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    words = [sys.executable, "-c", script, path, root]
    answer = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True)
    assert answer.stdout == f"{errno.EACCES} {path}: permits reading only\n"


def test_a_file_on_a_read_only_file_system_is_refused_for_writing(mounted):
    path = make(mounted("tmpfs", "size=1m") / "a.img", 4096)
    subprocess.run(["mount", "-o", "remount,ro", os.path.dirname(path)], check=True, timeout=30)
    with raises(errno.EROFS, "read-only file system"):
        open_leaf(path)
    leaf = open_leaf(path, readonly=True)
    assert read(leaf, 0, 4096) == b"x" * 4096
    leaf.close()


# Names.


def test_its_names_are_the_word_and_the_absolute_path(tmp_path):
    make(tmp_path / "a.img")
    leaf = open_leaf("./a.img", cwd=str(tmp_path))
    assert leaf.name == "./a.img"
    assert leaf.table_name == f"{tmp_path}/a.img"
    leaf.close()


def test_blanks_and_backslashes_are_quoted_in_its_table_name(tmp_path):
    make(tmp_path / "a b\\c.img")
    leaf = open_leaf("a b\\c.img", cwd=str(tmp_path))
    assert leaf.table_name == f"{tmp_path}/a\\ b\\\\c.img"
    leaf.close()


def test_a_parent_folder_is_the_one_behind_a_link(tmp_path):
    """`link/../a.img` is beside what the link leads to, not beside the link."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to("deep/er")
    make(tmp_path / "deep" / "a.img", 1024)
    leaf = open_leaf("link/../a.img", cwd=str(tmp_path))
    assert leaf.size == 1024
    leaf.close()


def test_names_of_one_file_have_one_identity(tmp_path):
    path = make(tmp_path / "a.img")
    os.link(path, tmp_path / "hard")
    (tmp_path / "soft").symlink_to(path)
    identities = {leaf_identity(word, str(tmp_path)) for word in ("a.img", "hard", "soft", path)}
    assert len(identities) == 1
    leaf = open_leaf(path)
    assert leaf.identity in identities
    leaf.close()


# Size.


def test_its_size_is_whole_sectors(tmp_path):
    leaf = open_leaf(make(tmp_path / "a.img", 1000))
    assert leaf.size == 512
    leaf.close()


def test_a_file_that_grew_is_seen_after_a_refresh(tmp_path):
    path = make(tmp_path / "a.img", 4096)
    leaf = open_leaf(path)
    os.truncate(path, 8192)
    assert leaf.size == 4096
    leaf.refresh()
    assert leaf.size == 8192
    leaf.close()


# A file cut short while it is in use.


@pytest.fixture
def cut(tmp_path):
    path = make(tmp_path / "a.img")
    leaf = open_leaf(path)
    os.truncate(path, 300_000)
    yield leaf
    assert os.path.getsize(path) == 300_000
    leaf.close()


def test_reads_beyond_the_new_end_fail_and_others_go_on(cut):
    for offset, length in [(300_000, 1), (299_999, 2), (MIB - 512, 512), (0, MIB)]:
        with raises(errno.EIO, f"read of {length} bytes at byte {offset}: the file now ends"):
            read(cut, offset, length)
    assert read(cut, 0, 300_000) == b"x" * 300_000


def test_a_failed_read_tells_device_and_offset(cut):
    with pytest.raises(OSError) as info:
        read(cut, 512_000, 512)
    assert (info.value.device, info.value.offset) == (cut.name, 512_000)


@pytest.mark.parametrize("fua", [False, True])
def test_writes_beyond_the_new_end_fail_and_do_not_make_the_file_longer(cut, fua):
    for offset, length in [(300_000, 1), (299_999, 2), (MIB - 512, 512)]:
        with raises(errno.EIO, "the file now ends at byte 300000"):
            cut.pwritev([memoryview(b"y" * length)], offset, fua=fua)
    cut.pwritev([memoryview(b"y" * 512)], 299_488, fua=fua)
    assert read(cut, 299_400, 600) == b"x" * 88 + b"y" * 512
    cut.flush()


@pytest.mark.parametrize("may_unmap", [False, True])
def test_zeroes_and_discards_beyond_the_new_end_fail(cut, may_unmap):
    with raises(errno.EIO, "the file now ends"):
        cut.write_zeroes(299_999, 512, may_unmap=may_unmap)
    with raises(errno.EIO, "the file now ends"):
        cut.discard(299_999, 512)
    assert read(cut, 299_999, 1) == b"x"


def test_what_is_cut_off_is_no_hole(cut):
    assert list(cut.extents(0, MIB))[-1].kind == DATA
    assert list(cut.extents(400_000, 1000)) == [Extent(400_000, 1000, DATA)]


def test_a_file_that_was_deleted_goes_on_until_it_is_closed(tmp_path):
    path = make(tmp_path / "a.img")
    leaf = open_leaf(path)
    os.unlink(path)
    leaf.pwritev([memoryview(b"y" * 512)], 0)
    assert read(leaf, 0, 513) == b"y" * 512 + b"x"
    leaf.close()


# Reading only.


def test_a_read_only_leaf_refuses_every_change(tmp_path):
    leaf = open_leaf(make(tmp_path / "a.img"), readonly=True)
    assert leaf.readonly
    for change in (
        lambda: leaf.pwritev([memoryview(b"y" * 512)], 0),
        lambda: leaf.pwritev([memoryview(b"y" * 512)], 0, fua=True),
        lambda: leaf.discard(0, 512),
        lambda: leaf.write_zeroes(0, 512),
    ):
        with raises(errno.EROFS, "opened for reading only"):
            change()
    leaf.flush()
    assert read(leaf, 0, MIB) == b"x" * MIB
    leaf.close()


def test_a_read_only_leaf_becomes_writable_under_reads(tmp_path):
    leaf = open_leaf(make(tmp_path / "a.img"), readonly=True)
    failures = []
    stop = threading.Event()

    def reader():
        try:
            while not stop.is_set():
                assert read(leaf, 0, 4096) == b"x" * 4096
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=reader)
    thread.start()
    leaf.make_writable()
    leaf.pwritev([memoryview(b"y" * 512)], 8192)
    stop.set()
    thread.join()
    assert not failures
    assert not leaf.readonly
    assert read(leaf, 8192, 513) == b"y" * 512 + b"x"
    leaf.close()


def test_a_leaf_that_became_writable_gives_back_every_descriptor(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    leaf = open_leaf(make(tmp_path / "a.img"), readonly=True)
    leaf.make_writable()
    leaf.close()
    leaf.close()
    assert len(os.listdir("/proc/self/fd")) == before


# Locks.


def try_lock(path, kind):
    """Whether another open file description gets the lock."""
    with open(path, "rb") as other:
        try:
            fcntl.flock(other, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_a_writable_file_is_locked_against_everybody(tmp_path):
    path = make(tmp_path / "a.img")
    leaf = open_leaf(path)
    assert not try_lock(path, fcntl.LOCK_SH)
    with raises(errno.EBUSY, "in use by another process"):
        open_leaf(path)
    with raises(errno.EBUSY, "in use by another process"):
        open_leaf(path, readonly=True)
    leaf.close()
    assert try_lock(path, fcntl.LOCK_EX)


def test_a_read_only_file_is_locked_against_writers(tmp_path):
    path = make(tmp_path / "a.img")
    leaf = open_leaf(path, readonly=True)
    assert try_lock(path, fcntl.LOCK_SH)
    assert not try_lock(path, fcntl.LOCK_EX)
    open_leaf(path, readonly=True).close()
    with raises(errno.EBUSY, "in use by another process"):
        open_leaf(path)
    leaf.close()


def test_a_leaf_that_became_writable_is_locked_against_readers(tmp_path):
    path = make(tmp_path / "a.img")
    leaf = open_leaf(path, readonly=True)
    leaf.make_writable()
    assert not try_lock(path, fcntl.LOCK_SH)
    leaf.close()
    assert try_lock(path, fcntl.LOCK_EX)


def test_a_leaf_that_may_not_become_writable_stays_as_it_was(tmp_path):
    path = make(tmp_path / "a.img")
    leaf = open_leaf(path, readonly=True)
    other = open_leaf(path, readonly=True)
    with raises(errno.EBUSY, "in use by another process"):
        leaf.make_writable()
    other.close()
    assert leaf.readonly
    assert not try_lock(path, fcntl.LOCK_EX)
    assert try_lock(path, fcntl.LOCK_SH)
    assert read(leaf, 0, 1) == b"x"
    leaf.close()


def test_a_file_system_without_locks_is_fine(tmp_path, monkeypatch):
    def refuse(fd, how):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(file_module.fcntl, "flock", refuse)
    open_leaf(make(tmp_path / "a.img")).close()


# A full file system, and failing flushes.


def test_a_full_file_system_is_told_apart_from_a_broken_one(mounted):
    path = mounted("tmpfs", "size=1m") / "a.img"
    with open(path, "wb") as file:
        file.truncate(4 * MIB)
    leaf = open_leaf(str(path))
    with raises(errno.ENOSPC, "no space left on device"):
        leaf.pwritev([memoryview(b"y" * (2 * MIB))], 0)
    with raises(errno.ENOSPC, "no space left on device"):
        leaf.pwritev([memoryview(b"y" * 4096)], 3 * MIB, fua=True)
    leaf.flush()
    leaf.write_zeroes(0, 4 * MIB)
    with raises(errno.ENOSPC, "no space left on device"):
        leaf.write_zeroes(0, 4 * MIB, may_unmap=False)
    leaf.pwritev([memoryview(b"y" * 4096)], 3 * MIB)
    assert read(leaf, 3 * MIB, 4096) == b"y" * 4096
    leaf.close()


def failing(code, times=1):
    """A system call that fails some times and then does nothing."""
    left = [times]

    def call(*_):
        if left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        return 512

    return call


def test_a_flush_that_failed_is_not_forgotten_until_the_file_is_opened_anew(tmp_path, monkeypatch):
    path = make(tmp_path / "a.img")
    leaf = open_leaf(path)
    monkeypatch.setattr(file_module.os, "fdatasync", failing(errno.EIO))
    with raises(errno.EIO, "^.*a.img: flush: input/output error$"):
        leaf.flush()
    for _ in range(2):
        with raises(errno.EIO, "an earlier flush lost writes"):
            leaf.flush()
    leaf.close()
    leaf = open_leaf(path)
    leaf.flush()
    leaf.close()


def test_a_durable_write_that_failed_counts_as_a_failed_flush(tmp_path, monkeypatch):
    leaf = open_leaf(make(tmp_path / "a.img"))
    monkeypatch.setattr(file_module, "_pwritev", failing(errno.EIO))
    with raises(errno.EIO, "write of 512 bytes: input/output error"):
        leaf.pwritev([memoryview(b"y" * 512)], 0, fua=True)
    with raises(errno.EIO, "an earlier flush lost writes"):
        leaf.flush()
    leaf.close()


def test_a_plain_write_that_failed_leaves_flushes_alone(tmp_path, monkeypatch):
    leaf = open_leaf(make(tmp_path / "a.img"))
    monkeypatch.setattr(file_module, "_pwritev", failing(errno.EIO))
    with raises(errno.EIO, "write of 512 bytes: input/output error"):
        leaf.pwritev([memoryview(b"y" * 512)], 0)
    leaf.flush()
    leaf.close()


def test_durable_writes_work_where_the_file_system_has_no_flag_for_them(tmp_path, monkeypatch):
    leaf = open_leaf(make(tmp_path / "a.img"))
    flushes = []
    pwritev = os.pwritev

    def without_flag(fd, buffers, offset, flags=0):
        if flags:
            raise OSError(errno.EOPNOTSUPP, "no flags")
        return pwritev(fd, buffers, offset)

    monkeypatch.setattr(file_module, "_pwritev", without_flag)
    monkeypatch.setattr(file_module.os, "fdatasync", flushes.append)
    for number in (1, 2):
        leaf.pwritev([memoryview(b"y" * 512)], 512, fua=True)
        assert len(flushes) == number
    assert read(leaf, 511, 514) == b"x" + b"y" * 512 + b"x"
    leaf.close()


def test_a_durable_write_is_one_call_with_the_flag(tmp_path, monkeypatch):
    leaf = open_leaf(make(tmp_path / "a.img"))
    calls = []
    pwritev = os.pwritev

    def record(fd, buffers, offset, flags=0):
        calls.append(flags)
        return pwritev(fd, buffers, offset, flags)

    monkeypatch.setattr(file_module, "_pwritev", record)
    leaf.pwritev([memoryview(b"y" * 512)] * 3, 0, fua=True)
    leaf.pwritev([memoryview(b"y" * 512)] * 3, 0)
    assert calls == [os.RWF_DSYNC, 0]
    leaf.close()


# Holes.


def test_holes_are_told_by_extents(tmp_path):
    path = tmp_path / "a.img"
    with open(path, "wb") as file:
        file.truncate(4 * MIB)
        file.seek(MIB)
        file.write(b"x" * MIB)
    leaf = open_leaf(str(path))
    if list(leaf.extents(0, 4096)) == [Extent(0, 4096, DATA)]:
        needs.missing("the file system has no holes")
    assert list(leaf.extents(0, 4 * MIB)) == [
        Extent(0, MIB, HOLE),
        Extent(MIB, MIB, DATA),
        Extent(2 * MIB, 2 * MIB, HOLE),
    ]
    assert list(leaf.extents(MIB + 5, 10)) == [Extent(MIB + 5, 10, DATA)]
    assert list(leaf.extents(MIB - 5, 10)) == [Extent(MIB - 5, 5, HOLE), Extent(MIB, 5, DATA)]
    assert list(leaf.extents(3 * MIB, MIB)) == [Extent(3 * MIB, MIB, HOLE)]
    assert list(leaf.extents(0, 0)) == []
    leaf.close()


def test_a_discard_gives_the_room_back(tmp_path):
    path = make(tmp_path / "a.img")
    leaf = open_leaf(path)
    before = os.stat(path).st_blocks
    leaf.discard(0, MIB)
    assert os.stat(path).st_blocks < before
    assert os.path.getsize(path) == MIB
    assert read(leaf, 0, MIB) == bytes(MIB)
    leaf.close()


def test_zeroes_that_may_not_be_a_hole_keep_the_room(tmp_path):
    path = make(tmp_path / "a.img")
    leaf = open_leaf(path)
    leaf.write_zeroes(0, MIB, may_unmap=False)
    assert os.stat(path).st_blocks >= MIB // 512
    assert read(leaf, 0, MIB) == bytes(MIB)
    leaf.close()


@pytest.mark.parametrize("may_unmap", [True, False])
def test_zeroes_of_more_than_64_mib_are_complete(tmp_path, may_unmap):
    path = tmp_path / "a.img"
    size = 200 * MIB
    with open(path, "wb") as file:
        file.truncate(size)
        for place in range(0, size, 8 * MIB):
            file.seek(place)
            file.write(b"x" * 4096)
    leaf = open_leaf(str(path))
    leaf.write_zeroes(0, size, may_unmap=may_unmap)
    for place in range(0, size, 8 * MIB):
        assert read(leaf, place, 4096) == bytes(4096)
    leaf.close()


def test_zeroes_of_the_largest_request_are_one_call(tmp_path):
    path = tmp_path / "a.img"
    with open(path, "wb") as file:
        file.truncate(1 << 33)
        file.seek((1 << 32) - 1)
        file.write(b"xx")
    leaf = open_leaf(str(path))
    leaf.write_zeroes(0, 1 << 32, fast_only=True)
    assert read(leaf, (1 << 32) - 1, 2) == b"\0x"
    leaf.close()


def test_a_fallocate_broken_off_by_a_signal_is_repeated(tmp_path, monkeypatch):
    leaf = open_leaf(make(tmp_path / "a.img"))
    real = file_module._fallocate
    calls = []

    def interrupted(*words):
        calls.append(words)
        if len(calls) == 1:
            ctypes.set_errno(errno.EINTR)
            return -1
        return real(*words)

    monkeypatch.setattr(file_module, "_fallocate", interrupted)
    leaf.write_zeroes(0, MIB)
    assert len(calls) == 2
    assert read(leaf, 0, MIB) == bytes(MIB)
    leaf.close()


# The end.


def test_a_closed_leaf_says_so(tmp_path):
    leaf = open_leaf(make(tmp_path / "a.img"))
    leaf.close()
    leaf.close()
    for call in (
        lambda: read(leaf, 0, 512),
        lambda: leaf.pwritev([memoryview(b"y")], 0),
        lambda: leaf.pwritev([memoryview(b"y")], 0, fua=True),
        lambda: leaf.flush(),
        lambda: leaf.discard(0, 512),
        lambda: leaf.write_zeroes(0, 512),
    ):
        with raises(errno.EBADF, "a.img: closed"):
            call()


def test_its_descriptor_is_not_inherited(tmp_path):
    leaf = open_leaf(make(tmp_path / "a.img"), readonly=True)
    assert not os.get_inheritable(leaf.fd)
    leaf.make_writable()
    assert not os.get_inheritable(leaf.fd)
    assert not os.get_inheritable(leaf._lock_fd)
    leaf.close()


def test_a_large_read_lets_other_threads_run(tmp_path):
    """The interpreter's lock is released in system calls: a counter goes on during them."""
    path = tmp_path / "a.img"
    with open(path, "wb") as file:
        file.truncate(64 * MIB)
    leaf = open_leaf(str(path))
    count = 0
    stop = threading.Event()

    def counter():
        nonlocal count
        while not stop.is_set():
            count += 1
            time.sleep(0)

    thread = threading.Thread(target=counter)
    thread.start()
    read(leaf, 0, 64 * MIB)
    stop.set()
    thread.join()
    assert count
    leaf.close()
