"""Every verb that is dmsetup's, against a real server: its text, its --json, what it changes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading

import pytest


@pytest.fixture
def r0(dmpy, images):
    """A device r0, striped over two files, with a uuid."""
    dmpy.ok("create", "r0", "-u", "U-0", "--table",
            f"0 4096 striped 2 16 {images}/a.img 0 {images}/b.img 0")
    return dmpy


# -- create -------------------------------------------------------------------------------------


def test_create_says_nothing_as_dmsetup_does(dmpy, images):
    assert dmpy.ok("create", "x", "--table", f"0 2048 linear {images}/a.img 0").out == ""
    assert dmpy.ok("table", "x").out == f"0 2048 linear {images}/a.img 0\n"


def test_create_tells_the_device_as_json(dmpy):
    info = dmpy.ok("create", "x", "-u", "U", "--minor", "7", "-r", "--table", "0 8 zero",
                   "--json").json()
    assert {key: info[key] for key in ("name", "uuid", "minor", "readonly", "size_sectors")} == {
        "name": "x", "uuid": "U", "minor": 7, "readonly": True, "size_sectors": 8}


def test_create_reads_a_file_with_comments_and_blank_lines(dmpy, tmp_path):
    file = tmp_path / "table"
    file.write_text("# two lines\n\n0 8 zero\n  8 8 error\n")
    dmpy.ok("create", "x", str(file))
    assert dmpy.ok("table", "x").out == "0 8 zero \n8 8 error \n"


def test_create_reads_standard_input(dmpy):
    dmpy.ok("create", "x", stdin="0 8 zero\n")
    dmpy.ok("create", "y", "--table", "-", stdin="0 16 zero\n")
    dmpy.ok("create", "z", "-", stdin="0 24 zero\n")
    sizes = [info["size_sectors"] for info in dmpy.ok("info", "--json").json()]
    assert sizes == [8, 16, 24]


def test_create_takes_further_lines_from_further_options(dmpy):
    dmpy.ok("create", "x", "--table", "0 8 zero", "--table", "8 8 error")
    assert len(dmpy.ok("table", "x", "--json").json()["lines"]) == 2


def test_create_takes_a_file_for_the_table_as_newer_dmsetups_do(dmpy, tmp_path):
    (tmp_path / "t").write_text("0 8 zero")
    dmpy.ok("create", "x", "--table", str(tmp_path / "t"))
    assert dmpy.ok("table", "x").out == "0 8 zero \n"


def test_relative_legs_begin_at_the_current_folder(dmpy, images, monkeypatch):
    monkeypatch.chdir(images)
    dmpy.ok("create", "x", "--table", "0 2048 linear b.img 0")
    assert dmpy.ok("table", "x").out == f"0 2048 linear {images}/b.img 0\n"


def test_create_without_a_table_leaves_the_device_without_one(dmpy):
    dmpy.ok("create", "x", "--notable")
    assert dmpy.ok("table", "x").out == "\n"
    assert "Tables present:    None\n" in dmpy.ok("info", "x").out


def test_create_concise_makes_all_devices(dmpy):
    text = "x1,,,,0 8 zero;x2,U-2,9,ro,0 8 error,8 8 zero"
    dmpy.ok("create", "--concise", text)
    assert dmpy.ok("table", "--concise").out == (
        "x1,,0,rw,0 8 zero ;x2,U-2,9,ro,0 8 error ,8 8 zero \n")


def test_what_table_concise_prints_makes_the_same_devices(r0):
    text = r0.ok("table", "--concise").out
    r0.ok("remove", "r0")
    r0.ok("create", "--concise", stdin=text)
    assert r0.ok("table", "--concise").out == text


def test_create_concise_makes_none_when_one_is_refused(dmpy):
    message = dmpy.refused("create", "--concise", "x1,,,,0 8 zero;x2,,,,0 8 nosuch")
    assert "nosuch" in message
    assert dmpy.ok("ls").out == "No devices found\n"


# -- load, suspend, resume, clear ---------------------------------------------------------------


@pytest.mark.parametrize("verb", ["load", "reload"])
def test_load_fills_the_inactive_slot_and_resume_makes_it_live(r0, verb):
    r0.ok(verb, "r0", "--table", "0 16 zero")
    assert r0.ok("table", "--inactive", "r0").out == "0 16 zero \n"
    assert "Tables present:    LIVE & INACTIVE\n" in r0.ok("info", "r0").out
    r0.ok("suspend", "r0")
    r0.ok("resume", "r0")
    assert r0.ok("table", "r0").out == "0 16 zero \n"


def test_load_reads_a_file_and_standard_input(r0, tmp_path):
    (tmp_path / "t").write_text("0 24 zero")
    info = r0.ok("load", "r0", str(tmp_path / "t"), "--json").json()
    assert info["inactive_table"] is True
    r0.ok("load", "r0", stdin="0 32 zero")
    assert r0.ok("table", "--inactive", "r0").out == "0 32 zero \n"


def test_clear_drops_the_inactive_table(r0):
    r0.ok("load", "r0", "--table", "0 16 zero")
    assert r0.ok("clear", "r0", "--json").json()["inactive_table"] is False


def test_suspend_and_resume_take_several_devices(r0):
    r0.ok("create", "r1", "--table", "0 8 zero")
    infos = r0.ok("suspend", "--noflush", "--nolockfs", "r0", "r1", "--json").json()
    assert [info["suspended"] for info in infos] == [True, True]
    infos = r0.ok("resume", "r0", "r1", "--json").json()
    assert [info["suspended"] for info in infos] == [False, False]


# -- remove, rename, message --------------------------------------------------------------------


def test_remove_takes_several_devices(r0):
    r0.ok("create", "r1", "--table", "0 8 zero")
    assert r0.ok("remove", "r0", "r1", "--json").json() == [{}, {}]
    assert r0.ok("ls").out == "No devices found\n"


def test_remove_refuses_a_device_under_another(r0):
    r0.ok("create", "top", "--table", "0 8 linear r0 0")
    assert "r0" in r0.refused("remove", "r0")
    r0.ok("table", "r0")


def test_remove_deferred_waits_for_the_last_user(r0):
    r0.ok("create", "top", "--table", "0 8 linear r0 0")
    r0.ok("remove", "--deferred", "r0")
    assert "(DEFERRED REMOVE)" in r0.ok("info", "r0").out
    r0.ok("remove", "top")
    assert r0.ok("ls").out == "No devices found\n"


def test_remove_retry_outlasts_a_user_that_goes(r0):
    r0.ok("create", "top", "--table", "0 8 linear r0 0")
    timer = threading.Timer(0.3, lambda: r0.process("remove", "top"))
    timer.start()
    r0.ok("remove", "--retry", "r0")
    timer.join()


@pytest.mark.parametrize("verb", ["remove-all", "remove_all"])
def test_remove_all_takes_upper_devices_first(r0, verb):
    r0.ok("create", "a-lower", "--table", "0 8 zero")
    r0.ok("create", "b-upper", "--table", "0 8 linear a-lower 0")
    result = r0.ok(verb, "--json").json()
    assert sorted(result["removed"]) == ["a-lower", "b-upper", "r0"]
    assert result["in_use"] == []


def test_rename_gives_another_name_and_a_uuid_once(dmpy):
    dmpy.ok("create", "x", "--table", "0 8 zero")
    assert dmpy.ok("rename", "x", "y", "--json").json()["name"] == "y"
    assert dmpy.ok("rename", "y", "--setuuid", "U-y", "--json").json()["uuid"] == "U-y"
    assert "uuid" in dmpy.refused("rename", "y", "--setuuid", "U-z")


def test_message_to_a_target_without_messages_is_refused(r0):
    assert "striped" in r0.refused("message", "r0", "0", "hello", "-x")
    assert "sector" in r0.refused("message", "r0", "x", "hello", status=2)
    assert "MESSAGE" in r0.refused("message", "r0", "0", status=2)


# -- info, ls, table, status, deps --------------------------------------------------------------


def test_info_shows_the_block_and_an_empty_line(r0):
    assert r0.ok("info", "r0").out == (
        "Name:              r0\n"
        "State:             ACTIVE\n"
        "Read Ahead:        256\n"
        "Tables present:    LIVE\n"
        "Open count:        0\n"
        "Event number:      0\n"
        "Major, minor:      253, 0\n"
        "Number of targets: 1\n"
        "UUID: U-0\n\n")


def test_info_in_columns(r0):
    assert r0.ok("info", "-c").out == (
        "Name             Maj Min Stat Open Targ Event  UUID" + " " * 28 + "\n"
        "r0               253   0 L--w    0    1      0 U-0" + " " * 29 + "\n")
    assert r0.ok("info", "-c", "-o", "name,uuid", "--noheadings").out == "r0:U-0\n"
    assert r0.ok("info", "-c", "-o", "name,minor", "--noheadings", "--separator", "/").out == (
        "r0/0\n")
    assert r0.ok("info", "-c", "--nameprefixes", "--noheadings", "-o", "name,open").out == (
        "DM_NAME='r0':DM_OPEN='0'\n")


def test_info_in_columns_knows_who_uses_whom(r0):
    r0.ok("create", "top", "--table", "0 8 linear r0 0")
    fields = "name,devs_used,names_using_dev"
    assert r0.ok("info", "-c", "--noheadings", "-o", fields).out == "r0::top\ntop:r0:\n"


def test_info_lists_its_fields(dmpy):
    assert "  tables_loaded " in dmpy.ok("info", "-c", "-o", "help").out


def test_info_as_json_is_one_object_for_one_device_and_a_list_for_all(r0):
    assert r0.ok("info", "r0", "--json").json()["name"] == "r0"
    assert [info["name"] for info in r0.ok("info", "--json").json()] == ["r0"]


def test_a_device_is_chosen_by_uuid_minor_or_path_too(r0):
    for words in (["-u", "U-0"], ["-m", "0"], ["-j", "253", "-m", "0"], ["/dev/mapper/r0"]):
        assert r0.ok("info", "--json", *words).json()["name"] == "r0"
    r0.ok("rename", "-u", "U-0", "r1")
    assert r0.ok("table", "r1").out.startswith("0 4096 striped")


@pytest.mark.parametrize("verb", ["info", "ls", "table", "status", "deps", "stats"])
def test_no_devices_is_said_as_dmsetup_says_it(dmpy, verb):
    assert dmpy.ok(verb).out == "No devices found\n"
    assert dmpy.ok(verb, "--json").json() == []


def test_ls_and_its_ways_to_name_a_device(r0):
    assert r0.ok("ls").out == "r0\t(253:0)\n"
    assert r0.ok("ls", "-o", "blkdevname").out == "r0\t(dm-0)\n"
    assert r0.ok("ls", "--target", "striped").out == "r0\t(253, 0)\n"
    assert r0.ok("ls", "--target", "linear").out == "No devices found\n"
    assert r0.ok("ls", "--json").json()[0]["name"] == "r0"
    assert "devname" in r0.refused("ls", "-o", "devnam", status=2)


def test_ls_tree_shows_what_stands_on_what(r0, images):
    r0.ok("create", "top", "--table", "0 8 linear r0 0")
    assert r0.ok("ls", "--tree", "-o", "ascii").out == (
        f"top (253:1)\n `-r0 (253:0)\n    |-{images}/b.img\n    `-{images}/a.img\n")
    rows = r0.ok("ls", "--tree", "--json").json()
    assert rows[1]["deps"] == [{"major": 253, "minor": 0, "name": "r0"}]
    assert "inverted" in r0.refused("ls", "--tree", "-o", "invertd", status=2)


def test_table_and_status_put_the_name_first_where_there_are_several(r0, images):
    r0.ok("create", "z", "--table", "0 8 zero")
    striped = f"0 4096 striped 2 16 {images}/a.img 0 {images}/b.img 0"
    assert r0.ok("table").out == f"r0: {striped}\nz: 0 8 zero \n"
    assert r0.ok("table", "r0").out == f"{striped}\n"
    assert r0.ok("table", "--target", "zero").out == "z: 0 8 zero \n"
    assert r0.ok("status", "z").out == "0 8 zero \n"
    assert r0.ok("status", "r0").out.endswith(" 1 AA\n")
    assert r0.ok("status", "--noflush", "--json", "z").json() == {
        "name": "z", "lines": [[0, 8, "zero", ""]]}
    assert r0.ok("table", "--showkeys", "z", "r0", "--json").json()[1]["lines"][0][:3] == [
        0, 4096, "striped"]


def test_deps_lists_what_a_device_stands_on(r0, images):
    r0.ok("create", "top", "--table", "0 8 linear r0 0")
    assert r0.ok("deps", "top").out == "1 dependencies\t: (253, 0)\n"
    assert r0.ok("deps", "-o", "devname", "top").out == "1 dependencies\t: (r0)\n"
    assert r0.ok("deps", "r0").out == (
        f"2 dependencies\t: ({images}/b.img) ({images}/a.img)\n")
    assert r0.ok("deps").out.startswith("r0: 2 dependencies\t:")
    assert len(r0.ok("deps", "r0", "--json").json()["deps"]) == 2


# -- wait, targets, version, stats --------------------------------------------------------------


def test_wait_gives_up_when_asked_to(r0):
    assert "no event within 0.05 s" in r0.refused("wait", "r0", "--timeout", "0.05")
    assert "number" in r0.refused("wait", "r0", "x", status=2)


def test_wait_returns_with_the_event_that_a_removal_is(r0):
    waiter = subprocess.Popen([sys.executable, "-m", "dmpy.cli.main", "wait", "r0"],
                              env=r0.environment(), stdout=subprocess.PIPE, text=True)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            waiter.wait(0.3)
        assert waiter.poll() is None
        r0.ok("remove", "r0")
        assert waiter.wait(10) == 0
        assert "Event number:      1\n" in waiter.stdout.read()
    finally:
        waiter.kill()
        waiter.wait()
        waiter.stdout.close()


def test_targets_are_listed_with_their_versions(dmpy):
    assert "linear           v1.4.0\n" in dmpy.ok("targets").out
    assert {"name": "linear", "version": [1, 4, 0]} in dmpy.ok("targets", "--json").json()


def test_version_names_the_driver(dmpy):
    lines = dmpy.ok("version").out.splitlines()
    assert lines[0].startswith("Library version:   ")
    assert lines[1] == "Driver version:    4.47.0"
    assert dmpy.ok("version", "--json").json()["driver"] == "4.47.0"
    assert dmpy.ok("--version").out.splitlines() == lines


def test_stats_are_a_table_json_or_prometheus_text(r0):
    heading, rule, row = r0.ok("stats").out.splitlines()
    assert heading.split()[:3] == ["device", "reads", "writes"]
    assert row.split()[:2] == ["r0", "0"]
    assert r0.ok("stats", "r0", "--json").json()["errors"] == 0
    assert 'dmpy_reads_total{device="r0"} 0\n' in r0.ok("stats", "--prometheus").out


def test_rpc_calls_a_method_as_it_is(r0):
    assert r0.ok("rpc", "info", "name=r0").json()["minor"] == 0
    assert r0.ok("rpc", "info", '{"minor": 0}').json()["name"] == "r0"
    assert r0.ok("rpc", "table", "minor=0", "inactive=true").json()["lines"] == []
    assert "did you mean version" in r0.refused("rpc", "versoin")
    assert "KEY=VALUE" in r0.refused("rpc", "info", "r0", status=2)


def test_rpc_prints_the_reference_without_a_server(own_dmpy):
    assert "## create" in own_dmpy.ok("rpc", "--reference").out
    assert not own_dmpy.runtime.exists()


def test_json_is_one_document(r0):
    for words in (["info"], ["ls", "--tree"], ["table"], ["status"], ["deps"], ["targets"],
                  ["version"], ["stats"], ["suspend", "r0"], ["resume", "r0"]):
        json.loads(r0.ok(*words, "--json").out)
