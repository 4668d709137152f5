"""The interface of 2020: its settings, and its known faults mended."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from invlib import legacy
from invlib.attacks import matching
from invlib.errors import ConfigError, ObservationError, UnknownNameError
from invlib.legacy import metrics
from invlib.search import run
from invlib.search import state as state_module
from tests.conftest import random_batch

SHAPE = (3, 8, 8)
HALF = (0.5, 0.25)


def normalised(n: int = 1) -> tuple[Tensor, Tensor]:
    images, labels = random_batch(n)
    return (images - 0.5) / 0.25, labels


def gradient(model: nn.Module, inputs: Tensor, labels: Tensor) -> list[Tensor]:
    loss = nn.functional.cross_entropy(model(inputs), labels)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def machine(model: nn.Module, num_images: int = 1, **config: object) -> legacy.GradientReconstructor:
    return legacy.GradientReconstructor(model, HALF, {"max_iterations": 5, **config}, num_images)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Faults of the original, mended.


@pytest.mark.parametrize(
    ("scores", "best"), [([math.nan, 2.0, 1.0, 3.0], 2), ([math.inf, 1.0, math.nan, 2.0], 1)]
)
def test_scores_that_are_not_finite_do_not_shift_the_choice(
    tiny: nn.Module, monkeypatch: pytest.MonkeyPatch, scores: list[float], best: int
) -> None:
    x, y = normalised()
    trials: list[Tensor] = []

    def score(_: object, problem: object, inputs: Tensor, logits: object) -> float:
        trials.append(inputs.clone())
        return scores[len(trials) - 1]

    monkeypatch.setattr(legacy.GradientReconstructor, "_score", score)
    images, stats = machine(tiny, restarts=4).reconstruct(gradient(tiny, x, y), y, SHAPE)
    assert stats["opt"] == scores[best]
    assert torch.equal(images, trials[best])


def test_all_scores_not_finite_is_said(tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normalised()
    monkeypatch.setattr(legacy.GradientReconstructor, "_score", lambda *_: math.nan)
    _, stats = machine(tiny, restarts=2).reconstruct(gradient(tiny, x, y), y, SHAPE)
    assert stats["status"] == "non_finite"
    assert math.isnan(stats["opt"])


def test_tol_gives_back_a_restart_that_ran(tiny: nn.Module) -> None:
    x, y = normalised()
    observed = gradient(tiny, x, y)
    images, stats = machine(tiny, restarts=4).reconstruct(observed, y, SHAPE, tol=1e9, generator=generator())
    assert len(stats["trial_scores"]) == 1
    cost = legacy.reconstruction_costs([gradient(tiny, images, y)], observed, "sim")
    assert stats["opt"] == pytest.approx(float(cost), rel=1e-5)
    # With a tolerance out of reach all restarts run, and end where they end together.
    _, alone = machine(tiny, restarts=4).reconstruct(observed, y, SHAPE, tol=-1.0, generator=generator())
    _, together = machine(tiny, restarts=4).reconstruct(observed, y, SHAPE, generator=generator())
    assert alone["trial_scores"] == pytest.approx(together["trial_scores"], rel=1e-4)


def test_dryrun_takes_one_step_of_one_restart(tiny: nn.Module) -> None:
    x, y = normalised()
    observed = gradient(tiny, x, y)
    images, stats = machine(tiny, restarts=4, boxed=False, signed=True, lr_decay=False).reconstruct(
        observed, y, SHAPE, dryrun=True, generator=generator()
    )
    start = torch.randn((4, 1, *SHAPE), generator=generator())[0]
    assert len(stats["trial_scores"]) == 1
    # Adam's first step is lr long in every pixel.
    torch.testing.assert_close((images - start).abs(), torch.full_like(start, 0.1), rtol=1e-3, atol=1e-5)
    assert stats["status"] == "max_steps"


@pytest.mark.parametrize("use_updates", [True, False])
def test_label_inference_knows_the_sign_of_updates(tiny: nn.Module, use_updates: bool) -> None:
    x, _ = normalised()
    for label in range(5):
        y = torch.tensor([label])
        sent = legacy.loss_steps(tiny, x, y, lr=0.01, local_steps=2, use_updates=use_updates)
        attack = legacy.FedAvgReconstructor(
            tiny,
            HALF,
            2,
            0.01,
            {"max_iterations": 2, "cost_fn": "l2"},
            use_updates=use_updates,
        )
        without, _ = attack.reconstruct(sent, None, SHAPE, generator=generator())
        given, _ = attack.reconstruct(sent, y, SHAPE, generator=generator())
        assert torch.equal(without, given)


@pytest.mark.parametrize("use_updates", [True, False])
def test_fedavg_compares_updates_or_weights(tiny: nn.Module, use_updates: bool) -> None:
    x, y = normalised()
    client = {"lr": 0.1, "local_steps": 2, "use_updates": use_updates}
    sent = legacy.loss_steps(tiny, x, y, **client)
    attack = legacy.FedAvgReconstructor(tiny, HALF, 2, 0.1, {"max_iterations": 3}, use_updates=use_updates)
    images, stats = attack.reconstruct(sent, y, SHAPE)
    cost = legacy.reconstruction_costs([legacy.loss_steps(tiny, images, y, **client)], sent, "sim")
    assert stats["opt"] == pytest.approx(float(cost), rel=1e-4, abs=1e-7)


def test_config_stays_as_it_was(tiny: nn.Module) -> None:
    x, y = normalised()
    config = {"max_iterations": 2, "lr": None}
    default = copy.deepcopy(legacy.DEFAULT_CONFIG)
    attack = legacy.GradientReconstructor(tiny, HALF, config)
    attack.reconstruct(gradient(tiny, x, y), y, SHAPE)
    assert config == {"max_iterations": 2, "lr": None}
    assert default == legacy.DEFAULT_CONFIG
    assert attack.config == {**default, "max_iterations": 2}
    assert legacy.GradientReconstructor(tiny).config is not legacy.DEFAULT_CONFIG


def test_model_stays_in_its_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)).train()
    model[1].eval()
    x, y = normalised()
    observed, of_two = gradient(model, x, y), gradient(model, *normalised(2))
    before = copy.deepcopy(model.state_dict())
    machine(model).reconstruct(observed, y, SHAPE)
    assert [m.training for m in model] == [True, False, True, True]
    model[1].train()
    machine(model, 2).reconstruct(of_two, normalised(2)[1], SHAPE, eval=False)
    in_training = legacy.loss_steps(model, *normalised(2))
    assert all(m.training for m in model)
    assert not torch.equal(in_training[0], legacy.loss_steps(model.eval(), *normalised(2))[0])
    assert not model[1].training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())


def test_eval_false_uses_the_statistics_of_the_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)).train()
    x, y = normalised(2)
    observed = gradient(model, x, y)
    results = [
        machine(model, 2).reconstruct(observed, y, SHAPE, eval=mode, generator=generator())[0]
        for mode in (True, False)
    ]
    assert not torch.equal(*results)


def test_fedavg_scores_with_minibatches(tiny: nn.Module) -> None:
    x, y = normalised(2)
    client = {"lr": 0.5, "local_steps": 3}
    sent = legacy.loss_steps(tiny, x, y, batch_size=1, **client)
    attack = legacy.FedAvgReconstructor(tiny, HALF, 3, 0.5, {"max_iterations": 3}, 2, batch_size=1)
    images, stats = attack.reconstruct(sent, y, SHAPE)
    guesses = [legacy.loss_steps(tiny, images, y, batch_size=size, **client) for size in (1, 0)]
    by_size = [float(legacy.reconstruction_costs([guess], sent, "sim")) for guess in guesses]
    assert stats["opt"] == pytest.approx(by_size[0], rel=1e-4)
    assert stats["opt"] != pytest.approx(by_size[1], rel=1e-2)


@pytest.mark.parametrize(
    ("name", "count"), [("ConvNet8", 48_634), ("ConvNet16", 187_114), ("ConvNet32", 733_642)]
)
def test_convnets_are_as_wide_as_they_say(name: str, count: int) -> None:
    model, _ = legacy.construct_model(name, num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == count


# Settings.


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"itertions": 3}, "unknown keys 'itertions'; expected some of signed"),
        ({"cost_fn": "cos"}, "config 'cost_fn' is 'cos'; expected one of 'sim', 'simlocal'"),
        ({"indices": "last3"}, "config 'indices' is 'last3'; expected one of 'def', 'batch'"),
        ({"weights": "log"}, "config 'weights' is 'log'; expected one of 'equal', 'linear', 'exp'"),
        ({"optim": "lbfgs"}, "config 'optim' is 'lbfgs'; expected one of 'adam', 'sgd', 'adamw', 'LBFGS'"),
        ({"init": "ones"}, "config 'init' is 'ones'; expected one of 'randn', 'rand', 'zeros'"),
        ({"filter": "mean"}, "config 'filter' is 'mean'; expected one of 'none', 'median'"),
        ({"scoring_choice": "mse"}, "'scoring_choice' is 'mse'; expected one of 'loss', 'tv', 'inception'"),
        ({"signed": 2}, "config 'signed' is 2; expected True or False"),
        ({"restarts": 0}, "config 'restarts' is 0; expected a number of at least 1"),
        ({"max_iterations": 2.5}, "config 'max_iterations' is 2.5; expected a number"),
        ({"total_variation": -1}, "config 'total_variation' is -1; expected a number of at least 0"),
    ],
)
def test_unknown_settings_name_the_choices(tiny: nn.Module, config: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        legacy.GradientReconstructor(tiny, HALF, config)


def test_what_does_not_fit_is_said(tiny: nn.Module) -> None:
    x, y = normalised()
    observed = gradient(tiny, x, y)
    with pytest.raises(ConfigError, match="mean has shape \\(3, 8, 8\\); expected a number"):
        legacy.GradientReconstructor(tiny, (torch.zeros(3, 8, 8), 1.0))
    with pytest.raises(ConfigError, match="indices are \\[9\\]; expected numbers of the update's 4"):
        machine(tiny, indices=[9]).reconstruct(observed, y, SHAPE)
    with pytest.raises(ObservationError, match="gradients has 3 tensors; expected 4"):
        machine(tiny).reconstruct(observed[:3], y, SHAPE)
    with pytest.raises(ObservationError, match="labels have shape \\(2,\\); expected \\(1,\\)"):
        machine(tiny).reconstruct(observed, torch.tensor([1, 2]), SHAPE)
    with pytest.raises(ConfigError, match="unknown setting 'keeep'"):
        machine(tiny).reconstruct(observed, y, SHAPE, keeep="best")
    with pytest.raises(ConfigError, match="FedAvg lr is -1"):
        legacy.FedAvgReconstructor(tiny, HALF, 2, -1.0)
    with pytest.raises(ConfigError, match="config 'cost_fn' is 'cosine'"):
        legacy.reconstruction_costs([observed], observed, "cosine")
    with pytest.raises(ConfigError, match="img_batch has shape \\(1, 3, 8, 8\\) and ref_batch \\(3, 8, 8\\)"):
        legacy.psnr(x, x[0])
    with pytest.raises(UnknownNameError, match="no model 'ConvNet9'"):
        legacy.construct_model("ConvNet9")


def test_starting_points_come_from_the_default_generator(tiny: nn.Module) -> None:
    x, y = normalised()
    observed = gradient(tiny, x, y)
    config = {"max_iterations": 1, "boxed": False, "lr": 1e-12, "lr_decay": False, "restarts": 2}
    attack = legacy.GradientReconstructor(tiny, HALF, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        images, stats = attack.reconstruct(observed, y, SHAPE)
        after = torch.rand(())
        torch.manual_seed(5)
        starts = torch.randn((2, 1, *SHAPE))
        assert after == torch.rand(())
    best = stats["trial_scores"].index(min(stats["trial_scores"]))
    torch.testing.assert_close(images, starts[best], rtol=0, atol=1e-6)


def test_listed_tensors_are_compared(tiny: nn.Module) -> None:
    candidate, target = gradient(tiny, *normalised()), gradient(tiny, *normalised(2))
    found = legacy.reconstruction_costs([candidate], target, "l2", [0, -1], "linear")
    expected = (candidate[0] - target[0]).square().sum() + (candidate[3] - target[3]).square().sum() / 4
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_batch_draws_eight_tensors_anew() -> None:
    target = [torch.full((2,), float(i)) for i in range(12)]
    zero = [torch.zeros(2)] * 12
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        costs = {float(legacy.reconstruction_costs([zero], target, "l1", "batch")) for _ in range(9)}
        torch.manual_seed(0)
        rows = torch.randperm(12)[:8]
        torch.manual_seed(0)
        weighed = legacy.reconstruction_costs([zero], target, "l1", "batch", "linear")
    assert len(costs) > 4
    assert float(rows.sum() * 2) in costs
    assert float(weighed) == pytest.approx(sum(2 * i * (12 - i) / 12 for i in rows.tolist()), rel=1e-5)


def test_batch_attack_runs_restarts_one_by_one(tiny: nn.Module) -> None:
    x, y = normalised()
    images, stats = machine(tiny, indices="batch", restarts=2).reconstruct(gradient(tiny, x, y), y, SHAPE)
    assert images.shape == (1, *SHAPE)
    assert len(stats["trial_scores"]) == 2


@pytest.mark.parametrize("optim", ["adam", "adamw", "sgd", "LBFGS"])
def test_optimizers_are_those_of_torch(tiny: nn.Module, optim: str) -> None:
    x, y = normalised()
    tiny, x = tiny.double(), x.double()
    observed = gradient(tiny, x, y)
    config = {"optim": optim, "boxed": False, "cost_fn": "l2", "total_variation": 0.3, "lr_decay": False}
    attack = legacy.GradientReconstructor(tiny, HALF, {**config, "max_iterations": 3, "lr": 0.2})
    found, _ = attack.reconstruct(observed, y, SHAPE, generator=generator())

    image = torch.randn((1, *SHAPE), generator=generator()).double().requires_grad_()
    optimizer: torch.optim.Optimizer = {
        "adam": lambda: torch.optim.Adam([image], lr=0.2),
        "adamw": lambda: torch.optim.AdamW([image], lr=0.2),
        "sgd": lambda: torch.optim.SGD([image], lr=0.01, momentum=0.9, nesterov=True),
        "LBFGS": lambda: torch.optim.LBFGS([image]),
    }[optim]()

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(tiny(image), y)
        own = torch.autograd.grad(loss, list(tiny.parameters()), create_graph=True)
        cost = sum((a - b).square().sum() for a, b in zip(own, observed, strict=True))
        cost = cost + 0.3 * legacy.total_variation(image)
        image.grad = torch.autograd.grad(cost, image)[0]
        return cost

    for _ in range(3):
        optimizer.step(closure)
    torch.testing.assert_close(found, image.detach(), rtol=1e-6, atol=1e-8)


def test_config_becomes_an_attack() -> None:
    attack = legacy.attack({"filter": "median", "lr_decay": False, "boxed": False, "total_variation": 0})
    assert (attack.median_every, attack.decay, attack.box, attack.priors) == (500, None, False, ())
    assert attack.steps == 4800
    assert legacy.attack().decay is not None
    assert legacy.attack().priors[0][0] == 0.1


def test_the_last_image_counts_or_the_best(tiny: nn.Module) -> None:
    x, y = normalised()
    observed = gradient(tiny, x, y)
    # Steps as long as this make the cost jump about.
    attack = machine(tiny, lr=3.0, max_iterations=30, lr_decay=False, total_variation=0, cost_fn="l2")
    last, last_stats = attack.reconstruct(observed, y, SHAPE, generator=generator())
    best, best_stats = attack.reconstruct(observed, y, SHAPE, generator=generator(), keep="best")
    assert best_stats["opt"] < last_stats["opt"]
    for images, stats in ((last, last_stats), (best, best_stats)):
        cost = legacy.reconstruction_costs([gradient(tiny, images, y)], observed, "l2")
        assert stats["opt"] == pytest.approx(float(cost), rel=1e-4)


def test_labels_are_optimised_where_idlg_is_off(tiny: nn.Module) -> None:
    x, y = normalised()
    attack = machine(tiny, cost_fn="l2")
    attack.iDLG = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attack.reconstruct(gradient(tiny, x, y), None, SHAPE)
        after = torch.rand(())
        torch.manual_seed(0)
        torch.randn((1, 1, *SHAPE))
        torch.randn(5)
        assert after == torch.rand(())


@pytest.mark.parametrize(
    ("choice", "combine"), [("pixelmean", lambda t: t.mean(0)), ("pixelmedian", lambda t: t.median(0).values)]
)
@pytest.mark.parametrize("known", [True, False])
def test_restarts_can_be_combined(
    tiny: nn.Module, monkeypatch: pytest.MonkeyPatch, choice: str, combine, known: bool
) -> None:
    x, y = normalised(2)
    observed = gradient(tiny, x, y)
    trials: list[Tensor] = []
    score = legacy.GradientReconstructor._score

    def recording(self: object, problem: object, inputs: Tensor, logits: Tensor | None) -> float:
        trials.append(inputs.clone())
        return math.nan if len(trials) == 1 else score(self, problem, inputs, logits)

    monkeypatch.setattr(legacy.GradientReconstructor, "_score", recording)
    attack = machine(tiny, 2, restarts=4, scoring_choice=choice)
    images, stats = attack.reconstruct(observed, y if known else None, SHAPE)
    assert torch.equal(images, combine(torch.stack(trials[1:])))
    labels = y if known else tiny(images).softmax(-1).detach()
    cost = legacy.reconstruction_costs([gradient(tiny, images, labels)], observed, "sim")
    assert stats["opt"] == pytest.approx(float(cost), rel=1e-4)


def test_total_variation_can_choose(tiny: nn.Module) -> None:
    x, y = normalised()
    images, stats = machine(tiny, restarts=3, scoring_choice="tv").reconstruct(gradient(tiny, x, y), y, SHAPE)
    assert stats["opt"] == pytest.approx(float(legacy.total_variation(images)), rel=1e-5)
    assert stats["opt"] == min(stats["trial_scores"])


def test_inception_can_choose(tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def network(**settings: object) -> nn.Module:
        assert settings == {"weights": None, "init_weights": False, "transform_input": True}
        return nn.Sequential(nn.AvgPool2d(99), nn.Flatten(), nn.Linear(27, 4))

    fetched = network(weights=None, init_weights=False, transform_input=True)
    zoo = SimpleNamespace(models=SimpleNamespace(inception_v3=network))
    monkeypatch.setattr(metrics, "torchvision", lambda: zoo)
    monkeypatch.setattr(metrics, "pretrained", lambda *_: fetched.state_dict())
    x, y = normalised()
    attack = machine(tiny, max_iterations=1, restarts=3, scoring_choice="inception")
    images, stats = attack.reconstruct(gradient(tiny, x, y), y, SHAPE)
    with torch.no_grad():
        p = fetched(nn.functional.interpolate(images, (299, 299), mode="bilinear")).softmax(-1)
    assert stats["opt"] == pytest.approx(float(-(p * p.log()).mean()), rel=1e-4)
    assert stats["opt"] == min(stats["trial_scores"]) < max(stats["trial_scores"])


def test_ctrl_c_gives_back_what_is_there(tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    step = state_module.step

    def interrupted(problem: Any, settings: Any, measure: Any, state: Any) -> None:
        if state.step == 3:
            raise KeyboardInterrupt
        step(problem, settings, measure, state)

    monkeypatch.setattr(run, "step", interrupted)
    x, y = normalised()
    observed = gradient(tiny, x, y)
    _, stats = machine(tiny, restarts=2, optim="LBFGS").reconstruct(observed, y, SHAPE)
    assert stats["status"] == "interrupted"
    # L-BFGS runs one restart after another: the second never ran and cannot be chosen.
    assert math.isfinite(stats["trial_scores"][0])
    assert math.isnan(stats["trial_scores"][1])
    assert stats["opt"] == stats["trial_scores"][0]


# The client's side, and images.


def test_loss_steps_are_plain_sgd(tiny: nn.Module) -> None:
    x, y = normalised(5)
    sent = legacy.loss_steps(tiny, x, y, lr=0.1, local_steps=3, batch_size=2)
    trained = copy.deepcopy(tiny)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    for rows in (slice(0, 2), slice(2, 4), slice(0, 2)):  # the fifth image fits into no minibatch
        optimizer.zero_grad()
        nn.functional.cross_entropy(trained(x[rows]), y[rows]).backward()
        optimizer.step()
    new = legacy.loss_steps(tiny, x, y, lr=0.1, local_steps=3, batch_size=2, use_updates=False)
    for difference, weights, after, before in zip(
        sent, new, trained.parameters(), tiny.parameters(), strict=True
    ):
        torch.testing.assert_close(difference, after.detach() - before.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(weights, after.detach(), rtol=1e-5, atol=1e-6)


def test_loss_steps_are_differentiable(tiny: nn.Module) -> None:
    tiny = tiny.double()
    x, y = normalised()
    assert torch.autograd.gradcheck(
        lambda inputs: legacy.loss_steps(tiny, inputs, y, lr=0.5, local_steps=2)[3],
        x.double().requires_grad_(),
        fast_mode=True,
    )


def test_loss_function_of_the_caller(tiny: nn.Module) -> None:
    x, y = normalised(2)
    total = legacy.loss_steps(tiny, x, y, nn.CrossEntropyLoss(reduction="none"), local_steps=1)
    mean = legacy.loss_steps(tiny, x, y, local_steps=1)
    assert float(total[2].norm() / mean[2].norm()) == pytest.approx(2, rel=1e-3)


def test_models_come_with_their_seed() -> None:
    model, seed = legacy.construct_model("LeNetZhu", num_classes=7, seed=3, num_channels=1)
    assert seed == 3
    assert model.training
    again, key = legacy.construct_model("LeNetZhu", num_classes=7, seed=9, num_channels=1, modelkey=3)
    assert key == 3
    assert torch.equal(model.fc.weight, again.fc.weight)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    drawn = {legacy.construct_model("LeNetZhu")[1] for _ in range(3)}
    assert len(drawn) == 3
    assert legacy.construct_model("ConvNet", seed=0)[0].conv0.out_channels == 64


def test_psnr_at_its_limits() -> None:
    x = torch.rand(2, 1, 4, 4, generator=generator())
    assert legacy.psnr(x, x) == math.inf
    assert legacy.psnr(x, x, batched=True) == math.inf
    broken = x.clone()
    broken[0, 0, 0, 0] = math.nan
    assert math.isnan(legacy.psnr(broken, x))


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 2), ((3, 5), 1), (2, 1), (3, 3)])
def test_median_pool_keeps_the_size(kernel, stride) -> None:
    x = torch.rand(1, 2, 9, 11, generator=generator())
    found = legacy.MedianPool2d(kernel, stride)(x)
    assert found.shape == (1, 2, -(-9 // stride), -(-11 // stride))


def test_median_pool_of_a_window() -> None:
    x = torch.tensor([[1.0, 9.0, 2.0], [8.0, 3.0, 7.0], [4.0, 6.0, 5.0]]).view(1, 1, 3, 3)
    assert legacy.MedianPool2d(3, same=False)(x).item() == 5
    assert legacy.MedianPool2d(2, same=False)(x).flatten().tolist() == [3, 3, 4, 5]
    assert legacy.MedianPool2d(3, padding=(1, 1, 0, 0), same=False)(x).shape == (1, 1, 1, 3)


def test_legacy_attack_is_a_gradient_matching() -> None:
    assert isinstance(legacy.attack(), matching.GradientMatching)
