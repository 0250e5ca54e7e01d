"""`dmpy run`: a server of its own for the time that one command runs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import click

from dmpy.attach import export_uri
from dmpy.cli.change import table_text
from dmpy.cli.session import Session, fail, read_text
from dmpy.client import ServerGone

__all__ = ["run_command"]

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1,
              signal.SIGUSR2)
# What a shell answers when it cannot start a command.
_NOT_FOUND, _NOT_RUNNABLE = 127, 126


@click.command("run", short_help="Serve a table for the time that a command runs.",
               context_settings={"ignore_unknown_options": False,
                                 "allow_interspersed_args": False})
@click.argument("command", nargs=-1, required=True, metavar="[--] COMMAND...")
@click.option("--table", "tables", multiple=True, metavar="TABLE",
              help="The table of the device; given again, further lines.")
@click.option("--table-file", metavar="FILE", type=click.Path(allow_dash=True),
              help="A file with the table; - is standard input.")
@click.option("--device", "devices", multiple=True, metavar="NAME=TABLE",
              help="A further device, made in the order given; tables may name earlier ones.")
@click.option("--name", default="disk", show_default=True, help="Name of the device of --table.")
@click.option("-r", "--readonly", is_flag=True, help="Refuse writes to the device of --table.")
@click.pass_context
def run_command(ctx: click.Context, command: tuple[str, ...], tables: tuple[str, ...],
                table_file: str | None, devices: tuple[str, ...], name: str,
                readonly: bool) -> int:
    """Serve a table in a private folder, run COMMAND, stop, and exit with its status.

    COMMAND finds in its environment $uri (the last device's NBD URI), $NAME (the URI of each
    device), $nbd (as qemu wants it) and $socket; `dmpy` in it talks to this server. A COMMAND of
    one word goes to the shell:

    \b
      dmpy run --table "0 204800 linear a.img 0" -- 'nbdinfo "$uri"'
    """
    wanted = [(*_named_table(text), False) for text in devices]
    if tables or table_file:
        if tables and table_file:
            raise click.UsageError("--table and --table-file exclude each other")
        text = read_text(table_file) if table_file else table_text(tables, None)
        wanted.append((name, text, readonly))
    if not wanted:
        raise click.UsageError("--table, --table-file or --device is needed")
    # A Unix socket's path may have 107 bytes.
    place = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="dmpy-", dir=place if len(os.fsencode(place)) < 70 else "/tmp")
    try:
        with _server(folder) as session:
            for device, text, is_readonly in wanted:
                session.call("create", name=device, table=text, readonly=is_readonly,
                             cwd=os.getcwd())
            return _run(command, _environment(folder, [device for device, _, _ in wanted]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _named_table(text: str) -> tuple[str, str]:
    name, equals, table = text.partition("=")
    if not equals or not name:
        raise click.UsageError(f"--device must be NAME=TABLE (got {text})")
    return name, table_text((table,), None)


@contextmanager
def _server(folder: str) -> Iterator[Session]:
    from dmpy import launch

    session = Session(folder, os.path.join(folder, "state"))
    try:
        session.connect()
        yield session
    finally:
        session.close()
        with suppress(ServerGone):                      # it did not start, or COMMAND stopped it
            launch.stop_server(folder, force=True)


def _environment(folder: str, names: list[str]) -> dict[str, str]:
    socket = os.path.join(folder, "nbd.sock")
    environment = dict(os.environ)
    for name in names:
        # What is no word for a shell is spelled with underscores; no device replaces $PATH.
        word = re.sub(r"\W", "_", name, flags=re.ASCII)
        environment.setdefault(f"_{word}" if word[:1].isdigit() else word,
                               export_uri(name, socket))
    environment.update(
        uri=export_uri(names[-1], socket), socket=socket, unixsocket=socket,
        nbd=f"nbd:unix:{socket}:exportname={names[-1]}", exportname=names[-1],
        DMPY_RUNTIME_DIR=folder, DMPY_STATE_DIR=os.path.join(folder, "state"))
    return environment


# Run the command, passing signals on, and return the status a shell would see.
def _run(command: tuple[str, ...], environment: dict[str, str]) -> int:
    words = ["/bin/sh", "-c", command[0]] if len(command) == 1 else list(command)
    child: subprocess.Popen | None = None

    def forward(number: int, frame: object) -> None:
        # Ctrl-C reached the child by itself, as one of the terminal's foreground group.
        if child is not None and not (number in (signal.SIGINT, signal.SIGQUIT)
                                      and os.isatty(0)):
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        child = subprocess.Popen(words, env=environment)
        status = child.wait()
    except FileNotFoundError:
        fail(f"{words[0]}: command not found", _NOT_FOUND)
    except PermissionError:
        fail(f"{words[0]}: cannot be run: permission denied", _NOT_RUNNABLE)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 - status if status < 0 else status
