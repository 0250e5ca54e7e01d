"""Work beside the requests, in threads that begin only once the process may have threads.

A server rebuilds its devices first and forks then, and no thread lives through a fork. Such a
server says `defer()` before and `allow()` after: a job that is started in between waits until then.
Where nobody says so, as in a Mapper of one's own, jobs begin at once.

    def work(job):
        while job.go_on(0.5):                 # rests half a second, or until wake()
            ...                               # a slice of the work

    job = background.start(work, "resync r1")
    job.stop()

A slice is under 200 us of Python between calls that release Python's global lock (a read, a write,
numpy on whole chunks): a thread that keeps the lock takes a server from 70,000 requests a second
to a hundred.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from time import monotonic

__all__ = ["Job", "allow", "defer", "start"]

_log = logging.getLogger("dmpy")

# Protects the two below. Nothing but a thread's start is done while it is held.
_lock = threading.Lock()
_deferred = False
_waiting: list[Job] = []


class Job:
    """A piece of work in a thread of its own; made by start().

    Args:
        work: called with the job, in the thread; ends soon after go_on() was False.
        name: of the thread, for logs.

    Attributes:
        name: as given.
        stopping: the work is to come to an end; it may look at this between two calls to go_on().
    """

    def __init__(self, work: Callable[[Job], None], name: str) -> None:
        self.name = name
        self.stopping = False
        self._work = work
        self._thread: threading.Thread | None = None
        # Signalled when one of these has changed: stopping, paused, resting, woken, ended.
        self._changed = threading.Condition()
        self._paused = False
        self._resting = False
        self._woken = False
        self._ended = False

    @property
    def running(self) -> bool:
        """The work has not come to its end; also while it waits for allow(), or is paused."""
        return not self._ended

    def go_on(self, seconds: float = 0.0) -> bool:
        """Rest, for the work itself to call between slices.

        Args:
            seconds: how long, unless somebody calls wake(); longer while the job is paused.

        Returns:
            False when the work is to end.
        """
        with self._changed:
            deadline = monotonic() + seconds
            while not self.stopping:
                left = deadline - monotonic()
                if not self._paused and (self._woken or left <= 0):
                    break
                self._resting = True
                self._changed.notify_all()
                self._changed.wait(None if self._paused else left)
            self._resting = self._woken = False
            return not self.stopping

    def wake(self) -> None:
        """End the rest that the work takes, or is about to take."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def pause(self) -> None:
        """Let the work rest until unpause(); returns when it rests, or has ended.

        Called by the work itself it returns at once, and the next go_on() rests.
        """
        with self._changed:
            self._paused = True
            self._changed.notify_all()
            if self._thread in (None, threading.current_thread()):
                return
            self._changed.wait_for(lambda: self._resting or self._ended or not self._paused)

    def unpause(self) -> None:
        """Let the work go on after pause()."""
        with self._changed:
            self._paused = False
            self._changed.notify_all()

    def ask_to_stop(self) -> None:
        """Let the work come to its end, without waiting for that."""
        with _lock:
            if self in _waiting:
                _waiting.remove(self)
                self._ended = True
        with self._changed:
            self.stopping = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Let the work come to its end; returns when it has, or at once to the work itself."""
        self.ask_to_stop()
        thread = self._thread
        if thread not in (None, threading.current_thread()):
            thread.join()

    # Begin; the caller holds `_lock`.
    def _begin(self) -> None:
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    # The thread. Whatever escapes is a bug of ours: the log has it whole, the process lives on.
    def _run(self) -> None:
        try:
            self._work(self)
        except Exception:
            _log.exception("%s: ended by a bug", self.name)
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()


def start(work: Callable[[Job], None], name: str) -> Job:
    """Begin a piece of work, now or when allow() is called.

    Args:
        work: called with the job, in a thread of its own.
        name: of the thread, for logs.
    """
    job = Job(work, name)
    with _lock:
        if _deferred:
            _waiting.append(job)
        else:
            job._begin()
    return job


def defer() -> None:
    """Hold back the jobs that are started from now on: the process is going to fork."""
    global _deferred
    with _lock:
        _deferred = True


def allow() -> None:
    """Begin the jobs that were held back, and those to come at once."""
    global _deferred
    with _lock:
        _deferred = False
        for job in _waiting:
            job._begin()
        _waiting.clear()
