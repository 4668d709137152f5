"""python -m invlib."""

import runpy
import sys

import pytest

import invlib
from invlib import cli, models
from invlib.cli import train
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
