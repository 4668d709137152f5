"""Whole attacks on real images: what each must at least reach, in dB, well above a plain grey image."""

import pytest
import torch

import invlib as iv
from invlib.optim import objectives

QUASI_NEWTON = iv.LBFGS(line_search="strong_wolfe", history_size=50)
SQUARED = iv.GradientMatching(
    objective=objectives.l2, optimizer=QUASI_NEWTON, decay=None, steps=8, init="zeros"
)

# attack, network, protocol, whether the label is hidden, least PSNR; the grey image has 15.2 dB
TABLE = {
    "closed form, MLP": (iv.fully_connected(), "MLP", iv.FedSGD(), True, 90.0),
    "closed form, MLP, FedAvg": (iv.fully_connected(), "MLP", iv.FedAvg(lr=0.1, local_steps=2), True, 60.0),
    "cosine, LeNetZhu": (iv.inverting_gradients(steps=300, tv=1e-3), "LeNetZhu", iv.FedSGD(), True, 16.5),
    "cosine, ConvNet8": (iv.inverting_gradients(steps=120, tv=1e-3), "ConvNet8", iv.FedSGD(), True, 16.5),
    "squared distance, LeNetZhu": (SQUARED, "LeNetZhu", iv.FedSGD(), True, 22.0),
    "squared distance, FedAvg": (SQUARED, "LeNetZhu", iv.FedAvg(lr=0.05, local_steps=2), True, 20.0),
    "iDLG, LeNetZhu": (iv.improved_deep_leakage(steps=20), "LeNetZhu", iv.FedSGD(), True, 18.0),
    "DLG, LeNetZhu": (iv.deep_leakage(steps=20), "LeNetZhu", iv.FedSGD(), True, 17.0),
}


@pytest.mark.parametrize("name", TABLE)
def test_an_attack_reaches_what_it_should(name):
    attack, network, protocol, hidden, least = TABLE[name]
    x, y = iv.data.samples("photos32", indices=[1])
    model = iv.models.build(network, num_classes=10, seed=0)
    seen = iv.observe(model, x, y, protocol, normalization=iv.CIFAR10, reveal_labels=not hidden)
    rec = attack(model, seen, generator=torch.Generator().manual_seed(0))
    report = iv.evaluate(rec, x, y)
    assert report.psnr[0] >= least, f"{name}: {report}"
    assert report.grey_psnr[0] < 15.5
    assert report.labels_right == 1


def test_a_wrong_target_gives_a_wrong_picture():
    """The table could also be passed by an attack that looks at the truth; this one has none to look at."""
    x, y = iv.data.samples("photos32", indices=[1])
    model = iv.models.build("LeNetZhu", num_classes=10, seed=0)
    other = iv.models.build("LeNetZhu", num_classes=10, seed=1)
    seen = iv.observe(other, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
    assert iv.evaluate(SQUARED(model, seen), x, y).psnr[0] < 20
