"""The same commands go to the real dmsetup in the guest and to ours: output and exit status agree.

In the guest mapped devices have major number 254 and here 253, and its disks are files here; beside
that every character counts, on standard output and on standard error. What is not compared is what
udev's absence causes there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import needs
from tests.kernel import guest

pytestmark = [pytest.mark.kernel, pytest.mark.nbd]

DISK_SECTORS = 4096

# The words of a command, {0} and {1} for the disks.
COMMANDS: list[list[str]] = [
    words.split("|")
    for words in """
ls
info
info|-c
table
status
deps
ls|--tree
create|z|--table|0 8 zero
create|z|--table|0 8 zero
create|s1|-u|LVM-abc|--table|0 24 striped 2 3 {0} 0 {1} 0
create|s2|-u|LVM-abc|--table|0 8 zero
create|top|-r|--table|0 8 linear /dev/mapper/s1 0\\n8 8 zero\\n16 4 error
ls
ls|--tree
ls|--tree|-o|compact
ls|--tree|-o|inverted
ls|--tree|-o|device,active,open,rw,uuid
ls|-o|devname
ls|--target|striped
info
info|top
info|-c
info|-c|-o|name,uuid
info|-c|--noheadings|-o|name,open
info|-c|--noheadings|--separator|:|-o|name,major,minor,open,segments,events,uuid,attr
info|-u|LVM-abc
info|nosuch
table
table|top
table|--target|linear
table|--concise
table|nosuch
status
status|s1
status|--target|zero
status|nosuch
deps
deps|-o|devname|top
deps|top
deps|nosuch
remove|s1
message|top|0|hello
message|top|99|hello
message|nosuch|0|hello
suspend|z
suspend|z
info|z
resume|z
resume|z
info|z
load|z|--table|0 16 linear {0} 8
info|z
table|--inactive|z
table|z
clear|z
info|z
load|z|--table|0 16 linear {0} 8
resume|z
table|z
deps|z
load|z|--table|0 0 zero
load|nosuch|--table|0 8 zero
rename|z|y
rename|y|top
rename|nosuch|x
rename|y|a/b
rename|y|--setuuid|YY
rename|y|--setuuid|XX
info|y
wait|y|0
create|a/b|--table|0 8 zero
create|bad|--table|0 8 nosuch
create|bad|--table|0 8 linear {0}
create|bad|--table|x 8 zero
create|bad|--table|0 8 zero\\n9 8 zero
create|--concise|c1,,,,0 8 zero;c2,CU,7,ro,0 8 zero,8 8 error
table|--concise
info|c2
wipe_table|c1
table|c1
remove|c1|c2
remove|nosuch
suspend|nosuch
resume|nosuch
rename|y
create
remove
remove_all
ls
""".strip().splitlines()
]


@dataclass(frozen=True)
class Answer:
    """What a command printed and returned."""

    status: int
    output: str
    errors: str


_IN_GUEST = """
import json, subprocess
answers = []
for words in json.load(open("commands")):
    done = subprocess.run(
        ["dmsetup", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    answers.append([done.returncode, done.stdout, done.stderr])
json.dump(answers, open("answers", "w"))
"""


def _words(command: list[str], disks: list[str]) -> list[str]:
    return [word.replace("\\n", "\n").format(*disks) for word in command]


def _in_our_words(text: str, disks: list[Path]) -> str:
    for i, disk in enumerate(disks):
        major, minor = guest.ubd_number(i).split(":")
        text = re.sub(rf"\b{major}(:|, ){minor}\b", str(disk), text)
    return re.sub(r"\b254(?=[:, ] ?[0-9])|\b254(?= +[0-9]+ [LI-])", "253", text)


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> list[tuple[Answer, Answer]]:
    """The kernel's answer to each command in our words, and ours."""
    needs.tool(guest.KERNEL, package="user-mode-linux")
    needs.tool("dmsetup", package="dmsetup")
    needs.nbdkit_plugin("python")
    folder = tmp_path_factory.mktemp("dms")
    disks = [folder / "a", folder / "b"]
    for disk in disks:
        disk.write_bytes(bytes(DISK_SECTORS * 512))
    work = folder / "w"
    work.mkdir()
    nodes = [guest.ubd(i) for i in range(len(disks))]
    (work / "commands").write_text(json.dumps([_words(c, nodes) for c in COMMANDS]))
    (work / "ask.py").write_text(_IN_GUEST)
    result = guest.run(
        "exec /usr/bin/python3 -I ask.py",
        work,
        disks=disks,
        modules=["dm-mod", "dm-unstripe", "dm-zero"],
        seconds=90,
    )
    assert result.status == 0, result.output
    theirs = [
        Answer(status, _in_our_words(output, disks), _in_our_words(errors, disks))
        for status, output, errors in json.loads(result.read("answers"))
    ]
    environment = {**os.environ, "DMPY_RUNTIME_DIR": str(folder / "run"), "LC_ALL": "C"}
    environment.pop("DMPY_STATE_DIR", None)
    paths = [str(disk) for disk in disks]
    ours = []
    try:
        for command in COMMANDS:
            answer = subprocess.run(
                [sys.executable, "-m", "dmpy.cli.dmsetup", *_words(command, paths)],
                env=environment,
                cwd=guest.REPOSITORY,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
            ours.append(Answer(answer.returncode, answer.stdout, answer.stderr))
    finally:
        subprocess.run(
            [sys.executable, "-m", "dmpy.cli.main", "shutdown"],
            env=environment,
            cwd=guest.REPOSITORY,
            capture_output=True,
            timeout=30,
            check=False,
        )
    return list(zip(theirs, ours, strict=True))


@pytest.mark.parametrize(
    "number", range(len(COMMANDS)), ids=[f"{i}-{' '.join(c)}" for i, c in enumerate(COMMANDS)]
)
def test_dmsetup_answers_as_the_real_one(answers, number):
    theirs, ours = answers[number]
    assert ours == theirs
