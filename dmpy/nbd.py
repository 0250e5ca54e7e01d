"""The NBD edge: what nbdkit's Python plugin asks for, answered from a registry of devices.

A plugin script is `globals().update(dmpy.nbd.callbacks(plugin))`, where the plugin says how it is
configured and which devices it has. This is the only module that knows nbdkit, and it knows these
traps of nbdkit 1.32 to 1.48 (the tests in tests/nbd/ hold each of them):

- A server with several threads a connection is aborted by any client that hangs up, before 1.34:
  there a connection's requests are served one after another, whatever -t says.
- Entering Python costs 20 us more when the thread's state is not kept: it is pinned in open() and
  let go in close(), and in worker threads from their first request to their end.
- An error raised in a callback is never freed: it is kept small, and freed here.
- SIGTERM waits for idle clients for ever and skips close(): a drain thread lets them go first.
- Booleans must be True and False themselves, extents tuples inside the request, threads may start
  only after the fork.
"""

from __future__ import annotations

import ctypes
import errno
import getopt
import logging
import os
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from dmpy import background, buffers
from dmpy.device import BlockDevice, BlockSize
from dmpy.edge import Edge, Edges, advertised
from dmpy.mapped import MappedDevice
from dmpy.opening import Opening

try:
    import nbdkit
except ImportError:  # outside of nbdkit there is nothing to serve, but this can still be read
    nbdkit = None

__all__ = ["Plugin", "Refusal", "Registry", "callbacks", "nbdkit_version", "wire_errno"]

_log = logging.getLogger("dmpy.nbd")

# Seconds at the end of a server: for clients to leave by themselves, for requests that were sent to
# be answered, for requests that wait on a suspended device to fail.
_GRACE = 0.2
_ANSWER_TIME = 2.0
_LAST_TIME = 20.0

# As many devices as there are minor numbers, of a file each.
_MOST_FILES = 1 << 20

# More exports than this make nbdkit answer a listing with an error.
_MOST_LISTED = 10_000

# What NBD can carry. Everything else reaches a client as EINVAL, which says that the client is to
# blame, so it becomes EIO.
_CARRIED = {
    number: number
    for number in (
        errno.EPERM, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC, errno.EOPNOTSUPP,
        errno.ESHUTDOWN,
    )
} | {
    errno.EROFS: errno.EPERM,
    errno.EACCES: errno.EPERM,
    errno.EDQUOT: errno.ENOSPC,
    errno.EFBIG: errno.ENOSPC,
}  # fmt: skip


def wire_errno(number: int | None) -> int:
    """Return the errno that tells an NBD client best what a device's errno says."""
    return _CARRIED.get(number, errno.EIO)


class Refusal(Exception):
    """What a plugin raises to say in one sentence why it does not start or a request fails."""


class Registry(Protocol):
    """The devices that a server offers."""

    def names(self) -> list[tuple[str, str]]:
        """Return the name and a description of each."""

    def default(self) -> str:
        """Return the name of the device for clients that do not name one, or "" for none."""

    def open(self, name: str, readonly: bool) -> BlockDevice:
        """Return a device and count its user.

        Raises:
            OSError: there is none of this name, or it cannot be opened.
        """

    def describe(self, device: BlockDevice) -> str:
        """Return the description of an opened device."""

    def block_size(self, device: BlockDevice) -> BlockSize:
        """Return the block sizes that clients of an opened device should keep to."""

    def release(self, name: str, device: BlockDevice) -> None:
        """Undo one open()."""

    def watch(self, changed: Callable[[BlockDevice], None]) -> None:
        """Call `changed` whenever a device has got other block sizes."""


class Plugin:
    """How a plugin is configured, started and stopped; the base of the plugins.

    Attributes:
        registry: the devices; set by prepare().
        socket: path of the Unix socket that nbdkit was told to listen on, or None.
        readonly: True when nbdkit was started with -r.
        takes_files: arguments that are not key=value mean file=ARGUMENT.
        has_mapped_devices: every device is a MappedDevice, which has a shorter way for requests.
        tcp_needs_tls: with nbdkit's --tls=on, refuse clients over TCP that do not use TLS; those of
            a Unix socket may do as they like.
    """

    registry: Registry
    socket: str | None = None
    readonly = False
    takes_files = False
    has_mapped_devices = False
    tcp_needs_tls = False

    def configure(self, key: str, value: str) -> None:
        """Take one key=value argument; this one knows none.

        Raises:
            Refusal, OSError, ValueError: it is wrong; the sentence says how.
        """
        raise Refusal(f"unknown parameter {key} (got {key}={value})")

    def prepare(self) -> None:
        """Open the devices, before the fork, so without threads; an error ends nbdkit."""

    def start(self, end: Callable[[], None]) -> None:
        """Start threads; `end` ends the server from any of them, as SIGTERM does."""

    def retire(self) -> None:
        """The server ends: let go of whatever is itself a client. Clients are still served."""

    def interrupt(self) -> None:
        """Make requests that wait on a device fail: some have not ended by themselves."""

    def stop(self) -> None:
        """Flush and close everything; no request is under way."""


# --- errors ------------------------------------------------------------------------------------


# A request that failed, for nbdkit, which has been told the errno; str() is the line for its log.
class _RequestFailed(Exception):
    pass


# One like another that the connection has had: of no news to the log.
class _FailedAgain(_RequestFailed):
    pass


# nbdkit's plugin takes references to the exception, its type and its traceback and never gives
# them back (1.32 to 1.48), so every failure would stay in memory for ever. It formats each
# exception by traceback.format_exception just before, which is where they are noted, by thread;
# they are freed at the thread's next failure, or its connection's end.
_leaked: dict[int, tuple[weakref.ref, type, object]] = {}
_format_exception = traceback.format_exception
_drop_reference = ctypes.pythonapi.Py_DecRef
_drop_reference.argtypes = [ctypes.py_object]
_drop_reference.restype = None


# Takes the place of traceback.format_exception: our own errors are one line without a traceback.
def _format(kind, value=None, trace=None, *rest, **options):
    if kind is not _FailedAgain:
        _hush.end()
    if kind not in (_RequestFailed, _FailedAgain, Refusal):
        return _format_exception(kind, value, trace, *rest, **options)
    _leaked[threading.get_ident()] = (weakref.ref(value), kind, trace)
    # One line, and one that can be encoded: names and paths may be any bytes.
    text = str(value).replace("\n", "\\n")
    lines = [text.encode("utf-8", "backslashreplace").decode()]
    if kind is _FailedAgain:
        _hush.begin()  # last, so that nothing else is silenced with it
    return lines


# Free what this thread's last failure left.
def _reap() -> None:
    reference, kind, trace = _leaked.pop(threading.get_ident(), (None, None, None))
    error = reference() if reference is not None else None
    if error is None:
        return  # none, or an nbdkit that does not leak
    if trace is not None:
        _drop_reference(trace)
    _drop_reference(kind)
    _drop_reference(error)


# Tell nbdkit the errno and make the exception to raise.
def _failed(handle: _Handle, error: OSError, what: str, offset: int, length: int) -> Exception:
    _reap()
    number = wire_errno(error.errno)
    # nbdkit would take this for "write zeroes instead", and does that wrongly before 1.44.
    if number == errno.EOPNOTSUPP and what != "fast zero":
        number = errno.EIO
    nbdkit.set_error(number)
    name = errno.errorcode.get(error.errno, "EIO")
    where = f"{what} of {length} bytes at byte {offset}" if length else what
    kind = _FailedAgain if (what, number) in handle.failures else _RequestFailed
    handle.failures.add((what, number))
    return kind(f"[{name}] {handle.name}: {where}: {error.strerror or error}")


# The same for what is no request.
def _refused(number: int, sentence: str) -> Refusal:
    _reap()
    nbdkit.set_error(wire_errno(number))
    return Refusal(sentence)


# --- the log -----------------------------------------------------------------------------------


# Hands records to nbdkit's log, wherever --log sends it: stderr or syslog. Records below the level
# are for nbdkit -v.
class _Log(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(logging.DEBUG)
        self._level = level
        self._error = ctypes.PyDLL(None).nbdkit_error

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        _hush.end()
        if record.levelno < self._level:
            nbdkit.debug(text)
            return
        if record.levelno < logging.ERROR:
            text = f"{record.levelname.lower()}: {text}"
        self._error(b"%s", text.encode("utf-8", "backslashreplace"))


# nbdkit has a line for every request that fails, and a client that keeps asking a leg that is gone
# would fill the disk (20,000 lines a second). It writes the line after _format(), in the same
# thread, with the GIL held: for as long, stderr leads nowhere. A thread that waits for the GIL
# leads it back. Not for syslog, nor while requests are debugged.
class _Hush:
    def __init__(self) -> None:
        self._dup2 = ctypes.PyDLL(None).dup2  # keeps the GIL
        self._stderr = self._nowhere = -1
        # Released: stderr has to be led back.
        self._begun = threading.Lock()
        self._begun.acquire()

    def start(self) -> None:
        self._nowhere = os.open(os.devnull, os.O_WRONLY)
        self._stderr = os.dup(2)
        threading.Thread(target=self._run, name="hush", daemon=True).start()

    def begin(self) -> None:
        if self._stderr >= 0:
            self._dup2(self._nowhere, 2)
            with suppress(RuntimeError):  # somebody else has begun, and it has not ended yet
                self._begun.release()

    # What comes next is worth reading.
    def end(self) -> None:
        if self._stderr >= 0:
            self._dup2(self._stderr, 2)

    def _run(self) -> None:
        while self._begun.acquire():
            self.end()


_hush = _Hush()


def _log_level(word: str) -> int:
    level = logging.getLevelNamesMapping().get(word.upper())
    if level is None:
        raise Refusal(f"loglevel must be one of debug, info, warning, error (got {word})")
    return level


def _start_log(level: int) -> None:
    top = logging.getLogger("dmpy")
    top.handlers = [_Log(level)]
    top.setLevel(logging.DEBUG)
    top.propagate = False


# --- thread states -----------------------------------------------------------------------------

# PyDLL keeps the GIL, which both need. Each Ensure beyond nbdkit's own keeps the thread's state
# alive from one callback to the next.
_ensure = ctypes.pythonapi.PyGILState_Ensure
_release = ctypes.pythonapi.PyGILState_Release
_LOCKED = 0

_worker = threading.local()
_UNPIN = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_unpin = _UNPIN(lambda _: _release(_LOCKED))


# Keep the state of the calling worker thread until the thread ends. A pthread key's destructor
# would come too late: Python's own key is cleared by then.
def _pin_worker() -> None:
    at_exit = ctypes.CDLL(None).__cxa_thread_atexit_impl
    at_exit.argtypes = [_UNPIN, ctypes.c_void_p, ctypes.c_void_p]
    _worker.pinned = True
    _ensure()
    # The last argument says which library must stay loaded; NULL crashes glibc 2.36.
    at_exit(_unpin, None, ctypes.cast(_ensure, ctypes.c_void_p))


# A callback that may be the first of its worker thread. What is thread-local lives as long as the
# thread's state, so it tells whether that is pinned.
def _in_worker(callback: Callable) -> Callable:
    def pinned(*arguments):
        try:
            _worker.pinned
        except AttributeError:
            _pin_worker()
        return callback(*arguments)

    return pinned


# --- how nbdkit was started --------------------------------------------------------------------

# Of nbdkit 1.32 to 1.48; `=` marks those with a value.
_SHORT_OPTIONS = "46D:e:fg:hi:nop:P:rst:u:U:vV"
_LONG_OPTIONS = (
    "ipv4-only ipv6-only debug= dump-config dump-plugin exit-with-parent export= export-name= "
    "exportname= filter= foreground no-fork group= help ip-addr= ipaddr= log= long-options "
    "mask-handshake= new-style newstyle no-mc no-meta-contexts no-sr old-style oldstyle pid-file= "
    "pidfile= port= print-uri read-only readonly run= selinux-label= short-options single stdin "
    "swap threads= timeout= tls= tls-certificates= tls-psk= tls-verify-peer unix= user= verbose "
    "version vsock keepalive"
).split()
_DEFAULT_THREADS = 16


# What the command line says and nbdkit does not tell its plugins.
class _Options:
    __slots__ = ("exit_with_parent", "readonly", "socket", "threads")

    def __init__(self) -> None:
        self.exit_with_parent = False
        self.readonly = False
        self.socket: str | None = None
        self.threads = _DEFAULT_THREADS
        with open("/proc/self/cmdline", "rb") as file:
            words = [os.fsdecode(word) for word in file.read().split(b"\0")[1:-1]]
        # An option that we do not know ends the reading; what follows counts as not given.
        with suppress(getopt.GetoptError, ValueError):
            for option, value in getopt.gnu_getopt(words, _SHORT_OPTIONS, _LONG_OPTIONS)[0]:
                if option in ("-t", "--threads"):
                    self.threads = int(value) or _DEFAULT_THREADS
                elif option in ("-r", "--readonly", "--read-only"):
                    self.readonly = True
                elif option == "--exit-with-parent":
                    self.exit_with_parent = True
                elif option in ("-U", "--unix") and value != "-":
                    self.socket = os.path.abspath(value)


def nbdkit_version() -> str:
    """Return the version of the nbdkit that runs this process, "" when it does not tell."""
    with suppress(OSError, subprocess.SubprocessError, IndexError):
        answer = subprocess.run(
            ["/proc/self/exe", "--version"], capture_output=True, text=True, timeout=10, check=True
        )
        return answer.stdout.split()[1]
    return ""


# nbdkit 1.32.5 asks the kernel to send it SIGTERM when its parent ends, --exit-with-parent or not
# (seen with strace): a server that a command starts in the background would end with the command.
_PR_SET_PDEATHSIG = 1


def _outlive_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)


# Each file under a device and each client takes a descriptor, and 1,024 is what most systems give a
# process that does not ask for more. (nbdkit writes a line for every attempt to accept a client
# that it has no descriptor for, without a pause.)
def _allow_many_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# Whether a client that hangs up ends a server with several threads a connection ("raw_send_socket:
# Assertion `sock >= 0' failed"). nbdkit commit 9d82aa4f (in 1.33.10) ended that.
def _hangups_are_fatal() -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", nbdkit_version())
    return numbers is None or tuple(map(int, numbers.groups())) < (1, 34)


# nbdkit takes bare arguments for plugins in C only and stops at one after our script. It reads its
# argument vector while it goes along, and runs this in the middle of it, so a bare argument can
# become file=ARGUMENT just in time. Without glibc's name for the vector the user has to type that.
_named_arguments: list[bytes] = []  # nbdkit reads them where they are


def _name_bare_arguments() -> None:
    try:
        words = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "_dl_argv")
    except ValueError:
        return
    place = 0
    while words[place] is not None:
        place += 1
    # From the end back to the script itself: nbdkit has moved options to the front.
    script = os.fsencode(sys.modules["__main__"].__file__)
    place -= 1
    while words[place] not in (script, b"script=" + script):
        if re.match(rb"[A-Za-z][A-Za-z0-9_.-]*=", words[place]) is None:
            _named_arguments.append(b"file=" + words[place])
            words[place] = _named_arguments[-1]
        place -= 1
        if place == 0:
            return


# --- connections -------------------------------------------------------------------------------


# One client's view of a device. The slots that requests need are here, ready.
class _Handle(Opening):
    __slots__ = (
        "__weakref__", "edge", "failures", "name", "odd_offset", "odd_read", "odd_write", "preadv",
        "pwritev", "readonly", "size",
    )  # fmt: skip

    def __init__(self, name: str, edge: Edge, readonly: bool) -> None:
        device = edge.device
        if isinstance(device, MappedDevice):
            super().__init__(device, 0)
        else:
            self.device = device
        self.name = name
        self.edge = edge
        self.readonly = readonly or device.readonly
        # What has failed so far, and with which errno.
        self.failures: set[tuple[str, int]] = set()
        self.size = device.size
        self.preadv = device.preadv
        self.pwritev = device.pwritev
        self.refresh()

    def refresh(self) -> None:
        edge = self.edge
        self.odd_offset = edge.odd_offset
        self.odd_read = edge.odd_read
        self.odd_write = edge.odd_write
        self.largest = edge.largest

    def close(self) -> None:
        if isinstance(self.device, MappedDevice):
            super().close()

    # The way of requests that Opening does not make itself. Fast path: the request is made of whole
    # blocks, not larger than the device takes, and no read for which scratch could be better, so it
    # can go to the device as it is.
    def read_slowly(self, view: memoryview, offset: int) -> None:
        try:
            if len(view) & self.odd_read or offset & self.odd_offset:
                self.edge.read(view, offset)
            else:
                self.preadv([view], offset)
        except OSError as error:
            raise _failed(self, error, "read", offset, len(view)) from None

    # Fast path: as for reads.
    def write_slowly(self, view: memoryview, offset: int, fua: bool) -> None:
        try:
            if len(view) & self.odd_write or offset & self.odd_offset:
                self.edge.write(view, offset, fua)
            else:
                self.pwritev([view], offset, fua=fua)
        except OSError as error:
            raise _failed(self, error, "write", offset, len(view)) from None


# Of devices that are no mapped devices every request goes that way.
def _pread(handle: _Handle, buffer: memoryview, offset: int, flags: int) -> None:
    handle.read_slowly(buffer, offset)


def _pwrite(handle: _Handle, buffer: memoryview, offset: int, flags: int) -> None:
    handle.write_slowly(buffer, offset, flags != 0)  # FLAG_FUA is the only one that writes have


def _flush(handle: _Handle, flags: int) -> None:
    try:
        handle.device.flush()
    except OSError as error:
        raise _failed(handle, error, "flush", 0, 0) from None


def _trim(handle: _Handle, count: int, offset: int, flags: int) -> None:
    try:
        handle.edge.trim(offset, count, fua=flags & nbdkit.FLAG_FUA != 0)
    except OSError as error:
        raise _failed(handle, error, "trim", offset, count) from None


def _zero(handle: _Handle, count: int, offset: int, flags: int) -> None:
    fast_only = flags & nbdkit.FLAG_FAST_ZERO != 0
    try:
        handle.edge.zero(
            offset,
            count,
            may_unmap=flags & nbdkit.FLAG_MAY_TRIM != 0,
            fast_only=fast_only,
            fua=flags & nbdkit.FLAG_FUA != 0,
        )
    except OSError as error:
        what = "fast zero" if fast_only else "zero"
        raise _failed(handle, error, what, offset, count) from None


def _extents(handle: _Handle, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    try:
        return handle.edge.extents(offset, count, flags & nbdkit.FLAG_REQ_ONE != 0)
    except OSError as error:
        raise _failed(handle, error, "block status", offset, count) from None


# What nbdkit calls for requests, by name. That of a mapped device is a method itself, called with
# the handle as `self`: each frame between nbdkit and the system call is 3 % of a small request.
def _requests(plugin: Plugin) -> dict[str, Callable]:
    return {
        "pread": _Handle.read if plugin.has_mapped_devices else _pread,
        "pwrite": _Handle.write if plugin.has_mapped_devices else _pwrite,
        "flush": _flush,
        "trim": _trim,
        "zero": _zero,
        "extents": _extents,
    }


# Everything else that nbdkit asks: one for each server.
class _Server:
    def __init__(self, plugin: Plugin) -> None:
        self.plugin = plugin
        self.options = _Options()
        self.level = logging.WARNING
        self.draining = False
        self.handles: set[_Handle] = set()
        self._edges = Edges()
        # Protects handles, held for a moment only; nothing is taken under it.
        self._lock = threading.Lock()
        self._drain = _Drain(self)
        plugin.readonly = self.options.readonly
        plugin.socket = self.options.socket

    # -- start and end --

    def config(self, key: str, value: str) -> None:
        try:
            if key == "loglevel":
                self.level = _log_level(value)
            else:
                self.plugin.configure(key, value)
        except (OSError, ValueError) as error:
            raise _refused(errno.EINVAL, f"{key}: {_sentence(error)}") from None

    def thread_model(self) -> int:
        if self.options.threads > 1 and _hangups_are_fatal():
            self.options.threads = 1
            return nbdkit.THREAD_MODEL_SERIALIZE_REQUESTS
        return nbdkit.THREAD_MODEL_PARALLEL

    def get_ready(self) -> None:
        _start_log(self.level)
        _allow_many_files()
        # No thread lives through the fork that is to come.
        background.defer()
        try:
            self.plugin.prepare()
            self.plugin.registry.watch(self.device_changed)
        except (OSError, ValueError) as error:
            raise _refused(errno.EINVAL, _sentence(error)) from None

    def after_fork(self) -> None:
        if not self.options.exit_with_parent:
            _outlive_parent()
        if self.options.socket is not None:
            os.chmod(self.options.socket, 0o600)
        if self.options.threads > 1:
            script = vars(sys.modules["__main__"])
            requests = _requests(self.plugin)
            script.update({name: _in_worker(call) for name, call in requests.items()})
        buffers.slow_copy_width()  # measured now, not in the first client's big read
        self._drain.start()
        if self.level > logging.DEBUG:
            _hush.start()
        background.allow()
        try:
            self.plugin.start(self._drain.begin)
        except (OSError, ValueError) as error:
            raise _refused(errno.EINVAL, _sentence(error)) from None

    def cleanup(self) -> None:
        self.plugin.stop()

    # -- before a client has a device --

    def preconnect(self, readonly: bool) -> None:
        if self.draining:
            raise _refused(errno.ESHUTDOWN, "the server is shutting down")

    def list_exports(self, readonly: bool, is_tls: bool) -> list[tuple[str, str]]:
        self._refuse_plain_tcp(is_tls)
        names = [
            (name, _on_the_wire(text))
            for name, text in self.plugin.registry.names()
            if _on_the_wire(name) == name
        ]
        if len(names) > _MOST_LISTED:
            _log.warning("%d exports: only %d are listed", len(names), _MOST_LISTED)
        return names[:_MOST_LISTED]

    def default_export(self, readonly: bool, is_tls: bool) -> str:
        self._refuse_plain_tcp(is_tls)
        name = self.plugin.registry.default()
        return name if _on_the_wire(name) == name else ""

    # nbdkit requires TLS of all clients or of none. `is_tls` is None where only nbdkit can tell.
    def _refuse_plain_tcp(self, is_tls: bool | None) -> None:
        if not self.plugin.tcp_needs_tls or is_tls or _is_on_unix_socket():
            return
        if is_tls is None and ctypes.PyDLL(None).nbdkit_is_tls() == 1:
            return
        raise _refused(errno.EPERM, "TLS is required over TCP")

    # -- connections --

    def open(self, readonly: bool) -> _Handle:
        self._refuse_plain_tcp(None)
        try:
            name = nbdkit.export_name()
        except UnicodeDecodeError:
            raise _refused(errno.ENOENT, "the export's name is not UTF-8") from None
        try:
            device = self.plugin.registry.open(name, readonly)
        except OSError as error:
            sentence = f"export {name[:200]!r}: {_sentence(error)}"
            raise _refused(error.errno, sentence) from None
        handle = _Handle(name, self._edges.take(device), readonly)
        with self._lock:
            self.handles.add(handle)
        _log.debug("%s: opened", name)
        _ensure()  # nothing may fail from here on
        return handle

    def close(self, handle: _Handle) -> None:
        handle.close()
        self._edges.give_back(handle.edge)
        try:
            self.plugin.registry.release(handle.name, handle.device)
        except OSError as error:
            _log.error("%s: close: %s", handle.name, _sentence(error))
        finally:
            _log.debug("%s: closed", handle.name)
            with self._lock:
                self.handles.discard(handle)
            _reap()
            _release(_LOCKED)

    # A client keeps the size and the flags that it was told, but its requests must fit the device.
    def device_changed(self, device: BlockDevice) -> None:
        self._edges.refresh(device)
        with self._lock:
            handles = [handle for handle in self.handles if handle.device is device]
        for handle in handles:
            handle.refresh()

    # -- what a device is like; nbdkit wants True and False themselves --

    def get_size(self, handle: _Handle) -> int:
        return int(handle.size)

    def block_size(self, handle: _Handle) -> tuple[int, int, int]:
        block_size = self.plugin.registry.block_size(handle.device)
        return tuple(map(int, advertised(block_size)))

    def export_description(self, handle: _Handle) -> str:
        return _on_the_wire(self.plugin.registry.describe(handle.device))

    def can_write(self, handle: _Handle) -> bool:
        return not handle.readonly

    def can_fua(self, handle: _Handle) -> int:
        return nbdkit.FUA_NATIVE

    def can_cache(self, handle: _Handle) -> int:
        return nbdkit.CACHE_EMULATE  # reading it is what brings it into the caches below

    # A flush covers what every connection has written: all share the device.
    def can_multi_conn(self, handle: _Handle) -> bool:
        return True

    def can_flush(self, handle: _Handle) -> bool:
        return True

    def can_trim(self, handle: _Handle) -> bool:
        return True

    def can_zero(self, handle: _Handle) -> bool:
        return True

    def can_fast_zero(self, handle: _Handle) -> bool:
        return True

    def can_extents(self, handle: _Handle) -> bool:
        return True

    def is_rotational(self, handle: _Handle) -> bool:
        return False


# Text as NBD can carry it: UTF-8 of at most 4096 bytes. Names and paths may be any bytes.
def _on_the_wire(text: str) -> str:
    encoded = text.encode("utf-8", "replace").partition(b"\0")[0]
    return encoded[:4096].decode("utf-8", "ignore")


def _sentence(error: Exception) -> str:
    sentence = getattr(error, "strerror", None) or str(error)
    filename = getattr(error, "filename", None)
    return sentence if filename is None else f"{filename}: {sentence}"


# Whether the client of the calling thread came in through a Unix socket. nbdkit's Python module has
# no such call before 1.38.
def _is_on_unix_socket() -> bool:
    address = ctypes.create_string_buffer(128)
    length = ctypes.c_uint(len(address))
    if ctypes.PyDLL(None).nbdkit_peer_name(address, ctypes.byref(length)) != 0:
        return False
    return int.from_bytes(address.raw[:2], sys.byteorder) == socket.AF_UNIX


# --- the end of a server -----------------------------------------------------------------------


# Ends the server in order: no new clients, time for the old ones to leave, no more requests from
# those who stay, their last replies, close(), and only then nbdkit's own end, which would skip
# close() and wait for idle clients for ever.
class _Drain:
    def __init__(self, server: _Server) -> None:
        self._server = server
        self._addresses: set[object] = set()
        self._write_fd = -1

    # In the main thread, after the fork, before anybody else listens on a socket.
    def start(self) -> None:
        self._addresses = {_place(listener) for listener in _sockets() if _listens(listener)}
        read_fd, self._write_fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._write_fd, False)
        # nbdkit's main thread never runs Python handlers; the signal's number in the pipe does it.
        signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._run, args=(read_fd,), name="drain", daemon=True).start()

    # From any thread.
    def begin(self) -> None:
        with suppress(BlockingIOError):  # the pipe is full: somebody else has begun
            os.write(self._write_fd, bytes([signal.SIGTERM]))

    def _run(self, read_fd: int) -> None:
        ends = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
        while os.read(read_fd, 1)[0] not in ends:
            pass
        server = self._server
        _log.info("shutting down, %d clients", len(server.handles))
        try:
            server.plugin.retire()
        except Exception:
            _log.exception("shutting down")
        server.draining = True
        self._wait(_GRACE)
        self._hang_up()
        if not self._wait(_ANSWER_TIME):
            _log.warning("shutting down, requests still wait: they are made to fail")
            breaker = threading.Thread(target=server.plugin.interrupt, daemon=True)
            breaker.start()
            breaker.join(_LAST_TIME)
            if breaker.is_alive() or not self._wait(_LAST_TIME):
                _log.error("shutting down, a device does not answer: leaving without it")
                os._exit(1)
        nbdkit.shutdown()

    # Let clients know that nobody reads any more; replies can still be sent.
    def _hang_up(self) -> None:
        for connection in _sockets():
            with connection, suppress(OSError):
                if not _listens(connection) and _place(connection) in self._addresses:
                    connection.shutdown(socket.SHUT_RD)

    # Wait until all clients are gone, or some seconds; returns whether they are.
    def _wait(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while self._server.handles and time.monotonic() < end:
            time.sleep(0.01)
        return not self._server.handles


# The sockets that this process has open, as new objects on descriptors of their own.
def _sockets() -> list[socket.socket]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            fd = int(name)
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                found.append(socket.socket(fileno=os.dup(fd)))
    return found


def _listens(found: socket.socket) -> bool:
    return found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) != 0


# Where a socket is, the same for a listener and for the connections that it accepted. Connections
# that we made ourselves, to a server below, have another.
def _place(found: socket.socket) -> object:
    name = found.getsockname()
    return name[1] if isinstance(name, tuple) else name


# --- what a script needs -----------------------------------------------------------------------


def callbacks(plugin: Plugin) -> dict[str, object]:
    """Return what nbdkit looks for in a script: `globals().update(callbacks(plugin))`.

    Args:
        plugin: what the script serves.
    """
    traceback.format_exception = _format
    if plugin.takes_files:
        _name_bare_arguments()
    server = _Server(plugin)
    names = [name for name in vars(_Server) if name[0] != "_" and name != "device_changed"]
    answers = {name: getattr(server, name) for name in names}
    return {"API_VERSION": 2} | _requests(plugin) | answers
