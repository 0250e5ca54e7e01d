"""The verbs that only look: ls, info, table, status, deps, wait, targets, version, stats."""

from __future__ import annotations

import locale
import os
import sys
from typing import Any

import click

from dmpy.cli import format as fmt
from dmpy.cli.session import (
    Session,
    blocks,
    emit,
    json_option,
    one_device,
    pass_session,
    selection,
    single_or_list,
)
from dmpy.client import ServerGone

__all__ = [
    "deps_command",
    "info_command",
    "ls_command",
    "stats_command",
    "status_command",
    "table_command",
    "targets_command",
    "version_command",
    "wait_command",
]

# How deps and ls can show a device: dmsetup's words for -o.
_NAMINGS = ("devno", "devname", "blkdevname")


# Results for the chosen devices, or for all.
def _results(session: Session, method: str, selectors: list[dict], **params: Any) -> list[dict]:
    if not selectors:
        return session.call(method, **params)
    return [session.call(method, **selector, **params) for selector in selectors]


def _all_deps(session: Session) -> dict[str, list]:
    return {entry["name"]: entry["deps"] for entry in session.call("deps")}


# -- ls -----------------------------------------------------------------------------------------


@click.command("ls", short_help="List the devices, as a tree too.")
@click.option("--target", metavar="TYPE", help="Only devices with a target of this type.")
@click.option("--tree", "as_tree", is_flag=True, help="Show what stands on what.")
@click.option("-o", "--options", metavar="WORDS",
              help=f"One of {', '.join(_NAMINGS)}; with --tree {', '.join(fmt.TREE_OPTIONS)}.")
@json_option
@pass_session
def ls_command(session: Session, target: str | None, as_tree: bool, options: str | None,
               as_json: bool) -> None:
    """List the devices, and those that could not be rebuilt when the server started.

    On a terminal, --tree is drawn in colour; with -o, or into a pipe, it is dmsetup's.
    """
    infos = session.call("info")
    if target:
        having = {entry["name"] for entry in session.call("table")
                  if any(line[2] == target for line in entry["lines"])}
        infos = [info for info in infos if info["name"] in having]
    failed = {} if target else {each["minor"]: each for each in session.call("server")["failed"]}
    if as_json:
        emit(_rows(infos, _all_deps(session) if as_tree else None, failed), None, True)
        return
    minors = {info["minor"] for info in infos}
    # A device that could not be rebuilt is there without its table, if its entry can be read.
    broken = [f"{each['name'] or minor}\t(failed: {each['error']})"
              for minor, each in failed.items() if as_tree or minor not in minors]
    if as_tree:
        text = _tree(session, infos, options)
    else:
        naming = _naming(options)
        lines = [fmt.target_ls_line(info) if target else fmt.ls_line(info, names=naming)
                 + (f"\tfailed: {failed[info['minor']]['error']}" if info["minor"] in failed
                    else "") for info in infos]
        text = "\n".join(lines) or None
    emit(None, "\n".join(filter(None, [text, *broken])) or fmt.NO_DEVICES, False)


# What --json prints: a device each, with "error" where it could not be rebuilt.
def _rows(infos: list[dict], deps: dict[str, list] | None, failed: dict[int, dict]) -> list[dict]:
    rows = []
    for info in infos:
        row = dict(info) if deps is None else info | {"deps": deps[info["name"]]}
        if info["minor"] in failed:
            row["error"] = failed[info["minor"]]["error"]
        rows.append(row)
    minors = {info["minor"] for info in infos}
    return rows + [each for minor, each in failed.items() if minor not in minors]


def _naming(options: str | None) -> str:
    words = [word for word in (options or "").split(",") if word]
    for word in words:
        if word not in _NAMINGS:
            raise click.UsageError(
                f"-o {word} is unknown{fmt.did_you_mean(word, _NAMINGS)}"
                + (" (a tree option needs --tree)" if word in fmt.TREE_OPTIONS else ""))
    return words[-1] if words else "devno"


def _tree(session: Session, infos: list[dict], options: str | None) -> str | None:
    if not infos:
        return None
    deps = _all_deps(session)
    if sys.stdout.isatty() and options is None and not os.environ.get("NO_COLOR"):
        from dmpy.cli.top import rich_tree

        return rich_tree(infos, deps)
    try:
        tree = fmt.Tree(options or "", utf=locale.getpreferredencoding() == "UTF-8",
                        width=_terminal_width())
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    return tree.text(infos, deps)


# dmsetup cuts at the terminal's width less 3; into a pipe nothing is cut here.
def _terminal_width() -> int | None:
    return os.get_terminal_size().columns - 3 if sys.stdout.isatty() else None


# -- info ---------------------------------------------------------------------------------------


@click.command("info", short_help="Show the state of devices.")
@selection(required=False)
@click.option("-c", "-C", "--columns", is_flag=True, help="A line a device.")
@click.option("-o", "--options", "fields", metavar="FIELDS",
              help="Columns, comma-separated; +FIELDS adds to the usual ones; help lists them.")
@click.option("-O", "--sort", metavar="FIELDS", help="Sort by these columns; -FIELD: descending.")
@click.option("--noheadings", is_flag=True, help="No heading, and a colon between columns.")
@click.option("--separator", metavar="TEXT", help="What goes between columns, without padding.")
@click.option("--nameprefixes", is_flag=True, help="Each value as DM_FIELD='value'.")
@click.option("--unquoted", is_flag=True, help="No quotes with --nameprefixes.")
@click.option("--rows", is_flag=True, help="A line a column.")
@json_option
@pass_session
def info_command(session: Session, selectors: list[dict], columns: bool, fields: str | None,
                 sort: str | None, noheadings: bool, separator: str | None, nameprefixes: bool,
                 unquoted: bool, rows: bool, as_json: bool) -> None:
    """Show the state of devices: of those named, or of all."""
    if fields in ("help", "?"):
        click.echo(fmt.fields_help())
        return
    columns = columns or any((fields, sort, noheadings, separator, nameprefixes, rows))
    try:
        report = fmt.Report(
            fmt.parse_fields(fields), headings=not noheadings, separator=separator,
            prefixes=nameprefixes, unquoted=unquoted, as_rows=rows,
            sort=fmt.parse_sort_keys(sort))
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    infos = _results(session, "info", selectors)
    if as_json:
        emit(single_or_list(infos, selectors), None, True)
    elif columns and infos:
        related = any(field.section.startswith("Mapped Device Relationship")
                      for field in report.fields)
        emit(None, report.text(infos, _all_deps(session) if related else None), False)
    else:
        click.echo(blocks([fmt.info_block(info) for info in infos]))


# -- table and status ---------------------------------------------------------------------------


# Print the rows of `table` or `status`; only those of one target type, if asked.
def _emit_lines(entries: list[dict], selectors: list[dict], target: str | None,
                as_json: bool) -> None:
    if target:
        entries = [entry | {"lines": lines} for entry in entries
                   if (lines := [line for line in entry["lines"] if line[2] == target])]
    if as_json:
        alone = len(selectors) == 1 and len(entries) == 1
        emit(entries[0] if alone else entries, None, True)
        return
    if not entries and not selectors and not target:
        click.echo(fmt.NO_DEVICES)
    lines = [line for entry in entries
             for line in fmt.table_lines(entry, multiple=len(selectors) != 1)]
    emit(None, "\n".join(lines) if lines else None, False)


@click.command("table", short_help="Show what devices are made of.")
@selection(required=False)
@click.option("--target", metavar="TYPE", help="Only lines of this target.")
@click.option("--inactive", is_flag=True, help="The table that is loaded and not live yet.")
@click.option("--showkeys", is_flag=True, help="Keys as they are, not as zeroes.")
@click.option("--concise", is_flag=True, help="On one line, as `dmpy create --concise` takes it.")
@json_option
@pass_session
def table_command(session: Session, selectors: list[dict], target: str | None, inactive: bool,
                  showkeys: bool, concise: bool, as_json: bool) -> None:
    """Show the live tables of devices: of those named, or of all."""
    entries = _results(session, "table", selectors, inactive=inactive, showkeys=showkeys)
    if concise and not as_json:
        infos = _results(session, "info", selectors)
        if infos:
            click.echo(fmt.concise(infos, entries))
        return
    _emit_lines(entries, selectors, target, as_json)


@click.command("status", short_help="Show how the targets of devices fare.")
@selection(required=False)
@click.option("--target", metavar="TYPE", help="Only lines of this target.")
@click.option("--inactive", is_flag=True, help="Of the table that is not live yet.")
@click.option("--noflush", is_flag=True, help="Do not commit metadata first.")
@json_option
@pass_session
def status_command(session: Session, selectors: list[dict], target: str | None, inactive: bool,
                   noflush: bool, as_json: bool) -> None:
    """Show the status of each target, in the kernel's words."""
    entries = _results(session, "status", selectors, inactive=inactive, noflush=noflush)
    _emit_lines(entries, selectors, target, as_json)


# -- deps, wait, targets, version ---------------------------------------------------------------


@click.command("deps", short_help="Show what devices stand on.")
@selection(required=False)
@click.option("-o", "--options", metavar="WORD", help=f"One of {', '.join(_NAMINGS)}.")
@json_option
@pass_session
def deps_command(session: Session, selectors: list[dict], options: str | None,
                 as_json: bool) -> None:
    """Show the devices, files and URIs that a device's live table stands on."""
    naming = _naming(options)
    entries = _results(session, "deps", selectors)
    lines = [fmt.deps_line(entry, multiple=len(selectors) != 1, names=naming)
             for entry in entries]
    emit(single_or_list(entries, selectors), "\n".join(lines) or fmt.NO_DEVICES, as_json)


@click.command("wait", short_help="Wait for an event of a device.")
@one_device("NAME [EVENT_NR]")
@click.option("--noflush", is_flag=True, help="Accepted, as dmsetup does.")
@click.option("--timeout", type=click.FloatRange(min=0), metavar="SECONDS",
              help="Give up after so long (exit status 1).")
@json_option
@pass_session
def wait_command(session: Session, selector: dict, rest: list[str], noflush: bool,
                 timeout: float | None, as_json: bool) -> None:
    """Wait until the event number of device NAME exceeds EVENT_NR (0), then show its state."""
    if len(rest) > 1 or not all(word.isascii() and word.isdigit() for word in rest):
        raise click.UsageError(f"event number must be one number (got {' '.join(rest)})")
    event_nr = int(rest[0]) if rest else 0
    info = session.call("wait", **selector, event_nr=event_nr, timeout=timeout)
    emit(info, f"{fmt.info_block(info)}\n", as_json)


@click.command("targets", short_help="List the targets and their versions.")
@json_option
@pass_session
def targets_command(session: Session, as_json: bool) -> None:
    """List the targets that tables can have, with the kernel version whose rules each follows."""
    targets = session.call("targets")
    emit(targets, fmt.targets_text(targets), as_json)


@click.command("version", short_help="Show versions.")
@json_option
@pass_session
def version_command(session: Session, as_json: bool) -> None:
    """Show the versions of dmpy and of the device-mapper interface that it follows.

    Those of a running server, if there is one; no server is started for this.
    """
    try:
        versions = session.call("version", start=False)
    except ServerGone:
        import platform

        import dmpy
        from dmpy.control import DRIVER_VERSION

        versions = {"dmpy": dmpy.__version__, "driver": DRIVER_VERSION,
                    "nbdkit": None, "python": platform.python_version()}
    text = fmt.version_text(f"{versions['dmpy']} (dmpy)", versions["driver"])
    emit(versions, text, as_json)


# -- stats --------------------------------------------------------------------------------------


@click.command("stats", short_help="Show what devices have done.")
@selection(required=False)
@click.option("--prometheus", is_flag=True, help="In the text format that Prometheus reads.")
@json_option
@pass_session
def stats_command(session: Session, selectors: list[dict], prometheus: bool,
                  as_json: bool) -> None:
    """Show what devices have done since they were made: requests, bytes, errors, latency."""
    stats = _results(session, "stats", selectors)
    if prometheus:
        from dmpy import metrics

        emit(None, metrics.exposition((each["name"], each) for each in stats).rstrip("\n"), False)
    elif as_json:
        emit(single_or_list(stats, selectors), None, True)
    elif not stats:
        click.echo(fmt.NO_DEVICES)
    else:
        from dmpy.cli.top import stats_text

        click.echo(stats_text(stats))
