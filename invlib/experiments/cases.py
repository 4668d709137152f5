"""What an experiment is made of: its cases as data, and its two sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from invlib.attacks.base import Attack
from invlib.core.normalization import Normalization
from invlib.core.observation import ClientStep
from invlib.federated import FedSGD

# how a client runs its network, and whether it sends what batch norm kept
Mode = Literal["evaluation", "training", "training, buffers withheld"]
# (plan of the run, case, number of the first private image, seed) -> what a row says of one client
Measure = Callable[[Any, "Case", int, int], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a form of an experiment is.

    Args:
        images: clients that are attacked in each case.
        steps: network evaluations of each restart.
        restarts: starting points of each attack.
    """

    images: int
    steps: int
    restarts: int = 1


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What an experiment may build its cases from.

    Args:
        steps: network evaluations of each restart.
        restarts: starting points of each attack.
        reduced: whether the networks of the reduced form are wanted.
        slug: the data set's short name, which trained weights carry (``"cifar10"`` for the patches too).
    """

    steps: int
    restarts: int
    reduced: bool
    slug: str


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of an experiment's table: a network, a client and an attack on what it sends.

    Args:
        columns: what the row is called, heading → word; together they name the case.
        network: a name that `invlib.models.build` knows.
        attack: called with the model, the observation and a generator.
        weights: the slug of trained weights; None for an untrained network, another one for each client.
        protocol: the client's step.
        images: private images of one client.
        reveal_labels: whether the server is told the labels.
        num_classes: outputs of an untrained network; the data set's where None.
        labels: what labels of the data set are called by this network, where it has other classes.
        normalization: how the client encodes images, where neither model card nor data set says it right.
        paper: what the paper has in this place, to be printed beside it.
        sweep: where the experiment sweeps a setting, the number on the horizontal axis.
        series: which line of the figure the number belongs to.
        measure: makes client and network by itself, attacks and compares; None does as for every search.
        clients: at most how many are attacked; None as many as the form has.
        text: whether a client has sentences in the place of images.
        mode: ``"evaluation"``, ``"training"``, or ``"training, buffers withheld"``, where the client does
            not send its batch-norm statistics.
    """

    columns: Mapping[str, str]
    network: str
    attack: Attack
    weights: str | None = None
    protocol: ClientStep = field(default_factory=FedSGD)
    images: int = 1
    reveal_labels: bool = True
    num_classes: int | None = None
    labels: Mapping[int, int] = field(default_factory=dict)
    normalization: Normalization | None = None
    paper: str | None = None
    sweep: float | None = None
    series: str = ""
    measure: Measure | None = None
    clients: int | None = None
    text: bool = False
    mode: Mode = "evaluation"

    @property
    def name(self) -> str:
        """The words of all columns, which name the case within its experiment."""
        return ", ".join(self.columns.values())


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A named list of cases, in a full and a reduced form.

    Args:
        title: what is asked, in a line.
        cases: makes the cases of a form.
        full: the size that the results are meant to have.
        reduced: a size that two CPU cores finish in 20 minutes.
        dataset: the data set where none is named; ``"auto"`` is CIFAR10, or else the patches.
        notes: sentences under the table: what a reader must know to read it.
        axis: the name of the swept setting; empty where there is none.
        log: whether its axis is logarithmic.
    """

    title: str
    cases: Callable[[Setup], Sequence[Case]]
    full: Size
    reduced: Size
    dataset: str = "auto"
    notes: tuple[str, ...] = ()
    axis: str = ""
    log: bool = False
