"""The verbs that change something: create, load, suspend, resume, clear, remove, rename ..."""

from __future__ import annotations

import errno
import os
import time

import click

from dmpy.cli.format import NO_DEVICES
from dmpy.cli.session import (
    Session,
    emit,
    fail,
    json_option,
    one_device,
    pass_session,
    read_text,
    selection,
    single_or_list,
    table_file,
)

__all__ = [
    "clear_command",
    "create_command",
    "load_command",
    "message_command",
    "remove_all_command",
    "remove_command",
    "rename_command",
    "resume_command",
    "suspend_command",
    "table_text",
]

# `remove --retry`: as often, and as long in between, as dmsetup.
_RETRIES = 25
_RETRY_SECONDS = 0.2


def table_text(options: tuple[str, ...], file: str | None) -> str:
    """Return the table that a command line gives.

    Args:
        options: the values of --table, a line or several each; `-` is standard input, and the
            name of a file (a table is never one word) its contents.
        file: the file argument, or None for standard input.
    """
    if not options:
        return read_text(file or "-")
    lines = [read_text(text) if text == "-" or _is_file(text) else text for text in options]
    return "\n".join(lines)


def _is_file(text: str) -> bool:
    return len(text.split()) == 1 and os.path.isfile(text)


@click.command("create", short_help="Make a device from a table.")
@click.argument("words", nargs=-1, metavar="NAME [FILE]", shell_complete=table_file)
@click.option("--table", "tables", multiple=True, metavar="TABLE",
              help="The table; given again, further lines; - is standard input.")
@click.option("-n", "--notable", is_flag=True, help="Make the device without a table.")
@click.option("-u", "--uuid", default="", help="The device's uuid.")
@click.option("-r", "--readonly", is_flag=True, help="Refuse writes.")
@click.option("-m", "--minor", type=click.IntRange(min=0), help="The device's minor number.")
@click.option("--concise", "is_concise", is_flag=True,
              help="The argument (or standard input) is NAME,UUID,MINOR,FLAGS,TABLE[;...].")
@json_option
@pass_session
def create_command(session: Session, words: tuple[str, ...], tables: tuple[str, ...],
                   notable: bool, uuid: str, readonly: bool, minor: int | None,
                   is_concise: bool, as_json: bool) -> None:
    """Make a device NAME from a table and let requests go.

    The table comes from --table, from FILE, or from standard input: lines `BEGIN LEN TYPE
    ARGUMENTS` in sectors of 512 bytes; blank lines and lines that begin with # do not count.
    Paths in it are relative to the current folder.
    """
    if is_concise:
        if tables or notable or uuid or len(words) > 1:
            raise click.UsageError("--concise takes one argument, and no table, uuid or minor")
        created = _create_concise(session, words[0] if words else read_text("-"), readonly)
        emit(created, None, as_json)
        return
    if not words:
        raise click.UsageError("argument NAME is missing")
    if len(words) > 2 or (len(words) == 2 and tables):
        raise click.UsageError(f"argument {words[-1]} is one too many (expected NAME [FILE])")
    if notable and (tables or len(words) == 2):
        raise click.UsageError("--notable and a table exclude each other")
    table = None if notable else table_text(tables, words[1] if len(words) == 2 else None)
    info = session.call("create", name=words[0], table=table, uuid=uuid, readonly=readonly,
                        minor=minor, cwd=os.getcwd())
    emit(info, None, as_json)


# All of the devices or none: what was made before one is refused goes again.
def _create_concise(session: Session, text: str, readonly: bool) -> list:
    from dmpy.table import parse_concise

    created = []
    try:
        for device in parse_concise(text):
            created.append(session.call(
                "create", name=device.name, table=device.table or None, uuid=device.uuid,
                readonly=readonly or device.readonly, minor=device.minor, cwd=os.getcwd()))
    except OSError:
        for info in reversed(created):
            session.call("remove", name=info["name"], force=False, deferred=False)
        raise
    return created


@click.command("load", short_help="Load a table into a device's inactive slot.")
@one_device("NAME [FILE]")
@click.option("--table", "tables", multiple=True, metavar="TABLE",
              help="The table; given again, further lines; - is standard input.")
@click.option("-r", "--readonly", is_flag=True, help="Refuse writes once the table is live.")
@json_option
@pass_session
def load_command(session: Session, selector: dict, rest: list[str], tables: tuple[str, ...],
                 readonly: bool, as_json: bool) -> None:
    """Load a table into the inactive slot of device NAME; `dmpy resume` makes it live."""
    if len(rest) > 1 or (rest and tables):
        raise click.UsageError(f"argument {rest[-1]} is one too many (expected NAME [FILE])")
    table = table_text(tables, rest[0] if rest else None)
    # None leaves the device as writable as it was created.
    info = session.call("load", **selector, table=table, readonly=readonly or None,
                        cwd=os.getcwd())
    emit(info, None, as_json)


@click.command("suspend", short_help="Hold a device's requests back.")
@selection(required=True)
@click.option("--noflush", is_flag=True, help="Do not wait for what the device still has to do.")
@click.option("--nolockfs", is_flag=True, help="Accepted: no file system is frozen here anyway.")
@json_option
@pass_session
def suspend_command(session: Session, selectors: list[dict], noflush: bool, nolockfs: bool,
                    as_json: bool) -> None:
    """Let the requests in flight end and hold new ones back until `dmpy resume`."""
    infos = [session.call("suspend", **each, noflush=noflush, nolockfs=nolockfs)
             for each in selectors]
    emit(single_or_list(infos, selectors), None, as_json)


@click.command("resume", short_help="Make the inactive table live and let requests go on.")
@selection(required=True)
@click.option("--noflush", is_flag=True, help="Accepted, as dmsetup does: nothing is flushed here.")
@click.option("--nolockfs", is_flag=True, help="Accepted: no file system is frozen here anyway.")
@json_option
@pass_session
def resume_command(session: Session, selectors: list[dict], noflush: bool, nolockfs: bool,
                   as_json: bool) -> None:
    """Make the inactive table live, where there is one, and let requests go on."""
    infos = [session.call("resume", **each) for each in selectors]
    emit(single_or_list(infos, selectors), None, as_json)


@click.command("clear", short_help="Drop the inactive table.")
@selection(required=True)
@json_option
@pass_session
def clear_command(session: Session, selectors: list[dict], as_json: bool) -> None:
    """Drop the table that was loaded and is not live yet."""
    infos = [session.call("clear", **each) for each in selectors]
    emit(single_or_list(infos, selectors), None, as_json)


@click.command("remove", short_help="Remove devices.")
@selection(required=True)
@click.option("-f", "--force", is_flag=True,
              help="Put an error table in place first, so that requests in flight end.")
@click.option("--retry", is_flag=True, help="Try for five seconds while the device is in use.")
@click.option("--deferred", is_flag=True, help="When in use: remove it once it is closed.")
@json_option
@pass_session
def remove_command(session: Session, selectors: list[dict], force: bool, retry: bool,
                   deferred: bool, as_json: bool) -> None:
    """Remove devices. One that is open, attached and in use, or under another one is refused."""
    results = []
    for selector in selectors:
        for left in reversed(range(_RETRIES if retry else 1)):
            try:
                results.append(session.call("remove", **selector, force=force, deferred=deferred))
                break
            except OSError as error:
                if error.errno != errno.EBUSY or not left:
                    raise
            time.sleep(_RETRY_SECONDS)
    emit(single_or_list(results, selectors), None, as_json)


@click.command("remove-all", short_help="Remove every device that is not in use.")
@click.option("-f", "--force", is_flag=True,
              help="Put error tables in place first, so that requests in flight end.")
@json_option
@pass_session
def remove_all_command(session: Session, force: bool, as_json: bool) -> None:
    """Remove every device that is not in use, upper ones before what they stand on."""
    left = [info["name"] for info in session.call("info")]
    removed: list[str] = []
    refused: dict[str, OSError] = {}
    while left:
        before = len(left)
        for name in list(left):
            try:
                session.call("remove", name=name, force=force, deferred=False)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                refused[name] = error                   # perhaps its user goes in this round
            else:
                left.remove(name)
                removed.append(name)
        if len(left) == before:
            break
    emit({"removed": removed, "in_use": left}, None if removed or left else NO_DEVICES, as_json)
    if left:
        fail("; ".join(str(refused[name]) for name in left))


@click.command("rename", short_help="Give a device another name, or its uuid.")
@one_device("NAME NEW_NAME")
@click.option("--setuuid", is_flag=True, help="NEW_NAME is the uuid of a device that has none.")
@json_option
@pass_session
def rename_command(session: Session, selector: dict, rest: list[str], setuuid: bool,
                   as_json: bool) -> None:
    """Give device NAME the name NEW_NAME; the NBD export is renamed with it."""
    if len(rest) != 1:
        raise click.UsageError(f"one new {'uuid' if setuuid else 'name'} is needed "
                               f"(got {len(rest)})")
    method, param = ("set_uuid", "new_uuid") if setuuid else ("rename", "new_name")
    info = session.call(method, **selector, **{param: rest[0]})
    emit(info, None, as_json)


@click.command("message", short_help="Send a message to a target.",
               context_settings={"ignore_unknown_options": True})
@one_device("NAME SECTOR MESSAGE...")
@json_option
@pass_session
def message_command(session: Session, selector: dict, rest: list[str], as_json: bool) -> None:
    """Send a message to the target that holds SECTOR of device NAME, and print its reply."""
    if len(rest) < 2:
        raise click.UsageError("argument MESSAGE is missing" if rest else
                               "argument SECTOR is missing")
    sector, *words = rest
    if not (sector.isascii() and sector.isdigit()):
        raise click.UsageError(f"sector must be a number (got {sector})")
    result = session.call("message", **selector, sector=int(sector), message=" ".join(words))
    emit(result, result["reply"].removesuffix("\n") or None, as_json)
