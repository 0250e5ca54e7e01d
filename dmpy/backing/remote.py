"""A leaf on an NBD server: `nbd://host/export`, `nbd+unix:///export?socket=path`, TLS too.

Requests go through libnbd on up to four connections, each with one request in flight. A server
that went away is connected to again by the request that needs it next.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn
from urllib.parse import quote, unquote

from dmpy import buffers as scratch_memory
from dmpy.device import DATA, HOLE, ZERO, BlockDevice, BlockSize, Buffers, Extent
from dmpy.device import merge_extents, slices, total
from dmpy.errors import DeviceError
from dmpy.units import SECTOR_SIZE, round_down

__all__ = ["SCHEMES", "RemoteLeaf", "absolute_uri"]

# What a URI for this leaf can begin with.
SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix")

# Connections to a server that allows several (or that nobody writes to).
_CONNECTIONS = 4
# Seconds: to connect, and without any sign of life while a request is in flight.
_CONNECT_TIMEOUT = 10
_REQUEST_TIMEOUT = 60
# libnbd's limit for one read or write. Also the largest zero request that older servers carry out
# fully where they emulate it: nbdkit before 1.44.1 zeroes the first 64 MiB again and again.
_LARGEST_PIECE = 64 << 20
# Trim and block status carry no data; one gibibyte keeps them below NBD's 32 bits.
_LARGEST_RANGE = 1 << 30
# Buffers that are no single view are gathered in scratch, this many bytes at a time.
_GATHERED = 4 << 20

# Py_DecRef through PyDLL: the interpreter's lock is held.
_drop_reference = ctypes.pythonapi.Py_DecRef
_drop_reference.argtypes = [ctypes.py_object]
_drop_reference.restype = None

_CONTEXT = "base:allocation"
# Query parameters of a URI that name files.
_PATHS = ("socket", "tls-psk-file", "tls-certificates")


class RemoteLeaf(BlockDevice):
    """An export of an NBD server.

    A server that dies takes the requests in flight with it: reads and block status are tried once
    more on a new connection, all else gets EIO. Later requests connect again. As a server that
    died may have lost what it had not flushed, the first flush after that fails with EIO when
    anything was written since the last one.

    Args:
        uri: what libnbd takes, with absolute paths (`absolute_uri`).
        readonly: refuse writes.

    Attributes:
        identity: equal for two leaves exactly when they have the same URI.

    Raises:
        OSError: EACCES for a server that only lets read, or what connecting says.
    """

    def __init__(self, uri: str, *, readonly: bool = False) -> None:
        self.identity = ("nbd", uri)
        self.name = _public_name(uri)
        self._uri = uri
        self._nbd = self._module()
        # Protects the lists and counters below; nothing else is taken under it. Waited on for a
        # connection that is given back.
        self._changed = threading.Condition()
        self._idle: list = []
        # How many may be in use: as the server promised, and as it kept so far.
        self._limit = self._allowed = 1
        self._in_use = 0
        self._closed = False
        # True while completed writes wait for a flush; True once such writes may be gone.
        self._unflushed = self._lost = False
        # Until then (monotonic seconds) a server that did not answer is not asked again.
        self._quiet_until = 0.0
        self.size = 0
        self.readonly = True
        first = self._connected()
        self._idle.append(first)
        try:
            self._learn(first, readonly)
        except BaseException:
            self.close()
            raise

    @property
    def table_name(self) -> str:
        """The whole URI, with a backslash before each backslash."""
        return self._uri.replace("\\", "\\\\")

    def refresh(self) -> None:
        """Ask for the size anew, on a new connection: NBD tells it only there."""
        handle = self._connected()
        self.size = round_down(handle.get_size(), SECTOR_SIZE)
        with self._changed:
            stale, self._idle = self._idle, [handle]
        for old in stale:
            self._disconnect(old)

    def make_writable(self) -> None:
        """Accept writes from now on.

        Raises:
            OSError: EACCES where the server only lets read.
        """
        if self._server_readonly:
            self._fail(errno.EACCES, "the server permits reading only")
        self.readonly = False
        self._limit = self._allowed = _CONNECTIONS if self._multi_conn else 1

    def preadv(self, buffers: Buffers, offset: int) -> None:
        """Fill the buffers, in as many requests as the server's maximum asks for.

        Raises:
            OSError: what the server says, EIO when it is gone.
        """
        for view, place in self._pieces(buffers, offset):
            if len(view) == 1:
                self._read(view[0], place)
                continue
            with scratch_memory.scratch(total(view)) as space:
                self._read(space, place)
                begin = 0
                for part in view:
                    part[:] = space[begin : begin + len(part)]
                    begin += len(part)

    def pwritev(self, buffers: Buffers, offset: int, *, fua: bool = False) -> None:
        """Write the buffers, in as many requests as the server's maximum asks for.

        Raises:
            OSError: what the server says, EIO when it is gone.
        """
        self._check_writable()
        flags = self._nbd.CMD_FLAG_FUA if fua and self._can_fua else 0
        for view, place in self._pieces(buffers, offset):
            if len(view) == 1:
                self._write(view[0], place, flags)
                continue
            with scratch_memory.scratch(total(view)) as space:
                begin = 0
                for part in view:
                    space[begin : begin + len(part)] = part
                    begin += len(part)
                self._write(space, place, flags)
        if fua and not flags:
            self.flush()

    def flush(self) -> None:
        """Flush the server's cache.

        Raises:
            OSError: EIO, once, when the server was gone and may have lost writes.
        """
        if self.readonly:
            return
        with self._changed:
            # Cleared first: what is written meanwhile waits for the next flush.
            unflushed, self._unflushed = self._unflushed, False
        try:
            if self._can_flush:
                self._request("flush", 0, lambda handle: handle.aio_flush())
        except OSError:
            with self._changed:
                self._unflushed = self._unflushed or unflushed
            raise
        with self._changed:
            lost, self._lost = self._lost, False
        if lost:
            self._fail(errno.EIO, "the server was gone and may have lost writes before this flush")

    def discard(self, offset: int, length: int) -> None:
        """Trim the range.

        Raises:
            OSError: EOPNOTSUPP where the server cannot.
        """
        self._check_writable()
        if not self._can_trim:
            self._fail(errno.EOPNOTSUPP, "the server cannot trim")
        for place, piece in self._ranges(offset, length, _LARGEST_RANGE):
            self._request("trim", place, lambda handle, p=place, n=piece: handle.aio_trim(n, p))
            self._unflushed = True

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        """Have the server zero the range, or write zeroes where it cannot.

        Raises:
            OSError: EOPNOTSUPP for `fast_only` where the server has no fast way.
        """
        self._check_writable()
        if fast_only and not self._can_fast_zero:
            self._fail(errno.EOPNOTSUPP, "the server has no fast way to zero")
        if not self._can_zero:
            super().write_zeroes(offset, length, may_unmap=may_unmap)
            return
        flags = 0 if may_unmap else self._nbd.CMD_FLAG_NO_HOLE
        fast = self._nbd.CMD_FLAG_FAST_ZERO if fast_only else 0
        for place, piece in self._ranges(offset, length, _LARGEST_PIECE):
            self._request("zero", place, self._zero_command(place, piece, flags | fast))
            self._unflushed = True
            # What has begun is finished: "fast or nothing" is answered by the first piece.
            fast = 0

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Ask the server for block status; all is data where it has none."""
        if not self._can_extents:
            return iter([Extent(offset, length, DATA)])
        return merge_extents(self._block_status(offset, length))

    def close(self) -> None:
        """Disconnect; no request may be in flight."""
        with self._changed:
            self._closed = True
            handles, self._idle = self._idle, []
            self._changed.notify_all()
        for handle in handles:
            self._disconnect(handle)

    # libnbd, which a machine without NBD leaves need not have.
    def _module(self):
        try:
            return importlib.import_module("nbd")
        except ImportError as error:
            reason = "needs libnbd's Python module nbd (package python3-libnbd)"
            raise DeviceError(errno.ENOPKG, f"{self.name}: {reason}", device=self.name) from error

    # Remember what the server can do.
    def _learn(self, handle, readonly: bool) -> None:
        self._multi_conn = handle.can_multi_conn()
        self._server_readonly = handle.is_read_only()
        self._can_flush = handle.can_flush()
        self._can_fua = handle.can_fua()
        self._can_trim = handle.can_trim()
        self._can_zero = handle.can_zero()
        self._can_fast_zero = handle.can_fast_zero()
        self._can_extents = handle.can_meta_context(_CONTEXT)
        # The protocol's advice for servers that state nothing is 512 and 4096.
        minimum = handle.get_block_size(self._nbd.SIZE_MINIMUM) or SECTOR_SIZE
        preferred = handle.get_block_size(self._nbd.SIZE_PREFERRED) or 4096
        maximum = handle.get_block_size(self._nbd.SIZE_MAXIMUM) or _LARGEST_PIECE
        self._maximum = round_down(min(maximum, _LARGEST_PIECE), minimum)
        # No maximum upwards: a long request is sent in pieces.
        self.block_size = BlockSize(minimum, max(preferred, minimum))
        self.size = round_down(handle.get_size(), max(minimum, SECTOR_SIZE))
        if readonly:
            # Without writes there is nothing that two connections could see differently.
            self._limit = self._allowed = _CONNECTIONS
        else:
            self.make_writable()

    # A connected handle, within a bounded time.
    def _connected(self):
        begin = time.monotonic()
        if begin < self._quiet_until:
            self._fail(errno.EIO, "the server did not answer a moment ago")
        handle = self._nbd.NBD()
        try:
            handle.set_uri_allow_local_file(True)
            handle.add_meta_context(_CONTEXT)
            # Reads fill every byte or fail, so that clearing the buffer first is wasted time.
            handle.set_pread_initialize(False)
            handle.aio_connect_uri(self._uri)
            while not handle.aio_is_ready():
                if handle.poll(1000) == 0 and time.monotonic() - begin > _CONNECT_TIMEOUT:
                    self._fail(errno.ETIMEDOUT, "the server does not answer")
        except self._nbd.Error as error:
            self._quiet_until = time.monotonic() + min(time.monotonic() - begin, 5)
            self._fail(error.errnum or errno.EIO, f"no connection: {self._words(error)}")
        except OSError:
            self._quiet_until = time.monotonic() + 5
            raise
        return handle

    # A connection for one request, given back afterwards unless it died.
    @contextmanager
    def _connection(self):
        handle = self._taken()
        try:
            yield handle
        finally:
            with self._changed:
                self._in_use -= 1
                if _is_gone(handle):
                    self._forget_idle()
                elif not self._closed:
                    self._idle.append(handle)
                self._changed.notify()

    # An idle connection that is alive, or a new one; waits while all that may be are in use.
    def _taken(self):
        while True:
            with self._changed:
                while not self._idle and self._in_use >= self._limit and not self._closed:
                    self._changed.wait()
                if self._closed:
                    self._fail(errno.EBADF, "closed")
                self._in_use += 1
                alone = self._in_use == 1
                handle = self._idle.pop() if self._idle else None
            try:
                if handle is None:
                    handle = self._reconnected()
                    self._limit = self._allowed if alone else self._limit
                if self._is_alive(handle):
                    return handle
                failure = None
            except DeviceError as error:
                failure = error
            with self._changed:
                self._in_use -= 1
                if failure is None:
                    self._forget_idle()
                elif not alone:
                    # The server serves the others but takes no more: be content with those.
                    self._limit = max(1, self._in_use)
                self._changed.notify()
            if failure is not None and alone:
                sentence = failure.strerror
                raise DeviceError(errno.EIO, sentence, device=self.name) from failure

    # What idles leads to a server that is gone, and so may be what was written and not flushed.
    # Called with the lock held.
    def _forget_idle(self) -> None:
        self._idle.clear()
        self._lost = self._lost or self._unflushed
        self._unflushed = False

    # A connection to what must be the same export.
    def _reconnected(self):
        handle = self._connected()
        if handle.get_size() < self.size:
            reason = f"the export came back with {handle.get_size()} bytes (expected {self.size})"
            self._fail(errno.EIO, reason)
        if handle.is_read_only() and not self.readonly:
            self._fail(errno.EIO, "the export came back read-only")
        return handle

    # Whether the server has not hung up while nobody listened.
    def _is_alive(self, handle) -> bool:
        try:
            handle.poll(0)
        except self._nbd.Error:
            return False
        return not _is_gone(handle)

    # One request from command to reply. `again`: may be sent a second time after a lost server.
    def _request(self, verb: str, offset: int, send: Callable, *, again: bool = False) -> None:
        try:
            with self._connection() as handle:
                self._finish(handle, send(handle))
            return
        except self._nbd.Error as error:
            code = error.errnum or errno.EIO
            gone = _is_gone(handle) or code == errno.ESHUTDOWN
            words = self._words(error)
        except TimeoutError:
            gone, code, again = True, errno.EIO, False
            words = f"no answer in {_REQUEST_TIMEOUT} s"
        if gone and again:
            self._request(verb, offset, send)
            return
        reason = f"the server is gone ({words})" if gone else words
        sentence = f"{self.name}: {verb} at byte {offset}: {reason}"
        code = errno.EIO if gone else code
        raise DeviceError(code, sentence, device=self.name, offset=offset)

    # Wait for the reply to a command.
    def _finish(self, handle, cookie: int) -> None:
        while not handle.aio_command_completed(cookie):
            if handle.poll(int(_REQUEST_TIMEOUT * 1000)) == 0:
                self._hang_up(handle, cookie)
                raise TimeoutError

    # Cut a connection with a request in flight, so that no late reply is written into a buffer
    # that is somebody else's by then.
    def _hang_up(self, handle, cookie: int) -> None:
        with socket.socket(fileno=os.dup(handle.aio_get_fd())) as line:
            line.shutdown(socket.SHUT_RDWR)
        while self._is_alive(handle):
            pass
        with suppress(self._nbd.Error):
            handle.aio_command_completed(cookie)

    def _read(self, view: memoryview, offset: int) -> None:
        with self._lent(view) as target:
            self._request(
                "read", offset, lambda handle: handle.aio_pread(target, offset), again=True
            )

    def _write(self, view: memoryview, offset: int, flags: int) -> None:
        with self._lent(view) as source:
            self._request(
                "write", offset, lambda handle: handle.aio_pwrite(source, offset, flags=flags)
            )
        if not flags:
            self._unflushed = True

    # A view as libnbd wants it, and back again. libnbd 1.14 never drops the reference that each
    # command takes on the view (seen by sys.getrefcount): without the cure below every request
    # would leave an object behind and keep the caller's buffer for ever.
    @contextmanager
    def _lent(self, view: memoryview):
        own = view[:]
        lent = self._nbd.Buffer.from_buffer(own)
        references = sys.getrefcount(own)
        try:
            yield lent
        finally:
            while sys.getrefcount(own) > references:
                _drop_reference(own)
            own.release()

    # The extents of a range, as the server cuts them.
    def _block_status(self, offset: int, length: int) -> Iterator[Extent]:
        end = offset + length
        while offset < end:
            entries: list[int] = []

            def store(context, _offset, found, _error, entries=entries):
                if context == _CONTEXT:
                    entries[:] = found
                return 0

            count = min(end - offset, _LARGEST_RANGE)
            self._request(
                "block status",
                offset,
                lambda handle, n=count, p=offset, s=store: handle.aio_block_status(n, p, s),
                again=True,
            )
            begin = offset
            for size, flags in zip(entries[::2], entries[1::2], strict=True):
                size = min(size, end - offset)
                if size:
                    yield Extent(offset, size, _kind(flags))
                offset += size
            if offset == begin:
                # No answer, or an empty one: data is always true.
                yield Extent(offset, end - offset, DATA)
                return

    # Cut buffers at the server's maximum; lists of several also at what scratch should hold.
    def _pieces(self, buffers: Buffers, offset: int) -> Iterator[tuple[list[memoryview], int]]:
        length = total(buffers)
        step = self._maximum
        if len(buffers) > 1:
            step = min(step, max(_GATHERED, self.block_size.minimum))
        if length <= step:
            if length:
                yield list(buffers), offset
            return
        for begin in range(0, length, step):
            yield slices(buffers, begin, min(step, length - begin)), offset + begin

    # Cut a range that carries no data.
    @staticmethod
    def _ranges(offset: int, length: int, step: int) -> Iterator[tuple[int, int]]:
        for begin in range(0, length, step):
            yield offset + begin, min(step, length - begin)

    @staticmethod
    def _zero_command(offset: int, length: int, flags: int) -> Callable:
        return lambda handle: handle.aio_zero(length, offset, flags=flags)

    def _check_writable(self) -> None:
        if self.readonly:
            self._fail(errno.EROFS, "opened for reading only")

    # Say goodbye without waiting for an answer. libnbd closes with the last reference.
    def _disconnect(self, handle) -> None:
        if self._is_alive(handle):
            handle.aio_disconnect()

    # libnbd's words about a failure, after the name of its function; the system's words where
    # libnbd repeats a part of the URI that may be secret.
    def _words(self, error) -> str:
        text = error.string.partition(": ")[2] or error.string
        if any(secret in text for secret in _secrets(self._uri)):
            text = os.strerror(error.errnum) if error.errnum else "libnbd does not say why"
        return text[:1].lower() + text[1:]

    def _fail(self, code: int, reason: str) -> NoReturn:
        raise DeviceError(code, f"{self.name}: {reason}", device=self.name)


def absolute_uri(uri: str, cwd: str) -> str:
    """Return a URI whose relative paths begin in `cwd`: the server works in another folder.

    Args:
        uri: of one of SCHEMES.
        cwd: absolute path of a folder.

    Raises:
        OSError: EINVAL for a Unix socket without a path, or what is no URI.
    """
    scheme, _, rest = uri.partition("://")
    address, mark, query = rest.partition("?")
    fields = []
    for field in query.split("&"):
        key, equals, value = field.partition("=")
        if key in _PATHS:
            value = quote(os.path.join(cwd, unquote(value)), safe="/") if value else ""
        fields.append(key + equals + value)
    scheme = scheme.lower()
    if scheme.endswith("+unix") and not _query_value(fields, "socket"):
        name = _public_name(uri)
        raise DeviceError(errno.EINVAL, f"{name}: ?socket=PATH is missing", device=name)
    return f"{scheme}://{address}{mark}{'&'.join(fields)}"


# The value of a parameter, "" where there is none.
def _query_value(fields: list[str], key: str) -> str:
    values = [field[len(key) + 1 :] for field in fields if field.startswith(key + "=")]
    return values[0] if values else ""


# What of a URI may be shown: where the server is, not who asks, nor the files that hold keys.
def _public_name(uri: str) -> str:
    scheme, _, rest = uri.partition("://")
    address, _, query = rest.partition("?")
    authority, slash, export = address.partition("/")
    shown = f"{scheme}://{authority.rpartition('@')[2]}{slash}{export}"
    path = _query_value(query.split("&"), "socket")
    return f"{shown}?socket={path}" if path else shown


# What of a URI may not be shown, as it is written and as it is meant.
def _secrets(uri: str) -> set[str]:
    rest = uri.partition("://")[2]
    address, _, query = rest.partition("?")
    words = [address.partition("/")[0].rpartition("@")[0]]
    fields = [field.partition("=") for field in query.split("&")]
    words += [value for key, _, value in fields if key != "socket"]
    return {text for word in words for text in (word, unquote(word)) if text}


# NBD's flags as a kind. A hole that does not read as zeroes is data to everybody else.
def _kind(flags: int) -> int:
    return HOLE if flags & 3 == HOLE else ZERO if flags & ZERO else DATA


# Whether a connection is of no more use.
def _is_gone(handle) -> bool:
    return handle.aio_is_dead() or handle.aio_is_closed()
