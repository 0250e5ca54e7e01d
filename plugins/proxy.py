"""What dmpy.serve() runs: passes requests on to the program that has the devices.

    nbdkit -f -U nbd.sock python plugins/proxy.py socket=proxy.sock
"""

import os
import runpy

runpy.run_path(os.path.join(os.path.dirname(os.path.realpath(__file__)), "adopt.py"))

from dmpy.nbd import callbacks
from dmpy.proxy import ProxyPlugin

globals().update(callbacks(ProxyPlugin()))
