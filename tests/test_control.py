"""The control socket: every method, every kind of bad request, and clients that misbehave."""

from __future__ import annotations

import errno
import json
import os
import random
import socket
import tempfile
import threading
import time
from pathlib import Path

import pytest

from dmpy import attachments, control
from dmpy.control import METHODS, Client, ControlServer, RemoteError, ServerGone, reference
from dmpy.errors import DeviceError
from dmpy.mapper import FailedEntry, Mapper

REQUEST = {"jsonrpc": "2.0", "id": 1, "method": "version"}


@pytest.fixture
def folder():
    """A folder with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="dmpy-", dir="/tmp") as path:
        yield path


@pytest.fixture
def mapper():
    with Mapper() as opened:
        yield opened


@pytest.fixture
def server(mapper, folder):
    stopped = threading.Event()
    served = ControlServer(mapper, f"{folder}/control.sock", shutdown=stopped.set)
    served.start()
    served.asked_to_stop = stopped
    yield served
    served.stop()


@pytest.fixture
def client(server):
    with Client(server.path, timeout=30) as opened:
        yield opened


class Raw:
    """A client that sends what it likes."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)  # before the time-out, with which a full queue is an error
        self.socket.settimeout(30)
        self.file = self.socket.makefile("rb")

    def send(self, content: object) -> Raw:
        data = content if isinstance(content, bytes) else json.dumps(content).encode() + b"\n"
        self.socket.sendall(data)
        return self

    def reply(self) -> object:
        line = self.file.readline()
        assert line.endswith(b"\n")
        return json.loads(line)

    def at_end(self) -> bool:
        return self.file.read(1) == b""

    def close(self) -> None:
        self.file.close()
        self.socket.close()


@pytest.fixture
def raw(server):
    opened = Raw(server.path)
    yield opened
    opened.close()


def refusal(client: Client, method: str, **params: object) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        client.call(method, **params)
    return caught.value


# --- the protocol ------------------------------------------------------------------------------


def test_every_method_has_a_handler_and_every_handler_a_method():
    handlers = {name[4:] for name in vars(ControlServer) if name.startswith("_do_")}
    assert handlers == set(METHODS)


def test_every_method_and_parameter_is_in_the_reference():
    text = reference()
    for name, method in METHODS.items():
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert method.meaning in section
        for param in method.params:
            assert f"| `{param.name}` | {param.kind} |" in section
            assert param.meaning in section


def test_handlers_take_what_the_methods_declare():
    for name, method in METHODS.items():
        code = getattr(ControlServer, f"_do_{name}").__code__
        named = set(code.co_varnames[: code.co_argcount]) - {"self", "connection", "device"}
        declared = {param.name for param in method.params}
        takes_rest = bool(code.co_flags & 8)
        assert named <= declared if takes_rest else named == declared


# --- methods -----------------------------------------------------------------------------------


def test_a_device_is_created_described_and_removed(client):
    info = client.call("create", name="r0", table="0 8 zero", uuid="u")
    assert info == client.call("info", name="r0") == client.call("info", uuid="u")
    assert client.call("info") == [info]
    assert info["name"] == "r0"
    assert info["size_sectors"] == 8
    assert info["live_table"] is True
    assert info["attached"] == ""
    assert client.call("remove", minor=info["minor"]) == {}
    assert client.call("info") == []


def test_table_and_status_come_line_by_line(client):
    client.call("create", name="b", table="0 8 zero\n8 8 error")
    client.call("create", name="a")
    lines = [[0, 8, "zero", ""], [8, 8, "error", ""]]
    assert client.call("table", name="b") == {"name": "b", "lines": lines}
    assert client.call("status") == [{"name": "a", "lines": []}, {"name": "b", "lines": lines}]


def test_a_table_is_loaded_and_resumed(client):
    client.call("create", name="r0", table="0 8 zero")
    assert client.call("load", name="r0", table="0 16 zero")["inactive_table"] is True
    assert client.call("table", name="r0", inactive=True)["lines"] == [[0, 16, "zero", ""]]
    assert client.call("suspend", name="r0", noflush=True)["suspended"] is True
    info = client.call("resume", name="r0")
    assert (info["suspended"], info["size_sectors"]) == (False, 16)
    client.call("load", name="r0", table="0 8 zero")
    assert client.call("clear", name="r0")["inactive_table"] is False


def test_names_and_uuids_change(client):
    client.call("create", name="a", table="0 8 zero")
    assert client.call("rename", name="a", new_name="b")["name"] == "b"
    assert client.call("set_uuid", name="b", new_uuid="u")["uuid"] == "u"
    assert refusal(client, "info", name="a").errno == errno.ENXIO


def test_deps_name_the_device_below(client):
    client.call("create", name="low", table="0 8 zero", minor=4)
    client.call("create", name="high", table="0 8 linear 253:4 0")
    deps = {"name": "high", "deps": [{"major": 253, "minor": 4, "name": "low"}]}
    assert client.call("deps", name="high") == deps
    assert refusal(client, "remove", name="low").errno == errno.EBUSY


def test_stats_are_those_of_the_device(client, mapper):
    client.call("create", name="r0", table="0 8 zero")
    mapper.device("r0").preadv([memoryview(bytearray(512))], 0)
    (stats,) = client.call("stats")
    assert (stats["name"], stats["reads"], stats["read_bytes"]) == ("r0", 1, 512)


def test_version_server_and_targets_describe_what_serves(client, server):
    assert client.call("version")["driver"] == control.DRIVER_VERSION
    assert client.call("server")["pid"] == os.getpid()
    assert {"name": "linear", "version": [1, 4, 0]} in client.call("targets")


def test_paths_begin_in_the_callers_folder(client, tmp_path):
    (tmp_path / "a.img").write_bytes(bytes(4096))
    client.call("create", name="r0", table="0 8 linear a.img 0", cwd=str(tmp_path))
    (lines,) = client.call("table", name="r0")["lines"]
    assert str(tmp_path / "a.img") in lines[3]


def test_a_table_error_has_its_line_and_argument(client):
    error = refusal(client, "create", name="r0", table="0 8 zero\n8 8 striped 2 12 a 0 b 0")
    assert (error.code, error.kind, error.errno) == (-32000, "TableError", errno.EINVAL)
    assert error.data["line"] == 2
    assert error.data["target"] == "striped"
    assert str(error) == error.message == error.strerror
    assert client.call("info") == []


def test_a_device_error_has_its_errno(client):
    error = refusal(client, "resume", name="none")
    assert (error.kind, error.errno, error.data["errno_name"]) == ("DeviceError", 6, "ENXIO")


def test_a_device_that_could_not_be_rebuilt_is_reported_with_its_reason(client, mapper):
    mapper.failed.append(FailedEntry("lost", "", 3, "line 1, linear: leg gone.img: no such file"))
    assert client.call("server")["failed"] == [
        {"name": "lost", "uuid": "", "minor": 3,
         "error": "line 1, linear: leg gone.img: no such file"}
    ]  # fmt: skip
    error = refusal(client, "info", name="lost")
    assert error.errno == errno.ENXIO
    assert "could not be rebuilt: line 1, linear: leg gone.img" in error.message


def test_an_error_of_ours_is_reported_as_such_and_the_connection_goes_on(client, mapper, caplog):
    mapper.targets = lambda: 1 / 0
    error = refusal(client, "targets")
    assert error.code == -32603
    assert "ZeroDivisionError" in error.message
    assert "ZeroDivisionError" in caplog.text
    assert client.call("info") == []


def test_a_table_of_a_hundred_thousand_lines_goes_through_in_three_seconds(
    client, tmp_path, record_property
):
    """The limit is the project's; the time that it took is in the report."""
    (tmp_path / "a.img").write_bytes(bytes(1 << 20))
    text = "".join(
        f"{i * 8} 8 linear {tmp_path}/a.img {i * 8 % 2048}\n" for i in range(100_000)
    )
    client.call("create", name="big")
    begin = time.monotonic()
    client.call("load", name="big", table=text)
    seconds = time.monotonic() - begin
    record_property("seconds", seconds)
    print(f"load of 100,000 lines: {seconds:.2f} s")
    client.call("resume", name="big")
    assert len(client.call("table", name="big")["lines"]) == 100_000
    assert seconds < 30  # a hanging machine, not a benchmark


# --- waiting -----------------------------------------------------------------------------------


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.005)


def test_wait_returns_at_the_next_event_and_blocks_nobody_else(client, mapper, raw):
    client.call("create", name="r0", table="0 8 zero")
    raw.send(REQUEST | {"method": "wait", "params": {"name": "r0", "event_nr": 0}})
    assert client.call("info", name="r0")["event_nr"] == 0
    mapper.device("r0").trigger_event()
    assert raw.reply()["result"]["event_nr"] == 1


def test_wait_for_an_event_that_has_been_returns_at_once(client, mapper):
    client.call("create", name="r0", table="0 8 zero")
    mapper.device("r0").trigger_event()
    assert client.call("wait", name="r0", event_nr=0)["event_nr"] == 1


def test_wait_has_a_time_limit(client):
    client.call("create", name="r0", table="0 8 zero")
    assert refusal(client, "wait", name="r0", timeout=0.01).errno == errno.ETIMEDOUT
    assert refusal(client, "wait", name="r0", timeout=0).errno == errno.ETIMEDOUT


def test_wait_ends_when_its_client_goes_away(client, server, raw):
    client.call("create", name="r0", table="0 8 zero")
    raw.send(REQUEST | {"method": "wait", "params": {"name": "r0"}})
    wait_until(lambda: len(server._connections) == 2)
    raw.close()
    wait_until(lambda: len(server._connections) == 1)


def test_a_client_that_only_ended_its_sending_still_gets_the_event(client, mapper, raw):
    client.call("create", name="r0", table="0 8 zero")
    raw.send(REQUEST | {"method": "wait", "params": {"name": "r0", "event_nr": 0}})
    raw.socket.shutdown(socket.SHUT_WR)
    time.sleep(2 * control._WAIT_SLICE)
    mapper.device("r0").trigger_event()
    assert raw.reply()["result"]["event_nr"] == 1


def test_clients_that_wait_for_events_take_no_room_from_others(mapper, folder):
    """128 of them kept everybody else out, `dmpy shutdown` too."""
    mapper.create("r0", "0 8 zero")
    with ControlServer(mapper, f"{folder}/c.sock", max_connections=2) as server:
        waiters = [Raw(server.path) for _ in range(5)]
        for waiter in waiters:
            waiter.send(REQUEST | {"method": "wait", "params": {"name": "r0", "event_nr": 0}})
        with Client(server.path, timeout=10) as client:
            assert client.call("info", name="r0")["event_nr"] == 0
        mapper.device("r0").trigger_event()
        for waiter in waiters:
            assert waiter.reply()["result"]["event_nr"] == 1
            waiter.close()


def test_more_waiting_clients_than_there_may_be_are_refused(mapper, folder, monkeypatch):
    monkeypatch.setattr(control, "_MOST_WAITING", 1)
    mapper.create("r0", "0 8 zero")
    with ControlServer(mapper, f"{folder}/c.sock") as server:
        first = Raw(server.path)
        first.send(REQUEST | {"method": "wait", "params": {"name": "r0", "event_nr": 0}})
        wait_until(lambda: any(each.waits for each in server._connections))
        with Client(server.path, timeout=10) as client:
            assert refusal(client, "wait", name="r0").errno == errno.EAGAIN
        mapper.device("r0").trigger_event()
        assert first.reply()["result"]["event_nr"] == 1
        first.close()


def test_wait_ends_when_the_server_stops(client, server, raw):
    client.call("create", name="r0", table="0 8 zero")
    raw.send(REQUEST | {"method": "wait", "params": {"name": "r0"}})
    wait_until(lambda: any(each.idle_since is None for each in server._connections))
    server.stop()
    assert raw.reply()["error"]["data"]["errno_name"] == "ESHUTDOWN"


# --- JSON-RPC ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"\n", -32700),
        (b"{\n", -32700),
        (b'{"jsonrpc": "2.0", "id": NaN, "method": "version"}\n', -32700),
        (b"\xff\xfe{}\n", -32700),
        (b"[" * 200_000 + b"\n", -32700),
        (b'{"a":' * 200_000 + b"\n", -32700),
        (b"9" * 10_000 + b"\n", -32700),
        ([], -32600),
        (7, -32600),
        ({}, -32600),
        ({"jsonrpc": "1.0", "id": 1, "method": "version"}, -32600),
        ({"jsonrpc": "2.0", "id": 1, "method": 1}, -32600),
        (REQUEST | {"params": 3}, -32600),
        (REQUEST | {"id": {}}, -32600),
        (REQUEST | {"id": True}, -32600),
        (b'{"jsonrpc": "2.0", "id": 1e999, "method": "version"}\n', -32600),
        ([REQUEST] * 1001, -32600),
        (REQUEST | {"method": "nothing"}, -32601),
        (REQUEST | {"method": "_listen"}, -32601),
        (REQUEST | {"params": {"x": 1}}, -32602),
        (REQUEST | {"params": [1]}, -32602),
    ],
)
def test_a_wrong_request_gets_its_code_and_the_connection_goes_on(raw, content, code):
    reply = raw.send(content).reply()
    assert reply["error"]["code"] == code
    assert reply["id"] == (1 if code in (-32601, -32602) else None)
    assert raw.send(REQUEST).reply()["result"]["dmpy"]


@pytest.mark.parametrize(
    ("method", "params", "sentence"),
    [
        ("create", {}, "create: parameter name is missing"),
        ("create", {"name": 1},
         "create: parameter name has the wrong type (got integer, expected string)"),
        ("create", {"name": None},
         "create: parameter name has the wrong type (got null, expected string)"),
        ("create", {"name": "a", "minor": True},
         "create: parameter minor has the wrong type (got boolean, expected integer)"),
        ("create", {"name": "a", "minor": 1 << 20},
         "create: parameter minor is out of range (got 1048576, expected 0 to 1048575)"),
        ("create", {"name": "a", "minor": -1},
         "create: parameter minor is out of range (got -1, expected 0 to 1048575)"),
        ("create", {"name": "a\0"},
         "create: parameter name holds a NUL character or half a surrogate pair"),
        ("create", {"name": "\ud800"},
         "create: parameter name holds a NUL character or half a surrogate pair"),
        ("create", {"name": "a", "tabel": "0 8 zero"},
         "create: unknown parameter tabel (expected name, table, uuid, readonly, minor, cwd)"),
        ("version", {"x": 1}, "version: unknown parameter x (expected none)"),
        ("resume", {}, "resume: a device is named by one of name, uuid and minor (got 0 of them)"),
        ("info", {"name": "a", "minor": 1},
         "info: a device is named by one of name, uuid and minor (got 2 of them)"),
    ],
)  # fmt: skip
def test_wrong_parameters_are_named(client, method, params, sentence):
    error = refusal(client, method, **params)
    assert (error.code, error.message) == (-32602, sentence)


def test_parameters_may_come_by_position(raw):
    raw.send(REQUEST | {"method": "create", "params": ["r0", "0 8 zero"]}).reply()
    reply = raw.send(REQUEST | {"method": "rename", "params": ["r0", None, None, "r1"]}).reply()
    assert reply["result"]["name"] == "r1"


def test_a_notification_gets_no_reply_even_if_it_is_wrong(raw):
    raw.send({"jsonrpc": "2.0", "method": "create", "params": {"name": "r0"}})
    raw.send({"jsonrpc": "2.0", "method": "nothing"})
    raw.send({"jsonrpc": "2.0", "method": "create", "params": {"name": "r0"}})
    assert raw.send(REQUEST | {"id": "x", "method": "info"}).reply()["result"][0]["name"] == "r0"


def test_a_batch_is_answered_by_an_array_without_its_notifications(raw):
    notification = {"jsonrpc": "2.0", "method": "version"}
    replies = raw.send([REQUEST | {"id": "a"}, notification, 1, REQUEST | {"id": 2}]).reply()
    assert [reply["id"] for reply in replies] == ["a", None, 2]
    assert replies[1]["error"]["code"] == -32600


def test_a_batch_of_notifications_gets_no_reply(raw):
    raw.send([{"jsonrpc": "2.0", "method": "version"}] * 3)
    assert raw.send(REQUEST | {"id": 9}).reply()["id"] == 9


def test_requests_may_come_together_and_in_pieces(raw):
    line = json.dumps(REQUEST).encode() + b"\n"
    raw.send(line + line + line[:10])
    assert raw.reply()["result"] == raw.reply()["result"]
    assert raw.send(line[10:]).reply()["id"] == 1


def test_the_last_request_needs_no_newline(raw):
    raw.send(json.dumps(REQUEST).encode())
    raw.socket.shutdown(socket.SHUT_WR)
    assert raw.reply()["id"] == 1
    assert raw.at_end()


# --- clients that misbehave --------------------------------------------------------------------


def test_random_bytes_disturb_nobody(server, client):
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    good = json.dumps(REQUEST | {"method": "info"}).encode()
    for _ in range(200):
        data = chance.choice([
            chance.randbytes(chance.randrange(1, 3000)),
            good[: chance.randrange(len(good))],
            bytes(byte ^ (chance.random() < 0.05) for byte in good) + b"\n",
            json.dumps([[chance.choice(list(METHODS)), {"name": chance.randrange(9)}]]).encode(),
        ])
        noise = Raw(server.path)
        try:
            noise.send(data)
            noise.socket.shutdown(socket.SHUT_WR)
            for line in noise.file:
                reply = json.loads(line)
                for each in reply if isinstance(reply, list) else [reply]:
                    assert each["jsonrpc"] == "2.0"
                    assert ("error" in each) != ("result" in each)
        except ConnectionError:
            pass
        noise.close()
        assert client.call("info") == []


def test_random_parameters_get_an_error_or_a_result_of_every_method(client, server):
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    values = [None, True, 0, -1, 1 << 70, 0.5, "", "r0", "0 8 zero", "\udc80", [], {}, "x" * 500]
    safe = [name for name in METHODS if name not in ("attach", "shutdown", "wait")]
    for _ in range(500):
        method = chance.choice(safe)
        names = [param.name for param in METHODS[method].all_params]
        params = {name: chance.choice(values) for name in names if chance.random() < 0.6}
        try:
            client.call(method, **params)
        except RemoteError as error:
            assert error.code in (-32000, -32602), (method, params, error)
    client.call("version")


def test_a_request_of_seventy_mebibytes_is_refused_and_the_next_one_served(raw):
    piece = b"x" * (1 << 20)
    for _ in range(70):
        raw.send(piece)
    reply = raw.send(b"\n").reply()
    assert reply["error"]["code"] == -32600
    assert reply["error"]["message"] == f"request is larger than {64 << 20} bytes"
    assert raw.send(REQUEST).reply()["id"] == 1


def test_the_limit_of_a_request_holds_on_both_sides(mapper, folder):
    line = json.dumps(REQUEST).encode()
    with ControlServer(mapper, f"{folder}/c.sock", max_request=len(line)) as server:
        raw = Raw(server.path)
        assert "result" in raw.send(line + b"\n").reply()
        assert "error" in raw.send(line + b" \n").reply()
        raw.close()


def test_the_client_refuses_a_request_that_the_server_would(client):
    with pytest.raises(OSError, match="request is larger than 64 MiB"):
        client.call("create", name="r0", table="x" * (64 << 20))


def test_half_a_request_then_silence_gets_an_error_and_the_end(raw, client, server):
    server.request_timeout = 0.3
    raw.send(b'{"jsonrpc"')
    reply = raw.reply()
    assert reply["error"]["message"] == "half a request, then silence for 0.3 s"
    assert raw.at_end()
    assert client.call("info") == []


def test_a_byte_now_and_then_does_not_hold_a_connection(raw, server):
    server.request_timeout = 0.3
    with pytest.raises(ConnectionError):
        for _ in range(1000):
            raw.send(b"x")
            time.sleep(0.01)


def test_an_idle_connection_may_stay(raw, server):
    server.request_timeout = 0.1
    time.sleep(0.3)
    server.request_timeout = 30.0
    assert raw.send(REQUEST).reply()["id"] == 1


def test_a_client_that_reads_no_replies_is_dropped(raw, server, client):
    client.call("create", name="r0", table="0 8 zero")
    server.request_timeout = 0.3
    line = json.dumps(REQUEST | {"method": "stats"}).encode() + b"\n"
    with pytest.raises((ConnectionError, TimeoutError)):
        for _ in range(100_000):
            raw.send(line * 100)
    wait_until(lambda: len(server._connections) == 1)


def test_a_thousand_connections_are_served(server, client):
    client.call("create", name="r0", table="0 8 zero")
    for _ in range(1000):
        with Client(server.path, timeout=30) as one:
            one.call("version")
    wait_until(lambda: len(server._connections) == 1)


def test_a_thousand_silent_connections_keep_nobody_out(mapper, folder):
    with ControlServer(mapper, f"{folder}/c.sock", max_connections=200) as server:
        held = [Raw(server.path) for _ in range(1000)]
        with Client(server.path, timeout=30) as client:
            assert client.call("info") == []
            assert len(server._connections) <= 200
        for raw in held:
            raw.close()


def test_an_idle_client_whose_connection_was_closed_calls_again(mapper, folder):
    with ControlServer(mapper, f"{folder}/c.sock", max_connections=1) as server:
        with Client(server.path, timeout=30) as first, Client(server.path, timeout=30) as second:
            for _ in range(2):
                first.call("version")
                second.call("version")


def test_too_many_requests_under_way_are_refused_with_a_sentence(mapper, folder, monkeypatch):
    monkeypatch.setattr(control, "_ROOM_PATIENCE", 0.05)
    with ControlServer(mapper, f"{folder}/c.sock", max_connections=1) as server:
        raw = Raw(server.path)
        raw.socket.sendall(b'{"jsonrpc"')
        wait_until(lambda: any(each.idle_since is None for each in server._connections))
        with Client(server.path, timeout=30) as second:
            error = refusal(second, "version")
        assert error.errno == errno.EAGAIN
        raw.close()


def test_other_users_are_refused(server, monkeypatch):
    monkeypatch.setattr(control, "_peer_uid", lambda sock: os.geteuid() + 4711)
    raw = Raw(server.path)
    reply = raw.reply()
    assert reply["error"]["data"]["errno_name"] == "EPERM"
    assert raw.at_end()
    raw.close()


def test_no_thread_and_no_descriptor_is_left_over(server, client):
    client.call("version")
    threads, fds = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for number in range(200):
        raw = Raw(server.path)
        raw.send([b"{", b"\n", json.dumps(REQUEST).encode() + b"\n"][number % 3])
        raw.close()
    wait_until(lambda: len(server._connections) == 1)
    wait_until(lambda: threading.active_count() == threads)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) == fds)


# --- the socket --------------------------------------------------------------------------------


def test_the_socket_is_for_its_owner_only(server, folder):
    assert os.stat(server.path).st_mode & 0o777 == 0o600
    assert os.listdir(folder) == ["control.sock"]


def test_a_dead_servers_socket_is_replaced(mapper, folder):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{folder}/c.sock")
    with ControlServer(mapper, f"{folder}/c.sock") as server, Client(server.path) as client:
        assert client.call("info") == []


def test_a_living_servers_socket_is_left_alone(server, mapper):
    with pytest.raises(DeviceError, match="another server answers there") as caught:
        ControlServer(mapper, server.path).start()
    assert caught.value.errno == errno.EBUSY
    with Client(server.path) as client:
        assert client.call("info") == []


def test_stop_removes_the_socket_and_ends_idle_connections(server, client):
    client.call("version")
    server.stop()
    server.stop()
    assert not os.path.exists(server.path)
    with pytest.raises(ServerGone, match="no dmpy server runs in"):
        client.call("version")


def test_a_path_too_long_for_a_socket_is_refused(mapper, tmp_path):
    path = str(tmp_path / ("x" * 108))
    with pytest.raises(DeviceError, match="path is too long for a socket"):
        ControlServer(mapper, path).start()
    with pytest.raises(OSError, match="path is too long for a socket"):
        Client(path)


def test_shutdown_replies_and_then_asks_for_the_stop(client, server):
    assert client.call("shutdown") == {}
    assert server.asked_to_stop.wait(20)


def test_shutdown_without_a_server_of_its_own_is_refused(mapper, folder):
    with ControlServer(mapper, f"{folder}/c.sock") as server, Client(server.path) as client:
        assert refusal(client, "shutdown").errno == errno.EOPNOTSUPP


# --- attachments -------------------------------------------------------------------------------


class Nodes:
    """In place of dmpy.attach: nodes that are only noted."""

    def __init__(self) -> None:
        self.held: dict[str, str] = {}
        self.users: dict[str, str] = {}
        self.exports: list[str] = []
        self.failure: OSError | None = None

    def attach(self, name, socket, runtime, *, readonly, block_size, as_file, export, uri):
        if self.failure is not None:
            raise self.failure
        assert name not in self.held
        self.exports.append(export)
        node = f"/dev/loop{900 + len(self.exports)}"
        self.held[name] = node
        return node

    def detach(self, name, runtime):
        if self.held[name] in self.users:
            raise OSError(errno.EBUSY, f"{self.held[name]} is busy")
        del self.held[name]

    def in_use(self, node):
        return self.users.get(node)

    def clean_up(self, runtime):
        return []


@pytest.fixture
def nodes(monkeypatch):
    fake = Nodes()
    monkeypatch.setattr(attachments, "attach", fake)
    return fake


@pytest.fixture
def attaching(nodes, mapper, folder):
    """A client of a server with a device folder."""
    mapper.create("old", "0 8 zero")
    info = {"devdir": f"{folder}/dev", "uri": f"nbd+unix:///?socket={folder}/nbd.sock"}
    with ControlServer(mapper, f"{folder}/c.sock", info=info) as server:
        with Client(server.path, timeout=30) as client:
            client.server = server
            client.devdir = Path(folder, "dev")
            yield client


def links(client) -> dict[str, str]:
    return {path.name: os.readlink(path) for path in client.devdir.iterdir()}


def test_a_removal_that_waits_for_requests_does_not_keep_the_server_from_ending(
    mapper, server, client, monkeypatch
):
    """`dmpy shutdown` and SIGTERM hung with it: requests fail only at the very end."""
    monkeypatch.setattr(control, "_STOP_PATIENCE", 0.2)
    client.call("create", name="low", table="0 8 zero")
    client.call("create", name="top", table="0 8 linear low 0")
    client.call("suspend", name="low")
    device = mapper.device("top")
    errors = []

    def read():
        try:
            device.preadv([memoryview(bytearray(512))], 0)
        except OSError as error:
            errors.append(error.errno)

    reader = threading.Thread(target=read)
    reader.start()
    wait_until(lambda: device.in_flight)
    remover = Raw(server.path)
    remover.send(REQUEST | {"method": "remove", "params": {"name": "top", "force": True}})
    wait_until(lambda: device.suspended)
    assert client.call("shutdown") == {}
    server.stop()
    mapper.close()
    reader.join(10)
    assert errors == [errno.ESHUTDOWN]
    remover.close()


def test_what_is_live_at_the_start_is_attached_before_the_first_reply(attaching):
    assert attaching.call("info", name="old")["attached"] == "/dev/loop901"
    assert links(attaching) == {"old": "/dev/loop901"}


def test_a_created_device_has_its_node_and_link_in_the_reply(attaching, nodes):
    info = attaching.call("create", name="r0", table="0 8 zero")
    assert info["attached"] == "/dev/loop902"
    assert info["open_count"] == 0
    assert links(attaching)["r0"] == "/dev/loop902"
    assert nodes.exports == ["attached/0", "attached/1"]


def test_a_device_without_a_table_is_attached_when_it_is_resumed(attaching):
    assert attaching.call("create", name="r0")["attached"] == ""
    attaching.call("load", name="r0", table="0 8 zero")
    assert attaching.call("resume", name="r0")["attached"] == "/dev/loop902"


def test_a_removed_device_loses_node_and_link(attaching, nodes):
    attaching.call("remove", name="old")
    assert (nodes.held, links(attaching)) == ({}, {})


def test_a_renamed_device_keeps_its_node_and_its_link_moves(attaching, nodes):
    attaching.call("rename", name="old", new_name="new")
    assert links(attaching) == {"new": "/dev/loop901"}
    attaching.call("create", name="old", table="0 8 zero")
    assert links(attaching) == {"new": "/dev/loop901", "old": "/dev/loop902"}
    attaching.call("remove", name="new")
    assert links(attaching) == {"old": "/dev/loop902"}
    assert list(nodes.held.values()) == ["/dev/loop902"]


def test_a_device_whose_node_is_used_is_open_and_not_removed(attaching, nodes):
    attaching.call("info")
    nodes.users["/dev/loop901"] = "mounted on /mnt: unmount it first"
    assert attaching.call("info", name="old")["open_count"] == 1
    assert refusal(attaching, "remove", name="old").errno == errno.EBUSY
    assert attaching.call("info", name="old")["attached"] == "/dev/loop901"
    error = refusal(attaching, "detach", name="old")
    assert error.errno == errno.EBUSY
    nodes.users.clear()
    assert attaching.call("info", name="old")["open_count"] == 0
    attaching.call("remove", name="old")


def test_a_device_whose_node_is_used_goes_later_when_that_was_asked_for(
    attaching, nodes, monkeypatch
):
    monkeypatch.setattr(attachments, "_POLL", 0.01)
    attaching.call("info")
    nodes.users["/dev/loop901"] = "mounted on /mnt: unmount it first"
    attaching.call("remove", name="old", deferred=True)
    assert attaching.call("info", name="old")["deferred_remove"] is True
    nodes.users.clear()
    wait_until(lambda: attaching.call("info") == [])
    assert (nodes.held, links(attaching)) == ({}, {})


def test_a_device_that_another_client_has_open_keeps_its_node(attaching, nodes, mapper):
    attaching.call("info")
    mapper.device("old").open()
    assert refusal(attaching, "remove", name="old").errno == errno.EBUSY
    assert links(attaching) == {"old": "/dev/loop901"}
    attaching.call("remove", name="old", deferred=True)
    mapper.device("old").release()
    wait_until(lambda: nodes.held == {} and links(attaching) == {})


def test_a_device_that_cannot_be_attached_is_not_created(attaching, nodes):
    attaching.call("info")
    nodes.failure = OSError(errno.ENODEV, "no loop devices here")
    error = refusal(attaching, "create", name="r0", table="0 8 zero")
    assert (error.errno, error.message) == (errno.ENODEV, "no loop devices here")
    nodes.failure = None
    assert [info["name"] for info in attaching.call("info")] == ["old"]


def test_a_file_in_the_device_folder_is_never_replaced(attaching, nodes):
    attaching.call("info")
    (attaching.devdir / "r0").write_text("mine")
    assert refusal(attaching, "create", name="r0", table="0 8 zero").errno == errno.EEXIST
    assert (attaching.devdir / "r0").read_text() == "mine"
    assert list(nodes.held) == ["old"]


def test_a_device_of_a_new_size_gets_a_new_node_unless_its_node_is_used(attaching, nodes):
    attaching.call("load", name="old", table="0 16 zero")
    assert attaching.call("resume", name="old")["attached"] == "/dev/loop902"
    assert links(attaching) == {"old": "/dev/loop902"}
    nodes.users["/dev/loop902"] = "open in process 1: close it first"
    attaching.call("load", name="old", table="0 8 zero")
    assert attaching.call("resume", name="old")["attached"] == "/dev/loop902"
    nodes.users.clear()


def test_a_suspended_device_is_removed_with_its_node(attaching, nodes):
    attaching.call("suspend", name="old")
    attaching.call("remove", name="old")
    assert nodes.held == {}


def test_links_that_a_dead_server_left_are_removed_and_others_stay(nodes, mapper, folder):
    os.mkdir(f"{folder}/dev")
    os.symlink("/dev/loop7", f"{folder}/dev/stale")
    os.symlink("../dm-0", f"{folder}/dev/theirs")
    info = {"devdir": f"{folder}/dev"}
    with ControlServer(mapper, f"{folder}/c.sock", info=info) as server:
        with Client(server.path, timeout=30) as client:
            client.call("info")
    assert os.listdir(f"{folder}/dev") == ["theirs"]


def test_shutdown_is_refused_while_a_node_is_used_unless_it_is_forced(nodes, mapper, folder):
    mapper.create("r0", "0 8 zero")
    asked = threading.Event()
    with ControlServer(mapper, f"{folder}/c.sock", shutdown=asked.set) as server:
        with Client(server.path, timeout=30) as client:
            node = client.call("attach", name="r0")["node"]
            nodes.users[node] = "mounted on /mnt: unmount it first"
            error = refusal(client, "shutdown")
            assert error.message == (
                f"the server cannot stop: {node} of r0 is mounted on /mnt: unmount it first"
            )
            assert not asked.is_set()
            client.call("shutdown", force=True)
            assert asked.wait(20)
            nodes.users.clear()
    assert nodes.held == {}


def test_attach_and_detach_without_a_device_folder(nodes, client):
    client.call("create", name="r0", table="0 8 zero")
    node = client.call("attach", name="r0")
    assert node == client.call("attach", name="r0") == {"node": "/dev/loop901"}
    assert client.call("detach", name="r0") == node
    assert refusal(client, "detach", name="r0").message == "device r0 is not attached"
    client.call("suspend", name="r0")
    assert refusal(client, "attach", name="r0").errno == errno.EBUSY
    client.call("create", name="empty")
    assert refusal(client, "attach", name="empty").errno == errno.ENXIO


def test_one_of_many_devices_is_made_and_removed_without_a_look_at_the_others(
    client, mapper, monkeypatch
):
    """With 10,000 devices each look took 2 ms."""
    client.call("create", name="other", table="0 8 zero")

    def look(*_: object):
        raise AssertionError("all devices were looked at")

    with monkeypatch.context() as patch:
        patch.setattr(mapper, "devices", look)
        patch.setattr(mapper, "_find", look)
        client.call("create", name="one", table="0 8 zero")
        client.call("remove", name="one")
    assert [each["name"] for each in client.call("info")] == ["other"]
