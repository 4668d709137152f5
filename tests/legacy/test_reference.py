"""The interface of 2020 gives the numbers that the code of 2020 gave (tests/reference/README.md)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from invlib import legacy, models
from invlib.search.engines import selection
from invlib.search.problem import Measure

REFERENCE = Path(__file__).parents[1] / "reference"
KNOWN = json.loads((REFERENCE / "inversefed.json").read_text())


@pytest.fixture(scope="module")
def arrays() -> dict[str, Tensor]:
    with np.load(REFERENCE / "inversefed.npz") as stored:
        return {key: torch.from_numpy(stored[key]) for key in stored}


def numbered(arrays: dict[str, Tensor], prefix: str) -> list[Tensor]:
    return [arrays[key] for key in sorted(k for k in arrays if k.startswith(prefix))]


@pytest.mark.parametrize("cost_fn", ["sim", "simlocal", "l2", "l1", "max"])
def test_costs(arrays: dict[str, Tensor], cost_fn: str) -> None:
    candidate, target = ([arrays[f"costs/{kind}/{i}"] for i in range(12)] for kind in ("candidate", "target"))
    cases = [case for case in KNOWN["costs"] if case["cost_fn"] == cost_fn]
    assert len(cases) == 27
    for case in cases:
        names = {key: case[key] for key in ("cost_fn", "indices", "weights")}
        found = legacy.reconstruction_costs([candidate], target, **names)
        assert float(found) == pytest.approx(case["value"], rel=1e-5), names


def test_costs_of_several_gradients_are_averaged(arrays: dict[str, Tensor]) -> None:
    candidate, target = ([arrays[f"costs/{kind}/{i}"] for i in range(12)] for kind in ("candidate", "target"))
    alone = legacy.reconstruction_costs([candidate], target, "l2")
    both = legacy.reconstruction_costs([candidate, target], target, "l2")
    assert float(both) == pytest.approx(float(alone) / 2)


def test_image_functions(arrays: dict[str, Tensor]) -> None:
    x, noisy, known = arrays["image/x"], arrays["image/noisy"], KNOWN["image"]
    factor = 1 / torch.tensor(known["std"])[:, None, None]
    assert float(legacy.total_variation(x)) == pytest.approx(known["total_variation"], rel=1e-5)
    assert legacy.psnr(noisy, x) == pytest.approx(known["psnr_default"], rel=1e-5)
    assert legacy.psnr(noisy, x, batched=True) == pytest.approx(known["psnr_batched"], rel=1e-5)
    assert legacy.psnr(noisy, x, factor=factor) == pytest.approx(known["psnr_factor_std"], rel=1e-5)
    filtered = legacy.MedianPool2d(kernel_size=3, stride=1, padding=1, same=False)(noisy)
    torch.testing.assert_close(filtered, arrays["image/median3"], rtol=1e-5, atol=0)


def network(case: dict[str, Any], arrays: dict[str, Tensor]) -> nn.Module:
    model = models.build(case["arch"])
    stored = numbered(arrays, f"weights/{case['arch']}-{case['seed']}/")
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), stored, strict=True):
            parameter.copy_(value)
    return model


def update(case: dict[str, Any], arrays: dict[str, Tensor], model: nn.Module) -> list[Tensor]:
    """What the client sends: the stored tensors, and those too large to be stored computed anew."""
    inputs = arrays[f"traj/{case['name']}/target_images"]
    labels = torch.tensor([3, 7][: case["num_images"]])
    if case["fedavg"]:
        steps = {"lr" if key == "local_lr" else key: value for key, value in case["fedavg"].items()}
        computed = legacy.loss_steps(model, inputs, labels, **steps)
    else:
        computed = list(torch.autograd.grad(cross_entropy(model(inputs), labels), list(model.parameters())))
    stored = 0
    for i, tensor in enumerate(computed):
        expected = arrays.get(f"traj/{case['name']}/observed/{i:03d}")
        if expected is not None:
            # 1e-4: an update is a small difference of two rounded weights.
            assert (tensor - expected).norm() <= 1e-4 * expected.norm()
            computed[i], stored = expected, stored + 1
    assert stored >= len(computed) - 6
    return [tensor.detach() for tensor in computed]


@pytest.mark.parametrize("case", KNOWN["trajectories"], ids=lambda case: case["name"])
def test_trajectories(
    case: dict[str, Any], arrays: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    costs: dict[int, list[Tensor]] = {}
    build = selection.build

    def recording(name: Any, problem: Any) -> Measure:
        measure = build(name, problem)

        def evaluate(values: list[Tensor], rows: list[int], *how: Any, **more: Any) -> Any:
            result = measure(values, rows, *how, **more)
            for restart, cost in zip(rows, result[0], strict=True):
                costs.setdefault(restart, []).append(cost)
            return result

        return evaluate

    monkeypatch.setattr(selection, "build", recording)
    model = network(case, arrays)
    observed = update(case, arrays, model)
    if case["config"]["optim"] == "LBFGS":
        # Its steps divide by differences of gradients: in float32 two ways of rounding, of another
        # processor even, are 2e-4 apart after six evaluations. The exact path is what has to agree.
        model, observed = model.double(), [tensor.double() for tensor in observed]
    mean_std = tuple(torch.tensor(case[key])[:, None, None] for key in ("mean", "std"))
    if case["fedavg"]:
        machine = legacy.FedAvgReconstructor(
            model, mean_std, config=case["config"], num_images=case["num_images"], **case["fedavg"]
        )
    else:
        machine = legacy.GradientReconstructor(model, mean_std, case["config"], case["num_images"])
    labels = None if case["labels_given"] is None else torch.tensor(case["labels_given"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case["init_seed"])
        images, stats = machine.reconstruct(observed, labels, img_shape=(3, 32, 32))

    restarts = case["config"]["restarts"]
    known = arrays[f"traj/{case['name']}/losses"].view(restarts, -1)
    for restart in range(restarts):
        found = torch.stack(costs[restart])[:10].double()
        torch.testing.assert_close(found, known[restart, :10], rtol=1e-4, atol=0)
        # One evaluation more: where the last step led.
        assert len(costs[restart]) == known.shape[1] + 1
    assert stats["opt"] == pytest.approx(case["opt"], rel=0.03)
    assert stats["opt"] == min(stats["trial_scores"])
    assert images.shape == arrays[f"traj/{case['name']}/result"].shape
    if case["config"]["optim"] != "LBFGS":
        close = (images - arrays[f"traj/{case['name']}/result"]).abs() < 0.01
        assert close.float().mean() > 0.9
