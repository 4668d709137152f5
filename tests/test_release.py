"""What a release says of itself, what its archives hold, and the workflow that checks it."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import invlib
from tests import check_dist

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_written_once_and_the_same_everywhere() -> None:
    assert "version" not in PROJECT["project"]
    assert PROJECT["project"]["dynamic"] == ["version"]
    source = read(PROJECT["tool"]["hatch"]["version"]["path"])
    assert re.search(r'^__version__ = "(.+)"$', source, flags=re.MULTILINE)[1] == invlib.__version__
    newest, date = re.findall(r"^## (\d\S+) - (\S+)$", CHANGELOG, flags=re.MULTILINE)[0]
    assert invlib.__version__ == newest == CITATION["version"]
    assert date == str(CITATION["date-released"])


def test_the_changelog_keeps_its_form() -> None:
    headings = re.findall(r"^##? .+$", CHANGELOG, flags=re.MULTILINE)
    assert headings[:2] == ["# Changelog", "## Unreleased"]
    versions = [re.fullmatch(r"## (\d+)\.(\d+)\.(\d+) - (\d{4}-\d\d-\d\d)", line) for line in headings[2:]]
    assert len(versions) >= 2
    assert all(versions), headings
    numbers = [tuple(map(int, found.groups()[:3])) for found in versions if found]
    assert numbers == sorted(set(numbers), reverse=True)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for section in re.split(r"^## .+$", CHANGELOG, flags=re.MULTILINE)[1:]:
        named = re.findall(r"^### (.+)$", section, flags=re.MULTILINE)
        assert set(named) <= kinds
        assert len(named) == len(set(named))


def test_the_citation_says_what_the_package_says() -> None:
    about = PROJECT["project"]
    assert CITATION["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(CITATION)
    assert [author["name"] for author in CITATION["authors"]] == [one["name"] for one in about["authors"]]
    assert (CITATION["license"], CITATION["type"]) == (about["license"], "software")
    assert CITATION["keywords"] == about["keywords"]
    (paper,) = CITATION["references"]
    assert (paper["type"], paper["year"], len(paper["authors"])) == ("conference-paper", 2020, 4)
    assert paper["identifiers"][0]["value"] == "arXiv:2003.14053"


def test_the_hosted_workflow_runs_what_the_machine_runs() -> None:
    (path,) = (ROOT / ".github/workflows").glob("*.yml")
    text = path.read_text(encoding="utf-8")
    assert "secrets." not in text
    (job,) = yaml.safe_load(text)["jobs"].values()
    assert job["steps"][-1]["run"] == ".ci/run"
    (python,) = (
        step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", "")
    )
    assert f"Programming Language :: Python :: {python}" in PROJECT["project"]["classifiers"]


def test_the_machine_runs_every_check() -> None:
    checks = {*re.findall(r"^(check-\w+):", read("Makefile"), flags=re.MULTILINE)}
    checks.remove("check-flower")  # minutes, most of them a download
    assert len(checks) == 3
    commands = re.findall(r"^make --no-print-directory (.*)$", read(".ci/run"), flags=re.MULTILINE)
    made = {name for command in commands for name in command.split()}
    assert made >= {"test", "book", *checks}


# The check of the archives, without building them.


def test_a_source_archive_is_whole_and_has_nothing_more() -> None:
    names = [f"{top}/x" if "." not in top else top for top in check_dist.SOURCE]
    assert not list(check_dist.source_faults(names))
    names.remove("LICENSE/x")
    found = list(check_dist.source_faults([*names, ".ci/run", "invlib/__pycache__/a.pyc"]))
    assert found == [
        "source archive: LICENSE is missing",
        "source archive: .ci does not belong there",
        "source archive: invlib/__pycache__/a.pyc was made by a program",
    ]


def test_a_wheel_is_whole_and_has_nothing_more() -> None:
    expected = check_dist.expected_in_wheel(ROOT)
    assert {"invlib/py.typed", "invlib/_data/samples.npz", "invlib/_data/results/table1.jsonl"} <= expected
    assert "invlib/_data/weights/ResNet20-cifar10.safetensors" in expected
    assert not [name for name in expected if name.endswith((".pyc", "make_samples.py"))]
    about = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    names = [*expected, *(f"invlib-0.dist-info/{name}" for name in about)]
    assert not list(check_dist.wheel_faults(names, expected))
    names.remove("invlib/py.typed")
    names.remove("invlib-0.dist-info/licenses/LICENSE")
    assert list(check_dist.wheel_faults([*names, "tests/a.py"], expected)) == [
        "wheel: invlib/py.typed is missing",
        "wheel: licenses/LICENSE is missing",
        "wheel: tests/a.py does not belong there",
    ]


def test_the_wheel_is_lent_what_it_requires_and_no_extra() -> None:
    def names(required: list[str]) -> set[str]:
        return {one.metadata["Name"].lower() for one in check_dist.closure(required)}

    assert names(["pytest>=8"]) >= {"pytest", "pluggy", "packaging"}
    assert not names(["matplotlib>=3; extra == 'viz'", "triton>=3"])
    lent = names(PROJECT["project"]["dependencies"])
    assert {"torch", "numpy", "typing-extensions", "lightning-utilities"} <= {
        n.replace("_", "-") for n in lent
    }
    assert not lent & {"matplotlib", "torchvision", "pytest", "jupyterlab"}
    with pytest.raises(metadata.PackageNotFoundError):
        names(["no-such-package-here"])
