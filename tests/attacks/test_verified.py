"""The strongest attack is never worse than a closed form that applies, and believes none that does not."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import invlib as iv
from invlib.attacks import analytic
from invlib.attacks.labels import infer
from invlib.attacks.verified import closest_closed_form, distance_of
from invlib.errors import RecoveryError
from tests.conftest import random_batch

ONE, SOME = iv.FedSGD(), iv.FedAvg(lr=0.1, local_steps=3)


def net(*layers):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*[layer() for layer in layers])


def dense(activation, *biases, width=24, classes=5):
    first, last = biases
    return net(
        nn.Flatten,
        partial(nn.Linear, 192, width, bias=first),
        activation,
        partial(nn.Linear, width, classes, bias=last),
    )


def convolutions(activation, *channels):
    layers, before = [], 3
    for k, out in enumerate(channels):
        layers += [partial(nn.Conv2d, before, out, 3, stride=2 if k == 0 else 1, padding=1), activation]
        before = out
    return net(*layers, nn.Flatten, partial(nn.Linear, before * 16, 5))


def zoo(name, **settings):
    return iv.models.build(name, num_classes=5, image_size=8, seed=0, **settings)


def see(model, protocol=ONE, n=1, hidden=False, seed=0):
    x, y = random_batch(n, seed=seed)
    return x, y, iv.observe(model, x, y, protocol, normalization=iv.CIFAR10, reveal_labels=not hidden)


def closed_forms(model, seen):
    """Return what each closed form gives that does not refuse."""
    given = []
    for attack in (iv.fully_connected(), iv.recursive_inversion()):
        try:
            given.append(attack(model, seen))
        except RecoveryError:
            continue
    return given


def apart(model, seen, images, labels):
    """Return one minus the cosine of the update of some images and the observed one, by hand."""
    sent = seen.protocol(model, seen.normalization.encode(images), labels)
    a, b = (torch.cat([u[name].flatten().double() for name in seen.update]) for u in (sent, seen.update))
    return float(1 - a @ b / a.norm() / b.norm())


LEAKY = partial(nn.LeakyReLU, 0.2)
ACTIVATIONS = {"ReLU": nn.ReLU, "GELU": nn.GELU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "leaky": LEAKY}
BIASES = {"both": (True, True), "last": (False, True), "none": (False, False)}
# network, client, whether the label is hidden, least PSNR
TABLE = {
    f"{name}, biases {which}, {client}": (partial(dense, activation, *biases), protocol, hidden, 90)
    for name, activation in ACTIVATIONS.items()
    for which, biases in BIASES.items()
    for client, protocol, hidden in (("FedSGD", ONE, False), ("FedAvg, label hidden", SOME, True))
} | {
    "zoo, MLP": (partial(zoo, "MLP"), ONE, True, 90),
    "zoo, MLP, FedAvg": (partial(zoo, "MLP"), SOME, True, 90),
    "zoo, TwoLP": (partial(zoo, "TwoLP"), ONE, False, 90),
    "zoo, TwoLP, FedAvg": (partial(zoo, "TwoLP"), SOME, True, 90),
    "zoo, LeNetZhu": (partial(zoo, "LeNetZhu"), ONE, True, 60),
    "zoo, LeNetZhu, FedAvg": (partial(zoo, "LeNetZhu"), SOME, True, 15),
    "one convolution, ReLU": (partial(convolutions, nn.ReLU, 24), ONE, True, 90),
    "two convolutions, ReLU": (partial(convolutions, nn.ReLU, 24, 24), ONE, True, 90),
    "two convolutions, ReLU, FedAvg": (partial(convolutions, nn.ReLU, 24, 24), SOME, True, 14),
    "two convolutions, leaky": (partial(convolutions, LEAKY, 24, 24), ONE, True, 90),
}


@pytest.mark.parametrize("name", TABLE)
def test_best_is_never_worse_than_a_closed_form_that_applies(name):
    make, protocol, hidden, least = TABLE[name]
    model = make()
    x, y, seen = see(model, protocol, hidden=hidden, seed=3)
    found = iv.best(evaluations=50)(model, seen)
    reached = float(iv.metrics.psnr(found.images, x))
    assert reached >= least
    assert torch.equal(found.labels, y)
    assert found.score == pytest.approx(apart(model, seen, found.images, found.labels), abs=1e-6)
    for form in closed_forms(model, seen):
        # From 90 dB on all that differs is rounding.
        assert reached >= min(90, float(iv.metrics.psnr(form.images, x)))
        assert found.score <= apart(model, seen, form.images, y) + 1e-6
    if least >= 60:
        assert found.status == "closed_form"
        assert found.note.startswith("closed form, ")


@pytest.mark.parametrize("protocol", [ONE, SOME], ids=["FedSGD", "FedAvg"])
@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_a_batch_comes_back_where_units_are_active_for_one_image_alone(protocol, hidden, order):
    model = dense(nn.ReLU, True, True, width=256)
    x, y = random_batch(3, seed=3)[0][order], torch.tensor([3, 0, 4])
    seen = iv.observe(model, x, y, protocol, normalization=iv.CIFAR10, reveal_labels=not hidden)
    found = iv.best(evaluations=50)(model, seen)
    assert found.status == "closed_form"
    report = iv.evaluate(found, x, y)
    assert min(report.psnr) > 90
    # Each image has its own label, in the order in which labels were given.
    assert torch.equal(found.labels[list(report.order)], y)
    if not hidden:
        assert torch.equal(found.labels, y)
    agreed = iv.fully_connected(agreement=True)(model, seen)
    assert "several rows agree on 3 of the 3 shown" in agreed.note
    assert min(iv.evaluate(agreed, x, y).psnr) > 90


def test_a_mixture_is_not_claimed():
    model = dense(nn.Sigmoid, True, True)
    x, _, seen = see(model, n=2, seed=3)
    found = iv.best(evaluations=50)(model, seen)
    assert found.status == "max_steps"
    mixed = iv.fully_connected()(model, seen)
    assert float(iv.metrics.psnr(mixed.images, x).mean()) < 30
    assert found.score < apart(model, seen, mixed.images, mixed.labels)


class Mirrored(nn.Sequential):
    """Turns its images round, but not the one without negative numbers on which it is first tried."""

    def forward(self, x):
        return super().forward(x.flip(-1) if float(x.detach().min()) < 0 else x)


def test_a_closed_form_that_only_seems_to_apply_is_not_believed():
    model = Mirrored(*dense(nn.ReLU, True, True))
    x, _, seen = see(model, seed=3)
    assert iv.fully_connected()(model, seen).note.startswith("exact")
    found = iv.best(evaluations=100)(model, seen)
    assert found.status != "closed_form"
    wrong = iv.fully_connected()(model, seen).images
    assert float(iv.metrics.psnr(found.images, x)) > float(iv.metrics.psnr(wrong, x)) + 5


def with_noise(seen, share):
    generator = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(value.shape, generator=generator) for name, value in seen.update.items()}
    return replace(seen, update={n: v + share * v.std() * noise[n] for n, v in seen.update.items()})


def test_noise_on_the_update_leaves_the_nearer_of_search_and_closed_form():
    model = dense(nn.ReLU, True, True)
    _, _, seen = see(model, seed=3)
    noisy = with_noise(seen, 0.2)
    form = iv.fully_connected()(model, noisy)
    for evaluations in (1, 200):
        found = iv.best(evaluations=evaluations)(model, noisy)
        assert found.score <= apart(model, noisy, form.images, form.labels) + 1e-6
    assert "closed form" in iv.best(evaluations=1)(model, noisy).note


@pytest.mark.parametrize("label", [0, 1])
def test_a_label_that_cannot_be_inferred_is_tried(label):
    model = dense(nn.Tanh, True, False, classes=2)
    x, _ = random_batch(1, seed=0)
    seen = iv.observe(model, x, torch.tensor([label]), ONE, normalization=iv.CIFAR10, reveal_labels=False)
    assert infer(model, seen).labels.tolist() != [label]
    found = iv.best(evaluations=1)(model, seen)
    assert found.labels.tolist() == [label]
    assert float(iv.metrics.psnr(found.images, x)) > 90


def test_a_last_layer_that_was_not_sent_hides_the_label_only_until_it_is_tried():
    model = dense(nn.ReLU, True, True)
    model[-1].requires_grad_(False)
    x, y, seen = see(model, hidden=True, seed=3)
    assert iv.fully_connected()(model, seen).labels is None
    found = iv.best(evaluations=1)(model, seen)
    assert torch.equal(found.labels, y)
    assert float(iv.metrics.psnr(found.images, x)) > 90


def test_a_clipped_update_points_the_same_way():
    model = dense(nn.ReLU, True, True)
    x, _, seen = see(model, seed=3)
    clipped = replace(seen, update={name: 1e-3 * value for name, value in seen.update.items()})
    found = iv.best(evaluations=1)(model, clipped)
    assert float(iv.metrics.psnr(found.images, x)) > 90


def test_where_equations_are_missing_the_most_natural_of_the_images_that_agree_is_sought():
    model = convolutions(nn.Sigmoid, 4)
    x, _, seen = see(model, seed=1)
    closed, _ = closest_closed_form(model, seen, nn.functional.cross_entropy)
    assert not closed.determined
    found = iv.best(evaluations=300)(model, seen)
    assert "matching" in found.note
    assert float(iv.metrics.psnr(found.images, x)) > float(iv.metrics.psnr(closed.result.images, x)) + 3
    assert found.evaluations > closed.result.evaluations + 200


def test_the_distance_sees_what_single_precision_hides():
    model = dense(nn.Sigmoid, True, True)
    x, y, seen = see(model, seed=3)
    distance = distance_of(model, seen, nn.functional.cross_entropy)
    near = [distance((x + step).clamp(0, 1), y) for step in (0, 1e-5, 1e-4, 1e-3)]
    assert near[0] < 1e-13
    assert near[1] < 1e-9
    for a, b in itertools.pairwise(near[1:]):
        assert b == pytest.approx(100 * a, rel=0.1)


def test_the_direction_of_an_image_is_that_of_the_first_layers_rows():
    model = dense(nn.GELU, False, True)
    x, _, seen = see(model, SOME, seed=3)
    truth = seen.normalization.encode(x).flatten()
    found = analytic.input_direction(model, seen)
    assert abs(float(found @ truth / truth.norm())) == pytest.approx(1, abs=1e-6)
    with pytest.raises(RecoveryError, match="no layer up to '1' has a bias, and it is not the last one"):
        iv.fully_connected()(model, seen)


def batch_of_two():
    """LeNetZhu and two images, of which a search by cosine stalls long before its budget ends."""
    model = iv.models.build("LeNetZhu", num_classes=5, image_size=8, seed=0)
    x, y = random_batch(2, side=8, seed=3)
    return model, x, y, iv.observe(model, x, y, ONE, normalization=iv.CIFAR10)


def test_what_a_stalled_search_leaves_of_its_budget_goes_to_the_squared_distance():
    model, x, y, seen = batch_of_two()
    frames = iv.Frames(every=1)
    found = iv.best(evaluations=250)(model, seen, callback=frames)
    assert found.note.startswith("gradient matching with smoothing, then by squared distance; ")
    assert found.status == "max_steps"
    assert 235 <= found.evaluations <= 280
    assert found.history.steps == sorted(found.history.steps)
    assert len(found.history.steps) == len(found.history.cost)
    assert frames.steps == sorted(set(frames.steps))
    assert frames.steps[-1] > 5  # steps of 50 evaluations
    # Stopped where the search ends, it is worse by both measures.
    stopped = iv.best(evaluations=250)(model, seen, callback=lambda progress: progress.step > 5)
    assert stopped.status == "interrupted"
    assert found.score < stopped.score / 4
    assert iv.evaluate(found, x, y).mean_psnr > iv.evaluate(stopped, x, y).mean_psnr + 1
    assert found.score == pytest.approx(apart(model, seen, found.images, found.labels), abs=1e-6)


def test_where_nothing_is_left_to_gain_the_status_says_so():
    model = dense(nn.ReLU, True, True)
    x, _, seen = see(model, seed=3)
    noisy = with_noise(seen, 0.02)
    closed, _ = closest_closed_form(model, noisy, nn.functional.cross_entropy)
    found = iv.best(evaluations=400)(model, noisy)
    assert found.status == "converged"
    assert found.note.endswith("polished by L-BFGS")
    assert found.engine
    assert found.evaluations < 400
    assert found.score < closed.result.score
    assert float(iv.metrics.psnr(found.images, x)) > 50
