"""The page on the file format: its snippets run, and it names every field."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors
import torch
from torch import nn

import invlib as iv
from tests.conftest import random_batch

PAGE = (Path(__file__).parents[2] / "book" / "observation-format.md").read_text(encoding="utf-8")
READ, WRITE = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def observation():
    """An observation that has everything: buffers, labels, a part that was not sent, notes."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
    client = iv.FedAvg(lr=0.1, local_steps=2, momentum=0.9)
    seen = iv.observe(net, *random_batch(2), client, normalization=iv.CIFAR10, training_mode=True)
    mask = {"0.bias": torch.tensor([True, False, True, True])}
    return replace(seen, sent=mask, notes=("a doubt",))


def test_ten_lines_read_it(tmp_path, monkeypatch, capsys):
    seen = observation()
    iv.save_observation(seen, tmp_path / "update.safetensors")
    monkeypatch.chdir(tmp_path)
    assert "import invlib" not in READ
    assert len([line for line in READ.splitlines() if line]) <= 10
    found = {}
    exec(READ, found)
    assert list(found["update"]) == list(seen.update)
    assert all(np.array_equal(found["update"][n], value.numpy()) for n, value in seen.update.items())
    assert np.array_equal(found["arrays"]["labels"], seen.labels.numpy())
    assert found["header"]["protocol_settings"]["momentum"] == 0.9
    assert capsys.readouterr().out.startswith("FedAvg 2 ['0.weight', '0.bias'")


def test_what_is_written_by_hand_is_an_observation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(WRITE, {})
    found = iv.load_observation("written.safetensors")
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    found = replace(found, update={f"1.{name}": value for name, value in found.update.items()})
    found.validate(net)
    assert found.protocol == iv.FedAvg(lr=0.1, local_steps=1)
    assert (found.num_images, found.image_shape, found.training_mode) == (4, (3, 2, 2), True)
    assert found.update["1.bias"].eq(1).all()


def test_the_page_names_every_field(tmp_path):
    iv.save_observation(observation(), tmp_path / "seen")
    with safetensors.safe_open(tmp_path / "seen", framework="np") as file:
        header, names = json.loads(file.metadata()["invlib"]), list(file.keys())
    fields = re.findall(r"^\| `(\w+)` \|", PAGE.split("## The arrays")[0], flags=re.MULTILINE)
    assert fields == list(header)
    arrays = re.findall(r"^\| `(\w+)(?:/NAME)?` \|", PAGE.split("## The arrays")[1], flags=re.MULTILINE)
    assert {name.split("/")[0] for name in names} == {*arrays}
