"""The house rules that a machine can check: pages, names, sizes, imports, copies, words."""

import ast
import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dmpy"
LONGEST_LINE = 100
LONGEST_FUNCTION = 70

PAGE_HEADINGS = {
    "targets": [
        "Table",
        "Status",
        "Messages",
        "Example",
        "How it maps",
        "Failure",
        "On disk",
        "Not done",
        "See also",
    ],
    "formats": ["Layout", "Invariants", "Interrupted writes", "Versions", "Example"],
}

# What a module may import of dmpy, from the bottom up; `dmpy.X` stands for all below it. A module
# that is not named here may import anything that does not lead back to itself.
FLOOR = ["dmpy.units", "dmpy.errors"]
ENGINE = [
    *FLOOR, "dmpy.device", "dmpy.plan", "dmpy.buffers", "dmpy.formats", "dmpy.maths",
    "dmpy.background",
]
MAY_IMPORT = {
    "dmpy": [],
    "dmpy.units": [],
    "dmpy.errors": ["dmpy.units"],
    "dmpy.maths": [*FLOOR, "dmpy.maths"],
    "dmpy.formats": [*FLOOR, "dmpy.formats", "dmpy.maths"],
    "dmpy.device": FLOOR,
    "dmpy.buffers": FLOOR,
    "dmpy.background": FLOOR,
    "dmpy.plan": [*FLOOR, "dmpy.device"],
    "dmpy.backing": [*FLOOR, "dmpy.device", "dmpy.buffers", "dmpy.backing"],
    "dmpy.target": [*FLOOR, "dmpy.device", "dmpy.plan", "dmpy.buffers"],
    "dmpy.raid": [*ENGINE, "dmpy.target", "dmpy.stats", "dmpy.raid"],
    "dmpy.raid.levels": FLOOR,
    "dmpy.md": [*ENGINE, "dmpy.backing", "dmpy.target", "dmpy.raid", "dmpy.md"],
    "dmpy.targets": [*ENGINE, "dmpy.target", "dmpy.raid", "dmpy.md"],
    "dmpy.table": [*FLOOR, "dmpy.device", "dmpy.target"],
    "dmpy.stats": FLOOR,
    "dmpy.opening": [*FLOOR, "dmpy.device", "dmpy.plan", "dmpy.stats"],
    "dmpy.mapped": [
        *FLOOR, "dmpy.device", "dmpy.plan", "dmpy.target", "dmpy.table", "dmpy.stats",
        "dmpy.opening",
    ],
    "dmpy.mapper": [*ENGINE, "dmpy.backing", "dmpy.target", "dmpy.table", "dmpy.mapped"],
    "dmpy.testing": [*ENGINE, "dmpy.target", "dmpy.mapped", "dmpy.mapper", "dmpy.testing"],
}
# The rooms that nothing of the engine may know.
UPSTAIRS = ["dmpy.nbd", "dmpy.control", "dmpy.cli", "dmpy.launch", "dmpy.attach", "dmpy.proxy"]


def tracked(*suffixes):
    """The project's files, in git or about to be: those that it does not ignore."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        timeout=30,
    ).stdout.decode()
    paths = [ROOT / name for name in names.split("\0") if name]
    return [
        path
        for path in paths
        if path.is_file() and not path.is_symlink() and (not suffixes or path.suffix in suffixes)
    ]


def nothing(wrong):
    """Fail with everything that is wrong, one a line."""
    if wrong:
        pytest.fail("\n".join(map(str, wrong)), pytrace=False)


def name_of(path):
    return str(path.relative_to(ROOT))


PYTHON = tracked(".py")
OURS = [path for path in PYTHON if path.is_relative_to(PACKAGE)]
TREES = {path: ast.parse(path.read_text(), str(path)) for path in PYTHON}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def families(room):
    """The modules of dmpy/targets or dmpy/formats."""
    return [
        path
        for path in OURS
        if path.parent == PACKAGE / room and path.name != "__init__.py" and path.stem[0] != "_"
    ]


def public_functions(tree):
    """Public functions and classes at the top of a module, and public methods of those classes."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if node.name.startswith("_"):
                continue
            yield node.name, node, None
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                        yield f"{node.name}.{inner.name}", inner, node


# Pages and tests.


@pytest.mark.parametrize("room", ["targets", "formats"])
def test_each_family_has_its_page_with_all_headings_in_order(room):
    wrong = []
    for path in families(room):
        page = path.with_suffix(".md")
        if not page.exists():
            wrong.append(f"{name_of(page)} is missing")
            continue
        text = page.read_text()
        headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
        if headings != PAGE_HEADINGS[room]:
            wrong.append(f"{name_of(page)}: headings are {headings}")
        if not text.startswith(f"# {path.stem}\n"):
            wrong.append(f"{name_of(page)}: does not begin with # {path.stem}")
    nothing(wrong)


@pytest.mark.parametrize("room", ["targets", "formats"])
def test_each_family_has_its_test(room):
    missing = [
        path.stem
        for path in families(room)
        if not (ROOT / "tests" / room / f"test_{path.stem}.py").exists()
    ]
    nothing(missing)


def test_each_target_has_a_conformance_test():
    missing = [
        path.stem
        for path in families("targets")
        if "TargetTests" not in (ROOT / "tests/targets" / f"test_{path.stem}.py").read_text()
    ]
    nothing(missing)


def test_links_between_pages_lead_somewhere():
    wrong = []
    for page in tracked(".md"):
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
            if "://" not in link and not (page.parent / link).exists():
                wrong.append(f"{name_of(page)}: {link}")
    nothing(wrong)


# Names and documentation.


def test_each_module_is_documented():
    undocumented = [name_of(path) for path in OURS if not ast.get_docstring(TREES[path])]
    nothing(undocumented)


def test_each_module_lists_its_public_names():
    wrong = []
    for path in OURS:
        tree = TREES[path]
        listed = None
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                listed = node.value
        public = {name for name, _, owner in public_functions(tree) if owner is None}
        if isinstance(listed, (ast.List, ast.Tuple)):
            listed = [ast.literal_eval(element) for element in listed.elts]
            if path.name == "__init__.py":
                continue
            wrong += [f"{name_of(path)}: {name} is not in __all__" for name in public - {*listed}]
            defined = names_at_the_top(tree)
            wrong += [f"{name_of(path)}: {name} is not there" for name in {*listed} - defined]
        elif listed is None and public:
            wrong.append(f"{name_of(path)}: has no __all__")
    nothing(wrong)


def names_at_the_top(tree):
    """What a module defines or imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def test_each_public_name_is_documented():
    """A method that does what its base class says may leave the saying to that."""
    wrong = []
    inherited = {
        name.rpartition(".")[2]
        for path in (PACKAGE / "device.py", PACKAGE / "target.py")
        for name, node, owner in public_functions(TREES[path])
        if owner is not None and ast.get_docstring(node)
    }
    for path in OURS:
        for name, node, owner in public_functions(TREES[path]):
            if ast.get_docstring(node):
                continue
            if owner is not None and (owner.bases and node.name in inherited):
                continue
            marks = [ast.unparse(mark) for mark in getattr(node, "decorator_list", [])]
            if any(mark.endswith((".setter", "overload")) for mark in marks):
                continue
            if owner is not None and node.name.startswith("test_"):
                continue
            wrong.append(f"{name_of(path)}:{node.lineno}: {name}")
    nothing(wrong)


def test_no_class_is_a_manager_a_helper_or_a_util():
    wrong = [
        f"{name_of(path)}: {node.name}"
        for path in OURS
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.ClassDef) and re.search("Manager|Helper|Utils?$", node.name)
    ]
    wrong += [name_of(path) for path in OURS if path.stem in ("utils", "util", "helpers", "misc")]
    nothing(wrong)


# Sizes.


def test_no_line_is_longer_than_100_characters():
    wrong = []
    for path in PYTHON:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > LONGEST_LINE:
                wrong.append(f"{name_of(path)}:{number}: {len(line)} characters")
    nothing(wrong)


def test_no_function_is_longer_than_70_lines():
    wrong = []
    for path in PYTHON:
        for node in ast.walk(TREES[path]):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                if length > LONGEST_FUNCTION:
                    wrong.append(f"{name_of(path)}:{node.lineno}: {node.name} has {length} lines")
    nothing(wrong)


# Imports.


def imports(tree, *, lazily):
    """Yield the dmpy modules that a tree imports; those inside functions too with `lazily`."""
    walk = ast.walk(tree) if lazily else top_level(tree)
    for node in walk:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "dmpy")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dmpy":
            for alias in node.names:
                deeper = ROOT / node.module.replace(".", "/") / f"{alias.name}.py"
                is_module = deeper.exists() or (deeper.with_suffix("") / "__init__.py").exists()
                yield f"{node.module}.{alias.name}" if is_module else node.module


def top_level(tree):
    """Statements that run when the module is imported; not those for a type checker only."""
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, (ast.If, ast.Try)):
            yield from ast.walk(node)
        else:
            yield node


def is_in(module, room):
    return module == room or module.startswith(room + ".")


def test_imports_go_one_way():
    wrong = []
    for path in OURS:
        module = module_name(path)
        rule = max(
            (r for r in MAY_IMPORT if is_in(module, r) and (r != "dmpy" or module == "dmpy")),
            key=len,
            default=None,
        )
        if rule is None:
            continue
        for name in imports(TREES[path], lazily=rule not in ("dmpy", "dmpy.testing")):
            if not any(is_in(name, room) for room in MAY_IMPORT[rule]):
                wrong.append(f"{name_of(path)} imports {name}")
    nothing(wrong)


def test_the_engine_does_not_know_who_uses_it():
    wrong = []
    for path in OURS:
        module = module_name(path)
        if any(is_in(module, rule) for rule in MAY_IMPORT if rule != "dmpy"):
            for name in imports(TREES[path], lazily=True):
                if any(is_in(name, room) for room in UPSTAIRS):
                    wrong.append(f"{name_of(path)} imports {name}")
    nothing(wrong)


def test_commands_do_not_reach_into_the_engine():
    """The command line talks to the server over the control socket."""
    wrong = []
    for path in OURS:
        if is_in(module_name(path), "dmpy.cli"):
            for name in imports(TREES[path], lazily=True):
                if any(is_in(name, room) for room in ("dmpy.mapped", "dmpy.plan", "dmpy.nbd")):
                    wrong.append(f"{name_of(path)} imports {name}")
    nothing(wrong)


def test_no_imports_go_round_in_a_circle():
    graph = {}
    for path in OURS:
        names = {name for name in imports(TREES[path], lazily=False)}
        graph[module_name(path)] = names - {module_name(path)}
    done, path = set(), []

    def visit(module):
        if module in done:
            return
        assert module not in path, f"a circle: {' -> '.join([*path, module])}"
        path.append(module)
        for name in sorted(graph.get(module, ())):
            visit(name)
        path.pop()
        done.add(module)

    for module in sorted(graph):
        visit(module)


def test_only_the_edge_and_the_plugins_import_nbdkit():
    wrong = []
    for path in PYTHON:
        if path == PACKAGE / "nbd.py" or path.parent.name == "plugins":
            continue
        for node in ast.walk(TREES[path]):
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if isinstance(node, (ast.Import, ast.ImportFrom)) and "nbdkit" in names:
                wrong.append(f"{name_of(path)}:{node.lineno}")
    nothing(wrong)


def test_the_core_knows_no_target_by_name():
    """Linear excepted, for flattening."""
    names = {path.stem for path in families("targets")} - {"linear"}
    wrong = []
    for name in ("target.py", "table.py", "mapped.py", "plan.py"):
        for node in ast.walk(TREES[PACKAGE / name]):
            if isinstance(node, ast.Constant) and node.value in names:
                wrong.append(f"{name}:{node.lineno}: {node.value!r}")
    nothing(wrong)


def test_targets_do_not_import_each_other():
    wrong = [
        f"{name_of(path)} imports {name}"
        for path in families("targets")
        for name in imports(TREES[path], lazily=True)
        if is_in(name, "dmpy.targets") and name != module_name(path)
    ]
    nothing(wrong)


# The data path.


def comments(path):
    """Line number -> comment."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}


def copies(tree):
    """Calls in functions that copy bytes: bytes(x), x.tobytes(), b"".join(x)."""
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.Lambda)):
            for node in ast.walk(function):
                if isinstance(node, ast.Call):
                    called = ast.unparse(node.func)
                    if called in ("bytes", "b''.join") or called.endswith(".tobytes"):
                        yield node


def test_a_copy_in_a_target_says_why():
    wrong = []
    for path in families("targets"):
        noted = comments(path)
        for node in copies(TREES[path]):
            if not any(
                noted.get(near, "").startswith("# copy:")
                for near in range(node.lineno - 1, node.end_lineno + 1)
            ):
                wrong.append(f"{name_of(path)}:{node.lineno}: {ast.unparse(node)}")
    nothing(wrong)


# Words that have no place in the tree.


def test_nothing_is_left_to_do():
    wrong = []
    # Spelled apart, so that this file does not find itself.
    left = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    for path in tracked(".py", ".md", ".sh", ".toml", ""):
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if left.search(line):
                wrong.append(f"{name_of(path)}:{number}: {line.strip()[:80]}")
    nothing(wrong)


def test_nothing_speaks_of_the_place_where_it_was_written():
    """No paths of a workplace, no people or numbers that only its inhabitants know."""
    words = ["/wo" + "rk/", "/tm" + "p/w", "py" + "env", "/opt" + "/pypi"]
    phrases = [r"\bissue #?\d", r"\bsess" + r"ion \d", r"\bthis sess" + r"ion\b"]
    phrases.append(r"\bhel" + r"per \"")
    pattern = re.compile("|".join([*map(re.escape, words), *phrases]), re.IGNORECASE)
    wrong = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.search(line):
                wrong.append(f"{name_of(path)}:{number}: {line.strip()[:80]}")
    nothing(wrong)


def is_look_up(node, tries):
    """Whether a handler belongs to `try: return TABLE[key]` and says that it is not there."""
    body = tries[node].body
    return (
        ast.unparse(node.type) in ("KeyError", "IndexError", "AttributeError")
        and len(body) == 1
        and isinstance(body[0], ast.Return)
    )


def test_no_error_is_swallowed():
    """An `except: pass` for everything hides bugs; a named error needs a comment that says why."""
    wrong = []
    for path in OURS:
        noted = comments(path)
        tries = {
            handler: node
            for node in ast.walk(TREES[path])
            if isinstance(node, ast.Try)
            for handler in node.handlers
        }
        for node in tries:
            if node.type is None:
                wrong.append(f"{name_of(path)}:{node.lineno}: bare except")
                continue
            only_pass = all(isinstance(step, ast.Pass) for step in node.body)
            near = range(node.lineno - 1, node.end_lineno + 2)
            if only_pass and not is_look_up(node, tries) and not any(n in noted for n in near):
                wrong.append(f"{name_of(path)}:{node.lineno}: passed over without a reason")
    nothing(wrong)
