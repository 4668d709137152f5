"""Clip, noise and rate, off an optimiser that is no more than what is read of it."""

from types import SimpleNamespace

import pytest
import torch

from invlib.errors import ConfigError, DoubtWarning
from invlib.integrations.opacus import Privacy, privacy_of
from invlib.settings import Checked


def optimizer(**changes):
    said = {
        "max_grad_norm": 1.2,
        "noise_multiplier": 1.5,
        "expected_batch_size": 64,
        "loss_reduction": "mean",
    }
    return SimpleNamespace(**said | changes)


def test_the_numbers_are_those_of_the_optimizer():
    loader = SimpleNamespace(sample_rate=0.01)
    found = privacy_of(optimizer(), loader, steps=30)
    assert found == Privacy(
        clip_norm=1.2, noise_multiplier=1.5, batch_size=64, noise=1.5 * 1.2 / 64, rate=0.01, steps=30
    )
    assert isinstance(found, Checked)
    assert privacy_of(optimizer()).rate == 1
    assert privacy_of(optimizer(loss_reduction="sum", world_size=2)) == Privacy(
        clip_norm=1.2, noise_multiplier=1.5, batch_size=128, noise=1.5 * 1.2
    )


def test_a_sum_without_a_batch_size_takes_the_loaders():
    class Loader:
        dataset, sample_rate = range(100), 0.1

        def __len__(self):
            return 10

    found = privacy_of(optimizer(expected_batch_size=None, loss_reduction="sum"), Loader())
    assert (found.batch_size, found.rate) == (10, 0.1)
    with pytest.raises(ConfigError, match="expected_batch_size of the optimizer is None"):
        privacy_of(optimizer(expected_batch_size=None, loss_reduction="sum"))


def test_what_bounds_nothing_is_doubtful():
    with pytest.warns(DoubtWarning, match="nothing is bounded"):
        privacy_of(optimizer(noise_multiplier=0.0))
    with pytest.warns(DoubtWarning, match="has no sample_rate"):
        assert privacy_of(optimizer(), torch.utils.data.DataLoader([1, 2])).rate == 1
    adaptive = type("AdaClipDPOptimizer", (SimpleNamespace,), {})(**vars(optimizer()))
    with pytest.warns(DoubtWarning, match="AdaClipDPOptimizer changes its clip"):
        privacy_of(adaptive)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.optim.SGD([torch.zeros(1, requires_grad=True)]), "SGD without max_grad_norm"),
        (optimizer(max_grad_norm=-1.0), "clip_norm is -1"),
        (3, "int without max_grad_norm"),
    ],
)
def test_no_optimizer_of_opacus_is_named(wrong, message):
    with pytest.raises(ConfigError, match=message):
        privacy_of(wrong)
