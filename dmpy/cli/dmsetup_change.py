"""The verbs of dmsetup that change something, and what is left of udev's.

Source: lvm2 v2_03_16 libdm/dm-tools/dmsetup.c, _create_one_device(), _create_concise(), _load(),
_simple(), _error_device(), _remove(), _remove_all(), _rename(), _udevflags(), _udevcomplete_all();
libdm/ioctl/libdm-iface.c, _create_and_load_v4().
"""

from __future__ import annotations

import errno
import os
import re
import sys
from typing import Any

from dmpy.cli.dmsetup_driver import (
    NAME_LENGTH, UUID_LENGTH, Address, Failed, log_error, log_print,
)
from dmpy.cli.dmsetup_options import atoi
from dmpy.cli.dmsetup_run import Run
from dmpy.cli.format import DM_MAJOR
from dmpy.client import ServerGone

__all__ = [
    "clear", "cookie_value", "create", "load", "measure", "mknodes", "remove", "remove_all",
    "rename", "resume", "setgeometry", "stats", "suspend", "udevcomplete", "udevcomplete_all",
    "udevcookies", "udevcreatecookie", "udevflags", "udevreleasecookie", "wipe_table",
]

Info = dict[str, Any]

# sscanf("%llu %llu %s %n"): numbers need no blank between them and the word that follows.
_LINE = re.compile(r"\s*([+-]?[0-9]++)\s*([+-]?[0-9]++)\s*(\S+)\s*(.*)", re.DOTALL)
_TYPE_LENGTH = 16  # bytes of a target's name in the kernel's struct dm_target_spec, with its zero

_COOKIE_MAGIC = 0x0D4D
_UDEV_FLAGS = ("DISABLE_DM_RULES", "DISABLE_SUBSYSTEM_RULES", "DISABLE_DISK_RULES",
               "DISABLE_OTHER_RULES", "LOW_PRIORITY", "DISABLE_LIBRARY_FALLBACK",
               "PRIMARY_SOURCE")

_LARGEST_GEOMETRY = (0xFFFF, 0xFF, 0xFF, (1 << 64) - 1)  # cylinders, heads, sectors, start


# -- Tables ---------------------------------------------------------------------------------------


# Check the form of a table as dmsetup does, and return it without comments; `source` is what to
# call it in an error.
def _read_table(text: str, source: str) -> str:
    lines = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip(" \t\n\v\f\r")
        if not line or line.startswith("#"):
            continue
        parts = _LINE.fullmatch(line)
        if not parts:
            log_error(f"Invalid format on line {number} of table {source}.")
            raise Failed
        begin, length, kind, arguments = parts.groups()
        if len(os.fsencode(kind)) >= _TYPE_LENGTH:
            log_error(f"Target type name {kind} is too long.")
            raise Failed
        arguments = arguments.partition("#")[0].replace("\\", "\\\\")
        begin, length = (int(number) % (1 << 64) for number in (begin, length))
        lines.append(f"{begin} {length} {kind} {arguments}".rstrip())
    return "\n".join(lines)


# The table of --table, of a file, or of standard input.
def _table(run: Run, path: str | None) -> str:
    if run.options["table"]:
        return _read_table(run.options.text("table"), "")
    if path is None:
        return _read_table(sys.stdin.buffer.read().decode("utf-8", "surrogateescape"), "on stdin")
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return _read_table(file.read(), path)
    except OSError:
        log_error(f"Couldn't open '{path}' for reading.")
        raise Failed from None


# What the kernel says of a table that it does not take. A leg that is not there is ENODEV to it.
def _load_errno(error: OSError) -> OSError:
    if error.errno == errno.ENOENT:
        return OSError(errno.ENODEV, error.strerror)
    return error


# -- create, load ---------------------------------------------------------------------------------


def create(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup create NAME [TABLE_FILE]`."""
    if run.options["concise"]:
        _create_concise(run, words)
        return
    if not words:
        log_error("Please provide a name for the new device.")
        raise Failed
    options = run.options
    minor = options.number("minor") if options["minor"] else None
    major = options.number("major")
    name = _new_name(run, words[0])
    uuid = _new_uuid(run)
    table = "" if options["notable"] else _table(run, words[1] if len(words) == 2 else None)
    if minor is None:
        major = -1
    elif table:
        major = DM_MAJOR  # libdm's create with a table corrects it
    elif major <= 0:
        log_error("Missing major number for persistent device.")
        log_error("Couldn't create ioctl argument.")
        raise Failed
    _create(run, Address(name, uuid, major, minor or 0), table, bool(options["readonly"]))


def _new_name(run: Run, name: str) -> str:
    if "/" in name:
        log_error(f'Name "{name}" invalid. It contains "/".')
        raise Failed
    return run.driver.by_name(name).name


def _new_uuid(run: Run) -> str:
    return run.driver.mangled(run.options.text("uuid"), "UUID") if run.options["uuid"] else ""


# Create a device; `address` has its number where one was asked for. One call does what libdm does
# in three (create, load, resume, and remove when one of them fails).
def _create(run: Run, address: Address, table: str, readonly: bool) -> None:
    minor = None if address.major == -1 else address.minor
    try:
        run.driver.ask("create", name=address.name, table=table or None, uuid=address.uuid,
                       readonly=readonly, minor=minor, cwd=os.getcwd())
    except ServerGone:
        raise
    except OSError as error:
        _explain_create(run, address, minor, bool(table), error)
    run.show_state(Address(name=address.name))


# Say at which of libdm's steps a creation failed: the step `create` refuses a name, a uuid or a
# number that is taken, and what is no name; all else is the table's.
def _explain_create(run: Run, address: Address, minor: int | None, table: bool,
                    error: OSError) -> None:
    infos = run.driver.ask("info")
    taken = [info["minor"] for info in infos]
    first = not table or not address.name or error.errno == errno.ENAMETOOLONG \
        or any(info["name"] == address.name for info in infos) \
        or bool(address.uuid) and any(info["uuid"] == address.uuid for info in infos) \
        or minor in taken
    if first:
        run.driver.fail("create", address, error)
    place = Address(address.name, "", DM_MAJOR,
                    run.driver.free_minor() if minor is None else minor)
    run.driver.fail("reload", place, _load_errno(error))


# The concise form is read character by character, as dmsetup reads it: a backslash takes the
# meaning from what follows, blanks after a field's comma and after a semicolon are passed over.
def _create_concise(run: Run, words: list[str]) -> None:
    options = run.options
    if len(words) > 1:
        log_error("dmsetup create --concise takes at most one argument")
        raise Failed
    if options["table"] or options["minor"] or options["uuid"] or options["notable"] or \
            options["inactive"]:
        log_error("--concise is incompatible with --[no]table, --minor, --uuid and --inactive.")
        raise Failed
    text = words[0] if words else sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    fields, at = [""], 0
    while at < len(text):
        letter = text[at]
        at += 1
        if letter == "\\":
            if at == len(text):
                log_error("Backslash must be followed by another character at end of string.")
                _refuse_concise(fields)
            fields[-1] += text[at]
            at += 1
        elif letter == "," and len(fields) < 5:
            fields.append("")
            at = _past_blanks(text, at)
        elif letter == ",":
            fields[-1] += "\n"
        elif letter == ";" or at == len(text):
            fields[-1] += "" if letter == ";" else letter
            if len(fields) != 5:
                log_error("Five comma-separated fields are required for each device")
                _refuse_concise(fields)
            _create_from_fields(run, fields)
            fields = [""]
            at = _past_blanks(text, at)
        else:
            fields[-1] += letter
    if fields != [""]:
        log_error("Incomplete entry: five comma-separated fields are required for each device")
        _refuse_concise(fields)


def _past_blanks(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _refuse_concise(fields: list[str]) -> None:
    shown = fields + ["(null)"] * (5 - len(fields))
    log_error("Parsed {} fields: name: {} uuid: {} minor: {} flags: {} table: {}".format(
        len(fields), *shown))
    raise Failed


def _create_from_fields(run: Run, fields: list[str]) -> None:
    name, uuid, minor, flags, table = fields
    if flags not in ("", "ro", "rw"):
        log_error(f"Invalid flags parameter '{flags}' must be 'ro' or 'rw' or empty.")
        raise Failed
    address = Address(
        name=_new_name(run, name),
        uuid=run.driver.mangled(uuid, "UUID") if uuid else "",
        major=DM_MAJOR if minor else -1,
        minor=atoi(minor),
    )
    _create(run, address, _read_table(table, ""), flags == "ro" or bool(run.options["readonly"]))


def load(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup load DEVICE [TABLE_FILE]`, also called reload."""
    if run.options["notable"]:
        log_error("--notable only available when creating new device.")
        raise Failed
    name = None
    if not run.options.addressed:
        if not words:
            log_error("Please specify device.")
            raise Failed
        name, words = words[0], words[1:]
    elif len(words) > 1:
        log_error("Too many command line arguments.")
        raise Failed
    address = run.address(name)
    table = _table(run, words[0] if words else None)
    _load(run, address, table)
    run.show_state(address)


def _load(run: Run, address: Address, table: str) -> None:
    try:
        run.driver.ask("load", **run.driver.selector(address), table=table,
                       readonly=bool(run.options["readonly"]), cwd=os.getcwd())
    except OSError as error:
        run.driver.fail("reload", address, _load_errno(error))


# -- suspend, resume, clear, remove ---------------------------------------------------------------


def suspend(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup suspend DEVICE...`."""
    address = run.address(words[0] if words else None)
    run.driver.call("suspend", "suspend", address, noflush=bool(run.options["noflush"]),
                    nolockfs=bool(run.options["nolockfs"]))
    run.show_state(address)


def resume(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup resume DEVICE...`."""
    address = run.address(words[0] if words else None)
    run.driver.call("resume", "resume", address)
    run.show_state(address)


def clear(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup clear DEVICE...`."""
    address = run.address(words[0] if words else None)
    run.driver.call("clear", "clear", address)
    run.show_state(address)


def wipe_table(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup wipe_table DEVICE...`: replace the table by one that fails every request."""
    if info is None and not words:
        log_error("No device specified.")
        raise Failed
    address = Address(name=info["kernel_name"]) if info else run.address(words[0])
    size = 0
    try:
        lines = run.driver.call("table", "table", address)["lines"]
        size = sum(line[1] for line in lines)
    except Failed:
        pass  # the next call fails likewise, which dmsetup says as well
    _load(run, address, f"0 {size} error")
    try:
        run.driver.call("resume", "resume", address)
    except Failed:
        run.driver.call("clear", "clear", address)
        raise


def remove(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup remove DEVICE...`."""
    options = run.options
    if options["force"] and words:
        try:
            wipe_table(run, words, None, False)
        except Failed:
            pass  # said; the removal is tried all the same
    run.driver.remove(run.address(words[0] if words else None), retry=bool(options["retry"]),
                      deferred=bool(options["deferred"]))


def remove_all(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup remove_all`: what nobody has open; with --force what is left fails from then on."""
    options = run.options
    run.driver.remove_all(deferred=bool(options["deferred"]))
    mknodes(run, [], None, False)
    if not options["force"] or not _remaining(run):
        return
    try:
        run.all_devices(wipe_table, words, silent=True)
    except Failed:
        pass  # said; the others were replaced
    run.driver.remove_all(deferred=bool(options["deferred"]))
    left = _remaining(run)
    if left:
        log_error(f"Unable to remove {left} device(s).")


def _remaining(run: Run) -> int:
    return len(run.driver.ask("info"))


def mknodes(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup mknodes [DEVICE...]`: the server keeps the nodes; only the names are looked at."""
    try:
        if not words:
            run.driver.devices()
        elif words[0]:
            run.address(words[0])
    except Failed:
        if words:
            raise


# -- rename, setgeometry --------------------------------------------------------------------------


def rename(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup rename DEVICE NEW_NAME`, or with --setuuid the uuid of one that has none."""
    address = run.address(words[0] if len(words) == 2 else None)
    new = words[-1]
    if run.options["setuuid"]:
        if len(os.fsencode(new)) >= UUID_LENGTH:
            log_error(f'Uuid "{new}" too long')
            raise Failed
        uuid = run.driver.mangled(new, "new UUID")
        _by_name_only(run, address)
        _rename(run, address, "set_uuid", "uuid", uuid)
        return
    if "/" in new:
        log_error(f'Name "{new}" invalid. It contains "/".')
        raise Failed
    if len(os.fsencode(new)) >= NAME_LENGTH:
        log_error(f'Name "{new}" too long')
        raise Failed
    if not new:
        log_error("Non empty new name is required.")
        raise Failed
    name = run.driver.mangled(new, "new name")
    _by_name_only(run, address)
    _rename(run, address, "rename", "name", name)


# The kernel looks whether the new name or uuid is free before it looks at the device.
def _rename(run: Run, address: Address, method: str, key: str, new: str) -> None:
    try:
        run.driver.ask(method, **address.selector(), **{f"new_{key}": new})
    except ServerGone:
        raise
    except OSError as error:
        if any(info[key] == new for info in run.driver.ask("info")):
            error = OSError(errno.EBUSY, error.strerror)
        run.driver.fail("rename", address, error)


# The kernel finds a device that is to be renamed by its name only.
def _by_name_only(run: Run, address: Address) -> None:
    if not address.name:
        run.driver.fail("rename", address, OSError(errno.ENXIO, os.strerror(errno.ENXIO)))


def setgeometry(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup setgeometry DEVICE CYLINDERS HEADS SECTORS START`.

    Checked as the kernel checks it; an NBD export has no geometry that anybody could ask for.
    """
    named = not run.options.addressed
    address = run.address(words[0] if named else None)
    words = words[1:] if named else words
    found = run.driver.find(address)
    if found is None or not found["live_table"]:
        run.driver.fail("setgeometry", address, OSError(errno.ENXIO, os.strerror(errno.ENXIO)))
    numbers = [int(word) for word in words[:4] if word.isascii() and word.isdigit()]
    fits = len(numbers) == 4 and all(map(int.__le__, numbers, _LARGEST_GEOMETRY)) and \
        numbers[3] <= numbers[0] * numbers[1] * numbers[2]
    if not fits:
        run.driver.fail("setgeometry", address, OSError(errno.EINVAL, os.strerror(errno.EINVAL)))


# -- What dmpy does not have ----------------------------------------------------------------------


def stats(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup stats ...`: there are no statistics regions."""
    log_error("dmsetup stats: not supported by dmpy (`dmpy stats` counts requests).")
    raise Failed


def measure(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup measure`: the kernel measures tables for its integrity subsystem, IMA."""
    log_error("dmsetup measure: not supported by dmpy.")
    raise Failed


# -- udev -----------------------------------------------------------------------------------------
# dmpy's nodes are not made by udev: nobody has to wait for it, so there are no cookies, as for a
# dmsetup on a machine where udev does not run.


def cookie_value(text: str) -> int:
    """Return the number of a udev cookie; 0, and a complaint, when the text is none."""
    try:
        value = int(text.strip(), 8 if re.fullmatch(r"[+-]?0[0-7]+", text.strip()) else 0)
    except ValueError:
        value = 0
    if not 0 < value < 1 << 32 or "_" in text:
        log_error("Incorrect cookie value.")
        return 0
    return value


def udevcreatecookie(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup udevcreatecookie`: prints none, which scripts take for "no udev"."""


def udevreleasecookie(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup udevreleasecookie [COOKIE]`: nothing waits for it."""
    text = words[0] if words else run.options.text("udevcookie") or \
        os.environ.get("DM_UDEV_COOKIE", "")
    if words and not cookie_value(text):
        raise Failed
    if not text:
        log_error("No udev transaction cookie given.")
        raise Failed


def udevflags(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup udevflags COOKIE`: the flags in a cookie, as shell variables."""
    cookie = cookie_value(words[0])
    if not cookie:
        raise Failed
    for bit in range(16):
        if not cookie >> 16 >> bit & 1:
            continue
        if bit < len(_UDEV_FLAGS):
            log_print(f"DM_UDEV_{_UDEV_FLAGS[bit]}_FLAG='1'")
        elif bit < 8:
            log_print(f"DM_UDEV_FLAG{bit}='1'")
        else:
            log_print(f"DM_SUBSYSTEM_UDEV_FLAG{bit - 8}='1'")


def udevcomplete(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup udevcomplete COOKIE`: nobody waits for it."""
    cookie = cookie_value(words[0])
    if not cookie:
        raise Failed
    log_print(f"DM_COOKIE_COMPLETED=0x{cookie:<10x}")


def udevcomplete_all(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup udevcomplete_all [AGE]`: there is nothing to complete."""
    age = 0
    if words:
        if not re.match(r"\s*[+-]?[0-9]", words[0]):
            log_error("Failed to read age_in_minutes parameter.")
            raise Failed
        age = atoi(words[0])
    magic = f"{_COOKIE_MAGIC} (0x{_COOKIE_MAGIC:x})"
    if not run.options["yes"]:
        older = f"older than {age} minutes " if age else ""
        log_error(f"WARNING: This operation will destroy all semaphores {older}with keys "
                  f"that have a prefix {magic}.")
        sys.stdout.write("Do you really want to continue? [y/n]: ")
        sys.stdout.flush()
        if not sys.stdin.readline().strip().lower().startswith("y"):
            log_print(f"Semaphores with keys prefixed by {magic} NOT destroyed.")
            return
    log_print(f"0 semaphores with keys prefixed by {magic} destroyed. 0 skipped.")


def udevcookies(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup udevcookies`: the heading of an empty list."""
    log_print("Cookie       Semid      Value      Last semop time           Last change time")
