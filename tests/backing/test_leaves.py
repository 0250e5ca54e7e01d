"""The open leaves of a process, shared and counted."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from dmpy.backing import Leaves
from tests.backing.test_file import make, raises, read


@pytest.fixture
def leaves():
    leaves = Leaves()
    yield leaves
    leaves.close()


def test_two_words_for_one_file_share_one_leaf(tmp_path, leaves):
    path = make(tmp_path / "a.img")
    (tmp_path / "link").symlink_to(path)
    one = leaves.open("a.img", cwd=str(tmp_path))
    assert leaves.open("link", cwd=str(tmp_path)) is one
    assert leaves.open(path) is one


def test_a_leaf_is_closed_after_its_last_user(tmp_path, leaves):
    path = make(tmp_path / "a.img")
    leaf = leaves.open(path)
    leaves.open(path)
    leaves.release(leaf)
    assert read(leaf, 0, 1) == b"x"
    leaves.release(leaf)
    with raises(errno.EBADF, "closed"):
        read(leaf, 0, 1)
    again = leaves.open(path)
    assert again is not leaf
    assert read(again, 0, 1) == b"x"


def test_a_reader_first_and_a_writer_later_share_one_leaf(tmp_path, leaves):
    path = make(tmp_path / "a.img")
    reader = leaves.open(path, readonly=True)
    assert reader.readonly
    writer = leaves.open(path)
    assert writer is reader
    assert not writer.readonly
    writer.pwritev([memoryview(b"y")], 0)


def test_a_writer_first_and_a_reader_later_share_one_leaf(tmp_path, leaves):
    path = make(tmp_path / "a.img")
    assert leaves.open(path, readonly=True) is leaves.open(path, readonly=True)
    assert not leaves.open(path).readonly


def test_a_writer_that_is_refused_leaves_the_reader_alone(tmp_path, leaves):
    path = make(tmp_path / "a.img")
    reader = leaves.open(path, readonly=True)
    other = Leaves()
    other.open(path, readonly=True)
    with raises(errno.EBUSY, "in use by another process"):
        leaves.open(path)
    other.close()
    assert read(reader, 0, 1) == b"x"
    leaves.release(reader)
    with raises(errno.EBADF, "closed"):
        read(reader, 0, 1)


def test_the_leaves_of_two_mappers_keep_each_other_out(tmp_path, leaves):
    path = make(tmp_path / "a.img")
    leaves.open(path)
    with raises(errno.EBUSY, "in use by another process"):
        Leaves().open(path)


def test_a_file_that_grew_is_seen_by_its_next_user(tmp_path, leaves):
    path = make(tmp_path / "a.img", 4096)
    leaf = leaves.open(path)
    os.truncate(path, 8192)
    assert leaves.open(path) is leaf
    assert leaf.size == 8192


def test_a_file_in_place_of_another_is_another_leaf(tmp_path, leaves):
    path = make(tmp_path / "a.img")
    old = leaves.open(path)
    make(tmp_path / "b.img", byte=b"y")
    os.rename(tmp_path / "b.img", path)
    new = leaves.open(path)
    assert new is not old
    assert (read(old, 0, 1), read(new, 0, 1)) == (b"x", b"y")


def test_a_reader_becomes_a_writer_under_another_name_of_the_file(tmp_path, leaves):
    path = make(tmp_path / "a.img")
    leaves.open(path, readonly=True)
    os.rename(path, tmp_path / "b.img")
    leaves.open(str(tmp_path / "b.img")).pwritev([memoryview(b"y")], 0)
    assert (tmp_path / "b.img").read_bytes()[:2] == b"yx"


def test_a_word_that_cannot_be_opened_leaves_nothing_behind(tmp_path, leaves):
    before = len(os.listdir("/proc/self/fd"))
    with raises(errno.ENOENT, "gone"):
        leaves.open("gone", cwd=str(tmp_path))
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_that_open_and_close_one_file_never_lock_each_other_out(tmp_path, leaves):
    path = make(tmp_path / "a.img")
    failures = []

    def work(number):
        try:
            for _ in range(100):
                leaf = leaves.open(path, readonly=number % 2 == 0)
                assert read(leaf, 0, 1) == b"x"
                leaves.release(leaf)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
