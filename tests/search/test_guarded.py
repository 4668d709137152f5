"""Networks that cannot be mapped over restarts run one after another, and say so; what is not finite ends."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import invlib as iv
from invlib.errors import ConfigError
from invlib.optim import priors
from invlib.search.engines import memory, selection
from tests.conftest import build_tiny, random_batch


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(24, 6, batch_first=True), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.cell(x.permute(0, 2, 1, 3).flatten(2))[0][:, -1])


class Asking(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.body, self.change = build_tiny(), change

    def forward(self, x):
        return self.change(self.body(x))


def branching(x):
    return 2 * x if x.mean() > 0 else x


def dividing(x):
    return x / (1 + x.detach().abs().max().item())


def dropping_and_asking(x):
    return F.dropout(x, 0.5) * (2.0 if x.sum() > 1e9 else 1.0)


NETWORKS = {
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "an if on a tensor": lambda: Asking(branching),
    ".item()": lambda: Asking(dividing),
}


def made(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NETWORKS[name]().eval()


def see(net, n=1, seed=0, **facts):
    x, y = random_batch(n, seed=seed)
    return iv.observe(net, x, y, facts.pop("client", iv.FedSGD()), normalization=iv.CIFAR10, **facts)


@pytest.mark.parametrize("client", [iv.FedSGD(), iv.FedAvg(lr=0.1, local_steps=2)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_that_cannot_be_mapped_runs_one_restart_after_another(name, client):
    net = made(name)
    seen = see(net, client=client)
    attack = iv.GradientMatching(steps=3, restarts=3, record_every=1)
    before = torch.get_rng_state()
    found, alone = attack(net, seen), replace(attack, engine="eager")(net, seen)
    assert torch.equal(torch.get_rng_state(), before)
    assert (found.engine, alone.engine) == ("eager", "eager")
    assert found.engine_reason.startswith("one restart at a time, for the network cannot take them together")
    assert torch.equal(found.trials, alone.trials)
    assert torch.equal(found.trial_scores, alone.trial_scores)
    assert torch.equal(found.history.cost, alone.history.cost)
    assert found.evaluations == alone.evaluations
    with pytest.raises(ConfigError, match=r"engine='batched' cannot evaluate .* together \(\w+Error: "):
        replace(attack, engine="batched")(net, seen)


def test_spectral_norm_in_training_mode_falls_back_too():
    net = build_tiny()
    net = nn.Sequential(nn.utils.parametrizations.spectral_norm(net[0]), *net[1:])
    found = iv.GradientMatching(steps=2, restarts=2)(net, see(net, training_mode=True))
    assert found.trial_scores.isfinite().all()


def test_random_numbers_that_a_failed_try_drew_are_drawn_again():
    net = Asking(dropping_and_asking).train()
    seen = see(net, training_mode=True)
    attack, results = iv.GradientMatching(steps=2, restarts=2), []
    for engine in ("auto", "eager"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            results.append(replace(attack, engine=engine)(net, seen).trials)
    assert torch.equal(*results)


def test_what_fails_for_one_restart_too_keeps_its_own_error(tiny, seen):
    def broken(candidate, target):
        raise ZeroDivisionError("mine")

    for engine in ("auto", "eager", "batched"):
        with pytest.raises(ZeroDivisionError, match="mine"):
            iv.GradientMatching(objective=broken, steps=1, restarts=2, engine=engine)(tiny, seen)


def test_many_observations_of_a_network_that_cannot_be_mapped():
    net = made("LSTM")
    seen = [see(net, seed=k) for k in range(3)]
    attack = iv.GradientMatching(steps=2, restarts=2)
    for one, observation in zip(iv.attack_many(attack, net, seen), seen, strict=True):
        assert torch.equal(one.trials, attack(net, observation).trials)
        assert one.engine == "eager"


def test_a_network_that_cannot_be_mapped_where_memory_is_measured(monkeypatch):
    net, largest = made("an if on a tensor"), memory.largest
    monkeypatch.setattr(
        memory, "largest", lambda problem, *more: largest(replace(problem, activations=None), *more)
    )
    found = iv.GradientMatching(steps=2, restarts=2)(net, see(net))
    assert found.engine == "eager"


def test_scores_of_a_network_that_cannot_be_mapped():
    net = made(".item()")
    problem = iv.GradientMatching().problem(net, see(net))
    images = torch.rand(3, *problem.shape, generator=torch.Generator().manual_seed(0))
    together, alone = (selection.scores(problem, images, together=k) for k in (3, 1))
    assert torch.equal(together, alone)


class Nans:
    """A prior that is NaN from some evaluation on."""

    def __init__(self, after):
        self.after = after

    def __call__(self, inputs):
        self.after -= 1
        return inputs.square().mean() * (1.0 if self.after >= 0 else torch.nan)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
@pytest.mark.parametrize("after", [0, 1, 2, 5, 9])
def test_a_cost_that_is_not_a_number_ends_a_restart_of_lbfgs(tiny, seen, after, line_search):
    optimizer = iv.LBFGS(max_iter=4, line_search=line_search)
    attack = iv.GradientMatching(
        optimizer=optimizer, steps=5, restarts=2, priors=((1e-3, Nans(after)),), keep="last", record_every=1
    )
    found = attack(tiny, seen)
    assert found.trials.isfinite().all()
    assert found.trial_scores.isfinite().all()
    assert found.evaluations == after + 2 + 2  # a NaN for each restart, and their scores
    assert found.status == "max_steps"


def test_a_network_that_is_never_finite_is_said_so(tiny, seen):
    attack = iv.GradientMatching(optimizer=iv.LBFGS(), steps=3, objective=lambda c, t: c[0].sum() * torch.nan)
    assert attack(tiny, seen).status == "non_finite"


@pytest.mark.parametrize("shape", [(1, 3, 1, 9), (1, 3, 9, 1), (2, 1, 1, 1)], ids=str)
def test_images_with_a_side_of_one_pixel(shape):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = [d for d in (x.diff(dim=-1), x.diff(dim=-2)) if d.numel()]
    expected = sum((d.square() + 1e-4).sqrt().mean() for d in steps)
    assert float(priors.rounded_total_variation(x)) == pytest.approx(float(expected))
    natural = iv.NaturalImages()
    torch.testing.assert_close(natural.images(natural.coordinates(x)), x)
    # A median of three along the side there is, reflected at its ends.
    line = x.flatten(2)
    near = torch.cat([line[..., 1:2], line, line[..., -2:-1]], -1) if line.shape[-1] > 1 else line
    medians = near.unfold(-1, min(3, near.shape[-1]), 1).median(-1).values
    torch.testing.assert_close(priors.median_filter(x).flatten(2), medians)


@pytest.mark.parametrize("side", [(1, 12), (12, 1), (1, 1)], ids=str)
def test_attacks_on_images_with_a_side_of_one_pixel(side):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flat = 3 * side[0] * side[1]
        net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.GELU(), nn.Flatten(), nn.Linear(flat, 4)).eval()
    x = torch.rand(1, 3, *side, generator=torch.Generator().manual_seed(0))
    seen = iv.observe(net, x, torch.tensor([1]), iv.FedSGD(), normalization=iv.UNIT)
    for attack in (iv.best(steps=60), iv.best(steps=10, restarts=2), iv.inverting_gradients(steps=5)):
        found = attack(net, seen)
        assert found.images.isfinite().all()
        assert found.score < 1


def test_the_score_of_the_truth_is_not_below_zero():
    net = build_tiny()
    for n in range(1, 5):
        x, y = random_batch(n)
        seen = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
        starts = torch.stack([x, x.flip(-1)])
        for settings in (
            {},
            {"layers": iv.Layers(which="first", count=3, weights="linear")},
            {"objective": iv.objectives.layerwise_cosine},
            {"objective": iv.objectives.Masked(iv.objectives.cosine)},
        ):
            attack = iv.GradientMatching(**settings, steps=1, optimizer=iv.SGD(lr=1e-12), restarts=2)
            found = replace(attack, init=starts)(net, seen)
            assert found.score >= 0
            assert (found.trial_scores >= 0).all()
            assert attack.score(net, seen, x, y) >= 0
