"""Objectives and layer choices against hand-made values, float64 gradcheck and tiny gradients."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import invlib as iv
from invlib import Layers
from invlib.errors import ConfigError
from invlib.optim import objectives
from tests.conftest import build_tiny, random_batch

PLAIN = [objectives.cosine, objectives.l2, objectives.l1, objectives.maximum, objectives.layerwise_cosine]
ALL = [*PLAIN, objectives.tag, objectives.Masked(objectives.cosine), objectives.Masked(objectives.tag)]


def lists(seed=0, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 2), (4,), (2, 2, 2)]
    return [scale * torch.randn(s, generator=generator, dtype=dtype) for s in shapes]


def test_values_by_hand():
    c, t = [torch.tensor([3.0, 4.0])], [torch.tensor([4.0, 3.0])]
    assert objectives.cosine(c, t).item() == pytest.approx(1 - 24 / 25)
    assert objectives.l2(c, t).item() == pytest.approx(2)
    assert objectives.l1(c, t).item() == pytest.approx(2)
    assert objectives.maximum(c, t).item() == pytest.approx(1)
    assert objectives.layerwise_cosine(c * 2, t * 2, [1.0, 0.5]).item() == pytest.approx(1.5 * (1 - 24 / 25))


@pytest.mark.parametrize("objective", ALL)
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 0.25]])
def test_gradients_are_right(objective, weights):
    target = lists(1)
    candidate = [c.requires_grad_() for c in lists(0)]
    assert torch.autograd.gradcheck(lambda *c: objective(c, target, weights), candidate)


@pytest.mark.parametrize("objective", ALL)
def test_zero_at_the_target_and_positive_elsewhere(objective):
    assert objective(lists(0), lists(0)).item() == pytest.approx(0, abs=1e-12)
    assert objective(lists(0), lists(1)).item() > 0.1


@given(scale=st.floats(1e-6, 1e6))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_cosine_ignores_size(scale):
    a = objectives.cosine(lists(0), lists(1))
    b = objectives.cosine(lists(0), [scale * t for t in lists(1)])
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("small", [8e-5 / 5, 1e-12])
def test_cosine_holds_for_the_tiny_gradients_of_trained_networks(dtype, small):
    # A well-trained network's gradient can have a norm of 8e-5; its square times another's is near 1e-17.
    # At 1e-12 that product is less than float32 can hold, while each of the two norms is not.
    value = objectives.cosine(lists(0, small, dtype), lists(1, small, dtype))
    expected = objectives.cosine(lists(0), lists(1))
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("objective", [objectives.cosine, objectives.layerwise_cosine])
def test_a_vanished_gradient_gives_no_nan(objective):
    candidate = [torch.zeros_like(c).requires_grad_() for c in lists(0)]
    value = objective(candidate, lists(1))
    gradients = torch.autograd.grad(value, candidate)
    assert torch.isfinite(value)
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("objective", ALL)
def test_lists_of_different_length_are_refused(objective):
    with pytest.raises(ConfigError, match="2"):
        objective(lists(0)[:2], lists(1))


def test_a_wrong_number_of_weights_is_refused():
    with pytest.raises(ConfigError, match="weights has 2 numbers for 3 tensors; expected one each"):
        objectives.l1(lists(0), lists(1), [1.0, 2.0])


@pytest.mark.parametrize(
    ("layers", "indices", "weights"),
    [
        (Layers(), [0, 1, 2, 3], None),
        (Layers(which="first", count=2), [0, 1], None),
        (Layers(which="last", count=2), [2, 3], None),
        (Layers(which="last", count=9), [0, 1, 2, 3], None),
        (Layers(which="largest", count=2), [2, 0], None),
        (Layers(weights="linear"), [0, 1, 2, 3], [1.0, 0.75, 0.5, 0.25]),
        (Layers(which="last", count=1, weights="linear"), [3], [0.25]),
        (Layers(which="first", count=2, weights="exponential"), [0, 1], [1.0, 2.718281828**-1]),
    ],
)
def test_layers(layers, indices, weights):
    target = [torch.full((2,), v) for v in (3.0, 1.0, 5.0, 2.0)]
    found, factors = layers.choose(target)
    assert found == indices
    assert factors == (None if weights is None else pytest.approx(weights))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"which": "middle", "count": 1}, "which is 'middle'"),
        ({"weights": "square"}, "weights is 'square'"),
        ({"which": "first"}, "count=None; expected a positive count"),
        ({"which": "last", "count": 0}, "Layers count is 0; expected a whole number of at least 1"),
        ({"count": 3}, "none with which='all'"),
    ],
)
def test_bad_layers_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Layers(**arguments)


def test_tag_weighs_the_absolute_distance_less_from_tensor_to_tensor():
    c, t = [torch.tensor([3.0]), torch.tensor([5.0])], [torch.tensor([1.0]), torch.tensor([2.0])]
    assert objectives.tag(c, t).item() == pytest.approx(4 + 0.1 * 2 + 9 + 0.05 * 3)
    assert objectives.tag(c, t, [1.0, 0.5]).item() == pytest.approx(4 + 0.1 * 2 + 0.5 * (9 + 0.05 * 3))


# What a client sends that drops small numbers


def sparse(tensors, share=0.3):
    bound = torch.cat([t.flatten() for t in tensors]).abs().quantile(1 - share)
    return [torch.where(t.abs() >= bound, t, 0) for t in tensors]


@pytest.mark.parametrize("objective", PLAIN)
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 0.25]])
def test_masked_is_the_objective_on_the_numbers_that_were_sent(objective, weights):
    candidate, target = lists(0), sparse(lists(1), 0.6)
    kept = [(c[t != 0], t[t != 0]) for c, t in zip(candidate, target, strict=True)]
    assert all(len(c) for c, _ in kept)
    expected = objective([c for c, _ in kept], [t for _, t in kept], weights)
    torch.testing.assert_close(objectives.Masked(objective)(candidate, target, weights), expected)


def test_masked_forgives_what_was_dropped_and_stops_its_slope():
    whole = lists(0)
    target = sparse(whole)
    assert objectives.cosine(whole, target) > 0.01
    assert objectives.Masked(objectives.cosine)(whole, target).item() == pytest.approx(0, abs=1e-12)
    whole[0][target[0] == 0] = torch.inf
    leaves = [c.requires_grad_() for c in whole]
    objectives.Masked(objectives.l2)([2 * c for c in leaves], target).backward()
    for leaf, t in zip(leaves, target, strict=True):
        torch.testing.assert_close(leaf.grad, torch.where(t != 0, 4 * t, 0))


def test_masked_says_what_it_masks_and_equals_its_like():
    masked = objectives.Masked(objectives.l1)
    assert repr(masked) == "Masked(l1)"
    assert masked == objectives.Masked(objectives.l1) != objectives.Masked(objectives.l2)


def pruned(side=8):
    x, y = random_batch(1, side=side)
    model = build_tiny()
    seen = iv.observe(model, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
    values = sparse(list(seen.update.values()), 0.2)
    return model, replace(seen, update=dict(zip(seen.update, values, strict=True))), x, y


def test_masked_runs_on_every_engine_and_beside_others():
    model, seen, *_ = pruned()
    attack = iv.GradientMatching(
        objective=objectives.Masked(objectives.cosine),
        steps=5,
        restarts=3,
        layers=Layers(which="first", count=3, weights="linear"),
    )
    eager, batched = (replace(attack, engine=name)(model, seen) for name in ("eager", "batched"))
    assert eager.objective == "Masked(cosine)"
    torch.testing.assert_close(eager.trial_scores, batched.trial_scores, rtol=1e-3, atol=1e-4)
    other = replace(seen, update={name: -u.flip(0) for name, u in seen.update.items()})
    alone = [attack(model, one) for one in (seen, other)]
    for one, joined in zip(alone, iv.attack_many(attack, model, [seen, other]), strict=True):
        torch.testing.assert_close(one.trial_scores, joined.trial_scores, rtol=1e-3, atol=1e-4)


def test_masked_scores_the_truth_zero_and_needs_something_to_compare():
    model, seen, x, y = pruned()
    attack = iv.GradientMatching(objective=objectives.Masked(objectives.cosine), steps=1)
    assert attack.score(model, seen, x, y) == pytest.approx(0, abs=1e-6)
    assert iv.GradientMatching().score(model, seen, x, y) > 0.01
    silent = replace(seen, update={name: torch.zeros_like(u) for name, u in seen.update.items()})
    with pytest.raises(ConfigError, match=r"Masked\(cosine\) has nothing to compare: all \d+ numbers"):
        attack(model, silent)
