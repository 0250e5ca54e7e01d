"""dmsetup's text formats; what is expected here was printed by dmsetup 1.02.185 on Linux 6.1."""

from __future__ import annotations

import pytest

from dmpy.cli import format as fmt

BLANKS_AFTER_UUID = " " * 32


def _info(name, minor, *, targets=1, opened=0, **more):
    return {
        "name": name, "uuid": "", "major": 253, "minor": minor, "size_sectors": 2048,
        "open_count": opened, "event_nr": 0, "targets": targets, "readonly": False,
        "suspended": False, "live_table": True, "inactive_table": False,
        "deferred_remove": False, "block_size": [512, 4096, 33554432], **more,
    }


def _dep(major, minor, name=""):
    return {"major": major, "minor": minor, "name": name}


INFOS = [
    _info("a", 0, opened=2),
    _info("b", 1, opened=1, uuid="UUID-b", suspended=True),
    _info("c", 2, targets=2),
    _info("d", 3, targets=0, live_table=False),
    _info("longer-name-than-most", 4),
]
DEPS = {
    "a": [_dep(98, 0)],
    "b": [_dep(98, 16)],
    "c": [_dep(253, 1, "b"), _dep(253, 0, "a")],
    "d": [],
    "longer-name-than-most": [_dep(98, 16), _dep(253, 0, "a")],
}
TABLES = [
    {"name": "a", "lines": [[0, 2048, "linear", "98:0 0"]]},
    {"name": "b", "lines": [[0, 2048, "linear", "98:16 2048"]]},
    {"name": "c", "lines": [[0, 2048, "linear", "253:0 0"], [2048, 2048, "linear", "253:1 0"]]},
    {"name": "d", "lines": []},
    {"name": "longer-name-than-most",
     "lines": [[0, 1024, "striped", "2 8 253:0 0 98:16 0"]]},
]


def test_info_block_of_a_suspended_device_with_a_uuid():
    assert fmt.info_block(INFOS[1]) == (
        "Name:              b\n"
        "State:             SUSPENDED\n"
        "Read Ahead:        256\n"
        "Tables present:    LIVE\n"
        "Open count:        1\n"
        "Event number:      0\n"
        "Major, minor:      253, 1\n"
        "Number of targets: 1\n"
        "UUID: UUID-b"
    )


def test_info_block_of_a_device_without_a_table_has_no_read_ahead():
    assert fmt.info_block(INFOS[3]) == (
        "Name:              d\n"
        "State:             ACTIVE\n"
        "Tables present:    None\n"
        "Open count:        0\n"
        "Event number:      0\n"
        "Major, minor:      253, 3\n"
        "Number of targets: 0"
    )


def test_info_block_names_both_tables_and_every_state():
    info = _info("x", 9, readonly=True, deferred_remove=True, inactive_table=True)
    assert "State:             ACTIVE (READ-ONLY) (DEFERRED REMOVE)\n" in fmt.info_block(info)
    assert "Tables present:    LIVE & INACTIVE\n" in fmt.info_block(info)


def test_columns_are_as_wide_as_the_longest_value():
    assert fmt.Report(fmt.parse_fields(None)).text(INFOS).splitlines() == [
        "Name                  Maj Min Stat Open Targ Event  UUID" + " " * 28,
        "a                     253   0 L--w    2    1      0 " + BLANKS_AFTER_UUID,
        "b                     253   1 L-sw    1    1      0 UUID-b" + " " * 26,
        "c                     253   2 L--w    0    2      0 " + BLANKS_AFTER_UUID,
        "d                     253   3 ---w    0    0      0 " + BLANKS_AFTER_UUID,
        "longer-name-than-most 253   4 L--w    0    1      0 " + BLANKS_AFTER_UUID,
    ]


def test_columns_of_states_are_spelled_out():
    fields = fmt.parse_fields("name,uuid,attr,tables_loaded,suspended,readonly,devno,major,"
                              "minor,open,segments,events")
    assert fmt.Report(fields).text(INFOS).splitlines()[:3] == [
        "Name                  UUID                             Stat Tables Suspended Read-only "
        "DevNo Maj Min Open Targ Event ",
        "a                                                      L--w Live   Active    Writeable "
        "253:0 253   0    2    1      0",
        "b                     UUID-b                           L-sw Live   Suspended Writeable "
        "253:1 253   1    1    1      0",
    ]


def test_columns_of_relationships():
    fields = fmt.parse_fields("device_count,devs_used,devnos_used,device_ref_count,"
                              "names_using_dev,devnos_using_dev")
    text = fmt.Report(fields).text(INFOS, DEPS).splitlines()
    assert text[0] == ("#Devs DevNamesUsed     DevNosUsed       #Refs RefNames"
                       "                RefDevNos  ")
    assert text[1] == ("    1                  98:0                 2 c,longer-name-than-most "
                       "253:2,253:4")
    assert text[3] == "    2 b,a              253:1,253:0          0" + " " * 36


def test_no_headings_means_colons_and_no_padding():
    fields = fmt.parse_fields("name,uuid")
    assert fmt.Report(fields, headings=False).text(INFOS).splitlines()[:2] == ["a:", "b:UUID-b"]
    assert fmt.Report(fields, headings=False, separator="/").text(INFOS[1:2]) == "b/UUID-b"


def test_name_prefixes_quote_each_value():
    fields = fmt.parse_fields("name,minor")
    assert fmt.Report(fields, prefixes=True).text(INFOS[:1]).splitlines() == [
        "Name Min", "DM_NAME='a' DM_MINOR='0'",
    ]
    rows = fmt.Report(fields, headings=False, prefixes=True, unquoted=True, as_rows=True)
    assert rows.text(INFOS[:2]).splitlines() == ["DM_NAME=a:DM_NAME=b", "DM_MINOR=0:DM_MINOR=1"]


def test_sort_keys_order_the_rows():
    keys = fmt.parse_sort_keys("-minor")
    report = fmt.Report(fmt.parse_fields("name"), headings=False, sort=keys)
    assert report.text(INFOS).splitlines() == ["longer-name-than-most", "d", "c", "b", "a"]


def test_a_plus_adds_to_the_default_fields():
    assert [f.id for f in fmt.parse_fields("+devno")][-2:] == ["uuid", "devno"]


def test_all_stands_for_every_field():
    assert len(fmt.parse_fields("all")) == len(fmt.FIELDS)


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(ValueError, match=r"field minr is unknown \(did you mean minor\?\)"):
        fmt.parse_fields("name,minr")


def test_lvm_names_are_split_where_the_uuid_says_lvm():
    info = _info("vg--x-lv-tmeta", 1, uuid="LVM-abc")
    fields = fmt.parse_fields("subsystem,vg_name,lv_name,lv_layer")
    assert fmt.Report(fields, headings=False).text([info]) == "LVM:vg-x:lv:tmeta"
    assert fmt.Report(fields, headings=False).text([INFOS[0]]) == ":::"


def test_help_lists_each_field_in_its_section():
    text = fmt.fields_help()
    assert "  tables_loaded    - Which of the live and inactive table slots are filled.\n" in text
    assert text.splitlines()[:2] == ["Mapped Device Name Fields", "-------------------------"]


def test_table_lines_of_one_and_of_several_devices():
    assert fmt.table_lines(TABLES[2]) == ["0 2048 linear 253:0 0", "2048 2048 linear 253:1 0"]
    assert fmt.table_lines(TABLES[0], multiple=True) == ["a: 0 2048 linear 98:0 0"]


def test_a_device_without_a_table_still_has_its_line():
    assert fmt.table_lines(TABLES[3]) == [""]
    assert fmt.table_lines(TABLES[3], multiple=True) == ["d: "]


def test_a_status_without_arguments_ends_in_a_blank():
    assert fmt.table_lines({"name": "c", "lines": [[0, 2048, "linear", ""]]}) == [
        "0 2048 linear "]


def test_concise_puts_all_devices_on_one_line():
    assert fmt.concise(INFOS, TABLES) == (
        "a,,0,rw,0 2048 linear 98:0 0;b,UUID-b,1,rw,0 2048 linear 98:16 2048;"
        "c,,2,rw,0 2048 linear 253:0 0,2048 2048 linear 253:1 0;d,,3,rw;"
        "longer-name-than-most,,4,rw,0 1024 striped 2 8 253:0 0 98:16 0"
    )


def test_concise_quotes_what_has_a_meaning():
    info = _info("a;b", 0, uuid="u,v", readonly=True)
    table = {"name": "a;b", "lines": [[0, 8, "linear", "/x,y\\z 0"]]}
    assert fmt.concise([info], [table]) == "a\\;b,u\\,v,0,ro,0 8 linear /x\\,y\\\\z 0"


def test_deps_lines():
    entry = {"name": "c", "deps": DEPS["c"]}
    assert fmt.deps_line(entry) == "2 dependencies\t: (253, 1) (253, 0)"
    assert fmt.deps_line(entry, multiple=True) == "c: 2 dependencies\t: (253, 1) (253, 0)"
    assert fmt.deps_line(entry, names="devname") == "2 dependencies\t: (b) (a)"
    assert fmt.deps_line(entry, names="blkdevname") == "2 dependencies\t: (dm-1) (dm-0)"
    assert fmt.deps_line({"name": "d", "deps": []}) == "0 dependencies\t:"


def test_a_file_below_is_shown_by_its_path():
    entry = {"name": "f", "deps": [_dep(None, None, "/srv/a.img")]}
    assert fmt.deps_line(entry) == "1 dependencies\t: (/srv/a.img)"
    assert fmt.Tree().text([_info("f", 0)], {"f": entry["deps"]}) == "f (253:0)\n `-/srv/a.img"


def test_ls_lines():
    assert fmt.ls_line(INFOS[1]) == "b\t(253:1)"
    assert fmt.ls_line(INFOS[1], names="devname") == "b\t(b)"
    assert fmt.ls_line(INFOS[1], names="blkdevname") == "b\t(dm-1)"
    assert fmt.target_ls_line(INFOS[1]) == "b\t(253, 1)"


def test_targets_and_version():
    targets = [{"name": "snapshot-merge", "version": [1, 5, 0]},
               {"name": "linear", "version": [1, 4, 0]}]
    assert fmt.targets_text(targets) == "snapshot-merge   v1.5.0\nlinear           v1.4.0"
    assert fmt.version_text("1.02.185 (2022-05-18)", "4.47.0") == (
        "Library version:   1.02.185 (2022-05-18)\nDriver version:    4.47.0")


TREES = {
    "": """\
c (253:2)
 |-b (253:1)
 |  `- (98:16)
 `-a (253:0)
    `- (98:0)
d (253:3)
longer-name-than-most (253:4)
 |- (98:16)
 `-a (253:0)
    `- (98:0)""",
    "ascii,uuid,active,rw,open,device": """\
c (253:2) [ACTIVE, RW, 0, ]
 |-b (253:1) [SUSPENDED, RW, 1, UUID-b]
 |  `- (98:16)
 `-a (253:0) [ACTIVE, RW, 2, ]
    `- (98:0)
d (253:3) [ACTIVE, RW, 0, ]
longer-name-than-most (253:4) [ACTIVE, RW, 0, ]
 |- (98:16)
 `-a (253:0) [ACTIVE, RW, 2, ]
    `- (98:0)""",
    "inverted": """\
 (98:0)
 `-a (253:0)
    |-c (253:2)
    `-longer-name-than-most (253:4)
 (98:16)
 |-b (253:1)
 |  `-c (253:2)
 `-longer-name-than-most (253:4)
d (253:3)""",
    "compact": """\
c (253:2)-+-b (253:1)--- (98:16)
          `-a (253:0)--- (98:0)
d (253:3)
longer-name-than-most (253:4)-+- (98:16)
                              `-a (253:0)--- (98:0)""",
    "nodevice": """\
c
 |-b
 `-a
d
longer-name-than-most
 `-a""",
}


@pytest.mark.parametrize("options", TREES, ids=lambda o: o or "default")
def test_the_tree_is_drawn_as_dmsetup_draws_it(options):
    assert fmt.Tree(options).text(INFOS, DEPS) == TREES[options]


def test_a_long_tree_line_is_cut_at_the_width():
    tree = fmt.Tree(width=10)
    assert tree.text(INFOS[4:], {}) == "longer-nam..."


def test_an_unknown_tree_option_names_the_nearest():
    with pytest.raises(ValueError, match=r"tree option invert is unknown \(did you mean inverted"):
        fmt.Tree("invert")
