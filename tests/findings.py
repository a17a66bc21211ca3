"""What the pipeline hands to record and report, made up but plausible: a run of ``unlearn`` and one of ``compare``."""

from __future__ import annotations

import math
import random
from typing import Any

DIGITS = [str(c) for c in range(10)]
SETS = ("forget", "retain", "test")
ATTACKS = ("loss", "confidence", "entropy", "modified entropy", "u-lira")
VERSIONS = {"fastunlearn": "0.1.0", "python": "3.11.2", "torch": "2.13.0+cpu"}


def estimate(mean: float, half: float | None = None, runs: int = 1) -> dict[str, Any]:
    """As ``Estimate.as_dict`` writes it."""
    return {"mean": mean, "runs": runs} | ({} if half is None else {"low": mean - half, "high": mean + half})


def roc(strength: float, points: int = 120) -> dict[str, list[float]]:
    """tpr = fpr ** (1 - strength): 0 is a coin toss; the area under it is 1 / (2 - strength)."""
    fpr = [0.0, *(10 ** (-4 + 4 * k / (points - 2)) for k in range(points - 1))]
    return {"fpr": fpr, "tpr": [x ** (1 - strength) if x else 0.0 for x in fpr]}


def attack(strength: float, runs: int = 1) -> dict[str, Any]:
    half = 0.018 / math.sqrt(runs)
    tpr = {key: estimate(float(key) ** (1 - strength), 0.3 * float(key), runs) for key in ("0.001", "0.01")}
    return {"auc": estimate(1 / (2 - strength), half, runs), "tpr": tpr}


def model(
    name: str,
    role: str,
    accuracy: tuple[float, float, float],
    reference: tuple[float, float, float] | None,
    leak: float,
    *,
    runs: int = 1,
    seconds: float | None = None,
    relearn: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """One entry of ``models``; ``leak`` is the strength of the attacks on it."""
    draw = random.Random(seed)
    half = None if runs == 1 else 0.6

    def per_set(values: tuple[float, ...], spread: float | None) -> dict[str, Any]:
        return {s: estimate(v, spread, runs) for s, v in zip(SETS, values, strict=True)}

    near = tuple(0.02 + 0.004 * abs(a - b) for a, b in zip(accuracy, reference or accuracy, strict=True))
    per_class = {
        s: {
            c: {
                "accuracy": estimate(min(100.0, max(0.0, a + draw.gauss(0, 2)))),
                "loss": estimate(draw.uniform(0.05, 0.4)),
                "samples": 40 + 3 * k,
            }
            for k, c in enumerate(DIGITS)
        }
        for s, a in zip(SETS, accuracy, strict=True)
        if s == "test"
    }
    compared = reference is not None and role != "reference"
    return {
        "name": name,
        "role": role,
        "accuracy": per_set(accuracy, half),
        "loss": per_set(tuple(0.03 + 0.05 * (100 - a) for a in accuracy), None if runs == 1 else 0.01),
        "gap": per_set(tuple(a - b for a, b in zip(accuracy, reference, strict=True)), half)
        if compared and reference
        else None,
        "per_class": per_class,
        "kl": per_set(near, None) if compared else None,
        "js": per_set(tuple(v / 4 for v in near), None) if compared else None,
        "tow": estimate(0.97 - leak / 5, None if runs == 1 else 0.01, runs) if compared else None,
        "attacks": {a: attack(leak * (0.6 + 0.1 * k), runs) for k, a in enumerate(ATTACKS)},
        "svc": estimate(50 + 30 * leak, 2.0 if runs > 1 else None, runs),
        "relearn": None if relearn is None else estimate(relearn, 4.0 if runs > 1 else None, runs),
        "seconds": None if seconds is None else estimate(seconds, 0.1 * seconds if runs > 1 else None, runs),
    }


def confusion(size: int, accuracy: float, seed: int, samples: int = 100) -> list[list[int]]:
    draw = random.Random(seed)
    rows = []
    for true in range(size):
        right = min(samples, max(0, round(samples * (accuracy / 100 + draw.gauss(0, 0.02)))))
        row = [0] * size
        row[true] = right
        for _ in range(samples - right):
            row[draw.randrange(size)] += 1
        rows.append(row)
    return rows


def layers(count: int, seed: int = 3) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    found = []
    for k in range(count):
        of = draw.choice((64, 4608, 36864, 147456, 589824))
        share = draw.betavariate(1.5, 4)
        found.append(
            {
                "name": f"features.{3 * k}.{'weight' if k % 2 == 0 else 'bias'}",
                "changed": int(share * of),
                "of": of,
                "relative_change": 0.4 * share,
            }
        )
    return found


def leaks(count: int, seed: int, fall: float) -> dict[str, Any]:
    """Per-example scores that were high for the forgotten samples and fell by ``fall``."""
    draw = random.Random(seed)
    before = [draw.gauss(1.2 if fall > 0.5 else 0.4, 0.6) for _ in range(count)]
    after = [b * (1 - fall) + draw.gauss(0, 0.25) for b in before]
    after[count // 2] = 2.1  # one that stays where it was
    return {
        "ids": [f"sample-{draw.getrandbits(32):08x}" for _ in range(count)],
        "before": before,
        "after": after,
        "reference": [draw.gauss(0, 0.25) for _ in range(count)],
    }


def ratios(seed: int = 5) -> dict[str, Any]:
    edges = [10 ** (-4 + 7 * k / 56) for k in range(57)]
    draw = random.Random(seed)
    counts = [int(90_000 * math.exp(-(((k - 24) / 9) ** 2)) * draw.uniform(0.9, 1.1)) for k in range(56)]
    title = "Fisher information, forgotten over retained"
    return {"title": title, "xlabel": "ratio per weight", "edges": edges, "counts": counts, "mark": 1.7}


def spectrum(layer: str, seed: int, size: int = 64) -> dict[str, Any]:
    draw = random.Random(seed)
    retain, forget = ([draw.uniform(0.7, 1.3) * (k + 1) ** -p for k in range(size)] for p in (1.6, 2.2))
    return {"layer": layer, "retain": sorted(retain, reverse=True), "forget": sorted(forget, reverse=True)}


def unlearn_findings() -> dict[str, Any]:
    """DeepClean on 2,500 random images, one run."""
    reference = (85.5, 98.4, 85.2)
    models = [
        model("original", "original", (99.6, 99.5, 85.6), reference, 0.45, relearn=0, seed=1),
        model("DeepClean", "unlearned", (88.1, 97.1, 84.6), reference, 0.12, seconds=41.3, relearn=38, seed=2),
        model("retrained", "reference", reference, None, 0.02, seconds=1260.0, relearn=52, seed=3),
    ]
    names = [m["name"] for m in models]
    strength = dict(zip(names, (0.45, 0.12, 0.02), strict=True))
    probed = [f"features.{k}" for k in range(0, 24, 3)]
    return {
        "title": "Unlearning 2,500 images from vgg11_bn",
        "verdict": "Largely forgotten: on the forgotten images the model is 2.6 points better than one retrained "
        "without them, and the strongest attack finds them with AUC 0.53 where 0.50 is a coin toss.",
        "request": {
            "forget": "forget_2500.txt",
            "retain": "rest",
            "samples": {"forget": 2500, "retain": 47500, "test": 10000},
            "data": "cifar10/ (ImageFolder)",
            "model": "torchvision:vgg11_bn",
        },
        "models": models,
        "roc": {n: {a: roc(s * (0.6 + 0.1 * k)) for k, a in enumerate(ATTACKS)} for n, s in strength.items()},
        "layers": layers(20),
        "probes": {n: {p: 0.5 + s * (0.4 + k / 16) for k, p in enumerate(probed)} for n, s in strength.items()},
        "activation_distance": {
            n: {p: 0.05 + s * (1 + k / 8) for k, p in enumerate(probed)}
            for n, s in strength.items()
            if n != "retrained"
        },
        "confusion": {
            "classes": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
            "before": confusion(10, 86, 1),
            "after": confusion(10, 82, 2),
            "reference": confusion(10, 85, 3),
        },
        "histograms": [ratios()],
        "spectra": [],
        "leaks": {"forgotten": leaks(120, 7, 0.9), "neighbours": leaks(60, 8, 0.1)},
        "limits": [
            "This is a measurement, not a proof of erasure.",
            "Population attacks overstate protection; per-example attacks with few shadow models understate leakage.",
            "One run: the spread over seeds is unknown.",
        ],
        "settings": {
            "method": "DeepClean",
            "fraction": 0.3,
            "finetune": {"epochs": 3, "lr": 0.01, "momentum": 0.9},
            "seed": 0,
        },
        "versions": VERSIONS,
        "device": {"type": "cpu", "name": "x86-64, 2 cores", "kernels": "avx512"},
        "record": {"id": "2f6b1c1e-6d0f-4a55-9d0c-8a51d9f3f0b1", "sha256": "9f86d081884c7d659a2feaa0c55ad015" * 2},
    }


def compare_findings() -> dict[str, Any]:
    """Class 3 of the digits forgotten by several methods, over 3 seeds."""
    reference = (0.0, 98.9, 88.1)
    plan: list[tuple[str, str, tuple[float, float, float], float, float | None, float | None]] = [
        ("original", "original", (99.8, 99.4, 97.9), 0.55, None, 0.0),
        ("ClassForgetting", "unlearned", (0.6, 98.6, 87.9), 0.05, 0.21, 41.0),
        ("DeepClean", "unlearned", (4.2, 97.7, 87.0), 0.10, 0.83, 33.0),
        ("LCodec", "unlearned", (61.4, 99.0, 94.1), 0.40, 3.9, 9.0),
        ("retrained", "reference", reference, 0.01, 6.4, 47.0),
        ("finetune", "baseline", (71.3, 99.3, 95.2), 0.42, 1.1, 7.0),
        ("gradient ascent", "baseline", (2.1, 82.4, 74.3), 0.22, 0.4, 28.0),
        ("random labels", "baseline", (9.4, 95.5, 85.6), 0.30, 0.9, 12.0),
    ]
    models = [
        model(n, role, a, None if role == "reference" else reference, s, runs=3, seconds=t, relearn=r, seed=k)
        for k, (n, role, a, s, t, r) in enumerate(plan)
    ]
    strength = {n: s for n, _, _, s, _, _ in plan}
    probed = ["conv1", "conv2", "fc1", "fc2"]
    return unlearn_findings() | {
        "title": "Forgetting class 3 of the digits: three methods, three baselines, retraining",
        "verdict": "ClassForgetting and DeepClean come within 5 points of the retrained models on the forgotten class; "
        "LCodec does not.",
        "request": {
            "forget": "class:3",
            "retain": "rest",
            "samples": {"forget": 128, "retain": 1130, "test": 539},
            "data": "scikit-learn digits",
            "model": "fastunlearn.demo:network",
        },
        "models": models,
        "roc": {n: {a: roc(s * (0.6 + 0.1 * k)) for k, a in enumerate(ATTACKS)} for n, s in strength.items()},
        "layers": layers(8),
        "probes": {n: {p: 0.5 + s * (0.5 + k / 8) for k, p in enumerate(probed)} for n, s in strength.items()},
        "activation_distance": None,
        "confusion": {
            "classes": DIGITS,
            "before": confusion(10, 97, 4),
            "after": confusion(10, 90, 5),
            "reference": None,
        },
        "histograms": [],
        "spectra": [spectrum(layer, k) for k, layer in enumerate(probed)],
        "leaks": None,
        "settings": {"methods": ["ClassForgetting", "DeepClean", "LCodec"], "seeds": [0, 1, 2], "alpha": [100.0, 3.0]},
        "record": {"id": "compare-0001", "sha256": None},
    }
