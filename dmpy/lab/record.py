"""What is kept of a run, and the verdict over it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from dmpy.lab.model import Damage
from dmpy.lab.scenario import Expectation

__all__ = ["Event", "Record", "Sample", "judge"]


class Sample(NamedTuple):
    """How things are at one moment.

    Attributes:
        time: seconds from the start.
        legs: name -> "in_sync", "rebuilding", "failed", "unused" or "off".
        conditions: name -> what is physically the matter with a leg; only where something is.
        state: of the array, as `Observation.state` has it.
        action: in the background.
        progress: of that, 0 to 1.
        read, written: bytes since the start.
        errors: requests that failed, since the start.
    """

    time: float
    legs: dict[str, str]
    conditions: dict[str, str]
    state: str
    action: str
    progress: float
    read: int
    written: int
    errors: int


class Event(NamedTuple):
    """Something that was done or that happened.

    `kind` is "step" (the scenario did it), "array" (the array said so), "client" (requests
    failed) or "lab".
    """

    time: float
    kind: str
    text: str
    legs: tuple[str, ...] = ()


@dataclass
class Record:
    """A run of one variant.

    Attributes:
        damages: the first few sectors that hold what they must not; counts has all, by kind.
        unreadable: bytes that the last look could not read.
        final: state of the array at the end.
        complaints: why the verdict is bad; empty for a good one.
    """

    scenario: str
    variant: str
    seed: int
    legs: list[str]
    samples: list[Sample] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    seconds: float = 0.0
    requests: int = 0
    acknowledged: int = 0
    verified: int = 0
    errors: int = 0
    damages: list[Damage] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    unreadable: int = 0
    mismatches: int = 0
    final: str = "off"
    broken: str = ""
    complaints: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything went as the scenario expects."""
        return not self.complaints

    @property
    def degraded(self) -> list[tuple[float, float]]:
        """When the array was degraded or worse: (from, to) in seconds."""
        periods: list[tuple[float, float]] = []
        since: float | None = None
        # Events come from every look at the array, samples only from some.
        for event in self.events:
            if event.kind != "array" or not event.text.startswith("array "):
                continue
            if event.text in ("array degraded", "array failed"):
                since = event.time if since is None else since
            elif since is not None:
                periods.append((since, event.time))
                since = None
        if since is not None:
            periods.append((since, max(since, self.seconds)))
        return periods

    @property
    def actions(self) -> list[str]:
        """What the array did in the background, each turn once."""
        seen = [""]
        for event in self.events:
            if event.kind == "array" and event.text.startswith("action "):
                seen.append(event.text.removeprefix("action "))
        return [action for action in seen if action not in ("", "idle")]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON has it."""
        tree = asdict(self)
        for key, kind in (("samples", Sample), ("events", Event), ("damages", Damage)):
            tree[key] = [dict(zip(kind._fields, one)) for one in tree[key]]
        tree["degraded"] = [list(period) for period in self.degraded]
        tree["actions"] = self.actions
        tree["ok"] = self.ok
        return tree


def judge(record: Record, expect: Expectation) -> list[str]:
    """Return what is not as expected, a sentence each."""
    complaints = [record.broken] if record.broken else []
    complaints += _judge_data(record, expect)
    if expect.errors == "none" and record.errors:
        complaints.append(f"{record.errors} requests failed (expected none)")
    if expect.errors == "some" and not record.errors:
        complaints.append("no request failed (expected some)")
    if expect.degraded is not None and bool(record.degraded) != expect.degraded:
        was = "never" if expect.degraded else "at some time"
        wanted = "some time" if expect.degraded else "never"
        complaints.append(f"the array was {was} degraded (expected {wanted})")
    if expect.final != "any" and record.final != expect.final:
        complaints.append(f"the array ends {record.final} (expected {expect.final})")
    rest = iter(record.actions)
    missing = [action for action in expect.actions if action not in rest]
    if missing:
        did = ", ".join(record.actions) or "nothing"
        complaints.append(f"the array never did {missing[0]} in its turn (it did {did})")
    if expect.mismatches == "none" and record.mismatches:
        complaints.append(f"the last scrub found {record.mismatches} sectors that do not match "
                          "(expected none)")
    if expect.mismatches == "some" and not record.mismatches:
        complaints.append("the scrub found nothing (expected sectors that do not match)")
    return complaints


def _judge_data(record: Record, expect: Expectation) -> list[str]:
    damaged = sum(record.counts.values())
    if expect.data == "damaged":
        return [] if damaged else ["no damage was found (expected lost or wrong sectors)"]
    complaints = []
    if damaged:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(record.counts.items()))
        first = record.damages[0]
        complaints.append(f"sectors are damaged: {kinds}; sector {first.sector} holds "
                          f"{first.found} (expected {first.allowed})")
    if expect.data == "intact" and record.unreadable:
        complaints.append(f"{record.unreadable} bytes cannot be read (expected none)")
    if expect.data == "unreadable" and not record.unreadable:
        complaints.append("everything can be read (expected some that cannot)")
    return complaints
