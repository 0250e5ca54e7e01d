"""dmpy: Linux's device-mapper in user space.

    with dmpy.Mapper() as dm:
        dev = dm.create("r0", "0 204800 striped 2 128 a.img 0 b.img 0")
        dev.preadv([memoryview(bytearray(4096))], 0)
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# Where the names of the interface come from. They are fetched when they are first used: a command
# that only talks to the server should not wait for the engine to be imported.
_HOMES = {
    "DeviceError": "dmpy.errors",
    "FormatError": "dmpy.errors",
    "MappedDevice": "dmpy.mapped",
    "Mapper": "dmpy.mapper",
    "TableError": "dmpy.errors",
    "Target": "dmpy.target",
    "MapTarget": "dmpy.target",
    "serve": "dmpy.proxy",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    try:
        home = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module 'dmpy' has no attribute {name!r}") from None
    return getattr(importlib.import_module(home), name)
