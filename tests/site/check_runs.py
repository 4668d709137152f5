"""Run every chapter once more, from another folder, and compare its pictures with those of the built book.

Usage: python -m tests.site.check_runs _build

"Restart and run all" has to give the same pictures each time, wherever the notebook lies. The first run is
the book's; the second is made here, on a copy in an empty folder.
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
    """Compare all chapters and return the exit status: 0 the same, 1 a difference, 2 nothing to compare."""
    if len(sys.argv) != 2 or not (cache := Path(sys.argv[1]) / ".jupyter_cache" / "executed").is_dir():
        print(f"expected the folder that make book writes, got {sys.argv[1:]}", file=sys.stderr)
        return 2
    built = [json.loads(path.read_text(encoding="utf-8")) for path in cache.glob("*/base.ipynb")]
    faults = []
    for path in sorted(CHAPTERS.glob("*.ipynb")):
        chapter = json.loads(path.read_text(encoding="utf-8"))
        first = next((one for one in built if sources(one) == sources(chapter)), None)
        if first is None:
            faults.append(f"{path.name}: the built book has another version of this chapter")
            continue
        began = time.perf_counter()
        found = compare(first, run_elsewhere(path))
        faults += [f"{path.name}: {fault}" for fault in found]
        print(f"{path.name}: {time.perf_counter() - began:.0f} s, {len(found)} differences", flush=True)
    for fault in faults:
        print(fault)
    return 1 if faults or not built else 0


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
