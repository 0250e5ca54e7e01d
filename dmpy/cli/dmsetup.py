"""`dmpy-dmsetup`, the drop-in for dmsetup(8): its command line, output and exit status.

Named or linked as `dmsetup` and first in PATH, it lets scripts and test suites that drive dmsetup
run on dmpy's devices. The page dmsetup.md says what is the same and what is not.

Source: lvm2 v2_03_16 libdm/dm-tools/dmsetup.c, main(),
_perform_command_for_all_repeatable_args(), _process_options().
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from dmpy.cli import dmsetup_change as change
from dmpy.cli import dmsetup_show as show
from dmpy.cli.dmsetup_driver import Driver, Failed, log_error
from dmpy.cli.dmsetup_options import Options, UsageError, parse
from dmpy.cli.dmsetup_run import Run, Verb
from dmpy.client import ServerGone

__all__ = ["VERBS", "main", "run"]


def _help(run: Run, words: list[str], info: object, several: bool) -> None:
    sys.stderr.write(_usage())
    if run.options["columns"]:
        from dmpy.cli.dmsetup_report import help_columns

        log_error(help_columns())
        log_error(" ")
    run.report = None


_VERBS = (
    Verb("help", 0, 0, 0, _help, "[-c]"),
    Verb("create", 0, 2, 0, change.create,
         "NAME [-u UUID] [-j MAJOR -m MINOR] [-r] [TABLE_FILE | --table TABLE | -n]"),
    Verb("remove", 0, None, 2, change.remove, "[-f] [--retry] [--deferred] DEVICE..."),
    Verb("remove_all", 0, 0, 0, change.remove_all, "[-f] [--deferred]"),
    Verb("suspend", 0, None, 2, change.suspend, "[--noflush] [--nolockfs] DEVICE..."),
    Verb("resume", 0, None, 2, change.resume, "DEVICE..."),
    Verb("load", 0, 2, 0, change.load, "DEVICE [-r] [TABLE_FILE | --table TABLE]"),
    Verb("clear", 0, None, 2, change.clear, "DEVICE..."),
    Verb("reload", 0, 2, 0, change.load, "as load"),
    Verb("wipe_table", 0, None, 2, change.wipe_table, "DEVICE..."),
    Verb("rename", 1, 2, 0, change.rename, "DEVICE [--setuuid] NEW_NAME_OR_UUID"),
    Verb("measure", 0, None, 2, change.measure, "(not supported)"),
    Verb("message", 2, None, 0, show.message, "DEVICE SECTOR MESSAGE"),
    Verb("ls", 0, 0, 0, show.ls, "[--target TYPE] [--exec COMMAND] [-o OPTIONS] [--tree]"),
    Verb("info", 0, None, 1, show.info, "[-c [-o FIELDS] [-O KEYS] [-S CRITERIA]] [DEVICE...]"),
    Verb("deps", 0, None, 2, show.deps, "[-o OPTIONS] [DEVICE...]"),
    Verb("stats", 1, None, 1, change.stats, "(not supported)"),
    Verb("status", 0, None, 2, show.status, "[--target TYPE] [--noflush] [DEVICE...]"),
    Verb("table", 0, None, 2, show.status,
         "[--target TYPE] [--showkeys] [--concise] [DEVICE...]"),
    Verb("wait", 0, 2, 0, show.wait, "DEVICE [EVENT_NR]"),
    Verb("mknodes", 0, None, 1, change.mknodes, "[DEVICE...]"),
    Verb("mangle", 0, None, 1, show.mangle_names, "[DEVICE...]"),
    Verb("udevcreatecookie", 0, 0, 0, change.udevcreatecookie, ""),
    Verb("udevreleasecookie", 0, 1, 0, change.udevreleasecookie, "[COOKIE]"),
    Verb("udevflags", 1, 1, 0, change.udevflags, "COOKIE"),
    Verb("udevcomplete", 1, 1, 0, change.udevcomplete, "COOKIE"),
    Verb("udevcomplete_all", 0, 1, 0, change.udevcomplete_all, "[AGE_IN_MINUTES]"),
    Verb("udevcookies", 0, 0, 0, change.udevcookies, ""),
    Verb("target-version", 1, None, 1, show.target_version, "TYPE..."),
    Verb("targets", 0, 0, 0, show.targets, ""),
    Verb("version", 0, 0, 0, show.version, ""),
    Verb("setgeometry", 5, 5, 0, change.setgeometry, "DEVICE CYLINDERS HEADS SECTORS START"),
    Verb("splitname", 1, 2, 0, show.splitname, "NAME [SUBSYSTEM]"),
)
VERBS = {verb.name: verb for verb in _VERBS}

# How `ls` and `deps` can name a device; an option is the first of which it is the beginning.
_NAMED_OPTIONS = ("devno", "blkdevname", "devname")


# The help that dmsetup prints for `help`, and for a command line that is wrong.
def _usage() -> str:
    lines = [
        "Usage:",
        "",
        "dmsetup [OPTIONS] VERB [ARGUMENTS]          (dmpy's drop-in; see dmsetup(8))",
        "",
        *(f"    {verb.name} {verb.usage}".rstrip() for verb in _VERBS),
        "",
        "    create --concise [NAME,UUID,MINOR,FLAGS,TABLE[,TABLE...][;...]]",
        "",
        "A DEVICE is a name, a path in /dev/mapper, or -u UUID, or -j MAJOR -m MINOR.",
        "For all verbs: -v, --inactive, --manglename none|auto|hex; taken without effect:",
        "    --checks, --noopencount, --noudevsync, --noudevrules, --verifyudev, --udevcookie C,",
        "    --readahead SECTORS, --addnodeonresume, --addnodeoncreate, -U, -G, -M, -y.",
        "For info -c: --noheadings, --separator TEXT, --nameprefixes, --unquoted, --rows,",
        "    --unbuffered, --count N, --interval SECONDS; `-o help` lists the fields.",
        "For ls and deps, -o: devno, blkdevname, devname.",
        "For ls --tree, -o: ascii, utf, vt100, compact, inverted, notrunc,",
        "    [no]device, blkdevname, active, open, rw, uuid.",
        "",
        "",
    ]
    return "\n".join(lines)


def run(words: Sequence[str]) -> int:
    """Run one command and return its exit status, 0 or 1.

    Args:
        words: the command line without the program's name.
    """
    if not os.environ.get("DM_DEV_DIR", "/").startswith("/"):
        log_error("Invalid DM_DEV_DIR environment variable value.")
        return 1
    try:
        options = parse(list(words))
    except UsageError as error:
        log_error(str(error))
        log_error("Couldn't process command line.")
        return 1
    if options["udevcookie"]:
        change.cookie_value(options.text("udevcookie"))
    elif os.environ.get("DM_UDEV_COOKIE"):
        change.cookie_value(os.environ["DM_UDEV_COOKIE"])
    words = options.words
    if options["help"] or options["version"]:
        verb = VERBS["help" if options["help"] else "version"]
        _perform(Run(options, Driver(), verb), verb, [])
        return 0
    if not words or words[0] not in VERBS:
        if words:
            log_error("Unknown command.")
        sys.stderr.write(_usage())
        return 1
    verb, words = VERBS[words[0]], words[1:]
    if len(words) < verb.least or verb.most is not None and len(words) > verb.most:
        log_error("Incorrect number of arguments.")
        sys.stderr.write(_usage())
        return 1
    return _run_verb(options, verb, words)


def _run_verb(options: Options, verb: Verb, words: list[str]) -> int:
    driver = Driver(_mangling(options) if verb.name != "mangle" else "none")
    driver.verbose = options["verbose"] > 1
    driver.inactive = bool(options["inactive"])
    try:
        return _run_with(Run(options, driver, verb), verb, words)
    finally:
        driver.close()


def _run_with(this: Run, verb: Verb, words: list[str]) -> int:
    options = this.options
    if verb.name == "splitname":
        options.count["columns"] += 1
    try:
        _choose_names(this)
    except Failed:
        log_error("Couldn't process command line.")
        return 1
    if options["select"] and verb.repeats == 2:
        this.selected_verb, verb = verb, VERBS["info"]
        options.count["columns"] += 1
    try:
        if options["columns"] and verb.name != "stats":
            _make_report(this, verb)
        if verb.name == "help":
            return int(not _perform(this, verb, words))
        return _repeat(this, verb, words)
    except Failed:
        return 1


def _mangling(options: Options) -> str:
    mode = (options.text("manglename") or
            os.environ.get("DM_DEFAULT_NAME_MANGLING_MODE", "")).lower()
    return mode if mode in ("none", "hex") else "auto"


# What -o means to `ls` and `deps`, where it may be shortened, too.
def _choose_names(this: Run) -> None:
    options = this.options
    if options["tree"]:
        from dmpy.cli.dmsetup_tree import Tree

        Tree(options.text("options"))
        return
    if options["columns"] or not options["options"]:
        return
    text = options.text("options")
    at = 0
    while at < len(text):
        end = text.find(",", at)
        end = len(text) if end < 0 else end
        known = [word for word in _NAMED_OPTIONS if word.startswith(text[at:end])]
        if not known:
            log_error(f"Option not recognised: {text[at:]}.")
            raise Failed
        this.names = known[0]
        at = end + 1


def _make_report(this: Run, verb: Verb) -> None:
    from dmpy.cli.dmsetup_report import Report

    if this.options["sort"] and this.options.text("sort") and verb.name in ("status", "table"):
        log_error("--sort is not yet supported with status and table.")
        raise Failed
    driver = this.driver
    this.report = Report(this.options, this.graph, lambda: driver.dm_dir, driver.mangling,
                         splitname=verb.name == "splitname")


# Once, or as often as --count says, every --interval seconds.
def _repeat(this: Run, verb: Verb, words: list[str]) -> int:
    options = this.options
    left = options.number("count") or (0 if options["count"] or options["interval"] else 1)
    pause = options.number("interval") or 1
    while True:
        done = _perform(this, verb, words)
        if this.concise:
            sys.stdout.write("\n")
        if this.report is not None:
            this.report.output()
        left -= 1
        if not done or left == 0:
            return int(not done)
        if this.report is not None:
            import time

            sys.stdout.write("\n")
            sys.stdout.flush()
            time.sleep(pause)
            this.report.repeat()
        this.forget()


# Call the verb, for each word in turn where it repeats; whether it succeeded for all.
def _perform(this: Run, verb: Verb, words: list[str]) -> bool:
    several = bool(verb.repeats) and len(words) != 1 and \
        bool(words or not this.options.addressed)
    try:
        if not verb.repeats or not words:
            verb.function(this, words, None, several)
        for at in range(len(words) if verb.repeats else 0):
            verb.function(this, words[at:], None, several)
    except Failed:
        log_error("Command failed.")
        return False
    except ServerGone as gone:
        log_error(str(gone))
        log_error("Command failed.")
        return False
    return True


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `dmpy-dmsetup`: run the command line and exit."""
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    sys.stderr.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        status = run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _die_of("SIGINT")
    except BrokenPipeError:
        _die_of("SIGPIPE")
    except OSError as error:
        log_error(error.strerror or str(error))
        log_error("Command failed.")
        status = 1
    sys.exit(status)


# End as a program does that does not catch a signal; Python catches these two.
def _die_of(name: str) -> None:
    import signal

    number = getattr(signal, name)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


if __name__ == "__main__":
    main()
