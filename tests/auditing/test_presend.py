"""The client's check: what leaks is read off and named; what a cheating server builds raises an alarm."""

import copy
import math

import pytest
import torch
from torch import nn

import invlib as iv
from invlib.auditing import presend
from invlib.errors import ConfigError, ObservationError
from tests.auditing.constructions import (
    CLASSES,
    SHAPE,
    SIZE,
    bins_of,
    expected_alone,
    fishing,
    imprint,
    ordinary,
    pictures,
    staircase,
    traps,
)

UNIT = iv.UNIT


def check(net, x, y, **settings):
    return presend(net, x, y, **{"normalization": UNIT, "seconds": 0.1} | settings)


def ways(found, leak):
    return [way for way in found.ways if way.leak == leak]


@pytest.mark.parametrize(
    ("count", "bins", "known"),
    [(64, 1000, 60.09), (32, 1000, 31.02), (64, 128, 39.05), (64, 64, 23.7), (256, 1000, 198.3)],
)
def test_expected_number_alone_in_equally_likely_bins(count, bins, known):
    assert expected_alone(count, bins) == pytest.approx(known, abs=0.06)
    drawn = [bins_of(pictures(count, seed)[0], bins).bincount(minlength=bins) for seed in range(20)]
    alone = sum(int((c == 1).sum()) for c in drawn) / 20
    assert alone == pytest.approx(known, abs=4 * math.sqrt(count / 20))


@pytest.mark.parametrize(("count", "bins"), [(64, 1000), (32, 1000), (64, 128), (64, 64)])
def test_imprint_gives_the_pictures_that_are_alone_in_their_bin(count, bins):
    x, y = pictures(count)
    where = bins_of(x, bins)
    found = check(imprint(bins), x, y, readable=60)  # dominated mixtures apart
    assert found.leaks.tolist() == (where.bincount(minlength=bins)[where] == 1).tolist()
    assert found.action == "refuse"
    assert found.numbers["parallel_rows"] == bins
    assert [way.name for way in ways(found, "network")] == ["parallel rows"]


def test_traps_fire_for_one_picture_and_give_it():
    x, y = pictures(64)
    found = check(traps(512, 64), x, y)
    assert found.numbers["singletons"] / 512 == pytest.approx(1 / math.e, abs=0.08)
    assert found.leaks.float().mean() > 0.5
    assert found.action in ("drop", "refuse")
    assert found.numbers["parallel_rows"] == 0


def test_fishing_leaves_one_gradient_alone():
    x, y = pictures(8)
    y = torch.tensor([0, 1, 3, 4, 2, 1, 0, 3])
    honest, cheated = check(fishing(1.0), x, y), check(fishing(1000.0), x, y)
    assert not ways(honest, "network")
    assert honest.numbers["d_snr"] < 2 < 100 < cheated.numbers["d_snr"]
    assert [way.images for way in ways(cheated, "gradient")] == [(4,)]
    assert [way.name for way in ways(cheated, "network")] == ["scaled class"]
    assert (cheated.action, cheated.drop) == ("refuse", (4,))
    assert cheated.partly[4]


def test_pictures_that_come_out_once_others_are_subtracted():
    x, y = pictures(4)
    found = check(staircase(x), x, y, readable=60)
    assert found.leaks.all()
    assert found.numbers["singletons"] == 1
    [way] = ways(found, "image")
    assert (way.numbers["peeled"], way.images, found.action) == (3, (0, 1, 2, 3), "refuse")


def test_an_ordinary_network_leaks_what_its_zeros_single_out():
    x, y = pictures(10)
    net, scaled = ordinary(), iv.Normalization(mean=(0.5,) * 3, std=(0.1,) * 3)
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    found = check(net, x, y, normalization=scaled, seconds=10)
    assert found.leaks.all()
    assert not ways(found, "network")
    assert "zeros of a layer" in str(found)
    smooth = check(ordinary(activation=nn.Sigmoid), x, y)
    assert not smooth.leaks.any()
    assert (smooth.action, smooth.drop) == ("send", ())
    assert str(smooth).startswith("send: no image was read off (no proof of safety")
    over = nn.Sequential(*net[:2], nn.ReLU(inplace=True), net[3])
    assert check(over, x, y, normalization=scaled, seconds=10).numbers == found.numbers
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_one_picture_behind_linear_layers_and_behind_convolutions():
    x, y = pictures(1)
    for bias in (True, False):
        net = nn.Sequential(nn.Flatten(), nn.Linear(SIZE, 8, bias=bias), nn.ReLU(), nn.Linear(8, CLASSES))
        found = check(net, x, y)
        assert (found.leaks.tolist(), found.action) == ([True], "refuse"), bias
        assert found.psnr > 80
    behind = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, CLASSES))
    found = check(behind, x, y)
    assert (found.leaks.tolist(), found.partly.tolist()) == ([False], [True])
    assert {way.leak for way in found.ways} == {"features", "gradient"}
    assert found.action == "refuse"
    noise = iv.Defended(iv.FedSGD(), [iv.defenses.GaussianNoise(0.1)])
    assert (check(behind, x, y, client=noise).ways, found.numbers["gradient_db"] > 60) == ((), True)


def test_it_measures_what_leaves_and_not_the_trick():
    x, y = pictures(16)
    net, noise = imprint(64), iv.defenses.GaussianNoise(0.01)
    open_, hidden = check(net, x, y), check(net, x, y, client=iv.Defended(iv.FedSGD(), [noise]))
    assert open_.leaks.any()
    assert not hidden.leaks.any()
    assert hidden.action == "refuse"  # of the network, whose next update may come without noise


def test_several_steps_an_update_that_was_recorded_and_adam():
    x, y = pictures(16)
    net = imprint(64)
    steps = iv.FedAvg(lr=0.01, local_steps=2, batch_size=16)
    found = check(net, x, y, client=steps)
    assert found.leaks.sum() >= 8
    seen = iv.observe(net, x, y, steps, normalization=UNIT, reveal_labels=False)
    assert torch.equal(presend(net, x, y, update=seen, seconds=0.1).leaks, found.leaks)
    adam = check(net, x, y, client=iv.FedAvg(lr=0.01, local_steps=1, optimizer="adam"))
    assert not adam.leaks.any()
    assert any("no sum of gradients" in note for note in adam.notes)


def test_training_mode_says_that_pictures_are_coupled():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, CLASSES))
    x, y = pictures(4)
    found = check(net, x, y, training_mode=True)
    assert found.notes[0].startswith("training mode")
    assert 0 < found.numbers["d_snr"] < 10


def test_a_secret_combination_of_rows_is_missed():
    """What a server reads that was trained to know the combination beforehand (SEER): documented."""
    x, y = pictures(8)
    net = ordinary(activation=nn.Sigmoid)
    found = check(net, x, y)
    assert found.action == "send"
    assert found.numbers["d_snr"] < 1
    each = [iv.observe(net, x[k : k + 1], y[k : k + 1], iv.FedSGD(), normalization=UNIT) for k in range(8)]
    signals = torch.stack([one.update["1.bias"] for one in each], 1).double()
    secret = torch.linalg.pinv(signals)[0]
    update = iv.observe(net, x, y, iv.FedSGD(), normalization=UNIT).update
    read = (secret @ update["1.weight"].double()) / (secret @ update["1.bias"].double())
    assert iv.metrics.psnr(read.view(1, *SHAPE).clamp(0, 1), x[:1]) > 60


@pytest.mark.parametrize(
    ("name", "weights", "sample", "scale"),
    [
        ("LeNetZhu", "fashion-mnist", "fashion", iv.FASHION_MNIST),
        ("ConvNet8", "fashion-mnist", "fashion", iv.FASHION_MNIST),
        ("ResNet20", "cifar10", "patches32", iv.CIFAR10),
        ("ViT", "cifar10", "patches32", iv.CIFAR10),
    ],
)
def test_networks_that_nobody_crafted_raise_no_alarm(name, weights, sample, scale):
    x, y = iv.data.samples(sample, indices=range(8))
    trained = iv.models.build(name, weights=weights)
    fresh = iv.models.build(name, in_channels=x.shape[1], seed=0)
    found = [check(net, x, y, normalization=scale) for net in (trained, fresh)]
    assert [(one.action, one.drop) for one in found] == [("send", ())] * 2
    assert (found[0].numbers["d_snr"] > 1) == (weights == "fashion-mnist")  # by itself no sign of a cheat


X, Y = pictures(2)


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        ((X[:0], Y[:0]), {}, ObservationError, "N at least 1"),
        ((X[0], Y), {}, ObservationError, r"expected floating point \(N, C, H, W\)"),
        ((X[..., :4], Y), {}, ObservationError, "does not run on an image"),
        ((X, None), {}, ObservationError, "labels are None"),
        ((X, Y[:1]), {}, ObservationError, "expected one for each"),
        ((X, Y + CLASSES), {}, ObservationError, "out of range"),
        ((X * 255, Y), {}, ObservationError, r"expected \[0, 1\]"),
        ((torch.ones(2, 3, dtype=torch.int64), Y), {}, ObservationError, "token sequences"),
        ((X, Y), {"normalization": None}, ConfigError, "normalization is None"),
        ((X, Y), {"readable": 0}, ConfigError, "readable is 0"),
        ((X, Y), {"seconds": True}, ConfigError, "seconds is True"),
        ((X, Y), {"update": {}}, ObservationError, "update is a dict; expected an invlib.Observation"),
    ],
)
def test_bad_input_is_named(arguments, settings, error, message):
    with pytest.raises(error, match=message):
        check(ordinary(), *arguments, **settings)


def test_an_update_of_other_pictures_does_not_fit():
    seen = iv.observe(ordinary(), *pictures(3), iv.FedSGD(), normalization=UNIT)
    with pytest.raises(ObservationError, match="expected \\(3,\\)"):
        presend(ordinary(), X, Y, update=seen)
