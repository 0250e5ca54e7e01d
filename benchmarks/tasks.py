"""Timed tasks that are not a load on a server: how long a big table takes to load.

A new task is an entry in `TASKS`: a title, and a context manager from the ground to the function
that is timed. What it does before it yields and after is not timed.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from dmpy import Mapper

from . import dmpy_server
from .ground import Ground
from .peers import segments_table

__all__ = ["TASKS", "Task"]

_LINES = 100_000
_LINE_SIZE = 4096


@dataclass(frozen=True)
class Task:
    """One task: its words for the table, and how to get ready for it."""

    title: str
    prepared: Callable[[Ground], AbstractContextManager[Callable[[], object]]]


# The table: lines of 4 KiB over one sparse file, in a shuffled order.
def _big_table(ground: Ground) -> str:
    def make() -> str:
        path = ground.folder / "big.img"
        with open(path, "wb") as out:
            out.truncate(_LINES * _LINE_SIZE)
        return segments_table(str(path), _LINES * _LINE_SIZE, _LINES)

    return ground.once("big table", make)


@contextmanager
def _in_process(ground: Ground) -> Iterator[Callable[[], object]]:
    table = _big_table(ground)
    with Mapper() as mapper:
        yield lambda: mapper.create("big", table)


@contextmanager
def _through_socket(ground: Ground) -> Iterator[Callable[[], object]]:
    table = _big_table(ground)
    client = dmpy_server.client(ground)
    try:
        yield lambda: client.call("create", name="big", table=table)
    finally:
        client.call("remove", name="big")


TASKS = {
    "load-in-process": Task(f"a table of {_LINES:,} lines loads in process", _in_process),
    "load-through-socket": Task(
        f"a table of {_LINES:,} lines loads through the control socket", _through_socket
    ),
}
