"""L-CODEC on CIFAR-10: single training images out of a VGG11, one after another in the same model.

    python lcodec_cifar10.py run --archive cifar10.tar.xz --forget forget.json --model full.safetensors
    python lcodec_cifar10.py try --archive cifar10.tar.xz --forget forget.json --model full.safetensors --removals 20

``run`` removes 100 images, drawn with a seed from the list, one call of ``unlearn`` each, from the block of weights
that L-FOCI chooses, from as many units drawn at random, and from the full last layer, each beginning with the given
model. Per removal it measures the image's loss and gradient norm just before and just after, and its loss on the final
model; after every tenth the accuracy on the test images and the loss on 1,000 training images that stay. Writes
record.json and table.md to --out (``draw`` makes the second from the first). ``try`` walks L-FOCI's block through a
grid of settings on other images of the list and looks at training images alone.

Losses and gradient norms are measured in float64: a Newton step of one image in 50,000 moves a memorised image's loss
by less than float32 shows. Test accuracy runs in bfloat16 autocast. Inputs are normalised, so the perturbations' 0.1
is 0.1 of a channel's deviation.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cifar10 import Images, Loader, load_images, load_model
from torch import Tensor, nn
from torch.nn import functional as F

import fastunlearn as fu

REMOVALS = 100
EVERY = 10  # removals between two looks at the test images
MEASURED = 1_000  # other training images
HEAD = ("classifier.0", "classifier.3", "classifier.6")
LAST = ("classifier.6",)
LAST_SIZE = 10 * (512 + 1)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """One loss per sample in float64: in float32 that of the best-known images rounds to 0, and nothing explains it."""
    return F.cross_entropy(logits.double(), target, reduction="none")


BASE = fu.LCodec(
    perturbations=1_000, noise=0.1, damping=1e-6, hessian="gauss_newton", hessian_samples=256, max_units=8,
    max_block=8 * 513, batch_size=250, loss_fn=cross_entropy, layers=HEAD, select="foci",
)  # fmt: skip
GRID: list[dict[str, Any]] = [
    {"damping": 1e-2},
    {"damping": 1e-4},
    {"damping": 1e-5},
    {"damping": 1e-6},
    {"damping": 1e-7},
    {"damping": 1e-1, "update": "single_sample"},
    {"damping": 1e-2, "update": "single_sample"},
    {"damping": 1e-3, "update": "single_sample"},
]


def blocks(method: fu.LCodec) -> dict[str, fu.LCodec]:
    """The chosen block and the two beside it, the random one to be cut to the size of the chosen one."""
    return {
        "L-FOCI": method,
        "random": replace(method, select="random"),
        "last layer": replace(method, select="all", layers=LAST, max_units=10, max_block=LAST_SIZE),
    }


class Removals:
    """Normalised training images in memory: those to remove first, in the order of removal.

    Removing the k-th leaves what comes after it as the retain set, without a copy.
    """

    def __init__(self, images: Images, forget: Tensor, size: int = 1_000) -> None:
        first = torch.zeros(len(images), dtype=torch.bool)
        first[forget] = True
        order = torch.cat([forget, (~first).nonzero().flatten()])
        batches = list(Loader(images[order], 5_000))
        self.x, self.y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        self.count, self.size = len(forget), size

    def forget(self, k: int) -> list[tuple[Tensor, Tensor]]:
        return [(self.x[k : k + 1], self.y[k : k + 1])]

    def retain(self, k: int) -> list[tuple[Tensor, Tensor]]:
        """All that stay."""
        return list(zip(self.x[k + 1 :].split(self.size), self.y[k + 1 :].split(self.size), strict=True))


def draw_samples(n: int, listed: Tensor, removals: int, seed: int, trying: bool) -> tuple[Tensor, Tensor]:
    """Indices to remove, from the list (``try``: from its other end), and training images to measure, not from it."""
    generator = torch.Generator().manual_seed(seed)
    order = listed[torch.randperm(len(listed), generator=generator)]
    removed = order[-removals:] if trying else order[:removals]
    others = torch.ones(n, dtype=torch.bool)
    others[listed] = False
    order = others.nonzero().flatten()
    return removed, order[torch.randperm(len(order), generator=generator)[:MEASURED]]


def loss_and_gradient(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Of one sample, over all weights, in float64."""
    twin = copy.deepcopy(model).double()
    loss = F.cross_entropy(twin(batch[0].double()), batch[1])
    gradients = torch.autograd.grad(loss, list(twin.parameters()))
    return loss.item(), torch.stack([g.square().sum() for g in gradients]).sum().sqrt().item()


def mean_loss(model: nn.Module, images: Images) -> float:
    with torch.no_grad():
        losses = [cross_entropy(model(x), y) for x, y in Loader(images)]
    return torch.cat(losses).mean().item()


def looked_at(model: nn.Module, others: Images, test: Images | None) -> dict[str, float]:
    found = {"others_loss": mean_loss(model, others)}
    if test is not None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found["test_accuracy"] = fu.evaluate(model, forget=Loader(others), test=Loader(test)).accuracy["test"]
    return found


def remove_all(
    method: fu.LCodec, original: nn.Module, removals: Removals, others: Images, test: Images | None, sizes: list[int]
) -> dict[str, Any]:
    """Every removal in turn. ``sizes``: units per removal that a random block is given; empty for any other block."""
    model = copy.deepcopy(original)
    rows: list[dict[str, Any]] = []
    checks = [{"removals": 0, **looked_at(model, others, test)}]
    for k in range(removals.count):
        single = replace(method, seed=k)
        if sizes:
            single = replace(single, max_units=max(1, sizes[k]))
        sample = removals.forget(k)
        loss, gradient = loss_and_gradient(model, sample[0])
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damping that was raised is in the record
            outcome = single.unlearn(model, sample, removals.retain(k))
        seconds = time.perf_counter() - started
        removal = outcome.details["removals"][0]
        after = loss_and_gradient(model, sample[0])
        rows.append(
            {
                "loss": [loss, after[0]], "gradient_norm": [gradient, after[1]], "seconds": seconds,
                "phases": outcome.seconds, "block": removal["block"], "units": removal["units"],
                "scores": removal["scores"], "damping": removal["damping"], "step_norm": removal["step_norm"],
            }
        )  # fmt: skip
        if (k + 1) % EVERY == 0 or k + 1 == removals.count:
            checks.append({"removals": k + 1, **looked_at(model, others, test)})
            print(f"{k + 1} removals: {checks[-1]}, {seconds:.1f} s the last one", flush=True)
    for k, row in enumerate(rows):
        row["final_loss"] = loss_and_gradient(model, removals.forget(k)[0])[0]
    settings = {**outcome.settings, "seed": "number of the removal"}
    return {"settings": settings, "checks": checks, "removals": rows}


def run(record: dict[str, Any], sets: dict[str, Any], update: list[str], out: Path) -> None:
    """Every block under every update into record.json and table.md, kept after each."""
    record["rows"] = []
    for kind in update:
        sizes: list[int] = []
        for name, method in blocks(replace(BASE, **UPDATES[kind])).items():
            found = remove_all(method, **sets, sizes=sizes if name == "random" else [])
            if name == "L-FOCI":
                sizes = [len(row["units"]) for row in found["removals"]]
            record["rows"].append({"update": kind, "block": name, **found})
            (out / "record.json").write_text(json.dumps(record, indent=1))
            draw(out)
            print(line(record["rows"][-1]), flush=True)


# The mean Hessian of the others, with the step of one image in n; and the public code's second update ("CR"): the
# image's own Hessian and a full step, with the public damping and with ten times that.
UPDATES: dict[str, dict[str, Any]] = {
    "sekhari": {"update": "sekhari"},
    "single_sample": {"update": "single_sample", "damping": 1e-2},
    "single_sample_damped": {"update": "single_sample", "damping": 1e-1},
}


def draw(out: Path) -> None:
    """table.md from record.json."""
    rows = json.loads((out / "record.json").read_text())["rows"]
    head = [
        "| update, block | weights | step | loss up | loss, median change | to the end | gradient norm up "
        "| its median change | test accuracy | lowest | loss of others | seconds: all (select, Hessian, solve) |",
        "|---" * 12 + "|",
    ]
    (out / "table.md").write_text("\n".join([*head, *map(line, rows)]) + "\n")


def line(row: dict[str, Any]) -> str:
    removals, checks = row["removals"], row["checks"]

    def change(pairs: list[list[float]]) -> tuple[int, str]:
        return (
            sum(after > before for before, after in pairs),
            # A loss of 0 that stays 0 has not changed; a ruined model has both.
            f"{100 * (statistics.median(a / b if b else 1 + a for b, a in pairs) - 1):+.3g} %",
        )

    loss, gradient = change([r["loss"] for r in removals]), change([r["gradient_norm"] for r in removals])
    final = change([[r["loss"][0], r["final_loss"]] for r in removals])
    phases = [
        f"{statistics.median(r['phases'].get(phase, 0.0) for r in removals):.2f}"
        for phase in ("select", "hessian", "solve")
    ]
    accuracy = [check["test_accuracy"] for check in checks if "test_accuracy" in check]
    test = [f"{accuracy[0]:.2f} → {accuracy[-1]:.2f}", f"{min(accuracy):.2f}"] if accuracy else ["", ""]
    cells = [
        f"{row['update']}, {row['block']}", f"{statistics.median(r['block'] for r in removals):,.0f}",
        f"{statistics.median(r['step_norm'] for r in removals):.2g}", f"{loss[0]} of {len(removals)}", loss[1],
        final[1], f"{gradient[0]} of {len(removals)}", gradient[1], *test,
        f"{checks[0]['others_loss']:.4f} → {checks[-1]['others_loss']:.4f}",
        f"{statistics.median(r['seconds'] for r in removals):.1f} ({', '.join(phases)})",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("command", choices=["run", "try", "draw"])
    parser.add_argument("--archive", type=Path, help="tar of train|test/<class>/<number>.jpg")
    parser.add_argument("--forget", type=Path, help="JSON list of positions among the training images to draw from")
    parser.add_argument("--model", type=Path, help="weights trained on everything, safetensors")
    parser.add_argument("--removals", type=int, default=REMOVALS)
    parser.add_argument("--seed", type=int, default=0, help="of the images drawn")
    parser.add_argument("--update", nargs="+", choices=list(UPDATES), default=list(UPDATES))
    parser.add_argument("--out", type=Path, default=Path("out/lcodec_cifar10"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.command == "draw":
        draw(options.out)
        return
    if options.archive is None or options.forget is None or options.model is None:
        parser.error(f"{options.command} needs --archive, --forget and --model")
    images = load_images(options.archive, "train")
    listed = torch.tensor(json.loads(options.forget.read_text()))
    trying = options.command == "try"
    if not 0 < options.removals <= len(listed) // 2:
        parser.error(f"--removals must be 1 to {len(listed) // 2}, half the list, got {options.removals}")
    removed, others = draw_samples(len(images), listed, options.removals, options.seed, trying)
    sets: dict[str, Any] = {
        "original": load_model(options.model),
        "removals": Removals(images, removed),
        "others": images[others],
        "test": None,
    }
    if trying:
        for settings in GRID:
            found = remove_all(replace(BASE, **settings), **sets, sizes=[])
            print(settings, line({"update": "try", "block": "L-FOCI", **found}), flush=True)
        return
    sets["test"] = load_images(options.archive, "test")
    record: dict[str, Any] = {
        "torch": torch.__version__, "python": platform.python_version(),
        "threads": torch.get_num_threads(), "cores": os.cpu_count(), "seed": options.seed, "removed": removed.tolist(),
    }  # fmt: skip
    run(record, sets, options.update, options.out)


if __name__ == "__main__":
    main()
