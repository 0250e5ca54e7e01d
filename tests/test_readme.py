"""The examples of README.md hold: they are taken from the page and run, in order.

A fence's word says what a block is: `sh` and `python` are run (`sh root` as root only), the others
are written to the file that they name.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import needs

pytestmark = pytest.mark.nbd

ROOT = Path(__file__).resolve().parents[1]


class Block(NamedTuple):
    """A fenced block: what it is, the further words of its fence, its text."""

    line: int
    kind: str
    words: list[str]
    text: str


def _blocks() -> list[Block]:
    page = (ROOT / "README.md").read_text()
    found = []
    for match in re.finditer(r"^```(\w+)(.*)\n([\s\S]*?)^```$", page, re.MULTILINE):
        line = page.count("\n", 0, match.start()) + 1
        found.append(Block(line, match[1], match[2].split(), match[3]))
    return found


def _run(block: Block, folder: Path, environment: dict[str, str]) -> None:
    command = {"sh": ["sh", "-eu", "-c"], "python": [sys.executable, "-c"]}[block.kind]
    answer = subprocess.run(
        [*command, block.text],
        stdin=subprocess.DEVNULL,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=120,
        check=False,
    )
    assert answer.returncode == 0, f"README.md, line {block.line}:\n{block.text}\n{answer.stdout}"


@pytest.fixture
def environment(tmp_path_factory) -> dict[str, str]:
    """An environment in which pip installs into a folder of the test."""
    needs.nbdkit_plugin("python")
    for tool, package in (
        ("nbdinfo", "libnbd-bin"),
        ("nbdsh", "python3-libnbd"),
        ("qemu-io", "qemu-utils"),
        ("psktool", "gnutls-bin"),
    ):
        needs.tool(tool, package=package)
    folder = tmp_path_factory.mktemp("readme")
    site = folder / "site"
    paths = [str(Path(sys.executable).parent), "/usr/bin", "/bin", "/usr/sbin", "/sbin"]
    return {
        **os.environ,
        "DMPY": str(ROOT),
        "DMPY_RUNTIME_DIR": str(folder / "run"),
        "PATH": ":".join(paths),
        "PIP_TARGET": str(site),
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PYTHONPATH": str(site),
    }


def test_examples_of_the_readme_run_in_order(tmp_path, environment):
    is_root = os.geteuid() == 0
    if not is_root and os.environ.get("DMPY_TESTS_REQUIRE_ALL") == "1":
        needs.root()
    try:
        for block in _blocks():
            if block.words and block.words[0].startswith("file="):
                (tmp_path / block.words[0].removeprefix("file=")).write_text(block.text)
            elif "root" not in block.words or is_root:
                _run(block, tmp_path, environment)
    finally:
        subprocess.run(
            [shutil.which("dmpy", path=environment["PATH"]), "shutdown"],
            env=environment,
            capture_output=True,
            timeout=60,
            check=False,
        )


def test_every_page_and_folder_that_the_readme_links_is_there():
    page = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", page)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
