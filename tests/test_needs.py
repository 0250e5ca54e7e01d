"""A missing tool is a skip that names it, and a failure where nothing may be missing."""

import os

import pytest

from tests import needs


@pytest.fixture(autouse=True)
def nothing_required(monkeypatch):
    monkeypatch.delenv("DMPY_TESTS_REQUIRE_ALL", raising=False)


MISSING = {
    "no-such-tool": lambda: needs.tool("no-such-tool", package="no-such-package"),
    "no_such_module": lambda: needs.module("no_such_module"),
    "no-such-driver": lambda: needs.kernel_module("no-such-driver"),
    "/no/such/file": lambda: needs.path("/no/such/file"),
    "false": lambda: needs.command("false"),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_skipped_by_name(name):
    with pytest.raises(pytest.skip.Exception, match=name):
        MISSING[name]()


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_a_failure_where_all_is_required(name, monkeypatch):
    monkeypatch.setenv("DMPY_TESTS_REQUIRE_ALL", "1")
    with pytest.raises(pytest.fail.Exception, match=name):
        MISSING[name]()


def test_what_is_there_is_no_obstacle(tmp_path):
    assert os.access(needs.tool("sh"), os.X_OK)
    assert needs.path(str(tmp_path)) == str(tmp_path)
    needs.module("json")
    needs.command("true")


def test_root_is_asked_of_the_system(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    needs.root()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(pytest.skip.Exception, match="root"):
        needs.root()
