"""Whole batches: known answers, refusals, and a certificate that decoys do not pass."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import invlib as iv
from invlib.attacks import analytic
from invlib.attacks.certificate import certified, layer_of, signals_of
from invlib.attacks.directions import batch_inputs, directions, null_vectors, separated, span_of
from invlib.errors import ConfigError, DoubtWarning, RecoveryError
from invlib.metrics import psnr


def network(units=120, classes=10, *, after=nn.ReLU, bias=True, dropout=False, dtype=torch.float64, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = nn.Linear(3072, units, bias=bias)
        drop = [nn.Dropout(0.3)] if dropout else []
        net = nn.Sequential(nn.Flatten(), first, after(), *drop, nn.Linear(units, classes))
    return net.to(dtype)


def photos(count, classes=10, dtype=torch.float64):
    x, y = iv.data.samples("patches32", indices=range(count))
    return x.to(dtype), y % classes


def seen_by(net, x, y, protocol=None, *, hidden=True, **more):
    step = protocol or iv.FedSGD()
    return iv.observe(net, x, y, step, normalization=iv.CIFAR10, reveal_labels=not hidden, **more)


def nearest(found, truth):
    """Return the greatest distance of a found row from the nearest true one, and which those are."""
    gaps, rows = torch.cdist(found.flatten(1).double(), truth.flatten(1).double()).min(1)
    return float(gaps.max()), rows


def holds_all(rec, x, y, *, within=1e-6):
    assert rec.certified.tolist() == [True] * len(x)
    gap, rows = nearest(rec.images, x)
    assert gap < within
    assert rows.sort().values.tolist() == list(range(len(x)))
    assert torch.equal(rec.labels, y[rows])
    return rows


def planted(count, units, width, *, zeros=0.6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    d = torch.randn(units, count, generator=generator, dtype=torch.float64)
    d[torch.rand(units, count, generator=generator) < zeros] = 0
    return d, torch.randn(count, width, generator=generator, dtype=torch.float64)


# --- known answers ---


def test_one_image_is_the_quotient_of_the_gradients():
    net, (x, y) = network(), photos(1)
    seen = seen_by(net, x, y)
    rec = iv.exact_batch()(net, seen)
    given = analytic.layer_input(seen.update["1.weight"], seen.update["1.bias"])
    assert nearest(rec.images, iv.CIFAR10.decode(given.inputs.view(1, 3, 32, 32)))[0] < 1e-9
    holds_all(rec, x, y)


def test_a_planted_product_comes_apart_up_to_order_and_scale():
    d, x = planted(8, 120, 60)
    parts = batch_inputs(d @ x, None)
    assert (parts.rank, parts.found) == (8, 8)
    alike = (F.normalize(parts.inputs) @ F.normalize(x).T).abs()
    assert float((alike.max(1).values - 1).abs().max()) < 1e-9
    assert alike.argmax(1).sort().values.tolist() == list(range(8))
    assert float((parts.signals @ parts.inputs - d @ x).abs().max()) < 1e-9
    zeros = (d[:, alike.argmax(1)] == 0).double().mean(0)
    assert torch.allclose(parts.silent, zeros, atol=1e-9)


def test_a_bias_gradient_gives_the_scales():
    d, x = planted(8, 120, 60)
    gap, rows = nearest(batch_inputs(d @ x, d.sum(1)).inputs, x)
    assert gap < 1e-9
    assert rows.sort().values.tolist() == list(range(8))


def test_null_vectors_of_drawn_rows_are_columns_and_take_their_turn(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    planted = torch.randn(120, 6, generator=generator, dtype=torch.float64)
    planted = planted * (torch.rand(120, 6, generator=generator) < 0.5)
    span = span_of(planted @ torch.randn(6, 40, generator=generator, dtype=torch.float64))
    columns = torch.nn.functional.normalize(planted, dim=0)
    drawn = null_vectors(span.columns, generator)
    best = (drawn @ span.columns.T @ columns).abs().amax(0)
    torch.testing.assert_close(best, torch.ones(6, dtype=torch.float64))
    # Where the other source brings nothing, they find all.
    monkeypatch.setattr("invlib.attacks.directions.sphere", lambda u, starts: starts[:1])
    monkeypatch.setattr("invlib.attacks.directions.flattest", lambda u, along, *rest: along[:1])
    rounds = directions(span, None, generator, until=float("inf"))
    basis = next(found for found, _ in itertools.islice(rounds, 30) if len(found) == 6)
    assert float((basis @ span.columns.T @ columns).abs().amax(0).min()) > 1 - 1e-9


def test_directions_that_are_not_independent_raise_nothing():
    d, x = planted(3, 40, 20)
    separated(span_of(d @ x), torch.ones(3, 3, dtype=torch.float64), d.sum(1))


@pytest.mark.parametrize(("count", "units"), [(4, 100), (12, 200)])
def test_every_image_and_its_hidden_label_is_found_and_certified(count, units):
    net, (x, y) = network(units), photos(count)
    rec = iv.exact_batch()(net, seen_by(net, x, y))
    holds_all(rec, x, y)
    assert float(rec.residuals.max()) < 1e-6
    assert rec.score < 1e-6
    assert f"rank {count} " in rec.note


def test_order_and_scale_of_the_update_change_nothing():
    net, (x, y) = network(), photos(6)
    seen, order = seen_by(net, x, y), torch.tensor([3, 0, 5, 1, 4, 2])
    scaled = replace(seen, update={n: 7 * u for n, u in seen.update.items()})
    first = iv.exact_batch()(net, seen)
    for other in (seen_by(net, x[order], y[order]), scaled):
        again = iv.exact_batch()(net, other)
        assert again.certified.all()
        gap, rows = nearest(again.images, first.images)
        assert gap < 1e-6
        assert torch.equal(again.labels, first.labels[rows])


def test_one_image_twice_counts_twice():
    net, (x, y) = network(), photos(5)
    rows = torch.tensor([0, 1, 2, 3, 4, 2])
    rec = iv.exact_batch()(net, seen_by(net, x[rows], y[rows]))
    at = holds_all(rec, x, y).tolist().index(2)
    assert f"image {at} counts 2 times" in rec.note


@pytest.mark.parametrize("classes", [2, 3])
def test_labels_of_few_classes_are_right(classes):
    net, (x, y) = network(classes=classes), photos(6, classes)
    holds_all(iv.exact_batch()(net, seen_by(net, x, y)), x, y)


def test_without_a_bias_the_network_gives_the_scales():
    net, (x, y) = network(bias=False), photos(5)
    holds_all(iv.exact_batch()(net, seen_by(net, x, y)), x, y, within=1e-4)
    two, (x, y) = network(classes=2, bias=False), photos(5, 2)
    with pytest.raises(RecoveryError, match="no bias and there are two classes"):
        iv.exact_batch()(two, seen_by(two, x, y))


class Functional(nn.Module):
    """The network with parameters of its own instead of modules."""

    def __init__(self) -> None:
        super().__init__()
        own = network()
        self.w, self.b = nn.Parameter(own[1].weight.detach()), nn.Parameter(own[1].bias.detach())
        self.last = own[3]

    def forward(self, x):
        return self.last(F.linear(x.flatten(1), self.w, self.b).clamp_min(0))


def test_a_layer_without_a_module_is_read_too():
    net, (x, y) = Functional(), photos(5)
    holds_all(iv.exact_batch()(net, seen_by(net, x, y)), x, y)


def test_an_update_in_single_precision_is_certified():
    net, (x, y) = network(dtype=torch.float32), photos(8, dtype=torch.float32)
    rec = iv.exact_batch()(net, seen_by(net, x, y))
    holds_all(rec, x, y, within=1e-2)
    assert float(psnr(rec.images, x[nearest(rec.images, x)[1]]).min()) > 90
    assert rec.images.dtype == torch.float32


def test_labels_that_were_told_are_given_to_their_images():
    net, (x, y) = network(), photos(6)
    rec = iv.exact_batch()(net, seen_by(net, x, y, hidden=False))
    holds_all(rec, x, y)


def test_dropout_leaves_images_exact_and_proves_nothing():
    net, (x, y) = network(200, dropout=True), photos(4)
    seen = seen_by(net, x, y, training_mode=True)
    with pytest.warns(DoubtWarning, match="random"):
        rec = iv.exact_batch()(net, seen)
    assert nearest(rec.images, x)[0] < 1e-6
    assert not rec.certified.any()


def test_local_steps_on_one_batch_are_taken_apart():
    net, (x, y) = network(200), photos(4)
    seen = seen_by(net, x, y, iv.FedAvg(lr=0.01, local_steps=3))
    rec = iv.exact_batch()(net, seen)
    gap, rows = nearest(rec.images, x)
    assert gap < 1e-6
    assert rows.sort().values.tolist() == [0, 1, 2, 3]
    assert torch.equal(rec.labels, y[rows])
    assert rec.certified.all()


def stepping(model, inputs, labels, *, params=None, buffers=None, loss=F.cross_entropy, on_step=None):
    """A weight difference, of a client that does not say how long its step is."""
    update = iv.FedSGD()(model, inputs, labels, params=params, buffers=buffers, loss=loss, on_step=on_step)
    return {name: -0.3 * slope for name, slope in update.items()}


def test_a_step_of_unknown_length_is_certified():
    net, (x, y) = network(classes=2), photos(5, 2)
    holds_all(iv.exact_batch()(net, seen_by(net, x, y, stepping)), x, y)


def decaying(model, inputs, labels, *, params=None, buffers=None, loss=F.cross_entropy, on_step=None):
    """A weight difference of a client with weight decay."""
    update = iv.FedSGD()(model, inputs, labels, params=params, buffers=buffers, loss=loss, on_step=on_step)
    own = dict(model.named_parameters()) if params is None else params
    return {name: -0.3 * (slope + 0.05 * own[name].detach()) for name, slope in update.items()}


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weight_decay_is_taken_out(dtype, classes):
    net, (x, y) = network(200, classes, dtype=dtype), photos(6, classes, dtype)
    rec = iv.exact_batch(seconds=10)(net, seen_by(net, x, y, decaying))
    holds_all(rec, x, y, within=1e-6 if dtype == torch.float64 else 1e-3)
    assert "0.05 times the layer's weight, by weight decay, is taken out" in rec.note
    assert "weight decay" not in iv.exact_batch()(net, seen_by(net, x, y)).note


def test_weight_decay_is_taken_out_of_a_gradient_alone():
    (d, x), (w, _) = planted(8, 120, 60), planted(60, 120, 1, zeros=0, seed=1)
    parts = batch_inputs(d @ x + 0.3 * w, d.sum(1) + 0.3 * w[:, 0], weight=w, bias=w[:, 0])
    assert parts.decay == pytest.approx(0.3, abs=1e-12)
    assert nearest(parts.inputs, x)[0] < 1e-9
    assert batch_inputs(d @ x, None, weight=w).decay == 0
    with pytest.raises(RecoveryError, match="the weight has shape"):
        batch_inputs(d @ x, None, weight=w.T)


# --- what is refused, and what is not there ---


@pytest.mark.parametrize("after", [nn.GELU, nn.Sigmoid, nn.LeakyReLU])
def test_an_activation_without_zeros_is_refused(after):
    net, (x, y) = network(after=after), photos(4)
    with pytest.raises(RecoveryError, match="GELU, sigmoid and leaky ReLU have none"):
        iv.exact_batch()(net, seen_by(net, x, y))


@pytest.mark.parametrize(("side", "units"), [(8, 6), (1, 40)])
def test_more_images_than_units_or_inputs_are_refused(side, units):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(3 * side**2, units), nn.ReLU(), nn.Linear(units, 10))
        nn.init.ones_(net[1].bias)  # so that no unit is silent for all images
    x, y = photos(6, dtype=torch.float32)
    seen = iv.observe(net, x[:, :, :side, :side], y, iv.FedSGD(), normalization=iv.CIFAR10)
    with pytest.raises(RecoveryError, match=f"6 images and only {min(3 * side**2, units)} "):
        iv.exact_batch()(net, seen)


def test_a_layer_of_another_kind_is_refused():
    net, (x, y) = network(), photos(2)
    with pytest.raises(RecoveryError, match="'2' is no fully connected layer"):
        iv.exact_batch(layer="2")(net, seen_by(net, x, y))


@pytest.mark.parametrize(
    "setting",
    [{"seconds": 0}, {"seconds": "1"}, {"layer": 3}, {"search": 3}, {"search": iv.GradientMatching}],
)
def test_a_setting_out_of_range_is_refused(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        iv.exact_batch(**setting)


def test_more_images_than_were_said_are_found_and_doubted():
    net, (x, y) = network(), photos(5)
    seen = replace(seen_by(net, x, y), num_images=4)
    with pytest.warns(DoubtWarning, match="rank 5"):
        rec = iv.exact_batch()(net, seen)
    assert nearest(rec.images, x)[0] < 1e-6
    assert len(rec.images) == 5


def test_an_image_that_left_nothing_is_missed_and_the_others_are_found():
    net, (x, y) = network(), photos(5)
    seen, without = seen_by(net, x, y), seen_by(net, x[:4], y[:4])
    scaled = {n: without.update[n] * 4 / 5 for n in seen.update}
    rec = iv.exact_batch()(net, replace(seen, update=scaled))
    holds_all(rec, x[:4], y[:4])
    assert "1 of the client's images leave no trace" in rec.note


# --- the certificate ---


def ready(dtype, count=8, units=150, classes=10):
    """Return the column space of a batch's gradient, the server's network, and the normalised images."""
    net, (x, y) = network(units, classes, dtype=dtype), photos(count, classes, dtype)
    seen = seen_by(net, x, y)
    layer = layer_of(net, seen, None)
    signals = signals_of(net, seen, layer, torch.arange(classes))
    return (
        span_of(layer.weight_gradient, expected=count),
        signals,
        iv.CIFAR10.encode(x).flatten(1).double(),
        y,
    )


def decoys(images, count, generator):
    """Draw mixtures of two images of a batch, from nearly one of them to the middle, and beyond."""
    first, second = (torch.randint(len(images), (count,), generator=generator) for _ in range(2))
    second = torch.where(first == second, (second + 1) % len(images), second)
    share = 10 ** (-2 * torch.rand(count, 1, generator=generator, dtype=torch.float64))
    share *= torch.where(torch.rand(count, 1, generator=generator) < 0.3, -0.5, 0.5)
    return images[first] + share * (images[second] - images[first])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("classes", [2, 10])
def test_true_pairs_are_certified_and_no_decoy_is(dtype, classes):
    span, signals, images, y = ready(dtype, classes=classes)
    share = 1 / 8 if classes == 2 else None
    found = certified(span, signals, images, share)
    assert found.certified.all()
    assert torch.equal(found.labels, y)
    assert torch.allclose(found.weights, torch.full_like(found.weights, 1 / 8), rtol=1e-4)
    if dtype == torch.float64:
        assert float(found.residuals.max()) < 1e-6
    generator = torch.Generator().manual_seed(0)
    others = iv.CIFAR10.encode(iv.data.samples("photos32")[0][:50].double()).flatten(1)
    mixed = decoys(images, 1500, generator)
    for wrong in (others, mixed, images.roll(1, 1), images.flip(1), 0 * images[:1]):
        found = certified(span, signals, wrong, share)
        assert not found.certified.any()
        assert classes == 2 or float(found.residuals.min()) > 1e-4


def test_what_is_less_exact_than_the_gradient_is_certified_and_not_clean():
    span, signals, images, _ = ready(torch.float64)
    near = images + 1e-7 * (images.roll(1, 0) - images)
    assert certified(span, signals, images).clean.all()
    found = certified(span, signals, near)
    assert found.certified.all()
    assert not found.clean.any()


@pytest.mark.filterwarnings("ignore::invlib.errors.DoubtWarning")
@pytest.mark.parametrize("copies", [1, 2])
def test_mixtures_of_images_for_which_the_same_units_fire_are_not_certified(copies):
    net = network(classes=3, seed=2)
    x, y = (part[4:].repeat_interleave(copies, 0) for part in photos(6, 3))
    with torch.no_grad():  # the signals of three classes fill the column space, whatever the input
        net[1].bias.copy_(torch.tensor([20.0, -20.0], dtype=torch.float64).repeat(60))
    rec = iv.exact_batch(seconds=1)(net, seen_by(net, x, y))
    assert "units active for them alone" in rec.note  # by their signals, that is
    assert nearest(rec.images, x)[0] > 1
    assert not rec.certified.any()


def test_a_clipped_update_is_certified_as_a_whole():
    net, (x, y) = network(), photos(6)
    seen = seen_by(net, x, y)
    clipped = replace(seen, update={n: 0.037 * u for n, u in seen.update.items()})
    holds_all(iv.exact_batch()(net, clipped), x, y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("classes", [2, 10])
def test_a_wrong_label_is_not_certified(dtype, classes):
    span, signals, images, y = ready(dtype, classes=classes)
    back = signals(images)
    wrong = torch.stack([back[torch.arange(8), (y + k) % classes] for k in range(1, classes)], 1)
    found = certified(span, lambda _: wrong, images)
    assert not found.certified.any()
    assert float(found.residuals.min()) > 1e-2


# --- features behind convolutions ---


def convolutional(dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        return nn.Sequential(
            conv, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 100), nn.ReLU(), nn.Linear(100, 10)
        ).to(dtype)


def small(count, dtype=torch.float64):
    x, y = photos(count, dtype=dtype)
    return F.avg_pool2d(x, 2), y


def test_features_behind_convolutions_are_exact():
    net, (x, y) = convolutional(), small(8)
    rec = iv.exact_batch(search=None)(net, seen_by(net, x, y))
    gap, rows = nearest(rec.features, net[:3](iv.CIFAR10.encode(x)).detach())
    assert gap < 1e-6
    assert rows.sort().values.tolist() == list(range(8))
    assert torch.equal(rec.labels, y[rows])
    assert float(rec.residuals.max()) < 1e-6
    assert not rec.certified.any()
    assert rec.images.shape == (0, 3, 16, 16)
    assert "8 inputs (features) found, 8 certified" in rec.note


def test_an_image_is_searched_for_each_of_the_features_and_not_certified():
    net, (x, y) = convolutional(torch.float32), small(2, torch.float32)
    rec = iv.exact_batch()(net, seen_by(net, x, y))
    _, rows = nearest(rec.features, net[:3](iv.CIFAR10.encode(x)).detach())
    assert rec.images.shape == x.shape
    assert (psnr(rec.images, x[rows]) > psnr(torch.full_like(x, 0.5), x[rows]) + 3).all()
    assert not rec.certified.any()
    assert "proved by nothing" in rec.note
    assert rec.evaluations > 0


def test_any_attack_searches_the_image_of_features():
    net, (x, y) = convolutional(torch.float32), small(2, torch.float32)
    heard = []

    def search(model, observation, **more):
        heard.append(observation)
        return iv.inverting_gradients(steps=1)(model, observation, **more)

    rec = iv.exact_batch(search=search)(net, seen_by(net, x, y))
    for one, label in zip(heard, rec.labels, strict=True):
        row = int((y == label).nonzero())
        alone = seen_by(net, x[row : row + 1], y[row : row + 1]).update
        for name, value in one.update.items():
            if name.startswith("3."):
                assert torch.allclose(value, alone[name], rtol=1e-3, atol=1e-6)
            else:
                assert not one.sent[name].any()


class Spelled(nn.Module):
    """A first layer without a bias as a product, and, if asked, control flow on data."""

    def __init__(self, *, flow):
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(3072, 60, generator=draws, dtype=torch.float64) / 60)
        self.layer = network(60)[1] if flow else None
        self.head = nn.Linear(60, 10, dtype=torch.float64)
        if flow:
            self.first.requires_grad_(False)

    def forward(self, images):
        flat = images.flatten(1)
        z = self.layer(flat).relu() if self.layer is not None else (flat @ self.first).relu()
        return self.head(z * 2 if self.layer is not None and z.sum().item() < 0 else z)


@pytest.mark.parametrize(("flow", "words"), [(False, "no torch.nn.Linear"), (True, "torch.func.vmap")])
def test_a_network_whose_signals_cannot_be_computed_is_refused(flow, words):
    net, (x, y) = Spelled(flow=flow), photos(2)
    with pytest.raises(RecoveryError, match=words):
        iv.exact_batch(seconds=5)(net, seen_by(net, x, y))
