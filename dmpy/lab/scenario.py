"""Scenarios: small TOML files that say what is built, what is done to it, and what must hold.

README.md in this folder has the grammar.
"""

from __future__ import annotations

import difflib
import itertools
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmpy.errors import TableError
from dmpy.testing.faulty import OPS
from dmpy.units import SECTOR_SIZE, parse_size

__all__ = [
    "Expectation",
    "Scenario",
    "ScenarioError",
    "Step",
    "Variant",
    "Workload",
    "find",
    "missing_targets",
    "parse",
    "shipped",
]

FOLDER = Path(__file__).parent / "scenarios"
# So many legs have letters; no scenario needs more.
_MOST_LEGS = 26
_SMALLEST_LEG, _LARGEST_LEG = 64 << 10, 1 << 30
_MOST_VARIANTS = 200
_LONGEST = 600.0
# What is longer than this, a table say, is not part of a variant's title.
_LONGEST_WORD = 24


class ScenarioError(ValueError):
    """A scenario that cannot be run; the sentence says where and why."""


@dataclass(frozen=True)
class Workload:
    """What the clients do. Sizes are bytes.

    Attributes:
        over: "nbd" for clients of a real server, "direct" for calls in the process.
        clients: how many at once; each keeps one request under way.
        requests: the end of the workload, but not before the last step is done.
        block: of one request; several sizes are taken in turn by chance.
        reads: share of the requests that read.
        zeroes: share of the writes that only write zeroes.
        fua: share of the writes that are durable when they are acknowledged.
        flush_every: requests between two flushes of a client, 0 for none.
        rate: requests a second of all clients, 0 for as fast as they can.
        area: share of the device, from its start, that is used.
    """

    over: str = "nbd"
    clients: int = 3
    requests: int = 600
    block: tuple[int, ...] = (4096,)
    reads: float = 0.4
    zeroes: float = 0.02
    fua: float = 0.02
    flush_every: int = 50
    rate: float = 0.0
    area: float = 1.0


@dataclass(frozen=True)
class Step:
    """One thing that is done, when its time has come and all before it are done.

    Attributes:
        do: the verb.
        after: not before so many requests were answered since the workload began.
        progress: not before the resync or rebuild is so far, 0 to 1.
        time: not before so many seconds after the start.
        when: not before the array is in this state.
        legs: whom it concerns.
        arguments: what else the verb takes.
    """

    do: str
    after: int = 0
    progress: float | None = None
    time: float = 0.0
    when: str = ""
    legs: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Expectation:
    """What must hold at the end for the verdict to be good.

    Attributes:
        data: "intact": every acknowledged byte is there; "unreadable": some cannot be read, none
            is wrong; "damaged": the lab has to find lost or wrong bytes.
        errors: whether requests fail while the power is on: "none", "some", or "any" number.
        degraded: whether the array is degraded at some time, None where that does not matter.
        final: state at the end: "optimal", "degraded" or "failed", or "any".
        actions: what the array did in the background, in this order among other things.
        mismatches: what scrubs have found in the end: "none", "some" or "any".
    """

    data: str = "intact"
    errors: str = "none"
    degraded: bool | None = None
    final: str = "optimal"
    actions: tuple[str, ...] = ()
    mismatches: str = "any"


@dataclass(frozen=True)
class Variant:
    """A scenario with one choice of everything that it sweeps over.

    Attributes:
        title: the choice in words, empty where there is none.
        devices: (name, table) from the bottom up, `{...}` filled in. The table of an array of
            Linux MD is not known before it is made; it is empty.
        arrays: of those, by name: the words of `md` in the scenario.
        steps: likewise.
    """

    title: str
    devices: tuple[tuple[str, str], ...]
    steps: tuple[Step, ...]
    expect: Expectation
    arrays: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Scenario:
    """A scenario, checked.

    Attributes:
        name: of the file, without .toml.
        legs: name -> bytes.
        volatile: the legs have caches that a power cut empties.
        timeout: seconds after which a variant is given up.
    """

    name: str
    title: str
    description: str
    legs: Mapping[str, int]
    volatile: bool
    timeout: float
    workload: Workload
    variants: tuple[Variant, ...]

    @property
    def target_types(self) -> set[str]:
        """The targets that its tables name."""
        return {
            line.split()[2]
            for variant in self.variants
            for _, table in variant.devices
            for line in table.splitlines()
            if len(line.split()) > 2
        } | {"md" for variant in self.variants if variant.arrays}


# Verb -> (whether it names legs, argument -> type). A type is a Python type, a tuple of words, or
# "size" for bytes as `parse_size` reads them.
_ENOUGH = ("optimal", "degraded", "failed", "idle", "busy")
VERBS: dict[str, tuple[bool, dict[str, Any]]] = {
    "fail": (True, {}),
    "heal": (True, {}),
    "blank": (True, {}),
    "errors": (True, {"offset": "size", "length": "size", "ops": list, "count": int}),
    "corrupt": (True, {"offset": "size", "length": "size"}),
    "slow": (True, {"delay": float}),
    "cut-power": (False, {"keep": ("some", "all", "none", "torn")}),
    "start": (False, {"table": str, "device": str, "without": list}),
    "stop": (False, {}),
    "restart": (False, {"table": str, "device": str, "without": list}),
    "load": (False, {"table": str, "device": str}),
    "suspend": (False, {"device": str}),
    "resume": (False, {"device": str}),
    "message": (False, {"text": str, "device": str, "sector": int}),
    "pause": (False, {}),
    "go-on": (False, {}),
    "verify": (False, {}),
    "wait": (False, {"mismatches": ("some", "none"), "status": str}),
}
_NEEDED = {
    "errors": {"offset", "length"}, "corrupt": {"offset", "length"}, "slow": {"delay"},
    "load": {"table"}, "message": {"text"},
}
_WORKLOAD = {
    "over": ("nbd", "direct"), "clients": int, "requests": int, "block": "sizes", "reads": float,
    "zeroes": float, "fua": float, "flush_every": int, "rate": float, "area": float,
}
# Of an array of Linux MD; `others` are disks that may be added to it later.
_MD = {
    "level": ("0", "1", "4", "5", "6", "10"), "layout": str, "chunk": "size", "members": list,
    "spares": list, "others": list, "bitmap": bool, "metadata": str, "clean": bool,
}
_EXPECT = {
    "data": ("intact", "unreadable", "damaged"), "errors": ("none", "some", "any"),
    "degraded": bool, "final": ("optimal", "degraded", "failed", "any"), "actions": list,
    "mismatches": ("none", "some", "any"),
}


def shipped() -> list[str]:
    """Return the names of the scenarios that come with dmpy and whose targets are there."""
    names = sorted(entry.stem for entry in FOLDER.glob("*.toml"))
    return [name for name in names if not missing_targets(find(name))]


def missing_targets(scenario: Scenario) -> list[str]:
    """Return the targets that a scenario's tables name and that are not there."""
    from dmpy.target import find_target

    missing = []
    for word in sorted(scenario.target_types):
        try:
            find_target(word)
        except TableError:
            missing.append(word)
    return missing


def find(word: str) -> Scenario:
    """Read a scenario: the name of one that comes with dmpy, or the path of a file.

    Raises:
        ScenarioError: there is none, or it is not right.
        OSError: the file cannot be read.
    """
    path = Path(word)
    if os.sep not in word and path.suffix != ".toml":
        path = FOLDER / f"{word}.toml"
        if not path.exists():
            names = sorted(entry.stem for entry in FOLDER.glob("*.toml"))
            near = difflib.get_close_matches(word, names, 1)
            hint = f"did you mean {near[0]}" if near else "`dmpy lab --list` names them"
            raise ScenarioError(f"scenario {word} is unknown ({hint})")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ScenarioError(f"{path}: not a text in UTF-8") from None
    return parse(text, path.stem, where=str(path))


def parse(text: str, name: str = "scenario", *, where: str | None = None) -> Scenario:
    """Read a scenario from TOML.

    Args:
        text: the TOML.
        name: of the scenario.
        where: what sentences begin with; default the name.

    Raises:
        ScenarioError: it is not right.
    """
    where = where or name
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(f"{where}: not TOML: {error}") from None
    top = {
        "title": str, "description": str, "timeout": float, "volatile": bool, "legs": dict,
        "device": list, "workload": dict, "sweep": dict, "step": list, "expect": dict,
    }
    values = _fields(tree, top, where)
    for key in ("title", "legs", "device"):
        if key not in values:
            raise ScenarioError(f"{where}: {key} is missing")
    timeout = _between(values.get("timeout", 60.0), 0.1, _LONGEST, f"{where}: timeout")
    legs = _legs(values["legs"], f"{where}: legs")
    workload = _workload(values.get("workload", {}), f"{where}: workload")
    variants = []
    for title, choice in _choices(values.get("sweep", {}), legs, f"{where}: sweep"):
        arrays: dict[str, dict[str, Any]] = {}
        devices = tuple(
            _device(entry, choice, legs, arrays, f"{where}: device {number}")
            for number, entry in enumerate(values["device"], 1)
        )
        steps = tuple(
            _step(entry, choice, legs, f"{where}: step {number}")
            for number, entry in enumerate(values.get("step", []), 1)
        )
        expect = _expectation(values.get("expect", {}), choice, f"{where}: expect")
        variants.append(Variant(title, devices, steps, expect, arrays))
    if not variants[0].devices:
        raise ScenarioError(f"{where}: device is missing")
    cuts = any(step.do == "cut-power" for variant in variants for step in variant.steps)
    return Scenario(
        name, values["title"], values.get("description", "").strip(), legs,
        values.get("volatile", cuts), timeout, workload, tuple(variants),
    )


# The entries of a table, each of its type. Nothing else may be there.
def _fields(tree: Any, known: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise ScenarioError(f"{where}: must be a table (got {str(tree)[:40]})")
    found = {}
    for key, value in tree.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}" if near else f"known are {', '.join(known)}"
            raise ScenarioError(f"{where}: {key} is unknown ({hint})")
        found[key] = _value(value, known[key], f"{where}: {key}")
    return found


# A value of a type.
def _value(value: Any, kind: Any, where: str) -> Any:
    if kind == "size":
        return _size(value, where)
    if kind == "sizes":
        sizes = tuple(_size(one, where) for one in (value if isinstance(value, list) else [value]))
        if not sizes or any(size % SECTOR_SIZE or not 0 < size <= 1 << 22 for size in sizes):
            raise ScenarioError(f"{where} must be whole sectors, at most 4M (got {value})")
        return sizes
    if isinstance(kind, tuple):
        if value not in kind:
            raise ScenarioError(f"{where} must be one of {', '.join(kind)} (got {value})")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    # A bool is an int for Python, not for us.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        words = {str: "a text", int: "a whole number", float: "a number", bool: "true or false",
                 list: "a list", dict: "a table"}
        raise ScenarioError(f"{where} must be {words[kind]} (got {str(value)[:40]})")
    if kind in (int, float) and value < 0:
        raise ScenarioError(f"{where} must not be negative (got {value})")
    return value


def _size(value: Any, where: str) -> int:
    try:
        return parse_size(str(value))
    except ValueError as error:
        raise ScenarioError(f"{where}: {error}") from None


def _between(value: float, low: float, high: float, where: str) -> float:
    if not low <= value <= high:
        raise ScenarioError(f"{where} must be from {low:g} to {high:g} (got {value:g})")
    return value


# {"count": 4, "size": "8M"}, or {"a": "8M", ...}, or both for further legs.
def _legs(tree: dict[str, Any], where: str) -> dict[str, int]:
    legs: dict[str, int] = {}
    named = dict(tree)
    count, size = named.pop("count", 0), named.pop("size", None)
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= _MOST_LEGS:
        raise ScenarioError(f"{where}: count must be from 0 to {_MOST_LEGS} (got {count})")
    if count and size is None:
        raise ScenarioError(f"{where}: size is missing")
    for index in range(count):
        legs[chr(ord("a") + index)] = _size(size, f"{where}: size")
    for name, value in named.items():
        legs[name] = _size(value, f"{where}: {name}")
    if not legs:
        raise ScenarioError(f"{where}: there are none")
    for name, length in legs.items():
        if length % SECTOR_SIZE or not _SMALLEST_LEG <= length <= _LARGEST_LEG:
            raise ScenarioError(
                f"{where}: {name} must be whole sectors, from 64K to 1G (got {length} bytes)")
    return legs


def _workload(tree: Any, where: str) -> Workload:
    values = _fields(tree, _WORKLOAD, where)
    for key in ("reads", "zeroes", "fua", "area"):
        if key in values:
            _between(values[key], 0, 1, f"{where}: {key}")
    for key, low, high in (("clients", 1, 16), ("requests", 1, 1_000_000)):
        if key in values:
            _between(values[key], low, high, f"{where}: {key}")
    return Workload(**values)


# Everything that a scenario sweeps over: (the choice in words, name -> text).
def _choices(tree: Any, legs: Mapping[str, int], where: str) -> list[tuple[str, dict[str, Any]]]:
    axes = []
    for key, value in tree.items():
        if isinstance(value, dict):
            values = _sets_of_legs(_fields(value, {"of": list, "count": int}, f"{where}: {key}"),
                                   legs, f"{where}: {key}")
        elif isinstance(value, list) and value:
            values = [_choice(one, legs, f"{where}: {key}") for one in value]
        else:
            raise ScenarioError(f"{where}: {key} must be a list, or a table of `of` and `count`")
        # A table in the list chooses several things at once.
        axes.append([one if isinstance(one, dict) else {key: one} for one in values])
    choices = []
    for picked in itertools.product(*axes):
        chosen = {key: one for part in picked for key, one in part.items()}
        words = {key: " ".join(one) if isinstance(one, tuple) else one
                 for key, one in chosen.items()}
        title = ", ".join(f"{key} {one}" for key, one in words.items() if len(one) <= _LONGEST_WORD)
        choices.append((title, chosen))
    if len(choices) > _MOST_VARIANTS:
        raise ScenarioError(f"{where}: {len(choices)} variants (at most {_MOST_VARIANTS})")
    return choices


# A word, a set of legs, or several of these by name.
def _choice(value: Any, legs: Mapping[str, int], where: str) -> Any:
    if isinstance(value, list):
        return tuple(_known_leg(name, legs, where) for name in value)
    if isinstance(value, dict):
        return {key: _choice(one, legs, where) for key, one in value.items()}
    return str(value)


def _sets_of_legs(
    values: dict[str, Any], legs: Mapping[str, int], where: str
) -> list[tuple[str, ...]]:
    names = values.get("of", list(legs))
    for name in names:
        _known_leg(name, legs, where)
    count = values.get("count", 1)
    if not 1 <= count <= len(names):
        raise ScenarioError(f"{where}: count must be from 1 to {len(names)} (got {count})")
    return list(itertools.combinations(names, count))


def _known_leg(name: Any, legs: Mapping[str, int], where: str) -> str:
    if name not in legs:
        raise ScenarioError(f"{where}: leg {name} is unknown (there are {', '.join(legs)})")
    return name


# Fill `{name}` in a text; what is swept but not a text stays out.
def _filled(text: str, choice: Mapping[str, Any], where: str) -> str:
    words = {key: " ".join(one) if isinstance(one, tuple) else one for key, one in choice.items()}
    try:
        return text.format(**words)
    except (KeyError, IndexError, ValueError) as error:
        known = ", ".join(words) or "nothing"
        raise ScenarioError(
            f"{where}: braces name what is swept over, {known} (got {error})") from None


# A device: (name, table). What an array of Linux MD is made of goes into `arrays`.
def _device(
    tree: Any, choice: Mapping[str, Any], legs: Mapping[str, int],
    arrays: dict[str, dict[str, Any]], where: str,
) -> tuple[str, str]:
    values = _fields(tree, {"name": str, "table": str, "md": dict}, where)
    if not values.get("name"):
        raise ScenarioError(f"{where}: name is missing")
    if ("table" in values) == ("md" in values):
        raise ScenarioError(f"{where}: table is missing, or md, and not both")
    if "table" in values:
        return values["name"], _filled(values["table"], choice, f"{where}: table").strip()
    where = f"{where}: md"
    words = {key: _filled(value, choice, where) if isinstance(value, str) else value
             for key, value in values["md"].items()}
    if words.get("bitmap") in ("True", "False"):
        words["bitmap"] = words["bitmap"] == "True"
    made = _fields(words, _MD, where)
    for key in ("level", "members"):
        if not made.get(key):
            raise ScenarioError(f"{where}: {key} is missing")
    for name in [*made["members"], *made.get("spares", []), *made.get("others", [])]:
        _known_leg(name, legs, where)
    arrays[values["name"]] = made
    return values["name"], ""


def _expectation(tree: Any, choice: Mapping[str, Any], where: str) -> Expectation:
    if isinstance(tree, dict):
        tree = {key: _filled(value, choice, f"{where}: {key}") if isinstance(value, str) else value
                for key, value in tree.items()}
    values = _fields(tree, _EXPECT, where)
    if "actions" in values:
        values["actions"] = tuple(map(str, values["actions"]))
    return Expectation(**values)


def _step(
    tree: Any, choice: Mapping[str, Any], legs: Mapping[str, int], where: str
) -> Step:
    if not isinstance(tree, dict) or "do" not in tree:
        raise ScenarioError(f"{where}: do is missing")
    verb = tree["do"]
    if verb not in VERBS:
        near = difflib.get_close_matches(str(verb), VERBS, 1)
        hint = f"did you mean {near[0]}" if near else f"known are {', '.join(VERBS)}"
        raise ScenarioError(f"{where}: {verb} is unknown ({hint})")
    with_legs, arguments = VERBS[verb]
    known: dict[str, Any] = {"do": str, "after": int, "progress": float, "time": float,
                             "when": _ENOUGH, **arguments}
    if with_legs:
        known |= {"leg": str, "legs": list}
    where = f"{where}, {verb}"
    values = _fields(tree, known, where)
    for key in sorted(_NEEDED.get(verb, ())):
        if key not in values:
            raise ScenarioError(f"{where}: {key} is missing")
    if "progress" in values:
        _between(values["progress"], 0, 1, f"{where}: progress")
    concerned = _concerned(values, choice, legs, where) if with_legs else ()
    more = {key: _filled(value, choice, f"{where}: {key}") if isinstance(value, str) else value
            for key, value in values.items() if key in arguments}
    _check_arguments(verb, more, concerned, legs, where)
    if verb == "wait" and values.keys() <= {"do", "mismatches"}:
        raise ScenarioError(f"{where}: nothing to wait for (after, progress, status, time, when)")
    return Step(verb, values.get("after", 0), values.get("progress"), values.get("time", 0.0),
                values.get("when", ""), concerned, more)


# The legs of a step: `leg`, or `legs`, or the set that is swept over by that name.
def _concerned(
    values: dict[str, Any], choice: Mapping[str, Any], legs: Mapping[str, int], where: str
) -> tuple[str, ...]:
    names = [*([values["leg"]] if "leg" in values else []), *values.get("legs", [])]
    if not names:
        raise ScenarioError(f"{where}: leg is missing")
    found: list[str] = []
    for name in names:
        text = str(name)
        if text.startswith("{") and text.endswith("}") and text[1:-1] in choice:
            picked = choice[text[1:-1]]
            found += picked if isinstance(picked, tuple) else [picked]
        else:
            found.append(text)
    for name in found:
        _known_leg(name, legs, where)
    return tuple(found)


def _check_arguments(
    verb: str, values: dict[str, Any], concerned: tuple[str, ...], legs: Mapping[str, int],
    where: str,
) -> None:
    for name in values.get("ops", ()):
        if name not in OPS:
            raise ScenarioError(f"{where}: ops must be out of {', '.join(OPS)} (got {name})")
    if verb == "errors" and values.get("count", 1) != 1:
        raise ScenarioError(f"{where}: count must be 1, or left out for ever"
                            f" (got {values['count']})")
    if verb in ("errors", "corrupt"):
        for name in concerned:
            end = values["offset"] + values["length"]
            if not values["length"] or end > legs[name]:
                raise ScenarioError(f"{where}: leg {name} has {legs[name]} bytes, the range ends"
                                    f" at {end}")
