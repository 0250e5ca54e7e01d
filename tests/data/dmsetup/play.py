"""Play commands.txt to whatever `dmsetup` is first in PATH and write down what it answers.

A transcript is, for each command, the command after "$ ", its standard output after "| ", its
standard error after "! ", and its exit status after "= ". What depends on the machine is replaced:
the legs' names and numbers by <A>, <B>, <C>, device-mapper's major number by 253, and the long
help texts, which every implementation words for itself, by <usage>, <fields> and <selection>.

Used by record.py (in the guest, with the real dmsetup) and by test_dmsetup.py (with ours).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

TIMEOUT = 30  # seconds a command may take before it counts as hung

# Help texts, from their first line to their last.
_HELP = [
    ("usage", r"(?ms)^Usage:\n.*?^ [^\n]*\[no\]device[^\n]*\n\n"),
    ("fields", r"(?ms)^Mapped Device Name Fields\n.*?^  \? +- [^\n]*\n \n"),
    ("selection", r"(?ms)^Selection operands\n.*?^ +\} +- [^\n]*\n \n"),
]


def normalise(text: str, names: dict[str, str]) -> str:
    """Replace what differs from machine to machine.

    Args:
        text: output of one command.
        names: what to look for (as a regular expression) and what to write instead.
    """
    for word, pattern in _HELP:
        text = re.sub(pattern, f"<{word}>\n", text)
    for pattern, word in names.items():
        text = re.sub(pattern, word, text)
    return text


def play(commands: list[str], names: dict[str, str], env: dict[str, str]) -> str:
    """Run `commands` one after the other; return the transcript."""
    lines: list[str] = []
    for command in commands:
        if not command or command.startswith("#"):
            lines.append(command)
            continue
        lines.append(f"$ {command}")
        try:
            done = subprocess.run(
                ["/bin/sh", "-c", command], env=env, stdin=subprocess.DEVNULL,
                capture_output=True, timeout=TIMEOUT, check=False)
        except subprocess.TimeoutExpired:
            lines.append("= timeout")
            continue
        for mark, text in (("|", done.stdout), ("!", done.stderr)):
            text = normalise(text.decode("utf-8", "backslashreplace"), names)
            lines += [f"{mark} {line}".replace("\x1b", "\\e") for line in text.splitlines()]
            if text and not text.endswith("\n"):
                lines.append("\\ no newline at the end")
        lines.append(f"= {done.returncode}")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """play.py COMMANDS TRANSCRIPT PATTERN=WORD...: the environment gives A, B, C, MAJ and TMP."""
    names = dict(word.rsplit("=", 1) for word in argv[2:])
    with open(argv[0], encoding="utf-8") as file:
        commands = file.read().splitlines()
    with open(argv[1], "w", encoding="utf-8") as file:
        file.write(play(commands, names, dict(os.environ)))


if __name__ == "__main__":
    main(sys.argv[1:])
