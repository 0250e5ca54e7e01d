"""The timeline as a page and on a terminal."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from rich.console import Console

from dmpy.lab import Event, Record, Sample, parse
from dmpy.lab.model import Damage
from dmpy.lab.page import page
from dmpy.lab.text import timeline
from dmpy.lab.timeline import Stretch, lane, rates, shown_legs


def sample(time, b="in_sync", state="optimal", action="idle", progress=1.0, **more):
    return Sample(time, {"a": "in_sync", "b": b, "log": "unused"}, more.get("conditions", {}),
                  state, action, progress, int(time * 1e6), int(time * 2e6), 0)


@pytest.fixture
def record():
    record = Record("test", "lose b & <c>", 7, ["a", "b", "log"], seconds=1.0, requests=10,
                    acknowledged=2_000_000, verified=3_000_000)
    record.samples = [
        sample(0.0), sample(0.2, conditions={"b": "slow"}),
        sample(0.4, "failed", "degraded", conditions={"b": "dead"}),
        sample(0.6, "rebuilding", "degraded", "recover", 0.1),
        sample(0.8, "rebuilding", "degraded", "recover", 0.9), sample(0.9),
    ]
    record.events = [
        Event(0.3, "step", "leg b fails <b>", ("b",)), Event(0.4, "array", "array degraded"),
        Event(0.55, "array", "action recover"),
        Event(0.9, "array", "array optimal"), Event(0.6, "client", "write failed: no & never"),
    ]
    return record


SCENARIO = parse('title = "A & <B>"\ndescription = "d"\nlegs = { count = 2, size = "1M" }\n'
                 '[[device]]\nname = "d"\ntable = "0 8 linear a 0"')


def drawn(record):
    out = io.StringIO()
    Console(file=out, width=200).print(timeline(record, width=40))
    return out.getvalue()


def test_lanes_have_no_gaps(record):
    stretches = lane(record, lambda one: one.state)
    assert stretches == [Stretch(0.0, 0.4, "optimal"), Stretch(0.4, 0.9, "degraded"),
                         Stretch(0.9, 1.0, "optimal")]
    assert record.degraded == [(0.4, 0.9)]
    assert record.actions == ["recover"]


def test_legs_that_nobody_speaks_of_have_no_row(record):
    assert shown_legs(record) == ["a", "b"]


def test_rates_are_between_samples(record):
    assert rates(record)[0] == (0.2, pytest.approx(1e6), pytest.approx(2e6))


def test_the_terminal_shows_lanes_events_and_verdict(record):
    lines = drawn(record).splitlines()
    assert lines[0].rstrip() == "test, lose b & <c>"
    leg_b = next(line for line in lines if line.startswith("leg b"))
    assert re.search(r"━+~+×+▒+━+", leg_b)
    assert any("0.300 s  step" in line and "leg b fails <b>" in line for line in lines)
    assert lines[-1].rstrip() == "as expected: 10 requests, 2.0 MB acknowledged, 3.0 MB verified"
    record.complaints = ["the sky fell"]
    assert "not as expected: the sky fell (10 requests" in drawn(record)


def test_the_page_is_one_file_whose_drawing_is_well_formed(record):
    record.damages = [Damage(3, "lost", "write 1", "write 2")]
    text = page(SCENARIO, [record, record])
    assert "http" not in text and "<script" not in text
    assert "A &amp; &lt;B&gt;" in text and "lose b &amp; &lt;c&gt;" in text
    assert "leg b fails &lt;b&gt;" in text and "sector 3" in text
    assert "prefers-color-scheme: dark" in text
    HTMLParser(convert_charrefs=True).feed(text)
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 2
    tree = ElementTree.fromstring(drawings[0])
    kinds = {rect.get("class") for rect in tree.iter("rect")}
    assert kinds == {"optimal", "degraded", "in_sync", "slow", "failed", "rebuilding"}
    assert [line.get("class") for line in tree.iter("polyline")] == ["read", "write"]
    assert len(list(tree.iter("polygon"))) == 1
    assert [circle.tag for circle in tree.iter("circle")] == ["circle"] * 2


def test_a_run_that_never_began_can_be_drawn():
    empty = Record("test", "", 0, ["a"])
    empty.samples = [Sample(0.0, {"a": "off"}, {}, "off", "idle", 1.0, 0, 0, 0)]
    empty.complaints = ["the array was not built, see the events"]
    ElementTree.fromstring(re.search("<svg.*</svg>", page(SCENARIO, [empty]), re.DOTALL)[0])
    assert "not as expected" in drawn(empty)
