"""`python -m benchmarks`: servers side by side, in turns, and one table.

Prints what was promised beside what was measured, the ratios and every number; writes JSON and an
SVG chart where asked to. Nothing fails because it was slow.
"""
from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import signal
import statistics
import sys
import time
from pathlib import Path

from . import machine, report
from .fio import BenchmarkError
from .ground import Ground, Server
from .peers import PEERS, Peer
from .promises import PROMISES
from .race import race, summary
from .tasks import TASKS
from .workloads import WORKLOADS, Workload

__all__ = ["main"]

# 1,000 segments of 256 KiB, which four legs of 1,000 chunks of 64 KiB hold as well.
_SIZE = 1000 * 256 << 10
_FORMAT = 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="only what promises are about, 3 rounds of 0.3 s")
    add("--promised", action="store_true", help="only the workloads that promises are about")
    add("--seconds", type=float, metavar="S", help="length of each run of fio (default 1)")
    add("--rounds", type=int, metavar="N", help="turns of every server (default 7)")
    add("--only", action="append", default=[], metavar="NAME",
        help="only this peer, workload or task; may be repeated (see --list)")
    add("--size", type=int, default=_SIZE >> 20, metavar="MIB",
        help=f"MiB of each device (default {_SIZE >> 20})")
    add("--json", type=Path, metavar="FILE", help="write everything measured")
    add("--svg", type=Path, metavar="FILE", help="write the chart")
    add("--out", type=Path, metavar="DIR", help="write latest.json, latest.md and latest.svg")
    add("--render", type=Path, metavar="FILE", help="measure nothing: report on an earlier --json")
    add("--list", action="store_true", help="name the peers, workloads and tasks, and end")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv` and returns its exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.list:
        _list()
        return 0
    # A plain `kill` ends the run as Ctrl-C does: servers stopped, files gone.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.render:
        document = json.loads(options.render.read_text())
    else:
        peers, workloads, chosen = _choose(options, parser)
        document = _measure(options, peers, workloads, chosen, argv)
    print(report.markdown(document), end="")
    _write(options, document)
    return 0


# What there is, a line each.
def _list() -> None:
    for peer in PEERS:
        print(f"peer      {peer.name:22} {peer.title}")
    for workload in WORKLOADS:
        print(f"workload  {workload.name:22} {workload.title}")
    for name, task in TASKS.items():
        print(f"task      {name:22} {task.title}")


# The peers, workloads and tasks that the options ask for.
def _choose(options, parser) -> tuple[list[Peer], list[Workload], list[str]]:
    known = {
        "peers": {peer.name: peer for peer in PEERS},
        "workloads": {workload.name: workload for workload in WORKLOADS},
        "tasks": {name: name for name in TASKS},
    }
    chosen: dict[str, list] = {kind: [] for kind in known}
    for name in options.only:
        kind = next((kind for kind in known if name in known[kind]), None)
        if kind is None:
            parser.error(f"{name}: no such peer, workload or task (see --list)")
        chosen[kind].append(known[kind][name])
    promised = {name for promise in PROMISES for name in promise.workloads}
    if options.promised or options.quick:
        known["workloads"] = {n: w for n, w in known["workloads"].items() if n in promised}
    # A task alone asks for no load; a peer or a workload alone asks for no task.
    loads = bool(chosen["peers"] or chosen["workloads"] or not options.only)
    workloads = chosen["workloads"] or (list(known["workloads"].values()) if loads else [])
    everything = not options.only
    return (
        (chosen["peers"] or list(known["peers"].values())) if loads else [],
        workloads,
        chosen["tasks"] or (list(TASKS) if everything else []),
    )


# Runs it all and returns the document that report.py reads.
def _measure(options, peers, workloads, chosen, argv) -> dict:
    rounds = options.rounds or (3 if options.quick else 7)
    seconds = options.seconds or (0.3 if options.quick else 1.0)
    words = sys.argv[1:] if argv is None else argv
    before = os.getloadavg()[0]
    started = datetime.datetime.now(datetime.timezone.utc)
    with Ground(options.size << 20) as ground:
        document = {
            "format": _FORMAT,
            "command": shlex.join(["python", "-m", "benchmarks", *words]),
            "started": started.isoformat(timespec="seconds"),
            "machine": machine.describe(),
            "settings": {
                "size": ground.size, "rounds": rounds, "seconds": seconds,
                "file_system": machine.file_system(ground.folder),
                "page_offsets": machine.page_offsets(ground, workloads),
                "load_before": before,
                **machine.copy_trap(),
            },
            "peers": {peer.name: {"title": peer.title, "ours": peer.ours} for peer in peers},
        }
        servers, document["absent"] = _serve(ground, peers if workloads else [])
        document["workloads"] = {
            workload.name: _run(workload, servers, rounds, seconds, ground.size)
            for workload in workloads
        }
        document["tasks"] = _time(ground, chosen, rounds if options.rounds else 3)
    document["settings"]["load_after"] = os.getloadavg()[0]
    return document


# Starts the servers; one that cannot start is named with the reason.
def _serve(ground: Ground, peers: list[Peer]) -> tuple[dict[str, Server], dict[str, str]]:
    servers, absent = {}, {}
    for peer in peers:
        try:
            servers[peer.name] = peer.start(ground)
        except (BenchmarkError, FileNotFoundError) as error:
            absent[peer.name] = str(error)
    return servers, absent


# One workload on all servers.
def _run(workload, servers, rounds: int, seconds: float, size: int) -> dict:
    def progress(name: str, number: int) -> None:
        _say(f"{workload.title}: round {number + 1} of {rounds}: {name}")

    samples, failures = race(servers, workload, rounds, seconds, size, progress)
    _say("")
    return {
        "title": workload.title, "request_size": workload.request_size,
        "depth": workload.depth, "connections": workload.connections,
        "in_bytes": workload.in_bytes, "failures": failures,
        "results": {name: summary(samples[name]) for name in samples},
    }


# Runs each of the tasks `rounds` times.
def _time(ground: Ground, names: list[str], rounds: int) -> dict:
    times = {}
    for name in names:
        task = TASKS[name]
        _say(f"{task.title}")
        measured = []
        for _ in range(rounds):
            with task.prepared(ground) as work:
                begin = time.perf_counter()
                work()
                measured.append(round(time.perf_counter() - begin, 3))
        times[name] = {
            "title": task.title, "seconds": measured, "best": min(measured),
            "median": statistics.median(measured),
        }
    _say("")
    return times


# Progress, on one line of a terminal and nowhere else.
def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


# The files that the options ask for.
def _write(options, document: dict) -> None:
    files = {options.json: _json, options.svg: report.svg}
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        files[options.out / "latest.json"] = _json
        files[options.out / "latest.svg"] = report.svg
        files[options.out / "latest.md"] = _page
    for path, render in files.items():
        if path is not None:
            path.write_text(render(document))


def _json(document: dict) -> str:
    return json.dumps({**document, "promises": report.judge(document)}, indent=1) + "\n"


def _page(document: dict) -> str:
    chart = "![bars of the promised workloads](latest.svg)"
    return f"# Latest measurements\n\n{chart}\n\n{report.markdown(document, folded=True)}"


if __name__ == "__main__":
    sys.exit(main())
