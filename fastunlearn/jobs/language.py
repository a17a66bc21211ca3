"""Causal language models in a run: what is measured of one, and in one sentence whether the texts are forgotten."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastunlearn.data import IGNORED
from fastunlearn.evaluate import Estimate, evaluate
from fastunlearn.evaluate.language import (
    Perplexity,
    Question,
    TokenLogProbs,
    accuracy_of,
    extraction,
    min_k_attack,
    multiple_choice,
    perplexity_of,
    token_log_probs,
)
from fastunlearn.evaluate.relearn import relearn_time
from fastunlearn.inputs import tokenizer_of
from fastunlearn.jobs.findings import NEAR_AUC, NEAR_POINTS, Row, half_width, sentences
from fastunlearn.report.language import as_perplexity

if TYPE_CHECKING:
    from fastunlearn.jobs.task import Part, Task

NEAR_PERPLEXITY = 0.1  # of the perplexity on the forgotten texts, that counts as the same, beside what chance allows
NO_GAIN = 0.005  # nats of a token, that are no step towards the model that never saw the texts
CONTINUED = 500  # texts of a set at most that are continued
LONGEST_PROMPT = 50  # tokens of a text that it is continued from where nothing else is said
KNOWN_AGAIN = 0.05  # nats from the original's loss at which the forgotten texts count as relearnt
RELEARN_LR = 0.01
ATTACKS = {"min_k": "Min-K%", "min_k_plus": "Min-K%++"}
LEFT_OUT = (
    "Linear probes, distances of activations, leak scores of single samples, the support-vector attack and shadow "
    "models are not made for language models and were left out."
)


@dataclass(frozen=True)
class KnownTexts:
    """What is the same for all models of a run.

    Attributes:
        goal: the original's mean loss on the forgotten texts, in nats, which relearning aims at; infinite where nothing
            is relearnt.
        reference: of each set, the reference's log-probabilities of the tokens; None without a reference.
        prompt: tokens of a text that it is continued from; None where texts begin with what is not labelled (chats).
        questions: to be asked; None where no file is named.
    """

    goal: float
    reference: dict[str, TokenLogProbs] | None
    prompt: int | None
    questions: list[Question] | None

    @classmethod
    def of(cls, task: Task, original: nn.Module, reference: nn.Module | None) -> KnownTexts:
        """Cost: a pass over the forgotten texts, and one over every set through the reference."""
        theirs = None if reference is None else _all_log_probs(task, reference)
        goal = math.inf
        if not task.sharded and task.config.relearn:
            goal = evaluate(original, forget=task.forget.loader(task.config.batch_size)).loss["forget"]
        return cls(goal, theirs, _prompt(task), read_questions(task))


def require_measurable(task: Task) -> None:
    """Raise ValueError naming the set or the file, before a long run, where nothing of it could be measured."""
    read_questions(task)
    for name, part in task.sets.items():
        if not any(bool((batch["labels"][:, 1:] != IGNORED).any()) for batch in part.loader(task.config.batch_size)):
            raise ValueError(
                f"{part.samples.source}: no text of {name} has a second token that a model could predict from the first"
            )


@dataclass(frozen=True)
class Trial:
    """How long measuring a language model takes, tried on the first texts.

    Attributes:
        continued: texts of each set that are continued.
        tokens: of the longest continuation.
        continuation: seconds to continue one text; 0.0 where none is.
        questions, choices: how many there are.
        question: seconds to ask one.
        statistics: seconds of attacks and intervals of one model.
    """

    continued: dict[str, int]
    tokens: int
    continuation: float
    questions: int
    choices: int
    question: float
    statistics: float


def trial(task: Task) -> Trial:
    """Continue and ask the first few, and resample figures that are made up. Changes nothing."""
    prompt, questions = _prompt(task), read_questions(task)
    continued = {n: len(p.at_most(CONTINUED, 0)) for n, p in task.sets.items() if n != "retain"}
    first = next(iter(task.forget.loader(task.config.batch_size)))
    longest, seconds = 0, 0.0
    if _goes_on(first["labels"], prompt or 1):
        longest = int((first["labels"][:, prompt or 1 :] != IGNORED).sum(1).max())
        extraction(task.model, [first], prompt, "forget", 2)  # what a first call costs is not its pace
        started = time.perf_counter()
        extraction(task.model, [first], prompt, "forget", 2)
        seconds = (time.perf_counter() - started) / len(first["labels"])
    few, each = (questions or [])[: task.config.batch_size], 0.0
    if few:
        started = time.perf_counter()
        multiple_choice(task.model, few, batch_size=task.config.batch_size)
        each = (time.perf_counter() - started) / len(few)
    made = {name: _made_up(part) for name, part in task.sets.items()}
    started = time.perf_counter()
    _statistics(task, made, 0)
    statistics = time.perf_counter() - started
    choices = sum(len(question.choices) for question in questions or [])
    return Trial(continued, longest, seconds, len(questions or []), choices, each, statistics)


def _made_up(part: Part) -> TokenLogProbs:
    """Log-probabilities that no model has, of as many tokens."""
    labels = part.samples.batch(part.indices)["labels"]
    lengths = (labels[:, 1:] != IGNORED).sum(1)
    values = -torch.rand(int(lengths.sum()), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return TokenLogProbs(values, values.clone(), -values, values > -0.5, lengths)


def measure(task: Task, model: nn.Module, known: KnownTexts, seed: int) -> dict[str, Any]:
    """Everything about one model; JSON, as :func:`fastunlearn.jobs.measuring.measure` returns it.

    Cost: a forward pass over each set, the greedy continuation of at most 500 texts of each, one pass for each choice
    of the questions; relearning ``config.relearn`` steps at most.
    """
    config = task.config
    tokens = _all_log_probs(task, model)
    found = _statistics(task, tokens, seed)
    if known.reference is not None:
        theirs = {n: accuracy_of(t, n, 2, seed).mean for n, t in known.reference.items()}
        found["gap"] = {name: found["accuracy"][name]["mean"] - theirs[name] for name in tokens}
        found["factor"] = {
            name: _factor_over(ours, known.reference[name], name, config.bootstrap, seed).as_dict()
            for name, ours in tokens.items()
        }
    notes = [LEFT_OUT, *found["notes"]]
    if (drawn := len(task.measured)) < (there := len(task.retain)):
        notes.append(f"Of the {there:,} retained texts {drawn:,}, drawn at random, were measured.")
    found["extraction"], said = _extractions(task, model, known.prompt, seed)
    notes += said
    notes += task.not_relearned
    found["questions"] = None
    if known.questions is not None:
        asked = multiple_choice(model, known.questions, batch_size=config.batch_size)
        found["questions"] = asked.accuracy.as_dict()
        notes.append(
            f"{len(known.questions):,} questions were asked, of which guessing gets {asked.chance:.3g} % right."
        )
    found["relearn"] = _relearn(task, model, known.goal, seed)
    return found | {"confusion": None, "probes": None, "activation_distance": None, "notes": notes}


def _logarithm(found: Perplexity) -> Estimate:
    """The loss of a token with the interval of the perplexity, which is e to it."""
    low, high = found.value.low, found.value.high
    return Estimate(found.loss) if low is None or high is None else Estimate(found.loss, math.log(low), math.log(high))


def _statistics(task: Task, tokens: Mapping[str, TokenLogProbs], seed: int) -> dict[str, Any]:
    """What the log-probabilities of the sets' tokens say by themselves."""
    resamples = task.config.bootstrap
    perplexities = {n: perplexity_of(t, n, resamples, seed) for n, t in tokens.items()}
    found: dict[str, Any] = {
        "perplexity": {name: p.value.as_dict() for name, p in perplexities.items()},
        "loss": {name: _logarithm(p).as_dict() for name, p in perplexities.items()},
        "accuracy": {name: accuracy_of(t, name, resamples, seed).as_dict() for name, t in tokens.items()},
        "gap": None, "factor": None, "per_class": {}, "kl": None, "js": None, "tow": None,
        "attacks": {}, "roc": {}, "svc": None,
    }  # fmt: skip
    if "test" not in tokens:
        return found | {"notes": ["Without test texts nothing says what a model knows of texts that it never saw."]}
    told = min_k_attack(tokens["forget"], _others(task, tokens), resamples=resamples, seed=seed)
    found["attacks"] = {ATTACKS[name]: attack.as_dict() for name, attack in told.items()}
    found["roc"] = {ATTACKS[name]: attack.roc.thinned().as_dict() for name, attack in told.items()}
    notes = sentences(limit for attack in told.values() for limit in attack.limits)
    assert task.test is not None
    if not bool(torch.isin(task.test.labels, task.forget.labels).any()):
        notes.append("No test text is of a forgotten topic: attacks may tell them apart by the topic alone.")
    return found | {"notes": notes}


def identity(task: Task) -> dict[str, Any]:
    """What decides the results beside :meth:`Task.identity`: the questions' own bytes."""
    path = task.config.questions
    return {} if path is None else {"questions digest": hashlib.sha256(Path(path).read_bytes()).hexdigest()}


def read_questions(task: Task) -> list[Question] | None:
    """The questions of the configuration in the model's tokens: JSON lines of ``question``, ``choices`` and
    ``answer``, the right choice itself or its number from 0. None where no file is named.

    Raises OSError, and ValueError naming the file and the line.
    """
    path = task.config.questions
    if path is None:
        return None
    tokenizer = tokenizer_of(task.config.model)
    if tokenizer is None:
        raise ValueError(f"--questions {path} is text, which needs a tokenizer: name a Hugging Face folder with one")
    found = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                found.append(_question(line, f"--questions {path}, line {number}", tokenizer))
    if not found:
        raise ValueError(f"--questions {path} is empty: it has no question")
    return found


def _question(line: str, where: str, tokenizer: Any) -> Question:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict) or not {"question", "choices", "answer"} <= set(row):
        raise ValueError(f'{where}: expected {{"question": text, "choices": [texts], "answer": text or number}}')
    text, choices, answer = row["question"], row["choices"], row["answer"]
    if not isinstance(text, str) or not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise ValueError(f"{where}: question must be text and choices a list of texts")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool):
        raise ValueError(f"{where}: answer must be one of the choices or its number from 0, got {answer!r}")

    def tokens(part: str, special: bool) -> tuple[int, ...]:
        return tuple(tokenizer(part, add_special_tokens=special)["input_ids"])

    # A choice is a word that follows: tokenizers of sentences have the space before it in its first token.
    spaced = [choice if choice[:1].isspace() or text[-1:].isspace() else f" {choice}" for choice in choices]
    try:
        return Question(tokens(text, True), tuple(tokens(choice, False) for choice in spaced), answer)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _all_log_probs(task: Task, model: nn.Module) -> dict[str, TokenLogProbs]:
    size = task.config.batch_size
    return {n: token_log_probs(model, task.dealt(part.loader(size), model), n) for n, part in task.sets.items()}


def _factor_over(ours: TokenLogProbs, theirs: TokenLogProbs, name: str, resamples: int, seed: int) -> Estimate:
    """A perplexity over that of the same texts under the reference: both are resampled together, as they vary
    together from text to text."""
    return perplexity_of(replace(ours, log_probs=ours.log_probs - theirs.log_probs), name, resamples, seed).value


def _others(task: Task, tokens: Mapping[str, TokenLogProbs]) -> TokenLogProbs:
    """Test texts of the topics that are forgotten, if there are any: others would be told apart by their topic."""
    from fastunlearn.jobs.task import FORGOTTEN_TEST

    if FORGOTTEN_TEST in tokens:
        return tokens[FORGOTTEN_TEST]
    test = tokens["test"]
    chosen = torch.isin(task.sets["test"].labels, torch.unique(task.forget.labels)) & (test.lengths > 0)
    if not bool(chosen.any()):
        return test
    kept = chosen.repeat_interleave(test.lengths)
    return TokenLogProbs(
        test.log_probs[kept], test.means[kept], test.deviations[kept], test.correct[kept], test.lengths[chosen]
    )


def _prompt(task: Task) -> int | None:
    """Half of a forgotten text's tokens, by the median, at most 50; None for texts that begin without labels."""
    lengths, chats = [], False
    for batch in task.forget.loader(task.config.batch_size):
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) != 0
        first = mask.int().argmax(1, keepdim=True)
        chats |= bool((batch["labels"].gather(1, first) == IGNORED).any())
        lengths += mask.sum(1).tolist()
    return None if chats else max(1, min(sorted(lengths)[len(lengths) // 2] // 2, LONGEST_PROMPT))


def _extractions(
    task: Task, model: nn.Module, prompt: int | None, seed: int
) -> tuple[dict[str, Any] | None, list[str]]:
    """Of forgotten and of test texts: what share of the tokens and of the texts comes back, and notes."""
    found: dict[str, Any] = {}
    begun = "what comes before the first answer" if prompt is None else f"their first {prompt} tokens"
    notes = [
        f"Texts were continued greedily from {begun}; sampling, other beginnings or paraphrases may still bring them "
        "back."
    ]
    for name, part in task.sets.items():
        if name == "retain":
            continue
        # One drawn set for all models of a run.
        few = part.at_most(CONTINUED, task.config.seed)
        loader = few.loader(task.config.batch_size)
        if not any(_goes_on(batch["labels"], prompt or 1) for batch in loader):
            notes.append(f"No text of {name} is longer than that, so none was continued.")
            continue
        told = extraction(model, task.dealt(loader, model), prompt, name, task.config.bootstrap, seed)
        found[name] = {what: told.shares[what].as_dict() for what in ("overlap", "rouge_l", "exact")}
        if short := int((told.tokens == 0).sum()):
            notes.append(f"{short:,} of {len(few):,} texts of {name} end before that, and were not continued.")
        if len(few) < len(part):
            notes.append(f"Of the {len(part):,} texts of {name} {len(few):,}, drawn at random, were continued.")
    return found or None, notes


def _goes_on(labels: Tensor, prompt: int) -> bool:
    return bool((labels[:, prompt:] != IGNORED).any())


def _relearn(task: Task, model: nn.Module, goal: float, seed: int) -> float | None:
    """Steps until the mean loss of the forgotten texts is the original's again, but for 0.05 nats; None if never."""
    if not task.config.relearn or task.sharded or not math.isfinite(goal):
        return None
    forget = task.forget.loader(task.config.batch_size, shuffle=True, seed=seed)
    return relearn_time(
        model, forget, threshold=goal, margin=KNOWN_AGAIN, by="loss", lr=RELEARN_LR, max_steps=task.config.relearn
    ).steps


# What is said of it.


def verdict(unlearned: Row, original: Row, reference: Row | None) -> str:
    """One sentence: are the texts forgotten, compared with never having seen them, and what did it cost?

    Three things may tell a model from one that never saw the texts: its perplexity on them, what it recites of them,
    and the membership attacks; each counts where it is further off than chance allows, in either direction. Where they
    do not even tell the original, or the retained texts are known worse than they were and than they need be, the
    sentence says so.
    """
    name, cost = unlearned["name"], _cost(unlearned, original)
    if reference is None:
        test = _recited(unlearned, "test")
        level = "" if test is None else f" (of test texts: {test:.1f} %)"
        first, now = _recited(original, "forget"), _recited(unlearned, "forget")
        recited = ""
        if first is not None and now is not None:
            recited = f", and what it recites of their tokens from {first:.1f} % to {now:.1f} %{level}"
        return (
            f"{name} took the perplexity on the forgotten texts from {_perplexity(original, 'forget')} to "
            f"{_perplexity(unlearned, 'forget')}{recited}{cost}; without a retrained reference nothing here says how a "
            "model that never saw them behaves."
        )
    before, after = _gaps(original, reference), _gaps(unlearned, reference)
    told_before = {what for what, (gap, chance) in before.items() if gap > chance}
    told = {what for what, (gap, chance) in after.items() if gap > chance}
    halved = [w for w in told_before if w in after and (w not in told or after[w][0] <= before[w][0] / 2)]
    if told:
        word = "Partly forgotten" if halved else "Not forgotten"
    elif told_before:
        word = "Forgotten, as far as these measures see"
        if _harmed(unlearned, original, reference):
            word += ", but the retained texts suffered"
    else:
        word = "Undecided, these measures do not even tell the original from a model that never saw the texts"
    ours, theirs = _recited(unlearned, "forget"), _recited(reference, "forget")
    recited = ""
    if ours is not None and theirs is not None:
        recited = f", it recites {ours:.1f} % of their tokens (that model: {theirs:.1f} %)"
    aucs = [gap for what, (gap, _) in after.items() if what not in ("perplexity", "extraction")]
    attack = f", and the strongest attack's AUC is {max(aucs):.3f} away from that model's" if aucs else ""
    return (
        f"{word}: after {name} the perplexity on the forgotten texts is {_perplexity(unlearned, 'forget')}, where a "
        f"model that never saw them has {_perplexity(reference, 'forget')} (before: "
        f"{_perplexity(original, 'forget')}){recited}{attack}{cost}."
    )


def statement(model: Row, reference: Row | None) -> str:
    """One sentence about a model that nothing was done to."""
    recited, test = _recited(model, "forget"), _recited(model, "test")
    said = f"The model's perplexity on these texts is {_perplexity(model, 'forget')}"
    if reference is not None:
        said += f", the retrained one's {_perplexity(reference, 'forget')}"
    if recited is not None:
        theirs = None if reference is None else _recited(reference, "forget")
        beside = [f"the retrained one {theirs:.1f} %"] if theirs is not None else []
        beside += [f"of test texts {test:.1f} %"] if test is not None else []
        said += f"; it recites {recited:.1f} % of their tokens" + (f" ({', '.join(beside)})" if beside else "")
    return said + "."


def distance(row: Row, reference: Row) -> float:
    """Mean over the sets of the nats by which a token's loss is away from the reference's: of perplexities, the
    logarithm of their factor."""
    gaps = [_apart(row, reference, name) for name in reference["loss"]]
    return math.fsum(gaps) / len(gaps)


def _apart(row: Row, reference: Row, name: str) -> float:
    """Nats between the losses of a token; infinite where either has no bound, and so says nothing."""
    gap = abs(_nats(row, name) - _nats(reference, name))
    return math.inf if math.isnan(gap) else gap


def closest(models: Sequence[Row]) -> Row:
    """The method whose perplexities are closest to the retrained model's; the first of several."""
    reference = next(m for m in models if m["role"] == "reference")
    return min((m for m in models if m["role"] in ("unlearned", "baseline")), key=lambda m: distance(m, reference))


def comparison_verdict(models: Sequence[Row], best: Row) -> str:
    """One sentence: which method comes closest to never having seen the texts, how close, and in what time."""
    original = next(m for m in models if m["role"] == "original")
    reference = next(m for m in models if m["role"] == "reference")
    tried = sum(m["role"] in ("unlearned", "baseline") for m in models)
    runs = best["seconds"]["runs"]  # a perplexity without bound has none
    over = f"over {runs} seeds" if runs > 1 else "with one seed"
    spent = f", in {best['seconds']['mean']:.3g} s"
    if reference["seconds"] is not None:
        spent += f" where retraining takes {reference['seconds']['mean']:.3g} s"
    ours, nothing = distance(best, reference), distance(original, reference)
    sets = len(reference["loss"])
    away = f"a factor of {_factor(ours)} away in perplexity, on average over {sets} sets"
    if not ours < nothing - NO_GAIN:  # both may be without bound
        return (
            f"None of {tried} methods {over} comes closer to a model that never saw the texts than doing nothing, a "
            f"factor of {_factor(nothing)} away in perplexity; the closest is {best['name']}: {away}{spent}."
        )
    return (
        f"Of {tried} methods {over}, {best['name']} comes closest to a model that never saw the texts: {away} (doing "
        f"nothing: {_factor(nothing)}){spent}."
    )


def _gaps(row: Row, reference: Row) -> dict[str, tuple[float, float]]:
    """How far each measure is from the reference's, and how much of that is near enough or chance at 95 %."""
    near = math.log1p(NEAR_PERPLEXITY)
    found = {"perplexity": (_apart(row, reference, "forget"), max(near, _spread(row)))}
    ours, theirs = (r["extraction"] and r["extraction"].get("forget") for r in (row, reference))
    if ours and theirs:
        gap = abs(ours["overlap"]["mean"] - theirs["overlap"]["mean"])
        found["extraction"] = (gap, max(NEAR_POINTS, _chance(ours["overlap"], theirs["overlap"])))
    for name, attack in row["attacks"].items():
        if name in reference["attacks"]:
            mine, its = attack["auc"], reference["attacks"][name]["auc"]
            found[name] = (abs(mine["mean"] - its["mean"]), max(NEAR_AUC, _chance(mine, its)))
    return found


def _chance(ours: Row, theirs: Row) -> float:
    return math.hypot(half_width(ours), half_width(theirs))


def _harmed(unlearned: Row, original: Row, reference: Row) -> bool:
    """Whether the perplexity on the retained texts is above the original's and the reference's, beyond nearness."""
    return _nats(unlearned, "retain") > max(_nats(m, "retain") for m in (original, reference)) + math.log1p(
        NEAR_PERPLEXITY
    )


def _spread(row: Row) -> float:
    """Half the interval, in nats, of the factor between the perplexity on the forgotten texts and the reference's."""
    found = (row["factor"] or {}).get("forget") or {}
    low, high = found.get("low"), found.get("high")  # None where there is no bound
    return math.log(high / low) / 2 if low and high else 0.0


def _nats(row: Row, name: str) -> float:
    """Mean loss of a token; infinite where it has no bound."""
    found = row["loss"][name]
    return math.inf if found is None or found["mean"] is None else float(found["mean"])


def _perplexity(row: Row, name: str) -> str:
    nats = _nats(row, name)
    return as_perplexity(math.exp(nats)) if nats < 700 else "without bound"


def _factor(nats: float) -> str:
    return as_perplexity(math.exp(nats)) if nats < 700 else "no bound"


def _recited(row: Row, name: str) -> float | None:
    found = (row["extraction"] or {}).get(name)
    return None if found is None else float(found["overlap"]["mean"])


def _cost(unlearned: Row, original: Row) -> str:
    """What it did to the perplexity on the retained texts, and on test texts where there are any."""
    said = []
    for name, what in (("retain", "on the retained texts the perplexity is"), ("test", "on test texts")):
        if name in original["loss"]:
            nats = _nats(unlearned, name) - _nats(original, name)
            change = 100 * math.expm1(nats) if nats < 5 else math.inf
            if abs(change) < 0.05:
                said.append(f"{what} the same")
            elif change < 100:
                said.append(f"{what} {abs(change):.1f} % {'higher' if change > 0 else 'lower'}")
            else:
                said.append(f"{what} {_factor(nats)} times what it was" if nats < 700 else f"{what} without bound")
    return f"; {', '.join(said)}"
