"""Updates of different kinds, small and fast, with what a report has to say of each."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import invlib as iv
from invlib.auditing.words import NOT_FOUND, Verdict
from invlib.errors import DoubtWarning
from invlib.models.lenet import LeNetZhu
from invlib.models.mlp import FullyConnected
from invlib.models.vit import ViT
from tests.attacks.text_nets import Net, distinct


@dataclass(frozen=True, kw_only=True)
class Update:
    """One case.

    Args:
        name: for the test's id.
        model: what the client received.
        seen: what the server saw.
        truth: images ``(N, C, H, W)`` or tokens ``(N, T)``; None where there are none.
        verdicts: of which the whole report has to give one.
        reason: name of the finding among the reasons that has to be there; empty where nothing failed.
        says: that finding's verdict.
    """

    name: str
    model: nn.Module
    seen: iv.Observation
    truth: Tensor | None
    verdicts: tuple[Verdict, ...]
    reason: str = ""
    says: Verdict = "explains the failure"


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def photos(*rows: int) -> tuple[Tensor, Tensor]:
    """Parts of photographs of 16×16 pixels, and labels; all of them where no rows are given."""
    images, labels = iv.data.samples("patches32", [*rows] if rows else None)
    return nn.functional.avg_pool2d(images, 2), labels


def lenet(seed: int = 0) -> nn.Module:
    return seeded(lambda: LeNetZhu(image_size=16), seed)


def observed(model: nn.Module, rows: tuple[int, ...] = (0,), **more) -> tuple[iv.Observation, Tensor]:
    images, labels = photos(*rows)
    protocol = more.pop("protocol", iv.FedSGD())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DoubtWarning)
        return iv.observe(model, images, labels, protocol, normalization=iv.CIFAR10, **more), images


CERTIFIED: tuple[Verdict, ...] = ("recovered and certified",)
RECOVERED: tuple[Verdict, ...] = ("recovered and certified", "identified")


def fully_connected() -> Update:
    """One image of a fully connected network: a closed form."""
    model = seeded(lambda: FullyConnected(hidden=(64,), image_size=16))
    seen, truth = observed(model, (3,))
    return Update(name="fully connected", model=model, seen=seen, truth=truth, verdicts=RECOVERED)


def exact_batch() -> Update:
    """Four images of a wider one: its silent units separate them."""
    model = seeded(lambda: FullyConnected(hidden=(200, 100), image_size=16))
    seen, truth = observed(model, (0, 1, 2, 3))
    return Update(name="exact batch", model=model, seen=seen, truth=truth, verdicts=CERTIFIED)


def pooled() -> nn.Module:
    """A smooth convolutional network whose pooling nothing undoes in closed form."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 5, padding=2, stride=2),
        nn.Sigmoid(),
        nn.Conv2d(24, 24, 3, padding=1),
        nn.Sigmoid(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24 * 16, 10),
    )


def searched() -> Update:
    """One image of a smooth convolutional network: a search."""
    model = seeded(pooled)
    seen, truth = observed(model, (5,))
    return Update(name="searched", model=model, seen=seen, truth=truth, verdicts=RECOVERED)


def patches() -> Update:
    """One image of a vision transformer: its patch embedding."""
    model = seeded(lambda: ViT(width=48, depth=1, heads=2, dropout=0.0, image_size=16))
    seen, truth = observed(model, (4,))
    return Update(name="patches", model=model, seen=seen, truth=truth, verdicts=RECOVERED)


def tokens() -> Update:
    """One sequence of a transformer: its tables."""
    model, truth = Net(), distinct(12)
    seen = iv.observe(model, truth, torch.tensor([7]), iv.FedSGD())
    return Update(name="tokens", model=model, seen=seen, truth=truth, verdicts=RECOVERED)


def sequences() -> Update:
    """Two sequences of a decoder, by the subspaces of its blocks."""
    model = seeded(lambda: iv.models.build("TextDecoder", num_classes=40))
    truth = torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(0))
    seen = iv.observe(model, truth, torch.tensor([5, 6]), iv.FedSGD())
    return Update(name="sequences", model=model, seen=seen, truth=truth, verdicts=CERTIFIED)


def summed() -> Update:
    """The mean of two clients of two images each, who take three steps: what is exact of a batch is of it."""
    model = seeded(lambda: FullyConnected(hidden=(200, 100), image_size=16))
    client = iv.defenses.SecureAggregation(clients=2, client=iv.FedAvg(lr=0.01, local_steps=3))
    seen, truth = observed(model, (0, 1, 2, 3), protocol=client)
    return Update(name="summed", model=model, seen=seen, truth=truth, verdicts=CERTIFIED)


def noisy_text() -> Update:
    """A little noise of which the server was not told, over the tables of words."""
    model, truth = Net(), distinct(12)
    client = iv.Defended(iv.FedSGD(), [iv.defenses.GaussianNoise(1e-3)], public=False)
    seen = iv.observe(model, truth, torch.tensor([7]), client)
    return Update(
        name="noisy text", model=model, seen=seen, truth=truth, verdicts=("not tried",), reason="Noise"
    )


def garbage() -> Update:
    """Random numbers of the right shapes."""
    model, generator = lenet(), torch.Generator().manual_seed(0)
    seen, _ = observed(model)
    noise = {n: torch.randn(v.shape, generator=generator) for n, v in seen.update.items()}
    seen = replace(seen, update=noise, labels=None)
    return Update(
        name="garbage",
        model=model,
        seen=seen,
        truth=None,
        verdicts=("does not fit", NOT_FOUND),
        reason="No update",
        says="does not fit",
    )


def other_model() -> Update:
    """The update of a network of the same architecture with other weights."""
    seen, truth = observed(lenet(1))
    return Update(
        name="other model",
        model=lenet(0),
        seen=seen,
        truth=truth,
        verdicts=("does not fit", NOT_FOUND),
        reason="Model",
        says="does not fit",
    )


def normalised() -> nn.Module:
    """A network whose running statistics are far from those of its inputs, as after other data."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 16, 10),
    )
    for layer in net:
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 2)
            layer.running_var.uniform_(0.05, 0.5)
    return net


def training_mode() -> Update:
    """Training mode, which the server was not told, and no buffers."""
    model = seeded(normalised)
    seen, truth = observed(model, (0, 1, 2, 4), training_mode=True)
    seen = replace(seen, training_mode=False, buffers={})
    return Update(
        name="training mode",
        model=model,
        seen=seen,
        truth=truth,
        verdicts=("does not fit",),
        reason="Mode",
    )


def noisy() -> Update:
    """Gaussian noise of which the server was not told."""
    model = lenet()
    seen, truth = observed(model)
    size = sum(v.numel() for v in seen.update.values())
    length = sum(float(v.square().sum()) for v in seen.update.values()) ** 0.5
    noise = [iv.defenses.GaussianNoise(3 * length / size**0.5)]
    seen, _ = observed(model, protocol=iv.Defended(iv.FedSGD(), noise, public=False))
    return Update(
        name="noisy", model=model, seen=seen, truth=truth, verdicts=("partly", NOT_FOUND), reason="Noise"
    )


def saturated() -> Update:
    """A loss that is zero in the client's precision."""
    model = lenet()
    with torch.no_grad():
        model.fc.bias[0] += 1000
    seen, truth = observed(model)
    return Update(
        name="saturated", model=model, seen=seen, truth=truth, verdicts=(NOT_FOUND,), reason="Saturation"
    )


def sparsified() -> Update:
    """The largest numbers alone, of which the server was not told."""
    model = lenet()
    client = iv.Defended(iv.FedSGD(), [iv.defenses.TopK(0.05)], public=False)
    seen, truth = observed(model, protocol=client)
    return Update(
        name="sparsified",
        model=model,
        seen=seen,
        truth=truth,
        verdicts=("partly", NOT_FOUND),
        reason="Sparsity",
    )


ATTACKED = (fully_connected, exact_batch, searched, patches, tokens, sequences, summed)
FAILED = (garbage, other_model, training_mode, noisy, noisy_text, saturated, sparsified)
UPDATES = (*ATTACKED, *FAILED)
