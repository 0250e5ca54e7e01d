"""Text in dmsetup's own formats, made from the control protocol's results.

Every function here takes what `dmpy.control` answers (plain dicts and lists) and returns text
without a final newline; nothing prints and nothing talks to the server. The formats are those
of dmsetup 1.02.185 to the character, trailing blanks included, because scripts cut columns.

Source: lvm2 libdm/dm-tools/dmsetup.c, _display_info_long(), _status(), _deps(),
_display_tree_node(); libdm/libdm-report.c, _report_headings(), _output_field_basic_fmt().
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = [
    "DEFAULT_FIELDS",
    "DM_MAJOR",
    "FIELDS",
    "NO_DEVICES",
    "READ_AHEAD_SECTORS",
    "TREE_OPTIONS",
    "Field",
    "Report",
    "Tree",
    "block_name",
    "concise",
    "deps_line",
    "did_you_mean",
    "fields_help",
    "info_block",
    "ls_line",
    "parse_fields",
    "parse_sort_keys",
    "split_lvm_name",
    "target_ls_line",
    "table_lines",
    "targets_text",
    "version_text",
]

NO_DEVICES = "No devices found"
DEFAULT_FIELDS = "name,major,minor,attr,open,segments,events,uuid"

Info = Mapping[str, Any]
Deps = Mapping[str, Sequence[Mapping[str, Any]]]        # device name -> what it uses


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean X?)` for the known word nearest to `word`, or an empty string."""
    import difflib  # dmsetup, which runs by the thousand, never gets here

    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


# -- One device ---------------------------------------------------------------------------------


def info_block(info: Info) -> str:
    """Return `dmsetup info NAME`: one line a property, without the blank line that follows."""
    state = "SUSPENDED" if info["suspended"] else "ACTIVE"
    state += " (READ-ONLY)" if info["readonly"] else ""
    state += " (DEFERRED REMOVE)" if info.get("deferred_remove") else ""
    tables = [word for word, key in (("LIVE", "live_table"), ("INACTIVE", "inactive_table"))
              if info[key]]
    lines = [("Name:", info["name"]), ("State:", state)]
    if tables:
        lines.append(("Read Ahead:", READ_AHEAD_SECTORS))
    lines += [
        ("Tables present:", " & ".join(tables) or "None"),
        ("Open count:", info["open_count"]),
        ("Event number:", info["event_nr"]),
        ("Major, minor:", f"{info['major']}, {info['minor']}"),
        ("Number of targets:", info["targets"]),
    ]
    text = [f"{label:<18} {value}" for label, value in lines]
    if info["uuid"]:
        text.append(f"UUID: {info['uuid']}")
    return "\n".join(text)


# What the kernel gives a new block device: 128 KiB. An NBD export has no other figure.
READ_AHEAD_SECTORS = 256


def table_lines(entry: Mapping[str, Any], *, multiple: bool = False) -> list[str]:
    """Return the lines of `dmsetup table` or `dmsetup status` for one device.

    Args:
        entry: a result of the methods `table` or `status`: name and [begin, len, type, args] rows.
        multiple: put `NAME: ` before each line, as when several devices are listed.

    Returns:
        A line a table line; one empty line for a device without a table, as dmsetup prints.
    """
    prefix = f"{entry['name']}: " if multiple else ""
    rows = [f"{prefix}{begin} {length} {kind} {args}" for begin, length, kind, args
            in entry["lines"]]
    return rows or [prefix]


def concise(infos: Sequence[Info], tables: Sequence[Mapping[str, Any]]) -> str:
    """Return `dmsetup table --concise`: all devices on one line, as `create --concise` takes it.

    Args:
        infos: the devices, in the order to print.
        tables: results of the method `table` for these devices, in any order.
    """
    lines_of = {entry["name"]: entry["lines"] for entry in tables}
    devices = []
    for info in infos:
        parts = [_quoted(info["name"]), _quoted(info["uuid"]), str(info["minor"]),
                 "ro" if info["readonly"] else "rw"]
        parts += [f"{begin} {length} {kind} {_quoted(args)}" for begin, length, kind, args
                  in lines_of.get(info["name"], [])]
        devices.append(",".join(parts))
    return ";".join(devices)


# The concise form gives comma, semicolon and backslash a meaning; a backslash takes it away.
def _quoted(text: str) -> str:
    return "".join(f"\\{c}" if c in ",;\\" else c for c in text)


def block_name(major: int, minor: int, name: str = "") -> str:
    """Return the kernel's name of a block device (`dm-0`, `loop3`), or `name` where it has none.

    Args:
        major, minor: the device number.
        name: what to fall back to.
    """
    if major == DM_MAJOR:
        return f"dm-{minor}"
    try:
        with open(f"/sys/dev/block/{major}:{minor}/uevent", encoding="utf-8") as uevent:
            for line in uevent:
                if line.startswith("DEVNAME="):
                    return line[len("DEVNAME="):].strip()
    except OSError:
        pass                                            # no such device here: say its number
    return name or f"{major}:{minor}"


# The major number that dmpy gives its devices (`MappedDevice.major`).
DM_MAJOR = 253


def deps_line(entry: Mapping[str, Any], *, multiple: bool = False, names: str = "devno") -> str:
    """Return one line of `dmsetup deps`.

    A leg without a device number (a file, a URI) is shown by its word in the table.

    Args:
        entry: a result of the method `deps`.
        multiple: put `NAME: ` first.
        names: `devno`, `devname` or `blkdevname`, as the option -o of dmsetup.
    """
    prefix = f"{entry['name']}: " if multiple else ""
    words = []
    for dep in entry["deps"]:
        major, minor, name = dep["major"], dep["minor"], dep["name"]
        if not major:
            words.append(f" ({name})")
        elif names == "blkdevname":
            words.append(f" ({block_name(major, minor, name)})")
        elif names == "devname":
            words.append(f" ({name if major == DM_MAJOR else block_name(major, minor, name)})")
        else:
            words.append(f" ({major}, {minor})")
    return f"{prefix}{len(entry['deps'])} dependencies\t:{''.join(words)}"


def ls_line(info: Info, *, names: str = "devno") -> str:
    """Return one line of `dmsetup ls`; `names` as in `deps_line`."""
    shown = {"devno": f"{info['major']}:{info['minor']}", "devname": info["name"],
             "blkdevname": f"dm-{info['minor']}"}[names]
    return f"{info['name']}\t({shown})"


def target_ls_line(info: Info) -> str:
    """Return one line of `dmsetup ls --target TYPE`, which puts a blank after the comma."""
    return f"{info['name']}\t({info['major']}, {info['minor']})"


def targets_text(targets: Iterable[Mapping[str, Any]]) -> str:
    """Return `dmsetup targets`: `linear           v1.4.0`, one line a target."""
    return "\n".join(
        f"{target['name']:<16} v{'.'.join(map(str, target['version']))}" for target in targets
    )


def version_text(library: str, driver: str) -> str:
    """Return `dmsetup version`."""
    return f"Library version:   {library}\nDriver version:    {driver}"


# -- info -c: columns ---------------------------------------------------------------------------


class Field(NamedTuple):
    """A column of `info -c`.

    Attributes:
        id: the word for -o.
        heading: the text above the column.
        width: its least width in characters.
        numeric: right-aligned, and sorted as a number.
        value: makes the value from the device's info and a `_Names`.
        section: which part of `-o help` it is listed in.
        description: one line of help, dmsetup's words.
    """

    id: str
    heading: str
    width: int
    numeric: bool
    value: Callable[[Info, Any], Any]
    section: str
    description: str


# What a field needs to know beyond its own device: who uses whom.
class _Names:
    def __init__(self, deps: Deps) -> None:
        self.deps = deps
        self.users: dict[str, list[str]] = {}
        self.numbers: dict[str, str] = {}
        for user, uses in deps.items():
            for dep in uses:
                if dep["name"] in deps and dep["major"] == DM_MAJOR:
                    self.users.setdefault(dep["name"], []).append(user)

    def uses(self, info: Info) -> Sequence[Mapping[str, Any]]:
        return self.deps.get(info["name"], ())

    def used_by(self, info: Info) -> Sequence[str]:
        return self.users.get(info["name"], ())


def _attr(info: Info, _: _Names) -> str:
    return "".join((
        "L" if info["live_table"] else "-",
        "I" if info["inactive_table"] else "-",
        "s" if info["suspended"] else "-",
        "r" if info["readonly"] else "w",
    ))


def _tables(info: Info, _: _Names) -> str:
    return {(True, True): "Both", (True, False): "Live", (False, True): "Inactive",
            (False, False): "None"}[bool(info["live_table"]), bool(info["inactive_table"])]


def _dep_number(dep: Mapping[str, Any]) -> str:
    return f"{dep['major']}:{dep['minor']}" if dep["major"] else dep["name"]


# The subsystem is the part of the uuid before its first hyphen, dmsetup's convention.
def _subsystem(info: Info) -> str:
    head, hyphen, _ = info["uuid"].partition("-")
    return head if hyphen else ""


def _lvm_name(part: int) -> Callable[[Info, _Names], str]:
    def value(info: Info, _: _Names) -> str:
        return split_lvm_name(info["name"])[part] if _subsystem(info) == "LVM" else ""
    return value


def split_lvm_name(name: str) -> tuple[str, str, str]:
    """Split `vg-lv-layer` at its single hyphens; a doubled hyphen is one of the name's own.

    A hyphen at the end belongs to the name, and what follows a third single one is left out.
    """
    parts = ["", "", ""]
    at = 0
    for i in range(3):
        while at < len(name):
            if name[at] == "-" and at + 1 < len(name):
                if name[at + 1] != "-":
                    break
                at += 1
            parts[i] += name[at]
            at += 1
        at += 1
    return parts[0], parts[1], parts[2]


def _key(key: str) -> Callable[[Info, _Names], Any]:
    return lambda info, names: info[key]


_NAME, _INFO = "Mapped Device Name", "Mapped Device Information"
_DEPS, _SPLIT = "Mapped Device Relationship Information", "Mapped Device Name Components"
# Section -> the word that stands for all of its fields.
_SECTIONS = {_NAME: "name_all", _INFO: "info_all", _DEPS: "deps_all", _SPLIT: "splitname_all"}

_FIELD_LIST = [
    Field("name", "Name", 16, False, _key("name"), _NAME, "Name of mapped device."),
    Field("mangled_name", "MangledName", 16, False, _key("name"), _NAME,
          "Mangled name of mapped device."),
    Field("unmangled_name", "UnmangledName", 16, False, _key("name"), _NAME,
          "Unmangled name of mapped device."),
    Field("uuid", "UUID", 32, False, _key("uuid"), _NAME,
          "Unique (optional) identifier for mapped device."),
    Field("mangled_uuid", "MangledUUID", 32, False, _key("uuid"), _NAME,
          "Mangled unique (optional) identifier for mapped device."),
    Field("unmangled_uuid", "UnmangledUUID", 32, False, _key("uuid"), _NAME,
          "Unmangled unique (optional) identifier for mapped device."),
    Field("read_ahead", "RAhead", 6, True,
          lambda info, _: READ_AHEAD_SECTORS if info["live_table"] else 0, _NAME,
          "Read ahead value."),
    Field("blkdevname", "BlkDevName", 16, False, lambda info, _: f"dm-{info['minor']}", _INFO,
          "Name of block device."),
    Field("attr", "Stat", 4, False, _attr, _INFO,
          "(L)ive, (I)nactive, (s)uspended, (r)ead-only, read-(w)rite."),
    Field("tables_loaded", "Tables", 6, False, _tables, _INFO,
          "Which of the live and inactive table slots are filled."),
    Field("suspended", "Suspended", 9, False,
          lambda info, _: "Suspended" if info["suspended"] else "Active", _INFO,
          "Whether the device is suspended."),
    Field("readonly", "Read-only", 9, False,
          lambda info, _: "Read-only" if info["readonly"] else "Writeable", _INFO,
          "Whether the device is read-only or writeable."),
    Field("devno", "DevNo", 5, False, lambda info, _: f"{info['major']}:{info['minor']}", _INFO,
          "Device major and minor numbers"),
    Field("major", "Maj", 3, True, _key("major"), _INFO, "Block device major number."),
    Field("minor", "Min", 3, True, _key("minor"), _INFO, "Block device minor number."),
    Field("open", "Open", 4, True, _key("open_count"), _INFO,
          "Number of references to open device, if requested."),
    Field("segments", "Targ", 4, True, _key("targets"), _INFO,
          "Number of segments in live table, if present."),
    Field("events", "Event", 6, True, _key("event_nr"), _INFO, "Number of most recent event."),
    Field("device_count", "#Devs", 5, True, lambda info, names: len(names.uses(info)), _DEPS,
          "Number of devices used by this one."),
    Field("devs_used", "DevNamesUsed", 16, False, lambda info, names: ",".join(
        dep["name"] for dep in names.uses(info) if dep["major"] == DM_MAJOR), _DEPS,
        "List of names of mapped devices used by this one."),
    Field("devnos_used", "DevNosUsed", 16, False, lambda info, names: ",".join(
        map(_dep_number, names.uses(info))), _DEPS,
        "List of device numbers of devices used by this one."),
    Field("blkdevs_used", "BlkDevNamesUsed", 16, False, lambda info, names: ",".join(
        block_name(dep["major"], dep["minor"], dep["name"]) for dep in names.uses(info)), _DEPS,
        "List of names of block devices used by this one."),
    Field("device_ref_count", "#Refs", 5, True, lambda info, names: len(names.used_by(info)),
          _DEPS, "Number of mapped devices referencing this one."),
    Field("names_using_dev", "RefNames", 8, False,
          lambda info, names: ",".join(names.used_by(info)), _DEPS,
          "List of names of mapped devices using this one."),
    Field("devnos_using_dev", "RefDevNos", 9, False, lambda info, names: ",".join(
        names.numbers.get(user, user) for user in names.used_by(info)), _DEPS,
        "List of device numbers of mapped devices using this one."),
    Field("subsystem", "Subsys", 6, False, lambda info, _: _subsystem(info), _SPLIT,
          "Userspace subsystem responsible for this device."),
    Field("vg_name", "VG", 4, False, _lvm_name(0), _SPLIT, "LVM Volume Group name."),
    Field("lv_name", "LV", 4, False, _lvm_name(1), _SPLIT, "LVM Logical Volume name."),
    Field("lv_layer", "LVLayer", 7, False, _lvm_name(2), _SPLIT, "LVM device layer."),
]

FIELDS = {field.id: field for field in _FIELD_LIST}


def parse_fields(text: str | None) -> list[Field]:
    """Return the columns that an option -o asks for.

    Args:
        text: ids with commas between; a leading `+` adds to the default ones; `all` and
            `name_all`, `info_all`, `deps_all`, `splitname_all` stand for several; None: default.

    Raises:
        ValueError: a field is unknown; the sentence names the nearest.
    """
    words = text or DEFAULT_FIELDS
    if words.startswith("+"):
        words = f"{DEFAULT_FIELDS},{words[1:]}"
    chosen = []
    for word in filter(None, words.split(",")):
        word = word.strip().lower()
        sections = [name for name, every in _SECTIONS.items() if word in (every, "all")]
        if sections:
            chosen += [field for field in _FIELD_LIST if field.section in sections]
        elif _find_field(word):
            chosen.append(_find_field(word))
        else:
            known = [*FIELDS, *_SECTIONS.values(), "all"]
            raise ValueError(f"field {word} is unknown{did_you_mean(word, known)}")
    return chosen


# libdm ignores underscores in field ids, and takes a `dm_` before them.
def _find_field(word: str) -> Field | None:
    plain = word.removeprefix("dm_").replace("_", "")
    return next((field for field in _FIELD_LIST if field.id.replace("_", "") == plain), None)


def parse_sort_keys(text: str | None) -> list[tuple[Field, bool]]:
    """Return what an option -O sorts by: (field, descending) pairs; `-id` is descending."""
    keys = []
    for word in filter(None, (text or "").split(",")):
        field, = parse_fields(word.lstrip("+-"))
        keys.append((field, word.startswith("-")))
    return keys


def fields_help() -> str:
    """Return the list that `info -c -o help` prints."""
    width = max(map(len, [*FIELDS, *_SECTIONS.values()]))
    text = []
    for section, every in _SECTIONS.items():
        title = f"{section} Fields"
        rows = [(every, "All fields in this section.")]
        rows += [(f.id, f.description) for f in _FIELD_LIST if f.section == section]
        text += [title, "-" * len(title)]
        text += [f"  {word:<{width}} - {description}" for word, description in rows]
        text.append(" ")
    return "\n".join(text)


class Report:
    """`info -c`: a row a device, in libdm's layout.

    Args:
        fields: the columns.
        headings: print the heading line.
        separator: between columns; None: a blank, or a colon where there are no headings.
        prefixes: each value as `DM_FIELD='value'`.
        unquoted: leave the quotes of `prefixes` out.
        as_rows: a line a column instead of a line a device.
        sort: what to sort by; devices come in the order given otherwise.
    """

    def __init__(
        self,
        fields: Sequence[Field],
        *,
        headings: bool = True,
        separator: str | None = None,
        prefixes: bool = False,
        unquoted: bool = False,
        as_rows: bool = False,
        sort: Sequence[tuple[Field, bool]] = (),
    ) -> None:
        self.fields = list(fields)
        self.headings = headings
        self.aligned = headings and separator is None and not prefixes
        self.separator = separator if separator is not None else " " if headings else ":"
        self.prefixes = prefixes
        self.unquoted = unquoted
        self.as_rows = as_rows
        self.sort = list(sort)

    def text(self, infos: Sequence[Info], deps: Deps | None = None) -> str:
        """Return the report on these devices.

        Args:
            infos: results of the method `info`.
            deps: for the fields of section `deps`: device name -> its `deps` list, all devices.
        """
        names = _Names(deps or {})
        names.numbers = {i["name"]: f"{i['major']}:{i['minor']}" for i in infos}
        infos = list(infos)
        for field, descending in reversed(self.sort):
            infos.sort(key=lambda info, f=field: f.value(info, names), reverse=descending)
        rows = [[str(field.value(info, names)) for field in self.fields] for info in infos]
        widths = [
            max([field.width, *(len(row[i]) for row in rows)])
            for i, field in enumerate(self.fields)
        ]
        if self.as_rows:
            return self._rows(rows, widths)
        lines = []
        if self.headings:
            headings = [f"{f.heading:<{w}}" if self.aligned else f.heading
                        for f, w in zip(self.fields, widths)]
            lines.append(self.separator.join(headings))
        for row in rows:
            cells = [self._cell(*three) for three in zip(self.fields, row, widths)]
            lines.append(self.separator.join(cells))
        return "\n".join(lines)

    # The transposed form: the heading, then each device's value.
    def _rows(self, rows: list[list[str]], widths: list[int]) -> str:
        lines = []
        for i, field in enumerate(self.fields):
            cells = [self._cell(field, row[i], widths[i]) for row in rows]
            lines.append(self.separator.join([field.heading] * self.headings + cells))
        return "\n".join(lines)

    # One value, padded and decorated as asked.
    def _cell(self, field: Field, value: str, width: int) -> str:
        if self.aligned:
            value = value.rjust(width) if field.numeric else value.ljust(width)
        if self.prefixes:
            quote = "" if self.unquoted else "'"
            return f"DM_{field.id.upper()}={quote}{value}{quote}"
        return value


# -- ls --tree ----------------------------------------------------------------------------------

TREE_OPTIONS = (
    "active", "ascii", "blkdevname", "compact", "device", "inverted", "nodevice", "notrunc",
    "open", "rw", "utf", "uuid", "vt100",
)


# The strings that draw a tree: nothing, branch, line, last branch, only child, first of several.
class _Symbols(NamedTuple):
    empty: str
    branch: str
    line: str
    last: str
    single: str
    first: str


_ASCII = _Symbols("  ", "|-", "| ", "`-", "---", "-+-")
_UTF = _Symbols("  ", "├─", "│ ", "└─", "───", "─┬─")
_VT100 = _Symbols("  ", "\x0etq\x0f", "\x0ex\x0f ", "\x0emq\x0f", "\x0eqqq\x0f", "\x0eqwq\x0f")


# A node of the tree: a mapped device (with info) or something that it stands on (without).
class _Node:
    def __init__(self, name: str, number: tuple, info: Info | None) -> None:
        self.name = name
        self.number = number
        self.info = info
        self.below: list[_Node] = []
        self.above: list[_Node] = []


class Tree:
    """`dmsetup ls --tree`.

    Args:
        options: words of TREE_OPTIONS, comma-separated, as -o takes them.
        utf: draw with box characters where `options` do not choose.
        width: cut lines at this many characters; None: never.

    Raises:
        ValueError: an option is unknown.
    """

    def __init__(self, options: str = "", *, utf: bool = False, width: int | None = None) -> None:
        words = [word for word in options.split(",") if word]
        for word in words:
            if word not in TREE_OPTIONS:
                near = did_you_mean(word, TREE_OPTIONS)
                raise ValueError(f"tree option {word} is unknown{near}")
        self.on = set(words)
        self.symbols = _UTF if utf else _ASCII
        self.show_number = True
        for word in words:
            self.symbols = {"ascii": _ASCII, "utf": _UTF, "vt100": _VT100}.get(word, self.symbols)
            self.show_number = {"device": True, "nodevice": False}.get(word, self.show_number)
        self.width = None if "notrunc" in self.on or self.symbols is _VT100 else width

    def text(self, infos: Sequence[Info], deps: Deps) -> str:
        """Return the tree of these devices.

        Args:
            infos: results of the method `info`, all devices.
            deps: device name -> its `deps` list.
        """
        nodes = _nodes(infos, deps)
        upward = "inverted" in self.on
        roots = [n for n in nodes if not (n.below if upward else n.above)]
        self._lines: list[str] = []
        self._line = ""
        self._more = [False] * (len(nodes) + 2)
        self._widths = [0] * (len(nodes) + 2)
        self._walk(roots, 0, upward)
        return "\n".join(self._lines)

    # Children in order, each followed by its own.
    def _walk(self, children: list[_Node], depth: int, upward: bool) -> None:
        for child in children:
            grandchildren = child.above if upward else child.below
            self._node(child, depth, child is children[-1], bool(grandchildren))
            self._walk(grandchildren, depth + 1, upward)

    def _node(self, node: _Node, depth: int, last: bool, has_children: bool) -> None:
        if not node.name and not self.show_number and "blkdevname" not in self.on:
            return
        compact = "compact" in self.on
        self._more[depth] = not last
        self._widths[depth] = 0
        first_on_line = not self._line
        if not compact or first_on_line:
            self._line += self._prefix(depth)
        start = len(self._line)
        if compact and not first_on_line:
            self._line += self.symbols.first if not last else self.symbols.single
        self._line += self._label(node)
        if compact:
            self._widths[depth] = len(self._line) - start
        if not compact or not has_children:
            self._lines.append(self._cut(self._line))
            self._line = ""

    def _prefix(self, depth: int) -> str:
        drawn = ""
        for level in range(depth):
            drawn += " " * (self._widths[level] + 1)
            if level == depth - 1:
                drawn += self.symbols.branch if self._more[depth] else self.symbols.last
            else:
                drawn += self.symbols.line if self._more[level + 1] else self.symbols.empty
        return drawn

    def _label(self, node: _Node) -> str:
        major, minor = node.number
        label = node.name
        if "blkdevname" in self.on and major:
            label += f" <{block_name(major, minor)}>"
        if self.show_number and major:
            label += f" ({major}:{minor})"
        if node.info is None:
            return label
        info = node.info
        shown = []
        if "active" in self.on:
            shown.append("SUSPENDED" if info["suspended"] else "ACTIVE")
        if "rw" in self.on:
            shown.append("RO" if info["readonly"] else "RW")
        if "open" in self.on:
            shown.append(str(info["open_count"]))
        if "uuid" in self.on:
            shown.append(info["uuid"])
        return f"{label} [{', '.join(shown)}]" if shown else label

    def _cut(self, line: str) -> str:
        if self.width is None or len(line) <= self.width:
            return line
        return line[:self.width] + "..."


# Build the graph in dmsetup's order: devices as listed, what they use as met.
def _nodes(infos: Sequence[Info], deps: Deps) -> list[_Node]:
    by_name = {info["name"]: info for info in infos}
    nodes: dict[tuple, _Node] = {}

    def add(name: str, number: tuple) -> _Node:
        info = by_name.get(name) if number[0] == DM_MAJOR else None
        # A block device that is not ours has a number and no name, as in dmsetup.
        shown = name if info is not None or not number[0] else ""
        key = (number, shown if not number[0] else "")
        if key in nodes:
            return nodes[key]
        node = nodes[key] = _Node(shown, number, info)
        for dep in deps.get(name, ()) if info is not None else ():
            child = add(dep["name"], (dep["major"], dep["minor"]))
            node.below.append(child)
            child.above.append(node)
        return node

    for info in infos:
        add(info["name"], (info["major"], info["minor"]))
    return list(nodes.values())
