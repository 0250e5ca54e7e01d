"""Leaves that are files: a regular file, or a block device of the machine's kernel."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import stat
import struct
from collections.abc import Hashable, Iterator
from typing import NoReturn

from dmpy.device import DATA, HOLE, BlockDevice, BlockSize, Buffers, Extent, slices, total
from dmpy.errors import DeviceError
from dmpy.units import SECTOR_SIZE, round_down, round_up

__all__ = ["BlockLeaf", "FileLeaf", "node_of", "open_file"]

# The most buffers that one preadv or pwritev takes, as <limits.h> has it.
_IOV_MAX = 1024
# The smallest and largest preferred block size that NBD can express.
_PREFERRED = (4096, 32 << 20)

# <linux/fs.h>, the same on every architecture with 64-bit size_t but for the direction bits that
# _IO and _IOR have elsewhere on MIPS, PowerPC and SPARC.
_BLKROGET = 0x125E
_BLKDISCARD = 0x1277
_BLKSSZGET = 0x1268
_BLKPBSZGET = 0x127B
_BLKGETSIZE64 = 0x80081272

# <linux/falloc.h>
_KEEP_SIZE = 1
_PUNCH_HOLE = 2
_ZERO_RANGE = 16

# What fallocate says where the file system, or the alignment, does not allow a mode.
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)
# What a durable write says that did not get as far as the medium.
_NOT_LOST = (errno.ENOSPC, errno.EDQUOT, errno.EBADF, errno.EFBIG, errno.EPERM)
# What flock says where the file system has no locks.
_NO_LOCKS = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)

_DEVICE_NUMBER = re.compile(r"([0-9]{1,7}):([0-9]{1,7})", re.ASCII)

# Bound here because each look-up in `os` is 3 % of a request.
_preadv, _pwritev, _lseek = os.preadv, os.pwritev, os.lseek

# CDLL, not PyDLL: punching a large hole takes long, and other threads run meanwhile.
_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = getattr(_libc, "fallocate64", None) or _libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class FileLeaf(BlockDevice):
    """A regular file, read and written in place; its holes are the device's holes.

    The file is locked against other processes (flock: shared when read-only, else exclusive). Its
    size is what it was at the last `refresh`, in whole sectors, as the kernel has it for a loop
    device. A file that someone cuts short meanwhile gives EIO where it ends, and writes never make
    it longer again.

    After a flush that failed every further one fails with EIO until the file is opened anew: the
    kernel reports lost pages once and then holds them for clean (fsync(2), NOTES).

    Args:
        name: the word that the table has for it.
        path: absolute, or relative to the process' folder.
        readonly: open for reading only.

    Attributes:
        fd: the descriptor; its number stays the same until close().
        identity: equal for two leaves exactly when they are the same file.

    Raises:
        OSError: what open(2) says, in a sentence; EACCES for a file that permits reading only;
            EBUSY when another process holds it.
    """

    # Whether others can cut it short while it is open.
    _can_shrink = True

    def __init__(self, name: str, path: str, *, readonly: bool = False) -> None:
        self.name = name
        self.readonly = readonly
        self._path = path
        self.fd = _opened(name, path, self._flags(readonly))
        # After an upgrade: the descriptor that was opened first and carries the lock or claim.
        self._lock_fd = -1
        # The errno of the flush that failed, 0 while none has.
        self._lost = 0
        # The flag of durable writes, 0 once the file system has refused it.
        self._dsync = os.RWF_DSYNC
        try:
            self._claim(self.fd, exclusive=not readonly)
            self._check_node(os.fstat(self.fd))
            self.refresh()
        except BaseException:
            self.close()
            raise

    @property
    def table_name(self) -> str:
        """The absolute path, with a backslash before each blank and backslash."""
        return "".join(f"\\{c}" if c.isspace() or c == "\\" else c for c in self._path)

    def refresh(self) -> None:
        """Read the size anew; called when a table is loaded, so that a file that grew is seen."""
        status = os.fstat(self.fd)
        self.size = round_down(status.st_size, SECTOR_SIZE)
        self.block_size = BlockSize(1, _preferred(status.st_blksize))

    def make_writable(self) -> None:
        """Turn a read-only leaf into a writable one, under reads in flight.

        Raises:
            OSError: EACCES or EROFS where writing is not permitted, EBUSY when another process
                reads the file too; the leaf stays as it was.
        """
        if not self.readonly:
            return
        # 1. Open the same file for writing, whatever its name is by now (so not by path; and
        #    without O_EXCL, as the claim on a block device is ours already). Nothing has changed
        #    when that is refused.
        writable = _opened(self.name, f"/proc/self/fd/{self.fd}", os.O_CLOEXEC | os.O_RDWR)
        lock = -1
        try:
            # 2. Lock for writing. The descriptor that holds the lock is kept beside the new one,
            #    so that there is no moment without.
            self._claim(self.fd, exclusive=True)
            lock = os.dup(self.fd)
            # 3. Replace the descriptor under its number, in one step that readers do not see.
            os.dup2(writable, self.fd, inheritable=False)
        except BaseException:
            if lock >= 0:
                os.close(lock)
            raise
        finally:
            os.close(writable)
        self._lock_fd = lock
        self.readonly = False

    def preadv(self, buffers: Buffers, offset: int) -> None:
        """Fill the buffers by one preadv.

        Raises:
            OSError: EIO where the file ends before the device does.
        """
        try:
            moved = _preadv(self.fd, buffers, offset)
        except OSError as error:
            moved = self._failed_read(error, buffers)
        # Fast path: one buffer, one call, nothing missing.
        if moved != (len(buffers[0]) if len(buffers) == 1 else total(buffers)):
            self._read_rest(buffers, offset, moved)

    def pwritev(self, buffers: Buffers, offset: int, *, fua: bool = False) -> None:
        """Write the buffers by one pwritev, with RWF_DSYNC for `fua`.

        Raises:
            OSError: ENOSPC when the file system is full (a part may be written); EIO where the
                file ends before the device does, and nothing is written.
        """
        length = len(buffers[0]) if len(buffers) == 1 else total(buffers)
        try:
            # A write past the end of a file that was cut short would make it longer without a
            # word. One lseek (0.2 us) is the cheapest way to know; fstat costs three times that.
            if self._can_shrink and _lseek(self.fd, 0, os.SEEK_END) < offset + length:
                self._fail_short("write", offset, length)
            moved = _pwritev(self.fd, buffers, offset, self._dsync if fua else 0)
        except OSError as error:
            moved = self._failed_write(error, buffers, fua)
        if moved != length:
            self._write_rest(buffers, offset, moved, length, fua)
        if fua and not self._dsync:
            self.flush()

    def flush(self) -> None:
        """Make completed writes durable (fdatasync).

        Raises:
            OSError: what the kernel says at the first failure, EIO from then on.
        """
        if self._lost:
            reason = f"an earlier flush lost writes ({_words(self._lost)}): open the device anew"
            self._fail(errno.EIO, reason)
        if self.readonly:
            return
        if self.fd < 0:
            self._fail(errno.EBADF, "closed")
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            self._lost = error.errno
            self._fail_io(error, "flush")

    def discard(self, offset: int, length: int) -> None:
        """Punch a hole.

        Raises:
            OSError: EOPNOTSUPP where the file system has no holes.
        """
        self._check_writable()
        self._check_end(offset, length)
        if not self._allocate(_PUNCH_HOLE | _KEEP_SIZE, offset, length):
            self._fail(errno.EOPNOTSUPP, "the file system has no holes")

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        """Punch a hole, or let the file system mark the range as zero, or write zeroes.

        Raises:
            OSError: ENOSPC when the range has to be allocated and the file system is full.
        """
        self._check_writable()
        self._check_end(offset, length)
        if self._zero_fast(offset, length, may_unmap):
            return
        super().write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Tell data from holes by SEEK_DATA and SEEK_HOLE."""
        fd = self.fd
        end = offset + length
        # Beyond the end of a file cut short reads fail: no hole, or nobody would try to read it.
        file_end = min(end, _lseek(fd, 0, os.SEEK_END))
        while offset < file_end:
            data = min(_seek(fd, offset, os.SEEK_DATA, file_end), file_end)
            if data > offset:
                yield Extent(offset, data - offset, HOLE)
            if data == file_end:
                break
            offset = min(_seek(fd, data, os.SEEK_HOLE, file_end), file_end)
            if offset > data:
                yield Extent(data, offset - data, DATA)
        if file_end < end:
            begin = max(offset, file_end)
            yield Extent(begin, end - begin, DATA)

    def close(self) -> None:
        """Give back the file and its lock; no request may be in flight."""
        descriptors = (self.fd, self._lock_fd)
        self.fd = self._lock_fd = -1
        for fd in descriptors:
            if fd >= 0:
                os.close(fd)

    # The flags for open(2).
    def _flags(self, readonly: bool) -> int:
        return os.O_CLOEXEC | (os.O_RDONLY if readonly else os.O_RDWR)

    # Lock against other processes, or raise EBUSY with the lock as it was.
    def _claim(self, fd: int, *, exclusive: bool) -> None:
        try:
            fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return
            if error.errno != errno.EWOULDBLOCK:
                self._fail(error.errno, f"lock: {_words(error.errno)}")
            if exclusive and self.readonly:
                # A change of lock that is refused gives up the old lock first.
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            self._fail(errno.EBUSY, "in use by another process")

    # Remember which file was opened; it must be of the kind that was looked up.
    def _check_node(self, status: os.stat_result) -> None:
        self.identity = self._identity_of(status)
        if not stat.S_ISREG(status.st_mode):
            self._fail(errno.ENOTBLK, "not a regular file any more")

    def _identity_of(self, status: os.stat_result) -> Hashable:
        return ("file", status.st_dev, status.st_ino)

    # Refuse what must not make the file longer, as pwritev does in place.
    def _check_end(self, offset: int, length: int) -> None:
        if not self._can_shrink:
            return
        try:
            end = _lseek(self.fd, 0, os.SEEK_END)
        except OSError as error:
            self._fail_io(error, f"request of {length} bytes")
        if end < offset + length:
            self._fail_short("request", offset, length)

    def _check_writable(self) -> None:
        if self.readonly:
            self._fail(errno.EROFS, "opened for reading only")

    # Tell a list that is too long for the kernel, of which nothing was moved, from a failure.
    def _failed_read(self, error: OSError, buffers: Buffers) -> int:
        if error.errno == errno.EINVAL and len(buffers) > _IOV_MAX:
            return 0
        self._fail_io(error, f"read of {total(buffers)} bytes")

    # The same for a write, and for a file system that does not know RWF_DSYNC.
    def _failed_write(self, error: OSError, buffers: Buffers, fua: bool) -> int:
        if isinstance(error, DeviceError):
            raise error
        if error.errno == errno.EINVAL and len(buffers) > _IOV_MAX:
            return 0
        if fua and self._dsync and error.errno == errno.EOPNOTSUPP:
            self._dsync = 0
            return 0
        if fua and self.fd >= 0 and error.errno not in _NOT_LOST:
            # It may have taken the kernel's only report of lost pages from the next flush.
            self._lost = self._lost or error.errno
        self._fail_io(error, f"write of {total(buffers)} bytes")

    # Slow path: the kernel moved a part only, or the list is longer than it takes.
    def _read_rest(self, buffers: Buffers, offset: int, moved: int) -> None:
        length = total(buffers)
        while moved < length:
            rest = slices(buffers, moved, length - moved)[:_IOV_MAX]
            try:
                count = _preadv(self.fd, rest, offset + moved)
            except OSError as error:
                count = self._failed_read(error, rest)
            if not count:
                self._fail_short("read", offset, length)
            moved += count

    # Slow path of pwritev, from byte `moved` of `length` on.
    def _write_rest(
        self, buffers: Buffers, offset: int, moved: int, length: int, fua: bool
    ) -> None:
        while moved < length:
            rest = slices(buffers, moved, length - moved)[:_IOV_MAX]
            try:
                moved += _pwritev(self.fd, rest, offset + moved, self._dsync if fua else 0)
            except OSError as error:
                moved += self._failed_write(error, rest, fua)

    # Zero the range without writing it. False: this place has no way to do so, nothing happened.
    def _zero_fast(self, offset: int, length: int, may_unmap: bool) -> bool:
        if may_unmap and self._allocate(_PUNCH_HOLE | _KEEP_SIZE, offset, length):
            return True
        if self._allocate(_ZERO_RANGE | _KEEP_SIZE, offset, length):
            return True
        # tmpfs has no ZERO_RANGE: punch, then allocate what is now a hole.
        if may_unmap or not self._allocate(_PUNCH_HOLE | _KEEP_SIZE, offset, length):
            return False
        self._allocate(_KEEP_SIZE, offset, length)
        return True

    # One fallocate. False: the mode is not supported here, and nothing happened.
    def _allocate(self, mode: int, offset: int, length: int) -> bool:
        if not length:
            return True
        while _fallocate(self.fd, mode, offset, length):
            code = ctypes.get_errno()
            if code in _UNSUPPORTED:
                return False
            if code != errno.EINTR:
                self._fail_io(OSError(code, ""), f"fallocate of {length} bytes")
        return True

    # Raise what a system call said about a request.
    def _fail_io(self, error: OSError, request: str) -> NoReturn:
        if self.fd < 0:
            self._fail(errno.EBADF, "closed")
        if error.errno == errno.EBADF:
            self._check_writable()
        self._fail(error.errno, f"{request}: {_words(error.errno)}")

    # Raise what a request that meets the end of the file gets.
    def _fail_short(self, verb: str, offset: int, length: int) -> NoReturn:
        end = os.fstat(self.fd).st_size
        reason = f"{verb} of {length} bytes at byte {offset}: the file now ends at byte {end}"
        raise DeviceError(errno.EIO, f"{self.name}: {reason}", device=self.name, offset=offset)

    def _fail(self, code: int, reason: str) -> NoReturn:
        raise DeviceError(code, f"{self.name}: {reason}", device=self.name)


class BlockLeaf(FileLeaf):
    """A block device of the machine's kernel, through its page cache.

    It is claimed (O_EXCL), as the kernel's device-mapper claims its legs: one that is mounted, or
    used by another program that claims, gives EBUSY.

    Args:
        name: the word that the table has for it.
        path: of the device node.
        readonly: open for reading only.
    """

    # The kernel refuses writes past the end of a device.
    _can_shrink = False

    @property
    def table_name(self) -> str:
        """The device number, as the kernel prints it."""
        return f"{os.major(self._number)}:{os.minor(self._number)}"

    def refresh(self) -> None:
        """Read size and block size anew."""
        self.size = _query(self.fd, _BLKGETSIZE64, "=Q")
        physical = _query(self.fd, _BLKPBSZGET, "=I")
        self._logical = _query(self.fd, _BLKSSZGET, "=i")
        self._can_zero = _queue_limit(self._number, "write_zeroes_max_bytes") > 0
        # The page cache takes any byte; whole physical blocks save it from reading first.
        self.block_size = BlockSize(1, _preferred(physical))

    def discard(self, offset: int, length: int) -> None:
        """Tell the device that the whole blocks in the range are not needed (BLKDISCARD).

        Raises:
            OSError: EOPNOTSUPP where the device cannot discard.
        """
        self._check_writable()
        begin = round_up(offset, self._logical)
        length = round_down(offset + length, self._logical) - begin
        if length <= 0:
            return
        try:
            fcntl.ioctl(self.fd, _BLKDISCARD, struct.pack("=QQ", begin, length))
        except OSError as error:
            self._fail_io(error, f"discard of {length} bytes")

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        """Have the device zero the whole blocks in the range, and write the rest.

        Raises:
            OSError: EOPNOTSUPP for `fast_only` where the device has no fast way.
        """
        self._check_writable()
        # 1. Decide without asking the kernel: its fallocate drops what the page cache holds of
        #    the range before it finds that the device cannot zero. From here on there is no way
        #    back, so that whatever is refused below is written.
        fast = may_unmap and self._can_zero
        if fast_only and not fast:
            self._fail(errno.EOPNOTSUPP, "zeroes have to be written")
        mode = _PUNCH_HOLE | _KEEP_SIZE if fast else _ZERO_RANGE | _KEEP_SIZE
        # 2. Parts of blocks at both ends are written, whole blocks are left to the kernel.
        end = offset + length
        begin = min(round_up(offset, self._logical), end)
        middle = max(round_down(end, self._logical), begin)
        self._write_zero_bytes(offset, begin - offset)
        if not self._allocate(mode, begin, middle - begin):
            self._write_zero_bytes(begin, middle - begin)
        self._write_zero_bytes(middle, end - middle)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Say that everything is data: the kernel tells nothing about holes of a device."""
        yield Extent(offset, length, DATA)

    def _flags(self, readonly: bool) -> int:
        return super()._flags(readonly) | os.O_EXCL

    # The claim is O_EXCL's; the kernel also lets root open for writing what is set read-only.
    def _claim(self, fd: int, *, exclusive: bool) -> None:
        if exclusive and _query(fd, _BLKROGET, "=i"):
            self._fail(errno.EACCES, "the device is set read-only")

    def _check_node(self, status: os.stat_result) -> None:
        self.identity = self._identity_of(status)
        self._number = status.st_rdev
        if not stat.S_ISBLK(status.st_mode):
            self._fail(errno.ENOTBLK, "not a block device any more")

    def _identity_of(self, status: os.stat_result) -> Hashable:
        return ("block", status.st_rdev)

    def _write_zero_bytes(self, offset: int, length: int) -> None:
        BlockDevice.write_zeroes(self, offset, length)

    def _fail_short(self, verb: str, offset: int, length: int) -> NoReturn:
        reason = f"{verb} of {length} bytes at byte {offset}: the device now ends before that"
        raise DeviceError(errno.EIO, f"{self.name}: {reason}", device=self.name, offset=offset)


def node_of(word: str, cwd: str) -> tuple[str, os.stat_result]:
    """Find the file that a table word names.

    Args:
        word: a path, or the device number of a block device, as in `8:16`.
        cwd: the folder in which relative paths begin.

    Returns:
        The absolute path and its status; a regular file or a block device.

    Raises:
        OSError: ENOENT, ENXIO (no device of that number), EISDIR, ENOTBLK (anything else that is
            no storage) or what stat(2) says, in a sentence that begins with the word.
    """
    if not word or "\0" in word:
        raise DeviceError(errno.EINVAL, f"{word!r}: not a path", device=word)
    path = _number_path(word) or _absolute(word, cwd)
    try:
        status = os.stat(path)
    except UnicodeEncodeError as error:
        raise DeviceError(errno.EINVAL, f"{word!r}: not a path", device=word) from error
    except OSError as error:
        reason = _words(error.errno)
        if error.errno == errno.ENOENT and os.path.islink(path):
            reason = f"a symbolic link to {os.readlink(path)}, which does not exist"
        raise DeviceError(error.errno, f"{word}: {reason}", device=word) from error
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFDIR:
        raise DeviceError(errno.EISDIR, f"{word}: a folder, not a disk", device=word)
    if kind not in (stat.S_IFREG, stat.S_IFBLK):
        names = {stat.S_IFCHR: "character device", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        reason = f"a {names[kind]}, neither a regular file nor a block device"
        raise DeviceError(errno.ENOTBLK, f"{word}: {reason}", device=word)
    return path, status


def open_file(word: str, *, readonly: bool, cwd: str) -> FileLeaf:
    """Open the regular file or block device that a table word names.

    Args:
        word: as `node_of` takes it.
        readonly: open for reading only.
        cwd: the folder in which relative paths begin.

    Raises:
        OSError: as `node_of` and `FileLeaf` say.
    """
    path, status = node_of(word, cwd)
    leaf_type = BlockLeaf if stat.S_ISBLK(status.st_mode) else FileLeaf
    return leaf_type(word, path, readonly=readonly)


# The node of a block device given by number, None for any other word.
def _number_path(word: str) -> str | None:
    match = _DEVICE_NUMBER.fullmatch(word)
    if match is None:
        return None
    number = f"{int(match[1])}:{int(match[2])}"
    try:
        with open(f"/sys/dev/block/{number}/uevent", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("DEVNAME="):
                    return "/dev/" + line[8:].rstrip("\n")
    except FileNotFoundError:
        if os.path.exists(f"/dev/block/{number}"):
            return f"/dev/block/{number}"
    raise DeviceError(errno.ENXIO, f"{word}: no block device of that number", device=word)


# The path without its empty and "." parts. ".." stays: behind a link it means something else.
def _absolute(word: str, cwd: str) -> str:
    parts = os.path.join(cwd, word).split("/")
    return "/" + "/".join(part for part in parts if part not in ("", "."))


# open(2) with sentences that tell permission to read from permission to write.
def _opened(name: str, path: str, flags: int) -> int:
    try:
        return os.open(path, flags)
    except OSError as error:
        code = error.errno
        reason = _words(code)
        if code == errno.EACCES and flags & os.O_RDWR and os.access(path, os.R_OK):
            reason = "permits reading only"
        elif code == errno.EPERM and flags & os.O_RDWR:
            code, reason = errno.EACCES, "permits reading only (immutable or append-only)"
        elif code == errno.EBUSY:
            reason = "in use: mounted, or held by another program"
        elif code == errno.ETXTBSY:
            reason = "in use: a program that runs, or swap"
        raise DeviceError(code, f"{name}: {reason}", device=name) from error


# Where the next data or hole begins; `end` when there is none.
def _seek(fd: int, offset: int, whence: int, end: int) -> int:
    try:
        return os.lseek(fd, offset, whence)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return end
        if error.errno in _UNSUPPORTED:
            return offset if whence == os.SEEK_DATA else end
        raise


def _query(fd: int, request: int, layout: str) -> int:
    answer = fcntl.ioctl(fd, request, bytes(struct.calcsize(layout)))
    return struct.unpack(layout, answer)[0]


# A limit of a device's request queue, which a partition shares with its disk; 0 where unknown.
def _queue_limit(number: int, name: str) -> int:
    folder = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"
    for queue in (f"{folder}/queue", f"{folder}/../queue"):
        try:
            with open(f"{queue}/{name}", encoding="ascii") as line:
                return int(line.read())
        except OSError:
            continue
    return 0


def _preferred(size: int) -> int:
    lowest, highest = _PREFERRED
    return min(max(1 << (size - 1).bit_length(), lowest), highest)


def _words(code: int) -> str:
    text = os.strerror(code)
    return text[:1].lower() + text[1:]
