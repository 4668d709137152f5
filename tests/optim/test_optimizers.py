"""Optimisers against torch's own, the box, and the step decay of the published code."""

import itertools

import pytest
import torch

from invlib.errors import ConfigError
from invlib.optim.optimizers import LBFGS, SGD, Adam, Variable
from invlib.optim.schedules import StepDecay, geometric


def bowl(values):
    """A quadratic for each restart, with curvatures from 1 to 3."""
    x = values[0]
    scale = torch.linspace(1, 3, x[0].numel()).view_as(x[0])
    costs = (scale * x.square()).flatten(1).sum(1)
    return costs, [2 * scale * x] + [2 * v for v in values[1:]]


def start():
    return torch.randn(2, 1, 1, 2, 3, generator=torch.Generator().manual_seed(0))


def free(*names):
    return [Variable(name=n, signed=n == "images") for n in names]


def walk(optimizer, values, variables, steps, factor=1.0):
    state = optimizer.init(values)
    for _ in range(steps):
        optimizer.step(values, variables, state, bowl, factor)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Adam, lambda p: torch.optim.Adam(p, lr=0.05)),
        (SGD, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True)),
    ],
)
def test_steps_are_those_of_torch(ours, theirs, signed):
    values = [start()]
    walk(ours(lr=0.05, signed=signed), values, free("images"), 10)
    expected = start().requires_grad_()
    optimizer = theirs([expected])
    for _ in range(10):
        gradient = bowl([expected.detach()])[1][0]
        expected.grad = gradient.sign() if signed else gradient
        optimizer.step()
    torch.testing.assert_close(values[0], expected.detach(), rtol=1e-5, atol=1e-6)


def test_lbfgs_continues_across_steps_as_torch_does():
    values = [start()[:1]]
    walk(LBFGS(max_iter=3), values, free("images"), 4)
    expected = start()[:1].requires_grad_()
    optimizer = torch.optim.LBFGS([expected], max_iter=3)
    for _ in range(4):

        def closure():
            cost, (gradient,) = bowl([expected.detach()])
            expected.grad = gradient
            return cost.sum()

        optimizer.step(closure)
    torch.testing.assert_close(values[0], expected.detach())


def test_lbfgs_with_a_line_search_reaches_the_bottom():
    values = [start()[:1]]
    walk(LBFGS(line_search="strong_wolfe"), values, free("images"), 2)
    assert values[0].abs().max() < 1e-4
    assert values[0].grad is None


@pytest.mark.parametrize("optimizer", [Adam(lr=0.5), SGD(lr=0.5), LBFGS(lr=0.5)])
def test_the_box_holds_after_every_step(optimizer):
    values = [start()[:1]]
    low, high = torch.tensor(0.25).view(1, 1, 1, 1), torch.tensor(0.5).view(1, 1, 1, 1)
    walk(optimizer, values, [Variable(name="images", low=low, high=high)], 3)
    assert values[0].min() >= 0.25
    assert values[0].max() <= 0.5


@pytest.mark.parametrize("optimizer", [Adam(signed=True, lr=0.1), SGD(signed=True, lr=0.1, momentum=0)])
def test_only_images_are_signed(optimizer):
    values = [torch.full((1, 2), 1.0), torch.full((1, 2), 1.0)]
    moved = [v.clone() for v in values]
    state = optimizer.init(values)
    optimizer.step(
        moved,
        free("images", "labels"),
        state,
        lambda v: (torch.zeros(1), [torch.tensor([[1e-3, -4.0]])] * 2),
        1.0,
    )
    images, labels = (m - v for m, v in zip(moved, values, strict=True))
    torch.testing.assert_close(images, torch.tensor([[-0.1, 0.1]]))
    if isinstance(optimizer, SGD):
        torch.testing.assert_close(labels, torch.tensor([[-1e-4, 0.4]]))


@pytest.mark.parametrize("optimizer", [Adam(lr=0.1), SGD(lr=0.1), LBFGS(max_iter=1)])
def test_the_factor_scales_the_step(optimizer):
    whole, tenth = [start()[:1]], [start()[:1]]
    walk(optimizer, whole, free("images"), 1)
    walk(optimizer, tenth, free("images"), 1, factor=0.1)
    torch.testing.assert_close((tenth[0] - start()[:1]) * 10, whole[0] - start()[:1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("steps", [30, 80, 100, 4800])
def test_step_decay_falls_where_the_published_code_lets_it(steps):
    factors = [StepDecay().factor(k, steps) for k in range(steps)]
    for count, divisor in enumerate((2.667, 1.6, 1.142), 1):
        falls = next(k for k, f in enumerate(factors) if f == pytest.approx(0.1**count))
        assert abs(falls - steps // divisor) <= steps / 1000 + 1
    assert factors[0] == 1
    assert factors[-1] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("steps", "falls"), [(100, (37, 62, 87)), (4800, (1800, 3000, 4200)), (3, (1, 1, 2))]
)
def test_step_decay_falls_at_the_whole_step_before(steps, falls):
    expected = [0.1 ** sum(k >= fall for fall in falls) for k in range(steps)]
    assert [StepDecay().factor(k, steps) for k in range(steps)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Adam(lr=0), "Adam lr is 0; expected a positive"),
        (lambda: SGD(lr=-1), "SGD lr is -1"),
        (lambda: LBFGS(lr=0), "LBFGS lr is 0"),
        (lambda: SGD(momentum=1.0), r"momentum is 1.0; expected a number in \[0, 1\)"),
        (lambda: LBFGS(line_search="golden"), "line_search is 'golden'"),
        (lambda: StepDecay(at=(0.5, 0.2)), "expected ascending"),
        (lambda: StepDecay(at=(1.5,)), r"expected ascending numbers in \(0, 1\)"),
        (lambda: StepDecay(gamma=0), "gamma is 0"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(("start", "end"), [(4.0, 30.0), (1.0, 0.01), (2.0, 2.0)])
def test_geometric_goes_from_start_to_end_in_equal_ratios(start, end):
    numbers = [geometric(start, end, k / 4) for k in range(5)]
    assert numbers[0] == start
    assert numbers[4] == pytest.approx(end)
    ratios = [b / a for a, b in itertools.pairwise(numbers)]
    assert ratios == pytest.approx([(end / start) ** 0.25] * 4)
