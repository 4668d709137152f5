"""The chapters as files: what every one has, and what none may hold."""

import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
SECTIONS = {
    "where it fails": r"^#+ .*\bfails?\b",
    "what defends against it": r"^#+ .*\bdefends?\b",
    "summary": r"^#+ .*\bsummary\b",
    "exercises": r"^#+ .*\bexercises\b",
    "further reading": r"^#+ .*\bfurther reading\b",
}

HEADER = {
    "objectives": r":::\{admonition\} What you will be able to do\n:class: tip\n(- .+\n){3,}",
    "prerequisites": r"^\*\*You need\*\* \S",
    "run time": r"^\*\*Run time\*\*: about \d+ s on a 2-core CPU\.",
    "data": r"^\*\*Data\*\*: \S",
}
BOXES = {
    "pitfalls": r"^:::\{admonition\} Pitfalls\n:class: warning\n(- .+\n){3,}",
    "defences": r"^:::\{admonition\} What defends against this.*\n:class: important\n",
}
# Other spellings of the book's words.
MISSPELT = r"honest but curious server|gradient-matching|label-inference|Fed-?(?:avg|sgd)|Fed-(?:Avg|SGD)"

pytestmark = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def notebook(path):
    return json.loads(path.read_text(encoding="utf-8"))


def cells(path, kind):
    return [cell for cell in notebook(path)["cells"] if cell["cell_type"] == kind]


def prose(path):
    return "\n\n".join("".join(cell["source"]) for cell in cells(path, "markdown"))


def test_no_outputs_are_stored(path):
    stored = [
        index
        for index, cell in enumerate(cells(path, "code"))
        if cell["outputs"] or cell["execution_count"] is not None
    ]
    assert not stored, "outputs come from the build; clear them (jupyter nbconvert --clear-output --inplace)"


def test_runs_on_the_python3_kernel(path):
    assert notebook(path)["metadata"]["kernelspec"]["name"] == "python3"


def test_begins_with_its_only_title(path):
    first = "".join(notebook(path)["cells"][0]["source"])
    assert first.startswith("# ")
    outside_code = re.sub(r"^```.*?^```", "", prose(path), flags=re.MULTILINE | re.DOTALL)
    assert len(re.findall(r"^# ", outside_code, flags=re.MULTILINE)) == 1


@pytest.mark.parametrize("section", SECTIONS)
def test_has_section(path, section):
    assert re.search(SECTIONS[section], prose(path), flags=re.MULTILINE | re.IGNORECASE), section


@pytest.mark.parametrize("part", HEADER)
def test_begins_with(path, part):
    first = "".join(notebook(path)["cells"][0]["source"])
    assert re.search(HEADER[part], first, flags=re.MULTILINE), part


@pytest.mark.parametrize("box", BOXES)
def test_has_box(path, box):
    assert re.search(BOXES[box], prose(path), flags=re.MULTILINE), box


def test_run_time_is_within_the_budget_and_the_same_on_the_front_page(path):
    said = int(re.search(r"\*\*Run time\*\*: about (\d+) s", prose(path))[1])
    assert said <= 90
    front = (ROOT / "book" / "index.md").read_text(encoding="utf-8")
    card = re.search(rf":link: \.\./chapters/{path.stem}\n.*?\nComputes in about (\d+) s", front, re.DOTALL)
    assert int(card[1]) == said


def test_has_a_slider(path):
    sources = ["".join(cell["source"]) for cell in cells(path, "code")]
    assert any(re.search(r"viz\.(?:scrubber|wipe|panel)\(", source) for source in sources)


def test_ends_with_reading_that_is_cited(path):
    last = "".join(notebook(path)["cells"][-1]["source"])
    assert last.startswith("## Further reading")
    assert len(re.findall(r"^- .*\{cite:t\}", last, flags=re.MULTILINE)) >= 3


def test_words_have_one_spelling(path):
    assert not re.findall(MISSPELT, prose(path))


def test_solutions_are_code_that_runs_with_the_chapter(path):
    # The build runs every cell and stops at an error, but for cells with one of these tags.
    excused = {"skip-execution", "raises-exception"}
    text, between, solved = notebook(path)["cells"], False, []
    for cell in text:
        source = "".join(cell["source"])
        if "{solution-start}" in source:
            between = True
            solved.append(0)
        elif "{solution-end}" in source:
            between = False
        elif between and cell["cell_type"] == "code":
            solved[-1] += 1
            assert not excused & set(cell["metadata"].get("tags", []))
    assert len(solved) >= 3
    assert all(solved), "a solution has no code"


def test_exercises_have_folded_solutions(path):
    text = prose(path)
    exercises = re.findall(r"^`{3,}\{exercise[^}]*\}.*?^:label: (\S+)", text, flags=re.MULTILINE | re.DOTALL)
    solutions = re.findall(
        r"^`{3,}\{solution(?:-start)?\} (\S+)\n(.*?)^`{3,}", text, re.MULTILINE | re.DOTALL
    )
    assert len(exercises) >= 3
    assert sorted(label for label, _ in solutions) == sorted(exercises)
    assert all(":class: dropdown" in options for _, options in solutions), "a solution is not folded"


def test_figures_have_alt_text(path):
    for cell in cells(path, "code"):
        meta = cell["metadata"].get("mystnb", {})
        if "figure" in meta:
            alt = meta.get("image", {}).get("alt", "")
            assert len(alt) >= 20, f"figure {meta['figure'].get('name')} has no description: {alt!r}"


def test_sliders_have_alt_text(path):
    for cell in cells(path, "code"):
        source = "".join(cell["source"])
        for call in re.findall(r"viz\.(?:scrubber|wipe|panel)\(", source):
            assert "alt=" in source, f"{call}... has no alt="


def test_every_drawing_cell_is_a_figure_or_a_slider(path):
    for cell in cells(path, "code"):
        source = "".join(cell["source"])
        if re.search(r"viz\.(?:compare|grid|filmstrip|convergence|lines|bars)\(", source):
            assert "figure" in cell["metadata"].get("mystnb", {}), f"no caption and name for:\n{source}"


def test_cell_ids_are_unique(path):
    ids = [cell["id"] for cell in notebook(path)["cells"]]
    assert len(set(ids)) == len(ids)


def test_no_path_of_a_machine(path):
    assert not re.search(r"(?<![\w.])/(?:home|Users|tmp|work|mnt|root)/", path.read_text(encoding="utf-8"))


def test_is_listed_in_the_table_of_contents(path):
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8"))
    listed = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    assert f"chapters/{path.stem}" in listed
