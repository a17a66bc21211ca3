"""The picture of benchmarks/test_fisher.py: what each way to the Fisher diagonal takes, in plain backward passes.

python benchmarks/picture.py out/bench.json fisher.svg
"""

from __future__ import annotations

import argparse
import json

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

COLOURS = {"ours": "#c44e52", "loop": "#8c8c8c", "vmap": "#4c72b0", "opacus": "#55a868", "backpack": "#8172b3"}


def main(source: str, target: str) -> None:
    with open(source, encoding="utf-8") as file:
        runs = json.load(file)["benchmarks"]
    models = {
        run["name"].partition("[")[2].rstrip("]"): run["extra_info"]["medians"]
        for run in runs
        if run["name"].startswith("test_fisher_diagonal")
    }
    figure, axes = plt.subplots(figsize=(8, 1 + 0.62 * len(models)), layout="constrained")
    ticks, height = [], 0.8 / len(COLOURS)
    for i, (name, medians) in enumerate(models.items()):
        present = [peer for peer in COLOURS if peer in medians]
        for j, peer in enumerate(present):
            y = -i + 0.4 - (j + 0.5) * height
            ratio = medians[peer] / medians["plain_backward"]
            axes.barh(y, ratio, height, color=COLOURS[peer])
            axes.text(ratio * 1.03, y, f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}", va="center", fontsize=6)
        model, _, samples = name.rpartition("-")
        ticks.append(f"{model}, N = {samples}")
    axes.set_yticks([-i for i in range(len(ticks))], ticks)
    axes.set_xscale("log")
    axes.set_xlim(left=0.5)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time in plain forward and backward passes (logarithmic)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    axes.legend(handles, COLOURS, loc="lower right", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="JSON of pytest-benchmark")
    parser.add_argument("target", help="picture to write")
    main(**vars(parser.parse_args()))
