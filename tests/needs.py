"""What a test needs from the machine: it is skipped without, with a reason that names the thing.

With DMPY_TESTS_REQUIRE_ALL=1 (as in CI) nothing may be missing: the test fails instead.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess

import pytest

__all__ = [
    "command",
    "kernel_module",
    "missing",
    "module",
    "nbdkit_plugin",
    "path",
    "root",
    "tool",
]

# Where tools live that an ordinary user's PATH does not name.
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


def tool(name: str, *, package: str | None = None) -> str:
    """Require a program.

    Args:
        name: the program's name.
        package: the distribution package that holds it, for the reason.

    Returns:
        Its path.
    """
    found = shutil.which(name) or shutil.which(name, path=_SBIN)
    if found is None:
        missing(f"the program {name} is missing" + (f" (package {package})" if package else ""))
    return found


def root() -> None:
    """Require user id 0."""
    if os.geteuid() != 0:
        missing("this needs root")


def kernel_module(name: str) -> None:
    """Require a feature of the running kernel: built in, loaded, or loadable by modprobe."""
    if os.path.isdir(f"/sys/module/{name.replace('-', '_')}"):
        return
    modprobe = shutil.which("modprobe") or shutil.which("modprobe", path=_SBIN)
    if modprobe:
        answer = subprocess.run([modprobe, name], capture_output=True, timeout=30, check=False)
        if answer.returncode == 0:
            return
    missing(f"the kernel module {name} is not there and cannot be loaded")


def module(name: str, *, package: str | None = None) -> None:
    """Require a Python module that can be imported."""
    if importlib.util.find_spec(name) is None:
        hint = f" (package {package})" if package else ""
        missing(f"the Python module {name} is missing{hint}")


def path(name: str, *, why: str = "") -> str:
    """Require a file, folder or device node; returns it."""
    if not os.path.exists(name):
        missing(f"{name} is missing" + (f": {why}" if why else ""))
    return name


def command(*words: str, why: str = "") -> None:
    """Require that a command succeeds, for features that only a try can tell."""
    tool(words[0])
    answer = subprocess.run(words, capture_output=True, timeout=30, check=False)
    if answer.returncode:
        missing(f"`{' '.join(words)}` exits with {answer.returncode}" + (f": {why}" if why else ""))


def nbdkit_plugin(name: str) -> None:
    """Require nbdkit with a plugin or filter."""
    command(tool("nbdkit", package="nbdkit"), "--dump-plugin", name, why="no such nbdkit plugin")


def missing(reason: str) -> None:
    """Skip the test, or fail it where nothing may be missing."""
    if os.environ.get("DMPY_TESTS_REQUIRE_ALL") == "1":
        pytest.fail(f"{reason}, and DMPY_TESTS_REQUIRE_ALL=1 forbids to skip", pytrace=False)
    pytest.skip(reason)
