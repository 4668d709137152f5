"""Toy networks of a server that cheats, which the client's check has to find; only tests import them."""

import torch
from torch import nn

SHAPE = (3, 8, 8)
SIZE = 3 * 8 * 8
CLASSES = 5


def pictures(count, seed=0):
    """Smooth pictures whose mean brightness is uniform in [0.3, 0.7], and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = nn.functional.interpolate(
        torch.rand(count, 3, 4, 4, generator=generator), (8, 8), mode="bilinear"
    )
    brightness = 0.3 + 0.4 * torch.rand(count, generator=generator)
    centred = images - images.mean((1, 2, 3), keepdim=True)
    images = brightness[:, None, None, None] + 0.5 * centred
    return images, torch.randint(CLASSES, (count,), generator=generator)


def bins_of(images, bins):
    """Return into which of the equally likely bins of brightness each picture falls."""
    return ((images.mean((1, 2, 3)) - 0.3) / 0.4 * bins).long()


def expected_alone(count, bins):
    """Return how many of some pictures are expected to fall into a bin alone, all bins equally likely."""
    return count * (1 - 1 / bins) ** (count - 1)


def two_layers(rows, biases, columns):
    """A fully connected layer with the given rows and biases, ReLU, and a head with the given columns."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(SIZE, len(rows)), nn.ReLU(), nn.Linear(len(rows), CLASSES))
    with torch.no_grad():
        net[1].weight.copy_(rows)
        net[1].bias.copy_(biases)
        net[3].weight.copy_(columns)
        net[3].bias.zero_()
    return net


def imprint(bins):
    """Rows that all measure the brightness, one beginning to fire at each bin; the head hears them alike."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.full((bins, SIZE), 1 / SIZE)
    biases = -(0.3 + 0.4 * torch.arange(bins) / bins)
    return two_layers(rows, biases, 0.1 * torch.randn(CLASSES, 1, generator=generator).expand(CLASSES, bins))


def traps(units, count):
    """Random rows whose biases let each fire for one picture in ``count``, measured on other pictures."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(units, SIZE, generator=generator) / SIZE**0.5
    others = pictures(4000, seed=99)[0].flatten(1)
    biases = -(others @ rows.T).quantile(1 - 1 / count, dim=0)
    return two_layers(rows, biases, 0.1 * torch.randn(CLASSES, units, generator=generator))


def fishing(times, target=2):
    """A convolutional network that never expects one class, and hears it many times as loud as the others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(96, CLASSES)
        )
    with torch.no_grad():
        net[3].weight[target] *= times
        net[3].bias[target] -= 10 * times
    return net


def ordinary(units=100, activation=nn.ReLU):
    """A fresh network of two fully connected layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return nn.Sequential(nn.Flatten(), nn.Linear(SIZE, units), activation(), nn.Linear(units, CLASSES))


def staircase(images):
    """Unit 0 fires for picture 0 alone, unit k for pictures k - 1 and k: each step frees the next picture."""
    n = len(images)
    fires = torch.eye(n) + torch.eye(n).roll(-1, 1).tril(-1)
    rows = (2 * fires - 1) @ torch.linalg.pinv(images.flatten(1)).T
    generator = torch.Generator().manual_seed(5)
    return two_layers(rows, torch.zeros(n), torch.rand(CLASSES, n, generator=generator))
