"""Targets: what a table line does with the bytes of its range.

A target is one file in `dmpy/targets/`, found by the word in the table, or a class that another
package offers under the entry-point group `dmpy.targets`.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import pkgutil
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from enum import IntEnum
from functools import reduce
from importlib import metadata
from typing import ClassVar, NoReturn

from dmpy.device import BlockDevice, BlockSize, Buffers, Cutter, Extent, total
from dmpy.errors import DeviceError, TableError
from dmpy.plan import Lane, Requeue, Segment, rest_until
from dmpy.units import SECTOR_SHIFT, SECTOR_SIZE, exact_div

__all__ = [
    "Args",
    "Leg",
    "MapTarget",
    "Op",
    "Run",
    "Target",
    "by_leg",
    "find_target",
    "flush_all",
    "target_types",
]

ENTRY_POINTS = "dmpy.targets"

Run = tuple[int, int, int]
"""A piece of a request that is contiguous on one leg: (leg, offset on the leg, length), bytes."""

# What is not a device at all; lookup_bdev() makes one errno of it.
_NO_DEVICE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENOTBLK}

_DIGITS = re.compile(r"[0-9]+", re.ASCII)
_DIGITS_PLUS = re.compile(r"\+?[0-9]+", re.ASCII)


class Op(IntEnum):
    """What a request wants, for targets that map reads and writes differently."""

    READ = 0
    WRITE = 1
    DISCARD = 2
    ZERO = 3
    EXTENTS = 4


# The lane of legs that are not part of a plan: nothing is passed over, nobody waits for it.
_NO_PLAN = Lane()


# Bound once: looking a member up in its class takes longer than using it.
_READ, _WRITE = Op.READ, Op.WRITE


class Leg:
    """A section of a lower device that a target uses; offsets are bytes from its start.

    Attributes:
        device: the device that the table names.
        start: bytes from the start of the device.
        length: bytes.
        segment: where the section really is, once devices that can be passed over are.
    """

    __slots__ = ("device", "length", "segment", "start")

    def __init__(self, device: BlockDevice, start: int, length: int) -> None:
        self.device = device
        self.start = start
        self.length = length
        self.segment = Segment(0, length, device, start, _NO_PLAN)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Leg):
            return NotImplemented
        mine = (self.device, self.start, self.length)
        return mine == (other.device, other.start, other.length)

    __hash__ = None

    # The segment to use, with its lane entered.
    def _enter(self) -> Segment:
        while True:
            segment = self.segment
            segment.lane.entered += 1
            if segment is self.segment:
                return segment
            segment.lane.left += 1

    def preadv(self, buffers: Buffers, offset: int) -> None:
        """Read as BlockDevice.preadv() does."""
        segment = self.segment
        lane = segment.lane
        lane.entered += 1
        try:
            # Fast path: nobody has changed the plan just now.
            if segment is self.segment:
                segment.preadv(buffers, offset + segment.skew)
                return
        except Requeue:
            pass  # made again below, when the plan has changed
        finally:
            lane.left += 1
        rest_until(lambda: self.segment is not segment)
        self.preadv(buffers, offset)

    def pwritev(self, buffers: Buffers, offset: int, *, fua: bool = False) -> None:
        """Write as BlockDevice.pwritev() does."""
        segment = self.segment
        lane = segment.lane
        lane.entered += 1
        try:
            # Fast path: nobody has changed the plan just now.
            if segment is self.segment:
                segment.pwritev(buffers, offset + segment.skew, fua=fua)
                return
        except Requeue:
            pass  # made again below, when the plan has changed
        finally:
            lane.left += 1
        rest_until(lambda: self.segment is not segment)
        self.pwritev(buffers, offset, fua=fua)

    def flush(self) -> None:
        """Flush the whole device below."""
        self._act(lambda segment: segment.device.flush())

    def discard(self, offset: int, length: int) -> None:
        """Discard as BlockDevice.discard() does."""
        self._act(lambda segment: segment.device.discard(offset + segment.skew, length))

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        """Write zeroes as BlockDevice.write_zeroes() does."""
        self._act(
            lambda segment: segment.device.write_zeroes(
                offset + segment.skew, length, may_unmap=may_unmap, fast_only=fast_only
            )
        )

    # Do something on the segment's device, again when it is given back.
    def _act(self, act: Callable[[Segment], None]) -> None:
        while True:
            segment = self._enter()
            try:
                act(segment)
                return
            except Requeue:
                pass  # made again below, when the plan has changed
            finally:
                segment.lane.left += 1
            rest_until(lambda: self.segment is not segment)

    def extents(self, offset: int, length: int) -> list[Extent]:
        """Return the extents of a piece, in bytes from the start of the leg."""
        segment = self._enter()
        try:
            skew = segment.skew
            return [
                Extent(extent.offset - skew, extent.length, extent.kind)
                for extent in segment.device.extents(offset + skew, length)
            ]
        finally:
            segment.lane.left += 1

    def table(self) -> str:
        """Return the leg as a table has it: device and start sector."""
        return f"{self.device.table_name} {exact_div(self.start, SECTOR_SIZE)}"


# What `event` is until the target is part of a live table.
def _nobody_waits() -> None:
    pass


class Target(BlockDevice):
    """One line of a table; itself a block device of as many bytes.

    Args:
        length: bytes.
        legs: the sections of lower devices that it uses; the kernel's iterate_devices, as data.

    Attributes:
        type_name: the word in the table, as the kernel spells it.
        version: the version of the kernel's target whose grammar and status it follows.
        transparent: byte b is always byte b of the one leg, so a plan may point straight at it.
        event: tells whoever waits for the device that something happened, dm_table_event().
        noflush: during a suspend: requests that are held back are to be given back for the next
            table by raising Requeue, dm_noflush_suspending().
    """

    type_name: ClassVar[str]
    version: ClassVar[tuple[int, int, int]]
    transparent: ClassVar[bool] = False

    def __init__(self, length: int, legs: Sequence[Leg] = ()) -> None:
        self.name = self.type_name
        self.size = length
        self.legs = list(legs)
        self.event: Callable[[], None] = _nobody_waits
        self.noflush = False
        self.block_size = reduce(
            BlockSize.joined, (leg.device.block_size for leg in self.legs), BlockSize()
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Target):
            return NotImplemented
        return (
            self.type_name == other.type_name
            and self.size == other.size
            and self.legs == other.legs
            and self.table() == other.table()
        )

    __hash__ = object.__hash__

    @classmethod
    @abstractmethod
    def parse(cls, args: Args, length: int) -> Target:
        """Make the target of a table line, the kernel's ctr.

        Args:
            args: the words after the target's name.
            length: bytes of the line.

        Raises:
            TableError: the words do not make a target.
        """

    @abstractmethod
    def table(self) -> str:
        """Return the arguments as a table has them; parse() of them gives an equal target."""

    def table_without_secrets(self) -> str:
        """Return table() with zeroes in the place of keys."""
        return self.table()

    def status(self) -> str:
        """Return the status line's words after the target's name, in the kernel's grammar."""
        return ""

    def message(self, *words: str) -> str:
        """Act on a message and return the reply, which is empty for most.

        Raises:
            OSError: EINVAL when the target does not know the message.
        """
        raise DeviceError(
            errno.EINVAL, f"{self.type_name} takes no messages (got {' '.join(words)[:80]})"
        )

    def presuspend(self) -> None:
        """Get ready to be suspended, or removed; I/O still flows.

        Background work ends, and requests that the target holds back fail, or are given back with
        `noflush`. May be called again.
        """

    def postsuspend(self) -> None:
        """Come to rest; no I/O is under way."""

    def resume(self) -> None:
        """Get ready for I/O, before the first request and after each suspend."""

    def flush(self) -> None:
        """Flush every leg's device once."""
        flush_all({id(leg.device): leg for leg in self.legs}.values())


class MapTarget(Target):
    """A target that only says where bytes live; this class moves them.

    Attributes:
        pure: map() says the same for ever, for reads and writes alike.
    """

    pure: ClassVar[bool] = False

    @abstractmethod
    def map(self, op: Op, offset: int, length: int) -> list[Run]:
        """Say where a piece of the target lives.

        Args:
            op: what is wanted.
            offset: bytes from the start of the target.
            length: bytes, more than none.

        Returns:
            Runs that follow each other and fill the piece exactly.
        """

    def read_spot(self, offset: int, length: int) -> tuple[int, int]:
        if not self.pure:
            return -1, 0
        runs = self.map(_READ, offset, length)
        leg, place, size = runs[0]
        segment = self.legs[leg].segment
        if size != length or segment.fd < 0:
            return -1, 0
        return segment.fd, place + segment.skew

    write_spot = read_spot

    def leg_error(self, leg: int, error: OSError) -> None:
        """Take note that a leg failed a request; the error goes on to whoever asked."""

    def preadv(self, buffers: Buffers, offset: int) -> None:
        length = len(buffers[0]) if len(buffers) == 1 else total(buffers)
        runs = self.map(_READ, offset, length)
        leg = 0
        try:
            if len(runs) == 1:
                leg, place, size = runs[0]
                assert size == length, self.type_name
                self.legs[leg].preadv(buffers, place)
            else:
                for leg, place, views in by_leg(runs, buffers):
                    self.legs[leg].preadv(views, place)
        except OSError as error:
            self.leg_error(leg, error)
            raise

    def pwritev(self, buffers: Buffers, offset: int, *, fua: bool = False) -> None:
        length = len(buffers[0]) if len(buffers) == 1 else total(buffers)
        runs = self.map(_WRITE, offset, length)
        leg = 0
        try:
            if len(runs) == 1:
                leg, place, size = runs[0]
                assert size == length, self.type_name
                self.legs[leg].pwritev(buffers, place, fua=fua)
            else:
                for leg, place, views in by_leg(runs, buffers):
                    self.legs[leg].pwritev(views, place, fua=fua)
        except OSError as error:
            self.leg_error(leg, error)
            raise

    def flush(self) -> None:
        """Flush every leg's device once, all of them, then raise the first error."""
        first: OSError | None = None
        # The first leg on each device speaks for it.
        legs: dict[int, int] = {}
        for number, leg in enumerate(self.legs):
            legs.setdefault(id(leg.device), number)
        for number in legs.values():
            try:
                self.legs[number].flush()
            except OSError as error:
                self.leg_error(number, error)
                first = first or error
        if first is not None:
            raise first

    def discard(self, offset: int, length: int) -> None:
        for leg, place, size in _joined(self.map(Op.DISCARD, offset, length)):
            try:
                self.legs[leg].discard(place, size)
            except OSError as error:
                self.leg_error(leg, error)
                raise

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        for leg, place, size in _joined(self.map(Op.ZERO, offset, length)):
            try:
                self.legs[leg].write_zeroes(place, size, may_unmap=may_unmap, fast_only=fast_only)
            except OSError as error:
                self.leg_error(leg, error)
                raise

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        for leg, place, size in self.map(Op.EXTENTS, offset, length):
            for extent in self.legs[leg].extents(place, size):
                yield Extent(offset + extent.offset - place, extent.length, extent.kind)
            offset += size


def by_leg(runs: list[Run], buffers: Buffers) -> list[tuple[int, int, list[memoryview]]]:
    """Gather what lies together on a leg, so that a request costs one system call a leg.

    Args:
        runs: where the bytes of the buffers live, in order.
        buffers: views of bytes.

    Returns:
        (leg, offset on the leg, views) of each stretch that is contiguous on its leg.
    """
    stretches: list[tuple[int, int, list[memoryview]]] = []
    last: dict[int, tuple[int, list[memoryview]]] = {}
    assert sum(length for _, _, length in runs) == total(buffers), runs[0]
    cut = Cutter(buffers)
    for leg, place, length in runs:
        views = cut.take(length)
        end, gathered = last.get(leg, (-1, views))
        if end == place:
            gathered += views
        else:
            gathered = views
            stretches.append((leg, place, gathered))
        last[leg] = (place + length, gathered)
    return stretches


# The same without buffers: runs of one leg that touch each other become one.
def _joined(runs: list[Run]) -> list[Run]:
    joined: list[Run] = []
    last: dict[int, int] = {}
    for leg, place, length in runs:
        index = last.get(leg)
        if index is not None and joined[index][1] + joined[index][2] == place:
            joined[index] = (leg, joined[index][1], joined[index][2] + length)
        else:
            last[leg] = len(joined)
            joined.append((leg, place, length))
    return joined


def flush_all(devices) -> None:
    """Flush each of several devices or legs, all of them, then raise the first error."""
    first: OSError | None = None
    for device in devices:
        try:
            device.flush()
        except OSError as error:
            first = first or error
    if first is not None:
        raise first


class Args:
    """The words of a table line after the target's name, taken one by one.

    Every method raises TableError with line, target and argument when the words do not fit.

    Args:
        words: the words.
        open_device: gives the device that a word names, or raises OSError.
        line: number of the line, from 1.
        target: the target's name.
    """

    __slots__ = ("_open_device", "_place", "line", "target", "words")

    def __init__(
        self,
        words: Sequence[str],
        open_device: Callable[[str], BlockDevice],
        *,
        line: int = 1,
        target: str = "target",
    ) -> None:
        self.words = words
        self.line = line
        self.target = target
        self._open_device = open_device
        self._place = 0

    @property
    def remaining(self) -> int:
        """How many words have not been taken."""
        return len(self.words) - self._place

    def fail(
        self, reason: str, argument: str | None = None, number: int = errno.EINVAL
    ) -> NoReturn:
        """Refuse the line, with EINVAL or another errno."""
        raise TableError(
            reason, line=self.line, target=self.target, argument=argument, errno=number
        )

    def word(self, name: str) -> str:
        """Take the next word, whatever it is."""
        try:
            word = self.words[self._place]
        except IndexError:
            self.fail(f"{name} is missing (got {len(self.words)} arguments)", name)
        self._place += 1
        return word

    def integer(
        self,
        name: str,
        minimum: int = 0,
        maximum: int = (1 << 64) - 1,
        multiple_of: int = 1,
        *,
        plus: bool = False,
    ) -> int:
        """Take a decimal number.

        Args:
            name: what the number is, for the sentence, with its unit where it has one.
            minimum: the smallest that is right.
            maximum: the largest that is right.
            multiple_of: what it has to be a multiple of.
            plus: whether a plus sign may stand before it, as kstrtouint() allows and
                sscanf("%llu") does not.
        """
        word = self.word(name)
        pattern = _DIGITS_PLUS if plus else _DIGITS
        # Python refuses to read very long numbers; none of more than 20 digits can be right.
        if pattern.fullmatch(word) is None or len(word) > 40:
            self.fail(f"{name} must be a number (got {word[:40]})", name)
        number = int(word)
        if number < minimum:
            self.fail(f"{name} must be at least {minimum} (got {number})", name)
        if number > maximum:
            self.fail(f"{name} must be at most {maximum} (got {number})", name)
        if number % multiple_of:
            self.fail(f"{name} must be a multiple of {multiple_of} (got {number})", name)
        return number

    def choice(self, name: str, options: Sequence[str]) -> str:
        """Take one of some words."""
        word = self.word(name)
        if word not in options:
            self.fail(f"{name} must be one of {', '.join(options)} (got {word})", name)
        return word

    def device(self, name: str = "device") -> BlockDevice:
        """Take a device: path, device name, maj:min, URI or mem:SIZE."""
        word = self.word(name)
        try:
            return self._open_device(word)
        except OSError as error:
            reason = error.strerror or str(error)
            if word not in reason:
                reason = f"{word}: {reason}"
            number = errno.ENODEV if error.errno in _NO_DEVICE else error.errno
            self.fail(f"{name} {reason}", name, number or errno.EIO)

    def leg(self, length: int, name: str = "device") -> Leg:
        """Take `<dev> <start>`, the start in sectors.

        Args:
            length: bytes that the target needs from there on.
            name: what the device is, for the sentence.
        """
        device = self.device(name)
        start_sectors = self.integer(f"start sector on {device.name}", 0, (1 << 55) - 1)
        start = start_sectors << SECTOR_SHIFT
        if start + length > device.size:
            self.fail(
                f"leg {device.name} has {device.size >> SECTOR_SHIFT} sectors, the line needs "
                f"{-(-length >> SECTOR_SHIFT)} from sector {start_sectors}",
                name,
            )
        block = device.block_size.minimum
        if start % block or length % block:
            self.fail(
                f"leg {device.name} has blocks of {block} bytes, the line needs "
                f"{length >> SECTOR_SHIFT} sectors from sector {start_sectors}",
                name,
            )
        return Leg(device, start, length)

    def optional_leg(self, name: str, length: int | None = None) -> Leg | None:
        """Take a device of which the table gives no start, or `-` for none.

        Args:
            name: what the device is, for the sentence.
            length: bytes that the target needs from its start on, None for all of it.
        """
        if self._place < len(self.words) and self.words[self._place] == "-":
            self._place += 1
            return None
        device = self.device(name)
        if length is not None and length > device.size:
            self.fail(
                f"{name} {device.name} has {device.size >> SECTOR_SHIFT} sectors, "
                f"the line needs {length >> SECTOR_SHIFT}",
                name,
            )
        return Leg(device, 0, device.size if length is None else length)

    def check_chunk(self, chunk_size: int, block: int) -> None:
        """Refuse chunks that would cut the blocks of a leg; both are bytes."""
        if chunk_size % block:
            self.fail(
                f"chunk size must be a multiple of the legs' blocks of {block} bytes "
                f"(got {chunk_size >> SECTOR_SHIFT} sectors)",
                "chunk size in sectors",
            )

    def rest(self) -> list[str]:
        """Take all words that are left."""
        words = list(self.words[self._place :])
        self._place = len(self.words)
        return words

    def end(self) -> None:
        """Refuse words that are left over."""
        if self.remaining:
            self.fail(
                f"{self.remaining} argument{'s' * (self.remaining > 1)} too many "
                f"(got {' '.join(self.words[self._place :])[:80]})",
                "arguments",
            )


def find_target(type_name: str) -> type[Target]:
    """Return the target that a table means by a word.

    Built-in targets are in `dmpy.targets.NAME`, where NAME is the word up to its first hyphen;
    others come from the entry-point group `dmpy.targets`.

    Raises:
        TableError: there is no such target; the nearest names are in the sentence.
    """
    try:
        return _found[type_name]
    except KeyError:
        pass
    target = _built_in(type_name) or _third_party(type_name)
    if target is None:
        names = sorted(known.type_name for known in target_types())
        near = difflib.get_close_matches(type_name, names, 3, 0.5)
        hint = f"did you mean {' or '.join(near)}" if near else f"known are {', '.join(names)}"
        raise TableError(f"unknown target type {type_name[:40]!r} ({hint})")
    _found[type_name] = target
    return target


def target_types() -> list[type[Target]]:
    """Return every target that a table can name, by name.

    Those of other packages that cannot be loaded are left out; find_target() says why.
    """
    package = importlib.import_module("dmpy.targets")
    modules = [module.name for module in pkgutil.iter_modules(package.__path__)]
    found = {
        target.type_name: target
        for module in modules
        for target in _targets_in(importlib.import_module(f"dmpy.targets.{module}"))
    }
    for point in metadata.entry_points(group=ENTRY_POINTS):
        with suppress(TableError):
            found.setdefault(point.name, _load(point))
    return [found[name] for name in sorted(found)]


# Word to target, for tables of many lines; never more than the targets that exist.
_found: dict[str, type[Target]] = {}


# The targets that a module defines.
def _targets_in(module) -> list[type[Target]]:
    return [
        thing
        for thing in vars(module).values()
        if isinstance(thing, type)
        and issubclass(thing, Target)
        and thing.__module__ == module.__name__
        and "type_name" in vars(thing)
    ]


# A target from dmpy/targets/, or None.
def _built_in(type_name: str) -> type[Target] | None:
    module_name = type_name.partition("-")[0]
    if not module_name.isidentifier():
        return None
    try:
        module = importlib.import_module(f"dmpy.targets.{module_name}")
    except ModuleNotFoundError as error:
        if error.name != f"dmpy.targets.{module_name}":
            raise
        return None
    for target in _targets_in(module):
        if target.type_name == type_name:
            return target
    return None


# A target of another package, or None.
def _third_party(type_name: str) -> type[Target] | None:
    for point in metadata.entry_points(group=ENTRY_POINTS, name=type_name):
        return _load(point)
    return None


# The class behind an entry point, checked: what another package offers may be anything.
def _load(point: metadata.EntryPoint) -> type[Target]:
    try:
        target = point.load()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise TableError(
            f"entry point {point.name}: {point.value} cannot be loaded: {reason}"
        ) from error
    if not (isinstance(target, type) and issubclass(target, Target)):
        raise TableError(f"entry point {point.name}: {point.value} is not a Target class")
    if target.type_name != point.name:
        raise TableError(
            f"entry point {point.name}: {point.value} calls itself {target.type_name}"
        )
    return target
