"""Who may import what: read from the source, so that the boundaries hold without anyone watching."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for folder in ("promoe_ds", "evaluation", "launchers") for p in (ROOT / folder).rglob("*.py"))
OURS = [p for p in SOURCES if p.is_relative_to(ROOT / "promoe_ds")]
LEVELS = (
    {"_version", "config"},
    {"utils"},
    {"data", "moe", "diffusion"},
    {"models", "recipes"},
    {"costs"},
    {"parallel", "checkpoint"},
    {"sampling"},
    {"train"},
    {"api", "formats", "analysis"},
    {"evaluation", "cli"},
)
"""the rooms of promoe_ds, foundations first: a module imports from its own room and from levels above its own here;
rooms of one level do not know each other"""
WITHOUT_DISTRIBUTED = (
    "promoe_ds/models",
    "promoe_ds/moe",
    "promoe_ds/diffusion",
    "promoe_ds/data",
    "promoe_ds/sampling",
    "promoe_ds/checkpoint",
    "promoe_ds/analysis",
    "evaluation/",
)


def imports(source: str, ours: frozenset[str] = frozenset()) -> set[str]:
    """Every module imported anywhere in a source: in functions, under TYPE_CHECKING, and by a string that is the name
    of one of `ours`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and node.value in ours:
            found.add(str(node.value))
    return found


def named(path: Path) -> str:
    """The module of a file of promoe_ds."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module of promoe_ds -> the modules of promoe_ds that it imports; of a package, only where a name of it is meant.

    `promoe_ds` alone counts neither as a string, which is its name, nor where a module inside it is meant.
    """
    ours = frozenset(sources) - {"promoe_ds"}
    out = {}
    for module, source in sources.items():
        out[module] = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module in sources:
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                out[module] |= {name if name in sources else node.module for name in whole}
            elif isinstance(node, ast.Import):
                out[module] |= {alias.name for alias in node.names if alias.name in sources}
            elif isinstance(node, ast.Constant) and node.value in ours:
                out[module].add(str(node.value))
        out[module].discard(module)
    return out


def upward(imported: dict[str, set[str]]) -> list[str]:
    """Imports from a room to one that is not on a level before it: "MODULE imports MODULE"."""

    def level(module: str) -> int:
        room = module.split(".")[1]
        return next((i for i, rooms in enumerate(LEVELS) if room in rooms), -1)

    edges = [(a, b) for a, those in imported.items() for b in those if a != "promoe_ds"]
    return [f"{a} imports {b}" for a, b in edges
            if b == "promoe_ds" or (a.split(".")[1] != b.split(".")[1] and level(b) >= level(a))]  # fmt: skip


def circle(imported: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, or none."""
    try:
        graphlib.TopologicalSorter(imported).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def within(module: str, name: str) -> bool:
    return module == name or module.startswith(f"{name}.")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_boundaries(path: Path) -> None:
    name, found = str(path.relative_to(ROOT)), imports(path.read_text(encoding="utf-8"))
    if not name.startswith("promoe_ds/parallel/"):
        assert not any(within(module, "deepspeed") for module in found), "only promoe_ds/parallel imports deepspeed"
    if name.startswith(WITHOUT_DISTRIBUTED):
        assert not any(within(module, "torch.distributed") for module in found)
    if not name.startswith(("promoe_ds/analysis/", "launchers/")):
        assert not any(within(module, "promoe_ds.analysis") for module in found), (
            "analysis is the last before launchers"
        )
    assert not any(within(module, "evaluation") or within(module, "launchers") for module in found), (
        "say promoe_ds.evaluation, promoe_ds.cli: a file of the working directory may have the short name"
    )
    if name.startswith("evaluation/"):
        known = ("promoe_ds.config", "promoe_ds.utils.files", "promoe_ds.utils.outputs", "promoe_ds.utils.pictures",
                 "promoe_ds.utils.ranks", "promoe_ds.utils.tensors", "promoe_ds.evaluation")  # fmt: skip
        ours = {module for module in found if within(module, "promoe_ds")}
        assert all(any(within(module, part) for part in known) for module in ours), ours
    if name == "promoe_ds/utils/files.py":
        assert all(module.partition(".")[0] in sys.stdlib_module_names for module in found), "evaluation/ uses it"


def test_imports_point_one_way() -> None:
    modules = {named(path): path.read_text(encoding="utf-8") for path in OURS}
    rooms = {name.split(".")[1] for name in modules if "." in name}
    assert rooms <= set().union(*LEVELS), "add it to LEVELS"
    imported = graph(modules)
    assert upward(imported) == []
    assert circle(imported) == []
    between = {room: {b.split(".")[1] for a in imported if a.split(".")[1:2] == [room] for b in imported[a]} - {room}
               for room in rooms}  # fmt: skip
    assert circle(between) == []


@pytest.mark.parametrize(
    ("module", "line", "up", "ring"),
    [
        ("promoe_ds.config.schema", "def late(): from promoe_ds.data import order", True, False),
        ("promoe_ds.config.schema", "importlib.import_module('promoe_ds.moe.routers')", True, True),
        ("promoe_ds.data.order", "from promoe_ds.moe.cosine import cosine", True, False),  # of one level
        ("promoe_ds.utils.files", "import promoe_ds", True, True),
        ("promoe_ds.moe.router", "if TYPE_CHECKING: from promoe_ds.moe.layer import MoELayer", False, True),
        ("promoe_ds.moe.router", "NAME = 'promoe_ds.moe.experts'", False, True),
        ("promoe_ds.moe.experts", "from promoe_ds.moe import router", False, False),
    ],
)
def test_an_added_circle_or_upward_import_is_found(module: str, line: str, up: bool, ring: bool) -> None:
    modules = {named(path): path.read_text(encoding="utf-8") for path in OURS}
    imported = graph(modules | {module: f"{modules[module]}\n{line}\n"})
    assert (upward(imported) != [], circle(imported) != []) == (up, ring)


def test_a_module_is_imported_by_its_name_in_no_string_but_that_of_the_bundle() -> None:
    """And by none that is put together when it runs, but routers, which are found in their folder."""
    modules = frozenset(map(named, OURS)) - {"promoe_ds"}
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.Constant) and node.value in modules) or path.parent.name == "formats", path
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
                assert isinstance(node.args[0], ast.Constant) or path.parent.name == "routers", path


def test_only_the_compiler_replaces_functions_of_a_module() -> None:
    """Two that replaced the same one would undo each other: whoever looks on uses hooks."""
    found = set()
    for path in OURS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign):
                targets = [t for t in node.targets if isinstance(t, ast.Attribute) and ast.unparse(t.value) != "self"]
                found |= {path.name for t in targets if t.attr in ("forward", "attend", "activation", "backends")}
    assert found == {"compiled.py"}


def test_few_modules_at_the_root_and_no_two_of_one_name() -> None:
    assert len([path for path in OURS if path.parent == ROOT / "promoe_ds"]) <= 3
    names = [path.stem for path in OURS if path.stem != "__init__"]
    assert [name for name in names if names.count(name) > 1] == []


def test_what_the_wheel_ships_imports_what_it_ships_and_what_is_declared() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines += [line for name, extra in project["optional-dependencies"].items() if name != "dev" for line in extra]
    declared = {re.split(r"[\[=<>]", line)[0].lower().replace("_", "-") for line in lines}
    packages = importlib.metadata.packages_distributions()
    for path in SOURCES:
        for module in {name.split(".")[0] for name in imports(path.read_text(encoding="utf-8"))}:
            if module not in sys.stdlib_module_names and module != "promoe_ds":
                names = {name.lower().replace("_", "-") for name in packages.get(module, [module])}
                assert names & declared, f"{path}: {module} is not declared"


def test_tensors_are_written_by_the_one_writer() -> None:
    """safetensors makes files of mode 0600; `files.atomic` gives them the mode of any other."""
    saves = inside = 0
    for path in (*SOURCES, *(ROOT / "benchmarks").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        blocks = [node for node in ast.walk(tree) if isinstance(node, ast.With)]
        written = [block for block in blocks if "atomic(" in ast.unparse(block.items[0])]
        saves += count_saves(tree)
        inside += sum(map(count_saves, written))
    assert inside == saves > 0


def count_saves(tree: ast.AST) -> int:
    calls = (ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))
    return sum(name.rpartition(".")[2] == "save_file" for name in calls)


def test_only_the_parallel_package_touches_process_groups() -> None:
    for path in SOURCES:
        name = str(path.relative_to(ROOT))
        if name.startswith(("promoe_ds/models", "promoe_ds/moe", "promoe_ds/diffusion", "promoe_ds/train")):
            assert "torch.distributed" not in path.read_text(encoding="utf-8"), name


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_house_sizes(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name} is longer than 60 lines"
