"""Random requests through libnbd, compared with a bytearray."""

from __future__ import annotations

import os
import random

import pytest

from tests.nbd.conftest import MIB

pytest.importorskip("nbd", reason="the Python module nbd is missing (package python3-libnbd)")
import nbd

SIZE = 4 * MIB


# Bytes whose content a trim has left open are compared with nothing until they are written again.
class Model:
    def __init__(self, handles, size, rng):
        self.handles, self.size, self.rng = handles, size, rng
        self.data = bytearray(size)
        self.known = bytearray(b"\1") * size
        self.log = []

    def place(self):
        rng = self.rng
        length = rng.choice((1, 100, 512, 4096, 5000, 65536, 200_000, rng.randrange(1, 300_000)))
        unit = rng.choice((1, 512, 4096, 65536))
        offset = min(rng.randrange(self.size) // unit * unit, self.size - length)
        return offset, length

    def step(self):
        handle = self.rng.choice(self.handles)
        offset, length = self.place()
        kind = self.rng.choice(("read", "read", "write", "write", "zero", "trim", "status", "all"))
        fua = self.rng.choice((0, 0, nbd.CMD_FLAG_FUA))
        self.log.append((kind, offset, length, fua))
        end = offset + length
        if kind == "write":
            data = self.rng.randbytes(length)
            handle.pwrite(data, offset, fua)
            self.data[offset:end] = data
            self.known[offset:end] = b"\1" * length
        elif kind == "zero":
            no_hole = self.rng.choice((0, nbd.CMD_FLAG_NO_HOLE))
            handle.zero(length, offset, fua | no_hole)
            self.data[offset:end] = bytes(length)
            self.known[offset:end] = b"\1" * length
        elif kind == "trim":
            handle.trim(length, offset, fua)
            self.known[offset:end] = bytes(length)
        elif kind == "status":
            self.check_status(handle, offset, length)
        elif kind == "all" and self.rng.random() < 0.1:
            handle.flush()
            self.check(handle.pread(self.size, 0), 0)
        else:
            self.check(handle.pread(length, offset), offset)

    def check(self, found, offset):
        expected = self.data[offset : offset + len(found)]
        if found == expected:
            return
        for index, (got, want) in enumerate(zip(found, expected, strict=True)):
            if got != want and self.known[offset + index]:
                raise AssertionError(f"byte {offset + index} is {got}, expected {want}: {self.log}")

    def check_status(self, handle, offset, length):
        found = []
        handle.block_status(length, offset, lambda _, o, e, err: found.extend(e) or 0)
        assert sum(found[::2]) <= length and found
        for size, kind in zip(found[::2], found[1::2], strict=True):
            if kind & 2:  # it claims to read as zeroes
                self.check_zero(handle, offset, size)
            offset += size

    def check_zero(self, handle, offset, size):
        assert handle.pread(size, offset) == bytes(size), self.log


TABLES = {
    "linear": "0 8192 linear {a} 0",
    "pieces": "0 3 linear {a} 7\n3 5000 linear {b} 0\n5003 3189 linear {a} 100",
    "striped": "0 8192 striped 2 8 {a} 0 {b} 8",
    "mixed": "0 4096 striped 2 16 {a} 0 {b} 0\n4096 4096 linear {b} 4096",
}


@pytest.mark.parametrize("name", TABLES)
def test_random_requests_agree_with_a_bytearray(serve, images, name):
    seed = int(os.environ.get("DMPY_TEST_SEED", "0")) or int.from_bytes(os.urandom(4))
    print(f"repeat with DMPY_TEST_SEED={seed}")
    a, b = images(SIZE, SIZE + MIB)
    server = serve("table.py", "table=" + TABLES[name].format(a=a, b=b))
    model = Model([server.connect() for _ in range(3)], SIZE, random.Random(seed))
    for _ in range(400):
        model.step()
    model.check(model.handles[0].pread(SIZE, 0), 0)
    assert server.stop() == 0


def test_random_requests_agree_on_a_device_of_blocks(odd):
    """Where every request has to be widened and split."""
    seed = int(os.environ.get("DMPY_TEST_SEED", "0")) or int.from_bytes(os.urandom(4))
    print(f"repeat with DMPY_TEST_SEED={seed}")
    model = Model([odd.connect("blocks") for _ in range(3)], SIZE, random.Random(seed))
    for _ in range(250):
        model.step()
    model.check(model.handles[0].pread(SIZE, 0), 0)
