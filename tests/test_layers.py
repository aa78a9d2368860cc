"""Code structure: packages, imports that point down, short files and functions, few arguments."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SPINE = {"main": 3, "evaluate": 2, "model": 1, "data": 1}  # and 0 for all of reclm
MAY_IMPORT = {  # subpackage: those it may import; "" is reclm itself, which all may use
    "": {""},
    "data": {"", "data"},
    "nn": {"", "data", "nn"},
    "run": {"", "data", "run"},
    "engines": {"", "data", "engines"},  # prepare data with polars or Spark, which are extras
    "adapt": {"", "data", "nn", "run", "adapt"},  # makes trained models smaller, or fits them to other data
    "serve": {
        "",
        "data",
        "nn",
        "run",
        "adapt",
        "serve",
    },  # applies trained models, so it also imports model.py
}
MOST_LINES, MOST_OF_SPINE, MOST_OF_PACKAGE = 400, 1230, 8750
MOST_OF_ROOM = {"serve": 3300, "adapt": 1000, "engines": 400}  # optional rooms, which the rest does not need
MOST_LINES_OF_FUNCTION, MOST_ARGUMENTS = 60, 8
PACKAGE = sorted((ROOT / "reclm").rglob("*.py"))
FILES = [*(ROOT / f"{name}.py" for name in SPINE), *PACKAGE]
PROGRAM = [path for path in FILES if path.name != "__init__.py"]


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


EVERY_FILE = pytest.mark.parametrize("path", PROGRAM, ids=name_of)


def tree(path):
    return ast.parse(path.read_text())


def functions(path):
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def imports(path):
    """Dotted names of all modules that a file imports, at any depth: "torch.nn", "reclm.run.dist", "data"."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            inside = ROOT.joinpath(*node.module.split("."))
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if inside.is_dir() else {node.module}
    return found


def room(module):
    """ "reclm.nn.losses" -> "nn", "reclm.config" -> "", anything else -> None."""
    parts = module.split(".")
    if parts[0] != "reclm":
        return None
    return parts[1] if len(parts) > 2 else ""


@pytest.mark.parametrize("name", list(SPINE))
def test_spine_imports_point_down(name):
    upward = [
        other for other in imports(ROOT / f"{name}.py") if SPINE.get(other.split(".")[0], 0) >= SPINE[name]
    ]
    assert upward == []


@EVERY_FILE
def test_rooms_know_only_what_is_below_them(path):
    ours = room(name_of(path))
    if ours is None:
        return
    found = imports(path)
    spine = {other.split(".")[0] for other in found} & SPINE.keys()
    assert spine <= ({"model"} if ours == "serve" else set()), "the package imports the spine"
    assert {room(other) for other in found} - {None} <= MAY_IMPORT[ours]


def test_the_rooms_are_those_of_the_plan():
    folders = {path.parent.relative_to(ROOT / "reclm").as_posix() for path in PACKAGE}
    assert folders == {".", *filter(None, MAY_IMPORT)}
    assert not {"utils", "helpers", "common", "manager"} & {path.stem for path in PACKAGE}


@EVERY_FILE
def test_data_is_made_without_torch(path):
    if room(name_of(path)) in ("data", ""):
        allowed = {"metrics", "draws"}  # pure functions of tensors
        assert "torch" not in {other.split(".")[0] for other in imports(path)} or path.stem in allowed


@pytest.mark.parametrize("name", ["nn.losses", "nn.context", "metrics"])
def test_maths_imports_torch_only(name):
    path = ROOT / "reclm" / f"{name.replace('.', '/')}.py"
    ours = imports(path) - {"reclm.draws"}  # maths too
    assert {other.split(".")[0] for other in ours} <= {"torch", *sys.stdlib_module_names}


def test_package_has_no_import_cycle():
    ours = {name_of(path): imports(path) for path in PACKAGE}
    while free := [name for name, below in ours.items() if not below & ours.keys()]:
        for name in free:
            del ours[name]
    assert ours == {}


def asks_rank(node):
    """rank(), data_rank() or dist.rank(), get_rank() likewise, os.environ["RANK"]."""
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        return name in ("rank", "get_rank", "data_rank")
    return isinstance(node, ast.Name) and node.id in ("rank", "data_rank")


@EVERY_FILE
def test_processes_are_told_apart_in_three_files_only(path):
    if path.stem in ("dist", "logger", "checkpoint"):
        return
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Compare):
            compared = [part for side in (node.left, *node.comparators) for part in ast.walk(side)]
            assert not any(map(asks_rank, compared)), f"line {node.lineno} compares a process"
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            assert not any(map(asks_rank, ast.walk(node.test))), f"line {node.lineno} branches on a process"
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            assert name != "is_main", f"line {node.lineno} asks for the main process"
        if isinstance(node, ast.Constant):
            assert node.value not in ("RANK", "LOCAL_RANK"), f"line {node.lineno}"


@EVERY_FILE
def test_functions_are_short(path):
    for node in functions(path):
        length = node.end_lineno - node.lineno + 1
        assert length <= MOST_LINES_OF_FUNCTION, f"{node.name} has {length} lines"
        args = node.args
        count = len(args.posonlyargs) + len(args.args) + len(args.kwonlyargs)
        assert count <= MOST_ARGUMENTS, f"{node.name} has {count} arguments"


@EVERY_FILE
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


def test_the_house_is_read_in_an_afternoon():
    """Lines that are nothing but a comment do not count: they make the reading easier."""
    lines = {
        path: sum(not line.lstrip().startswith("#") for line in path.read_text().splitlines())
        for path in PROGRAM
    }
    assert sum(lines[ROOT / f"{name}.py"] for name in SPINE) <= MOST_OF_SPINE
    package = [path for path in lines if room(name_of(path)) not in (None, *MOST_OF_ROOM)]
    assert sum(lines[path] for path in package) <= MOST_OF_PACKAGE
    for optional, most in MOST_OF_ROOM.items():
        assert sum(count for path, count in lines.items() if room(name_of(path)) == optional) <= most


@EVERY_FILE
def test_datasets_and_contexts_have_their_type(path):
    """`ctx` of an autograd function is torch's own."""
    for node in functions(path):
        for arg in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
            if arg.arg not in ("dataset", "ctx") or node.name in ("forward", "backward") and _static(node):
                continue
            assert arg.annotation is not None, f"{node.name}, line {node.lineno}: {arg.arg} has no type"


def _static(node):
    return any(getattr(decorator, "id", "") == "staticmethod" for decorator in node.decorator_list)


def test_the_task_is_asked_for_in_two_places_at_most():
    """Tasks are entries of dicts next to the code that uses them."""
    asked = []
    for path in PROGRAM:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                if any(getattr(side, "attr", getattr(side, "id", "")) == "task" for side in sides):
                    asked.append(f"{name_of(path)}:{node.lineno}")
    assert len(asked) <= 2, asked


@EVERY_FILE
def test_every_file_says_what_it_is(path):
    assert ast.get_docstring(tree(path))
