"""Going on with a client of Adam: from images that are nearly right to nearer ones."""

import pytest
import torch
from tqdm.auto import tqdm

import invlib as iv
from invlib.attacks.adaptive import gone_on, jumps
from invlib.attacks.parts import Parts
from invlib.core.network import in_mode
from tests.conftest import build_tiny


def parts_of(net):
    return Parts(net, generator=torch.Generator(), callback=None, bar=tqdm(disable=True, total=0), saved=None)


@pytest.mark.parametrize(
    ("client", "there"),
    [
        (iv.FedAvg(lr=1e-3, local_steps=2, optimizer="adam"), True),
        (iv.FedAvg(lr=1e-3, local_steps=2, momentum=0.9), False),
        (iv.FedSGD(), False),
    ],
)
def test_updates_that_jump(client, there):
    net = build_tiny().eval()
    x, y = torch.rand(1, 3, 8, 8), torch.tensor([1])
    assert jumps(iv.observe(net, x, y, client, normalization=iv.CIFAR10)) is there


def test_a_search_that_jumps_have_stopped_goes_on():
    net = iv.models.build("LeNetZhu", seed=0).eval()
    x, y = iv.data.samples("photos32", indices=[0])
    start = 0.8 * x + 0.2 * x.flip(-1)
    client = iv.FedAvg(lr=1e-3, local_steps=2, optimizer="adam")
    seen = iv.observe(net, x, y, client, normalization=iv.CIFAR10)
    search = iv.GradientMatching(init=start, steps=1, optimizer=iv.SGD(lr=1e-9))
    found = search(net, seen)
    with in_mode(net, training=False, seed=0):
        after = gone_on(found, net, seen, parts_of(net), search=search, evaluations=50, told=1)
    assert iv.metrics.psnr(after.images, x) > iv.metrics.psnr(start, x) + 3
    assert after.score < found.score / 5
    assert 50 <= after.evaluations - found.evaluations <= 70
    assert after.note.endswith("without the jumps of Adam")
