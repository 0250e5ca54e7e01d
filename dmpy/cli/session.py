"""What every verb shares: the connection, the choice of devices, text or JSON, error sentences."""

from __future__ import annotations

import errno
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import click

from dmpy.cli.format import NO_DEVICES, did_you_mean
from dmpy.client import Client, RemoteError, ServerGone

__all__ = [
    "Failure",
    "Session",
    "blocks",
    "device_names",
    "emit",
    "fail",
    "json_option",
    "one_device",
    "pass_session",
    "read_text",
    "selection",
    "sentence",
    "single_or_list",
    "table_file",
]

Selector = dict[str, Any]

# The prefix under which the kernel shows its devices; a name may be given with it.
_DEVICE_FOLDER = "/dev/mapper/"


class Session:
    """Which server a command talks to, and the connection to it.

    Args:
        runtime: the runtime folder, or None for the usual one.
        state: the state folder of a server that has to be started, or None for the usual one.
    """

    def __init__(self, runtime: str | None = None, state: str | None = None) -> None:
        self._runtime = runtime
        self._state = state
        self._client: Client | None = None

    @functools.cached_property
    def runtime(self) -> str:
        """The runtime folder, absolute."""
        from dmpy import launch

        if self._runtime:
            return os.path.abspath(self._runtime)
        return launch.runtime_dir(create=False)

    @functools.cached_property
    def state(self) -> str:
        """The state folder, absolute."""
        from dmpy import launch

        if self._state:
            return os.path.abspath(self._state)
        # A server of one's own keeps its state to itself, unless told otherwise.
        if self._runtime:
            return os.path.join(self.runtime, "state")
        return launch.state_dir(create=False)

    @property
    def socket(self) -> str:
        """The path of the control socket."""
        return os.path.join(self.runtime, "control.sock")

    def call(self, method: str, *, start: bool = True, **params: Any) -> Any:
        """Call a method of the server.

        Args:
            method: one of the control protocol.
            start: start a server where none was started yet.
            params: of the method.

        Raises:
            RemoteError: the server refused.
            ServerGone: there is none; one that died is not replaced behind the user's back.
        """
        client = self.connect(start=start)
        try:
            return client.call(method, **params)
        except RemoteError as error:
            raise self._with_suggestion(client, error, params) from None

    def connect(self, *, start: bool = True) -> Client:
        """Return the connection, making it first where there is none."""
        if self._client is None:
            try:
                self._client = Client(self.socket)
            except ServerGone as gone:
                # One that is there but does not answer yet may be starting: that is waited for.
                if gone.died or not start:
                    raise
                from dmpy import launch

                self._client = launch.start_server(self.runtime, self.state)
            except NotADirectoryError as error:
                raise OSError(error.errno, f"runtime folder {self.runtime} is no folder") from None
        return self._client

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._client is not None:
            self._client.close()
            self._client = None

    # A name that is nearly one of ours is a slip of the keyboard.
    def _with_suggestion(self, client: Client, error: RemoteError, params: dict) -> OSError:
        name = params.get("name")
        if error.errno != errno.ENXIO or not name or "did you mean" in error.message:
            return error
        names = [info["name"] for info in client.call("info")]
        hint = "" if name in names else did_you_mean(name, names)
        return OSError(error.errno, error.message + hint) if hint else error


pass_session = click.make_pass_decorator(Session)


# -- Options and arguments that many verbs have -------------------------------------------------


def json_option(command: Callable) -> Callable:
    """Add `--json`, passed on as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def table_file(ctx: click.Context, param: click.Parameter, incomplete: str) -> list:
    """Complete the FILE of `NAME FILE`; a new device's name is nobody's to complete."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")] if ctx.params.get("words") else []


def device_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list:
    """Complete a device's name: the names that the running server has; never starts one."""
    if param.name == "words" and ctx.params.get("words"):
        # Only the first of the words is a device.
        return table_file(ctx, param, incomplete) if ctx.command.name == "load" else []
    session = ctx.find_object(Session) or Session()
    try:
        client = Client(session.socket, timeout=2.0)
        names = [info["name"] for info in client.call("info")]
        client.close()
    except OSError:
        return []                                       # a completion has nobody to complain to
    return [name for name in names if name.startswith(incomplete)]


def _selector_options(command: Callable) -> Callable:
    for option in (
        click.option("-m", "--minor", type=click.IntRange(min=0), help="Choose by minor number."),
        click.option("-j", "--major", type=click.IntRange(min=0), help="Beside --minor: 253."),
        click.option("-u", "--uuid", help="Choose by uuid."),
    ):
        command = option(command)
    return command


def selection(*, required: bool) -> Callable:
    """Add `NAME...`, `-u UUID` and `-m MINOR`, passed on as `selectors`.

    Args:
        required: at least one device must be named; otherwise none means all of them.
    """
    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def wrapper(*args: Any, names: tuple[str, ...], uuid: str | None, minor: int | None,
                    major: int | None, **kwargs: Any) -> Any:
            selectors = [{"name": _plain_name(name)} for name in names]
            selectors += _by_number(uuid, minor, major)
            if required and not selectors:
                raise click.UsageError("argument NAME is missing")
            return command(*args, selectors=selectors, **kwargs)

        named = click.argument("names", nargs=-1, metavar="NAME..." if required else "[NAME]...",
                               shell_complete=device_names)
        return named(_selector_options(wrapper))
    return decorate


def one_device(metavar: str) -> Callable:
    """Add `NAME` and further words, passed on as `selector` and `rest`; -u and -m replace NAME.

    Args:
        metavar: how the arguments are shown in the help.
    """
    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def wrapper(*args: Any, words: tuple[str, ...], uuid: str | None, minor: int | None,
                    major: int | None, **kwargs: Any) -> Any:
            selectors = _by_number(uuid, minor, major)
            if not selectors:
                if not words:
                    raise click.UsageError("argument NAME is missing")
                selectors, words = [{"name": _plain_name(words[0])}], words[1:]
            return command(*args, selector=selectors[0], rest=list(words), **kwargs)

        argument = click.argument("words", nargs=-1, metavar=metavar, shell_complete=device_names)
        return argument(_selector_options(wrapper))
    return decorate


def _by_number(uuid: str | None, minor: int | None, major: int | None) -> list[Selector]:
    if major is not None and minor is None:
        raise click.UsageError("--major needs --minor")
    if major is not None and major != 253:
        raise OSError(errno.ENXIO, f"no device has the number {major}:{minor} (ours are 253:N)")
    selectors: list[Selector] = [] if uuid is None else [{"uuid": uuid}]
    return selectors if minor is None else [*selectors, {"minor": minor}]


def _plain_name(name: str) -> str:
    return name.removeprefix(_DEVICE_FOLDER)


# -- Output -------------------------------------------------------------------------------------


def emit(result: Any, text: str | None, as_json: bool) -> None:
    """Print a verb's outcome: `result` as JSON, or else `text` (None: nothing)."""
    if as_json:
        click.echo(json.dumps(result, indent=2))
    elif text is not None:
        click.echo(text)


def single_or_list(results: Sequence[Any], selectors: Sequence[Selector]) -> Any:
    """Return the one result for one chosen device, else the list: the shape that --json prints."""
    return results[0] if len(selectors) == 1 else list(results)


def blocks(texts: Sequence[str]) -> str:
    """Join what is printed a device: each followed by an empty line, or dmsetup's word for none."""
    return "\n".join(f"{text}\n" for text in texts) if texts else NO_DEVICES


def fail(message: str, status: int = 1) -> NoReturn:
    """End the command with a sentence on stderr and an exit status."""
    raise Failure(message, status)


class Failure(Exception):
    """A command that cannot go on; `main` prints the sentence.

    Attributes:
        status: what the process exits with.
    """

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def sentence(error: BaseException) -> str:
    """Return the one line that says what an error means, in this project's style."""
    if isinstance(error, click.ClickException):
        # click ends its sentences with a full stop.
        return _one_line(error.format_message()).removesuffix(".")
    if isinstance(error, OSError) and not isinstance(error, (RemoteError, ServerGone)):
        text = error.strerror or str(error) or os.strerror(error.errno or errno.EIO)
        # What Python raises by itself has a capital letter, and the file beside the reason.
        if error.filename is not None:
            text = f"{os.fsdecode(error.filename)}: {_lower(text)}"
        return _one_line(text)
    return _one_line(str(error) or type(error).__name__)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def read_text(path: str) -> str:
    """Return the text of a file, or of standard input for `-`.

    Raises:
        OSError: naming the file.
        Failure: the file is no text.
    """
    try:
        if path == "-":
            if sys.stdin.isatty():
                click.echo("dmpy: reading the table from the terminal; Ctrl-D ends it", err=True)
            return sys.stdin.read()
        with open(path, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError:
        fail(f"{path}: not a text file")
