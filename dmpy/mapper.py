"""The registry of mapped devices: what the kernel's device-mapper core is.

Source: Linux v6.12 drivers/md/dm-ioctl.c, dev_create(), dm_hash_rename(), dev_remove().
"""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from dmpy.backing import Leaves
from dmpy.device import BlockDevice
from dmpy.errors import DeviceError, TableError
from dmpy.mapped import MAJOR, MappedDevice
from dmpy.table import Table, no_garbage_collection
from dmpy.target import target_types
from dmpy.units import SECTOR_SHIFT

__all__ = ["FailedEntry", "Journal", "Mapper"]

_log = logging.getLogger("dmpy")

# DM_NAME_LEN and DM_UUID_LEN with their terminating zero
_LONGEST_NAME = 127
_LONGEST_UUID = 128
_MINORS = 1 << 20
# A request may have to go through three calls a device.
_DEEPEST = 100

_NUMBERS = re.compile(r"([0-9]{1,9}):([0-9]{1,9})", re.ASCII)

Listener = Callable[[str, MappedDevice], None]


class Journal(Protocol):
    """Where a mapper notes its devices, so that they come back."""

    def record(self, entry: dict) -> None:
        """Keep what is known of a device, in the place of what was; durable on return."""

    def forget(self, minor: int) -> None:
        """Drop a device."""

    def entries(self) -> list[dict]:
        """Return what was kept, by minor number."""


class FailedEntry(NamedTuple):
    """A device of the journal that could not be rebuilt, and why."""

    name: str
    uuid: str
    minor: int
    error: str


class Mapper:
    """All mapped devices of a process, by name.

    Everything raises TableError or OSError (DeviceError) and changes nothing when it does. All of
    it may be called from several threads.

    Args:
        journal: notes every change; None for devices that end with the process.
        device_dirs: folders whose file names are device names, for tables that say
            /dev/mapper/NAME.
        leaves: opens what is not a mapped device.

    Attributes:
        failed: entries of the journal that could not be rebuilt.
        listeners: called with what happened ("created", "loaded", "resumed", "suspended",
            "renamed", "removed") and the device, after the change and outside the locks.
    """

    def __init__(
        self,
        journal: Journal | None = None,
        device_dirs: Sequence[str] = ("/dev/mapper",),
        leaves: Leaves | None = None,
    ) -> None:
        self.device_dirs = list(device_dirs)
        self.failed: list[FailedEntry] = []
        # Their entries, by minor number: tables that can be rebuilt another day.
        self._unbuilt: dict[int, dict] = {}
        self.listeners: list[Listener] = []
        self._journal = journal
        self._leaves = leaves or Leaves()
        self._devices: dict[str, MappedDevice] = {}
        # Minor numbers that are taken; None for a device that the journal may have and we have not.
        self._numbers: dict[int, MappedDevice | None] = {}
        # Every number below this one is taken.
        self._lowest = 0
        self._topology = threading.RLock()
        self._closed = False

    def __enter__(self) -> Mapper:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Looking up

    def device(
        self, name: str | None = None, *, uuid: str | None = None, minor: int | None = None
    ) -> MappedDevice:
        """Return the device with a name, a uuid, or a minor number.

        Raises:
            OSError: ENXIO when there is none.
        """
        with self._topology:
            if name is not None:
                found = self._devices.get(name)
                what = f"device {name}"
            elif uuid is not None:
                found = self._find(lambda device: bool(uuid) and device.uuid == uuid)
                what = f"device with uuid {uuid}"
            else:
                found = self._numbers.get(minor)
                what = f"device {MAJOR}:{minor}"
        if found is None:
            raise DeviceError(errno.ENXIO, f"{what} does not exist")
        return found

    # The first device that fits, or None.
    def _find(self, fits: Callable[[MappedDevice], bool]) -> MappedDevice | None:
        return next(filter(fits, self._devices.values()), None)

    def devices(self) -> list[MappedDevice]:
        """Return all devices by name."""
        with self._topology:
            return [self._devices[name] for name in sorted(self._devices)]

    def targets(self) -> list[tuple[str, tuple[int, int, int]]]:
        """Return (name, version) of every target that a table can name."""
        return [(target.type_name, target.version) for target in target_types()]

    # Making and changing

    def create(
        self,
        name: str,
        table: str | None = None,
        *,
        uuid: str = "",
        readonly: bool = False,
        minor: int | None = None,
        cwd: str | None = None,
    ) -> MappedDevice:
        """Make a device; with a table, load it and put it to use.

        Args:
            name: up to 127 bytes without a slash.
            table: the table's text, or None for a device without a table.
            uuid: up to 128 bytes.
            readonly: writes are refused.
            minor: the number to have, None for the lowest that is free.
            cwd: where relative paths in the table begin; None for the process's folder.

        Raises:
            TableError: the table cannot be loaded.
            OSError: EBUSY when name or uuid are taken, ENXIO when the number is, EINVAL when one
                of them cannot be.
        """
        _check_name(name)
        _check_uuid(uuid)
        with self._topology:
            self._open_for_business()
            self._free_name(name)
            self._free_uuid(uuid)
            number = self._free_minor(minor)
            device = MappedDevice(
                name, number, uuid, topology=self._topology, release=self._release
            )
            device.readonly = readonly
            device.on_last_close = self._last_close
            self._devices[name] = self._numbers[number] = device
        try:
            if table is not None:
                self._load(device, table, readonly, cwd)
                device.resume()
            self._note(device)
        except BaseException:
            self._unregister(device)
            raise
        self._tell("created", device)
        return device

    def load(
        self, name: str, table: str, *, readonly: bool | None = None, cwd: str | None = None
    ) -> MappedDevice:
        """Load a table as the inactive one; resume() puts it to use.

        Args:
            name: the device.
            table: the table's text.
            readonly: of the device from then on; None for as it is.
            cwd: where relative paths in the table begin.
        """
        device = self.device(name)
        if readonly is None:
            readonly = device.readonly
        loaded = self._parse(device, table, readonly, cwd)
        try:
            with self._noting(device, inactive=loaded.text(), inactive_readonly=readonly):
                device.load(loaded)
        except BaseException:
            self._release(device, loaded)
            raise
        self._tell("loaded", device)
        return device

    def clear(self, name: str) -> MappedDevice:
        """Drop the inactive table."""
        device = self.device(name)
        with self._noting(device, inactive=None, inactive_readonly=None):
            device.clear()
        return device

    def suspend(self, name: str, *, noflush: bool = False) -> MappedDevice:
        """Hold requests back, after those under way have ended."""
        device = self.device(name)
        with self._noting(device, suspended=True):
            device.suspend(noflush=noflush)
        self._tell("suspended", device)
        return device

    def resume(self, name: str) -> MappedDevice:
        """Put the inactive table to use if there is one, and let requests go on."""
        device = self.device(name)
        with device.life:
            if device.inactive is None:
                self._resume_as_it_is(device)
            else:
                after = {
                    "suspended": False,
                    "live": device.inactive.text(),
                    "readonly": device.inactive.readonly,
                    "inactive": None,
                    "inactive_readonly": None,
                }
                with self._noting(device, **after):
                    device.resume()
        self._forget_failure(device.minor)
        self._tell("resumed", device)
        return device

    # Let requests go on, whether that can be noted or not: they must not wait for a full disk.
    # After a restart the device would be suspended once more.
    def _resume_as_it_is(self, device: MappedDevice) -> None:
        device.resume()
        try:
            self._note(device)
        except OSError as error:
            _log.error("%s: resumed, which cannot be noted: %s", device.name, error)

    def rename(self, name: str, new_name: str) -> MappedDevice:
        """Give a device another name."""
        _check_name(new_name)
        with self._topology:
            device = self.device(name)
            self._free_name(new_name)
            self._devices[new_name] = self._devices.pop(name)
            device.name = new_name
        try:
            self._note(device)
        except OSError:
            with self._topology:
                self._devices[name] = self._devices.pop(new_name)
                device.name = name
            raise
        self.failed = [
            entry._replace(name=new_name) if entry.minor == device.minor else entry
            for entry in self.failed
        ]
        _tell_waiters(device)
        self._tell("renamed", device)
        return device

    def set_uuid(self, name: str, uuid: str) -> MappedDevice:
        """Give a device a uuid, once."""
        _check_uuid(uuid)
        with self._topology:
            device = self.device(name)
            if device.uuid:
                raise DeviceError(errno.EINVAL, f"{name} has the uuid {device.uuid} already")
            self._free_uuid(uuid)
            device.uuid = uuid
        try:
            self._note(device)
        except OSError:
            device.uuid = ""
            raise
        _tell_waiters(device)
        return device

    def message(self, name: str, sector: int, text: str) -> str:
        """Send a message to the target at a sector and return its reply."""
        return self.device(name).message(sector, text)

    def wait(
        self, name: str, event_nr: int | None = None, timeout: float | None = None
    ) -> int:
        """Wait for an event of a device; see MappedDevice.wait()."""
        return self.device(name).wait(event_nr, timeout)

    def remove(self, name: str, *, force: bool = False, deferred: bool = False) -> None:
        """Remove a device.

        Args:
            name: the device.
            force: first replace its table by one that fails all requests.
            deferred: if it is in use, remove it when it no longer is.

        Raises:
            OSError: EBUSY when it is in use, ENXIO when there is none.
        """
        if self._remove_damaged(name):
            return
        device = self.device(name)
        if force and device.live is not None:
            sectors = device.live.size >> SECTOR_SHIFT
            self._load(device, f"0 {sectors} error", device.readonly, None)
            device.suspend(noflush=True)
            device.resume()
            self._note(device)
        with self._topology:
            if device.open_count and deferred:
                device.deferred_remove = True
                return
            self._take_out(device)
        self._take_down(device)

    # Remove an entry of the journal of which not even a device could be made.
    def _remove_damaged(self, name: str) -> bool:
        with self._topology:
            for entry in self.failed:
                if entry.name == name and name not in self._devices:
                    self._forget(entry.minor)
                    self._forget_failure(entry.minor)
                    self._free_number(entry.minor)
                    return True
        return False

    # Deferred removal, when the last one has closed the device.
    def _last_close(self, device: MappedDevice) -> None:
        with self._topology:
            if device.removed or device.open_count or not device.deferred_remove:
                return
            self._take_out(device)
        self._take_down(device)

    # Take a device that nobody uses out of the registry, under the lock.
    def _take_out(self, device: MappedDevice) -> None:
        if device.removed:
            raise DeviceError(errno.ENXIO, f"device {device.name} is gone")
        if device.open_count:
            raise DeviceError(errno.EBUSY, f"device {device.name} is in use {_by_whom(device)}")
        device.removed = True
        del self._devices[device.name]
        self._numbers[device.minor] = None

    # Take down a device that is out of the registry.
    def _take_down(self, device: MappedDevice) -> None:
        try:
            with device.life:
                self._forget(device.minor)
        except BaseException:
            # It would come back at the next start, so it may as well stay.
            with self._topology:
                device.removed = False
                self._devices[device.name] = self._numbers[device.minor] = device
            raise
        self._free_number(device.minor)
        self._shut_and_close(device)
        self._forget_failure(device.minor)
        self._tell("removed", device)

    # Undo create().
    def _unregister(self, device: MappedDevice) -> None:
        with self._topology:
            device.removed = True
            # Somebody may have removed it already, and made another of that name.
            if self._devices.get(device.name) is device:
                del self._devices[device.name]
            if self._numbers.get(device.minor) is device:
                self._free_number(device.minor)
        self._shut_and_close(device)

    # End a device's requests, then drop its tables.
    def _shut_and_close(self, device: MappedDevice) -> None:
        device.shut(DeviceError(errno.ENXIO, f"device {device.name} is gone", device=device.name))
        device.close()

    def close(self) -> None:
        """Flush and close everything, those devices first that lie on others.

        Raises:
            OSError: the first flush that failed, after everything is closed.
        """
        with self._topology:
            if self._closed:
                return
            self._closed = True
            devices = _top_down(self._devices.values())
        goodbye = {
            device: DeviceError(
                errno.ESHUTDOWN, f"{device.name}: shutting down", device=device.name
            )
            for device in devices
        }
        # 1. Nobody waits any more, or the flushes would wait as well, and targets come to rest.
        for device in devices:
            device.refuse(goodbye[device])
        for device in devices:
            device.presuspend()
        # 2. Targets flush what they keep themselves, upper devices first, then there are no more
        #    requests.
        leaves = _leaves_of(devices)
        first: OSError | None = None
        for device in devices:
            first = _flushed(device, set(leaves)) or first
            try:
                device.shut(goodbye[device])
            except OSError as error:
                first = first or error
        # 3. What is in the leaves becomes durable, once for each.
        for leaf in leaves:
            try:
                leaf.flush()
            except OSError as error:
                first = first or error
        # 4. Everything is given back.
        for device in devices:
            device.close()
        self._leaves.close()
        with self._topology:
            self._devices.clear()
        if first is not None:
            raise first

    # Checks, under the lock

    def _open_for_business(self) -> None:
        if self._closed:
            raise DeviceError(errno.ESHUTDOWN, "the mapper is closed")

    def _free_name(self, name: str) -> None:
        if name in self._devices or any(entry.name == name for entry in self.failed):
            raise DeviceError(errno.EBUSY, f"device {name} exists already")

    def _free_uuid(self, uuid: str) -> None:
        taken = self._find(lambda device: device.uuid == uuid) if uuid else None
        if taken is not None:
            raise DeviceError(errno.EBUSY, f"uuid {uuid} is that of device {taken.name} already")

    def _free_minor(self, wanted: int | None) -> int:
        if wanted is None:
            while self._lowest in self._numbers:
                self._lowest += 1
            if self._lowest == _MINORS:
                raise DeviceError(errno.ENXIO, f"all {_MINORS} minor numbers are taken")
            return self._lowest
        if not 0 <= wanted < _MINORS:
            raise DeviceError(
                errno.EINVAL, f"minor number must be from 0 to {_MINORS - 1} (got {wanted})"
            )
        if wanted in self._numbers:
            # ENXIO rather than EBUSY is what the kernel says here.
            raise DeviceError(errno.ENXIO, f"minor number {wanted} is taken")
        return wanted

    # Give a minor number back.
    def _free_number(self, minor: int) -> None:
        with self._topology:
            del self._numbers[minor]
            self._lowest = min(self._lowest, minor)

    # Tables

    # Read a table for a device; what it opened is given back when it cannot be loaded.
    def _parse(
        self, device: MappedDevice, text: str, readonly: bool, cwd: str | None
    ) -> Table:
        folder = cwd or os.getcwd()
        opened: list[BlockDevice] = []
        known: dict[str, BlockDevice] = {}

        def open_device(word: str) -> BlockDevice:
            below = known.get(word)
            if below is None:
                below = self._open(device, word, readonly, folder, opened)
                # Memory is new each time it is named.
                if not word.startswith("mem:"):
                    known[word] = below
            return below

        try:
            with no_garbage_collection():
                return Table.parse(text, open_device, readonly=readonly)
        except BaseException:
            self._release_devices(device, opened)
            raise

    # Load a table that is no news to the journal yet.
    def _load(
        self, device: MappedDevice, text: str, readonly: bool, cwd: str | None
    ) -> None:
        table = self._parse(device, text, readonly, cwd)
        try:
            device.load(table)
        except BaseException:
            self._release(device, table)
            raise

    # The device that a word in a table names. Each is held once a table, however often named.
    def _open(
        self,
        device: MappedDevice,
        word: str,
        readonly: bool,
        cwd: str,
        opened: list[BlockDevice],
    ) -> BlockDevice:
        with self._topology:
            below = self._named(word)
            if below is device and "/" not in word and os.path.exists(os.path.join(cwd, word)):
                # A device may be called like the file that it is made of.
                below = None
            if below is not None:
                if below not in opened:
                    self._hold(device, below, readonly)
                    opened.append(below)
                return below
        leaf = self._leaves.open(word, readonly=readonly, cwd=cwd)
        if leaf in opened:
            self._leaves.release(leaf)
        else:
            opened.append(leaf)
        return leaf

    # Hold a device for a table of another, under the lock.
    def _hold(self, device: MappedDevice, below: MappedDevice, readonly: bool) -> None:
        _refuse_loop(device, below)
        _refuse_depth(device, below)
        if below.live is None:
            raise DeviceError(errno.ENODEV, f"device {below.name} has no table in use")
        if below.readonly and not readonly:
            raise DeviceError(errno.EACCES, f"device {below.name} is read-only")
        below.holders[device] += 1

    # The mapped device that a word names: maj:min, /dev/mapper/NAME, or its name.
    def _named(self, word: str) -> MappedDevice | None:
        numbers = _NUMBERS.fullmatch(word)
        if numbers is not None and int(numbers[1]) == MAJOR:
            return self._numbers.get(int(numbers[2]))
        folder, slash, name = word.rpartition("/")
        if slash and folder not in self.device_dirs:
            return None
        return self._devices.get(name)

    # Give back the devices of a table; passed to every MappedDevice.
    def _release(self, device: MappedDevice, table: Table) -> None:
        self._release_devices(device, table.devices)

    def _release_devices(self, device: MappedDevice, devices: list[BlockDevice]) -> None:
        for below in devices:
            if not isinstance(below, MappedDevice):
                self._leaves.release(below)
                continue
            with self._topology:
                below.holders[device] -= 1
                if not below.holders[device]:
                    del below.holders[device]
            below.closed_by_somebody()

    # The journal

    # Note a device as it is, or as it is about to be.
    def _note(self, device: MappedDevice, **after: object) -> None:
        if self._journal is None:
            return
        # Under `life`, so that what is noted last is how things are.
        with device.life:
            with self._topology:
                if device.removed:
                    return
                live, inactive = device.live, device.inactive
                entry = {
                    "minor": device.minor,
                    "name": device.name,
                    "uuid": device.uuid,
                    "readonly": device.readonly,
                    "suspended": device.suspended,
                    "live": live.text() if live else None,
                    "inactive": inactive.text() if inactive else None,
                    "inactive_readonly": inactive.readonly if inactive else None,
                }
                unbuilt = self._unbuilt.get(device.minor)
                if unbuilt is not None and live is None:
                    entry["live"] = unbuilt["live"]
                if unbuilt is not None and inactive is None:
                    entry["inactive"] = unbuilt["inactive"]
                    entry["inactive_readonly"] = unbuilt["inactive_readonly"]
            self._journal.record(entry | after)

    # Change a device inside: first the journal, so that nothing has changed when that fails.
    @contextmanager
    def _noting(self, device: MappedDevice, **after: object) -> Iterator[None]:
        with device.life:
            self._note(device, **after)
            try:
                yield
            except BaseException:
                self._note(device)
                raise

    # Drop a device from the journal.
    def _forget(self, minor: int) -> None:
        if self._journal is not None:
            self._journal.forget(minor)

    def restore(self) -> None:
        """Rebuild the devices of the journal; what cannot be rebuilt is in `failed` afterwards."""
        assert self._journal is not None
        waiting: list[tuple[MappedDevice, dict]] = []
        for entry in self._journal.entries():
            if "error" in entry:
                self._numbers[entry["minor"]] = None
                self._fail(entry, entry["error"])
                continue
            device = MappedDevice(
                entry["name"],
                entry["minor"],
                entry["uuid"],
                topology=self._topology,
                release=self._release,
            )
            device.readonly = entry["readonly"]
            device.on_last_close = self._last_close
            self._devices[device.name] = self._numbers[device.minor] = device
            waiting.append((device, entry))
        suspended_devices = [(device, entry["suspended"]) for device, entry in waiting]
        reasons: dict[int, str] = {}
        # Devices lie on devices: try those that are left until a round brings nothing up.
        before = None
        while waiting and len(waiting) != before:
            before = len(waiting)
            waiting = [
                (device, entry)
                for device, entry in waiting
                if not self._rebuild(device, entry, reasons)
            ]
        for _, entry in waiting:
            self._fail(entry, reasons[entry["minor"]])
        # At the end, since a device that is being rebuilt may have to read those below it.
        for device, suspended in suspended_devices:
            if suspended and device.live is not None:
                device.suspend()

    # Bring one device to where it was; says whether that worked.
    def _rebuild(self, device: MappedDevice, entry: dict, reasons: dict[int, str]) -> bool:
        try:
            if entry["live"] is not None and device.live is None:
                self._load(device, entry["live"], entry["readonly"], "/")
                device.resume()
            if entry["inactive"] is not None:
                self._load(device, entry["inactive"], entry["inactive_readonly"], "/")
        except (TableError, OSError) as error:
            reasons[device.minor] = str(error)
            return False
        except Exception as error:
            # A bug, of another package's target perhaps: the other devices are not to blame.
            _log.exception("%s: cannot be rebuilt", device.name)
            reasons[device.minor] = f"bug: {type(error).__name__}: {error}"
            return False
        return True

    # Report a device of the journal that could not be rebuilt. It stays there, for the next time.
    def _fail(self, entry: dict, reason: str) -> None:
        name = entry["name"] or f"{MAJOR}:{entry['minor']}"
        _log.error("%s: cannot be rebuilt: %s", name, reason)
        self.failed.append(FailedEntry(name, entry["uuid"], entry["minor"], reason))
        if "error" not in entry:
            self._unbuilt[entry["minor"]] = entry

    # A device that has been made to work, or removed, has not failed.
    def _forget_failure(self, minor: int) -> None:
        self.failed = [entry for entry in self.failed if entry.minor != minor]
        self._unbuilt.pop(minor, None)

    # Tell everybody what happened.
    def _tell(self, event: str, device: MappedDevice) -> None:
        for listener in list(self.listeners):
            listener(event, device)


# Names and uuids as check_name() in dm-ioctl.c and the sizes in struct dm_ioctl have it.
# A new name or uuid is an event of the live table, so without one it is none.
def _tell_waiters(device: MappedDevice) -> None:
    if device.live is not None:
        device.trigger_event()


def _check_name(name: str) -> None:
    if not name:
        raise DeviceError(errno.EINVAL, "device name must not be empty")
    if "/" in name or "\0" in name:
        raise DeviceError(errno.EINVAL, f"device name must not contain / or NUL (got {name!r})")
    if name in (".", "..", "control"):
        raise DeviceError(errno.EINVAL, f"device name must not be {name}")
    size = _size_in_bytes(name)
    if size > _LONGEST_NAME:
        raise DeviceError(
            errno.EINVAL, f"device name must have at most {_LONGEST_NAME} bytes (got {size})"
        )


def _check_uuid(uuid: str) -> None:
    if "\0" in uuid or _size_in_bytes(uuid) > _LONGEST_UUID:
        raise DeviceError(
            errno.EINVAL, f"uuid must have at most {_LONGEST_UUID} bytes (got {uuid[:40]!r}...)"
        )


# How long a name is for the system; half a surrogate pair, which JSON can carry, is no name.
def _size_in_bytes(name: str) -> int:
    try:
        return len(os.fsencode(name))
    except UnicodeEncodeError:
        raise DeviceError(errno.EINVAL, f"not a name that can be encoded: {name[:40]!r}") from None


# Refuse a table through which a device would reach itself, under the lock. Holders are looked at
# rather than tables, since a table that somebody else is about to load has holders already.
def _refuse_loop(device: MappedDevice, below: MappedDevice) -> None:
    way = _way_up(device, below, set())
    if way is not None:
        path = " -> ".join(step.name for step in [device, *reversed(way)])
        raise DeviceError(errno.ELOOP, f"{below.name}: mapped to itself ({path})")


# The way up from a device to another, through those that hold it, or None.
def _way_up(
    start: MappedDevice, goal: MappedDevice, seen: set[MappedDevice]
) -> list[MappedDevice] | None:
    if start is goal:
        return [start]
    seen.add(start)
    for holder in start.holders:
        if holder not in seen:
            rest = _way_up(holder, goal, seen)
            if rest is not None:
                return [start, *rest]
    return None


# Refuse a stack deeper than a thread's call stack can follow, under the lock.
def _refuse_depth(device: MappedDevice, below: MappedDevice) -> None:
    depth = _height(device, {}) + _depth(below, {})
    if depth > _DEEPEST:
        raise DeviceError(
            errno.ELOOP, f"{below.name}: stack of {depth} devices (at most {_DEEPEST})"
        )


# How many devices lie on the longest way down, this one included.
def _depth(device: MappedDevice, known: dict[MappedDevice, int]) -> int:
    if device not in known:
        tables = [table for table in (device.live, device.inactive) if table is not None]
        lower = [
            _depth(below, known)
            for table in tables
            for below in table.devices
            if isinstance(below, MappedDevice)
        ]
        known[device] = 1 + max(lower, default=0)
    return known[device]


# How many devices lie on the longest way up, this one included.
def _height(device: MappedDevice, known: dict[MappedDevice, int]) -> int:
    if device not in known:
        above = [_height(holder, known) for holder in device.holders]
        known[device] = 1 + max(above, default=0)
    return known[device]


# Who uses a device, for the sentence that refuses to remove it.
def _by_whom(device: MappedDevice) -> str:
    holders = sorted(holder.name for holder in device.holders)
    clients = device.open_count - device.holders.total()
    users = [f"by {', '.join(holders)}"] if holders else []
    users += [f"by {clients} client{'s' * (clients > 1)}"] if clients else []
    return " and ".join(users)


# What lies below some devices, and only has to be flushed: no mapped devices, and not the legs of
# targets that know better what a flush is, or how to do without one of them.
def _leaves_of(devices: list[MappedDevice]) -> set[BlockDevice]:
    tables = [device.live for device in devices if device.live is not None]
    return {
        leg.device
        for table in tables
        for line in table.lines
        if getattr(line.target, "pure", False)
        for leg in line.target.legs
        if not isinstance(leg.device, MappedDevice)
    }


# Flush a device that is about to be closed, but for its leaves, and return what went wrong. A
# suspended device has nothing that its leaves do not have.
def _flushed(device: MappedDevice, leaves: set[BlockDevice]) -> OSError | None:
    if device.live is None or device.suspended:
        return None
    try:
        device.flush_besides(leaves)
    except OSError as error:
        return error if error.errno != errno.ESHUTDOWN else None
    return None


# Devices in an order in which holders come before what they hold.
def _top_down(devices) -> list[MappedDevice]:
    order: list[MappedDevice] = []
    seen: set[MappedDevice] = set()

    def visit(device: MappedDevice) -> None:
        if device in seen:
            return
        seen.add(device)
        for holder in device.holders:
            visit(holder)
        order.append(device)

    for device in devices:
        visit(device)
    return order
