"""`top` and the figures in it."""

from __future__ import annotations

import pytest

from dmpy.cli import top


def _stats(name="r0", **more):
    return {
        "name": name, "reads": 0, "writes": 0, "read_bytes": 0, "write_bytes": 0, "flushes": 0,
        "discards": 0, "zeroes": 0, "errors": 0, "in_flight": 0,
        "read_histogram": [0] * 64, "write_histogram": [0] * 64, **more,
    }


def _histogram(**counts):
    histogram = [0] * 64
    for key, count in counts.items():
        histogram[int(key[1:])] = count
    return histogram


def test_a_percentile_lies_within_its_entry():
    histogram = _histogram(_10=99, _20=1)              # 512..1023 ns, and 0.5..1 ms
    assert 512e-9 <= top.percentile(histogram, 0.5) < 1024e-9
    assert 512e-9 <= top.percentile(histogram, 0.99) <= 1024e-9
    assert 2**19 * 1e-9 <= top.percentile(histogram, 1.0) <= 2**20 * 1e-9


def test_no_requests_have_no_percentile():
    assert top.percentile([0] * 64, 0.5) is None
    assert top.percentile([], 0.5) is None


def test_rates_are_differences_a_second():
    before = _stats(reads=100, read_bytes=1 << 20, read_histogram=_histogram(_30=100))
    after = _stats(reads=300, read_bytes=3 << 20, writes=10, write_bytes=40960, in_flight=3,
                   errors=2, read_histogram=_histogram(_30=100, _10=200),
                   write_histogram=_histogram(_10=10))
    rates = top.rates(before, after, 2.0)
    assert rates["read_iops"] == 100
    assert rates["write_iops"] == 5
    assert rates["read_bytes_per_second"] == 1 << 20
    assert (rates["in_flight"], rates["errors"]) == (3, 2)
    # What was slow before the interval does not count in it.
    assert rates["p99"] <= 1024e-9


def test_a_device_made_in_between_did_all_its_work_in_between():
    rates = top.rates({}, _stats(reads=10, read_histogram=_histogram(_10=10)), 1.0)
    assert rates["read_iops"] == 10


@pytest.mark.parametrize(("seconds", "text"), [
    (None, "-"), (5e-9, "5 ns"), (1.5e-6, "1.5 us"), (0.0025, "2.5 ms"), (1.25, "1.25 s")])
def test_a_latency_has_the_unit_that_suits_it(seconds, text):
    assert top._latency(seconds) == text


@pytest.mark.parametrize(("size", "text"), [
    (0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536 << 10, "1.5 MiB")])
def test_a_size_has_the_unit_that_suits_it(size, text):
    assert top._size(size) == text


def test_once_prints_one_table(dmpy):
    dmpy.ok("create", "r0", "--table", "0 8 zero")
    heading, _, row = dmpy.ok("top", "--once", "--interval", "0.05").out.splitlines()
    assert heading.split("  ")[0] == "device"
    assert row.split() == ["r0", "0", "0", "0.0", "0.0", "0", "-", "-", "0"]


def test_json_is_a_line_a_look(dmpy):
    nbd = pytest.importorskip("nbd", reason="libnbd's Python module is missing")
    dmpy.ok("create", "r0", "--table", "0 2048 zero")
    handle = nbd.NBD()
    handle.connect_uri(f"nbd+unix:///r0?socket={dmpy.runtime}/nbd.sock")
    handle.pread(4096, 0)
    handle.shutdown()
    assert dmpy.ok("stats", "r0", "--json").json()["reads"] == 1
    lines = dmpy.ok("top", "--count", "2", "--interval", "0.05", "--json").out.splitlines()
    assert len(lines) == 2
    assert '"name": "r0"' in lines[1]


def test_a_long_name_is_not_cut_in_a_pipe(dmpy):
    dmpy.ok("create", "n" * 100, "--table", "0 8 zero")
    assert "n" * 100 in dmpy.ok("stats").out
    assert "n" * 100 in dmpy.ok("top", "--once", "--interval", "0.05").out
