"""What the plugin scripts serve: the devices of a Mapper, as exports by name."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from urllib.parse import quote

from dmpy.attachments import EXPORT_PREFIX
from dmpy.backing import open_leaf
from dmpy.control import ControlServer
from dmpy.device import BlockDevice, BlockSize
from dmpy.errors import DeviceError
from dmpy.launch import clean_runtime
from dmpy.mapper import Mapper
from dmpy.metrics import MetricsServer, parse_address
from dmpy.nbd import Plugin, Refusal, nbdkit_version
from dmpy.state import Journal
from dmpy.table import escape
from dmpy.units import SECTOR_SHIFT, SECTOR_SIZE, parse_size, round_down

__all__ = ["MapperRegistry", "OneTablePlugin", "ServerPlugin", "leg_sizes"]

# A table of one line is its own description up to this many characters.
_LONGEST_LINE = 200


class MapperRegistry:
    """The devices of a mapper, each an export of its name.

    An attachment of the server's own opens `attached/MINOR`, which does not count as a user.

    Args:
        mapper: whose devices are served, as they come and go.
    """

    def __init__(self, mapper: Mapper) -> None:
        self._mapper = mapper

    def names(self) -> list[tuple[str, str]]:
        """Return the name and a description of each device."""
        return [(device.name, self.describe(device)) for device in self._mapper.devices()]

    def default(self) -> str:
        """Return the name of the only device, or "" where there are none or several."""
        devices = self._mapper.devices()
        return devices[0].name if len(devices) == 1 else ""

    def open(self, name: str, readonly: bool) -> BlockDevice:
        """Return a device and count its user.

        Raises:
            DeviceError: ENOENT when no device has the name; what the device says when it cannot be
                opened.
        """
        if not name:
            count = len(self._mapper.devices())
            raise DeviceError(errno.ENOENT, f"a name is needed where there are {count} exports")
        minor = name.removeprefix(EXPORT_PREFIX)
        try:
            if minor != name and minor.isascii() and minor.isdecimal():
                return self._mapper.device(minor=int(minor))
            device = self._mapper.device(name)
        except OSError:
            raise DeviceError(errno.ENOENT, "no device has this name") from None
        device.open(writable=not (readonly or device.readonly))
        return device

    def describe(self, device: BlockDevice) -> str:
        """Return the table, where it is one short line, else what it is made of."""
        table = device.live
        if table is None:
            return "no table"
        if len(table.lines) == 1:
            text = device.table_text()
            if len(text) <= _LONGEST_LINE:
                return text
        types = sorted({line.target.type_name for line in table.lines})
        return f"{len(table.lines)} lines of {', '.join(types)}"

    def block_size(self, device: BlockDevice) -> BlockSize:
        """Return the block sizes of a device."""
        return device.block_size

    def release(self, name: str, device: BlockDevice) -> None:
        """Undo one open()."""
        if not name.startswith(EXPORT_PREFIX):
            device.release()

    def watch(self, changed: Callable[[BlockDevice], None]) -> None:
        """Call `changed` whenever a device has another table."""

        def listen(event: str, device: BlockDevice) -> None:
            if event == "resumed":
                changed(device)

        self._mapper.listeners.append(listen)


class OneTablePlugin(Plugin):
    """A plugin that makes one device of its arguments and serves it.

    Arguments of each such plugin: name=NAME names the export (clients that do not name one get it
    anyway), loglevel=LEVEL. With nbdkit -r everything is opened for reading only.

    Args:
        name: of the device, unless name=NAME says otherwise.
        make_table: gives the table's text; called with the plugin when all arguments are known.
        options: names of further arguments, with their defaults; `values` has what was given.
        takes_files: file=PATH and bare arguments are collected in `files`.

    Attributes:
        files: paths and other table words, as given.
        values: value by option.
        cwd: the folder that nbdkit was started in; relative paths begin there.
    """

    has_mapped_devices = True

    def __init__(
        self,
        name: str,
        make_table: Callable[[OneTablePlugin], str],
        options: dict[str, str] | None = None,
        *,
        takes_files: bool = True,
    ) -> None:
        self.name = name
        self.files: list[str] = []
        self.values = dict(options or {})
        self.takes_files = takes_files
        self.cwd = os.getcwd()
        self._make_table = make_table
        self._mapper: Mapper | None = None

    def configure(self, key: str, value: str) -> None:
        """Take one argument."""
        if key == "file" and self.takes_files:
            self.files.append(value)
        elif key == "name":
            self.name = value
        elif key in self.values:
            self.values[key] = value
        else:
            known = ["name", "loglevel", *self.values] + ["file"] * self.takes_files
            raise Refusal(f"{key}: unknown argument (known are {', '.join(sorted(known))})")

    def prepare(self) -> None:
        """Make the device."""
        if self.takes_files and not self.files:
            raise Refusal(f"{self.name}: no files given (expected file names or mem:SIZE)")
        self._mapper = Mapper()
        self.registry = MapperRegistry(self._mapper)
        table = self._make_table(self)
        self._mapper.create(self.name, table, readonly=self.readonly, cwd=self.cwd)

    def interrupt(self) -> None:
        """Make requests that wait fail."""
        self._mapper.close()

    def stop(self) -> None:
        """Flush and close the device."""
        if self._mapper is not None:
            self._mapper.close()

    def size_argument(self, key: str) -> int:
        """Return the value of an option that is a size, in bytes.

        Raises:
            Refusal: it is not a size.
        """
        try:
            return parse_size(self.values[key])
        except ValueError as error:
            raise Refusal(f"{key}: {error}") from None


def leg_sizes(plugin: OneTablePlugin, multiple: int = SECTOR_SIZE) -> list[tuple[str, int]]:
    """Return each file of a plugin as a table word, and how much of it a table can use.

    Args:
        plugin: whose files they are.
        multiple: bytes; sizes are rounded down to a multiple of it.

    Returns:
        (word, sectors) for each file.

    Raises:
        OSError: a file cannot be opened.
        Refusal: a file is smaller than `multiple`.
    """
    found = []
    for word in plugin.files:
        leaf = open_leaf(word, readonly=plugin.readonly, cwd=plugin.cwd)
        size = leaf.size
        leaf.close()
        if size < multiple:
            raise Refusal(f"{word}: too small (got {size} bytes, expected at least {multiple})")
        found.append((escape(word), round_down(size, multiple) >> SECTOR_SHIFT))
    return found


class ServerPlugin(Plugin):
    """The server behind `dmpy`: all devices of a state folder, changed through the control socket.

    Arguments: runtime=FOLDER (control.sock appears there), state=FOLDER (the journal), and as
    wanted devdir=FOLDER (each device is attached and linked there), metrics=ADDRESS (Prometheus'
    text over HTTP, HOST:PORT or unix:PATH), tcp_uri=URI (where it is to be found over TCP, if
    nbdkit was told to listen there; with nbds: clients there need TLS), loglevel=LEVEL.
    """

    has_mapped_devices = True

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._mapper: Mapper | None = None
        self._journal: Journal | None = None
        self._control: ControlServer | None = None
        self._metrics: MetricsServer | None = None

    def configure(self, key: str, value: str) -> None:
        """Take one argument."""
        if key in ("runtime", "state", "devdir"):
            # nbdkit leaves the folder that it was started in.
            self._values[key] = os.path.abspath(value)
        elif key == "metrics":
            parse_address(value)
            self._values[key] = value
        elif key == "tcp_uri":
            self._values[key] = value
            self.tcp_needs_tls = value.startswith("nbds:")
        else:
            known = "devdir, loglevel, metrics, runtime, state, tcp_uri"
            raise Refusal(f"{key}: unknown argument (known are {known})")

    def prepare(self) -> None:
        """Take the state folder and rebuild its devices."""
        for key in ("runtime", "state"):
            if key not in self._values:
                raise Refusal(f"{key}: missing (expected {key}=FOLDER)")
        self._journal = Journal(self._values["state"])
        folders = ["/dev/mapper"]
        if "devdir" in self._values:
            folders.append(self._values["devdir"])
        self._mapper = Mapper(journal=self._journal, device_dirs=folders)
        self._mapper.restore()
        self.registry = MapperRegistry(self._mapper)

    def start(self, end: Callable[[], None]) -> None:
        """Serve the control socket, and metrics where they are wanted."""
        self._journal.sign()
        if "metrics" in self._values:
            metrics = MetricsServer(self._mapper, self._values["metrics"])
            metrics.start()
            self._metrics = metrics
        runtime = self._values["runtime"]
        nbd_socket = quote(self.socket or os.path.join(runtime, "nbd.sock"))
        info = {
            "uri": f"nbd+unix:///?socket={nbd_socket}",
            "tcp_uri": self._values.get("tcp_uri"),
            "runtime": runtime,
            "state": self._values["state"],
            "devdir": self._values.get("devdir"),
            "metrics": self._metrics.address if self._metrics is not None else None,
            "nbdkit": nbdkit_version(),
        }
        control = ControlServer(
            self._mapper, os.path.join(runtime, "control.sock"), info=info, shutdown=end
        )
        control.start()
        self._control = control

    def retire(self) -> None:
        """Detach what is attached and stop taking commands."""
        if self._control is not None:
            self._control.stop()
        if self._metrics is not None:
            self._metrics.stop()

    def interrupt(self) -> None:
        """Make requests that wait fail."""
        self._mapper.close()

    def stop(self) -> None:
        """Flush and close every device, and let go of the state folder."""
        self.retire()
        try:
            if self._mapper is not None:
                self._mapper.close()
        finally:
            if self._journal is not None:
                self._journal.close()
            # What is left there tells that a server died.
            if self._control is not None:
                clean_runtime(self._values["runtime"])
