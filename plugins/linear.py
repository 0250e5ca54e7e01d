"""Serves files one after the other as one device.

    nbdkit python plugins/linear.py a.img b.img [name=NAME] [loglevel=LEVEL]

A file is a regular file, a block device, an nbd:// URI or mem:SIZE; what a file has beyond whole
sectors of 512 bytes is left out. -r serves it for reading only. On nbdkit before 1.34 one
connection has one request under way at a time; from 1.34 on -t 4 suits slow files.
"""

import os
import runpy

runpy.run_path(os.path.join(os.path.dirname(os.path.realpath(__file__)), "adopt.py"))

from dmpy.exports import OneTablePlugin, leg_sizes
from dmpy.nbd import callbacks


def table(plugin):
    begin = 0
    lines = []
    for word, sectors in leg_sizes(plugin):
        lines.append(f"{begin} {sectors} linear {word} 0")
        begin += sectors
    return "\n".join(lines)


globals().update(callbacks(OneTablePlugin("linear", table)))
