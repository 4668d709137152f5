"""Ctrl-C at any evaluation leaves result and checkpoint between two steps, from where the run goes on."""

import signal
import threading
from dataclasses import replace

import pytest
import torch

import invlib as iv
from invlib.search.interrupt import held


def press() -> int:
    signal.raise_signal(signal.SIGINT)
    return 0


def press_twice() -> None:
    press()
    press()


def raise_it() -> None:
    raise KeyboardInterrupt


class Keyboard:
    """Does something at an evaluation of `watched`, counted from 1."""

    at, do, count = 0, staticmethod(press), 0

    @classmethod
    def will(cls, do, at):
        cls.at, cls.do, cls.count = at, staticmethod(do), 0


def watched(candidate, target):
    Keyboard.count += 1
    if Keyboard.count == Keyboard.at:
        Keyboard.do()
    return iv.objectives.cosine(candidate, target)


ATTACKS = {
    "Adam": iv.GradientMatching(steps=8, restarts=4),
    "SGD": iv.GradientMatching(optimizer=iv.SGD(), steps=8, restarts=4),
    "L-BFGS": iv.GradientMatching(optimizer=iv.LBFGS(max_iter=4), steps=4, restarts=2),
    "line search": iv.GradientMatching(
        optimizer=iv.LBFGS(max_iter=4, line_search="strong_wolfe"), steps=4, restarts=2
    ),
    "pruned": iv.GradientMatching(steps=10, restarts=4, chunk=3, prune=True, patience=3),
    "pruned L-BFGS": iv.GradientMatching(optimizer=iv.LBFGS(max_iter=3), steps=10, restarts=2, prune=True),
}


def same(found, whole):
    assert found.status == whole.status
    assert found.evaluations == whole.evaluations
    assert torch.equal(found.trials, whole.trials)
    assert found.history.steps == whole.history.steps
    torch.testing.assert_close(found.history.cost, whole.history.cost, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("do", [press, press_twice, raise_it], ids=lambda do: do.__name__)
@pytest.mark.parametrize("name", ATTACKS)
def test_a_run_that_was_interrupted_within_a_step_ends_as_if_nothing_had_been(
    tiny, seen, tmp_path, monkeypatch, name, do
):
    monkeypatch.setattr("invlib.search.run.CHECK_EVERY", 2)
    path, attack = tmp_path / "run.pt", replace(ATTACKS[name], objective=watched, record_every=1)
    Keyboard.will(press, 0)
    whole = attack(tiny, seen)
    last = Keyboard.count - attack.restarts  # what follows are the scores
    for at in (1, last // 2, last):
        Keyboard.will(do, at)
        cut = attack(tiny, seen, checkpoint=path)
        assert cut.status == "interrupted"
        assert cut.trials.isfinite().all()
        assert path.exists()
        Keyboard.will(press, 0)
        same(attack(tiny, seen, checkpoint=path), whole)
        assert list(tmp_path.iterdir()) == []
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_in_another_thread_keeps_its_last_whole_step(tiny, seen, tmp_path):
    path, attack = tmp_path / "run.pt", replace(ATTACKS["L-BFGS"], objective=watched)
    Keyboard.will(press, 0)
    whole, cut = attack(tiny, seen), []
    Keyboard.will(raise_it, 7)
    thread = threading.Thread(target=lambda: cut.append(attack(tiny, seen, checkpoint=path)))
    thread.start()
    thread.join()
    assert cut[0].status == "interrupted"
    same(attack(tiny, seen, checkpoint=path), whole)


def test_ctrl_c_while_results_are_scored_is_no_loss(tiny, seen, tmp_path):
    path, attack = tmp_path / "run.pt", replace(ATTACKS["Adam"], objective=watched)
    Keyboard.will(press, 0)
    whole = attack(tiny, seen)
    Keyboard.will(press, Keyboard.count)
    found = attack(tiny, seen, checkpoint=path)
    assert found.status == "interrupted"
    assert torch.equal(found.trial_scores, whole.trial_scores)


def test_a_handler_of_the_callers_own_is_called_when_the_step_is_whole_and_stays():
    told, during = [], []

    def mine(number, frame):
        told.append(number)

    before = signal.signal(signal.SIGINT, mine)
    try:
        with held():
            press()
            during.extend(told)
        assert (during, told) == ([], [signal.SIGINT])
        with pytest.raises(ZeroDivisionError), held():
            1 / press()
        assert len(told) == 2
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)
