"""The command line as such: usage, suggestions, speed, errors that are one sentence."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from dmpy.cli import entry, main
from dmpy.cli.session import Session


def _run(capsys, *words):
    status = main.run(list(words))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize(("words", "expected"), [
    (["creat"], "command creat is unknown (did you mean create?); see `dmpy --help`"),
    (["supend", "r0"], "command supend is unknown (did you mean suspend?); see `dmpy --help`"),
    (["qqq"], "command qqq is unknown; see `dmpy --help`"),
    (["create", "x", "--tabel", "0 8 zero"],
     "option --tabel is unknown (did you mean --table?); see `dmpy create --help`"),
    (["create"], "argument NAME is missing; see `dmpy create --help`"),
    (["create", "x", "f", "g"],
     "argument g is one too many (expected NAME [FILE]); see `dmpy create --help`"),
    (["create", "x", "--notable", "--table", "0 8 zero"],
     "--notable and a table exclude each other; see `dmpy create --help`"),
    (["remove"], "argument NAME is missing; see `dmpy remove --help`"),
    (["info", "-c", "-o", "nmae"],
     "field nmae is unknown (did you mean name?); see `dmpy info --help`"),
    (["info", "-j", "253"], "--major needs --minor; see `dmpy info --help`"),
    (["run", "--", "true"], "--table, --table-file or --device is needed; see `dmpy run --help`"),
    (["run", "--device", "x", "--", "true"],
     "--device must be NAME=TABLE (got x); see `dmpy run --help`"),
])
def test_wrong_usage_is_one_sentence_and_status_2(capsys, words, expected):
    assert _run(capsys, *words) == (2, "", f"dmpy: {expected}\n")


def test_no_command_shows_the_help(capsys):
    status, out, err = _run(capsys)
    assert (status, err) == (2, "")
    assert "  create " in out


@pytest.mark.parametrize("verb", [*main.VERBS, *main.ALIASES])
def test_every_verb_has_help_and_json_where_it_prints(capsys, verb):
    status, out, err = _run(capsys, verb, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"Usage: dmpy {verb} ")
    if verb not in ("run", "serve", "rpc", "completion"):
        assert "--json" in out


def test_a_bug_of_ours_is_one_sentence_too(capsys, monkeypatch):
    monkeypatch.setattr(Session, "call", lambda *args, **more: 1 // 0)
    status, out, err = _run(capsys, "ls")
    assert status == 1
    assert err == ("dmpy: a bug of dmpy, ZeroDivisionError: integer division or modulo by zero "
                   "(DMPY_DEBUG=1 shows where)\n")


def test_a_bug_of_ours_shows_where_when_asked(monkeypatch):
    monkeypatch.setenv("DMPY_DEBUG", "1")
    monkeypatch.setattr(Session, "call", lambda *args, **more: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main.run(["ls"])


def test_a_folder_that_is_too_long_for_a_socket_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("DMPY_RUNTIME_DIR", str(tmp_path / ("x" * 120)))
    status, _, err = _run(capsys, "shutdown")
    assert status == 1
    assert "too long for a socket" in err
    assert err.count("\n") == 1


def test_a_reader_that_has_seen_enough_is_no_error():
    process = subprocess.run(
        f"{sys.executable} -m dmpy.cli.main rpc --reference | head -1", shell=True,
        capture_output=True, text=True, timeout=30, check=False)
    assert process.stdout == "# Control socket\n"
    assert process.stderr == ""


def test_help_imports_neither_rich_nor_numpy_nor_the_engine():
    script = ("import sys, dmpy.cli.main as m; m.run(['--help']); "
              "print(sorted({'rich', 'numpy', 'dmpy.mapper', 'dmpy.control', 'dmpy.table'} "
              "& set(sys.modules)), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          timeout=30, check=True)
    assert done.stderr == "[]\n"


def test_help_is_there_at_once():
    # The best of five: a busy machine may slow some of them down.
    best = 9.0
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "dmpy.cli.main", "--help"], capture_output=True,
                       timeout=30, check=True)
        best = min(best, time.perf_counter() - start)
    assert best < 0.35


def test_under_the_name_of_dmsetup_it_is_that_command(monkeypatch):
    from dmpy.cli import dmsetup

    called = []
    monkeypatch.setattr(dmsetup, "main", lambda: called.append(True))
    monkeypatch.setattr(sys, "argv", ["/opt/x/dmsetup", "ls"])
    entry.main()
    assert called == [True]


def test_under_the_name_of_dmsetup_nothing_is_imported_for_the_other_command():
    script = ("import sys; sys.argv = ['/opt/x/dmsetup', 'help']\nfrom dmpy.cli import entry\n"
              "try: entry.main()\nexcept SystemExit: pass\n"
              "print(sorted({'click', 'dmpy.cli.main'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          timeout=30, check=True)
    assert done.stdout == "[]\n"
