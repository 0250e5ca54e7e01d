"""Mirrors of the kernel's dm-mirror and ours on the same disks, in both directions.

The kernel makes mirrors: one comes to an orderly end, of one the images are taken in the middle of
a write, as a crash leaves them. dmpy opens those, writes and closes them, makes one of its own, and
leaves one as a crash would; then the kernel opens all of them again. What each says of them, and of
legs that fail, must be the same but for the names of the devices.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

import dmpy
from dmpy.errors import TableError
from tests import needs
from tests.kernel import guest
from tests.kernel.probe import content

pytestmark = pytest.mark.kernel

SECTOR = 512
SECTORS = 1000  # of a mirror: 15 regions of 64 sectors and a short one
REGION = 64
LOG_SECTORS = 8
MODULES = ["dm-mod", "dm-mirror", "dm-region-hash", "dm-log"]

# Tables that are judged on four disks, the last one small: the kernel loads some of them.
JUDGED = [
    "0 1000 mirror core 1 64 2 {0} 0 {1} 0",
    "0 1000 mirror core 2 64 sync 2 {0} 0 {1} 0",
    "0 1000 mirror core 2 64 nosync 2 {0} 0 {1} 0",
    "0 1000 mirror core 2 64 maybe 2 {0} 0 {1} 0",
    "0 1000 mirror core 1 2 2 {0} 0 {1} 0",
    "0 1000 mirror core 1 1 2 {0} 0 {1} 0",
    "0 1000 mirror core 1 0 2 {0} 0 {1} 0",
    "0 1000 mirror core 1 512 2 {0} 0 {1} 0",
    "0 1000 mirror core 1 1024 2 {0} 0 {1} 0",
    "0 1000 mirror core 1 96 2 {0} 0 {1} 0",
    "0 1000 mirror core 1 064 2 {0} 0 {1} 0",
    "0 1000 mirror core 1 +64 2 {0} 0 {1} 0",
    "0 1000 mirror core 1 64x 2 {0} 0 {1} 0",
    "0 1000 mirror core 0 2 {0} 0 {1} 0",
    "0 1000 mirror core 3 64 sync 2 {0} 0 {1} 0",
    "0 1000 mirror core 9 64 2 {0} 0 {1} 0",
    "0 1000 mirror core",
    "0 1000 mirror core 1 64",
    "0 1000 mirror",
    "0 1000 mirror nosuch 1 64 2 {0} 0 {1} 0",
    "0 1000 mirror disk 2 {3} 64 2 {0} 0 {1} 0",
    "0 1000 mirror disk 3 {3} 64 nosync 2 {0} 0 {1} 0",
    "0 1000 mirror disk 1 {3} 2 {0} 0 {1} 0",
    "0 1000 mirror disk 4 {3} 64 sync sync 2 {0} 0 {1} 0",
    "0 1000 mirror core 1 64 1 {0} 0",
    "0 1000 mirror core 1 64 0",
    "0 8 mirror core 1 8 9 {0} 0 {0} 8 {0} 16 {0} 24 {0} 32 {1} 0 {1} 8 {1} 16 {1} 24",
    "0 8 mirror core 1 8 10 {0} 0 {0} 8 {0} 16 {0} 24 {0} 32 {1} 0 {1} 8 {1} 16 {1} 24 {1} 32",
    "0 1000 mirror core 1 64 2 {0} 0 {1}",
    "0 1000 mirror core 1 64 2 {0} 0",
    "0 1000 mirror core 1 64 2 {0} 1000 {1} 1000",
    "0 1000 mirror core 1 64 2 {0} 1001 {1} 0",
    "0 1000 mirror core 1 64 2 {0} 0 {1} 0 0",
    "0 1000 mirror core 1 64 2 {0} 0 {1} 0 1",
    "0 1000 mirror core 1 64 2 {0} 0 {1} 0 1 handle_errors",
    "0 1000 mirror core 1 64 2 {0} 0 {1} 0 1 keep_log",
    "0 1000 mirror core 1 64 2 {0} 0 {1} 0 2 keep_log handle_errors",
    "0 1000 mirror core 1 64 2 {0} 0 {1} 0 2 handle_errors handle_errors",
    "0 1000 mirror core 1 64 2 {0} 0 {1} 0 1 nosuch",
    "0 1000 mirror core 1 64 2 {0} 0 {1} 0 1 handle_errors 7",
    "0 1000 mirror core 1 64 2 {0} 0 {0} 0",
]

# What happens to mirrors of three legs, nosync, the same in the guest and here. Words: break N and
# mend N (a leg gives errors, or not), read and write (a sector), say (status and event number).
STORIES = {
    "plain": (
        "",
        "say; break 0; read 5; say; mend 0; write 5; say; break 2; write 70; say; read 70; say",
    ),
    "keep": (
        "2 handle_errors keep_log",
        "say; break 0; read 5; say; write 5; say; read 5; say; break 1; write 300; say; read 300;"
        "say; break 2; write 400; say; read 500; say",
    ),
    "handle": ("1 handle_errors", "say; break 1; read 5; say; break 0; read 70; say; read 70; say"),
}

_FUNCTIONS = """
legs() { echo "0 1000 linear $1 $2"; }
try() { "$@" >/dev/null 2>&1 && echo ok || echo failed; }
put() { try dd if=/run/w/one of=/dev/mapper/$1 bs=512 seek=$2 count=1 oflag=direct conv=notrunc; }
get() { try dd if=/dev/mapper/$1 of=/dev/null bs=512 skip=$2 count=1 iflag=direct; }
swap() { dmsetup suspend --noflush $1; dmsetup load $1 --table "$2"; dmsetup resume $1; }
say() { sleep 0.1; echo "$(dmsetup status $1) $(dmsetup info -c --noheadings -o events $1)"; }
in_sync() {
    for turn in $(seq 100); do
        dmsetup status $1 | grep -q ' \\([0-9]*\\)/\\1 ' && return
        sleep 0.1
    done
    echo "$1 does not come into sync"
}
"""

# Disks of the first boot: 0, 1 the legs of the clean mirror and 2 its log; 3, 4, 5 of the one that
# crashes; 6, 7 for stories and tables.
_FIRST = (
    _FUNCTIONS
    + """
clean="0 1000 mirror disk 2 /dev/ubdc 64 2 /dev/ubda 0 /dev/ubdb 24"
dmsetup create clean --table "$clean"
in_sync clean
dd if=/run/w/data of=/dev/mapper/clean bs=128000 oflag=direct conv=notrunc 2>/dev/null
sleep 0.3
dmsetup table clean >clean.table
dmsetup status clean >clean.status
dmsetup remove clean

dmsetup create slow --table "0 1000 linear /dev/ubde 0"
dmsetup create crash --table "0 1000 mirror disk 2 /dev/ubdf 64 2 /dev/ubdd 0 /dev/mapper/slow 0"
in_sync crash
dd if=/run/w/data of=/dev/mapper/crash bs=128000 oflag=direct conv=notrunc 2>/dev/null
sleep 0.3
dmsetup suspend slow
for at in 70 300 995; do
    dd if=/run/w/one of=/dev/mapper/crash bs=512 seek=$at count=1 oflag=direct conv=notrunc \\
        2>/dev/null &
done
sleep 0.5
dd if=/dev/ubdd of=crash0 bs=512 iflag=direct 2>/dev/null
dd if=/dev/ubde of=crash1 bs=512 iflag=direct 2>/dev/null
dd if=/dev/ubdf of=crashlog bs=512 iflag=direct 2>/dev/null
dmsetup resume slow
wait
dmsetup remove crash
dmsetup remove slow

for t in judged/*; do
    if dmsetup create judged <$t >/dev/null 2>$t.no; then
        dmsetup table judged >$t.yes
        dmsetup remove judged
    fi
done
. ./stories
"""
)

_SECOND = (
    _FUNCTIONS
    + """
i=0
for name in clean crash new left; do
    read -r a b log <<END
$(sed -n "$((i + 1))p" disks)
END
    i=$((i + 1))
    dmsetup create $name --table "0 1000 mirror disk 2 $log 64 2 $a 0 $b 24"
    dmsetup status $name >$name.status
    in_sync $name
    sha256sum </dev/mapper/$name >$name.sum
    put $name 999
    dmsetup remove $name
done
"""
)


def _story_script() -> str:
    # The stories as the guest's shell has them; say prints, everything else prints how it went.
    lines = []
    for name, (features, story) in STORIES.items():
        for leg in range(3):
            lines.append(f"dmsetup create leg{leg} --table '0 1000 linear /dev/ubdg {leg * 1000}'")
        legs = " ".join(f"/dev/mapper/leg{leg} 0" for leg in range(3))
        lines.append(
            f"dmsetup create {name} --table '0 1000 mirror core 2 64 nosync 3 {legs} {features}'"
        )
        lines.append(f"{{ dmsetup table {name}")
        for step in story.split(";"):
            verb, *place = step.split()
            if verb == "break":
                lines.append(f"swap leg{place[0]} '0 1000 error'")
            elif verb == "mend":
                lines.append(f"swap leg{place[0]} '0 1000 linear /dev/ubdg {int(place[0]) * 1000}'")
            elif verb == "say":
                lines.append(f"say {name}")
            else:
                lines.append(f"{'get' if verb == 'read' else 'put'} {name} {place[0]}")
        lines.append(f"}} >{name}.story")
        lines.append(f"dmsetup remove {name}; for n in 0 1 2; do dmsetup remove leg$n; done")
    return "\n".join(lines)


def _tell(dm: dmpy.Mapper, name: str, disk: Path) -> list[str]:
    # The same story here.
    features, story = STORIES[name]
    places = [f"0 1000 linear {disk} {leg * 1000}" for leg in range(3)]
    for leg in range(3):
        dm.create(f"leg{leg}", places[leg])
    legs = " ".join(f"/dev/mapper/leg{leg} 0" for leg in range(3))
    device = dm.create(name, f"0 1000 mirror core 2 64 nosync 3 {legs} {features}")
    said = [device.table_text()]
    for step in story.split(";"):
        verb, *place = step.split()
        if verb == "say":
            said.append(f"{device.status_text()} {device.event_nr}")
        elif verb in ("break", "mend"):
            leg = int(place[0])
            dm.suspend(f"leg{leg}", noflush=True)
            dm.load(f"leg{leg}", "0 1000 error" if verb == "break" else places[leg])
            dm.resume(f"leg{leg}")
        else:
            said.append(_try(device, verb, int(place[0])))
    dm.remove(name)
    for leg in range(3):
        dm.remove(f"leg{leg}")
    return said


def _try(device, verb: str, sector: int) -> str:
    data = memoryview(bytearray(b"1" * SECTOR))
    try:
        if verb == "read":
            device.preadv([data], sector * SECTOR)
        else:
            device.pwritev([data], sector * SECTOR)
    except OSError:
        return "failed"
    return "ok"


def _in_sync(device) -> None:
    deadline = time.monotonic() + 20
    target = device.live.lines[0].target
    while target.log.sync_count < target.log.count:
        assert time.monotonic() < deadline, device.status_text()
        time.sleep(0.005)


@dataclass
class Answers:
    """What came of it.

    Attributes:
        first, second: folders of the two boots.
        data: what the kernel wrote to all mirrors.
        marked: regions marked in the log that the crash left.
        ours: what dmpy said, by what about.
        disks: legs and log that dmpy has had, by mirror.
        bytes: what dmpy read, by mirror, before the second boot.
    """

    first: Path
    second: Path
    data: bytes
    marked: set[int]
    ours: dict[str, object]
    disks: dict[str, list[Path]]
    bytes: dict[str, bytes]


def _blank(folder: Path, names: list[str]) -> list[Path]:
    # Disks with other content each, so that what is equal has been made so.
    paths = []
    for n, name in enumerate(names):
        paths.append(folder / name)
        paths[n].write_bytes(content(n, (SECTORS + 24) * SECTOR))
    return paths


def _log(path: Path) -> Path:
    path.write_bytes(content(99, LOG_SECTORS * SECTOR))
    return path


def _marked(log: Path) -> set[int]:
    # Regions that are not clean, by the kernel's layout; no code of dmpy used.
    raw = log.read_bytes()
    assert raw[:8] == b"rRiM\2\0\0\0"
    count = int.from_bytes(raw[8:16], "little")
    return {n for n in range(count) if not raw[1024 + n // 8] >> n % 8 & 1}


def _first_boot(folder: Path) -> bytes:
    folder.mkdir()
    data = content(7, SECTORS * SECTOR)
    (folder / "data").write_bytes(data)
    (folder / "one").write_bytes(b"1" * SECTOR)
    (folder / "stories").write_text(_story_script())
    (folder / "judged").mkdir()
    disks = _blank(folder, ["clean0", "clean1"]) + [_log(folder / "cleanlog")]
    disks += _blank(folder, ["c0", "c1"]) + [_log(folder / "clog")]
    disks.append(folder / "legs")
    disks[-1].write_bytes(content(11, 3000 * SECTOR))
    disks += _blank(folder, ["j0", "j1"])
    disks[-2].write_bytes(content(12, 2000 * SECTOR))
    disks[-1].write_bytes(content(13, 2000 * SECTOR))
    nodes = [guest.ubd(7), guest.ubd(8), guest.ubd(6), guest.ubd(5)]
    for i, table in enumerate(JUDGED):
        (folder / "judged" / f"{i:03}").write_text(table.format(*nodes))
    result = guest.run(_FIRST, folder, disks=disks, modules=MODULES, seconds=120)
    assert result.status == 0, result.output
    assert "does not come into sync" not in result.output
    return data


def _open(dm: dmpy.Mapper, name: str, disks: list[Path]):
    a, b, log = disks
    return dm.create(name, f"0 1000 mirror disk 2 {log} 64 2 {a} 0 {b} 24")


def _read(device) -> bytes:
    data = bytearray(device.size)
    device.preadv([memoryview(data)], 0)
    return bytes(data)


def _use(dm: dmpy.Mapper, answers: Answers) -> None:
    # What dmpy does to mirrors between the boots.
    disks, ours = answers.disks, answers.ours
    clean = _open(dm, "clean", disks["clean"])
    ours["clean"] = clean.table_text(), clean.status_text()
    answers.bytes["clean"] = _read(clean)
    clean.pwritev([memoryview(b"2" * 40 * SECTOR)], 100 * SECTOR)
    crash = _open(dm, "crash", disks["crash"])
    _in_sync(crash)
    answers.bytes["crash"] = _read(crash)
    crash.pwritev([memoryview(b"3" * SECTOR)], 0)
    new = _open(dm, "new", disks["new"])
    _in_sync(new)
    new.pwritev([memoryview(b"4" * SECTOR)], 500 * SECTOR)
    left = _open(dm, "leaves", disks["source"])
    _in_sync(left)
    dm.suspend("leaves")
    dm.resume("leaves")
    left.pwritev([memoryview(b"5" * 3 * SECTOR)], 190 * SECTOR)
    # As a crash: what is there now, and one leg did not get it.
    for path, copy in zip(disks["source"], disks["left"], strict=True):
        shutil.copy(path, copy)
    ours["left marked"] = _marked(disks["left"][2])
    with disks["left"][1].open("r+b") as leg:
        leg.seek((24 + 190) * SECTOR)
        leg.write(b"9" * 2 * SECTOR)
    answers.bytes["left"] = _read(left)


def _judge(dm: dmpy.Mapper, folder: Path) -> list[tuple[bool, str]]:
    disks = _blank(folder, ["j0", "j1", "j2"])
    for disk in disks[:2]:
        disk.write_bytes(bytes(2000 * SECTOR))
    disks.append(_log(folder / "j3"))
    verdicts = []
    for table in JUDGED:
        try:
            verdicts.append((True, dm.create("judged", table.format(*disks)).table_text()))
            dm.remove("judged")
        except (TableError, OSError) as error:
            verdicts.append((False, str(error)))
            if "judged" in [device.name for device in dm.devices()]:
                dm.remove("judged")
    return verdicts


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> Answers:
    """Boot, use what was made, boot again."""
    needs.tool(guest.KERNEL, package="user-mode-linux")
    needs.tool("dmsetup", package="dmsetup")
    folder = tmp_path_factory.mktemp("mirror")
    first, second = folder / "first", folder / "second"
    data = _first_boot(first)
    second.mkdir()
    disks = {"clean": [first / "clean0", first / "clean1", first / "cleanlog"]}
    disks["crash"] = _blank(folder, ["crash0", "crash1"]) + [first / "crashlog"]
    shutil.copy(first / "crash0", disks["crash"][0])
    raw = (first / "crash1").read_bytes()
    disks["crash"][1].write_bytes(bytes(24 * SECTOR) + raw[: SECTORS * SECTOR])
    for name in ("new", "source", "left"):
        disks[name] = _blank(folder, [f"{name}0", f"{name}1"]) + [_log(folder / f"{name}log")]
    answers = Answers(first, second, data, _marked(first / "crashlog"), {}, disks, {})
    (folder / "story.img").write_bytes(content(11, 3000 * SECTOR))
    with dmpy.Mapper() as dm:
        _use(dm, answers)
        answers.bytes["new"] = _read(dm.device("new"))
        answers.bytes["clean"] = _read(dm.device("clean"))
        answers.bytes["crash"] = _read(dm.device("crash"))
    with dmpy.Mapper() as dm:
        for name in STORIES:
            answers.ours[name] = _tell(dm, name, folder / "story.img")
        answers.ours["judged"] = _judge(dm, folder)
    names = ["clean", "crash", "new", "left"]
    (second / "one").write_bytes(b"1" * SECTOR)
    (second / "disks").write_text(
        "".join(" ".join(guest.ubd(3 * n + i) for i in range(3)) + "\n" for n in range(4))
    )
    ordered = [path for name in names for path in disks[name]]
    result = guest.run(_SECOND, second, disks=ordered, modules=MODULES, seconds=60)
    assert result.status == 0 and "does not" not in result.output, result.output
    return answers


def _translated(text: str, words: dict[str, str]) -> str:
    return " ".join(words.get(word, word.replace("254:", "253:")) for word in text.split())


def test_table_and_status_are_the_kernels(answers):
    words = {guest.ubd_number(i): str(disk) for i, disk in enumerate(answers.disks["clean"])}
    table, status = answers.ours["clean"]
    assert _translated((answers.first / "clean.table").read_text(), words) == table
    assert _translated((answers.first / "clean.status").read_text(), words) == status
    assert " 16/16 1 AA 3 disk " in status


@pytest.mark.parametrize("name", STORIES)
def test_legs_that_fail_are_told_of_as_by_the_kernel(answers, name):
    theirs = (answers.first / f"{name}.story").read_text().splitlines()
    assert [_translated(line, {}) for line in theirs] == answers.ours[name]


def test_the_kernel_and_dmpy_accept_the_same_tables(answers):
    wrong = []
    for n, (table, (accepted, text)) in enumerate(zip(JUDGED, answers.ours["judged"])):
        theirs = answers.first / "judged" / f"{n:03}.yes"
        if theirs.exists() != accepted:
            wrong.append(f"{table}: kernel {theirs.exists()}, dmpy {accepted}: {text}")
        elif accepted and len(theirs.read_text().split()) != len(text.split()):
            wrong.append(f"{table}: kernel {theirs.read_text()}, dmpy {text}")
    assert not wrong, "\n".join(wrong)


def test_a_crash_of_the_kernel_leaves_marks_and_dmpy_copies(answers):
    """The legs differ where a write was under way; the first leg has it."""
    assert answers.marked == {70 // REGION, 300 // REGION, 995 // REGION}
    raw = [(answers.first / f"crash{n}").read_bytes() for n in range(2)]
    assert raw[0][70 * SECTOR : 71 * SECTOR] == b"1" * SECTOR
    assert raw[1][70 * SECTOR : 71 * SECTOR] == answers.data[70 * SECTOR : 71 * SECTOR]
    expected = bytearray(answers.data)
    expected[:SECTOR] = b"3" * SECTOR
    for sector in (70, 300, 995):
        expected[sector * SECTOR : (sector + 1) * SECTOR] = b"1" * SECTOR
    assert answers.bytes["crash"] == expected


def test_dmpy_reads_and_writes_what_the_kernel_left(answers):
    expected = bytearray(answers.data)
    expected[100 * SECTOR : 140 * SECTOR] = b"2" * 40 * SECTOR
    assert answers.bytes["clean"] == expected


@pytest.mark.parametrize("name", ["clean", "crash", "new"])
def test_the_kernel_finds_what_dmpy_has_closed_in_sync(answers, name):
    assert " 16/16 1 AA " in (answers.second / f"{name}.status").read_text()


def test_the_kernel_copies_what_a_crash_of_dmpy_left(answers):
    assert answers.ours["left marked"] == {190 // REGION, 192 // REGION}
    a, b = (path.read_bytes() for path in answers.disks["left"][:2])
    assert a[190 * SECTOR : 193 * SECTOR] == b"5" * 3 * SECTOR
    assert b[(24 + 190) * SECTOR : (24 + 193) * SECTOR] == b"5" * 3 * SECTOR


@pytest.mark.parametrize("name", ["clean", "crash", "new", "left"])
def test_the_kernel_reads_what_dmpy_wrote_and_leaves_legs_equal(answers, name):
    expected = hashlib.sha256(answers.bytes[name]).hexdigest()
    assert (answers.second / f"{name}.sum").read_text().split()[0] == expected
    a, b, log = (path.read_bytes() for path in answers.disks[name])
    assert a[: SECTORS * SECTOR] == b[24 * SECTOR : (24 + SECTORS) * SECTOR]
    assert a[999 * SECTOR : 1000 * SECTOR] == b"1" * SECTOR
    assert not _marked(answers.disks[name][2])
