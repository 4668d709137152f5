"""LeNetZhu and ResNet20 are the networks of the 2020 code: same order of parameters, same function."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from invlib import models

REFERENCE = Path(__file__).parents[1] / "reference"


@pytest.mark.parametrize(
    ("name", "seed", "case"), [("LeNetZhu", 1, "lenet-sim"), ("ResNet20", 2, "resnet20-sim")]
)
def test_gradient_equals_that_of_the_2020_code(name: str, seed: int, case: str) -> None:
    described = json.loads((REFERENCE / "inversefed.json").read_text())["trajectories"]
    labels = next(entry["labels_given"] for entry in described if entry["name"] == case)
    model = models.build(name)
    parameters = list(model.parameters())
    with np.load(REFERENCE / "inversefed.npz") as arrays:
        prefix = f"weights/{name}-{seed}/"
        assert sum(key.startswith(prefix) for key in arrays) == len(parameters)
        with torch.no_grad():
            for index, parameter in enumerate(parameters):
                stored = torch.from_numpy(arrays[f"{prefix}{index:03d}"])
                assert parameter.shape == stored.shape
                parameter.copy_(stored)
        images = torch.from_numpy(arrays[f"traj/{case}/target_images"])
        loss = cross_entropy(model(images), torch.tensor(labels))
        gradient = torch.autograd.grad(loss, parameters)
        compared = 0
        for index, found in enumerate(gradient):
            key = f"traj/{case}/observed/{index:03d}"
            if key in arrays:
                expected = torch.from_numpy(arrays[key])
                assert torch.linalg.norm(found - expected) <= 1e-4 * torch.linalg.norm(expected)
                compared += 1
        assert compared >= len(parameters) - 6  # the reference leaves tensors of over 20,000 numbers out


def test_initial_weights_have_the_size_of_those_of_the_2020_code() -> None:
    with np.load(REFERENCE / "inversefed.npz") as arrays:
        for name, seed in (("LeNetZhu", 1), ("ResNet20", 2)):
            for index, parameter in enumerate(models.build(name, seed=0).parameters()):
                if parameter.numel() >= 200:
                    stored = float(arrays[f"weights/{name}-{seed}/{index:03d}"].std())
                    assert parameter.std().item() == pytest.approx(stored, rel=0.15)
