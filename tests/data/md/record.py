"""Record golden.json: metadata that the real mdadm and the real kernel wrote, and what they say.

    python -m tests.data.md.record

Boots Debian's user-mode Linux (packages user-mode-linux, mdadm, dmsetup, kmod), which needs no
privileges, runs make.sh in it, and keeps what is near the ends of the disks.
"""

from __future__ import annotations

import base64
import json
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from tests.kernel import guest

__all__ = ["HERE", "Golden", "golden", "record"]

HERE = Path(__file__).resolve().parent
_SECTORS = 33000
_MODULES = ["md-mod", "raid0", "raid1", "raid10", "raid456", "dm-mod", "dm-raid", "dm-mirror"]


@dataclass
class Golden:
    """One disk: its metadata where it lay, all else zero.

    Attributes:
        name: as make.sh calls it.
        sectors: its size.
        blocks: byte -> 4096 bytes at most.
        text: what the tools printed of it: "examine", "export", "bitmap" and so on.
    """

    name: str
    sectors: int
    blocks: dict[int, bytes]
    text: dict[str, str]

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from byte `offset` on."""
        result = bytearray(length)
        for place, block in self.blocks.items():
            begin, end = max(offset, place), min(offset + length, place + len(block))
            if begin < end:
                result[begin - offset : end - offset] = block[begin - place : end - place]
        return bytes(result)

    def write(self, path: Path) -> Path:
        """Make a sparse file of it, for tools."""
        with path.open("wb") as file:
            file.truncate(self.sectors * 512)
            for place, block in self.blocks.items():
                file.seek(place)
                file.write(block)
        return path


def golden() -> dict[str, Golden]:
    """Return all that was recorded, by name."""
    recorded = json.loads((HERE / "golden.json").read_text())
    result = {}
    for kept in recorded["disks"]:
        blocks = {
            int(place): zlib.decompress(base64.b64decode(text))
            for place, text in kept["blocks"].items()
        }
        text = recorded["text"].get(kept["name"], {})
        result[kept["name"]] = Golden(kept["name"], kept["sectors"], blocks, text)
    return result


def record(folder: Path) -> dict:
    """Make the arrays in the guest.

    Args:
        folder: an empty folder.

    Raises:
        RuntimeError: the guest did not come up.
    """
    disks = []
    for i in range(8):
        disks.append(folder / f"disk{i}.img")
        with disks[i].open("wb") as file:
            file.truncate(_SECTORS * 512)
    work = folder / "w"
    work.mkdir()
    script = f"export DISKS='{' '.join(guest.ubd(i) for i in range(8))}'\n"
    script += ". /run/repo/tests/data/md/make.sh\n"
    result = guest.run(script, work, disks=disks, modules=_MODULES, seconds=240)
    print(result.output)
    text: dict[str, dict[str, str]] = {}
    for path in sorted((work / "text").iterdir()):
        name, _, kind = path.name.rpartition(".")
        text.setdefault(name, {})[kind] = path.read_text()
    kept = [json.loads(line) for line in (work / "kept.jsonl").read_text().splitlines()]
    return {"disks": kept, "text": text}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        recorded = record(Path(name))
    (HERE / "golden.json").write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    print(f"{len(recorded['disks'])} disks")
