"""`dmpy doctor`: what this machine lacks, and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import click

from dmpy.cli.session import Session, emit, json_option, pass_session, sentence

__all__ = ["MISSING", "NOTE", "OK", "Finding", "doctor_command", "examine"]

OK, NOTE, MISSING = "ok", "note", "missing"

# Program -> the package that has it, on Debian and on Fedora.
_PACKAGES = {
    "nbdkit": ("nbdkit", "nbdkit"),
    "python plugin": ("nbdkit-plugin-python", "nbdkit-python-plugin"),
    "libnbd": ("python3-libnbd", "python3-libnbd"),
    "nbd-client": ("nbd-client", "nbd"),
    "nbdfuse": ("libnbd-bin", "nbdfuse"),
    "fusermount3": ("fuse3", "fuse3"),
    "losetup": ("mount", "util-linux"),
    "nbdinfo": ("libnbd-bin", "libnbd"),
}


class Finding(NamedTuple):
    """One line of the doctor's.

    Attributes:
        what: the thing looked at.
        verdict: `ok`; `note` for what only some verbs need; `missing` for what all of them need.
        text: what was found, and for anything but `ok` how to get it.
    """

    what: str
    verdict: str
    text: str


@click.command("doctor", short_help="Say what this machine lacks, and how to get it.")
@json_option
@pass_session
def doctor_command(session: Session, as_json: bool) -> int:
    """Look at everything that dmpy needs, and say in a line each what is there and what is not.

    The exit status is 1 when something essential is missing.
    """
    findings = list(examine(session))
    width = max(len(finding.what) for finding in findings)
    text = "\n".join(f"{f.verdict:<8} {f.what:<{width}}  {f.text}" for f in findings)
    emit([finding._asdict() for finding in findings], text, as_json)
    return 1 if any(finding.verdict == MISSING for finding in findings) else 0


def examine(session: Session) -> Iterator[Finding]:
    """Look at the machine, then at the server of a session, which is not started for this."""
    yield from _nbdkit()
    yield from _modules()
    yield from _attaching()
    yield _folder("runtime folder", lambda: session.runtime, socket=True)
    yield _folder("state folder", lambda: session.state, socket=False)
    yield from _server(session)


# How to get a package on this distribution.
def _get(thing: str) -> str:
    debian, fedora = _PACKAGES[thing]
    if shutil.which("apt-get"):
        return f"apt install {debian}"
    if shutil.which("dnf"):
        return f"dnf install {fedora}"
    return f"install the package {debian} (Debian) or {fedora} (Fedora)"


# Programs for administrators are outside an ordinary user's PATH.
def _tool(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path="/usr/local/sbin:/usr/sbin:/sbin")


def _said(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace",
                              stdin=subprocess.DEVNULL, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _nbdkit() -> Iterator[Finding]:
    program = _tool("nbdkit")
    version = _said([program, "--version"]) if program else None
    if not program or version is None:
        yield Finding("nbdkit", MISSING, f"not installed: {_get('nbdkit')}")
        return
    yield Finding("nbdkit", OK, f"{program}, {version.split()[-1]}")
    plugin = _said([program, "--dump-plugin", "python"])
    if plugin is None:
        yield Finding("nbdkit's Python plugin", MISSING,
                      f"not installed: {_get('python plugin')}")
        return
    embedded = re.search(r"^python_version=(\d+)\.(\d+)", plugin, re.MULTILINE)
    ours = sys.version_info[:2]
    if embedded and (int(embedded[1]), int(embedded[2])) != ours:
        yield Finding(
            "nbdkit's Python plugin", MISSING,
            f"runs Python {embedded[1]}.{embedded[2]}, but dmpy is installed for {ours[0]}."
            f"{ours[1]}: install dmpy with that one (Debian's is /usr/bin/python3)")
    else:
        yield Finding("nbdkit's Python plugin", OK, f"runs Python {ours[0]}.{ours[1]}, as we do")


def _modules() -> Iterator[Finding]:
    if importlib.util.find_spec("numpy") is None:
        yield Finding("numpy", MISSING, f"not installed: {sys.executable} -m pip install numpy")
    else:
        yield Finding("numpy", OK, importlib.metadata.version("numpy"))
    # libnbd's module is called nbd.
    if importlib.util.find_spec("nbd") is None:
        yield Finding("libnbd's Python module", NOTE, "not installed, so no table can name nbd:// "
                      f"devices: {_get('libnbd')}, and make the virtual environment with "
                      "--system-site-packages")
    else:
        yield Finding("libnbd's Python module", OK, "tables can name nbd:// devices")


# What `attach` needs: one of two ways, and root.
def _attaching() -> Iterator[Finding]:
    from dmpy import attach

    client = None
    if attach.has_nbd_driver():
        client = _tool("nbd-client")
        if client:
            yield Finding("nbd driver", OK, f"in the kernel, with {client}")
        else:
            yield Finding("nbd driver", NOTE, "in the kernel, but `dmpy attach` needs nbd-client: "
                          f"{_get('nbd-client')}")
    else:
        yield Finding("nbd driver", NOTE, "not in this kernel, so `dmpy attach` uses nbdfuse and "
                      "a loop device; where modules can be loaded: modprobe nbd")
    if _tool("nbdfuse"):
        yield Finding("nbdfuse", OK, str(_tool("nbdfuse")))
    else:
        yield Finding("nbdfuse", NOTE, f"not installed: {_get('nbdfuse')}")
    if os.access("/dev/fuse", os.R_OK | os.W_OK):
        yield Finding("/dev/fuse", OK, "can be used")
    else:
        yield Finding("/dev/fuse", NOTE, "missing or closed to this user: modprobe fuse; for a "
                      "container: --device /dev/fuse --cap-add SYS_ADMIN")
    if os.geteuid() != 0:
        if not (_tool("fusermount3") or _tool("fusermount")):
            yield Finding("fusermount3", NOTE, f"not installed: {_get('fusermount3')}")
        yield Finding("root", NOTE, "not root, so `dmpy attach --file` shows devices as files "
                      "only; every other verb works")
    elif client:
        pass                                            # loop devices are the other way
    elif not _tool("losetup"):
        yield Finding("loop devices", NOTE, f"losetup is not installed: {_get('losetup')}")
    elif not os.path.exists("/dev/loop-control"):
        yield Finding("loop devices", NOTE, "no /dev/loop-control: modprobe loop; a container "
                      "needs --privileged")
    else:
        yield Finding("loop devices", OK, "/dev/loop-control is there")


# A folder of ours: private, ours, and short enough for the sockets in it.
def _folder(what: str, path_of: Callable[[], str], *, socket: bool) -> Finding:
    try:
        path = path_of()
        if socket and len(os.fsencode(os.path.join(path, "control.sock"))) > 107:
            return Finding(what, MISSING, f"{path} is too long for a socket: set DMPY_RUNTIME_DIR "
                           "to a shorter one")
        if not os.path.lexists(path):
            above = path
            while not os.path.exists(above):
                above = os.path.dirname(above)
            if os.access(above, os.W_OK | os.X_OK) and os.path.isdir(above):
                return Finding(what, OK, f"{path} will be made")
            return Finding(what, MISSING, f"{path} cannot be made, {above} is closed to this "
                           f"user: set DMPY_{what.split()[0].upper()}_DIR")
        info = os.stat(path)
        if not stat.S_ISDIR(info.st_mode):
            return Finding(what, MISSING, f"{path} is no folder: remove it")
        if info.st_uid != os.geteuid() and os.geteuid() != 0:
            return Finding(what, MISSING, f"{path} belongs to user {info.st_uid}: set "
                           f"DMPY_{what.split()[0].upper()}_DIR")
        if info.st_mode & 0o077:
            return Finding(what, MISSING, f"{path} is open to other users (mode "
                           f"{info.st_mode & 0o777:04o}): chmod 700 {path}")
        if not os.access(path, os.W_OK | os.X_OK):
            return Finding(what, MISSING, f"{path} cannot be written to")
    except OSError as error:
        return Finding(what, MISSING, sentence(error))
    return Finding(what, OK, path)


# The server, what it could not rebuild, and what an earlier one left attached.
def _server(session: Session) -> Iterator[Finding]:
    from dmpy import attach
    from dmpy.client import ServerGone

    try:
        server = session.call("server", start=False)
    except ServerGone as gone:
        if gone.died or gone.pid is not None:
            yield Finding("server", MISSING, str(gone))
        else:
            yield Finding("server", OK, "none runs; the first verb that needs it starts it")
        server = None
    except OSError as error:
        yield Finding("server", MISSING, sentence(error))
        return
    if server is not None:
        yield Finding("server", OK, f"pid {server['pid']}, for {server['uptime']:.0f} s")
        for failed in server["failed"]:
            yield Finding(f"device {failed['name'] or failed['minor']}", MISSING,
                          f"could not be rebuilt: {failed['error']}")
    try:
        stale = [record for record in attach.attached(session.runtime) if record["stale"]]
    except OSError as error:
        yield Finding("attached", NOTE, sentence(error))
        return
    for record in stale:
        yield Finding(f"attached {record['name']}", NOTE, f"{record['node']} lost its server; the "
                      "next one takes it away, once nothing uses it")
