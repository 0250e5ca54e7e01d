"""Turn an export of the server into a block device of this machine, and back.

Where the kernel has its nbd driver, `nbd-client` attaches the export to a free /dev/nbdN. Where
it has not (containers, most sandboxes), `nbdfuse` shows the export as a file and `losetup` makes
a block device of that file. Both need root; the file alone needs only /dev/fuse.

What was done is recorded in RUNTIME/attached/NAME.json, so that `detach` can undo it in order
from any process, and so that what a dead server left behind can be cleaned up.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "attach",
    "attached",
    "clean_up",
    "detach",
    "export_uri",
    "has_nbd_driver",
    "in_use",
]

# Seconds. A node is there within milliseconds; these bound a machine in trouble.
_PATIENCE = 20.0
# A prober (udev) opens every new block device for a moment: that is no user.
_PROBE_PATIENCE = 2.0
# Requests in flight come from connections: each is served by one thread.
_CONNECTIONS = 4

_log = logging.getLogger(__name__)


def export_uri(name: str, socket: str | os.PathLike[str]) -> str:
    """Return the NBD URI of the export `name` behind a Unix socket."""
    path = urllib.parse.quote(name, safe="")
    return f"nbd+unix:///{path}?socket={urllib.parse.quote(os.fspath(socket))}"


def attach(
    name: str,
    socket: str | os.PathLike[str],
    runtime: str | os.PathLike[str],
    *,
    readonly: bool = False,
    block_size: int = 512,
    as_file: bool = False,
    export: str | None = None,
    uri: str | None = None,
    server_pid: int | None = None,
) -> str:
    """Attach a device and return the path of its node.

    Attaching what is attached returns the node that is there.

    Args:
        name: the device; the record has its name.
        socket: the server's NBD socket.
        runtime: the runtime folder; the record goes to `attached/NAME.json` in it.
        readonly: make the node read-only.
        block_size: bytes, the least request the device takes (512 to 4096).
        as_file: stop at nbdfuse's file, which needs no root.
        export: the export's name; default: the device's.
        uri: the export's URI, where it is more than socket and export (TLS).
        server_pid: the process that serves the export; default: this one.

    Returns:
        `/dev/nbdN`, `/dev/loopN`, or the file's path.

    Raises:
        OSError: EPERM without root; ENOENT for a missing tool; ENODEV without /dev/fuse or loop
            devices; EIO when a tool refuses, with what it said; ETIMEDOUT.
    """
    with _locked(runtime) as folder:
        record = _load(folder, name)
        if record is not None:
            if not _stale(record):
                return record["node"]
            _undo(record, folder, forced=True)
        pid = os.getpid() if server_pid is None else server_pid
        record = {"name": name, "readonly": readonly, "server_pid": pid,
                  "server_start": _start_time(pid)}
        source = _Source(os.fspath(socket), export or name,
                         uri or export_uri(export or name, socket), block_size)
        if as_file:
            steps = _attach_file
        elif os.geteuid() != 0:
            raise OSError(errno.EPERM, f"attaching {name} as a block device needs root; without, "
                          f"`dmpy attach --file {name}` shows it as a file")
        else:
            # nbd-client's TLS is a process of its own between the kernel and us: not simpler.
            plain = source.uri.startswith("nbd+unix:")
            steps = _attach_nbd if plain and has_nbd_driver() else _attach_loop
        try:
            steps(record, folder, source)
            _save(folder, record)
        except BaseException:
            with contextlib.suppress(OSError):          # the first error is the one to tell
                _undo(record, folder, forced=True)
            raise
        return record["node"]


def detach(name: str, runtime: str | os.PathLike[str]) -> None:
    """Undo `attach`; on return everything is flushed and the processes are gone.

    A flush that fails is logged and does not keep the node: the kernel has given up what could
    not be written, so another try would find nothing left to flush.

    Raises:
        OSError: ENOENT when the device is not attached; EBUSY, naming the mount point, the
            holder or the process, while its node is in use: nothing has changed then.
    """
    with _locked(runtime) as folder:
        record = _load(folder, name)
        if record is None:
            raise OSError(errno.ENOENT, f"{name} is not attached")
        _undo(record, folder, forced=_stale(record))


def attached(runtime: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the records of what is attached, sorted by name.

    Each has at least: name, node, method (`nbd`, `loop` or `file`), readonly, server_pid, and
    stale (True when the server that served it is gone).
    """
    records = []
    for path in Path(runtime, "attached").glob("*.json"):
        record = _read(path)
        if record is not None:
            records.append({**record, "stale": _stale(record)})
    return sorted(records, key=lambda record: record["name"])


def clean_up(runtime: str | os.PathLike[str]) -> list[str]:
    """Remove what servers that are gone have left attached.

    Returns:
        A sentence for each record that could not be cleaned up (a file system is mounted).
    """
    if not os.path.isdir(os.path.join(runtime, "attached")):
        return []
    complaints = []
    with _locked(runtime) as folder:
        for path in sorted(folder.glob("*.json")):
            record = _read(path)
            if record is None or not _stale(record):
                continue
            try:
                _undo(record, folder, forced=True)
            except OSError as error:
                complaints.append(error.strerror)
    return complaints


def in_use(node: str) -> str | None:
    """Say who uses a node, or None.

    Args:
        node: what `attach` returned.

    Returns:
        Words that go after `NODE is`, with what to do: `mounted on /mnt: unmount it first`.

    Raises:
        OSError: the node cannot be looked at.
    """
    if stat.S_ISBLK(os.stat(node).st_mode):
        return _user_of_node(node)
    users = _users_of_file(node)
    return f"open in process {users}: close it first" if users else None


def has_nbd_driver() -> bool:
    """Say whether the kernel has its nbd driver, loading it where that is possible."""
    if os.path.isdir("/sys/module/nbd") or os.path.isdir("/sys/block/nbd0"):
        return True
    if os.geteuid() != 0 or not _tool("modprobe"):
        return False
    done = subprocess.run([_tool("modprobe"), "-q", "nbd"], stdin=subprocess.DEVNULL,
                          capture_output=True, timeout=_PATIENCE, check=False)
    return done.returncode == 0 and os.path.isdir("/sys/block/nbd0")


# -- Attaching ----------------------------------------------------------------------------------


# What to attach.
class _Source(NamedTuple):
    socket: str
    export: str
    uri: str
    block_size: int                                     # bytes


# The kernel's own client. Each step is entered in `record` as soon as it is done, for _undo.
def _attach_nbd(record: dict, folder: Path, source: _Source) -> None:
    client = _need("nbd-client", "nbd-client")
    complaint = ""
    for node in _free_nbd_nodes():
        command = [client, "-unix", source.socket, node, "-N", source.export,
                   "-b", str(min(max(source.block_size, 512), 4096)), "-C", str(_CONNECTIONS)]
        if record["readonly"]:
            command.append("-R")
        done = _run(command)
        if done.returncode == 0:
            record.update(method="nbd", node=node, nbd=node, nbd_pid=_nbd_pid(node))
            _wait_for(lambda: _node_size(node) > 0, f"{node} to get its size")
            record["nbd_pid"] = _nbd_pid(node)
            return
        complaint = _last_line(done) or complaint
    if complaint:
        raise OSError(errno.EIO, f"nbd-client cannot attach {record['name']}: {complaint}")
    raise OSError(errno.EBUSY, "every /dev/nbdN is in use (modprobe nbd nbds_max=N makes more)")


# nbdfuse's file, nothing more.
def _attach_file(record: dict, folder: Path, source: _Source) -> None:
    program = _need("nbdfuse", "libnbd-bin or nbdfuse")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise OSError(errno.ENODEV, "/dev/fuse is missing or closed to this user (a container "
                      "needs --device /dev/fuse)")
    if os.geteuid() != 0:
        _unmount_program()                              # libfuse mounts by the same one
    place = _place(folder, record["name"])
    place.mkdir(mode=0o700, exist_ok=True)
    file = place / "disk"
    file.touch(mode=0o600)
    record.update(method="file", file=str(file), node=str(file))
    command = [program, "-C", str(_CONNECTIONS)]
    command += ["-r"] if record["readonly"] else []
    command += [str(file), source.uri]
    with open(place / "log", "wb") as log:
        # A session of its own: the terminal's Ctrl-C must not pull the disk from under a mount.
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                 cwd="/", start_new_session=True)
    _children[child.pid] = child
    record.update(pid=child.pid, pid_start=_start_time(child.pid))

    def ready() -> bool:
        if _gone(record):
            said = (place / "log").read_text(errors="replace").strip().splitlines()
            raise OSError(errno.EIO, f"nbdfuse cannot show {record['name']}: "
                          f"{said[-1] if said else 'it ended without a word'}")
        return _is_mount_point(str(file))

    _wait_for(ready, f"nbdfuse to show {record['name']}")


# A loop device over nbdfuse's file.
def _attach_loop(record: dict, folder: Path, source: _Source) -> None:
    program = _need("losetup", "mount")
    if not os.path.exists("/dev/loop-control"):
        raise OSError(errno.ENODEV, "neither nbd nor loop devices here: /dev/loop-control is "
                      f"missing; `dmpy attach --file {record['name']}` needs neither")
    _attach_file(record, folder, source)
    command = [program, "--find", "--show", "--direct-io=off"]
    if source.block_size > 512:
        command += ["--sector-size", str(min(source.block_size, 4096))]
    command += ["--read-only"] if record["readonly"] else []
    done = _run([*command, record["file"]])
    if done.returncode:
        raise OSError(errno.EIO, f"losetup cannot attach {record['name']}: {_last_line(done)}")
    node = done.stdout.strip()
    size = os.stat(record["file"]).st_size
    record.update(method="loop", node=node, loop=node)
    _wait_for(lambda: _node_size(node) == size // 512 * 512, f"{node} to get its size")


# Nodes without a server, lowest number first.
def _free_nbd_nodes() -> Iterator[str]:
    numbers = sorted(int(p[len("/sys/block/nbd"):]) for p in glob.glob("/sys/block/nbd[0-9]*"))
    for number in numbers:
        node = f"/dev/nbd{number}"
        if _nbd_pid(node) is None and os.path.exists(node):
            yield node


# -- Detaching ----------------------------------------------------------------------------------


# Undo what `record` says was done, last step first, and forget it. `forced` is for what failed
# half-way or lost its server: waiting for data to reach a server that is gone would be for ever.
def _undo(record: dict, folder: Path, *, forced: bool) -> None:
    node = record.get("nbd") or record.get("loop")
    # 1. Nothing may use the node: a busy loop device would only be marked, and vanish later.
    if node is not None and _still_ours(record):
        _check_unused(node, record["name"])
        # 2. Everything written is on the server, and durable there.
        if not forced:
            _flush(node)
        # 3. The node goes.
        if "nbd" in record:
            _must(_run([_need("nbd-client", "nbd-client"), "-d", node]), "nbd-client -d")
            _wait_for(lambda: _node_size(node) == 0, f"{node} to be free")
        else:
            _must(_run([_need("losetup", "mount"), "-d", node]), "losetup -d")
            _wait_for(lambda: not _still_ours(record), f"{node} to be free")
    # 4. The file goes, with the process that showed it.
    if "file" in record:
        _remove_file(record, forced)
    # 5. The record goes last: until here a second attempt can go on.
    with contextlib.suppress(FileNotFoundError):
        _record_path(folder, record["name"]).unlink()


def _remove_file(record: dict, forced: bool) -> None:
    file = record["file"]
    # After step 3 the kernel drops the loop device's file a moment later.
    deadline = time.monotonic() + (_PATIENCE if "loop" in record else _PROBE_PATIENCE)
    while _is_mount_point(file):
        done = _run(_unmount_command(file, lazy=forced))
        if done.returncode and _is_mount_point(file):
            if time.monotonic() > deadline:
                users = _users_of_file(file)
                raise OSError(errno.EBUSY, f"the file of {record['name']} is in use"
                              f"{' by process ' + users if users else ''}: close it first")
            time.sleep(0.02)
    if "pid" in record and not _gone(record):
        if forced:
            os.kill(record["pid"], signal.SIGTERM)
        _wait_for(lambda: _gone(record), "nbdfuse to end")
    _children.pop(record.get("pid"), None)
    shutil.rmtree(os.path.dirname(file), ignore_errors=True)


def _unmount_command(file: str, *, lazy: bool) -> list[str]:
    if os.geteuid() == 0:
        return [_need("umount", "mount"), *(["-l"] if lazy else []), file]
    return [_unmount_program(), "-u", *(["-z"] if lazy else []), file]


def _unmount_program() -> str:
    return _tool("fusermount") or _need("fusermount3", "fuse3")


# Raise EBUSY, saying who, while a node is mounted, held by another device, or open.
def _check_unused(node: str, name: str) -> None:
    deadline = time.monotonic() + _PROBE_PATIENCE
    while True:
        user = _user_of_node(node)
        if user is None:
            return
        lasting = user.startswith(("mounted", "used"))
        if lasting or time.monotonic() > deadline:
            raise OSError(errno.EBUSY, f"{node} of {name} is {user}")
        time.sleep(0.05)


def _user_of_node(node: str) -> str | None:
    info = os.stat(node)
    number = f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}"
    for fields in _mounts():
        if fields[2] == number:
            return f"mounted on {fields[4]}: unmount it first"
    holders = f"/sys/block/{os.path.basename(node)}/holders"
    if os.path.isdir(holders) and os.listdir(holders):
        return f"used by {', '.join(sorted(os.listdir(holders)))}: remove that first"
    try:
        # An exclusive open fails while a mount of any namespace, swap, LVM or md has it.
        os.close(os.open(node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return "in exclusive use (a mount elsewhere, swap, LVM or md)"
        raise
    users = _processes_with(lambda s: stat.S_ISBLK(s.st_mode) and s.st_rdev == info.st_rdev)
    return f"open in process {', '.join(users)}: close it first" if users else None


def _users_of_file(file: str) -> str:
    target = os.stat(file)
    return ", ".join(_processes_with(
        lambda s: (s.st_dev, s.st_ino) == (target.st_dev, target.st_ino)))


# Processes with an open file that matches; those of other users only root can see.
def _processes_with(matches: Callable[[os.stat_result], bool]) -> list[str]:
    found = []
    for folder in glob.glob("/proc/[0-9]*"):
        try:
            fds = os.listdir(f"{folder}/fd")
        except OSError:
            continue                                    # ended meanwhile, or not ours to see
        for fd in fds:
            with contextlib.suppress(OSError):          # closed meanwhile
                if matches(os.stat(f"{folder}/fd/{fd}")):
                    command = Path(folder, "comm").read_text(errors="replace").strip()
                    found.append(f"{folder[len('/proc/'):]} ({command})")
                    break
    return found


def _flush(node: str) -> None:
    try:
        fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        _log.error("%s: what was written last is not durable: %s", node, error.strerror)


# -- What the machine says ----------------------------------------------------------------------

# nbdfuse processes that this process started: it has to reap them.
_children: dict[int, subprocess.Popen] = {}


# Whether the node still belongs to this record: numbers are used again.
def _still_ours(record: dict) -> bool:
    if "nbd" in record:
        return _nbd_pid(record["nbd"]) == record["nbd_pid"] is not None
    try:
        backing = Path(f"/sys/block/{os.path.basename(record['loop'])}/loop/backing_file")
        # The kernel adds ` (deleted)` when the file was unmounted from under the loop device.
        return backing.read_text().strip().removesuffix(" (deleted)") == record["file"]
    except OSError:
        return False


# Who attached a /dev/nbdN: the kernel keeps that process id as long as the attachment lasts.
def _nbd_pid(node: str) -> int | None:
    try:
        return int(Path(f"/sys/block/{os.path.basename(node)}/pid").read_text())
    except (OSError, ValueError):
        return None


def _node_size(node: str) -> int:
    try:
        return int(Path(f"/sys/block/{os.path.basename(node)}/size").read_text()) * 512
    except OSError:
        return 0


def _mounts() -> list[list[str]]:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        rows = [line.split() for line in mounts]
    for row in rows:
        for escaped, plain in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
            row[4] = row[4].replace(escaped, plain)
    return rows


def _is_mount_point(file: str) -> bool:
    return any(fields[4] == file for fields in _mounts())


# When a process started, in clock ticks since boot: with the pid it names one process for ever.
def _start_time(pid: int) -> int | None:
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2]
    except OSError:
        return None
    fields = after_name.split()
    return None if fields[0] == "Z" else int(fields[19])


def _gone(record: dict) -> bool:
    child = _children.get(record["pid"])
    if child is not None:
        return child.poll() is not None
    return _start_time(record["pid"]) != record["pid_start"]


def _stale(record: dict) -> bool:
    return _start_time(record["server_pid"]) != record["server_start"]


# -- The records --------------------------------------------------------------------------------


# One attach or detach at a time: free numbers are looked for and taken under this lock.
@contextlib.contextmanager
def _locked(runtime: Any) -> Iterator[Path]:
    folder = Path(os.path.realpath(runtime), "attached")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(fd)


# A device's name as a file's: quoted where `.`, `..` or odd characters would mislead.
def _word(name: str) -> str:
    word = urllib.parse.quote(name, safe=" !#$&'()*+,:;=@[]{}~^")
    return "%2E" + word[1:] if word.startswith(".") else word


def _record_path(folder: Path, name: str) -> Path:
    return folder / f"{_word(name)}.json"


def _place(folder: Path, name: str) -> Path:
    return folder / f"{_word(name)}.d"


def _load(folder: Path, name: str) -> dict | None:
    return _read(_record_path(folder, name))


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def _save(folder: Path, record: dict) -> None:
    path = _record_path(folder, record["name"])
    aside = path.with_name(path.name + ".new")
    aside.write_text(json.dumps(record, indent=1))
    aside.replace(path)


# -- Small tools --------------------------------------------------------------------------------


# Programs for administrators are outside an ordinary user's PATH.
def _tool(program: str) -> str | None:
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"
    return shutil.which(program, path=path)


def _need(program: str, package: str) -> str:
    found = _tool(program)
    if found is None:
        raise OSError(errno.ENOENT, f"{program} is not installed (package {package})")
    return found


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              errors="replace", cwd="/", timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        said = f"{os.path.basename(command[0])} did not end within {_PATIENCE:.0f} s"
        raise OSError(errno.ETIMEDOUT, said) from None


def _must(done: subprocess.CompletedProcess[str], what: str) -> None:
    if done.returncode:
        raise OSError(errno.EIO, f"{what}: {_last_line(done) or 'no reason given'}")


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return lines[-1].strip() if lines else ""


def _wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise OSError(errno.ETIMEDOUT, f"waited {_PATIENCE:.0f} s for {what}")
        time.sleep(0.01)
