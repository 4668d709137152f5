"""A report as one page."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def to_html(report: object, *, pictures: bool = False) -> str:
    """Return one page that needs no network."""
    return f"<!doctype html><html lang=en><title>Audit</title><pre>{escape(str(report))}</pre></html>"
