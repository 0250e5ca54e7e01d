"""Which devices of a server have a node (/dev/nbd0, /dev/loop0), and the folder of links to nodes.

An attachment is a client like any other, but it must not keep its own device from being removed.
So it connects to the export `attached/MINOR`, which does not count as an opener; what counts is
whether somebody uses the node. A device name holds no slash, so the two cannot be confused.

With a device folder (`dmpy serve --devdir DIR`) each device is attached as soon as it is live, and
DIR/NAME is a link to its node, as /dev/mapper/NAME is.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from dmpy import attach
from dmpy.errors import DeviceError

if TYPE_CHECKING:
    from dmpy.mapped import MappedDevice
    from dmpy.mapper import Mapper

__all__ = ["EXPORT_PREFIX", "Attachments"]

EXPORT_PREFIX = "attached/"
"""What an export's name begins with when its opener is an attachment; the minor follows."""

# Seconds between two looks at a node whose device goes when nobody uses it any more.
_POLL = 0.5
# Seconds that close() waits for others to be done with nodes.
_CLOSE_PATIENCE = 10.0

_log = logging.getLogger(__name__)


# What is known of one attached device.
class _Attached(NamedTuple):
    device: MappedDevice
    label: str  # under which it was attached: detach wants the same, whatever the name is now
    node: str
    size: int  # bytes, of the device when it was attached
    link: str | None


class Attachments:
    """The attached devices of one Mapper.

    Args:
        mapper: whose devices.
        runtime: the runtime folder; what is attached is recorded there.
        uri: where the server's exports are, `nbd+unix:///?socket=PATH` or with TLS.
        devdir: folder that gets a link to each device's node, or None. Made where missing.
    """

    def __init__(
        self, mapper: Mapper, runtime: str, *, uri: str | None = None, devdir: str | None = None
    ) -> None:
        self._mapper = mapper
        self._runtime = runtime
        self._uri = uri
        self.devdir = devdir
        # Protects _attached and _closing, and lets one attach or detach run at a time. Held while
        # programs run; the Mapper's locks may be taken under it, never the other way round.
        self._lock = threading.RLock()
        self._attached: dict[int, _Attached] = {}
        self._closing = threading.Event()
        mapper.listeners.append(self._on_event)

    def node(self, device: MappedDevice) -> str:
        """Return the device's node, or "" when it has none."""
        found = self._find(device)
        return found.node if found is not None else ""

    def use(self, device: MappedDevice) -> str | None:
        """Say who uses the device's node (mounted, held, open), or None."""
        node = self.node(device)
        return _use(node) if node else None

    def attach(self, device: MappedDevice, *, as_file: bool = False) -> str:
        """Give a device its node; one that has a node keeps it.

        Args:
            device: must be live and not suspended.
            as_file: a file in place of a block device, which needs no root.

        Returns:
            The path of the node.

        Raises:
            OSError: ENXIO without a live table, EBUSY while suspended, and what `dmpy.attach`
                raises.
        """
        with self._lock:
            found = self._find(device)
            if found is not None:
                return found.node
            if self._closing.is_set():
                raise DeviceError(errno.ESHUTDOWN, "the server is stopping", device=device.name)
            if device.live is None:
                raise DeviceError(
                    errno.ENXIO, f"device {device.name}: no table is live", device=device.name
                )
            if device.suspended:
                raise DeviceError(
                    errno.EBUSY, f"device {device.name} is suspended: resume it, then attach it",
                    device=device.name,
                )
            if device.minor in self._attached:
                self._detach(device.minor)  # of a device that is gone, whose minor this one got
            label = self._free_label(device)
            node = attach.attach(
                label,
                os.path.join(self._runtime, "nbd.sock"),
                self._runtime,
                readonly=device.readonly,
                block_size=device.block_size.minimum,
                as_file=as_file,
                export=f"{EXPORT_PREFIX}{device.minor}",
                uri=self._export_uri(device.minor),
            )
            entry = _Attached(device, label, node, device.size, None)
            try:
                self._attached[device.minor] = self._link(device.name, entry)
            except OSError:
                attach.detach(label, self._runtime)
                raise
            return node

    def detach(self, device: MappedDevice) -> str:
        """Take a device's node away, everything flushed.

        Returns:
            The path of the node that it had.

        Raises:
            OSError: ENXIO when it has none, EBUSY while somebody uses it.
        """
        with self._lock:
            node = self.node(device)
            if not node:
                raise DeviceError(
                    errno.ENXIO, f"device {device.name} is not attached", device=device.name
                )
            self._detach(device.minor)
            return node

    def became_live(self, device: MappedDevice) -> None:
        """Attach a device when there is a device folder, and again when its size has changed.

        A node whose size is not the device's any more but which is in use keeps its old size: NBD
        cannot tell a client of a new one.
        """
        with self._lock:
            found = self._find(device)
            if found is not None and found.size != device.size and device.live is not None:
                user = _use(found.node)
                if user is not None:
                    _log.warning("%s of device %s keeps its old size: it is %s",
                                 found.node, device.name, user)
                    return
                self._detach(device.minor)
                self.attach(device)
            elif self.devdir is not None and device.live is not None and not device.suspended:
                self.attach(device)

    def renamed(self, device: MappedDevice) -> None:
        """Move the device's link to its new name."""
        with self._lock:
            found = self._find(device)
            if found is not None and found.link is not None:
                self._attached[device.minor] = self._link(device.name, found)
                if found.link != self._attached[device.minor].link:
                    _unlink(found.link)

    @contextmanager
    def removal(self, device: MappedDevice, *, deferred: bool) -> Iterator[None]:
        """Surround the removal of a device.

        A node that is in use makes the device open, so that the Mapper refuses the removal (or
        puts it off); a node that nobody uses is detached first, and attached again if the Mapper
        refuses all the same.
        """
        # Without the lock, since a removal can wait for requests, and those for ever. What is
        # attached meanwhile goes when the Mapper tells of the removal.
        if self._find(device) is None:
            yield
            return
        with self._lock:
            if self._find(device) is None:
                yield
                return
            if _use(self.node(device)) is not None:
                device.open()
                try:
                    yield
                except BaseException:
                    device.release()
                    raise
                if deferred:
                    self._release_when_unused(device)
                else:
                    device.release()
                return
            if device.open_count:
                yield  # refused or put off: either way the node stays for now
                return
            self._make_quiet(device)
            self._detach(device.minor)
            try:
                yield
            except BaseException:
                with suppress(OSError):
                    self.attach(device)
                raise

    def start(self) -> None:
        """Clean up after a server that died, then attach what is live where there is a folder.

        Never raises: what goes wrong is logged, device by device.
        """
        try:
            for complaint in attach.clean_up(self._runtime):
                _log.warning("left by an earlier server: %s", complaint)
            if self.devdir is not None:
                os.makedirs(self.devdir, exist_ok=True)
                self._remove_stale_links()
        except OSError as error:
            _log.error("cannot clean up what an earlier server left attached: %s", error)
        for device in self._mapper.devices():
            if self._closing.is_set():
                return
            try:
                self.became_live(device)
            except OSError as error:
                _log.error("device %s cannot be attached: %s", device.name, error)

    def users(self) -> list[str]:
        """Say of each node in use who uses it, as sentences."""
        found = [(each, _use(each.node)) for each in list(self._attached.values())]
        return [f"{each.node} of {each.device.name} is {user}" for each, user in found if user]

    def refuse_more(self) -> None:
        """Attach nothing from now on; what is being attached is waited for by close()."""
        self._closing.set()

    def close(self) -> None:
        """Detach everything that nobody uses; what is in use is logged and stays."""
        self.refuse_more()
        # Whoever has the lock may wait for requests that only fail once this is over.
        if not self._lock.acquire(timeout=_CLOSE_PATIENCE):
            _log.error("nodes stay attached: one is being attached, detached or removed")
            return
        try:
            for minor, found in list(self._attached.items()):
                try:
                    self._make_quiet(found.device)
                    self._detach(minor)
                except OSError as error:
                    _log.error("%s of device %s stays attached: %s",
                               found.node, found.device.name, error)
        finally:
            self._lock.release()

    def _find(self, device: MappedDevice) -> _Attached | None:
        found = self._attached.get(device.minor)
        return found if found is not None and found.device is device else None

    # The device's name, unless a device that had this name before holds it.
    def _free_label(self, device: MappedDevice) -> str:
        taken = {each.label for each in self._attached.values()}
        label = device.name
        while label in taken:
            label += f"~{device.minor}"
        return label

    # The URI of an attachment's export, from that of the server; None leaves it to dmpy.attach.
    def _export_uri(self, minor: int) -> str | None:
        if self._uri is None:
            return None
        server, slash, query = self._uri.partition("/?")
        assert slash, f"{self._uri} is not the URI of a server"
        return f"{server}/{EXPORT_PREFIX}{minor}?{query}"

    def _detach(self, minor: int) -> None:
        found = self._attached[minor]
        attach.detach(found.label, self._runtime)
        del self._attached[minor]
        if found.link is not None:
            _unlink(found.link)

    # Detaching flushes, and a suspended device would keep that waiting for ever. Its inactive
    # table goes, so that it comes back with the table it has.
    def _make_quiet(self, device: MappedDevice) -> None:
        if device.suspended:
            self._mapper.clear(device.name)
            self._mapper.resume(device.name)

    def _link(self, name: str, entry: _Attached) -> _Attached:
        if self.devdir is None:
            return entry
        path = os.path.join(self.devdir, name)
        if name in {".", ".."} or (os.path.lexists(path) and not os.path.islink(path)):
            raise DeviceError(errno.EEXIST, f"{path} exists and is no link: it stays", device=name)
        aside = os.path.join(self.devdir, f".dmpy-{os.getpid()}")
        with suppress(FileNotFoundError):
            os.unlink(aside)
        os.symlink(entry.node, aside)
        os.rename(aside, path)
        return entry._replace(link=path)

    # Links of a server that died: those to nodes as we make them which are no device's any more.
    def _remove_stale_links(self) -> None:
        ours = os.path.join(os.path.realpath(self._runtime), "attached") + os.sep
        for name in os.listdir(self.devdir):
            path = os.path.join(self.devdir, name)
            if os.path.islink(path) and os.readlink(path).startswith(
                ("/dev/nbd", "/dev/loop", ours)
            ):
                _unlink(path)

    # A device that goes when it is closed (deferred removal) takes its node along. The Mapper
    # calls this in the thread that closed it, which must not wait for programs.
    def _on_event(self, event: str, device: MappedDevice) -> None:
        found = self._find(device) if event == "removed" else None
        if found is not None:
            threading.Thread(
                target=self._detach_removed, args=(device.minor, found), daemon=True
            ).start()

    def _detach_removed(self, minor: int, found: _Attached) -> None:
        with self._lock:
            if self._attached.get(minor) is not found:
                return
            try:
                self._detach(minor)
            except OSError as error:
                _log.error("%s of device %s, which is gone, stays attached: %s",
                           found.node, found.device.name, error)

    # Stand for the users of a node as an opener of the device until they are gone.
    def _release_when_unused(self, device: MappedDevice) -> None:
        def watch() -> None:
            while not self._closing.wait(_POLL):
                with self._lock:
                    found = self._find(device)
                    if found is not None and _use(found.node) is not None:
                        continue
                    try:
                        if found is not None:
                            self._detach(device.minor)
                    except OSError as error:
                        _log.warning("device %s, to be removed: %s", device.name, error)
                        continue
                break
            device.release()

        threading.Thread(target=watch, name=f"deferred-{device.name}", daemon=True).start()


# Who uses a node. One that cannot be looked at counts as used: its device must not go.
def _use(node: str) -> str | None:
    try:
        return attach.in_use(node)
    except OSError as error:
        return f"perhaps in use: {error.strerror}"


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
