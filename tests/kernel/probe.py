"""Runs in the guest, with the standard library alone: reads and writes devices as a plan says.

    python3 probe.py PLAN ANSWERS

PLAN is JSON: a list of [verb, device, offset, length, seed], bytes all. The answer to "read" is the
SHA-256 of the bytes or the name of an errno; to "write" (of the bytes that `content` makes from the
seed) "ok" or the name of an errno. All is direct I/O: several devices lie on the same disks, and a
page that one of them keeps would hide what went through another.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import random
import sys


def content(seed: int, length: int) -> bytes:
    """Return `length` bytes that depend on the seed alone."""
    return random.Random(seed).randbytes(length)


def _answer(verb: str, fd: int, offset: int, length: int, seed: int) -> str:
    with mmap.mmap(-1, length) as memory, memoryview(memory) as view:
        try:
            if verb == "write":
                view[:] = content(seed, length)
                done = os.pwritev(fd, [view], offset)
            else:
                done = os.preadv(fd, [view], offset)
        except OSError as error:
            return errno.errorcode[error.errno]
        if done != length:
            return f"only {done} of {length} bytes"
        return "ok" if verb == "write" else hashlib.sha256(view).hexdigest()


def main(plan: str, answers: str) -> None:
    """Do what the plan says, in order."""
    with open(plan) as file:
        steps = json.load(file)
    fds = {}
    result = []
    for verb, device, offset, length, seed in steps:
        if device not in fds:
            fds[device] = os.open(device, os.O_RDWR | os.O_DIRECT)
        result.append(_answer(verb, fds[device], offset, length, seed))
    with open(answers, "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
