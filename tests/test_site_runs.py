"""The comparison of two runs of a chapter, on small notebooks."""

import nbformat
import pytest
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
    assert "or the folder that make book writes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("built", "again", "said"),
    [
        ("1 + 2", "1 + 1", "1.ipynb: the built book has another version"),
        ("1 + 1", "1 + 2", "1.ipynb: this version of the chapter did not run again"),
        ("1 + 1", None, "1.ipynb: this version of the chapter did not run again"),
        ("1 + 1", "1 + 1", "1 chapters have run twice, 0 differences"),
    ],
)
def test_only_one_version_of_a_chapter_is_compared(monkeypatch, capsys, tmp_path, built, again, said):
    chapters, cache, second = (tmp_path / name for name in ("chapters", ".jupyter_cache/executed/1", "rerun"))
    for folder in (chapters, cache, second):
        folder.mkdir(parents=True)
    for path, code in ((chapters / "1.ipynb", "1 + 1"), (cache / "base.ipynb", built)):
        nbformat.write(new_notebook(cells=[new_code_cell(code)]), path)
    if again:
        nbformat.write(new_notebook(cells=[new_code_cell(again)]), second / "1.ipynb")
    monkeypatch.setattr(check_runs, "CHAPTERS", chapters)
    monkeypatch.setattr("sys.argv", ["check_runs", str(tmp_path)])
    assert check_runs.main() == (0 if said.startswith("1 chapters") else 1)
    assert said in capsys.readouterr().out
