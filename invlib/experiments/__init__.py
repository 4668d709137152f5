"""The paper's experiments, run again: ``python -m invlib experiment NAME``, and tables from the records.

Each experiment is a list of cases. An attack on one client in one case makes one row of the record, a file of
JSON lines that grows by whole rows alone: a run that was killed goes on where it was. Tables and figures are
made from the record, without data set or network.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from invlib.errors import ConfigError
from invlib.experiments import _report
from invlib.experiments._cases import Attack, Case, Experiment, Setup, Size
from invlib.experiments._catalog import EXPERIMENTS, get
from invlib.experiments._report import Table
from invlib.experiments._run import run

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

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def table(record: str | os.PathLike[str]) -> Table:
    """Return the table of a record: a line for each case, beside the floors and the paper's numbers.

    Args:
        record: the path of a ``.jsonl`` file, or the name of an experiment whose record comes with invlib.

    Raises:
        DataError: the record is missing, broken or empty.
    """
    return _report.build(_report.read(record), EXPERIMENTS, str(record))


def figure(record: str | os.PathLike[str], *, columns: int = 4, curve: bool = True) -> Figure:
    """Draw the originals and what each case made of them, and the PSNR over a setting that is swept.

    Args:
        record: as for `table`.
        columns: how many images.
        curve: whether the PSNR is drawn below the pictures where a setting is swept.

    Raises:
        DataError: the record is missing, broken or empty, or has no pictures.
        ConfigError: columns is not positive.

    Taught in: chapter 3
    """
    from invlib.experiments import _figures  # late: matplotlib is not needed for a table

    if columns < 1:
        raise ConfigError(f"columns is {columns}; expected at least 1")
    return _figures.build(_report.read(record), EXPERIMENTS, columns, str(record), curve)


def curve(record: str | os.PathLike[str]) -> Figure:
    """Draw the PSNR over the setting that an experiment sweeps.

    Args:
        record: as for `table`; it needs no pictures.

    Raises:
        DataError: the record is missing, broken or empty, or sweeps no setting.
    """
    from invlib.experiments import _figures

    return _figures.build_curve(_report.read(record), EXPERIMENTS, str(record))
