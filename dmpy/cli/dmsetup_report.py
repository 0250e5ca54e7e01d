"""The tables of `dmsetup info -c` and `splitname`: libdm's reports.

Fields are named without regard to case and underscores, several by one word (`all`, `info_all`).
Rows come in the devices' order or sorted by -O; a field that cannot be told drops its row and
fails the verb; -S chooses rows (dmsetup_select.py).

Source: lvm2 v2_03_16 libdm/libdm-report.c, dm_report_init(), _do_report_object(),
_output_field(); libdm/dm-tools/dmsetup.c, _report_init() and the report fields.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dmpy.cli.dmsetup_driver import (
    NAME_LENGTH, UUID_LENGTH, Failed, has_disk, log_error, log_print, mangle, unescape,
)
from dmpy.cli.dmsetup_options import Options
from dmpy.cli.dmsetup_tree import Graph, Node
from dmpy.cli.format import DM_MAJOR, FIELDS, READ_AHEAD_SECTORS, Field

__all__ = ["Column", "Report", "find_column", "help_columns"]

_DEFAULT = "name,major,minor,attr,open,segments,events,uuid"
_SPLITNAME = "vg_name,lv_name,lv_layer"

# The kinds of fields, libdm's report types, each with the word that its "all" begins with.
_PREFIXES = {"task": "name_", "info": "info_", "deps": "deps_", "tree": "tree_",
             "name": "splitname_", "stats": "stats_", "region": "region_"}
_KINDS = {"Mapped Device Name": "task", "Mapped Device Information": "info",
          "Mapped Device Name Components": "name"}
# Within the section of relations, what comes from the driver and not from the tree.
_DEPS_FIELDS = ("device_count", "devnos_used", "blkdevs_used")

# Fields of dm-stats regions. dmpy keeps none, and a device without regions has no rows.
_STATS = """read_count reads_merged_count read_sector_count read_time write_count
writes_merged_count write_sector_count write_time in_progress_count io_ticks queue_ticks read_ticks
write_ticks reads_merged_per_sec writes_merged_per_sec reads_per_sec writes_per_sec
read_size_per_sec write_size_per_sec avg_request_size queue_size await read_await write_await
throughput service_time util hist_count hist_count_bounds hist_count_ranges hist_percent
hist_percent_bounds hist_percent_ranges interval_ns interval""".split()
_REGION = """region_id region_start region_len area_id area_start area_len area_offset area_count
group_id program_id user_data precise hist_bins hist_bounds hist_ranges stats_name
obj_type""".split()


class Column(NamedTuple):
    """A field that a report can have.

    Attributes:
        field: its id, heading, width and whether it is a number.
        kind: libdm's report type, a key of _PREFIXES, or "special".
    """

    field: Field
    kind: str


def _columns() -> list[Column]:
    columns = []
    for field in FIELDS.values():
        kind = _KINDS.get(field.section) or ("deps" if field.id in _DEPS_FIELDS else "tree")
        columns.append(Column(field, kind))
    for ids, kind, section in ((_STATS, "stats", "Mapped Device Statistics"),
                               (_REGION, "region", "Mapped Device Statistics Regions")):
        columns += [Column(Field(id_, id_, 8, True, lambda info, names: 0, section,
                                 "Not kept by dmpy."), kind) for id_ in ids]
    return columns


def _special(id_: str, heading: str, description: str) -> Column:
    return Column(Field(id_, heading, 8, True, lambda info, names: 1, "Special", description),
                  "special")


_COLUMNS = _columns()
_SELECTED = _special("selected", "Selected", "Whether -S chooses the row.")
_SPECIAL = [_SELECTED, _special("help", "Help", "Print this list."),
            _special("?", "Help", "Print this list.")]


def find_column(word: str, prefix: str = "") -> Column | None:
    """Return the field of a name, None when there is none.

    Args:
        word: as the user wrote it.
        prefix: what may stand before an id, with an underscore at its end.
    """
    plain = word.replace("_", "").lower()
    if not plain:
        return None
    bare = prefix.rstrip("_")
    names = {plain}
    if bare and plain.startswith(bare):
        names.add(plain[len(bare):])
    for column in [*_SPECIAL, *_COLUMNS]:
        if column.field.id.replace("_", "") in names:
            return column
    return None


def help_columns(*, types: bool = False) -> str:
    """Return the list of all fields, by section, that `-o help` prints.

    Args:
        types: say what each is compared as (for -S), and leave the words for several fields out.
    """
    width = max(len(column.field.id) for column in _COLUMNS)
    lines: list[str] = []
    section = ""
    for column in [*_COLUMNS, *_SPECIAL]:
        if column.field.section != section:
            if section:
                lines.append(" ")
            section = column.field.section
            lines += [f"{section} Fields", "-" * (len(section) + 7)]
            if not types and column.kind != "special":
                kind = "deps" if column.kind == "tree" else column.kind
                lines.append(f"  {_PREFIXES[kind] + 'all':<{width}} - Every field listed here.")
        note = f" [{'number' if column.field.numeric else 'string'}]" if types else ""
        lines.append(f"  {column.field.id:<{width}} - {column.field.description}{note}")
    return "\n".join(lines)


# -- Values ---------------------------------------------------------------------------------------


# What format.FIELDS asks about other devices, answered from the graph.
class _Relations:
    def __init__(self, graph: Graph, deps: Sequence[dict[str, Any]]) -> None:
        self._graph = graph
        self._deps = {entry["name"]: entry["deps"] for entry in deps}
        self.numbers = {}

    def uses(self, info: dict[str, Any]) -> list[dict[str, Any]]:
        return self._deps.get(info["kernel_name"], [])

    def nodes(self, info: dict[str, Any], upward: bool) -> list[Node]:
        found = self._graph.node(info).next(upward)
        return [node for node in found if node is not self._graph.root and node.info]

    def used_by(self, info: dict[str, Any]) -> list[str]:
        return [node.name for node in self.nodes(info, True)]


class Report:
    """One report: what is shown of devices, and the rows shown so far.

    Args:
        options: the command line.
        graph: makes the graph of all devices and the control protocol's `deps` of all; called
            when a field needs them.
        dm_dir: the folder of device nodes, for messages.
        splitname: the report of the verb `splitname`.

    Raises:
        Failed: a field is unknown or -S cannot be understood; said on standard error.
    """

    def __init__(self, options: Options, graph: Callable[[], tuple], dm_dir: Callable[[], str],
                 mangling: str, *, splitname: bool = False) -> None:
        self._options = options
        self._graph = graph
        self._dm_dir = dm_dir
        self._mangling = mangling
        self._prefix = "splitname_" if splitname else ""
        self._kinds = {"name"} if splitname else set()
        self._relations: _Relations | None = None
        self.columns: list[Column] = []
        self.hidden: list[Column] = []
        self.keys: list[tuple[Column, bool]] = []
        self.rows: list[tuple[dict[Column, Any], bool]] = []
        self._headings_due = not options["noheadings"] and not self._asks_for_help()
        self._separator = ":" if options["noheadings"] else " "
        if options["separator"]:
            self._separator = options.text("separator")
        self._aligned = not (options["noheadings"] or options["separator"]
                             or options["nameprefixes"] or options["rows"])
        self._buffered = bool(options["rows"] or options["sort"] or not options["unbuffered"])
        self.fields = self._wanted(_SPLITNAME if splitname else _DEFAULT)
        self._choose()
        self.silent = any(column.field.id in ("help", "?") for column in self.columns)
        if self.silent:
            log_error(help_columns())
            log_error(" ")
        self._rule = self._selection()

    # dmsetup looks for the word anywhere in -o, and leaves the headings out then.
    def _asks_for_help(self) -> bool:
        return "help" in self._options.text("options")

    def _wanted(self, default: str) -> str:
        text = self._options.text("options")
        if not self._options["options"]:
            return default
        return f"{default},{text[1:]}" if text.startswith("+") else text

    # -- Fields -----------------------------------------------------------------------------------

    # Columns and sort keys. "all" stands for all fields of the kinds that the whole list names,
    # so the list is read twice, as libdm does.
    def _choose(self) -> None:
        words = [word for word in self.fields.split(",") if word]
        if self.fields.endswith(","):
            words.append("")
        found: list[Column | None] = []
        for word in words:
            column = find_column(word, self._prefix)
            kinds = {column.kind} if column else self._kinds_of(word)
            if not kinds:
                self._unknown(f"Unrecognised field: {word}")
            self._kinds |= kinds
            found.append(column)
        keys = self._sort_keys()
        for word, column in zip(words, found):
            if column:
                self.columns.append(column)
            else:
                kinds = self._kinds_of(word)
                self.columns += [each for each in _COLUMNS if each.kind in kinds]
        for key, descending in keys:
            if key in (column for column, _ in self.keys):
                log_error(f"dm_report: Ignoring duplicate sort field: {key.field.id}.")
                continue
            self.keys.append((key, descending))
            self._need(key)

    def _sort_keys(self) -> list[tuple[Column, bool]]:
        keys = []
        for word in filter(None, self._options.text("sort").split(",")):
            name = word[1:] if word[0] in "+-" else word
            column = find_column(name, self._prefix)
            if not name:
                log_error("dm_report: Missing sort field name")
            if column is None:
                self._unknown(f"dm_report: Unrecognised field: {word}")
            self._kinds.add(column.kind)
            keys.append((column, word[0] == "-"))
        return keys

    # The kinds that a word like `info_all` stands for; none when it is no such word.
    def _kinds_of(self, word: str) -> set[str]:
        plain = word.lower()
        kinds = set()
        if plain == "all":
            if not self._prefix:
                return set(self._kinds) or set(_PREFIXES)
            kinds |= self._kinds
            plain = self._prefix + "all"
        plain = plain.replace("_", "")
        return kinds | {kind for kind, prefix in _PREFIXES.items()
                        if plain == prefix.replace("_", "") + "all"}

    def _unknown(self, sentence: str) -> None:
        log_error(help_columns())
        log_error(" ")
        log_error(sentence)
        raise Failed

    # A field that is computed but not shown.
    def _need(self, column: Column) -> None:
        if column not in self.columns and column not in self.hidden:
            self.hidden.insert(0, column)
            self._kinds.add(column.kind)

    def _selection(self) -> Callable[[dict[Column, Any]], bool] | None:
        text = self._options.text("select")
        if not text:
            return None
        from dmpy.cli import dmsetup_select

        if text.lower() in ("help", "?"):
            log_error(help_columns(types=True))
            log_error(" ")
            log_error(dmsetup_select.HELP)
            self.silent = True
            return None
        if text.lower() == "all":
            return None
        return dmsetup_select.parse(text, self._need, self._prefix)

    # -- Rows -------------------------------------------------------------------------------------

    def add(self, info: dict[str, Any], *, show: bool = True) -> bool:
        """Make a device's row; return whether -S chooses it.

        Args:
            info: `Driver.shown` info.
            show: keep the row for `output`.

        Raises:
            Failed: a field cannot be told.
        """
        if self.silent or self._kinds & {"stats", "region"}:
            return False
        values: dict[Column, Any] = {}
        for column in [*self.hidden, *self.columns]:
            if self._prefix and column.kind not in ("name", "special"):
                log_error(f"_do_report_object: no data assigned to field {column.field.id}")
                raise Failed
            try:
                values[column] = self._value(column, info)
            except Failed:
                log_error("_do_report_object: report function failed for field "
                          f"{column.field.id}")
                raise
        chosen = self._rule is None or self._rule(values)
        if _SELECTED in values:
            values[_SELECTED] = int(chosen)
        if show and (chosen or _SELECTED in self.columns):
            self.rows.append((values, chosen))
            if not self._buffered:
                self.output()
        return chosen

    def _value(self, column: Column, info: dict[str, Any]) -> Any:
        id_ = column.field.id
        if id_ in ("name", "uuid", "mangled_name", "mangled_uuid", "unmangled_name",
                   "unmangled_uuid"):
            return self._name_value(id_, info)
        if id_ == "read_ahead":
            if has_disk(info):
                return READ_AHEAD_SECTORS
            log_error(f"{self._dm_dir()}/{info['name']}: open failed: No such file or directory")
            return 0
        if id_ == "blkdevname" and not has_disk(info):
            log_error(f"Could not resolve block device name for {DM_MAJOR}:{info['minor']}.")
            raise Failed
        if column.kind in ("deps", "tree"):
            return self._relation_value(id_, column, info)
        return column.field.value(info, None)

    def _name_value(self, id_: str, info: dict[str, Any]) -> str:
        form, _, key = id_.rpartition("_")
        text = info[key]
        what = "name" if key == "name" else "UUID"
        if form == "mangled":
            limit = NAME_LENGTH if key == "name" else UUID_LENGTH
            return mangle(text, what, self._mangling, limit) if text else ""
        return unescape(text) if form == "unmangled" and self._mangling == "none" else text

    def _relation_value(self, id_: str, column: Column, info: dict[str, Any]) -> Any:
        if self._relations is None:
            self._relations = _Relations(*self._graph())
        relations = self._relations
        if id_ == "devs_used":
            return ",".join(node.name for node in relations.nodes(info, False))
        if id_ == "devnos_using_dev":
            return ",".join(node.number for node in relations.nodes(info, True))
        return column.field.value(info, relations)

    # -- Output -----------------------------------------------------------------------------------

    def output(self) -> None:
        """Print the rows made so far, the headings before the first."""
        rows, self.rows = self.rows, []
        if not rows:
            return
        for column, descending in reversed(self.keys if self._buffered else []):
            rows.sort(key=lambda row, c=column: _sort_value(row[0][c]), reverse=descending)
        texts = [[str(values[column]) for column in self.columns] for values, _ in rows]
        if self._options["rows"]:
            self._output_transposed(texts)
            return
        widths = [max([column.field.width, *(_width(row[i]) for row in texts)])
                  for i, column in enumerate(self.columns)]
        if self._headings_due:
            self._headings_due = False
            headings = [column.field.heading for column in self.columns]
            if self._aligned:
                headings = [_pad(word, width) for word, width in zip(headings, widths)]
            log_print(self._separator.join(headings))
        for row in texts:
            log_print(self._separator.join(
                self._cell(column.field, text, width)
                for column, text, width in zip(self.columns, row, widths)))

    def repeat(self) -> None:
        """Begin anew, for the next of several reports (--count)."""
        self._headings_due = not self._options["noheadings"] and not self._asks_for_help()
        self._relations = None

    # A line a field: its heading, then the value of each device.
    def _output_transposed(self, texts: list[list[str]]) -> None:
        for i, column in enumerate(self.columns):
            heading = [] if self._options["noheadings"] else [column.field.heading]
            log_print(self._separator.join(
                heading + [self._cell(column.field, row[i], 0) for row in texts]))

    def _cell(self, field: Field, text: str, width: int) -> str:
        if self._options["nameprefixes"]:
            quote = "" if self._options["unquoted"] else "'"
            return f"DM_{field.id.upper()}={quote}{text}{quote}"
        if not self._aligned:
            return text
        return _pad(text, -width if field.numeric else width)


# Strings are ordered as bytes, as strcmp(3) does.
def _sort_value(value: Any) -> Any:
    return os.fsencode(value) if isinstance(value, str) else value


# printf pads by bytes.
def _width(text: str) -> int:
    return len(os.fsencode(text))


def _pad(text: str, width: int) -> str:
    blanks = " " * (abs(width) - _width(text))
    return text + blanks if width >= 0 else blanks + text
