"""`dmpy top`, and the other pictures that rich draws: the table of `stats`, the tree of `ls`."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from dmpy.cli.format import DM_MAJOR
from dmpy.cli.session import Session, json_option, pass_session

__all__ = ["percentile", "rates", "rich_tree", "stats_text", "top_command"]

Stats = Mapping[str, Any]

# What is printed once is as wide as it needs to be: a line that wraps is better than one cut.
_WIDTH = 1000


def percentile(histogram: Sequence[int], fraction: float) -> float | None:
    """Return the latency below which a fraction of the requests stayed.

    Args:
        histogram: entry i counts requests that took 2^(i-1) .. 2^i - 1 ns.
        fraction: 0 to 1.

    Returns:
        Seconds, interpolated within the entry; None without requests.
    """
    rest = fraction * sum(histogram)
    for i, count in enumerate(histogram):
        if count and rest <= count:
            low, high = (1 << i >> 1), (1 << i)
            return (low + (high - low) * rest / count) * 1e-9
        rest -= count
    return None


def rates(before: Stats, after: Stats, seconds: float) -> dict[str, Any]:
    """Return what a device did between two snapshots, a second.

    Args:
        before, after: results of the method `stats`.
        seconds: between them.

    Returns:
        name, read_iops, write_iops, read_bytes_per_second, write_bytes_per_second, in_flight,
        errors (counted since the device was made), and p50 and p99 of all reads and writes in
        seconds (None without any).
    """
    def rate(key: str) -> float:
        return max(0, after[key] - before.get(key, 0)) / seconds

    histogram = [0] * 65
    for key in ("read_histogram", "write_histogram"):
        for i, count in enumerate(after[key]):
            older = before.get(key, ())
            histogram[i] += max(0, count - (older[i] if i < len(older) else 0))
    return {
        "name": after["name"],
        "read_iops": rate("reads"),
        "write_iops": rate("writes"),
        "read_bytes_per_second": rate("read_bytes"),
        "write_bytes_per_second": rate("write_bytes"),
        "in_flight": after["in_flight"],
        "errors": after["errors"],
        "p50": percentile(histogram, 0.5),
        "p99": percentile(histogram, 0.99),
    }


@click.command("top", short_help="Watch the devices at work.")
@click.option("-d", "--interval", type=click.FloatRange(min=0.05), default=1.0, metavar="SECONDS",
              help="Between two looks; 1 s.")
@click.option("--once", is_flag=True, help="Print one interval and end.")
@click.option("-n", "--count", type=click.IntRange(min=1), metavar="N", help="End after N looks.")
@json_option
@pass_session
def top_command(session: Session, interval: float, once: bool, count: int | None,
                as_json: bool) -> None:
    """Watch the devices: requests and megabytes a second, in flight, latency. Ctrl-C ends it.

    With --json one line a look: {"seconds", "devices": [...]}, latencies in seconds.
    """
    left = 1 if once else count
    live = sys.stdout.isatty() and not as_json and not once
    before, then = _snapshot(session), time.monotonic()
    if not live:
        while left is None or left > 0:
            time.sleep(interval)
            before, then, rows = _look(session, before, then)
            if as_json:
                click.echo(json.dumps(rows))
            else:
                click.echo(_drawn(_rates_table(rows["devices"])))
            sys.stdout.flush()
            left = None if left is None else left - 1
        return
    _watch(session, interval, left, before, then)


def _watch(session: Session, interval: float, left: int | None, before: dict,
           then: float) -> None:
    from rich.live import Live

    def screen(rows: list[dict]) -> Group:
        note = Text(f"{session.runtime}, every {interval:g} s; Ctrl-C ends", style="dim")
        return Group(_rates_table(rows), note)

    with Live(screen([]), screen=True, auto_refresh=False) as live:
        while left is None or left > 0:
            time.sleep(interval)
            before, then, rows = _look(session, before, then)
            live.update(screen(rows["devices"]), refresh=True)
            left = None if left is None else left - 1


def _snapshot(session: Session) -> dict[str, Stats]:
    return {stats["name"]: stats for stats in session.call("stats")}


# One more look: the new snapshot, its time, and what happened since the older one.
def _look(session: Session, before: dict[str, Stats], then: float) -> tuple[dict, float, dict]:
    after, now = _snapshot(session), time.monotonic()
    seconds = max(now - then, 1e-6)
    # A device made in between did all of its work in between.
    rows = [rates(before.get(name, {}), stats, seconds) for name, stats in after.items()]
    return after, now, {"seconds": seconds, "devices": rows}


def _rates_table(rows: list[dict]) -> Table:
    table = _table("device", "r IOPS", "w IOPS", "r MB/s", "w MB/s", "in flight", "p50", "p99",
                   "errors")
    for row in rows:
        table.add_row(
            row["name"], f"{row['read_iops']:.0f}", f"{row['write_iops']:.0f}",
            f"{row['read_bytes_per_second'] / 1e6:.1f}",
            f"{row['write_bytes_per_second'] / 1e6:.1f}", str(row["in_flight"]),
            _latency(row["p50"]), _latency(row["p99"]), _errors(row["errors"]))
    return table


def stats_text(stats: Sequence[Stats]) -> str:
    """Return the table of `dmpy stats`, in colour on a terminal."""
    table = _table("device", "reads", "writes", "read", "written", "flushes", "discards",
                   "zeroes", "in flight", "read p50", "p99", "write p50", "p99", "errors")
    for each in stats:
        reads, writes = each["read_histogram"], each["write_histogram"]
        table.add_row(
            each["name"], str(each["reads"]), str(each["writes"]), _size(each["read_bytes"]),
            _size(each["write_bytes"]), str(each["flushes"]), str(each["discards"]),
            str(each["zeroes"]), str(each["in_flight"]), _latency(percentile(reads, 0.5)),
            _latency(percentile(reads, 0.99)), _latency(percentile(writes, 0.5)),
            _latency(percentile(writes, 0.99)), _errors(each["errors"]))
    return _drawn(table)


def rich_tree(infos: Sequence[Mapping[str, Any]], deps: Mapping[str, Sequence]) -> str:
    """Return `dmpy ls --tree` for a terminal: each device with its number, size and state."""
    by_name = {info["name"]: info for info in infos}
    used = {dep["name"] for uses in deps.values() for dep in uses if dep["major"] == DM_MAJOR}

    def grow(branch: Tree, name: str) -> None:
        for dep in deps.get(name, ()):
            if dep["major"] == DM_MAJOR and dep["name"] in by_name:
                grow(branch.add(_label(by_name[dep["name"]])), dep["name"])
            else:
                number = f" ({dep['major']}:{dep['minor']})" if dep["major"] else ""
                branch.add(Text(f"{dep['name']}{number}", style="dim"))

    drawn = []
    for info in infos:
        if info["name"] not in used:
            tree = Tree(_label(info))
            grow(tree, info["name"])
            drawn.append(tree)
    return _drawn(*drawn)


def _label(info: Mapping[str, Any]) -> Text:
    label = Text(info["name"], style="bold")
    label.append(f" ({info['major']}:{info['minor']})", style="cyan not bold")
    label.append(f" {_size(info['size_sectors'] * 512)}", style="not bold")
    for word, shown in (("read-only", info["readonly"]), ("no table", not info["live_table"])):
        if shown:
            label.append(f" {word}", style="not bold yellow")
    if info["suspended"]:
        label.append(" suspended", style="not bold red")
    if info.get("attached"):
        label.append(f" {info['attached']}", style="not bold green")
    return label


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    return table


# What rich makes of things: coloured on a terminal, plain into a pipe.
def _drawn(*things: Any) -> str:
    terminal = sys.stdout.isatty()
    console = Console(file=io.StringIO(), force_terminal=terminal, width=_WIDTH,
                      color_system="auto" if terminal else None,
                      no_color=bool(os.environ.get("NO_COLOR")))
    for thing in things:
        console.print(thing)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _latency(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, factor in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def _size(size: int) -> str:
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024:
            break
        value /= 1024
    return f"{size} B" if unit == "B" else f"{value:.4g} {unit}"


def _errors(count: int) -> Text:
    return Text(str(count), style="bold red" if count else "")
