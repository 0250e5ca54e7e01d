"""The timeline of a run on a terminal: a row a leg, throughput, what happened, the verdict."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dmpy.lab.record import Record, Sample
from dmpy.lab.timeline import STATES, lane, leg_state, rates, shown_legs, verdict_line

__all__ = ["timeline"]

_STYLES = {
    "in_sync": "green", "optimal": "green", "slow": "yellow", "unused": "dim", "spare": "dim green",
    "syncing": "cyan", "rebuilding": "cyan", "errors": "yellow", "degraded": "yellow",
    "dead": "red", "failed": "red", "off": "dim",
}
_BARS = "▁▂▃▄▅▆▇█"


def timeline(record: Record, *, width: int = 72) -> Group:
    """Draw a run.

    Args:
        record: of the run.
        width: columns of the time axis.
    """
    order = list(STATES)
    grid = Table.grid(padding=(0, 1))
    grid.add_row("", _axis(record, width))

    def row(label: str, state_of: Callable[[Sample], str]) -> None:
        # The worst state within a column is the one that shows.
        cells = [""] * width
        for begin, end, state in lane(record, state_of):
            for column in range(_column(record, begin, width), _column(record, end, width) + 1):
                if not cells[column] or order.index(state) > order.index(cells[column]):
                    cells[column] = state
        line = Text()
        for state in cells:
            line.append(STATES[state][0] if state else " ", _STYLES.get(state, ""))
        grid.add_row(label, line)

    row("array", lambda sample: sample.state)
    for name in shown_legs(record):
        row(f"leg {name}", leg_state(name))
    points = rates(record)
    for column, label in ((1, "read"), (2, "write")):
        spark, top = _spark([(point[0], point[column]) for point in points], record, width)
        grid.add_row(f"{label} {top / 1e6:.1f} MB/s", spark)
    used = [state for state in STATES if _is_there(record, state)]
    legend = Text("  ".join(f"{STATES[state][0]} {STATES[state][1]}" for state in used), "dim")
    happened = Table.grid(padding=(0, 2))
    for event in record.events:
        style = {"step": "bold", "client": "yellow", "array": "cyan"}.get(event.kind, "")
        happened.add_row(f"{event.time:8.3f} s", event.kind, Text(event.text, style))
    verdict = Text(verdict_line(record), "bold green" if record.ok else "bold red")
    title = Text(f"{record.scenario}, {record.variant}" if record.variant else record.scenario,
                 "bold")
    return Group(title, grid, legend, happened, verdict)


def _is_there(record: Record, state: str) -> bool:
    return any(
        state == sample.state or state in sample.legs.values()
        or state in sample.conditions.values()
        for sample in record.samples
    )


def _column(record: Record, second: float, width: int) -> int:
    return min(int(second / max(record.seconds, 1e-6) * width), width - 1)


def _axis(record: Record, width: int) -> Text:
    end = f"{record.seconds:.1f} s"
    return Text("0" + end.rjust(width - 1), "dim")


# The curve, and its top.
def _spark(
    points: list[tuple[float, float]], record: Record, width: int
) -> tuple[Text, float]:
    sums, counts = [0.0] * width, [0] * width
    for at, value in points:
        column = _column(record, at, width)
        sums[column] += value
        counts[column] += 1
    # A column without a sample shows what its neighbour does.
    values: list[float] = []
    for total, count in zip(sums, counts):
        values.append(total / count if count else values[-1] if values else 0.0)
    top = max(values, default=0.0)
    line = "".join(_BARS[min(int(value / top * 8), 7)] if value else " " for value in values)
    return Text(line), top
