"""Servers for the tests that talk NBD: started on a short path, waited for, and always stopped."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pytest

from tests import needs

ROOT = Path(__file__).parents[2]
ODD_DEVICES = ROOT / "tests" / "nbd" / "odd_devices.py"
MIB = 1 << 20


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything here as talking NBD."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.nbd)


class Server:
    """An nbdkit that runs a script.

    Args:
        folder: short; gets the socket and the log.
        script: path of the script, or what nbdkit is to run with its arguments.
        arguments: for the script.
        options: for nbdkit, before the script.
        cwd: where it starts.
    """

    def __init__(self, folder, script, arguments=(), options=("-t", "1"), cwd=None) -> None:
        self.socket = os.path.join(folder, "s")
        self.log_path = os.path.join(folder, "log")
        what = ["python", str(script)] if str(script).endswith(".py") else [str(script)]
        self.command = [
            needs.tool("nbdkit"), "-f", "-U", self.socket, *options, *what, *map(str, arguments)
        ]  # fmt: skip
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=cwd
            )
        end = time.monotonic() + 20
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise AssertionError(f"{self.command}: {self.log}")
            time.sleep(0.01)

    # Whether it greets clients, which it does when everything has been started.
    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
            probe.settimeout(20)
            probe.connect(self.socket)
            greeting = probe.recv(18)
            probe.sendall(struct.pack(">I8sII", 1, b"IHAVEOPT", 2, 0))  # NBD_OPT_ABORT
            return greeting[:8] == b"NBDMAGIC"
        return False

    @property
    def log(self) -> str:
        """What it has said so far."""
        return Path(self.log_path).read_text(errors="replace")

    @property
    def pid(self) -> int:
        """Of nbdkit, which has not forked."""
        return self.process.pid

    def uri(self, name: str = "") -> str:
        """The URI of an export."""
        return f"nbd+unix:///{quote(name, safe='')}?socket={self.socket}"

    def connect(self, name: str = "", **_):
        """A new libnbd handle, with the request checks of libnbd switched off."""
        import nbd

        handle = nbd.NBD()
        handle.set_strict_mode(0)
        handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        handle.connect_uri(self.uri(name))
        return handle

    def memory(self) -> tuple[int, int]:
        """Resident KiB and the number of threads."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return int(fields["VmRSS"].split()[0]), int(fields["Threads"])

    def alive(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def stop(self, number: int = signal.SIGTERM, timeout: float = 30) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout)

    def kill(self) -> None:
        """End it at once, if it has not ended."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def folder() -> Iterator[str]:
    """A folder with a short path, for sockets."""
    path = tempfile.mkdtemp(prefix="d-", dir="/tmp")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def serve(folder) -> Iterator[Callable[..., Server]]:
    """Start servers: serve(script, *arguments, options=...)."""
    needs.module("nbd", package="python3-libnbd")
    needs.nbdkit_plugin("python")
    servers: list[Server] = []

    def start(script, *arguments, options=("-t", "1"), cwd=None) -> Server:
        place = os.path.join(folder, str(len(servers)))
        os.mkdir(place)
        server = Server(place, ROOT / "plugins" / script, arguments, options, cwd)
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def odd(serve) -> Server:
    """A server of the devices in odd_devices.py."""
    return serve(ODD_DEVICES)


@pytest.fixture
def run() -> Callable[..., str]:
    """Run a program, with a time limit; returns what it printed, and shows it when it fails."""

    def start(*command: object, timeout: float = 120, status: int = 0, env=None) -> str:
        words = [needs.tool(str(command[0])), *map(str, command[1:])]
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=timeout, check=False, env=env
        )
        assert done.returncode == status, f"{words}: {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr if status else done.stdout

    return start


@pytest.fixture
def images(tmp_path) -> Callable[..., list[Path]]:
    """Make sparse files: images(4 * MIB, 4 * MIB) -> paths."""

    def make(*sizes: int) -> list[Path]:
        paths = []
        for number, size in enumerate(sizes):
            path = tmp_path / f"{'abcdefgh'[number]}.img"
            with path.open("wb") as file:
                file.truncate(size)
            paths.append(path)
        return paths

    return make


FIO = (
    "--name=v", "--ioengine=nbd", "--bsrange=512-64k", "--iodepth=16", "--verify=crc32c",
    "--do_verify=1", "--randseed=7", "--group_reporting", "--verify_state_save=0",
)  # fmt: skip


@pytest.fixture
def fio(run) -> Callable[..., str]:
    """Run fio with verification on an export; further options as words."""

    def start(uri: str, *options: str, timeout: float = 120) -> str:
        output = run("fio", *FIO, f"--uri={uri}", *options, timeout=timeout)
        assert "err= 0" in output and "verify:" not in output, output
        return output

    return start
