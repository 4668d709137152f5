"""Gradient statistics with a slope written by hand: the reference's numbers, alone and in stacks."""

import pytest
import torch
from torch.func import grad, vmap

from invlib import kernels
from invlib.kernels import manual, reference

SHAPES = ((3, 4), (5,), (), (2, 3, 2, 2))


def draw(*leading, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((*leading, *shape), generator=generator, dtype=dtype) for shape in SHAPES]


def cost(module, weights):
    """A function of all three sums that no two of them enter alike."""

    def of(*tensors):
        dot, ours, theirs = module.gradient_statistics(tensors[:4], tensors[4:], weights)
        return dot * ours.sqrt() + 3 * ours - theirs / (1 + dot.square())

    return of


@pytest.fixture(params=[1, 13, 10**6], ids=["tensor by tensor", "in parts", "in one piece"], autouse=True)
def _parts(request, monkeypatch):
    monkeypatch.setattr(manual, "PART", request.param)


@pytest.mark.parametrize("weights", [(1.0,) * 4, (0.5, 1.0, 0.0, 2.0)])
@pytest.mark.parametrize("stacks", [(), (3,), (2, 3)])
@pytest.mark.parametrize("shared", [True, False], ids=["one target", "a target each"])
def test_value_and_slope_are_the_references(weights, stacks, shared):
    candidate, target = draw(*stacks), draw(*(() if shared else stacks), seed=1)
    found = {}
    for module in (manual, reference):
        of = cost(module, weights)
        mapped = grad(of, argnums=(0, 1, 2, 3))
        for _ in stacks:
            dims = (0,) * 4 + (None if shared else 0,) * 4
            of, mapped = vmap(of, in_dims=dims), vmap(mapped, in_dims=dims)
        found[module] = of(*candidate, *target), mapped(*candidate, *target)
    torch.testing.assert_close(found[manual], found[reference])


@pytest.mark.parametrize("stacked", [True, False])
def test_the_tape_gives_the_references_slope(stacked):
    found = []
    for module in (manual, reference):
        candidate = [c.requires_grad_() for c in (draw(3) if stacked else draw())]
        of = cost(module, (1.0,) * 4)
        of = vmap(of, in_dims=(0,) * 4 + (None,) * 4) if stacked else of
        found.append(torch.autograd.grad(of(*candidate, *draw(seed=1)).sum(), candidate))
    torch.testing.assert_close(*found)


def test_half_precision_is_summed_in_single():
    candidate, target = draw(dtype=torch.bfloat16), draw(seed=1, dtype=torch.bfloat16)
    sums = manual.gradient_statistics(candidate, target, (1.0,) * 4)
    assert all(s.dtype == torch.float32 for s in sums)
    torch.testing.assert_close(sums, reference.gradient_statistics(candidate, target, (1.0,) * 4))


def test_an_automatic_choice_on_a_cpu_takes_it_and_an_explicit_one_does_not(monkeypatch):
    def refuse(*_):
        raise AssertionError("taken")

    monkeypatch.setattr(manual, "gradient_statistics", refuse)
    with pytest.raises(AssertionError, match="taken"):
        kernels.gradient_statistics(draw(), draw(seed=1))
    kernels.gradient_statistics(draw(), draw(seed=1), impl="reference")
