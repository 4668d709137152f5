"""Measure how often a client's check before sending is alarmed by networks that nobody has made for it.

Usage: python -m tests.benchmarks.alarms --out results/presend-alarms.jsonl

It needs CIFAR-10 (INVLIB_DATA). An image that is read off is no false alarm, for it is compared with the
client's own; what counts is an alarm without one.
"""

import argparse
import json
import warnings
from collections import Counter
from pathlib import Path

import torch

import invlib as iv

NETWORKS = {"ConvNet8": "cifar10", "LeNetZhu": "cifar10", "ResNet20": "cifar10", "ViT": "cifar10"}
BATCHES, COUNT, FIRST = 50, 8, 1000


def main() -> None:
    """Check the batches and write a line for each network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", iv.errors.DoubtWarning)
    images, labels = iv.data.load("CIFAR10", split="train")
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for name, weights in NETWORKS.items():
            for trained in (True, False):
                model = iv.models.build(name, weights=weights) if trained else iv.models.build(name, seed=0)
                actions, read, false = Counter(), 0, 0
                for k in range(FIRST, FIRST + BATCHES * COUNT, COUNT):
                    rows = slice(k, k + COUNT)
                    found = iv.presend(model, images[rows], labels[rows], normalization=iv.CIFAR10)
                    actions[found.action] += 1
                    read += int(found.leaks.sum())
                    false += found.action != "send" and not found.leaks.any()
                row = {"network": name, "trained": trained, "batches": BATCHES, "images": COUNT}
                row |= {"read off": read, "false": false, **actions}
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(row, flush=True)


if __name__ == "__main__":
    main()
