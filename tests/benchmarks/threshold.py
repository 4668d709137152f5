"""Measure how often a search below the audit's threshold identifies its image, and one above it does not.

Usage: python -m tests.benchmarks.threshold --out results/audit-threshold.jsonl

It needs CIFAR-10 (INVLIB_DATA); images 1000 to 1003 were used to choose nothing.
"""

import argparse
import json
import warnings
from pathlib import Path

import torch

import invlib as iv
from invlib.auditing.tried import LIKELY, Subject, candidates_like, wrong_pictures
from invlib.metrics.identification import by_ssim

NETWORKS = {
    "LeNetZhu": iv.FedAvg(lr=0.01, local_steps=4),
    "ResNet20": iv.FedSGD(),
    "ConvNet8": iv.FedSGD(),
}
EVALUATIONS, IMAGES, POOL = (15, 60, 250), range(1000, 1004), range(1100, 1200)


def main() -> None:
    """Run the searches and write a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", iv.errors.DoubtWarning)
    images, labels = iv.data.load("CIFAR10", split="train")
    pool = images[list(POOL)]
    rows = []
    for name, client in NETWORKS.items():
        model = iv.models.build(name, weights="cifar10").eval()
        for evaluations in EVALUATIONS:
            for k in IMAGES:
                image = images[k : k + 1]
                seen = iv.observe(
                    model, image, labels[k : k + 1], client, normalization=iv.CIFAR10, reveal_labels=False
                )
                found = iv.best(evaluations=evaluations)(model, seen)
                subject = Subject(model=model, observation=seen, truth=None, candidates=candidates_like(seen))
                distance, wrong = wrong_pictures(subject, found)
                least = min(wrong["noise"], wrong["photographs"])
                identified = iv.identifiability(found.images, image, pool, likeness=by_ssim)
                rows.append(
                    {
                        "network": name,
                        "evaluations": evaluations,
                        "image": k,
                        "ratio": distance / least,
                        "below": distance < LIKELY * least and distance < wrong["shifted copies"],
                        "identified": identified.hits,
                        "candidates": identified.candidates,
                        "psnr": iv.evaluate(found, image).mean_psnr,
                    }
                )
                print(rows[-1], flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
