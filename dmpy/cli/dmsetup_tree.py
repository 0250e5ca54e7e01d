"""Who stands on whom, and `dmsetup ls --tree`, which draws it.

Nodes are linked in libdm's order, which shows in what is drawn and in the fields of `info -c` that
name a device's users: devices as listed, below each what it uses, at the first meeting.

Source: lvm2 v2_03_16 libdm/libdm-deptree.c, _add_dev(), _link_tree_nodes();
libdm/dm-tools/dmsetup.c, _display_tree_node(), _out_char().
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from dmpy.cli.dmsetup_driver import Failed, has_disk, log_error
from dmpy.cli.format import DM_MAJOR, block_name

__all__ = ["Graph", "Node", "Tree"]

_MAX_DEPTH = 98
_WIDTH = 80  # columns, where standard output is no terminal
_MARGIN = 3  # columns left free on a terminal

# What an option of `-o` may be shortened to is its start; the first in this order is taken.
_OPTIONS = ("device", "blkdevname", "nodevice", "status", "table", "active", "open", "uuid", "rw",
            "utf", "vt100", "ascii", "inverted", "compact", "notrunc")

# How a tree is drawn: nothing, branch, line, last branch, only child, first of several children.
_SYMBOLS = {
    "ascii": ("  ", "|-", "| ", "`-", "---", "-+-"),
    "utf": ("  ", "├─", "│ ", "└─", "───", "─┬─"),
    "vt100": tuple(
        f"\x1b(0\x0f{body}\x1b(B{tail}" if body else tail
        for body, tail in (("", "  "), ("tq", ""), ("x", " "), ("mq", ""), ("qqq", ""),
                           ("qwq", ""))),
}


class Node:
    """A device in the graph.

    Attributes:
        name: as shown; empty where it is no mapped device.
        major, minor: its number; 0, 0 for a leg that is no block device.
        number: the number as text; for a leg that has none the table's word for it.
        info: the control protocol's info; None where the device is not ours.
        uses, used_by: in libdm's order.
    """

    def __init__(self, word: str, major: int, minor: int, info: dict[str, Any] | None) -> None:
        self.name = info["name"] if info else ""
        self.major = major
        self.minor = minor
        self.number = f"{major}:{minor}" if major else word
        self.info = info
        self.uses: list[Node] = []
        self.used_by: list[Node] = []

    def next(self, upward: bool) -> list[Node]:
        """What it uses, or with `upward` what uses it."""
        return self.used_by if upward else self.uses


class Graph:
    """All devices and what they stand on.

    Args:
        infos: `Driver.devices()`.
        deps: the control protocol's `deps` of all devices.
    """

    def __init__(self, infos: Sequence[dict[str, Any]], deps: Sequence[dict[str, Any]]) -> None:
        self._infos = {info["minor"]: info for info in infos}
        self._deps = {entry["name"]: entry["deps"] for entry in deps}
        self._nodes: dict[tuple[int, int, str], Node] = {}
        self.root = Node("", 0, 0, None)
        for info in infos:
            self._add(self.root, {**info, "name": info["kernel_name"]})

    def node(self, info: dict[str, Any]) -> Node:
        """Return the node of one of `infos`."""
        return self._nodes[info["major"], info["minor"], ""]

    # Link `parent` to the device that `dep` names, and that one to what it uses when it is new.
    # The root stands above what nothing uses and below what uses nothing.
    def _add(self, parent: Node, dep: dict[str, Any]) -> None:
        major, minor = dep["major"] or 0, dep["minor"] or 0
        key = (major, minor, "" if major else dep["name"])
        node = self._nodes.get(key)
        new = node is None
        if node is None:
            info = self._infos.get(minor) if major == DM_MAJOR else None
            node = self._nodes[key] = Node(dep["name"], major, minor, info)
        if parent is not self.root or not node.used_by:
            _link(parent, node, self.root)
        if not new:
            return
        below = self._deps.get(node.info["kernel_name"], ()) if node.info else ()
        for each in below:
            self._add(node, each)
        if not below:
            node.uses.append(self.root)
            self.root.used_by.append(node)


# Make `parent` use `child`, once; a child with a parent is no longer the root's.
def _link(parent: Node, child: Node, root: Node) -> None:
    if parent is not root and child in root.uses:
        root.uses.remove(child)
        child.used_by.remove(root)
    if child not in parent.uses:
        parent.uses.append(child)
        child.used_by.append(parent)


class Tree:
    """The picture of `dmsetup ls --tree`.

    Args:
        options: what `-o` says, words with commas between.

    Raises:
        Failed: an option is unknown; said on standard error.
    """

    def __init__(self, options: str) -> None:
        self.on = {"device"}
        self.symbols = _SYMBOLS["utf" if _locale_is_utf8() else "ascii"]
        cut = True
        for at, word in _words(options):
            option = next((known for known in _OPTIONS if known.startswith(word)), None)
            if option is None:
                log_error(f"Tree options not recognised: {options[at:]}.")
                raise Failed
            self.on.add(option)
            if option == "nodevice":
                self.on.discard("device")
            if option == "notrunc":
                cut = False
            self.symbols = _SYMBOLS.get(option, self.symbols)
        self._width = _WIDTH
        if self.symbols is not _SYMBOLS["vt100"] and sys.stdout.isatty():
            columns = os.get_terminal_size(1).columns
            self._width = columns - _MARGIN if columns > _MARGIN else _WIDTH
        self._cut = cut
        self._attributes = self.on & {"active", "rw", "open", "uuid"}
        self._compact = "compact" in self.on and not self._attributes and \
            not self.on & {"table", "status"}
        self._line = ""
        self._lines: list[str] = []
        self._more: list[bool] = [False] * (_MAX_DEPTH + 2)
        self._widths: list[int] = [0] * (_MAX_DEPTH + 2)

    def text(self, graph: Graph) -> str:
        """Return the picture, with a newline after each line."""
        self._lines = []
        self._line = ""
        self._walk(graph, graph.root, 0)
        return "".join(f"{line}\n" for line in self._lines)

    def _walk(self, graph: Graph, node: Node, depth: int) -> None:
        upward = "inverted" in self.on
        children = node.next(upward)
        for child in children:
            below = [each for each in child.next(upward) if each is not graph.root]
            self._draw(child, depth, child is children[-1], bool(below))
            if below:
                self._walk(graph, child, depth + 1)

    # One node: on a line of its own, or, compact, behind its parent when it is the first child.
    def _draw(self, node: Node, depth: int, last: bool, parent: bool) -> None:
        if depth + 2 > _MAX_DEPTH:
            return
        if not node.name and not self.on & {"device", "blkdevname"}:
            return
        self._more[depth] = not last
        self._widths[depth] = 0
        first = not self._line
        if not self._compact or first:
            self._line += self._prefix(depth)
        offset = len(self._line)
        if self._compact and not first:
            self._line += self.symbols[5 if self._more[depth] else 4]
        self._line += self._label(node)
        if self._compact:
            self._widths[depth] = len(self._line) - offset
        if not self._compact or not parent:
            self._lines.append(self._shortened(self._line))
            self._line = ""

    def _prefix(self, depth: int) -> str:
        empty, branch, line, last, _, _ = self.symbols
        drawn = []
        for level in range(depth):
            drawn.append(" " * (self._widths[level] + 1))
            if level == depth - 1:
                drawn.append(branch if self._more[depth] else last)
            else:
                drawn.append(line if self._more[level + 1] else empty)
        return "".join(drawn)

    def _label(self, node: Node) -> str:
        label = node.name
        known = node.info is None or has_disk(node.info)
        if "blkdevname" in self.on and node.major and known:
            label += f" <{block_name(node.major, node.minor)}>"
        if "device" in self.on:
            label += f" ({node.number})"
        if node.info is None or not self._attributes:
            return label
        info = node.info
        words = {
            "active": "SUSPENDED" if info["suspended"] else "ACTIVE",
            "rw": "RO" if info["readonly"] else "RW",
            "open": str(info["open_count"]),
            "uuid": info["uuid"],
        }
        return f"{label} [{', '.join(words[key] for key in words if key in self._attributes)}]"

    # A line that is wider than the terminal ends in three dots.
    def _shortened(self, line: str) -> str:
        if not self._cut or len(line) <= self._width:
            return line
        return line[:self._width - 1] + "..."


# Whether the user's locale has box characters. Python puts C.UTF-8 into LC_CTYPE of an environment
# that asks for C (PEP 538), so that word there says nothing, and neither does the C library.
def _locale_is_utf8() -> bool:
    ctype = os.environ.get("LC_CTYPE", "")
    words = (os.environ.get("LC_ALL"), "" if ctype == "C.UTF-8" else ctype,
             os.environ.get("LANG"))
    word = next(filter(None, words), "")
    return word.lower().replace("-", "").endswith("utf8")


# The words of an option list with the place where each begins.
def _words(options: str) -> list[tuple[int, str]]:
    found, at = [], 0
    while at < len(options):
        end = options.find(",", at)
        end = len(options) if end < 0 else end
        found.append((at, options[at:end]))
        at = end + 1
    return found
