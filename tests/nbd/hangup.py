"""A client with no manners: sends many requests and hangs up. Speaks NBD by hand."""

from __future__ import annotations

import random
import socket
import struct

_READ = 0
_WRITE = 1
_MAGIC = 0x25609513


def _receive(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = sock.recv(length - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def connect(path: str, name: bytes) -> socket.socket:
    """Negotiate in the oldest way that has names; returns the socket, ready for requests."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(20)
        sock.connect(path)
        _receive(sock, 18)
        sock.sendall(struct.pack(">I", 3))  # fixed newstyle, no zeroes
        sock.sendall(b"IHAVEOPT" + struct.pack(">II", 1, len(name)) + name)
        _receive(sock, 10)
    except BaseException:
        sock.close()
        raise
    return sock


def request(kind: int, cookie: int, offset: int, length: int) -> bytes:
    """The head of a request."""
    return struct.pack(">IHHQQI", _MAGIC, 0, kind, cookie, offset, length)


def hang_up_in_flight(path: str, name: bytes, rng: random.Random) -> None:
    """Send reads, perhaps half a write, take a part of an answer perhaps, and go."""
    size = rng.choice((4096, 65536, 1 << 20))
    with connect(path, name) as sock:
        for cookie in range(rng.choice((4, 16, 64))):
            sock.sendall(request(_READ, cookie, cookie * size, size))
        if rng.random() < 0.3:
            sock.sendall(request(_WRITE, 99, 0, 65536) + bytes(1000))
        if rng.random() < 0.5:
            _receive(sock, 16 + 100)
