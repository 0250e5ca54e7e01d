"""That the benchmarks run and report; how fast anything was is nobody's test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.chart import Bar, Panel, draw
from benchmarks.peers import PEERS, segments_table
from benchmarks.promises import LIMITS, PROMISES
from benchmarks.race import order, ratio
from benchmarks.tasks import TASKS
from benchmarks.workloads import WORKLOADS
from tests import needs

REPOSITORY = Path(__file__).parents[1]
SHORT = ["--seconds", "0.05", "--rounds", "1", "--size", "4"]


def run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, timeout=100, text=True,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def document():
    """A run's document made up: `linear` is slower than promised, nothing else was measured."""
    def result(*iops):
        return {"iops": list(iops), "best": max(iops), "median": iops[0], "p99_us": 9, "cpu_us": 7}

    return {
        "command": "python -m benchmarks",
        "machine": dict.fromkeys(
            ["cpu", "cores", "memory", "kernel", "distribution", "python", "nbdkit",
             "plugin_python", "fio", "qemu-nbd"], "x",
        ),
        "settings": {
            "size": 1 << 20, "rounds": 3, "seconds": 1.0, "file_system": "tmpfs",
            "page_offsets": {"4k": 16}, "copy_width": 0, "copy_trap": False,
            "load_before": 0.0, "load_after": 1.0,
        },
        "peers": {
            "file": {"title": "the <C> plugin", "ours": False},
            "linear": {"title": "linear", "ours": True},
        },
        "absent": {"qemu-nbd": "no such program"},
        "workloads": {
            "4k-randread-qd16": {
                "title": "4k random read, depth 16", "request_size": 4096, "depth": 16,
                "connections": 1, "in_bytes": False, "failures": {},
                "results": {"file": result(100, 200, 100), "linear": result(80, 180, 80)},
            },
        },
        "tasks": {"load-in-process": {"title": "load", "seconds": [1], "best": 1, "median": 1}},
    }


def test_names_are_unique_and_promises_name_what_there_is():
    peers = [peer.name for peer in PEERS]
    workloads = [workload.name for workload in WORKLOADS]
    assert len({*peers, *workloads, *TASKS}) == len(peers) + len(workloads) + len(TASKS)
    for promise in PROMISES:
        assert {promise.peer, promise.over} <= set(peers)
        assert set(promise.workloads) <= set(workloads)
    assert {limit.task for limit in LIMITS} <= set(TASKS)


def test_every_server_runs_once_a_round_and_not_always_in_the_same_place():
    names = ["a", "b", "c"]
    rounds = [order(names, number) for number in range(6)]
    assert all(sorted(names) == sorted(turn) for turn in rounds)
    assert {turn[0] for turn in rounds} == set(names)


def test_a_ratio_is_taken_within_the_rounds():
    # The machine was half as fast in the second round, for both.
    assert ratio([90, 45, 90], [100, 50, 100]) == pytest.approx(0.9)


def test_a_promise_is_met_missed_or_not_measured(document):
    verdicts = {(v["what"], v["over"], v["workload"]): v for v in report.judge(document)}
    missed = verdicts["linear", "file", "4k-randread-qd16"]
    assert (missed["measured"], missed["met"]) == (0.8, False)
    assert verdicts["linear", "file", "4k-randwrite-qd16"]["met"] is None
    assert verdicts["load-in-process", "", "load"]["met"] is True


def test_the_copy_trap_raises_the_promise(document):
    def wanted(trap):
        settings = {**document["settings"], "copy_trap": trap}
        verdicts = report.judge({**document, "settings": settings})
        return [v["wanted"] for v in verdicts if v["workload"] == "1M-read-qd4"][0]

    assert (wanted(False), wanted(True)) == (">= 0.95", ">= 1.50")


def test_the_report_says_what_was_left_out_and_what_was_missed(document):
    text = report.markdown(document)
    assert "left out: qemu-nbd: no such program" in text
    assert "not met" in text


def test_the_chart_is_well_formed_and_escapes_its_words(document):
    root = ElementTree.fromstring(report.svg(document))
    words = [element.text for element in root.iter() if element.tag.endswith("}text")]
    assert "the <C> plugin" in words
    assert "0.90" in words or "0.80" in words


def test_a_chart_without_bars_is_well_formed():
    ElementTree.fromstring(draw("a", "b", [Panel("c", ("d", "e"), [])], ("f", "g")))
    ElementTree.fromstring(draw("a", "b", [Panel("c", ("d", "e"), [Bar("z", 0, "0")])], ("f", "g")))


def test_segments_cover_the_disk_once_and_in_another_order():
    lines = [line.split() for line in segments_table("disk", 1000 * 4096, 1000).splitlines()]
    assert [int(line[0]) for line in lines] == list(range(0, 8000, 8))
    places = [int(line[4]) for line in lines]
    assert sorted(places) == list(range(0, 8000, 8)) != places


def test_servers_are_compared_and_the_report_written(tmp_path):
    needs.tool("fio")
    needs.tool("nbdkit")
    ground = tempfile.mkdtemp(dir="/dev/shm")
    text = run(
        "-m", "benchmarks", "--quick", *SHORT, "--out", str(tmp_path), "--json",
        str(tmp_path / "a.json"), "--only", "file", "--only", "bare", "--only", "linear",
        "--only", "4k-randread-qd16", "--only", "1M-write-qd4", TMPDIR=ground,
    )
    assert "linear / file" in text
    document = json.loads((tmp_path / "latest.json").read_text())
    assert document == json.loads((tmp_path / "a.json").read_text())
    assert document["absent"] == {}
    for entry in document["workloads"].values():
        assert entry["failures"] == {}
        assert set(entry["results"]) == {"file", "bare", "linear"}
    ElementTree.parse(tmp_path / "latest.svg")
    assert text in (tmp_path / "latest.md").read_text() or "<details>" in (
        tmp_path / "latest.md"
    ).read_text()
    os.rmdir(ground)  # which fails when anything was left behind


def test_every_server_of_ours_answers():
    needs.tool("fio")
    needs.tool("nbdkit")
    ours = [word for peer in PEERS if peer.ours for word in ("--only", peer.name)]
    text = run("-m", "benchmarks", *SHORT, *ours, "--only", "4k-randwrite-qd16")
    assert "left out" not in text
    assert "broke" not in text


def test_an_earlier_run_is_rendered_again(document, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(document))
    text = run("-m", "benchmarks", "--render", str(tmp_path / "a.json"))
    assert text == report.markdown(document)


def test_an_unknown_name_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--only", "nobody"], cwd=REPOSITORY,
        capture_output=True, text=True, timeout=60,
    )
    assert done.returncode == 2
    assert "nobody: no such peer, workload or task" in done.stderr


def test_the_engine_benchmarks_run():
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-disable", "benchmarks")
