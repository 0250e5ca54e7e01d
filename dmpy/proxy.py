"""Serves the mapper of a running Python program over NBD, for tests of other people's programs.

    with dmpy.Mapper() as dm, dmpy.serve(dm) as served:
        dm.create("r0", "0 204800 linear a.img 0")
        subprocess.run(["qemu-img", "info", served.uri("r0")], check=True)
        dm.suspend("r0")  # what the client sends now waits

The devices stay in this process, where tables can be loaded and legs made to fail while clients
run. nbdkit runs beside it with plugins/proxy.py, which passes each request on through a private
Unix socket: one connection for each of a client's, each served by a thread here.

A request is a head (operation, flags, offset, length) and for writes and names the bytes; a reply
is an errno, a length and as many bytes: what was read, or the sentence of the error.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from urllib.parse import quote

from dmpy.device import BlockDevice, BlockSize, Buffers, Extent, total
from dmpy.edge import Edge, Edges
from dmpy.errors import DeviceError
from dmpy.exports import MapperRegistry
from dmpy.launch import plugin_path, server_environment
from dmpy.mapper import Mapper
from dmpy.nbd import Plugin, Refusal

__all__ = ["ProxyPlugin", "Served", "serve"]

_HEAD = struct.Struct("<BBxxxxxxQQ")
assert _HEAD.size == 24
_REPLY = struct.Struct("<IQ")
_EXTENT = struct.Struct("<QQQ")

_NAMES, _DEFAULT, _OPEN, _READ, _WRITE, _FLUSH, _DISCARD, _ZERO, _EXTENTS = range(9)
# Flags, by operation: open for reading only; durable; may unmap and fast only.
_READONLY = _FUA = _MAY_UNMAP = 1
_FAST_ONLY = 2

# No request of NBD's is larger; what claims to be is no request of ours.
_LARGEST = 64 << 20

_START_TIME = 20.0
_STOP_TIME = 30.0


# Fill a view from a socket; EOFError when the other side has closed.
def _receive_into(sock: socket.socket, view: memoryview) -> None:
    while view:
        count = sock.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]


def _receive(sock: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    _receive_into(sock, memoryview(data))
    return data


# --- in the program that has the devices -------------------------------------------------------


# One client's connection: the requests of one nbdkit connection, one after another.
class _Session:
    def __init__(self, registry: MapperRegistry, edges: Edges, sock: socket.socket) -> None:
        self._registry = registry
        self._edges = edges
        self._socket = sock
        self._name = ""
        self._edge: Edge | None = None
        self._buffer = memoryview(bytearray(64 << 10))

    def run(self) -> None:
        try:
            with suppress(EOFError, ConnectionError):
                while True:
                    self._serve_one()
        finally:
            self._socket.close()
            if self._edge is not None:
                self._edges.give_back(self._edge)
                self._registry.release(self._name, self._edge.device)

    def _serve_one(self) -> None:
        head = _receive(self._socket, _HEAD.size)
        operation, flags, offset, length = _HEAD.unpack(head)
        payload = memoryview(b"")
        if operation in (_OPEN, _WRITE):
            payload = self._space(length)
            _receive_into(self._socket, payload)
        number = 0
        try:
            answer = self._answer(operation, flags, offset, length, payload)
        except OSError as error:
            number = error.errno or errno.EIO
            answer = (error.strerror or str(error)).encode("utf-8", "replace")
        self._socket.sendall(_REPLY.pack(number, len(answer)))
        self._socket.sendall(answer)

    # Room for the bytes of a request, the same for all of them.
    def _space(self, length: int) -> memoryview:
        if length > _LARGEST:
            raise ConnectionError(f"request of {length} bytes")
        if length > len(self._buffer):
            self._buffer = memoryview(bytearray(length))
        return self._buffer[:length]

    def _answer(
        self, operation: int, flags: int, offset: int, length: int, payload: memoryview
    ) -> bytes | memoryview:
        if operation == _NAMES:
            return json.dumps(self._registry.names()).encode()
        if operation == _DEFAULT:
            return self._registry.default().encode()
        if operation == _OPEN:
            return self._open(str(payload, "utf-8"), bool(flags & _READONLY))
        edge = self._edge
        if operation == _READ:
            data = self._space(length)
            edge.read(data, offset)
            return data
        if operation == _WRITE:
            edge.write(payload, offset, bool(flags & _FUA))
        elif operation == _FLUSH:
            edge.device.flush()
        elif operation == _DISCARD:
            edge.trim(offset, length, fua=False)
        elif operation == _ZERO:
            may_unmap, fast_only = bool(flags & _MAY_UNMAP), bool(flags & _FAST_ONLY)
            edge.zero(offset, length, may_unmap=may_unmap, fast_only=fast_only, fua=False)
        elif operation == _EXTENTS:
            return b"".join(_EXTENT.pack(*extent) for extent in _all_extents(edge, offset, length))
        return b""

    def _open(self, name: str, readonly: bool) -> bytes:
        device = self._registry.open(name, readonly)
        self._edge = self._edges.take(device)
        self._name = name
        about = {
            "size": device.size,
            "block_size": device.block_size,
            "readonly": device.readonly,
            "description": self._registry.describe(device),
        }
        return json.dumps(about).encode()


# The extents of a whole range: one answer of an edge may end before.
def _all_extents(edge: Edge, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
    end = offset + length
    while offset < end:
        for place, size, kind in edge.extents(offset, end - offset, only_one=False):
            yield place, size, kind
            offset = place + size


class Served:
    """A mapper that is being served; a context manager.

    Args:
        mapper: whose devices.

    Attributes:
        socket: path of the Unix socket on which NBD is spoken.

    Raises:
        OSError: nbdkit is missing or does not start.
    """

    def __init__(self, mapper: Mapper) -> None:
        folder = tempfile.mkdtemp(prefix="dmpy-")
        if len(folder) > 90:  # a socket's path has at most 107 bytes
            os.rmdir(folder)
            folder = tempfile.mkdtemp(prefix="dmpy-", dir="/tmp")
        self._folder = folder
        self.socket = os.path.join(folder, "nbd.sock")
        self._registry = MapperRegistry(mapper)
        self._edges = Edges()
        self._registry.watch(self._edges.refresh)
        self._sessions: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._acceptor = threading.Thread(target=self._accept, name="serve", daemon=True)
        self._process: subprocess.Popen | None = None
        try:
            self._listener.bind(os.path.join(folder, "proxy.sock"))
            self._listener.listen(128)
            self._acceptor.start()
            self._start()
        except BaseException:
            self.close()
            raise

    def uri(self, name: str = "") -> str:
        """Return the NBD URI of a device; without a name, of the only one."""
        return f"nbd+unix:///{quote(name, safe='')}?socket={quote(self.socket)}"

    @property
    def log(self) -> str:
        """What nbdkit has said so far: a line for each request that failed."""
        with open(os.path.join(self._folder, "log"), encoding="utf-8", errors="replace") as file:
            return file.read()

    def close(self) -> None:
        """Let clients finish what they have sent, then stop serving; the devices stay."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_TIME)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        with suppress(OSError):  # it may be closed already
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        # A session that waits on a suspended device ends when that is resumed.
        end = time.monotonic() + 1
        for thread in [self._acceptor, *self._sessions]:
            if thread.ident is not None:
                thread.join(max(0, end - time.monotonic()))
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> None:
        command = ["nbdkit", "-f", "-t", "1", "-U", self.socket, "python", plugin_path("proxy")]
        command.append(f"socket={os.path.join(self._folder, 'proxy.sock')}")
        environment = server_environment()
        with open(os.path.join(self._folder, "log"), "wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )
        end = time.monotonic() + _START_TIME
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                lines = self.log.strip().splitlines() or ["it does not answer"]
                raise DeviceError(errno.EIO, f"nbdkit does not serve: {lines[-1]}")
            time.sleep(0.01)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
            probe.settimeout(_START_TIME)
            probe.connect(self.socket)
            greeting = probe.recv(18)
            # Take leave as NBD has it (NBD_OPT_ABORT), or nbdkit's log begins with a complaint.
            probe.sendall(struct.pack(">I8sII", 1, b"IHAVEOPT", 2, 0))
            return greeting[:8] == b"NBDMAGIC"
        return False

    def _accept(self) -> None:
        with suppress(OSError):  # the listener was shut down
            while True:
                sock, _ = self._listener.accept()
                session = _Session(self._registry, self._edges, sock)
                thread = threading.Thread(target=session.run, name="serve", daemon=True)
                self._sessions = [other for other in self._sessions if other.is_alive()]
                self._sessions.append(thread)
                thread.start()


def serve(mapper: Mapper) -> Served:
    """Serve the devices of a mapper over NBD until the result is closed.

    Args:
        mapper: its devices may come, go and change while they are served.

    Raises:
        OSError: nbdkit is missing or does not start.
    """
    return Served(mapper)


# --- in nbdkit ---------------------------------------------------------------------------------


# A connection to the program that has the devices; one call at a time.
class _Caller:
    def __init__(self, path: str) -> None:
        self._lock = threading.Lock()
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)

    # Returns the reply's bytes, which went into `into` where that is given.
    def call(
        self,
        operation: int,
        flags: int = 0,
        offset: int = 0,
        length: int = 0,
        *,
        send: Buffers = (),
        into: Buffers = (),
    ) -> bytearray:
        try:
            with self._lock:
                self.socket.sendall(_HEAD.pack(operation, flags, offset, length))
                for buffer in send:
                    self.socket.sendall(buffer)
                number, size = _REPLY.unpack(_receive(self.socket, _REPLY.size))
                if number == 0 and into:
                    for view in into:
                        _receive_into(self.socket, view)
                    return bytearray()
                answer = _receive(self.socket, size)
        except (EOFError, ConnectionError):
            raise DeviceError(errno.ESHUTDOWN, "the program that has the devices is gone") from None
        if number:
            raise DeviceError(number, answer.decode())
        return answer


# A device that is in the other program, which also widens and splits what does not fit it: there
# all connections to it meet, and there its table may change.
class _Remote(BlockDevice):
    def __init__(self, caller: _Caller, name: str, readonly: bool) -> None:
        self.name = name
        self._caller = caller
        words = memoryview(name.encode())
        flags = _READONLY if readonly else 0
        about = json.loads(caller.call(_OPEN, flags, 0, len(words), send=[words]))
        self.size = about["size"]
        self.advertised = BlockSize(*about["block_size"])
        self.readonly = about["readonly"]
        self.description = about["description"]

    def preadv(self, buffers: Buffers, offset: int) -> None:
        self._caller.call(_READ, 0, offset, total(buffers), into=buffers)

    def pwritev(self, buffers: Buffers, offset: int, *, fua: bool = False) -> None:
        self._caller.call(_WRITE, _FUA if fua else 0, offset, total(buffers), send=buffers)

    def flush(self) -> None:
        self._caller.call(_FLUSH)

    def discard(self, offset: int, length: int) -> None:
        self._caller.call(_DISCARD, 0, offset, length)

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        flags = (_MAY_UNMAP if may_unmap else 0) | (_FAST_ONLY if fast_only else 0)
        self._caller.call(_ZERO, flags, offset, length)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        answer = self._caller.call(_EXTENTS, 0, offset, length)
        return (Extent(*fields) for fields in _EXTENT.iter_unpack(answer))

    def close(self) -> None:
        self._caller.socket.close()


class ProxyPlugin(Plugin):
    """Passes everything on to the program that called dmpy.serve(): socket=PATH."""

    def __init__(self) -> None:
        self._path: str | None = None
        self._main: _Caller | None = None
        self._open: set[_Remote] = set()
        self.registry = self

    def configure(self, key: str, value: str) -> None:
        """Take one argument."""
        if key != "socket":
            raise Refusal(f"{key}: unknown argument (expected socket)")
        self._path = os.path.abspath(value)

    def prepare(self) -> None:
        """Connect to the program."""
        if self._path is None:
            raise Refusal("socket: missing (expected socket=PATH, see dmpy.serve)")
        self._main = _Caller(self._path)

    def start(self, end: Callable[[], None]) -> None:
        """Watch for the end of the program."""

        def watch() -> None:
            lifeline = _Caller(self._path)
            with suppress(OSError):
                lifeline.socket.recv(1)
            end()

        threading.Thread(target=watch, name="lifeline", daemon=True).start()

    def interrupt(self) -> None:
        """Give up requests that wait over there."""
        for device in list(self._open):
            with suppress(OSError):
                device._caller.socket.shutdown(socket.SHUT_RDWR)

    # The registry

    def names(self) -> list[tuple[str, str]]:
        """Return the name and a description of each device."""
        return [(name, text) for name, text in json.loads(self._main.call(_NAMES))]

    def default(self) -> str:
        """Return the name of the only device."""
        return self._main.call(_DEFAULT).decode()

    def open(self, name: str, readonly: bool) -> BlockDevice:
        """Return a device, over a connection of its own."""
        caller = _Caller(self._path)
        try:
            device = _Remote(caller, name, readonly)
        except BaseException:
            caller.socket.close()
            raise
        self._open.add(device)
        return device

    def describe(self, device: BlockDevice) -> str:
        """Return the description of an opened device."""
        return device.description

    def block_size(self, device: BlockDevice) -> BlockSize:
        """Return the block sizes of the device over there."""
        return device.advertised

    def release(self, name: str, device: BlockDevice) -> None:
        """Close the device's connection, which counts one user less over there."""
        self._open.discard(device)
        device.close()

    def watch(self, changed: Callable[[BlockDevice], None]) -> None:
        """Do nothing: over there requests are made to fit the device as it is."""
