"""Run every chapter once more, from another folder, and compare its pictures with those of the built book.

Usage: python -m tests.site.check_runs --run _build/rerun
       python -m tests.site.check_runs _build

"Restart and run all" has to give the same pictures each time, wherever the notebook lies. The first run is
the book's; the second is made here with --run, on a copy in an empty folder, beside the book where two
threads are free. Without --run the two are compared.
"""

import hashlib
import json
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

CHAPTERS = Path(__file__).parents[2] / "chapters"
Notebook = dict[str, Any]


def main() -> int:
    """Run all chapters, or compare two runs, and return the exit status.

    0 the same, 1 a difference or a chapter that does not run, 2 nothing to run or to compare.
    """
    match sys.argv[1:]:
        case ["--run", folder]:
            return rerun(Path(folder))
        case [folder] if (Path(folder) / ".jupyter_cache" / "executed").is_dir():
            return compare_all(Path(folder) / ".jupyter_cache" / "executed", Path(folder) / "rerun")
    print(f"expected --run FOLDER, or the folder that make book writes, got {sys.argv[1:]}", file=sys.stderr)
    return 2


def rerun(folder: Path) -> int:
    """Run every chapter and keep it with its outputs."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in sorted(CHAPTERS.glob("*.ipynb")):
        began = time.perf_counter()
        nbformat.write(run_elsewhere(path), folder / path.name)
        print(f"{path.name}: ran again in {time.perf_counter() - began:.0f} s", flush=True)
    return 0


def compare_all(cache: Path, folder: Path) -> int:
    """Compare the chapters that the book holds with those that ran again."""
    built = [json.loads(path.read_text(encoding="utf-8")) for path in cache.glob("*/base.ipynb")]
    faults, compared = [], 0
    for path in sorted(CHAPTERS.glob("*.ipynb")):
        chapter = json.loads(path.read_text(encoding="utf-8"))
        first = next((one for one in built if sources(one) == sources(chapter)), None)
        again = folder / path.name
        second = json.loads(again.read_text(encoding="utf-8")) if again.is_file() else None
        if first is None:
            faults.append(f"{path.name}: the built book has another version of this chapter")
        elif second is None or sources(second) != sources(chapter):
            faults.append(f"{path.name}: this version of the chapter did not run again")
        else:
            faults += [f"{path.name}: {fault}" for fault in compare(first, second)]
            compared += 1
    for fault in faults:
        print(fault)
    print(f"{compared} chapters have run twice, {len(faults)} differences")
    return 1 if faults or not compared else 0


def sources(notebook: Notebook) -> list[str]:
    """Return the code of a notebook, cell by cell."""
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_elsewhere(path: Path) -> Notebook:
    """Run a copy of a notebook in an empty folder and return it with its outputs."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copy(path, folder))
        notebook = nbformat.read(copy, as_version=4)
        # A busy machine is slow, not wrong; without its last messages a cell would lack a picture.
        patience = {"timeout": 3600, "startup_timeout": 600, "iopub_timeout": 600}
        NotebookClient(notebook, resources={"metadata": {"path": folder}}, **patience).execute()
        return notebook


def compare(first: Notebook, second: Notebook) -> list[str]:
    """Return a fault for each cell whose pictures differ, and one if the sliders' pictures do."""
    cells = [[cell for cell in run["cells"] if cell["cell_type"] == "code"] for run in (first, second)]
    faults = [
        f"other pictures from the cell that begins {''.join(one['source'])[:60]!r}"
        for one, other in zip(*cells, strict=True)
        if pictures(one) != pictures(other)
    ]
    if slider_pictures(first) != slider_pictures(second):
        faults.append("other pictures in the sliders")
    return faults


def pictures(cell: Notebook) -> list[str]:
    """Return a digest of each figure that a cell shows."""
    shown = [
        output["data"]["image/png"] for output in cell["outputs"] if "image/png" in output.get("data", {})
    ]
    return [hashlib.sha256("".join("".join(png).split()).encode()).hexdigest() for png in shown]


def slider_pictures(notebook: Notebook) -> list[str]:
    """Return a digest of each picture that the sliders of a notebook hold."""
    state = json.dumps(notebook["metadata"].get("widgets", {}))
    found = re.findall(r"data:image/png;base64,[A-Za-z0-9+/=]+", state)
    return sorted(hashlib.sha256(uri.encode()).hexdigest() for uri in found)


if __name__ == "__main__":
    sys.exit(main())
