"""Any text is a table that survives a round trip, or a TableError that says where."""

import errno
import re

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dmpy.device import BlockSize
from dmpy.errors import DeviceError, TableError
from dmpy.mapper import Mapper
from dmpy.table import (
    ConciseDevice,
    Table,
    escape,
    format_concise,
    parse_concise,
    split_args,
)
from dmpy.testing import PatternDevice

SECTORS = 1 << 40


class Devices:
    """Opens a device for a few words, refuses the others as the system would."""

    def __init__(self, block_size=BlockSize()):
        self.devices = {
            word: PatternDevice(SECTORS * 512, word, block_size=block_size)
            for word in ("disk", "/dev/sda", "7:1", "a,b;c", "with space", "back\\slash", "#x")
        }
        for word, device in self.devices.items():
            device.name = escape(word)

    def __call__(self, word):
        if word in self.devices:
            return self.devices[word]
        raise DeviceError(2, f"{word}: no such file or directory")


def parse(text, **how):
    return Table.parse(text, Devices(**how))


# A model of dm_split_args(): one character at a time.
def split_as_the_kernel_does(text):
    words, at = [], 0
    while True:
        while at < len(text) and text[at] in " \t\n\v\f\r":
            at += 1
        if at == len(text):
            return words
        word = ""
        while at < len(text):
            if text[at] == "\\" and at + 1 < len(text):
                word += text[at + 1]
                at += 2
                continue
            if text[at] in " \t\n\v\f\r":
                break
            word += text[at]
            at += 1
        words.append(word)


TEXT = st.text(st.sampled_from("abc \t\\,;#01é\u3000") | st.characters(codec="utf-8"), max_size=40)


@given(TEXT)
@example("a\\")
@example("\\ a\\ ")
@example("a\u00a0b")
@example("a\x1cb")
def test_words_are_split_as_the_kernel_splits_them(text):
    assert split_args(text) == split_as_the_kernel_does(text)


@given(st.lists(st.text(min_size=1).filter(lambda word: "\n" not in word), max_size=5))
def test_quoted_words_are_found_whole(words):
    assert split_args(" ".join(escape(word) for word in words)) == words


# Lines that are right, as (length, target, words): the begin comes from those before.
STARTS = st.integers(0, 1000)
WORDS = st.sampled_from(["disk", "/dev/sda", "7:1", "a,b;c", "with space", "back\\slash", "#x"])


@st.composite
def good_lines(draw):
    target = draw(st.sampled_from(["linear", "striped", "zero", "error", "unstriped"]))
    device = escape(draw(WORDS))
    chunk = draw(st.sampled_from([1, 3, 8, 128]))
    rows = draw(st.integers(1, 50))
    if target == "linear":
        return draw(st.integers(1, 1 << 30)), target, f"{device} {draw(STARTS)}"
    if target == "striped":
        count = draw(st.integers(1, 5))
        legs = " ".join(f"{escape(draw(WORDS))} {draw(STARTS)}" for _ in range(count))
        return count * chunk * rows, target, f"{count} {chunk} {legs}"
    if target == "unstriped":
        count = draw(st.integers(1, 5))
        stripe = draw(st.integers(0, count - 1))
        return chunk * rows, target, f"{count} {chunk} {stripe} {device} {draw(STARTS)}"
    return draw(st.integers(1, 1 << 30)), target, ""


@st.composite
def good_tables(draw):
    begin, lines = 0, []
    for length, target, words in draw(st.lists(good_lines(), min_size=1, max_size=6)):
        lines.append(f"{begin} {length} {target} {words}".rstrip(" "))
        begin += length
    return lines


@given(good_tables())
def test_a_good_table_comes_back_word_for_word(lines):
    opener = Devices()
    table = Table.parse("\n".join(lines), opener)
    assert table.text() == "\n".join(lines)
    assert Table.parse(table.text(), opener) == table
    assert table.size == 512 * sum(int(line.split()[1]) for line in lines)


@given(good_tables(), st.randoms(use_true_random=False))
def test_comments_blank_lines_and_blanks_change_nothing(lines, rng):
    opener = Devices()
    dressed = []
    for line in lines:
        dressed += rng.choices(["", "   ", "# 0 8 zero", "\t# x", "#"], k=rng.randint(0, 2))
        words = re.split(r"(?<!\\) ", line)
        line = "".join(word + rng.choice([" ", "  ", "\t", " \t "]) for word in words)
        dressed.append(rng.choice(["", " ", "\t"]) + line)
    dressed.append("")
    assert Table.parse("\n".join(dressed), opener) == Table.parse("\n".join(lines), opener)


@given(good_tables())
def test_a_status_has_a_line_for_each_target(lines):
    status = parse("\n".join(lines)).status().split("\n")
    assert [line.split()[:3] for line in status] == [line.split()[:3] for line in lines]


ANY_LINE = st.one_of(
    TEXT,
    st.lists(
        st.sampled_from(
            ["0", "8", "16", "-1", "+8", "0x8", str(1 << 54), str(1 << 64), "9" * 50, "linear"]
            + ["striped", "zero", "error", "unstriped", "nosuch", "thin-pool", "disk", "gone"]
            + ["\\", "#", "../x", "a.b", "", "__init__", "os", "Linear", "zéro"]
        )
        | TEXT,
        max_size=9,
    ).map(" ".join),
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ANY_LINE, max_size=4), good_tables(), st.booleans())
def test_any_text_is_a_table_or_an_error_that_names_the_line(junk, good, mix):
    text = "\n".join(good + junk if mix else junk)
    opener = Devices()
    try:
        table = Table.parse(text, opener)
    except TableError as error:
        sentence = str(error)
        assert "\n" not in sentence
        if error.line is None:
            assert not mix
            assert sentence.startswith("table has no lines")
        else:
            assert 1 <= error.line <= text.count("\n") + 1
            assert sentence.startswith(f"line {error.line}")
    else:
        assert Table.parse(table.text(), opener) == table
        assert table.text() == Table.parse(table.text(), opener).text()


@settings(max_examples=200)
@given(good_tables(), st.data())
def test_a_damaged_table_is_refused_at_the_line_that_is_damaged_or_still_a_table(lines, data):
    number = data.draw(st.integers(0, len(lines) - 1))
    words = lines[number].split(" ")
    place = data.draw(st.integers(0, len(words) - 1))
    words[place] = data.draw(st.sampled_from(["", "x", "-1", "0", "1", str(1 << 70), "nosuch"]))
    damaged = [*lines[:number], " ".join(words), *lines[number + 1 :]]
    try:
        table = parse("\n".join(damaged))
    except TableError as error:
        assert error.line in (number + 1, number + 2) or (error.line is None and not any(damaged))
    else:
        assert len(table.lines) <= len(lines)


# One sentence for each kind of bad input, naming line, target and argument.
BAD = {
    "a gap": ("0 8 zero\n9 8 zero", 2, "zero", "gap before sector 9"),
    "a gap at the start": ("8 8 zero", 1, "zero", "gap before sector 8"),
    "an overlap": ("0 8 zero\n7 8 zero", 2, "zero", "overlap at sector 8"),
    "lines out of order": ("8 8 zero\n0 8 zero", 1, "zero", "gap"),
    "no length": ("0 0 zero", 1, "zero", "len must not be 0"),
    "a begin that is no number": ("x 8 zero", 1, None, "begin must be a number"),
    "a length that is no number": ("0 8s zero", 1, None, "len must be a number"),
    "a negative begin": ("-1 8 zero", 1, None, "begin must be a number"),
    "a length beyond any device": (f"0 {1 << 54} zero", 1, "zero", "at most"),
    "a length of 100 digits": (f"0 {'9' * 100} zero", 1, None, "len"),
    "a line that stops early": ("0 8 zero\n8 8", 2, None, "begin, len, type"),
    "a word": ("zero", 1, None, "begin, len, type"),
    "an unknown target": ("0 8 liner disk 0", 1, None, "did you mean linear"),
    "a target in capitals": ("0 8 LINEAR disk 0", 1, None, "unknown target"),
    "a target that is a module": ("0 8 __init__", 1, None, "unknown target"),
    "a target that is a path": ("0 8 ../linear disk 0", 1, None, "unknown target"),
    "a chunk of no sectors": ("0 16 striped 2 0 disk 0 disk 8", 1, "striped", "chunk size"),
    "a length of no whole rows": ("0 9 striped 1 8 disk 0", 1, "striped", "chunk size"),
    "a leg that is missing": ("0 16 striped 2 8 disk 0", 1, "striped", "legs"),
    "a device that is missing": ("0 8 linear gone 0", 1, "linear", "gone: no such file"),
    "a leg too short": (f"0 8 linear disk {SECTORS - 7}", 1, "linear", "the line needs 8"),
    "an argument too many": ("0 8 linear disk 0 0", 1, "linear", "too many"),
}


@pytest.mark.parametrize("text, line, target, words", BAD.values(), ids=BAD)
def test_it_is_refused_with_a_sentence_that_names_the_place(text, line, target, words):
    with pytest.raises(TableError) as caught:
        parse(text)
    assert caught.value.line == line
    assert caught.value.target == target
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"line {line}{', ' + target if target else ''}: ")


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment", "  \t "])
def test_a_table_without_lines_is_refused(text):
    with pytest.raises(TableError, match="no lines"):
        parse(text)


def test_the_line_number_counts_comments_and_blank_lines():
    with pytest.raises(TableError) as caught:
        parse("# first\n\n0 8 zero\n  # more\n9 8 zero")
    assert caught.value.line == 5


def test_the_largest_table_is_accepted():
    assert parse(f"0 {(1 << 54) - 1} zero").size == (1 << 63) - 512


def test_one_sector_more_is_refused():
    with pytest.raises(TableError):
        parse(f"0 {(1 << 54) - 8} zero\n{(1 << 54) - 8} 8 zero")


def test_lines_that_cut_a_block_of_a_leg_are_refused():
    """validate_hardware_logical_block_alignment(): whole blocks must stay whole below."""
    with pytest.raises(TableError):
        parse("0 1 zero\n1 8 linear disk 0", block_size=BlockSize(4096))


def test_a_hundred_thousand_lines_are_read():
    text = "\n".join(f"{n * 8} 8 linear disk {n * 16}" for n in range(100_000))
    table = parse(text)
    assert len(table.lines) == 100_000
    assert table.text() == text.replace("linear disk", "linear disk")


# Leaves by word.


def test_memory_that_is_named_twice_is_not_shared():
    with Mapper() as dm:
        device = dm.create("m", "0 256 striped 2 8 mem:64K 0 mem:64K 0")
        data = bytearray(b"".join(bytes([n]) * 4096 for n in range(32)))
        device.pwritev([memoryview(data)], 0)
        found = bytearray(len(data))
        device.preadv([memoryview(found)], 0)
        assert found == data


@pytest.mark.parametrize("name", ["plain", "with space", "back\\slash", "tab\there", "#hash", "é"])
def test_the_table_of_a_device_on_any_file_loads_again(tmp_path, name):
    (tmp_path / name).write_bytes(bytes(8192))
    with Mapper() as dm:
        dm.create("a", f"0 16 linear {escape(name)} 0", cwd=str(tmp_path))
        again = dm.create("b", dm.device("a").table_text())
        assert again.table_text() == dm.device("a").table_text()
        assert again.size == 8192


@pytest.mark.parametrize("word", ["nul\0here", "\ud800", "x" * 5000, "mem:", "mem:0", "nbd:", "."])
def test_a_word_that_names_no_device_is_refused_with_line_and_target(word):
    with Mapper() as dm:
        with pytest.raises(TableError) as caught:
            dm.create("a", f"0 8 linear {word} 0")
        assert caught.value.line == 1
        assert caught.value.target == "linear"
        assert dm.devices() == []


@pytest.mark.parametrize("what", ["name", "uuid"])
@pytest.mark.parametrize("text", ["\ud800", "nul\0", "x" * 129])
def test_a_name_or_uuid_that_cannot_be_is_refused_with_einval(what, text):
    with Mapper() as dm:
        with pytest.raises(OSError) as caught:
            dm.create(**{"name": "a", "table": "0 8 zero", what: text})
        assert caught.value.errno == errno.EINVAL
        assert dm.devices() == []


# The concise format.

# dmsetup takes the blanks round a field away.
FIELD = st.text(
    st.sampled_from("ab,;\\ -/") | st.characters(codec="utf-8", exclude_characters="\n"),
    max_size=12,
).map(str.strip)
CONCISE = st.builds(
    ConciseDevice,
    FIELD.filter(bool),
    FIELD,
    st.none() | st.integers(0, (1 << 20) - 1),
    st.booleans(),
    good_tables().map("\n".join),
)


@given(st.lists(CONCISE, min_size=1, max_size=4))
def test_the_concise_format_round_trips(devices):
    assert parse_concise(format_concise(devices)) == devices


def test_the_concise_format_is_the_one_of_the_manual():
    assert parse_concise("dev1,uuid1,3,rw,0 8 zero,8 8 error; dev2,,,ro,0 8 zero") == [
        ConciseDevice("dev1", "uuid1", 3, False, "0 8 zero\n8 8 error"),
        ConciseDevice("dev2", "", None, True, "0 8 zero"),
    ]


@settings(max_examples=200)
@given(TEXT)
def test_any_concise_text_is_devices_or_an_error(text):
    try:
        devices = parse_concise(text)
    except TableError as error:
        assert "\n" not in str(error)
    else:
        assert parse_concise(format_concise(devices)) == devices


@pytest.mark.parametrize(
    "text",
    ["", ";", "a", "a,b", "a,b,c,rw", "a,,x,rw,0 8 zero", "a,,,rx,0 8 zero", "a,,-1,,0 8 zero"],
)
def test_bad_concise_text_is_refused(text):
    with pytest.raises(TableError):
        parse_concise(text)
