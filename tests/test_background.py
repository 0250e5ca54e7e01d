"""Jobs: begun, deferred over a fork, paused, woken, stopped; and what happens to bugs in them."""

import os
import threading

import pytest

from dmpy import background


@pytest.fixture
def deferred():
    background.defer()
    yield
    background.allow()


def counter():
    """Return a work that counts its slices, and what tells when it has done one."""
    slices = []
    done = threading.Event()

    def work(job):
        while job.go_on():
            slices.append(threading.current_thread().name)
            done.set()
            job.go_on(60)

    return work, slices, done


def test_a_job_begins_at_once_in_a_thread_of_its_name():
    work, slices, done = counter()
    job = background.start(work, "counting")
    assert done.wait(10)
    assert slices[0] == "counting"
    assert job.running
    job.stop()
    assert not job.running


def test_a_deferred_job_waits_until_jobs_are_allowed(deferred):
    work, slices, done = counter()
    job = background.start(work, "later")
    assert not done.wait(0.02)
    assert job.running
    background.allow()
    assert done.wait(10)
    job.stop()


def test_a_deferred_job_that_is_stopped_never_begins(deferred):
    work, slices, done = counter()
    job = background.start(work, "never")
    job.stop()
    assert not job.running
    background.allow()
    assert not done.wait(0.02)


def test_a_deferred_job_begins_in_the_process_that_has_forked(deferred):
    work, slices, done = counter()
    job = background.start(work, "over the fork")
    child = os.fork()
    if not child:
        background.allow()
        begun = done.wait(10)
        os._exit(0 if begun else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    job.stop()


def test_a_job_rests_until_it_is_woken():
    work, slices, done = counter()
    job = background.start(work, "resting")
    assert done.wait(10)
    done.clear()
    job.wake()
    assert done.wait(10)
    job.stop()


def test_a_wake_before_the_rest_is_not_lost():
    rested = threading.Event()
    go = threading.Event()

    def work(job):
        go.wait(10)
        job.go_on(60)
        rested.set()

    job = background.start(work, "woken early")
    job.wake()
    go.set()
    assert rested.wait(10)
    job.stop()


def test_a_paused_job_does_nothing_until_it_goes_on():
    slices = []
    one = threading.Semaphore(0)

    def work(job):
        while job.go_on(0.0001):
            slices.append(1)
            one.release()

    job = background.start(work, "paused")
    assert one.acquire(timeout=10)
    job.pause()
    seen = len(slices)
    job.wake()
    assert len(slices) == seen
    while one.acquire(blocking=False):
        pass
    job.unpause()
    assert one.acquire(timeout=10)
    job.stop()


def test_a_paused_job_can_be_stopped():
    work, slices, done = counter()
    job = background.start(work, "paused for good")
    assert done.wait(10)
    job.pause()
    job.stop()
    assert not job.running


def test_work_that_has_ended_can_be_paused_and_stopped():
    job = background.start(lambda job: None, "short")
    job.pause()
    job.stop()
    assert not job.running


def test_a_job_may_stop_itself():
    ended = threading.Event()

    def work(job):
        job.stop()
        assert not job.go_on()
        ended.set()

    background.start(work, "own end")
    assert ended.wait(10)


def test_a_bug_in_a_job_is_logged_and_ends_it(caplog):
    def work(job):
        raise KeyError("mistake")

    job = background.start(work, "broken")
    job.stop()
    assert not job.running
    assert "broken: ended by a bug" in caplog.text
    assert "mistake" in caplog.text
