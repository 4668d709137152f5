"""The figure of an experiment, made from its record alone: pictures of every case, and a curve."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from invlib.core.files import Row, unpng
from invlib.errors import ConfigError, DataError
from invlib.experiments.cases import Experiment
from invlib.experiments.catalog import EXPERIMENTS
from invlib.experiments.report import read
from invlib.viz.figure import COLOURS, MARKERS, WIDTH, as_images, show
from invlib.viz.figure import figure as styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAME_WIDTH = 1.8  # inches, for the names of the cases
_CURVE_HEIGHT = 3.0
# Inches: of small pictures, and of photographs, whose detail a small one would hide.
_MAX_SIDE, _MAX_SIDE_OF_PHOTOGRAPHS, _PHOTOGRAPH = 0.9, 2.6, 64
_CAPTION = 0.18  # inches, under each picture
_TALLEST = 6.8  # inches: a sheet of paper has to hold the figure and its caption
_SMALLEST = 0.3


@styled
def figure(record: str | os.PathLike[str], *, columns: int = 4, curve: bool = True) -> Figure:
    """Draw the originals and what each case made of them, and the PSNR over a setting that is swept.

    Args:
        record: as for `invlib.experiments.table`.
        columns: how many images.
        curve: whether the PSNR is drawn below the pictures where a setting is swept.

    Raises:
        DataError: the record is missing, broken or empty, or has no pictures.
        ConfigError: columns is not positive.

    Taught in: chapter 3
    """
    import matplotlib.pyplot as plt

    if columns < 1:
        raise ConfigError(f"columns is {columns}; expected at least 1")
    rows = read(record)
    truths, pictures = _pictures(rows)
    if not truths:
        raise DataError(
            f"record {record} has no pictures; expected at least one attack made without --no-pictures"
        )
    numbers, names = sorted(truths)[:columns], _names(rows)
    large = min(truths[numbers[0]].shape[-2:]) >= _PHOTOGRAPH
    most = _MAX_SIDE_OF_PHOTOGRAPHS if large else _MAX_SIDE
    experiment = _swept(rows) if curve else None
    swept = experiment is not None
    row = (_TALLEST - (_CURVE_HEIGHT if swept else 0)) / (len(pictures) + 1)
    side = min(most, (WIDTH - _NAME_WIDTH) / len(numbers), max(_SMALLEST, row - _CAPTION))
    picture_height = (len(pictures) + 1) * (side + _CAPTION)
    width = WIDTH if swept else _NAME_WIDTH + len(numbers) * side
    result = plt.figure(figsize=(width, picture_height + (_CURVE_HEIGHT if swept else 0)))
    if experiment is not None:
        parts: Any = result.subfigures(2, 1, height_ratios=[picture_height, _CURVE_HEIGHT])
        _curve(parts[1].subplots(), rows, experiment)
    axes = (parts[0] if swept else result).subplots(
        len(pictures) + 1, len(numbers) + 1, squeeze=False, width_ratios=[_NAME_WIDTH, *[side] * len(numbers)]
    )
    _label(axes[0, 0], "original")
    for column, number in enumerate(numbers, 1):
        show(axes[0, column], as_images(truths[number])[0])
    for line, (case, images) in enumerate(pictures.items(), 1):
        _label(axes[line, 0], names[case])
        for column, number in enumerate(numbers, 1):
            if number not in images:
                axes[line, column].axis("off")
                continue
            picture, psnr = images[number]
            show(axes[line, column], as_images(picture)[0])
            axes[line, column].set_xlabel("exact" if psnr == float("inf") else f"{psnr:.1f} dB", fontsize=7)
    return result


@styled
def curve(record: str | os.PathLike[str]) -> Figure:
    """Draw the PSNR over the setting that an experiment sweeps.

    Args:
        record: as for `invlib.experiments.table`; it needs no pictures.

    Raises:
        DataError: the record is missing, broken or empty, or sweeps no setting.
    """
    import matplotlib.pyplot as plt

    rows = read(record)
    experiment = _swept(rows)
    if experiment is None:
        raise DataError(
            f"record {record} sweeps 0 settings; expected one, as fedavg, multi or architecture do"
        )
    result, axes = plt.subplots(figsize=(WIDTH, _CURVE_HEIGHT))
    _curve(axes, rows, experiment)
    return result


def _swept(rows: Sequence[Row]) -> Experiment | None:
    experiment = EXPERIMENTS.get(rows[0]["experiment"]) if rows else None
    if experiment is None or not experiment.axis or all(row["sweep"] is None for row in rows):
        return None
    return experiment


def _pictures(rows: Sequence[Row]) -> tuple[dict[int, Tensor], dict[str, dict[int, tuple[Tensor, float]]]]:
    """Return the originals by their numbers, and for each case the reconstructions with their PSNR."""
    truths: dict[int, Tensor] = {}
    pictures: dict[str, dict[int, tuple[Tensor, float]]] = {}
    for row in rows:
        count = len(row["psnr"])
        if row.get("truth"):
            for k, image in enumerate(unpng(row["truth"], count)):
                truths[row["image"] + k] = image
        if not row["reconstruction"]:
            continue
        images = unpng(row["reconstruction"], count)
        here = pictures.setdefault(row["case"], {})
        for k in range(count):
            here[row["image"] + k] = (images[k], float(row["psnr"][k]))
    return truths, pictures


def _names(rows: Sequence[Row]) -> dict[str, str]:
    """Return what each case is called beside the others: the words of the columns in which they differ."""
    columns = {row["case"]: row["columns"] for row in rows}
    headings = list(dict.fromkeys(name for words in columns.values() for name in words))
    differ = [name for name in headings if len({words.get(name) for words in columns.values()}) > 1]
    return {
        case: "\n".join(
            # A number alone says nothing.
            f"{name} {words[name]}" if words[name][:1].isdigit() else words[name]
            for name in differ or headings
            if name in words
        )
        for case, words in columns.items()
    }


def _curve(axes: Any, rows: Sequence[Row], experiment: Experiment) -> None:
    """Draw the mean PSNR of each series over the swept setting, and the grey floor."""
    series: dict[str, dict[float, list[float]]] = {}
    floor: dict[float, list[float]] = {}
    for row in rows:
        if row["sweep"] is None:
            continue
        values = [float(v) for v in row["psnr"] if v not in ("inf", "-inf")]
        series.setdefault(row["series"], {}).setdefault(row["sweep"], []).extend(values)
        floor.setdefault(row["sweep"], []).extend(
            float(f["grey"]) for f in row["floors"] if f["grey"] not in (None, "inf", "-inf")
        )
    for index, (name, points) in enumerate(series.items()):
        places = sorted(place for place, values in points.items() if values)
        axes.plot(
            places,
            [statistics.fmean(points[place]) for place in places],
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            label=name or None,
        )
    places = sorted(floor)
    means = [statistics.fmean(floor[place]) for place in places]
    # A dash at each place and no line: clients of different size have different images, so another floor.
    axes.plot(places, means, "_", color="#666666", markersize=14, label="plain grey")
    if experiment.log:
        axes.set_xscale("log")
    if len(places) <= 10:
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
    axes.set(xlabel=experiment.axis, ylabel="PSNR in dB")
    axes.legend()


def _label(axes: Any, text: str) -> None:
    axes.axis("off")
    axes.text(1, 0.5, text, ha="right", va="center", fontsize=7, transform=axes.transAxes)
