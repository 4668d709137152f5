"""Per-example clipping: a plain loop, its slopes, every engine, and what it leaves of an attack."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import invlib as iv
from invlib.autodiff.gradients import GradientMode
from invlib.core.network import trainable_parameters
from invlib.defenses.perexample import PerExample
from invlib.errors import ConfigError
from tests.conftest import build_tiny, random_batch

N = 3


def in_a_loop(model, inputs, labels, clip):
    """The definition, image by image."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, y in zip(inputs, labels, strict=True):
        model.zero_grad()
        F.cross_entropy(model(x[None]), y[None]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        for name, p in model.named_parameters():
            total[name] += p.grad / len(inputs)
    return total


def norms(model, inputs, labels):
    each = [iv.FedSGD()(model, x[None], y[None]) for x, y in zip(inputs, labels, strict=True)]
    return torch.stack([torch.cat([g.flatten() for g in one.values()]).norm() for one in each]).detach()


@pytest.fixture(autouse=True)
def _the_same_networks():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def batch():
    model = build_tiny(torch.float64)
    x, y = random_batch(N, dtype=torch.float64)
    inputs = iv.CIFAR10.encode(x)
    return model, inputs, y, float(norms(model, inputs, y).sort().values[:2].mean())  # clips all but one


def test_it_is_what_a_loop_of_clip_grad_norm_gives(batch):
    model, inputs, labels, clip = batch
    slopes = PerExample(clip)(model, inputs, labels)
    for name, wanted in in_a_loop(model, inputs, labels, clip).items():
        torch.testing.assert_close(slopes[name], wanted)
    whole = iv.FedSGD()(model, inputs, labels)
    assert any((slopes[name] - whole[name]).abs().max() > 1e-3 for name in whole)


def test_a_clip_that_nothing_reaches_is_none(batch):
    model, inputs, labels, _ = batch
    for name, wanted in iv.FedSGD()(model, inputs, labels).items():
        torch.testing.assert_close(PerExample(1e6)(model, inputs, labels)[name], wanted)


@pytest.mark.parametrize("kind", ["tape", "mapped", "stacked"])
def test_every_way_gives_the_same_update_and_the_same_slopes(batch, kind):
    _, inputs, labels, clip = batch
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)).double()
    guesses = torch.stack([inputs, inputs.flip(0) * 0.5])  # two restarts
    own = trainable_parameters(model)

    def slopes(update, leaf):
        return torch.autograd.grad(sum(g.pow(3).sum() for g in update.values()), leaf)[0]

    plain = guesses.clone().requires_grad_()
    wanted = [PerExample(clip)(model, one, labels) for one in plain]
    along = sum(slopes(update, plain) for update in wanted)
    leaf = guesses.clone().requires_grad_()
    mode = GradientMode(kind=kind)
    if kind == "tape":
        params = {name: p.detach().requires_grad_() for name, p in own.items()}
        found = [PerExample(clip)(model, one, labels, params=params, mode=mode) for one in leaf]
        felt = sum(slopes(update, leaf) for update in found)
    else:
        params = {
            name: p.detach().expand(2, *p.shape).contiguous().requires_grad_() for name, p in own.items()
        }
        both = PerExample(clip)(model, leaf.transpose(0, 1), labels.expand(2, -1).T, params=params, mode=mode)
        found = [{name: g[k] for name, g in both.items()} for k in range(2)]
        felt = slopes(both, leaf)
    for one, other in zip(found, wanted, strict=True):
        for name in other:
            torch.testing.assert_close(one[name], other[name])
    torch.testing.assert_close(felt, along)


def test_four_restarts_cost_the_same_with_every_engine(batch):
    model, inputs, labels, clip = batch
    seen = iv.observe(model, iv.CIFAR10.decode(inputs), labels, PerExample(clip), normalization=iv.CIFAR10)
    attack = iv.GradientMatching(restarts=4, steps=3, objective=iv.objectives.l2)
    results = [replace(attack, engine=engine)(model, seen) for engine in ("eager", "batched")]
    assert [r.engine for r in results] == ["eager", "batched"]
    torch.testing.assert_close(results[0].trial_scores, results[1].trial_scores)
    assert attack.score(model, seen, iv.CIFAR10.decode(inputs), labels) < 1e-20


def test_one_image_keeps_its_direction_and_comes_back_from_a_layer():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.ReLU(), nn.Linear(7, 5))
    x, y = random_batch()
    seen = iv.observe(model, x, y, PerExample(1e-3), normalization=iv.CIFAR10)
    assert float(torch.cat([g.flatten() for g in seen.update.values()]).norm()) == pytest.approx(
        1e-3, rel=0.01
    )
    torch.testing.assert_close(iv.fully_connected()(model, seen).images, x, atol=1e-4, rtol=0)


def test_soft_labels_are_taken(batch):
    model, inputs, labels, clip = batch
    soft = F.one_hot(labels, 5).double()
    hard = PerExample(clip)(model, inputs, labels)
    for name, g in PerExample(clip)(model, inputs, soft).items():
        torch.testing.assert_close(g, hard[name])


@pytest.mark.parametrize("track", [True, False])
def test_batch_norm_that_couples_images_is_refused(track):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=track), nn.Flatten(), nn.LazyLinear(5)
    )
    x, y = random_batch(2)
    model(x)
    with pytest.raises(
        ConfigError, match=r"PerExample\(clip=1.0\) .* batch norm '1' .*; expected evaluation"
    ):
        iv.observe(model, x, y, PerExample(1.0), normalization=iv.CIFAR10, training_mode=track)
    if track:
        assert iv.observe(model, x, y, PerExample(1.0), normalization=iv.CIFAR10).update


def test_frozen_layers_have_no_gradient_and_no_share_of_the_norm():
    model = build_tiny()
    model[0].requires_grad_(False)
    x, y = random_batch(2)
    update = PerExample(0.01)(model, iv.CIFAR10.encode(x), y)
    assert set(update) == {"3.weight", "3.bias"}
    wanted = in_a_loop(nn.Sequential(*model[3:]), model[:3](iv.CIFAR10.encode(x)).detach(), y, 0.01)
    torch.testing.assert_close(update["3.weight"], wanted["0.weight"])


@pytest.mark.parametrize("clip", [0, -1.0, float("nan"), "1"])
def test_a_clip_has_to_be_positive(clip):
    with pytest.raises(ConfigError, match=r"PerExample clip is .*; expected a positive number"):
        PerExample(clip)


def test_the_loss_of_an_update_that_was_clipped_is_felt_through_the_clip(batch):
    """Finite differences of the clipped update along a change of the images."""
    model, inputs, labels, clip = batch
    change = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(1), dtype=inputs.dtype)

    def total(t):
        return sum(g.pow(3).sum() for g in PerExample(clip)(model, inputs + t * change, labels).values())

    at = torch.zeros((), dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(total(at), at)[0]
    assert float(slope) == pytest.approx(float((total(1e-5) - total(-1e-5)).detach()) / 2e-5, rel=1e-5)
