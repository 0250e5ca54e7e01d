"""The verbs of dmsetup that tell: info, table, status, ls, deps, wait, targets, version, splitname.

Source: lvm2 v2_03_16 libdm/dm-tools/dmsetup.c, _info(), _status(), _deps(), _ls(), _targets(),
_version(), _splitname(), _mangle(), _exec_command().
"""

from __future__ import annotations

import errno
import sys
from typing import Any

from dmpy.cli.dmsetup_driver import (
    Address, Failed, has_disk, log_error, log_print, mangle, unescape, unmangle,
)
from dmpy.cli.dmsetup_options import atoi
from dmpy.cli.dmsetup_run import Run
from dmpy.cli.format import DM_MAJOR, block_name

__all__ = [
    "DRIVER_VERSION", "LIBRARY_VERSION", "deps", "info", "ls", "mangle_names", "message",
    "splitname", "status", "target_version", "targets", "version", "wait",
]

# The release of dmsetup whose behaviour this is, and the interface of the kernel that it is for.
LIBRARY_VERSION = "1.02.185 (2022-05-18)"
DRIVER_VERSION = "4.47.0"

_EXEC_WORDS = 256

Info = dict[str, Any]


def version(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup version`; it starts no server."""
    log_print(f"Library version:   {LIBRARY_VERSION}")
    log_print(f"Driver version:    {DRIVER_VERSION}")
    run.report = None


def targets(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup targets`: what tables can be made of, with versions."""
    for target in run.driver.ask("targets"):
        _print_target(target)


def target_version(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup target-version TYPE...`."""
    for target in run.driver.ask("targets"):
        if target["name"] == words[0]:
            _print_target(target)
            return
    log_error(f"device-mapper: target-version ioctl on {words[0]}  failed: Invalid argument")
    raise Failed


def _print_target(target: Info) -> None:
    number = ".".join(str(part) for part in target["version"])
    log_print(f"{target['name']:<16} v{number}")


def info(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup info [DEVICE...]`."""
    if info is None and run.names_all(words):
        run.all_devices(_info_of_all, words)
        return
    shown = info or _existing(run, run.address(words[0] if words else None))
    run.show_info(shown)


# `info` gone through all devices.
def _info_of_all(run: Run, words: list[str], info: Info, several: bool) -> None:
    run.show_info(info)


def _existing(run: Run, address: Address) -> Info:
    found = run.driver.find(address)
    if found is None:
        log_error("Device does not exist.")
        raise Failed
    return run.driver.shown(found)


# -- table, status, ls --target -------------------------------------------------------------------


def status(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup table`, `dmsetup status`, and `dmsetup ls` with --target or --exec."""
    if info is None and run.names_all(words):
        run.all_devices(status, words)
        return
    options = run.options
    verb = run.selected_verb or run.verb
    method = "table" if verb.name == "table" else "status"
    params: Info = {"inactive": bool(options["inactive"])}
    if method == "table":
        params["showkeys"] = bool(options["showkeys"])
    else:
        params["noflush"] = bool(options["noflush"])
    if info is not None:
        entry = run.listing(method, **params).get(info["kernel_name"])
        if entry is None:
            return  # it went away meanwhile
        shown = info
    else:
        address = run.address(words[0] if words else None)
        shown, entry = _one_table(run, address, method, params)
    lines = [line for line in entry["lines"] or [None]
             if not options["target"] or line and line[2] == options.text("target")]
    printing = not options["exec"] or not options.text("exec") or options["verbose"]
    if lines and printing:
        _print_lines(run, shown, lines, several, words[0] if words else shown["name"])
    if lines and several and options["verbose"] and verb.name != "ls" and \
            not (options["concise"] and method == "table" and options["verbose"] < 2):
        log_print("")
    if lines and options["exec"] and options.text("exec"):
        _execute(run, shown)


# The device at an address with its table or status. Its info is asked for only where it shows: a
# suite that polls a status needs one call.
def _one_table(run: Run, address: Address, method: str, params: Info) -> tuple[Info, Info]:
    options = run.options
    if method == "status":
        try:
            entry = run.driver.ask("status", **run.driver.selector(address), **params)
        except OSError as error:
            if error.errno == errno.ENXIO:
                log_error("Device does not exist.")
                raise Failed from error
            run.driver.fail("status", address, error)
    else:
        entry = run.driver.call("table", "table", address, **params)
    address = Address(name=entry["name"])
    if options["verbose"] or options["concise"]:
        return _existing(run, address), entry
    return {"name": unmangle(entry["name"], "name", run.driver.mangling)}, entry


# Print a device's lines as the verb shows them; a line is None for a device without a table, `name`
# is what the user calls the device.
def _print_lines(run: Run, info: Info, lines: list, several: bool, name: str) -> None:
    options = run.options
    verb = run.selected_verb or run.verb
    if verb.name == "ls":
        log_print(f"{name}\t({info['major']}, {info['minor']})")
        return
    concise = options["concise"] and verb.name == "table"
    if concise:
        head = [_quoted(name), _quoted(info["uuid"]), str(info["minor"]),
                "ro" if info["readonly"] else "rw"]
        body = [f"{line[0]} {line[1]} {line[2]} {_quoted(line[3])}" for line in lines if line]
        sys.stdout.write((";" if run.concise else "") + ",".join(head + body))
        run.concise = True
        return
    if options["verbose"]:
        run.show_info(info)
    prefix = f"{name}: " if several and not options["verbose"] else ""
    log_print("\n".join(
        prefix + (f"{line[0]} {line[1]} {line[2]} {line[3]}" if line else "") for line in lines))


# A backslash before each character that means something in the concise form.
def _quoted(text: str) -> str:
    return "".join(f"\\{letter}" if letter in ",;\\" else letter for letter in text)


# Run the command of --exec with the path of the device's node as its last word.
def _execute(run: Run, info: Info) -> None:
    import subprocess

    words = run.options.text("exec").split()
    if not words:
        raise Failed
    if len(words) >= _EXEC_WORDS:
        log_error("Too many args to --exec.")
        raise Failed
    try:
        subprocess.run([*words, run.node(info)], check=False)
    except OSError:
        return  # the child of dmsetup would exit with 127, which dmsetup does not look at


# -- ls, deps -------------------------------------------------------------------------------------


def ls(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup ls`."""
    options = run.options
    if options["target"] and options.text("target") or options["exec"] and options.text("exec"):
        status(run, words, None, False)
        return
    if options["tree"]:
        from dmpy.cli.dmsetup_tree import Tree

        tree = Tree(options.text("options"))
        graph, _ = run.graph()
        if not graph.root.uses:
            log_print("No devices found")
        sys.stdout.write(tree.text(graph))
        return
    run.all_devices(_ls_line, words)


def _ls_line(run: Run, words: list[str], info: Info, several: bool) -> None:
    shown = f"{info['major']}:{info['minor']}"
    if run.names != "devno" and has_disk(info):
        shown = info["kernel_name"] if run.names == "devname" else f"dm-{info['minor']}"
    log_print(f"{info['name']}\t({shown})")


def deps(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup deps [DEVICE...]`."""
    if info is None and run.names_all(words):
        run.all_devices(deps, words)
        return
    options = run.options
    inactive = bool(options["inactive"])
    if info is not None and not inactive:
        entry = run.listing("deps").get(info["kernel_name"], {"deps": []})
    else:
        address = run.address(words[0] if words else None) if info is None else \
            Address(name=info["kernel_name"])
        entry = run.driver.call("deps", "deps", address, **({"inactive": True} if inactive else {}))
    if options["verbose"]:
        run.show_info(info or _existing(run, Address(name=entry["name"])))
    name = info["name"] if info else words[0] if words else ""
    prefix = f"{name}: " if several and not options["verbose"] else ""
    numbers = "".join(f" ({_dep(run, dep)})" for dep in entry["deps"])
    log_print(f"{prefix}{len(entry['deps'])} dependencies\t:{numbers}")
    if several and options["verbose"]:
        log_print("")


# How a device below is named. A leg that is no block device has no number: its word stands there.
def _dep(run: Run, dep: Info) -> str:
    major, minor = dep["major"], dep["minor"]
    if not major:
        return dep["name"]
    if run.names == "devname" and major == DM_MAJOR:
        return dep["name"]
    if run.names != "devno":
        return block_name(major, minor)
    return f"{major}, {minor}"


# -- Others ---------------------------------------------------------------------------------------


def wait(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup wait DEVICE [EVENT_NR]`: until the device's event number is not that (0)."""
    if not words and not run.options.addressed:
        log_error("No device specified.")
        raise Failed
    named = not run.options.addressed
    address = run.address(words[0] if named else None)
    rest = words[1:] if named else words
    event_nr = atoi(rest[-1]) & 0xFFFFFFFF if rest else 0
    found = run.driver.find(address)
    if found is None or found["event_nr"] == event_nr:
        run.driver.call("waitevent", "wait", address, event_nr=event_nr, timeout=None)
    run.show_state(address)


def message(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup message DEVICE SECTOR MESSAGE`."""
    named = not run.options.addressed
    address = run.address(words[0] if named else None)
    words = words[1:] if named else words
    text = words[0].lstrip()
    digits = text[1:] if text[:1] in ("+", "-") else text
    if not digits.isascii() or not digits.isdigit() or int(digits) >> 64:
        log_error("Invalid sector.")
        raise Failed
    sector = int(text) % (1 << 64)
    if len(words) == 1:
        log_error("No message supplied.")
    result = run.driver.call("message", "message", address, sector=sector,
                             message=" ".join(words[1:]))
    reply = result["reply"]
    if reply:
        sys.stdout.write(reply if reply.endswith("\n") else reply + "\n")


def splitname(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup splitname NAME [SUBSYSTEM]`: the parts of an LVM device's name."""
    run.report.add({"name": words[0], "uuid": (words[1] if len(words) > 1 else "LVM") + "-"})


def mangle_names(run: Run, words: list[str], info: Info | None, several: bool) -> None:
    """`dmsetup mangle [DEVICE...]`: rename devices whose names are not mangled as they should."""
    if info is None and run.names_all(words):
        run.all_devices(mangle_names, words)
        return
    shown = info
    if shown is None:
        found = run.driver.find(run.address(words[0] if words else None))
        if found is None:
            raise Failed
        shown = run.driver.shown(found)
    name, uuid = shown["name"], shown["uuid"]
    mode = run.options.text("manglename").lower() or "auto"
    if mode == "auto":
        for what, text in (("name", name), ("UUID", uuid)):
            if "\\x5cx" in text:
                aim = "rename the device" if what == "name" else "correct the device UUID"
                log_error(f'The {what} "{text}" seems to be mangled more than once. '
                          f"Manual intervention required to {aim}.")
                raise Failed
    new_name = unescape(name) if mode == "none" else mangle(name, "name", mode)
    new_uuid = unescape(uuid) if mode == "none" else mangle(uuid, "UUID", mode)
    if new_uuid != uuid:
        log_error(f"{name}: {uuid}: UUID in incorrect form. ")
        log_error("Unable to change device UUID. The device must be deactivated first.")
        raise Failed
    if new_name == name:
        log_print(f"{name}: {uuid or '[no UUID]'}: name {'and UUID ' if uuid else ''}"
                  "already in correct form")
        return
    log_print(f"{name}: renaming to {new_name}")
    run.driver.call("rename", "rename", Address(name=name), new_name=new_name)
