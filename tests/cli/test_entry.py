"""python -m invlib."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import invlib
from invlib import cli, models
from invlib.cli import train
from invlib.cli.status import exit_status
from invlib.core.interrupt import of_a_command
from invlib.errors import DeviceError


def test_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["invlib", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("invlib", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"invlib {invlib.__version__}\n"


def test_no_command_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_models_are_listed_with_their_sizes_and_weights(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = models.build

    def without_torchvision(name: str):
        if name == "resnet18":
            raise DeviceError("no torchvision")
        return build(name)

    monkeypatch.setattr(models, "names", lambda: ("ConvNet8", "LeNetZhu", "resnet18"))
    monkeypatch.setattr(models, "available", lambda: {"LeNetZhu": ("fashion-mnist",)})
    monkeypatch.setattr(models, "model_card", lambda *_: {"accuracy": 0.9})
    monkeypatch.setattr(models, "build", without_torchvision)
    assert cli.main(["models"]) == 0
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        ["ConvNet8", "48,634"],
        ["LeNetZhu", "15,826", "fashion-mnist (accuracy 0.9)"],
        ["resnet18", "torchvision"],
    ]


def test_embedded_images_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["patches32", "60"] for line in lines)
    assert "CIFAR10" in lines[-1]


def test_training_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(train, "run", lambda args: asked.append(args) or 0)
    argv = ["train", "--model", "LeNetZhu", "--dataset", "FashionMNIST", "--out", "x.safetensors"]
    assert cli.main(argv) == 0
    assert (asked[0].model, asked[0].dataset) == ("LeNetZhu", "FashionMNIST")


def test_what_a_user_can_mend_is_one_line_and_2(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "--model", "LeNetZhu", "--dataset", "CIFAR10", "--out", "x.pth"]
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("error: --out is 'x.pth'; expected")


def test_ctrl_c_is_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", interrupted)
    argv = ["train", "--model", "LeNetZhu", "--dataset", "CIFAR10", "--out", "x.safetensors"]
    assert cli.main(argv) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    line = f"{sys.executable} -m invlib data | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True)
    assert done.stdout in (b"141\n", b"0\n")  # true may have ended before a line was there, or after
    assert done.stderr == b""


def test_a_closed_pipe_ends_a_command_quietly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert exit_status(lambda: (_ for _ in ()).throw(BrokenPipeError())) == 141


def test_what_the_system_says_is_one_line_and_2(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (PermissionError(13, "not allowed", "x"), MemoryError()):
        assert exit_status(lambda error=error: (_ for _ in ()).throw(error)) == 2
        assert capsys.readouterr().err.count("error: ") == 1


INTERRUPTED = """
import sys
sys.modules["torch"] = None
import importlib.abc
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "numpy" or name == "torch":
            raise KeyboardInterrupt
del sys.modules["torch"]
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("module", ["invlib", "invlib.reconstruct_image", "invlib.rec_mult"])
def test_ctrl_c_while_torch_is_imported(module: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED)
    paths = [str(tmp_path), str(Path(invlib.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        (["python", "-m", "invlib", "train"], True),
        (["python", "-X", "dev", "-m", "invlib.rec_mult"], True),
        (["/env/bin/python", "/env/bin/invlib", "models"], True),
        (["python", "-m", "mine", "invlib"], False),
        (["python", "script.py", "-m", "invlibrary"], False),
        (["python"], False),
    ],
)
def test_other_programs_keep_their_own_ctrl_c(words: list[str], ours: bool) -> None:
    assert of_a_command(words) is ours
