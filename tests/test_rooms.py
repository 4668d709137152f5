"""The rooms of the library: a room imports rooms of lower floors only, and no two files import each other."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import invlib as iv

PACKAGE = Path(__file__).parents[1] / "invlib"
FLOORS = {
    **dict.fromkeys(("__main__", "reconstruct_image", "rec_mult"), 8),
    **dict.fromkeys(("cli",), 7),
    **dict.fromkeys(("experiments", "legacy", "__init__"), 6),
    **dict.fromkeys(("attacks",), 5),
    **dict.fromkeys(("search", "models", "viz"), 4),
    **dict.fromkeys(("federated", "optim", "data", "metrics"), 3),
    **dict.fromkeys(("core", "autodiff", "kernels"), 2),
    **dict.fromkeys(("errors",), 1),
}


def module(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module(path): ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
PACKAGES = {module(path): path.parent for path in PACKAGE.rglob("__init__.py")}


def imported(tree):
    """Every import, also inside functions and for the type checker alone: the file, and the name or None."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: expected absolute imports"
            for name in (alias.name for alias in node.names):
                file = f"{node.module}.{name}" in TREES
                yield (f"{node.module}.{name}", None) if file else (node.module, name)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)


IMPORTS = {name: {file for file, _ in imported(tree) if file in TREES} for name, tree in TREES.items()}


def room(name):
    return name.split(".")[1] if "." in name else "__init__"


def test_every_room_has_a_floor():
    assert {room(name) for name in TREES} == set(FLOORS)


def test_a_room_imports_rooms_of_lower_floors_only():
    upwards = [
        f"{name} -> {other}"
        for name, others in IMPORTS.items()
        for other in others
        if room(other) != room(name) and FLOORS[room(other)] >= FLOORS[room(name)]
    ]
    assert not upwards


def test_files_form_no_circle():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_packages_define_nothing():
    for name in PACKAGES:
        defined = {n.name for n in ast.walk(TREES[name]) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        assert defined <= ({"__getattr__", "__dir__"} if name == "invlib" else set()), name


def test_no_file_is_called_like_a_thing_that_its_package_hands_on():
    for name, folder in PACKAGES.items():
        handed_on = {thing for _, thing in imported(TREES[name]) if thing is not None}
        files = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
        assert not handed_on & files, name


def test_the_face_shows_every_name():
    modules = {
        "analytic",
        "data",
        "errors",
        "experiments",
        "kernels",
        "labels",
        "legacy",
        "metrics",
        "models",
    }
    modules |= {"objectives", "optimizers", "priors", "smoothing", "training", "viz"}
    assert {*modules, *iv.__all__} <= set(dir(iv))
    assert all(isinstance(getattr(iv, name), ModuleType) for name in modules)
