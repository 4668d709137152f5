"""The paper's experiments, run again: ``python -m invlib experiment NAME``, and tables from the records.

Each experiment is a list of cases. An attack on one client in one case makes one row of the record, a file of
JSON lines that grows by whole rows alone: a run that was killed goes on where it was. Tables and figures are
made from the record, without data set or network.
"""

from invlib.attacks.base import Attack
from invlib.experiments.cases import Case, Experiment, Setup, Size
from invlib.experiments.catalog import EXPERIMENTS, get
from invlib.experiments.figures import curve, figure
from invlib.experiments.report import Table, table
from invlib.experiments.runner import run

__all__ = [
    "EXPERIMENTS",
    "Attack",
    "Case",
    "Experiment",
    "Setup",
    "Size",
    "Table",
    "curve",
    "figure",
    "get",
    "run",
    "table",
]
