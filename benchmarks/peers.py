"""Who is compared: a name, words for the table, and how to serve the ground's bytes.

A new peer is one line in `PEERS`: a function from the ground to a `Server`. One that cannot start
(a program is missing, say) is left out of the run and the report says why.
"""
from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import dmpy_server
from .ground import Ground, Server

__all__ = ["PEERS", "Peer", "linear_table", "segments_table", "striped_table"]

_BARE = Path(__file__).with_name("plugins") / "bare.py"
_SECTOR = 512


@dataclass(frozen=True)
class Peer:
    """One contestant.

    Attributes:
        name: its word in options, promises and JSON.
        title: its words in tables and charts.
        start: serves `ground.size` bytes.
        ours: whether dmpy does the work.
    """

    name: str
    title: str
    start: Callable[[Ground], Server]
    ours: bool = False


def linear_table(leg: str, size: int) -> str:
    """One linear line over `size` bytes of `leg`."""
    return f"0 {size // _SECTOR} linear {leg} 0"


def striped_table(legs: list[str], size: int, chunk: int = 64 << 10) -> str:
    """`size` bytes dealt out to `legs` in chunks of `chunk` bytes."""
    words = " ".join(f"{leg} 0" for leg in legs)
    return f"0 {size // _SECTOR} striped {len(legs)} {chunk // _SECTOR} {words}"


def segments_table(leg: str, size: int, count: int) -> str:
    """`count` equal linear lines over `leg` in a shuffled order, so that none can be joined."""
    length = size // count // _SECTOR
    places = list(range(count))
    random.Random(1).shuffle(places)
    return "\n".join(
        f"{line * length} {length} linear {leg} {place * length}"
        for line, place in enumerate(places)
    )


# Four files which together hold what the disk holds.
def _legs(ground: Ground) -> list[str]:
    return [ground.file(f"leg{number}.img", ground.size // 4) for number in range(4)]


# Serves `ten`, a linear device over nine others over the disk.
def _ten_layers(ground: Ground) -> Server:
    leg = ground.disk
    for number in range(1, 10):
        name = f"layer{number}"
        dmpy_server.create(ground, name, linear_table(leg, ground.size))
        leg = name
    return dmpy_server.create(ground, "ten", linear_table(leg, ground.size))


# A RAID set without metadata devices, on files of its own, of at least the ground's size.
def _raid(
    ground: Ground, word: str, members: int, data: int, *, params: str = "", missing: int = 0
) -> Server:
    chunk = 0 if word == "raid1" else 64 << 10
    unit = chunk or 4096
    member_size = -(-ground.size // data // unit) * unit + unit
    name = f"{word}{'-degraded' if missing else ''}"
    pairs = [
        "- -" if place < missing else f"- {ground.file(f'{name}-{place}.img', member_size)}"
        for place in range(members)
    ]
    count = 1 + len(params.split())
    length = member_size * data // _SECTOR
    table = f"0 {length} raid {word} {count} {chunk // _SECTOR} {params} {members} "
    return dmpy_server.create(ground, name, table + " ".join(pairs))


PEERS = [
    Peer("file", "nbdkit file (C)", lambda g: g.nbdkit("file", "file", g.disk)),
    Peer(
        "file-threads", "nbdkit file (C), default threads",
        lambda g: g.nbdkit("file-threads", "file", g.disk, threads=None),
    ),
    Peer(
        "offset", "nbdkit file + offset filter",
        lambda g: g.nbdkit("offset", "--filter=offset", "file", g.disk, "offset=0"),
    ),
    Peer("memory", "nbdkit memory", lambda g: g.nbdkit("memory", "memory", str(g.size))),
    Peer("qemu-nbd", "qemu-nbd raw", lambda g: g.qemu_nbd("qemu-nbd", g.disk)),
    Peer(
        "bare", "bare Python plugin",
        lambda g: g.nbdkit("bare", "python", str(_BARE), f"file={g.disk}"),
    ),
    Peer(
        "linear", "dmpy linear",
        lambda g: dmpy_server.create(g, "linear", linear_table(g.disk, g.size)), ours=True,
    ),
    Peer(
        "striped", "dmpy striped over 4",
        lambda g: dmpy_server.create(g, "striped", striped_table(_legs(g), g.size)), ours=True,
    ),
    Peer("ten-layers", "dmpy ten linear layers", _ten_layers, ours=True),
    Peer(
        "1000-segments", "dmpy 1,000 segments",
        lambda g: dmpy_server.create(g, "thousand", segments_table(g.disk, g.size, 1000)),
        ours=True,
    ),
    Peer("raid0", "dmpy raid0 of 4", lambda g: _raid(g, "raid0", 4, 4), ours=True),
    Peer("raid1", "dmpy raid1 of 2", lambda g: _raid(g, "raid1", 2, 1), ours=True),
    Peer("raid10", "dmpy raid10 of 4", lambda g: _raid(g, "raid10", 4, 2), ours=True),
    Peer("raid5", "dmpy raid5 of 4", lambda g: _raid(g, "raid5_ls", 4, 3), ours=True),
    Peer("raid6", "dmpy raid6 of 6", lambda g: _raid(g, "raid6_zr", 6, 4), ours=True),
    Peer(
        "raid5-degraded", "dmpy raid5 of 4, one lost",
        lambda g: _raid(g, "raid5_ls", 4, 3, missing=1), ours=True,
    ),
    Peer(
        "raid6-degraded", "dmpy raid6 of 6, two lost",
        lambda g: _raid(g, "raid6_zr", 6, 4, missing=2), ours=True,
    ),
]
