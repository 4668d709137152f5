"""What an audit found, as an object, as JSON and as one page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from invlib.auditing.page import to_html
from invlib.auditing.words import Finding, Number, Verdict
from invlib.core.files import atomic_write
from invlib.errors import DataError
from invlib.settings import checked

FORMAT = "invlib-audit-1"


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """What `invlib.audit` found about one update.

    Args:
        verdict: the worst of its attacks' verdicts; of several searches the one that explains the update best
            counts.
        summary: three sentences for whoever decides.
        scope: what was audited, with what, and for how long.
        leaks: what the update tells without any search.
        attacks: what was tried, the cheapest first.
        reasons: why attacks failed, where they did.
        defences: those that are there, and those that were tried on this update.
        not_tried: a clause each.
        complete: whether all parts ran to their end; False after Ctrl-C and where the budget was spent.
        pictures: name → images ``(N, C, H, W)`` in [0, 1], recovered or private. No file has them unless
            it is asked to.
    """

    verdict: Verdict
    summary: tuple[str, str, str]
    scope: Mapping[str, Number]
    leaks: tuple[Finding, ...]
    attacks: tuple[Finding, ...]
    reasons: tuple[Finding, ...]
    defences: tuple[Finding, ...]
    not_tried: tuple[str, ...]
    complete: bool = True
    pictures: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        unfinished = () if self.complete else ("This report is not complete.",)
        return "\n".join([*unfinished, *self.summary])

    def _repr_html_(self) -> str:
        """Return the page in a frame of its own, as a notebook shows it."""
        return (
            f'<iframe srcdoc="{escape(self.to_html())}" title="The report of an audit" '
            'style="width:100%;height:40rem;border:1px solid #8888"></iframe>'
        )

    def to_json(self) -> str:
        """Return everything but the pictures; a number that is not finite is null."""
        report = asdict(replace(self, pictures={}))
        del report["pictures"]
        return json.dumps({"format": FORMAT, **_plain(report)}, indent=1, allow_nan=False) + "\n"

    def to_html(self, *, pictures: bool = False) -> str:
        """Return one page that needs no network; `pictures` puts recovered and private images into it."""
        return to_html(self, pictures=checked("pictures", pictures, bool))

    def save(self, folder: str | Path, *, pictures: bool = False) -> tuple[Path, Path]:
        """Write ``audit.html`` and ``audit.json`` into a folder, which is made where it is missing.

        Returns:
            The two paths.

        Raises:
            DataError: one of them cannot be written; neither is left half-written.
        """
        page, data = (Path(folder) / f"audit.{kind}" for kind in ("html", "json"))
        try:
            page.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{folder} cannot be made: {error}") from error
        for path, text in ((page, self.to_html(pictures=pictures)), (data, self.to_json())):
            atomic_write(path, partial(_write, text), private=True)
        return page, data


def _write(text: str, at: Path) -> None:
    at.write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
