"""scripts/demo does the main job from start to end, mounted and without root."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests import needs

pytestmark = pytest.mark.nbd

DEMO = Path(__file__).resolve().parents[1] / "scripts" / "demo"


def _run(folder: Path, *options: str) -> str:
    needs.nbdkit_plugin("python")
    for tool in ("mke2fs", "debugfs", "e2fsck"):
        needs.tool(tool, package="e2fsprogs")
    needs.tool("nbdcopy", package="libnbd-bin")
    answer = subprocess.run(
        [DEMO, "--clean", *options],
        env={**os.environ, "TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout
    return answer.stdout


@pytest.fixture
def folder(tmp_path_factory) -> Path:
    """A folder for the demo's own, with a short path: a Unix socket lies in it."""
    return tmp_path_factory.mktemp("demo")


def test_demo_mounts_and_compares_every_file(folder):
    needs.root()
    needs.path("/dev/fuse", why="nbdfuse needs it where the kernel has no nbd driver")
    output = _run(folder)
    assert "mkfs.ext4" in output
    assert "files are the same" in output
    assert "without root nothing is mounted" not in output
    assert list(folder.iterdir()) == []


def test_demo_without_root_compares_every_file_and_says_that_nothing_is_mounted(folder):
    output = _run(folder, "--rootless")
    assert "without root nothing is mounted" in output
    assert "files are the same" in output
    assert list(folder.iterdir()) == []
