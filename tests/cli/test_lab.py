"""`dmpy lab`."""

from __future__ import annotations

import json

import pytest

from tests import needs

QUICK = """
title = "a leg of two fails"
legs = { count = 2, size = "256K" }
[[device]]
name = "s"
table = "0 1024 striped 2 8 a 0 b 0"
[workload]
over = "direct"
requests = 100
rate = 1000
[[step]]
do = "fail"
leg = "b"
after = 20
[expect]
data = "unreadable"
errors = "some"
final = "failed"
"""


@pytest.fixture
def quick(tmp_path):
    path = tmp_path / "quick.toml"
    path.write_text(QUICK)
    return path


def test_the_scenarios_are_listed(own_dmpy):
    out = own_dmpy.ok("lab", "--list").out
    assert "striped-loses-a-leg  " in out
    listed = own_dmpy.ok("lab", "--list", "--json").json()
    assert {entry["name"] for entry in listed} == {line.split()[0] for line in out.splitlines()}
    assert all(entry["variants"] >= 1 for entry in listed)


def test_a_scenario_runs_and_shows_its_timeline(own_dmpy, quick):
    out = own_dmpy.ok("lab", quick, "--seed", "7").out
    assert "leg b fails" in out and "as expected: " in out
    assert out.endswith("1 of 1 as expected, --seed 7\n")
    assert not (own_dmpy.runtime / "control.sock").exists()


def test_quiet_prints_the_verdict_only(own_dmpy, quick):
    lines = own_dmpy.ok("lab", quick, "-q").out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("quick: as expected: ")


def test_json_has_everything(own_dmpy, quick):
    tree = own_dmpy.ok("lab", quick, "--json", "--seed", "1").json()
    assert (tree["ok"], tree["seed"], tree["scenario"]) == (True, 1, "quick")
    assert tree["runs"][0]["events"] and tree["runs"][0]["samples"]


def test_the_page_is_written(own_dmpy, quick, tmp_path):
    own_dmpy.ok("lab", quick, "--html", tmp_path / "page.html", "-q")
    assert "<svg" in (tmp_path / "page.html").read_text()


def test_the_exit_status_says_that_it_was_not_as_expected(own_dmpy, quick):
    quick.write_text(QUICK.replace('"failed"', '"optimal"'))
    result = own_dmpy("lab", quick, "--json")
    assert result.status == 1
    assert json.loads(result.out)["ok"] is False


def test_over_nbd_in_a_process_of_its_own(own_dmpy, quick):
    needs.module("nbd", package="python3-libnbd")
    quick.write_text(QUICK.replace('"direct"', '"nbd"'))
    done = own_dmpy.process("lab", quick, "-q")
    assert (done.returncode, done.stderr) == (0, ""), done


def test_variants_can_be_picked(own_dmpy, quick):
    quick.write_text(QUICK.replace('leg = "b"', 'leg = "{one}"')
                     + '[sweep]\none = ["a", "b"]\n')
    lines = own_dmpy.ok("lab", quick, "-q", "--only", "one a").out.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == ["quick, one a"]
    assert own_dmpy.refused("lab", quick, "--only", "zebra") \
        == "scenario quick has no variant with zebra in its title"


def test_what_cannot_be_run_is_one_sentence(own_dmpy, quick, tmp_path):
    assert own_dmpy.refused("lab", "nosuch").startswith("scenario nosuch is unknown")
    assert "argument SCENARIO is missing" in own_dmpy.refused("lab", status=2)
    assert "exclude each other" in own_dmpy.refused("lab", "--list", "x", status=2)
    own_dmpy.refused("lab", quick, "--html", tmp_path / "no" / "page.html")
    quick.write_text(QUICK.replace("striped", "nosuch"))
    assert own_dmpy.refused("lab", quick) \
        == "scenario quick needs the target nosuch, which is not there"
    quick.write_text("title = 3")
    assert own_dmpy.refused("lab", quick).endswith("title must be a text (got 3)")
