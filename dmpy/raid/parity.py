"""RAID 4, 5 and 6: chunks of data and of parity in stripes.

A write takes its stripes. One that fills a stripe reads nothing; one that fills a part reads either
what it replaces and the parity (read-modify-write) or what it leaves (reconstruct-write), whichever
is less. When members are missing, the stripe is computed from those that are there.

Source: Linux v6.1 drivers/md/raid5.c, handle_stripe_dirtying(), fetch_block(),
handle_parity_checks5(), handle_parity_checks6().
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np

from dmpy import buffers as scratch
from dmpy.device import Buffers, Cutter, slices, total
from dmpy.errors import DeviceError
from dmpy.maths.parity import pq, q_update, recover, xor_into, xor_update
from dmpy.raid.array import REBUILDING, Array, Member
from dmpy.raid.levels import StripeMap
from dmpy.target import by_leg

__all__ = ["ParityArray"]

# What is synced at once, bytes of each member.
_WINDOW = 1 << 20
# STRIPE_SIZE: a check counts all of such a piece of the members when they disagree in it.
_CHECK_BLOCK = 4096


# The bytes of a view as numbers.
def _numbers(view: memoryview) -> np.ndarray:
    return np.frombuffer(view, np.uint8)


class ParityArray(Array):
    """Where each stripe has one or two chunks of parity."""

    def __init__(self, geometry, members, store, **options) -> None:
        super().__init__(geometry, members, store, **options)
        self._chunk = geometry.chunk_size
        self._width = geometry.data_members * geometry.chunk_size

    def sync_range(self, offset: int, length: int) -> tuple[int, int]:
        """Say which bytes of what is synced a piece lies in."""
        first, last = self._stripes(offset, length)
        return first * self._chunk, (last + 1) * self._chunk

    @property
    def sync_size(self) -> int:
        """Bytes of what is synced."""
        return self.size // self._width * self._chunk

    def lock_numbers(self, begin: int, end: int) -> tuple[int, int]:
        """Say which stripes bytes of the members lie in."""
        return begin // self._chunk, (end - 1) // self._chunk

    # The stripes that a piece of the array lies in.
    def _stripes(self, offset: int, length: int) -> tuple[int, int]:
        return offset // self._width, (offset + length - 1) // self._width

    # The runs (member, place, length) of a piece, one a chunk.
    def _runs(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        runs = []
        chunk_size = self._chunk
        chunk, within = divmod(offset, chunk_size)
        while length:
            stripe, index = self.geometry.locate(chunk)
            piece = min(chunk_size - within, length)
            runs.append((index, stripe * chunk_size + within, piece))
            length -= piece
            chunk += 1
            within = 0
        return runs

    # Reads

    def read_place(self, offset: int, length: int) -> tuple[Member, int] | None:
        """Say where a piece can be read as it is."""
        chunk, within = divmod(offset, self._chunk)
        if within + length > self._chunk:
            return None
        stripe, index = self.geometry.locate(chunk)
        place = stripe * self._chunk + within
        member = self.members[index]
        return (member, place) if member.readable(place + length) else None

    def preadv(self, buffers: Buffers, offset: int) -> None:
        """Read as Array.preadv() says."""
        self.requests += 1
        runs = self._runs(offset, total(buffers))
        # Those that are looked at are those that are read, whoever takes their places meanwhile.
        members = tuple(self.members)
        if all(members[index].readable(place + size) for index, place, size in runs):
            try:
                for index, place, views in by_leg(runs, buffers):
                    members[index].leg.preadv(views, place)
                return
            except OSError:
                pass  # chunk by chunk, where what cannot be read is computed
        done = 0
        for index, place, length in runs:
            self._read_chunk(index, place, slices(buffers, done, length), length)
            done += length

    # Read a piece of one chunk, or compute it.
    def _read_chunk(self, index: int, place: int, views: list[memoryview], length: int) -> None:
        stripe, low = divmod(place, self._chunk)
        self.locks.take(stripe, stripe)
        try:
            member = self.members[index]
            bad = False
            if member.readable(place + length):
                try:
                    member.leg.preadv(views, place)
                    return
                except OSError:
                    bad = True  # it is computed, and written anew
            with ExitStack() as stack:
                chunks = self._load(stack, stripe, low, low + length, {index} if bad else set())
                found = memoryview(chunks[index])
                done = 0
                for view in views:
                    view[:] = found[done : done + len(view)]
                    done += len(view)
                if bad:
                    self.corrected(member, [found], place)
        finally:
            self.locks.give_back(stripe, stripe)

    # All chunks of a stripe between two bytes of them, by member; what cannot be read is computed.
    def _load(
        self, stack: ExitStack, stripe: int, low: int, high: int, without: set[int]
    ) -> dict[int, np.ndarray]:
        layout = self.geometry.stripe(stripe)
        place = stripe * self._chunk + low
        end = place + high - low
        while True:
            usable = self._usable(end)
            try:
                return self._load_from(stack, layout, place, end, usable, without)
            except OSError:
                # One may have been rebuilt and another have failed meanwhile.
                if self._usable(end) == usable:
                    raise

    # The members that can be read up to a byte, at one moment.
    def _usable(self, end: int) -> dict[int, Member]:
        with self.state_lock:
            return {member.index: member for member in self.members if member.readable(end)}

    # The same, from certain members.
    def _load_from(
        self,
        stack: ExitStack,
        layout: StripeMap,
        place: int,
        end: int,
        usable: dict[int, Member],
        without: set[int],
    ) -> dict[int, np.ndarray]:
        chunks: dict[int, np.ndarray] = {}
        missing: dict[int, np.ndarray] = {}
        for index in (*layout.data, layout.p, layout.q):
            if index is None:
                continue
            view = stack.enter_context(scratch.scratch(end - place))
            chunks[index] = _numbers(view)
            if index in usable and index not in without:
                try:
                    usable[index].leg.preadv([view], place)
                    continue
                except OSError:
                    pass  # it is computed
            missing[index] = chunks[index]
        if missing:
            self._compute(layout, chunks, missing, place)
        return chunks

    # Compute the chunks that are missing from those that are there.
    def _compute(
        self,
        layout: StripeMap,
        chunks: dict[int, np.ndarray],
        missing: dict[int, np.ndarray],
        place: int,
    ) -> None:
        if len(missing) > self.geometry.level.parity:
            raise DeviceError(
                errno.EIO,
                f"{self.name}: {len(missing)} chunks of the stripe at byte {place} of the members "
                f"cannot be read",
                device=self.name,
                offset=place,
            )
        # None also stands for a place of DDF's layouts that nothing enters the syndrome from.
        data = [
            None if index is None or index in missing else chunks[index]
            for index in layout.syndrome
        ]
        wanted: dict[int | str, np.ndarray] = {}
        for index, chunk in missing.items():
            if index == layout.p:
                wanted["p"] = chunk
            elif index == layout.q:
                wanted["q"] = chunk
            else:
                wanted[layout.syndrome.index(index)] = chunk
        p = None if layout.p in missing else chunks[layout.p]
        q = None if layout.q is None or layout.q in missing else chunks[layout.q]
        recover(data, p, q, wanted)

    # Writes

    def pwritev(self, buffers: Buffers, offset: int, *, fua: bool = False) -> None:
        """Write as Array.pwritev() says."""
        self.refuse_if_failed(offset)
        length = total(buffers)
        end = offset + length
        self.requests += 1
        first, last = self._stripes(offset, length)
        self.locks.take(first, last)
        try:
            self.begin_write(offset, length)
            # Fast path: a small write to an array that lacks nothing.
            small = first == last and len(buffers) == 1
            if not (small and self._write_in_chunk(offset, buffers[0], fua)):
                self._write_stripes(first, last, offset, end, Cutter(buffers), fua)
        finally:
            self.end_write(offset, length)
            self.locks.give_back(first, last)
        self.refuse_if_failed(offset)

    # Write bytes offset .. end-1 of the array, stripe by stripe; the caller has the stripes.
    def _write_stripes(
        self, first: int, last: int, offset: int, end: int, cut: Cutter, fua: bool
    ) -> None:
        # Parity of full stripes has to stay until all is written.
        with ExitStack() as stack:
            runs: list[tuple[int, int, memoryview]] = []
            for stripe in range(first, last + 1):
                begin = max(offset, stripe * self._width) - stripe * self._width
                size = min(end, (stripe + 1) * self._width) - stripe * self._width - begin
                view = _one_view(stack, cut.take(size), size)
                if size == self._width:
                    runs += self._full_stripe(stack, stripe, view)
                else:
                    runs += self._part_of_stripe(stack, stripe, begin, view)
            self._write_runs(runs, fua)

    # Read-modify-write of a piece of one chunk, where that is the least work; says whether it was.
    def _write_in_chunk(self, offset: int, view: memoryview, fua: bool) -> bool:
        chunk, low = divmod(offset, self._chunk)
        length = len(view)
        geometry, members = self.geometry, self.members
        parities = geometry.level.parity
        if low + length > self._chunk or parities + 1 > geometry.data_members - 1:
            return False
        stripe, index = geometry.locate(chunk)
        layout = geometry.stripe(stripe)
        place = stripe * self._chunk + low
        # Looked at before the array's health: who takes their places later is not meant.
        member, p_member = members[index], members[layout.p]
        q_member = None if layout.q is None else members[layout.q]
        if not self.healthy:
            return False
        with scratch.scratch(length) as old, scratch.scratch(length) as p:
            if q_member is None:
                return self._update(member, p_member, place, (view, old, p), fua)
            with scratch.scratch(length) as q:
                try:
                    q_member.leg.preadv([q], place)
                except OSError:
                    return False
                power = layout.syndrome.index(index)
                if not self._update(member, p_member, place, (view, old, p), fua):
                    return False
                q_update(_numbers(q), _numbers(old), _numbers(view), power)
                self.write_member(q_member, [q], place, fua=fua)
        return True

    # Replace a piece of data and change P accordingly; says whether it could be read. `views` are
    # the new data, and room for the old data and for P.
    def _update(
        self,
        member: Member,
        p_member: Member,
        place: int,
        views: tuple[memoryview, memoryview, memoryview],
        fua: bool,
    ) -> bool:
        view, old, p = views
        try:
            member.leg.preadv([old], place)
            p_member.leg.preadv([p], place)
        except OSError:
            return False  # what cannot be read is computed
        xor_update(_numbers(p), _numbers(old), _numbers(view))
        self.write_member(member, [view], place, fua=fua)
        self.write_member(p_member, [p], place, fua=fua)
        return True

    # Write chunks, what lies together on a member at once.
    def _write_runs(self, runs: list[tuple[int, int, memoryview]], fua: bool) -> None:
        together: dict[int, list[tuple[int, int, list[memoryview]]]] = {}
        for index, place, view in runs:
            stretches = together.setdefault(index, [])
            if stretches and stretches[-1][1] == place:
                begin, _, views = stretches[-1]
                views.append(view)
                stretches[-1] = (begin, place + len(view), views)
            else:
                stretches.append((place, place + len(view), [view]))
        for index, stretches in together.items():
            member = self.members[index]
            for place, _, views in stretches:
                if member.writable:
                    self.write_member(member, views, place, fua=fua)

    # The chunks of a stripe that is written whole.
    def _full_stripe(
        self, stack: ExitStack, stripe: int, view: memoryview
    ) -> list[tuple[int, int, memoryview]]:
        layout = self.geometry.stripe(stripe)
        size = self._chunk
        place = stripe * size
        runs = [
            (index, place, view[number * size : (number + 1) * size])
            for number, index in enumerate(layout.data)
        ]
        chunks = {index: _numbers(piece) for index, _, piece in runs}
        return runs + self._parity(stack, layout, chunks, place)

    # P and Q of chunks of data, to be written.
    def _parity(
        self, stack: ExitStack, layout: StripeMap, chunks: dict[int, np.ndarray], place: int
    ) -> list[tuple[int, int, memoryview]]:
        data = [None if index is None else chunks[index] for index in layout.syndrome]
        length = len(chunks[layout.data[0]])
        p_view = stack.enter_context(scratch.scratch(length))
        if layout.q is None:
            xor_into(_numbers(p_view), data)
            return [(layout.p, place, p_view)]
        q_view = stack.enter_context(scratch.scratch(length))
        pq(data, _numbers(p_view), _numbers(q_view))
        return [(layout.p, place, p_view), (layout.q, place, q_view)]

    # The pieces of a stripe of which a part is written.
    def _part_of_stripe(
        self, stack: ExitStack, stripe: int, begin: int, view: memoryview
    ) -> list[tuple[int, int, memoryview]]:
        layout = self.geometry.stripe(stripe)
        size = self._chunk
        # (number of the chunk, first byte in it, view) of each chunk that is touched
        pieces: list[tuple[int, int, memoryview]] = []
        done = 0
        while done < len(view):
            number, low = divmod(begin + done, size)
            length = min(size - low, len(view) - done)
            pieces.append((number, low, view[done : done + length]))
            done += length
        low = min(first for _, first, _ in pieces)
        high = max(first + len(piece) for _, first, piece in pieces)
        place = stripe * size
        everybody = [*layout.data, layout.p, *([] if layout.q is None else [layout.q])]
        members = tuple(self.members)
        if not all(members[index].readable(place + high) for index in everybody):
            return self._write_around_the_missing(stack, stripe, layout, pieces, low, high)
        whole = sum(first == low and first + len(piece) == high for _, first, piece in pieces)
        modify = len(pieces) + self.geometry.level.parity
        reconstruct = len(layout.data) - whole
        try:
            if modify < reconstruct:
                return self._modify(stack, members, layout, pieces, place, low, high)
            return self._reconstruct(stack, members, layout, pieces, place, low, high)
        except OSError:
            # What could not be read is computed.
            return self._write_around_the_missing(stack, stripe, layout, pieces, low, high)

    # Read-modify-write: what is replaced leaves the parity, what replaces it enters.
    def _modify(
        self,
        stack: ExitStack,
        members: tuple[Member, ...],
        layout: StripeMap,
        pieces: list[tuple[int, int, memoryview]],
        place: int,
        low: int,
        high: int,
    ) -> list[tuple[int, int, memoryview]]:
        parity = []
        for index in (layout.p, layout.q):
            if index is not None:
                view = stack.enter_context(scratch.scratch(high - low))
                members[index].leg.preadv([view], place + low)
                parity.append((index, view, _numbers(view)))
        runs = []
        for number, first, piece in pieces:
            index = layout.data[number]
            length = len(piece)
            with scratch.scratch(length) as old_view:
                members[index].leg.preadv([old_view], place + first)
                old, new = _numbers(old_view), _numbers(piece)
                within = slice(first - low, first - low + length)
                xor_update(parity[0][2][within], old, new)
                if layout.q is not None:
                    q_update(parity[1][2][within], old, new, layout.syndrome.index(index))
            runs.append((index, place + first, piece))
        return runs + [(index, place + low, view) for index, view, _ in parity]

    # Reconstruct-write: what is left is read, and the parity made anew.
    def _reconstruct(
        self,
        stack: ExitStack,
        members: tuple[Member, ...],
        layout: StripeMap,
        pieces: list[tuple[int, int, memoryview]],
        place: int,
        low: int,
        high: int,
    ) -> list[tuple[int, int, memoryview]]:
        written = {number: (first, piece) for number, first, piece in pieces}
        chunks: dict[int, np.ndarray] = {}
        for number, index in enumerate(layout.data):
            first, piece = written.get(number, (low, None))
            if piece is not None and len(piece) == high - low:
                chunks[index] = _numbers(piece)
                continue
            view = stack.enter_context(scratch.scratch(high - low))
            members[index].leg.preadv([view], place + low)
            if piece is not None:
                view[first - low : first - low + len(piece)] = piece
            chunks[index] = _numbers(view)
        runs = [(layout.data[number], place + first, piece) for number, first, piece in pieces]
        return runs + self._parity(stack, layout, chunks, place + low)

    # With members missing: compute the stripe as it was, change it, make the parity anew.
    def _write_around_the_missing(
        self,
        stack: ExitStack,
        stripe: int,
        layout: StripeMap,
        pieces: list[tuple[int, int, memoryview]],
        low: int,
        high: int,
    ) -> list[tuple[int, int, memoryview]]:
        place = stripe * self._chunk
        runs = [(layout.data[number], place + first, piece) for number, first, piece in pieces]
        parity = [index for index in (layout.p, layout.q) if index is not None]
        if not any(self.members[index].writable for index in parity):
            return runs
        chunks = self._load(stack, stripe, low, high, set())
        for number, first, piece in pieces:
            chunks[layout.data[number]][first - low : first - low + len(piece)] = _numbers(piece)
        return runs + self._parity(stack, layout, chunks, place + low)

    # Sync

    def sync_windows(self, begin: int) -> Iterator[tuple[int, int]]:
        """Cut what is synced into windows."""
        step = max(_WINDOW - _WINDOW % self._chunk, self._chunk)
        begin -= begin % self._chunk
        while begin < self.sync_size:
            yield begin, min(begin + step, self.sync_size)
            begin += step

    def sync_window(self, action: str, begin: int, end: int) -> int:
        """Make the members agree on a window."""
        first, last = self.lock_numbers(begin, end)
        self.locks.take(first, last)
        try:
            with ExitStack() as stack:
                if action == "recover":
                    self._recover(stack, begin, end)
                    return 0
                return self._check(stack, action, begin, end)
        finally:
            self.locks.give_back(first, last)

    # Every member that can be read, whole; a failed read gives none of it.
    def _read_members(
        self, stack: ExitStack, begin: int, end: int
    ) -> dict[int, tuple[memoryview, np.ndarray]]:
        found = {}
        for member in self.members:
            if member.readable(end):
                view = stack.enter_context(scratch.scratch(end - begin))
                try:
                    member.leg.preadv([view], begin)
                except OSError:
                    continue
                found[member.index] = (view, _numbers(view))
        return found

    # Compute what belongs on the members that are being rebuilt.
    def _recover(self, stack: ExitStack, begin: int, end: int) -> None:
        found = self._read_members(stack, begin, end)
        targets = [
            member
            for member in self.members
            if member.state == REBUILDING and member.index not in found
        ]
        views = {
            member.index: stack.enter_context(scratch.scratch(end - begin)) for member in targets
        }
        if self.geometry.level.parity == 1 and len(found) == len(self.members) - 1:
            # What is missing is the sum of all others, whichever of them is the parity.
            for view in views.values():
                xor_into(_numbers(view), [numbers for _, numbers in found.values()])
        else:
            self._recover_stripes(stack, begin, end, found, views)
        for member in targets:
            self.write_member(member, [views[member.index]], begin)

    # The same stripe by stripe.
    def _recover_stripes(
        self,
        stack: ExitStack,
        begin: int,
        end: int,
        found: dict[int, tuple[memoryview, np.ndarray]],
        views: dict[int, memoryview],
    ) -> None:
        size = self._chunk
        for place in range(begin, end, size):
            within = slice(place - begin, place - begin + size)
            layout = self.geometry.stripe(place // size)
            everybody = {*layout.data, layout.p, layout.q} - {None}
            chunks = {index: found[index][1][within] for index in everybody if index in found}
            missing: dict[int, np.ndarray] = {}
            for index in everybody - chunks.keys():
                view = views.get(index) or stack.enter_context(scratch.scratch(end - begin))
                views.setdefault(index, view)
                missing[index] = chunks[index] = _numbers(view)[within]
            self._compute(layout, chunks, missing, place)

    # See whether the parity is that of the data, and unless this is a check, make it so.
    def _check(self, stack: ExitStack, action: str, begin: int, end: int) -> int:
        found = self._read_members(stack, begin, end)
        if len(found) < len(self.members):
            return self._check_what_is_there(stack, action, begin, end, found)
        if self.geometry.level.parity == 1:
            with scratch.scratch(end - begin) as view:
                xor_into(_numbers(view), [numbers for _, numbers in found.values()])
                if not _numbers(view).any():
                    return 0
        return self._check_what_is_there(stack, action, begin, end, found)

    # The same stripe by stripe, for those of which all can be read.
    def _check_what_is_there(
        self,
        stack: ExitStack,
        action: str,
        begin: int,
        end: int,
        found: dict[int, tuple[memoryview, np.ndarray]],
    ) -> int:
        mismatches = 0
        size = self._chunk
        for place in range(begin, end, size):
            layout = self.geometry.stripe(place // size)
            if not all(index in found for index in layout.data):
                continue
            within = slice(place - begin, place - begin + size)
            with ExitStack() as inner:
                data = {index: found[index][1][within] for index in layout.data}
                bad = np.zeros(-(-size // _CHECK_BLOCK), bool)
                for index, _, right in self._parity(inner, layout, data, place):
                    if index not in found:
                        continue
                    wrong = _differences(_numbers(right), found[index][1][within])
                    bad |= wrong
                    if wrong.any() and action != "check":
                        self.write_member(self.members[index], [right], place)
                mismatches += int(bad.sum()) * (min(_CHECK_BLOCK, size) >> 9)
        return mismatches


# Which blocks of two chunks differ.
def _differences(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.logical_or.reduceat(one != other, np.arange(0, len(one), _CHECK_BLOCK))


# A piece of a request as one view; requests of several buffers are copied together.
def _one_view(stack: ExitStack, views: list[memoryview], length: int) -> memoryview:
    if len(views) == 1:
        return views[0]
    whole = stack.enter_context(scratch.scratch(length))
    done = 0
    for view in views:
        whole[done : done + len(view)] = view
        done += len(view)
    return whole
