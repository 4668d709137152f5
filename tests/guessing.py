"""A worker of an experiment that guesses, and fails as its argument says; see test_experiments_team.py.

Started without a rank it makes all workers by forking, prints their exit statuses, and leaves their words in
files. In every fault worker 0 is in an attack that never ends, and worker 1 has made one row.

With ``share`` three workers have two attacks with five restarts, and each writes which of them it ran; with
``share and kill`` worker 1 kills itself in the second.
"""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch._dynamo  # the client's gradient needs it, and before the fork it is imported once

from invlib import cli, errors, inverting_gradients, metrics
from invlib._group import Group
from invlib.experiments import _judge
from invlib.experiments._networks import Networks
from tests.test_experiments_run import Guess, register


def wait(until=lambda: False):
    while not until():
        time.sleep(0.05)


class Odd(Guess):
    made = 0

    def __call__(self, *args, **kwargs):
        rank, fault = int(os.environ["RANK"]), sys.argv[1]
        began = [Path(f"{fault}{k}") for k in range(2)]
        began[rank].write_text(str(os.getpid()))
        if fault == "none":
            wait(began[1 - rank].exists)  # both have work to do, or none ends
        elif rank == 0 and fault == "kill0":
            wait(Path("second").exists)
            os.kill(os.getpid(), signal.SIGKILL)
        elif rank == 0:
            wait()
        elif Odd.made == 1:
            Path("second").touch()
            wait(lambda: began[0].exists() and began[0].read_text())
            if fault == "kill1":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "raise":
                raise errors.DataError("the disk is on fire")
            if fault == "interrupt":
                for one in reversed(began):
                    os.kill(int(one.read_text()), signal.SIGINT)
            wait()
        Odd.made += 1
        return super().__call__(*args, **kwargs)


SEARCH = inverting_gradients(steps=4, restarts=5, prune=True)


def watch_groups():
    """Write down which restarts this worker runs, and die in the second attack where that is asked for."""
    rank, advance, begun = int(os.environ["RANK"]), Group.advance, []

    def watched(group):
        if group.step == 0:
            begun.append(group.rows)
        Path(f"rows{rank}").write_text(str(begun[0]))
        if len(begun) == 2 and rank == 1 and sys.argv[1] == "share and kill":
            os.kill(os.getpid(), signal.SIGKILL)
        advance(group)

    Group.advance = watched


def main():
    torch.set_num_threads(1)
    Networks.judge = _judge.similarity = lambda *_: None
    metrics.ssim = lambda images, truth: torch.zeros(len(images))
    if sys.argv[1].startswith("share"):
        watch_groups()
        register(pytest.MonkeyPatch(), search=SEARCH)
    else:
        Odd.__name__ = Odd.__qualname__ = "Guess"  # its settings are those of a plain guess
        register(pytest.MonkeyPatch(), dark=Odd(level=0.2), light=Odd(level=0.8))
    return cli.main(["experiment", "guess", "--device", "cpu"])


def fork(rank):
    """Go on as a worker, and return its process to the parent."""
    pid = os.fork()
    if pid:
        return pid
    os.environ["RANK"] = str(rank)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    sys.exit(main())


if __name__ == "__main__":
    if "RANK" in os.environ:
        sys.exit(main())
    for pid in [fork(rank) for rank in range(int(os.environ["WORLD_SIZE"]))]:
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
