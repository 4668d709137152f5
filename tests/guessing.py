"""A worker of an experiment that guesses, and fails as its argument says; see test_experiments_team.py.

Started without a rank it makes both workers by forking, prints their exit statuses, and leaves their words in
files. In every fault worker 0 is in an attack that never ends, and worker 1 has made one row.
"""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch._dynamo  # the client's gradient needs it, and before the fork it is imported once

from invlib import cli, errors, metrics
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
            wait(lambda: Path("results/guess.jsonl").read_bytes())
            os.kill(os.getpid(), signal.SIGKILL)
        elif rank == 0:
            wait()
        elif Odd.made == 1:
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


def main():
    torch.set_num_threads(1)
    Networks.judge = _judge.similarity = lambda *_: None
    metrics.ssim = lambda images, truth: torch.zeros(len(images))
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
    for pid in [fork(0), fork(1)]:
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
