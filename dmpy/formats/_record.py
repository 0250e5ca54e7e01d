"""Records of fixed layout as dataclasses: a field's default says its type, its place is counted."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

from dmpy.errors import FormatError

__all__ = ["Record", "hexadecimal", "octets", "record", "s16", "s32", "u8", "u16", "u32", "u64"]

_MARK = "dmpy.formats"
_Kind = TypeVar("_Kind", bound="type[Record]")


class _Code(NamedTuple):
    # How a field is packed: struct's letter, how many of them, and whether that is a list.
    letter: str
    count: int
    many: bool = False

    @property
    def text(self) -> str:
        return f"{self.count}{self.letter}"


def _field(letter: str, default: int, count: int | None) -> Any:
    metadata = {_MARK: _Code(letter, count or 1, many=count is not None)}
    if count is None:
        return dataclasses.field(default=default, metadata=metadata)
    return dataclasses.field(default_factory=lambda: [default] * count, metadata=metadata)


def u8(default: int = 0, count: int | None = None) -> Any:
    """Declare an unsigned byte, or a list of `count`."""
    return _field("B", default, count)


def u16(default: int = 0, count: int | None = None) -> Any:
    """Declare an unsigned number of 2 bytes, or a list of `count`."""
    return _field("H", default, count)


def u32(default: int = 0, count: int | None = None) -> Any:
    """Declare an unsigned number of 4 bytes, or a list of `count`."""
    return _field("I", default, count)


def u64(default: int = 0, count: int | None = None) -> Any:
    """Declare an unsigned number of 8 bytes, or a list of `count`."""
    return _field("Q", default, count)


def s16(default: int = 0, count: int | None = None) -> Any:
    """Declare a signed number of 2 bytes, or a list of `count`."""
    return _field("h", default, count)


def s32(default: int = 0, count: int | None = None) -> Any:
    """Declare a signed number of 4 bytes, or a list of `count`."""
    return _field("i", default, count)


def octets(size: int, default: bytes = b"") -> Any:
    """Declare `size` bytes, zero where the default is shorter."""
    default = default.ljust(size, b"\0")
    return dataclasses.field(default=default, metadata={_MARK: _Code("s", size)})


def hexadecimal(number: int) -> str:
    """Write a magic number or checksum as the messages do."""
    return f"{number:#010x}"


def record(kind: _Kind) -> _Kind:
    """Make a class of declared fields a dataclass that knows where they lie."""
    kind = dataclasses.dataclass(kind)
    at, kind.offsets, kind.codes = 0, {}, {}
    for field in dataclasses.fields(kind):
        if _MARK in field.metadata:
            code = field.metadata[_MARK]
            kind.offsets[field.name] = at
            kind.codes[field.name] = code
            at += struct.calcsize(f"<{code.text}")
    kind.SIZE = at
    return kind


class Record:
    """A record of fixed layout, without gaps.

    A subclass is marked with `record` and declares its fields in the order of the disk; `check`
    says what must hold of them.

    Attributes:
        SIZE: bytes of the declared fields.
        offsets: where each declared field begins, in bytes.
        byte_order: "<" or ">", as struct has it.
    """

    SIZE: ClassVar[int] = 0
    offsets: ClassVar[dict[str, int]] = {}
    codes: ClassVar[dict[str, _Code]] = {}
    byte_order: str = "<"

    @classmethod
    def unpack(cls, view: Any, *, device: str, byte: int, byte_order: str = "<") -> Self:
        """Read the declared fields, unchecked.

        Args:
            view: readable bytes, from the beginning of the record.
            device: where they come from, for messages.
            byte: where `view` begins on the device.
            byte_order: "<" or ">".

        Raises:
            FormatError: the view ends within the record.
        """
        view = memoryview(view).cast("B")
        if len(view) < cls.SIZE:
            raise FormatError(
                f"too short: {len(view)} bytes where {cls.SIZE} are needed",
                device=device,
                byte=byte,
            )
        layout = "".join(code.text for code in cls.codes.values())
        values = iter(struct.unpack_from(byte_order + layout, view))
        read = {
            name: [next(values) for _ in range(code.count)] if code.many else next(values)
            for name, code in cls.codes.items()
        }
        self = cls(**read)
        if byte_order != "<":
            self.byte_order = byte_order
        return self

    @classmethod
    def decode(cls, view: Any, *, device: str = "data", byte: int = 0) -> Self:
        """Read and check a record.

        Args:
            view: readable bytes, from the beginning of the record.
            device: where they come from, for messages.
            byte: where `view` begins on the device.

        Raises:
            FormatError: this is not such a record, or not one that can be used.
        """
        self = cls.unpack(view, device=device, byte=byte)
        self.check(device=device, byte=byte)
        return self

    def check(self, *, device: str, byte: int) -> None:
        """Raise FormatError where the record is not what it should be."""

    def pack(self) -> bytearray:
        """Return the declared fields as they are, unchecked."""
        values: list[Any] = []
        for name, code in self.codes.items():
            value = getattr(self, name)
            if code.many or code.letter == "s":
                assert len(value) == code.count, f"{name} has {len(value)} of {code.count} places"
            values += value if code.many else [value]
        layout = "".join(code.text for code in self.codes.values())
        try:
            return bytearray(struct.pack(self.byte_order + layout, *values))
        except struct.error as error:
            raise AssertionError(f"{type(self).__name__} does not fit: {error}") from error

    def encode(self) -> bytearray:
        """Return the bytes for the disk; that they would decode again is asserted."""
        self.assert_sound()
        return self.pack()

    def assert_sound(self) -> None:
        """Assert what `check` checks: what we write is never what we would refuse to read."""
        try:
            self.check(device="memory", byte=0)
        except FormatError as error:
            raise AssertionError(str(error)) from error

    @classmethod
    def wrong(
        cls, reason: str, field: str, found: object, expected: object, *, device: str, byte: int
    ) -> FormatError:
        """Return the error that names a field and its byte on the device."""
        return FormatError(
            reason,
            device=device,
            byte=byte + cls.offsets[field],
            field=field,
            found=found,
            expected=expected,
        )
