"""Bar charts as one self-contained SVG, readable in light and dark.

Drawn by hand, because a plotting library is a heavy dependency for a few rectangles. The chart
brings its own background and follows the reader's colour scheme.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

__all__ = ["Bar", "Panel", "draw"]


@dataclass(frozen=True)
class Bar:
    """One bar: its label, its length, the words for it, a remark, and whether it is dmpy's."""

    label: str
    value: float
    text: str
    remark: str = ""
    ours: bool = False


@dataclass(frozen=True)
class Panel:
    """One group of bars with a scale of their own, and heads for their words and remarks."""

    title: str
    heads: tuple[str, str]
    bars: Sequence[Bar]


_STYLE = """
svg { font: 12px system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif; }
.back { fill: #ffffff; stroke: #d5dae1; } .text { fill: #1f2733; } .dim { fill: #667080; }
.ours { fill: #2f6fde; } .other { fill: #aab3c0; } .axis { stroke: #c3cad4; }
.mark { stroke: #8a94a3; stroke-dasharray: 2 3; }
.title { font-size: 17px; font-weight: 600; } .panel { font-size: 13px; font-weight: 600; }
@media (prefers-color-scheme: dark) {
.back { fill: #151a21; stroke: #303844; } .text { fill: #e4e9f0; } .dim { fill: #98a2b1; }
.ours { fill: #5b94f5; } .other { fill: #566172; } .axis { stroke: #3a4350; }
.mark { stroke: #7d8898; }
}
"""

_WIDTH, _MARGIN, _GAP = 960, 24, 36
_LABEL, _TEXT, _REMARK = 186, 76, 42
_HEAD, _BAR, _STEP, _FOOT = 84, 13, 19, 30


def draw(title: str, note: str, panels: Sequence[Panel], keys: tuple[str, str]) -> str:
    """The SVG text of `panels`, two beside each other.

    Args:
        title: over everything.
        note: one line under the title, dim: the machine, say.
        keys: what the bars that are not ours and those that are ours are, for the key.
    """
    column = (_WIDTH - 2 * _MARGIN - _GAP) // 2
    parts, top = [], _HEAD
    for row in range(0, len(panels), 2):
        pair = panels[row : row + 2]
        for place, panel in enumerate(pair):
            parts += _panel(panel, _MARGIN + place * (column + _GAP), top, column)
        top += 44 + _STEP * max(len(panel.bars) for panel in pair)
    height = top + _FOOT
    frame = (
        f'<rect class="back" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{height - 1}" rx="8"/>'
    )
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}"'
        f' viewBox="0 0 {_WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title>", f"<style>{_STYLE}</style>", frame,
        _words(title, _MARGIN, 32, "text title"), _words(note, _MARGIN, 52, "dim"),
        *parts, *_key(keys, height - 18), "</svg>", "",
    ])


# A line of text; `anchor` says which end of it is at x.
def _words(text: str, x: float, y: float, style: str, anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


# The bars of one panel, drawn over a line at the first bar's value: the reference.
def _panel(panel: Panel, left: int, top: int, width: int) -> list[str]:
    start, right = left + _LABEL, left + width
    room = width - _LABEL - _TEXT - _REMARK
    scale = room / (max((bar.value for bar in panel.bars), default=0) or 1)
    bottom = top + 16 + _STEP * len(panel.bars)
    parts = [
        _words(panel.title, left, top + 6, "text panel"),
        _words(panel.heads[0], right - _REMARK, top + 6, "dim", "end"),
        _words(panel.heads[1], right, top + 6, "dim", "end"),
        f'<path class="axis" d="M{start} {top + 16}V{bottom}"/>',
    ]
    if panel.bars:
        at = start + scale * panel.bars[0].value
        parts.append(f'<path class="mark" d="M{at:.1f} {top + 16}V{bottom}"/>')
    for row, bar in enumerate(panel.bars):
        y = top + 19 + row * _STEP
        style = "ours" if bar.ours else "other"
        length = max(1.0, scale * bar.value)
        parts += [
            _words(bar.label, start - 8, y + 10.5, "text", "end"),
            f'<rect class="{style}" x="{start}" y="{y}" width="{length:.1f}" height="{_BAR}"'
            ' rx="2"/>',
            _words(bar.text, right - _REMARK, y + 10.5, "text", "end"),
            _words(bar.remark, right, y + 10.5, "dim", "end"),
        ]
    return parts


# What the two colours mean, at the foot of the chart.
def _key(keys: tuple[str, str], y: int) -> list[str]:
    parts, x = [], _MARGIN
    for text, style in zip(keys, ("other", "ours")):
        parts += [f'<rect class="{style}" x="{x}" y="{y - 10}" width="12" height="12" rx="2"/>',
                  _words(text, x + 18, y, "dim")]
        x += 40 + 7 * len(text)
    return parts
