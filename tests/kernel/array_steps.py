"""Runs in the guest, with the standard library alone: does the steps of a plan with RAID arrays.

    python3 array_steps.py PLAN ANSWERS

PLAN is JSON: a list of [verb, argument...]; ANSWERS becomes the list of what each step gave:

    ["run", words]               exit status and output of a command
    ["try", words]               the same, for commands that may fail; "run" ends the plan then
    ["create", tables]           complaint by name for the devices that the kernel refuses
    ["fill", device, seed]       nothing; the whole device gets the content of the seed
    ["write", device, offset, seed, length]      nothing
    ["digest", device]           SHA-256 of all its bytes
    ["scribble", devices, seed]  nothing; starts threads that overwrite their blocks of 4 KiB, in
                                 an order that nothing predicts, until the guest is gone
    ["settle"]                   status of every raid target by device, when all are idle
    ["scrub", devices]           the same after a check of each
    ["sysfs", devices, file, text]   nothing; writes text to /sys/block/DEVICE/md/FILE
    ["idle", devices]            for each md device its mismatch_cnt, when all are idle
    ["sleep", seconds]           nothing
    ["cut"]                      nothing: the power is cut, after the answers are saved

All is direct I/O, so that nothing stays in the guest's memory.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import random
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

_PIECE = 1 << 20
BLOCK = 4096
_PATIENCE = 20.0


def content(seed: int, length: int) -> bytes:
    """Return `length` bytes that depend on the seed alone."""
    return random.Random(seed).randbytes(length)


def block(seed: int, index: int) -> bytes:
    """Return what scribbling writes into block `index` of the device that has this seed."""
    return content(seed * 1_000_003 + index, BLOCK)


def _open(device: str) -> tuple[int, int]:
    fd = os.open(device, os.O_RDWR | os.O_DIRECT)
    return fd, os.lseek(fd, 0, os.SEEK_END)


def _write(device: str, offset: int, data: bytes) -> None:
    fd, _ = _open(device)
    with mmap.mmap(-1, len(data)) as memory, memoryview(memory) as view:
        view[:] = data
        done = 0
        while done < len(data):
            part = view[done : done + _PIECE]
            done += os.pwritev(fd, [part], offset + done)
            part.release()
    os.close(fd)


def _fill(device: str, seed: int) -> None:
    if not os.path.exists(device):
        return  # the kernel has refused it
    fd, size = _open(device)
    os.close(fd)
    _write(device, 0, content(seed, size))


def _digest(device: str) -> str:
    if not os.path.exists(device):
        return "not there"
    fd, size = _open(device)
    digest = hashlib.sha256()
    with mmap.mmap(-1, _PIECE) as memory, memoryview(memory) as view:
        offset = 0
        while offset < size:
            part = view[: min(_PIECE, size - offset)]
            done = os.preadv(fd, [part], offset)
            digest.update(part[:done])
            part.release()
            offset += done
    os.close(fd)
    return digest.hexdigest()


def _scribble(devices: list[str], seed: int) -> None:
    def scribble(device: str, seed: int) -> None:
        fd, size = _open(device)
        order = list(range(size // BLOCK))
        random.Random(seed).shuffle(order)
        memory = mmap.mmap(-1, BLOCK)
        for index in order * 1000:
            memory[:] = block(seed, index)
            os.pwritev(fd, [memory], index * BLOCK)

    for index, device in enumerate(devices):
        threading.Thread(target=scribble, args=(device, seed + index), daemon=True).start()


def _run(words: list[str], must: bool) -> list:
    done = subprocess.run(words, capture_output=True, text=True, timeout=_PATIENCE)
    output = (done.stdout + done.stderr).strip()
    if must and done.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit status {done.returncode}:\n{output}")
    return [done.returncode, output]


# All at once, which is quick; one by one those that come behind one that is refused.
def _create(tables: dict[str, str]) -> dict[str, str]:
    concise = ";".join(f"{name},,,,{table}" for name, table in tables.items())
    if _run(["dmsetup", "create", "--concise", concise], False)[0] == 0:
        return {}
    refused = {}
    for name, table in tables.items():
        if not Path("/dev/mapper", name).exists():
            _run(["dmesg", "-C"], True)
            if _run(["dmsetup", "create", name, "--table", table], False)[0]:
                refused[name] = _run(["dmesg", "-t"], True)[1]
    return refused


def _raid_status() -> dict[str, str]:
    lines = _run(["dmsetup", "status", "--target", "raid"], True)[1].splitlines()
    return dict(line.split(": ", 1) for line in lines if ": " in line)


def _settle() -> dict[str, str]:
    end = time.monotonic() + _PATIENCE
    while True:
        status = _raid_status()
        if all(text.split()[7] == "idle" for text in status.values()):
            return status
        if time.monotonic() > end:
            raise RuntimeError(f"not idle after {_PATIENCE} s: {status}")
        time.sleep(0.02)


# What `dmsetup message DEVICE 0 TEXT` does, in a hundredth of the time: struct dm_ioctl with a
# struct dm_target_msg behind it.
def _message(control: int, device: str, text: str) -> None:
    start = struct.calcsize("<3I2I2iIIIQ128s129s7x")
    message = struct.pack("<Q", 0) + text.encode() + b"\0"
    head = struct.pack(
        "<3I2I2iIIIQ128s129s7x",
        *(4, 0, 0), start + len(message), start, 0, 0, 0, 0, 0, 0, device.encode(), b"",
    )  # fmt: skip
    target_message = 3 << 30 | start << 16 | 0xFD << 8 | 14
    fcntl.ioctl(control, target_message, bytearray(head + message))


def _scrub(devices: list[str]) -> dict[str, str]:
    control = os.open("/dev/mapper/control", os.O_RDWR)
    for device in devices:
        if Path("/dev/mapper", device).exists():
            _message(control, device, "check")
    os.close(control)
    return _settle()


def _sysfs(devices: list[str], file: str, text: str) -> None:
    for device in devices:
        path = Path(f"/sys/block/{Path(device).name}/md/{file}")
        if path.exists():  # RAID 0 has not all of them
            path.write_text(text)


def _idle(devices: list[str]) -> dict[str, int]:
    found = {}
    end = time.monotonic() + _PATIENCE
    for device in devices:
        md = Path(f"/sys/block/{Path(device).name}/md")
        if not (md / "sync_action").exists():  # RAID 0
            continue
        while (md / "sync_action").read_text().strip() != "idle":
            if time.monotonic() > end:
                raise RuntimeError(f"{device}: not idle after {_PATIENCE} s")
            time.sleep(0.02)
        found[device] = int((md / "mismatch_cnt").read_text())
    return found


# The guest ends at once: nothing is written back, no array is stopped. What guest.py waits for is
# written before.
def _cut(answers: Path, result: list) -> None:
    for name, text in ((answers, json.dumps(result)), ("output", ""), ("dmesg", ""), ("exit", "0")):
        with open(name, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    Path("/proc/sysrq-trigger").write_text("c")
    time.sleep(60)


def main(plan: str, answers: str) -> None:
    """Do what the plan says, in order; on a failure the answers end there and it is told."""
    verbs = {
        "run": lambda *words: _run(list(words), True),
        "try": lambda *words: _run(list(words), False),
        "create": _create,
        "fill": _fill,
        "write": lambda device, offset, seed, length: _write(
            device, offset, content(seed, length)
        ),
        "digest": _digest,
        "scribble": _scribble,
        "settle": _settle,
        "scrub": _scrub,
        "sysfs": _sysfs,
        "idle": _idle,
        "sleep": time.sleep,
        "cut": lambda: _cut(Path(answers), result),
    }
    result = []
    try:
        for verb, *arguments in json.loads(Path(plan).read_text()):
            result.append(verbs[verb](*arguments))
    finally:
        Path(answers).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
