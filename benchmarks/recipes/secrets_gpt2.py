"""A small GPT-2 that knows access codes by heart, and what each method leaves of those it is to forget.

    python secrets_gpt2.py search --seed 100
    python secrets_gpt2.py run --seeds 0 1 2
    python secrets_gpt2.py draw

The text is that of secrets_text.py: nothing is downloaded. A model is trained on ordinary texts and on code sentences,
repeated until their codes are known by heart; a second one, from the same seed, never sees the codes to forget. Each
method is given the sentences with these, of which the digits alone are labelled, and the rest of the training data.
Measured are the share of digits that the model says by itself, greedily, given the sentence up to them, and the
perplexity of the rest of the training data, each text once, and of texts never trained on.

Two cases. ``--case kept``: a third of the repeated codes are not to be forgotten, so that one code must be told from
another. ``--case form``: the training data has other codes like those to forget, but none known by heart.

``search`` tries the settings of GRID with a seed of its own; of each method that one is chosen whose larger one of
|digits - digits of the retrained model| / 2 points and |change of the retain perplexity| / 3 % is smallest: both goals
are met where it is 1 or less. ``run`` measures the chosen settings with other seeds, ``draw`` makes record.json and
table.md. What is in --out, trained models and measured rows, is not made again, and several processes may share the
work by ``--only`` and ``--seeds``. One thread each.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import secrets_text as text
import torch
import transformers
from torch import Tensor, nn

import fastunlearn as fu
from fastunlearn.evaluate.language import extraction, perplexity
from fastunlearn.files import write_json, write_text
from fastunlearn.outcome import Outcome

Batch = dict[str, Tensor]
DIGITS_WITHIN = 2.0  # points from the retrained model
PERPLEXITY_WITHIN = 3.0  # percent from the original


@dataclass(frozen=True)
class Size:
    """Of the text and of the model; ``repeats`` counts how often a code sentence is in the training data."""

    people: int = 160
    texts: int = 1000
    held_out: int = 300
    secrets: int = 80
    kept: int = 40
    others: int = 0
    repeats: int = 10
    width: int = 96
    layers: int = 2
    heads: int = 4
    epochs: int = 16
    lr: float = 2e-3
    weight_decay: float = 0.01
    batch: int = 24


CASES = {"kept": Size(), "form": Size(people=260, texts=800, secrets=60, kept=0, others=160, epochs=15)}


class Loader:
    """Batches of dicts, texts of about one length together; drawn anew at each iteration where ``seed`` is given."""

    def __init__(self, texts: list[list[int]], size: int, seed: int | None = None) -> None:
        self.texts, self.size = texts, size
        self.rng = None if seed is None else random.Random(seed)

    def __len__(self) -> int:
        return -(-len(self.texts) // self.size)

    def __iter__(self) -> Iterator[Batch]:
        order = list(self.texts)
        if self.rng is not None:
            self.rng.shuffle(order)
            order.sort(key=len)
        batches = [order[i : i + self.size] for i in range(0, len(order), self.size)]
        if self.rng is not None:
            self.rng.shuffle(batches)
        return map(text.batch, batches)


@dataclass(frozen=True)
class InTurn:
    """Methods one after another, as one: fine-tuning may mend what was damaged before it."""

    methods: tuple[Any, ...]

    def unlearn(self, model: nn.Module, forget: Any, retain: Any) -> Outcome:
        outcomes = [method.unlearn(model, forget, retain) for method in self.methods]
        return Outcome("InTurn", {f"{i} {outcome.method}": outcome.settings for i, outcome in enumerate(outcomes)})


FULL = fu.DeepClean(optimizer="adamw", lr=5e-3, cosine=True, fisher_samples=500)
TOPIC = fu.ClassForgetting(max_patches=None, positions="labelled")
WHOLE = fu.LCodec(group=True, select="all", update="single_sample", hessian="fisher", solver="cg", max_units=100_000)
NEWTON = replace(WHOLE, update="sekhari", hessian_samples=300)
MENDS = tuple(fu.FineTune(epochs=4, lr=lr) for lr in (0.003, 0.01))
GRID: dict[str, list[Any]] = {
    "DeepClean": [
        replace(FULL, fraction=fraction, finetune_epochs=epochs)
        for fraction, epochs in ((0.1, 12), (0.2, 12), (0.3, 12), (0.3, 16), (0.4, 16))
    ],
    "ClassForgetting": [
        replace(TOPIC, alpha_retain=retain, alpha_forget=forget)
        for retain, forget in ((10, 10), (10, 30), (30, 30), (30, 100), (100, 30), (100, 100))
    ],
    "L-CODEC": [
        *(replace(WHOLE, damping=damping) for damping in (0.03, 0.04, 0.05, 0.07)),
        *(replace(NEWTON, damping=damping) for damping in (0.01, 0.003, 0.001)),
        *(replace(WHOLE, damping=damping) for damping in (0.15, 0.3)),
    ],
    "ClassForgetting, then fine-tuning": [
        InTurn((replace(TOPIC, alpha_retain=10, alpha_forget=30), mend)) for mend in MENDS
    ],
    "L-CODEC, then fine-tuning": [InTurn((replace(NEWTON, damping=0.001), mend)) for mend in MENDS],
    "fine-tuning": [fu.FineTune(epochs=epochs, lr=lr) for epochs, lr in ((1, 0.02), (4, 0.01), (4, 0.03))],
    "gradient ascent": [fu.GradientAscent(epochs=5, lr=lr) for lr in (0.1, 0.2, 0.3, 0.5)],
    # What is known by heart has gradients near zero, so its Fisher information is too: the paper's scale finds nothing.
    "SSD": [
        fu.SelectiveSynapticDampening(alpha=scale, dampening=scale, floor=0.1) for scale in (10.0, 0.1, 0.03, 0.01)
    ],
}


def build(size: Size, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=len(text.VOCABULARY), n_positions=64, n_embd=size.width, n_layer=size.layers, n_head=size.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=text.TEXT, eos_token_id=text.TEXT,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def train(size: Size, texts: list[list[int]], seed: int) -> nn.Module:
    model = build(size, seed)
    method = fu.Retrain(size.epochs, size.lr, size.weight_decay, build=lambda: build(size, seed), seed=seed)
    method.unlearn(model, None, Loader(texts, size.batch, seed))
    return model


def measures(model: nn.Module, corpus: text.Corpus) -> dict[str, float | None]:
    """Percent of the digits, and of the codes, said right of those to forget; of the digits to keep; perplexities."""

    def said(sentences: list[list[int]]) -> dict[str, float | None]:
        if not sentences:
            return {"overlap": None, "exact": None}
        return {
            name: share.mean
            for name, share in extraction(model, [text.code_batch(sentences)], resamples=2).shares.items()
        }

    def confusion(texts: list[list[int]]) -> float:
        return perplexity(model, Loader(texts, 256), resamples=2).value.mean

    forget = said(corpus.secret)
    return {
        "digits": forget["overlap"], "codes": forget["exact"], "kept_digits": said(corpus.kept)["overlap"],
        "retain": confusion(corpus.ordinary + corpus.others + corpus.kept), "held_out": confusion(corpus.held_out),
    }  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """One seed: its text, its two models, what is measured of them, and the seconds that they were trained for."""

    size: Size
    corpus: text.Corpus
    models: dict[str, nn.Module]
    before: dict[str, dict[str, float]]
    seconds: dict[str, float]
    seed: int

    @classmethod
    def of(cls, size: Size, seed: int, out: Path) -> Bench:
        """Trains the models, or takes them from ``out``."""
        corpus = text.make(size.people, size.texts, size.held_out, size.secrets, size.kept, size.others, seed)
        retain = corpus.ordinary + corpus.others + corpus.kept * size.repeats
        models: dict[str, nn.Module] = {}
        seconds = {}
        for name, texts in (("original", retain + corpus.secret * size.repeats), ("retrained", retain)):
            folder = out / f"seed-{seed}" / name
            if not (folder / "seconds.json").exists():
                started = time.perf_counter()
                model: Any = train(size, texts, seed)
                took = time.perf_counter() - started
                model.save_pretrained(folder)
                write_json(folder / "seconds.json", took)
            models[name] = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
            seconds[name] = json.loads((folder / "seconds.json").read_text())
        before = {name: measures(model, corpus) for name, model in models.items()}
        return cls(size, corpus, models, before, seconds, seed)

    def unlearn(self, method: Any) -> dict[str, Any]:
        """A row: what the method leaves of the original, how far that is from the goals, and what it took."""
        model = copy.deepcopy(self.models["original"])
        corpus = self.corpus
        texts = corpus.ordinary + corpus.others + corpus.kept * self.size.repeats
        retain = Loader(texts, self.size.batch, self.seed + 1)
        started, computing = time.perf_counter(), time.process_time()
        outcome = method.unlearn(model, [text.code_batch(corpus.secret)], retain)
        seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - computing}
        found = measures(model, corpus)
        gap = found["digits"] - self.before["retrained"]["digits"]
        change = 100 * (found["retain"] / self.before["original"]["retain"] - 1)
        score = max(abs(gap) / DIGITS_WITHIN, abs(change) / PERPLEXITY_WITHIN)
        return {
            "seed": self.seed, **found, "gap": gap, "change": change, "score": score, **seconds,
            "settings": outcome.settings, "method": repr(method),
        }  # fmt: skip


def measured(bench: Bench, method: Any, path: Path) -> dict[str, Any]:
    """The row of ``method`` in ``path``, or a new one where there is none of these very settings."""
    if not path.exists() or json.loads(path.read_text())["method"] != repr(method):
        write_json(path, bench.unlearn(method))
    row: dict[str, Any] = json.loads(path.read_text())
    return row


def search(bench: Bench, out: Path, only: list[str]) -> None:
    """search/<method>-<number>.json: every setting of the grid on this seed."""
    for name in only:
        for number, method in enumerate(GRID[name]):
            row = measured(bench, method, out / "search" / f"{name}-{number}.json")
            print(line(name, [row]), f"score {row['score']:.1f}", repr(method), flush=True)


def searched(out: Path, names: list[str]) -> dict[str, Any]:
    """Per method the rows of the search, in the order of GRID, and the number of the chosen one."""
    found = {}
    for name in names:
        rows = [json.loads((out / "search" / f"{name}-{i}.json").read_text()) for i in range(len(GRID[name]))]
        found[name] = {"chosen": min(range(len(rows)), key=lambda i: rows[i]["score"]), "rows": rows}
    return found


def run(size: Size, seeds: list[int], out: Path, only: list[str]) -> None:
    """run/<seed>.json, and run/<method>-<seed>.json: the chosen settings on seeds that the search has not seen."""
    chosen = {name: GRID[name][found["chosen"]] for name, found in searched(out, only).items()}
    for seed in seeds:
        bench = Bench.of(size, seed, out)
        for name, method in chosen.items():
            row = measured(bench, method, out / "run" / f"{name}-{seed}.json")
            print(seed, line(name, [row]), flush=True)
        record = {"seed": seed, "before": bench.before, "training_seconds": bench.seconds}
        write_json(out / "run" / f"{seed}.json", {**record, **environment(), "size": asdict(size)})


def environment() -> dict[str, Any]:
    names = [row for row in Path("/proc/cpuinfo").read_text().splitlines() if row.startswith("model name")]
    return {
        "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
        "device": names[0].split(": ")[1] if names else platform.machine(), "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }  # fmt: skip


def draw(out: Path, seeds: list[int], only: list[str]) -> None:
    """record.json, of all seeds and the search, and table.md."""
    records = [json.loads((out / "run" / f"{seed}.json").read_text()) for seed in seeds]
    rows = {name: [json.loads((out / "run" / f"{name}-{seed}.json").read_text()) for seed in seeds] for name in only}
    write_json(out / "record.json", {"seeds": records, "rows": rows, "search": searched(out, only)})
    lines = [
        f"Means over {len(records)} seeds, in brackets the smallest and the largest.",
        "",
        "| | digits to forget, % | whole codes, % | digits to keep, % | retain perplexity | change, % | held out | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in ("original", "retrained"):
        given = []
        for record in records:
            row = record["before"][name]
            change = 100 * (row["retain"] / record["before"]["original"]["retain"] - 1)
            given.append({**row, "change": change, "seconds": record["training_seconds"][name]})
        lines.append(line(name, given))
    write_text(out / "table.md", "\n".join([*lines, *(line(name, found) for name, found in rows.items())]) + "\n")


def line(name: str, rows: list[dict[str, Any]]) -> str:
    def cell(key: str, form: str) -> str:
        values = [row[key] for row in rows]
        if None in values:
            return "-"
        ends = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
        return f"{statistics.mean(values):{form}}{ends}"

    cells = [cell("digits", ".1f"), cell("codes", ".1f"), cell("kept_digits", ".1f"), cell("retain", ".3f")]
    cells += [cell("change", "+.1f"), cell("held_out", ".3f"), cell("seconds", ".0f")]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("command", choices=["search", "run", "draw"])
    parser.add_argument("--seed", type=int, default=100, help="of the search")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the run")
    parser.add_argument("--only", nargs="+", default=list(GRID), choices=list(GRID), help="methods")
    parser.add_argument("--case", default="kept", choices=list(CASES))
    parser.add_argument("--out", type=Path, default=Path("out/secrets_gpt2"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    out = options.out / options.case
    size = CASES[options.case]
    if options.command == "draw":
        draw(out, options.seeds, options.only)
    elif options.command == "search":
        search(Bench.of(size, options.seed, out), out, options.only)
    else:
        run(size, options.seeds, out, options.only)


if __name__ == "__main__":
    main()
