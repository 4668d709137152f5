"""The comparison of two runs of a chapter, on small notebooks."""

import json

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests.site import check_runs


def notebook(png="AAAA", uri="data:image/png;base64,AAAA", text="0.1 s"):
    outputs = [
        new_output("stream", text=text),
        new_output("display_data", data={"image/png": png, "text/plain": "figure"}),
    ]
    metadata = {"widgets": {"state": {"a": {"value": f'<img src="{uri}">'}}}}
    cells = [new_markdown_cell("text"), new_code_cell("draw()", outputs=outputs)]
    return new_notebook(cells=cells, metadata=metadata)


def test_the_same_pictures():
    # Text may differ (it tells times), and so may the line breaks of a stored picture.
    assert check_runs.compare(notebook(), notebook(png="AA\nAA\n", text="0.2 s")) == []


def test_another_figure():
    found = check_runs.compare(notebook(), notebook(png="AAAB"))
    assert found == ["other pictures from the cell that begins 'draw()'"]


def test_another_slider():
    found = check_runs.compare(notebook(), notebook(uri="data:image/png;base64,AAAB"))
    assert found == ["other pictures in the sliders"]


def test_runs_in_an_empty_folder(tmp_path):
    path = tmp_path / "chapter.ipynb"
    code = "import os\nassert os.listdir() == ['chapter.ipynb'], os.listdir()\nprint('ran')"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=[new_code_cell(code)], metadata=kernel), path)
    before = path.read_text()
    (tmp_path / "neighbour").touch()
    ran = check_runs.run_elsewhere(path)
    assert ran["cells"][0]["outputs"][0]["text"] == "ran\n"
    assert path.read_text() == before


def test_nothing_to_compare_with(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["check_runs", str(tmp_path)])
    assert check_runs.main() == 2
    assert "expected the folder that make book writes" in capsys.readouterr().err


def test_a_chapter_that_was_changed_since_the_build(monkeypatch, capsys, tmp_path):
    chapters, cache = tmp_path / "chapters", tmp_path / ".jupyter_cache" / "executed" / "1"
    chapters.mkdir()
    cache.mkdir(parents=True)
    nbformat.write(new_notebook(cells=[new_code_cell("1 + 1")]), chapters / "1.ipynb")
    (cache / "base.ipynb").write_text(json.dumps(new_notebook(cells=[new_code_cell("1 + 2")])))
    monkeypatch.setattr(check_runs, "CHAPTERS", chapters)
    monkeypatch.setattr("sys.argv", ["check_runs", str(tmp_path)])
    assert check_runs.main() == 1
    assert "1.ipynb: the built book has another version" in capsys.readouterr().out
