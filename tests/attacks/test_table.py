"""Every attack: one signature and one kind of result for all, and what each must reach on real images."""

import math
import pickle

import pytest
import torch
from torch import nn

import invlib as iv
from invlib.core.fingerprint import describe
from invlib.experiments.attacks import OnTheWay
from invlib.optim import objectives
from tests.conftest import build_tiny, random_batch

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
    "beyond inferring, LeNetZhu": (iv.beyond_inferring(steps=10), "LeNetZhu", iv.FedSGD(), True, 22.0),
    "CPL, LeNetZhu": (iv.client_privacy_leakage(steps=8), "LeNetZhu", iv.FedSGD(), True, 16.0),
    "modern, LeNetZhu": (iv.modern(steps=150), "LeNetZhu", iv.FedSGD(), True, 16.0),
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


def mlp():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Sigmoid(), nn.Linear(8, 5))


def relu_net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5))


def batch_normed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 4, 3, stride=2)
        return nn.Sequential(conv, nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 5)).eval()


MASKED = {"objective": objectives.Masked(objectives.cosine)}
SOFT = {"labels": "optimize", "restarts": 2}
SMOOTH = {"smoothing": iv.Smoothing(), "fading": 0.1, "coordinates": iv.NaturalImages()}
ONE, SOME = iv.FedSGD(), iv.FedAvg(lr=0.1, local_steps=2)


class Patches(nn.Module):
    """A linear patch embedding, positions, and what follows them."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed, self.places = nn.Conv2d(3, 16, 4, stride=4), nn.Parameter(torch.randn(16, 2, 2))
            self.head = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(64, 5))

    def forward(self, x):
        return self.head(self.embed(x) + self.places)


def on_the_way(**settings):
    return OnTheWay(attack=iv.inverting_gradients(**settings))


# attack, its settings, one that differs, network, protocol, what its score measures
CLOSED = {
    "fully connected": (
        iv.fully_connected,
        {},
        {"tolerance": 0.1},
        mlp,
        ONE,
        "unexplained share of the first layer's gradient",
    ),
    "recursive": (iv.recursive_inversion, {}, {"iterations": 9}, build_tiny, ONE, "cosine"),
    "patch embedding": (
        iv.patch_embedding,
        {},
        {"decay": False},
        Patches,
        ONE,
        "unexplained share of the patch embedding's update",
    ),
    "best, closed form": (iv.best, {}, {"evaluations": 9}, build_tiny, ONE, "cosine"),
}
SEARCHES = {
    "best": (iv.best, {"evaluations": 200}, {"tv": 0.2}, relu_net, ONE, "cosine"),
    "best, shifts": (iv.best, {"evaluations": 500}, {"shifts": 3}, relu_net, ONE, "cosine"),
    "best, noise": (iv.best, {"evaluations": 200, "init": "randn"}, {}, relu_net, ONE, "cosine"),
    "inverting gradients": (iv.inverting_gradients, {"steps": 4}, {"tv": 1.0}, build_tiny, ONE, "cosine"),
    "through local steps": (iv.inverting_gradients, {"steps": 4}, {"tv": 1.0}, build_tiny, SOME, "cosine"),
    "on the way": (on_the_way, {"steps": 4}, {"tv": 1.0}, build_tiny, SOME, "cosine"),
    "deep leakage": (iv.deep_leakage, {"steps": 4}, {"restarts": 2}, build_tiny, ONE, "l2"),
    "improved": (iv.improved_deep_leakage, {"steps": 4}, {"restarts": 2}, build_tiny, ONE, "l2"),
    "matching": (iv.GradientMatching, {"steps": 4}, {"init": "zeros"}, build_tiny, ONE, "cosine"),
    "soft labels": (iv.GradientMatching, {"steps": 4, **SOFT}, {"keep": "last"}, build_tiny, ONE, "cosine"),
    "smoothed": (iv.GradientMatching, {"steps": 4, **SMOOTH}, {"fading": 1}, relu_net, ONE, "cosine"),
    "beyond inferring": (iv.beyond_inferring, {"steps": 4}, {"tv": 1.0}, build_tiny, ONE, "l2"),
    "CPL": (iv.client_privacy_leakage, {"steps": 4}, {"label_weight": 2.0}, build_tiny, ONE, "l2"),
    "GradInversion": (iv.see_through_gradients, {"steps": 4}, {"norm": 1.0}, batch_normed, ONE, "l2"),
    "modern": (iv.modern, {"steps": 4}, {"features": 1.0}, build_tiny, ONE, "cosine"),
    "masked": (iv.GradientMatching, {"steps": 4, **MASKED}, {}, build_tiny, ONE, "Masked(cosine)"),
    "forward": (iv.ForwardMatching, {"steps": 4}, {"tv": (1.0, 2.0)}, build_tiny, ONE, "cosine by block"),
}
BEST = [name for name in SEARCHES if name.startswith("best")]
ALL = CLOSED | SEARCHES


def ready(name):
    make, settings, _, network, protocol, _ = ALL[name]
    x, y = random_batch()
    model = network()
    return make(**settings), model, iv.observe(model, x, y, protocol, normalization=iv.CIFAR10), y


@pytest.mark.parametrize("name", ALL)
def test_every_attack_takes_the_same_and_gives_the_same(name, capsys):
    attack, model, seen, y = ready(name)
    told = []
    result = attack(
        model, seen, generator=torch.Generator().manual_seed(1), callback=told.append, progress=True
    )
    # Only the strongest attack goes on where its search stalls, until nothing is left to gain.
    ends = {"closed_form"} if name in CLOSED else {"max_steps", *(["converged"] if name in BEST else [])}
    assert result.status in ends
    assert result.objective == ALL[name][-1]
    assert math.isfinite(result.score)
    assert result.score == result.trial_scores.min()
    assert torch.equal(result.images, result.trials[int(result.trial_scores.argmin())])
    assert 0 <= result.images.min() <= result.images.max() <= 1
    assert result.images.shape == (1, 3, 8, 8)
    if name != "soft labels":
        assert torch.equal(result.labels, y)
    assert bool(told) == (name in SEARCHES)
    bar = capsys.readouterr().err
    assert ("step" in bar or "evaluation" in bar) == (name in SEARCHES or name.startswith("best"))
    if told:
        assert told[0].step == 0
        # Comparing shifted copies takes a part of a step, which the rest then lacks.
        assert told[-1].steps - told[-1].step in {0, int(name == "best, shifts")}
        assert result.engine
    # In another process the same attack gives the same, and neither callback nor bar changes anything.
    copy = pickle.loads(pickle.dumps(attack))
    assert copy == attack
    again = copy(model, seen, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again.images, result.images)


@pytest.mark.parametrize("name", ALL)
def test_every_attack_says_its_settings(name):
    make, settings, other, *_ = ALL[name]
    attack, alike, different = make(**settings), make(**settings), make(**{**settings, **other})
    assert attack == alike
    assert describe(attack) == describe(alike)
    assert repr(attack) == repr(alike)
    assert " at 0x" not in repr(attack)
    assert repr(attack).startswith(type(attack).__name__)
    if other:
        assert attack != different
        assert describe(attack) != describe(different)
        assert repr(attack) != repr(different)
    with pytest.raises(AttributeError):
        attack.steps = 3


@pytest.mark.parametrize("name", SEARCHES)
def test_ctrl_c_gives_what_a_search_has(name):
    attack, model, seen, _ = ready(name)

    def interrupt(progress):
        if progress.step == 2:
            raise KeyboardInterrupt

    result = attack(model, seen, callback=interrupt)
    assert result.status == "interrupted"
    assert math.isfinite(result.score)
    assert 0 <= result.images.min() <= result.images.max() <= 1
    stopped = attack(model, seen, callback=lambda progress: progress.step == 2)
    assert torch.equal(stopped.images, result.images)
    assert stopped.status == "interrupted"
