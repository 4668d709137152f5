"""Several processes for one attack: the result of one, and what ends them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import invlib as iv
from invlib import _spread
from invlib.errors import ConfigError
from tests import sharing

ROOT = str(Path(__file__).parents[1])
posix = pytest.mark.skipif(os.name != "posix", reason="makes processes by forking")


def run(folder, *argv):
    """Run the workers of sharing.py in a folder, and return their exit statuses."""
    done = subprocess.run(
        [sys.executable, str(Path(sharing.__file__)), *map(str, argv)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return [int(status) for status in done.stdout.split()]


@pytest.fixture(scope="module")
def alone():
    return sharing.results()


@posix
@pytest.mark.parametrize("size", [2, 3])
def test_workers_find_what_one_process_finds(tmp_path, alone, size):
    assert run(tmp_path, size, "share") == [0] * size
    for rank in range(size):
        shared = torch.load(tmp_path / f"found{rank}.pt", weights_only=False)
        assert list(shared) == list(alone)
        for name in alone:
            for one, expected in zip(shared[name], alone[name], strict=True):
                assert_same(one, expected, name)
                assert one.engine.endswith(f", spread over {size} workers")


def assert_same(one, expected, name):
    def close(left, right):
        torch.testing.assert_close(
            left, right, rtol=1e-5, atol=1e-9, equal_nan=True, msg=lambda m: f"{name}: {m}"
        )

    close(one.trials, expected.trials)
    close(one.images, expected.images)
    close(one.trial_scores, expected.trial_scores)
    close(one.history.cost, expected.history.cost)
    close(one.history.objective, expected.history.objective)
    assert one.history.steps == expected.history.steps
    assert one.evaluations == expected.evaluations
    assert one.status == expected.status
    assert torch.equal(one.labels, expected.labels)


@posix
def test_some_of_the_workers_are_a_group(tmp_path, alone):
    assert run(tmp_path, 3, "group") == [0] * 3
    for rank, words in enumerate(["", ", spread over 2 workers", ", spread over 2 workers"]):
        found = torch.load(tmp_path / f"found{rank}.pt", weights_only=False)
        assert_same(found, alone["plain"][0], f"worker {rank}")
        assert found.engine.partition(" parameters")[2] == words


@posix
def test_the_first_of_the_killed_workers_is_named_by_all_that_are_left(tmp_path):
    assert run(tmp_path, 4, "kill") == [0, -9, -9, 0]
    for rank in (0, 3):
        words = (tmp_path / f"raised{rank}").read_text()
        assert re.match(r"WorkerError: worker 1 \(process \d+ on .+\) ended before its share", words), words


@posix
def test_workers_that_differ_are_refused(tmp_path):
    assert run(tmp_path, 2, "differ") == [0, 0]
    both = [torch.load(tmp_path / f"found{rank}.pt") for rank in range(2)]
    assert both[0] == both[1]
    restarts, starts, call = both[0]
    assert restarts.startswith("worker 1 runs another attack than worker 0")
    assert starts == restarts
    assert re.match(r"worker 1 \(process \d+ on .+\) makes another call than worker 0", call)


class Alone:
    """A team of one."""

    rank, size = 0, 1

    def total(self, mine):
        assert mine.dtype == torch.float64
        return mine.clone()


@pytest.mark.parametrize(
    ("settings", "more", "words"),
    [
        ({"tolerance": 0.1}, {}, "has tolerance where"),
        ({"patience": 3}, {"checkpoint": "run.pt"}, "has checkpoint and patience where"),
        ({}, {"callback": lambda progress: None}, "has callback where"),
    ],
)
def test_what_cannot_be_shared_is_said(tiny, seen, settings, more, words):
    with _spread.spread_over(Alone()), pytest.raises(ConfigError, match=words):
        iv.GradientMatching(steps=1, **settings)(tiny, seen, **more)


def test_ctrl_c_is_not_swallowed(tiny, seen, monkeypatch):
    def interrupted(group):
        raise KeyboardInterrupt

    monkeypatch.setattr("invlib._group.Group.advance", interrupted)
    attack = iv.GradientMatching(steps=1)
    assert attack(tiny, seen).status == "interrupted"
    with _spread.spread_over(Alone()), pytest.raises(KeyboardInterrupt):
        attack(tiny, seen)


def test_without_a_group_nothing_is_shared(monkeypatch):
    with (
        pytest.raises(ConfigError, match=r"has no group of processes; expected torchrun"),
        iv.spread_restarts(),
    ):
        pass
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 3 if group is None else -1)
    with pytest.raises(ConfigError, match="process 3 is not in the group"), iv.spread_restarts(object()):
        pass
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(dist, "get_backend_config", lambda group=None: "cuda:nccl")
    with pytest.raises(ConfigError, match=r"backend is cuda:nccl, .* expected gloo"), iv.spread_restarts():
        pass
    assert _spread.workers() is None
