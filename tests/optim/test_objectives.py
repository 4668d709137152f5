"""Objectives and layer choices against hand-made values, float64 gradcheck and tiny gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invlib import Layers
from invlib.errors import ConfigError
from invlib.optim import objectives

ALL = [objectives.cosine, objectives.l2, objectives.l1, objectives.maximum, objectives.layerwise_cosine]


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
        ({"which": "last", "count": 0}, "count=0"),
        ({"count": 3}, "none with which='all'"),
    ],
)
def test_bad_layers_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Layers(**arguments)
