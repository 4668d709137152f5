"""Saturated losses: the same direction without the vanishing factor, where it holds and where it does not."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import invlib as iv
from invlib.attacks import saturation
from invlib.attacks.labels import infer
from invlib.autodiff.odds import log_odds
from invlib.core.network import in_mode
from invlib.errors import ConfigError, DoubtWarning, RecoveryError
from invlib.optim import objectives
from invlib.search.engines import selection
from tests.conftest import build_tiny, random_batch

LABEL = 3


def sure(margin, dtype=torch.float32):
    """A small network that is sure of a label: its probability is about 1 - exp(-margin)."""
    net = build_tiny().to(dtype).eval()
    with torch.no_grad():
        net[3].bias[LABEL] += margin
    return net


def seen_of(net, client=None, **facts):
    x, _ = random_batch(dtype=next(net.parameters()).dtype)
    label = torch.tensor([LABEL])
    return x, iv.observe(net, x, label, client or iv.FedSGD(), normalization=iv.CIFAR10, **facts)


def flat(update):
    parts = update.values() if isinstance(update, dict) else update
    return torch.cat([part.detach().double().flatten() for part in parts])


def apart(one, other):
    """The distance of two directions, without the cancellation of a cosine."""
    return float((one / one.norm() - other / other.norm()).norm())


def test_log_odds_are_cross_entropy_without_its_factor():
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(6, 10, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.tensor([0, 3, 9, 3, 1, 5])
    p = logits.softmax(-1)[range(6), labels]
    each = torch.autograd.grad(log_odds(logits, labels), logits)[0]
    whole = torch.autograd.grad(F.cross_entropy(logits, labels), logits)[0]
    torch.testing.assert_close((1 - p)[:, None] * each, whole)
    torch.testing.assert_close(log_odds(logits, labels), ((1 - p) / p).log().mean())
    assert torch.autograd.gradgradcheck(lambda z: log_odds(z, labels, alpha=0.7), logits)


@pytest.mark.parametrize("margin", [0.0, 5.0, 12.0])
def test_the_direction_of_the_gradient_is_the_same(margin):
    net = sure(margin, torch.float64)
    x, _ = random_batch(dtype=torch.float64)
    inputs, label = iv.CIFAR10.encode(x), torch.tensor([LABEL])
    one, other = (flat(iv.FedSGD()(net, inputs, label, loss=loss)) for loss in (F.cross_entropy, log_odds))
    assert apart(one, other) < 2e-7


def test_where_the_probability_is_one_the_candidate_still_has_a_direction():
    net, exact = sure(20.0), sure(20.0, torch.float64)
    x, seen = seen_of(net)
    assert F.cross_entropy(net(iv.CIFAR10.encode(x)), torch.tensor([LABEL])).item() == 0
    problem = iv.GradientMatching().problem(net, seen)
    assert problem.alpha == 0  # the client's own label has lost all of its slope
    inputs = iv.CIFAR10.encode(x)
    assert apart(flat(problem.update(inputs, problem.labels)), flat(problem.target)) < 1e-5
    whole = iv.FedSGD()(exact, inputs.double(), torch.tensor([LABEL]), loss=log_odds)
    odds = iv.FedSGD()(net, inputs, torch.tensor([LABEL]), loss=log_odds)
    assert apart(flat(whole), flat(odds)) < 1e-5


@pytest.mark.parametrize("margin", [12.0, 15.0, 16.5])
def test_the_rounding_of_the_clients_probability_is_found_in_its_bias(margin):
    net = sure(margin)
    x, seen = seen_of(net)
    attack = iv.GradientMatching()
    problem = attack.problem(net, seen)
    assert problem.alpha is not None
    assert attack.score(net, seen, x, torch.tensor([LABEL])) < 1e-6
    target, inputs = flat(problem.target), iv.CIFAR10.encode(x)
    assert apart(flat(problem.update(inputs, problem.labels)), target) < 1e-5
    plain = flat(iv.FedSGD()(net, inputs, problem.labels, loss=log_odds))  # the label counts in full
    assert apart(plain, target) > 0.1 * abs(problem.alpha - 1)


@pytest.mark.parametrize("engine", ["eager", "batched"])
@pytest.mark.parametrize("sharpness", [None, 4.0])
def test_engines_agree_with_the_slow_way(engine, sharpness):
    net = sure(12.0, torch.float64)
    _, seen = seen_of(net)
    attack = iv.GradientMatching(restarts=3)
    problem = attack.problem(net, seen)
    assert problem.alpha is not None
    values = attack.starts(problem, seen, torch.Generator().manual_seed(0))[0]
    with in_mode(net, training=False):
        cost, _, [slopes] = selection.build(engine, problem)([values], [0, 1, 2], sharpness, 1.0)
    for k, value in enumerate(values):
        place = value.clone().requires_grad_()
        with iv.smoothing.rounded(sharpness):
            loss = log_odds(net(place), torch.tensor([LABEL]))
            update = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        expected = objectives.cosine(update, list(seen.update.values()))
        torch.testing.assert_close(cost[k], expected.detach())
        torch.testing.assert_close(slopes[k], torch.autograd.grad(expected, place)[0])


def test_one_batch_of_all_restarts_takes_log_odds(monkeypatch):
    net = sure(12.0)
    _, seen = seen_of(net)
    from invlib.autodiff import gradients

    monkeypatch.setattr(gradients, "_tape_loss", None)  # what mapping would need
    found = iv.GradientMatching(steps=2, restarts=2)(net, seen)
    assert found.engine == "batched"
    assert torch.isfinite(found.trial_scores).all()


def test_a_loss_that_is_not_saturated_is_left_alone_unless_asked():
    net = sure(0.0)
    _, seen = seen_of(net)
    assert iv.GradientMatching().problem(net, seen).alpha is None
    assert iv.GradientMatching(log_odds=True).problem(net, seen).alpha == pytest.approx(1, abs=1e-5)
    assert iv.GradientMatching(log_odds=False).problem(sure(12.0), seen).alpha is None


class Averaged(iv.FedSGD):
    """Sends the gradient, in units of its own."""

    def __call__(self, *args, **kwargs):
        return {name: -3 * part for name, part in super().__call__(*args, **kwargs).items()}

    def mean_gradient(self, update, num_images):
        return update / -3


@pytest.mark.parametrize("client", [iv.FedAvg(lr=0.5, local_steps=1), Averaged()])
def test_other_clients_that_send_one_gradient(client):
    x, seen = seen_of(sure(12.0, torch.float64), client)
    attack, net = iv.GradientMatching(), sure(12.0, torch.float64)
    assert attack.problem(net, seen).alpha is not None
    assert attack.score(net, seen, x, torch.tensor([LABEL])) < 1e-12


@pytest.mark.parametrize(
    ("settings", "client", "facts", "why"),
    [
        ({}, iv.FedAvg(lr=0.5, local_steps=3), {}, "does not send one gradient"),
        ({"objective": objectives.l2}, None, {}, "a factor changes the objective l2"),
        ({}, None, {"loss": F.multi_margin_loss}, "multi_margin_loss has other slopes than cross-entropy"),
        ({"labels": "optimize"}, None, {}, "the labels are no classes"),
    ],
    ids=["local steps", "objective", "loss", "soft labels"],
)
def test_where_log_odds_do_not_hold_they_are_not_taken(settings, client, facts, why):
    net = sure(12.0, torch.float64)
    _, seen = seen_of(net, client, **facts)
    assert iv.GradientMatching(**settings).problem(net, seen).alpha is None
    with pytest.raises(ConfigError, match=f"log_odds is True, and .*{why}"):
        iv.GradientMatching(log_odds=True, **settings).problem(net, seen)


def test_noise_on_an_update_is_not_taken_for_rounding():
    net = sure(12.0)
    _, seen = seen_of(net)
    generator = torch.Generator().manual_seed(0)
    noisy = {n: u + 1e-5 * torch.randn(u.shape, generator=generator) for n, u in seen.update.items()}
    assert iv.GradientMatching().problem(net, replace(seen, update=noisy)).alpha in (None, 1.0)


def test_single_precision_turns_the_gradient_of_cross_entropy_and_not_of_log_odds():
    x, _ = random_batch(seed=1)
    inputs, label = iv.CIFAR10.encode(x), torch.tensor([LABEL])
    exact = flat(iv.FedSGD()(sure(15.0, torch.float64), inputs.double(), label))
    one, other = (
        flat(iv.FedSGD()(sure(15.0), inputs, label, loss=loss)) for loss in (F.cross_entropy, log_odds)
    )
    assert apart(one, exact) > 1e-3
    assert apart(other, exact) < 1e-5


def test_the_chordal_distance_is_the_cosine_without_cancellation():
    net, (x, y) = build_tiny(), random_batch()
    one = list(iv.FedSGD()(net, x, y).values())
    other = [t + 1e-6 * torch.ones_like(t) for t in one]
    exact = objectives.cosine([t.double() for t in one], [t.double() for t in other])
    assert float(objectives.chordal(one, other)) == pytest.approx(float(exact), rel=1e-2)
    assert objectives.scale_free(objectives.chordal, one)
    assert not objectives.scale_free(objectives.l2, one)


def test_one_minus_the_probability_is_read_off_the_bias():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    x, y = random_batch()
    seen = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
    slopes = saturation.head_slopes(net, seen)
    p = net(iv.CIFAR10.encode(x)).softmax(-1)[0, y[0]]
    assert saturation.unsure(slopes) == pytest.approx(1 - p.item(), rel=1e-5)


def test_a_label_whose_slope_is_rounded_to_zero_is_still_inferred():
    net = sure(20.0)
    _, seen = seen_of(net, reveal_labels=False)
    assert saturation.head_slopes(net, seen)[LABEL] == 0
    found = infer(net, seen)
    assert (found.labels.tolist(), found.guess) == ([LABEL], False)
    with pytest.raises(RecoveryError, match="no entry of the bias gradient is negative"):
        infer(net, replace(seen, update=dict(seen.update) | {"3.bias": 1e8 * seen.update["3.bias"]}))


@pytest.mark.parametrize("attack", [iv.inverting_gradients(), iv.best()])
def test_an_update_of_zeros_is_not_searched_for(attack):
    net = sure(200.0)
    with pytest.warns(DoubtWarning, match="all zero"):
        _, seen = seen_of(net)
    with pytest.warns(DoubtWarning, match=r"all zero, as of a loss that is zero in torch\.float32"):
        found = attack(net, seen)
    assert found.evaluations < 60
    assert any("nothing is searched for" in doubt for doubt in found.warnings)


def test_an_update_below_the_normal_numbers_is_doubtful():
    net = sure(95.0)
    _, seen = seen_of(net)
    assert 0 < max(float(u.abs().max()) for u in seen.update.values()) < torch.finfo(torch.float32).tiny
    with pytest.warns(DoubtWarning, match="below the normal ones of torch.float32"):
        found = iv.GradientMatching(steps=1)(net, seen)
    assert found.warnings


def batch_of(net, count=3):
    x, _ = random_batch(count, dtype=next(net.parameters()).dtype)
    labels = torch.full((count,), LABEL)
    return x, labels, iv.observe(net, x, labels, iv.FedSGD(), normalization=iv.CIFAR10)


def test_a_batch_whose_labels_lost_their_slopes_is_left_alone():
    net = sure(20.0)
    _, _, seen = batch_of(net)
    assert iv.GradientMatching().problem(net, seen).alpha is None
    assert iv.GradientMatching(log_odds=True).problem(net, seen).alpha == 1


@pytest.mark.parametrize("margin", [12.0, 20.0])
def test_the_weights_of_a_batch_are_one_minus_each_probability(margin):
    net = sure(margin, torch.float64)
    x, labels, seen = batch_of(net)
    inputs = iv.CIFAR10.encode(x)
    problem = iv.GradientMatching().problem(net, seen)
    assert problem.alpha == 1
    found = problem.update(inputs, labels)
    assert apart(flat(found), flat(seen.update)) < 2e-7
    p = net(inputs).softmax(-1)[:, LABEL]
    each = [flat(iv.FedSGD()(net, inputs[k : k + 1], labels[:1], loss=log_odds)) for k in range(3)]
    rows = torch.stack(each)
    assert apart(flat(found), rows.T @ (1 - p).detach()) < 2e-7
    sent = flat(seen.update)
    weights = saturation._nonnegative(rows @ rows.T, rows @ sent)
    torch.testing.assert_close(weights / weights.sum(), ((1 - p) / (1 - p).sum()).detach(), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("client", "training"), [(iv.FedAvg(lr=0.5, local_steps=1), False), (None, True)])
def test_a_batch_of_other_clients_is_left_alone(client, training):
    net = sure(12.0)
    x, _ = random_batch(2)
    labels = torch.full((2,), LABEL)
    facts = {"normalization": iv.CIFAR10, "training_mode": training}
    seen = iv.observe(net, x, labels, client or iv.FedSGD(), **facts)
    assert iv.GradientMatching().problem(net, seen).alpha is None
    with pytest.raises(ConfigError, match="2 images are told apart in evaluation mode and FedSGD alone"):
        iv.GradientMatching(log_odds=True).problem(net, seen)


def test_an_image_that_does_not_fit_keeps_a_weight():
    gram, along = torch.eye(3), torch.tensor([1.0, -1.0, 0.5])
    assert saturation._nonnegative(gram, along).tolist() == pytest.approx([1, 0.01, 0.5])
    assert saturation._nonnegative(gram, -torch.ones(3)).tolist() == [1, 1, 1]
    stacks = saturation._nonnegative(gram.expand(2, 3, 3), torch.stack([along, 2 * along]))
    assert stacks[1].tolist() == pytest.approx([2, 0.02, 1])


@pytest.mark.parametrize("engine", ["eager", "batched"])
def test_the_slope_of_a_batch_is_that_of_its_best_weights(engine):
    net = sure(12.0, torch.float64)
    _, _, seen = batch_of(net)
    attack = iv.GradientMatching(restarts=2)
    problem = attack.problem(net, seen)
    values = attack.starts(problem, seen, torch.Generator().manual_seed(0))[0]
    measure = selection.build(engine, problem)
    cost, _, [slopes] = measure([values], [0, 1], None, 1.0)
    way = torch.randn(values.shape, generator=torch.Generator().manual_seed(1)).double()
    more, less = (measure([values + h * way], [0, 1], None, 1.0)[0] for h in (1e-5, -1e-5))
    torch.testing.assert_close((more - less) / 2e-5, (slopes * way).flatten(1).sum(1), rtol=1e-3, atol=1e-9)
    assert (cost > 0).all()
    assert (slopes.flatten(2).norm(dim=-1) > 0).all()


@pytest.mark.parametrize(
    ("slopes", "share"),
    [
        ([1e-8, -3e-8, 0.0], 1.0),  # the label's is not below zero
        ([1e-8, 0.0, 1e-8], 1.0),
        ([0.0, 0.0, 0.0], 1.0),
        ([1e-8, 1e-8, 0.0], 0.0),
        ([1e-7, 1e-7, -1.8e-7], 0.9),
        ([1e-5, 1e-5, -3e-5], 1.0),  # more is missing than rounding explains
    ],
)
def test_what_rounding_does_not_explain_leaves_the_label_in_full(slopes, share):
    assert saturation.label_share(torch.tensor(slopes).double(), 2) == pytest.approx(share)
