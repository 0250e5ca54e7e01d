"""The timeline of a scenario as one HTML file that needs nothing else: the runs drawn in SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dmpy.lab.record import Event, Record, Sample
from dmpy.lab.scenario import Scenario
from dmpy.lab.timeline import STATES, Stretch, lane, leg_state, rates, shown_legs, verdict_line

__all__ = ["page"]

# Of the drawing, in its own units.
_LEFT, _RIGHT, _WIDTH = 96, 16, 1000
_LANE, _GAP, _CURVE = 20, 6, 84
_TOP = 30

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1d2430; --dim: #667080;
  --line: #d5dae2; --card: #f6f7f9; --good: #2f8f5b; --sync: #2b78c5; --warn: #c98a00;
  --bad: #c63b3b; --none: #8a94a3; --read: #2b78c5; --write: #c2611f; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181f; --ink: #e4e8ee; --dim: #98a2b1;
  --line: #333b48; --card: #1c222b; --good: #3fa873; --sync: #4f9be6; --warn: #d9a032;
  --bad: #e05d5d; --none: #48515f; --read: #5aa7f0; --write: #e8894a; } }
body { background: var(--paper); color: var(--ink); margin: 2rem auto; padding: 0 1rem;
  max-width: 70rem; font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 0 0 .3rem; }
p { margin: .3rem 0 .8rem; } .dim { color: var(--dim); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 1rem; margin: 1rem 0; }
.verdict { font-weight: 600; } .ok { color: var(--good); } .not { color: var(--bad); }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg .dim { fill: var(--dim); } svg .on { fill: #fff; font-size: 11px; }
.in_sync, .optimal { fill: var(--good); } .rebuilding, .syncing { fill: var(--sync); }
.slow, .errors, .degraded { fill: var(--warn); } .dead, .failed { fill: var(--bad); }
.unused, .spare { fill: var(--none); }
.off { fill: none; stroke: var(--line); stroke-dasharray: 3 3; }
.grid { stroke: var(--line); } .mark { stroke: var(--dim); stroke-dasharray: 2 3; }
.knob { fill: var(--ink); } svg .number { fill: var(--paper); font-size: 10px; }
.read, .write { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.read { stroke: var(--read); } .write { stroke: var(--write); }
.progress { fill: var(--sync); opacity: .35; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left;
  padding: .15rem .8rem .15rem 0; vertical-align: top; } td.t { white-space: nowrap;
  font-variant-numeric: tabular-nums; } tr + tr td { border-top: 1px solid var(--line); }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .3em 0 1em; }
details summary { cursor: pointer; color: var(--dim); margin-top: .6rem; }
"""
_KEYS = {"in sync": "--good", "resync, rebuild": "--sync", "slow, errors, degraded": "--warn",
         "failed, does not answer": "--bad", "spare, not in the array": "--none",
         "read": "--read", "write": "--write"}


def page(scenario: Scenario, records: Sequence[Record]) -> str:
    """Return the page of a scenario that was run."""
    good = sum(record.ok for record in records)
    word = "ok" if good == len(records) else "not"
    total = f"{good} of {len(records)} runs went as expected" if len(records) > 1 else (
        "it went as expected" if good else "it did not go as expected")
    keys = "".join(f'<span class="key" style="background:var({color})"></span>{escape(text)}'
                   for text, color in _KEYS.items())
    return "\n".join([
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(scenario.title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(scenario.title)}</h1>",
        f'<p class="dim">dmpy lab {escape(scenario.name)}</p>',
        f"<p>{escape(scenario.description)}</p>",
        f'<p class="verdict {word}">{total}</p>',
        f'<p class="dim">{keys}</p>',
        *(_section(record) for record in records),
        "</body></html>",
        "",
    ])


def _section(record: Record) -> str:
    word = "ok" if record.ok else "not"
    title = record.variant or record.scenario
    marked = _marked(record)
    numbers = {id(event): number for number, event in enumerate(marked, 1)}
    rows = "".join(
        f'<tr><td class="t">{numbers.get(id(event), "")}</td>'
        f'<td class="t">{event.time:.3f} s</td><td>{event.kind}</td>'
        f"<td>{escape(event.text)}</td></tr>"
        for event in record.events)
    damages = "".join(
        f"<tr><td>sector {damage.sector}</td><td>{damage.kind}</td>"
        f"<td>{escape(damage.found)}</td><td>expected {escape(damage.allowed)}</td></tr>"
        for damage in record.damages)
    periods = ", ".join(f"{begin:.2f} to {end:.2f} s" for begin, end in record.degraded)
    facts = f"Degraded: {periods or 'never'}. In the background: " \
            f"{', '.join(record.actions) or 'nothing'}. Seed {record.seed}."
    return (
        f'<section><h2>{escape(title)}</h2><p class="verdict {word}">'
        f"{escape(verdict_line(record))}</p>{_drawing(record, marked)}"
        f'<p class="dim">{escape(facts)}</p>'
        f"{f'<table>{damages}</table>' if damages else ''}"
        f"<details open><summary>What happened</summary><table>{rows}</table></details></section>")


# The events that get a number in the drawing: what the scenario did, and failing requests.
def _marked(record: Record) -> list[Event]:
    return [event for event in record.events if event.kind in ("step", "client")]


def _drawing(record: Record, marked: list[Event]) -> str:
    span = max(record.seconds, 1e-3)
    lanes = ["array", "progress", *shown_legs(record)]
    if not any(map(_works, record.samples)):
        lanes.remove("progress")
    height = _TOP + len(lanes) * (_LANE + _GAP) + _GAP + _CURVE + 28
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="timeline">']

    def x(second: float) -> float:
        return round(_LEFT + second / span * (_WIDTH - _LEFT - _RIGHT), 1)

    bottom = height - 22
    for second in _ticks(span):
        parts.append(f'<line class="grid" x1="{x(second)}" x2="{x(second)}" y1="{_TOP - 4}" '
                     f'y2="{bottom}"/><text class="dim" x="{x(second)}" y="{height - 6}" '
                     f'text-anchor="middle">{second:g} s</text>')
    for index, name in enumerate(lanes):
        y = _TOP + index * (_LANE + _GAP)
        label = name if name in ("array", "progress") else f"leg {name}"
        parts.append(f'<text x="{_LEFT - 10}" y="{y + 14}" text-anchor="end">{escape(label)}'
                     "</text>")
        if name == "progress":
            parts.append(_progress(record, x, y + _LANE))
            continue
        state_of = (lambda sample: sample.state) if name == "array" else leg_state(name)
        parts += [_block(stretch, x, y) for stretch in lane(record, state_of)]
    parts += _curves(record, x, bottom)
    parts += _marks(marked, x, bottom)
    parts.append("</svg>")
    return "".join(parts)


def _block(stretch: Stretch, x, y: float) -> str:
    begin, end = x(stretch.begin), x(stretch.end)
    words = STATES[stretch.state][1]
    width = max(end - begin, 1.5)
    label = ""
    if width > 7 * len(words) and stretch.state != "off":
        label = f'<text class="on" x="{begin + 6}" y="{y + 14}">{words}</text>'
    return (f'<g><title>{words}, {stretch.begin:.2f} to {stretch.end:.2f} s</title>'
            f'<rect class="{stretch.state}" x="{begin}" y="{y}" width="{width:.1f}" '
            f'height="{_LANE}" rx="3"/>{label}</g>')


# Whether something goes on in the background.
def _works(sample: Sample) -> bool:
    return sample.action not in ("idle", "frozen")


# How far the background work is: a slope for each piece of it, over the line of the row's foot.
def _progress(record: Record, x, foot: float) -> str:
    parts = [f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{foot}" y2="{foot}"/>']
    for begin, end, action in lane(record, lambda sample: sample.action * _works(sample)):
        if not action:
            continue
        inside = [s for s in record.samples if begin <= s.time < end]
        points = [(x(s.time), foot - s.progress * _LANE) for s in inside]
        points.append((max(x(end), points[0][0] + 2), points[-1][1]))
        path = " ".join(f"{px},{py:.1f}" for px, py in points)
        parts.append(f'<g><title>{escape(action)}, {begin:.2f} to {end:.2f} s</title>'
                     f'<polygon class="progress" points="{points[0][0]},{foot} {path} '
                     f'{points[-1][0]},{foot}"/><text x="{points[0][0] + 6}" y="{foot - 6}">'
                     f"{escape(action)}</text></g>")
    return "".join(parts)


def _curves(record: Record, x, bottom: float) -> list[str]:
    points = rates(record)
    top = max((max(read, written) for _, read, written in points), default=0.0) or 1.0
    parts = [f'<text x="{_LEFT - 10}" y="{bottom - _CURVE + 10}" text-anchor="end" class="dim">'
             f"{top / 1e6:.1f} MB/s</text>",
             f'<text x="{_LEFT - 10}" y="{bottom}" text-anchor="end" class="dim">0</text>',
             f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" '
             f'y2="{bottom}"/>']
    for column, name in ((1, "read"), (2, "write")):
        line = " ".join(f"{x(point[0])},{bottom - point[column] / top * (_CURVE - 8):.1f}"
                        for point in points)
        parts.append(f'<polyline class="{name}" points="{line}"><title>{name}</title></polyline>')
    return parts


def _marks(marked: list[Event], x, bottom: float) -> list[str]:
    parts = []
    last = -100.0
    for number, event in enumerate(marked, 1):
        place = x(event.time)
        parts.append(f'<line class="mark" x1="{place}" x2="{place}" y1="18" y2="{bottom}"/>')
        # Numbers that would lie on each other move to the right.
        last = max(place, last + 17)
        parts.append(f'<g><title>{escape(event.text)}</title><circle class="knob" cx="{last}" '
                     f'cy="11" r="8"/><text class="number" x="{last}" y="14.5" '
                     f'text-anchor="middle">{number}</text></g>')
    return parts


# Round seconds, about eight of them.
def _ticks(span: float) -> list[float]:
    step = next((s for s in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if span / s <= 9), 200)
    return [round(n * step, 3) for n in range(int(span / step) + 1)]
