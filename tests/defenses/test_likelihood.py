"""What an attacker who knows the defences minimises, and that searches and closed forms take it."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import norm

import invlib as iv
from invlib.attacks.parts import Parts
from invlib.core.observation import stackable
from invlib.errors import ConfigError, DoubtWarning, RecoveryError
from tests.conftest import build_tiny, random_batch

D = iv.defenses
WIDE = torch.float64


def case(*transforms, n=1, client=None, seed=0, dtype=WIDE, **settings):
    x, y = random_batch(n, dtype=dtype)
    defended = iv.Defended(client or iv.FedSGD(), transforms, **settings)
    model, generator = build_tiny(dtype), torch.Generator().manual_seed(seed)
    seen = iv.observe(model, x, y, defended, normalization=iv.CIFAR10, generator=generator)
    return model, seen, x, y


def search(**settings):
    return iv.GradientMatching(**{"steps": 30, "decay": None, "priors": ()} | settings)


def loss(transforms, simulated, seen):
    client = iv.Defended(iv.FedSGD(), transforms)
    return float(client.loss([torch.tensor(simulated)], [torch.tensor(seen)]))


def test_a_clip_alone_changes_nothing_for_one_who_matches_directions():
    model, plain, x, y = case()
    _, clipped, _, _ = case(D.Clip(0.01))
    assert math.hypot(*(float(u.norm()) for u in clipped.update.values())) == pytest.approx(0.01, rel=1e-3)
    one, other = search()(model, plain), search()(model, clipped)
    torch.testing.assert_close(other.images, one.images, rtol=0, atol=1e-6)
    assert other.score == pytest.approx(one.score, rel=1e-6)
    assert other.note == "gradient matching by the likelihood of clip 0.01"
    assert search().score(model, clipped, x, y) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "transform", [D.TopK(1.0), D.Quantize(32), D.GaussianNoise(0.0), D.LaplaceNoise(0.0)], ids=repr
)
def test_defences_that_do_nothing_change_nothing(transform):
    model, plain, *_ = case()
    _, seen, _, _ = case(transform)
    one, other = search()(model, plain), search()(model, seen)
    torch.testing.assert_close(other.images, one.images, rtol=0, atol=1e-4)
    assert other.score == pytest.approx(one.score, rel=1e-4)


def test_noise_counts_by_its_density():
    near, far, sigma = [0.0, 0.0, 0.0], [0.1, -0.2, 0.3], 0.5
    for noise, law in (
        (D.GaussianNoise(sigma), torch.distributions.Normal(0.0, sigma)),
        (D.LaplaceNoise(sigma), torch.distributions.Laplace(0.0, sigma / math.sqrt(2))),
    ):
        gap = loss([D.Clip(9.0), noise], far, near) - loss([D.Clip(9.0), noise], near, near)
        expected = law.log_prob(torch.tensor(near)).sum() - law.log_prob(torch.tensor(far)).sum()
        assert gap == pytest.approx(float(expected), rel=1e-5)


def test_what_was_rounded_after_noise_counts_by_the_probability_of_its_interval():
    law = norm(0.0, 0.5)
    signs = loss([D.GaussianNoise(0.5), D.Sign()], [0.3, -4.0, 60.0], [1.0, 1.0, 1.0])
    assert signs == pytest.approx(-law.logcdf([0.3, -4.0, 60.0]).sum(), rel=1e-4)
    value = loss([D.GaussianNoise(0.5), D.TopK(0.5)], [1.5, 0.7], [2.0, 0.0])
    assert value == pytest.approx(0.5 - math.log(law.cdf(2.0 - 0.7) - law.cdf(-2.0 - 0.7)), rel=1e-4)


def test_numbers_that_were_not_sent_cost_only_above_the_smallest_that_was():
    seen = [4.0, -3.0, 0.0, 0.0]
    assert loss([D.TopK(0.5)], [4.0, -3.0, 2.9, -2.9], seen) == pytest.approx(0)
    assert loss([D.TopK(0.5)], [8.0, -6.0, 5.8, 0.0], seen) == pytest.approx(0)  # whatever its length
    over = loss([D.TopK(0.5)], [4.0, -3.0, 3.5, -5.0], seen)
    assert over == pytest.approx((0.5**2 + 2.0**2) / (2 * 25))
    cosine = loss([], [4.0, 3.0], [4.0, -3.0])
    assert loss([D.TopK(0.5)], [4.0, 3.0, 0.0, 0.0], seen) == pytest.approx(cosine)


def test_levels_signs_and_half_precision_are_intervals():
    assert loss([D.Quantize(3)], [3.0, 1.4, -0.4], [3.0, 1.0, 0.0]) == pytest.approx(0, abs=1e-2)
    assert loss([D.Quantize(3)], [3.0, -1.4, 2.0], [3.0, 1.0, 0.0]) > 0.1
    assert loss([D.Sign()], [5.0, -0.1], [1.0, -1.0]) == 0
    assert loss([D.Sign()], [3.0, 4.0], [1.0, -1.0]) == pytest.approx(16 / 50)
    assert loss([D.Transport("bfloat16")], [1.002, 3.0], [1.0, 3.0]) == pytest.approx(0, abs=1e-9)
    assert loss([D.Transport("bfloat16")], [1.02, 3.0], [1.0, 3.0]) > 1e-6


@pytest.mark.parametrize(
    "transforms",
    [
        [D.TopK(0.2)],
        [D.Sign()],
        [D.Quantize(4)],
        [D.Transport("bfloat16")],
        [D.MaskLayer("0")],
        [D.TopK(0.2), D.Quantize(4)],
        [D.Clip(0.1), D.TopK(0.2), D.Transport("float16")],
        [D.Clip(0.1), D.GaussianNoise(1e-4)],
        [D.GaussianNoise(1e-4), D.TopK(0.2)],
        [D.TopK(0.2), D.GaussianNoise(1e-4)],
        [D.LaplaceNoise(1e-4)],
    ],
    ids=repr,
)
def test_the_clients_own_images_score_best(transforms):
    model, seen, x, y = case(*transforms, dtype=torch.float32)
    own = search().score(model, seen, x, y)
    others = [search().score(model, seen, random_batch(seed=s)[0], y) for s in range(1, 6)]
    assert own < min(others)
    if not any(t.noise for t in transforms):
        assert own < 1e-3 * min(others)


def test_an_objective_that_was_named_wins():
    model, seen, _, y = case(D.Clip(0.5), D.GaussianNoise(0.01))
    found = search(objective=iv.objectives.l2, steps=2)(model, seen)
    assert found.objective == "l2"
    assert "likelihood" not in found.note
    told = search(steps=2)(model, seen)
    assert told.objective == "the likelihood of clip 0.5, noise 0.01"
    assert told.note == "gradient matching by the likelihood of clip 0.5, noise 0.01"
    assert told.score == pytest.approx(search().score(model, seen, told.images, y))
    naive = search(steps=2)(model, case(D.Clip(0.5), D.GaussianNoise(0.01), public=False)[1])
    assert (naive.objective, naive.note) == ("cosine", "")


@pytest.mark.parametrize(
    "transforms",
    [[D.Clip(0.05), D.GaussianNoise(0.001)], [D.TopK(0.3), D.GaussianNoise(0.001)], [D.TopK(0.3)]],
    ids=repr,
)
@pytest.mark.parametrize("client", [iv.FedSGD(), iv.FedAvg(lr=0.1, local_steps=2)], ids=["one", "two"])
def test_restarts_cost_the_same_by_every_engine(transforms, client):
    model, seen, *_ = case(*transforms, client=client)
    assert stackable(seen.protocol)
    runs = [
        search(restarts=4, steps=3, engine=engine, record_every=1)(model, seen)
        for engine in ("eager", "batched")
    ]
    assert {run.engine for run in runs} == {"eager", "batched"}
    torch.testing.assert_close(runs[0].history.cost, runs[1].history.cost, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(runs[0].trials, runs[1].trials, rtol=0, atol=1e-6)


def test_priors_weigh_less_the_more_a_likelihood_says():
    model, seen, *_ = case(D.GaussianNoise(1e-3))
    attack = search(priors=((0.5, iv.priors.total_variation),))
    [(weight, _)] = attack.problem(model, seen).priors
    square = sum(float(u.square().sum()) for u in seen.update.values())
    count = sum(u.numel() for u in seen.update.values())
    assert weight == pytest.approx(0.5 * (square / 1e-6 - count))
    [(plain, _)] = attack.problem(model, case(D.Clip(0.1))[1]).priors
    assert plain == 0.5


@pytest.mark.parametrize(
    ("transforms", "doubt"),
    [
        ([D.GaussianNoise(0.1), D.Clip(1.0)], "a clip after noise"),
        ([D.GaussianNoise(0.1), D.LaplaceNoise(0.1)], "sums of Laplace noise"),
        ([D.LaplaceNoise(0.1), D.Sign()], "Laplace noise before rounding"),
        ([D.Sign(), D.GaussianNoise(0.1)], "sign before noise is left out"),
    ],
    ids=repr,
)
def test_what_a_likelihood_leaves_out_is_said(transforms, doubt):
    model, seen, *_ = case(*transforms)
    with pytest.warns(DoubtWarning, match=doubt):
        found = search(steps=1)(model, seen)
    assert any(doubt in warning for warning in found.warnings)


def test_closed_forms_read_through_a_clip_and_doubt_noise():
    x, y = random_batch(dtype=WIDE)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 20), torch.nn.Sigmoid())
    model.append(torch.nn.Linear(20, 5)).to(WIDE)

    def found(*transforms):
        client = iv.Defended(iv.FedSGD(), transforms)
        return iv.fully_connected()(
            model, iv.observe(model, x, y, client, normalization=iv.CIFAR10, reveal_labels=False)
        )

    torch.testing.assert_close(found(D.Clip(1e-3)).images, x, rtol=0, atol=1e-6)
    assert found(D.Clip(1e-3)).labels.tolist() == y.tolist()
    with pytest.warns(DoubtWarning, match="labels were inferred from an update with noise of 1e-06"):
        noisy = found(D.GaussianNoise(1e-6))
    assert 0 < float((noisy.images - x).abs().max()) < 0.1
    with pytest.raises(RecoveryError, match=r"of the numbers of .* were sent"):
        found(D.TopK(0.1))


def test_best_says_what_it_compares_by():
    model, seen, *_ = case(D.Clip(0.5), D.GaussianNoise(0.01), dtype=torch.float32)
    found = iv.best(evaluations=50)(model, seen)
    assert "by the likelihood of clip 0.5, noise 0.01" in found.note
    other = iv.best(evaluations=50)(model, case(D.TopK(0.5), dtype=torch.float32)[1])
    assert "by the likelihood of top-k 0.5" in other.note
    assert math.isfinite(found.score)


NOISY = [D.Clip(0.5), D.GaussianNoise(1e-3)]


def naively(seen):
    return replace(seen, protocol=seen.protocol.client)


@pytest.mark.parametrize("better", [True, False])
def test_best_keeps_the_likelier_of_two_results(better, monkeypatch):
    model, seen, x, _ = case(*NOISY, n=2, dtype=torch.float32)
    run, first, then = Parts.run, [], []

    def planted(parts, part, observation, **told):
        result = run(parts, part, observation, **told)
        if told["name"] != "likelihood":
            assert observation.protocol == iv.FedSGD()
            first.append(result.images)
            return result
        torch.testing.assert_close(part.init, first[-1])
        # A score alone must not decide: that of the likelier images is made out to be the worse one.
        result = replace(result, score=1e9) if better else replace(result, images=1 - x, score=-1e9)
        then.append(result.images)
        return result

    monkeypatch.setattr(Parts, "run", planted)
    found = iv.best(evaluations=100)(model, seen)
    assert torch.equal(found.images, then[-1] if better else first[-1])
    assert ("which came to nothing likelier" in found.note) == (not better)
    assert "then by the likelihood of clip 0.5, noise 0.001" in found.note
    assert found.objective == "the likelihood of clip 0.5, noise 0.001"


def test_the_prior_decides_between_images_of_one_likelihood(monkeypatch):
    model, seen, x, _ = case(D.Clip(0.5), D.GaussianNoise(0.05), n=2, dtype=torch.float32)
    run, grey = Parts.run, torch.full_like(x, 0.47)

    def planted(parts, part, observation, **told):
        result = run(parts, part, observation, **told)
        return (
            replace(result, images=grey)
            if told["name"] == "likelihood"
            else replace(result, images=x, trials=x[None])
        )

    monkeypatch.setattr(Parts, "run", planted)
    found = iv.best(evaluations=100)(model, seen)
    assert search().score(model, seen, x, seen.labels) < search().score(model, seen, grey, seen.labels)
    torch.testing.assert_close(found.images, grey)  # noise as large as this says next to nothing
    free = iv.best(evaluations=100, natural=0.0)(model, seen)
    torch.testing.assert_close(free.images, x)


@pytest.mark.parametrize("transforms", [NOISY, [D.Sign()], [D.TopK(0.1)], [D.Quantize(bits=2)]], ids=repr)
def test_who_knows_a_defence_ends_likelier_for_the_same_evaluations(transforms):
    model, seen, _, y = case(*transforms, n=2, dtype=torch.float32)
    attack = iv.best(evaluations=100)
    found, naive = attack(model, seen), attack(model, naively(seen))
    assert found.score == pytest.approx(search().score(model, seen, found.images, y), rel=1e-4)
    assert found.score < search().score(model, seen, naive.images, y)
    assert found.evaluations < 100 + 20
    assert found.history.steps == sorted(found.history.steps)


def test_rounds_of_one_model_are_averaged():
    model, _, x, y = case()
    client = iv.Defended(iv.FedSGD(), [D.Clip(0.5), D.GaussianNoise(0.2)])
    seen = [
        iv.observe(model, x, y, client, normalization=iv.CIFAR10, generator=torch.Generator().manual_seed(s))
        for s in range(4)
    ]
    net, both = iv.several_rounds([model] * 4, seen)
    [mean] = both.protocol.clients
    assert mean.transforms == (D.Clip(0.5), D.GaussianNoise(0.1))
    assert len(both.update) == len(seen[0].update)
    attack = search()

    def gap(net, observation):
        return attack.score(net, observation, random_batch(seed=3)[0].to(WIDE), y) - attack.score(
            net, observation, x, y
        )

    assert gap(net, both) == pytest.approx(sum(gap(model, one) for one in seen), rel=1e-6)


def test_rounds_of_other_models_add_their_likelihoods():
    models = [build_tiny(WIDE), build_tiny(WIDE)]
    with torch.no_grad():
        for p in models[1].parameters():
            p.mul_(1.1)
    x, y = random_batch(dtype=WIDE)
    clients = [
        iv.Defended(iv.FedSGD(), [D.GaussianNoise(0.1)]),
        iv.Defended(iv.FedSGD(), [D.Clip(0.3), D.GaussianNoise(0.2)]),
    ]
    seen = [iv.observe(m, x, y, c, normalization=iv.CIFAR10) for m, c in zip(models, clients, strict=True)]
    net, both = iv.several_rounds(models, seen)
    attack = search()
    alone = [attack.score(m, one, x, y) for m, one in zip(models, seen, strict=True)]
    assert attack.score(net, both, x, y) == pytest.approx(sum(alone), rel=1e-6)
    assert (
        "noise 0.1 and the likelihood of clip 0.3, noise 0.2 in 2 rounds" in search(steps=1)(net, both).note
    )
    few = search(layers=iv.Layers(which="first", count=3))
    with pytest.raises(ConfigError, match="is of 3 tensors; expected those of all layers in each round"):
        few.score(net, both, x, y)
    clips = [replace(c, transforms=(D.Clip(0.1),)) for c in clients]
    seen = [iv.observe(m, x, y, c, normalization=iv.CIFAR10) for m, c in zip(models, clips, strict=True)]
    assert attack.score(*iv.several_rounds(models, seen), x, y) == pytest.approx(0, abs=1e-12)
