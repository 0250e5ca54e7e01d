"""dmsetup's command line: getopt_long() as the C library does it, with dmsetup's options.

Options stand anywhere, long ones may be shortened to what is unambiguous, `--` ends them. Python's
own getopt knows no permutation with abbreviations and words its errors differently, argparse takes
10 ms to import; scripts see both.

Source: lvm2 v2_03_16 libdm/dm-tools/dmsetup.c, _process_switches(); getopt_long(3).
"""

from __future__ import annotations

import os

__all__ = ["Options", "UsageError", "atoi", "parse"]

# The long options, in the order in which an ambiguous one lists them; "=" takes an argument.
_LONG = """readonly alias= alldevices allprograms allregions area areas= areasize= bounds= checks
clear columns concise count= deferred select= exec= filemap follow= force foreground gid= group
groupid= help histogram inactive interval= length= manglename= major= minor= mode= nameprefixes
nogroup noflush noheadings nolockfs noopencount nosuffix notable notimesuffix udevcookie= nomonitor
noudevrules noudevsync options= precise programid= raw readahead= region regions= regionid=
relative retry rows segments separator= setuuid showkeys sort= start= table= target= tree uid=
units= uuid= unbuffered unquoted userdata= verbose= verifyudev version yes addnodeonresume
addnodeoncreate""".split()
_TAKES_ARGUMENT = {word.rstrip("="): word.endswith("=") for word in _LONG}

# The short options; `-v` counts, `--verbose` wants a word that nobody reads (so in dmsetup).
_SHORT = {
    "c": "columns", "C": "columns", "f": "force", "G": "gid", "h": "help", "j": "major",
    "m": "minor", "M": "mode", "n": "notable", "o": "options", "O": "sort", "r": "readonly",
    "S": "select", "u": "uuid", "U": "uid", "v": "verbose", "y": "yes",
}
_SHORT_TAKES_ARGUMENT = "GjmMoOSuU"
_NUMBERS = ("areas", "count", "gid", "groupid", "interval", "major", "minor", "regionid", "uid")
_MANGLING_MODES = ("none", "auto", "hex")


class UsageError(Exception):
    """A command line that cannot be understood; str() is what dmsetup says then."""


class Options:
    """What the command line asked for.

    Attributes:
        count: option -> how often it was given; every option has an entry.
        value: option -> its last argument, an int for those that are numbers.
        words: what is no option, in order.
    """

    def __init__(self) -> None:
        self.count = dict.fromkeys(_TAKES_ARGUMENT, 0)
        self.value: dict[str, str | int] = {}
        self.words: list[str] = []

    def __getitem__(self, option: str) -> int:
        """How often `option` was given."""
        return self.count[option]

    def text(self, option: str) -> str:
        """The argument of an option, empty when it was not given."""
        return str(self.value.get(option, ""))

    def number(self, option: str) -> int:
        """The argument of a numeric option, 0 when it was not given."""
        return int(self.value.get(option, 0))

    @property
    def addressed(self) -> bool:
        """A device is named by an option, -u or -j, and not by a word."""
        return bool(self.count["uuid"] or self.count["major"])


def parse(words: list[str]) -> Options:
    """Read a command line (without the program's name).

    Raises:
        UsageError: as dmsetup words it.
    """
    options = Options()
    permute = "POSIXLY_CORRECT" not in os.environ
    i = 0
    while i < len(words):
        word = words[i]
        i += 1
        if word == "--":
            options.words += words[i:]
            break
        if word.startswith("--"):
            i = _long(options, word[2:], words, i)
        elif word.startswith("-") and word != "-":
            i = _shorts(options, word[1:], words, i)
        else:
            options.words.append(word)
            if not permute:
                options.words += words[i:]
                break
    _check(options)
    return options


# One long option, `text` without its dashes. Returns the index of the next word.
def _long(options: Options, text: str, words: list[str], i: int) -> int:
    given, equals, argument = text.partition("=")
    found = [given] if given in _TAKES_ARGUMENT else [
        name for name in _TAKES_ARGUMENT if name.startswith(given)]
    if not found:
        raise UsageError(f"dmsetup: unrecognized option '--{text}'")
    if len(found) > 1:
        list_ = "".join(f" '--{name}'" for name in found)
        raise UsageError(f"dmsetup: option '--{text}' is ambiguous; possibilities:{list_}")
    option = found[0]
    if not _TAKES_ARGUMENT[option]:
        if equals:
            raise UsageError(f"dmsetup: option '--{option}' doesn't allow an argument")
        _take(options, option, None)
        return i
    if not equals:
        if i == len(words):
            raise UsageError(f"dmsetup: option '--{option}' requires an argument")
        argument = words[i]
        i += 1
    _take(options, option, argument)
    return i


# A word of short options, `text` without its dash. Returns the index of the next word.
def _shorts(options: Options, text: str, words: list[str], i: int) -> int:
    for at, letter in enumerate(text, 1):
        if letter not in _SHORT:
            raise UsageError(f"dmsetup: invalid option -- '{letter}'")
        if letter not in _SHORT_TAKES_ARGUMENT:
            _take(options, _SHORT[letter], None)
            continue
        if at < len(text):
            _take(options, _SHORT[letter], text[at:])
        elif i == len(words):
            raise UsageError(f"dmsetup: option requires an argument -- '{letter}'")
        else:
            _take(options, _SHORT[letter], words[i])
            i += 1
        break
    return i


# Note one option, and refuse an argument that dmsetup refuses while it still reads.
def _take(options: Options, option: str, argument: str | None) -> None:
    options.count[option] += 1
    if argument is None:
        return
    value: str | int = atoi(argument) if option in _NUMBERS else argument
    if option == "count" and value < 0:
        raise UsageError("Count must be zero or greater.")
    if option == "interval" and value <= 0:
        raise UsageError("Interval must be a positive integer.")
    if option == "mode":
        value = _octal(argument)
        if not value:
            raise UsageError(f"Invalid argument for --mode: {argument}. ")
    if option == "manglename" and argument.lower() not in _MANGLING_MODES:
        raise UsageError("Unknown name mangling mode.")
    if option == "readahead" and argument.lower() not in ("auto", "none") and atoi(argument) < -1:
        raise UsageError(
            f"Negative read ahead value ({atoi(argument)}) is not understood.")
    options.value[option] = value


# What is checked once all options are read.
def _check(options: Options) -> None:
    if bool(options["major"]) != bool(options["minor"]):
        raise UsageError("Please specify both major number and minor number.")
    if options["table"] and options["notable"]:
        raise UsageError("--table and --notable are incompatible.")
    if options["addnodeonresume"] and options["addnodeoncreate"]:
        raise UsageError("--addnodeonresume and --addnodeoncreate are incompatible.")


# strtol(3) in base 8, 0 where the text is no such number.
def _octal(text: str) -> int:
    try:
        return int(text, 8) if "_" not in text and "o" not in text.lower() else 0
    except ValueError:
        return 0


def atoi(text: str) -> int:
    """Return the number that `text` begins with, as atoi(3); 0 when it begins with none."""
    text = text.lstrip(" \t\n\v\f\r")
    end = 1 if text[:1] in ("+", "-") else 0
    while end < len(text) and text[end] in "0123456789":
        end += 1
    return int(text[:end]) if text[:end].strip("+-") else 0
