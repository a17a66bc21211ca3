"""Of causal language models: the report's section on perplexity and recitation, and what it says of them elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fastunlearn.report.charts import text
from fastunlearn.report.markup import (
    PERCENT1,
    SET_NAMES,
    Estimated,
    View,
    as_digits,
    as_seconds,
    cell_of,
    mean_of,
    name_of,
    part_of,
    row_of,
    signed,
    table_of,
)

Model = Mapping[str, Any]
RECITED = (("overlap", "tokens"), ("exact", "whole"))


def is_language(view: View) -> bool:
    """Whether the models measured are language models."""
    return any(model.get("perplexity") for model in view.models)


def data_of(name: str) -> str:
    """A set of texts as one speaks of it."""
    return "test texts of the forgotten topics" if name == "test of forgotten" else f"{SET_NAMES.get(name, name)} texts"


def as_perplexity(value: float) -> str:
    """With as many digits as say something: 1.04, 23.1, 8,140, 3.2e+09."""
    return as_digits(value) if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def as_factor(value: float) -> str:
    """Of two perplexities."""
    return f"\N{MULTIPLICATION SIGN}\u202f{as_perplexity(value)}"


def as_change(factor: float) -> str:
    """A factor as a change in percent where that reads well, else as it is."""
    change = 100 * (factor - 1)
    return signed(f"{change:+.1f}\u202f%") if abs(change) < 100 else as_factor(factor)


def factor_of(model: Model | None, other: Model | None, part: str) -> float | None:
    """The model's perplexity over the other's on a set; None where either was not measured or has no bound."""
    nats = [mean_of(part_of(m, "loss", part)) for m in (model, other)]
    if nats[0] is None or nats[1] is None:
        return None
    return math.exp(min(nats[0] - nats[1], 700.0))


def recited(model: Model | None, part: str, what: str) -> Estimated:
    """Of the continuations of a set's texts, the share of tokens (``overlap``) or of texts (``exact``), in percent."""
    found: Estimated = (part_of(model, "extraction", part) or {}).get(what)
    return found


def section(view: View) -> str:
    """Perplexity, next tokens, continuations and questions, by model."""
    if not is_language(view):
        return ""
    return _perplexities(view) + _next_tokens(view) + _recited(view) + _questions(view)


def _perplexities(view: View) -> str:
    sets = view.sets("perplexity")
    head = ["model", *(f"{text(SET_NAMES.get(s, s))}<small>perplexity</small>" for s in sets)]
    timed = any(mean_of(m.get("seconds")) is not None for m in view.models)
    head += ["time"] if timed else []

    def cells(model: Model) -> list[str]:
        is_reference = model is view.reference
        found = []
        for s in sets:
            factor = None if is_reference else mean_of(part_of(model, "factor", s))
            note = "" if factor is None else as_factor(factor)
            theirs = None if is_reference else part_of(view.reference, "perplexity", s)
            found.append(cell_of(part_of(model, "perplexity", s), as_perplexity, theirs, note=note))
        return found + ([cell_of(model.get("seconds"), as_seconds)] if timed else [])

    rows = [row_of(name_of(view, m), cells(m), "reference" if m is view.reference else "") for m in view.models]
    beside = ", and its factor over the retrained one's" if view.reference else ""
    return table_of(f"Perplexity by model{beside}", head, rows) + (
        '<p class="small">The perplexity is e to the mean loss of a token: of how many equally likely tokens the model '
        "chooses, as it were. Small figures are 95 % intervals over the texts, or over the runs where there are "
        "several.</p>"
    )


def _next_tokens(view: View) -> str:
    sets = view.sets()
    head = ["model", *(f"{text(SET_NAMES.get(s, s))}<small>next token, %</small>" for s in sets)]
    rows = []
    for model in view.models:
        gaps = [None if model is view.reference else part_of(model, "gap", s) for s in sets]
        cells = [cell_of(part_of(model, "accuracy", s), PERCENT1, gap=g) for s, g in zip(sets, gaps, strict=True)]
        rows.append(row_of(name_of(view, model, roles=False), cells, "reference" if model is view.reference else ""))
    return "<h3>Next tokens</h3>" + table_of("Share of tokens predicted right", head, rows)


def _recited(view: View) -> str:
    sets = view.sets("extraction")
    if not sets:
        return ""
    head = ["model"]
    head += [f"{text(SET_NAMES.get(s, s))}<small>{unit}, %</small>" for s in sets for _, unit in RECITED]
    rows = []
    for model in view.models:
        is_reference = model is view.reference
        cells = []
        for s in sets:
            for what, _ in RECITED:
                theirs = None if is_reference else recited(view.reference, s, what)
                cells.append(cell_of(recited(model, s, what), PERCENT1, theirs))
        rows.append(row_of(name_of(view, model, roles=False), cells, "reference" if is_reference else ""))
    return (
        "<h3>What is recited</h3>"
        + table_of("Texts continued greedily from their beginnings", head, rows)
        + '<p class="small">Given the beginning of a text, the model goes on with its likeliest token each time. '
        "Tokens: the share of them that are the text's own, in their place; whole: the share of texts continued "
        "without a fault.</p>"
    )


def _questions(view: View) -> str:
    if all(mean_of(m.get("questions")) is None for m in view.models):
        return ""
    reference = (view.reference or {}).get("questions")
    rows = [
        row_of(
            name_of(view, m, roles=False),
            [cell_of(m.get("questions"), PERCENT1, None if m is view.reference else reference)],
            "reference" if m is view.reference else "",
        )
        for m in view.models
    ]
    return "<h3>Questions</h3>" + table_of("Multiple choice, answered right", ["model", "right, %"], rows)


def figures(view: View) -> list[tuple[str, Callable[[Model], Estimated], Callable[[float], str], float, Any]]:
    """For charts with a row per model: title, figure, how it is written, least width of the axis, its limits."""
    found: list[tuple[str, Callable[[Model], Estimated], Callable[[float], str], float, Any]] = [
        (f"Loss of a token of {data_of(s)}, nats", partial(part_of, key="loss", part=s), as_digits, 0.2, (0, math.inf))
        for s in view.sets("loss")
    ]
    for s in view.sets("extraction"):
        title = f"Recited of {data_of(s)}, % of tokens"
        found.append((title, partial(recited, part=s, what="overlap"), PERCENT1, 4.0, (0, 100)))
    return found


def answers(view: View, mine: Model) -> list[tuple[str, str, str]]:
    """Question, answer, and what it is to be compared with, of the cards at the top of the page."""
    found = []

    def others(value: Callable[[Model | None], Estimated], write: Callable[[float], str]) -> str:
        known = (("retrained", mean_of(value(view.reference))), ("original", mean_of(value(view.original))))
        return "; ".join(f"{name} {write(v)}" for name, v in known if v is not None)

    def detail(text: str, rest: str) -> str:
        return f"{text}; {rest}" if rest else text

    known = mean_of(part_of(mine, "perplexity", "forget"))
    if known is not None:
        rest = others(partial(part_of, key="perplexity", part="forget"), as_perplexity)
        factor = mean_of(part_of(mine, "factor", "forget"))
        answer, said = as_perplexity(known), "Perplexity on the forgotten texts"
        if factor is not None:
            answer, said = as_factor(factor), "The perplexity of never having seen them: "
            said += f"{as_perplexity(known)} on the forgotten texts"
        found.append(("Is it forgotten?", answer, detail(said, rest)))
    overlap = mean_of(recited(mine, "forget", "overlap"))
    if overlap is not None:

        def percent(value: float) -> str:
            return f"{PERCENT1(value)}\u202f%"

        rest = others(partial(recited, part="forget", what="overlap"), percent)
        test = mean_of(recited(mine, "test", "overlap"))
        said = "Of the tokens that follow the beginnings of the forgotten texts"
        said = detail(said, "" if test is None else f"of test texts {percent(test)}")
        found.append(("Can it be recited?", percent(overlap), detail(said, rest)))
    cost = factor_of(mine, view.original, "retain")
    if cost is not None:
        held = factor_of(mine, view.original, "test")
        rest = "" if held is None else f"on test texts {as_change(held)}"
        found.append(("What did it cost?", as_change(cost), detail("Perplexity on the retained texts", rest)))
    return found
