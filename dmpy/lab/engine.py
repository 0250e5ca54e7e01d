"""Runs a scenario: builds the stack, drives the clients, does the steps, looks, and judges.

    from dmpy.lab import find, run

    for record in run(find("raid5-one-leg"), seed=1):
        assert record.ok, record.complaints
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dmpy.backing import Leaves
from dmpy.device import BlockDevice
from dmpy.errors import TableError
from dmpy.lab.legs import LabLeg, Plug
from dmpy.lab.model import Model
from dmpy.lab.observe import Observation, observe
from dmpy.lab.record import Event, Record, Sample, judge
from dmpy.lab.scenario import Scenario, Step, Variant
from dmpy.lab.workload import Client, Clients, DirectClient, NBDClient, read_all
from dmpy.mapper import Mapper
from dmpy.proxy import Served, serve
from dmpy.units import SECTOR_SIZE

__all__ = ["Lab", "run"]

_SAMPLE_EVERY = 0.05
_POLL_EVERY = 0.005
# What cannot be read is counted in pieces of this many bytes.
_READ_UNIT = 4096
# A rebuild that was asked for begins within this.
_BEGINS_WITHIN = 5.0
# What a message began is there, or over, within this.
_SHOWS_WITHIN = 0.2
# After the last step the array is given this long to come to rest.
_SETTLES_WITHIN = 10.0
# Bytes of a chunk of an array of Linux MD, where the scenario does not say: several a request.
_CHUNK = 16 << 10
# This part of all requests, at least, comes after the last step.
_AFTERWARDS = 10
# A request that takes longer at the end is one that the array holds back.
_FINISH_WITHIN = 5.0

Listener = Callable[[Event], None]


# Something that a step needs did not happen; the sentence is part of the verdict.
class _Broken(Exception):
    pass


# Opens the lab's legs by name, and everything else as usual.
class _LabLeaves(Leaves):
    def __init__(self, plug: Plug) -> None:
        super().__init__()
        self._plug = plug

    def open(self, word: str, *, readonly: bool = False, cwd: str = "/") -> BlockDevice:
        leg = self._plug.legs.get(word)
        return leg or super().open(word, readonly=readonly, cwd=cwd)

    def release(self, device: BlockDevice) -> None:
        if not isinstance(device, LabLeg):
            super().release(device)


class Lab:
    """One run of one variant.

    Args:
        scenario: what is run.
        variant: which of its variants.
        seed: of every choice of the clients and of the power.
        listener: told of each event as it happens, in any thread.
    """

    def __init__(
        self, scenario: Scenario, variant: Variant, *, seed: int = 0,
        listener: Listener | None = None,
    ) -> None:
        self._scenario = scenario
        self._variant = variant
        self._seed = seed
        self._listener = listener
        self._plug = Plug(volatile=scenario.volatile)
        for name, size in scenario.legs.items():
            self._plug.add(name, size)
        self._tables = dict(variant.devices)
        self._top = variant.devices[-1][0]
        self._mapper: Mapper | None = None
        self._served: Served | None = None
        self._clients: Clients | None = None
        self._model: Model | None = None
        self._size = 0
        self._cuts = 0
        self._keep = "some"
        self._began = time.monotonic()
        self._last_array = ("", "idle")
        self._record = Record(scenario.name, variant.title, seed, list(scenario.legs))
        # Protects the events and what was told of clients; the listener is called without it.
        self._lock = threading.Lock()
        self._told: dict[str, float] = {}

    def run(self) -> Record:
        """Run it and return the record, judged. Whatever the array does, this returns."""
        record = self._record
        over = threading.Event()
        sampler = threading.Thread(target=self._sample_until, args=(over,), daemon=True)
        with _quiet():
            try:
                self._make_arrays()
                self._start()
                if self._mapper is None:
                    raise _Broken("the array was not built, see the events")
                # Making it and starting the server is not part of the story.
                self._began = time.monotonic()
                sampler.start()
                self._clients.go_on()
                self._do_steps()
                self._finish_workload()
                self._settle()
            except _Broken as broken:
                record.broken = str(broken)
                self._tell("lab", record.broken)
            finally:
                self._end(over, sampler)
        record.complaints = judge(record, self._variant.expect)
        return record

    # Building and taking down

    def _make_arrays(self) -> None:
        for name, words in self._variant.arrays.items():
            try:
                self._tables[name] = self._make_md(words)
            except (OSError, ValueError) as error:
                raise _Broken(f"array {name} cannot be made: {_sentence(error)}") from None

    # Write the superblocks of an array of Linux MD; returns its table, with all its disks.
    def _make_md(self, words: Mapping[str, Any]) -> str:
        from dmpy.md.assemble import assemble
        from dmpy.md.create import Recipe, create, layout_number, level_number

        legs = self._plug.legs
        level = level_number(words["level"])
        layout = layout_number(level, words["layout"]) if "layout" in words else None
        recipe = Recipe(
            level, layout, words.get("chunk", 0 if level == 1 else _CHUNK),
            words.get("metadata", "1.2"), bitmap=words.get("bitmap", False),
            assume_clean=words.get("clean", True))
        names = [*words["members"], *words.get("spares", [])]
        members = [legs[name] for name in words["members"]]
        disks = create(members, [legs[name] for name in words.get("spares", [])], recipe)
        found = assemble(disks)
        names += words.get("others", [])
        sectors = found.geometry.size // SECTOR_SIZE
        for name in names:
            legs[name].flush()
        return f"0 {sectors} md {found.uuid} {len(names)} {' '.join(names)}"

    # Make the devices and serve them. A refusal is an event: some scenarios are about it.
    def _start(self, device: str = "", table: str = "", without: Sequence[str] = ()) -> None:
        if table:
            self._tables[device or self._top] = table
        mapper = Mapper(leaves=_LabLeaves(self._plug))
        try:
            for name, text in self._tables.items():
                words = ["-" if word in without else word for word in text.split(" ")]
                mapper.create(name, " ".join(words), cwd="/")
            # From here on it can be looked at: a rebuild does not wait for the server.
            self._mapper = mapper
            if self._scenario.workload.over == "nbd":
                self._served = serve(mapper)
        except (TableError, OSError) as error:
            self._mapper = None
            self._tell("array", f"refused: {_sentence(error)}")
            _close(mapper)
            return
        if self._clients is None:
            top = mapper.device(self._top)
            self._size = top.size
            self._model = Model(top.size // SECTOR_SIZE)
            self._clients = Clients(
                self._scenario.workload, self._model, top.size, top.block_size.minimum,
                self._seed, self._connect, self._request_failed, lambda: self._plug.off)

    def _connect(self) -> Client:
        served, mapper = self._served, self._mapper
        if served is not None:
            return NBDClient(served.uri(self._top))
        if mapper is None:
            raise ConnectionError("there is no array")
        return DirectClient(mapper.device(self._top))

    # Take everything down. In order: the server first, which lets clients finish. Otherwise the
    # devices first, so that requests which they hold back fail.
    def _stop(self, *, in_order: bool = True) -> None:
        mapper, served = self._mapper, self._served
        self._mapper = self._served = None
        if served is not None and in_order:
            served.close()
        error = None if mapper is None else _close(mapper)
        if served is not None and not in_order:
            served.close()
        # Whatever it says is of no use to anybody after a power cut.
        if error is not None and not self._plug.off:
            self._tell("array", f"at the end: {error.strerror or error}")

    def _end(self, over: threading.Event, sampler: threading.Thread) -> None:
        record = self._record
        if self._plug.off:
            self._plug.push(self._seed)
        self._look()
        record.seconds = self._now()
        over.set()
        if sampler.ident is not None:
            sampler.join(5)
        if self._clients is not None:
            clients = self._clients
            if not clients.pause(_FINISH_WITHIN):
                record.broken = record.broken or "a client still waits for its answer"
                self._stop(in_order=False)
            clients.stop()
            record.requests, record.errors = clients.answered, clients.errors
            if clients.crash is not None:
                record.broken = record.broken or f"a client crashed: {clients.crash!r}"
        self._stop()
        if self._model is not None:
            model = self._model
            record.acknowledged, record.verified = model.acknowledged, model.verified
            record.damages, record.counts = model.damages, dict(model.counts)

    # The steps

    def _do_steps(self) -> None:
        for number, step in enumerate(self._variant.steps, 1):
            self._await(step, f"step {number}, {step.do}")
            verb = getattr(self, f"_do_{step.do.replace('-', '_')}")
            try:
                verb(step)
            except (OSError, ValueError) as error:
                raise _Broken(f"step {number}, {step.do}: {_sentence(error)}") from None

    # Wait until all conditions of a step have come true.
    def _await(self, step: Step, where: str) -> None:
        began = self._now()
        was_busy = False
        while True:
            missing = ""
            if self._clients.answered < step.after:
                missing = f"{step.after} requests (there were {self._clients.answered})"
            elif self._now() < step.time:
                missing = f"second {step.time:g}"
            elif step.arguments.get("status", "") not in self._status():
                missing = f"the status to say {step.arguments['status']}"
            elif step.when or step.progress is not None:
                seen = self._observation()
                was_busy = was_busy or seen.busy
                if step.when and not seen.is_it(step.when):
                    missing = f"the array to be {step.when} (it is {seen.state}, {seen.action})"
                elif step.progress is not None and not _is_so_far(seen, step.progress, was_busy):
                    missing = f"progress {step.progress:g} (it is {_share(seen):g})"
                    if not was_busy and self._now() - began > _BEGINS_WITHIN:
                        raise _Broken(f"{where}: no resync or rebuild is under way")
            if not missing:
                return
            self._check_time(f"{where}: gave up waiting for {missing}")
            time.sleep(_POLL_EVERY)

    def _status(self) -> str:
        if self._mapper is None:
            return ""
        return self._mapper.device(self._top).status_text()

    def _check_time(self, sentence: str) -> None:
        if self._clients.crash is not None:
            raise _Broken(f"a client crashed: {self._clients.crash!r}")
        if self._now() > self._scenario.timeout:
            raise _Broken(f"{sentence} after {self._scenario.timeout:g} s")

    def _legs_of(self, step: Step) -> list[LabLeg]:
        return [self._plug.legs[name] for name in step.legs]

    # One line in the record for what a step did.
    def _did(self, step: Step, text: str) -> None:
        self._tell("step", text, step.legs)

    def _do_fail(self, step: Step) -> None:
        self._did(step, f"leg {_names(step)} fails")
        for leg in self._legs_of(step):
            leg.fail()

    def _do_heal(self, step: Step) -> None:
        for leg in self._legs_of(step):
            leg.heal()
        self._did(step, f"leg {_names(step)} works again")

    def _do_blank(self, step: Step) -> None:
        for leg in self._legs_of(step):
            leg.blank()
        self._did(step, f"leg {_names(step)} is a new, empty disk")

    def _do_errors(self, step: Step) -> None:
        how = step.arguments
        for leg in self._legs_of(step):
            leg.errors(how["offset"], how["length"], how.get("ops", ["read"]), how.get("count"))
        self._did(step, f"leg {_names(step)} fails to {'/'.join(how.get('ops', ['read']))} "
                        f"{how['length']} bytes at {how['offset']}")

    def _do_corrupt(self, step: Step) -> None:
        for leg in self._legs_of(step):
            leg.corrupt(step.arguments["offset"], step.arguments["length"])
        self._did(step, f"leg {_names(step)} rots: {step.arguments['length']} bytes at "
                        f"{step.arguments['offset']}")

    def _do_slow(self, step: Step) -> None:
        for leg in self._legs_of(step):
            leg.delay = step.arguments["delay"]
        self._did(step, f"leg {_names(step)} takes {step.arguments['delay'] * 1000:g} ms more")

    def _do_cut_power(self, step: Step) -> None:
        self._plug.pull()
        self._did(step, "power cut")
        self._keep = step.arguments.get("keep", "some")
        self._stop(in_order=False)
        if not self._clients.pause():
            raise _Broken("a client still waits for its answer after the power was cut")
        self._model.power_cut()

    def _do_start(self, step: Step) -> None:
        if self._mapper is not None:
            raise ValueError("the array is there already")
        story = ""
        if self._plug.off:
            self._cuts += 1
            story = ": " + self._plug.push(self._seed + self._cuts, self._keep)
        self._did(step, f"start{story}")
        self._start(**step.arguments)
        if self._mapper is not None:
            self._clients.go_on()

    def _do_stop(self, step: Step) -> None:
        self._did(step, "stop")
        self._pause()
        self._stop()

    def _do_restart(self, step: Step) -> None:
        self._did(step, "restart")
        self._pause()
        self._stop()
        self._start(**step.arguments)
        if self._mapper is not None:
            self._clients.go_on()

    def _do_load(self, step: Step) -> None:
        name = step.arguments.get("device", self._top)
        mapper = self._there()
        self._did(step, f"load {step.arguments['table'].strip()}")
        mapper.load(name, step.arguments["table"], cwd="/")
        mapper.suspend(name)
        mapper.resume(name)
        self._tables[name] = step.arguments["table"]

    def _do_suspend(self, step: Step) -> None:
        self._did(step, "suspend")
        self._there().suspend(step.arguments.get("device", self._top))

    def _do_resume(self, step: Step) -> None:
        self._there().resume(step.arguments.get("device", self._top))
        self._did(step, "resume")

    def _do_message(self, step: Step) -> None:
        name = step.arguments.get("device", self._top)
        reply = self._there().message(name, step.arguments.get("sector", 0), step.arguments["text"])
        self._did(step, f"message {step.arguments['text']}{': ' if reply else ''}{reply}")
        # What it began shows in the status a moment later.
        end = time.monotonic() + _SHOWS_WITHIN
        while not self._observation().busy and time.monotonic() < end:
            time.sleep(_POLL_EVERY / 5)

    def _do_pause(self, step: Step) -> None:
        self._pause()
        self._did(step, "clients pause")

    def _do_go_on(self, step: Step) -> None:
        self._did(step, "clients go on")
        self._clients.go_on()

    def _do_verify(self, step: Step) -> None:
        self._pause()
        unreadable = self._verify()
        self._did(step, f"everything read: {_verdict_words(self._model, unreadable)}")
        self._clients.go_on()

    def _do_wait(self, step: Step) -> None:
        wanted = step.arguments.get("mismatches")
        found = self._observation().mismatches
        if wanted and bool(found) != (wanted == "some"):
            raise ValueError(f"{found} sectors do not match (expected {wanted})")
        if wanted:
            self._did(step, f"{found} sectors do not match")

    def _pause(self) -> None:
        if not self._clients.pause(self._scenario.timeout):
            raise _Broken("a client still waits for its answer")

    def _there(self) -> Mapper:
        if self._mapper is None:
            raise ValueError("there is no array")
        return self._mapper

    # The end

    # The clients go on after the last step for a while, so that what it did meets requests.
    def _finish_workload(self) -> None:
        requests = self._scenario.workload.requests
        goal = max(requests, self._clients.answered + requests // _AFTERWARDS)
        while self._mapper is not None and self._clients.working:
            if self._clients.answered >= goal:
                break
            self._check_time("gave up waiting for the clients")
            time.sleep(_POLL_EVERY)
        self._pause()

    # Let the background work end, look once more, then read everything.
    def _settle(self) -> None:
        end = time.monotonic() + _SETTLES_WITHIN
        while self._observation().busy and time.monotonic() < end:
            self._check_time("gave up waiting for the array to come to rest")
            time.sleep(_POLL_EVERY)
        if self._mapper is None:
            self._record.unreadable = self._size
            self._tell("lab", "there is no array to read")
        else:
            self._record.unreadable = self._verify()
            words = _verdict_words(self._model, self._record.unreadable)
            self._tell("lab", f"everything read: {words}")
        seen = self._observation()
        self._record.mismatches = seen.mismatches
        self._record.final = {"syncing": "optimal", "off": "failed"}.get(seen.state, seen.state)

    def _verify(self) -> int:
        try:
            client = self._connect()
        except OSError:
            return self._size
        try:
            unit = max(_READ_UNIT, self._there().device(self._top).block_size.minimum)
            return read_all(client, self._model, self._size, unit)
        finally:
            client.close()

    # Looking

    def _now(self) -> float:
        return time.monotonic() - self._began

    def _observation(self) -> Observation:
        seen = observe(self._mapper, self._tables)
        self._note_array(seen)
        return seen

    # What the array does by itself is an event.
    def _note_array(self, seen: Observation) -> None:
        with self._lock:
            before, self._last_array = self._last_array, (seen.state, seen.action)
        if before[0] != seen.state:
            self._tell("array", f"array {seen.state}")
        if before[1] != seen.action:
            self._tell("array", f"action {seen.action}")

    def _look(self) -> None:
        seen = self._observation()
        clients = self._clients
        legs = {
            name: seen.legs.get(name, "unused") if seen.up else "off" for name in self._plug.legs}
        conditions = {
            name: leg.condition for name, leg in self._plug.legs.items() if leg.condition}
        self._record.samples.append(Sample(
            round(self._now(), 4), legs, conditions, seen.state, seen.action, _share(seen),
            clients.read_bytes if clients else 0, clients.written_bytes if clients else 0,
            clients.errors if clients else 0))

    def _sample_until(self, over: threading.Event) -> None:
        while not over.is_set():
            self._look()
            over.wait(_SAMPLE_EVERY)

    def _request_failed(self, verb: str, error: OSError) -> None:
        text = f"{verb} failed: {error.strerror or error}"
        with self._lock:
            # One event a second for one kind of failure: an array that is gone fails thousands.
            now = self._now()
            if now - self._told.get(verb, -1.0) < 1.0:
                return
            self._told[verb] = now
        self._tell("client", text)

    def _tell(self, kind: str, text: str, legs: Iterable[str] = ()) -> None:
        event = Event(round(self._now(), 4), kind, text, tuple(legs))
        with self._lock:
            self._record.events.append(event)
        if self._listener is not None:
            self._listener(event)


def run(
    scenario: Scenario, *, seed: int = 0, listener: Listener | None = None
) -> Iterator[Record]:
    """Run all variants of a scenario, one after the other, and yield their records.

    Args:
        scenario: what is run.
        seed: of every choice.
        listener: told of each event as it happens.
    """
    for variant in scenario.variants:
        yield Lab(scenario, variant, seed=seed, listener=listener).run()


# What the array logs of its failures is in the record already.
@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("dmpy")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _close(mapper: Mapper) -> OSError | None:
    try:
        mapper.close()
    except OSError as error:
        return error
    return None


def _sentence(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _names(step: Step) -> str:
    return " and ".join(step.legs)


def _share(seen: Observation) -> float:
    return round(seen.done / seen.total, 4) if seen.total else 1.0


# A rebuild that was seen and is no more has come further than any share.
def _is_so_far(seen: Observation, progress: float, was_busy: bool) -> bool:
    return _share(seen) >= progress if seen.busy else was_busy


def _verdict_words(model: Model, unreadable: int) -> str:
    words = [f"{count} sectors {kind}" for kind, count in sorted(model.counts.items())]
    if unreadable:
        words.append(f"{unreadable} bytes cannot be read")
    return ", ".join(words) or "every byte is there"
