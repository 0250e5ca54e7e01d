"""The state folder: what brings the devices back after a restart, a kill -9 or a power cut.

One JSON file a device, `devices/MINOR.json`, so that a damaged file costs one device:

    {"format": "dmpy device", "version": 1, "crc32": 305419896,
     "entry": {"minor": 0, "name": "r0", "uuid": "", "readonly": false, "suspended": false,
               "live": "0 2048 linear /d/a.img 0\\n", "inactive": null,
               "inactive_readonly": null}}

`crc32` covers the entry as `_canonical` writes it. A change is (1) written to `MINOR.json.new`,
(2) fsynced, (3) renamed over `MINOR.json`, (4) the folder is fsynced. A cut before (3) leaves the
older entry, a cut after it the newer one: no moment has neither. `lock` holds a flock for as long
as the server that owns the folder lives, and that server's process id as text.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import threading
import zlib
from contextlib import suppress
from pathlib import Path

from dmpy.errors import DeviceError

__all__ = ["FORMAT", "VERSION", "Journal"]

FORMAT = "dmpy device"
VERSION = 1  # 1: the first. A reader refuses every other version.

_ENTRY_FILE = re.compile(r"(0|[1-9][0-9]{0,6})\.json")
# What an entry holds, by key. None stands where a device has no such table.
_FIELDS = {
    "minor": int,
    "name": str,
    "uuid": str,
    "readonly": bool,
    "suspended": bool,
    "live": (str, type(None)),
    "inactive": (str, type(None)),
    "inactive_readonly": (bool, type(None)),
}


class Journal:
    """The entries of one state folder, held against every other process.

    Changes may come from several threads; of two of one minor, the one that comes last counts.

    Args:
        folder: made with mode 0700 where it is missing.

    Raises:
        DeviceError: EBUSY while another process holds the folder; the errno of what went wrong
            when the folder cannot be made, locked or read.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._devices = self.folder / "devices"
        # Minors whose file this process wrote, or read and found sound.
        self._sound: set[int] = set()
        # Lets one change at a time write; held while the disk is waited for, takes nothing.
        self._writing = threading.Lock()
        try:
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            self._lock_fd = _lock(self.folder)
        except OSError as error:
            if isinstance(error, DeviceError):
                raise
            raise _failure(error, f"state folder {self.folder}: cannot be used") from error
        try:
            self._devices.mkdir(mode=0o700, exist_ok=True)
            self._sweep()
            _sync_folder(self.folder)
            with suppress(PermissionError):  # the folder above may be one that we cannot read
                _sync_folder(self.folder.parent)
            self.sign()
        except OSError as error:
            os.close(self._lock_fd)
            raise _failure(error, f"state folder {self.folder}: cannot be used") from error

    def sign(self) -> None:
        """Leave our process id in `lock` for whoever is refused; again after a fork.

        The lock itself goes through a fork, and does not need the id: a full disk, which may be
        what the user starts the server to look into, is no reason to fail.
        """
        with suppress(OSError):
            os.pwrite(self._lock_fd, f"{os.getpid()}\n".ljust(16).encode(), 0)

    def record(self, entry: dict) -> None:
        """Make an entry durable in place of the older one of the same minor.

        Args:
            entry: "minor", "name", "uuid", "readonly", "suspended", the texts of the "live" and
                the "inactive" table and "inactive_readonly" (None without that table). Not kept.

        Raises:
            DeviceError: ENOSPC, EIO or another errno; the older entry is still in force, and the
                caller undoes the change that it could not record.
        """
        _check(entry)
        path = self._path(entry["minor"])
        content = _encode(entry)
        try:
            with self._writing:
                older = _read_or_none(path)
                self._keep_damaged(path, older)
                _write_aside(path, content)
                try:
                    _sync_folder(self._devices)
                except OSError:
                    _put_back(path, older)
                    raise
                self._sound.add(entry["minor"])
        except OSError as error:
            sentence = f"state folder {self.folder}: device {entry['name']} cannot be recorded"
            raise _failure(error, sentence) from error

    def forget(self, minor: int) -> None:
        """Drop the entry of a device that was removed; a damaged file is moved aside instead.

        Args:
            minor: of the device; one that has no entry is fine.

        Raises:
            DeviceError: the errno of what went wrong; the entry may still be there.
        """
        path = self._path(minor)
        try:
            with self._writing:
                self._keep_damaged(path, _read_or_none(path))
                path.unlink(missing_ok=True)
                self._sound.discard(minor)
                _sync_folder(self._devices)
        except OSError as error:
            sentence = f"state folder {self.folder}: the entry {path.name} cannot be dropped"
            raise _failure(error, sentence) from error

    def entries(self) -> list[dict]:
        """Read what was recorded, by ascending minor.

        Returns:
            The entries as they were given to `record`. One that cannot be read is {"minor",
            "name": "", "uuid": "", "error": the sentence that says why}; its file stays as it is.
        """
        found = []
        for name in os.listdir(self._devices):
            match = _ENTRY_FILE.fullmatch(name)
            if match is None:
                continue
            minor = int(match[1])
            try:
                found.append(_decode((self._devices / name).read_bytes(), minor))
                self._sound.add(minor)
            except (OSError, ValueError) as error:
                why = error.strerror if isinstance(error, OSError) else str(error)
                sentence = f"{self._devices / name}: {why}"
                found.append({"minor": minor, "name": "", "uuid": "", "error": sentence})
        return sorted(found, key=lambda entry: entry["minor"])

    def close(self) -> None:
        """Let go of the folder; closing twice is fine."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Where the entry of a minor lives.
    def _path(self, minor: int) -> Path:
        return self._devices / f"{minor}.json"

    # Remove what a cut between writing aside and renaming left: it was never in force.
    def _sweep(self) -> None:
        for name in os.listdir(self._devices):
            if name.endswith(".json.new"):
                (self._devices / name).unlink()

    # A damaged file is evidence, and perhaps all that is left of a table: keep a second name of it.
    def _keep_damaged(self, path: Path, content: bytes | None) -> None:
        minor = int(path.name.removesuffix(".json"))
        if content is None or minor in self._sound:
            return
        try:
            _decode(content, minor)
        except ValueError:
            _link_under_free_name(path)


# Take the folder's flock. The descriptor is closed on exec, so that no child holds it after us.
def _lock(folder: Path) -> int:
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        os.close(fd)
        who = f"the server with pid {holder}" if holder.isdigit() else "another server"
        raise DeviceError(
            errno.EBUSY, f"state folder {folder} is in use by {who}: two cannot share it"
        ) from None
    except OSError:
        os.close(fd)
        raise
    return fd


# One spelling of an entry, so that its checksum does not depend on how the file is laid out.
def _canonical(entry: dict) -> bytes:
    return json.dumps(entry, sort_keys=True, separators=(",", ":")).encode("ascii")


def _encode(entry: dict) -> bytes:
    checksum = zlib.crc32(_canonical(entry))
    whole = {"format": FORMAT, "version": VERSION, "crc32": checksum, "entry": entry}
    return json.dumps(whole, indent=1).encode("ascii") + b"\n"


# Read one file, trusting nothing in it. ValueError says what is wrong with it.
def _decode(content: bytes, minor: int) -> dict:
    try:
        whole = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ValueError("not a JSON document: damaged, or cut short") from None
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise ValueError(f"not an entry of a device (expected format {FORMAT!r})")
    version = whole.get("version")
    if version != VERSION:
        raise ValueError(f"format version is not one this dmpy reads (got {version!r}, "
                         f"expected {VERSION})")
    entry = whole.get("entry")
    if not isinstance(entry, dict) or whole.get("crc32") != zlib.crc32(_canonical(entry)):
        raise ValueError("checksum does not match: damaged, or edited by hand")
    _check(entry)
    if entry["minor"] != minor:
        raise ValueError(f"holds another device (got minor {entry['minor']}, expected {minor})")
    return entry


# The same rules on both sides: what `record` refuses, a reader refuses too.
def _check(entry: dict) -> None:
    if entry.keys() != _FIELDS.keys():
        odd = ", ".join(sorted(entry.keys() ^ _FIELDS.keys()))
        raise ValueError(f"entry has missing or unknown fields: {odd}")
    for key, kind in _FIELDS.items():
        if not isinstance(entry[key], kind) or (kind is int and isinstance(entry[key], bool)):
            raise ValueError(f"field {key} has the wrong type (got {type(entry[key]).__name__})")
    if not 0 <= entry["minor"] < 1 << 20:
        raise ValueError(f"minor is out of range (got {entry['minor']})")


def _read_or_none(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


# Steps 1 to 3 of the module's docstring. On failure nothing is left but the older file.
def _write_aside(path: Path, content: bytes) -> None:
    aside = path.with_name(path.name + ".new")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(fd, view):]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(aside, path)
    except OSError:
        with suppress(OSError):
            aside.unlink()
        raise


# The newer file is in place but nobody knows for how long: return to the older one, as far as the
# disk still lets us. The error that brought us here is the one that the caller hears of.
def _put_back(path: Path, older: bytes | None) -> None:
    with suppress(OSError):
        if older is None:
            path.unlink()
        else:
            _write_aside(path, older)


def _link_under_free_name(path: Path) -> None:
    for number in range(1, 1000):
        with suppress(FileExistsError):
            os.link(path, path.with_name(f"{path.name}.damaged-{number}"))
            return
    raise DeviceError(errno.EEXIST, f"{path}: a thousand damaged copies are there already")


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# Keep the errno, which callers act on, and say where it happened.
def _failure(error: OSError, sentence: str) -> DeviceError:
    number = error.errno or errno.EIO
    return DeviceError(number, f"{sentence}: {error.strerror or os.strerror(number)}")
