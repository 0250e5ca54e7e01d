"""What the numbers were measured on: the machine, the versions, the copy trap."""
from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

from dmpy.buffers import slow_copy_width

from .ground import Ground, system_path
from .workloads import Workload

__all__ = ["copy_trap", "describe", "file_system", "page_offsets"]

# glibc maps an allocation of 128 KiB and more by itself, behind a header of this many bytes.
_LARGE_BUFFER_AT = 16
_WHEREAMI = Path(__file__).with_name("plugins") / "whereami.py"


def describe() -> dict[str, str]:
    """Names and versions, by what they are of; `none` where a program is missing."""
    cpu = Path("/proc/cpuinfo").read_text()

    def field(name: str) -> str:
        found = re.search(rf"^{name}\s*:\s*(.*)$", cpu, re.MULTILINE)
        return found[1] if found else "unknown"

    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    return {
        "cpu": f"{field('model name')} (family {field('cpu family')}, model {field('model')})",
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{int(memory[1]) >> 20} GiB" if memory else "unknown",
        "kernel": f"{platform.system()} {platform.release()}",
        "distribution": platform.freedesktop_os_release().get("PRETTY_NAME", "unknown"),
        "python": platform.python_version(),
        "nbdkit": _version("nbdkit", "--version"),
        "plugin_python": _plugin_python(),
        "fio": _version("fio", "--version"),
        "qemu-nbd": _version("qemu-nbd", "--version"),
    }


# The first thing that looks like a version in what a program says of itself.
def _version(*argv: str) -> str:
    found = re.search(r"\d+\.\d+(\.\d+)?", _output(*argv))
    return found[0] if found else "none"


# The version that nbdkit's Python plugin was built for.
def _plugin_python() -> str:
    found = re.search(r"^python_version=(.*)$", _output("nbdkit", "python", "--dump-plugin"), re.M)
    return found[1] if found else "none"


# Standard output of a program, or nothing where there is no such program.
def _output(*argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20, env=system_path())
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def page_offsets(ground: Ground, workloads: list[Workload]) -> dict[str, int]:
    """Where nbdkit's buffer begins in its page, bytes, by request size.

    Empty where libnbd's Python module is not there to ask.
    """
    try:
        import nbd
    except ImportError:
        return {}
    server = ground.nbdkit("whereami", "python", str(_WHEREAMI))
    offsets = {}
    for size, request_size in {w.size: w.request_size for w in workloads}.items():
        # A connection each, because a buffer that has grown stays where it is.
        handle = nbd.NBD()
        handle.connect_uri(server.uri)
        offsets[size] = int.from_bytes(handle.pread(request_size, 0)[:2], "little")
        handle.shutdown()
    return offsets


def file_system(folder: Path) -> str:
    """The type of the file system that holds `folder`, from /proc/mounts."""
    found = ("", "unknown")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        inside = folder == Path(place) or Path(place) in folder.parents
        if inside and len(place) >= len(found[0]):
            found = (place, kind)
    return found[1]


def copy_trap() -> dict[str, int | bool]:
    """Whether this CPU copies slowly into nbdkit's large buffers, which begin at page+16.

    Returns:
        `copy_width`: destinations of 1 .. width - 1 bytes above the source modulo a page are slow,
        0 if none is; `copy_trap`: whether page+16 is among them.
    """
    width = slow_copy_width()
    return {"copy_width": width, "copy_trap": width > _LARGE_BUFFER_AT}
