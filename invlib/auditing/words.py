"""The words of a report, fixed, so that programs and people may rely on them; and one finding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from invlib.errors import ConfigError

# What a statement is of. One finding is of one kind.
Kind = Literal[
    "read off the update",  # what it says by itself
    "found by an attack",  # a lower bound on the risk
    "cannot be told apart",  # an upper bound for one pair of images, whoever attacks
    "bounded for everybody",  # an upper bound, on average over what the record may be
    "local diagnostic",  # describes, near one image, and bounds nothing
]
Verdict = Literal[
    "recovered and certified",  # proved without the truth
    "identified",  # the truth was given: the right one among the candidates
    "probably recovered",  # without the truth: no wrong picture scores like that on this network
    "partly",  # some images of the batch, or some of what is in them
    "not found with this budget (no proof of safety)",
    "bounded",
    "read off",
    "nothing found",  # looked for, and not there
    "explains the failure",
    "would help",  # a defence, tried on this update
    "would not help",
    "does not fit",  # no client of this kind with this model sends that
    "not tried",
]
NOT_FOUND: Verdict = "not found with this budget (no proof of safety)"
# From the worst on: what a whole report says is the first that one of its parts says.
RANKING: tuple[Verdict, ...] = (
    "recovered and certified",
    "identified",
    "probably recovered",
    "partly",
    "does not fit",
    NOT_FOUND,
    "not tried",
)
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
KINDS: tuple[Kind, ...] = get_args(Kind)

Number = float | int | str | bool | None | list[float] | list[int] | list[str]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One statement of a report.

    Args:
        name: a short title.
        kind: what the statement is of.
        verdict: one of the fixed words.
        text: a few plain sentences, with the numbers that matter.
        numbers: what the text rests on, for programs.
        advice: what to try, or to do.
        certified: whether it was proved without the truth; None where that was not asked.

    Raises:
        ConfigError: the kind or the verdict is none of the fixed words.
    """

    name: str
    kind: Kind
    verdict: Verdict
    text: str
    numbers: Mapping[str, Number] = field(default_factory=dict)
    advice: str = ""
    certified: bool | None = None

    def __post_init__(self) -> None:
        for name, words in (("kind", KINDS), ("verdict", VERDICTS)):
            if getattr(self, name) not in words:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}; expected one of {', '.join(map(repr, words))}"
                )


def worst(findings: tuple[Finding, ...] | list[Finding]) -> Verdict:
    """Return the first verdict of `RANKING` that a finding has; ``"not tried"`` where none has one."""
    said = {finding.verdict for finding in findings}
    return next((verdict for verdict in RANKING if verdict in said), "not tried")
