"""Prometheus reads what we print, and only this machine can ask."""

from __future__ import annotations

import errno
import http.client
import os
import re
import socket
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest

from dmpy.errors import DeviceError
from dmpy.metrics import CONTENT_TYPE, MetricsServer, exposition, parse_address

PLAIN = {
    "reads": 3, "writes": 2, "read_bytes": 12288, "write_bytes": 1024, "flushes": 1,
    "discards": 4, "zeroes": 5, "errors": 6, "in_flight": 7,
    "read_histogram": [0] * 65, "write_histogram": [0] * 65,
}  # fmt: skip
LINE = re.compile(r'([a-z_]+)(?:\{((?:[a-z]+="(?:[^"\\\n]|\\[\\n"])*",?)+)\})? ([0-9.e+-]+)')


def figures(**changes) -> dict:
    return PLAIN | changes


# Parse strictly: every line is a comment or a sample, every sample comes after its TYPE.
def samples(text: str) -> dict[tuple[str, str], float]:
    found = {}
    types = {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, metric, kind = line.split(" ")
            assert metric not in types
            types[metric] = kind
            continue
        if line.startswith("# HELP "):
            continue
        name, labels, value = LINE.fullmatch(line).groups()
        family = re.sub("_(bucket|sum|count)$", "", name)
        assert name in types or types[family] == "histogram"
        assert (name, labels) not in found
        found[name, labels] = float(value)
    return found


def test_every_counter_is_there_with_its_device():
    found = samples(exposition([("r0", figures())]))
    assert found["dmpy_devices", None] == 1
    assert found["dmpy_reads_total", 'device="r0"'] == 3
    assert found["dmpy_written_bytes_total", 'device="r0"'] == 1024
    assert found["dmpy_errors_total", 'device="r0"'] == 6
    assert found["dmpy_in_flight", 'device="r0"'] == 7


def test_no_devices_give_a_valid_text():
    assert samples(exposition([])) == {("dmpy_devices", None): 0}


def test_buckets_add_up_and_end_at_infinity():
    reads = [0] * 65
    for nanoseconds in [0, 700, 5_000, 5_000, 90_000_000_000]:
        reads[nanoseconds.bit_length()] += 1
    found = samples(exposition([("r0", figures(read_histogram=reads))]))
    bucket = "dmpy_read_seconds_bucket"
    assert found[bucket, 'device="r0",le="1.024e-06"'] == 2
    assert found[bucket, 'device="r0",le="4.096e-06"'] == 2
    assert found[bucket, 'device="r0",le="8.192e-06"'] == 4
    assert found[bucket, 'device="r0",le="34.359738368"'] == 4
    assert found[bucket, 'device="r0",le="+Inf"'] == 5
    assert found["dmpy_read_seconds_count", 'device="r0"'] == 5
    assert found["dmpy_read_seconds_sum", 'device="r0"'] == pytest.approx(90, rel=0.5)
    in_order = [value for (name, _), value in found.items() if name == bucket]
    assert in_order == sorted(in_order)


@pytest.mark.parametrize(
    ("name", "label"), [('a"b', r"a\"b"), ("a\\b", r"a\\b"), ("a\nb", r"a\nb"), ("\udcff", "?")]
)
def test_odd_names_are_escaped(name, label):
    found = samples(exposition([(name, figures())]))
    assert found["dmpy_reads_total", f'device="{label}"'] == 3


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("localhost:0", ("127.0.0.1", 0)),
        ("127.0.0.2:65535", ("127.0.0.2", 65535)),
        ("[::1]:9090", ("::1", 9090)),
        ("unix:/run/m.sock", "/run/m.sock"),
    ],
)
def test_addresses_of_this_machine_are_taken(text, place):
    assert parse_address(text) == place


@pytest.mark.parametrize(
    "text",
    ["0.0.0.0:9090", "192.0.2.1:80", "[::]:80", "example.org:80", ":80", "127.0.0.1", "unix:m",
     "127.0.0.1:65536", "127.0.0.1:x", "unix:/" + "x" * 107],
)  # fmt: skip
def test_other_addresses_are_refused(text):
    with pytest.raises(ValueError, match="^metrics: "):
        parse_address(text)


@pytest.fixture
def mapper():
    device = SimpleNamespace(name="r0", stats=SimpleNamespace(snapshot=figures))
    return SimpleNamespace(devices=lambda: [device])


@pytest.fixture
def port(mapper):
    server = MetricsServer(mapper, "127.0.0.1:0")
    server.start()
    yield server.port
    server.stop()


def test_metrics_are_served_over_http(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"] == CONTENT_TYPE
        assert samples(answer.read().decode()) == samples(exposition([("r0", figures())]))


def test_other_paths_and_methods_are_refused(port):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10)
    with pytest.raises(urllib.error.HTTPError, match="501"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", data=b"x", timeout=10)


def test_a_silent_client_holds_up_nobody(port):
    with socket.create_connection(("127.0.0.1", port)):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert answer.status == 200


def test_a_unix_socket_is_for_its_owner_and_replaces_a_dead_one(mapper, tmp_path):
    path = str(tmp_path / "m.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    server = MetricsServer(mapper, f"unix:{path}")
    server.start()
    assert os.stat(path).st_mode & 0o777 == 0o600
    with pytest.raises(DeviceError) as caught:
        MetricsServer(mapper, f"unix:{path}")
    assert caught.value.errno == errno.EADDRINUSE
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(path)
    connection.request("GET", "/metrics")
    assert b"dmpy_reads_total" in connection.getresponse().read()
    connection.close()
    server.stop()
    assert not os.path.exists(path)
