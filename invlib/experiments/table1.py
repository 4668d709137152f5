"""Table 1 of the paper: two attacks and this project's best, on two networks, untrained and trained."""

from __future__ import annotations

from invlib.experiments.attacks import ATTACKS
from invlib.experiments.cases import Case, Experiment, Setup, Size

# PSNR in dB, mean ± standard deviation: Geiping et al. 2020, arXiv 2003.14053, table 1.
_PAPER = {
    "LeNetZhu": {
        "l2 + L-BFGS": ("46.25 ± 12.66", "13.24 ± 5.44"),
        "cosine + signed Adam": ("18.00 ± 3.33", "18.08 ± 4.27"),
    },
    "ResNet20-4": {
        "l2 + L-BFGS": ("10.29 ± 5.38", "6.90 ± 2.80"),
        "cosine + signed Adam": ("19.83 ± 2.96", "13.95 ± 3.38"),
    },
}


def cases(setup: Setup) -> list[Case]:
    """Return the cases; the reduced form has ResNet20 in the place of ResNet20-4."""
    made = []
    for published in ("LeNetZhu", "ResNet20-4"):
        network = "ResNet20" if setup.reduced and published == "ResNet20-4" else published
        for trained in (False, True):
            for attack, make in ATTACKS.items():
                paper = _PAPER[published][attack][trained] if attack in _PAPER[published] else None
                if paper is not None and network != published:
                    paper = f"{paper} ({published})"
                made.append(
                    Case(
                        columns={
                            "network": network,
                            "weights": "trained" if trained else "untrained",
                            "attack": attack,
                        },
                        network=network,
                        weights=setup.slug if trained else None,
                        attack=make(steps=setup.steps, restarts=setup.restarts),
                        paper=paper,
                    )
                )
    return made


EXPERIMENT = Experiment(
    title="two published attacks and this project's best, on two networks, untrained and trained",
    cases=cases,
    full=Size(images=100, steps=4800),
    reduced=Size(images=4, steps=500),
    notes=(
        "Paper: Geiping et al. 2020, arXiv 2003.14053, table 1: 100 images of CIFAR-10, 4,800 steps, one "
        "restart.",
    ),
)
