"""Arrays: what all RAID levels have in common.

An array is made of members and of the geometry that says which bytes are where. A member that
fails a write is left out from then on, and the store knows it before the write is acknowledged.

Source: Linux v6.1 drivers/md/md.c, md_error(), md_update_sb(); raid1.c, raid10.c, raid5.c, error
handling of each.
"""

from __future__ import annotations

import errno
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from time import monotonic

from dmpy.device import DATA, Buffers, Extent, total, zero_chunks
from dmpy.errors import DeviceError
from dmpy.raid.levels import Geometry
from dmpy.target import Leg

__all__ = [
    "FAULTY",
    "IN_SYNC",
    "MISSING",
    "REBUILDING",
    "SPARE",
    "Array",
    "Member",
    "NoStore",
    "StripeLocks",
    "Store",
]

_log = logging.getLogger("dmpy.raid")

# What a member can be.
IN_SYNC = "in_sync"
REBUILDING = "rebuilding"
FAULTY = "faulty"
MISSING = "missing"
SPARE = "spare"

# Read errors that may be mended by writing the lost bytes anew before the member is left out, as
# MD_DEFAULT_MAX_CORRECTED_READ_ERRORS has it.
_MOST_CORRECTED = 20

# Later than any time at which a region was written.
_NOW = float("inf")


class Member:
    """One of the devices that an array is made of.

    Attributes:
        index: its place in the array.
        leg: where its data is; offsets are bytes from the start of the data. None when missing.
        state: IN_SYNC, REBUILDING, FAULTY or MISSING.
        recovery_offset: bytes of it that are right already while it is rebuilding.
        write_mostly: read it only when nothing else can be.
        only_unsynced: it was in sync before, so that only the array's unsynced regions have to be
            rebuilt.
        errors: read errors that have been mended.
    """

    __slots__ = (
        "errors",
        "index",
        "leg",
        "only_unsynced",
        "recovery_offset",
        "state",
        "write_mostly",
    )

    def __init__(
        self,
        index: int,
        leg: Leg | None,
        *,
        state: str = IN_SYNC,
        recovery_offset: int = 0,
        write_mostly: bool = False,
    ) -> None:
        self.index = index
        self.leg = leg
        self.state = state if leg is not None else MISSING
        self.recovery_offset = recovery_offset
        self.write_mostly = write_mostly
        self.only_unsynced = False
        self.errors = 0

    def readable(self, end: int) -> bool:
        """Say whether the bytes before `end` are right."""
        return self.state == IN_SYNC or (self.state == REBUILDING and end <= self.recovery_offset)

    @property
    def writable(self) -> bool:
        """Say whether writes go to it."""
        return self.state in (IN_SYNC, REBUILDING)

    def __repr__(self) -> str:
        return f"<Member {self.index} {self.state}>"


class Store(ABC):
    """Keeps what must be known of an array after a restart. Calls return when it is durable."""

    @abstractmethod
    def update(self, array: Array) -> None:
        """Keep the states of the members, how far they are rebuilt and how far the array is synced.

        Raises:
            OSError: it could not be kept anywhere.
        """

    @abstractmethod
    def mark_dirty(self, regions: Iterable[int]) -> None:
        """Keep that regions are about to be written, before they are."""

    @abstractmethod
    def mark_clean(self, regions: Iterable[int]) -> None:
        """Keep that all members agree on regions; need not be durable."""

    @abstractmethod
    def dirty_regions(self) -> set[int]:
        """Return the regions that were dirty when the array was last used."""

    def flush(self) -> None:
        """Make what was kept durable, clean marks too."""


class NoStore(Store):
    """Keeps nothing: the array begins anew each time."""

    def update(self, array: Array) -> None:
        """Nothing is kept."""

    def mark_dirty(self, regions: Iterable[int]) -> None:
        """Nothing is kept."""

    def mark_clean(self, regions: Iterable[int]) -> None:
        """Nothing is kept."""

    def dirty_regions(self) -> set[int]:
        """Return that nothing is known to be dirty."""
        return set()


class StripeLocks:
    """Lets one at a time work on a stripe; stripes are numbers.

    Taking a stripe that nobody has is one dict.setdefault(), which is atomic.
    """

    __slots__ = ("_changed", "_held", "_waiting")

    def __init__(self) -> None:
        self._held: dict[int, object] = {}
        # Protects `_waiting`; nothing is taken under it.
        self._changed = threading.Condition(threading.Lock())
        self._waiting = 0

    def take(self, first: int, last: int) -> object:
        """Take stripes first .. last, in order; returns what to hand to give_back()."""
        token = object()
        for stripe in range(first, last + 1):
            if self._held.setdefault(stripe, token) is not token:
                self._wait_for(stripe, token)
        return token

    # Wait until a stripe is given back, and take it.
    def _wait_for(self, stripe: int, token: object) -> None:
        with self._changed:
            self._waiting += 1
            while self._held.setdefault(stripe, token) is not token:
                self._changed.wait()
            self._waiting -= 1

    def give_back(self, first: int, last: int) -> None:
        """Give stripes first .. last back."""
        for stripe in range(first, last + 1):
            del self._held[stripe]
        if self._waiting:
            with self._changed:
                self._changed.notify_all()


class Array(ABC):
    """A RAID array; offsets are bytes from its start.

    Locks: `state_lock` protects the members' states and the dirty regions, and is held while the
    store writes them, so that what is kept is how things are; stripes may not be taken under it.

    Args:
        geometry: where bytes live.
        members: one for each place, in order.
        store: keeps states.
        region_size: bytes that one bit of the write-intent bitmap stands for, of what sync_range()
            counts; 0 without a bitmap.
        name: for messages.

    Attributes:
        state_lock: see above.
        degraded: how many members are not in sync.
        failed: so many members are gone that some bytes are lost.
        resync_offset: bytes of each member from its start on which all members agree, None when
            they agree everywhere.
        mismatches: sectors that the last check found to disagree.
        event: called when something happened that people wait for.
        needs_sync: called when there is work for the background.
        unsynced: regions that were written while a member was missing.
        crashed: regions that were dirty when the array was last used: members may disagree there.
        requests: how many requests there were, more or less, to see whether the array is in use.
        spares: legs that take the place of a member that fails.
    """

    def __init__(
        self,
        geometry: Geometry,
        members: Sequence[Member],
        store: Store,
        *,
        region_size: int,
        name: str,
    ) -> None:
        self.geometry = geometry
        self.members = list(members)
        self.store = store
        self.region_size = region_size
        self.name = name
        self.size = geometry.size
        self.resync_offset: int | None = None
        self.mismatches = 0
        self.event: Callable[[], None] = lambda: None
        self.needs_sync: Callable[[], None] = lambda: None
        self.spares: list[Leg] = []
        self.locks = StripeLocks()
        self.state_lock = threading.RLock()
        # Regions whose bit is set in the store, and when each was last written.
        self._dirty: dict[int, float] = {}
        self.unsynced: set[int] = set()
        self.crashed: set[int] = set()
        self.requests = 0

    # State

    @property
    def degraded(self) -> int:
        """How many members are not in sync."""
        return sum(member.state != IN_SYNC for member in self.members)

    @property
    def healthy(self) -> bool:
        """Whether all members are in sync."""
        for member in self.members:
            if member.state != IN_SYNC:
                return False
        return True

    @property
    def failed(self) -> bool:
        """Whether so many members are gone that bytes are lost."""
        if self.healthy:
            return False
        working = {member.index for member in self.members if member.state == IN_SYNC}
        return not self.geometry.enough(working)

    def fail(self, index: int, reason: str = "failed on request") -> None:
        """Leave a member out from now on.

        Raises:
            OSError: the store could not keep it.
        """
        with self.state_lock:
            member = self.members[index]
            if member.state in (FAULTY, MISSING):
                return
            member.state = FAULTY
            member.recovery_offset = 0
            _log.error("%s: member %d: %s", self.name, index, reason)
            if self.failed:
                _log.error("%s: too many members are gone, no more writes", self.name)
            self.store.update(self)
        self.event()
        self.needs_sync()

    def rebuilt(self, members: Iterable[Member]) -> None:
        """Take members that have been rebuilt for members in sync, if they have not failed."""
        with self.state_lock:
            for member in members:
                if member.state == REBUILDING:
                    member.state = IN_SYNC
                    member.recovery_offset = 0
                    member.only_unsynced = False
            if not self.degraded:
                self.unsynced.clear()

    def keep(self) -> None:
        """Keep the state as it is.

        Raises:
            OSError: it could not be kept.
        """
        with self.state_lock:
            self.store.update(self)

    @property
    def in_member_order(self) -> bool:
        """Whether what is synced is counted in bytes of each member."""
        return self.geometry.level.number != 10

    def remove(self, index: int) -> None:
        """Take a member that has failed out of the array.

        Raises:
            OSError: EBUSY when it is in use.
        """
        with self.state_lock:
            member = self.members[index]
            if member.writable:
                raise DeviceError(errno.EBUSY, f"{self.name}: member {index} is in use")
            # Another object: requests that are under way have the old one, with its leg.
            self.members[index] = Member(index, None)
            self.store.update(self)

    def add(self, index: int, leg: Leg, *, only_unsynced: bool = False) -> None:
        """Give a place that is empty a new member, which is rebuilt from then on.

        Args:
            index: the place.
            leg: the new member's data.
            only_unsynced: it was a member before, and only what was written since is not on it.

        Raises:
            OSError: EBUSY when the place is taken.
        """
        with self.state_lock:
            member = self.members[index]
            if member.writable:
                raise DeviceError(errno.EBUSY, f"{self.name}: place {index} is taken")
            added = Member(index, leg, state=REBUILDING, write_mostly=member.write_mostly)
            added.only_unsynced = only_unsynced
            self.members[index] = added
            self.store.update(self)
        self.event()
        self.needs_sync()

    def corrected(self, member: Member, buffers: Buffers, place: int) -> None:
        """Write bytes again that a member could not read; past a limit it is left out."""
        member.errors += 1
        if member.errors > _MOST_CORRECTED:
            self.fail(member.index, f"more than {_MOST_CORRECTED} read errors")
            return
        self.write_member(member, buffers, place)

    def write_member(
        self, member: Member, buffers: Buffers, place: int, *, fua: bool = False
    ) -> None:
        """Write to a member; one that fails is left out, which is no error of the array's yet.

        Raises:
            OSError: the write failed, and the member is one that the array cannot do without.
        """
        leg = member.leg
        try:
            leg.pwritev(buffers, place, fua=fua)
        except OSError as error:
            if member.leg is not leg and self.members[member.index] is member:
                # The member is on another device since: what the old one does is of no matter.
                self.write_member(member, buffers, place, fua=fua)
                return
            if self.is_last(member):
                raise
            if self.members[member.index] is member:
                reason = f"write of {total(buffers)} bytes: {error.strerror or error}"
                self.fail(member.index, reason)

    def is_last(self, member: Member) -> bool:
        """Say whether a member is kept although it fails: nothing would be left without it."""
        return False

    def refuse_if_failed(self, offset: int) -> None:
        """Raise EIO for a write to an array that has lost too many members."""
        if self.failed:
            raise DeviceError(
                errno.EIO,
                f"{self.name}: too many members are gone",
                device=self.name,
                offset=offset,
            )

    # The write-intent bitmap

    @abstractmethod
    def sync_range(self, offset: int, length: int) -> tuple[int, int]:
        """Say which bytes (begin, end) of what is synced a piece of the array lies in."""

    @property
    @abstractmethod
    def sync_size(self) -> int:
        """Bytes of what is synced: of the array in RAID 10, else of each member."""

    # The regions that a piece of the array lies in.
    def _regions(self, offset: int, length: int) -> range:
        begin, end = self.sync_range(offset, length)
        return range(begin // self.region_size, -(-end // self.region_size))

    def begin_write(self, offset: int, length: int) -> None:
        """Keep that a piece is about to be written, durably, before it is.

        The caller has the locks of the piece.

        Raises:
            OSError: it could not be kept.
        """
        if not self.region_size:
            return
        dirty = self._dirty
        new = []
        for region in self._regions(offset, length):
            if region not in dirty:
                new.append(region)
            # Not a time: it is being written.
            dirty[region] = _NOW
        if new:
            with self.state_lock:
                self.store.mark_dirty(new)

    def end_write(self, offset: int, length: int) -> None:
        """Take note that a piece has been written, everywhere or not."""
        if not self.region_size:
            return
        now = monotonic()
        for region in self._regions(offset, length):
            self._dirty[region] = now
            if self.degraded:
                self.unsynced.add(region)

    def clean_up(self, idle: float) -> None:
        """Mark regions clean that have not been written for a while.

        Args:
            idle: seconds without a write.

        Raises:
            OSError: too many members are gone.
        """
        if self.degraded or self.resync_offset is not None:
            # Whoever comes back has to be brought up to date with what is dirty.
            return
        limit = monotonic() - idle
        old = [
            region
            for region, when in list(self._dirty.items())
            if when <= limit and region not in self.unsynced and region not in self.crashed
        ]
        if not old:
            return
        # What is marked clean must be on the members.
        self.flush()
        for region in old:
            begin = region * self.region_size
            first, last = self.lock_numbers(begin, min(begin + self.region_size, self.sync_size))
            # Whoever writes has the locks from before he looks at the bit.
            self.locks.take(first, last)
            try:
                if self._dirty[region] <= limit:
                    del self._dirty[region]
                    with self.state_lock:
                        self.store.mark_clean([region])
            finally:
                self.locks.give_back(first, last)

    @abstractmethod
    def lock_numbers(self, begin: int, end: int) -> tuple[int, int]:
        """Say which locks (first, last) protect bytes of what is synced."""

    def nobody_writes(self) -> None:
        """Take note that there are no requests: whoever writes next has to say so anew."""
        with self.state_lock:
            self._dirty.clear()

    def all_synced(self) -> None:
        """Take note that all members agree everywhere: only what is being written is dirty."""
        with self.state_lock:
            self.unsynced.clear()
            self.crashed.clear()
            clean = [region for region in self.store.dirty_regions() if region not in self._dirty]
            self.store.mark_clean(clean)

    # Requests

    def flush(self) -> None:
        """Flush every member; one that fails is left out.

        Raises:
            OSError: EIO when too many are gone.
        """
        for member in self.members:
            if member.writable:
                try:
                    member.leg.flush()
                except OSError as error:
                    if self.is_last(member):
                        raise
                    self.fail(member.index, f"flush: {error.strerror or error}")
        self.refuse_if_failed(0)

    @abstractmethod
    def preadv(self, buffers: Buffers, offset: int) -> None:
        """Read as BlockDevice.preadv() does."""

    @abstractmethod
    def pwritev(self, buffers: Buffers, offset: int, *, fua: bool = False) -> None:
        """Write as BlockDevice.pwritev() does."""

    @abstractmethod
    def read_place(self, offset: int, length: int) -> tuple[Member, int] | None:
        """Say which one member a piece can be read from as it is, and where; None for none."""

    def discard(self, offset: int, length: int) -> None:
        """Refuse: what is discarded may read as anything, on each member as something else."""
        raise DeviceError(errno.EOPNOTSUPP, f"{self.name}: discard is not supported")

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        """Write zeroes as BlockDevice.write_zeroes() does."""
        if fast_only:
            raise DeviceError(errno.EOPNOTSUPP, f"{self.name}: zeroes have to be written")
        for place, zeroes in zero_chunks(offset, length, 1 << 20):
            self.pwritev([zeroes], place)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Say that everything is data."""
        yield Extent(offset, length, DATA)

    @abstractmethod
    def sync_windows(self, begin: int) -> Iterator[tuple[int, int]]:
        """Cut members from byte `begin` on into windows (begin, end) to be synced one by one."""

    @abstractmethod
    def sync_window(self, action: str, begin: int, end: int) -> int:
        """Make members agree on a window, or see whether they do.

        Args:
            action: resync, recover, check or repair.
            begin: bytes from the start of each member's data.
            end: bytes.

        Returns:
            Sectors found to disagree.
        """
