"""What buffers alone give away, and images brought to the statistics that they hold."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import invlib as iv
from invlib.attacks.buffers import with_statistics
from invlib.errors import RecoveryError
from tests.conftest import random_batch


def network(first=None):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = first or nn.Conv2d(3, 16, 3, padding=1, bias=False)
        net = nn.Sequential(first, nn.BatchNorm2d(16), nn.ReLU(), nn.AvgPool2d(8), nn.Flatten())
        return net.append(nn.LazyLinear(10)).eval()


def see(net, n):
    x, y = iv.data.samples("photos32", indices=list(range(n)))
    net(x)
    return x, iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10, training_mode=True)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_buffers_alone_give_the_mean_colour_and_the_contrast(n):
    net = network()
    x, seen = see(net, n)
    nothing = replace(seen, update={name: torch.zeros_like(u) for name, u in seen.update.items()})
    told = iv.buffers_alone(net, nothing)
    colour = x.mean((0, 2, 3))
    assert (told.colour - colour).abs().max() < 2e-3
    assert told.deviation.max() < 5e-3
    contrast = (x - colour[:, None, None]).square().mean().sqrt()
    assert 0.7 < told.contrast / contrast < 1.4
    assert told.layer == "1"
    middling = iv.metrics.psnr(torch.full_like(told.mean_image, 0.47), x.mean(0, keepdim=True))
    assert iv.metrics.psnr(told.mean_image, x.mean(0, keepdim=True)) > middling


def test_one_by_one_filters_give_the_colour_to_rounding():
    net = network(nn.Conv2d(3, 16, 1))
    x, seen = see(net, 3)
    told = iv.buffers_alone(net, seen)
    assert (told.colour - x.mean((0, 2, 3))).abs().max() < 1e-5
    assert told.deviation.max() < 1e-5


def test_filters_that_see_every_pixel_by_itself_give_the_mean_image():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 192), nn.BatchNorm1d(192), nn.Linear(192, 5)).eval()
    nn.init.eye_(net[1].weight)
    x, y = random_batch(2)
    seen = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10, training_mode=True)
    assert (iv.buffers_alone(net, seen).mean_image - x.mean(0, keepdim=True)).abs().max() < 1e-4


@pytest.mark.parametrize("n", [1, 4])
def test_a_planted_factor_and_offset_are_repaired(n):
    net = network()
    x, seen = see(net, n)
    colours = [torch.tensor(c).view(3, 1, 1) for c in ((0.3, 0.5, 0.4), (0.3, 0.1, 0.2))]
    pale = colours[0] * x + colours[1]
    assert (with_statistics(net, seen, pale) - x).abs().max() < 1e-5
    assert (with_statistics(net, seen, x) - x).abs().max() < 1e-5


def test_refusals():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.BatchNorm2d(16), nn.Flatten(), nn.LazyLinear(10))
    _, seen = see(net.eval(), 2)
    with pytest.raises(RecoveryError, match="'2', is behind something that is not linear"):
        iv.buffers_alone(net, seen)
    with pytest.raises(RecoveryError, match="sent no running statistics"):
        iv.buffers_alone(net, replace(seen, buffers={}))


def test_best_finds_the_brightness_that_training_mode_hides_where_buffers_are_sent():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.Sigmoid(), nn.Flatten()]
        net = nn.Sequential(*layers, nn.Linear(16 * 64, 5)).eval()
    x, y = random_batch(2)
    x = 0.5 * x + 0.45
    seen = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10, training_mode=True)
    told, untold = (
        iv.best(evaluations=100)(net, replace(seen, buffers=buffers)) for buffers in (seen.buffers, {})
    )
    assert "by the statistics that were sent" in told.note
    assert "statistics" not in untold.note
    error, before = ((r.images - x).abs().mean() for r in (told, untold))
    assert (told.images.mean((0, 2, 3)) - x.mean((0, 2, 3))).abs().max() < 5e-3
    assert error < 0.03
    assert before > 3 * error
