"""What both drawings of a run need: stretches of one state, rates, and words for states."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from dmpy.lab.record import Record, Sample

__all__ = ["STATES", "Stretch", "lane", "leg_state", "rates", "shown_legs", "verdict_line"]

# State -> (letter for a terminal, in words), the best first.
STATES = {
    "in_sync": ("━", "in sync"),
    "optimal": ("━", "optimal"),
    "slow": ("~", "slow"),
    "spare": ("+", "spare"),
    "unused": ("·", "not in the array"),
    "syncing": ("▒", "syncing"),
    "rebuilding": ("▒", "being rebuilt"),
    "errors": ("!", "has errors"),
    "degraded": ("!", "degraded"),
    "dead": ("×", "does not answer"),
    "failed": ("×", "failed"),
    "off": (" ", "off"),
}


class Stretch(NamedTuple):
    """Seconds from `begin` to `end` in one state."""

    begin: float
    end: float
    state: str


def lane(record: Record, state_of: Callable[[Sample], str]) -> list[Stretch]:
    """Return the stretches of a state over a run, without gaps."""
    stretches: list[Stretch] = []
    samples = record.samples
    for sample, following in zip(samples, [*samples[1:], None]):
        end = following.time if following else max(record.seconds, sample.time)
        state = state_of(sample)
        if stretches and stretches[-1].state == state:
            stretches[-1] = stretches[-1]._replace(end=end)
        else:
            stretches.append(Stretch(sample.time, end, state))
    return stretches


def leg_state(name: str) -> Callable[[Sample], str]:
    """Return what tells a leg's state: the worse of what the array says and how the leg is."""
    order = list(STATES)

    def state(sample: Sample) -> str:
        return max(sample.legs[name], sample.conditions.get(name, "in_sync"), key=order.index)

    return state


def shown_legs(record: Record) -> list[str]:
    """Return the legs that are worth a row: all but those of which nobody says anything."""
    return [
        name for name in record.legs
        if any(sample.legs[name] not in ("unused", "off") or name in sample.conditions
               and sample.conditions[name] != "off" for sample in record.samples)
    ]


def rates(record: Record) -> list[tuple[float, float, float]]:
    """Return (second, bytes read a second, bytes written a second) between samples."""
    points = []
    for before, after in zip(record.samples, record.samples[1:]):
        seconds = max(after.time - before.time, 1e-6)
        points.append((after.time, (after.read - before.read) / seconds,
                       (after.written - before.written) / seconds))
    return points


def verdict_line(record: Record) -> str:
    """Return one line that says how a run went."""
    numbers = (f"{record.requests} requests, {_megabytes(record.acknowledged)} acknowledged, "
               f"{_megabytes(record.verified)} verified")
    if record.ok:
        return f"as expected: {numbers}"
    return f"not as expected: {'; '.join(record.complaints)} ({numbers})"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
