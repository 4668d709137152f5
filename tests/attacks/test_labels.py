"""Label inference: exact for one image, counts for batches; gradients or updates, with or without bias."""

import contextlib
import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import invlib as iv
from invlib.attacks.base import loss_of, with_loss
from invlib.attacks.counts import whole_counts
from invlib.attacks.labels import contradiction, infer
from invlib.attacks.losses import smoothing_of
from invlib.core.network import classifier
from invlib.errors import ConfigError, RecoveryError
from tests.conftest import build_tiny, random_batch

PROTOCOLS = [iv.FedSGD(), iv.FedAvg(lr=0.05, local_steps=4), iv.FedAvg(lr=0.05, epochs=2)]


def without_bias():
    net = build_tiny()
    net[3] = nn.Linear(96, 5, bias=False)
    return net


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=str)
@pytest.mark.parametrize("build", [build_tiny, without_bias])
@pytest.mark.parametrize("label", range(5))
def test_the_label_of_one_image_is_exact(protocol, build, label):
    x, _ = random_batch(seed=label)
    y = torch.tensor([label])
    net = build()
    found = infer(net, iv.observe(net, x, y, protocol, normalization=iv.CIFAR10, reveal_labels=False))
    assert found.labels.tolist() == [label]
    assert found.counts.tolist() == [int(c == label) for c in range(5)]


@pytest.mark.parametrize("protocol", [*PROTOCOLS, iv.FedAvg(lr=0.05, epochs=2, batch_size=2)], ids=str)
@pytest.mark.parametrize("build", [build_tiny, without_bias])
@pytest.mark.parametrize("labels", [[0, 0, 3, 4], [2, 2, 2, 2], [0, 1, 2, 3]])
def test_the_label_counts_of_a_batch(protocol, build, labels):
    x, _ = random_batch(4)
    net = build()
    seen = iv.observe(net, x, torch.tensor(labels), protocol, normalization=iv.CIFAR10, reveal_labels=False)
    found = infer(net, seen)
    assert found.labels.tolist() == labels
    assert found.counts.sum() == 4


@pytest.mark.parametrize("labels", [[0, 0, 3, 4], [2, 2, 2, 2]])
def test_features_below_zero_turn_the_row_sums_round(labels):
    net = without_bias()
    net[1] = nn.LogSigmoid()  # gives negative numbers alone
    x, _ = random_batch(4)
    y = torch.tensor(labels)
    seen = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10, reveal_labels=False)
    assert infer(net, seen).labels.tolist() == labels


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=str)
@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.LogSigmoid, nn.Tanh], ids=["above", "below", "mixed"])
@pytest.mark.parametrize("label", range(5))
def test_the_label_of_one_image_is_exact_for_features_of_any_sign(protocol, activation, label):
    net = without_bias()
    net[1] = activation()
    for seed in range(4):
        x, _ = random_batch(seed=seed)
        y = torch.tensor([label])
        seen = iv.observe(net, x, y, protocol, normalization=iv.CIFAR10, reveal_labels=False)
        assert infer(net, seen).labels.tolist() == [label]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("label", range(5))
@pytest.mark.parametrize("rest", [0.3, 1e-5, 1e-12])
def test_a_confident_wrong_prediction_hides_no_label(sign, label, rest):
    net = without_bias()
    x, _ = random_batch()
    seen = iv.observe(net, x, torch.tensor([0]), iv.FedSGD(), normalization=iv.CIFAR10, reveal_labels=False)
    wrong = (label + 2) % 5
    factors = torch.full((5,), rest / 4)
    factors[wrong] = 1 - rest  # where rest is small, as long as the label's row, to rounding
    factors[label] -= 1
    features = sign * torch.rand(96, generator=torch.Generator().manual_seed(0))
    seen = replace(seen, update=dict(seen.update) | {"3.weight": 1e-20 * torch.outer(factors, features)})
    assert infer(net, seen).labels.tolist() == [label]


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.LogSigmoid], ids=["above", "below"])
@pytest.mark.parametrize("label", range(2))
def test_of_two_classes_random_images_tell_the_sign_of_the_features(activation, label):
    net = build_tiny(classes=2)
    net[1], net[3].bias = activation(), None
    x, _ = random_batch()
    y = torch.tensor([label])
    seen = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10, reveal_labels=False)
    found = infer(net, seen)
    assert found.labels.tolist() == [label]
    assert "features of random images" in found.method


def test_a_bias_that_was_not_sent_is_not_needed():
    net = build_tiny()
    net[3].bias.requires_grad_(False)
    x, y = random_batch()
    seen = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10, reveal_labels=False)
    found = infer(net, seen)
    assert found.labels.tolist() == y.tolist()
    assert found.method == "row of the weight gradient that is opposed to all others"


def test_soft_labels_take_the_plain_gradient(tiny, seen):
    attack = iv.GradientMatching(labels="optimize")
    assert [(v.name, v.signed) for v in attack.problem(tiny, seen).variables] == [
        ("images", True),
        ("labels", False),
    ]


def test_the_last_layer_is_found():
    assert classifier(build_tiny()) == ("3.weight", "3.bias")
    assert classifier(without_bias()) == ("3.weight", None)
    assert classifier(nn.Linear(3, 2)) == ("weight", "bias")


def test_a_network_without_a_fully_connected_layer_is_refused():
    with pytest.raises(RecoveryError, match="Conv2d has 0 fully connected layers"):
        classifier(nn.Conv2d(3, 3, 3))


def test_a_zero_gradient_is_refused(tiny, seen):
    zero = replace(seen, update=dict(seen.update) | {"3.bias": torch.zeros(5)})
    with pytest.raises(RecoveryError, match=r"'3\.bias' is all zero"):
        infer(tiny, zero)


def test_a_missing_layer_is_refused(tiny, seen):
    with pytest.raises(RecoveryError, match=r"lacks '3\.weight'"):
        infer(tiny, replace(seen, update={"0.weight": seen.update["0.weight"]}))


@pytest.mark.parametrize(
    ("expected", "present", "total", "counts"),
    [
        ([0.9, 1.6, 0.5], [0, 0, 0], 3, [1, 2, 0]),  # the first two are furthest short
        ([2.9, 2.02, 0.04, 0.04], [0, 0, 1, 1], 5, [2, 1, 1, 1]),  # the second pays for the last two
        ([0.02, 0.03, 0.04, 3.91], [1, 1, 1, 0], 4, [1, 1, 1, 1]),
    ],
)
def test_counts_by_hand(expected, present, total, counts):
    found = whole_counts(torch.tensor(expected), present=torch.tensor(present).bool(), total=total)
    assert found.tolist() == counts


@given(
    expected=st.lists(st.floats(-2, 6), min_size=1, max_size=8),
    total=st.integers(1, 20),
    data=st.data(),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_counts_are_whole_and_add_up(expected, total, data):
    size = len(expected)
    present = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    counts = whole_counts(torch.tensor(expected), present=torch.tensor(present), total=total)
    assert int(counts.sum()) == total
    assert (counts >= 0).all()
    if sum(present) <= total:
        assert all(c >= 1 for c, p in zip(counts.tolist(), present, strict=True) if p)


# What follows is about other losses, other clients, and what labels cannot be read off.

CLASS_WEIGHTS = torch.linspace(0.5, 3, 10)
LOSSES = {
    "half": lambda o, t: 0.5 * F.cross_entropy(o, t),
    "sum": lambda o, t: F.cross_entropy(o, t, reduction="sum"),
    "weighted": nn.CrossEntropyLoss(weight=CLASS_WEIGHTS),
    "weighted sum": lambda o, t: F.cross_entropy(o, t, weight=CLASS_WEIGHTS, reduction="sum"),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "log_softmax and nll": lambda o, t: F.nll_loss(o.log_softmax(1), t),
    "hinge": F.multi_margin_loss,
    "one against all": lambda o, t: F.binary_cross_entropy_with_logits(o, F.one_hot(t, 10).to(o)),
}
EIGHT = [1, 3, 3, 3, 3, 7, 7, 9]


def photo_net(*tail, bias=True):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(1800, 10, bias=bias), *tail
        )


def of_photos(net, loss=F.cross_entropy, protocol=None, labels=EIGHT, *, factor=1.0, told=True):
    """What a client sends of eight photographs with these labels, in an order of its own."""
    x, _ = iv.data.samples("photos32")
    x = torch.cat([x, x.flip(-1)])[: len(labels)]
    facts = {"normalization": iv.CIFAR10, "reveal_labels": False, "loss": loss}
    seen = iv.observe(net, x, torch.tensor(labels).flip(0), protocol or iv.FedSGD(), **facts)
    scaled = {name: factor * value for name, value in seen.update.items()}
    return replace(seen, update=scaled, loss=loss if told else None)


@pytest.mark.parametrize("protocol", [iv.FedSGD(), iv.FedAvg(lr=0.002, local_steps=3)], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_counts_by_other_losses_that_are_told(loss, protocol):
    net = photo_net()
    seen = of_photos(net, LOSSES[loss], protocol)
    found = infer(net, seen)
    assert found.labels.tolist() == EIGHT
    assert found.guess
    assert 0 < found.doubt < 1
    assert found.factor == 1
    assert infer(net, replace(seen, loss=None), loss=LOSSES[loss]).labels.tolist() == EIGHT


@pytest.mark.parametrize("label", [0, 4, 9])
@pytest.mark.parametrize("loss", LOSSES)
def test_one_label_is_exact_by_other_losses(loss, label):
    net = photo_net()
    assert infer(net, of_photos(net, LOSSES[loss], labels=[label])).labels.tolist() == [label]


def test_log_softmax_at_the_end_of_the_model():
    net = photo_net(nn.LogSoftmax(1))
    found = infer(net, of_photos(net, F.nll_loss))
    assert found.labels.tolist() == EIGHT
    assert found.doubt < 0.3


def test_classes_of_no_weight():
    net = photo_net()
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1, 0, 2, 1, 0.5, 1, 3, 1, 0.2]))
    assert infer(net, of_photos(net, loss)).labels.tolist() == EIGHT


@pytest.mark.parametrize("loss", [F.cross_entropy, LOSSES["smoothed"], LOSSES["weighted"]])
def test_a_clipped_update_is_too_short_by_a_factor_that_is_said(loss):
    net = photo_net()
    found = infer(net, of_photos(net, loss, factor=0.01))
    assert found.labels.tolist() == EIGHT
    assert found.factor == pytest.approx(100, rel=0.25)
    assert "times" in str(found)


@pytest.mark.parametrize(("loss", "factor"), [("half", 2), ("sum", 1 / 8)])
def test_a_scaled_loss_that_nobody_told_is_a_factor(loss, factor):
    net = photo_net()
    found = infer(net, of_photos(net, LOSSES[loss], told=False))
    assert found.labels.tolist() == EIGHT
    assert found.factor == pytest.approx(factor, rel=0.05)


def test_a_factor_is_found_for_one_label_too():
    net = photo_net()
    assert infer(net, of_photos(net, labels=[4], factor=1e-6)).labels.tolist() == [4]


def trained(make):
    """Return a client's step as a function, that of a plain training loop with one of torch's optimisers."""

    def client(model, inputs, labels, *, params=None, buffers=None, loss=F.cross_entropy, on_step=None):
        start = dict(model.named_parameters()) if params is None else params
        now = {name: p.detach().clone().requires_grad_() for name, p in start.items()}
        optimizer = make(list(now.values()))
        for _ in range(5):
            optimizer.zero_grad()
            loss(torch.func.functional_call(model, (now, buffers or {}), (inputs,)), labels).backward()
            optimizer.step()
        return {name: now[name].detach() - start[name] for name in start}

    return client


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.005, momentum=0.9),
    "weight decay": lambda p: torch.optim.SGD(p, lr=0.005, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
}


@pytest.mark.parametrize("label", [0, 4, 9])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_label_of_a_client_that_trains_with_an_optimizer_of_torch(optimizer, bias, label):
    net = photo_net(bias=bias)
    seen = of_photos(net, protocol=trained(OPTIMIZERS[optimizer]), labels=[label])
    assert infer(net, seen).labels.tolist() == [label]


@pytest.mark.parametrize("optimizer", ["momentum", "weight decay"])
def test_counts_of_a_client_that_trains_with_momentum(optimizer):
    net = photo_net()
    found = infer(net, of_photos(net, protocol=trained(OPTIMIZERS[optimizer])))
    assert found.labels.tolist() == EIGHT


def test_adam_tells_which_classes_there_are_and_hardly_how_many():
    net = photo_net()
    found = infer(net, of_photos(net, protocol=trained(OPTIMIZERS["adam"])))
    assert set(found.labels.tolist()) == set(EIGHT)
    assert found.doubt > 0.3


def test_the_mean_of_two_clients():
    net = photo_net()
    step = iv.FedAvg(lr=0.01, local_steps=3)

    def two(model, inputs, labels, **settings):
        parts = [step(model, inputs[rows], labels[rows], **settings) for rows in (slice(0, 4), slice(4, 8))]
        return {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}

    assert infer(net, of_photos(net, protocol=two)).labels.tolist() == EIGHT


class HeadFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(32, 10)
        self.hidden = nn.Linear(3 * 64, 32)

    def forward(self, x):
        return self.head(torch.sigmoid(self.hidden(x.flatten(1))))


class Squeeze(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.classify = nn.Conv2d(3, 16, 3, stride=2), nn.Conv2d(16, 10, 1)
        self.gate = nn.Linear(16, 16)

    def forward(self, x):
        x = self.conv(x).relu()
        return self.classify(x * self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]).mean((2, 3))


@pytest.mark.parametrize("labels", [[3], [7], [0, 0, 3, 9]])
@pytest.mark.parametrize("build", [HeadFirst, Squeeze])
def test_the_layer_that_makes_the_logits_is_asked(build, labels):
    torch.manual_seed(0)
    net = build()
    x, _ = random_batch(len(labels))
    y = torch.tensor(labels)
    seen = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10, reveal_labels=False)
    found = infer(net, seen)
    assert found.labels.tolist() == labels
    assert len(found.counts) == 10


MANY_HOT = torch.tensor([[0.0, 1, 0, 1, 0, 0, 1, 0, 0, 1]])


def many_hot(net, loss, targets=MANY_HOT, *, told=True):
    x, _ = iv.data.samples("photos32", indices=list(range(len(targets))))
    made = loss(net(iv.CIFAR10.encode(x)), targets)
    return iv.from_gradients(
        net,
        torch.autograd.grad(made, list(net.parameters())),
        num_images=len(targets),
        image_shape=(3, 32, 32),
        normalization=iv.CIFAR10,
        loss=loss if told else None,
    )


@pytest.mark.parametrize(
    "loss", [F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss(pos_weight=torch.full((10,), 3.0))]
)
@pytest.mark.parametrize("bias", [True, False])
def test_signs_are_the_labels_of_an_image_that_has_several(loss, bias):
    net = photo_net(bias=bias)
    found = infer(net, many_hot(net, loss))
    assert torch.equal(found.labels, MANY_HOT)
    assert found.counts.tolist() == MANY_HOT[0].long().tolist()
    assert found.guess is not bias


def test_one_logit_of_two_classes():
    net = nn.Sequential(photo_net(), nn.ReLU(), nn.Linear(10, 1))

    def loss(o, t):
        return F.binary_cross_entropy_with_logits(o[:, 0], t.to(o))

    for label in (0, 1):
        found = infer(net, many_hot(net, loss, torch.tensor([label])))
        assert found.labels.tolist() == [label]


@pytest.mark.parametrize(
    ("loss", "targets", "told", "why"),
    [
        (F.binary_cross_entropy_with_logits, MANY_HOT, False, "one label leaves"),
        (
            F.binary_cross_entropy_with_logits,
            MANY_HOT.repeat(2, 1),
            True,
            "which has which of several labels",
        ),
        (F.binary_cross_entropy_with_logits, MANY_HOT.repeat(2, 1), False, "no 2 labels make"),
        (F.mse_loss, torch.linspace(-1, 2, 10)[None], True, "mse_loss takes no classes"),
        (F.mse_loss, torch.linspace(-1, 2, 10)[None], False, "unexplained"),
        (F.mse_loss, torch.linspace(0, 9, 20).view(2, 10), False, "no 2 labels make"),
    ],
)
def test_what_no_labels_explain_is_not_inferred(loss, targets, told, why):
    net = photo_net()
    with pytest.raises(RecoveryError, match=f"labels not inferred, because .*{why}.*labels="):
        infer(net, many_hot(net, loss, targets, told=told))


def test_one_logit_tells_no_class():
    net = nn.Sequential(nn.Flatten(), nn.Linear(14, 1))
    seen = iv.from_gradients(
        net, [torch.ones(1, 14), torch.ones(1)], num_images=1, image_shape=(1, 1, 14), normalization=iv.UNIT
    )
    with pytest.raises(RecoveryError, match="makes no classes of one logit"):
        infer(net, seen)
    assert infer(net, seen, loss=lambda o, _: o.square().mean()).doubt == 1  # no label is asked for


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(tiny, seen, bad):
    wrong = replace(seen, update=dict(seen.update) | {"3.bias": torch.full((5,), bad)})
    with pytest.raises(RecoveryError, match=r"labels not inferred, because .*NaN or infinite"):
        infer(tiny, wrong)


def test_a_client_that_sends_something_else_is_refused(tiny, seen):
    def noise(model, inputs, labels, **_):
        generator = torch.Generator().manual_seed(3)
        return {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}

    hidden = replace(seen, protocol=noise, labels=None, update=noise(tiny, None, None))
    with pytest.raises(RecoveryError, match=r"noise .*has nothing in common"):
        infer(tiny, hidden)


def test_a_part_of_the_bias_may_tell_the_label_of_one_image(tiny, seen):
    label = int(seen.labels[0])
    for kept, other in ((label, (label + 1) % 5), ((label + 1) % 5, label)):
        mask = torch.ones(5).bool()
        mask[other] = False
        part = {"3.bias": seen.update["3.bias"] * mask}
        weights = {"3.weight": torch.zeros(5, 96).bool(), "3.bias": mask}
        some = replace(seen, update=dict(seen.update) | part, sent=weights)
        if kept == label:
            assert infer(tiny, some).labels.tolist() == [label]
        else:
            with pytest.raises(RecoveryError, match="no entry of the bias gradient is negative"):
                infer(tiny, some)


def test_counts_of_very_many_images_are_made_at_once():
    counts = whole_counts(torch.full((10,), 0.3), present=torch.ones(10).bool(), total=10**12)
    assert counts.sum() == 10**12
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("protocol", [iv.FedSGD(), iv.FedAvg(lr=0.01, local_steps=2)], ids=str)
@pytest.mark.parametrize("labels", [[3], EIGHT])
def test_labels_that_contradict_the_update(labels, protocol):
    net = photo_net()
    seen = of_photos(net, protocol=protocol, labels=labels)
    true = torch.tensor(labels).flip(0)
    assert contradiction(net, replace(seen, labels=true)) is None
    wrong = contradiction(net, replace(seen, labels=(true + 1) % 10))
    assert "raises the logits of other classes" in wrong
    assert "turned round" not in wrong
    turned = replace(seen, labels=true, update={n: -v for n, v in seen.update.items()})
    assert "turned round" in contradiction(net, turned)


# The attacks.


def test_the_loss_that_counts(seen):
    bce = F.binary_cross_entropy_with_logits
    assert loss_of(F.cross_entropy, replace(seen, loss=None)) is F.cross_entropy
    assert loss_of(F.cross_entropy, replace(seen, loss=bce)) is bce
    assert loss_of(F.nll_loss, replace(seen, loss=bce)) is F.nll_loss
    assert with_loss(F.nll_loss, replace(seen, loss=bce)).notes == (
        "the attack's loss, nll_loss, counts, and not the observation's, binary_cross_entropy_with_logits",
    )
    assert with_loss(F.nll_loss, replace(seen, loss=None)).notes == ()


def test_an_attack_says_that_labels_were_guessed():
    net = photo_net()
    found = iv.inverting_gradients(steps=1)(net, of_photos(net, LOSSES["sum"]))
    assert sorted(found.labels.tolist()) == EIGHT
    [said] = [w for w in found.warnings if "guessed" in w]
    assert said.startswith("labels were guessed: counts from the bias gradient; doubt 0.")
    exact = iv.inverting_gradients(steps=1)(net, of_photos(net, labels=[4]))
    assert not [w for w in exact.warnings if "guessed" in w]


@pytest.mark.parametrize("restarts", [1, 2])
@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (F.binary_cross_entropy_with_logits, torch.tensor([[0.0, 1, 0, 1, 1], [1, 0, 0, 0, 1]])),
        (F.mse_loss, torch.linspace(-1, 1, 10).view(2, 5)),
        (F.cross_entropy, torch.tensor([[0.5, 0.5, 0, 0, 0], [0, 0, 0.2, 0, 0.8]])),
    ],
)
def test_targets_are_whatever_the_loss_takes(tiny, loss, targets, restarts):
    x, _ = random_batch(2)
    seen = iv.observe(tiny, x, targets, iv.FedSGD(), normalization=iv.CIFAR10, loss=loss)
    attack = iv.inverting_gradients(steps=2, restarts=restarts)
    assert attack.score(tiny, seen, x, targets) == pytest.approx(0, abs=1e-6)
    assert attack.score(tiny, seen, x, targets.flip(0)) > 1e-3
    for found in (attack(tiny, seen), *iv.attack_many(attack, tiny, [seen, seen])):
        assert torch.equal(found.labels, targets)
        assert torch.isfinite(found.trial_scores).all()


def test_labels_of_one_column(seen):
    net = build_tiny(classes=1)
    x, _ = random_batch(2)
    y = torch.tensor([[0.3], [-1.0]])
    seen = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10, loss=F.mse_loss)
    attack = iv.inverting_gradients(steps=2, restarts=2)
    assert attack.score(net, seen, x, y) == pytest.approx(0, abs=1e-6)
    assert torch.equal(attack(net, seen).labels, y)


def test_optimised_labels_are_probabilities_which_the_loss_has_to_take(tiny, seen):
    hidden = replace(seen, labels=None)
    log = nn.Sequential(tiny, nn.LogSoftmax(1))
    renamed = replace(hidden, update={f"0.{n}": v for n, v in hidden.update.items()}, loss=F.nll_loss)
    same, plain = (
        iv.deep_leakage(steps=2)(log, replace(renamed, loss=loss)) for loss in (F.nll_loss, F.cross_entropy)
    )
    assert same.score == pytest.approx(plain.score, rel=1e-3)

    def nll_but_other(o, t):
        return F.nll_loss(o, t)

    with pytest.raises(ConfigError, match=r"probabilities .* nll_but_other does not take them"):
        iv.deep_leakage(steps=2, loss=nll_but_other)(tiny, hidden)
    one = build_tiny(classes=1)
    x, _ = random_batch(1)
    target = torch.ones(1, 1)
    told = iv.observe(one, x, target, iv.FedSGD(), normalization=iv.CIFAR10, loss=F.mse_loss)
    with pytest.raises(ConfigError, match="one logit"):
        iv.deep_leakage(steps=2)(one, replace(told, labels=None))


def test_forward_matching_knows_one_loss(tiny, seen):
    with pytest.raises(ConfigError, match="loss is nll_loss; expected cross_entropy"):
        iv.ForwardMatching(steps=1)(tiny, replace(seen, loss=F.nll_loss))


TARGETS = {
    "many-hot": (F.binary_cross_entropy_with_logits, torch.tensor([[0.0, 1, 0, 1, 1], [1, 0, 0, 0, 1]])),
    "numbers": (F.mse_loss, torch.linspace(-1, 1, 10).view(2, 5)),
    "soft": (F.cross_entropy, torch.tensor([[0.5, 0.5, 0, 0, 0], [0, 0, 0.2, 0, 0.8]])),
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", TARGETS)
def test_attacks_on_a_chain_with_targets_that_are_no_classes(kind, bias, count):
    loss, targets = TARGETS[kind][0], TARGETS[kind][1][:count]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 24, bias=bias), nn.ReLU(), nn.Linear(24, 5, bias=bias))
    x, _ = random_batch(count)
    seen = iv.observe(net, x, targets, iv.FedSGD(), normalization=iv.CIFAR10, loss=loss)
    found = iv.best(steps=20)(net, seen)
    assert torch.equal(found.labels, targets)
    assert count > 1 or found.score < 1e-6
    for attack in (iv.fully_connected(), iv.recursive_inversion(), iv.best(steps=20)):
        for observation in (seen, replace(seen, labels=None)):
            with contextlib.suppress(ConfigError, RecoveryError):  # refused by name
                labels = attack(net, observation).labels
                told = observation.labels is not None
                hard = kind == "soft" and not told and (count, bias) != (1, True)  # the nearest classes
                assert labels is None or labels.shape == (targets[:, 0] if hard else targets).shape


def test_labels_sought_as_probabilities_are_doubtful_where_the_loss_takes_other_targets(tiny):
    x, _ = random_batch(1)
    loss, targets = TARGETS["numbers"]
    seen = iv.observe(
        tiny, x, targets[:1], iv.FedSGD(), normalization=iv.CIFAR10, loss=loss, reveal_labels=False
    )
    [said] = [w for w in iv.deep_leakage(steps=1)(tiny, seen).warnings if "sought" in w]
    assert said.endswith("mse_loss takes others too")


def test_labels_of_a_batch_are_guessed_where_the_client_tells_of_noise():
    tiny = build_tiny()
    x, y = random_batch(4)
    seen = iv.observe(tiny, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
    noise = [iv.defenses.GaussianNoise(0.05 * float(seen.update["3.bias"].norm()))]
    noisy = replace(iv.defenses.defend(seen, noise), labels=None)
    found = infer(tiny, noisy)
    assert found.guess
    assert found.labels.sort().values.tolist() == y.sort().values.tolist()
    with pytest.raises(RecoveryError, match="no 4 labels make"):
        infer(tiny, replace(noisy, protocol=iv.FedSGD()))


@pytest.mark.parametrize("labels", [[3], [7, 0, 3], [4, 8]])
def test_smoothed_labels_of_a_network_that_is_sure_of_them_are_exact(labels):
    model, (x, _) = build_tiny(torch.float64, 10), random_batch(len(labels), dtype=torch.float64)
    y = torch.tensor(labels)
    with torch.no_grad():  # the label's entry of the bias gradient becomes positive
        list(model.parameters())[-1][y] += 5
    loss = functools.partial(F.cross_entropy, label_smoothing=0.2)
    seen = iv.observe(model, x, y, iv.FedSGD(), normalization=iv.UNIT, reveal_labels=False, loss=loss)
    found = iv.labels.infer(model, seen)
    assert found.labels.tolist() == sorted(labels)
    assert not found.guess
    assert "features" in found.method


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_the_smoothing_of_a_loss_is_read_off_its_slope(smoothing):
    loss = nn.CrossEntropyLoss(label_smoothing=smoothing)
    assert smoothing_of(loss, 7, torch.zeros(1)) == pytest.approx(smoothing, abs=1e-5)
    assert smoothing_of(nn.CrossEntropyLoss(reduction="sum"), 7, torch.zeros(1)) is None
    assert smoothing_of(nn.MultiMarginLoss(), 7, torch.zeros(1)) is None
    assert smoothing_of(nn.CrossEntropyLoss(weight=torch.arange(1.0, 8.0)), 7, torch.zeros(1)) is None


def sharp_client(times, some):
    """What a client sends of patches to whose labels a network gives logits so many times its own."""
    net = iv.models.build("LeNetZhu", weights="cifar10").eval()
    with torch.no_grad():
        net.fc.weight *= times
        net.fc.bias *= times
    x, _ = iv.data.samples("patches32", some)
    y = net(iv.CIFAR10.encode(x)).argmax(1)
    return net, y, iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10, reveal_labels=False)


def test_labels_are_fitted_to_the_last_layer_where_the_bias_suggests_another_scale():
    net, y, seen = sharp_client(4, range(3))
    found = infer(net, seen)
    assert found.labels.tolist() == sorted(y.tolist())
    assert not found.guess
    assert found.factor == 1


def test_a_factor_that_nothing_explains_makes_labels_doubtful():
    found = infer(*sharp_client(10, range(8, 12))[::2])
    assert found.factor != 1
    assert found.guess
    assert found.doubt >= 0.5
