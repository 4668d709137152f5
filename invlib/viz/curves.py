"""Figures made of numbers: cost curves, lines, bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from invlib.errors import ConfigError
from invlib.viz.figure import COLOURS, MARKERS, NARROW, figure, same_length

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@figure
def convergence(runs: Any, *, ylabel: str = "matching cost", log: bool = True) -> Figure:
    """Draw how the cost fell: the best restart of each run as a strong line, the others faint.

    Args:
        runs: a `Reconstruction`, its history, or several of either by name.
        ylabel: name of the cost.
        log: whether the cost's axis is logarithmic.

    Raises:
        ConfigError: where there is nothing to draw.

    Example:
        >>> from types import SimpleNamespace
        >>> history = SimpleNamespace(steps=[0, 10], cost=torch.tensor([[1.0, 0.9], [0.5, 0.1]]))
        >>> len(convergence({"Adam": history}).axes[0].lines)  # two restarts
        2

    Taught in: chapter 2
    """
    named = runs if isinstance(runs, Mapping) else {"": runs}
    if not named:
        raise ConfigError("runs is empty; expected at least one history")
    axes = _axes(2.9, named)
    for index, (name, run) in enumerate(named.items()):
        history = getattr(run, "history", run)
        cost = np.asarray(torch.as_tensor(history.cost, dtype=torch.float64))
        cost = cost[:, None] if cost.ndim == 1 else cost
        if cost.size == 0:
            raise ConfigError(f"the history{f' of {name!r}' if name else ''} is empty; nothing to draw")
        same_length("history.steps", history.steps, len(cost), "recorded costs")
        finite = np.where(np.isfinite(cost), cost, np.inf)
        best = int(finite.min(axis=0).argmin())
        for restart in range(cost.shape[1]):
            strong = restart == best
            axes.plot(
                history.steps,
                cost[:, restart],
                color=COLOURS[index % len(COLOURS)],
                alpha=1.0 if strong else 0.25,
                linewidth=1.8 if strong else 0.9,
                zorder=3 if strong else 2,
                label=name if strong and name else None,
            )
    axes.set(xlabel="step", ylabel=ylabel, yscale="log" if log else "linear")
    return _finished(axes, named)


@figure
def lines(
    x: Sequence[float],
    ys: Mapping[str, Sequence[float]] | Sequence[float],
    *,
    xlabel: str,
    ylabel: str,
    log: str = "",
) -> Figure:
    """Draw one line with markers for each series.

    Args:
        x: where the points are.
        ys: one series, or several by name, each as long as `x`.
        xlabel: what is on the horizontal axis, with its unit.
        ylabel: what is on the vertical axis, with its unit.
        log: the logarithmic axes: `""`, `"x"`, `"y"` or `"xy"`.

    Raises:
        ConfigError: where lengths do not fit or `log` is another word.

    Example:
        >>> figure = lines([1, 2, 4], {"MLP": [30, 25, 20]}, xlabel="images", ylabel="PSNR in dB", log="x")
        >>> figure.axes[0].get_xscale()
        'log'

    Taught in: chapter 3
    """
    series = _series(ys, len(x), "points")
    if log not in ("", "x", "y", "xy"):
        raise ConfigError(f"log must be '', 'x', 'y' or 'xy', got {log!r}")
    axes = _axes(2.9, series)
    for index, (name, values) in enumerate(series.items()):
        axes.plot(
            x,
            values,
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markevery=-(-len(x) // 25),  # more markers than this would hide the line
            label=name or None,
        )
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if "x" in log:
        axes.set_xscale("log")
    if len(x) <= 10:
        # Few measured places: name exactly these on the axis.
        axes.set_xticks(list(x), [f"{value:g}" for value in x])
        axes.minorticks_off()
    if "y" in log:
        axes.set_yscale("log")
    return _finished(axes, series)


@figure
def bars(
    labels: Sequence[str],
    values: Mapping[str, Sequence[float]] | Sequence[float],
    *,
    ylabel: str,
    number: str = "{:.1f}",
) -> Figure:
    """Draw bars with the number above each.

    Args:
        labels: one for each group of bars.
        values: one series, or several by name, each as long as `labels`.
        ylabel: what is measured, with its unit.
        number: the format of the numbers above the bars.

    Raises:
        ConfigError: where lengths do not fit.

    Example:
        >>> figure = bars(["eval", "train"], [20.5, 14.0], ylabel="PSNR in dB")
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['20.5', '14.0']

    Taught in: chapter 1
    """
    series = _series(values, len(labels), "labels")
    axes = _axes(2.6, series)
    width = 0.8 / len(series)
    for index, (name, heights) in enumerate(series.items()):
        places = np.arange(len(labels)) + (index - (len(series) - 1) / 2) * width
        drawn = axes.bar(
            places,
            heights,
            width=width * 0.92,
            color=COLOURS[index % len(COLOURS)],
            label=name or None,
        )
        axes.bar_label(drawn, labels=[number.format(height) for height in heights], padding=2, fontsize=8)
    axes.set_xticks(range(len(labels)), labels)
    if max(map(len, labels)) * len(labels) > 60:  # about as many letters as there is room for in a line
        axes.tick_params(axis="x", labelrotation=30)
        for tick in axes.get_xticklabels():
            tick.set(horizontalalignment="right", rotation_mode="anchor")
    axes.grid(False, axis="x")
    axes.set_ylabel(ylabel)
    axes.margins(y=0.12)
    return _finished(axes, series)


def _series(
    values: Mapping[str, Sequence[float]] | Sequence[float], count: int, what: str
) -> dict[str, Sequence[float]]:
    series = dict(values) if isinstance(values, Mapping) else {"": values}
    if not series or count == 0:
        raise ConfigError("there is nothing to draw; expected at least one series with one value")
    for name, numbers in series.items():
        same_length(repr(name) if name else "values", numbers, count, what)
    return series


def _axes(height: float, named: Mapping[str, object]) -> Any:
    import matplotlib.pyplot as plt

    legend = 0.2 * -(-len(named) // 2) if any(named) else 0.0  # inches, two names in a line
    return plt.subplots(figsize=(NARROW, height + legend))[1]


def _finished(axes: Any, named: Mapping[str, object]) -> Figure:
    if any(named):
        # Above the axes: within them some line passes behind it.
        axes.figure.legend(loc="outside upper left", ncols=2)
    result: Figure = axes.figure
    return result
