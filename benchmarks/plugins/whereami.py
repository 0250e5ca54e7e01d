"""A disk that reads as the place of nbdkit's own buffer.

Each read returns the buffer's address modulo 4096 in its first 2 bytes, little endian. The
benchmark reads once in each request size, because where a buffer sits in its page decides how fast
some CPUs copy into it.
"""
import ctypes

import nbdkit

API_VERSION = 2


def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL


def open(readonly):
    return nbdkit.export_name()


def get_size(handle):
    return 1 << 30


def pread(handle, buf, offset, flags):
    place = ctypes.addressof(ctypes.c_char.from_buffer(buf)) % 4096
    buf[:2] = place.to_bytes(2, "little")
