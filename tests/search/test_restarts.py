"""Many restarts: which go on when they are halved, and what happens when they do not fit in memory."""

import weakref
from dataclasses import replace
from functools import partial
from typing import ClassVar

import pytest
import torch

import invlib as iv
from invlib.errors import ConfigError
from invlib.search import run
from invlib.search import state as state_module
from invlib.search.engines import selection
from invlib.search.halving import rungs, survivors
from tests.conftest import build_tiny, random_batch


def see(net, n=1):
    x, y = random_batch(n)
    return iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10)


def test_halving_takes_a_fifth_of_the_work():
    plan = rungs(100, 32, True)
    assert plan == [(10, 32), (20, 16), (30, 8), (40, 4), (50, 2), (100, 1)]
    before, work = 0, 0
    for step, left in plan:
        work += left * (step - before)
        before = step
    assert work <= 100 * 32 / 3


def test_halving_keeps_the_lowest_of_each_observation_and_what_is_not_finite_last():
    nan, inf = torch.nan, torch.inf
    costs = torch.tensor([3.0, 1.0, 2.0, nan, nan, inf, 7.0, 5.0])
    running = torch.tensor([True, True, True, True, True, True, True, False])
    assert survivors(costs, running, 2, 4).nonzero().flatten().tolist() == [1, 2, 4, 6]
    assert survivors(costs, running, 4, 4).tolist() == running.tolist()


@pytest.mark.parametrize(
    ("steps", "restarts", "expected"),
    [
        (100, 1, [(100, 1)]),
        (100, 3, [(10, 3), (20, 2), (100, 1)]),
        (3, 4, [(1, 4), (1, 2), (3, 1)]),  # a step is the least
    ],
)
def test_few_restarts_and_few_steps_are_halved_too(steps, restarts, expected):
    assert rungs(steps, restarts, True) == expected
    assert rungs(steps, restarts, False) == [(steps, restarts)]


@pytest.mark.parametrize("chunk", [None, 3, 1])
@pytest.mark.parametrize(
    "optimizer", [iv.Adam(signed=True), iv.LBFGS(max_iter=2)], ids=lambda o: type(o).__name__
)
def test_halving_leaves_one_that_ends_where_it_would_have_ended(optimizer, chunk):
    net = build_tiny(torch.float64)
    x, y = random_batch(dtype=torch.float64)
    seen = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
    attack = iv.GradientMatching(optimizer=optimizer, steps=30, restarts=8, chunk=chunk, record_every=1)
    every, halved = attack(net, seen), replace(attack, prune=True)(net, seen)
    assert halved.trial_scores.isfinite().all()
    # The one that went on did so as if nothing had happened around it.
    survivor = int(halved.history.cost[-1].isfinite().nonzero())
    torch.testing.assert_close(halved.trials[survivor], every.trials[survivor])
    assert halved.score < 1.5 * every.score
    assert torch.equal(halved.images, halved.trials[halved.trial_scores.argmin()])
    assert halved.evaluations < every.evaluations / 2
    running = halved.history.cost.isfinite().sum(1)
    assert running[0] == 8
    assert running[-1] == 1
    assert running.tolist() == sorted(running.tolist(), reverse=True)


def test_halving_keeps_those_with_the_lowest_cost(tiny, seen):
    attack = iv.GradientMatching(steps=40, restarts=4, prune=True, record_every=1, optimizer=iv.SGD(lr=1e-9))
    found = attack(tiny, seen)  # nothing moves, so that the order of the starts is the order of the ends
    start = found.history.cost[0]
    last = found.history.cost[-1].isfinite()
    assert last.tolist() == (start == start.min()).tolist()
    second = found.history.cost[6].isfinite()
    assert second.tolist() == (start <= start.sort().values[1]).tolist()


def test_a_restart_that_is_not_finite_falls_behind_first(tiny, seen):
    init = torch.rand(4, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    init[:2] = torch.nan
    found = iv.GradientMatching(steps=20, restarts=4, prune=True, init=init)(tiny, seen)
    assert found.trial_scores.isfinite().tolist() == [False, False, True, True]
    assert found.status == "max_steps"


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_a_halved_run_goes_on_from_its_checkpoint(tiny, seen, tmp_path, cut):
    path = tmp_path / "run.pt"
    attack = iv.GradientMatching(steps=12, restarts=4, chunk=3, prune=True, record_every=1)
    whole = attack(tiny, seen)
    taken = []

    def stop(progress):
        taken.append(progress.step)
        return len(taken) >= cut

    assert attack(tiny, seen, checkpoint=path, callback=stop).status == "interrupted"
    resumed = attack(tiny, seen, checkpoint=path)
    torch.testing.assert_close(resumed.trials, whole.trials)
    torch.testing.assert_close(resumed.history.cost, whole.history.cost, equal_nan=True)
    assert not path.exists()


class CyclingAdam(iv.Adam):
    """An optimiser of one's own, whose state holds a table as long as there are restarts."""

    tables: ClassVar[list[int]] = []

    def init(self, values):
        return super().init(values) | {"table": torch.tensor([0.1, 0.2, 0.3, 0.4])}

    def step(self, values, variables, state, evaluate, factor):
        self.tables.append(len(state["table"]))
        super().step(values, variables, state, evaluate, factor * float(state["table"][state["step"] % 4]))


class Undeclared:
    """An optimiser that does not say what of its state is per restart."""

    together = True

    def init(self, values):
        return {"mean": [torch.zeros_like(v) for v in values]}

    def step(self, values, variables, state, evaluate, factor):
        values[0].sub_(evaluate(values)[1][0])


def test_halving_cuts_only_what_the_optimizer_declares(tiny, seen):
    attack = iv.GradientMatching(optimizer=CyclingAdam(), steps=20, restarts=4, prune=True)
    assert attack(tiny, seen).status == "max_steps"
    assert set(CyclingAdam.tables) == {4}
    with pytest.raises(ConfigError, match="Undeclared has no attribute per_restart; expected the names"):
        replace(attack, optimizer=Undeclared())
    assert replace(attack, optimizer=Undeclared(), prune=False)(tiny, seen).status == "max_steps"


def test_frames_show_the_leader_of_a_halved_run(tiny, seen):
    frames = iv.Frames(every=5)
    found = iv.GradientMatching(steps=20, restarts=4, prune=True)(tiny, seen, callback=frames)
    assert frames.steps == [0, 5, 10, 15, 20]
    torch.testing.assert_close(frames.images[-1], found.images)


class Small:
    """An engine on a device that holds so many restarts at once."""

    def __init__(self, monkeypatch, room):
        self.sizes = []
        make = selection.build

        def measure(engine, problem):
            step = make(engine, problem)

            def evaluate(values, *how, **more):
                self.sizes.append(len(values[0]))
                if len(values[0]) > room:
                    raise torch.OutOfMemoryError("out of memory")
                return step(values, *how, **more)

            return evaluate

        monkeypatch.setattr(selection, "build", measure)


@pytest.mark.parametrize("prune", [False, True])
def test_restarts_that_do_not_fit_are_halved_and_go_on(monkeypatch, prune):
    net = build_tiny(torch.float64)
    x, y = random_batch(dtype=torch.float64)
    seen = iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10)
    attack = iv.GradientMatching(steps=10, restarts=5, prune=prune, record_every=1)
    whole = attack(net, seen)
    device = Small(monkeypatch, room=2)
    split = attack(net, seen)
    torch.testing.assert_close(split.trials, whole.trials)
    torch.testing.assert_close(split.history.cost, whole.history.cost, equal_nan=True)
    assert split.evaluations == whole.evaluations
    assert device.sizes[:3] == [5, 2, 2] if not prune else device.sizes[:2] == [5, 2]
    assert device.sizes.count(5) == 1  # what did not fit is not tried again
    assert split.engine_reason == whole.engine_reason + ", halved where they did not fit in memory"


def test_what_a_step_held_is_gone_before_its_restarts_are_halved(monkeypatch, tiny, seen):
    make, part, held, left = selection.build, state_module.select, [], []

    def measure(engine, problem):
        step = make(engine, problem)

        def evaluate(values, *how, **more):
            mine = values[0].clone()
            if len(mine) > 2:
                held.append(weakref.ref(mine))
                raise torch.OutOfMemoryError("out of memory")
            return step(values, *how, **more)

        return evaluate

    def watched(settings, state, places):
        left.append(held[-1]())
        return part(settings, state, places)

    monkeypatch.setattr(selection, "build", measure)
    monkeypatch.setattr(run, "select", watched)
    iv.GradientMatching(steps=1, restarts=4)(tiny, seen)
    assert left == [None, None]


def test_one_restart_that_does_not_fit_is_an_error(monkeypatch, tiny, seen):
    Small(monkeypatch, room=0)
    with pytest.raises(torch.OutOfMemoryError):
        iv.GradientMatching(steps=2, restarts=4)(tiny, seen)


def many(dtype=torch.float64, client=None, count=3, **facts):
    net = build_tiny(dtype)
    seen = []
    for seed in range(count):
        x, y = random_batch(2, seed=seed, dtype=dtype)
        seen.append(iv.observe(net, x, y, client or iv.FedSGD(), normalization=iv.CIFAR10, **facts))
    return net, seen


@pytest.mark.parametrize("engine", ["auto", "eager"])
@pytest.mark.parametrize(
    "settings", [{}, {"restarts": 2}, {"restarts": 2, "chunk": 3}, {"labels": "optimize"}], ids=str
)
@pytest.mark.parametrize("client", [iv.FedSGD(), iv.FedAvg(lr=0.1, local_steps=2, batch_size=1)], ids=str)
def test_many_observations_together_are_each_as_if_alone(client, settings, engine):
    net, seen = many(client=client)
    attack = iv.GradientMatching(steps=6, record_every=2, engine=engine, **settings)
    generators = [torch.Generator().manual_seed(k) for k in range(3)]
    together = iv.attack_many(attack, net, seen, generators=generators)
    for one, alone in zip(together, one_by_one(attack, net, seen), strict=True):
        assert_same(one, alone)


def one_by_one(attack, net, seen):
    return [attack(net, one, generator=torch.Generator().manual_seed(k)) for k, one in enumerate(seen)]


def assert_same(one, alone):
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-9, equal_nan=True)
    close(one.trials, alone.trials)
    close(one.images, alone.images)
    close(one.trial_scores, alone.trial_scores)
    assert one.history.steps == alone.history.steps
    close(one.history.cost, alone.history.cost)
    close(one.history.objective, alone.history.objective)
    assert one.evaluations == alone.evaluations
    assert one.status == alone.status
    assert torch.equal(one.labels, alone.labels)


def together_with_sizes(monkeypatch, attack, net, seen):
    """Attack together, and return beside the results how many restarts each step took."""
    device = Small(monkeypatch, room=100)
    generators = [torch.Generator().manual_seed(k) for k in range(len(seen))]
    return iv.attack_many(attack, net, seen, generators=generators), device.sizes


@pytest.mark.parametrize("settings", [{}, {"chunk": 5}, {"engine": "eager"}, {"keep": "last"}], ids=str)
def test_each_of_many_observations_keeps_its_own_best(monkeypatch, settings):
    net, seen = many()
    attack = iv.GradientMatching(steps=30, restarts=4, prune=True, record_every=2, **settings)
    alone = one_by_one(attack, net, seen)
    together, sizes = together_with_sizes(monkeypatch, attack, net, seen)
    for one, expected in zip(together, alone, strict=True):
        assert_same(one, expected)
    if "chunk" not in settings:
        assert sizes == [12] * 3 + [6] * 3 + [3] * 25


def test_many_observations_of_which_some_are_not_finite(monkeypatch):
    net, seen = many()
    broken = {name: torch.full_like(part, 1e200) for name, part in seen[1].update.items()}
    seen[1] = replace(seen[1], update=broken)  # whose square is too large
    attack = iv.GradientMatching(steps=30, restarts=2, prune=True, objective=iv.objectives.l2, patience=4)
    monkeypatch.setattr(run, "CHECK_EVERY", 2)
    alone = one_by_one(attack, net, seen)
    assert [one.status for one in alone] == ["max_steps", "non_finite", "max_steps"]
    together, _ = together_with_sizes(monkeypatch, attack, net, seen)
    for one, expected in zip(together, alone, strict=True):
        assert_same(one, expected)


@pytest.mark.parametrize("early", [{"tolerance": 10.0}, {"patience": 2}], ids=str)
@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_an_attack_that_stops_early_runs_one_observation_after_another(monkeypatch, early, chunk):
    monkeypatch.setattr(run, "CHECK_EVERY", 2)
    net, seen = many()
    adam = {"optimizer": iv.Adam(signed=True, lr=0.5), "decay": None}
    attack = iv.GradientMatching(steps=60, restarts=3, record_every=1, chunk=chunk, **early, **adam)
    alone = one_by_one(attack, net, seen)
    assert "converged" in {one.status for one in alone}
    if "tolerance" in early:  # any restart is good enough, so that no other one runs
        ran = chunk or 3
        assert all(
            one.trial_scores.isfinite().tolist() == [True] * ran + [False] * (3 - ran) for one in alone
        )
    together, sizes = together_with_sizes(monkeypatch, attack, net, seen)
    for one, expected in zip(together, alone, strict=True):
        assert_same(one, expected)
    assert sum(sizes) == sum(one.evaluations - attack.restarts for one in alone)


def test_a_restart_that_is_good_enough_ends_those_that_have_begun(monkeypatch):
    """With a chunk for each restart, the first reaches the tolerance when all of them have begun."""
    monkeypatch.setattr(run, "CHECK_EVERY", 2)
    net, [seen, *_] = many()
    attack = iv.GradientMatching(steps=100, restarts=4, chunk=1, prune=True, record_every=1)
    lowest = attack(net, seen).history.objective[:11].nan_to_num(torch.inf).min()
    first = attack(net, seen).history.objective[:11, :].nan_to_num(torch.inf).amin(0)
    assert first.argmin() != 0
    found = replace(attack, tolerance=float(lowest))(net, seen)
    assert found.status == "converged"
    assert found.evaluations <= 4 * 12 + 4  # of 180


@pytest.mark.parametrize(
    ("restarts", "chunk", "sizes"),
    [(2, 4, [4, 2]), (2, 5, [4, 2]), (2, 1, [1] * 6), (3, 2, [2, 1] * 3), (3, None, [9]), (3, 100, [9])],
)
def test_a_chunk_ends_where_an_observation_does(monkeypatch, restarts, chunk, sizes):
    net, seen = many()
    attack = iv.GradientMatching(steps=1, restarts=restarts, chunk=chunk)
    _, found = together_with_sizes(monkeypatch, attack, net, seen)
    assert found == [size for size in sizes for _ in range(2)]


def test_many_observations_whose_labels_are_inferred():
    net, seen = many(reveal_labels=False)
    found = iv.attack_many(iv.GradientMatching(steps=2), net, seen)
    for one, observation in zip(found, seen, strict=True):
        assert torch.equal(one.labels, iv.labels.infer(net, observation).labels)


def test_many_observations_with_an_optimizer_that_takes_one_at_a_time():
    net, seen = many()
    attack = iv.GradientMatching(steps=2, optimizer=iv.LBFGS(max_iter=2))
    for one, observation in zip(iv.attack_many(attack, net, seen), seen, strict=True):
        assert torch.equal(one.images, attack(net, observation).images)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init": torch.zeros(2, 3, 8, 8)}, "init is a tensor"),
        ({"layers": iv.Layers(which="largest", count=2)}, "layers are the largest"),
    ],
)
def test_what_many_observations_cannot_have_is_said(settings, words):
    net, seen = many()
    with pytest.raises(ConfigError, match=words):
        iv.attack_many(iv.GradientMatching(**settings), net, seen)


def test_observations_that_differ_are_refused():
    net, seen = many()
    attack = iv.GradientMatching(steps=1)
    with pytest.raises(ConfigError, match="observation 1 has protocol FedAvg"):
        iv.attack_many(attack, net, [seen[0], replace(seen[1], protocol=iv.FedAvg(lr=0.1, local_steps=1))])
    with pytest.raises(ConfigError, match="observations is empty"):
        iv.attack_many(attack, net, [])
    with pytest.raises(ConfigError, match="generators has 1 entries; expected one for each of 3"):
        iv.attack_many(attack, net, seen, generators=[torch.Generator()])
