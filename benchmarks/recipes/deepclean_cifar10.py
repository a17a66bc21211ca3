"""DeepClean on CIFAR-10: 2,500 random training images out of a VGG11, beside a model retrained without them.

    python deepclean_cifar10.py search --archive cifar10.tar.xz --forget forget.json
    python deepclean_cifar10.py run --archive cifar10.tar.xz --forget forget.json \
        --model full.safetensors --reference retrained.safetensors

``search`` is how the settings below were chosen. It never sees the test images, the retrained model or the model that
``run`` unlearns: it trains a shadow model without 2,500 held-back training images, makes that forget 2,500 other
training images, and measures how far the result is from a model that never saw those. What such a model does is known
without training it: on the forgotten images what the shadow does on the held-back ones, on retained images what the
shadow does there.

``run`` measures the settings, the front of thresholds, selective synaptic dampening, fine-tuning alone and gradient
ascent against the retrained model, and writes record.json, table.md and front.png to --out (``draw`` makes the last
two from the first). Training, fine-tuning and
measuring run in bfloat16 autocast; the Fisher passes in float32.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cifar10 import Images, Loader, load_images, load_model, train
from safetensors.torch import save_file
from torch import Tensor, nn

import fastunlearn as fu

EPOCHS = 14  # of training from scratch
SAMPLES = 2_500  # held back by the search, forgotten by it, and read for the retained information
MEASURED = 10_000  # retained images that accuracy is measured on
BATCH = 64

# The first two convolutions hold edges and colours, cost most of a backward pass, and stay; so does batch norm, a zero
# in which silences a whole channel.
FIRST = ("features.0.weight", "features.0.bias", "features.4.weight", "features.4.bias")
BASE = fu.DeepClean(
    fraction=0.4, floor=0.0, lr=0.1, cosine=True, protect=(nn.BatchNorm2d, *FIRST), autocast=torch.bfloat16,
    fisher_samples=SAMPLES,
)  # fmt: skip
SHORT = replace(BASE, finetune_epochs=1)
LONG = replace(BASE, finetune_epochs=3)
FRACTIONS = (0.1, 0.2)
ALPHAS = (2.0,)
GRID: list[dict[str, Any]] = [
    {"fraction": 0.1, "floor": 0.1, "lr": 0.03},
    {"fraction": 0.3, "lr": 0.05},
    {"fraction": 0.4, "lr": 0.05},
    {"fraction": 0.4},
    {"fraction": 0.5, "lr": 0.05, "finetune_epochs": 3},
    {"fraction": 0.4, "finetune_epochs": 3},
]


def shuffled(images: Images, seed: int) -> Loader:
    """Without flips: an image shown as it was memorised is memorised again in fewer passes."""
    return Loader(images, BATCH, shuffle=True, seed=seed)


def split(n: int, forget: Tensor, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Indices held back, forgotten and retained in the search; none of them is one that ``run`` forgets."""
    others = torch.ones(n, dtype=torch.bool)
    others[forget] = False
    order = others.nonzero().flatten()
    order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))]
    return order[:SAMPLES], order[SAMPLES : 2 * SAMPLES], order[2 * SAMPLES :]


def measured(model: nn.Module, forget: Images, retain: Images, test: Images) -> fu.Metrics:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return fu.evaluate(model, forget=Loader(forget), retain=Loader(retain), test=Loader(test))


def distance(metrics: fu.Metrics, goal: dict[str, float]) -> float:
    """Mean absolute gap of the three accuracies, in points."""
    return sum(abs(metrics.accuracy[name] - goal[name]) for name in goal) / len(goal)


def search(images: Images, forget: Tensor, out: Path) -> None:
    held_back, proxy, retained = split(len(images), forget)
    path = out / "shadow.safetensors"
    if not path.exists():
        seen = torch.ones(len(images), dtype=torch.bool)
        seen[held_back] = False
        save_file(train(images[seen], EPOCHS, seed=1).state_dict(), path)
    shadow = load_model(path)
    sets = images[proxy], images[retained[:SAMPLES]], images[held_back]
    before = measured(shadow, *sets)
    goal = {**before.accuracy, "forget": before.accuracy["test"]}
    print(f"shadow {before.accuracy}, AUC {before.membership_auc:.3f}; goal {goal}, AUC 0.5", flush=True)
    for options in [{}, *GRID]:
        model, seconds = copy.deepcopy(shadow), 0.0
        if options:
            method = replace(BASE, **options)
            outcome = method.unlearn(model, Loader(sets[0]), shuffled(images[retained], 0))
            seconds = sum(outcome.seconds.values())
        metrics = measured(model, *sets)
        row = {"settings": options, "distance": distance(metrics, goal), "seconds": seconds, **metrics.as_dict()}
        with (out / "search.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{options}: distance {row['distance']:.2f}, AUC {metrics.membership_auc:.3f}, {metrics.accuracy}",
            flush=True,
        )


def run(images: Images, test: Images, forget: Tensor, original: nn.Module, reference: nn.Module, out: Path) -> None:
    kept = torch.ones(len(images), dtype=torch.bool)
    kept[forget] = False
    retained = images[kept]
    few = torch.randperm(len(retained), generator=torch.Generator().manual_seed(0))[:MEASURED]
    sets = images[forget], retained[few], test
    theirs = measured(reference, *sets)

    started = time.perf_counter()
    train(retained, EPOCHS, stop_after=1)
    retraining = EPOCHS * (time.perf_counter() - started)
    rows: list[dict[str, Any]] = []

    def add(name: str, model: nn.Module, seconds: float = 0.0, **more: Any) -> None:
        metrics = measured(model, *sets)
        row = {
            "name": name, **metrics.as_dict(), "distance": distance(metrics, theirs.accuracy), "seconds": seconds,
            "share_of_retraining": seconds / retraining, **more,
        }  # fmt: skip
        rows.append(row)
        (out / "record.json").write_text(json.dumps({"retraining_seconds": retraining, "rows": rows}, indent=1))
        print(line(row), flush=True)

    def unlearn(name: str, method: Any, seed: int = 0) -> None:
        model = copy.deepcopy(original)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=isinstance(method, (fu.FineTune, fu.GradientAscent))):
            outcome = method.unlearn(model, Loader(sets[0]), shuffled(retained, seed))
        add(name, model, sum(outcome.seconds.values()), outcome=outcome.as_dict())

    add("original", original)
    add("retrained", reference, retraining)
    for seed in range(3):
        unlearn(f"DeepClean, 40 %, 1 epoch, seed {seed}", replace(SHORT, seed=seed), seed)
    unlearn("DeepClean, 40 %, 3 epochs", LONG)
    for alpha in ALPHAS:
        unlearn(f"SSD, alpha {alpha:g}", fu.SelectiveSynapticDampening(alpha=alpha, floor=0.1, fisher_samples=SAMPLES))
    unlearn("fine-tuning alone, 1 epoch", fu.FineTune(lr=0.01))
    unlearn("gradient ascent, 1 epoch", fu.GradientAscent(lr=1e-4))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what has forgotten too much is in the table
        sweep = BASE.sweep(
            original, Loader(sets[0]), shuffled(retained, 0), fractions=FRACTIONS, test=Loader(test),
            reference=theirs, retain_measured=Loader(sets[1]),
        )  # fmt: skip
    print(sweep, flush=True)
    for point in sweep.points:
        seconds = sweep.fisher_seconds + sum(point.outcome.seconds.values())
        name = f"DeepClean, {100 * point.outcome.settings['fraction']:.0f} %, 1 epoch"
        row = {
            "name": name, **point.metrics.as_dict(), "distance": distance(point.metrics, theirs.accuracy),
            "seconds": seconds, "share_of_retraining": seconds / retraining, "outcome": point.outcome.as_dict(),
        }  # fmt: skip
        rows.append(row)
    record = {"retraining_seconds": retraining, "torch": torch.__version__, "rows": rows, "sweep": sweep.as_dict()}
    (out / "record.json").write_text(json.dumps(record, indent=1))
    draw(out)


def draw(out: Path) -> None:
    """table.md and front.png from record.json."""
    from matplotlib.figure import Figure

    rows = json.loads((out / "record.json").read_text())["rows"]
    head = ["| | forget | retain | test | mean gap | attack AUC | of retraining |", "|---|---|---|---|---|---|---|"]
    (out / "table.md").write_text("\n".join([*head, *map(line, rows)]) + "\n")
    goal = next(row["accuracy"] for row in rows if row["name"] == "retrained")
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        ours = row["name"].startswith("DeepClean")
        forget, retain = (abs(row["accuracy"][name] - goal[name]) for name in ("forget", "retain"))
        axes.scatter(forget, retain, color="#3b6ea5" if ours else "#8a8a8a")
        axes.annotate(
            row["name"].removeprefix("DeepClean, "), (forget, retain), xytext=(0, 6 if ours else -11), fontsize=7,
            textcoords="offset points", ha="right" if forget > 8 else "left",
        )  # fmt: skip
    axes.set_xlabel("forget accuracy, points from the retrained model")
    axes.set_ylabel("retain accuracy, points from it")
    axes.set_title("blue: DeepClean, by share of live weights reset", fontsize=10)
    figure.savefig(out / "front.png", dpi=130)


def line(row: dict[str, Any]) -> str:
    accuracy = " | ".join(f"{row['accuracy'][name]:.1f}" for name in ("forget", "retain", "test"))
    share = f"{100 * row['share_of_retraining']:.1f} %" if row["seconds"] else ""
    return f"| {row['name']} | {accuracy} | {row['distance']:.2f} | {row['membership_auc']:.3f} | {share} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("command", choices=["search", "run", "draw"])
    parser.add_argument("--archive", type=Path, help="tar of train|test/<class>/<number>.jpg")
    parser.add_argument("--forget", type=Path, help="JSON list of positions among the training images")
    parser.add_argument("--model", type=Path, help="weights trained on everything, safetensors")
    parser.add_argument("--reference", type=Path, help="weights retrained without the forgotten images, safetensors")
    parser.add_argument("--out", type=Path, default=Path("out/deepclean_cifar10"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.command == "draw":
        draw(options.out)
        return
    if options.archive is None or options.forget is None:
        parser.error(f"{options.command} needs --archive and --forget")
    images = load_images(options.archive, "train")
    forget = torch.tensor(json.loads(options.forget.read_text()))
    if options.command == "search":
        search(images, forget, options.out)
        return
    if options.model is None or options.reference is None:
        parser.error("run needs --model and --reference")
    test = load_images(options.archive, "test")
    run(images, test, forget, load_model(options.model), load_model(options.reference), options.out)


if __name__ == "__main__":
    main()
