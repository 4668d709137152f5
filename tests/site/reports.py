"""Reports of an audit that are made up, with every word that one can have; the pages made of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from invlib.auditing.report import AuditReport
from invlib.auditing.words import KINDS, NOT_FOUND, VERDICTS, Finding

LONG = "encoder.layers.11.self_attention.output_projection.weight_orig_without_any_place_to_break"
SCOPE = {
    "model": "LeNetZhu",
    "parameters": 15_826,
    "images": "4 of 3×32×32",
    "client": "FedAvg(lr=0.01, local_steps=2, batch_size=2)",
    "training_mode": False,
    "threat": "B",
    "invlib": "2.0.0",
    "seed": 0,
    "seconds": 173.4,
    "budget": 240.0,
    "noise": None,
}
# Part of the report: the kinds and verdicts that belong there.
_WORDS = {
    "leaks": (("read off the update",), ("read off", "nothing found", "does not fit")),
    "attacks": (
        ("found by an attack",),
        ("recovered and certified", "identified", "probably recovered", "partly", NOT_FOUND, "not tried"),
    ),
    "reasons": (("local diagnostic", "cannot be told apart"), ("explains the failure", "nothing found")),
    "defences": (("bounded for everybody", "local diagnostic"), ("bounded", "would help", "would not help")),
}


def finding(verdict: Any, kind: Any, **changes: Any) -> Finding:
    """Return a finding of a kind, with numbers of each type."""
    return Finding(
        **{
            "name": f"A check that ends as “{verdict}”",
            "kind": kind,
            "verdict": verdict,
            "text": "The gradient of fc.weight has rank 4, so that the update is of 4 images. Their labels "
            "are 3, 3, 5 and 8: each of these rows is negative, and no other is.",
            "numbers": {
                "layer": LONG,
                "rank": 4,
                "largest_number": 1_234_567,
                "score": 3.2e-9,
                "noise": None,
                "labels": [3, 3, 5, 8],
                "singular_values": [10.0**-k for k in range(20)],
                "exact": True,
            },
            "advice": "Average the update over more clients before anyone sees it (secure aggregation).",
            "certified": {"recovered and certified": True, "identified": False}.get(verdict),
        }
        | changes
    )


def report(**changes: Any) -> AuditReport:
    """Return a report that has every verdict and every kind."""
    parts = {
        part: tuple(finding(word, kinds[k % len(kinds)]) for k, word in enumerate(words))
        for part, (kinds, words) in _WORDS.items()
    }
    found = [each for part in parts.values() for each in part]
    assert {each.verdict for each in found} == {*VERDICTS}
    assert {each.kind for each in found} == {*KINDS}
    return replace(
        AuditReport(
            verdict="recovered and certified",
            summary=(
                "Whoever receives this update can compute all four images in it, in under a second.",
                "The update proves it: the client's step on the computed images gives the same numbers.",
                "Noise with a multiplier of 0.8 on this update would have stopped what was tried.",
            ),
            scope=SCOPE,
            **parts,
            not_tried=(
                "a server that changes the model before it sends it",
                "several rounds of the same client",
            ),
            pictures={
                "recovered": torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
                "private": torch.rand(2, 1, 120, 160, generator=torch.Generator().manual_seed(1)),
            },
        ),
        **changes,
    )


def short(verdict: Any) -> AuditReport:
    """Return a report of one attack with a verdict."""
    bounded = verdict == "bounded"
    found = finding(verdict, "bounded for everybody" if bounded else "found by an attack", numbers={})
    empty = dict.fromkeys(_WORDS, ())
    return report(**empty | {"defences" if bounded else "attacks": (found,)}, verdict=verdict, not_tried=())


def write(folder: Path) -> list[Path]:
    """Write pages into a folder: with all words, partial, and whole verdicts of the other colours."""
    named = {"all": report(), "partial": report(complete=False, leaks=(), pictures={})}
    named |= {"not-found": short(NOT_FOUND), "bounded": short("bounded")}
    pages = []
    for name, made in named.items():
        pages.append(folder / f"audit-{name}.html")
        pages[-1].write_text(made.to_html(pictures=True), encoding="utf-8")
    return pages
