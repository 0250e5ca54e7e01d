"""What several kinds of leaves need: small file systems and loop devices, with root only."""

from __future__ import annotations

import subprocess

import pytest

from tests import needs


@pytest.fixture
def mounted(tmp_path):
    """A function (type, options) that mounts a file system of its own and returns its folder."""
    needs.root()
    folders = []

    def mount(kind, options):
        folder = tmp_path / f"mnt{len(folders)}"
        folder.mkdir()
        words = ["mount", "-t", kind, "-o", options, kind, str(folder)]
        needs.command(*words, why="mounting is not possible here")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True, timeout=30)


@pytest.fixture
def loop(tmp_path):
    """A function (path, words for losetup) that makes a loop device of a file and returns it."""
    needs.root()
    losetup = needs.tool("losetup", package="mount")
    needs.path("/dev/loop-control", why="loop devices")
    nodes = []

    def attach(path, *words):
        words = [losetup, "--find", "--show", *words, str(path)]
        answer = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True)
        nodes.append(answer.stdout.strip())
        return nodes[-1]

    yield attach
    for node in nodes:
        subprocess.run([losetup, "--detach", node], check=True, timeout=30)
