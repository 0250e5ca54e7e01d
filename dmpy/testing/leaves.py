"""Leaves that a test chooses: any device may stand under a table by a word of its own."""

from __future__ import annotations

import errno
import threading
from collections import Counter
from collections.abc import Mapping

from dmpy.device import BlockDevice
from dmpy.errors import DeviceError

__all__ = ["GivenLeaves"]


class GivenLeaves:
    """Opens the devices of a dict, for `Mapper(leaves=GivenLeaves({"disk": device}))`.

    Args:
        devices: word in the table -> device. It may change afterwards.

    Attributes:
        opened: word -> how often it is held now; empty when everything was given back.
    """

    def __init__(self, devices: Mapping[str, BlockDevice]) -> None:
        self.devices = devices
        self.opened: Counter[str] = Counter()
        # Protects the counts; nothing is called while it is held.
        self._lock = threading.Lock()

    def open(self, word: str, *, readonly: bool = False, cwd: str = "/") -> BlockDevice:
        """Return the device of a word.

        Raises:
            OSError: ENOENT when there is none.
        """
        try:
            device = self.devices[word]
        except KeyError:
            raise DeviceError(errno.ENOENT, f"{word}: no such device in this test") from None
        with self._lock:
            self.opened[word] += 1
        return device

    def release(self, device: BlockDevice) -> None:
        """Count a device back."""
        word = next(word for word, known in self.devices.items() if known is device)
        with self._lock:
            self.opened[word] -= 1
            assert self.opened[word] >= 0, f"{word}: released more often than opened"
            if not self.opened[word]:
                del self.opened[word]

    def close(self) -> None:
        """There is nothing to close: the devices belong to the test."""
