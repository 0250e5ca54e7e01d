"""Tables as text: what the kernel and dmsetup would take, and what they would not."""

import time

import pytest

from dmpy.backing import open_leaf
from dmpy.device import BlockSize
from dmpy.errors import TableError
from dmpy.table import (
    ConciseDevice,
    Table,
    escape,
    format_concise,
    parse_concise,
    split_args,
)


def parse(text):
    return Table.parse(text, lambda word: open_leaf(word))


def refusal(text):
    with pytest.raises(TableError) as caught:
        parse(text)
    return caught.value


def test_lines_follow_each_other_and_give_the_size():
    table = parse("0 8 zero\n8 16 error")
    assert [(line.begin, line.len, line.target.type_name) for line in table.lines] == [
        (0, 8, "zero"),
        (8, 16, "error"),
    ]
    assert table.size == 24 * 512


def test_blank_lines_and_comments_are_passed_over_but_counted():
    assert parse("# head\n\n  # indented\n\t0\t8 zero  \n\n").size == 8 * 512
    assert refusal("# head\n\n0 8 nosuch").line == 3


def test_text_and_table_are_each_other():
    text = "0 8 zero\n8 8 linear mem:64K 3"
    assert parse(text).text() == text
    assert parse(text).status() == "0 8 zero\n8 8 linear"


@pytest.mark.parametrize(
    ("text", "line", "argument", "sentence"),
    [
        ("", None, None, "table has no lines"),
        ("0 8", 1, None, "line 1: a table line is begin, len, type and arguments (got '0 8')"),
        ("x 8 zero", 1, "begin", "line 1: begin must be a number of sectors (got 'x')"),
        ("0 -8 zero", 1, "len", "line 1: len must be a number of sectors (got '-8')"),
        ("0 0x8 zero", 1, "len", "line 1: len must be a number of sectors (got '0x8')"),
        ("0 0 zero", 1, "len", "line 1, zero: len must not be 0 sectors"),
        ("8 8 zero", 1, "begin", "gap before sector 8: begin is 8 (expected 0)"),
        ("0 8 zero\n16 8 zero", 2, "begin", "gap before sector 16: begin is 16 (expected 8)"),
        ("0 8 zero\n4 8 zero", 2, "begin", "overlap at sector 8: begin is 4 (expected 8)"),
        ("0 8 zero 1", 1, "arguments", "line 1, zero: 1 argument too many (got 1)"),
        ("0 8 linear", 1, "device", "line 1, linear: device is missing (got 0 arguments)"),
        (
            "0 8 linear mem:2048 0",
            1,
            "device",
            "line 1, linear: leg mem:2048 has 4 sectors, the line needs 8 from sector 0",
        ),
        ("0 8 linear mem:4096 1x", 1, None, "start sector on mem:4096 must be a number (got 1x)"),
        ("0 36028797018963968 zero", 1, "len", "end must be at most sector 18014398509481983"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text, line, argument, sentence):
    error = refusal(text)
    assert sentence in str(error)
    assert error.line == line
    if argument is not None:
        assert error.argument == argument


def test_the_largest_device_is_accepted():
    assert parse("0 18014398509481983 zero").size == (1 << 63) - 512


def test_an_unknown_target_gets_the_nearest_names():
    assert "did you mean linear" in str(refusal("0 8 linaer mem:4096 0"))
    assert "known are error, linear" in str(refusal("0 8 xyzzy"))


@pytest.mark.parametrize("name", ["__init__", "..linear", "os", "linear.x", "Linear", "linear-x"])
def test_a_word_that_is_no_target_is_refused_whatever_it_looks_like(name):
    assert "unknown target type" in str(refusal(f"0 8 {name} mem:4096 0"))


def test_a_backslash_quotes_the_next_character():
    assert split_args(r"0 8 linear /a\ b 0") == ["0", "8", "linear", "/a b", "0"]
    assert split_args(r"a\\b \x") == ["a\\b", "x"]
    assert split_args("a\\") == ["a\\"]
    assert split_args("a\tb  c\n") == ["a", "b", "c"]


@pytest.mark.parametrize("word", ["/a b", "/a\\b", "/a\tb", "/ä\u00a0b", "\\"])
def test_a_quoted_word_is_found_whole(word):
    assert split_args(f"x {escape(word)} y") == ["x", word, "y"]


def test_a_table_knows_the_devices_that_it_holds():
    leaf = open_leaf("mem:64K")
    other = open_leaf("mem:64K")
    words = {"x": leaf, "y": other}
    table = Table.parse("0 8 linear x 0\n8 8 linear y 8\n16 8 linear x 8", words.__getitem__)
    assert table.devices == [leaf, other]


def test_lines_that_cut_the_blocks_of_a_leg_are_refused():
    leaf = open_leaf("mem:64K")
    leaf.block_size = BlockSize(4096, 4096)
    for text in ("0 8 linear x 0\n8 9 linear x 0", "0 1 zero\n1 8 linear x 0"):
        with pytest.raises(TableError, match="blocks of 4096 bytes"):
            Table.parse(text, lambda word: leaf)


def test_a_long_table_loads_in_a_time_that_grows_with_its_length():
    leaf = open_leaf("mem:64M")
    lines = "\n".join(f"{line * 8} 8 linear x {line % 1000 * 8}" for line in range(5000))
    begun = time.perf_counter()
    table = Table.parse(lines, lambda word: leaf)
    assert len(table.lines) == 5000
    assert time.perf_counter() - begun < 2
    assert table.find(8 * 4999) is table.lines[-1].target
    assert table.find(8 * 5000) is None


def test_the_concise_format_is_read_and_written():
    text = r"a,UUID-1,3,ro,0 8 zero,8 8 linear /x\,y 0;b,,,,0 8 error"
    devices = parse_concise(text)
    assert devices == [
        ConciseDevice("a", "UUID-1", 3, True, "0 8 zero\n8 8 linear /x,y 0"),
        ConciseDevice("b", "", None, False, "0 8 error"),
    ]
    assert parse_concise(format_concise(devices)) == devices


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "no devices"),
        ("a,b,c", "got 3 fields"),
        ("a,,x,,0 8 zero", "minor must be a number"),
        ("a,,1048576,,0 8 zero", "minor must be a number below 1048576"),
        ("a,,,rx,0 8 zero", "flags must be ro or rw"),
    ],
)
def test_a_bad_concise_table_is_refused(text, sentence):
    with pytest.raises(TableError, match=sentence):
        parse_concise(text)
