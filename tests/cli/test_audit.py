"""``python -m invlib audit``: bad input is named before any work, and a report is whole or not there."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import invlib as iv
from invlib import cli, models
from invlib.cli import audit as command
from tests.site import reports

NETS = """
import torch
from torch import nn
import invlib as iv

def fresh():
    torch.rand(3)
    return iv.models.build("LeNetZhu").train()

def wrapped():
    return nn.DataParallel(iv.models.build("LeNetZhu", seed=1))

def other():
    return iv.models.build("MLP", seed=0)

def needs(argument):
    return fresh()

def raises():
    raise OSError("no such disk")

def nothing():
    return "a network"

number = 3
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with updates, weights, images and networks, some of which are not what they are called."""
    base = tmp_path_factory.mktemp("audit")
    model = models.build("LeNetZhu", seed=0)
    images, labels = iv.data.samples("photos32", indices=[0])
    seen = iv.observe(model, images, labels, iv.FedSGD(), normalization=iv.CIFAR10)
    iv.save_observation(seen, base / "update.safetensors")
    iv.save_observation(seen, base / "recorded.safetensors")
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    safetensors.torch.save_file(weights, base / "recorded.received.safetensors")
    safetensors.torch.save_file(weights, base / "weights.safetensors")
    torch.save(weights, base / "weights.pth")
    with safetensors.safe_open(base / "update.safetensors", framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def saved(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        changed = {n: change(t) if n.startswith("update/") else t for n, t in tensors.items()}
        safetensors.torch.save_file(changed, base / f"{name}.safetensors", metadata)

    saved("nan", lambda t: t * float("nan"))
    saved("integer", lambda t: t.int())
    saved("shape", lambda t: t[None])
    header = json.loads(metadata["invlib"])
    for name, change in (("oblong", {"image_shape": [3, 16, 64]}), ("foreign", {"format": "other"})):
        safetensors.torch.save_file(
            tensors, base / f"{name}.safetensors", {"invlib": json.dumps(header | change)}
        )
    safetensors.torch.save_file({"x": torch.zeros(1)}, base / "bare.safetensors")
    hollow = {"invlib": json.dumps(header | {"order": []})}
    safetensors.torch.save_file({"labels": tensors["labels"]}, base / "hollow.safetensors", hollow)
    (base / "cut.safetensors").write_bytes((base / "update.safetensors").read_bytes()[:-9])
    (base / "text.safetensors").write_text("hello")
    (base / "nets.py").write_text(NETS)
    (base / "broken.py").write_text("1 +")
    (base / "folder.safetensors").mkdir()
    for name, size, count in (("private", 32, 1), ("two", 32, 2), ("small", 8, 1), ("empty", 32, 0)):
        (base / name).mkdir()
        for k in range(count):
            pixels = np.random.default_rng(k).integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(base / name / f"{k}.png")
    (base / "damaged").mkdir()
    (base / "damaged" / "0.png").write_text("hello")
    (base / "file").write_text("hello")
    return base


def contents(base: Path) -> list[str]:
    return sorted(str(p.relative_to(base)) for p in base.rglob("*") if "__pycache__" not in p.parts)


GOOD = "audit update.safetensors --model LeNetZhu --out report "
BAD = {
    # what is given more than once counts the last time
    "audit": "arguments are required",
    "audit update.safetensors --out report": "--model",
    "audit update.safetensors --model LeNetZhu": "--out",
    **{f"{GOOD}--budget {n}": "--budget" for n in ("0", "-1", "nan", "inf", "x")},
    **{f"{GOOD}--seed {n}": "--seed" for n in ("-1", "1.5", "1" + "0" * 30)},
    **{
        f"audit {name}.safetensors --model LeNetZhu --out report": said
        for name, said in (
            ("missing", "no observation at"),
            ("folder", "no observation at"),
            ("text", "corrupt or no observation"),
            ("cut", "corrupt or no observation"),
            ("bare", "has format None"),
            ("foreign", "has format 'other'"),
            ("weights", "has format None"),
            ("nan", "finite"),
            ("integer", "is of torch.int32"),
            ("shape", "shape"),
            ("oblong", "expected square ones"),
            ("hollow", "does not fit the model"),
        )
    },
    **{
        f"{GOOD}--model {name}": said
        for name, said in (
            ("NoNet", "no model 'NoNet'"),
            ("MLP", "does not fit the model"),
            ("nets", "no model 'nets'"),
            ("''", "no model ''"),
            ("nowhere:fresh", "No module named 'nowhere'"),
            ("nets:missing", "'missing'"),
            ("nets:number", "not callable"),
            ("nets:needs", "argument"),
            ("nets:raises", "OSError: no such disk"),
            ("nets:nothing", "makes a str"),
            ("nets:other", "does not fit the model"),
            ("broken:net", "SyntaxError"),
            (":", "package.module:function"),
        )
    },
    **{
        f"{GOOD}--model {model} --weights {name}": said
        for model, name, said in (
            ("LeNetZhu", "missing.safetensors", "does not exist"),
            ("LeNetZhu", "nothing", "no trained weights 'nothing'"),
            ("LeNetZhu", "text.safetensors", "cannot be read"),
            ("LeNetZhu", "bare.safetensors", "do not fit the model"),
            ("nets:fresh", "missing.safetensors", "does not exist"),
            ("nets:fresh", "bare.safetensors", "do not fit the model"),
            ("nets:fresh", "text.safetensors", "cannot be read"),
            ("nets:fresh", "folder.safetensors", "is a folder"),
            ("nets:other", "weights.safetensors", "do not fit the model"),
        )
    },
    **{
        f"{GOOD}--truth {name}": said
        for name, said in (
            ("missing", "no such folder"),
            ("empty", "no image files"),
            ("damaged", "not an image"),
            ("small", "images of 3×8×8; expected 3×32×32"),
            ("file", "no such folder"),
        )
    },
    **{
        f"{GOOD}--data {name}": said
        for name, said in (("empty", "no image files"), ("file", "no such folder"))
    },
    **{f"{GOOD}--privacy {text}": "--privacy" for text in ("1.1", "noise_multiplier=x", "''", "a=1,,b=2")},
    **{f"{GOOD}--out {name}": "cannot be written" for name in ("file", "file/report", "/dev/null/x")},
}


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return place


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_named_before_any_work(
    line: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "audit", lambda *_, **__: pytest.fail("the work began"))
    before, random = contents(here), torch.get_rng_state()
    try:
        status = cli.main(shlex.split(line))
    except SystemExit as ended:  # argparse's own
        status = ended.code
    said = capsys.readouterr().err
    assert status == 2
    assert said.count("error: ") == 1
    assert "Traceback" not in said
    assert BAD[line] in said
    assert contents(here) == before
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("line", ["--truth two", "--privacy rate=0.1", "--privacy clip=1"])
def test_what_the_audit_itself_refuses(line: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(here)
    assert cli.main(shlex.split(GOOD + line)) == 2
    assert capsys.readouterr().err.count("error: ") == 1
    assert contents(here) == before


class Asked:
    """Stands in for the audit: keeps what it was asked, and returns a report that is made up."""

    def __init__(self, **changes: Any) -> None:
        self.report = reports.report(**changes)

    def __call__(self, model: Any, seen: Any, truth: Any, **settings: Any) -> Any:
        self.model, self.seen, self.truth, self.settings = model, seen, truth, settings
        return self.report


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    stand_in = Asked()
    monkeypatch.setattr(command, "audit", stand_in)
    return stand_in


def test_what_is_asked_for(here: Path, asked: Asked, tmp_path: Path) -> None:
    line = (
        f"audit update.safetensors --model LeNetZhu --out {tmp_path / 'new' / 'report'} --budget 60 --seed 3 "
        "--privacy noise_multiplier=1.5,rate=0.01,steps=500 --truth private --data small"
    )
    assert cli.main(shlex.split(line)) == 0
    candidates = asked.settings.pop("candidates")
    assert candidates.shape == (1, 3, 32, 32)  # scaled to those of the update
    assert asked.truth.shape == (1, 3, 32, 32)
    assert asked.settings == {
        "budget": 60.0,
        "seed": 3,
        "progress": True,
        "privacy": {"noise_multiplier": 1.5, "rate": 0.01, "steps": 500},
    }
    assert sorted(os.listdir(tmp_path / "new" / "report")) == ["audit.html", "audit.json"]


def test_the_clients_own_images_are_not_scaled(here: Path, asked: Asked, tmp_path: Path) -> None:
    assert cli.main(shlex.split(f"{GOOD} --out {tmp_path} --truth private")) == 0
    pixels = np.asarray(Image.open(here / "private" / "0.png"))
    assert np.array_equal((asked.truth[0] * 255).round().byte().movedim(0, 2).numpy(), pixels)


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 32, 32)])
def test_grey_images(shape: tuple[int, ...], tmp_path: Path) -> None:
    Image.fromarray(np.full(shape[1:], 51, dtype=np.uint8)).save(tmp_path / "0.png")
    model = models.build("LeNetZhu", in_channels=1, image_size=shape[1])
    one = torch.zeros(1, *shape), torch.zeros(1, dtype=torch.int64)
    seen = iv.observe(model, *one, iv.FedSGD(), normalization=iv.UNIT)
    for scaled in (False, True):
        images = command._images("truth", tmp_path, seen, scaled=scaled)
        assert torch.equal(images, torch.full((1, *shape), 0.2))


@pytest.mark.parametrize(
    "line",
    [
        "audit update.safetensors --model LeNetZhu",
        "audit update.safetensors --model LeNetZhu --seed 5 --weights weights.safetensors",
        "audit update.safetensors --model LeNetZhu --seed 5 --weights weights.pth",
        "audit recorded.safetensors --model LeNetZhu --seed 5",
        "audit recorded.safetensors --model nets:fresh",
        "audit recorded.safetensors --model nets:wrapped",
        "audit update.safetensors --model nets:wrapped --weights weights.pth",
    ],
)
def test_the_weights_are_those_that_the_client_received(
    line: str, here: Path, asked: Asked, tmp_path: Path
) -> None:
    random = torch.get_rng_state()
    assert cli.main([*shlex.split(line), "--out", str(tmp_path)]) == 0
    expected = models.build("LeNetZhu", seed=0).state_dict()
    assert asked.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in asked.model.state_dict().items())
    assert not asked.model.training
    assert torch.equal(torch.get_rng_state(), random)


def test_what_is_printed(
    here: Path, asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(shlex.split(f"{GOOD} --out {tmp_path}")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "untrained" in lines[1]
    assert lines[-5:-2] == list(asked.report.summary)
    assert lines[-2:] == [str(tmp_path / "audit.html"), str(tmp_path / "audit.json")]
    assert "data:image" not in (tmp_path / "audit.html").read_text()


def test_pictures_are_asked_for(here: Path, asked: Asked, tmp_path: Path) -> None:
    assert cli.main(shlex.split(f"{GOOD} --out {tmp_path} --pictures")) == 0
    assert "data:image" in (tmp_path / "audit.html").read_text()
    assert (tmp_path / "audit.html").stat().st_mode & 0o077 == 0


def test_after_ctrl_c_the_report_is_partial_and_says_so(
    here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "audit", Asked(complete=False))
    assert cli.main(shlex.split(f"{GOOD} --out {tmp_path}")) == 130
    assert "not complete" in capsys.readouterr().out
    assert "This report is partial." in (tmp_path / "audit.html").read_text()
    assert json.loads((tmp_path / "audit.json").read_text())["complete"] is False


def test_a_text_takes_no_images() -> None:
    seen = iv.Observation(
        update={"w": torch.zeros(3, 2)}, protocol=iv.FedSGD(), num_images=1, image_shape=(5,)
    )
    with pytest.raises(iv.errors.ConfigError, match="token sequences"):
        command._images("data", Path("."), seen)


@pytest.mark.slow
def test_an_audit(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"audit {place / 'recorded.safetensors'} --model LeNetZhu --budget 3 --out {tmp_path / 'report'}"
    assert cli.main(shlex.split(line)) == 0
    report = json.loads((tmp_path / "report" / "audit.json").read_text())
    assert report["verdict"] == "recovered and certified"
    page = (tmp_path / "report" / "audit.html").read_text()
    printed = capsys.readouterr().out
    for sentence in report["summary"]:
        assert sentence in printed
    assert "<strong>recovered and certified</strong>" in page
