"""Runs over a mirror of two legs: each injection, and verdicts that have to be bad."""

from __future__ import annotations

import json

import pytest

from dmpy.lab import Lab, engine, find, parse
from dmpy.lab.observe import Observation
from tests import needs


def texts(record):
    return [event.text for event in record.events]


def test_a_run_without_a_step_is_as_expected(lab):
    record = lab()
    assert record.ok, record.complaints
    assert record.requests >= 150
    assert record.acknowledged and record.verified
    assert (record.final, record.unreadable, record.errors) == ("optimal", 0, 0)
    assert record.degraded == []
    assert record.samples[-1].legs == {"a": "in_sync", "b": "in_sync"}


def test_the_same_over_nbd(lab):
    needs.nbdkit_plugin("python")
    needs.module("nbd", package="python3-libnbd")
    text = """
        title = "over a server"
        legs = { count = 2, size = "256K" }
        [[device]]
        name = "m"
        table = "0 512 labmirror none a 0 b 0"
        [workload]
        requests = 150
        [[step]]
        do = "fail"
        leg = "a"
        after = 50
        [expect]
        degraded = true
        final = "degraded"
    """
    scenario = parse(text)
    record = Lab(scenario, scenario.variants[0], seed=2).run()
    assert record.ok, record.complaints


def test_a_leg_that_fails_is_seen_in_the_lanes_and_periods(lab):
    record = lab("""
        [[step]]
        do = "fail"
        leg = "b"
        after = 50
        [[step]]
        do = "wait"
        time = 0.3
        [expect]
        degraded = true
        final = "degraded"
    """)
    assert record.ok, record.complaints
    assert record.samples[-1].legs == {"a": "in_sync", "b": "failed"}
    assert record.samples[-1].conditions == {"b": "dead"}
    assert record.degraded[0][1] == record.seconds
    assert "leg b fails" in texts(record) and "array degraded" in texts(record)


def test_losing_both_legs_is_unreadable_and_said(lab):
    steps = """
        [[step]]
        do = "fail"
        legs = ["a", "b"]
        after = 50
        [[step]]
        do = "wait"
        when = "failed"
        [expect]
        data = "unreadable"
        errors = "some"
        final = "failed"
    """
    record = lab(steps)
    assert record.ok, record.complaints
    assert record.unreadable == 256 << 10
    record = lab(steps[: steps.index("[expect]")])
    assert not record.ok
    assert any("requests failed (expected none)" in one for one in record.complaints)
    assert any("262144 bytes cannot be read" in one for one in record.complaints)


def test_errors_in_a_range_strike_there_only(lab):
    record = lab("""
        [[step]]
        do = "errors"
        leg = "b"
        offset = 0
        length = "4K"
        ops = ["write"]
        [[step]]
        do = "wait"
        when = "degraded"
        [expect]
        final = "degraded"
    """)
    assert record.ok, record.complaints


def test_errors_far_from_every_request_strike_never(lab):
    record = lab("""
        [[step]]
        do = "errors"
        leg = "b"
        offset = "252K"
        length = "4K"
        ops = ["write"]
        [expect]
        degraded = false
    """, workload="area = 0.5")
    assert record.ok, record.complaints


def test_bytes_that_rot_are_found(lab):
    record = lab("""
        [[step]]
        do = "corrupt"
        leg = "a"
        offset = "192K"
        length = "512"
        after = 100
    """, workload="area = 0.5")
    assert not record.ok
    assert record.counts["wrong"] == 1
    assert record.damages[0].sector == 384


def test_a_slow_leg_slows_the_clients(lab):
    record = lab("""
        [[step]]
        do = "slow"
        leg = "a"
        delay = 0.01
        [[step]]
        do = "wait"
        after = 20
        [[step]]
        do = "heal"
        leg = "a"
    """, requests=30)
    assert record.ok, record.complaints
    # The mirror takes one request at a time, so twenty of them cannot be faster than this.
    healed = next(event.time for event in record.events if event.text == "leg a works again")
    assert healed >= 0.15
    assert any(sample.conditions == {"a": "slow"} for sample in record.samples)


def test_a_message_is_sent_and_progress_can_be_waited_for(lab):
    record = lab("""
        [[step]]
        do = "fail"
        leg = "b"
        after = 30
        [[step]]
        do = "blank"
        leg = "b"
        when = "degraded"
        [[step]]
        do = "message"
        text = "sync"
        [[step]]
        do = "wait"
        when = "optimal"
        [expect]
        degraded = true
        actions = ["resync"]
    """, workload="clients = 1")
    assert record.ok, record.complaints
    assert "message sync: copied" in texts(record)


def test_a_message_that_is_refused_is_part_of_the_verdict(lab):
    record = lab("""
        [[step]]
        do = "message"
        text = "@what"
    """)
    assert not record.ok
    assert record.complaints[0].startswith("step 1, message: ")


def test_a_restart_keeps_everything(lab):
    record = lab("""
        [[step]]
        do = "restart"
        after = 50
        [[step]]
        do = "verify"
        after = 100
    """)
    assert record.ok, record.complaints
    assert "everything read: every byte is there" in texts(record)


def test_load_puts_another_table_in_the_place(lab):
    record = lab("""
        [[step]]
        do = "load"
        table = "0 512 labmirror none b 0 a 0"
        after = 50
    """)
    assert record.ok, record.complaints


def test_requests_wait_between_suspend_and_resume(lab):
    record = lab("""
        [[step]]
        do = "suspend"
        after = 40
        [[step]]
        do = "wait"
        time = 0.3
        [[step]]
        do = "resume"
    """)
    assert record.ok, record.complaints
    begin = next(event.time for event in record.events if event.text == "suspend")
    end = next(event.time for event in record.events if event.text == "resume")
    # Those that were under way when it was suspended may end after the first look.
    inside = [sample for sample in record.samples if begin + 0.05 < sample.time < end]
    assert inside[0].read == inside[-1].read and inside[0].written == inside[-1].written


def test_a_text_in_the_status_can_be_waited_for(lab):
    record = lab("""
        [[step]]
        do = "fail"
        leg = "b"
        [[step]]
        do = "wait"
        status = "1 AD"
        [expect]
        final = "degraded"
    """)
    assert record.ok, record.complaints


def test_clients_pause_and_go_on(lab):
    record = lab("""
        [[step]]
        do = "pause"
        after = 40
        [[step]]
        do = "wait"
        time = 0.3
        [[step]]
        do = "go-on"
    """, requests=200)
    assert record.ok, record.complaints
    pause = next(event.time for event in record.events if event.text == "clients pause")
    on = next(event.time for event in record.events if event.text == "clients go on")
    inside = [sample for sample in record.samples if pause < sample.time < on]
    assert inside[0].read == inside[-1].read and inside[0].written == inside[-1].written


CUT = """
    [[step]]
    do = "cut-power"
    after = 100
    keep = "{keep}"
    [[step]]
    do = "start"
    [[step]]
    do = "verify"
    [[step]]
    do = "cut-power"
    after = 180
    [[step]]
    do = "start"
"""


@pytest.mark.parametrize("keep", ["all", "none"])
def test_flushed_bytes_survive_a_power_cut(lab, keep):
    # One leg keeps what the other lost, so reads come from the first leg only: it never fails.
    record = lab(CUT.format(keep=keep), requests=250, workload="flush_every = 10")
    assert record.ok, record.complaints
    assert any(sample.state == "off" for sample in record.samples) or record.requests
    assert record.errors == 0


def test_an_array_that_is_never_started_again_ends_failed(lab):
    record = lab("""
        [[step]]
        do = "cut-power"
        after = 50
        [[step]]
        do = "start"
        table = "0 512 nosuch"
        [expect]
        data = "unreadable"
        final = "failed"
    """)
    assert record.ok, record.complaints
    assert any(text.startswith("refused: ") for text in texts(record))


def test_a_table_that_is_refused_at_the_beginning_is_said(lab):
    text = 'title = "t"\nlegs = { count = 1, size = "64K" }\n[[device]]\nname = "d"\n' \
           'table = "0 8 linear a 9999"'
    scenario = parse(text)
    record = Lab(scenario, scenario.variants[0]).run()
    assert not record.ok
    assert "not built" in record.complaints[0]


def test_waiting_for_what_never_comes_ends_with_the_time(lab):
    record = lab("""
        [[step]]
        do = "wait"
        when = "degraded"
    """, timeout=0.3, requests=10)
    assert not record.ok
    assert "gave up waiting for the array to be degraded" in record.complaints[0]


# The lab has to find what a broken target does.


def test_a_mirror_that_drops_flushes_is_caught(lab):
    record = lab(CUT.format(keep="none"), flaw="drops-flush", workload="flush_every = 5")
    assert not record.ok
    assert record.counts["lost"] > 0


def test_a_mirror_that_writes_one_leg_only_is_caught(lab):
    record = lab("""
        [[step]]
        do = "fail"
        leg = "a"
        after = 120
        [expect]
        degraded = true
        final = "degraded"
    """, flaw="one-leg-only")
    assert not record.ok
    assert record.counts["lost"] > 0


def test_a_mirror_that_acknowledges_what_failed_is_caught(lab):
    record = lab("""
        [[step]]
        do = "fail"
        legs = ["a", "b"]
        after = 80
        [expect]
        data = "unreadable"
        errors = "some"
        final = "failed"
    """, flaw="acknowledges-errors")
    assert not record.ok


def test_a_mirror_that_reads_another_place_is_caught(lab):
    record = lab(flaw="swaps")
    assert not record.ok
    assert record.counts.keys() & {"misplaced", "lost"}


def test_a_mirror_that_hides_its_loss_is_caught(lab):
    record = lab("""
        [[step]]
        do = "fail"
        leg = "b"
        after = 50
        [expect]
        degraded = true
        final = "degraded"
    """, flaw="hides-loss")
    assert any("never degraded" in one for one in record.complaints)
    assert any("ends optimal" in one for one in record.complaints)


def test_damage_that_is_expected_has_to_be_found(lab):
    record = lab("""
        [expect]
        data = "damaged"
    """)
    assert record.complaints == ["no damage was found (expected lost or wrong sectors)"]


def test_a_record_is_json(lab):
    tree = json.loads(json.dumps(lab().as_dict()))
    assert tree["ok"] is True
    assert tree["samples"][0]["legs"] == {"a": "in_sync", "b": "in_sync"}
    assert tree["events"][0]["kind"] in ("array", "step")


def test_events_are_told_as_they_happen(lab):
    heard = []
    scenario = find("striped-loses-a-leg")
    text = parse('title = "t"\nlegs = { count = 1, size = "64K" }\n[[device]]\nname = "d"\n'
                 'table = "0 128 linear a 0"\n[workload]\nover = "direct"\nrequests = 5')
    record = Lab(text, text.variants[0], listener=heard.append).run()
    assert heard == record.events
    assert scenario.target_types == {"striped"}


def test_progress_of_nothing_is_said(lab, monkeypatch):
    monkeypatch.setattr(engine, "_BEGINS_WITHIN", 0.1)
    record = lab("""
        [[step]]
        do = "fail"
        leg = "a"
        progress = 0.5
    """)
    assert record.complaints[0] == "step 1, fail: no resync or rebuild is under way"


def test_a_share_of_progress_is_reached_or_passed():
    part = Observation(done=5, total=10, action="recover")
    over = Observation(done=10, total=10)
    assert engine._is_so_far(part, 0.5, True)
    assert not engine._is_so_far(part, 0.6, True)
    assert engine._is_so_far(over, 0.6, True)
    assert not engine._is_so_far(over, 0.6, False)


def test_an_array_of_md_is_made_and_its_spare_takes_over():
    text = """
        title = "t"
        legs = { count = 4, size = "6M" }
        [[device]]
        name = "md0"
        md = { level = "5", members = ["a", "b", "c"], spares = ["d"] }
        [workload]
        over = "direct"
        requests = 200
        rate = 2000
        [[step]]
        do = "fail"
        leg = "a"
        after = 50
        [[step]]
        do = "wait"
        when = "degraded"
        [[step]]
        do = "wait"
        when = "optimal"
        [expect]
        degraded = true
    """
    scenario = parse(text)
    record = Lab(scenario, scenario.variants[0], seed=2).run()
    assert record.ok, record.complaints
    assert record.samples[0].legs["d"] == "spare"
    assert record.samples[-1].legs["d"] == "in_sync"


def test_an_array_of_md_that_cannot_be_made_is_said():
    scenario = parse('title = "t"\nlegs = { count = 1, size = "6M" }\n[[device]]\nname = "d"\n'
                     'md = { level = "5", members = ["a"] }')
    record = Lab(scenario, scenario.variants[0]).run()
    assert record.complaints[0].startswith("array d cannot be made: ")
