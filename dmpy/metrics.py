"""Counters and latencies of all devices as Prometheus text, and a small server for them.

Format: version 0.0.4 of the text exposition format. Latencies are kept in powers of two, so the
sum of a histogram is an estimate: each request counts as the middle of its bucket.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn, UnixStreamServer
from typing import TYPE_CHECKING

from dmpy.errors import DeviceError

if TYPE_CHECKING:
    from dmpy.mapper import Mapper

__all__ = ["CONTENT_TYPE", "MetricsServer", "exposition", "parse_address"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Metric, type, meaning, and where it is in Stats.snapshot().
_COUNTERS = (
    ("dmpy_reads_total", "counter", "reads that succeeded", "reads"),
    ("dmpy_writes_total", "counter", "writes that succeeded", "writes"),
    ("dmpy_read_bytes_total", "counter", "bytes read", "read_bytes"),
    ("dmpy_written_bytes_total", "counter", "bytes written", "write_bytes"),
    ("dmpy_flushes_total", "counter", "flushes that succeeded", "flushes"),
    ("dmpy_discards_total", "counter", "discards that succeeded", "discards"),
    ("dmpy_zeroes_total", "counter", "requests to write zeroes that succeeded", "zeroes"),
    ("dmpy_errors_total", "counter", "requests of any kind that failed", "errors"),
    ("dmpy_in_flight", "gauge", "requests under way, or waiting for a resume", "in_flight"),
)
_HISTOGRAMS = (
    ("dmpy_read_seconds", "how long reads took", "read_histogram"),
    ("dmpy_write_seconds", "how long writes took", "write_histogram"),
)
# Entry i of a histogram counts what took less than 2**i ns. The buckets that are printed go from
# 1 us to 34 s, by factors of two; whatever is beyond is in +Inf.
_PRINTED_BUCKETS = range(10, 36)


def exposition(figures: Iterable[tuple[str, dict]]) -> str:
    """Return the metrics of devices as text.

    Args:
        figures: the name of each device and its `Stats.snapshot()`.
    """
    devices = [(_escape(name), snapshot) for name, snapshot in figures]
    lines = ["# HELP dmpy_devices devices that are there", "# TYPE dmpy_devices gauge",
             f"dmpy_devices {len(devices)}"]
    for metric, kind, meaning, key in _COUNTERS:
        lines += [f"# HELP {metric} {meaning}", f"# TYPE {metric} {kind}"]
        lines += [f'{metric}{{device="{name}"}} {snapshot[key]}' for name, snapshot in devices]
    for metric, meaning, key in _HISTOGRAMS:
        lines += [f"# HELP {metric} {meaning}; its sum is an estimate",
                  f"# TYPE {metric} histogram"]
        for name, snapshot in devices:
            lines += _histogram(metric, name, snapshot[key])
    return "\n".join(lines) + "\n"


def _histogram(metric: str, name: str, buckets: list[int]) -> Iterator[str]:
    for i in _PRINTED_BUCKETS:
        limit = (1 << i) / 1e9
        yield f'{metric}_bucket{{device="{name}",le="{limit!r}"}} {sum(buckets[:i + 1])}'
    count = sum(buckets)
    yield f'{metric}_bucket{{device="{name}",le="+Inf"}} {count}'
    # The middle of bucket i, of 2**(i - 1) to 2**i ns, is 3/4 of its end.
    estimate = sum(number * (0.75 * (1 << i)) for i, number in enumerate(buckets)) / 1e9
    yield f'{metric}_sum{{device="{name}"}} {estimate!r}'
    yield f'{metric}_count{{device="{name}"}} {count}'


# A label's value: what the format cannot hold is escaped, what UTF-8 cannot is replaced.
def _escape(name: str) -> str:
    name = name.encode("utf-8", "replace").decode("utf-8")
    return name.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def parse_address(text: str) -> str | tuple[str, int]:
    """Read where to serve: HOST:PORT of this machine only, [::1]:PORT, or unix:PATH.

    Returns:
        The path, or host and port; port 0 stands for any that is free.

    Raises:
        ValueError: it is none of these, or a host that others can reach.
    """
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not os.path.isabs(path) or len(os.fsencode(path)) > 107:
            raise ValueError(f"metrics: socket must be an absolute path of at most 107 bytes "
                             f"(got {path!r})")
        return path
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"metrics: address must be HOST:PORT or unix:PATH (got {text!r})")
    if host == "localhost":
        host = "127.0.0.1"
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = False
    if not is_local:
        raise ValueError(f"metrics: host must be localhost, 127.0.0.1 or ::1, as everybody who "
                         f"reaches it can read (got {host!r})")
    return host, int(port)


class MetricsServer:
    """Answers GET /metrics over HTTP, in threads.

    Args:
        mapper: whose devices.
        address: as `parse_address` reads it.

    Raises:
        ValueError: the address is not one to serve on.
        DeviceError: EADDRINUSE and so on.
    """

    def __init__(self, mapper: Mapper, address: str) -> None:
        place = parse_address(address)

        class Handler(_Handler):
            def figures(self) -> list[tuple[str, dict]]:
                return [(device.name, device.stats.snapshot()) for device in mapper.devices()]

        try:
            self._server = _serve_on(place, Handler)
        except OSError as error:
            number = error.errno or errno.EIO
            raise DeviceError(number, f"metrics: {address}: {os.strerror(number)}") from error
        self._path = place if isinstance(place, str) else None

    @property
    def port(self) -> int | None:
        """The TCP port, or None on a Unix socket."""
        return None if self._path is not None else self._server.server_address[1]

    @property
    def address(self) -> str:
        """Where it answers, as `parse_address` reads it, with the port that it got."""
        if self._path is not None:
            return f"unix:{self._path}"
        host, port = self._server.server_address[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def start(self) -> None:
        """Begin to answer."""
        work = self._server.serve_forever
        threading.Thread(target=work, args=(0.1,), name="metrics", daemon=True).start()

    def stop(self) -> None:
        """Stop answering, after start()."""
        self._server.shutdown()
        self._server.server_close()
        if self._path is not None:
            with suppress(FileNotFoundError):
                os.unlink(self._path)


class _TCP(ThreadingMixIn, TCPServer):
    allow_reuse_address = True
    daemon_threads = True
    # Threads of clients that do not finish must not hold up the end; they time out.
    block_on_close = False


class _TCP6(_TCP):
    address_family = socket.AF_INET6


class _Unix(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True
    block_on_close = False

    # Listening comes after this, so nobody gets in before the mode is right.
    def server_bind(self) -> None:
        super().server_bind()
        os.chmod(self.server_address, 0o600)


def _serve_on(place: str | tuple[str, int], handler: type[_Handler]) -> TCPServer:
    if isinstance(place, tuple):
        return (_TCP6 if ":" in place[0] else _TCP)(place, handler)
    # A socket that a server left behind when it died is replaced, one that answers is not.
    with socket.socket(socket.AF_UNIX) as probe, suppress(FileNotFoundError):
        try:
            probe.connect(place)
        except ConnectionRefusedError:
            os.unlink(place)
    return _Unix(place, handler)


class _Handler(BaseHTTPRequestHandler):
    server_version = "dmpy"
    timeout = 10.0  # seconds for a client's whole silence

    def do_GET(self) -> None:
        if self.path.split("?")[0] != "/metrics":
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        content = exposition(self.figures()).encode("utf-8")
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    # One line a scrape would fill the log; errors that matter are raised.
    def log_message(self, *_: object) -> None:
        pass

    # A Unix socket has no address to print.
    def address_string(self) -> str:
        return "local"
