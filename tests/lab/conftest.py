"""A mirror of the tests' own, right or broken in one chosen way, and short runs over it."""

from __future__ import annotations

import threading

import pytest

from dmpy import target
from dmpy.lab import Lab, observe, parse
from dmpy.target import Target


class LabMirror(Target):
    """Two legs with the same bytes: `labmirror <flaw> a 0 b 0`; copies on the message `sync`."""

    type_name = "labmirror"
    version = (1, 0, 0)
    FLAWS = ("none", "drops-flush", "one-leg-only", "acknowledges-errors", "swaps", "hides-loss")

    def __init__(self, length, legs, flaw):
        super().__init__(length, legs)
        self.flaw = flaw
        self.alive = [True, True]
        self.done = 8
        self.writes = 0
        self.lock = threading.RLock()

    @classmethod
    def parse(cls, args, length):
        flaw = args.choice("flaw", cls.FLAWS)
        return cls(length, [args.leg(length), args.leg(length)], flaw)

    def table(self):
        return f"{self.flaw} {self.legs[0].table()} {self.legs[1].table()}"

    def status(self):
        health = "AA" if self.flaw == "hides-loss" else "".join("DA"[alive] for alive in self.alive)
        names = " ".join(leg.device.table_name for leg in self.legs)
        return f"2 {names} {self.done}/8 1 {health} 1 core"

    def message(self, *words):
        """Copy the first leg over the second, in eight slices that can be seen."""
        step = self.size // 8
        buffer = memoryview(bytearray(step))
        for self.done in range(8):
            with self.lock:
                self.legs[0].preadv([buffer], self.done * step)
                self.legs[1].pwritev([buffer], self.done * step)
                self.event()
            threading.Event().wait(0.02)
        self.done = 8
        self.alive[1] = True
        return "copied"

    def preadv(self, buffers, offset):
        if self.flaw == "swaps" and self.writes > 30:
            offset = 0
        self.some_leg(lambda leg: leg.preadv(buffers, offset), first=True)

    def pwritev(self, buffers, offset, *, fua=False):
        self.writes += 1
        if self.flaw == "one-leg-only" and self.writes > 30 and self.alive[0]:
            self.legs[0].pwritev(buffers, offset, fua=fua)
            return
        self.some_leg(lambda leg: leg.pwritev(buffers, offset, fua=fua))

    def flush(self):
        if self.flaw != "drops-flush":
            self.some_leg(lambda leg: leg.flush())

    def some_leg(self, act, first=False):
        """Do it to one or all legs; a leg that fails is no more."""
        error = OSError(5, "all legs have failed")
        worked = False
        with self.lock:
            for index, leg in enumerate(self.legs):
                if self.alive[index] and not (first and worked):
                    try:
                        act(leg)
                        worked = True
                    except OSError as failure:
                        error = failure
                        self.alive[index] = False
        if not worked and self.flaw != "acknowledges-errors":
            raise error


@pytest.fixture(autouse=True)
def labmirror(monkeypatch):
    """Make `labmirror` a target for the time of a test."""
    monkeypatch.setitem(target._found, "labmirror", LabMirror)
    monkeypatch.setitem(observe.READERS, "labmirror", observe.READERS["mirror"])


HEAD = """
title = "test"
legs = {{ count = 2, size = "256K" }}
timeout = {timeout}
{top}
[[device]]
name = "m"
table = "0 512 labmirror {flaw} a 0 b 0"
[workload]
over = "direct"
requests = {requests}
rate = 1500
{workload}
"""


@pytest.fixture
def lab():
    """Run steps and expectations over the mirror and return the record."""

    def run(steps="", *, flaw="none", requests=150, top="", workload="", seed=1, timeout=20):
        text = HEAD.format(flaw=flaw, requests=requests, timeout=timeout, top=top,
                           workload=workload) + steps
        scenario = parse(text, "test")
        return Lab(scenario, scenario.variants[0], seed=seed).run()

    return run
