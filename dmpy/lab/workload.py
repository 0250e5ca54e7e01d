"""The clients of a scenario: they write what the model says, read it back and compare."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from dmpy.device import BlockDevice
from dmpy.errors import DeviceError
from dmpy.lab.model import Model, content
from dmpy.lab.scenario import Workload
from dmpy.units import SECTOR_SIZE

__all__ = ["Client", "Clients", "DirectClient", "NBDClient", "read_all"]

_READ_ALL_STEP = 1 << 20
# A client whose request failed takes a breath, or a failed array has it spin.
_BREATH = 0.005


class Client(Protocol):
    """One connection to the device; errors are OSError."""

    def read(self, offset: int, length: int) -> np.ndarray:
        """Return uint8[length]."""

    def write(self, offset: int, data: np.ndarray, *, fua: bool) -> None:
        """Write uint8[n]."""

    def zero(self, offset: int, length: int) -> None:
        """Write zeroes."""

    def flush(self) -> None:
        """Make what was acknowledged durable."""

    def close(self) -> None:
        """Hang up."""


class DirectClient:
    """Calls the device in this process."""

    def __init__(self, device: BlockDevice) -> None:
        self._device = device

    def read(self, offset: int, length: int) -> np.ndarray:
        """Return uint8[length]."""
        data = np.empty(length, np.uint8)
        self._device.preadv([memoryview(data)], offset)
        return data

    def write(self, offset: int, data: np.ndarray, *, fua: bool) -> None:
        """Write uint8[n]."""
        self._device.pwritev([memoryview(data)], offset, fua=fua)

    def zero(self, offset: int, length: int) -> None:
        """Write zeroes."""
        self._device.write_zeroes(offset, length)

    def flush(self) -> None:
        """Flush the device."""
        self._device.flush()

    def close(self) -> None:
        """Do nothing: the device is the mapper's."""


class NBDClient:
    """A libnbd connection to a real server.

    Args:
        uri: of the export.

    Raises:
        OSError: the server does not answer, or libnbd is missing.
    """

    def __init__(self, uri: str) -> None:
        try:
            import nbd
        except ImportError:
            raise DeviceError(
                errno.ENOENT, "libnbd's Python module is not installed (package python3-libnbd)"
            ) from None
        self._nbd = nbd
        self._handle = nbd.NBD()
        self._call(self._handle.connect_uri, uri)

    def read(self, offset: int, length: int) -> np.ndarray:
        """Return uint8[length]."""
        return np.frombuffer(self._call(self._handle.pread, length, offset), np.uint8)

    def write(self, offset: int, data: np.ndarray, *, fua: bool) -> None:
        """Write uint8[n]."""
        flags = self._nbd.CMD_FLAG_FUA if fua else 0
        # copy: this libnbd takes bytes and bytearrays only.
        self._call(self._handle.pwrite, data.tobytes(), offset, flags)

    def zero(self, offset: int, length: int) -> None:
        """Write zeroes."""
        self._call(self._handle.zero, length, offset)

    def flush(self) -> None:
        """Send a flush."""
        self._call(self._handle.flush)

    def close(self) -> None:
        """Hang up without a word, as a client that dies does."""
        # The handle's last reference: libnbd closes the socket.
        self._handle = None

    def _call(self, call: Callable, *args: object) -> object:
        try:
            return call(*args)
        except self._nbd.Error as error:
            number = error.errnum or errno.ENOTCONN
            raise DeviceError(number, os.strerror(number)) from None


class Clients:
    """All clients of a workload, each in a thread.

    Two of them never touch the same sector, but they meet in every stripe.

    Args:
        workload: what they do.
        model: the account that they keep.
        size: bytes of the device.
        alignment: bytes that divide every offset and length.
        seed: of every choice.
        connect: makes a connection; OSError while there is no server.
        failed: told of a request that failed, unless `excused` says that it had to.
        excused: whether errors are nobody's fault just now.
    """

    def __init__(
        self, workload: Workload, model: Model, size: int, alignment: int, seed: int,
        connect: Callable[[], Client], failed: Callable[[str, OSError], None],
        excused: Callable[[], bool],
    ) -> None:
        self._workload = workload
        self._model = model
        self._alignment = max(SECTOR_SIZE, alignment)
        self._seed = seed
        self._connect = connect
        self._failed = failed
        self._excused = excused
        self._slot = max(*workload.block, self._alignment)
        self._slots = max(int(size * workload.area) // self._slot, workload.clients)
        self._slots = min(self._slots, size // self._slot)
        # Everything below is protected by this, and it is told of every change.
        self._changed = threading.Condition()
        self._paused = True
        self._stopped = False
        self._at_rest = 0
        self.answered = 0
        self.read_bytes = 0
        self.written_bytes = 0
        self.errors = 0
        self.crash: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"client {number}", daemon=True)
            for number in range(min(workload.clients, self._slots))
        ]
        self._alive = len(self._threads)
        for thread in self._threads:
            thread.start()

    @property
    def working(self) -> bool:
        """Whether the clients work, or have yet to notice that they should not."""
        return not self._paused and self._alive > 0

    def go_on(self) -> None:
        """Let the clients work, over fresh connections."""
        with self._changed:
            self._paused = False
            self._changed.notify_all()

    def pause(self, timeout: float = 30.0) -> bool:
        """Have the clients stop after the request that is under way; says whether all did."""
        with self._changed:
            self._paused = True
            return self._changed.wait_for(lambda: self._at_rest >= self._alive, timeout)

    def stop(self, timeout: float = 30.0) -> None:
        """End all clients."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _run(self, number: int) -> None:
        rng = random.Random(f"{self._seed} client {number}")
        try:
            while self._rest():
                self._work(number, rng)
        except BaseException as error:
            # A bug, ours or the device's, must not look like a client that has nothing to do.
            self.crash = error
        finally:
            with self._changed:
                self._alive -= 1
                self._changed.notify_all()

    # Wait until there is work; says whether there is any.
    def _rest(self) -> bool:
        with self._changed:
            self._at_rest += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stopped or not self._paused)
            self._at_rest -= 1
            return not self._stopped

    # Work over one connection until told to pause, or until it breaks.
    def _work(self, number: int, rng: random.Random) -> None:
        try:
            client = self._connect()
        except OSError as error:
            self._note_failure("connect", error)
            return
        pace = self._workload.clients / self._workload.rate if self._workload.rate else 0.0
        due = time.monotonic()
        try:
            # Not all clients flush at once.
            count = number * self._workload.flush_every // self._workload.clients
            while not (self._paused or self._stopped):
                count += 1
                every = self._workload.flush_every
                verb = "flush" if every and count % every == 0 else self._verb(rng)
                try:
                    self._request(client, verb, number, rng)
                except OSError as error:
                    self._note_failure(verb, error)
                    if error.errno in (errno.ENOTCONN, errno.ESHUTDOWN, errno.EPIPE,
                                       errno.ECONNRESET, errno.EINVAL):
                        return
                with self._changed:
                    self.answered += 1
                if pace:
                    due += pace
                    time.sleep(max(0.0, due - time.monotonic()))
        finally:
            client.close()

    def _verb(self, rng: random.Random) -> str:
        if rng.random() < self._workload.reads:
            return "read"
        return "zero" if rng.random() < self._workload.zeroes else "write"

    def _request(self, client: Client, verb: str, number: int, rng: random.Random) -> None:
        model = self._model
        if verb == "flush":
            began = model.flush_begins()
            client.flush()
            model.flush_ends(began)
            return
        offset, length = self._place(number, rng)
        sector, count = offset // SECTOR_SIZE, length // SECTOR_SIZE
        if verb == "read":
            model.check(sector, client.read(offset, length))
            with self._changed:
                self.read_bytes += length
            return
        fua = verb == "write" and rng.random() < self._workload.fua
        written = model.write_begins(sector, count, zero=verb == "zero")
        if verb == "zero":
            client.zero(offset, length)
        else:
            client.write(offset, content(sector, count, written), fua=fua)
        model.write_ends(sector, count, written, fua=fua)
        with self._changed:
            self.written_bytes += length

    # A place that is this client's alone.
    def _place(self, number: int, rng: random.Random) -> tuple[int, int]:
        mine = len(range(number, self._slots, len(self._threads)))
        slot = number + len(self._threads) * rng.randrange(mine)
        unit = self._alignment
        length = -(-rng.choice(self._workload.block) // unit) * unit
        within = rng.randrange((self._slot - length) // unit + 1) * unit
        return slot * self._slot + within, length

    def _note_failure(self, verb: str, error: OSError) -> None:
        if not (self._excused() or self._stopped or (verb == "connect" and self._paused)):
            with self._changed:
                self.errors += 1
            self._failed(verb, error)
        time.sleep(_BREATH)


def read_all(client: Client, model: Model, size: int, unit: int) -> int:
    """Read the whole device and compare.

    Args:
        client: connected.
        model: the account.
        size: bytes of the device.
        unit: bytes of the smallest piece that is tried where a larger one cannot be read.

    Returns:
        How many bytes cannot be read.
    """
    def read(offset: int, length: int) -> int:
        try:
            model.check(offset // SECTOR_SIZE, client.read(offset, length))
        except OSError:
            if length <= unit:
                return length
            # Which half is it?
            half = max(unit, length // 2 // unit * unit)
            return read(offset, half) + read(offset + half, length - half)
        return 0

    return sum(read(offset, min(_READ_ALL_STEP, size - offset))
               for offset in range(0, size, _READ_ALL_STEP))
