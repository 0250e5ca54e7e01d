"""The control socket: JSON-RPC 2.0 on a Unix socket, a request a line, a reply a line.

`METHODS` is the whole protocol: requests are checked against it, and `reference()` prints it. The
socket is for its owner and root only. Each connection has a thread of its own, and a request that
is malformed, too large, too slow or that waits for an event holds up nobody but its sender.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import select
import socket
import struct
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import dmpy
from dmpy.attachments import Attachments
from dmpy.client import MAX_REQUEST, Client, RemoteError, ServerGone
from dmpy.errors import DeviceError, FormatError, TableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dmpy.mapped import MappedDevice
    from dmpy.mapper import FailedEntry, Mapper

__all__ = [
    "DRIVER_VERSION",
    "METHODS",
    "Client",
    "ControlServer",
    "Method",
    "Param",
    "RemoteError",
    "ServerGone",
    "reference",
]

DRIVER_VERSION = "4.47.0"
"""The version of the kernel's device-mapper interface whose behaviour this follows."""

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
DEVICE_REFUSES = -32000

# Requests in one batch: the replies to a batch are in memory at once.
_MAX_BATCH = 1000
# Seconds a connection must have been idle before it can be closed to make room for another.
_MIN_IDLE = 0.2
# Seconds a new connection waits for room before it is refused.
_ROOM_PATIENCE = 2.0
# Seconds between two looks at whether the client of a `wait` is still there, and how many may wait.
_WAIT_SLICE = 0.25
_MOST_WAITING = 1024
# Seconds that requests under way get to end when the server stops.
_STOP_PATIENCE = 5.0
_RECEIVE_SIZE = 1 << 18
_SERVER_KEYS = ("uri", "tcp_uri", "runtime", "state", "devdir", "metrics")
_MAX_MINOR = (1 << 20) - 1

_log = logging.getLogger(__name__)


# --- the protocol ------------------------------------------------------------------------------

# In place of a default: the caller has to give the parameter.
_REQUIRED = object()


@dataclass(frozen=True)
class Param:
    """One parameter of a method.

    Attributes:
        name: its key in "params".
        kind: "string", "integer", "number" or "boolean", as JSON names them.
        meaning: for the reference, with the unit.
        default: when it is left out or, where this is None, null. Without one it must be there.
        minimum: least number.
        maximum: largest number.
    """

    name: str
    kind: str
    meaning: str
    default: object = _REQUIRED
    minimum: int = 0
    maximum: int = (1 << 63) - 1

    @property
    def required(self) -> bool:
        """Whether a request must have it."""
        return self.default is _REQUIRED


@dataclass(frozen=True)
class Method:
    """One method of the control socket.

    Attributes:
        meaning: what it does, a sentence.
        result: what it returns.
        params: beside the selector.
        selector: "one": names one device; "optional": without it the result is a list of all
            devices, sorted by name; "": it is about no device that is there.
    """

    meaning: str
    result: str
    params: tuple[Param, ...] = ()
    selector: str = ""

    @property
    def all_params(self) -> tuple[Param, ...]:
        """The selector's parameters, then its own: the order of parameters by position."""
        return (_SELECTOR if self.selector else ()) + self.params


_SELECTOR = (
    Param("name", "string", "the device of this name", None),
    Param("uuid", "string", "the device of this uuid", None),
    Param("minor", "integer", "the device of this minor number", None, maximum=_MAX_MINOR),
)
_CWD = Param("cwd", "string", "folder that relative paths in the table start from", None)
_INACTIVE = Param("inactive", "boolean", "the inactive table instead of the live one", False)
_INFO = "info: see below"

METHODS: dict[str, Method] = {
    "version": Method(
        "Say what serves.",
        '{"dmpy", "driver" (of the kernel interface it follows), "nbdkit", "python"}',
    ),
    "server": Method(
        "Describe the server, once it has attached what it has to attach at its start.",
        '{"pid", "uri" (of the NBD server), "tcp_uri" (the same over TCP, or null), "runtime", '
        '"state", "devdir" (folders, or null), "metrics" (HOST:PORT or unix:PATH, or null), '
        '"uptime" (seconds), "failed": [{"name", "uuid", "minor", "error"}] (devices that could '
        "not be rebuilt)}",
    ),
    "targets": Method(
        "List the target types.", '[{"name", "version": [major, minor, patch]}], sorted by name'
    ),
    "create": Method(
        "Create a device, and make it live if a table is given.",
        _INFO,
        (
            Param("name", "string", "name of the new device, without a slash"),
            Param("table", "string", "table lines, or null for a device without a table", None),
            Param("uuid", "string", "its uuid", ""),
            Param("readonly", "boolean", "refuse writes", False),
            Param("minor", "integer", "its minor number, or null for the lowest that is free",
                  None, maximum=_MAX_MINOR),
            _CWD,
        ),
    ),
    "load": Method(
        "Load an inactive table, which the next resume makes live.",
        _INFO,
        (
            Param("table", "string", "table lines"),
            Param("readonly", "boolean", "refuse writes; null: as the device is", None),
            _CWD,
        ),
        "one",
    ),
    "clear": Method("Drop the inactive table.", _INFO, (), "one"),
    "suspend": Method(
        "Let requests under way end, and hold new ones back until resume.",
        _INFO,
        (
            Param("noflush", "boolean", "do not flush what is queued", False),
            Param("nolockfs", "boolean",
                  "taken for dmsetup's sake: no file system is frozen from here either way", False),
        ),
        "one",
    ),
    "resume": Method(
        "Make the inactive table live, if there is one, and let requests go on.", _INFO, (), "one"
    ),
    "remove": Method(
        "Remove a device that nobody uses.",
        "{}",
        (
            Param("force", "boolean", "first replace its table by one that fails every request",
                  False),
            Param("deferred", "boolean", "if it is in use, remove it at its last close", False),
        ),
        "one",
    ),
    "rename": Method(
        "Give a device another name.", _INFO, (Param("new_name", "string", "the new name"),), "one"
    ),
    "set_uuid": Method(
        "Give a uuid to a device that has none.",
        _INFO,
        (Param("new_uuid", "string", "the uuid"),),
        "one",
    ),
    "message": Method(
        "Send a message to the target at a sector.",
        '{"reply"}: text, "" for most messages',
        (
            Param("sector", "integer", "where the target is, in sectors of 512 bytes", 0),
            Param("message", "string", "words, separated by blanks"),
        ),
        "one",
    ),
    "info": Method("Describe a device.", _INFO, (), "optional"),
    "table": Method(
        "Print a table.",
        '{"name", "lines": [[begin (sectors), length (sectors), type, arguments]]}; no lines '
        "without a table",
        (_INACTIVE, Param("showkeys", "boolean", "keys as they are, not as zeroes", False)),
        "optional",
    ),
    "status": Method(
        "Print the status of every target.",
        '{"name", "lines": [[begin (sectors), length (sectors), type, status]]}',
        (_INACTIVE, Param("noflush", "boolean", "do not commit metadata first", False)),
        "optional",
    ),
    "deps": Method(
        "List what a device's table stands on.",
        '{"name", "deps": [{"major", "minor", "name"}]}',
        (_INACTIVE,),
        "optional",
    ),
    "wait": Method(
        "Wait for an event of a device. Ends early when the client or the server goes away.",
        "info, after the event",
        (
            Param("event_nr", "integer", "the last event that is known; null: the present one",
                  None),
            Param("timeout", "number", "seconds, then ETIMEDOUT; null: for ever", None),
        ),
        "one",
    ),
    "stats": Method(
        "Count a device's requests since it was created.",
        '{"name", "reads", "writes", "read_bytes", "write_bytes", "flushes", "discards", "zeroes", '
        '"errors", "in_flight", "read_histogram", "write_histogram", ...}; entry i of a histogram '
        "counts requests whose nanoseconds have i binary digits",
        (),
        "optional",
    ),
    "attach": Method(
        "Make a block device of this machine of a device.",
        '{"node"}: its path, such as /dev/nbd0 or /dev/loop0',
        (Param("as_file", "boolean", "a file instead, which needs no root", False),),
        "one",
    ),
    "detach": Method("Undo attach, after everything was flushed.", '{"node"}', (), "one"),
    "shutdown": Method(
        "Flush, detach and stop the server after this reply. Refused with EBUSY while the node of "
        "an attached device is in use.",
        "{}",
        (Param("force", "boolean", "stop even so: what is mounted fails from then on", False),),
    ),
}

_KINDS = {"string": str, "integer": int, "number": (int, float), "boolean": bool}

_REFERENCE_HEAD = f"""\
# Control socket

`RUNTIME/control.sock` speaks JSON-RPC 2.0: one request a line, one reply a line, each at most
{MAX_REQUEST >> 20} MiB. The socket takes its owner and root. `dmpy.client.Client` is a client; so
is `socat - UNIX-CONNECT:RUNTIME/control.sock`. Parameters go by name, or by position: the three of
the selector, where there is one, then those of the table. Batches and notifications are as JSON-RPC
has them.

A *selector* is exactly one of `name`, `uuid` and `minor`.

*info* is {{"name", "uuid", "major", "minor", "size_sectors", "open_count", "event_nr", "targets"
(their number), "readonly", "suspended", "live_table", "inactive_table" (whether there is one),
"deferred_remove", "block_size", "attached" (the node, or "")}}.

A request that a device refuses is answered by an error with code {DEVICE_REFUSES}, a sentence as
"message", and "data": {{"errno", "errno_name", "kind"}}, for a table also "line", "target",
"argument". What is wrong with the request itself has JSON-RPC's own codes.
"""


def reference() -> str:
    """Return the reference of the control socket, as markdown printed from METHODS."""
    parts = [_REFERENCE_HEAD]
    for name, method in METHODS.items():
        parts.append(f"\n## {name}\n\n{method.meaning}\n")
        if method.selector:
            parts.append({
                "one": "\nOf one device: a selector.\n",
                "optional": "\nOf one device: a selector; of all without.\n",
            }[method.selector])
        if method.params:
            parts.append("\n| parameter | type | default | meaning |\n| --- | --- | --- | --- |\n")
        for param in method.params:
            default = "required" if param.required else f"`{json.dumps(param.default)}`"
            parts.append(f"| `{param.name}` | {param.kind} | {default} | {param.meaning} |\n")
        parts.append(f"\nResult: {method.result}.\n")
    return "".join(parts)


# A request that JSON-RPC itself refuses.
class _Invalid(Exception):
    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


# Make the arguments of a handler of what a request says, or raise _Invalid naming the parameter.
def _arguments(name: str, method: Method, given: object) -> dict[str, object]:
    params = method.all_params
    if isinstance(given, list):
        if len(given) > len(params):
            raise _Invalid(INVALID_PARAMS, f"{name}: too many parameters (got {len(given)}, "
                           f"expected at most {len(params)})")
        given = dict(zip((param.name for param in params), given, strict=False))
    unknown = given.keys() - {param.name for param in params}
    if unknown:
        known = ", ".join(param.name for param in params) or "none"
        raise _Invalid(INVALID_PARAMS, f"{name}: unknown parameter {min(unknown)[:100]} "
                       f"(expected {known})")
    arguments = {}
    for param in params:
        value = given.get(param.name, param.default)
        if value is _REQUIRED:
            raise _Invalid(INVALID_PARAMS, f"{name}: parameter {param.name} is missing")
        if value is not None or param.default is not None:
            _check_value(name, param, value)
        arguments[param.name] = value
    if method.selector:
        count = sum(arguments[param.name] is not None for param in _SELECTOR)
        if count > 1 or (count == 0 and method.selector == "one"):
            raise _Invalid(INVALID_PARAMS, f"{name}: a device is named by one of name, uuid and "
                           f"minor (got {count} of them)")
    return arguments


def _check_value(name: str, param: Param, value: object) -> None:
    right = isinstance(value, _KINDS[param.kind])
    if not right or (isinstance(value, bool) and param.kind != "boolean"):
        raise _Invalid(INVALID_PARAMS, f"{name}: parameter {param.name} has the wrong type (got "
                       f"{_json_kind(value)}, expected {param.kind})")
    if isinstance(value, str):
        # What no path and no name can hold must not get as far as a system call.
        try:
            valid = b"\0" not in os.fsencode(value)
        except UnicodeEncodeError:
            valid = False
        if not valid:
            raise _Invalid(INVALID_PARAMS, f"{name}: parameter {param.name} holds a NUL character "
                           "or half a surrogate pair")
    elif param.kind != "boolean" and not param.minimum <= value <= param.maximum:
        raise _Invalid(INVALID_PARAMS, f"{name}: parameter {param.name} is out of range (got "
                       f"{value}, expected {param.minimum} to {param.maximum})")


def _json_kind(value: object) -> str:
    if value is None:
        return "null"
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}
    return kinds.get(type(value), "object")


# Parse one line, strictly: Python's reader would take NaN, and guess UTF-16.
def _parse(line: bytes | bytearray) -> object:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    try:
        return json.loads(line.decode("utf-8"), parse_constant=refuse)
    except RecursionError:
        raise _Invalid(PARSE_ERROR, "request is nested too deep") from None
    except ValueError as error:
        raise _Invalid(PARSE_ERROR, f"request is not JSON: {str(error)[:200]}") from None


# The JSON-RPC error object of whatever a handler raised.
def _error_object(error: Exception) -> dict:
    if isinstance(error, _Invalid):
        return {"code": error.code, "message": str(error)}
    if isinstance(error, OSError):
        number = error.errno or errno.EIO
        kind = "DeviceError" if isinstance(error, DeviceError) else "OSError"
        message = error.strerror or str(error) or os.strerror(number)
        if error.filename is not None and not isinstance(error, DeviceError):
            message = f"{error.filename}: {message}"
        data = {}
    elif isinstance(error, ValueError):
        number, message = errno.EINVAL, str(error)
        kind = type(error).__name__
        data = {}
        if isinstance(error, TableError):
            number = error.errno
            data = {"line": error.line, "target": error.target, "argument": error.argument}
        elif not isinstance(error, FormatError):
            kind = "ValueError"
    else:
        number, kind, data = errno.EIO, type(error).__name__, {}
        message = f"bug in dmpy, its log has the traceback: {kind}: {error}"
    data = {"errno": number, "errno_name": errno.errorcode.get(number, "")} | data
    code = DEVICE_REFUSES if isinstance(error, OSError | ValueError) else INTERNAL_ERROR
    return {"code": code, "message": message, "data": data | {"kind": kind}}


def _reply(number: object, **content: object) -> dict:
    return {"jsonrpc": "2.0", "id": number} | content


def _to_line(reply: object) -> bytes:
    return json.dumps(reply, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"


# --- one connection ----------------------------------------------------------------------------


class _Connection:
    def __init__(self, server: ControlServer, sock: socket.socket) -> None:
        self.server = server
        self.socket = sock
        # Since when nothing of a request has come, or None while one is read or served.
        self.idle_since: float | None = time.monotonic()
        # Whether it waits for an event, perhaps for days: it takes no room from the others then.
        self.waits = False
        self.thread = threading.Thread(target=self._run, name="control", daemon=True)
        # To be called when the reply is out: shutdown.
        self.after_reply: Callable[[], None] | None = None
        self._received = bytearray()

    def _run(self) -> None:
        try:
            if self._is_allowed():
                self._serve()
        except OSError as error:
            _log.debug("a control connection ended: %s", error)  # its client went away
        except Exception:
            _log.exception("a control connection ended by a bug of ours")
        finally:
            self.server._drop(self)
            self.socket.close()

    # The socket's mode keeps others out; this holds also where the mode was widened.
    def _is_allowed(self) -> bool:
        uid = _peer_uid(self.socket)
        if uid in (0, os.geteuid()):
            return True
        refusal = DeviceError(errno.EPERM, f"user {uid} may not control this server")
        self._send(_reply(None, error=_error_object(refusal)))
        return False

    def _serve(self) -> None:
        while True:
            try:
                line = self._next_line()
                if line is None:
                    return
                reply = self._answer(line)
            except _Invalid as error:
                reply = _reply(None, error=_error_object(error))
            except TimeoutError:
                sentence = f"half a request, then silence for {self.server.request_timeout:g} s"
                error = _Invalid(INVALID_REQUEST, sentence)
                self._send(_reply(None, error=_error_object(error)))
                return
            line = b""
            if reply is not None:
                self._send(reply)
            if self.after_reply is not None:
                self.after_reply()
                self.after_reply = None

    # Return the next line, or None at the end. The time-out is for a whole request, so that a
    # byte now and then does not hold the connection; for the first byte there is none.
    def _next_line(self) -> bytes | bytearray | None:
        searched = 0
        too_large = False
        deadline = None
        while (end := self._received.find(b"\n", searched)) < 0:
            if len(self._received) > self.server.max_request:
                too_large = True
                self._received.clear()  # and what comes up to the next newline goes too
            searched = len(self._received)
            if deadline is None and (searched or too_large):
                deadline = time.monotonic() + self.server.request_timeout
            self.idle_since = time.monotonic() if deadline is None else None
            self._set_timeout(deadline)
            piece = self.socket.recv(_RECEIVE_SIZE)
            self.idle_since = None
            if not piece:
                line, self._received = self._received, bytearray()
                return line or None
            self._received += piece
        line = self._received[:end]
        del self._received[: end + 1]
        if too_large or len(line) > self.server.max_request:
            limit = self.server.max_request
            raise _Invalid(INVALID_REQUEST, f"request is larger than {limit} bytes")
        return line

    def _set_timeout(self, deadline: float | None) -> None:
        if deadline is None:
            self.socket.settimeout(None)
            return
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.socket.settimeout(left)

    def _send(self, reply: object) -> None:
        self.socket.settimeout(self.server.request_timeout)
        self.socket.sendall(_to_line(reply))

    def _answer(self, line: bytes | bytearray) -> object:
        request = _parse(line)
        if not isinstance(request, list):
            return self._answer_one(request)
        if not 0 < len(request) <= _MAX_BATCH:
            raise _Invalid(INVALID_REQUEST, f"batch must have 1 to {_MAX_BATCH} requests (got "
                           f"{len(request)})")
        replies = [self._answer_one(each) for each in request]
        return [reply for reply in replies if reply is not None] or None

    # None for a notification, whose sender wants to hear nothing, not even of errors.
    def _answer_one(self, request: object) -> dict | None:
        try:
            name, method, given, number, is_notification = _check_request(request)
        except _Invalid as error:
            return _reply(None, error=_error_object(error))
        try:
            if method is None:
                raise _Invalid(METHOD_NOT_FOUND, f"no method {name[:100]}")
            result = self.server._call(self, name, _arguments(name, method, given))
            reply = _reply(number, result=result)
        except Exception as error:
            reply = _reply(number, error=_error_object(error))
            if reply["error"]["code"] == INTERNAL_ERROR:
                _log.exception("control: %s", name)
        return None if is_notification else reply

    def is_abandoned(self) -> bool:
        """Say whether the client has closed; one that only ended its sending still listens."""
        poll = select.poll()
        poll.register(self.socket, 0)
        return bool(poll.poll(0))

    def end(self, how: int) -> None:
        """Stop reading (SHUT_RD) or everything (SHUT_RDWR), from any thread."""
        with suppress(OSError):
            self.socket.shutdown(how)


# Take a request apart; the parameters are checked later, when there is an id to reply to.
def _check_request(request: object) -> tuple[str, Method | None, object, object, bool]:
    if not isinstance(request, dict):
        raise _Invalid(INVALID_REQUEST, f"request is not an object (got {_json_kind(request)})")
    if request.get("jsonrpc") != "2.0":
        raise _Invalid(INVALID_REQUEST, 'request lacks "jsonrpc": "2.0"')
    name = request.get("method")
    if not isinstance(name, str):
        raise _Invalid(INVALID_REQUEST, "request lacks a method")
    given = request.get("params", {})
    if not isinstance(given, dict | list):
        raise _Invalid(INVALID_REQUEST, f"params are no object and no array (got "
                       f"{_json_kind(given)})")
    number = request.get("id")
    finite = not isinstance(number, float) or math.isfinite(number)
    if isinstance(number, bool | list | dict) or not finite:
        raise _Invalid(INVALID_REQUEST, "id is no string, number or null")
    return name, METHODS.get(name), given, number, "id" not in request


def _peer_uid(sock: socket.socket) -> int:
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1]


# --- the server --------------------------------------------------------------------------------


class ControlServer:
    """Serves the control socket of one Mapper.

    Args:
        mapper: whose devices; not closed by this.
        path: of the socket, in a folder that only its owner can write to.
        info: what `server` and `version` tell: "uri", "tcp_uri", "runtime", "state", "devdir",
            "metrics", "nbdkit"; with "devdir" every device that becomes live is attached and
            linked there.
        shutdown: begins to stop the server and returns at once; called after the reply.
        max_connections: how many clients are served at a time, beside those that wait for an
            event. One more closes the connection that has been idle for longest, or waits for one,
            or is refused.
        request_timeout: seconds from the first byte of a request to its last, and for a reply.
        max_request: bytes.
    """

    def __init__(
        self,
        mapper: Mapper,
        path: str | os.PathLike[str],
        *,
        info: dict[str, str | None] | None = None,
        shutdown: Callable[[], None] | None = None,
        max_connections: int = 128,
        request_timeout: float = 30.0,
        max_request: int = MAX_REQUEST,
    ) -> None:
        self.mapper = mapper
        self.path = os.fspath(path)
        self.request_timeout = request_timeout
        self.max_request = max_request
        self._info = dict(info or {})
        self._shutdown = shutdown
        self._max_connections = max_connections
        self._started = time.monotonic()
        self._stopping = threading.Event()
        # Set once what has to be attached at the start is attached, or was tried.
        self._ready = threading.Event()
        runtime = self._info.get("runtime") or os.path.dirname(os.path.abspath(self.path))
        self.attachments = Attachments(
            mapper, runtime, uri=self._info.get("uri"), devdir=self._info.get("devdir")
        )
        self._listener: socket.socket | None = None
        # Protects _connections, told of each that ends; held for a moment, takes nothing.
        self._changed = threading.Condition()
        self._connections: set[_Connection] = set()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Open the socket and begin to serve, in threads.

        Raises:
            DeviceError: EBUSY when another server answers on the socket.
            OSError: the socket cannot be made.
        """
        self._listener = _listen(self.path)
        for work in (self._accept, self._attach):
            thread = threading.Thread(target=work, name=work.__name__, daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Detach what nobody uses, end what waits, let the rest reply, and remove the socket.

        Call it while NBD is still served: detaching flushes. Stopping twice is fine.
        """
        if self._stopping.is_set() or self._listener is None:
            return
        self._stopping.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        with self._changed:
            self._changed.notify_all()
            connections = list(self._connections)
        for connection in connections:
            connection.end(socket.SHUT_RD)
        self.attachments.refuse_more()
        self._ready.wait(_STOP_PATIENCE)
        self.attachments.close()
        deadline = time.monotonic() + _STOP_PATIENCE
        for connection in connections:
            if connection.thread is not threading.current_thread():
                connection.thread.join(max(0.0, deadline - time.monotonic()))
            connection.end(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(1.0)
        self._listener.close()
        with suppress(FileNotFoundError):
            os.unlink(self.path)

    def __enter__(self) -> ControlServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _attach(self) -> None:
        try:
            self.attachments.start()
        finally:
            self._ready.set()

    # -- connections --

    def _accept(self) -> None:
        complained = False
        while not self._stopping.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if self._stopping.is_set():
                    return
                # Descriptors or memory are out: they come back when some connections end.
                if not complained:
                    _log.error("control socket: cannot accept: %s", error.strerror)
                complained = True
                self._stopping.wait(0.1)
                continue
            complained = False
            self._welcome(sock)

    def _welcome(self, sock: socket.socket) -> None:
        if not self._make_room():
            sentence = f"{self._max_connections} control requests are under way already"
            refusal = _error_object(DeviceError(errno.EAGAIN, sentence))
            with suppress(OSError):
                sock.setblocking(False)
                sock.send(_to_line(_reply(None, error=refusal)))
            sock.close()
            return
        connection = _Connection(self, sock)
        with self._changed:  # so that stop() finds no thread that has not begun
            try:
                if not self._stopping.is_set():
                    connection.thread.start()
                    self._connections.add(connection)
                    return
            except RuntimeError as error:  # no more threads
                _log.error("control socket: %s", error)
        sock.close()

    # Wait until one more connection may be served; say whether it may.
    def _make_room(self) -> bool:
        deadline = time.monotonic() + _ROOM_PATIENCE
        with self._changed:
            while self._number_of(waiting=False) >= self._max_connections:
                now = time.monotonic()
                idle = [each for each in self._connections if each.idle_since is not None]
                oldest = min(idle, key=lambda each: each.idle_since or now, default=None)
                if oldest is not None and now - (oldest.idle_since or now) >= _MIN_IDLE:
                    self._connections.discard(oldest)
                    oldest.end(socket.SHUT_RDWR)
                elif now >= deadline or self._stopping.is_set():
                    return False
                else:
                    self._changed.wait(_MIN_IDLE / 4)
        return True

    # How many connections wait for an event, or do not; under _changed.
    def _number_of(self, *, waiting: bool) -> int:
        return sum(each.waits is waiting for each in self._connections)

    # Surrounds a wait for an event.
    @contextmanager
    def _waiting(self, connection: _Connection) -> Iterator[None]:
        with self._changed:
            if self._number_of(waiting=True) >= _MOST_WAITING:
                raise DeviceError(errno.EAGAIN, f"{_MOST_WAITING} clients wait for events already")
            connection.waits = True
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                connection.waits = False

    def _drop(self, connection: _Connection) -> None:
        with self._changed:
            self._connections.discard(connection)
            self._changed.notify_all()

    # -- methods --

    def _call(self, connection: _Connection, name: str, arguments: dict) -> object:
        method = METHODS[name]
        if name != "version":
            self._ready.wait()
        handler = getattr(self, f"_do_{name}")
        if not method.selector:
            return handler(connection, **arguments)
        selector = {param.name: arguments.pop(param.name) for param in _SELECTOR}
        if any(value is not None for value in selector.values()):
            if name == "remove" and self._remove_lost(selector):
                return {}
            return handler(connection, self._device(selector), **arguments)
        devices = sorted(self.mapper.devices(), key=lambda device: device.name)
        return [handler(connection, device, **arguments) for device in devices]

    def _device(self, selector: dict) -> MappedDevice:
        try:
            return self.mapper.device(**selector)
        except OSError as error:
            lost = self._lost(selector)
            if lost is None:
                raise
            sentence = f"device {lost.name} could not be rebuilt: {lost.error}"
            raise DeviceError(error.errno, sentence, device=lost.name) from None

    # The entry of the journal that a selector names, when it was too damaged to make a device of.
    def _lost(self, selector: dict) -> FailedEntry | None:
        if not self.mapper.failed:
            return None
        there = {device.minor for device in self.mapper.devices()}
        for failed in self.mapper.failed:
            named = any(value and getattr(failed, key) == value for key, value in selector.items())
            if (named or failed.minor == selector["minor"]) and failed.minor not in there:
                return failed
        return None

    # Such an entry can only be removed.
    def _remove_lost(self, selector: dict) -> bool:
        lost = self._lost(selector)
        if lost is not None:
            self.mapper.remove(lost.name)
        return lost is not None

    def _describe(self, device: MappedDevice) -> dict:
        used = self.attachments.use(device) is not None
        info = device.info()
        open_count = info["open_count"] + used
        return info | {"open_count": open_count, "attached": self.attachments.node(device)}

    def _do_version(self, connection: _Connection) -> dict:
        return {
            "dmpy": dmpy.__version__,
            "driver": DRIVER_VERSION,
            "nbdkit": self._info.get("nbdkit") or "",
            "python": ".".join(map(str, sys.version_info[:3])),
        }

    def _do_server(self, connection: _Connection) -> dict:
        known = {key: self._info.get(key) for key in _SERVER_KEYS}
        failed = [
            {"name": each.name, "uuid": each.uuid, "minor": each.minor, "error": str(each.error)}
            for each in self.mapper.failed
        ]
        uptime = round(time.monotonic() - self._started, 3)
        return {"pid": os.getpid(), **known, "uptime": uptime, "failed": failed}

    def _do_targets(self, connection: _Connection) -> list:
        targets = sorted(self.mapper.targets())
        return [{"name": name, "version": list(version)} for name, version in targets]

    def _do_create(self, connection: _Connection, name: str, **rest: object) -> dict:
        device = self.mapper.create(name, rest.pop("table"), **rest)
        try:
            self.attachments.became_live(device)
        except OSError:
            self.mapper.remove(name)  # with a device folder, a device without a node is none
            raise
        return self._describe(device)

    def _do_load(self, connection: _Connection, device: MappedDevice, **rest: object) -> dict:
        self.mapper.load(device.name, rest.pop("table"), **rest)
        return self._describe(device)

    def _do_clear(self, connection: _Connection, device: MappedDevice) -> dict:
        self.mapper.clear(device.name)
        return self._describe(device)

    def _do_suspend(
        self, connection: _Connection, device: MappedDevice, noflush: bool, nolockfs: bool
    ) -> dict:
        self.mapper.suspend(device.name, noflush=noflush)
        return self._describe(device)

    def _do_resume(self, connection: _Connection, device: MappedDevice) -> dict:
        self.mapper.resume(device.name)
        self.attachments.became_live(device)
        return self._describe(device)

    def _do_remove(
        self, connection: _Connection, device: MappedDevice, force: bool, deferred: bool
    ) -> dict:
        with self.attachments.removal(device, deferred=deferred):
            self.mapper.remove(device.name, force=force, deferred=deferred)
        return {}

    def _do_rename(self, connection: _Connection, device: MappedDevice, new_name: str) -> dict:
        self.mapper.rename(device.name, new_name)
        self.attachments.renamed(device)
        return self._describe(device)

    def _do_set_uuid(self, connection: _Connection, device: MappedDevice, new_uuid: str) -> dict:
        self.mapper.set_uuid(device.name, new_uuid)
        return self._describe(device)

    def _do_message(
        self, connection: _Connection, device: MappedDevice, sector: int, message: str
    ) -> dict:
        return {"reply": self.mapper.message(device.name, sector, message) or ""}

    def _do_info(self, connection: _Connection, device: MappedDevice) -> dict:
        return self._describe(device)

    def _do_table(self, connection: _Connection, device: MappedDevice, **rest: object) -> dict:
        return {"name": device.name, "lines": device.table_lines(**rest)}

    def _do_status(self, connection: _Connection, device: MappedDevice, **rest: object) -> dict:
        return {"name": device.name, "lines": device.status_lines(**rest)}

    def _do_deps(self, connection: _Connection, device: MappedDevice, inactive: bool) -> dict:
        keys = ("major", "minor", "name")
        deps = [dict(zip(keys, each, strict=True)) for each in device.deps(inactive=inactive)]
        return {"name": device.name, "deps": deps}

    def _do_wait(
        self,
        connection: _Connection,
        device: MappedDevice,
        event_nr: int | None,
        timeout: float | None,
    ) -> dict:
        with self._waiting(connection):
            self._wait(connection, device, event_nr, timeout)
        return self._describe(device)

    # Waits in slices, between which it looks whether there is still somebody to reply to.
    def _wait(
        self,
        connection: _Connection,
        device: MappedDevice,
        event_nr: int | None,
        timeout: float | None,
    ) -> None:
        known = device.event_nr if event_nr is None else event_nr
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = _WAIT_SLICE if deadline is None else deadline - time.monotonic()
            try:
                device.wait(known, max(0.0, min(left, _WAIT_SLICE)))
                return
            except OSError as error:
                if error.errno != errno.ETIMEDOUT:
                    raise
            if self._stopping.is_set():
                raise DeviceError(errno.ESHUTDOWN, "the server is stopping", device=device.name)
            if connection.is_abandoned():
                raise DeviceError(errno.ECONNABORTED, "the client went away", device=device.name)
            if deadline is not None and time.monotonic() >= deadline:
                sentence = f"device {device.name}: no event within {timeout:g} s"
                raise DeviceError(errno.ETIMEDOUT, sentence, device=device.name)

    def _do_stats(self, connection: _Connection, device: MappedDevice) -> dict:
        return {"name": device.name, **device.stats.snapshot()}

    def _do_attach(self, connection: _Connection, device: MappedDevice, as_file: bool) -> dict:
        return {"node": self.attachments.attach(device, as_file=as_file)}

    def _do_detach(self, connection: _Connection, device: MappedDevice) -> dict:
        return {"node": self.attachments.detach(device)}

    def _do_shutdown(self, connection: _Connection, force: bool) -> dict:
        if self._shutdown is None:
            raise DeviceError(errno.EOPNOTSUPP, "this server is stopped by the program it is in")
        users = self.attachments.users()
        if users and not force:
            raise DeviceError(errno.EBUSY, f"the server cannot stop: {'; '.join(users)}")
        connection.after_reply = self._shutdown
        return {}


# Make a socket of mode 0600 which nobody ever sees half made: it gets its name when it listens. A
# socket that a dead server left is replaced in the same step.
def _listen(path: str) -> socket.socket:
    aside = os.path.join(os.path.dirname(path), f".{os.getpid()}")
    if len(os.fsencode(path)) > 107 or len(os.fsencode(aside)) > 107:
        sentence = f"{path}: path is too long for a socket (expected at most 107 bytes)"
        raise DeviceError(errno.ENAMETOOLONG, sentence)
    if _answers(path):
        raise DeviceError(errno.EBUSY, f"{path}: another server answers there")
    listener = socket.socket(socket.AF_UNIX)
    try:
        with suppress(FileNotFoundError):
            os.unlink(aside)
        listener.bind(aside)
        os.chmod(aside, 0o600)
        listener.listen(128)
        os.rename(aside, path)
    except BaseException:
        listener.close()
        raise
    return listener


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            pass  # a queue that is full, say: whatever it is, it is not known to be dead
        return True
