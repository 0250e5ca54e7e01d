"""The kernel's own device-mapper and ours map the same disk images with the same tables.

One boot answers for all: the tables are loaded there by dmsetup, then a program reads and writes
through the devices. Here the same tables are loaded by a Mapper on the same images (and, for the
writes, on copies), and everything must be the same: bytes, errno, table and status text.

In the guest a leg is a disk, and the kernel prints it as major:minor; here it is a file, and is
printed by its path. So the words of the kernel's text that name a leg are replaced by the path
before texts are compared. Devices that lie on other devices are 254:N there and 253:N here.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

import dmpy
from dmpy.errors import TableError
from tests import needs
from tests.kernel import guest
from tests.kernel.probe import content

pytestmark = pytest.mark.kernel

SECTOR_SIZE = 512
# Odd, so that no chunk, page or track divides a disk; the last is small.
DISK_SECTORS = (6151, 6151, 4099, 1025)


def _many_lines(seed: int, lines: int) -> str:
    # A table of short lines in an order that nothing predicts.
    rng = random.Random(seed)
    text, begin = [], 0
    for _ in range(lines):
        length = rng.randint(1, 40)
        disk = rng.randrange(4)
        start = rng.randint(0, DISK_SECTORS[disk] - length)
        kind = rng.choice(["linear"] * 6 + ["zero"])
        arguments = f" {{{disk}}} {start}" if kind == "linear" else ""
        text.append(f"{begin} {length} {kind}{arguments}")
        begin += length
    return "\n".join(text)


# Name of a device -> its table, {0} .. {3} for the disks. Later ones may lie on earlier ones.
TABLES = {
    "linear-whole-disk": "0 6151 linear {0} 0",
    "linear-from-offset": "0 1001 linear {1} 17",
    "linear-last-sector": "0 1 linear {3} 1024",
    "linear-concatenation": "0 4099 linear {2} 0\n4099 100 linear {0} 5000\n4199 1025 linear {3} 0",
    "linear-same-sectors-twice": "0 64 linear {0} 8\n64 64 linear {0} 8\n128 9 linear {0} 71",
    "many-lines": _many_lines(seed=1, lines=60),
    "striped-1-leg": "0 1025 striped 1 5 {3} 0",
    "striped-2-of-8": "0 12288 striped 2 8 {0} 0 {1} 0",
    "striped-2-of-1": "0 2046 striped 2 1 {1} 1 {2} 2",
    "striped-2-of-3": "0 8184 striped 2 3 {1} 5 {2} 7",
    "striped-3-of-3": "0 3069 striped 3 3 {3} 2 {0} 1000 {2} 0",
    "striped-3-of-7": "0 6132 striped 3 7 {2} 3 {1} 4000 {0} 11",
    "striped-4-of-128": "0 4096 striped 4 128 {0} 0 {1} 1 {2} 2 {3} 1",
    "striped-one-row": "0 6144 striped 3 2048 {0} 0 {1} 100 {2} 2051",
    "striped-4-on-one-disk": "0 2400 striped 4 24 {0} 0 {0} 600 {0} 1200 {0} 1800",
    "unstriped-first-of-2": "0 3072 unstriped 2 8 0 {0} 0",
    "unstriped-last-of-3": "0 1023 unstriped 3 3 2 {1} 2",
    "unstriped-middle-of-3": "0 2044 unstriped 3 7 1 {0} 3",
    "unstriped-only-one": "0 1020 unstriped 1 20 0 {3} 5",
    "zero": "0 2049 zero",
    "error": "0 17 error",
    "every-type": (
        "0 9 linear {0} 100\n9 8 error\n17 5 zero\n22 30 striped 2 5 {1} 3 {2} 4\n"
        "52 9 unstriped 2 3 1 {3} 1\n61 3 error\n64 1 linear {1} 6150"
    ),
    "stacked-linear": "0 2000 linear /dev/mapper/striped-2-of-3 77\n2000 5 zero",
    "stacked-striped": (
        "0 1998 striped 2 3 /dev/mapper/linear-from-offset 1 /dev/mapper/striped-3-of-7 9"
    ),
    "stacked-three-high": "0 500 linear /dev/mapper/stacked-striped 3",
    # Puts a striped device together again from its own legs.
    "stacked-unstriped": "0 6144 unstriped 2 8 1 /dev/mapper/striped-2-of-8 0",
}

# Written whole through dmpy before the kernel sees the disks, each by the content of a seed. They
# share no sector.
WRITTEN_FIRST = {"linear-from-offset": 11, "striped-3-of-3": 12}

# Tables on the four disks that are judged one by one. The kernel refuses some and loads others.
JUDGED = [
    # striped
    "0 24 striped 2 0 {0} 0 {1} 0",
    "0 25 striped 2 3 {0} 0 {1} 0",
    "0 26 striped 2 3 {0} 0 {1} 0",
    "0 24 striped 0 3",
    "0 24 striped 2 3 {0} 0",
    "0 24 striped 2 3 {0} 0 {1}",
    "0 24 striped 2 3 {0} 0 {1} 0 7",
    "0 24 striped 2",
    "0 24 striped",
    "0 24 striped -2 3 {0} 0 {1} 0",
    "0 24 striped 2 -3 {0} 0 {1} 0",
    "0 24 striped 2 4294967296 {0} 0 {1} 0",
    "0 24 striped 4294967298 3 {0} 0 {1} 0",
    "0 24 striped 2 0x3 {0} 0 {1} 0",
    "0 24 striped 2 03 {0} 0 {1} 0",
    "0 24 striped 2 +3 {0} 0 {1} 0",
    "0 24 striped 2 3x {0} 0 {1} 0",
    "0 24 striped 2 3 {0} 0x10 {1} 0",
    "0 24 striped 2 3 {0} -1 {1} 0",
    "0 24 striped 2 3 {0} 6139 {1} 0",
    "0 24 striped 2 3 {0} 6140 {1} 0",
    # linear
    "0 8 linear {0}",
    "0 8 linear {0} 0 0",
    "0 8 linear",
    "0 8 linear {0} 0x10",
    "0 8 linear {0} 010",
    "0 8 linear {0} +1",
    "0 8 linear {0} -1",
    "0 8 linear {0} 1x",
    "0 8 linear {0} abc",
    "0 6152 linear {0} 0",
    "0 6151 linear {0} 1",
    "0 8 linear {0} 36028797018963968",
    "0 8 linear {0} 18446744073709551615",
    # unstriped
    "0 12 unstriped 2 3 2 {0} 0",
    "0 12 unstriped 2 3 3 {0} 0",
    "0 12 unstriped 1 3 7 {0} 0",
    "0 12 unstriped 2 0 1 {0} 0",
    "0 12 unstriped 0 3 0 {0} 0",
    "0 13 unstriped 2 3 1 {0} 0",
    "0 12 unstriped 2 3 1 {0}",
    "0 12 unstriped 2 3 1 {0} 0 0",
    "0 12 unstriped 2 3x 1 {0} 0",
    "0 12 unstriped 2 3 1 {0} 0x",
    "0 12 unstriped 2 +3 1 {0} 7",
    "0 12 unstriped 2 3 1 {0} 6151",
    # zero and error
    "0 8 zero 1",
    "0 8 error 1 2 3",
    # the table as a whole
    "0 8 nosuch",
    "0 8 Linear {0} 0",
    "0 8 lin {0} 0",
    "0 0 zero",
    "8 8 zero",
    "0 8 zero\n9 8 zero",
    "0 8 zero\n7 8 zero",
    "8 8 zero\n0 8 zero",
    "00 08 zero",
    "# comment\n\n0 8 zero\n   # indented\n8 8 error\n",
    "0 8 zero\n8 8",
    "x 8 zero",
    "0 x zero",
    "0 8",
    "0 -8 zero",
    "-8 8 zero",
    "0 18446744073709551615 zero",
    "  0   8   zero  ",
    "0\t8\tzero",
]


@dataclass
class Answers:
    """What the kernel said and did, and what we said and did about the same.

    Attributes:
        disks: our copies of the disks, which got our writes.
        kernel_disks: the disks that the kernel wrote.
        tables, status: kernel's text and ours, per device.
        steps: the plan of reads and writes.
        kernel_answers, our_answers: to each step.
        judged: for each of JUDGED whether the kernel loads it, its table text or its complaint.
    """

    disks: list[Path]
    kernel_disks: list[Path]
    tables: dict[str, tuple[str, str]]
    status: dict[str, tuple[str, str]]
    steps: list[list]
    kernel_answers: list[str]
    our_answers: list[str]
    judged: list[tuple[bool, str]]


def _lines_of(table: str) -> list[tuple[int, int, str]]:
    lines = [line.split() for line in table.splitlines()]
    return [(int(words[0]), int(words[1]), words[2]) for words in lines]


def _plan() -> list[list]:
    # Every byte of every device is read line by line; then pieces anywhere, which may cross from
    # line to line; then writes, and every byte again. Of a write that meets an error line nobody
    # promises what is written (the kernel goes on behind it, we stop): such stay in one line.
    rng = random.Random(2)
    whole, pieces, writes = [], [], []
    for name, table in TABLES.items():
        node = f"/dev/mapper/{name}"
        lines = _lines_of(table)
        for begin, length, _ in lines:
            whole.append(["read", node, begin * SECTOR_SIZE, length * SECTOR_SIZE, 0])
        all_of_it = (0, sum(length for _, length, _ in lines), "")
        has_errors = any(kind == "error" for _, _, kind in lines)
        for steps, verb in ((pieces, "read"), (writes, "write")):
            for _ in range(6):
                stay = has_errors and verb == "write"
                first, available, _ = rng.choice(lines) if stay else all_of_it
                length = min(rng.choice([1, 2, 3, 8, 21, 100, 513]), available)
                begin = first + rng.randint(0, available - length)
                seed = rng.randrange(1 << 30)
                steps.append([verb, node, begin * SECTOR_SIZE, length * SECTOR_SIZE, seed])
    rng.shuffle(writes)
    return whole + pieces + writes + whole


def _ours(device: object, verb: str, offset: int, length: int, seed: int) -> str:
    buffer = bytearray(length)
    try:
        if verb == "write":
            buffer[:] = content(seed, length)
            device.pwritev([memoryview(buffer)], offset)
            return "ok"
        device.preadv([memoryview(buffer)], offset)
    except OSError as error:
        return errno.errorcode[error.errno]
    return hashlib.sha256(buffer).hexdigest()


def _in_our_words(text: str, disks: list[Path]) -> str:
    # The kernel's text with our words for its disks and devices.
    words = {guest.ubd_number(i): str(disk) for i, disk in enumerate(disks)}
    lines = []
    for line in text.splitlines():
        line = " ".join(words.get(word, word.replace("254:", "253:")) for word in line.split())
        lines.append(line)
    return "\n".join(lines)


def _words(text: str) -> list[list[str]]:
    # Blanks at line ends do not count: dmsetup prints one behind a target without arguments.
    return [line.split() for line in text.splitlines()]


def _by_device(text: str, disks: list[Path]) -> dict[str, str]:
    # What `dmsetup table` prints of all devices, apart: "NAME: line".
    result: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, line = line.split(": ", 1)
        result.setdefault(name, []).append(line)
    return {name: _in_our_words("\n".join(lines), disks) for name, lines in result.items()}


_SCRIPT = """
set -e
dmsetup create --concise "$(cat concise)"
dmsetup table >table
dmsetup status >status
/usr/bin/python3 -I probe.py plan answers
dmsetup remove_all
set +e
for t in judged/*; do
    dmesg -C
    if dmsetup create judged <$t >/dev/null 2>$t.no; then
        dmsetup table judged >$t.yes
        dmsetup remove judged
    else
        dmesg -t >>$t.no
    fi
done
"""


def _ask_the_kernel(folder: Path, disks: list[Path], steps: list[list]) -> guest.Result:
    nodes = [guest.ubd(i) for i in range(len(disks))]
    # The form for many devices at once: a comma for a newline, and for blanks a plain blank.
    concise = ";".join(
        f"{name},,,,{table.format(*nodes)}".replace("\n", ",") for name, table in TABLES.items()
    )
    (folder / "concise").write_text(concise)
    (folder / "plan").write_text(json.dumps(steps))
    shutil.copy(Path(__file__).with_name("probe.py"), folder)
    (folder / "judged").mkdir()
    for i, table in enumerate(JUDGED):
        (folder / "judged" / f"{i:03}").write_text(table.format(*nodes))
    return guest.run(
        _SCRIPT, folder, disks=disks, modules=["dm-mod", "dm-unstripe", "dm-zero"], seconds=120
    )


def _judgements(folder: Path) -> list[tuple[bool, str]]:
    result = []
    for i in range(len(JUDGED)):
        accepted = folder / "judged" / f"{i:03}.yes"
        refused = folder / "judged" / f"{i:03}.no"
        result.append(
            (True, accepted.read_text()) if accepted.exists() else (False, refused.read_text())
        )
    return result


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> Answers:
    """Boot once, ask everything, and do the same with dmpy."""
    needs.tool(guest.KERNEL, package="user-mode-linux")
    needs.tool("dmsetup", package="dmsetup")
    folder = tmp_path_factory.mktemp("dm")
    kernel_disks, disks = [], []
    for i, sectors in enumerate(DISK_SECTORS):
        kernel_disks.append(folder / f"kernel{i}.img")
        disks.append(folder / f"ours{i}.img")
        kernel_disks[i].write_bytes(content(i, sectors * SECTOR_SIZE))
    with dmpy.Mapper() as mapper:
        for name, seed in WRITTEN_FIRST.items():
            device = mapper.create(name, TABLES[name].format(*kernel_disks))
            device.pwritev([memoryview(content(seed, device.size))], 0)
    for theirs, ours in zip(kernel_disks, disks, strict=True):
        shutil.copy(theirs, ours)
    steps = _plan()
    tables, status, our_answers = {}, {}, []
    with dmpy.Mapper() as mapper:
        for name, table in TABLES.items():
            device = mapper.create(name, table.format(*disks))
            tables[name] = device.table_text()
            status[name] = device.status_text()
        for verb, node, *rest in steps:
            our_answers.append(_ours(mapper.device(Path(node).name), verb, *rest))

    work = folder / "w"
    work.mkdir()
    result = _ask_the_kernel(work, kernel_disks, steps)
    assert result.status == 0, result.output + result.dmesg
    kernel_tables = _by_device(result.read("table"), disks)
    kernel_status = _by_device(result.read("status"), disks)
    return Answers(
        disks=disks,
        kernel_disks=kernel_disks,
        tables={name: (kernel_tables[name], text) for name, text in tables.items()},
        status={name: (kernel_status[name], text) for name, text in status.items()},
        steps=steps,
        kernel_answers=json.loads(result.read("answers")),
        our_answers=our_answers,
        judged=_judgements(work),
    )


def _differences(answers: Answers, verb: str) -> list[str]:
    return [
        f"{step}: kernel {theirs}, dmpy {ours}"
        for step, theirs, ours in zip(
            answers.steps, answers.kernel_answers, answers.our_answers, strict=True
        )
        if step[0] == verb and theirs != ours
    ]


def test_every_byte_reads_as_through_the_kernel(answers):
    assert _differences(answers, "read") == []


def test_writes_end_as_through_the_kernel(answers):
    assert _differences(answers, "write") == []


def test_the_same_writes_leave_the_same_disks(answers):
    for theirs, ours in zip(answers.kernel_disks, answers.disks, strict=True):
        assert theirs.read_bytes() == ours.read_bytes(), f"{theirs.name} and {ours.name} differ"


@pytest.mark.parametrize("name", WRITTEN_FIRST)
def test_what_dmpy_wrote_reads_back_through_the_kernel(answers, name):
    ((begin, length, _),) = _lines_of(TABLES[name])
    assert begin == 0
    step = ["read", f"/dev/mapper/{name}", 0, length * SECTOR_SIZE, 0]
    written = content(WRITTEN_FIRST[name], length * SECTOR_SIZE)
    first_read = answers.kernel_answers[answers.steps.index(step)]
    assert first_read == hashlib.sha256(written).hexdigest()


def test_what_the_kernel_wrote_reads_back_through_dmpy(answers):
    # After the guest is gone, from the disks as it left them: its last reads of every line.
    last = {tuple(step[1:4]): i for i, step in enumerate(answers.steps)}
    with dmpy.Mapper() as mapper:
        for name, table in TABLES.items():
            mapper.create(name, table.format(*answers.kernel_disks))
        for name, table in TABLES.items():
            for begin, length, _ in _lines_of(table):
                step = (f"/dev/mapper/{name}", begin * SECTOR_SIZE, length * SECTOR_SIZE)
                ours = _ours(mapper.device(name), "read", *step[1:], 0)
                assert ours == answers.kernel_answers[last[step]], step


@pytest.mark.parametrize("name", TABLES)
def test_table_text_is_the_kernels(answers, name):
    kernel, ours = answers.tables[name]
    assert _words(ours) == _words(kernel)


@pytest.mark.parametrize("name", TABLES)
def test_status_text_is_the_kernels(answers, name):
    kernel, ours = answers.status[name]
    assert _words(ours) == _words(kernel)


def _our_judgement(table: str, disks: list[Path]) -> tuple[bool, str]:
    with dmpy.Mapper() as mapper:
        try:
            device = mapper.create("judged", table.format(*disks))
        except TableError as error:
            return False, str(error)
        except OSError as error:
            return False, os.strerror(error.errno)
        return True, device.table_text()


@pytest.mark.parametrize("number", range(len(JUDGED)), ids=JUDGED)
def test_what_the_kernel_refuses_is_refused_and_what_it_loads_is_loaded(answers, number):
    kernel_loads, kernel_text = answers.judged[number]
    loads, text = _our_judgement(JUDGED[number], answers.disks)
    assert loads == kernel_loads, f"kernel: {kernel_text}\ndmpy: {text}"
    if loads:
        assert _words(text) == _words(_in_our_words(kernel_text, answers.disks))
