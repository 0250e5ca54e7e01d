"""What libdevmapper is to dmsetup: names, addresses, calls to the driver and its error messages.

The driver is the dmpy server; a call that the kernel would answer with an errno is one of the
control protocol's here, and its failure is worded as libdm words that of the ioctl. Names and
uuids are kept by the driver with unusual characters as \\xNN ("mangled"), and shown without.

Source: lvm2 v2_03_16 libdm/libdm-common.c, mangle_string(), unmangle_string(),
_dm_task_set_name_from_path(); libdm/ioctl/libdm-iface.c, _do_dm_ioctl(), dm_task_run().
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any, NamedTuple, NoReturn

from dmpy.cli.format import DM_MAJOR
from dmpy.client import Client, ServerGone

__all__ = [
    "Address", "Driver", "Failed", "NAME_LENGTH", "UUID_LENGTH", "has_disk", "log_error",
    "log_print", "mangle", "unescape", "unmangle",
]

NAME_LENGTH = 128  # bytes of a name, with the zero at its end, in the kernel's struct dm_ioctl
UUID_LENGTH = 129

# Characters that need no mangling, beside ASCII letters and digits.
_PLAIN = "#+-.:=@_"
_TWICE = "\\x5cx"  # a backslash that was mangled itself

_REMOVE_RETRIES = 25
_REMOVE_DELAY = 0.2  # seconds


class Failed(Exception):
    """A verb that has failed and has said so; `errno` is the driver's, 0 when it was not asked."""

    def __init__(self, number: int = 0) -> None:
        super().__init__(number)
        self.errno = number


def log_error(text: str) -> None:
    """Say something went wrong: a line on standard error."""
    sys.stderr.write(text + "\n")


def log_print(text: str) -> None:
    """Say something: a line on standard output."""
    sys.stdout.write(text + "\n")


# -- Names ----------------------------------------------------------------------------------------


def _is_plain(character: str) -> bool:
    return character in _PLAIN or character.isascii() and character.isalnum()


# Refuse a name whose backslash was mangled; only `auto` cannot tell what it means.
def _check_mangled_once(text: str, what: str, mode: str) -> None:
    if mode == "auto" and _TWICE in text:
        log_error(f'The {what} "{text}" seems to be mangled more than once. '
                  "This is not allowed in auto mode.")
        raise Failed


def mangle(text: str, what: str, mode: str, limit: int = NAME_LENGTH) -> str:
    """Return `text` with each unusual byte as \\xNN.

    Args:
        text: a name or a uuid.
        what: what to call it in an error: "name", "new name", "UUID".
        mode: "auto" keeps what is mangled already, "hex" mangles its backslashes too; "none"
            is treated as "auto".
        limit: the bytes that the result may take, with a zero at its end.

    Raises:
        Failed: mangled and unmangled parts are mixed, or the result is too long.
    """
    data = os.fsencode(text)
    out = []
    state = None  # None: not known yet; False: mangled already; True: needs mangling
    i = 0
    while i < len(data):
        character = chr(data[i])
        if mode != "hex" and data[i:i + 2] == b"\\x":
            if len(data) - i < 4 or state is True:
                _refuse_mixture(text, what)
            out.append(data[i:i + 4].decode("latin-1"))
            state = False
            i += 4
            continue
        if _is_plain(character):
            out.append(character)
        else:
            if mode != "hex" and state is False:
                _refuse_mixture(text, what)
            out.append(f"\\x{data[i]:02x}")
            state = True
        i += 1
    mangled = "".join(out)
    if len(mangled) >= limit:
        log_error(f'Mangled form of the {what} too long for "{text}".')
        raise Failed
    return mangled


def _refuse_mixture(text: str, what: str) -> None:
    log_error(f'The {what} "{text}" contains mixed mangled and unmangled characters or '
              "it's already mangled improperly.")
    raise Failed


def unmangle(text: str, what: str, mode: str) -> str:
    """Return `text` with each \\xNN as the byte that it stands for.

    Args:
        mode: "none" returns the text as it is.

    Raises:
        Failed: the text has characters that should have been mangled, or was mangled twice.
    """
    if mode == "none":
        return text
    _check_mangled_once(text, what, mode)
    if not all(_is_plain(character) or character == "\\" for character in text):
        log_error(f'The {what} "{text}" should be mangled but it contains '
                  "blacklisted characters.")
        raise Failed
    return unescape(text)


def unescape(text: str) -> str:
    """Return `text` with each \\xNN as its byte, whatever else is in it."""
    if "\\x" not in text:
        return text
    data = os.fsencode(text)
    out = bytearray()
    i = 0
    while i < len(data):
        try:
            if data[i:i + 2] != b"\\x":
                raise ValueError
            out.append(int(data[i + 2:i + 4], 16))
            i += 4
        except ValueError:
            out.append(data[i])
            i += 1
    return os.fsdecode(bytes(out))


def has_disk(info: dict[str, Any]) -> bool:
    """Whether the kernel would show a block device: only once a table was loaded."""
    return bool(info["live_table"] or info["inactive_table"])


# -- Calls ----------------------------------------------------------------------------------------


class Address(NamedTuple):
    """The device that a call is about, in one of libdm's three ways.

    Attributes:
        name: as the driver keeps it, mangled; empty when addressed otherwise.
        uuid: likewise.
        major, minor: -1 when addressed otherwise.
    """

    name: str = ""
    uuid: str = ""
    major: int = -1
    minor: int = -1

    def selector(self) -> dict[str, Any]:
        """The control protocol's words for it."""
        if self.name or not self.uuid and self.major < 0:
            return {"name": self.name}
        return {"uuid": self.uuid} if self.uuid else {"minor": self.minor}

    def __str__(self) -> str:
        """As it stands in an error message: name, blank, then uuid and number, if any."""
        number = f"({self.major}:{self.minor})" if self.major > 0 else ""
        return f"{self.name} {self.uuid}{number}"


# Start a server where none was started yet. One that died is not replaced behind the user's back.
def _connect() -> Client:
    runtime = os.environ.get("DMPY_RUNTIME_DIR")
    if not runtime:
        from dmpy import launch

        runtime = str(launch.runtime_dir())
    socket = os.path.join(runtime, "control.sock")
    try:
        return Client(socket)
    except ServerGone as gone:
        if gone.died or gone.pid is not None:
            raise
    from dmpy import launch

    launch.start_server()
    return Client(socket)


class Driver:
    """The dmpy server, asked as libdm asks the kernel. It is started when it does not run.

    Args:
        mangling: "none", "auto" or "hex": how names are shown and taken.

    Attributes:
        verbose: say the server's own sentence after libdm's.
        inactive: the number of targets is that of a device's inactive table.
    """

    def __init__(self, mangling: str = "auto") -> None:
        self.mangling = mangling
        self.verbose = False
        self.inactive = False
        self._client: Any = None
        self._devdir: str | None = None
        self._dev_dir = os.environ.get("DM_DEV_DIR") or "/dev/"

    @property
    def dm_dir(self) -> str:
        """The folder of the device nodes: $DM_DEV_DIR/mapper, or the server's own --devdir."""
        return self.devdir or os.path.join(self._dev_dir, "mapper")

    @property
    def devdir(self) -> str:
        """The folder in which the server shows attached devices; empty when it does not."""
        if self._devdir is None:
            self._devdir = self.client.call("server").get("devdir") or ""
        return self._devdir

    @property
    def client(self) -> Any:
        """The connection to the server."""
        if self._client is None:
            self._client = _connect()
        return self._client

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def ask(self, method: str, **params: Any) -> Any:
        """Call `method` of the control protocol; OSError with the errno when it fails."""
        return self.client.call(method, **params)

    def call(self, ioctl: str, method: str, address: Address, **params: Any) -> Any:
        """Call `method` about a device, on behalf of libdm's `ioctl`.

        Raises:
            Failed: it was refused; libdm's message is on standard error.
        """
        try:
            return self.ask(method, **self.selector(address), **params)
        except OSError as error:
            self.fail(ioctl, address, error)

    def selector(self, address: Address) -> dict[str, Any]:
        """Return the control protocol's words for an address.

        Raises:
            OSError: ENXIO for the number of a device that cannot be ours.
        """
        if address.major >= 0 and address.major != DM_MAJOR:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        return address.selector()

    def fail(self, ioctl: str, address: Address, error: OSError) -> NoReturn:
        """Say that an ioctl failed, as libdm does; with -vv, the server's own sentence too.

        Raises:
            Failed: always.
        """
        if isinstance(error, ServerGone):
            raise error
        number = error.errno or errno.EIO
        log_error(f"device-mapper: {ioctl} ioctl on {address} failed: {os.strerror(number)}")
        if self.verbose and error.strerror and error.strerror != os.strerror(number):
            log_error(error.strerror)
        raise Failed(number)

    def find(self, address: Address) -> dict[str, Any] | None:
        """Return a device's info, its names mangled; None when there is no such device."""
        try:
            return self.ask("info", **self.selector(address))
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            self.fail("info", address, error)

    def shown(self, info: dict[str, Any]) -> dict[str, Any]:
        """Return a device's info with name and uuid as they are shown; `kernel_name` is as kept.

        Raises:
            Failed: a name cannot be shown in this mangling mode.
        """
        lines = info["targets"]
        if self.inactive:
            lines = len(self.ask("table", minor=info["minor"], inactive=True)["lines"])
        return {
            **info,
            "targets": lines,
            "kernel_name": info["name"],
            "name": unmangle(info["name"], "name", self.mangling),
            "uuid": unmangle(info["uuid"], "UUID", self.mangling),
        }

    def devices(self) -> list[dict[str, Any]]:
        """Return `shown` info of all devices, sorted by the name the driver keeps.

        Raises:
            Failed: a name cannot be shown in this mangling mode.
        """
        infos, failed = [], False
        for info in sorted(self.ask("info"), key=lambda info: os.fsencode(info["name"])):
            try:
                infos.append(self.shown(info))
            except Failed:
                failed = True
        if failed:
            raise Failed
        return infos

    # -- Addresses --------------------------------------------------------------------------------

    def by_name(self, name: str) -> Address:
        """Return the address of a device named on the command line, by name or by path.

        Raises:
            Failed: the name is too long or improperly mangled, or the path leads to no device.
        """
        if "/" in name:
            return Address(name=self._name_of_path(name))
        if len(os.fsencode(name)) >= NAME_LENGTH:
            log_error(f'Name "{name}" too long.')
            raise Failed
        return Address(name=self.mangled(name, "name"))

    def mangled(self, text: str, what: str) -> str:
        """Return a name or uuid of the command line as the driver keeps it.

        Raises:
            Failed: it is improperly mangled.
        """
        if self.mangling == "none":
            return text
        _check_mangled_once(text, what, self.mangling)
        limit = UUID_LENGTH if "UUID" in what else NAME_LENGTH
        try:
            return mangle(text, what, self.mangling, limit)
        except Failed:
            end = "." if what in ("name", "UUID") else ""
            kind = {"name": "device name", "new name": "new device name",
                    "UUID": "device uuid", "new UUID": "new device UUID"}[what]
            log_error(f'Failed to mangle {kind} "{text}"{end}')
            raise

    # The name of the device that a path is a node of. Without nodes (no --devdir), a path straight
    # into the folder where they would be still names its device.
    def _name_of_path(self, path: str) -> str:
        folders = {os.path.join(self._dev_dir, "mapper"), self.devdir} - {""}
        full = path
        if not path.startswith("/") and path.count("/") == 1 and not os.path.exists(path):
            full = os.path.normpath(os.path.join(self._dev_dir, path))
        folder, name = os.path.split(full)
        folder = os.path.realpath(folder)
        if folder in map(os.path.realpath, folders):
            info = self.find(Address(name=name))
            if info is not None:
                return name
        try:
            number = os.stat(full).st_rdev
        except OSError:
            number = 0
        for info in self.ask("info") if number else ():
            node = info.get("attached")
            if node and os.path.exists(node) and os.stat(node).st_rdev == number:
                return info["name"]
        log_error(f"Device {name if number else path} not found")
        raise Failed

    # -- Verbs that need more than one call -------------------------------------------------------

    def remove(self, address: Address, *, retry: bool, deferred: bool) -> None:
        """Remove a device; with `retry`, for five seconds while it is busy.

        Raises:
            Failed: it cannot be removed.
        """
        import time

        for left in range(_REMOVE_RETRIES, 0, -1):
            try:
                self.call("remove", "remove", address, force=False, deferred=deferred)
                return
            except Failed as failed:
                if not (retry and failed.errno == errno.EBUSY and left > 1):
                    raise
            time.sleep(_REMOVE_DELAY)

    def remove_all(self, *, deferred: bool) -> None:
        """Remove every device that nobody has open; those below them follow."""
        again = True
        while again:
            again = False
            for info in self.ask("info"):
                if info["open_count"]:
                    continue
                try:
                    self.ask("remove", minor=info["minor"], force=False, deferred=False)
                    again = True
                except OSError as error:
                    if error.errno not in (errno.EBUSY, errno.ENXIO):
                        raise
        for info in self.ask("info") if deferred else ():
            self.ask("remove", minor=info["minor"], force=False, deferred=True)

    def free_minor(self) -> int:
        """Return the minor number that the next device gets: the lowest free one."""
        taken = {info["minor"] for info in self.ask("info")}
        return next(minor for minor in range(len(taken) + 1) if minor not in taken)
