"""Starts dmpy's own server on the ground and creates devices in it, as a user's commands do."""
from __future__ import annotations

from dmpy import launch
from dmpy.client import Client
from dmpy.errors import DeviceError

from .fio import BenchmarkError
from .ground import Ground, Server

__all__ = ["client", "create"]

_RUNTIME = "dmpy"


# The server's process: one for all devices, started when the first is wanted.
def _process(ground: Ground):
    def start():
        runtime, state = ground.folder / _RUNTIME, ground.folder / f"{_RUNTIME}-state"
        for folder in (runtime, state):
            folder.mkdir(mode=0o700)
        try:
            argv = launch.server_command(str(runtime), str(state))
            environment = launch.server_environment()
        except DeviceError as error:
            raise BenchmarkError(str(error)) from error
        return ground.serve("dmpy", argv, runtime / "control.sock", environment)

    return ground.once("dmpy process", start)


def client(ground: Ground) -> Client:
    """A connection of its own to the server's control socket."""
    _process(ground)
    connection = Client(launch.control_socket(str(ground.folder / _RUNTIME)))
    ground.defer(connection.close)
    return connection


def create(ground: Ground, name: str, table: str) -> Server:
    """Creates a device and returns its export.

    Raises:
        BenchmarkError: the server does not start or refuses the table.
    """
    process = _process(ground)
    connection = ground.once("dmpy client", lambda: client(ground))
    try:
        connection.call("create", name=name, table=table)
    except OSError as error:
        raise BenchmarkError(f"{name}: {error.strerror or error}") from error
    return Server(launch.device_uri(name, str(ground.folder / _RUNTIME)), process.pid)
