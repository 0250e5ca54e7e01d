"""What goes on in the background of an array: resync, recovery, checks, and cleaning the bitmap.

One thread an array. It works in windows, each a few calls that let other threads run, and rests in
between to stay below the speed that it is allowed.

Source: Linux v6.1 drivers/md/md.c, md_do_sync(), md_check_recovery();
Documentation/admin-guide/md.rst.
"""

from __future__ import annotations

import logging
import threading
from time import monotonic

from dmpy.raid.array import REBUILDING, Array, Member

__all__ = ["ACTIONS", "Syncer"]

_log = logging.getLogger("dmpy.raid")

# What a message may ask for.
ACTIONS = ("idle", "frozen", "resync", "recover", "check", "repair")

# SYNC_SPEED_MAX of the kernel, in bytes a second, here for an array in use.
_RATE_IN_USE = 200_000 << 10
# A checkpoint is kept after so many bytes, as md does at 1/16 of the array or so.
_CHECKPOINT = 256 << 20
# How long a region has to be idle to be marked clean, DEFAULT daemon_sleep.
_IDLE_SECONDS = 5.0


class Syncer:
    """Keeps the members of an array in agreement.

    Args:
        array: the array.
        minimum_rate: bytes of each member a second that are done even while the array is in use.
        maximum_rate: bytes of each member a second that are not exceeded; 0 for 200 MB while the
            array is in use, and as much as can be while it is not.
        daemon_sleep: seconds after which idle regions are marked clean.

    Attributes:
        action: idle, frozen, resync, recover, check or repair: what is going on.
        position: bytes of what is synced that are done.
    """

    def __init__(
        self,
        array: Array,
        *,
        minimum_rate: int = 0,
        maximum_rate: int = 0,
        daemon_sleep: float = _IDLE_SECONDS,
    ) -> None:
        self.array = array
        self.minimum_rate = minimum_rate
        self.maximum_rate = maximum_rate
        self.daemon_sleep = daemon_sleep
        self.action = "idle"
        self.position = 0
        self._frozen = False
        # Those that the recovery that is going on began with.
        self._rebuilding: list[Member] = []
        self._asked: str | None = None
        self._interrupted = False
        self._stopping = False
        # Protects what is asked for; nothing is taken under it.
        self._changed = threading.Condition(threading.Lock())
        array.needs_sync = self.wake

    # From any thread

    def wake(self) -> None:
        """See whether there is something to do."""
        with self._changed:
            self._changed.notify_all()

    def request(self, action: str) -> None:
        """Do as a message says: interrupt (idle), and freeze or begin something."""
        with self._changed:
            self._frozen = action == "frozen"
            self._interrupted = self.action not in ("idle", "frozen")
            self._asked = None if action in ("idle", "frozen") else action
            if self.action in ("idle", "frozen"):
                self.action = "frozen" if self._frozen else "idle"
            self._changed.notify_all()

    def restart(self) -> None:
        """Let run() be called again after stop()."""
        with self._changed:
            self._stopping = self._interrupted = False

    def stop(self) -> None:
        """End run() soon."""
        with self._changed:
            self._stopping = self._interrupted = True
            self._changed.notify_all()

    def wait_idle(self, timeout: float | None = None) -> bool:
        """Wait until there is nothing to do; says whether there is not."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self.action in ("idle", "frozen") and not self._due(), timeout
            )

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes that are in sync, or have been looked at, and all bytes."""
        size = self.array.sync_size
        if self.action in ("idle", "frozen"):
            rebuilding = [m.recovery_offset for m in self.array.members if m.state == REBUILDING]
            offset = self.array.resync_offset
            done = min([size if offset is None else offset, *rebuilding])
            return done, size
        return self.position, size

    # The background thread

    def run(self) -> None:
        """Do what there is to do until stop()."""
        while True:
            with self._changed:
                while not self._stopping and self._due() is None:
                    if not self._changed.wait(self.daemon_sleep):
                        break
                if self._stopping:
                    return
                action = self._due()
                if action is not None:
                    self.action, self._asked, self._interrupted = action, None, False
            try:
                if action is None:
                    self.array.clean_up(self.daemon_sleep)
                else:
                    if action == "recover":
                        self._take_spare()
                    self._do(action)
            except OSError as error:
                _log.error("%s: %s: %s", self.array.name, action or "bitmap", error)
                self._give_up(action)
            finally:
                with self._changed:
                    self.action = "frozen" if self._frozen else "idle"
                    self._changed.notify_all()

    # What to do next; None for nothing. Called under the lock.
    def _due(self) -> str | None:
        array = self.array
        if self._frozen or array.failed or not array.sync_size:
            return None
        if self._asked is not None:
            return self._asked
        if self._spare_fits() or any(member.state == REBUILDING for member in array.members):
            return "recover"
        if array.resync_offset is not None or (array.crashed and not array.degraded):
            return "resync"
        return None

    # Whether there is a spare and a place for it.
    def _spare_fits(self) -> bool:
        array = self.array
        return bool(array.spares) and any(not member.writable for member in array.members)

    # A spare takes the place of a member that is gone. Not under the lock: the array wakes us.
    def _take_spare(self) -> None:
        array = self.array
        for member in array.members:
            if array.spares and not member.writable:
                if member.leg is not None:
                    array.remove(member.index)
                array.add(member.index, array.spares.pop(0))

    # One action from its checkpoint to its end, or until it is interrupted.
    def _do(self, action: str) -> None:
        array = self.array
        begin = self._begin(action)
        self.position = begin
        if action in ("check", "repair"):
            array.mismatches = 0
        array.event()
        _log.info("%s: %s from byte %d", array.name, action, begin)
        kept = begin
        for first, last in array.sync_windows(begin):
            if self._interrupted or self._stopping:
                self._keep(action, self.position)
                return
            started, requests = monotonic(), array.requests
            if self._needed(action, first, last):
                found = array.sync_window(action, first, last)
                if action in ("check", "repair"):
                    array.mismatches += found
                self._advance(action, last)
                self._rest(last - first, monotonic() - started, array.requests != requests)
            else:
                self._advance(action, last)
            if last - kept >= _CHECKPOINT:
                self._keep(action, last)
                kept = last
        self._finish(action)
        array.event()

    # Where an action goes on.
    def _begin(self, action: str) -> int:
        array = self.array
        if action == "recover":
            self._rebuilding = [m for m in array.members if m.state == REBUILDING]
            return min((m.recovery_offset for m in self._rebuilding), default=0)
        if action == "resync":
            return array.resync_offset or 0
        return 0

    # Whether a window has to be looked at: after a crash only what was dirty has.
    def _needed(self, action: str, first: int, last: int) -> bool:
        array = self.array
        if not array.region_size or action in ("check", "repair"):
            return True
        if action == "resync" and array.resync_offset is not None:
            return True
        if action == "recover" and not all(m.only_unsynced for m in self._rebuilding):
            return True
        regions = range(first // array.region_size, -(-last // array.region_size))
        if action == "resync":
            return any(region in array.crashed for region in regions)
        return any(region in array.unsynced or region in array.crashed for region in regions)

    # A window is done.
    def _advance(self, action: str, position: int) -> None:
        self.position = position
        if action == "recover" and self.array.in_member_order:
            for member in self._rebuilding:
                member.recovery_offset = max(member.recovery_offset, position)

    # Keep how far an action is, so that it can go on from there.
    def _keep(self, action: str, position: int) -> None:
        array = self.array
        if action == "resync" and array.resync_offset is not None:
            array.resync_offset = position
        if action in ("resync", "recover"):
            array.flush()
            array.keep()

    # Stay below the limit after a window that took some seconds, and leave others their time.
    def _rest(self, done: int, took: float, busy: bool) -> None:
        rate = self.maximum_rate or (_RATE_IN_USE if busy else 0)
        rest = done / rate - took if rate else 0.0
        if busy:
            rest = max(rest, took)
            if self.minimum_rate:
                rest = min(rest, done / self.minimum_rate - took)
        if rest > 0:
            with self._changed:
                if not self._interrupted:
                    self._changed.wait(min(rest, 1.0))

    # An action has come to its end.
    def _finish(self, action: str) -> None:
        array = self.array
        if action in ("resync", "recover", "repair"):
            array.flush()
        if action == "recover":
            array.rebuilt(self._rebuilding)
        if action in ("resync", "repair"):
            array.resync_offset = None
            array.crashed.clear()
        if action != "check":
            if not (array.degraded or array.unsynced or array.crashed):
                array.all_synced()
            array.keep()
        _log.info("%s: %s is done, %d mismatches", array.name, action, array.mismatches)

    # What cannot be done is not tried again and again.
    def _give_up(self, action: str | None) -> None:
        with self._changed:
            if action is not None:
                self._frozen = True
