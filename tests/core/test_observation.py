"""What an observation accepts, and that every fault is named, all at once."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import invlib as iv
from invlib.core.network import in_mode, num_classes
from invlib.errors import ConfigError, ObservationError
from tests.conftest import build_tiny, random_batch


def changed(seen, **tensors):
    return replace(seen, update=dict(seen.update) | tensors)


def test_a_fitting_observation_has_no_faults(tiny, seen):
    assert seen.faults(tiny) == []
    seen.validate(tiny)


def test_all_faults_are_listed_at_once(tiny, seen):
    update = dict(seen.update)
    del update["0.bias"]
    update["extra"] = torch.zeros(2)
    update["3.weight"] = update["3.weight"][:, :-1]
    update["3.bias"] = update["3.bias"].index_fill(0, torch.tensor([1]), torch.nan)
    with pytest.raises(ObservationError) as caught:
        replace(seen, update=update, labels=torch.tensor([9])).validate(tiny)
    text = str(caught.value)
    for part in (
        "update lacks '0.bias'",
        "update has 'extra'",
        "update['3.weight'] has shape (5, 95); expected (5, 96)",
        "update['3.bias'] has 1 NaN or infinite numbers of 5",
        "labels [9] are out of range; expected 0 to 4",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_images": 0}, "num_images is 0; expected a whole number of at least 1"),
        ({"num_images": 3}, r"labels have shape \(1,\); expected \(3,\)"),
        ({"image_shape": (3, 9, 9)}, r"does not run on an image of shape \(3, 9, 9\)"),
        ({"image_shape": (1, 8, 8)}, r"normalization has 3 channels and image_shape is \(1, 8, 8\)"),
        ({"labels": torch.tensor([-1])}, r"labels \[-1\] are out of range"),
    ],
)
def test_each_wrong_fact_is_named(tiny, seen, change, message):
    with pytest.raises(ObservationError, match=message):
        replace(seen, **change).validate(tiny)


def test_infinite_numbers_are_refused(tiny, seen):
    with pytest.raises(ObservationError, match="NaN or infinite"):
        changed(seen, **{"3.bias": torch.full((5,), torch.inf)}).validate(tiny)


def test_training_mode_needs_no_statistics_and_statistics_that_moved_need_it():
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 5))
    x, y = random_batch(2)
    good = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10, training_mode=True)
    assert iv.GradientMatching().score(net, replace(good, buffers={}), x, y) < 1e-6
    with pytest.raises(ObservationError, match=r"'1.running_mean'.*expected training_mode=True"):
        replace(good, training_mode=False).validate(net)


def test_a_model_without_parameters_is_refused(seen):
    with pytest.raises(ObservationError, match="Flatten has 0 trainable parameters"):
        seen.validate(nn.Flatten())


def test_a_model_that_gives_no_logits_is_refused(seen):
    with pytest.raises(ObservationError, match=r"expected logits \(N, classes\)"):
        num_classes(nn.Conv2d(3, 2, 3), (3, 8, 8))


def test_the_mode_of_every_module_comes_back():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.BatchNorm1d(3, track_running_stats=False))
    net[1].eval()
    before = [m.training for m in net.modules()], net[0].track_running_stats, net[2].track_running_stats

    def fail_in_training_mode():
        with in_mode(net, training=True):
            assert not net[0].track_running_stats
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail_in_training_mode()
    assert before == (
        [m.training for m in net.modules()],
        net[0].track_running_stats,
        net[2].track_running_stats,
    )


@given(
    mean=st.lists(st.floats(0, 1), min_size=1, max_size=4),
    std=st.floats(0.05, 2),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_decode_undoes_encode(mean, std, shape):
    normalization = iv.Normalization(mean=tuple(mean), std=(std,) * len(mean))
    n, h, w = shape
    images = torch.rand(n, len(mean), h, w, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(normalization.decode(normalization.encode(images)), images)
    low, high = normalization.box(dtype=torch.float64)
    inputs = normalization.encode(images)
    assert (inputs >= low).all()
    assert (inputs <= high).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": (0.5,), "std": (1.0, 1.0)}, "mean has 1 channels and std has 2"),
        ({"mean": (0.5,), "std": (0.0,)}, r"std is \(0.0,\); expected a tuple, each a positive"),
        ({"mean": (), "std": ()}, "at least one"),
    ],
)
def test_bad_normalization_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        iv.Normalization(**arguments)


def test_normalization_of_other_channels_is_refused():
    with pytest.raises(ConfigError, match="normalization has 3 channels, the images have 4"):
        iv.CIFAR10.encode(torch.zeros(1, 4, 2, 2))


def test_an_observation_holds_no_image(seen):
    x, _ = random_batch()
    for value in vars(seen).values():
        tensors = value.values() if isinstance(value, dict) else [value]
        assert all(not isinstance(t, torch.Tensor) or t.shape != x.shape for t in tensors)


def test_float64_models_are_observed_in_float64():
    x, y = random_batch(dtype=torch.float64)
    seen = iv.observe(build_tiny(torch.float64), x, y, iv.FedSGD(), normalization=iv.CIFAR10)
    assert {t.dtype for t in seen.update.values()} == {torch.float64}
