"""A leaf of memory: `mem:SIZE` in a table, empty at each opening and gone with the last user."""

from __future__ import annotations

import errno
import fcntl
import os

from dmpy.backing.file import FileLeaf
from dmpy.device import BlockSize
from dmpy.errors import DeviceError
from dmpy.units import SECTOR_SIZE, parse_size

__all__ = ["PREFIX", "MemoryLeaf"]

# How a table word for memory begins.
PREFIX = "mem:"

# The largest offset that the kernel's page cache has.
_LARGEST_SIZE = (1 << 63) - 4096


class MemoryLeaf(FileLeaf):
    """Anonymous memory of any size, which takes room only where it was written.

    It is a memfd, so that reads and writes of any thread copy outside of the interpreter's lock,
    a discard gives the memory back, and holes are known. A size beyond the machine's memory is
    fine as long as it is not filled: then the kernel ends the process, as for any memory.

    Args:
        word: `mem:` and a size as `dmpy.units.parse_size` reads it.
        readonly: refuse writes; all that can be read then is zeroes.

    Raises:
        OSError: EINVAL for what is no size, or not whole sectors.
    """

    # The size is sealed.
    _can_shrink = False
    # There is nothing more durable behind it.
    _dsync = 0

    def __init__(self, word: str, *, readonly: bool = False) -> None:
        size = _size(word)
        self.name = word
        self.readonly = readonly
        self.size = size
        self.block_size = BlockSize(1, 4096)
        self.identity = ("memory", object())
        self._lock_fd = -1
        self._lost = 0
        self.fd = os.memfd_create("dmpy", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        # Nobody can change the size from now on, so that writes need not look.
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        if readonly:
            writable = self.fd
            self.fd = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
            os.close(writable)

    @property
    def table_name(self) -> str:
        """The word itself: a table that is loaded again gets new, empty memory."""
        return self.name

    def refresh(self) -> None:
        """Do nothing: the size never changes."""

    def flush(self) -> None:
        """Do nothing: what is written is as durable as it gets."""


# The size in a word, in bytes.
def _size(word: str) -> int:
    try:
        size = parse_size(word.removeprefix(PREFIX))
    except ValueError as error:
        raise DeviceError(errno.EINVAL, f"{word}: {error}", device=word) from error
    if size % SECTOR_SIZE or not 0 < size <= _LARGEST_SIZE:
        reason = f"the size must be whole sectors of 512 bytes, below 8 EiB (got {size} bytes)"
        raise DeviceError(errno.EINVAL, f"{word}: {reason}", device=word)
    return size
