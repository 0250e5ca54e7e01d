"""The ground a benchmark stands on: a folder on tmpfs, the files in it, the servers over them."""
from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from .fio import BenchmarkError

__all__ = ["Ground", "Server", "system_path"]

MiB = 1 << 20
_START_SECONDS = 20


def system_path() -> dict[str, str]:
    """The environment with the distribution's programs first in PATH.

    nbdkit's Python plugin takes its standard library from the first `python3` in PATH, which has
    to be the one it was built for.
    """
    return {**os.environ, "PATH": "/usr/bin:/bin:" + os.environ.get("PATH", "")}


class Server:
    """One export of a running server: where it is, and what its process has used."""

    def __init__(self, uri: str, pid: int) -> None:
        self.uri = uri
        self.pid = pid

    def cpu_seconds(self) -> float:
        """User and system time of the process so far, seconds, in steps of a clock tick."""
        stat = Path(f"/proc/{self.pid}/stat").read_text()
        fields = stat.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Ground:
    """A context manager: everything made through it is gone afterwards.

    Attributes:
        size: bytes of every device that is compared.
        folder: where the files and sockets are; in TMPDIR, else on /dev/shm if there is one.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.folder = Path()
        self._stack = contextlib.ExitStack()
        self._shared: dict[str, object] = {}

    def __enter__(self) -> Ground:
        shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        parent = os.environ.get("TMPDIR") or shared
        self.folder = Path(tempfile.mkdtemp(prefix="dmpy-bench-", dir=parent))
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def defer(self, function, *args) -> None:
        """Calls `function(*args)` at the end, the last deferred first."""
        self._stack.callback(function, *args)

    def once(self, key: str, make):
        """What `make()` returned the first time it was asked for under `key`."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def file(self, name: str, size: int) -> str:
        """Path of a file of `size` bytes without holes, made the first time it is asked for."""
        path = self.folder / name

        def make() -> str:
            block = os.urandom(MiB)
            with open(path, "wb") as out:
                for at in range(0, size, MiB):
                    out.write(block[: min(MiB, size - at)])
            return str(path)

        return self.once(f"file {name}", make)

    @property
    def disk(self) -> str:
        """Path of the file that most servers serve: the same pages of memory for all."""
        return self.file("disk.img", self.size)

    def serve(self, name: str, argv: list[str], path: Path, env=None) -> subprocess.Popen:
        """Starts a server and waits until it answers on its Unix socket `path`.

        Raises:
            BenchmarkError: it ended, or did not listen in time; with the last line it wrote.
        """
        log = self.folder / f"{name}.log"
        with open(log, "wb") as out:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env or system_path()
            )
        self.defer(_stop, process)
        deadline = time.monotonic() + _START_SECONDS
        while not _listens(path):
            if process.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace").strip().splitlines()[-1:]
                raise BenchmarkError(f"{name}: server did not start: {' '.join(said)}")
            time.sleep(0.01)
        return process

    def nbdkit(self, name: str, *args: str, threads: int | None = 1) -> Server:
        """nbdkit with the plugin and arguments `args`; `threads` None leaves nbdkit's default."""
        path = self.folder / f"{name}.sock"
        count = [] if threads is None else ["-t", str(threads)]
        process = self.serve(name, ["nbdkit", "-f", *count, "-U", str(path), *args], path)
        return Server(f"nbd+unix:///?socket={path}", process.pid)

    def qemu_nbd(self, name: str, image: str) -> Server:
        """qemu-nbd over the raw file `image`, with its default cache and room for 4 clients."""
        path = self.folder / f"{name}.sock"
        argv = ["qemu-nbd", "--format=raw", "--persistent", "--shared=8", f"--socket={path}", image]
        return Server(f"nbd+unix:///?socket={path}", self.serve(name, argv, path).pid)


# Whether somebody accepts connections at the Unix socket `path`.
def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


# Asks the server to end, and makes it when it does not.
def _stop(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
