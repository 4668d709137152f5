"""Workers that share the restarts of attacks on a tiny network; see test_spreading.py.

Makes as many workers as its first argument says by forking, and waits for them. Each writes what it found to
``found{rank}.pt``, or what was raised to ``raised{rank}``.
"""

import os
import signal
import socket
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch._dynamo  # the client's gradient needs it, and before the fork it is imported once
import torch.distributed as dist

import invlib as iv
from invlib._group import Group
from tests.conftest import build_tiny, random_batch

BASE = iv.GradientMatching(steps=30, restarts=5, record_every=2)
ATTACKS = {
    "plain": BASE,
    "pruned": replace(BASE, prune=True),
    "pruned, in chunks, the last kept": replace(BASE, prune=True, chunk=2, keep="last"),
    "eager": replace(BASE, engine="eager", restarts=3, steps=5),
    "fewer restarts than workers": replace(BASE, restarts=1, steps=5),
    "L-BFGS": replace(BASE, optimizer=iv.LBFGS(max_iter=3), steps=6, prune=True),
    "labels": replace(BASE, labels="optimize", steps=10),
}


def scene():
    """Return a network and what the server saw of three clients."""
    net = build_tiny(torch.float64)
    seen = []
    for seed in range(3):
        x, y = random_batch(1, seed=seed, dtype=torch.float64)
        seen.append(iv.observe(net, x, y, iv.FedSGD(), normalization=iv.CIFAR10))
    return net, seen


def generators():
    return [torch.Generator().manual_seed(seed) for seed in range(3)]


def results():
    """Return what every attack finds, and what one finds of three clients together."""
    net, seen = scene()
    found = {name: [attack(net, seen[0])] for name, attack in ATTACKS.items()}
    found["three clients"] = ATTACKS["pruned"].together(net, seen, generators=generators())
    return found


def work(rank, what):
    net, (seen, *_) = scene()
    if what == "group":  # of the last two; the first is alone
        group = dist.new_group([1, 2])
        with iv.spread_restarts(group) if rank else nullcontext():
            return BASE(net, seen)
    with iv.spread_restarts():
        if what == "share":
            return results()
        if what == "differ":
            return [refused(partial(attack, net, seen)) for attack in different(rank)]
        if what == "kill" and rank in (1, 2):
            kill_at(10)
        return BASE(net, seen)


def different(rank):
    """Return attacks that are not the same in worker 1."""
    yield replace(BASE, restarts=5 + rank)
    yield lambda net, seen: BASE(net, seen, generator=torch.Generator().manual_seed(rank))
    yield replace(BASE, labels=("auto", "optimize")[rank])


def refused(call):
    try:
        call()
    except iv.errors.ConfigError as error:
        return str(error)


def kill_at(evaluation):
    """Let this process kill itself at an evaluation."""
    evaluate, count = Group.evaluate, []

    def killing(group, values):
        count.append(1)
        if len(count) == evaluation:
            os.kill(os.getpid(), signal.SIGKILL)
        return evaluate(group, values)

    Group.evaluate = killing


def worker(rank, size, port, what):
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
    }
    dist.init_process_group("gloo")
    try:
        torch.save(work(rank, what), f"found{rank}.pt")
    except iv.errors.InvlibError as error:
        Path(f"raised{rank}").write_text(f"{type(error).__name__}: {error}")
    else:
        dist.destroy_process_group()


if __name__ == "__main__":
    size, what = int(sys.argv[1]), sys.argv[2]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            worker(rank, size, port, what)
            sys.exit()
        children.append(pid)
    print(*[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])
