"""One run of dmsetup: its options, its driver, its report, and what verbs have in common."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from dmpy.cli.dmsetup_driver import Address, Driver, Failed, has_disk, log_error, log_print
from dmpy.cli.dmsetup_options import Options
from dmpy.cli.format import info_block

__all__ = ["Run", "Verb"]


class Verb(NamedTuple):
    """A verb of the command line.

    Attributes:
        name: the word.
        least, most: how many words may follow; None: any number.
        repeats: it is called for each word in turn, or for all devices; 2: -S chooses devices.
        function: called as function(run, words, info, several), where `info` is a device of
            `Driver.devices` when all are gone through, else None; raises Failed.
        usage: what may follow, for the help.
    """

    name: str
    least: int
    most: int | None
    repeats: int
    function: Callable[..., None]
    usage: str


class Run:
    """What a verb works with.

    Attributes:
        options: the command line.
        driver: the server.
        verb: the verb that runs.
        report: of `info -c` and `splitname`; else None.
        names: how `ls` and `deps` show devices: "devno", "blkdevname" or "devname".
        concise: whether `table --concise` has printed a device.
    """

    def __init__(self, options: Options, driver: Driver, verb: Verb) -> None:
        self.options = options
        self.driver = driver
        self.verb = verb
        self.report: Any = None
        self.selected_verb: Verb | None = None
        self.names = "devno"
        self.concise = False
        self._graph: tuple | None = None
        self._listed: dict[str, Any] = {}

    # -- Devices ----------------------------------------------------------------------------------

    def address(self, word: str | None) -> Address:
        """Return the address that a word gives, or the options where there is no word.

        Raises:
            Failed: there is neither, or the name is no device's.
        """
        if word is not None:
            return self.driver.by_name(word)
        if self.options["uuid"]:
            return Address(uuid=self.driver.mangled(self.options.text("uuid"), "UUID"))
        if self.options["major"]:
            return Address(major=self.options.number("major"), minor=self.options.number("minor"))
        log_error("No device specified.")
        raise Failed

    def names_all(self, words: list[str]) -> bool:
        """Whether the verb is about all devices: none is named."""
        return not words and not self.options.addressed

    def all_devices(self, function: Callable[..., None], words: list[str],
                    *, silent: bool = False) -> None:
        """Call a verb's function for every device.

        Raises:
            Failed: for one of them it failed; the others were gone through all the same.
        """
        infos = self.driver.devices()
        if not infos and not silent:
            log_print("No devices found")
        failed = False
        for info in infos:
            try:
                function(self, words, info, True)
            except Failed:
                failed = True
        if failed:
            raise Failed

    def listing(self, method: str, **params: Any) -> dict[str, Any]:
        """Return the results of `table`, `status` or `deps` of all devices, by kept name.

        Asked once: a verb that goes through all devices needs one call instead of one each.
        """
        key = method + repr(sorted(params.items()))
        if key not in self._listed:
            self._listed[key] = {entry["name"]: entry
                                 for entry in self.driver.ask(method, **params)}
        return self._listed[key]

    def graph(self) -> tuple:
        """Return the graph of all devices, and the control protocol's `deps` of all."""
        from dmpy.cli.dmsetup_tree import Graph

        if self._graph is None:
            deps = self.driver.ask("deps")
            self._graph = Graph(self.driver.devices(), deps), deps
        return self._graph

    def forget(self) -> None:
        """Ask again what was asked: for the next of several reports."""
        self._graph = None
        self._listed.clear()

    # -- Output -----------------------------------------------------------------------------------

    def show_info(self, info: dict[str, Any]) -> None:
        """Print a device's state, as a block or as a row of the report.

        Args:
            info: `Driver.shown` info.

        Raises:
            Failed: a field cannot be told.
        """
        if self.options["columns"]:
            chosen = self.report.add(info, show=self.selected_verb is None)
            if chosen and self.selected_verb is not None:
                self.selected_verb.function(self, [info["name"]], None, True)
            return
        if not has_disk(info):
            log_error(f"{self.driver.dm_dir}/{info['name']}: open failed: "
                      "No such file or directory")
        log_print(info_block(info))
        log_print("")

    def show_state(self, address: Address) -> None:
        """Print a device's state after a verb, if -v asks for it."""
        if self.options["verbose"]:
            info = self.driver.find(address)
            if info is None:
                log_error("Device does not exist.")
                raise Failed
            self.show_info(self.driver.shown(info))

    def node(self, info: dict[str, Any]) -> str:
        """Return the path of a device's node."""
        return os.path.join(self.driver.dm_dir, info["name"])


