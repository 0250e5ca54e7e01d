"""The errors that dmpy raises on purpose; anything else that escapes is a bug of ours."""

from __future__ import annotations

import errno as errnos

__all__ = ["DeviceError", "FormatError", "TableError"]


class TableError(ValueError):
    """A table that cannot be loaded; `str()` is the whole sentence.

    Args:
        reason: thing first, then what is wrong, then (got X) or (expected Y).
        line: number of the table line, counted from 1, or None for the table as a whole.
        target: the target's type name, or None where the line did not get that far.
        argument: the name of the argument at fault, or None.
        errno: what the kernel's ioctl would give.
    """

    def __init__(
        self,
        reason: str,
        *,
        line: int | None = None,
        target: str | None = None,
        argument: str | None = None,
        errno: int = errnos.EINVAL,
    ) -> None:
        self.errno = errno
        self.reason = reason
        self.line = line
        self.target = target
        self.argument = argument
        place = [f"line {line}"] if line is not None else []
        place += [target] if target is not None else []
        super().__init__(f"{', '.join(place)}: {reason}" if place else reason)


class FormatError(ValueError):
    """A disk that does not hold what it should; `str()` is the whole sentence.

    Args:
        reason: what is wrong, in words.
        device: name of the device.
        byte: where the field begins, in bytes from the start of the device.
        field: the kernel's name of the field.
        found: the value that is there.
        expected: the value, or the rule, that should hold.
    """

    def __init__(
        self,
        reason: str,
        *,
        device: str,
        byte: int,
        field: str | None = None,
        found: object = None,
        expected: object = None,
    ) -> None:
        self.device = device
        self.byte = byte
        self.field = field
        self.found = found
        self.expected = expected
        detail = f": {field} is {found}, expected {expected}" if field is not None else ""
        super().__init__(f"{device}: byte {byte}: {reason}{detail}")


class DeviceError(OSError):
    """A request that a device cannot serve; always carries an errno.

    Args:
        errno: the number that reaches the client.
        reason: the sentence; also `strerror`.
        device: name of the device, or None.
        offset: bytes from the start of that device, or None.
    """

    def __init__(
        self, errno: int, reason: str, *, device: str | None = None, offset: int | None = None
    ) -> None:
        super().__init__(errno, reason)
        self.device = device
        self.offset = offset

    def again(self) -> DeviceError:
        """Return an error that says the same, to be raised another time.

        An exception object keeps the traceback of every time it was raised.
        """
        return DeviceError(self.errno, self.strerror, device=self.device, offset=self.offset)

    def __str__(self) -> str:
        return self.strerror
