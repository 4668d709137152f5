"""Tables and figures, made from a record."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from invlib.errors import ConfigError
from invlib.experiments import report
from invlib.experiments.catalog import EXPERIMENTS
from invlib.experiments.report import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def table(record: str | os.PathLike[str]) -> Table:
    """Return the table of a record: a line for each case, beside the floors and the paper's numbers.

    Args:
        record: the path of a ``.jsonl`` file, or the name of an experiment whose record comes with invlib.

    Raises:
        DataError: the record is missing, broken or empty.
    """
    return report.build(report.read(record), EXPERIMENTS, str(record))


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
    from invlib.experiments import figures  # late: matplotlib is not needed for a table

    if columns < 1:
        raise ConfigError(f"columns is {columns}; expected at least 1")
    return figures.build(report.read(record), EXPERIMENTS, columns, str(record), curve)


def curve(record: str | os.PathLike[str]) -> Figure:
    """Draw the PSNR over the setting that an experiment sweeps.

    Args:
        record: as for `table`; it needs no pictures.

    Raises:
        DataError: the record is missing, broken or empty, or sweeps no setting.
    """
    from invlib.experiments import figures

    return figures.build_curve(report.read(record), EXPERIMENTS, str(record))
