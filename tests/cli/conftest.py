"""A real server for the command line's tests: one for all that leave it alive, or one's own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dmpy import attach
from dmpy.cli import main
from tests import needs

REPO = Path(__file__).resolve().parents[2]


class Result(NamedTuple):
    """What a command did."""

    status: int
    out: str
    err: str

    def json(self) -> Any:
        """The output as JSON."""
        return json.loads(self.out)


class CLI:
    """Runs `dmpy` against the server of one runtime folder."""

    def __init__(self, runtime: Path) -> None:
        self.runtime = runtime

    def environment(self) -> dict[str, str]:
        """For processes that should find this server, and this source tree's dmpy."""
        return os.environ | {
            "DMPY_RUNTIME_DIR": str(self.runtime), "DMPY_STATE_DIR": str(self.runtime / "state"),
            "PYTHONPATH": str(REPO), "NO_COLOR": "1",
        }

    def __call__(self, *words: str, stdin: str = "") -> Result:
        """Run a verb in this process; never raises."""
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment().items():
                patch.setenv(name, value)
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = main.run([str(word) for word in words])
        return Result(status, out.getvalue(), err.getvalue())

    def ok(self, *words: str, stdin: str = "") -> Result:
        """Run a verb that has to succeed."""
        result = self(*words, stdin=stdin)
        assert (result.status, result.err) == (0, ""), result
        return result

    def refused(self, *words: str, stdin: str = "", status: int = 1) -> str:
        """Run a verb that has to be refused; return its one sentence."""
        result = self(*words, stdin=stdin)
        assert result.status == status, result
        assert result.err.startswith("dmpy: "), result
        assert result.err.count("\n") == 1, f"not one line: {result.err!r}"
        assert result.out == ""
        return result.err.removeprefix("dmpy: ").rstrip("\n")

    def process(self, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run `dmpy` as a process of its own."""
        more = {"env": self.environment(), "capture_output": True, "text": True,
                "timeout": 60, "check": False} | more
        return subprocess.run([sys.executable, "-m", "dmpy.cli.main", *map(str, words)], **more)

    def pid(self) -> int:
        """The server's process id."""
        return int((self.runtime / "server.pid").read_text())

    def end(self) -> None:
        """Stop the server, if one runs, by its process id if it must be."""
        result = self("shutdown", "--force")
        if result.status:
            with contextlib.suppress(OSError, ValueError):
                os.kill(self.pid(), signal.SIGKILL)
        # What could not be detached in order must not outlive the tests either.
        attach.clean_up(self.runtime)


def _make() -> CLI:
    needs.nbdkit_plugin("python")
    # pytest's folders are too deep for a Unix socket's 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="dmpy-cli-", dir="/tmp"))
    return CLI(folder / "run")


def _remove(cli: CLI) -> None:
    cli.end()
    shutil.rmtree(cli.runtime.parent, ignore_errors=True)


@pytest.fixture(scope="session")
def _shared():
    cli = _make()
    yield cli
    _remove(cli)


@pytest.fixture
def dmpy(_shared: CLI):
    """The command line, with a server that has no devices; tests leave that server alive."""
    yield _shared
    for info in _shared("info", "--json").json():
        if info["attached"]:
            _shared.ok("detach", info["name"])
    _shared.ok("remove-all")


@pytest.fixture
def own_dmpy():
    """The command line, and a runtime folder of the test's own, where no server runs yet."""
    cli = _make()
    yield cli
    _remove(cli)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with sparse files a.img, b.img and c.img of 1 MiB each."""
    for name in ("a.img", "b.img", "c.img"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 1 << 20)
    return tmp_path
