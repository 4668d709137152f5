"""The table of an experiment, made from its record alone."""

from __future__ import annotations

import html
import os
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from invlib import data
from invlib.core.files import Row
from invlib.errors import DataError
from invlib.experiments import record as _record
from invlib.experiments.catalog import EXPERIMENTS

_WIDTH = 110


@dataclass(frozen=True, kw_only=True)
class Table:
    """A small table of words, aligned as text and drawn by notebooks.

    Args:
        columns: the headings.
        rows: one word for each heading.
        caption: what the table shows, and how its numbers are to be read.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str

    def __str__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(w.ljust(n) for w, n in zip(line, widths, strict=True)).rstrip() for line in lines]
        text.insert(1, "  ".join("-" * n for n in widths))
        return "\n".join([*textwrap.wrap(self.caption, _WIDTH), "", *text])

    def _repr_html_(self) -> str:
        # A column that says the same in every row is said once below, which keeps the table in the page.
        several = len(self.rows) > 1
        same = [k for k, words in enumerate(zip(*self.rows, strict=True)) if several and len({*words}) == 1]
        kept = [k for k in range(len(self.columns)) if k not in same]
        head = "".join(f"<th>{html.escape(self.columns[k])}</th>" for k in kept)
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(row[k])}</td>' for k in kept)}</tr>" for row in self.rows
        )
        alike = ", ".join(f"{self.columns[k]} {self.rows[0][k]}" for k in same)
        below = f"{self.caption} In every row: {alike}." if same else self.caption
        # The page's own width for the words; what is wider scrolls by itself and not with the page.
        return (
            '<div style="overflow-x: auto" tabindex="0">'
            f'<table class="table" style="font-size: 0.8em"><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
            f'<p style="font-size: 0.85em">{html.escape(below)}</p>'
        )


def locate(record: str | os.PathLike[str]) -> Path:
    """Return the file of a record: a path that ends in .jsonl, or the name of a record in data/results."""
    if isinstance(record, os.PathLike) or str(record).endswith(".jsonl"):
        return Path(record)
    try:
        return data.resource(f"results/{record}.jsonl")
    except DataError as error:
        raise DataError(
            f"no record {record!r} comes with invlib; expected one of data/results, or the path of a .jsonl "
            f"file, such as results/{record}.jsonl where this command makes it: "
            f"python -m invlib experiment {record}"
        ) from error


def read(record: str | os.PathLike[str]) -> list[Row]:
    """Return the rows of a record by name or path, the cases in the order of the experiment.

    Several processes write rows as they come; older records have no places.
    """
    rows = _record.read(locate(record))
    if not rows:
        raise DataError(f"record {record} has no rows; expected at least one attack")
    return sorted(rows, key=lambda row: int(row.get("place", 0)))


def table(record: str | os.PathLike[str]) -> Table:
    """Return the table of a record: a line for each case, beside the floors and the paper's numbers.

    Args:
        record: the path of a ``.jsonl`` file, or the name of an experiment whose record comes with invlib.

    Raises:
        DataError: the record is missing, broken or empty.
    """
    rows = read(record)
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    names = list(dict.fromkeys(name for row in rows for name in row["columns"]))
    with_paper = any(row.get("paper") for row in rows)
    with_labels = any(row["settings"]["labels"] == "inferred" for row in rows)
    counts = list(dict.fromkeys(name for row in rows for name in row.get("counts", ())))
    searched = not counts
    with_psnr = any(row["psnr"] for row in rows)
    headings = [*names, *counts, *(["PSNR in dB"] if with_psnr else []), *(["paper"] if with_paper else [])]
    headings += ["SSIM", "by SSIM", "by features"] if searched else []
    headings += ["grey", "mean", "class"] if with_psnr else []
    headings += [*(["labels right"] if with_labels else [])]
    headings += ["evaluations" if searched else "seconds", "clients"]
    lines = []
    for group in cases.values():
        line = [str(group[0]["columns"].get(name, "")) for name in names]
        line += [_sum([row["counts"][name] for row in group if name in row["counts"]]) for name in counts]
        if with_psnr:
            line.append(_mean_and_spread(_flat(group, "psnr")))
        if with_paper:
            line.append(group[0].get("paper") or "")
        if searched:
            line.append(_mean(_flat(group, "ssim"), "{:.3f}"))
            line += [_identified(group, "rank_ssim"), _identified(group, "rank_features")]
        if with_psnr:
            line += [
                _mean([f[kind] for row in group for f in row["floors"]], "{:.2f}")
                for kind in ("grey", "mean", "class")
            ]
        if with_labels:
            right = [row["labels_right"] for row in group if row["labels_right"] is not None]
            total = sum(len(row["psnr"]) for row in group if row["labels_right"] is not None)
            line.append(f"{sum(right) / total:.0%}" if total else "")
        last = ("evaluations", "{:.0f}") if searched else ("seconds", "{:.2g}")
        line += [_mean([row[last[0]] for row in group], last[1]), str(len(group))]
        lines.append(tuple(line))
    return Table(columns=tuple(headings), rows=tuple(lines), caption=_caption(rows, cases))


def _caption(rows: Sequence[Row], cases: dict[str, list[Row]]) -> str:
    name, settings = rows[0]["experiment"], rows[0]["settings"]
    experiment = EXPERIMENTS.get(name)
    clients = _range(len(group) for group in cases.values())
    reduced = any(row["settings"]["reduced"] for row in rows)
    title = experiment.title if experiment else name
    budget = found = identified = ""
    if any("counts" in row for row in rows):
        found = " that were found"
    else:
        budget = (
            f"{settings['steps']} network evaluations a restart, "
            f"{settings['restarts']} restart{'s' if settings['restarts'] != 1 else ''}, "
        )
        identified = (
            "By SSIM, by features: how often the reconstruction picks its own original out of "
            f"{_range(row['candidates'] for row in rows)} candidates, by SSIM and by the features of another "
            "trained network. "
        )
    parts = [
        f"{'REDUCED FORM of ' if reduced else ''}{name}: {title}.",
        f"{clients} {'client' if clients == '1' else 'clients'} a case, from {settings['dataset']} "
        f"({settings['split']}), {budget}"
        f"seed {settings['seed']}, on {', '.join(sorted({row['device'] for row in rows}))}.",
        f"PSNR: mean ± standard deviation over images{found}. {identified}Grey, mean, class: the PSNR of "
        "what needs no update at all, namely the best plain grey image, the mean of the candidates, another "
        "image of the class."
        if any(row["psnr"] for row in rows)
        else "",
        *(experiment.notes if experiment else ()),
    ]
    return " ".join(filter(None, parts))


def _range(values: Iterable[int]) -> str:
    ordered = sorted(set(values))
    return str(ordered[0]) if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"


def _flat(group: Sequence[Row], key: str) -> list[float]:
    return [float(value) for row in group for value in row[key]]


def _mean_and_spread(values: list[float]) -> str:
    # An exact image has an infinite PSNR, with which there is no mean: it is said beside it.
    values = [v for v in values if v == v]  # of what was not found there is none
    finite = [v for v in values if v not in (float("inf"), float("-inf"))]
    exact = f", {len(values) - len(finite)} exact" if len(finite) < len(values) else ""
    if not finite:
        return exact.removeprefix(", ")
    return f"{statistics.fmean(finite):.2f} ± {statistics.pstdev(finite):.2f}{exact}"


def _mean(values: Sequence[float | None], form: str) -> str:
    known = [float(v) for v in values if v is not None]
    return form.format(statistics.fmean(known)) if known else "–"


def _sum(counts: Sequence[Sequence[int]]) -> str:
    return f"{sum(some for some, _ in counts)} of {sum(every for _, every in counts)}" if counts else ""


def _identified(group: Sequence[Row], key: str) -> str:
    ranks = [rank for row in group for rank in row[key] if rank is not None]
    return f"{sum(rank == 1 for rank in ranks) / len(ranks):.0%}" if ranks else "–"
