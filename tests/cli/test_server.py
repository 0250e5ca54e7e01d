"""serve, shutdown, and the server that the first verb starts."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest


def _serve(cli, *words):
    process = subprocess.Popen([sys.executable, "-m", "dmpy.cli.main", "serve", *words],
                               env=cli.environment(), stderr=subprocess.PIPE, text=True)
    line = process.stderr.readline()
    assert line.startswith("dmpy: serving "), line + process.stderr.read()
    return process


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end(process):
    process.kill()
    process.wait()
    process.stderr.close()


def test_the_first_verb_starts_the_server_and_shutdown_ends_it(own_dmpy):
    own_dmpy.ok("create", "x", "--table", "0 8 zero")
    pid = own_dmpy.pid()
    assert own_dmpy.ok("shutdown", "--json").json() == {"pid": pid}
    assert not (own_dmpy.runtime / "control.sock").exists()
    assert own_dmpy.ok("shutdown").out == f"no server runs in {own_dmpy.runtime}\n"


def test_devices_come_back_with_the_next_server(own_dmpy):
    own_dmpy.ok("create", "x", "-u", "U", "--table", "0 8 zero")
    own_dmpy.ok("suspend", "x")
    before = own_dmpy.ok("info", "x").out
    own_dmpy.ok("shutdown")
    assert own_dmpy.ok("info", "x").out == before


def test_two_first_verbs_at_once_start_one_server(own_dmpy):
    processes = [
        subprocess.Popen([sys.executable, "-m", "dmpy.cli.main", "rpc", "server"],
                         env=own_dmpy.environment(), stdout=subprocess.PIPE, text=True)
        for _ in range(3)]
    pids = {process.communicate(timeout=60)[0].split('"pid": ')[1].split(",")[0]
            for process in processes}
    assert pids == {str(own_dmpy.pid())}


def test_verbs_that_need_no_server_start_none(own_dmpy):
    own_dmpy.ok("version")
    own_dmpy.ok("shutdown")
    own_dmpy("doctor")
    own_dmpy.ok("completion", "bash")
    assert not own_dmpy.runtime.exists()


def test_the_runtime_folder_can_be_an_option(own_dmpy):
    other = own_dmpy.runtime.parent / "other"
    own_dmpy.ok("--runtime", str(other), "--state", str(other / "state"), "create", "x",
                "--table", "0 8 zero")
    assert (other / "control.sock").exists()
    assert not own_dmpy.runtime.exists()
    own_dmpy.ok("--runtime", str(other), "shutdown")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_ends_in_order_at_a_signal(own_dmpy, number):
    process = _serve(own_dmpy)
    try:
        own_dmpy.ok("create", "x", "--table", "0 8 zero")
        process.send_signal(number)
        assert process.wait(20) == 0
        assert not (own_dmpy.runtime / "control.sock").exists()
    finally:
        _end(process)


def test_serve_ends_at_shutdown(own_dmpy):
    process = _serve(own_dmpy)
    try:
        own_dmpy.ok("shutdown")
        assert process.wait(20) == 0
    finally:
        _end(process)


def test_serve_refuses_to_be_the_second(own_dmpy):
    own_dmpy.ok("ls")
    message = own_dmpy.refused("serve")
    assert f"pid {own_dmpy.pid()}" in message
    assert str(own_dmpy.runtime) in message


@pytest.mark.parametrize("words", [
    ["--tcp", "127.0.0.1:0"], ["--metrics", "127.0.0.1:0"], ["--log-level", "debug"]])
def test_serve_in_the_background_refuses_options_for_a_server_that_runs(own_dmpy, words):
    own_dmpy.ok("ls")
    message = own_dmpy.refused("serve", "--background", *words)
    assert f"pid {own_dmpy.pid()} runs in {own_dmpy.runtime} already" in message


def test_serve_in_the_background_is_content_with_a_server_that_runs(own_dmpy):
    own_dmpy.ok("ls")
    pid = own_dmpy.pid()
    assert own_dmpy("serve", "--background").status == 0
    assert own_dmpy.pid() == pid


def test_serve_answers_metrics_over_http(own_dmpy):
    process = _serve(own_dmpy, "--metrics", f"127.0.0.1:{(port := _free_port())}")
    try:
        own_dmpy.ok("create", "x", "--table", "0 8 zero")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert b'dmpy_reads_total{device="x"} 0\n' in answer.read()
    finally:
        own_dmpy.ok("shutdown")
        _end(process)


def test_serve_speaks_nbd_over_tcp_on_this_machine(own_dmpy):
    nbd = pytest.importorskip("nbd", reason="libnbd's Python module is missing")
    process = _serve(own_dmpy, "--tcp", f"127.0.0.1:{(port := _free_port())}")
    try:
        own_dmpy.ok("create", "x", "--table", "0 8 zero")
        handle = nbd.NBD()
        handle.connect_uri(f"nbd://127.0.0.1:{port}/x")
        assert handle.get_size() == 4096
        handle.shutdown()
    finally:
        own_dmpy.ok("shutdown")
        _end(process)


def test_serve_says_which_free_ports_it_took(own_dmpy):
    result = own_dmpy("serve", "--background", "--tcp", "localhost:0", "--metrics", "localhost:0")
    ports = re.search(r"and nbd://127.0.0.1:(\d+) .*, metrics on 127.0.0.1:(\d+)\)$", result.err)
    assert ports, result
    for port in ports.groups():
        socket.create_connection(("127.0.0.1", int(port)), 10).close()


@pytest.mark.parametrize(("words", "expected"), [
    (["--tcp", "0.0.0.0:10809"], "needs tls=require"),
    (["--tcp", "nonsense"], "HOST:PORT"),
    (["--metrics", "0.0.0.0:9000"], "metrics: host must be localhost"),
    (["--tls", "require"], "needs a folder of certificates"),
    (["--tls", "sometimes"], "'sometimes' is not one of"),
    (["--log-level", "loud"], "'loud' is not one of"),
])
def test_options_that_cannot_be_are_refused(own_dmpy, words, expected):
    assert expected in own_dmpy.refused("serve", *words, status=2)
    assert not own_dmpy.runtime.exists()


def test_a_state_folder_of_somebody_else_is_refused(own_dmpy):
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    state = own_dmpy.runtime.parent / "state"
    state.mkdir(0o700)
    os.chown(state, 65534, 65534)
    message = own_dmpy.refused("--state", str(state), "ls")
    assert str(state) in message
    assert "65534" in message


def test_shutdown_waits_until_the_server_is_gone(own_dmpy):
    own_dmpy.ok("ls")
    pid = own_dmpy.pid()
    start = time.monotonic()
    own_dmpy.ok("shutdown")
    assert time.monotonic() - start < 10
    assert not os.path.exists(f"/proc/{pid}")


def test_a_mirror_goes_on_copying_after_a_restart(own_dmpy, images):
    """Devices are rebuilt before the server forks, and threads do not live through that."""
    own_dmpy.ok(
        "create", "safe", "--table",
        f"0 2048 mirror core 1 64 2 {images}/a.img 0 {images}/b.img 0",
    )
    own_dmpy.ok("shutdown")
    (images / "a.img").write_bytes(os.urandom(1 << 20))
    assert own_dmpy("serve", "--background").status == 0
    deadline = time.monotonic() + 30
    while " 32/32 1 AA 1 core" not in own_dmpy.ok("status", "safe").out:
        assert time.monotonic() < deadline, own_dmpy.ok("status", "safe").out
        time.sleep(0.02)
    own_dmpy.ok("remove", "safe")
    assert (images / "a.img").read_bytes() == (images / "b.img").read_bytes()
