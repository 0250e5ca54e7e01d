"""Serves the device that a table makes.

    nbdkit python plugins/table.py table="0 2048 linear a.img 0" [name=NAME] [loglevel=LEVEL]
    nbdkit python plugins/table.py file=r0.table

Relative paths in the table begin in the folder that nbdkit was started in. -r serves it for reading
only. On nbdkit before 1.34 one connection has one request under way at a time; from 1.34 on -t 4
suits slow files.
"""

import os
import runpy

runpy.run_path(os.path.join(os.path.dirname(os.path.realpath(__file__)), "adopt.py"))

from dmpy.exports import OneTablePlugin
from dmpy.nbd import Refusal, callbacks


def table(plugin):
    text, file = plugin.values["table"], plugin.values["file"]
    if bool(text) == bool(file):
        raise Refusal("table: give one of table=TEXT and file=PATH")
    if file:
        with io_open(os.path.join(plugin.cwd, file), encoding="utf-8") as lines:
            text = lines.read()
    return text


io_open = open  # nbdkit's open() takes the name
globals().update(
    callbacks(OneTablePlugin("table", table, {"table": "", "file": ""}, takes_files=False))
)
