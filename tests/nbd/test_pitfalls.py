"""What went wrong in servers made with nbdkit's Python plugin before, each as a test."""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from tests import needs
from tests.nbd.conftest import MIB, ODD_DEVICES, ROOT
from tests.nbd.hangup import connect as connect_by_hand
from tests.nbd.hangup import hang_up_in_flight

pytest.importorskip("nbd", reason="the Python module nbd is missing (package python3-libnbd)")
import nbd


@pytest.mark.parametrize("options", [("-t", "1"), ()], ids=["one thread", "default threads"])
def test_clients_that_hang_up_in_flight_do_not_end_the_server(serve, options):
    """nbdkit 1.32.5: raw_send_socket: Assertion `sock >= 0' failed, with -t 2 and more."""
    server = serve(ODD_DEVICES, options=options)
    rng = random.Random(1)
    for _ in range(150):
        with suppress(OSError, EOFError):
            hang_up_in_flight(server.socket, b"memory", rng)
    assert server.alive(), server.log
    assert server.connect("memory").pread(512, 0) == bytes(512)


def test_zero_of_136_mib_zeroes_all_of_it(odd):
    """nbdkit's emulation of a big zero clears the first 64 MiB and then the same again."""
    handle = odd.connect("hint")
    for place in range(0, 200 * MIB, 8 * MIB):
        handle.pwrite(b"\xff" * 4096, place)
    handle.zero(136 * MIB, 32 * MIB)
    for place in range(0, 200 * MIB, 8 * MIB):
        inside = 32 * MIB <= place < 168 * MIB
        assert handle.pread(4096, place) == (b"\0" if inside else b"\xff") * 4096, place


def test_extents_of_the_largest_request_stay_inside_it(serve, tmp_path):
    """An extent beyond the end of a request aborts nbdkit 1.32.5 (CVE-2025-47711)."""
    path = tmp_path / "sparse.img"
    with path.open("wb") as file:
        file.truncate(6 << 30)
        file.seek(4 << 30)
        file.write(b"\1" * 65536)
    server = serve(ODD_DEVICES, path)
    handle = server.connect("file")
    lengths = []
    handle.block_status(
        (1 << 32) - 1, 4096, lambda _, offset, found, error: lengths.extend(found) or 0
    )
    # 4 GiB of hole less where it began, then data up to the end of the request.
    assert lengths == [(4 << 30) - 4096, 3, 4095, 0]
    assert server.alive()


@pytest.mark.parametrize("clients", [0, 1, 20])
def test_sigterm_with_idle_clients_ends_the_server_in_order(odd, clients):
    """nbdkit alone waits for idle clients for ever and never calls close()."""
    handles = [odd.connect("memory") for _ in range(clients)]
    begin = time.monotonic()
    assert odd.stop() == 0
    assert time.monotonic() - begin < 3
    assert len(handles) == clients


def test_sigterm_with_clients_that_never_said_what_they_want_ends_the_server(odd):
    """They have no handle, and still nbdkit would wait for them."""
    clients = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for number, client in enumerate(clients):
        client.connect(odd.socket)
        assert client.recv(18)[:8] == b"NBDMAGIC"
        if number:
            client.sendall(b"\0\0\0\3" + b"IHAVEOPT" * (number - 1))
    assert odd.stop() == 0
    for client in clients:
        client.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_sigterm_under_load_ends_the_server_in_order(odd, number):
    """The last replies go out, and the exit status is 0."""

    def hammer():
        handle = odd.connect("memory")
        with suppress(nbd.Error):
            while True:
                handle.pwrite(b"\1" * 4096, 0)
                handle.pread(65536, 0)

    threads = [threading.Thread(target=hammer) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    assert odd.stop(number) == 0
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_sigterm_with_requests_that_never_end_makes_them_fail(odd):
    """A suspended device must not keep the server from ending."""
    stuck = odd.connect("stuck")
    buffer = nbd.Buffer(512)
    failed = []
    stuck.aio_pread(buffer, 0, completion=lambda number: failed.append(number.value) or 1)
    stuck.poll(50)
    begin = time.monotonic()
    odd.process.send_signal(signal.SIGTERM)
    with suppress(nbd.Error):
        while not failed:
            stuck.poll(100)
    assert odd.process.wait(20) == 0
    assert time.monotonic() - begin < 10
    assert failed == [errno.ESHUTDOWN]


def test_new_clients_are_refused_while_the_server_ends(odd):
    """They get an orderly answer, or nobody listens any more."""
    stuck = odd.connect("stuck")
    stuck.aio_pread(nbd.Buffer(512), 0)
    stuck.poll(50)
    odd.process.send_signal(signal.SIGTERM)
    time.sleep(1)
    with pytest.raises(nbd.Error):
        odd.connect("memory")
    assert odd.process.wait(20) == 0


@pytest.mark.parametrize(
    "options", [("-t", "1"), (), ("-t", "4")], ids=["one thread", "default threads", "workers"]
)
def test_2000_connections_leave_no_memory_and_no_threads(serve, options):
    """A pinned thread state that is not let go costs 5 to 63 KiB a connection."""
    # With workers as nbdkit from 1.34 on has them, whatever this one is: no client hangs up here.
    workers = ["workers=yes"] * ("4" in options)
    server = serve(ODD_DEVICES, *workers, options=options)

    def connections(count):
        for _ in range(count):
            with connect_by_hand(server.socket, b"memory") as sock:
                sock.sendall(b"".join(_READS))
                left = 16 * (16 + 4096)
                while left:
                    left -= len(sock.recv(left))

    connections(200)
    before, threads_before = server.memory()
    connections(2000)
    time.sleep(0.3)
    after, threads_after = server.memory()
    assert after - before < 1500, f"{before} KiB, then {after} KiB"
    assert threads_after <= threads_before


def _read_head(cookie):
    from tests.nbd.hangup import request

    return request(0, cookie, cookie * 4096, 4096)


_READS = [_read_head(cookie) for cookie in range(16)]


def test_6000_failing_requests_leave_no_memory(odd):
    """nbdkit keeps every exception for ever: 545 to 793 bytes each, 3 MiB and more here."""
    handle = odd.connect("errno-5")

    def fail(count):
        for _ in range(count):
            with pytest.raises(nbd.Error):
                handle.pread(512, 0)

    fail(500)
    before, _ = odd.memory()
    fail(6000)
    after, _ = odd.memory()
    assert after - before < 300, f"{before} KiB, then {after} KiB"


def test_failing_opens_leave_no_memory(odd):
    """The same for exports that are not there."""

    def fail(count):
        for _ in range(count):
            with pytest.raises(nbd.Error):
                odd.connect("nothing")

    fail(200)
    before, _ = odd.memory()
    fail(1500)
    after, _ = odd.memory()
    assert after - before < 400, f"{before} KiB, then {after} KiB"


def test_a_failure_is_one_line_in_the_log(odd):
    """No traceback, and what failed where."""
    with pytest.raises(nbd.Error):
        odd.connect("errno-5").pread(4096, 8192)
    lines = [line for line in odd.log.splitlines() if "errno-5" in line]
    assert len(lines) == 1 and "Traceback" not in odd.log
    assert lines[0].endswith("[EIO] errno-5: read of 4096 bytes at byte 8192: made to fail")


def test_a_client_that_keeps_failing_does_not_fill_the_log(odd):
    """nbdkit has a line for each failed request: a leg that was gone made 4 MB of them a second."""
    handle = odd.connect("errno-5")
    for place in range(2000):
        with pytest.raises(nbd.Error):
            handle.pread(512, place % 16 * 512)
    with pytest.raises(nbd.Error):
        handle.pwrite(bytes(512), 0)
    with pytest.raises(nbd.Error):
        odd.connect("bug").pread(512, 0)
    lines = odd.log.splitlines()
    # A handful more when the machine is so busy that a thread loses its turn.
    assert 1 <= sum("errno-5: read" in line for line in lines) < 20
    assert sum("errno-5: write" in line for line in lines) == 1
    assert "this is the bug" in odd.log


def test_a_bug_of_ours_is_eio_with_a_traceback(odd):
    """What is not an OSError must not look like an answer of the device."""
    with pytest.raises(nbd.Error) as caught:
        odd.connect("bug").pread(512, 0)
    assert caught.value.errno == "EIO"
    assert "Traceback" in odd.log and "this is the bug" in odd.log


def test_a_server_outlives_the_program_that_started_it(folder):
    """nbdkit 1.32.5 has the kernel send it SIGTERM then, --exit-with-parent or not."""
    needs.nbdkit_plugin("python")
    pid_file = f"{folder}/pid"
    command = f"nbdkit -f -P {pid_file} -U {folder}/s python {ODD_DEVICES} 2>{folder}/log & "
    # The shell ends when the server listens; what starts and ends with it is not the server.
    waiting = f"while ! test -s {pid_file} && kill -0 $!; do sleep 0.01; done; sleep 0.2"
    subprocess.run(["sh", "-c", command + waiting], timeout=30, check=True)
    with open(pid_file) as file:
        pid = int(file.read())
    try:
        time.sleep(0.2)  # what the kernel sends at the end of a parent would be there by now
        with open(f"/proc/{pid}/stat") as file:
            assert file.read().rpartition(")")[2].split()[0] not in "ZX"
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_server_may_open_as_many_files_as_the_system_lets_it(folder):
    """With the usual limit of 1,024 a thousandth device of its own file was refused."""
    needs.nbdkit_plugin("python")
    command = (
        f"ulimit -Sn 256; ulimit -Hn; nbdkit -U {folder}/s python {ODD_DEVICES} "
        "--run 'grep \"Max open files\" /proc/$PPID/limits'"
    )
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=30, check=True
    )
    hard, *limits = done.stdout.split()
    assert limits[3] == hard, done


def test_a_signal_at_the_end_of_the_parent_is_called_off():
    get, set_ = 2, 1
    script = (
        "import ctypes\nfrom dmpy import nbd\nprctl = ctypes.CDLL(None).prctl\n"
        "def signal_at_end():\n    number = ctypes.c_int()\n"
        f"    prctl({get}, ctypes.byref(number))\n    return number.value\n"
        f"prctl({set_}, 15)\nbefore = signal_at_end()\nnbd._outlive_parent()\n"
        "print(before, signal_at_end())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "15 0\n"


def test_the_unix_socket_is_for_its_owner_only(odd):
    """nbdkit makes it with umask 022."""
    odd.connect("memory")
    assert stat.S_IMODE(os.stat(odd.socket).st_mode) == 0o600


# Whether a process has not ended; one that has may wait for its parent to notice.
def _runs(pid):
    with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
    return False


def test_background_threads_start_in_daemon_mode(folder):
    """A thread that is started before nbdkit forks is not there afterwards."""
    path, pid_path = f"{folder}/s", f"{folder}/pid"
    command = ["nbdkit", "-t", "1", "-U", path, "-P", pid_path, "python", ODD_DEVICES]
    subprocess.run(command, check=True, timeout=20)
    with open(pid_path) as file:
        pid = int(file.read())
    try:
        handle = nbd.NBD()
        handle.connect_uri(f"nbd+unix:///memory?socket={path}")
        os.kill(pid, signal.SIGTERM)  # an idle client: only the drain thread ends this
        end = time.monotonic() + 10
        while _runs(pid) and time.monotonic() < end:
            time.sleep(0.02)
        assert not _runs(pid)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_client_killed_in_mid_request_leaves_the_device_usable(odd):
    """The next client gets every byte, and no opener is left over."""
    script = (
        "import nbd,sys\nh=nbd.NBD()\nh.connect_uri(sys.argv[1])\n"
        "while True:\n b=[h.aio_pread(nbd.Buffer(1<<20),i<<20) for i in range(32)]\n"
        " print(1,flush=True)\n while h.aio_in_flight(): h.poll(-1)\n"
    )
    for _ in range(5):
        child = subprocess.Popen(
            ["/usr/bin/python3", "-c", script, odd.uri("memory")], stdout=subprocess.PIPE
        )
        child.stdout.readline()
        child.kill()
        child.wait()
        child.stdout.close()
    handle = odd.connect("memory")
    handle.pwrite(b"\7" * MIB, 0)
    assert handle.pread(MIB, 0) == b"\7" * MIB
    assert odd.alive()


def test_two_clients_are_served_at_the_same_time(odd):
    """nbdkit's default thread model would make the second wait for the first."""
    stuck = odd.connect("stuck")
    stuck.aio_pread(nbd.Buffer(512), 0)
    stuck.poll(50)
    assert odd.connect("memory").pread(512, 0) == bytes(512)


def test_default_threads_also_serve_clients_at_the_same_time(serve):
    """The thread model that old releases are held to orders one connection, not all."""
    server = serve(ODD_DEVICES, options=())
    stuck = server.connect("stuck")
    stuck.aio_pread(nbd.Buffer(512), 0)
    stuck.poll(50)
    assert server.connect("memory").pread(512, 0) == bytes(512)


def test_dump_plugin_does_not_crash(run):
    """An exception there is a SIGSEGV in nbdkit 1.32.5."""
    output = run("nbdkit", "python", ROOT / "plugins" / "striped.py", "--dump-plugin")
    assert "has_can_fast_zero=1" in output
