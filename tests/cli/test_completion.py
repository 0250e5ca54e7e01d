"""The completion scripts load in the real shells, and complete verbs, options and device names."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest

from tests import needs


@pytest.fixture
def shell_environment(dmpy, tmp_path):
    """An environment in which `dmpy` is a command, and a device `needle` exists."""
    script = tmp_path / "bin" / "dmpy"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m dmpy.cli.main "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    dmpy.ok("create", "needle", "--table", "0 8 zero")
    environment = dmpy.environment()
    return environment | {"PATH": f"{script.parent}:{os.environ['PATH']}", "HOME": str(tmp_path),
                          "XDG_CONFIG_HOME": str(tmp_path), "TERM": "dumb"}


def _say(environment, *command, stdin=""):
    done = subprocess.run(command, env=environment, input=stdin, capture_output=True, text=True,
                          timeout=60, check=False)
    assert done.returncode == 0, done
    return done.stdout


BASH = """
eval "$(dmpy completion bash)"
complete -p dmpy >&2
try() {
    COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
    _dmpy_completion dmpy
    echo "${COMPREPLY[@]}"
}
try dmpy susp
try dmpy table --show
try dmpy remove nee
try dmpy rename needle nee
"""


def test_bash_completes_verbs_options_and_devices(shell_environment):
    out = _say(shell_environment, needs.tool("bash"), "--norc", "-c", BASH)
    assert out.splitlines() == ["suspend", "--showkeys", "needle", ""]


# What only a line editor can do is replaced: the functions that offer words print them.
ZSH = """
compdef() { print -r -- "$@" }
compadd() { print -r -- "${(@P)@[-1]}" }
_describe() { print -r -- "${(@P)3}" }
eval "$(dmpy completion zsh)"
try() { words=("$@"); CURRENT=$#; _dmpy_completion }
try dmpy susp
try dmpy remove nee
"""


def test_zsh_completes_verbs_and_devices(shell_environment):
    out = _say(shell_environment, needs.tool("zsh"), "-f", "-c", ZSH)
    assert out.splitlines() == [
        "_dmpy_completion dmpy", "suspend:Hold a device's requests back.", "needle"]


FISH = """
dmpy completion fish | source
complete -C 'dmpy susp'
complete -C 'dmpy table --show'
complete -C 'dmpy remove nee'
"""


def test_fish_completes_verbs_options_and_devices(shell_environment):
    out = _say(shell_environment, needs.tool("fish"), "--no-config", "-c", FISH)
    words = [line.split("\t")[0] for line in out.splitlines()]
    assert words == ["suspend", "--showkeys", "needle"]


def test_the_table_file_is_completed_as_a_file(dmpy):
    for words in ("dmpy load needle ta", "dmpy create new ta"):
        environment = dmpy.environment() | {
            "_DMPY_COMPLETE": "fish_complete", "COMP_WORDS": words, "COMP_CWORD": "ta"}
        assert dmpy.process(env=environment).stdout.strip() == "file,ta"


def test_completion_never_starts_a_server(own_dmpy):
    environment = own_dmpy.environment() | {
        "_DMPY_COMPLETE": "bash_complete", "COMP_WORDS": "dmpy remove ", "COMP_CWORD": "2"}
    done = own_dmpy.process(env=environment)
    assert (done.stdout.strip(), done.stderr) == ("", "")
    assert not own_dmpy.runtime.exists()


def test_an_unknown_shell_is_refused(dmpy):
    message = dmpy.refused("completion", "bsh", status=2)
    assert "bash" in message
