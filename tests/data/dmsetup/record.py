"""Record transcript.txt: what the real dmsetup says to commands.txt on a real kernel.

    python -m tests.data.dmsetup.record

Boots Debian's user-mode Linux (packages user-mode-linux, dmsetup, kmod), which needs no privileges
and takes under a minute for the five hundred commands.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from tests.kernel import guest

__all__ = ["HERE", "record"]

HERE = Path(__file__).resolve().parent

_SCRIPT = """
export A={0} B={1} C={2} TMP=/tmp
export MAJ=$(sed -n 's/ device-mapper//p' /proc/devices)
/usr/bin/python3 /run/repo/tests/data/dmsetup/play.py /run/w/commands.txt /run/w/transcript.txt \
    "\\\\b$MAJ\\\\b=253" ' <ubd[abc]>=' {3}
"""


def record(folder: Path) -> str:
    """Play commands.txt in the guest and return the transcript.

    Args:
        folder: an empty folder.

    Raises:
        RuntimeError: the guest did not come up, or the player failed in it.
    """
    (folder / "commands.txt").write_text((HERE / "commands.txt").read_text())
    disks, names = [], []
    for index, leg in enumerate("abc"):
        disk = folder / leg
        disk.touch()
        os.truncate(disk, 8 << 20)
        disks.append(disk)
        number = guest.ubd_number(index)
        shown = number.replace(":", ", ")
        names += [f"'\\b{number}\\b=<{leg.upper()}>'", f"'\\({shown}\\)=(<{leg.upper()}>)'"]
    script = _SCRIPT.format(*(guest.ubd(i) for i in range(3)), " ".join(names))
    result = guest.run(script, folder, disks=disks, modules=["dm-mod", "dm-zero"], seconds=240)
    if result.status:
        raise RuntimeError(f"the player failed in the guest:\n{result.output}")
    return result.read("transcript.txt")


def main() -> None:
    """Record, and say how it went."""
    with tempfile.TemporaryDirectory() as folder:
        transcript = record(Path(folder))
    (HERE / "transcript.txt").write_text(transcript)
    print(f"{transcript.count(chr(10) + '$ ')} commands", file=sys.stderr)


if __name__ == "__main__":
    main()
