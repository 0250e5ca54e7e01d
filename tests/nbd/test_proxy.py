"""dmpy.serve(): the devices of this very process, served while tables change and legs fail."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import dmpy
from dmpy.backing import Leaves
from dmpy.device import BlockSize, total
from dmpy.testing import Fault, FaultyDevice
from tests import needs
from tests.nbd.conftest import FIO, MIB, ROOT

pytest.importorskip("nbd", reason="the Python module nbd is missing (package python3-libnbd)")
import nbd


@pytest.fixture
def dm():
    """A mapper."""
    with dmpy.Mapper() as mapper:
        yield mapper


@pytest.fixture
def served(dm):
    """The mapper, served."""
    needs.nbdkit_plugin("python")
    with dmpy.serve(dm) as served:
        yield served


def _connect(served, name=""):
    handle = nbd.NBD()
    handle.set_strict_mode(0)
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    handle.connect_uri(served.uri(name))
    return handle


def test_every_request_reaches_the_device(dm, served):
    device = dm.create("r 0", "0 8192 linear mem:4M 0")
    handle = _connect(served, "r 0")
    assert handle.get_size() == 4 * MIB
    handle.pwrite(b"\1" * 100_000, 5000, nbd.CMD_FLAG_FUA)
    view = memoryview(bytearray(100_000))
    device.preadv([view], 5000)
    assert view == b"\1" * 100_000 == handle.pread(100_000, 5000)
    handle.zero(50_000, 5000)
    handle.trim(4096, 2 * MIB)
    handle.flush()
    handle.cache(4096, 0)
    assert handle.pread(60_000, 5000) == bytes(50_000) + b"\1" * 10_000
    found = []
    handle.block_status(4 * MIB, 0, lambda _, o, e, error: found.extend(e) or 0)
    assert sum(found[::2]) == 4 * MIB and 3 in found[1::2]
    assert device.stats.writes == 1 and device.stats.discards == 1


def test_errno_of_a_failing_device_reaches_the_client(dm, served):
    dm.create("bad", "0 8 zero\n8 8 error")
    dm.create("full", "0 8192 linear mem:4M 0", readonly=True)
    with pytest.raises(nbd.Error) as caught:
        _connect(served, "bad").pread(512, 4096)
    assert caught.value.errno == "EIO"
    with pytest.raises(nbd.Error):
        _connect(served, "full").pwrite(bytes(512), 0)
    assert "[EIO] bad: read of 512 bytes at byte 4096" in served.log


class _FaultyLeaves(Leaves):
    """Opens leaves that fail when the test says so."""

    def open(self, word, **options):
        self.made = FaultyDevice(super().open(word, **options))
        return self.made

    def release(self, device):
        super().release(device.device)


def test_a_leg_that_fails_once_fails_one_request(images):
    leaves = _FaultyLeaves()
    with dmpy.Mapper(leaves=leaves) as dm, dmpy.serve(dm) as served:
        dm.create("r0", f"0 2048 linear {images(MIB)[0]} 0")
        handle = _connect(served)
        handle.pwrite(b"\1" * 512, 0)
        leaves.made.fault = Fault(1, error=errno.ENOSPC)
        with pytest.raises(nbd.Error) as caught:
            handle.pwrite(bytes(512), 0)
        assert caught.value.errno == "ENOSPC"
        assert handle.pread(512, 0) == b"\1" * 512


class _BlockLeaf(FaultyDevice):
    """Blocks of 4096 bytes and nothing else."""

    def __init__(self, device):
        super().__init__(device)
        self.block_size = BlockSize(4096, 4096, 65536)

    def preadv(self, buffers, offset):
        assert offset % 4096 == 0 and total(buffers) % 4096 == 0
        super().preadv(buffers, offset)
        time.sleep(0.0002)  # so that writers who do not exclude each other meet

    def pwritev(self, buffers, offset, *, fua=False):
        assert offset % 4096 == 0 and total(buffers) % 4096 == 0
        super().pwritev(buffers, offset, fua=fua)


class _BlockLeaves(_FaultyLeaves):
    """Files whose name begins with b have blocks."""

    def open(self, word, **options):
        faulty = super().open(word, **options)
        if os.path.basename(word).startswith("b"):
            return _BlockLeaf(faulty.device)
        return faulty


def test_parts_of_blocks_written_through_several_connections_all_arrive(images):
    """Each has its own connection to this process: the exclusion has to be here."""
    _, path = images(MIB, MIB)
    with dmpy.Mapper(leaves=_BlockLeaves()) as dm, dmpy.serve(dm) as served:
        dm.create("r0", f"0 2048 linear {path} 0")
        handles = [_connect(served) for _ in range(8)]
        assert handles[0].get_block_size(nbd.SIZE_MINIMUM) == 4096
        for turn in range(30):
            for part, handle in enumerate(handles):
                data = bytearray([turn + part * 30]) * 512
                handle.aio_pwrite(nbd.Buffer.from_bytearray(data), part * 512)
            for handle in handles:
                while handle.aio_in_flight():
                    handle.poll(-1)
            expected = b"".join(bytes([turn + part * 30]) * 512 for part in range(8))
            assert handles[0].pread(4096, 0) == expected


def test_requests_fit_a_table_that_was_loaded_after_the_client_came(images):
    """The client was told that any byte may be written, and the new leg has blocks."""
    a, b = images(MIB, MIB)
    with dmpy.Mapper(leaves=_BlockLeaves()) as dm, dmpy.serve(dm) as served:
        dm.create("r0", f"0 2048 linear {a} 0")
        handle = _connect(served)
        handle.pwrite(b"\1" * 100, 1000)
        dm.load("r0", f"0 2048 linear {b} 0")
        dm.resume("r0")
        handle.pwrite(b"\2" * 100, 1000)
        handle.zero(50, 1000)
        assert handle.pread(200, 950) == bytes(100) + b"\2" * 50 + bytes(50)
        assert b.read_bytes()[1050:1100] == b"\2" * 50


def test_a_fragmented_device_is_described_whole(dm, served):
    dm.create("r0", "0 262144 linear mem:128M 0")
    handle = _connect(served)
    for place in range(0, 100 * MIB, 8192):
        handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"\1" * 4096)), place)
        while handle.aio_in_flight() > 32:
            handle.poll(-1)
    while handle.aio_in_flight():
        handle.poll(-1)
    found, offset = [], 0
    while offset < 128 * MIB:
        part = []
        handle.block_status(
            128 * MIB - offset, offset, lambda _, o, e, error, part=part: part.extend(e) or 0
        )
        found += zip(part[::2], part[1::2], strict=True)
        offset += sum(part[::2])
    holes = sum(size for size, kind in found if kind)
    assert sum(size for size, kind in found if not kind) == 50 * MIB and holes == 78 * MIB


def test_exports_are_listed_with_what_they_are(dm, served, run):
    dm.create("a", "0 8 zero")
    dm.create("b", "0 8 error\n8 8 zero")
    output = run("nbdinfo", "--list", served.uri())
    assert "description: 0 8 zero" in output
    assert "description: 2 lines of error, zero" in output


def test_a_client_counts_as_an_opener_until_it_has_gone(dm, served):
    device = dm.create("r0", "0 8 zero")
    handle = _connect(served)
    assert device.open_count == 1
    del handle
    gc.collect()
    end = time.monotonic() + 10
    while device.open_count and time.monotonic() < end:
        time.sleep(0.01)
    dm.remove("r0")
    with pytest.raises(nbd.Error):
        _connect(served, "r0")


def test_requests_wait_while_the_device_is_suspended(dm, served):
    dm.create("r0", "0 2048 linear mem:1M 0")
    handle = _connect(served)
    dm.suspend("r0")
    done = []
    handle.aio_pwrite(nbd.Buffer(4096), 0, completion=lambda e: done.append(e.value) or 1)
    handle.poll(200)
    assert not done
    dm.load("r0", "0 2048 zero")
    dm.resume("r0")
    while not done:
        assert handle.poll(5000) == 1
    assert done == [0]


def test_closing_while_a_request_waits_does_not_hang(dm):
    dm.create("r0", "0 2048 linear mem:1M 0")
    with dmpy.serve(dm) as served:
        handle = _connect(served)
        dm.suspend("r0")
        handle.aio_pread(nbd.Buffer(512), 0)
        handle.poll(100)
        begin = time.monotonic()
    assert time.monotonic() - begin < 10
    dm.resume("r0")
    assert handle


def test_nothing_is_left_after_closing(dm):
    with dmpy.serve(dm) as served:
        folder = os.path.dirname(served.socket)
        pid = served._process.pid
        assert os.path.exists(served.socket)
    assert not os.path.exists(folder)
    assert not os.path.exists(f"/proc/{pid}")
    assert not [thread for thread in threading.enumerate() if thread.name == "serve"]


def test_nbdkit_ends_with_the_program_that_serves():
    """Even when that is killed."""
    script = (
        "import dmpy, time\n"
        "with dmpy.Mapper() as dm, dmpy.serve(dm) as served:\n"
        " dm.create('r0', '0 8 zero')\n"
        " print(served._process.pid, served.uri(), flush=True)\n"
        " time.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    pid, uri = child.stdout.readline().split()
    handle = nbd.NBD()
    handle.connect_uri(uri)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    end = time.monotonic() + 15
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < end:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{pid}")


def test_a_missing_nbdkit_is_told_in_one_sentence(dm, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(OSError, match="nbdkit is not installed"):
        dmpy.serve(dm)


def test_fio_verifies_while_the_device_moves_to_another_leg(dm, served, images):
    """load, suspend, copy, resume: four connections do not lose a byte, and none sees an error."""
    old, new = images(32 * MIB, 32 * MIB)
    dm.create("r0", f"0 65536 linear {old} 0")
    fio = subprocess.Popen(
        [
            needs.tool("fio"), *FIO, f"--uri={served.uri()}", "--rw=randrw", "--numjobs=4",
            "--size=8M", "--offset_increment=8M", "--time_based", "--runtime=3",
            "--verify_backlog=64",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    end = time.monotonic() + 20
    while not dm.device("r0").stats.writes and time.monotonic() < end:
        time.sleep(0.01)
    moves = 0
    here, there = old, new
    while fio.poll() is None and moves < 6:
        time.sleep(0.2)
        dm.load("r0", f"0 65536 linear {there} 0")
        dm.suspend("r0")
        there.write_bytes(here.read_bytes())
        dm.resume("r0")
        here, there = there, here
        moves += 1
    output, _ = fio.communicate(timeout=60)
    assert fio.returncode == 0 and "err= 0" in output and "verify:" not in output, output
    assert moves >= 3
    assert dm.device("r0").stats.errors == 0
