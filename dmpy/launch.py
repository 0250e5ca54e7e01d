"""Where the server lives, and how it is started and stopped.

The server is nbdkit with `plugins/dmpy.py`. Its runtime folder holds control.sock, nbd.sock,
server.pid and server.log, its state folder the journal. A server that stops in order removes its
sockets and its pid file (`clean_runtime`); what is left of them tells that it died.

Whoever starts a server holds `RUNTIME/start.lock` meanwhile: of two that start one, the second
finds the server of the first.
"""

from __future__ import annotations

import errno
import os
import stat
import time

from dmpy.client import Client, ServerGone
from dmpy.errors import DeviceError

TYPE_CHECKING = False  # typing's own would cost the command line its import
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator

__all__ = [
    "Options",
    "ServerGone",
    "check_folder",
    "clean_runtime",
    "connect",
    "control_socket",
    "device_uri",
    "nbd_socket",
    "nbdkit_threads",
    "nbdkit_version",
    "plugin_path",
    "run_server",
    "runtime_dir",
    "server_command",
    "server_environment",
    "start_server",
    "state_dir",
    "stop_server",
]

_SOCKET_PATH_MAX = 107
# Seconds for a server to come up (its journal can be long), and to flush and end.
_START_PATIENCE = 60.0
_STOP_PATIENCE = 120.0
_POLL = 0.01
# Bytes of server.log after which the next start begins a new one.
_LOG_SIZE_MAX = 4 << 20
# Lines of the log that tell why a server did not come up.
_LOG_TAIL = 5
# nbdkit before this aborts when a client of a multi-threaded connection hangs up.
_THREADS_SINCE = (1, 34)

# Servers that this process started in the background: it has to reap them.
_started: dict[int, subprocess.Popen] = {}


# --- places ------------------------------------------------------------------------------------


def runtime_dir(*, create: bool = True) -> str:
    """Return the folder of sockets: DMPY_RUNTIME_DIR, or what the system has for that.

    Args:
        create: make it where it is missing, with mode 0700, and check that it is ours alone.

    Raises:
        DeviceError: as `check_folder`; ENAMETOOLONG when a socket's path would be too long.
    """
    named = os.environ.get("DMPY_RUNTIME_DIR")
    user = os.environ.get("XDG_RUNTIME_DIR")
    if named:
        path = os.path.abspath(named)
    elif os.geteuid() == 0:
        path = "/run/dmpy"
    elif user:
        path = os.path.join(user, "dmpy")
    else:
        path = f"/tmp/dmpy-{os.geteuid()}"
    length = len(os.fsencode(control_socket(path)))
    if length > _SOCKET_PATH_MAX:
        raise DeviceError(
            errno.ENAMETOOLONG,
            f"runtime folder {path}: path of the socket in it is too long (got {length} bytes, "
            f"expected at most {_SOCKET_PATH_MAX}); set DMPY_RUNTIME_DIR to a shorter one",
        )
    return check_folder(path) if create else path


def state_dir(*, create: bool = True) -> str:
    """Return the folder of the journal: DMPY_STATE_DIR, or what the system has for that.

    Args:
        create: make it where it is missing, with mode 0700, and check that it is ours alone.

    Raises:
        DeviceError: as `check_folder`.
    """
    named = os.environ.get("DMPY_STATE_DIR")
    runtime = os.environ.get("DMPY_RUNTIME_DIR")
    if named:
        path = os.path.abspath(named)
    elif runtime:
        path = os.path.join(os.path.abspath(runtime), "state")
    elif os.geteuid() == 0:
        path = "/var/lib/dmpy"
    else:
        home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
        path = os.path.join(os.path.abspath(home), "dmpy")
    return check_folder(path) if create else path


def check_folder(path: str) -> str:
    """Make a folder that only we can use, or see that it is one; returns its path.

    Raises:
        DeviceError: EPERM when it is somebody else's or others can write to it; ENOTDIR; the
            errno of what went wrong when it cannot be made.
    """
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass  # looked at next
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode) and found.st_uid in (0, os.geteuid()):
            found = os.stat(path)
    except OSError as error:
        raise DeviceError(
            error.errno, f"folder {path} cannot be made: {error.strerror}"
        ) from error
    if not stat.S_ISDIR(found.st_mode):
        raise DeviceError(errno.ENOTDIR, f"{path} is not a folder")
    if found.st_uid != os.geteuid():
        raise DeviceError(errno.EPERM, f"folder {path} belongs to user {found.st_uid}, not to us")
    if found.st_mode & 0o022:
        mode = stat.S_IMODE(found.st_mode)
        raise DeviceError(
            errno.EPERM, f"folder {path} can be written by others (got mode {mode:o}): chmod 700"
        )
    return path


def control_socket(runtime: str) -> str:
    """Return the path of the control socket."""
    return os.path.join(runtime, "control.sock")


def nbd_socket(runtime: str) -> str:
    """Return the path of the NBD socket."""
    return os.path.join(runtime, "nbd.sock")


def device_uri(name: str, runtime: str, *, base: str | None = None) -> str:
    """Return the NBD URI of a device, "" for the server as a whole.

    Args:
        name: of the device.
        runtime: the runtime folder.
        base: "uri" as the server tells it, for one with TLS.
    """
    from urllib.parse import quote, urlsplit

    base = base or f"nbd+unix:///?socket={quote(nbd_socket(runtime))}"
    # Put together by hand: urlunsplit() drops the empty host of schemes that it does not know.
    parts = urlsplit(base)
    return f"{parts.scheme}://{parts.netloc}/{quote(name, safe='')}?{parts.query}"


def plugin_path(name: str) -> str:
    """Return the path of a plugin script: in the source tree and when installed.

    Raises:
        DeviceError: ENOENT when there is none of this name.
    """
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "plugins", f"{name}.py")
    if not os.path.exists(path):
        raise DeviceError(errno.ENOENT, f"plugin {name} is not part of this installation ({path})")
    return os.path.realpath(path)


def clean_runtime(runtime: str) -> None:
    """Remove sockets and pid file: the last thing that a server does, the first of the next."""
    for name in ("control.sock", "nbd.sock", "server.pid"):
        try:
            os.unlink(os.path.join(runtime, name))
        except FileNotFoundError:
            pass  # a server that did not get far


# --- nbdkit ------------------------------------------------------------------------------------


def nbdkit_version() -> str:
    """Return nbdkit's version, such as "1.32.5".

    Raises:
        DeviceError: ENOENT when nbdkit is not installed.
    """
    words = _output(["nbdkit", "--version"]).split()
    return words[1] if len(words) > 1 else "0"


def nbdkit_threads(version: str) -> int:
    """Return how many threads a connection gets from an nbdkit of this version.

    Before 1.34 any client that hangs up aborts a server with more than one (fixed by nbdkit
    commit 9d82aa4f): there, parallel requests come from parallel connections.
    """
    numbers = tuple(int(word) for word in version.split(".")[:2] if word.isdigit())
    return 4 if numbers >= _THREADS_SINCE else 1


def server_environment() -> dict[str, str]:
    """Return the environment in which nbdkit's Python finds our packages.

    nbdkit embeds the distribution's Python, which takes the first python3 in PATH for itself;
    PYTHONEXECUTABLE tells it which one we run under, virtual environment included.

    Raises:
        DeviceError: ENOEXEC when nbdkit's Python is another version than this one.
    """
    import sys

    fields = dict(line.partition("=")[::2] for line in _output(
        ["nbdkit", "--dump-plugin", "python"]).splitlines())
    theirs = fields.get("python_version", "")
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    if theirs.split(".")[:2] != ours.split("."):
        raise DeviceError(
            errno.ENOEXEC,
            f"nbdkit runs Python {theirs or '(no Python plugin)'}, dmpy is installed for {ours}: "
            "scripts/setup installs it for nbdkit's",
        )
    environment = dict(os.environ)
    environment.pop("PYTHONHOME", None)
    environment["PYTHONEXECUTABLE"] = sys.executable
    return environment


# What a tool of nbdkit prints.
def _output(command: list[str]) -> str:
    import subprocess

    try:
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=20,
            check=True,
        )
    except FileNotFoundError:
        raise DeviceError(
            errno.ENOENT, "nbdkit is not installed (packages nbdkit and nbdkit-plugin-python)"
        ) from None
    except subprocess.SubprocessError as error:
        said = str(getattr(error, "stderr", "") or error).strip().splitlines()[-1]
        raise DeviceError(errno.EIO, f"`{' '.join(command)}` does not work: {said}") from None
    return done.stdout


class Options:
    """What can be chosen about a server.

    Args:
        devdir: folder that gets a link to each device's node, or None.
        loglevel: debug, info, warning or error.
        metrics: HOST:PORT of this machine or unix:PATH to serve Prometheus' metrics on.
        tcp: HOST:PORT to serve NBD on beside the Unix socket; a host that others can reach needs
            TLS. Port 0 takes any that is free.
        tls: of clients over TCP: "require", "on" (they may choose) or "off". Default: require when
            one of the next two is given. The Unix socket is there for plain clients in any case.
        tls_certificates: folder with ca-cert.pem, server-cert.pem and server-key.pem.
        tls_psk: file of lines USER:KEY.
        tls_verify_peer: clients need a certificate too.

    Raises:
        ValueError: they do not go together; the sentence says how.
    """

    __slots__ = ("_tcp", "devdir", "loglevel", "metrics", "tcp", "tls", "tls_certificates",
                 "tls_psk", "tls_verify_peer")

    def __init__(
        self,
        *,
        devdir: str | None = None,
        loglevel: str | None = None,
        metrics: str | None = None,
        tcp: str | None = None,
        tls: str | None = None,
        tls_certificates: str | None = None,
        tls_psk: str | None = None,
        tls_verify_peer: bool = False,
    ) -> None:
        self.devdir = os.path.abspath(devdir) if devdir else None
        self.loglevel = loglevel
        self.metrics = metrics
        self.tcp = tcp
        self.tls_certificates = os.path.abspath(tls_certificates) if tls_certificates else None
        self.tls_psk = os.path.abspath(tls_psk) if tls_psk else None
        self.tls_verify_peer = tls_verify_peer
        has_keys = bool(tls_certificates or tls_psk)
        self.tls = tls or ("require" if has_keys else "off")
        if metrics is not None:
            from dmpy.metrics import parse_address

            parse_address(metrics)
        if self.tls not in ("off", "on", "require"):
            raise ValueError(f"tls must be off, on or require (got {self.tls})")
        if tls_certificates and tls_psk:
            raise ValueError("tls: certificates and a file of keys do not go together")
        if self.tls != "off" and not has_keys:
            raise ValueError("tls needs a folder of certificates or a file of keys")
        if self.tls == "off" and (has_keys or tls_verify_peer):
            raise ValueError("tls is off, but has certificates, keys or clients to verify")
        if tls_verify_peer and tls_psk:
            raise ValueError("tls: clients with keys have no certificates to verify")
        if self.tls != "off" and tcp is None:
            raise ValueError("tls is for clients over tcp: it needs tcp=HOST:PORT")
        self._tcp = None if tcp is None else _tcp_place(tcp, encrypted=self.tls == "require")

    def arguments(self) -> list[str]:
        """Return the key=value arguments for the plugin."""
        given = {"devdir": self.devdir, "loglevel": self.loglevel, "metrics": self.metrics}
        return [f"{key}={value}" for key, value in given.items() if value is not None]

    def tls_arguments(self) -> list[str]:
        """Return nbdkit's own TLS options; whom it is required of is for the plugin to say."""
        if self.tls == "off":
            return []
        words = ["--tls=on"]
        if self.tls_certificates:
            words.append(f"--tls-certificates={self.tls_certificates}")
        if self.tls_psk:
            words.append(f"--tls-psk={self.tls_psk}")
        return words + ["--tls-verify-peer"] * self.tls_verify_peer


# Host and port of a TCP listener. Without TLS everybody who reaches it can read and write.
def _tcp_place(text: str, *, encrypted: bool) -> tuple[str, int]:
    import ipaddress

    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError(f"tcp must be HOST:PORT (got {text!r})")
    host = "127.0.0.1" if host == "localhost" else host
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = False
    if not is_local and not encrypted:
        raise ValueError(f"tcp: host {host} can be reached from elsewhere, which needs tls=require")
    return host, int(port)


def server_command(
    runtime: str, state: str, options: Options | None = None, *, version: str | None = None
) -> list[str]:
    """Return the command line of a server; for one on TCP it is to be handed its sockets.

    Args:
        runtime: the runtime folder.
        state: the state folder.
        options: what else was asked for.
        version: nbdkit's, None to ask it.
    """
    options = options or Options()
    threads = nbdkit_threads(version or nbdkit_version())
    command = ["nbdkit", "-f", "-t", str(threads), "-P", os.path.join(runtime, "server.pid")]
    if options.tcp is None:
        command += ["--unix", nbd_socket(runtime)]
    command += options.tls_arguments()
    command += ["python", plugin_path("dmpy"), f"runtime={runtime}", f"state={state}"]
    return command + options.arguments()


# nbdkit listens on a Unix socket or on TCP, unless it gets sockets that listen already, from 3 on,
# as systemd hands them over. This puts them there and becomes nbdkit.
_HAND_OVER = """
import fcntl, os, sys
count = int(sys.argv[1])
fds = [fcntl.fcntl(int(word), fcntl.F_DUPFD, 3 + count) for word in sys.argv[2:2 + count]]
for number, fd in enumerate(fds, 3):
    os.dup2(fd, number)
    os.close(fd)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(count))
os.execvp(sys.argv[2 + count], sys.argv[2 + count:])
"""


# Start nbdkit. The environment that it gets is that of server_environment().
def _spawn(
    runtime: str, state: str, options: Options, *, log: object, foreground: bool
) -> subprocess.Popen:
    import subprocess
    import sys

    command = server_command(runtime, state, options)
    if foreground:
        command.insert(1, "--exit-with-parent")
    environment = server_environment()
    listeners = []
    try:
        if options.tcp is not None:
            listeners = _listeners(runtime, options._tcp)
            host, port = listeners[1].getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            scheme = "nbds" if options.tls == "require" else "nbd"
            command.append(f"tcp_uri={scheme}://{host}:{port}")
            fds = [str(listener.fileno()) for listener in listeners]
            command = [sys.executable, "-I", "-S", "-c", _HAND_OVER, str(len(fds)), *fds, *command]
        return subprocess.Popen(
            command,
            cwd="/",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=not foreground,
            pass_fds=[listener.fileno() for listener in listeners],
        )
    finally:
        for listener in listeners:
            listener.close()


# The sockets of a server on TCP: our Unix socket too, as every client of this machine expects it.
def _listeners(runtime: str, place: tuple[str, int]) -> list:
    import socket

    unix = socket.socket(socket.AF_UNIX)
    unix.bind(nbd_socket(runtime))  # not listening yet, and in a folder of mode 0700
    os.chmod(nbd_socket(runtime), 0o600)
    unix.listen(128)
    try:
        family, _, _, _, address = socket.getaddrinfo(*place, type=socket.SOCK_STREAM)[0]
        tcp = socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        unix.close()
        host, port = place
        number = error.errno if error.errno and error.errno > 0 else errno.EADDRNOTAVAIL
        sentence = f"tcp: cannot listen on {host}:{port}: {error.strerror}"
        raise DeviceError(number, sentence) from None
    return [unix, tcp]


# --- starting and stopping ---------------------------------------------------------------------


def connect(runtime: str | None = None, *, timeout: float | None = None) -> Client:
    """Return a connection to the server that runs.

    Args:
        runtime: the runtime folder; None for the one of `runtime_dir`.
        timeout: seconds that a call may take, None for no limit.

    Raises:
        ServerGone: none runs; `died` tells whether one did.
        OSError: the socket is somebody else's.
    """
    return Client(control_socket(runtime or runtime_dir(create=False)), timeout=timeout)


def start_server(
    runtime: str | None = None,
    state: str | None = None,
    options: Options | None = None,
    *,
    patience: float = _START_PATIENCE,
) -> Client:
    """Start a server in the background, unless one runs, and return a connection to it.

    Args:
        runtime: the runtime folder; None for the one of `runtime_dir`.
        state: the state folder; None for the one of `state_dir`.
        options: for a new server. One that runs cannot take them; None takes it as it is.
        patience: seconds for it to come up.

    Raises:
        DeviceError: EBUSY when one runs already and there are options for it; it did not come up,
            and the sentence has the last lines of its log.
    """
    runtime = check_folder(runtime) if runtime else runtime_dir()
    state = check_folder(state) if state else state_dir()
    with _start_lock(runtime):
        running = _running(runtime, patience)
        if running is not None and options is None:
            return running
        if running is not None:
            raise _runs_already(running, runtime)
        clean_runtime(runtime)
        path = os.path.join(runtime, "server.log")
        with _open_log(path) as log:
            begin = log.tell()
            process = _spawn(runtime, state, options or Options(), log=log, foreground=False)
        client = _wait_until_up(process, runtime, patience)
        if client is None:
            raise _not_up(process, patience, path, begin)
        _started[process.pid] = process
        return client


def run_server(
    runtime: str | None = None,
    state: str | None = None,
    options: Options | None = None,
    *,
    ready: Callable[[Client], None] | None = None,
    patience: float = _START_PATIENCE,
) -> int:
    """Run a server in the foreground until it ends; SIGTERM, SIGINT and SIGHUP stop it in order.

    Args:
        runtime: the runtime folder; None for the one of `runtime_dir`.
        state: the state folder; None for the one of `state_dir`.
        options: what else was asked for.
        ready: called with a connection when the server is up.
        patience: seconds for it to come up.

    Returns:
        The exit status, 128 and more for a signal, as a shell has it.

    Raises:
        DeviceError: EBUSY when one runs already; it did not come up.
    """
    runtime = check_folder(runtime) if runtime else runtime_dir()
    state = check_folder(state) if state else state_dir()
    with _start_lock(runtime):
        running = _running(runtime, patience)
        if running is not None:
            raise _runs_already(running, runtime)
        clean_runtime(runtime)
        process = _spawn(runtime, state, options or Options(), log=None, foreground=True)
        with _passing_signals_to(process):
            client = _wait_until_up(process, runtime, patience)
            if client is None:
                raise _not_up(process, patience)
    with _passing_signals_to(process):
        with client:
            if ready is not None:
                ready(client)
        status = process.wait()
    return 128 - status if status < 0 else status


def stop_server(
    runtime: str | None = None, *, force: bool = False, patience: float = _STOP_PATIENCE
) -> None:
    """Stop the server in order, and wait until it has ended.

    Args:
        runtime: the runtime folder; None for the one of `runtime_dir`.
        force: also while nodes of attached devices are in use.
        patience: seconds for it to end.

    Raises:
        ServerGone: none runs.
        RemoteError: EBUSY while a node is in use.
        DeviceError: ETIMEDOUT when it does not end.
    """
    import select

    with connect(runtime, timeout=patience) as client:
        pid = client.call("server")["pid"]
        watch = os.pidfd_open(pid)
        try:
            client.call("shutdown", force=force)
            poll = select.poll()
            poll.register(watch, select.POLLIN)
            if not poll.poll(patience * 1000):
                raise DeviceError(
                    errno.ETIMEDOUT, f"the server with pid {pid} still runs after {patience:.0f} s"
                )
        finally:
            os.close(watch)
    child = _started.pop(pid, None)
    if child is not None:
        child.wait()


# Held while a server is started. A contextmanager's decorator is left out: its import is not free.
class _start_lock:
    def __init__(self, runtime: str) -> None:
        self._path = os.path.join(runtime, "start.lock")

    def __enter__(self) -> None:
        import fcntl

        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


# What to raise when a server was to be started where one runs.
def _runs_already(running: Client, runtime: str) -> DeviceError:
    with running:
        pid = running.call("server")["pid"]
    return DeviceError(
        errno.EBUSY, f"a server with pid {pid} runs in {runtime} already: `dmpy shutdown` stops it"
    )


# A connection to the server that runs, or None. One that is about to end is waited for.
def _running(runtime: str, patience: float) -> Client | None:
    deadline = time.monotonic() + patience
    while True:
        try:
            with Client(control_socket(runtime), timeout=patience) as client:
                client.call("version")
            return connect(runtime)
        except ServerGone as gone:
            if gone.died or gone.pid is None:
                return None
            if time.monotonic() >= deadline:
                raise
        time.sleep(_POLL)


# A connection to a server that has come up, with what it attaches at its start; None if it does
# not, or ends.
def _wait_until_up(process: subprocess.Popen, runtime: str, patience: float) -> Client | None:
    deadline = time.monotonic() + patience
    while process.poll() is None and time.monotonic() < deadline:
        try:
            client = Client(control_socket(runtime))
            client.call("server")
            return client
        except ServerGone:
            time.sleep(_POLL)
    return None


# What to raise when a server did not come up; it is ended if it still tries.
def _not_up(
    process: subprocess.Popen, patience: float, log: str | None = None, begin: int = 0
) -> DeviceError:
    status = process.poll()
    if status is None:
        process.kill()
        process.wait()
        why = f"it was not there after {patience:.0f} s"
    else:
        why = f"it ended with status {status}"
    if log is not None:
        with open(log, encoding="utf-8", errors="replace") as file:
            file.seek(begin)
            lines = [line for line in file.read().splitlines() if line.strip()][-_LOG_TAIL:]
        why = "\n".join(lines) or why
        return DeviceError(errno.EIO, f"the server did not start: {why}")
    return DeviceError(errno.EIO, f"the server did not start: {why}")


def _open_log(path: str):
    try:
        if os.stat(path).st_size > _LOG_SIZE_MAX:
            os.rename(path, f"{path}.1")
    except FileNotFoundError:
        pass  # the first start
    log = open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab")
    log.seek(0, os.SEEK_END)
    return log


# While this is entered, signals that ask us to end ask the server.
class _passing_signals_to:
    def __init__(self, process: subprocess.Popen) -> None:
        self._process = process

    def __enter__(self) -> None:
        import signal
        import threading

        self._signal = signal
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                self._before[number] = signal.signal(number, self._pass)

    def _pass(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            self._signal.signal(number, handler)
