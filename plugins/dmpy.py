"""The server behind the dmpy command: every device of a state folder is an export of its name.

    nbdkit -f -t 1 -U RUNTIME/nbd.sock python plugins/dmpy.py runtime=RUNTIME state=STATE \\
        [devdir=FOLDER] [metrics=ADDRESS] [loglevel=LEVEL]

Commands come in through RUNTIME/control.sock. -t 1 is what nbdkit before 1.34 does with this in any
case; from 1.34 on -t 4 lets one connection have several requests under way on slow devices.
"""

import os
import runpy

runpy.run_path(os.path.join(os.path.dirname(os.path.realpath(__file__)), "adopt.py"))

from dmpy.exports import ServerPlugin
from dmpy.nbd import callbacks

globals().update(callbacks(ServerPlugin()))
