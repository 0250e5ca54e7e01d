"""`doctor`: a line a thing, and status 1 only for what nothing works without."""

from __future__ import annotations

import os
import stat
import sys

import pytest

from dmpy.cli import doctor
from dmpy.cli.session import Session


def _findings(session):
    return {finding.what: finding for finding in doctor.examine(session)}


@pytest.fixture
def session(tmp_path, monkeypatch):
    """A session of folders that are there and ours; no server."""
    for name in ("run", "state"):
        (tmp_path / name).mkdir(0o700)
    return Session(str(tmp_path / "run"), str(tmp_path / "state"))


def _tool(folder, name, script):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_healthy_machine_is_all_right(dmpy):
    dmpy.ok("ls")
    result = dmpy("doctor")
    assert (result.status, result.err) == (0, ""), result
    lines = result.out.splitlines()
    assert all(line.split()[0] in ("ok", "note") for line in lines)
    assert any("nbdkit's Python plugin" in line for line in lines)
    assert any(f"pid {dmpy.pid()}" in line for line in lines)


def test_json_has_the_same_findings(dmpy):
    findings = dmpy.ok("doctor", "--json").json()
    assert findings[0]["what"] == "nbdkit"
    assert findings[0]["verdict"] == "ok"


def test_a_missing_nbdkit_is_essential_and_says_how_to_get_it(session, monkeypatch):
    monkeypatch.setattr(doctor, "_tool", lambda program: None)
    finding = _findings(session)["nbdkit"]
    assert finding.verdict == "missing"
    assert "nbdkit" in finding.text.split("install")[-1]


def test_a_missing_python_plugin_is_essential(session, monkeypatch, tmp_path):
    _tool(tmp_path, "nbdkit", 'test "$1" = --version && echo nbdkit 1.32.5')
    monkeypatch.setattr(doctor, "_tool", lambda program: str(tmp_path / "nbdkit"))
    finding = _findings(session)["nbdkit's Python plugin"]
    assert finding.verdict == "missing"
    assert "python-plugin" in finding.text or "plugin-python" in finding.text


def test_a_plugin_of_another_python_is_essential(session, monkeypatch, tmp_path):
    _tool(tmp_path, "nbdkit", 'echo nbdkit 1.48.1; echo python_version=3.99.1')
    monkeypatch.setattr(doctor, "_tool", lambda program: str(tmp_path / "nbdkit"))
    finding = _findings(session)["nbdkit's Python plugin"]
    assert finding.verdict == "missing"
    assert "runs Python 3.99" in finding.text
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in finding.text


def test_what_only_attach_needs_is_a_note(session, monkeypatch):
    found = doctor._tool
    monkeypatch.setattr(doctor, "_tool", lambda program: None if program == "nbdfuse" else
                        found(program))
    finding = _findings(session)["nbdfuse"]
    assert finding.verdict == "note"
    assert "nbdfuse" in finding.text or "libnbd" in finding.text


def test_no_root_is_a_note_that_says_what_still_works(session, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(session.runtime).st_uid or 1000)
    monkeypatch.setattr(os, "stat", os.stat)
    finding = _findings(session).get("root")
    if os.getuid() == 0:
        assert finding is not None
        assert "--file" in finding.text


def test_a_runtime_folder_open_to_others_is_essential(session):
    os.chmod(session.runtime, 0o777)
    finding = _findings(session)["runtime folder"]
    assert finding.verdict == "missing"
    assert f"chmod 700 {session.runtime}" in finding.text


def test_a_runtime_folder_that_is_a_file_is_essential(tmp_path):
    (tmp_path / "f").touch()
    finding = _findings(Session(str(tmp_path / "f"), str(tmp_path)))["runtime folder"]
    assert finding.verdict == "missing"


def test_a_runtime_folder_too_long_for_a_socket_is_essential(tmp_path):
    finding = _findings(Session(str(tmp_path / ("x" * 100)), str(tmp_path)))["runtime folder"]
    assert finding.verdict == "missing"
    assert "DMPY_RUNTIME_DIR" in finding.text


def test_a_folder_that_will_be_made_is_all_right(tmp_path):
    short = f"/tmp/dmpy-doctor-{os.getpid()}"
    finding = _findings(Session(short, str(tmp_path / "a" / "b")))
    assert finding["runtime folder"].text == f"{short} will be made"
    assert finding["state folder"].verdict == "ok"
    assert not os.path.exists(short)


def test_a_server_that_died_is_essential(session):
    """Its pid file is all that is left of it."""
    with open(f"{session.runtime}/server.pid", "w", encoding="ascii") as file:
        file.write("999999999\n")
    finding = _findings(session)["server"]
    assert finding.verdict == "missing"
    assert "`dmpy serve` starts it again" in finding.text
