"""`dmpy`: the command line.

The verbs are in change.py, show.py, server.py, run.py, top.py and doctor.py of this folder, and
are imported when they are used: a script calls `dmpy` a thousand times.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import click

from dmpy.cli.format import did_you_mean
from dmpy.cli.session import Failure, Session, sentence

__all__ = ["ALIASES", "VERBS", "cli", "main", "run"]

# Verb -> its module, and its line in `dmpy --help`. The order is that of the help.
VERBS = {
    "create": ("change", "Make a device from a table."),
    "load": ("change", "Load a table into a device's inactive slot."),
    "suspend": ("change", "Hold a device's requests back."),
    "resume": ("change", "Make the inactive table live and let requests go on."),
    "clear": ("change", "Drop the inactive table."),
    "remove": ("change", "Remove devices."),
    "remove-all": ("change", "Remove every device that is not in use."),
    "rename": ("change", "Give a device another name, or its uuid."),
    "message": ("change", "Send a message to a target."),
    "ls": ("show", "List the devices, as a tree too."),
    "info": ("show", "Show the state of devices."),
    "table": ("show", "Show what devices are made of."),
    "status": ("show", "Show how the targets of devices fare."),
    "deps": ("show", "Show what devices stand on."),
    "wait": ("show", "Wait for an event of a device."),
    "targets": ("show", "List the targets and their versions."),
    "version": ("show", "Show versions."),
    "stats": ("show", "Show what devices have done."),
    "top": ("top", "Watch the devices at work."),
    "attach": ("server", "Give a device a node that can be mounted."),
    "detach": ("server", "Take a device's node away."),
    "run": ("run", "Serve a table for the time that a command runs."),
    "serve": ("server", "Run the server in the foreground."),
    "shutdown": ("server", "Stop the server, everything flushed."),
    "md": ("md", "Make, assemble and mend arrays of Linux MD."),
    "lab": ("lab", "Break an array under load and see whether it holds."),
    "doctor": ("doctor", "Say what this machine lacks, and how to get it."),
    "rpc": ("server", "Call a method of the server as it is."),
    "completion": ("server", "Print the completion script of a shell."),
}
# dmsetup's other spellings.
ALIASES = {"reload": "load", "remove_all": "remove-all"}


class _Verbs(click.Group):
    """The group of verbs: imported when used, suggested when misspelt."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        name = ALIASES.get(cmd_name, cmd_name)
        if name not in VERBS:
            return None
        module = importlib.import_module(f"dmpy.cli.{VERBS[name][0]}")
        return getattr(module, f"{name.replace('-', '_')}_command")

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None:
            near = did_you_mean(args[0], [*VERBS, *ALIASES])
            raise click.UsageError(f"command {args[0]} is unknown{near}")
        return super().resolve_command(ctx, args)

    # The lines are in VERBS: asking each command would import them all.
    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in VERBS.items()])


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--runtime", metavar="DIR", envvar="DMPY_RUNTIME_DIR",
              help="Folder of the server's sockets (also $DMPY_RUNTIME_DIR).")
@click.option("--state", metavar="DIR", envvar="DMPY_STATE_DIR",
              help="Folder that keeps the tables (also $DMPY_STATE_DIR).")
@click.option("--version", "show_version", is_flag=True, help="Print dmpy's version and exit.")
@click.pass_context
def cli(ctx: click.Context, runtime: str | None, state: str | None, show_version: bool) -> None:
    """Linux's device-mapper in user space.

    The verbs are dmsetup's; tables are the kernel's. The first verb that needs the server starts
    it; each device is an NBD export of its name. For example:

    \b
      truncate -s 100M a.img b.img
      dmpy create r0 --table "0 409600 striped 2 128 a.img 0 b.img 0"
      dmpy attach r0
    """
    ctx.obj = Session(runtime, state)
    ctx.call_on_close(ctx.obj.close)


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 for a refusal, 2 for wrong usage.

    Whatever goes wrong is one sentence on stderr.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    bare = not arguments
    if bare:
        arguments = ["--help"]
    elif arguments == ["--version"]:
        arguments = ["version"]
    try:
        result = cli.main(arguments, prog_name="dmpy", standalone_mode=False)
        sys.stdout.flush()
        return 2 if bare else result if isinstance(result, int) else 0
    except click.UsageError as error:
        _complain(_usage_sentence(error))
        return 2
    except click.exceptions.Exit as error:
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; the interpreter must not flush once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Failure as error:
        _complain(str(error))
        return error.status
    except (OSError, ValueError, click.ClickException) as error:
        _complain(sentence(error))
        return 1
    except Exception as error:
        if os.environ.get("DMPY_DEBUG"):
            raise
        _complain(f"a bug of dmpy, {type(error).__name__}: {sentence(error)} "
                  "(DMPY_DEBUG=1 shows where)")
        return 1


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status."""
    sys.exit(run(argv))


def _complain(text: str) -> None:
    click.echo(f"dmpy: {text}", err=True)


# click's sentences in this project's style, with the command whose help would tell more.
def _usage_sentence(error: click.UsageError) -> str:
    if isinstance(error, click.NoSuchOption):
        known = [o for p in error.ctx.command.params for o in p.opts] if error.ctx else []
        text = f"option {error.option_name} is unknown{did_you_mean(error.option_name, known)}"
    elif isinstance(error, click.MissingParameter) and error.param is not None:
        kind = "argument" if isinstance(error.param, click.Argument) else "option"
        text = f"{kind} {_given(error.param)} is missing"
    elif isinstance(error, click.BadParameter) and error.param is not None:
        text = f"{_given(error.param)}: {error.message.removesuffix('.')}"
    else:
        message = sentence(error)
        text = message[:1].lower() + message[1:]
    command = error.ctx.command_path if error.ctx else "dmpy"
    return f"{text}; see `{command} --help`"


# A parameter as it is typed.
def _given(param: click.Parameter) -> str:
    return param.opts[-1] if isinstance(param, click.Option) else param.human_readable_name


if __name__ == "__main__":
    main()
