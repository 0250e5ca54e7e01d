"""Leaves: the devices below all targets, opened by the word that a table has for them.

| word | leaf |
| --- | --- |
| a path | the regular file or block device of that name |
| `8:16` | the block device of that number |
| `mem:64M` | new memory, gone with its last user |
| `nbd://host/export`, `nbd+unix:///export?socket=path`, `nbds...` | an NBD export |

README.md in this folder says what each of them promises.
"""

from __future__ import annotations

import errno
import re
import stat
import threading
from collections.abc import Hashable

from dmpy.backing.file import BlockLeaf, FileLeaf, node_of, open_file
from dmpy.backing.memory import PREFIX as MEMORY_PREFIX
from dmpy.backing.memory import MemoryLeaf
from dmpy.backing.remote import SCHEMES, RemoteLeaf, absolute_uri
from dmpy.device import BlockDevice
from dmpy.errors import DeviceError

__all__ = [
    "BlockLeaf",
    "FileLeaf",
    "Leaves",
    "MemoryLeaf",
    "RemoteLeaf",
    "leaf_identity",
    "open_leaf",
]

_URI = re.compile(r"([a-z][a-z0-9+.-]*)://", re.ASCII | re.IGNORECASE)


def open_leaf(word: str, *, readonly: bool = False, cwd: str = "/") -> BlockDevice:
    """Open the leaf that a table word names.

    Args:
        word: a path, a device number, `mem:SIZE` or an NBD URI.
        readonly: open for reading only.
        cwd: the folder in which relative paths begin; absolute.

    Returns:
        A leaf of the caller's own. Its `name` is the word, for a URI without what may be secret.

    Raises:
        OSError: ENOENT, EISDIR, EACCES, EROFS, EBUSY (held by another process), ENOTBLK (no
            storage), EINVAL (no leaf of that form), or what the system says, in a sentence that
            begins with the word.
    """
    if word.startswith(MEMORY_PREFIX):
        return MemoryLeaf(word, readonly=readonly)
    if _is_uri(word):
        return RemoteLeaf(absolute_uri(word, cwd), readonly=readonly)
    return open_file(word, readonly=readonly, cwd=cwd)


def leaf_identity(word: str, cwd: str = "/") -> Hashable:
    """Name what a table word means, so that two words for one file can be told to be one.

    Args:
        word: as in `open_leaf`.
        cwd: the folder in which relative paths begin; absolute.

    Returns:
        Equal values for words that may share one leaf. Each `mem:SIZE` differs from every other.

    Raises:
        OSError: where the word names nothing that could be opened.
    """
    if word.startswith(MEMORY_PREFIX):
        return ("memory", object())
    if _is_uri(word):
        return ("nbd", absolute_uri(word, cwd))
    status = node_of(word, cwd)[1]
    if stat.S_ISBLK(status.st_mode):
        return ("block", status.st_rdev)
    return ("file", status.st_dev, status.st_ino)


class Leaves:
    """The open leaves of one process: one object a file, however many tables name it.

    All methods may be called from any thread.
    """

    def __init__(self) -> None:
        # Protects the two dictionaries, and is held while a leaf is opened or closed, so that two
        # tables never open one file at once and lock each other out. Nothing else is taken under
        # it but what leaves take.
        self._lock = threading.Lock()
        self._leaves: dict[Hashable, BlockDevice] = {}
        self._users: dict[Hashable, int] = {}

    def open(self, word: str, *, readonly: bool = False, cwd: str = "/") -> BlockDevice:
        """Open a leaf, or share the one that is open, and count the caller as a user.

        A leaf that is shared has its size read anew; one that was opened for reading only becomes
        writable when a user needs that, and then stays so.

        Args:
            word: as in `open_leaf`.
            readonly: the caller only reads.
            cwd: the folder in which relative paths begin; absolute.

        Raises:
            OSError: as `open_leaf`; the users so far keep what they have.
        """
        with self._lock:
            identity = leaf_identity(word, cwd)
            leaf = self._leaves.get(identity)
            if leaf is None:
                leaf = open_leaf(word, readonly=readonly, cwd=cwd)
                identity = leaf.identity
                if identity in self._leaves:
                    leaf.close()
                    reason = "another file has taken its place meanwhile"
                    raise DeviceError(errno.EBUSY, f"{leaf.name}: {reason}", device=leaf.name)
                self._leaves[identity] = leaf
                self._users[identity] = 0
            else:
                leaf.refresh()
                if not readonly:
                    leaf.make_writable()
            self._users[identity] += 1
            return leaf

    def release(self, device: BlockDevice) -> None:
        """Count one user less, and close the leaf after the last; no request is in flight then.

        Args:
            device: what `open` returned.
        """
        with self._lock:
            identity = device.identity
            assert self._leaves.get(identity) is device, "not a leaf that is open here"
            self._users[identity] -= 1
            if self._users[identity]:
                return
            del self._leaves[identity], self._users[identity]
            # Under the lock: who opens the file next must not meet the old lock on it.
            device.close()

    def close(self) -> None:
        """Close every leaf, whoever uses it."""
        with self._lock:
            leaves = list(self._leaves.values())
            self._leaves.clear()
            self._users.clear()
        for leaf in leaves:
            leaf.close()


# Tell URIs from paths; a scheme that is none of ours is a mistake, not a file.
def _is_uri(word: str) -> bool:
    match = _URI.match(word)
    if match is None:
        return False
    if match[1].lower() not in SCHEMES:
        reason = f"scheme is none of {', '.join(SCHEMES)} (got {match[1]})"
        raise DeviceError(errno.EINVAL, f"{match[0]}...: {reason}", device=match[0])
    return True
