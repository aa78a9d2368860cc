"""The house: imports point down, ranks are compared in three files, functions and files stay short."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SPINE = {"main": 3, "evaluate": 2, "model": 1, "data": 1}  # and 0 for all of reclm
PACKAGE = sorted(path.stem for path in (ROOT / "reclm").glob("*.py") if path.stem != "__init__")
FILES = [*(ROOT / f"{name}.py" for name in SPINE), *(ROOT / "reclm" / f"{name}.py" for name in PACKAGE)]
EVERY_FILE = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def tree(path):
    return ast.parse(path.read_text())


def imports(path):
    """Dotted names of all that a file imports, at any depth: "torch.nn", "reclm.run.dist", "data"."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = {f"reclm.{alias.name}" for alias in node.names}
            found |= names if node.module == "reclm" else {node.module}
    return found


def layer(name):
    return SPINE.get(name.split(".")[0])


@pytest.mark.parametrize("name", list(SPINE))
def test_spine_imports_point_down(name):
    upward = [other for other in imports(ROOT / f"{name}.py") if (layer(other) or 0) >= SPINE[name]]
    assert upward == []


@pytest.mark.parametrize("name", PACKAGE)
def test_package_never_imports_the_spine(name):
    assert [other for other in imports(ROOT / "reclm" / f"{name}.py") if layer(other)] == []


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("errors", set()),
        ("config", {"errors"}),
        ("dist", {"errors"}),
        ("logger", {"errors", "dist", "metrics"}),
        ("losses", set()),
        ("metrics", set()),
        ("optim", {"config"}),
    ],
)
def test_foundations_import_nothing_of_ours(name, allowed):
    ours = {other for other in imports(ROOT / "reclm" / f"{name}.py") if other.startswith("reclm")}
    assert ours <= {f"reclm.{other}" for other in allowed}


@pytest.mark.parametrize("name", ["losses", "metrics", "optim"])
def test_maths_imports_torch_only(name):
    roots = {other.split(".")[0] for other in imports(ROOT / "reclm" / f"{name}.py")}
    assert roots <= {"torch", "reclm", *sys.stdlib_module_names}


def test_package_has_no_import_cycle():
    ours = {
        name: {other[6:] for other in imports(ROOT / "reclm" / f"{name}.py") if other.startswith("reclm.")}
        for name in PACKAGE
    }
    while free := [name for name, below in ours.items() if not below & ours.keys()]:
        for name in free:
            del ours[name]
    assert ours == {}


def asks_rank(node):
    """rank() or dist.rank(), get_rank() likewise, os.environ["RANK"]."""
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        return name in ("rank", "get_rank")
    return isinstance(node, ast.Name) and node.id == "rank"


@EVERY_FILE
def test_rank_is_compared_in_three_files_only(path):
    if path.stem in ("dist", "logger", "checkpoint"):
        return
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Compare):
            compared = [part for side in (node.left, *node.comparators) for part in ast.walk(side)]
            assert not any(map(asks_rank, compared)), f"line {node.lineno} compares a rank"
        if isinstance(node, (ast.If, ast.IfExp, ast.While)):
            assert not any(map(asks_rank, ast.walk(node.test))), f"line {node.lineno} branches on a rank"
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            assert name != "is_main", f"line {node.lineno} asks for the main rank"
        if isinstance(node, ast.Constant):
            assert node.value not in ("RANK", "LOCAL_RANK"), f"line {node.lineno}"


@EVERY_FILE
def test_functions_are_short(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"
            args = node.args
            count = len(args.posonlyargs) + len(args.args) + len(args.kwonlyargs)
            assert count <= 8, f"{node.name} has {count} arguments"


@pytest.mark.parametrize("name", list(SPINE))
def test_spine_files_are_short(name):
    assert len((ROOT / f"{name}.py").read_text().splitlines()) < 400


def test_no_drawers_for_odds_and_ends():
    assert not {"utils", "helpers", "common", "manager"} & set(PACKAGE)
    assert [path for path in (ROOT / "reclm").iterdir() if path.is_dir() and path.name != "__pycache__"] == []


@EVERY_FILE
def test_every_file_says_what_it_is(path):
    assert ast.get_docstring(tree(path))
