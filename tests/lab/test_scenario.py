"""Scenarios as files: what is read, and one sentence for each that is refused."""

from __future__ import annotations

import pytest

from dmpy.lab import ScenarioError, find, parse, shipped
from dmpy.lab.scenario import FOLDER

GOOD = """
title = "t"
legs = { count = 3, size = "1M", log = "64K" }
[[device]]
name = "d"
table = "0 128 linear a 0"
"""


def refused(text):
    with pytest.raises(ScenarioError) as caught:
        parse(text, "s")
    sentence = str(caught.value)
    assert sentence.startswith("s: ")
    assert "\n" not in sentence
    return sentence.removeprefix("s: ")


def step(line):
    return refused(f"{GOOD}[[step]]\n{line}\n").removeprefix("step 1")


def test_legs_have_letters_or_names():
    scenario = parse(GOOD)
    assert scenario.legs == {"a": 1 << 20, "b": 1 << 20, "c": 1 << 20, "log": 64 << 10}
    assert scenario.target_types == {"linear"}


def test_everything_has_a_default():
    scenario = parse(GOOD)
    assert scenario.workload.over == "nbd"
    assert [variant.title for variant in scenario.variants] == [""]
    assert scenario.variants[0].expect.data == "intact"
    assert not scenario.volatile


def test_legs_are_volatile_where_the_power_is_cut():
    assert parse(GOOD + '[[step]]\ndo = "cut-power"\n').volatile
    assert not parse("volatile = false\n" + GOOD + '[[step]]\ndo = "cut-power"\n').volatile


def test_a_sweep_makes_a_variant_of_every_choice():
    scenario = parse(GOOD.replace("linear", "{kind}") + """
        [sweep]
        kind = ["linear", "striped"]
        lose = { of = ["a", "b", "c"], count = 2 }
        [[step]]
        do = "fail"
        legs = ["{lose}", "log"]
    """)
    assert len(scenario.variants) == 6
    assert scenario.variants[3].title == "kind striped, lose a b"
    assert scenario.variants[3].steps[0].legs == ("a", "b", "log")
    assert scenario.variants[3].devices == (("d", "0 128 striped a 0"),)


def test_sets_of_legs_can_be_listed():
    scenario = parse(GOOD + '[sweep]\nlose = [["a", "b"], ["c"]]\n'
                            '[[step]]\ndo = "fail"\nleg = "{lose}"\n')
    assert [variant.steps[0].legs for variant in scenario.variants] == [("a", "b"), ("c",)]


@pytest.mark.parametrize(("text", "sentence"), [
    ("title = ", "not TOML: Invalid value (at end of document)"),
    ("", "title is missing"),
    (GOOD + "titel = 1", "device 1"),
    ("titel = 'x'\n" + GOOD, "titel is unknown (did you mean title)"),
    ("timeout = 0\n" + GOOD, "timeout must be from 0.1 to 600 (got 0)"),
    (GOOD.replace('"t"', "3"), "title must be a text (got 3)"),
    (GOOD.replace("count = 3", "count = 30"), "legs: count must be from 0 to 26 (got 30)"),
    (GOOD.replace('"1M"', '"1000"'), "legs: a must be whole sectors, from 64K to 1G (got 1000 "
                                     "bytes)"),
    (GOOD.replace('"1M"', '"many"'), "legs: size: "),
    (GOOD.replace('name = "d"', ""), "device 1: name is missing"),
    (GOOD.replace("table =", "#"), "device 1: table is missing, or md, and not both"),
    (GOOD.replace("table =", "md = { level = '7', members = ['a'] } #"),
     "device 1: md: level must be one of 0, 1, 4, 5, 6, 10 (got 7)"),
    (GOOD.replace("table =", "md = { level = '5', members = ['z'] } #"),
     "device 1: md: leg z is unknown (there are a, b, c, log)"),
    (GOOD.replace("table =", "md = { level = '5' } #"), "device 1: md: members is missing"),
    (GOOD.replace("linear", "{x}"), "device 1: table: braces name what is swept over, nothing "
                                    "(got 'x')"),
    (GOOD + "[workload]\nover = 'air'", "workload: over must be one of nbd, direct (got air)"),
    (GOOD + "[workload]\nreads = 2", "workload: reads must be from 0 to 1 (got 2)"),
    (GOOD + "[workload]\nblock = '700'", "workload: block must be whole sectors, at most 4M "
                                         "(got 700)"),
    (GOOD + "[workload]\nclients = true", "workload: clients must be a whole number (got True)"),
    (GOOD + "[workload]\nrate = -1", "workload: rate must not be negative (got -1.0)"),
    (GOOD + "[expect]\nfinal = 'fine'", "expect: final must be one of optimal, degraded, failed, "
                                        "any (got fine)"),
    (GOOD + "[sweep]\nx = 3", "sweep: x must be a list, or a table of `of` and `count`"),
    (GOOD + "[sweep]\nx = { count = 5 }", "sweep: x: count must be from 1 to 4 (got 5)"),
    (GOOD + "[sweep]\nx = { of = ['z'] }", "sweep: x: leg z is unknown (there are a, b, c, log)"),
])
def test_what_is_wrong_is_one_sentence(text, sentence):
    assert refused(text).startswith(sentence)


@pytest.mark.parametrize(("line", "sentence"), [
    ("after = 3", ": do is missing"),
    ("do = 'explode'", ": explode is unknown (known are fail, "),
    ("do = 'fial'", ": fial is unknown (did you mean fail)"),
    ("do = 'fail'", ", fail: leg is missing"),
    ("do = 'fail'\nleg = 'z'", ", fail: leg z is unknown (there are a, b, c, log)"),
    ("do = 'fail'\nleg = 'a'\nwhen = 'late'", ", fail: when must be one of optimal, "),
    ("do = 'wait'", ", wait: nothing to wait for (after, progress, status, time, when)"),
    ("do = 'wait'\nprogress = 1.5", ", wait: progress must be from 0 to 1 (got 1.5)"),
    ("do = 'corrupt'\nleg = 'a'", ", corrupt: length is missing"),
    ("do = 'corrupt'\nleg = 'a'\noffset = '1M'\nlength = 1",
     ", corrupt: leg a has 1048576 bytes, the range ends at 1048577"),
    ("do = 'errors'\nleg = 'a'\noffset = 0\nlength = 1\nops = ['chew']",
     ", errors: ops must be out of read, write, "),
    ("do = 'errors'\nleg = 'a'\noffset = 0\nlength = 1\ncount = 7",
     ", errors: count must be 1, or left out for ever (got 7)"),
    ("do = 'cut-power'\nkeep = 'half'", ", cut-power: keep must be one of some, all, none, torn"),
    ("do = 'pause'\nleg = 'a'", ", pause: leg is unknown"),
])
def test_what_is_wrong_with_a_step_is_one_sentence(line, sentence):
    assert step(line).startswith(sentence)


def test_scenarios_are_found_by_name_and_by_path(tmp_path):
    assert find("striped-loses-a-leg").name == "striped-loses-a-leg"
    (tmp_path / "mine.toml").write_text(GOOD)
    assert find(str(tmp_path / "mine.toml")).name == "mine"
    with pytest.raises(ScenarioError, match="did you mean striped-loses-a-leg"):
        find("striped-loses-leg")
    with pytest.raises(FileNotFoundError):
        find(str(tmp_path / "not.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ScenarioError, match="not a text in UTF-8"):
        find(str(tmp_path / "binary.toml"))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_each_scenario_that_is_shipped_can_be_run(path):
    scenario = find(path.stem)
    assert scenario.description
    assert path.stem in shipped()
