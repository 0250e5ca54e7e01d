"""md: an array of Linux MD on the disks that it is made of, assembled from their superblocks.

Table: begin len md uuid devices {device|-}...

The word is ours: in Linux an assembled array is a device of the md driver, not a line of a table.

Source: Linux v6.1 drivers/md/md.c, md_run(), md_seq_show(), action_store(), state_store();
mdadm 4.2 Manage.c, Manage_add().
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Sequence

from dmpy import background
from dmpy.device import Buffers, Extent
from dmpy.errors import DeviceError, FormatError
from dmpy.md.assemble import Assembly, assemble
from dmpy.md.bad_blocks import CarefulLeg
from dmpy.md.create import geometry_of, joining_disk, layout_name, what_is_there
from dmpy.md.disk import Disk, open_disk
from dmpy.md.ppl import replay
from dmpy.md.store import MDStore
from dmpy.md.twin import TwinLeg
from dmpy.raid import make_array
from dmpy.raid.array import FAULTY, IN_SYNC, MISSING, REBUILDING, Array, Member, NoStore
from dmpy.raid.sync import ACTIONS, Syncer
from dmpy.target import Args, Leg, Target
from dmpy.units import SECTOR_SHIFT

__all__ = ["MD"]

# MD_SB_DISKS for 0.90; roles of 1.x fill a page.
_MOST_DEVICES = 1920
_FOR_DISKS = ("fail", "remove", "add", "re-add")
_MESSAGES = (*ACTIONS, *_FOR_DISKS, "replace", "grow", "sync_speed_max", "detail")


class MD(Target):
    """An array; reads and writes are those of its Array.

    Args:
        uuid: the array's, as mdadm prints it.
        devices: all of each device, in the order of the table; None for `-`.
        length: bytes.
    """

    type_name = "md"
    version = (1, 0, 0)

    def __init__(self, uuid: str, devices: Sequence[Leg | None], length: int) -> None:
        there = [leg for leg in devices if leg is not None]
        super().__init__(length, there)
        self.uuid = uuid
        self.devices = list(devices)
        self.array: Array | None = None
        self.syncer: Syncer | None = None
        self.assembly: Assembly | None = None
        self._store: MDStore | None = None
        self._job: background.Job | None = None
        # The member and the device that are to be copied, data legs both, and who does it.
        self._wanted_copy: tuple[Leg, Leg] | None = None
        self._copying: background.Job | None = None
        # The disk that a device is, and where its data is, once the array is in use.
        self._disks: dict[int, Disk] = {}
        self._data: dict[int, Leg] = {}
        # What is wrong with the superblock of a device.
        self._damaged: dict[int, FormatError] = {}
        self._readonly = any(leg.device.readonly for leg in there)

    # Which of its devices are members is found out later, and no part of what a table says.
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MD):
            return NotImplemented
        mine = (self.uuid, self.size, self.devices)
        return mine == (other.uuid, other.size, other.devices)

    __hash__ = Target.__hash__

    @classmethod
    def parse(cls, args: Args, length: int) -> MD:
        """Read `uuid devices {device|-}...`."""
        uuid = args.word("uuid").lower()
        count = args.integer("number of devices", 1, _MOST_DEVICES, plus=True)
        if args.remaining != count:
            args.fail(f"{count} devices need as many words (got {args.remaining})", "devices")
        devices = [args.optional_leg(f"device {number}") for number in range(count)]
        if not any(devices):
            args.fail("an array needs a device that is there", "devices")
        if len({id(leg.device) for leg in devices if leg}) != sum(map(bool, devices)):
            args.fail("one device is named twice", "devices")
        target = cls(uuid, devices, length)
        try:
            disks = target.look()
        except FormatError as error:
            args.fail(str(error), "devices")
        except OSError as error:
            args.fail(error.strerror or str(error), "devices", error.errno or errno.EIO)
        if not disks:
            args.fail(f"no device has a superblock of array {uuid}", "devices")
        return target

    def table(self) -> str:
        """Return `uuid devices {device|-}...`."""
        words = ["-" if leg is None else leg.device.table_name for leg in self.devices]
        return f"{self.uuid} {len(words)} {' '.join(words)}"

    def look(self) -> list[Disk]:
        """Read the superblocks of this array from the devices; damaged ones are left out.

        Raises:
            FormatError: all that there are are damaged.
            OSError: a device cannot be read.
        """
        self._disks, self._damaged = {}, {}
        for leg in self.devices:
            if leg is None:
                continue
            try:
                disk = open_disk(
                    leg, leg.device.name, leg.device.size,
                    prefer=lambda each: each.uuid == self.uuid,
                )
            except FormatError as error:
                self._damaged[id(leg)] = error
                continue
            if disk is not None and disk.uuid == self.uuid:
                self._disks[id(leg)] = disk
        if self._damaged and not self._disks:
            raise next(iter(self._damaged.values()))
        return list(self._disks.values())

    # Status

    def status(self) -> str:
        """Return the line that md.md describes."""
        array = self.array
        if array is None:
            return f"inactive {self.uuid}"
        newest = self.assembly.newest
        done, total = self.syncer.progress if array.sync_size else (0, 0)
        words = [
            f"raid{newest.level}",
            self._state_word(),
            f"{len(array.members)}",
            f"{len(array.members) - array.degraded}",
            "".join(_health(member) for member in array.members),
            f"{done >> SECTOR_SHIFT}/{total >> SECTOR_SHIFT}",
            self.syncer.action,
            str(array.mismatches),
            str(self._store.events if self._store else newest.events),
            self._bitmap_word(),
            str(sum(leg is not None for leg in self.devices)),
        ]
        for leg in self.devices:
            if leg is not None:
                words += [leg.device.table_name, *self._role_words(leg)]
        return " ".join(words)

    # clean, active (being written, or not in agreement), read-only or failed.
    def _state_word(self) -> str:
        array = self.array
        if array.failed:
            return "failed"
        if self._readonly:
            return "read-only"
        dirty = self._store is not None and self._store.active
        return "active" if dirty or array.resync_offset is not None else "clean"

    def _bitmap_word(self) -> str:
        if self._store is None or self.assembly.bitmap is None:
            return "-"
        return f"{len(self._store.dirty_regions())}/{self.assembly.bitmap.bits}"

    # The place and the state of a device: A in sync, R rebuilt now, F failed, S spare, - not used.
    def _role_words(self, leg: Leg) -> tuple[str, str]:
        data = self._data.get(id(leg))
        for member in self.array.members:
            if data is not None and _leg_of(member) is data:
                return str(member.index), {IN_SYNC: "A", REBUILDING: "R"}.get(member.state, "F")
        return ("-", "S") if data in self.array.spares and data is not None else ("-", "-")

    def detail(self) -> dict:
        """Return everything that is known, for `dmpy md detail`."""
        array, newest = self.array, self.assembly.newest
        done, total = self.syncer.progress if array.sync_size else (0, 0)
        number = self._store.number_of if self._store else lambda disk: disk.number
        devices = []
        for leg in self.devices:
            if leg is None:
                continue
            place, state = self._role_words(leg)
            disk = self._disks.get(id(leg))
            reasons = [each.reason for each in self.assembly.left_out if each.disk is disk]
            reasons += [str(self._damaged[key]) for key in [id(leg)] if key in self._damaged]
            devices.append({
                "device": leg.device.table_name,
                "place": None if place == "-" else int(place),
                "state": _STATES[state],
                "number": number(disk) if disk is not None else None,
                "reason": reasons[0] if reasons and state == "-" else None,
                "errors": array.members[int(place)].errors if place != "-" else 0,
            })
        return {
            "uuid": self.uuid,
            "name": newest.label,
            "version": newest.version,
            "level": f"raid{newest.level}",
            "layout": layout_name(newest.level, newest.layout),
            "chunk_size": newest.chunk_size,
            "size": array.size,
            "member_size": self._store.size if self._store else newest.array_size,
            "raid_disks": len(array.members),
            "state": self._state_word(),
            "degraded": array.degraded,
            "health": "".join(_health(member) for member in array.members),
            "action": self.syncer.action,
            "due": self._is_due(),
            "replacing": self._replacing(),
            "done": done,
            "total": total,
            "mismatches": array.mismatches,
            "events": self._store.events if self._store else newest.events,
            "bitmap": None if self._bitmap_word() == "-" else {
                "chunk_size": self.assembly.bitmap.chunksize,
                "dirty": len(self._store.dirty_regions()),
                "bits": self.assembly.bitmap.bits,
            },
            "devices": devices,
        }

    # Whether there is something to do that has not begun yet.
    def _is_due(self) -> bool:
        return self._job is not None and not self.syncer.wait_idle(0)

    # How far the copy of a member to another device is.
    def _replacing(self) -> dict | None:
        for member in self.array.members:
            if isinstance(member.leg, TwinLeg):
                twin = member.leg
                return {
                    "place": member.index,
                    "device": twin.copy.device.table_name,
                    "done": twin.done,
                    "total": twin.length,
                }
        return None

    # Messages

    def message(self, *words: str) -> str:
        """Act on one of the messages that md.md describes.

        Raises:
            OSError: EINVAL for other words, EBUSY where something is in the way.
        """
        verb, rest = words[0].lower(), words[1:]
        if verb not in _MESSAGES or self.array is None:
            raise DeviceError(
                errno.EINVAL,
                f"md: message must be one of {', '.join(_MESSAGES)} (got {' '.join(words)[:80]})",
            )
        if verb == "detail" and not rest:
            return json.dumps(self.detail())
        if self._readonly or self._store is None:
            what = "read-only" if self._readonly else "without redundancy"
            raise DeviceError(errno.EROFS, f"md: the array is {what}: {verb} is not for it")
        if verb in ACTIONS and not rest:
            self._act(verb)
        elif verb in _FOR_DISKS and len(rest) in ((1, 2) if verb == "add" else (1,)):
            leg = self._find(rest[0])
            if verb == "add":
                if rest[1:] not in ((), ("force",)):
                    raise DeviceError(errno.EINVAL, f"md: add DEVICE [force] (got {rest[1]})")
                self._add(leg, force=bool(rest[1:]))
            else:
                {"fail": self._fail, "remove": self._remove, "re-add": self._re_add}[verb](leg)
        elif verb == "replace" and len(rest) == 2:
            self._replace(self._find(rest[0]), self._find(rest[1]))
        elif verb == "sync_speed_max" and len(rest) == 1 and rest[0].isdecimal():
            self.syncer.maximum_rate = int(rest[0][:15]) << 10
        elif verb == "grow" and len(rest) == 2:
            return self._grow(*rest)
        else:
            raise DeviceError(errno.EINVAL, f"md: {verb} takes other words (got {len(rest)})")
        return ""

    def _act(self, action: str) -> None:
        going = self.syncer.action
        if action not in ("idle", "frozen") and going not in ("idle", "frozen"):
            raise DeviceError(errno.EBUSY, f"md: {going} is going on")
        if action in ("check", "repair") and self.array.degraded and self.array.failed:
            raise DeviceError(errno.EIO, "md: too many members are gone")
        self.syncer.request(action)

    # The device of the table that a word means.
    def _find(self, word: str) -> Leg:
        names = {word, os.path.abspath(word)}
        for leg in self.devices:
            if leg is not None and names & {leg.device.name, leg.device.table_name}:
                return leg
        known = ", ".join(leg.device.table_name for leg in self.devices if leg is not None)
        raise DeviceError(errno.ENODEV, f"md: {word} is no device of the array (expected {known})")

    # The member that a device is, or None.
    def _member(self, leg: Leg) -> Member | None:
        data = self._data.get(id(leg))
        found = [m for m in self.array.members if data is not None and _leg_of(m) is data]
        return found[0] if found else None

    def _fail(self, leg: Leg) -> None:
        member = self._member(leg)
        name = leg.device.name
        if member is None:
            data = self._data.get(id(leg))
            if data is None or data not in self.array.spares:
                raise DeviceError(errno.EINVAL, f"md: {name} is not in use")
            self.array.spares.remove(data)
            self.array.keep()
            return
        working = {m.index for m in self.array.members if m.state == IN_SYNC}
        if member.index in working and not self.array.geometry.enough(working - {member.index}):
            raise DeviceError(
                errno.EBUSY, f"md: {name} cannot be failed, the array cannot do without it"
            )
        self.array.fail(member.index)

    def _remove(self, leg: Leg) -> None:
        member = self._member(leg)
        data = self._data.get(id(leg))
        if member is not None:
            if member.writable:
                raise DeviceError(
                    errno.EBUSY, f"md: {leg.device.name} is in use, it has to be failed first"
                )
            self.array.remove(member.index)
        elif data in self.array.spares:
            self.array.spares.remove(data)
            self.array.keep()
        if data is not None:
            self._store.drop_disk(data)
            del self._data[id(leg)]

    def _refuse_used(self, leg: Leg) -> None:
        member = self._member(leg)
        if member is not None and member.writable:
            raise DeviceError(errno.EBUSY, f"md: {leg.device.name} is place {member.index} already")
        if self._data.get(id(leg)) in self.array.spares:
            raise DeviceError(errno.EBUSY, f"md: {leg.device.name} is a spare already")
        if member is not None:
            self._remove(leg)

    # Take a device for a spare, whatever it was before.
    def _add(self, leg: Leg, *, force: bool) -> None:
        self._refuse_used(leg)
        known = self._disks.get(id(leg))
        if known is None and not force:
            found = what_is_there(leg.device)
            if found:
                raise DeviceError(
                    errno.EBUSY,
                    f"md: {leg.device.name} carries {found} (force overwrites it)",
                )
        disk = joining_disk(self.assembly.newest, leg, leg.device, self._store.size)
        self._disks[id(leg)] = disk
        data = self._data_leg(leg, disk)
        self._store.add_disk(data, disk)
        self._store.write_bitmap(disk)
        with self.array.state_lock:
            self.array.spares.append(data)
            self.array.keep()
        self.syncer.wake()

    # Take a former member back in its place; the bitmap says what is not on it.
    def _re_add(self, leg: Leg) -> None:
        self._refuse_used(leg)
        name = leg.device.name
        disk = open_disk(
            leg, name, leg.device.size, prefer=lambda each: each.uuid == self.uuid
        )
        cleared = self._store.events_cleared
        place = disk.place if disk is not None and disk.uuid == self.uuid else None
        reason = ""
        if place is None or not isinstance(place.role, int):
            reason = "it was no member of the array"
        elif cleared is None:
            reason = "the array has no write-intent bitmap"
        elif disk.events < cleared:
            reason = f"it is too old ({disk.events} events, the bitmap begins at {cleared})"
        elif not place.in_sync and not place.by_bitmap:
            reason = "it was not rebuilt yet"
        elif place.role >= len(self.array.members) or self.array.members[place.role].writable:
            reason = f"place {place.role} is taken"
        if reason:
            raise DeviceError(errno.EBUSY, f"md: {name} cannot be re-added: {reason} (add it)")
        self._disks[id(leg)] = disk
        data = self._data_leg(leg, disk)
        self._store.add_disk(data, disk, place.number)
        self._store.write_bitmap(disk)
        if self.array.members[place.role].leg is not None:
            self.array.remove(place.role)
        self.array.add(place.role, data, only_unsynced=True)

    # Have a member copied to a spare, from the next resume on: then no write is under way that
    # would miss the copy.
    def _replace(self, old: Leg, new: Leg) -> None:
        member = self._member(old)
        data = self._data.get(id(new))
        if member is None or member.state != IN_SYNC:
            raise DeviceError(errno.EINVAL, f"md: {old.device.name} is no member in sync")
        if data is None or data not in self.array.spares:
            raise DeviceError(errno.EINVAL, f"md: {new.device.name} is no spare")
        if self._wanted_copy is not None:
            raise DeviceError(errno.EBUSY, "md: a member is being replaced already")
        self._wanted_copy = (_leg_of(member), data)

    # Begin to copy; nothing is being read or written.
    def _begin_copy(self) -> None:
        old, new = self._wanted_copy
        members = [m for m in self.array.members if m.leg is old and m.state == IN_SYNC]
        if not members or new not in self.array.spares:
            self._wanted_copy = None
            return
        member, twin = members[0], TwinLeg(old, new)
        self.array.spares.remove(new)
        self._store.alias(twin, old)
        member.leg = twin
        self._copying = background.start(
            lambda job: self._copy(job, member, twin), f"replace {self.uuid}"
        )

    # The thread that copies.
    def _copy(self, job: background.Job, member: Member, twin: TwinLeg) -> None:
        complete = twin.run(job, lambda: member.leg is twin and member.state == IN_SYNC)
        array = self.array
        with array.state_lock:
            if complete and member.leg is twin and member.state == IN_SYNC:
                member.leg = twin.copy
                member.errors = 0
                self._store.drop_disk(twin.old)
                self._data = {key: leg for key, leg in self._data.items() if leg is not twin.old}
                array.keep()
            else:
                if member.leg is twin:
                    member.leg = twin.old
                if not twin.lost:
                    array.spares.append(twin.copy)
            self._store.forget(twin)
            if not job.stopping:
                self._wanted_copy = None
        self.event()
        self.syncer.wake()

    # Keep that the array has more places, or more of each member; the next table makes it so.
    # Answers with the sectors that the array has from then on.
    def _grow(self, what: str, number: str) -> str:
        if what not in ("members", "size") or not number.isdecimal():
            raise DeviceError(errno.EINVAL, "md: grow members NUMBER or grow size SECTORS")
        if self.syncer.action not in ("idle", "frozen") or self.array.degraded:
            raise DeviceError(errno.EBUSY, "md: the array can grow when it is in sync and at rest")
        if what == "members":
            self._store.grow_members(self.array, int(number))
        else:
            self._store.grow_size(self.array, int(number) << SECTOR_SHIFT)
        newest = self.assembly.newest
        grown = geometry_of(
            newest.level, newest.layout, self._store.raid_disks, newest.chunk_size,
            self._store.size,
        )
        return str(grown.size >> SECTOR_SHIFT)

    # Life

    def resume(self) -> None:
        if self.array is None:
            self._assemble()
        if self._wanted_copy is not None and self._copying is None:
            self._begin_copy()
        if self.array.sync_size and self._job is None and not self._readonly:
            syncer = self.syncer
            syncer.restart()
            self._job = background.start(lambda job: syncer.run(), f"sync {self.uuid}")

    def presuspend(self) -> None:
        if self._job is not None:
            self.syncer.stop()
            self._job.stop()
            self._job = None
        if self._copying is not None:
            self._copying.stop()
            self._copying = None

    def postsuspend(self) -> None:
        """Leave the disks so that any system can take them up."""
        if self._store is not None:
            self._store.stop(self.array)

    # Make the array of what the superblocks say.
    def _assemble(self) -> None:
        try:
            disks = self.look()
        except FormatError as error:
            raise DeviceError(errno.EINVAL, str(error)) from None
        found = assemble(disks)
        if found.has_ppl and found.resync_offset is not None:
            self._replay(found)
        if found.geometry.size < self.size:
            raise DeviceError(
                errno.EINVAL,
                f"md: the array has {found.geometry.size >> SECTOR_SHIFT} sectors, the table "
                f"needs {self.size >> SECTOR_SHIFT}",
            )
        self._data = {}
        for leg in self.devices:
            disk = self._disks.get(id(leg))
            if disk in found.disks:
                self._data_leg(leg, disk)
        legs = {id(disk): self._data[key] for key, disk in self._disks.items()
                if key in self._data}
        members = []
        for index, disk in enumerate(found.slots):
            members.append(_member_of(index, disk, found, legs))
        store = NoStore()
        if found.geometry.level.number != 0 and not self._readonly:
            by_leg = {id(legs[id(disk)]): disk for disk in found.disks}
            store = self._store = MDStore(found, by_leg)
        region_size = self._region_size(found)
        array = make_array(
            found.geometry, members, store, region_size=region_size, name=f"md {self.uuid}"
        )
        array.resync_offset = found.resync_offset
        array.spares = [legs[id(disk)] for disk in found.spares]
        array.event = self.event
        if self._store is not None:
            self._store.start(array)
        self.assembly, self.array = found, array
        self.syncer = Syncer(array)

    # Make parity right that a crash left in mid-stripe. When the logs have no gap nothing is left
    # to be synced.
    def _replay(self, found: Assembly) -> None:
        degraded = len(found.working) < len(found.slots)
        if self._readonly:
            if degraded:
                raise DeviceError(errno.EROFS, "md: the partial parity log has to be replayed")
            return
        done = replay(found)
        if done.mismatches and degraded:
            raise DeviceError(
                errno.EIO, f"md: the array is degraded and {done.mismatches} entries of its "
                "partial parity logs are damaged"
            )
        if not done.mismatches and (done.entries or degraded):
            found.resync_offset = None

    # Bytes that a bit stands for. Without a bitmap all is one region: what is kept of it is whether
    # it is being written.
    def _region_size(self, found: Assembly) -> int:
        if self._store is None:
            return 0
        if found.bitmap is not None:
            return found.bitmap.chunksize
        return 1 << (max(found.geometry.size, found.newest.array_size) - 1).bit_length()

    # The section of a device that holds data.
    def _data_leg(self, leg: Leg, disk: Disk) -> Leg:
        length = disk.array_size or disk.data_size
        data = CarefulLeg(leg.device, disk.data_offset, length, disk)
        self._data[id(leg)] = data
        self.legs.append(data)
        data.segment = type(leg.segment)(
            0, length, leg.segment.device, leg.segment.skew + disk.data_offset, leg.segment.lane
        )
        return data

    # Requests

    # The array, once it is in use.
    def _running(self) -> Array:
        if self.array is None:
            raise DeviceError(errno.EIO, "md: the array is not in use yet")
        return self.array

    # The array, if it may be written.
    def _writable(self) -> Array:
        if self._readonly:
            raise DeviceError(errno.EROFS, "md: the array is read-only")
        return self._running()

    def preadv(self, buffers: Buffers, offset: int) -> None:
        self._running().preadv(buffers, offset)

    def pwritev(self, buffers: Buffers, offset: int, *, fua: bool = False) -> None:
        self._writable().pwritev(buffers, offset, fua=fua)

    def flush(self) -> None:
        if not self._readonly:
            self._running().flush()

    def discard(self, offset: int, length: int) -> None:
        self._writable().discard(offset, length)

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        self._writable().write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return self._running().extents(offset, length)

    def read_spot(self, offset: int, length: int) -> tuple[int, int]:
        found = self.array.read_place(offset, length) if self.array is not None else None
        if found is None:
            return -1, 0
        member, place = found
        leg = _leg_of(member)
        segment = leg.segment
        careful = isinstance(leg, CarefulLeg) and leg.bad
        return (segment.fd, place + segment.skew) if segment.fd >= 0 and not careful else (-1, 0)


_STATES = {"A": "in_sync", "R": "rebuilding", "F": "faulty", "S": "spare", "-": "unused"}


# The character of a member: U in sync, R being rebuilt, F failed, _ missing.
def _health(member: Member) -> str:
    return {IN_SYNC: "U", REBUILDING: "R", FAULTY: "F", MISSING: "_"}[member.state]


# The data of a member; while it is being copied, of the device that it is copied from.
def _leg_of(member: Member) -> Leg | None:
    return member.leg.old if isinstance(member.leg, TwinLeg) else member.leg


# A member as its disk has it.
def _member_of(index: int, disk: Disk | None, found: Assembly, legs: dict[int, Leg]) -> Member:
    if disk is None:
        return Member(index, None)
    place = found.places[index]
    member = Member(
        index,
        legs[id(disk)],
        state=IN_SYNC if place.in_sync else REBUILDING,
        recovery_offset=place.recovery_offset,
        write_mostly=place.write_mostly,
    )
    member.only_unsynced = place.by_bitmap
    member.errors = place.corrected
    return member

