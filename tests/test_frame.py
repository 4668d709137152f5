"""The frame: what README, contents and commands promise is there, and rooms keep their floors."""

import ast
import hashlib
import json
import re
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import invlib as iv

ROOT = Path(__file__).parents[1]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def toc_files():
    def walk(entries):
        for entry in entries:
            yield entry["file"]
            yield from walk(entry.get("sections", []))

    toc = yaml.safe_load(read("book/_toc.yml"))
    return [toc["root"], *(file for part in toc["parts"] for file in walk(part["chapters"]))]


def test_table_of_contents_lists_every_page_once():
    listed = toc_files()
    assert len(set(listed)) == len(listed)
    pages = [
        p
        for folder in ("book", "chapters")
        for p in (ROOT / folder).rglob("*")
        if p.suffix in (".md", ".ipynb")
    ]
    pages = [p for p in pages if "_static" not in p.parts and ".ipynb_checkpoints" not in p.parts]
    assert sorted(listed) == sorted(str(p.relative_to(ROOT).with_suffix("")) for p in pages)


def test_commands_in_the_prose_exist():
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), flags=re.MULTILINE))
    for page in ("README.md", "book/index.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"(?:^|`)make ([a-z-]+)", read(page), flags=re.MULTILINE))
        assert named, page
        assert named <= targets, f"{page} names commands that the Makefile does not have: {named - targets}"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "book/_static/VENDORED.md"])
def test_links_of_pages_outside_the_book_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", read(page)) if not link.startswith("http")]
    for link in links:
        assert ((ROOT / page).parent / link.split("#")[0]).exists(), link


def test_files_that_the_recipes_name_exist():
    named = re.findall(r"`((?:invlib|tests|book|data|chapters)/[\w./-]*)`", read("CONTRIBUTING.md"))
    assert len(named) >= 10
    for name in named:
        assert (ROOT / name).exists() or name == "chapters/7_name.ipynb", name


def test_hooks_before_a_commit_run_what_the_machine_runs():
    hooks = {
        hook["id"]: hook
        for repo in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
        for hook in repo["hooks"]
    }
    assert {repo["repo"] for repo in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]} == {"local"}
    assert all(hook["language"] == "system" for hook in hooks.values()), "a hook would download something"
    for tool in ("ruff check", "ruff format --check", "mypy"):
        assert f"$(BIN)/{tool}" in read("Makefile")
        assert any(f".venv/bin/{tool}" in hook["entry"] for hook in hooks.values())
    for name in re.findall(r"tests/\w+\.py", " ".join(hook["entry"] for hook in hooks.values())):
        assert (ROOT / name).exists(), name


def test_citation_names_the_book_and_the_paper():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["title"] == yaml.safe_load(read("_config.yml"))["title"]
    assert citation["license"] == "MIT"
    assert re.match(r"1\.2\.\d", citation["cff-version"])
    for entry in [citation, *citation["references"]]:
        assert entry["title"]
        assert all(
            "name" in author or {"family-names", "given-names"} <= set(author) for author in entry["authors"]
        )
    assert "MIT License" in read("LICENSE")


def test_every_room_has_a_page():
    import invlib

    pages = "\n".join(read(f"{file}.md") for file in toc_files() if "/api/" in file)
    documented = set(re.findall(r"automodule:: (\S+)", pages))
    rooms = {p.name.removesuffix(".py") for p in (ROOT / "invlib").iterdir() if (p / "__init__.py").exists()}
    # The loop has no names for a reader; its settings are those of GradientMatching.
    assert {name.split(".")[1] for name in documented} == rooms - {"search"} | {"errors"}
    for name in invlib.__all__:
        thing = getattr(invlib, name)
        if callable(thing):
            assert {thing.__module__, thing.__module__.rpartition(".")[0]} & documented, name


def test_pins_satisfy_what_the_package_asks_for():
    from packaging.requirements import Requirement

    lines = [line.split("#")[0].strip() for line in read("requirements.txt").splitlines()]
    pins = {r.name: next(iter(r.specifier)).version for line in lines if line for r in [Requirement(line)]}
    project = tomllib.loads(read("pyproject.toml"))["project"]
    wanted = project["dependencies"] + [
        r for extra in project["optional-dependencies"].values() for r in extra
    ]
    for requirement in map(Requirement, wanted):
        assert pins[requirement.name] in requirement.specifier, requirement


def definitions(body, within):
    """Yield the qualified name and the docstring of each function, class and method in a module's code."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield within + node.name, ast.get_docstring(node) or ""
            if isinstance(node, ast.ClassDef):
                yield from definitions(node.body, f"{within}{node.name}.")


def named_in(notebook):
    """Return module and qualified name of all that a notebook refers to as `iv.…` or `invlib.…`."""
    import invlib

    text = "\n".join("".join(cell["source"]) for cell in json.loads(read(notebook))["cells"])
    found = set()
    for dotted in re.findall(r"\b(?:iv|invlib)((?:\.\w+)+)", text):
        thing = invlib
        for part in dotted.split(".")[1:]:
            thing = getattr(thing, part, None)
            found.add((getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)))
    return found


def test_a_chapter_that_a_docstring_names_names_the_thing():
    named = {path.name[0]: named_in(path) for path in (ROOT / "chapters").glob("*.ipynb")}
    count = 0
    for path in (ROOT / "invlib").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for name, text in definitions(ast.parse(path.read_text(encoding="utf-8")).body, ""):
            for line in re.findall(r"^.*Taught in.*$", text, flags=re.MULTILINE):
                taught = re.fullmatch(r"Taught in: chapter (\d)", line)
                assert taught, f"{module}.{name}: {line}"
                assert (module, name) in named[taught[1]], f"{module}.{name} is not in chapter {taught[1]}"
                count += 1
    assert count >= 40


def lines_of_code(text):
    """Yield each line of the code blocks of a page, also of those within directives."""
    for _, kind, body in re.findall(r"^(`{3,})([^\n]*)\n(.*?)^\1$", text, flags=re.MULTILINE | re.DOTALL):
        if re.match(r"\{(?!code)", kind):
            yield from lines_of_code(body)
        else:
            yield from re.sub(r"\A---\n.*?^---\n", "", body, flags=re.MULTILINE | re.DOTALL).splitlines()


def test_code_on_a_page_is_no_wider_than_the_page():
    count = 0
    for page in toc_files():
        if (ROOT / f"{page}.md").exists():
            lines = list(lines_of_code(read(f"{page}.md")))
        else:
            lines = []
            for cell in json.loads(read(f"{page}.ipynb"))["cells"]:
                text = "".join(cell["source"])
                lines += text.splitlines() if cell["cell_type"] == "code" else lines_of_code(text)
        count += len(lines)
        # A longer one breaks in a window of 1280 pixels.
        assert not [line for line in lines if len(line) > 76], page
    assert count > 2000


@pytest.mark.parametrize(("folder", "count"), [("book/_static", 4), ("tests/site/vendor", 1)])
def test_vendored_files_are_unmodified(folder, count):
    sums = re.findall(r"^([0-9a-f]{64})  (\S+)$", read(f"{folder}/VENDORED.md"), flags=re.MULTILINE)
    assert len(sums) == count
    for expected, name in sums:
        assert hashlib.sha256((ROOT / folder / name).read_bytes()).hexdigest() == expected, name


def test_ten_lines_of_the_readme_run(tmp_path, monkeypatch):
    code = re.search(r"^```python\n(.*?)^```", read("README.md"), flags=re.MULTILINE | re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(code.replace("steps=1000", "steps=3"), {})
    assert (tmp_path / "found.png").stat().st_size > 0


# The rooms of the library.
PACKAGE = ROOT / "invlib"
FLOORS = {
    **dict.fromkeys(("__main__", "reconstruct_image", "rec_mult"), 8),
    **dict.fromkeys(("cli", "integrations"), 7),
    **dict.fromkeys(("auditing", "experiments", "legacy", "smoothing", "__init__"), 6),
    **dict.fromkeys(("attacks",), 5),
    **dict.fromkeys(("search", "models", "viz", "defenses"), 4),
    **dict.fromkeys(("federated", "optim", "data", "metrics"), 3),
    **dict.fromkeys(("core", "autodiff", "kernels"), 2),
    **dict.fromkeys(("settings",), 1),
    **dict.fromkeys(("errors",), 0),
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
        "defenses",
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
