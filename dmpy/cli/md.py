"""`dmpy md`: arrays of Linux MD.

Superblocks are read and written here, as mdadm does in user space; an array that is in use is the
server's, and is told what to do by messages.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

import click

from dmpy.cli.session import Session, emit, fail, json_option, pass_session

__all__ = ["md_command"]

# Between two looks at an array that is waited for.
_LOOK_SECONDS = 0.1
_RESTING = ("idle", "frozen")
# Members that `create` is told to be without.
_MISSING = "missing"


@click.group("md", short_help="Make, assemble and mend arrays of Linux MD.")
def md_command() -> None:
    """Make, assemble and mend arrays of Linux MD: the disks are those of mdadm.

    DEVICE is a file, a block device, an NBD URI, or another dmpy device; every verb takes --json.
    For example:

    \b
      truncate -s 100M a.img b.img c.img
      dmpy md create r5 --level 5 --bitmap a.img b.img c.img --wait
      dmpy md fail r5 b.img
      dmpy md detail r5
      dmpy md re-add r5 b.img --wait
    """


# -- Devices ------------------------------------------------------------------------------------


class _Devices:
    """Devices that a command names, open for as long as superblocks are read or written.

    Args:
        session: of the command.
        words: as typed.
        readonly: open them for reading.
        in_use: take those too that a server uses; what is read may change meanwhile.

    Attributes:
        opened: device by word, in the order of the command line.
    """

    def __init__(self, session: Session, words: Sequence[str], *, readonly: bool = True,
                 in_use: bool = False) -> None:
        self._session = session
        self._in_use = in_use
        self._readonly = readonly
        self._words: dict[int, str] = {}
        self.opened: dict[str, Any] = {}
        if len(set(words)) != len(words):
            twice = next(word for word in words if words.count(word) > 1)
            raise OSError(errno.EINVAL, f"{twice} is named twice")
        try:
            for word in words:
                self._open(word)
        except BaseException:
            self.close()
            raise

    def _open(self, word: str) -> None:
        from dmpy.backing import open_leaf

        target, table_word = self._place(word)
        try:
            leaf = open_leaf(target, readonly=self._readonly, cwd=os.getcwd())
        except OSError as error:
            if error.errno != errno.EBUSY or not self._in_use:
                raise
            leaf = _UsedFile(target)
        if table_word != target:
            leaf.name = word
        self.opened[word] = leaf
        self._words[id(leaf)] = table_word

    # What to open here, and the word for a table. A device of the server is opened over NBD.
    def _place(self, word: str) -> tuple[str, str]:
        if "://" in word or word.startswith("mem:"):
            return word, word
        name = word.removeprefix("/dev/mapper/")
        if "/" not in name and not os.path.exists(word) and self._is_ours(name):
            socket = os.path.join(self._session.runtime, "nbd.sock")
            return f"nbd+unix:///{quote(name, safe='')}?socket={quote(socket)}", name
        return os.path.abspath(word), os.path.abspath(word)

    def _is_ours(self, name: str) -> bool:
        from dmpy.client import ServerGone

        try:
            return any(info["name"] == name for info in self._session.call("info", start=False))
        except ServerGone:
            return False                                # without a server there are no devices

    @property
    def table_words(self) -> list[str]:
        """The devices' words for a table."""
        return list(self._words.values())

    def word(self, disk: Any) -> str:
        """Return the word for a disk in a table."""
        return self._words[id(disk.medium)]

    def close(self) -> None:
        """Close them, so that the server can open them."""
        for leaf in self.opened.values():
            leaf.close()

    def __enter__(self) -> _Devices:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


# A file that is in use, for looking at.
class _UsedFile:
    def __init__(self, path: str) -> None:
        self.name = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.lseek(self._fd, 0, os.SEEK_END)

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Read as BlockDevice.preadv() does."""
        if os.preadv(self._fd, buffers, offset) != sum(map(len, buffers)):
            raise OSError(errno.EIO, f"{self.name}: ends before byte {self.size}")

    def close(self) -> None:
        """Give the file back."""
        os.close(self._fd)


# Refuse a name that is taken before a superblock is written.
def _free_name(session: Session, name: str) -> None:
    if any(info["name"] == name for info in session.call("info")):
        raise OSError(errno.EBUSY, f"device {name} exists already")


# -- Arrays in use ------------------------------------------------------------------------------


# Everything that is known of an array.
def _detail(session: Session, name: str) -> dict[str, Any]:
    _line(session, name)
    reply = session.call("message", name=name, sector=0, message="detail")["reply"]
    return {"device": name, **json.loads(reply)}


# The one line of an array's table: sectors, uuid, words.
def _line(session: Session, name: str) -> tuple[int, str, list[str]]:
    lines = session.call("table", name=name, inactive=False, showkeys=False)["lines"]
    if len(lines) != 1 or lines[0][2] != "md":
        raise OSError(errno.EINVAL, f"device {name} is no MD array")
    uuid, _, *words = lines[0][3].split()
    return lines[0][1], uuid, words


def _message(session: Session, name: str, *words: str) -> str:
    text = " ".join(_quoted(word) for word in words)
    return session.call("message", name=name, sector=0, message=text)["reply"]


def _quoted(word: str) -> str:
    from dmpy.table import escape

    return escape(word)


# Give an array another table. It stops in order and is assembled anew; where that is refused it
# goes on as it was.
def _reload(session: Session, name: str, sectors: int, uuid: str, words: Sequence[str]) -> None:
    quoted = " ".join(map(_quoted, words))
    table = f"0 {sectors} md {uuid} {len(words)} {quoted}"
    session.call("load", name=name, table=table, readonly=None, cwd=os.getcwd())
    try:
        session.call("resume", name=name)
    except OSError:
        session.call("clear", name=name)
        session.call("resume", name=name)
        raise


# The word in an array's table for a device that somebody typed, or None.
def _word_in(words: Sequence[str], typed: str) -> str | None:
    plain = typed.removeprefix("/dev/mapper/")
    for word in words:
        if word in (typed, plain, os.path.abspath(typed)):
            return word
    return None


def _known(session: Session, name: str, typed: str) -> str:
    words = [each["device"] for each in _detail(session, name)["devices"]]
    word = _word_in(words, typed)
    if word is None:
        raise OSError(errno.ENODEV, f"{typed} is no device of {name} "
                      f"(expected {', '.join(words)})")
    return word


# The word for a device that is to be in an array's table from now on, and whether it is new there.
def _brought_in(session: Session, name: str, typed: str) -> tuple[str, bool]:
    sectors, uuid, words = _line(session, name)
    word = _word_in(words, typed)
    if word is not None:
        return word, False
    with _Devices(session, [typed]) as devices:
        word = devices.table_words[0]
    _reload(session, name, sectors, uuid, [*words, word])
    return word, True


# Take a device out of an array's table.
def _let_go(session: Session, name: str, word: str) -> None:
    sectors, uuid, words = _line(session, name)
    left = [each for each in words if each != word]
    if left != words and any(each != "-" for each in left):
        _reload(session, name, sectors, uuid, left)


# -- Waiting ------------------------------------------------------------------------------------


# Wait until an array has nothing more to do, with a bar on a terminal.
def _wait(session: Session, name: str) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(name)
        found = _detail(session, name)
        while _busy(found):
            what = found["replacing"] or found
            action = "replace" if found["replacing"] else found["action"]
            bar.update(task, description=f"{name}: {action}", completed=what["done"],
                       total=what["total"] or 1)
            time.sleep(_LOOK_SECONDS)
            found = _detail(session, name)
    return found


# Whether an array works on something, or is about to.
def _busy(found: dict[str, Any]) -> bool:
    return found["action"] not in _RESTING or found["due"] or found["replacing"] is not None


def _wait_option(command: Any) -> Any:
    return click.option("--wait", is_flag=True, help="Wait until the array is at rest.")(command)


# What a verb prints that changed an array: with --json everything, else nothing.
def _report(session: Session, name: str, wait: bool, as_json: bool) -> None:
    if wait:
        _wait(session, name)
    emit(_detail(session, name) if as_json else None, None, as_json)


# -- create, assemble, stop ---------------------------------------------------------------------


@md_command.command("create")
@click.argument("name")
@click.argument("devices", nargs=-1, required=True, metavar="DEVICE...")
@click.option("-l", "--level", required=True, help="raid0, raid1, raid4, raid5, raid6 or raid10.")
@click.option("-n", "--raid-devices", type=click.IntRange(min=1), metavar="N",
              help="Members; all devices but the spares when left out.")
@click.option("-x", "--spare-devices", type=click.IntRange(min=0), default=0, metavar="N",
              help="Spares, the last ones named.")
@click.option("-c", "--chunk", metavar="SIZE", help="Such as 64K; 512K when left out.")
@click.option("-p", "--layout", help="As mdadm names it: left-symmetric, n2, f2, o2 ...")
@click.option("-e", "--metadata", default="1.2", help="Version: 0.90, 1.0, 1.1 or 1.2.")
@click.option("-b", "--bitmap/--no-bitmap", default=False, help="Keep a write-intent bitmap.")
@click.option("--bitmap-chunk", metavar="SIZE", help="Of the members, for each bit.")
@click.option("--assume-clean", is_flag=True, help="The members agree already.")
@click.option("-z", "--size", metavar="SIZE", help="To use of each member.")
@click.option("--data-offset", metavar="SIZE", help="Where data begins on each member.")
@click.option("-N", "--name", "label", help="The array's name in its superblocks; NAME.")
@click.option("-W", "--write-mostly", multiple=True, metavar="DEVICE",
              help="A member to read only when nothing else can be.")
@click.option("-f", "--force", is_flag=True, help="Also over what is on the devices.")
@_wait_option
@json_option
@pass_session
def _create(session: Session, name: str, devices: tuple[str, ...], wait: bool, as_json: bool,
              **options: Any) -> None:
    """Make an array of DEVICEs and serve it as NAME. `missing` stands for a member to come."""
    from dmpy.md.assemble import assemble, open_disks, table_text
    from dmpy.md.create import create

    recipe, count = _recipe(name, devices, options)
    _free_name(session, name)
    words = [word for word in devices if word != _MISSING]
    with _Devices(session, words, readonly=False) as opened:
        each = [opened.opened.get(word) for word in devices]
        if None in each[count:]:
            raise click.UsageError("a spare cannot be missing")
        create(each[:count], each[count:], recipe, force=options["force"])
        found = assemble(open_disks(list(opened.opened.values())))
        table = table_text(found, lambda disk: _quoted(opened.word(disk)))
    _serve(session, name, found, table, readonly=False)
    _report(session, name, wait, as_json)


# What `create` is to make: the recipe, and how many of the devices are members.
def _recipe(name: str, devices: Sequence[str], options: dict[str, Any]) -> tuple[Any, int]:
    from dmpy.md.create import Recipe, layout_number, level_number

    level = level_number(options["level"])
    count = options["raid_devices"] or len(devices) - options["spare_devices"]
    if count + options["spare_devices"] != len(devices) or count < 1:
        raise click.UsageError(
            f"{len(devices)} devices are named (expected {count + options['spare_devices']})"
        )
    unknown = set(options["write_mostly"]) - set(devices)
    if unknown:
        raise click.UsageError(f"--write-mostly: {min(unknown)} is not among the devices")
    if options["write_mostly"] and level != 1:
        raise click.UsageError("--write-mostly is for raid1")
    layout = options["layout"]
    recipe = Recipe(
        level,
        None if layout is None else layout_number(level, layout),
        chunk_size=_size(options["chunk"]),
        version=options["metadata"],
        name=options["label"] or name,
        size=_size(options["size"]),
        data_offset=None if options["data_offset"] is None else _size(
            options["data_offset"]) >> 9,
        bitmap=options["bitmap"] or options["bitmap_chunk"] is not None,
        bitmap_chunk=_size(options["bitmap_chunk"]),
        assume_clean=options["assume_clean"],
        write_mostly=frozenset(devices.index(word) for word in options["write_mostly"]),
    )
    return recipe, count


def _size(text: str | None) -> int:
    from dmpy.units import parse_size

    return 0 if text is None else parse_size(text)


# Have the server use an array.
def _serve(session: Session, name: str, found: Any, table: str, *, readonly: bool) -> None:
    session.call("create", name=name, table=table, uuid=f"MD-{found.uuid}", readonly=readonly,
                 minor=None, cwd=os.getcwd())


@md_command.command("assemble")
@click.argument("name")
@click.argument("devices", nargs=-1, required=True, metavar="DEVICE...")
@click.option("-u", "--uuid", help="Take only disks of this array.")
@click.option("-r", "--readonly", is_flag=True, help="Refuse writes, and write nothing.")
@click.option("-f", "--force", is_flag=True,
              help="Take stale disks where there are too few, a dirty degraded array for clean.")
@_wait_option
@json_option
@pass_session
def _assemble(session: Session, name: str, devices: tuple[str, ...], uuid: str | None,
                readonly: bool, force: bool, wait: bool, as_json: bool) -> None:
    """Put DEVICEs, in any order, together to an array and serve it as NAME.

    Stale disks are left out, and an array that is degraded is used when that is safe; both are
    said. Nothing is written to a disk that is not used.
    """
    from dmpy.md.assemble import assemble, disk_of, table_text
    from dmpy.md.force import force_assembly

    if force and readonly:
        raise click.UsageError("--force and --readonly exclude each other")
    _free_name(session, name)
    with _Devices(session, devices, readonly=not force) as opened:
        disks = [disk_of(each, uuid=uuid) for each in opened.opened.values()]
        if uuid is not None:
            disks = [disk for disk in disks if disk.uuid == uuid]
            if not disks:
                raise OSError(errno.ENODEV, f"no disk is of array {uuid}")
        found = assemble(disks, force=force)
        if found.forced:
            force_assembly(found)
        table = table_text(found, lambda disk: _quoted(opened.word(disk)))
    _serve(session, name, found, table, readonly=readonly)
    for sentence in found.warnings():
        click.echo(f"dmpy: {name}: {sentence}", err=True)
    _report(session, name, wait, as_json)


@md_command.command("stop")
@click.argument("name")
@json_option
@pass_session
def _stop(session: Session, name: str, as_json: bool) -> None:
    """Stop the array NAME that nobody uses; its disks are left in order."""
    _line(session, name)
    emit(session.call("remove", name=name, force=False, deferred=False), None, as_json)


# -- examine, zero-superblock, detail -----------------------------------------------------------


@md_command.command("examine")
@click.argument("devices", nargs=-1, required=True, metavar="DEVICE...")
@json_option
@pass_session
def _examine(session: Session, devices: tuple[str, ...], as_json: bool) -> None:
    """Say what the superblocks of DEVICEs say."""
    from dmpy.md.assemble import disk_of
    from dmpy.md.examine import describe, text

    with _Devices(session, devices, in_use=True) as opened:
        found = [describe(disk_of(leaf)) for leaf in opened.opened.values()]
    emit(found if len(found) > 1 else found[0], "\n\n".join(map(text, found)), as_json)


@md_command.command("zero-superblock")
@click.argument("devices", nargs=-1, required=True, metavar="DEVICE...")
@json_option
@pass_session
def _zero(session: Session, devices: tuple[str, ...], as_json: bool) -> None:
    """Overwrite the superblocks of MD on DEVICEs, which no array uses."""
    from dmpy.md.create import zero_superblocks

    with _Devices(session, devices, readonly=False) as opened:
        wiped = {word: zero_superblocks(leaf) for word, leaf in opened.opened.items()}
    without = [word for word, versions in wiped.items() if not versions]
    if without:
        fail(f"{', '.join(without)}: no superblock of an MD array")
    emit(wiped, None, as_json)


@md_command.command("detail")
@click.argument("name")
@_wait_option
@json_option
@pass_session
def _show_detail(session: Session, name: str, wait: bool, as_json: bool) -> None:
    """Show an array: its state, its members, and how far it is with what it does."""
    found = _wait(session, name) if wait else _detail(session, name)
    emit(found, _detail_text(found), as_json)


def _detail_text(found: dict[str, Any]) -> str:
    chunk = found["chunk_size"]
    bitmap = found["bitmap"]
    facts = [
        ("UUID", found["uuid"]),
        ("Name", found["name"]),
        ("Version", found["version"]),
        ("Level", " ".join(filter(None, (found["level"], found["layout"])))),
        ("Chunk size", f"{chunk >> 10} KiB" if chunk else ""),
        ("Size", f"{found['size'] >> 9} sectors ({found['size'] / (1 << 20):.4g} MiB)"),
        ("State", found["state"] + (", degraded" if found["degraded"] else "")),
        ("Members", f"{found['raid_disks']} [{found['health']}]"),
        ("Action", _action_words(found)),
        ("Mismatches", f"{found['mismatches']} sectors"),
        ("Events", found["events"]),
        ("Bitmap", f"{bitmap['dirty']} of {bitmap['bits']} bits set" if bitmap else "none"),
    ]
    lines = [f"{name + ':':<12} {value}" for name, value in facts if value != ""]
    lines += ["", f"{'Place':>5}  {'State':<12} Device"]
    for each in found["devices"]:
        place = "-" if each["place"] is None else each["place"]
        reason = f" ({each['reason']})" if each["reason"] else ""
        lines.append(f"{place:>5}  {each['state']:<12} {each['device']}{reason}")
    return "\n".join([f"{found['device']}:", *lines])


def _action_words(found: dict[str, Any]) -> str:
    what = found["replacing"]
    if what is not None:
        return f"replace, {100 * what['done'] // what['total']} %"
    if found["action"] in _RESTING:
        return found["action"]
    return f"{found['action']}, {100 * found['done'] // (found['total'] or 1)} %"


# -- members ------------------------------------------------------------------------------------


@md_command.command("fail")
@click.argument("name")
@click.argument("devices", nargs=-1, required=True, metavar="DEVICE...")
@_wait_option
@json_option
@pass_session
def _fail(session: Session, name: str, devices: tuple[str, ...], wait: bool,
            as_json: bool) -> None:
    """Leave members out of the array NAME; a spare takes over by itself."""
    for typed in devices:
        _message(session, name, "fail", _known(session, name, typed))
    _report(session, name, wait, as_json)


@md_command.command("remove")
@click.argument("name")
@click.argument("devices", nargs=-1, required=True, metavar="DEVICE...")
@json_option
@pass_session
def _remove(session: Session, name: str, devices: tuple[str, ...], as_json: bool) -> None:
    """Let go of members that have failed, or of spares; `failed` stands for all that have."""
    for typed in _failed_ones(session, name, devices):
        word = _known(session, name, typed)
        _message(session, name, "remove", word)
        _let_go(session, name, word)
    _report(session, name, False, as_json)


def _failed_ones(session: Session, name: str, devices: Sequence[str]) -> Iterator[str]:
    for typed in devices:
        if typed != "failed":
            yield typed
            continue
        for each in _detail(session, name)["devices"]:
            if each["state"] in ("faulty", "unused"):
                yield each["device"]


@md_command.command("add")
@click.argument("name")
@click.argument("devices", nargs=-1, required=True, metavar="DEVICE...")
@click.option("-f", "--force", is_flag=True, help="Also over what is on the devices.")
@_wait_option
@json_option
@pass_session
def _add(session: Session, name: str, devices: tuple[str, ...], force: bool, wait: bool,
           as_json: bool) -> None:
    """Add spares to the array NAME, which are built in where a member is missing."""
    for typed in devices:
        _bring_in(session, name, typed, "add", *(["force"] if force else []))
    _report(session, name, wait, as_json)


@md_command.command("re-add")
@click.argument("name")
@click.argument("devices", nargs=-1, required=True, metavar="DEVICE...")
@_wait_option
@json_option
@pass_session
def _re_add(session: Session, name: str, devices: tuple[str, ...], wait: bool,
              as_json: bool) -> None:
    """Take former members back in their places; the bitmap says what they lack."""
    for typed in devices:
        _bring_in(session, name, typed, "re-add")
    _report(session, name, wait, as_json)


# Send a message about a device that the table may not have yet; it goes again when refused.
def _bring_in(session: Session, name: str, typed: str, verb: str, *more: str) -> str:
    word, is_new = _brought_in(session, name, typed)
    try:
        _message(session, name, verb, word, *more)
    except OSError:
        if is_new:
            # The refusal is what matters; the table is as good with the word as without.
            with contextlib.suppress(OSError):
                _let_go(session, name, word)
        raise
    return word


@md_command.command("replace")
@click.argument("name")
@click.argument("device")
@click.option("--with", "new", required=True, metavar="DEVICE",
              help="What takes its place: a spare, or a device that is added.")
@click.option("-f", "--force", is_flag=True, help="Also over what is on the new device.")
@_wait_option
@json_option
@pass_session
def _replace(session: Session, name: str, device: str, new: str, force: bool, wait: bool,
               as_json: bool) -> None:
    """Copy the member DEVICE to another one, which then takes its place.

    The array is as redundant as it was all the time. When the server stops before the copy is
    complete, the new device is a spare again.
    """
    old = _known(session, name, device)
    word, _ = _brought_in(session, name, new)
    state = next(e["state"] for e in _detail(session, name)["devices"] if e["device"] == word)
    if state == "unused":
        _bring_in(session, name, new, "add", *(["force"] if force else []))
    _message(session, name, "replace", old, word)
    # The copy begins where no request is under way.
    session.call("suspend", name=name, noflush=False, nolockfs=False)
    session.call("resume", name=name)
    _report(session, name, wait, as_json)


# -- grow, check, repair ------------------------------------------------------------------------


@md_command.command("grow")
@click.argument("name")
@click.option("-n", "--raid-devices", type=click.IntRange(min=1), metavar="N",
              help="Members of a RAID 1.")
@click.option("-z", "--size", metavar="SIZE", help="To use of each member; max for all there is.")
@_wait_option
@json_option
@pass_session
def _grow(session: Session, name: str, raid_devices: int | None, size: str | None, wait: bool,
            as_json: bool) -> None:
    """Give the array NAME more members, or use more of each. New connections see the new size."""
    if (raid_devices is None) == (size is None):
        raise click.UsageError("one of --raid-devices and --size is needed")
    old, uuid, words = _line(session, name)
    if raid_devices is not None:
        reply = _message(session, name, "grow", "members", str(raid_devices))
    else:
        sectors = 0 if size == "max" else _size(size) >> 9
        if size != "max" and not sectors:
            raise click.UsageError(f"--size must be at least a sector (got {size})")
        # Devices have their sizes read anew, which may be what has grown.
        _reload(session, name, old, uuid, words)
        reply = _message(session, name, "grow", "size", str(sectors))
    _reload(session, name, int(reply), uuid, words)
    _report(session, name, wait, as_json)


@md_command.command("check")
@click.argument("name")
@_wait_option
@json_option
@pass_session
def _check(session: Session, name: str, wait: bool, as_json: bool) -> None:
    """See whether the members of the array NAME agree; with --wait, say so."""
    _scrub(session, name, "check", wait, as_json)


@md_command.command("repair")
@click.argument("name")
@_wait_option
@json_option
@pass_session
def _repair(session: Session, name: str, wait: bool, as_json: bool) -> None:
    """Make the members of the array NAME agree."""
    _scrub(session, name, "repair", wait, as_json)


def _scrub(session: Session, name: str, action: str, wait: bool, as_json: bool) -> None:
    _line(session, name)
    _message(session, name, action)
    found = _wait(session, name) if wait else _detail(session, name)
    emit(found, f"{found['mismatches']} sectors disagree" if wait and action == "check" else None,
         as_json)
