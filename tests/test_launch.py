"""Starting, finding and stopping the server: folders, command lines, races, deaths, restarts."""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from dmpy import launch
from dmpy.client import Client, RemoteError, ServerGone
from dmpy.errors import DeviceError
from dmpy.launch import Options
from tests import needs


@pytest.fixture
def runtime(monkeypatch):
    """A runtime folder with a path short enough for sockets; what runs in it is ended."""
    with tempfile.TemporaryDirectory(prefix="dmpy-", dir="/tmp") as path:
        monkeypatch.setenv("DMPY_RUNTIME_DIR", path)
        monkeypatch.delenv("DMPY_STATE_DIR", raising=False)
        yield path
        with contextlib.suppress(ServerGone):
            launch.stop_server(force=True)


@pytest.fixture
def served(runtime):
    """A client of a real server."""
    needs.nbdkit_plugin("python")
    with launch.start_server() as client:
        yield client


def server_pid(client: Client) -> int:
    return client.call("server")["pid"]


# Kill a server as a crash would, and wait until it is gone.
def kill(client: Client) -> None:
    pid = server_pid(client)
    os.kill(pid, signal.SIGKILL)
    launch._started.pop(pid).wait()


# --- places ------------------------------------------------------------------------------------


def test_folders_follow_the_environment(monkeypatch):
    for name in ("DMPY_RUNTIME_DIR", "DMPY_STATE_DIR", "XDG_RUNTIME_DIR", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/u")

    def places() -> tuple[str, str]:
        return launch.runtime_dir(create=False), launch.state_dir(create=False)

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert places() == ("/run/dmpy", "/var/lib/dmpy")
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert places() == ("/tmp/dmpy-1234", "/home/u/.local/state/dmpy")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1234")
    monkeypatch.setenv("XDG_STATE_HOME", "/s")
    assert places() == ("/run/user/1234/dmpy", "/s/dmpy")
    monkeypatch.setenv("DMPY_RUNTIME_DIR", "/r")
    assert places() == ("/r", "/r/state")
    monkeypatch.setenv("DMPY_STATE_DIR", "/t")
    assert places() == ("/r", "/t")


def test_a_folder_is_made_for_its_owner_only(tmp_path):
    path = str(tmp_path / "a" / "b")
    assert launch.check_folder(path) == launch.check_folder(path) == path
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o1777])
def test_a_folder_that_others_can_write_to_is_refused(tmp_path, mode):
    tmp_path.chmod(mode)
    with pytest.raises(DeviceError, match="can be written by others"):
        launch.check_folder(str(tmp_path))


def test_a_folder_that_others_can_only_read_is_taken(tmp_path):
    tmp_path.chmod(0o755)
    launch.check_folder(str(tmp_path))


def test_a_folder_of_somebody_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(DeviceError, match="belongs to user") as caught:
        launch.check_folder(str(tmp_path))
    assert caught.value.errno == errno.EPERM


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(DeviceError, match="is not a folder"):
        launch.check_folder(str(tmp_path / "f"))


def test_a_runtime_folder_with_a_path_too_long_for_sockets_is_refused(monkeypatch):
    longest = "/" + "x" * (107 - len("//control.sock"))
    monkeypatch.setenv("DMPY_RUNTIME_DIR", longest)
    assert launch.runtime_dir(create=False) == longest
    monkeypatch.setenv("DMPY_RUNTIME_DIR", longest + "x")
    with pytest.raises(DeviceError, match="too long .got 108 bytes, expected at most 107"):
        launch.runtime_dir(create=False)


def test_uris_quote_what_they_must():
    assert launch.device_uri("a b/?", "/r") == "nbd+unix:///a%20b%2F%3F?socket=/r/nbd.sock"


def test_a_plugin_that_is_not_there_is_named():
    assert launch.plugin_path("linear").endswith("plugins/linear.py")
    with pytest.raises(DeviceError, match="plugin nothing is not part of this installation"):
        launch.plugin_path("nothing")


# --- command lines -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "threads"),
    [("1.30.7", 1), ("1.32.5", 1), ("1.33.99", 1), ("1.34.0", 4), ("1.48.1", 4), ("2.0.0", 4)],
)
def test_threads_suit_the_version_of_nbdkit(version, threads):
    assert launch.nbdkit_threads(version) == threads


def test_the_plain_command_line():
    command = launch.server_command("/r", "/s", version="1.32.5")
    plugin = launch.plugin_path("dmpy")
    assert " ".join(command) == (
        f"nbdkit -f -t 1 -P /r/server.pid --unix /r/nbd.sock python {plugin} runtime=/r state=/s"
    )


def test_tls_is_passed_on_to_nbdkit():
    options = Options(tls_certificates="/c", tls_verify_peer=True, tcp="0.0.0.0:1")
    command = launch.server_command("/r", "/s", options, version="1.32.5")
    assert "--unix" not in command
    assert {"--tls=on", "--tls-certificates=/c", "--tls-verify-peer"} <= set(command)
    command = launch.server_command("/r", "/s", Options(tls_psk="/k", tcp="0.0.0.0:1"),
                                    version="1.32.5")
    assert "--tls-psk=/k" in command


@pytest.mark.parametrize("tcp", ["localhost:0", "127.0.0.1:10809", "[::1]:10809"])
def test_tcp_on_this_machine_needs_no_tls(tcp):
    Options(tcp=tcp)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tcp": "0.0.0.0:1"}, "tcp: host 0.0.0.0 can be reached from elsewhere, which needs "
                               "tls=require"),
        ({"tcp": "example.org:1"}, "tcp: host example.org can be reached from elsewhere, which "
                                   "needs tls=require"),
        ({"tcp": "[::]:1", "tls": "on", "tls_psk": "/k"}, "tcp: host :: can be reached from "
                                                         "elsewhere, which needs tls=require"),
        ({"tcp": "10809"}, "tcp must be HOST:PORT (got '10809')"),
        ({"tcp": "127.0.0.1:70000"}, "tcp must be HOST:PORT (got '127.0.0.1:70000')"),
        ({"tls": "maybe"}, "tls must be off, on or require (got maybe)"),
        ({"tls": "require"}, "tls needs a folder of certificates or a file of keys"),
        ({"tls": "off", "tls_psk": "/k"}, "tls is off, but has certificates, keys or clients to "
                                          "verify"),
        ({"tls_psk": "/k"}, "tls is for clients over tcp: it needs tcp=HOST:PORT"),
        ({"tls_verify_peer": True}, "tls is off, but has certificates, keys or clients to verify"),
        ({"tls_psk": "/k", "tls_certificates": "/c"},
         "tls: certificates and a file of keys do not go together"),
        ({"tls_psk": "/k", "tls_verify_peer": True},
         "tls: clients with keys have no certificates to verify"),
        ({"metrics": "0.0.0.0:1"}, "metrics: host must be localhost, 127.0.0.1 or ::1, as "
                                   "everybody who reaches it can read (got '0.0.0.0')"),
    ],
)  # fmt: skip
def test_options_that_are_not_safe_or_do_not_go_together_are_refused(options, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        Options(**options)


# --- without a server --------------------------------------------------------------------------


def test_no_server_is_told_from_a_dead_one(runtime):
    with pytest.raises(ServerGone) as caught:
        launch.connect()
    assert (caught.value.died, caught.value.pid) == (False, None)
    assert str(caught.value) == f"no dmpy server runs in {runtime}: `dmpy serve` starts one"
    Path(runtime, "server.pid").write_text("4194304\n")
    with pytest.raises(ServerGone) as caught:
        launch.connect()
    assert (caught.value.died, caught.value.pid) == (True, 4194304)
    assert str(caught.value) == (
        f"the dmpy server of {runtime} (pid 4194304) died: see {runtime}/server.log; "
        "`dmpy serve` starts it again, with its devices"
    )


def test_a_pid_that_is_another_programs_now_is_no_server(runtime):
    Path(runtime, "server.pid").write_text(f"{os.getpid()}\n")
    with pytest.raises(ServerGone) as caught:
        launch.connect()
    assert caught.value.died


def test_nbdkit_that_is_not_installed_is_named(monkeypatch, runtime):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DeviceError, match="nbdkit is not installed"):
        launch.start_server()


def test_the_client_side_is_imported_without_the_engine():
    code = (
        "import sys, dmpy.launch, dmpy.client; "
        "heavy = {'numpy', 'subprocess', 'typing', 'dataclasses', 'logging', 'pathlib', "
        "'dmpy.mapper', 'dmpy.control'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-S", "-c", code], check=True, timeout=60,
                   cwd=Path(launch.__file__).parents[1])


# --- with a server -----------------------------------------------------------------------------


@pytest.mark.nbd
def test_a_server_starts_once_and_stops_in_order(served, runtime):
    with launch.start_server() as second:
        assert server_pid(second) == server_pid(served)
    for name in ("control.sock", "nbd.sock"):
        assert stat.S_IMODE(os.stat(f"{runtime}/{name}").st_mode) == 0o600
    assert int(Path(runtime, "server.pid").read_text()) == server_pid(served)
    info = served.call("server")
    assert info["uri"] == f"nbd+unix:///?socket={runtime}/nbd.sock"
    assert (info["runtime"], info["state"]) == (runtime, f"{runtime}/state")
    launch.stop_server()
    assert not {"control.sock", "nbd.sock", "server.pid"} & set(os.listdir(runtime))
    with pytest.raises(ServerGone, match="no dmpy server runs"):
        served.call("version")


@pytest.mark.nbd
def test_of_racing_starts_one_wins_and_the_others_use_it(runtime):
    needs.nbdkit_plugin("python")
    pids = []

    def start() -> None:
        with launch.start_server() as client:
            pids.append(server_pid(client))

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(pids) == 6
    assert len(set(pids)) == 1


@pytest.mark.nbd
def test_devices_come_back_after_a_kill_and_after_a_stop(served, tmp_path):
    (tmp_path / "a.img").write_bytes(bytes(1 << 20))
    served.call("create", name="low", table=f"0 2048 linear {tmp_path}/a.img 0", uuid="u")
    served.call("create", name="high", table="0 2048 linear 253:0 0", readonly=True)
    served.call("load", name="low", table="0 8 zero")
    served.call("create", name="empty", minor=9)
    served.call("suspend", name="high")
    served.call("create", name="gone", table="0 8 zero")
    served.call("remove", name="gone")
    expected = [served.call(verb) for verb in ("info", "table", "deps")]
    inactive = served.call("table", inactive=True)
    kill(served)
    with pytest.raises(ServerGone, match="died: see .*; `dmpy serve` starts it again") as caught:
        served.call("info")
    assert caught.value.died
    for _ in range(2):
        with launch.start_server() as client:
            assert [client.call(verb) for verb in ("info", "table", "deps")] == expected
            assert client.call("table", inactive=True) == inactive
            assert client.call("server")["failed"] == []
        launch.stop_server()


@pytest.mark.nbd
def test_what_cannot_be_rebuilt_is_reported_and_the_others_come_up(served, runtime, tmp_path):
    leg = tmp_path / "a.img"
    leg.write_bytes(bytes(1 << 20))
    served.call("create", name="lost", table=f"0 2048 linear {leg} 0")
    served.call("create", name="damaged", table="0 8 zero")
    served.call("create", name="good", table="0 8 zero")
    kill(served)
    leg.unlink()
    path = Path(runtime, "state", "devices", "1.json")
    path.write_bytes(path.read_bytes()[:-40])
    with launch.start_server() as client:
        lost, damaged = sorted(client.call("server")["failed"], key=lambda entry: entry["minor"])
        assert (lost["name"], lost["minor"]) == ("lost", 0)
        assert str(leg) in lost["error"]
        assert damaged["minor"] == 1
        assert "damaged, or cut short" in damaged["error"]
        assert client.call("table", name="good")["lines"] == [[0, 8, "zero", ""]]
        assert client.call("create", name="next")["minor"] == 3
        with pytest.raises(RemoteError, match="could not be rebuilt: .*damaged, or cut short"):
            client.call("info", minor=1)
        client.call("remove", minor=1)
        assert [entry["name"] for entry in client.call("server")["failed"]] == ["lost"]
        # What happens to it meanwhile must not cost it the table that it will have again.
        client.call("rename", name="lost", new_name="lost2")
        client.call("suspend", name="lost2")
    launch.stop_server()
    leg.write_bytes(bytes(1 << 20))
    with launch.start_server() as client:
        table = [[0, 2048, "linear", f"{leg} 0"]]
        assert client.call("table", name="lost2")["lines"] == table
        assert client.call("server")["failed"] == []
    assert path.with_name("1.json.damaged-1").exists()


@pytest.mark.nbd
def test_a_second_server_on_one_state_folder_is_refused(served, runtime):
    with tempfile.TemporaryDirectory(prefix="dmpy-", dir="/tmp") as other:
        with pytest.raises(DeviceError) as caught:
            launch.start_server(other, f"{runtime}/state")
    assert (
        f"state folder {runtime}/state is in use by the server with pid {server_pid(served)}"
        in str(caught.value)
    )
    assert served.call("info") == []


@pytest.mark.nbd
def test_a_server_that_does_not_come_up_is_ended_and_its_log_is_told(runtime):
    needs.nbdkit_plugin("python")
    with pytest.raises(DeviceError, match="the server did not start: .*loglevel"):
        launch.start_server(options=Options(loglevel="loud"))
    with pytest.raises(DeviceError, match="the server did not start"):
        launch.start_server(patience=0.0)
    with launch.start_server() as client:
        assert client.call("info") == []


@pytest.mark.nbd
def test_stopping_where_nothing_runs_says_so(runtime):
    with pytest.raises(ServerGone, match="no dmpy server runs"):
        launch.stop_server()


RUN = """
import sys
from dmpy import launch
ready = lambda client: print("pid", client.call("server")["pid"], flush=True)
sys.exit(launch.run_server(ready=ready))
"""


@contextlib.contextmanager
def in_foreground():
    process = subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE, text=True,
                               cwd=Path(launch.__file__).parents[1])
    try:
        yield process, int(process.stdout.readline().split()[1])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.nbd
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_server_in_the_foreground_ends_in_order_at_a_signal(runtime, number):
    needs.nbdkit_plugin("python")
    with in_foreground() as (process, _):
        with launch.connect() as client:
            client.call("create", name="r0", table="0 8 zero")
        process.send_signal(number)
        assert process.wait(30) == 0
        assert not {"control.sock", "nbd.sock", "server.pid"} & set(os.listdir(runtime))


@pytest.mark.nbd
def test_a_server_in_the_foreground_ends_with_its_parent_and_at_shutdown(runtime):
    needs.nbdkit_plugin("python")
    with in_foreground() as (process, pid):
        process.kill()
        watch = os.pidfd_open(pid)
        deadline = time.monotonic() + 30
        while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
            time.sleep(0.01)
        os.close(watch)
        assert not os.path.exists(f"/proc/{pid}")
    with in_foreground() as (process, _):
        launch.stop_server()
        assert process.wait(30) == 0


@pytest.mark.nbd
def test_a_second_server_in_the_foreground_is_refused(served, runtime):
    with pytest.raises(DeviceError, match=f"pid {server_pid(served)} runs in {runtime} already"):
        launch.run_server()


@pytest.mark.nbd
def test_tcp_and_the_unix_socket_are_served_side_by_side(runtime):
    needs.nbdkit_plugin("python")
    nbdinfo = needs.tool("nbdinfo", package="libnbd-bin")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with launch.start_server(options=Options(tcp=f"localhost:{port}")) as client:
        client.call("create", name="r0", table="0 8 zero")
        for uri in (f"nbd://127.0.0.1:{port}/r0", launch.device_uri("r0", runtime)):
            done = subprocess.run([nbdinfo, "--size", uri], capture_output=True, timeout=30,
                                  check=True)
            assert done.stdout == b"4096\n"
        with socket.create_connection(("127.0.0.1", port)):
            pass
        with pytest.raises(DeviceError, match=f"cannot listen on 127.0.0.1:{port}"):
            with tempfile.TemporaryDirectory(prefix="dmpy-", dir="/tmp") as other:
                launch.start_server(other, f"{other}/s", Options(tcp=f"127.0.0.1:{port}"))
    launch.stop_server()


def runs(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0


@pytest.mark.nbd
def test_tls_is_asked_of_clients_over_tcp_and_not_of_the_unix_socket(runtime, tmp_path):
    needs.nbdkit_plugin("python")
    nbdinfo = needs.tool("nbdinfo", package="libnbd-bin")
    keys = tmp_path / "keys"
    keys.write_text("alice:00112233445566778899aabbccddeeff\n")
    keys.chmod(0o600)
    with launch.start_server(options=Options(tcp="0.0.0.0:0", tls_psk=str(keys))) as client:
        client.call("create", name="r0", table="0 8 zero")
        port = client.call("server")["tcp_uri"].removeprefix("nbds://0.0.0.0:")
        with_key = f"nbds://alice@127.0.0.1:{port}/r0?tls-psk-file={keys}"
        assert runs(nbdinfo, "--size", with_key)
        assert runs(nbdinfo, "--list", with_key.replace("/r0?", "/?"))
        assert not runs(nbdinfo, "--size", f"nbd://127.0.0.1:{port}/r0")
        assert not runs(nbdinfo, "--size", f"nbd://127.0.0.1:{port}/")
        assert not runs(nbdinfo, "--list", f"nbd://127.0.0.1:{port}/")
        assert runs(nbdinfo, "--size", launch.device_uri("r0", runtime))


@pytest.mark.nbd
def test_metrics_are_served_on_request(runtime):
    needs.nbdkit_plugin("python")
    with launch.start_server(options=Options(metrics=f"unix:{runtime}/m.sock")) as client:
        client.call("create", name="r0", table="0 8 zero")
        connection = http.client.HTTPConnection("localhost", timeout=30)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(f"{runtime}/m.sock")
        connection.request("GET", "/metrics")
        assert b'dmpy_reads_total{device="r0"} 0' in connection.getresponse().read()
        connection.close()


@pytest.mark.nbd
def test_a_device_folder_has_working_nodes_before_the_reply(runtime):
    """The whole way: create, use, refuse removal while mounted or held, rename, remove, restart."""
    needs.nbdkit_plugin("python")
    needs.root()
    needs.tool("nbdfuse", package="nbdfuse")
    needs.path("/dev/loop-control")
    devdir = Path(runtime, "dev")
    with launch.start_server(options=Options(devdir=str(devdir))) as client:
        client.call("create", name="r0", table="0 2048 linear mem:1M 0")
        fd = os.open(devdir / "r0", os.O_RDWR)
        assert os.pread(fd, 4096, 0) == bytes(4096)
        assert client.call("info", name="r0")["open_count"] == 1
        with pytest.raises(RemoteError) as caught:
            client.call("remove", name="r0")
        assert caught.value.errno == errno.EBUSY
        os.pwrite(fd, b"x" * 512, 0)
        os.close(fd)
        client.call("rename", name="r0", new_name="r1")
        assert os.listdir(devdir) == ["r1"]
        assert (devdir / "r1").read_bytes()[:512] == b"x" * 512
        kill(client)
    with launch.start_server(options=Options(devdir=str(devdir))) as client:
        assert os.listdir(devdir) == ["r1"]
        assert len((devdir / "r1").read_bytes()) == 1 << 20
        client.call("remove", name="r1")
        assert os.listdir(devdir) == []
    launch.stop_server()
    assert not list(Path(runtime, "attached").glob("*.json"))
