"""Matching block by block, with the image's gradient taken forward over reverse."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import invlib as iv
from invlib.attacks.forward import ForwardMatching, block, cosine_by_block, forward_step
from invlib.errors import ConfigError, ObservationError
from tests.conftest import build_tiny, random_batch


def seen_by(model: nn.Module, **settings) -> iv.Observation:
    x, y = random_batch(dtype=next(model.parameters()).dtype)
    return iv.observe(model, x, y, iv.FedSGD(), normalization=iv.CIFAR10, **settings)


def with_batch_norm() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, stride=2),
            nn.BatchNorm2d(4),
            nn.Sequential(nn.ReLU6(), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Tanh()),
            nn.Flatten(),
            nn.Linear(64, 5),
        ).double()


def test_the_slope_is_that_of_a_double_backward_pass() -> None:
    model = with_batch_norm().eval()
    seen = seen_by(model)
    by_block = cosine_by_block([name for name, _ in model.named_parameters()])
    attack = iv.GradientMatching(objective=by_block, priors=((0.5, iv.priors.total_variation),))
    measure = forward_step(model, attack.problem(model, seen))
    stack = torch.rand(2, 1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    _, objectives, [slopes] = measure([stack], [0, 1], None, 0.0)
    costs, _, [steeper] = measure([stack], [0, 1], None, 2.0)
    objective, slope = objectives[1], slopes[1]

    guess = stack[1].clone().requires_grad_()
    variation = iv.priors.total_variation(guess)
    torch.testing.assert_close(costs[1], objective + variation.detach())
    torch.testing.assert_close(steeper[1], slope + torch.autograd.grad(variation, guess)[0])

    loss = F.cross_entropy(model(guess), seen.labels)
    candidate = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    target = list(seen.update.values())
    expected = torch.tensor(0.0, dtype=torch.float64)
    for first, last in ((0, 2), (2, 4), (4, 6), (6, 8)):  # weight and bias of four modules
        a = torch.cat([g.flatten() for g in candidate[first:last]])
        b = torch.cat([g.flatten() for g in target[first:last]])
        expected = expected + (1 - F.cosine_similarity(a, b, dim=0)) / 4
    torch.testing.assert_close(objective, expected.detach())
    torch.testing.assert_close(slope, torch.autograd.grad(expected, guess)[0])


def test_blocks_are_cut_at_the_numbers_in_a_name() -> None:
    names = ("_blocks.3._bn0.bias", "layer1.0.conv1.weight", "layer1.10.bn2.bias", "conv1.weight", "_fc.bias")
    assert [block(name) for name in names] == ["_blocks.3", "layer1.0", "layer1.10", "conv1", "_fc"]
    assert block("stages.1.2.conv.weight") == "stages.1.2"
    assert block("weight") == ""


def test_it_finds_the_image() -> None:
    model = build_tiny()
    x, y = random_batch()
    seen = seen_by(model)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    state = torch.get_rng_state()
    found = ForwardMatching(steps=300, tv=(1e-3, 1e-4))(model, seen)
    assert float(iv.metrics.psnr(found.images, x)) > 25
    assert found.images.shape == x.shape
    assert 0 <= found.images.min() <= found.images.max() <= 1
    assert torch.equal(found.labels, y)
    assert found.status == "max_steps"
    assert found.evaluations == 302  # one a step, one where the last step led, and one for the score
    assert found.history.steps == list(range(0, 301, 10))
    assert found.history.objective.shape == (31, 1)
    assert (found.engine, found.objective, found.chunks) == ("forward", "cosine by block", (1,))
    assert found.history.objective[-1] < 0.1 * found.history.objective[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_restarts_are_chosen_by_their_score() -> None:
    model = build_tiny()
    attack = ForwardMatching(steps=20, restarts=3, tv=(1e-3, 1e-3))
    seen = seen_by(model)
    found = attack(model, seen, generator=torch.Generator().manual_seed(3))
    assert found.trial_scores.shape == (3,)
    assert len(set(found.trial_scores.tolist())) == 3
    best = int(found.trial_scores.argmin())
    assert found.score == found.trial_scores[best]
    assert torch.equal(found.images, found.trials[best])
    again = attack(model, seen, generator=torch.Generator().manual_seed(3))
    assert torch.equal(found.trials, again.trials)
    other = attack(model, seen, generator=torch.Generator().manual_seed(4))
    assert torch.equal(found.trials[0], other.trials[0])  # the grey start
    assert not torch.equal(found.trials[1], other.trials[1])


def test_total_variation_smooths() -> None:
    model = build_tiny()
    seen = seen_by(model)
    rough, smooth = (
        iv.priors.total_variation(ForwardMatching(steps=30, tv=tv)(model, seen).images)
        for tv in ((1e-3, 1e-3), (1e-3, 10.0))
    )
    assert smooth < 0.5 * rough


def test_hidden_labels_are_inferred() -> None:
    model = build_tiny()
    _, y = random_batch()
    found = ForwardMatching(steps=1)(model, seen_by(model, reveal_labels=False))
    assert torch.equal(found.labels, y)


def test_a_network_of_no_numbers_is_no_result() -> None:
    model = build_tiny()
    seen = seen_by(model)
    with torch.no_grad():
        model[0].weight.fill_(torch.nan)
    found = ForwardMatching(steps=2)(model, seen)
    assert found.status == "non_finite"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "ForwardMatching steps is 0; expected a whole number of at least 1"),
        ({"restarts": 0}, "ForwardMatching restarts is 0; expected a whole number of at least 1"),
        ({"lr": 0.0}, "ForwardMatching lr is 0.0; expected a positive number"),
        ({"tv": (1.0, 0.0)}, r"ForwardMatching tv is \(1.0, 0.0\); expected a tuple of a positive number"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ForwardMatching(**settings)


def test_other_clients_are_refused() -> None:
    model = build_tiny()
    x, y = random_batch()
    step = iv.FedAvg(lr=0.1, local_steps=1)
    with pytest.raises(ConfigError, match="the client ran FedAvg in evaluation mode; expected FedSGD"):
        ForwardMatching()(model, iv.observe(model, x, y, step, normalization=iv.CIFAR10))
    with pytest.raises(ConfigError, match="the client ran FedSGD in training mode"):
        ForwardMatching()(model, seen_by(model, training_mode=True))
    with pytest.raises(ObservationError):
        ForwardMatching()(build_tiny(classes=4), seen_by(model))
