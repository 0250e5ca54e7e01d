"""The client of the control socket: one JSON-RPC 2.0 request a line, one reply a line.

    with Client("/run/dmpy/control.sock") as client:
        client.call("create", name="r0", table="0 2048 zero")

It imports next to nothing: a command line that is called thousands of times starts with it.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time

__all__ = ["MAX_REQUEST", "Client", "RemoteError", "ServerGone"]

MAX_REQUEST = 64 << 20
"""The server refuses a request of more than so many bytes."""

_RECEIVE_SIZE = 1 << 18
# Seconds from a server's closing of its sockets to its end.
_LAST_BREATH = 0.5


class RemoteError(OSError):
    """The server refused a call, and nothing changed.

    Attributes:
        errno: of the error, EINVAL for a call that is wrong in itself.
        message: the sentence; also `strerror` and `str()`.
        kind: "TableError", "DeviceError", "OSError" and so on; "" for errors of JSON-RPC itself.
        code: JSON-RPC's, -32000 for everything that devices raise.
        data: what else the server sent: "errno_name", and "line", "target", "argument" of a table.
    """

    def __init__(self, error: dict) -> None:
        data = error.get("data")
        self.data = data if isinstance(data, dict) else {}
        self.code = error.get("code")
        self.message = str(error.get("message"))
        self.kind = self.data.get("kind", "")
        super().__init__(self.data.get("errno", errno.EINVAL), self.message)

    def __str__(self) -> str:
        return self.message


class ServerGone(ConnectionError):
    """Nobody answers on the control socket; `str()` says why, and how to start a server.

    Attributes:
        died: a server left its socket or pid file behind, so it did not stop in order.
        pid: of the server, where its pid file tells, else None.
    """

    def __init__(self, sentence: str, *, died: bool, pid: int | None = None) -> None:
        super().__init__(errno.ECONNREFUSED, sentence)
        self.died = died
        self.pid = pid

    def __str__(self) -> str:
        return self.strerror


class Client:
    """One connection to a server; not for two threads at once.

    Args:
        path: of the control socket, at most 107 bytes.
        timeout: seconds that a call may take, or None for no limit (`wait` can take for ever).

    Raises:
        ServerGone: nobody listens there.
        OSError: EACCES when the socket belongs to somebody else; ENAMETOOLONG.
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout: float | None = None) -> None:
        self.path = os.fspath(path)
        self.timeout = timeout
        self._received = bytearray()
        self._number = 0
        self._socket = self._connect()

    def call(self, method: str, **params: object) -> object:
        """Call a method of the server and return its result.

        Args:
            method: a name from `dmpy.control.METHODS`.
            params: as documented there.

        Raises:
            RemoteError: the server refused.
            ServerGone: the server went away before it replied; whether it still did what it was
                asked for is not known.
            TimeoutError: `timeout` is over. The connection is of no further use.
        """
        self._number += 1
        request = {"jsonrpc": "2.0", "id": self._number, "method": method, "params": params}
        line = json.dumps(request).encode("ascii") + b"\n"
        if len(line) > MAX_REQUEST:
            sentence = f"request is larger than {MAX_REQUEST >> 20} MiB (got {len(line)} bytes)"
            raise OSError(errno.EMSGSIZE, sentence)
        try:
            self._send(line)
            reply = json.loads(self._next_line())
        except ConnectionError as error:
            raise self._gone("closed the connection before it replied") from error
        if "error" in reply:
            raise RemoteError(reply["error"])
        return reply["result"]

    def close(self) -> None:
        """Close the connection; closing twice is fine."""
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self) -> socket.socket:
        if len(os.fsencode(self.path)) > 107:
            sentence = f"{self.path}: path is too long for a socket (expected at most 107 bytes)"
            raise OSError(errno.ENAMETOOLONG, sentence)
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(self.timeout)
        deadline = time.monotonic() + (self.timeout or 0.0)
        try:
            while True:
                try:
                    connection.connect(self.path)
                    return connection
                except BlockingIOError:  # the server's queue is full, and there is a time-out
                    if time.monotonic() >= deadline:
                        raise TimeoutError(errno.ETIMEDOUT, f"{self.path}: no answer") from None
                    time.sleep(0.01)
        except FileNotFoundError:
            connection.close()
            raise self._gone("") from None
        except ConnectionRefusedError:
            connection.close()
            raise self._gone("does not answer") from None
        except BaseException as error:
            connection.close()
            if isinstance(error, PermissionError):
                sentence = f"{self.path}: the server belongs to another user"
                raise PermissionError(error.errno, sentence) from None
            raise

    # A server with many clients closes those that are idle. Then no byte of the request arrived,
    # and a new connection may send it again.
    def _send(self, line: bytes) -> None:
        try:
            self._socket.sendall(line)
        except BrokenPipeError:
            if self._number == 1:
                return  # what the server said before it closed is there to be read
            self._socket.close()
            self._received.clear()
            self._socket = self._connect()
            self._socket.sendall(line)

    def _next_line(self) -> bytes:
        searched = 0
        while (end := self._received.find(b"\n", searched)) < 0:
            searched = len(self._received)
            piece = self._socket.recv(_RECEIVE_SIZE)
            if not piece:
                raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            self._received += piece
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line

    # The pid file beside the socket tells a server that died from one that was never started:
    # a server that stops in order removes it.
    def _gone(self, what: str) -> ServerGone:
        folder = os.path.dirname(self.path)
        try:
            with open(os.path.join(folder, "server.pid"), encoding="ascii") as file:
                pid = int(file.read())
        except (OSError, ValueError):
            pid = None
        if pid is None and not os.path.exists(self.path):
            sentence = f"no dmpy server runs in {folder}: `dmpy serve` starts one"
            return ServerGone(sentence, died=False)
        who = f"the dmpy server of {folder}" + (f" (pid {pid})" if pid is not None else "")
        if pid is not None and _is_server(pid, _LAST_BREATH if what else 0.0):
            what = what or "has no control socket"
            return ServerGone(
                f"{who} {what}: see {folder}/server.log; `kill {pid}` ends it",
                died=False,
                pid=pid,
            )
        return ServerGone(
            f"{who} died: see {folder}/server.log; `dmpy serve` starts it again, with its devices",
            died=True,
            pid=pid,
        )


# Whether a pid file still names a server: numbers are used again, and a dead one may not have been
# reaped yet. One that has just closed its sockets gets a moment to end.
def _is_server(pid: int, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                name, _, rest = file.read().partition("(")[2].rpartition(")")
        except OSError:
            return False
        if not name.startswith("nbdkit") or rest.split()[0] in "ZX":
            return False
        if time.monotonic() >= deadline:
            return True
        time.sleep(0.02)
