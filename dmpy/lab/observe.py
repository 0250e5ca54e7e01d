"""What the status lines of a stack say about its legs: the same that `dmpy status` prints.

Source: Linux v6.12 drivers/md/dm-raid.c, raid_status(); dm-raid1.c, mirror_status();
dm-stripe.c, stripe_status().
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from dmpy.mapper import Mapper

__all__ = ["READERS", "Observation", "observe"]

# How many members a level of `raid` may lose; raid10 is looked at copy by copy.
_STANDS = {"raid0": 0, "raid4": 1, "raid5": 1, "raid6": 2}
# Their progress says nothing of how equal the members are.
_SCRUBS = ("check", "repair")
_WORDS = {"A": "in_sync", "a": "rebuilding"}


@dataclass
class Observation:
    """What a stack says of itself.

    Attributes:
        up: the devices are there.
        legs: name -> "in_sync", "spare", "rebuilding" or "failed", of those that are part of it.
        done, total: of the resync or rebuild, in units of the target's.
        action: "idle", or what goes on in the background.
        mismatches: of the last scrub, in sectors.
        failed: more is lost than the array stands.
        incomplete: a member's place is empty.
    """

    up: bool = True
    legs: dict[str, str] = field(default_factory=dict)
    done: int = 0
    total: int = 0
    action: str = "idle"
    mismatches: int = 0
    failed: bool = False
    incomplete: bool = False

    @property
    def busy(self) -> bool:
        """Whether a resync, rebuild or scrub is under way, or still to come."""
        return self.action not in ("idle", "frozen") or self.done < self.total

    @property
    def state(self) -> str:
        """One word: "off", "failed", "degraded", "syncing" or "optimal"."""
        if not self.up:
            return "off"
        if self.failed:
            return "failed"
        if self.incomplete or {"rebuilding", "failed"} & {*self.legs.values()}:
            return "degraded"
        if self.action in _SCRUBS:
            return "optimal"
        return "syncing" if self.busy else "optimal"

    def is_it(self, word: str) -> bool:
        """Whether a word of a step's `when` holds."""
        if word == "idle":
            return self.up and not self.busy
        if word == "busy":
            return self.up and self.busy
        return self.state == word


def observe(mapper: Mapper | None, devices: Iterable[str]) -> Observation:
    """Look at the devices of a stack; one that is not there makes it all "off"."""
    seen = Observation()
    if mapper is None:
        return Observation(up=False)
    for name in devices:
        try:
            device = mapper.device(name)
            lines = zip(device.table_text().splitlines(), device.status_text().splitlines())
            for table, status in lines:
                _, _, target, *arguments = table.split()
                reader = READERS.get(target)
                if reader is not None:
                    reader(seen, arguments, status.split()[3:])
        except OSError:
            # It went away between the look-up and the question, as after a power cut.
            return Observation(up=False)
    return seen


# raid: `type #params params... #devs {meta data}...`, status `type #devs health done/total action
# mismatches data_offset journal`.
def _raid(seen: Observation, table: Sequence[str], status: Sequence[str]) -> None:
    pairs = table[2 + int(table[1]) :]
    names = pairs[2::2]
    level, _, health, ratio, action, mismatches = status[:6]
    if action != "recover":
        # While copies or parities are made right all members are `a`, and none of them is lost.
        health = health.replace("a", "A")
    for name, letter in zip(names, health):
        if name != "-":
            _note(seen, name, _WORDS.get(letter, "failed"))
    if "-" in names:
        seen.incomplete = True
    _progress(seen, ratio)
    if action != "idle":
        seen.action = action
    seen.mismatches += int(mismatches)
    seen.failed = seen.failed or _too_many(level, table, [letter != "A" for letter in health])


# Whether more is lost than a level stands; what is being rebuilt is not there yet.
def _too_many(level: str, table: Sequence[str], lost: Sequence[bool]) -> bool:
    family = level.partition("_")[0]
    if family in _STANDS:
        return sum(lost) > _STANDS[family]
    if family == "raid1":
        return all(lost)
    parameters = list(table[2 : 2 + int(table[1])])
    copies = 2
    if "raid10_copies" in parameters:
        copies = int(parameters[parameters.index("raid10_copies") + 1])
    if "raid10_format" in parameters:
        if parameters[parameters.index("raid10_format") + 1] != "near":
            # Chunk c is on `copies` neighbours, wherever they are.
            members = len(lost)
            return any(all(lost[(first + n) % members] for n in range(copies))
                       for first in range(members))
    members = len(lost)
    return any(all(lost[(chunk * copies + n) % members] for n in range(copies))
               for chunk in range(members))


# mirror: `log #log args... #devs {dev offset}... features`, status `#devs names done/total
# #health health #log log...`.
def _mirror(seen: Observation, table: Sequence[str], status: Sequence[str]) -> None:
    count = int(status[0])
    names, ratio, health = status[1 : 1 + count], status[1 + count], status[3 + count]
    for name, letter in zip(names, health):
        _note(seen, name, "in_sync" if letter == "A" else "failed")
    _progress(seen, ratio)
    done, total = map(int, ratio.split("/"))
    if done < total:
        seen.action = "resync"
    seen.failed = seen.failed or all(letter != "A" for letter in health)


# md: status `level state members working health done/total action mismatches events bitmap #devs
# {name place state}...`.
def _md(seen: Observation, table: Sequence[str], status: Sequence[str]) -> None:
    if status[0] == "inactive":
        return
    _, state, _, _, health, ratio, action, mismatches = status[:8]
    words = {"A": "in_sync", "R": "rebuilding", "F": "failed", "S": "spare"}
    for name, letter in zip(status[11::3], status[13::3]):
        if letter in words:
            _note(seen, name, words[letter])
    seen.incomplete = seen.incomplete or bool({"F", "_"} & {*health})
    _progress(seen, ratio)
    if action != "idle":
        seen.action = action
    seen.mismatches += int(mismatches)
    seen.failed = seen.failed or state == "failed"


# striped: status `#devs names 1 health`. It has nothing to fall back on.
def _striped(seen: Observation, table: Sequence[str], status: Sequence[str]) -> None:
    count = int(status[0])
    for name, letter in zip(status[1 : 1 + count], status[2 + count]):
        _note(seen, name, "in_sync" if letter == "A" else "failed")
        seen.failed = seen.failed or letter != "A"


# linear: it counts nothing; a leg that does not answer shows in the requests.
def _linear(seen: Observation, table: Sequence[str], status: Sequence[str]) -> None:
    _note(seen, table[0], "in_sync")


# A leg that several lines use is as well as the worst of them says.
def _note(seen: Observation, name: str, state: str) -> None:
    order = ("in_sync", "spare", "rebuilding", "failed")
    before = seen.legs.get(name, "in_sync")
    seen.legs[name] = max(before, state, key=order.index)


def _progress(seen: Observation, ratio: str) -> None:
    done, total = map(int, ratio.split("/"))
    seen.done += done
    seen.total += total


# Word in the table -> what reads (observation, table arguments, status words) into the observation.
# A target from elsewhere may be added; of one that is not here nothing is known but that it is up.
READERS: dict[str, Callable[[Observation, Sequence[str], Sequence[str]], None]] = {
    "linear": _linear, "md": _md, "mirror": _mirror, "raid": _raid, "striped": _striped,
}
