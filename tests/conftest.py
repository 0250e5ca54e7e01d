"""What the whole suite shares: no silent skips end to end, and random tests that can be repeated.

A test end to end needs tools that a user's machine may lack, and is then skipped; the run ends
with the list of those and why. Where every tool must be there (`DMPY_TESTS_REQUIRE_ALL=1`, as
`.ci/run` sets it), such a skip is a failure.
"""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

REQUIRE_ALL = os.environ.get("DMPY_TESTS_REQUIRE_ALL") == "1"
HERE = Path(__file__).parent

# Folders and files whose tests drive real programs; a skip anywhere else (a target that cannot do
# what a conformance test asks, say) is no loss.
END_TO_END_FOLDERS = ("nbd", "kernel", "cli")
END_TO_END_MARKERS = ("nbd", "kernel")

# No deadline: two busy cores make any time limit a coin toss. print_blob gives the line that
# repeats a failure, beside the seed in the header.
hypothesis.settings.register_profile("dmpy", deadline=None, print_blob=True)
hypothesis.settings.load_profile("dmpy")

# (node id, reason) of the end-to-end tests that were skipped, in order.
_skipped: list[tuple[str, str]] = []


def pytest_configure(config: pytest.Config) -> None:
    """Seed hypothesis by a number that the header shows, unless the command line gives one."""
    if config.getoption("hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(int.from_bytes(os.urandom(4)))


def pytest_report_header(config: pytest.Config) -> str:
    """Name the seed, so that a failure of a random test can be repeated."""
    seed = config.getoption("hypothesis_seed", None)
    return f"hypothesis: repeat this run's random tests with --hypothesis-seed={seed}"


def _is_end_to_end(node: pytest.Item | pytest.Collector) -> bool:
    # A test or a whole file of tests: by its marker, or by where it lies.
    if any(node.get_closest_marker(name) for name in END_TO_END_MARKERS):
        return True
    path = node.path.relative_to(HERE) if node.path.is_relative_to(HERE) else node.path
    return path.parts[0] in END_TO_END_FOLDERS


def _judge_skip(node, report) -> None:
    # Notes a skipped end-to-end test or file, and turns it into a failure where all must run.
    if not report.skipped or hasattr(report, "wasxfail") or not _is_end_to_end(node):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    _skipped.append((report.nodeid, reason))
    if REQUIRE_ALL:
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped, and must not be here: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Judge a test that skipped itself, at any of its phases."""
    report = yield
    _judge_skip(item, report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Judge a file that skipped itself while it was imported."""
    report = yield
    _judge_skip(collector, report)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List the end-to-end tests that were skipped, grouped by reason."""
    if not _skipped:
        return
    by_reason: dict[str, list[str]] = {}
    for nodeid, reason in _skipped:
        by_reason.setdefault(reason, []).append(nodeid)
    terminalreporter.section("end-to-end tests that did not run")
    for reason, nodeids in by_reason.items():
        terminalreporter.write_line(f"{len(nodeids)} because {reason}:")
        for nodeid in nodeids:
            terminalreporter.write_line(f"    {nodeid}")
    terminalreporter.write_line("scripts/setup installs missing tools; some tests need root.")
