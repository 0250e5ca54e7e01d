"""raid: RAID 0, 1, 4, 5, 6 and 10 in the kernel's formats.

Table: begin len raid type params chunk_size_sectors [param]... devices {meta|- data|-}...

Source: Linux v6.1 drivers/md/dm-raid.c, raid_ctr(), raid_status(), raid_message().
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from dmpy import background
from dmpy.device import Buffers, Extent
from dmpy.errors import DeviceError, FormatError
from dmpy.formats.dm_raid import MAX_SECTOR, DmRaidSuperblock
from dmpy.formats.md_bitmap import BitmapSuper
from dmpy.raid import make_array
from dmpy.raid.array import FAULTY, IN_SYNC, MISSING, REBUILDING, Array, Member, NoStore, Store
from dmpy.raid.dm_store import DmRaidStore, Found, look
from dmpy.raid.levels import LEVELS, Geometry
from dmpy.raid.sync import ACTIONS, Syncer
from dmpy.target import Args, Leg, Target
from dmpy.units import SECTOR_SHIFT

__all__ = ["Params", "Raid"]

_MOST_DEVICES = 253
_INT = (1 << 31) - 1
# Parameters that only have a number, with their smallest and largest, in the order of the table.
_NUMBERS = {
    "daemon_sleep": (0, _INT),
    "min_recovery_rate": (0, _INT),
    "max_recovery_rate": (0, _INT),
    "max_write_behind": (0, 2 * 16383 + 1),
    "stripe_cache": (0, _INT),
    "region_size": (0, _INT),
    "raid10_copies": (2, _MOST_DEVICES),
}
# What stands in the table for a 0: the default, which is in jiffies of 10 ms for daemon_sleep.
_INSTEAD_OF_0 = {"region_size": 8192, "daemon_sleep": 500}
# A region of the bitmap where the table does not say, in sectors.
_REGION_SECTORS = 8192
_MOST_REGIONS = 1 << 21


class Params:
    """The parameters of a table line, as given.

    Attributes:
        flags: sync and nosync, as far as given.
        rebuild: places that are rebuilt whatever their superblocks say.
        write_mostly: places that are read only when nothing else can be.
        numbers: value by name.
        raid10_format: near, far or offset, or None.
        near_sets: copies of raid10_format far and offset rotate among all devices.
    """

    def __init__(self) -> None:
        self.flags: list[str] = []
        self.rebuild: list[int] = []
        self.write_mostly: list[int] = []
        self.numbers: dict[str, int] = {}
        self.raid10_format: str | None = None
        self.near_sets = False

    def words(self) -> list[str]:
        """Return the parameters in the order in which the kernel prints them."""
        words = list(self.flags)
        words += [f"rebuild {place}" for place in sorted(self.rebuild)]
        for name in ("daemon_sleep", "min_recovery_rate", "max_recovery_rate"):
            words += self._number(name)
        words += [f"write_mostly {place}" for place in sorted(self.write_mostly)]
        for name in ("max_write_behind", "stripe_cache", "region_size", "raid10_copies"):
            words += self._number(name)
        if self.raid10_format is not None:
            words.append(f"raid10_format {self.raid10_format}")
        if self.near_sets:
            words.append("raid10_use_near_sets")
        return words

    def _number(self, name: str) -> list[str]:
        return [f"{name} {self.numbers[name]}"] if name in self.numbers else []


class Raid(Target):
    """A RAID set; reads and writes are those of its Array.

    Args:
        type_word: raid1, raid5_ls and so on.
        chunk_sectors: sectors of a chunk, 0 for raid1.
        params: of the table line.
        geometry: where bytes live.
        metas: metadata devices by place, None for `-`.
        datas: data devices by place, None for `-`.
    """

    type_name = "raid"
    version = (1, 15, 1)

    def __init__(
        self,
        type_word: str,
        chunk_sectors: int,
        params: Params,
        geometry: Geometry,
        metas: list[Leg | None],
        datas: list[Leg | None],
        length: int,
    ) -> None:
        super().__init__(length, [leg for leg in (*metas, *datas) if leg is not None])
        self.type_word = type_word
        self.chunk_sectors = chunk_sectors
        self.params = params
        self.geometry = geometry
        self.metas = metas
        self.datas = datas
        self.array: Array | None = None
        self.syncer: Syncer | None = None
        self._job: background.Job | None = None
        self._checked = False
        # The state that the superblocks speak of, before the set is put to use.
        self._found = self._analyse()

    @classmethod
    def parse(cls, args: Args, length: int) -> Raid:
        """Read `type params chunk_size_sectors [param]... devices {meta|- data|-}...`."""
        type_word = args.word("raid type").lower()
        level = LEVELS.get(type_word)
        if level is None or type_word in _ONLY_MD:
            known = ", ".join(word for word in LEVELS if word not in _ONLY_MD)
            args.fail(f"raid type must be one of {known} (got {type_word[:40]})", "raid type")
        count = args.integer("number of parameters", 1, 1024, plus=True)
        chunk_sectors, params = _parse_params(args, type_word, count)
        devices = args.integer("number of devices", 1, _MOST_DEVICES, plus=True)
        if devices < level.minimum:
            args.fail(
                f"{type_word} needs at least {level.minimum} devices (got {devices})",
                "number of devices",
            )
        _check_places(args, params, devices)
        geometry = _geometry(args, type_word, params, chunk_sectors, devices, length)
        metas, datas = _parse_devices(args, params, geometry, devices)
        try:
            return cls(type_word, chunk_sectors, params, geometry, metas, datas, length)
        except FormatError as error:
            args.fail(str(error), "metadata device")
        except OSError as error:
            args.fail(error.strerror or str(error), "devices", error.errno or errno.EINVAL)

    def table(self) -> str:
        """Return the arguments in the kernel's order."""
        words = self.params.words()
        count = 1 + sum(len(word.split()) for word in words)
        pairs = [
            f"{_device_word(meta)} {_device_word(data)}"
            for meta, data in zip(self.metas, self.datas, strict=True)
        ]
        return " ".join(
            [self.type_word, str(count), str(self.chunk_sectors), *words, str(len(pairs)), *pairs]
        )

    def status(self) -> str:
        """Return `type devices health done/total action mismatches data_offset journal`."""
        array, syncer = self.array, self.syncer
        word = self._layout_word()
        if array is None:
            total = self.geometry.member_size >> SECTOR_SHIFT
            health = "".join("-" if leg is None else "A" for leg in self.datas)
            return f"{word} {len(health)} {health} {total}/{total} idle 0 0 -"
        action = syncer.action
        done, total = syncer.progress
        if not array.sync_size:
            done = total = self.geometry.member_size
        resyncing = action == "resync" or (action == "idle" and array.resync_offset is not None)
        health = "".join(_health(member, resyncing) for member in array.members)
        mismatches = array.mismatches if self._checked else 0
        return (
            f"{word} {len(health)} {health} {done >> SECTOR_SHIFT}/{total >> SECTOR_SHIFT} "
            f"{action} {mismatches} 0 -"
        )

    # The word for what the layout is, whatever the table calls it.
    def _layout_word(self) -> str:
        if self.geometry.level.number != 10:
            return self.type_word
        if self.geometry.far_offset:
            return "raid10_offset"
        return "raid10_far" if self.geometry.far > 1 else "raid10"

    def message(self, *words: str) -> str:
        """Take idle, frozen, resync, recover, check or repair; further words mean nothing.

        Raises:
            OSError: EINVAL for other words, EBUSY while something is going on already.
        """
        action = words[0].lower()
        if self.syncer is None or not self.array.sync_size:
            raise DeviceError(errno.EINVAL, f"raid: {self.type_word} has nothing to sync")
        if action not in ("idle", "frozen") and self.syncer.action not in ("idle", "frozen"):
            raise DeviceError(errno.EBUSY, f"raid: {self.syncer.action} is going on")
        if action not in ACTIONS:
            raise DeviceError(
                errno.EINVAL,
                f"raid: message must be one of {', '.join(ACTIONS)} (got {words[0][:40]})",
            )
        if action in ("check", "repair", "resync", "recover"):
            self._checked = action == "check"
        self.syncer.request(action)
        return ""

    # Life

    # Read what the metadata devices say, and refuse what does not fit.
    def _analyse(self) -> Found | None:
        if not any(self.metas):
            return None
        found = look(self.metas)
        freshest = found.freshest
        if freshest is None or "sync" in self.params.flags:
            if None in self.metas:
                raise DeviceError(errno.EINVAL, "raid: a new set needs all of its devices")
            return found._replace(freshest=None)
        wanted = {
            "num_devices": len(self.datas),
            "level": self.geometry.level.number,
            "layout": self.geometry.layout,
            "stripe_sectors": self.chunk_sectors,
        }
        if freshest.level in (0, 1):
            del wanted["layout"]
        if freshest.reshaping:
            raise DeviceError(errno.EINVAL, "raid: a reshape is under way (not supported)")
        for field, expected in wanted.items():
            value = getattr(freshest, field)
            if value != expected:
                raise DeviceError(
                    errno.EINVAL,
                    f"raid: superblock has {field} {value} (expected {expected} by the table)",
                )
        self._check_places(found)
        return found

    # Refuse devices that are in another's place, and new ones that nobody said are to be rebuilt.
    def _check_places(self, found: Found) -> None:
        for place, superblock in enumerate(found.superblocks):
            if superblock is None:
                if self.metas[place] is not None and place not in found.unreadable:
                    if place not in self.params.rebuild:
                        raise DeviceError(
                            errno.EINVAL,
                            f"raid: device {place} is new to the set (expected rebuild {place})",
                        )
            elif superblock.array_position != place and self.geometry.level.number != 1:
                raise DeviceError(
                    errno.EINVAL,
                    f"raid: device {place} has place {superblock.array_position} in the set",
                )

    def resume(self) -> None:
        if self.array is None:
            self._found = self._analyse()
            self.array = self._make_array()
            self.array.event = self.event
            numbers = self.params.numbers
            self.syncer = Syncer(
                self.array,
                minimum_rate=numbers.get("min_recovery_rate", 0) << 10,
                maximum_rate=numbers.get("max_recovery_rate", 0) << 10,
                daemon_sleep=numbers.get("daemon_sleep", 500) / 100,
            )
        if self.array.sync_size and self._job is None:
            syncer = self.syncer
            syncer.restart()
            self._job = background.start(lambda job: syncer.run(), f"sync {self.type_word}")

    def presuspend(self) -> None:
        if self._job is not None:
            self.syncer.stop()
            self._job.stop()
            self._job = None

    def postsuspend(self) -> None:
        """Leave everything so that it can be picked up again, no region dirty that need not be."""
        if self.array is not None and not self.array.failed:
            self.array.clean_up(0)
            self.array.keep()
            self.array.store.flush()

    # The array as the superblocks, or the table, have it.
    def _make_array(self) -> Array:
        members = [self._member(place) for place in range(len(self.datas))]
        if not self.geometry.enough({m.index for m in members if m.state == IN_SYNC}):
            raise DeviceError(errno.EIO, "raid: too few devices are in sync")
        region_size = self._region_size()
        store = self._make_store(region_size)
        array = make_array(
            self.geometry, members, store, region_size=region_size, name=self.type_word
        )
        self._set_offsets(array)
        if isinstance(store, DmRaidStore):
            if self._found.freshest is None:
                store.create(array)
            else:
                array.unsynced = store.dirty_regions() if array.degraded else set()
                array.crashed = store.dirty_regions()
                self._note_who_returns(array, store)
                store.update(array)
        return array

    # A device that had failed and is there again only lacks what was written since.
    def _note_who_returns(self, array: Array, store: DmRaidStore) -> None:
        for member in array.members:
            own = self._found.superblocks[member.index]
            returns = member.index in self._found.freshest.failed and own is not None
            if returns and member.state == REBUILDING and member.index not in self.params.rebuild:
                member.only_unsynced = own.events >= store.events_cleared

    def _region_size(self) -> int:
        if self.geometry.level.number == 0 or not any(self.metas):
            return 0
        sectors = self.params.numbers.get("region_size") or _REGION_SECTORS
        while (self.size >> SECTOR_SHIFT) // sectors > _MOST_REGIONS:
            sectors *= 2
        return sectors << SECTOR_SHIFT

    # A member as its superblock has it.
    def _member(self, place: int) -> Member:
        member = Member(
            place, self.datas[place], write_mostly=place in self.params.write_mostly
        )
        if member.leg is None:
            return member
        freshest = self._found.freshest if self._found is not None else None
        if place in self.params.rebuild:
            member.state = REBUILDING
        elif self._found is not None and place in self._found.unreadable:
            member.state = FAULTY
        elif freshest is not None and self._found.superblocks[place] is not None:
            own = self._found.superblocks[place]
            if place in freshest.failed:
                member.state = REBUILDING
            elif own.disk_recovery_offset != MAX_SECTOR:
                member.state = REBUILDING
                member.recovery_offset = own.disk_recovery_offset << SECTOR_SHIFT
        return member

    def _make_store(self, region_size: int) -> Store:
        if self._found is None:
            return NoStore()
        freshest = self._found.freshest
        geometry = self.geometry
        template = DmRaidSuperblock(
            num_devices=len(self.datas),
            events=freshest.events if freshest is not None else 0,
            level=geometry.level.number,
            layout=geometry.layout if geometry.level.number not in (0, 1) else 0,
            stripe_sectors=self.chunk_sectors,
            new_level=geometry.level.number,
            new_layout=geometry.layout if geometry.level.number not in (0, 1) else 0,
            new_stripe_sectors=self.chunk_sectors,
            array_sectors=self.size >> SECTOR_SHIFT,
            sectors=geometry.member_size >> SECTOR_SHIFT,
        )
        bitmap = None
        if region_size:
            sync_size = self.size if geometry.level.number == 10 else geometry.member_size
            bitmap = BitmapSuper(
                sync_size=sync_size >> SECTOR_SHIFT,
                chunksize=region_size,
                daemon_sleep=5,
                events=template.events,
            )
        dirty = "nosync" not in self.params.flags
        return DmRaidStore(
            self.metas, template, bitmap, new=freshest is None, dirty=dirty
        )

    # How far the array is synced.
    def _set_offsets(self, array: Array) -> None:
        # Without metadata the kernel takes a set for one that is in sync.
        if not array.sync_size or "nosync" in self.params.flags or self._found is None:
            array.resync_offset = None
        elif self._found.freshest is not None:
            sectors = self._found.freshest.array_resync_offset
            offset = sectors << SECTOR_SHIFT
            array.resync_offset = None if offset >= array.sync_size else offset
        else:
            array.resync_offset = 0
        if self.geometry.level.parity and array.degraded and array.resync_offset is not None:
            raise DeviceError(errno.EIO, "raid: devices are missing from a set that is not synced")

    # Requests

    # The array, once the set is in use.
    def _running(self) -> Array:
        if self.array is None:
            raise DeviceError(errno.EIO, "raid: the set is not in use yet")
        return self.array

    def preadv(self, buffers: Buffers, offset: int) -> None:
        self._running().preadv(buffers, offset)

    def pwritev(self, buffers: Buffers, offset: int, *, fua: bool = False) -> None:
        self._running().pwritev(buffers, offset, fua=fua)

    def flush(self) -> None:
        self._running().flush()

    def discard(self, offset: int, length: int) -> None:
        self._running().discard(offset, length)

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        self._running().write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return self._running().extents(offset, length)

    def read_spot(self, offset: int, length: int) -> tuple[int, int]:
        array = self.array
        found = array.read_place(offset, length) if array is not None else None
        if found is None:
            return -1, 0
        array.requests += 1
        member, place = found
        segment = member.leg.segment
        return (segment.fd, place + segment.skew) if segment.fd >= 0 else (-1, 0)


# Words of LEVELS that dm-raid does not have.
_ONLY_MD = {
    "raid4_n", "raid5_0", "raid6_la", "raid6_ra", "raid6_ls", "raid6_rs", "raid6_0", "raid6_0_6",
}  # fmt: skip


# The word for a device in the table.
def _device_word(leg: Leg | None) -> str:
    return "-" if leg is None else leg.device.table_name


# The character of a member in the status.
def _health(member: Member, resyncing: bool) -> str:
    if member.state == FAULTY:
        return "D"
    if member.state == MISSING:
        return "-"
    return "a" if resyncing or member.state == REBUILDING else "A"


# The chunk size and the parameters behind it.
def _parse_params(args: Args, type_word: str, count: int) -> tuple[int, Params]:
    chunk_sectors = args.integer("chunk size in sectors", 0, _INT, plus=True)
    if type_word == "raid1":
        chunk_sectors = 0
    elif chunk_sectors & (chunk_sectors - 1):
        args.fail(f"chunk size must be a power of 2 (got {chunk_sectors})", "chunk size in sectors")
    elif chunk_sectors < 8:
        args.fail(f"chunk size must be at least 8 (got {chunk_sectors})", "chunk size in sectors")
    params = Params()
    left = count - 1
    while left > 0:
        left -= _parse_param(args, type_word, params)
    if left < 0:
        args.fail(f"number of parameters is {count}, the last one lacks its value", "parameters")
    _check_combination(args, type_word, params)
    if len(params.flags) > 1:
        args.fail("sync and nosync exclude each other", "sync")
    if params.rebuild and params.flags:
        args.fail(f"{params.flags[0]} and rebuild exclude each other", "rebuild")
    rates = params.numbers
    if rates.get("max_recovery_rate") and rates.get("min_recovery_rate", 0) > rates[
        "max_recovery_rate"
    ]:
        args.fail("min_recovery_rate must be at most max_recovery_rate", "min_recovery_rate")
    return chunk_sectors, params


# One parameter; returns how many words it has.
def _parse_param(args: Args, type_word: str, params: Params) -> int:
    name = args.word("parameter").lower()
    if name in ("sync", "nosync"):
        if name in params.flags:
            args.fail(f"{name} is given twice", name)
        params.flags.append(name)
        return 1
    if name == "raid10_use_near_sets":
        _only_for(args, name, type_word, "raid10")
        if params.near_sets:
            args.fail(f"{name} is given twice", name)
        params.near_sets = True
        return 1
    if name in ("rebuild", "write_mostly"):
        if name == "write_mostly" and type_word != "raid1":
            args.fail("write_mostly is for raid1 only", name)
        places = params.rebuild if name == "rebuild" else params.write_mostly
        place = args.integer(name, 0, _MOST_DEVICES - 1, plus=True)
        if place not in places:
            places.append(place)
        elif name == "rebuild":
            args.fail(f"rebuild {place} is given twice", name)
    elif name == "raid10_format":
        _only_for(args, name, type_word, "raid10")
        word = args.word(name).lower()
        if word not in ("near", "far", "offset"):
            args.fail(f"raid10_format must be near, far or offset (got {word[:40]})", name)
        params.raid10_format = word
    elif name in _NUMBERS:
        if name in params.numbers:
            args.fail(f"{name} is given twice", name)
        if name == "max_write_behind":
            _only_for(args, name, type_word, "raid1")
        elif name == "raid10_copies":
            _only_for(args, name, type_word, "raid10")
        elif name == "stripe_cache":
            _only_for(args, name, type_word, "raid4", "raid5", "raid6")
        number = args.integer(name, *_NUMBERS[name], plus=True)
        params.numbers[name] = number or _INSTEAD_OF_0.get(name, 0)
    elif name in ("journal_dev", "journal_mode", "delta_disks", "data_offset"):
        args.fail(f"{name} is not supported (got {args.word(name)})", name)
    else:
        args.fail(f"unknown parameter {name[:40]}", name)
    return 2


# Refuse what a level has no use for, as rs_check_for_valid_flags() does.
def _check_combination(args: Args, type_word: str, params: Params) -> None:
    if type_word == "raid0":
        given = [*params.flags, *params.numbers, *(["rebuild"] if params.rebuild else [])]
        if given:
            args.fail(f"raid0 takes no parameters (got {given[0]})", given[0])
    if type_word.startswith("raid6") and "nosync" in params.flags:
        args.fail("raid6 must be synced, its Q is of no use otherwise (got nosync)", "nosync")


# Refuse a parameter that another level has.
def _only_for(args: Args, name: str, type_word: str, *families: str) -> None:
    if not type_word.startswith(families):
        args.fail(f"{name} is for {', '.join(families)} only (got {type_word})", name)


# Refuse places that there are not.
def _check_places(args: Args, params: Params, devices: int) -> None:
    for name, places in (("rebuild", params.rebuild), ("write_mostly", params.write_mostly)):
        for place in places:
            if place >= devices:
                args.fail(f"{name} must be at most {devices - 1} (got {place})", name)
    if len(params.write_mostly) >= devices:
        args.fail("write_mostly must leave a device that is read", "write_mostly")
    if params.numbers.get("raid10_copies", 2) > devices:
        args.fail(f"raid10_copies must be at most {devices}", "raid10_copies")


# Where bytes live, from the table's length.
def _geometry(
    args: Args, type_word: str, params: Params, chunk_sectors: int, devices: int, length: int
) -> Geometry:
    level = LEVELS[type_word]
    options: dict[str, int | bool] = {}
    sectors = length >> SECTOR_SHIFT
    if level.number == 1:
        member_sectors, left = sectors, 0
    elif level.number == 10:
        copies = params.numbers.get("raid10_copies", 2)
        member_sectors, left = divmod(sectors * copies, devices)
        kind = params.raid10_format or "near"
        if kind == "near" and params.near_sets:
            args.fail("raid10_use_near_sets is for far and offset only", "raid10_use_near_sets")
        far_sets = 0 if params.near_sets else 2
        options = {"near": copies} if kind == "near" else {"far": copies, "far_sets": far_sets}
        options["far_offset"] = kind == "offset"
    else:
        member_sectors, left = divmod(sectors, devices - level.parity)
    if left:
        args.fail(
            f"length must be divisible by the number of data devices (got {sectors} sectors)",
            "length",
        )
    try:
        geometry = Geometry(
            level,
            devices,
            chunk_sectors << SECTOR_SHIFT,
            member_size=member_sectors << SECTOR_SHIFT,
            **options,
        )
    except ValueError as error:
        args.fail(str(error), "raid type")
    if geometry.size < length:
        args.fail(
            f"length must be whole stripes of chunks (got {sectors} sectors, "
            f"{geometry.size >> SECTOR_SHIFT} of them fill stripes)",
            "length",
        )
    region = params.numbers.get("region_size")
    if region and (region & (region - 1) or region < chunk_sectors or region > sectors):
        args.fail(
            f"region_size must be a power of 2, at least the chunk size and at most the length "
            f"(got {region})",
            "region_size",
        )
    return geometry


# The pairs of devices.
def _parse_devices(
    args: Args, params: Params, geometry: Geometry, devices: int
) -> tuple[list[Leg | None], list[Leg | None]]:
    metas: list[Leg | None] = []
    datas: list[Leg | None] = []
    for place in range(devices):
        metas.append(args.optional_leg(f"metadata device {place}"))
        datas.append(args.optional_leg(f"data device {place}", geometry.member_size))
        if datas[-1] is None and metas[-1] is not None:
            args.fail(f"data device {place} is -, but it has a metadata device", "data device")
    for place in params.rebuild:
        if datas[place] is None:
            args.fail(f"rebuild {place}: there is no such device (got -)", "rebuild")
    if not any(datas):
        args.fail("at least one device must be there (got -)", "data device")
    return metas, datas
