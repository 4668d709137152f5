"""What every test shares: one thread, no windows, the Triton interpreter where no GPU is."""

import os
import signal

import torch

# Before anything imports triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
from torch import nn

import invlib as iv


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heard() -> None:
    """A shell lets what it runs in the background ignore Ctrl-C, and tests press it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def tiny() -> nn.Module:
    """A smooth convolutional network on 3×8×8 images, small enough to attack in a test."""
    return build_tiny()


def build_tiny(dtype: torch.dtype = torch.float32, classes: int = 5) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(6 * 16, classes)
        )
    return net.to(dtype)


def random_batch(n: int = 1, *, side: int = 8, classes: int = 5, seed: int = 0, dtype=torch.float32):
    """Random smooth images in [0, 1] and labels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 3, 3, generator=generator)
    images = nn.functional.interpolate(coarse, (side, side), mode="bilinear").clamp(0, 1).to(dtype)
    labels = torch.randint(classes, (n,), generator=generator)
    return images, labels


@pytest.fixture
def seen(tiny: nn.Module) -> iv.Observation:
    """A FedSGD observation of one image by the tiny network."""
    x, y = random_batch()
    return iv.observe(tiny, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
