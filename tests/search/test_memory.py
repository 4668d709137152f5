"""How many restarts run together: the memory of one, measured, against what is free."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import invlib as iv
from invlib.models.convnet import ConvNet
from invlib.search.engines import memory, selection
from invlib.search.engines.batched import part_of_many
from tests.benchmarks import baseline
from tests.conftest import build_tiny, random_batch

CPU = torch.device("cpu")
SIZE = 4000  # bytes of the tensors below


def see(net, n=1, client=None, side=8):
    x, y = random_batch(n, side=side, dtype=next(net.parameters()).dtype)
    return iv.observe(net, x, y, client or iv.FedSGD(), normalization=iv.CIFAR10)


def one_after_another(x):
    for _ in range(10):
        x = x * 2


def views_and_changes_in_place(x):
    y = x.clone()
    x.add_(1).view(10, 100).t()
    y.view(10, 100).t().add_(1)


def two_of_three_at_once(x):
    a = x * 2
    b = a * 2
    del a
    return b * 2


def held_for_the_way_back(x):
    x = x.clone().requires_grad_()
    y = x.sin().sin().sin()  # x, what two of them keep, and y
    y.backward(torch.ones_like(y))  # beside them the ones, a cosine, and its product


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return (x * 2) * slope


def a_function_of_ones_own(x):
    x = x.clone().requires_grad_()
    y = Squared.apply(x)
    y.backward(torch.ones_like(y))  # x, y, the ones, x * 2 and the product


def mapped(x):
    return torch.func.vmap(lambda row: (row * 2) * 3)(x.view(10, 100))


def differentiated_by_transforms(x):
    return torch.func.grad(lambda v: (v * v).sum())(x)


@pytest.mark.parametrize(
    ("run", "tensors"),
    [
        (one_after_another, 2),
        (views_and_changes_in_place, 1),
        (two_of_three_at_once, 2),
        (held_for_the_way_back, 7),
        (a_function_of_ones_own, 5),
        (mapped, 2),
        (differentiated_by_transforms, 3),
    ],
    ids=lambda p: getattr(p, "__name__", ""),
)
def test_the_peak_of_a_function_whose_peak_is_known(run, tensors):
    x = torch.ones(1000)
    assert memory.peak(lambda: run(x), CPU) == pytest.approx(tensors * SIZE, abs=16)  # a scalar or two


def test_what_a_function_leaves_behind_is_not_counted_the_next_time():
    left = []
    for _ in range(2):
        assert memory.peak(lambda: left.append(torch.ones(1000) + 1), CPU) == 2 * SIZE


@pytest.mark.parametrize("client", [iv.FedSGD(), iv.FedAvg(lr=0.1, local_steps=12)], ids=["FedSGD", "FedAvg"])
@pytest.mark.parametrize("net", ["many activations", "many parameters"])
def test_one_restart_needs_its_share_of_what_many_need(client, net):
    if net == "many activations":
        net = ConvNet(width=4, image_size=16).eval()
    else:
        net = nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.Sigmoid(), nn.Linear(64, 10))
    attack = iv.GradientMatching(restarts=8)
    seen = see(net, 2, client, side=16)
    problem = attack.problem(net, seen)
    starts = attack.starts(problem, seen, torch.Generator().manual_seed(0))
    step = selection.build("batched", problem)
    everyone = memory.peak(lambda: step(starts, list(range(8)), None, 1.0), CPU)
    measured = replace(problem, activations=None)
    _, need = memory.largest(measured, starts, part_of_many(problem), None)
    assert need == pytest.approx(everyone / 8, rel=0.1)
    _, estimate = memory.largest(problem, starts, part_of_many(problem), None)
    assert need < estimate


@pytest.mark.parametrize(
    ("count", "most", "unit", "sizes"),
    [
        (10, 10, 10, [10]),
        (10, 9, 10, [5, 5]),
        (10, 4, 10, [3, 3, 4]),
        (3, 1, 3, [1, 1, 1]),
        (12, 5, 4, [4, 4, 4]),  # four of them belong together
        (12, 9, 4, [4, 8]),
        (12, 3, 4, [3, 3, 3, 3]),
    ],
)
def test_chunks_are_few_and_equal(count, most, unit, sizes):
    chunks = memory.split(count, most, unit=unit)
    assert [len(chunk) for chunk in chunks] == sizes
    assert [row for chunk in chunks for row in chunk] == list(range(count))


def sized(monkeypatch):
    """Record how many restarts each step takes."""
    sizes, make = [], selection.build

    def measure(engine, problem):
        step = make(engine, problem)

        def evaluate(values, rows, *how, **more):
            sizes.append(len(rows))
            return step(values, rows, *how, **more)

        return evaluate

    monkeypatch.setattr(selection, "build", measure)
    return sizes


def room_for(monkeypatch, restarts, run):
    """Run an attack; leave room for so many of its restarts; return what it found, and what one needs."""
    found, largest = [], memory.largest

    def watched(problem, starts, step, sharpness):
        most, need = largest(replace(problem, activations=None), starts, step, sharpness)
        found.extend((need, 4 * sum(s.nbytes for s in starts)))
        return most, need

    with monkeypatch.context() as patch:
        patch.setattr(memory, "largest", watched)
        whole = run()
    need, kept = found
    free = (need * restarts + kept + 1) / memory.MARGIN + 1
    monkeypatch.setattr(memory, "available", lambda device: int(free))
    return whole, need


@pytest.mark.parametrize(("restarts", "sizes"), [(4, [3, 4]), (3, [2, 2, 3]), (0, [1] * 7)])
def test_restarts_are_split_as_memory_allows_with_the_same_result(monkeypatch, restarts, sizes):
    net = build_tiny(torch.float64)
    seen = see(net)
    attack = iv.GradientMatching(steps=5, restarts=7, record_every=1)
    whole, need = room_for(monkeypatch, restarts, lambda: attack(net, seen))
    assert whole.chunks == (7,)
    ran = sized(monkeypatch)
    split = attack(net, seen)
    steps = attack.steps + 1  # the last point is measured too
    assert ran == [size for size in sizes for _ in range(steps)]
    torch.testing.assert_close(split.trials, whole.trials)
    torch.testing.assert_close(split.history.cost, whole.history.cost)
    assert split.evaluations == whole.evaluations
    words = f", in chunks, because each restart needs about {need / 1e6:.2g} MB"
    assert split.engine_reason == whole.engine_reason + words
    assert split.chunks == tuple(sizes)


def test_chunks_of_many_observations_end_where_an_observation_does(monkeypatch):
    net = build_tiny(torch.float64)
    seen = [see(net) for _ in range(3)]
    attack = iv.GradientMatching(steps=5, restarts=2, record_every=1)
    whole, _ = room_for(monkeypatch, 5, lambda: iv.attack_many(attack, net, seen))
    ran = sized(monkeypatch)
    split = iv.attack_many(attack, net, seen)
    assert ran == [size for size in (2, 4) for _ in range(attack.steps + 1)]
    for one, expected in zip(split, whole, strict=True):
        torch.testing.assert_close(one.trials, expected.trials)
        assert one.chunks == (2, 4)


def test_some_of_what_is_free_is_left_to_others(monkeypatch, tiny, seen):
    attack = iv.GradientMatching(restarts=100)
    problem = replace(attack.problem(tiny, seen), activations=None)
    starts = attack.starts(problem, seen, torch.Generator().manual_seed(0))
    _, need = memory.largest(problem, starts, part_of_many(problem), None)
    free = 60 * need
    monkeypatch.setattr(memory, "available", lambda device: free)
    most, _ = memory.largest(problem, starts, part_of_many(problem), None)
    places, best, means = (sum(s.nbytes for s in starts) * k for k in (1, 1, 2))  # two means: Adam's
    assert 0.6 * free < most * need + places + best + means < 0.9 * free


@pytest.mark.parametrize(("times", "measured"), [(20, False), (2, True)])
def test_an_estimate_is_taken_where_there_is_room_for_much_more(monkeypatch, tiny, seen, times, measured):
    attack = iv.GradientMatching(restarts=10)
    problem = attack.problem(tiny, seen)
    starts = attack.starts(problem, seen, torch.Generator().manual_seed(0))
    _, estimate = memory.largest(problem, starts, part_of_many(problem), None)
    monkeypatch.setattr(memory, "available", lambda device: times * 10 * estimate)
    _, need = memory.largest(problem, starts, part_of_many(problem), None)
    assert (need < estimate) is measured


def test_a_chunk_that_is_given_is_taken(monkeypatch, tiny, seen):
    monkeypatch.setattr(memory, "peak", None)
    ran = sized(monkeypatch)
    found = iv.GradientMatching(steps=1, restarts=5, chunk=4)(tiny, seen)
    assert ran == [4, 4, 1, 1]
    assert found.chunks == (4, 1)
    assert "chunks" not in found.engine_reason


@pytest.mark.parametrize(
    "settings",
    [{"restarts": 1}, {"restarts": 3, "engine": "eager"}, {"restarts": 3, "optimizer": iv.LBFGS(max_iter=1)}],
    ids=str,
)
def test_where_one_restart_runs_at_a_time_nothing_is_measured(monkeypatch, tiny, seen, settings):
    monkeypatch.setattr(memory, "peak", None)
    iv.GradientMatching(steps=1, **settings)(tiny, seen)


class Careless(nn.Module):
    """A network that draws random numbers at every call."""

    def __init__(self):
        super().__init__()
        self.inner = build_tiny()

    def forward(self, x):
        return self.inner(nn.functional.dropout(x, 0.1))


@pytest.mark.parametrize("name", ["LeNetZhu", "ConvNet8", "ResNet20"])
def test_one_restart_takes_no_more_than_the_loop_of_2020(name):
    net = iv.models.build(name, num_classes=10, seed=0).eval()
    seen = see(net, side=32)
    start = torch.randn(1, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    theirs = memory.peak(lambda: baseline.attack(net, seen, start, 2), CPU)
    ours = memory.peak(lambda: iv.inverting_gradients(steps=2)(net, seen), CPU)
    assert ours <= theirs


def test_measuring_leaves_no_trace():
    net = Careless()
    seen = see(net)
    attack = iv.GradientMatching(restarts=3)
    problem = attack.problem(net, seen)
    starts = attack.starts(problem, seen, torch.Generator().manual_seed(0))
    before = [t.clone() for t in (*net.parameters(), *starts, torch.get_rng_state())]
    memory.largest(problem, starts, part_of_many(problem), None)
    for now, was in zip((*net.parameters(), *starts, torch.get_rng_state()), before, strict=True):
        assert torch.equal(now, was)
    assert all(p.grad is None for p in net.parameters())


def test_a_restart_that_does_not_fit_alone_runs_alone(monkeypatch, tiny, seen):
    def peak(run, device):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(memory, "peak", peak)
    monkeypatch.setattr(memory, "available", lambda device: 0)
    ran = sized(monkeypatch)
    iv.GradientMatching(steps=1, restarts=2)(tiny, seen)
    assert ran == [1] * 4


def test_a_gpu_is_asked_for_its_own_counts(monkeypatch):
    class Card:
        """Torch's account of a card: what is reserved and allocated on it, and the largest so far."""

        now, most, free, reserved = 100, 900, 1000, 160

        def reset_peak_memory_stats(self, device):
            self.most = self.now

        def run(self):
            self.most = max(self.most, self.now + 70)

    card = Card()
    monkeypatch.setattr(
        torch,
        "cuda",
        SimpleNamespace(
            reset_peak_memory_stats=card.reset_peak_memory_stats,
            memory_allocated=lambda device: card.now,
            max_memory_allocated=lambda device: card.most,
            memory_reserved=lambda device: card.reserved,
            mem_get_info=lambda device: (card.free, 4000),
        ),
    )
    device = torch.device("cuda")
    assert memory.peak(card.run, device) == 70
    assert memory.available(device) == 1060


@pytest.mark.gpu
def test_restarts_are_split_on_a_gpu(monkeypatch):
    net = build_tiny(torch.float64)
    seen = see(net)
    attack = iv.GradientMatching(steps=5, restarts=7)
    whole = attack(net, seen)
    net = net.cuda()
    room_for(monkeypatch, 3, lambda: attack(net, seen))
    split = attack(net, seen)
    assert split.chunks == (2, 2, 3)
    torch.testing.assert_close(split.trials.cpu(), whole.trials)
