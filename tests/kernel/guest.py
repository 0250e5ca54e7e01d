"""Runs a shell script under the distribution's own Linux kernel, as a process, without privileges.

The kernel is user-mode Linux (package user-mode-linux). The host's root folder is the guest's
read-only root, so every tool that is installed here runs there; one folder of the host is writable
in the guest at /run/w and brings results back; this project is at /run/repo, wherever it is here.
Images given as disks are /dev/ubda, /dev/ubdb and so on.

A boot takes about a second, so tests that need it gather their questions into few scripts.

The guest's disk driver never passes a FLUSH on to the host's file: nothing about durability can be
judged here. A guest ends with sync and an orderly power-off, after which the files are complete.
"""

from __future__ import annotations

import os
import shutil
import signal
import string
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["KERNEL", "REPOSITORY", "Result", "run", "ubd", "ubd_number"]

KERNEL = "linux.uml"
REPOSITORY = Path(__file__).resolve().parents[2]
_MODULES = Path("/usr/lib/uml/modules")
_UBD_MAJOR = 98
_UBD_MINORS = 16  # minors of one ubd disk: itself and 15 partitions

# The first process of the guest. The script runs with dmsetup kept from waiting for udev, which
# does not run here. `seconds` bounds it inside the guest, so that even a script that hangs leaves
# its output; the host's own limit is for a guest that does not come up.
_INIT = """#!/bin/sh
export PATH=/usr/bin:/bin:/usr/sbin:/sbin LC_ALL=C HOME=/run DM_DISABLE_UDEV=1
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mountpoint -q /dev || mount -t devtmpfs dev /dev
mkdir -p /dev/pts
for d in /run /mnt /tmp /var/tmp; do mount -t tmpfs tmpfs $d; done
mkdir -p /run/w /run/repo /run/m/lib/modules/$(uname -r)
# Linux 6.12 wants the host's folder by name, 6.1 bare.
host() {{
    mount -t hostfs $3 -o hostfs=$1 none $2 2>/dev/null || mount -t hostfs $3 -o $1 none $2
}}
host {folder} /run/w
host {repo} /run/repo -r
host {modules}/$(uname -r) /run/m/lib/modules/$(uname -r)
! command -v ip >/dev/null || ip link set lo up
for m in {names}; do modprobe -d /run/m $m || echo "module $m: not loaded" >&2; done
cd /run/w
dmesg -C
timeout -k 2 {seconds} sh /run/w/script >/run/w/output 2>&1 </dev/null
echo $? >/run/w/exit
dmesg >/run/w/dmesg
sync -f /run/w
timeout -k 1 10 sync
echo o >/proc/sysrq-trigger
sleep 60
"""


@dataclass(frozen=True)
class Result:
    """What a script in the guest left behind.

    Attributes:
        status: its exit status; 124 when it ran out of time.
        output: what it wrote to standard output and standard error, in order.
        dmesg: the kernel's log since the script began.
        folder: the folder that was writable in the guest.
        seconds: from start to power-off.
    """

    status: int
    output: str
    dmesg: str
    folder: Path
    seconds: float

    def read(self, name: str) -> str:
        """Return the text of a file that the script wrote into /run/w."""
        return (self.folder / name).read_text()


def ubd(index: int) -> str:
    """Return the guest's path of disk `index`."""
    return f"/dev/ubd{string.ascii_lowercase[index]}"


def ubd_number(index: int) -> str:
    """Return the guest's `major:minor` of disk `index`, as dmsetup prints it."""
    return f"{_UBD_MAJOR}:{index * _UBD_MINORS}"


def run(
    script: str,
    folder: Path,
    *,
    disks: Sequence[Path] = (),
    modules: Sequence[str] = (),
    memory: str = "256M",
    seconds: int = 60,
) -> Result:
    """Boot, run `script` by sh in /run/w, power off, and return what came of it.

    Args:
        script: shell text; its working folder is `folder`, writable, as /run/w.
        folder: an empty or filled folder of the host.
        disks: raw images; the guest's disks in this order.
        modules: kernel modules to load first, in this order.
        memory: the guest's memory.
        seconds: how long the script may take.

    Raises:
        RuntimeError: the guest did not come up or did not power off; with its console.
    """
    folder = folder.resolve()
    (folder / "script").write_text(script)
    for name in ("exit", "output", "dmesg"):
        (folder / name).unlink(missing_ok=True)
    init = folder / "init"
    init.write_text(
        _INIT.format(
            folder=folder,
            repo=REPOSITORY,
            modules=_MODULES,
            names=" ".join(modules),
            seconds=seconds,
        )
    )
    init.chmod(0o755)
    command = [
        shutil.which(KERNEL) or KERNEL,
        f"mem={memory}",
        "root=/dev/root",
        "rootfstype=hostfs",
        "rootflags=/",
        "ro",
        f"init={init}",
        "con=null",
        "con0=null,fd:1",
        "quiet",
        f"uml_dir={folder}/uml",
        *(f"ubd{i}={Path(disk).resolve()}" for i, disk in enumerate(disks)),
    ]
    started = time.monotonic()
    console, ended = _boot(command, folder / "console", seconds + 30)
    took = time.monotonic() - started
    if not ended or not (folder / "exit").exists():
        raise RuntimeError(f"guest: did not power off in order after {took:.0f} s:\n{console}")
    return Result(
        status=int((folder / "exit").read_text()),
        output=(folder / "output").read_text(),
        dmesg=(folder / "dmesg").read_text(),
        folder=folder,
        seconds=took,
    )


def _boot(command: list[str], console: Path, seconds: float) -> tuple[str, bool]:
    # Runs the kernel to its end, in a session of its own so that none of its processes outlives
    # the limit. Returns its console and whether it ended by itself.
    with console.open("wb") as output:
        guest = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        guest.wait(seconds)
        ended = True
    except subprocess.TimeoutExpired:
        ended = False
    finally:
        try:
            os.killpg(guest.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # the usual case: the guest is gone
        guest.wait()
    return console.read_text(errors="replace"), ended
