"""``compare``: several methods and retraining, over seeds, in one report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fastunlearn.checkpoint import load_into, load_weights, save_weights
from fastunlearn.files import write_json, write_text
from fastunlearn.jobs import language
from fastunlearn.jobs.config import Config, ConfigError, Say, check_type, write_config
from fastunlearn.jobs.deletion import draws, run_method, train
from fastunlearn.jobs.findings import Row, closest, comparison_verdict, joined, mean_roc, model_row
from fastunlearn.jobs.language import KnownTexts
from fastunlearn.jobs.measuring import Known, known_of, measure
from fastunlearn.jobs.methods import entry, make_method
from fastunlearn.jobs.task import Task, applicable, open_task
from fastunlearn.jobs.workspace import Workspace, require_free
from fastunlearn.report.html import write_report
from fastunlearn.report.pictures import write_pictures
from fastunlearn.report.record import device_name, plain_limits, versions

Chosen = tuple[str, str, dict[str, Any]]  # label, method, settings


def compare(config: Config, resume: bool, say: Say) -> tuple[Path, dict[str, Any]]:
    """Run every method with every seed beside a retrained model; returns the folder and the findings.

    Without ``weights`` each seed trains an original of its own; without ``reference`` each seed retrains one without
    the forgotten samples, several of them at once where that is faster. The folder holds ``report.html``,
    ``findings.json``, ``config.yaml`` and ``pictures``. Each method with each seed is a phase of its own, kept as soon
    as it is finished. Raises as :func:`~fastunlearn.jobs.deletion.unlearn`.
    """
    config.require("out")
    assert config.out is not None
    if config.shadows:
        raise ConfigError("shadows belong to unlearn; a comparison has the attacks that need no other models")
    chosen = _chosen(config)
    require_free(Path(config.out), resume)
    task = open_task(config)
    if task.weights is None or task.reference is None:
        task.require_fresh()
    skipped: dict[str, str] = {}
    if not chosen:
        names, skipped = applicable(task)
        if task.language:
            names.remove("lcodec")
            skipped["lcodec"] = "the perturbations that it chooses units by are not made for texts that are continued"
        chosen = [(name, name, {}) for name in names]
    if task.language:
        language.require_measurable(task)
    out = Path(config.out).resolve()
    space = Workspace(out, task.identity() | language.identity(task), resume)
    try:
        run = _Comparison(task, space, chosen, say)
        findings = run.findings(skipped)
        if draws(config, say):
            write_pictures(findings, space.path / "pictures")
        # The way that was faster here, so that the file gives the same bits elsewhere.
        write_text(space.path / "config.yaml", write_config(replace(config, stack=run.stack)))
        write_json(space.path / "findings.json", findings)
        write_report(findings, space.path / "report.html")
        space.finish()
    finally:
        space.close()
    return out, findings


def _chosen(config: Config) -> list[Chosen]:
    """The methods asked for, their settings checked; a label tells two of the same name apart."""
    found: list[Chosen] = []
    for item in config.methods:
        given = {"method": item} if isinstance(item, str) else item
        if not isinstance(given, dict) or not isinstance(given.get("method"), str):
            raise ConfigError(f"methods must hold names or {{method: name, settings: {{...}}}}, got {item!r}")
        if unknown := sorted(set(given) - {"method", "settings", "label"}):
            raise ConfigError(
                f"methods: {given['method']}: unknown key {unknown[0]!r}; known are method, settings, label"
            )
        name, settings, label = given["method"], given.get("settings") or {}, given.get("label") or given["method"]
        check_type(settings, "dict", f"methods: {name}: settings")
        check_type(label, "str", f"methods: {name}: label")
        if not re.fullmatch(r"[\w .,;:=()+%-]{1,80}", label):  # files are called by it
            raise ConfigError(
                f"methods: {name}: label must be up to 80 letters, digits and simple signs, got {label!r}"
            )
        if name == "retrain":
            raise ConfigError("methods: retrain is always run, as the reference; leave it out")
        make_method(name, settings, config.seed, nn.Module)
        if label in {label for label, _, _ in found} | {"original", "retrained"}:
            raise ConfigError(f"methods: {label} is there twice; give one of them another label")
        found.append((label, name, settings))
    return found


class _Comparison:
    """The phases: training what is missing, then each method with each seed."""

    def __init__(self, task: Task, space: Workspace, chosen: Sequence[Chosen], say: Say) -> None:
        self.task, self.space, self.chosen, self.say = task, space, chosen, say
        self.stack = task.config.stack
        self.seeds = [task.config.seed + i for i in range(task.config.seeds)]

    def findings(self, skipped: dict[str, str]) -> dict[str, Any]:
        """As ``unlearn`` makes them, with intervals over the seeds."""
        task, config = self.task, self.task.config
        seconds = self.space.phase("train", self._train)
        self.stack = seconds["stack"]
        rows: dict[str, list[Row]] = {}
        roles = {"original": "original"}
        given = task.weights is not None and task.reference is not None  # the same two models for every seed
        known: Known | KnownTexts | None = None
        for seed in self.seeds:
            original, reference = self._model("original", seed), self._model("retrained", seed)
            here = replace(task, model=original)
            if known is None or not given:
                known = known_of(here, original, reference)
            for label, name, settings in self.chosen:
                roles[label] = "baseline" if entry(name).baseline else "unlearned"
                run = partial(self._run, here, reference, known, seed, label, name, settings)
                found = self.space.phase(f"{seed}-{label}", run)
                rows.setdefault(label, []).append(found)
            if given and seed != self.seeds[0]:
                continue
            for label, model in (("original", original), ("retrained", reference)):
                self.say(f"seed {seed}: measuring the {label} model")
                found = self.space.phase(f"{seed}-{label}", partial(measure, here, model, reference, known, seed))
                rows.setdefault(label, []).append({**found, "seconds": seconds.get(label)})
        roles["retrained"] = "reference"
        order = ["original", *(label for label, _, _ in self.chosen), "retrained"]
        apart = ("roc", "probes", "activation_distance", "confusion", "notes")
        models = [
            model_row(label, roles[label], [{k: v for k, v in r.items() if k not in apart} for r in rows[label]])
            for label in order
        ]
        best = language.closest(models) if task.language else closest(models)
        samples = {name: len(part) for name, part in task.sets.items()} | {"retain": len(task.retain)}
        attacks = list(models[0]["attacks"])
        limits = plain_limits(method=best["name"], reference=True, runs=len(self.seeds), attacks=attacks)
        limits += (
            [f"{best['name']} was chosen by these very figures, which flatters it."] if len(self.chosen) > 1 else []
        )
        limits += [f"{name} was left out: {reason}." for name, reason in skipped.items()]
        limits += sorted({note for label in order for row in rows[label] for note in row["notes"]})
        return {
            "title": f"Ways to forget {config.forget}",
            "verdict": (language.comparison_verdict if task.language else comparison_verdict)(models, best),
            "request": {"forget": config.forget, "retain": config.retain, "samples": samples,
                        "data": config.data or config.forget, "model": config.model},
            "models": models,
            "closest": best["name"],
            "roc": {label: {a: mean_roc([r["roc"][a] for r in rows[label]]) for a in rows[label][0]["roc"]}
                    for label in order},
            "layers": [],
            "probes": _means(rows, order, "probes"),
            "activation_distance": _means(rows, order, "activation_distance"),
            "confusion": self._confusion(rows, best["name"]),
            "histograms": [],
            "spectra": [],
            "leaks": None,
            "limits": limits,
            "settings": {label: {"method": name, **settings} for label, name, settings in self.chosen}
            | {"seeds": self.seeds, "training": seconds["how"]},
            "versions": versions(),
            "device": {"name": device_name(task.device), "type": task.device.type},
            "record": {"id": None, "sha256": None},
        }  # fmt: skip

    def _train(self) -> dict[str, Any]:
        """Originals where no weights were given, references where none was; seconds of each, and how."""
        task, seeds = self.task, self.seeds
        wanted: list[tuple[str, Any]] = []
        if task.weights is None:
            wanted.append(("original", None))
        if task.reference is None:
            wanted.append(("retrained", task.retain))
        found: dict[str, Any] = {"stack": task.config.stack, "how": "not needed"}
        for label, part in wanted:
            if part is None:
                part = task.everything()
            self.say(f"training {len(seeds)} models, {label}, on {len(part):,} samples")
            models, found[label], report = train(task, [part] * len(seeds), seeds)
            found |= {"stack": report.mode, "how": f"{report.mode}: {report.reason}"}
            task = replace(task, config=replace(task.config, stack=report.mode))  # the references as the originals
            for seed, model in zip(seeds, models, strict=True):
                save_weights(self.space.weights(f"{label}-{seed}"), model.state_dict())
        return found

    def _model(self, label: str, seed: int) -> nn.Module:
        kept = self.space.weights(f"{label}-{seed}")
        model = self.task.copy()
        if kept.exists():
            load_into(model, load_weights(kept), "what this run kept")
        elif label == "retrained":
            assert self.task.reference is not None  # or it would have been trained
            load_into(model, self.task.reference, "--reference")
        return model.eval()

    def _run(
        self,
        here: Task,
        reference: nn.Module,
        known: Known | KnownTexts,
        seed: int,
        label: str,
        name: str,
        settings: dict[str, Any],
    ) -> dict[str, Any]:
        self.say(f"seed {seed}: {label}")
        model = here.copy()
        outcome, _ = run_method(here, name, make_method(name, settings, seed, here.fresh), model, seed)
        return {**measure(here, model, reference, known, seed), "seconds": sum(outcome.seconds.values())}

    def _confusion(self, rows: dict[str, list[Row]], best: str) -> dict[str, Any] | None:
        """Counts added up over the seeds: before, after the method that came closest, retrained."""
        if rows["original"][0]["confusion"] is None:
            return None
        total = {
            label: [[sum(cells) for cells in zip(*lines, strict=True)]
                    for lines in zip(*(r["confusion"] for r in rows[label]), strict=True)]
            for label in ("original", best, "retrained")
        }  # fmt: skip
        return {"classes": self.task.classes, "before": total["original"], "after": total[best],
                "reference": total["retrained"]}  # fmt: skip


def _means(rows: dict[str, list[Row]], order: Sequence[str], key: str) -> dict[str, dict[str, float]] | None:
    """Per model and layer, averaged over the seeds; None where it was not measured."""
    if any(row[key] is None for label in order for row in rows[label]):
        return None
    return {
        label: {layer: value["mean"] for layer, value in joined([r[key] for r in rows[label]]).items()}
        for label in order
    }
