"""Tables: the text that says what a device is made of, and what it becomes when loaded.

A line is `begin len type arguments`, in sectors, as dmsetup has it. Blank lines and lines that
begin with # are passed over. Words are separated by white space; a backslash quotes the character
behind it.

Source: Linux v6.12 drivers/md/dm-table.c, dm_table_add_target(), dm_split_args(); dmsetup(8).
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from dmpy.device import BlockDevice, BlockSize
from dmpy.errors import TableError
from dmpy.target import Args, Target, find_target
from dmpy.units import SECTOR_SHIFT

__all__ = [
    "ConciseDevice",
    "Line",
    "Table",
    "escape",
    "format_concise",
    "no_garbage_collection",
    "parse_concise",
    "split_args",
]

# NBD and loff_t end at 2^63 bytes.
LARGEST_SECTORS = (1 << 63 >> SECTOR_SHIFT) - 1
# A million lines are a hundred megabytes of text; the largest LVM volumes have a few thousand.
MOST_LINES = 1 << 20

_NUMBER = re.compile(r"[0-9]{1,20}", re.ASCII)
_WORD = re.compile(r"(?:\\[\s\S]|[^\\ \t\n\v\f\r]|\\\Z)+")
_QUOTED = re.compile(r"\\([\s\S])")
_TO_QUOTE = re.compile(r"([\\ \t\n\v\f\r])")


class Line(NamedTuple):
    """A line of a table; `begin` and `len` are sectors."""

    begin: int
    len: int
    target: Target


class Table:
    """What a device is made of.

    Args:
        lines: the lines; they follow each other from sector 0 without gaps.

    Attributes:
        lines: as given.
        size: bytes.
        readonly: the table was loaded for a read-only device.
        devices: the devices that the table holds, each once.
    """

    def __init__(
        self,
        lines: list[Line],
        *,
        devices: list[BlockDevice] | None = None,
        readonly: bool = False,
    ) -> None:
        self.lines = lines
        self.readonly = readonly
        self.devices = devices if devices is not None else _devices_of(lines)
        last = lines[-1]
        self.size = (last.begin + last.len) << SECTOR_SHIFT

    @classmethod
    def parse(
        cls,
        text: str,
        open_device: Callable[[str], BlockDevice],
        *,
        readonly: bool = False,
    ) -> Table:
        """Read a table and make its targets.

        Args:
            text: the table.
            open_device: gives the device that a word names, or raises OSError.
            readonly: the table is for a read-only device.

        Raises:
            TableError: the text is no table that the kernel would load.
        """
        opened: dict[int, BlockDevice] = {}

        def open_noted(word: str) -> BlockDevice:
            device = open_device(word)
            opened[id(device)] = device
            return device

        lines: list[Line] = []
        end = 0
        for number, text_line in _text_lines(text):
            line = _parse_line(text_line, number, end, open_noted)
            end = line.begin + line.len
            lines.append(line)
            if len(lines) > MOST_LINES:
                raise TableError(f"table has more than {MOST_LINES} lines")
        if not lines:
            raise TableError("table has no lines")
        return cls(lines, devices=list(opened.values()), readonly=readonly)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Table):
            return NotImplemented
        return self.lines == other.lines

    __hash__ = None

    @property
    def block_size(self) -> BlockSize:
        """What suits every target."""
        # Lines share a few block sizes, so join each of those once.
        joined = BlockSize()
        for block_size in {line.target.block_size for line in self.lines}:
            joined = joined.joined(block_size)
        return joined

    def table_lines(self, *, showkeys: bool = False) -> list[tuple[int, int, str, str]]:
        """Return (begin, len, type, arguments) of each line, sectors, keys as zeroes or not."""
        return [
            (
                line.begin,
                line.len,
                line.target.type_name,
                line.target.table() if showkeys else line.target.table_without_secrets(),
            )
            for line in self.lines
        ]

    def status_lines(self) -> list[tuple[int, int, str, str]]:
        """Return (begin, len, type, status) of each line, in sectors."""
        return [
            (line.begin, line.len, line.target.type_name, line.target.status())
            for line in self.lines
        ]

    def text(self, *, showkeys: bool = False) -> str:
        """Return the table's text, which parses to an equal table when keys are shown."""
        return _as_text(self.table_lines(showkeys=showkeys))

    def status(self) -> str:
        """Return the status text, one line a target."""
        return _as_text(self.status_lines())

    def find(self, sector: int) -> Target | None:
        """Return the target that holds a sector, or None beyond the end."""
        for line in self.lines:
            if line.begin <= sector < line.begin + line.len:
                return line.target
        return None


# Begin, len, type, words as lines of text.
def _as_text(lines: list[tuple[int, int, str, str]]) -> str:
    return "\n".join(
        f"{begin} {length} {name} {words}" if words else f"{begin} {length} {name}"
        for begin, length, name, words in lines
    )


# The devices under the legs of some lines, each once.
def _devices_of(lines: list[Line]) -> list[BlockDevice]:
    return list(
        {id(leg.device): leg.device for line in lines for leg in line.target.legs}.values()
    )


# The lines that count, with their numbers from 1.
def _text_lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        line = line.lstrip(" \t\v\f\r")
        if line and not line.startswith("#"):
            yield number, line


# One line, checked against the end of the one before.
def _parse_line(
    text: str, number: int, end: int, open_device: Callable[[str], BlockDevice]
) -> Line:
    words = split_args(text)
    if len(words) < 3:
        raise TableError(
            f"a table line is begin, len, type and arguments (got {text[:80]!r})", line=number
        )
    begin = _sectors("begin", words[0], number)
    length = _sectors("len", words[1], number)
    name = words[2]
    if not length:
        raise TableError("len must not be 0 sectors", line=number, target=name, argument="len")
    if begin != end:
        what = "gap before" if begin > end else "overlap at"
        raise TableError(
            f"{what} sector {max(begin, end)}: begin is {begin} (expected {end})",
            line=number,
            target=name,
            argument="begin",
        )
    if begin + length > LARGEST_SECTORS:
        raise TableError(
            f"end must be at most sector {LARGEST_SECTORS} (got {begin + length})",
            line=number,
            target=name,
            argument="len",
        )
    try:
        target_type = find_target(name)
    except TableError as error:
        raise TableError(error.reason, line=number, argument="type") from None
    args = Args(words[3:], open_device, line=number, target=name)
    target = target_type.parse(args, length << SECTOR_SHIFT)
    args.end()
    block = target.block_size.minimum
    if ((begin | length) << SECTOR_SHIFT) % block:
        args.fail(
            f"begin and len must be multiples of the legs' blocks of {block} bytes "
            f"(got {begin} and {length} sectors)",
            "len",
        )
    return Line(begin, length, target)


# A number of sectors in the first two columns.
def _sectors(name: str, word: str, number: int) -> int:
    if _NUMBER.fullmatch(word) is None:
        raise TableError(
            f"{name} must be a number of sectors (got {word[:40]!r})", line=number, argument=name
        )
    return int(word)


def split_args(text: str) -> list[str]:
    """Split a line into words and take the quoting away."""
    if text.isprintable() and text.isascii() and "\\" not in text:
        # There is no white space but blanks then, and what split() would take for white space too.
        return text.split()
    return [_QUOTED.sub(r"\1", word) for word in _WORD.findall(text)]


def escape(word: str) -> str:
    """Quote a word so that split_args() finds it whole."""
    return _TO_QUOTE.sub(r"\\\1", word)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Switch Python's garbage collector off for the making of many objects.

    What makes up a long table lives long and has no cycles; looking for some takes half the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class ConciseDevice(NamedTuple):
    """A device in the concise format; `minor` is None where the number is left open."""

    name: str
    uuid: str
    minor: int | None
    readonly: bool
    table: str


def parse_concise(text: str) -> list[ConciseDevice]:
    """Read `name,uuid,minor,flags,table[,table...][;...]`, a backslash quoting the next character.

    Raises:
        TableError: the text does not have that form; `line` counts devices.
    """
    devices = []
    for number, fields in enumerate(_concise_fields(text), 1):
        if fields == [""]:
            continue
        if len(fields) < 5:
            raise TableError(
                "a concise device is name, uuid, minor, flags and table lines "
                f"(got {len(fields)} fields)",
                line=number,
            )
        name, uuid, minor, flags, *lines = fields
        if flags not in ("", "ro", "rw"):
            raise TableError(f"flags must be ro or rw (got {flags[:40]})", line=number)
        if minor and not (_NUMBER.fullmatch(minor) and int(minor) < 1 << 20):
            raise TableError(
                f"minor must be a number below {1 << 20} (got {minor[:40]})", line=number
            )
        devices.append(
            ConciseDevice(
                name, uuid, int(minor) if minor else None, flags == "ro", "\n".join(lines)
            )
        )
    if not devices:
        raise TableError("concise table has no devices")
    return devices


# The fields of each device, quoting taken away.
def _concise_fields(text: str) -> Iterator[list[str]]:
    fields = [""]
    quoted = False
    for character in text.strip():
        if quoted:
            fields[-1] += character
            quoted = False
        elif character == "\\":
            quoted = True
        elif character == ",":
            fields.append("")
        elif character == ";":
            yield [field.strip() for field in fields]
            fields = [""]
        else:
            fields[-1] += character
    yield [field.strip() for field in fields]


def format_concise(devices: list[ConciseDevice]) -> str:
    """Write devices so that parse_concise() gives them back."""
    texts = []
    for name, uuid, minor, readonly, table in devices:
        fields = [name, uuid, "" if minor is None else str(minor), "ro" if readonly else "rw"]
        fields += table.split("\n")
        texts.append(",".join(re.sub(r"([\\,;])", r"\\\1", field) for field in fields))
    return ";".join(texts)
