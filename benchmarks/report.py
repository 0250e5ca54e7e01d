"""Turns the document of a run (what is written as JSON) into text, a chart and verdicts."""
from __future__ import annotations

from collections.abc import Sequence

from . import chart
from .promises import LIMITS, PROMISES
from .race import ratio

__all__ = ["headline", "judge", "markdown", "svg"]

# The reference of the ratio table and of the chart.
_REFERENCE = "file"
# The workloads that the chart shows, where they were measured.
_CHARTED = ("4k-randread-qd16", "4k-randwrite-qd16", "1M-read-qd4", "1M-write-qd4")


def judge(document: dict) -> list[dict]:
    """What was promised, with what was measured and whether it was met (None: not measured)."""
    verdicts = []
    for promise in PROMISES:
        trap = document["settings"]["copy_trap"] and promise.with_trap is not None
        wanted = promise.with_trap if trap else promise.at_least
        for workload in promise.workloads:
            results = document["workloads"].get(workload, {}).get("results", {})
            measured = None
            if promise.peer in results and promise.over in results:
                ours, theirs = results[promise.peer], results[promise.over]
                measured = round(ratio(ours["iops"], theirs["iops"]), 3)
            verdicts.append({
                "what": promise.peer, "over": promise.over, "workload": workload,
                "wanted": f">= {wanted:.2f}", "measured": measured,
                "met": None if measured is None else measured >= wanted,
            })
    for limit in LIMITS:
        task = document["tasks"].get(limit.task)
        measured = None if task is None else task["median"]
        verdicts.append({
            "what": limit.task, "over": "", "workload": task["title"] if task else "",
            "wanted": f"< {limit.seconds:g} s", "measured": measured,
            "met": None if measured is None else measured < limit.seconds,
        })
    return verdicts


def headline(document: dict) -> str:
    """The machine in one line."""
    machine, settings = document["machine"], document["settings"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['kernel']}, "
        f"nbdkit {machine['nbdkit']}, {settings['rounds']} rounds of {settings['seconds']:g} s"
    )


def markdown(document: dict, *, folded: bool = False) -> str:
    """The whole report; `folded` hides the long table behind a line to click, for a web page."""
    parts = [f"    {document['command']}", _conditions(document), _verdicts(document)]
    parts.append(_ratios(document))
    numbers = _numbers(document)
    if folded:
        numbers = f"<details><summary>Every number</summary>\n\n{numbers}\n\n</details>"
    parts.append(numbers)
    return "\n\n".join(part for part in parts if part) + "\n"


# Everything that has to be known to make sense of the numbers.
def _conditions(document: dict) -> str:
    machine, settings = document["machine"], document["settings"]
    places = ", ".join(f"{size} at page+{at}" for size, at in settings["page_offsets"].items())
    width = settings["copy_width"]
    trap = f"to 1..{width - 1} bytes above the source in a page" if width else "none"
    trap += ", which is where large buffers are" if settings["copy_trap"] else ""
    lines = [
        f"- machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory']},"
        f" {machine['kernel']}, {machine['distribution']}",
        f"- versions: nbdkit {machine['nbdkit']} (its Python {machine['plugin_python']}),"
        f" fio {machine['fio']}, qemu-nbd {machine['qemu-nbd']}, Python {machine['python']}",
        f"- devices of {settings['size'] >> 20} MiB, backing files on {settings['file_system']},"
        " one Unix socket each; nbdkit with one thread a connection unless said otherwise",
        f"- nbdkit's buffers: {places or 'unknown'}; slow copies: {trap}",
        f"- {settings['rounds']} rounds of {settings['seconds']:g} s, all servers in turns in each;"
        " ratios are medians of the rounds' ratios; load average"
        f" {settings['load_before']:.1f} before, {settings['load_after']:.1f} after",
    ]
    lines += [f"- left out: {name}: {why}" for name, why in document["absent"].items()]
    lines += [
        f"- broke: {name}: {workload}: {why}"
        for workload, entry in document["workloads"].items()
        for name, why in entry["failures"].items()
    ]
    return "\n".join(lines)


# What was promised beside what was measured.
def _verdicts(document: dict) -> str:
    words = {True: "met", False: "not met", None: "not measured"}
    rows = []
    for verdict in judge(document):
        over = f"{verdict['what']} / {verdict['over']}" if verdict["over"] else verdict["what"]
        measured = verdict["measured"]
        shown = "" if measured is None else f"{measured:.2f}" + ("" if verdict["over"] else " s")
        rows.append([over, verdict["workload"], verdict["wanted"], shown, words[verdict["met"]]])
    return _table(["promise", "on", "wanted", "measured", ""], rows, left=(0, 1))


# Rows of workloads, columns of peers: the reference's median, and everybody's ratio to it.
def _ratios(document: dict) -> str:
    names = [n for n in document["peers"] if n != _REFERENCE and _measured(document, n)]
    rows = []
    for entry in document["workloads"].values():
        results = entry["results"]
        base = results.get(_REFERENCE)
        row = [entry["title"], _speed(entry, base["median"]) if base else ""]
        for name in names:
            found = base and name in results
            row.append(f"{ratio(results[name]['iops'], base['iops']):.2f}" if found else "")
        rows.append(row)
    if not rows:
        return ""
    return _table(["", f"{_REFERENCE} (median)", *(f"/ {n}" for n in names)], rows)


# Whether a peer has any result.
def _measured(document: dict, name: str) -> bool:
    return any(name in entry["results"] for entry in document["workloads"].values())


# One row for each workload and peer.
def _numbers(document: dict) -> str:
    rows = []
    for entry in document["workloads"].values():
        for name, result in entry["results"].items():
            rows.append([
                entry["title"], document["peers"][name]["title"], _speed(entry, result["best"]),
                _speed(entry, result["median"]), f"{result['cpu_us']:.1f}",
                f"{result['p99_us']:.0f}",
            ])
    for task in document["tasks"].values():
        best, median = f"{task['best']:.2f} s", f"{task['median']:.2f} s"
        rows.append([task["title"], "dmpy", best, median, "", ""])
    heads = ["workload", "server", "best", "median", "server CPU us/request", "p99 us"]
    return _table(heads, rows, left=(0, 1))


# Requests a second as people say them: thousands of small ones, megabytes of large ones.
def _speed(entry: dict, iops: float) -> str:
    if entry["in_bytes"]:
        return f"{iops * entry['request_size'] / 1e6:,.0f} MB/s"
    return f"{iops / 1000:.1f}k/s"


# A table that reads well as it is and as Markdown.
def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    grid = [list(heads), *[list(row) for row in rows]]
    widths = [max(3, *(len(row[column]) for row in grid)) for column in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths))
        )
        return f"| {' | '.join(padded)} |"

    rule = (
        "-" * width if column in left else "-" * (width - 1) + ":"
        for column, width in enumerate(widths)
    )
    return "\n".join([line(grid[0]), f"| {' | '.join(rule)} |", *map(line, grid[1:])])


def svg(document: dict) -> str:
    """The chart: the workloads that the promises are about, or the first four there are."""
    entries = document["workloads"]
    chosen = [name for name in _CHARTED if name in entries] or list(entries)[:4]
    panels = []
    for name in chosen:
        entry, bars = entries[name], []
        base = entry["results"].get(_REFERENCE)
        for peer, result in entry["results"].items():
            known, text = document["peers"][peer], _speed(entry, result["median"])
            remark = f"{ratio(result['iops'], base['iops']):.2f}" if base else ""
            bars.append(
                chart.Bar(known["title"], result["median"], text, remark, known["ours"])
            )
        panels.append(chart.Panel(entry["title"], ("median", "ratio"), bars))
    return chart.draw(
        "dmpy beside other NBD servers", headline(document), panels,
        ("other servers", "dmpy; ratio: to nbdkit's file plugin, median of the rounds"),
    )
