"""`best` goes on within itself from a checkpoint, whatever part of it was under way, and has one bar."""

import io
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

import invlib as iv
from invlib.attacks import auto
from tests.conftest import build_tiny, random_batch


def strided():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        ).eval()


def see(net):
    x, y = random_batch(dtype=next(net.parameters()).dtype)
    return iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10)


def rounded():
    """A chain whose closed form rounding has left inexact, so that it is polished."""
    net = iv.models.build("LeNetZhu", num_classes=5, image_size=8, seed=0).double()
    seen = see(net)
    return net, replace(seen, update={n: u.bfloat16().double() for n, u in seen.update.items()})


def shifting():
    net = strided()
    return net, see(net)


def stalling():
    """Sigmoids in single precision, where the cosine soon stalls and the squared distance goes on."""
    net = build_tiny()
    net = nn.Sequential(*net[:2], nn.AvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nn.init.normal_(net[4].weight)
    return net, see(net)


class Pooled(nn.Module):
    """Sigmoids as functions, and the mean over all places."""

    def __init__(self, width=4):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.second = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x):
        return self.head(torch.sigmoid(self.second(torch.sigmoid(self.first(x)))).mean((2, 3)))


def pooled(width=4):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Pooled(width).eval()


SITUATIONS = {
    "shorter schedule": (stalling, {"steps": 400}),
    "polish": (rounded, {"steps": 80}),
    "shifted copies": (shifting, {"steps": 500, "restarts": 2}),
    "squared distance": (stalling, {"steps": 250, "restarts": 2, "prune": True}),
}


@pytest.mark.parametrize("name", ["polish", "squared distance"])
def test_best_goes_on_in_whatever_part_it_was(tmp_path, name):
    make, settings = SITUATIONS[name]
    net, seen = make()
    path, attack, steps = tmp_path / "run.pt", iv.best(**settings), []
    whole = attack(net, seen, callback=lambda p: steps.append(p.step))
    count = len(steps)
    assert count > 3
    for at in (2, count // 2, count - 1):
        told = []

        def press(progress, told=told, at=at):
            told.append(progress.step)
            if len(told) == at:
                signal.raise_signal(signal.SIGINT)

        cut = attack(net, seen, checkpoint=path, callback=press)
        assert cut.status == "interrupted"
        assert cut.images.isfinite().all()
        assert path.exists()
        again = []
        found = attack(net, seen, checkpoint=path, callback=lambda p, again=again: again.append(p.step))
        assert len(again) <= count - at + 1  # nothing but what was left, and the start anew
        assert torch.equal(found.images, whole.images)
        assert torch.equal(found.trial_scores, whole.trial_scores)
        assert found.history.steps == whole.history.steps
        for what in ("status", "score", "evaluations", "note"):
            assert getattr(found, what) == getattr(whole, what)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", SITUATIONS)
def test_best_has_one_progress_bar(monkeypatch, name):
    make, settings = SITUATIONS[name]
    net, seen = make()
    bars, tqdm = [], auto.tqdm

    def made(*args, **kwargs):
        bars.append(tqdm(*args, **kwargs, file=io.StringIO()))
        return bars[-1]

    monkeypatch.setattr("invlib.attacks.auto.tqdm", made)
    monkeypatch.setattr("invlib.search.hooks.tqdm", None)
    found = iv.best(**settings)(net, seen, progress=True)
    [bar] = bars
    assert 0.9 * found.evaluations <= bar.n <= found.evaluations
    assert found.evaluations <= 1.2 * bar.total


def test_a_longer_search_that_stalls_is_none_the_worse_for_it():
    net = pooled(16)
    x, y = iv.data.samples("photos32", indices=[0])
    seen = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
    short, longer = (iv.best(steps=steps)(net, seen) for steps in (200, 400))
    assert longer.score <= short.score
    assert "a shorter schedule came nearer" in longer.note
    assert longer.evaluations <= 425
    assert longer.history.steps == sorted(longer.history.steps)


def test_ctrl_c_in_the_polish_is_an_interruption():
    net, seen = rounded()
    told = []

    def press(progress):
        told.append(progress.step)
        if progress.step == 2:
            signal.raise_signal(signal.SIGINT)

    assert iv.best(steps=80)(net, seen, callback=press).status == "interrupted"
    assert max(told) == 2
