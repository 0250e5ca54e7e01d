"""A member that is being copied to another device, which takes its place when that is done.

Until then reads go to the old device and writes to both. A window is copied and a write made under
one lock, so that neither overtakes the other.

Source: Linux v6.1 drivers/md/raid5.c, raid10.c: want_replacement, replacement.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from dmpy.background import Job
from dmpy.buffers import scratch
from dmpy.device import Buffers, Extent
from dmpy.errors import DeviceError
from dmpy.target import Leg

if TYPE_CHECKING:
    from dmpy.plan import Segment

__all__ = ["TwinLeg"]

_log = logging.getLogger("dmpy.raid")

# What is copied at once, in bytes.
_WINDOW = 1 << 20


class TwinLeg:
    """Does for an array what a Leg does.

    Args:
        old: the member's data.
        copy: where it is copied to.

    Attributes:
        done: bytes that are copied.
        lost: the copy could not be written, and is given up.
    """

    def __init__(self, old: Leg, copy: Leg) -> None:
        self.old = old
        self.copy = copy
        self.device = old.device
        self.start = old.start
        self.length = old.length
        self.done = 0
        self.lost = False
        # Held for each write and for the copying of a window; nothing is taken under it but what
        # the legs take.
        self._lock = threading.Lock()

    @property
    def segment(self) -> Segment:
        """Where the old device's data really is, for reads."""
        return self.old.segment

    def preadv(self, buffers: Buffers, offset: int) -> None:
        """Read the old device."""
        self.old.preadv(buffers, offset)

    def pwritev(self, buffers: Buffers, offset: int, *, fua: bool = False) -> None:
        """Write both."""
        with self._lock:
            self.old.pwritev(buffers, offset, fua=fua)
            self._also(lambda: self.copy.pwritev(buffers, offset, fua=fua))

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        """Write zeroes to both."""
        with self._lock:
            self.old.write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)
            self._also(lambda: self.copy.write_zeroes(offset, length, may_unmap=may_unmap))

    def discard(self, offset: int, length: int) -> None:
        """Refuse: what is left behind a discard may differ between the two.

        Raises:
            OSError: EOPNOTSUPP.
        """
        raise DeviceError(errno.EOPNOTSUPP, f"{self.device.name}: is being copied, no discards")

    def flush(self) -> None:
        """Flush both."""
        self.old.flush()
        self._also(self.copy.flush)

    def extents(self, offset: int, length: int) -> list[Extent]:
        """Return the extents of the old device."""
        return self.old.extents(offset, length)

    # The copy's share; one that fails is given up, and the member is as good as before.
    def _also(self, act: Callable[[], None]) -> None:
        if self.lost:
            return
        try:
            act()
        except OSError as error:
            _log.error("%s: copy given up: %s", self.copy.device.name, error)
            self.lost = True

    def run(self, job: Job, wanted: Callable[[], bool]) -> bool:
        """Copy everything, window by window.

        Args:
            job: the thread's job.
            wanted: asked before each window; False ends the copying.

        Returns:
            Whether the copy is complete and durable.
        """
        with scratch(_WINDOW) as window:
            while self.done < self.length:
                if not job.go_on() or self.lost or not wanted():
                    return False
                if not self._copy_window(window[: min(_WINDOW, self.length - self.done)]):
                    return False
        self._also(self.copy.flush)
        return not self.lost

    # Copy the next window; False when the old device cannot be read.
    def _copy_window(self, view: memoryview) -> bool:
        with self._lock:
            try:
                self.old.preadv([view], self.done)
            except OSError as error:
                _log.error("%s: cannot be copied: %s", self.device.name, error)
                return False
            self._also(lambda: self.copy.pwritev([view], self.done))
            self.done += len(view)
        return True
