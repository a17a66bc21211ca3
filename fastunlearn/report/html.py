"""``report.html``: what was asked, what was measured and against what, in one file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastunlearn.files import write_text
from fastunlearn.report import language
from fastunlearn.report.charts import numbers, shorten, text
from fastunlearn.report.markup import (
    AUC,
    PERCENT1,
    SET_NAMES,
    Estimated,
    Findings,
    View,
    as_points,
    as_seconds,
    attack_of,
    mean_of,
    part_of,
)
from fastunlearn.report.sections import SECTIONS

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def write_report(findings: Findings, path: str | Path) -> None:
    """Write one HTML file, whole or not at all, that shows ``findings``.

    It holds no script and asks for nothing over the network; parts of ``findings`` that are absent or None leave
    their section out, and long ones are cut to what changed most, which the section then says. Raises KeyError for
    models without a name and ValueError for histograms whose edges do not fit their counts; OSError when the file
    can not be written. Cost: linear in ``findings``; 200 to 400 kB for a handful of models.
    """
    write_text(path, render(findings))


def render(findings: Findings) -> str:
    """The page :func:`write_report` writes."""
    view = View(findings)
    shown = [(key, name, note, body) for key, name, note, part in SECTIONS if (body := part(view))]
    style = (files("fastunlearn.report") / "report.css").read_text(encoding="utf-8")
    links = "".join(f'<li><a href="#{key}">{name}</a></li>' for key, name, _, _ in shown)
    sections = "".join(
        f'<section id="{key}" aria-labelledby="{key}-h"><header><h2 id="{key}-h">{name}</h2><p>{note}</p></header>'
        f'<div class="body">{body}</div></section>'
        for key, name, note, body in shown
    )
    title = text(findings.get("title") or "Unlearning report")
    number = (findings.get("record") or {}).get("id")
    mast = f"<p>record <b>{text(number)}</b></p>" if number else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{style}</style></head><body>'
        f'<div class="page"><div class="mast"><p>fastunlearn <span>unlearning report</span></p>{mast}</div>'
        f"<main>{_verdict(view, title)}"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>{sections}</main></div></body></html>\n'
    )


# The top of the page: the verdict, and three questions that a reader asks first.


def _verdict(view: View, title: str) -> str:
    verdict = view.findings.get("verdict")
    sentence = f'<p class="verdict">{text(verdict)}</p>' if verdict else ""
    missing = ""
    if view.models and view.reference is None:
        missing = (
            '<p class="warning">No retrained model was measured, so nothing here says how far this is from '
            "never having seen the data.</p>"
        )
    cards = whose = ""
    if view.tried:
        mine, tried = _spoken_of(view)
        cards = "".join(_card(*answer) for answer in _answers(view, mine))
        if tried > 1:
            figures = "perplexities" if language.is_language(view) else "accuracies"
            why = f"whose {figures} are nearest to the retrained model's" if view.reference else "which is the first"
            name = f"<b><bdi>{text(shorten(mine['name'], 60))}</bdi></b>"
            whose = f'<p class="whose">{name}, of {tried} methods the one {why}</p>'
    return (
        f'<div class="top" id="verdict"><h1>{title}</h1>{sentence}{missing}'
        + (f'{whose}<dl class="answers">{cards}</dl>' if cards else "")
        + "</div>"
    )


def _card(question: str, answer: str, detail: str) -> str:
    return f"<div><dt>{question}</dt><dd><b>{answer}</b><span>{detail}</span></dd></div>"


def _spoken_of(view: View) -> tuple[Mapping[str, Any], int]:
    """The model that the cards speak of, and of how many it was chosen: the ``closest`` of the findings, else the only
    one that was unlearned, else the one whose accuracies are on average nearest to the reference's; without a reference
    the first."""
    tried = view.tried
    named = [m for m in tried if m["name"] == view.findings.get("closest")]
    if named:
        return named[0], len(tried)
    if len(view.unlearned) == 1:
        return view.unlearned[0], 1

    def distance(model: Mapping[str, Any]) -> float:
        gaps = numbers(mean_of(e) for e in (model.get("gap") or {}).values())
        return math.fsum(map(abs, gaps)) / len(gaps) if gaps else math.inf

    return min(tried, key=distance), len(tried)


def _answers(view: View, mine: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Question, answer, and what it is to be compared with, for one unlearned model."""
    found: list[tuple[str, str, str]] = []

    def others(value: Callable[[Mapping[str, Any] | None], Estimated], write: Callable[[float], str], unit: str) -> str:
        known = (("retrained", mean_of(value(view.reference))), ("original", mean_of(value(view.original))))
        return "; ".join(f"{name} {write(v)}{unit}" for name, v in known if v is not None)

    def right(part: str) -> str:
        value = mean_of(part_of(mine, "accuracy", part)) or 0.0
        whole = f"right on {PERCENT1(value)}\u202f% of the {SET_NAMES[part]} data"
        rest = others(partial(part_of, key="accuracy", part=part), PERCENT1, "\u202f%")
        return f"{whole}; {rest}" if rest else whole

    spoken = language.is_language(view)
    if spoken:
        found += language.answers(view, mine)
    known = None if spoken else mean_of(part_of(mine, "accuracy", "forget"))
    target = mean_of(part_of(view.reference, "accuracy", "forget"))
    if known is not None and target is not None:
        answer = f"{as_points(known - target)} <i>points</i>"
        found.append(("Is it forgotten?", answer, f"away from never having seen it: {right('forget')}"))
    elif known is not None:
        found.append(("Is it forgotten?", f"{PERCENT1(known)}\u202f%", _capital(right("forget"))))
    for attack in view.attacks()[:1]:
        auc = mean_of(attack_of(mine, attack))
        if auc is not None:
            rest = others(partial(attack_of, attack=attack), AUC, "")
            detail = f"AUC of the strongest attack, <bdi>{text(shorten(attack, 30))}</bdi>; 0.5 is a coin toss"
            found.append(("Can an attacker tell?", AUC(auc), f"{detail}; {rest}" if rest else detail))
    after, before = mean_of(part_of(mine, "accuracy", "test")), mean_of(part_of(view.original, "accuracy", "test"))
    if after is not None and before is not None and not spoken:
        found.append(("What did it cost?", f"{as_points(after - before)} <i>points</i>", _capital(right("test"))))
    seconds, retraining = mean_of(mine.get("seconds")), mean_of((view.reference or {}).get("seconds"))
    if seconds is not None:
        detail = "of unlearning"
        if retraining is not None and seconds > 0:
            detail += f"; retraining took {as_seconds(retraining)}, {_times(retraining / seconds)} as long"
        found.append(("How long did it take?", as_seconds(seconds), _capital(detail)))
    return found


def _times(factor: float) -> str:
    return f"{factor:.0f} times" if factor >= 10 else f"{factor:.1f} times"


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
