"""An nbdkit script that serves devices made for one test each; not a plugin of dmpy.

Exports: errno-N (every request fails with errno N), blocks (4096-byte blocks of at most 64 KiB a
request, refuses anything else), turning (the same from the first flush on), slow (2 ms a request),
stuck (requests wait until the server ends), hint (no discard, no fast zero), memory, file
(file=PATH), shrunk (half its size when it is used), bug (raises AssertionError), calls (reading it
gives the calls that `memory` has seen, as JSON), many-0 ... many-10000. default=NAME is the default
export; workers=yes has several threads serve a connection even where nbdkit cannot do that safely.
"""

import errno
import json
import os
import runpy
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
runpy.run_path(os.path.join(ROOT, "plugins", "adopt.py"))

import dmpy.nbd
from dmpy.backing import open_leaf
from dmpy.device import BlockDevice, BlockSize, total
from dmpy.errors import DeviceError
from dmpy.nbd import Plugin, callbacks

MIB = 1 << 20
ended = threading.Event()


class Over(BlockDevice):
    """Passes everything on to a leaf; the others change something."""

    def __init__(self, leaf, name):
        self.leaf, self.name, self.size = leaf, name, leaf.size
        self.block_size = leaf.block_size

    def preadv(self, buffers, offset):
        self.leaf.preadv(buffers, offset)

    def pwritev(self, buffers, offset, *, fua=False):
        self.leaf.pwritev(buffers, offset, fua=fua)

    def flush(self):
        self.leaf.flush()

    def discard(self, offset, length):
        self.leaf.discard(offset, length)

    def write_zeroes(self, offset, length, *, may_unmap=True, fast_only=False):
        self.leaf.write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)

    def extents(self, offset, length):
        return self.leaf.extents(offset, length)


class Failing(Over):
    def __init__(self, number):
        super().__init__(open_leaf("mem:16M"), f"errno-{number}")
        self.number = number

    def _fail(self, *_, **__):
        raise DeviceError(self.number, "made to fail")

    preadv = pwritev = flush = discard = write_zeroes = extents = _fail


class Bug(Over):
    def preadv(self, buffers, offset):
        assert offset is None, "this is the bug"


class Blocks(Over):
    """Whole blocks of 4096 bytes, at most 16 of them at once, and nothing else."""

    def __init__(self):
        super().__init__(open_leaf("mem:16M"), "blocks")
        self.block_size = BlockSize(4096, 4096, 65536)

    def _check(self, offset, length):
        if offset % 4096 or length % 4096 or not length:
            raise DeviceError(errno.EILSEQ, f"got {length} bytes at {offset}")

    def preadv(self, buffers, offset):
        self._check(offset, total(buffers))
        assert total(buffers) <= 65536
        super().preadv(buffers, offset)
        time.sleep(0.0002)  # so that writers who do not exclude each other meet

    def pwritev(self, buffers, offset, *, fua=False):
        self._check(offset, total(buffers))
        assert total(buffers) <= 65536
        super().pwritev(buffers, offset, fua=fua)

    def discard(self, offset, length):
        self._check(offset, length)
        super().discard(offset, length)

    def write_zeroes(self, offset, length, *, may_unmap=True, fast_only=False):
        self._check(offset, length)
        super().write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)

    def extents(self, offset, length):
        self._check(offset, length)
        return super().extents(offset, length)


class Turning(Blocks):
    """Takes any request until it is flushed, and then whole blocks only."""

    def __init__(self, devices):
        super().__init__()
        self.devices = devices
        self.name = "turning"
        self.block_size = BlockSize()

    def flush(self):
        self.block_size = BlockSize(4096, 4096, 65536)
        self.devices.changed(self)

    def _check(self, offset, length):
        if self.block_size.minimum > 1:
            super()._check(offset, length)


class Slow(Over):
    def preadv(self, buffers, offset):
        time.sleep(0.002)
        super().preadv(buffers, offset)


class Stuck(Over):
    def preadv(self, buffers, offset):
        ended.wait()
        raise DeviceError(errno.ESHUTDOWN, "the device is gone")


class Hint(Over):
    def discard(self, offset, length):
        raise DeviceError(errno.EOPNOTSUPP, "cannot discard")

    def write_zeroes(self, offset, length, *, may_unmap=True, fast_only=False):
        BlockDevice.write_zeroes(self, offset, length, may_unmap=may_unmap, fast_only=fast_only)


class Shrunk(Over):
    def flush(self):
        self.size = self.leaf.size // 2


class Counted(Over):
    calls = []

    def pwritev(self, buffers, offset, *, fua=False):
        self.calls.append(["write", offset, total(buffers), fua])
        super().pwritev(buffers, offset, fua=fua)

    def flush(self):
        self.calls.append(["flush"])
        super().flush()

    def discard(self, offset, length):
        self.calls.append(["discard", offset, length])
        super().discard(offset, length)

    def write_zeroes(self, offset, length, *, may_unmap=True, fast_only=False):
        self.calls.append(["zero", offset, length, may_unmap, fast_only])
        super().write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)


class Calls(Over):
    def preadv(self, buffers, offset):
        text = json.dumps(Counted.calls).encode().ljust(self.size)
        Counted.calls.clear()
        buffers[0][:] = text[offset : offset + len(buffers[0])]


def make(name, path):
    if name.startswith("errno-"):
        return Failing(int(name.partition("-")[2]))
    if name == "file":
        return open_leaf(path)
    if name == "blocks":
        return Blocks()
    if name == "calls":
        return Calls(open_leaf("mem:65536"), name)
    if name.startswith("many-"):
        return Over(open_leaf("mem:4096"), name)
    kinds = {"slow": Slow, "stuck": Stuck, "hint": Hint, "shrunk": Shrunk, "memory": Counted,
             "bug": Bug}
    if name not in kinds:
        raise DeviceError(errno.ENOENT, "no device has this name")
    return kinds[name](open_leaf("mem:256M"), name)


class Devices(Plugin):
    takes_files = True

    def __init__(self):
        self.path = None
        self.default_name = ""
        self.made = {}
        self.registry = self

    def configure(self, key, value):
        if key == "file":
            self.path = os.path.abspath(value)
        elif key == "default":
            self.default_name = value
        elif key == "workers":
            dmpy.nbd._hangups_are_fatal = lambda: False
        else:
            super().configure(key, value)

    def names(self):
        return [(f"many-{number}", f"number {number}") for number in range(10_001)]

    def default(self):
        return self.default_name

    def open(self, name, readonly):
        if name not in self.made:
            turning = name == "turning"
            self.made[name] = Turning(self) if turning else make(name, self.path)
        return self.made[name]

    def describe(self, device):
        return f"the device {device.name}"

    def block_size(self, device):
        return device.block_size

    def release(self, name, device):
        pass

    def watch(self, changed):
        self.changed = changed

    def interrupt(self):
        ended.set()

    def stop(self):
        for device in self.made.values():
            device.close()


globals().update(callbacks(Devices()))
