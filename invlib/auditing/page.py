"""A report as one page, complete in itself: light or dark, on a screen of any width or on paper.

What is in a report comes from outside too, such as the names of layers and files: all of it is escaped, and
the page's own policy lets a browser neither run anything nor fetch anything.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from torch import Tensor

from invlib.auditing.words import Finding, Kind, Verdict
from invlib.core.files import png

# Verdict: how it is coloured beside its words, and what it says.
_VERDICTS: dict[Verdict, tuple[str, str]] = {
    "recovered and certified": (
        "bad",
        "Private content was computed, and the update itself proves it right.",
    ),
    "identified": ("bad", "An attack picked the client's own image out of the candidates."),
    "probably recovered": ("bad", "An attack found what wrong images do not reach on this network."),
    "partly": ("bad", "A part of the images, or of what is in them, was recovered."),
    "not found with this budget (no proof of safety)": (
        "open",
        "The attacks that ran did not find it. Another attack, or more time, still may.",
    ),
    "bounded": ("good", "No attacker does better than the bound, within what the bound is about."),
    "read off": ("bad", "The update says it outright; no search was needed."),
    "nothing found": ("open", "A check looked for this and did not see it. That is no proof of safety."),
    "explains the failure": (
        "open",
        "A reason why an attack had to fail. An attacker can remove some of them.",
    ),
    "would help": ("good", "Tried on this update, it made the attack fail, or its bound small enough."),
    "would not help": ("bad", "Tried on this update, it did not stop the attack."),
    "does not fit": (
        "open",
        "This model and this client cannot have sent this update: no verdict rests on it.",
    ),
    "not tried": ("open", "Nothing was run, so nothing is known."),
}
_KINDS: dict[Kind, str] = {
    "read off the update": "The update says it by itself. It holds for this update, without any search.",
    "found by an attack": "A lower bound on the risk: somebody can do at least this. A failed attack bounds "
    "nothing.",
    "cannot be told apart": "Two inputs whose updates nobody can distinguish. It holds for these two "
    "alone, whoever attacks.",
    "bounded for everybody": "An upper bound for every attacker, on average over what the record may be, and "
    "only while its assumptions hold.",
    "local diagnostic": "Describes the update near one image. It bounds nothing.",
}
_PARTS = (
    ("leaks", "What needs no search", "What anyone reads off who receives the update."),
    ("attacks", "Attacks", "What was tried, the cheapest first. Each result is a lower bound on the risk."),
    (
        "reasons",
        "Why an attack failed",
        "Reasons that were looked for, each with the number that speaks for it.",
    ),
    ("defences", "Defences", "What is there, what it proves, and what others would change on this update."),
)
_LIMITS = (
    "One update of one client was audited. Other clients, other rounds and other images may give away more.",
    "An attack that failed shows that this attack failed with this budget, and nothing else.",
    "A bound holds for what it names: one example or one client, so many rounds, and the stated relation of "
    "neighbours. It does not hold for the data set as a whole.",
    "Statements of different kinds cannot be compared: a failed attack or a diagnostic is never a bound.",
    "The server was taken to follow the protocol. One that changes the model can learn more.",
    "The facts in the table of the scope were taken as they were told. With a wrong one every search fails.",
)
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MOST_PICTURES = 32  # of one name
_MOST_ENTRIES = 12  # of a list among the numbers
# On screens with many pixels a picture of so few would be a stamp.
_SMALL, _SHOWN = 96, 128

_STYLE = """
:root { color-scheme: light; --page: #fcfcfa; --text: #1d1f21; --soft: #565a5f;
  --rule: #d9d7d0; --bad: #a3261c; --good: #1c6b3c; --open: #4a5568; --link: #1f5a96; }
@media screen and (prefers-color-scheme: dark) { :root { color-scheme: dark; --page: #16181a;
  --text: #e6e5e1; --soft: #a9adb2; --rule: #3a3e42; --bad: #ff9a8d; --good: #86d3a2;
  --open: #b7c2d0; --link: #8fbdf0; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 3rem 1.25rem 4rem; max-width: 46rem; background: var(--page);
  color: var(--text); font: 1rem/1.6 Charter, "Bitstream Charter", "Sitka Text", Cambria, Georgia, serif;
  overflow-wrap: anywhere; }
h1, h2, h3, .tags, .over, nav, table, summary, figcaption, dt {
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0 0 1.75rem; font-size: 1.9rem; line-height: 1.2; font-weight: 650; letter-spacing: -0.015em; }
h2 { margin: 3.25rem 0 .4rem; padding-top: .9rem; border-top: 1px solid var(--rule); font-size: 1.3rem;
  line-height: 1.3; font-weight: 650; }
h3 { margin: 0 0 .35rem; font-size: 1.02rem; line-height: 1.4; font-weight: 650; }
section > h3 { margin-top: 2.25rem; }
p { margin: 0 0 .75rem; }
a { color: var(--link); }
.over, .soft { color: var(--soft); }
.over { margin: 0 0 .35rem; font-size: .85rem; }
.partial { margin: 0 0 1.75rem; padding: .75rem 1rem; border: 2px solid var(--bad); }
.whole { margin: 0 0 1.5rem; padding: .1rem 0 .1rem 1.1rem; border-left: 4px solid var(--tone); }
.whole strong { display: block; color: var(--tone); font: 650 1.35rem/1.35 system-ui, -apple-system,
  "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
.summary { font-size: 1.1rem; }
.bad { --tone: var(--bad); } .good { --tone: var(--good); } .open { --tone: var(--open); }
nav { margin-top: 2rem; font-size: .9rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.25rem; margin: 0; padding: 0; list-style: none; }
nav li { margin: 0; } nav a { display: inline-block; padding: .15rem 0; }
article { margin: 1.6rem 0 0; }
.tags { display: flex; flex-wrap: wrap; gap: .3rem .9rem; align-items: baseline; margin: 0 0 .5rem;
  font-size: .85rem; line-height: 1.45; }
.tags strong { color: var(--tone); font-weight: 650; }
.kind { padding: .05rem .5rem; border: 1px solid var(--rule); border-radius: 1rem; color: var(--soft); }
.advice { padding-left: 1rem; border-left: 2px solid var(--rule); }
table { width: 100%; border-collapse: collapse; font-size: .88rem; line-height: 1.45; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { padding: .35rem .75rem .35rem 0; border-top: 1px solid var(--rule); text-align: left;
  vertical-align: top; }
th { width: 42%; font-weight: 500; color: var(--soft); }
td { font-variant-numeric: tabular-nums; }
details { margin: .25rem 0 .75rem; }
summary { display: list-item; width: fit-content; padding: .15rem 0; color: var(--soft); font-size: .88rem;
  cursor: pointer; }
details table { margin-top: .35rem; }
main ul { padding-left: 1.2rem; } main li { margin: .35rem 0; }
dt { margin-top: .8rem; font-size: .92rem; font-weight: 650; } dd { margin: .1rem 0 0; }
figure { margin: 1.5rem 0 0; } figcaption { margin-bottom: .5rem; font-size: .88rem; color: var(--soft); }
.row { display: flex; flex-wrap: wrap; gap: .6rem; }
.row img { max-width: 100%; height: auto; border: 1px solid var(--rule); }
.row img.small { image-rendering: pixelated; }
@media (max-width: 30rem) { body { padding-top: 1.75rem; } h1 { font-size: 1.55rem; } }
@media print { @page { size: A4; margin: 16mm; } :root { --page: #fff; font-size: 10pt; }
  body { max-width: none; padding: 0; } nav { display: none; } h2 { margin-top: 2rem; }
  h2, h3, dt, .tags, summary, section > .soft, figcaption { break-after: avoid; }
  tr, details, figure, img, .advice { break-inside: avoid; } th, td { padding-block: .15rem; }
  details::details-content { content-visibility: visible; display: block; block-size: auto; } }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def to_html(report: Any, *, pictures: bool = False) -> str:
    """Return a report as one page of HTML, complete in itself.

    Args:
        report: an `invlib.auditing.AuditReport`.
        pictures: whether its pictures are put into the page; else not a pixel of them is in it.
    """
    tone, meaning = _VERDICTS[report.verdict]
    parts = [(name, title) for name, title, _ in _PARTS]
    shown = [("scope", "Scope"), *parts, ("not-tried", "Not tried"), ("limits", "For the auditor")]
    if pictures and report.pictures:
        shown.insert(-2, ("pictures", "Pictures"))
    title = "What this update gives away"
    body = [
        "<header>",
        '<p class="over">Audit of one update in federated learning</p>',
        f"<h1>{title}</h1>",
        "" if report.complete else _PARTIAL,
        f'<p class="whole {tone}"><span class="over">Verdict</span><strong>{_text(report.verdict)}</strong>'
        f"{_text(meaning)}</p>",
        *(f'<p class="summary">{_text(sentence)}</p>' for sentence in report.summary),
        '</header><nav aria-label="Parts of the report"><ul>',
        *(f'<li><a href="#{name}">{_text(words)}</a></li>' for name, words in shown),
        "</ul></nav><main>",
        _section("scope", "Scope", "What was audited, with what, and for how long."),
        _table("What was audited", report.scope),
        "</section>",
    ]
    for name, words, about in _PARTS:
        findings = getattr(report, name)
        body += [_section(name, words, about), *map(_finding, findings)]
        idle = "Nothing failed." if name == "reasons" and report.complete else "This part was not run."
        body += ["" if findings else f'<p class="soft">{idle}</p>', "</section>"]
    if pictures and report.pictures:
        body += [
            _section("pictures", "Pictures", "Private, and asked for: keep this file as you keep the data.")
        ]
        body += [_figure(name, images) for name, images in report.pictures.items()]
        body += ["</section>"]
    body += [
        _section("not-tried", "What was not tried", "Nothing is known about these."),
        _list(report.not_tried) or '<p class="soft">The report names nothing.</p>',
        "</section>",
        _section("limits", "For the auditor", "How to read this report, and what it does not say."),
        _list(_LIMITS),
        "<h3>Kinds of statement</h3>",
        _meanings(_KINDS),
        "<h3>Verdicts in this report</h3>",
        _meanings({word: said for word, (_, said) in _VERDICTS.items() if word in _said(report)}),
        "</section></main>",
    ]
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f"<title>{title}: {_text(report.verdict)}</title><style>{_STYLE}</style>"
    )
    lines = "\n".join(filter(None, body))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{lines}\n</body></html>\n'


_PARTIAL = (
    '<p class="partial"><strong>This report is partial.</strong> The audit ended before all of its parts had '
    "run: what is missing below was not examined, which is no result.</p>"
)


def _said(report: Any) -> set[Verdict]:
    return {report.verdict, *(found.verdict for name, *_ in _PARTS for found in getattr(report, name))}


def _section(name: str, title: str, about: str) -> str:
    return f'<section id="{name}"><h2>{_text(title)}</h2><p class="soft">{_text(about)}</p>'


def _finding(found: Finding) -> str:
    proved = {None: "", True: "<span>proved from the update</span>", False: "<span>not proved</span>"}
    numbers = ""
    if found.numbers:
        table = _table(f"Numbers: {found.name}", found.numbers)
        numbers = f"<details><summary>Numbers</summary>{table}</details>"
    advice = f'<p class="advice"><strong>To do:</strong> {_text(found.advice)}</p>' if found.advice else ""
    return (
        f'<article><h3>{_text(found.name)}</h3><p class="tags {_VERDICTS[found.verdict][0]}">'
        f'<strong>{_text(found.verdict)}</strong><span class="kind">{_text(found.kind)}</span>'
        f"{proved[found.certified]}</p><p>{_text(found.text)}</p>{advice}{numbers}</article>"
    )


def _table(caption: str, rows: Mapping[str, Any]) -> str:
    lines = (
        f'<tr><th scope="row">{_text(name.replace("_", " "))}</th><td>{_text(_value(value))}</td></tr>'
        for name, value in rows.items()
    )
    return f"<table><caption>{_text(caption)}</caption><tbody>{''.join(lines)}</tbody></table>"


def _list(entries: Iterable[str]) -> str:
    lines = "".join(f"<li>{_text(entry)}</li>" for entry in entries)
    return f"<ul>{lines}</ul>" if lines else ""


def _meanings(words: Mapping[Any, str]) -> str:
    lines = (f"<dt>{_text(word)}</dt><dd>{_text(said)}</dd>" for word, said in words.items())
    return f"<dl>{''.join(lines)}</dl>"


def _figure(name: str, images: Tensor) -> str:
    count, channels, height, width = images.shape
    if channels not in (1, 3):
        return f'<p class="soft">{_text(name)}: not shown, as images of {channels} channels.</p>'
    scale = max(1, round(_SHOWN / max(height, width))) if max(height, width) <= _SMALL else 1
    kind = ' class="small"' if scale > 1 else ""
    tags = (
        f'<img{kind} width="{width * scale}" height="{height * scale}" '
        f'alt="{_text(name)}: image {number} of {count}" src="data:image/png;base64,{png(image[None])}">'
        for number, image in enumerate(images[:_MOST_PICTURES], 1)
    )
    more = f"; the first {_MOST_PICTURES} of {count}" if count > _MOST_PICTURES else ""
    return (
        f'<figure><figcaption>{_text(name)}{more}</figcaption><div class="row">{"".join(tags)}</div></figure>'
    )


def _value(value: Any) -> str:
    """Return a number as people read it: the exact one is in the JSON."""
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float) and (1e-3 <= abs(value) < 1e9 or not value or not math.isfinite(value)):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    if isinstance(value, float):
        factor, power = f"{value:.3e}".split("e")
        return f"{float(factor):g}×10{str(int(power)).translate(_RAISED)}"
    if isinstance(value, list | tuple):
        more = f" … ({len(value)} in all)" if len(value) > _MOST_ENTRIES else ""
        return ", ".join(map(_value, value[:_MOST_ENTRIES])) + more or "none"
    return str(value)


def _text(words: str) -> str:
    """Escape text; what could turn it round or hide in it (control and format characters) becomes �."""
    return escape("".join("�" if unicodedata.category(c)[0] == "C" and c != "\n" else c for c in words))
