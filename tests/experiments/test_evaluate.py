"""``python -m invlib evaluate``: measured accuracy beside the card's."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from invlib import cli, models
from invlib.models import cards
from invlib.models.cards import Trained

N = 400


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A network whose answer is the brightest of three channels, and 400 test images, 300 of them right."""
    y = np.arange(N) % 3
    x = np.zeros((N, 32, 32, 3), dtype=np.uint8)
    x[np.arange(N), :, :, np.where(np.arange(N) < 300, y, (y + 1) % 3)] = 255
    np.savez(tmp_path / "cifar10_test.npz", x=x, y=y)
    monkeypatch.setenv("INVLIB_DATA", str(tmp_path))
    model = models.build("TwoLP")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        first, last = (m for m in model.modules() if isinstance(m, nn.Linear))
        for channel in range(3):
            first.weight[channel, channel * 1024 : (channel + 1) * 1024] = 1 / 1024
            last.weight[channel, channel] = 1
    path = tmp_path / "TwoLP-cifar10.safetensors"

    def save(**card):
        settings = {"model": "TwoLP", "dataset": "CIFAR10", "test_set": "CIFAR-10, test images"}
        settings["normalization"] = {"mean": [0.0] * 3, "std": [1.0] * 3}
        cards.save(Trained(model=model, card=settings | card), path)
        return str(path)

    return save


def test_a_card_that_is_right(weights, capsys):
    assert cli.main(["evaluate", weights(accuracy=0.75), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "measured: 0.7500 on CIFAR-10, test images, the 400 on this disk" in out
    assert "card:     0.7500 on CIFAR-10, test images" in out
    assert "they agree: +0.0000, where 0.005 either way is allowed" in out
    assert "copy" not in out


@pytest.mark.parametrize(("stated", "status"), [(0.755, 0), (0.745, 0), (0.7551, 1), (0.7449, 1), (0.9, 1)])
def test_the_tolerance_is_half_a_percent_either_way(weights, capsys, stated, status):
    assert cli.main(["evaluate", weights(accuracy=stated)]) == status
    assert ("they do NOT agree" in capsys.readouterr().out) == bool(status)


def test_a_card_of_a_copy_of_the_images_says_so(weights, capsys):
    path = weights(accuracy=0.75, test_set="CIFAR-10, test images (JPEG quality 75 copy)")
    assert cli.main(["evaluate", path]) == 0
    assert "measured on a copy of the images" in capsys.readouterr().out


def test_the_normalisation_is_the_cards(weights, capsys):
    path = weights(accuracy=0.75, normalization={"mean": [0.0, 0.0, 9.0], "std": [1.0, 1.0, 1e-3]})
    assert cli.main(["evaluate", path]) == 1
    assert "measured: 0.75" not in capsys.readouterr().out


def test_other_images_than_the_cards_are_not_compared(weights, tmp_path, capsys):
    path = weights(accuracy=0.1)
    (tmp_path / "cifar10_test.npz").rename(tmp_path / "cifar10_train.npz")
    assert cli.main(["evaluate", path, "--split", "train"]) == 0
    out = capsys.readouterr().out
    assert "training images" in out
    assert "not compared" in out


def test_shipped_weights_have_a_name(weights, monkeypatch, capsys):
    path = Path(weights(accuracy=0.75))
    monkeypatch.setattr(models, "available", lambda: {"TwoLP": ("cifar10",)})
    monkeypatch.setattr("invlib.cli.evaluate.locate", lambda name, slug: path if name == "TwoLP" else None)
    assert cli.main(["evaluate", "TwoLP-cifar10"]) == 0
    assert cli.main(["evaluate", "TwoLP-cifar100"]) == 2
    assert "there are: TwoLP-cifar10" in capsys.readouterr().err


def test_faults(weights, tmp_path, capsys):
    path = weights()
    assert cli.main(["evaluate", path]) == 2
    assert "states no accuracy" in capsys.readouterr().err
    assert cli.main(["evaluate", str(tmp_path / "none.safetensors")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert cli.main(["evaluate", weights(accuracy=0.75, dataset="CIFAR11")]) == 2
    assert "'CIFAR11'; expected one of CIFAR10" in capsys.readouterr().err
    card = tmp_path / "TwoLP-cifar10.json"
    card.write_text(json.dumps({"model": "MLP"}))
    assert cli.main(["evaluate", path]) == 2
    assert "do not fit" in capsys.readouterr().err
