"""The least a Python plugin can do: one file, one `os.preadv` or `os.pwritev` a request.

nbdkit -t 1 python benchmarks/plugins/bare.py file=disk.img

The thread state is pinned as dmpy pins it, so that what dmpy costs more is dmpy's own work.
"""
import ctypes
import os

import nbdkit

API_VERSION = 2

_ensure = ctypes.pythonapi.PyGILState_Ensure
_release = ctypes.pythonapi.PyGILState_Release
_path = ""


def config(key, value):
    global _path
    if key != "file":
        raise RuntimeError(f"{key}: unknown parameter (expected file=PATH)")
    _path = os.path.abspath(value)


def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL


def open(readonly):
    fd = os.open(_path, os.O_RDWR)
    # Pinned last: nothing may fail between this and the handle's close.
    _ensure()
    return fd


def close(fd):
    os.close(fd)
    _release(0)


def get_size(fd):
    return os.fstat(fd).st_size


def can_multi_conn(fd):
    return True


def pread(fd, buf, offset, flags):
    os.preadv(fd, [buf], offset)


def pwrite(fd, buf, offset, flags):
    os.pwritev(fd, [buf], offset)


def flush(fd, flags):
    os.fdatasync(fd)
