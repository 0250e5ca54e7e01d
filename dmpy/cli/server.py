"""The verbs about the server itself: serve, shutdown, attach, detach, rpc, completion."""

from __future__ import annotations

import json
from typing import Any

import click

from dmpy.cli.session import (
    Session,
    emit,
    fail,
    json_option,
    pass_session,
    selection,
    single_or_list,
)
from dmpy.client import Client, RemoteError, ServerGone

__all__ = [
    "attach_command",
    "completion_command",
    "detach_command",
    "rpc_command",
    "serve_command",
    "shutdown_command",
]

_SHELLS = ("bash", "zsh", "fish")
_FOLDER = click.Path(file_okay=False)


@click.command("serve", short_help="Run the server in the foreground.")
@click.option("--runtime", metavar="DIR", type=_FOLDER, help="Folder of the server's sockets.")
@click.option("--state", metavar="DIR", type=_FOLDER, help="Folder that keeps the tables.")
@click.option("--devdir", metavar="DIR", type=_FOLDER,
              help="Attach each device as it is made, and link DIR/NAME to its node.")
@click.option("--metrics", metavar="HOST:PORT",
              help="Serve Prometheus metrics over HTTP there, on this machine.")
@click.option("--tcp", metavar="HOST:PORT", help="Serve NBD over TCP too; beyond this machine "
              "only with --tls require.")
@click.option("--tls", type=click.Choice(["off", "on", "require"]), help="Encrypt NBD.")
@click.option("--tls-certificates", metavar="DIR", type=_FOLDER,
              help="Folder of ca-cert.pem, server-cert.pem and server-key.pem.")
@click.option("--tls-psk", metavar="FILE", type=click.Path(),
              help="File of pre-shared keys, USER:HEX a line.")
@click.option("--tls-verify-peer", is_flag=True, help="Refuse clients without a certificate.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]),
              help="How much the server says on stderr.")
@click.option("-b", "--background", is_flag=True,
              help="Return when the server is ready; its log goes to RUNTIME/server.log.")
@pass_session
def serve_command(session: Session, runtime: str | None, state: str | None, background: bool,
                  log_level: str | None, **options: Any) -> int:
    """Run the server in the foreground until SIGTERM, Ctrl-C or `dmpy shutdown`.

    The devices of the state folder come back first. A server that died is started again by this
    as well.
    """
    from dmpy import launch

    if runtime or state:
        session = Session(runtime or session.runtime, state or
                          (None if runtime else session.state))
    try:
        chosen = launch.Options(loglevel=log_level, **options)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if background:
        # Without a wish of its own, a server that runs already is as good as a new one.
        wanted = chosen if log_level or any(options.values()) else None
        with launch.start_server(session.runtime, session.state, wanted) as client:
            _tell(client)
        return 0
    return launch.run_server(session.runtime, session.state, chosen, ready=_tell)


# Where a server that is up can be reached, and what it could not bring back.
def _tell(client: Client) -> None:
    server = client.call("server")
    places = " and ".join(filter(None, (server["uri"], server["tcp_uri"])))
    metrics = f", metrics on {server['metrics']}" if server["metrics"] else ""
    click.echo(f"dmpy: serving {places} (pid {server['pid']}, tables in {server['state']}"
               f"{metrics})", err=True)
    for failed in server["failed"]:
        click.echo(f"dmpy: device {failed['name'] or failed['minor']} could not be rebuilt: "
                   f"{failed['error']}", err=True)


@click.command("shutdown", short_help="Stop the server, everything flushed.")
@click.option("-f", "--force", is_flag=True,
              help="Even while nodes are in use: what is mounted fails from then on.")
@json_option
@pass_session
def shutdown_command(session: Session, force: bool, as_json: bool) -> None:
    """Stop the server; its devices come back when it is started again.

    Refused while the node of an attached device is in use. No server is no error.
    """
    from dmpy import launch

    try:
        pid = session.call("server", start=False)["pid"]
    except ServerGone as gone:
        if gone.died or gone.pid is not None:
            raise
        emit({"pid": None}, f"no server runs in {session.runtime}", as_json)
        return
    session.close()
    launch.stop_server(session.runtime, force=force)
    emit({"pid": pid}, None, as_json)


@click.command("attach", short_help="Give a device a node that can be mounted.")
@selection(required=True)
@click.option("--file", "as_file", is_flag=True, help="A file, which needs no root.")
@json_option
@pass_session
def attach_command(session: Session, selectors: list[dict], as_file: bool, as_json: bool) -> None:
    """Give devices nodes (/dev/nbd0, or /dev/loop0 where the kernel has no nbd) and print them.

    It needs root; with --file the node is a file that nbdfuse shows, without root.
    """
    results = [session.call("attach", **selector, as_file=as_file) for selector in selectors]
    emit(single_or_list(results, selectors), "\n".join(r["node"] for r in results), as_json)


@click.command("detach", short_help="Take a device's node away.")
@selection(required=True)
@json_option
@pass_session
def detach_command(session: Session, selectors: list[dict], as_json: bool) -> None:
    """Take nodes away, everything flushed; refused while one is mounted or open."""
    results = [session.call("detach", **selector) for selector in selectors]
    emit(single_or_list(results, selectors), None, as_json)


@click.command("rpc", short_help="Call a method of the server as it is.")
@click.argument("method", required=False, shell_complete=lambda ctx, param, incomplete:
                _methods(incomplete))
@click.argument("params", nargs=-1, metavar="[KEY=VALUE | JSON]...")
@click.option("--reference", is_flag=True, help="Print the control protocol's reference.")
@pass_session
def rpc_command(session: Session, method: str | None, params: tuple[str, ...],
                reference: bool) -> None:
    """Call METHOD and print its result as JSON.

    Parameters are KEY=VALUE, where a value that is JSON is taken as such (minor=3, table=null), or
    one JSON object: `dmpy rpc info name=r0`, `dmpy rpc info '{"minor": 3}'`.
    """
    if reference:
        from dmpy.control import reference as text

        click.echo(text().rstrip("\n"))
        return
    if method is None:
        raise click.UsageError("argument METHOD is missing (or --reference)")
    try:
        result = session.call(method, **_parsed(params))
    except RemoteError as error:
        known = _methods("")
        if method not in known:
            from dmpy.cli.format import did_you_mean

            fail(f"{error.message}{did_you_mean(method, known)}")
        raise
    click.echo(json.dumps(result, indent=2))


def _methods(incomplete: str) -> list[str]:
    from dmpy.control import METHODS

    return [name for name in METHODS if name.startswith(incomplete)]


def _parsed(params: tuple[str, ...]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for word in params:
        key, equals, value = word.partition("=")
        if word.lstrip().startswith("{"):
            try:
                result.update(json.loads(word))
            except ValueError as error:
                raise click.UsageError(f"parameters are not JSON: {error}") from None
        elif equals and key.isidentifier():
            try:
                result[key] = json.loads(value)
            except ValueError:
                result[key] = value
        else:
            raise click.UsageError(f"parameter must be KEY=VALUE or a JSON object (got {word})")
    return result


@click.command("completion", short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion_command(ctx: click.Context, shell: str) -> None:
    """Print the completion script of SHELL.

    \b
    bash: eval "$(dmpy completion bash)"
    zsh:  eval "$(dmpy completion zsh)"
    fish: dmpy completion fish | source
    """
    from click.shell_completion import get_completion_class

    complete = get_completion_class(shell)
    assert complete is not None
    root = ctx.find_root()
    click.echo(complete(root.command, {}, "dmpy", "_DMPY_COMPLETE").source())
