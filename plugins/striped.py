"""Serves chunks dealt out to files in turn as one device.

    nbdkit python plugins/striped.py chunk=64K a.img b.img [name=NAME] [loglevel=LEVEL]

A file is a regular file, a block device, an nbd:// URI or mem:SIZE; each gives as many whole chunks
as the smallest has. -r serves it for reading only. On nbdkit before 1.34 one connection has one
request under way at a time; from 1.34 on -t 4 suits slow files.
"""

import os
import runpy

runpy.run_path(os.path.join(os.path.dirname(os.path.realpath(__file__)), "adopt.py"))

from dmpy.exports import OneTablePlugin, leg_sizes
from dmpy.nbd import Refusal, callbacks


def table(plugin):
    chunk_size = plugin.size_argument("chunk")
    if chunk_size == 0 or chunk_size % 4096:
        raise Refusal(f"chunk must be a multiple of 4096 bytes (got {chunk_size})")
    legs = leg_sizes(plugin, chunk_size)
    sectors = min(sectors for _, sectors in legs) * len(legs)
    words = " ".join(f"{word} 0" for word, _ in legs)
    return f"0 {sectors} striped {len(legs)} {chunk_size // 512} {words}"


globals().update(callbacks(OneTablePlugin("striped", table, {"chunk": "64K"})))
