"""``unlearn``: a new checkpoint, what was measured of it, and a record for the file, all of it or nothing."""

from __future__ import annotations

import importlib.util
import json
import time
import uuid
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastunlearn import ops
from fastunlearn.checkpoint import SUFFIXES, State, digest, load_weights, save_weights, weights_file
from fastunlearn.evaluate.stacked import Mode, TrainingReport, train_models
from fastunlearn.files import linked, write_json, write_text
from fastunlearn.jobs import language
from fastunlearn.jobs.attacking import require_attackable, shadow_attacks
from fastunlearn.jobs.config import Config, ConfigError, Say, read_config, write_config
from fastunlearn.jobs.findings import model_row, verdict
from fastunlearn.jobs.measuring import known_of, layer_changes, leaks, measure
from fastunlearn.jobs.methods import make_method
from fastunlearn.jobs.task import SHARDED, Part, Task, in_order, kept_on_disk, layout, naming, open_task
from fastunlearn.jobs.workspace import KEPT, Workspace, forget_phases, require_beside, require_free, require_makeable
from fastunlearn.methods.class_forgetting import ClassForgetting
from fastunlearn.methods.lcodec import LCodec
from fastunlearn.outcome import Outcome
from fastunlearn.parallel.launch import first_alone
from fastunlearn.parallel.ranks import ALONE, Ranks
from fastunlearn.patch import count_changes, write_patch
from fastunlearn.report.html import write_report
from fastunlearn.report.log import locked, require_whole
from fastunlearn.report.pictures import write_pictures
from fastunlearn.report.record import (
    device_name,
    new_salt,
    plain_limits,
    read_record,
    read_salt,
    record,
    record_hash,
    versions,
    weights_entry,
    write_salt,
)  # fmt: skip

SMALLEST_RATIO = 1e-4  # in the picture
SPECTRA_UP_TO = 1024  # inputs of a layer whose spectrum is worth its eigendecomposition


def unlearn(config: Config, resume: bool, say: Say, ranks: Ranks = ALONE) -> tuple[Path, dict[str, Any]]:
    """Forget, measure, write; returns the folder and the findings. Several ranks do it together; rank 0 writes.

    The folder holds ``model.safetensors`` (or the suffix of ``weights``), ``patch.safetensors``, ``record.json``,
    ``report.html``, ``findings.json``, ``config.yaml``, ``outcome.json``, ``salt`` (mode 0600: keep it apart) and
    ``pictures``. It appears in one rename when all of them are complete, and the log gets its line after that; a run
    that was killed anywhere goes on with ``resume``, to the same weights. The original checkpoint is only read.

    Raises in one line what :func:`~fastunlearn.jobs.task.open_task`, the method and the disk have to say; nothing is at
    ``out`` then.
    """
    config.require("method", "out")
    assert config.method is not None and config.out is not None
    out = Path(config.out).resolve()
    log = Path(config.log).resolve() if config.log is not None else out.parent / "log.jsonl"
    if first_alone(ranks, lambda: resume and (out / "record.json").exists()):
        return out, first_alone(ranks, lambda: _complete(out, log, config))
    first_alone(ranks, lambda: _require_places(config, out, log, resume))
    if ranks.group is not None:
        _require_together(config, ranks)
    make_method(config.method, config.settings, config.seed, nn.Module)  # wrong settings are found before data are read
    task = open_task(config, ranks)
    task.require_trained()
    if config.shadows:
        require_attackable(task)
    if config.shadows or "retrain" in (config.method, config.reference):
        task.require_fresh()
    if task.language:
        language.require_measurable(task)
    space = Workspace(out, task.identity() | language.identity(task), resume, ranks)
    try:
        run = _Run(task, space, say)
        findings = run.findings()
        first_alone(ranks, lambda: run.write(findings, log))
    finally:
        space.close()
    return out, findings


def _require_together(config: Config, ranks: Ranks) -> None:
    """Refuse what one process does with a model of its own."""
    if config.shadows:
        raise ConfigError("shadow models are trained in one process: give --shadows 0, or start it without torchrun")
    if config.method == "retrain":
        raise ConfigError("method: retrain trains a new model in one process; start it without torchrun")
    if config.reference == "retrain" and layout(config, ranks) in SHARDED:
        raise ConfigError(
            "reference: retrain makes a model that every process has whole, which a sharded one may be too large for; "
            "give --reference the weights of a retrained one, or --parallel ddp"
        )


def _require_places(config: Config, out: Path, log: Path, resume: bool) -> None:
    """What would stop the run at its end is found before it begins."""
    require_free(out, resume)
    require_beside(out, log, "--log")
    require_makeable(log, "--log")
    with naming("--log"):
        require_whole(log)
    if config.cache is not None:
        cache = Path(config.cache)
        require_beside(out, cache, "--cache")
        require_makeable(cache / "model", "--cache")


class _Run:
    """The phases of one run, each finished once."""

    def __init__(self, task: Task, space: Workspace, say: Say) -> None:
        self.task, self.space, self.say, self.config = task, space, say, task.config
        self.before = task.stored()

    def findings(self) -> dict[str, Any]:
        """Everything that record and report say; the pieces are kept as they are finished."""
        task, config, phase = self.task, self.config, self.space.phase
        self.request = phase("identifier", _identifier)
        outcome = self.outcome = phase("unlearn", self._unlearn)
        reference_seconds = phase("retrain", self._retrain) if config.reference == "retrain" else None
        unlearned = self._loaded(self.space.weights("unlearned"))
        reference = None
        if config.reference == "retrain":
            reference = self._loaded(self.space.weights("retrained"))
        elif config.reference is not None:
            reference = self._loaded(Path(config.reference))
        name = outcome["method"]
        models: list[tuple[str, str, nn.Module, Any]] = [("original", "original", task.model, None)]
        models.append((name, "unlearned", unlearned, sum(outcome["seconds"].values())))
        if reference is not None:
            models.append(("retrained", "reference", reference, reference_seconds))
        rows, rocs, probes, distances, confusions = [], {}, {}, {}, {}
        notes: list[str] = []
        known = known_of(task, task.model, reference)
        for label, role, model, seconds in models:
            self.say(f"measuring the {role} model")
            found = phase(f"measure-{role}", partial(measure, task, model, reference, known, config.seed))
            rocs[label] = found.pop("roc")
            probes[label], distances[label] = found.pop("probes"), found.pop("activation_distance")
            notes += [note for note in found.pop("notes") if note not in notes]
            confusions[role] = found.pop("confusion")
            rows.append(model_row(label, role, [{**found, "seconds": seconds}]))
        if config.shadows:
            cache = Path(config.cache) if config.cache is not None else self.space.out.parent / ".shadows"
            by_role = {role: model for _, role, model, _ in models}
            extra = phase("shadows", lambda: shadow_attacks(task, by_role, cache, self.say))
            notes += [limit for limit in extra["limits"] if limit not in notes]
            for row in rows:
                row["attacks"] |= extra["attacks"][row["role"]]
                rocs[row["name"]] |= extra["roc"][row["role"]]
        names = list(task.model.state_dict())
        attacks = list(rows[1]["attacks"])
        samples = {n: len(part) for n, part in task.sets.items()} | {"retain": len(task.retain)}
        limits = plain_limits(method=name, reference=reference is not None, attacks=attacks)
        third = rows[2] if len(rows) > 2 else None
        said = (
            language.verdict(rows[1], rows[0], third)
            if task.language
            else verdict(rows[1], rows[0], third, len(task.forget))
        )
        return {
            "title": f"Unlearning {config.forget}",
            "verdict": said,
            "request": {"forget": config.forget, "retain": config.retain, "samples": samples,
                        "data": config.data or config.forget, "model": config.model},
            "models": rows,
            "roc": rocs,
            "layers": first_alone(task.ranks, lambda: layer_changes(in_order(self.before, names), self._after())),
            "probes": None if None in probes.values() else probes,
            "activation_distance": None if None in distances.values() else distances,
            "confusion": _confusion(task, confusions),
            "histograms": _histograms(outcome),
            "spectra": phase("spectra", self._spectra),
            "leaks": phase("leaks", lambda: leaks(task, task.model, unlearned, reference)),
            "limits": limits + notes,
            "settings": outcome["settings"],
            "versions": versions(),
            "device": {"name": device_name(task.device), "type": task.device.type},
            "record": {"id": self.request["id"], "sha256": None},
        }  # fmt: skip

    def write(self, findings: dict[str, Any], log: Path) -> None:
        """All files of the result, the record under the log's lock, then the one rename and the log's line."""
        task, config, space = self.task, self.config, self.space
        outcome, after = self.outcome, self._after()
        checkpoint = self._checkpoint(after)
        write_patch(space.path / "patch.safetensors", self.before, after)
        write_text(space.path / "config.yaml", write_config(config))
        write_json(space.path / "outcome.json", {k: v for k, v in outcome.items() if k != "kernels"})
        if not (space.path / "salt").exists():
            write_salt(space.path / "salt", new_salt())
        if draws(config, self.say):
            write_pictures(findings, space.path / "pictures")
        origin = task.weights if task.weights is not None else Path("the model's own")
        with locked(log) as held:
            made = record(
                before=weights_entry(origin, digest(self.before)),
                after=weights_entry(checkpoint, digest(after)),
                forgotten=task.forget.ids,
                salt=read_salt(space.path / "salt"),
                outcome=_as_outcome(outcome),
                seeds={"seed": config.seed},
                device=task.device,
                kernels=outcome["kernels"],
                changed=count_changes(self.before, after),
                data={"source": findings["request"]["data"], "digest": task.forget.samples.digest(),
                      "samples": findings["request"]["samples"]},
                metrics=findings["models"],
                limits=findings["limits"],
                config=config.as_dict(),
                previous=held.last_hash,
                identifier=self.request["id"],
                created=self.request["created"],
            )  # fmt: skip
            findings["record"]["sha256"] = record_hash(made)
            write_json(space.path / "findings.json", findings)
            write_report(findings, space.path / "report.html")
            write_json(space.path / "record.json", made)
            space.finish()
            held.append(space.out / "record.json")

    def _unlearn(self) -> dict[str, Any]:
        task, config = self.task, self.config
        assert config.method is not None
        method = make_method(config.method, config.settings, config.seed, task.fresh)
        model = task.copy()
        self.say(f"{config.method}: forgetting {len(task.forget):,} of {len(task.forget) + len(task.retain):,} samples")
        outcome, kernels = run_method(task, config.method, method, model, config.seed)
        if task.sharded:
            self.space.save("unlearned", task.as_stored(model), task.weights)
        else:
            after = _as_stored(self.before, task.model.state_dict(), model.state_dict())
            first_alone(task.ranks, lambda: save_weights(self.space.place_for("unlearned"), after))
        return {**outcome.as_dict(), "kernels": kernels}

    def _after(self) -> State:
        kept = self.space.weights("unlearned")
        return kept_on_disk(kept) if self.task.sharded else load_weights(kept)

    def _checkpoint(self, after: State) -> Path:
        """Write it; shards are there already, and are given a second name."""
        task, space = self.task, self.space
        kept = space.weights("unlearned")
        if kept.is_dir():
            for file in kept.iterdir():
                linked(file, space.path / file.name)
            return weights_file(space.path)
        own = "" if task.weights is None else task.weights.suffix  # a folder has none, an index of shards .json
        checkpoint = space.path / f"model{own if own in SUFFIXES else '.safetensors'}"
        save_weights(checkpoint, after, like=task.weights)
        return checkpoint

    def _retrain(self) -> float:
        task = self.task
        self.say(f"retraining on the {len(task.retain):,} retained samples, the yardstick")
        models, seconds, _ = train(task, [task.retain], [self.config.seed])
        first_alone(task.ranks, lambda: save_weights(self.space.place_for("retrained"), models[0].state_dict()))
        return seconds

    def _spectra(self) -> list[dict[str, Any]]:
        """Of class forgetting: what the layers' inputs look like on both sides, where that is cheap to say."""
        task, config = self.task, self.config
        assert config.method is not None
        method = make_method(config.method, config.settings, config.seed, task.fresh)
        if not isinstance(method, ClassForgetting):
            return []
        both = task.batches(config.method, config.seed)[:2]
        forget, retain = (task.dealt(batches, task.model) for batches in both)
        if max(layer.dim for layer in method.plan(task.model, forget, retain).layers) > SPECTRA_UP_TO:
            return []
        return [
            {"layer": layer.name, "retain": layer.retain[0].tolist(), "forget": layer.forget[0].tolist()}
            for layer in method.spectrum(task.model, forget, retain).layers
        ]

    def _loaded(self, weights: Path) -> nn.Module:
        return self.task.loaded(weights, str(weights))


def run_method(task: Task, name: str, method: Any, model: nn.Module, seed: int) -> tuple[Outcome, dict[str, Any]]:
    """Run the method on ``model`` in place; returns its account and the kernels it called, by operator."""
    forget, retain, validation = task.batches(name, seed)
    extra = {} if validation is None else {"validation": validation}
    torch.manual_seed(seed)
    shared = task.shared(model)
    given = {"forget": forget, "retain": retain, **extra}
    # L-CODEC does the whole of the work on every rank.
    dealt = given if isinstance(method, LCodec) else {n: task.dealt(b, shared) for n, b in given.items()}
    with ops.counted() as calls:
        outcome: Outcome = method.unlearn(shared, **dealt)
    kernels: dict[str, Any] = {}
    for (operator, device), count in sorted(calls.items()):
        kernels[operator] = {"calls": count, "backend": device.upper()}
    model.eval()
    return outcome, kernels


def draws(config: Config, say: Say) -> bool:
    """Whether pictures are wanted and can be drawn; what is missing is said and no reason to lose the rest."""
    if config.pictures and importlib.util.find_spec("matplotlib") is None:
        say("no pictures beside the report: they need matplotlib, pip install fastunlearn[report]")
        return False
    return config.pictures


def train(task: Task, parts: Sequence[Part], seeds: Sequence[int]) -> tuple[list[nn.Module], float, TrainingReport]:
    """A fresh model on each part, several at once where that is faster; the models, seconds of one, and how."""
    source = parts[0].samples
    keep = torch.zeros(len(parts), len(source), dtype=torch.bool)
    for row, part in zip(keep, parts, strict=True):
        row[part.indices] = True
    start = time.perf_counter()
    # One model gains nothing by being stacked, and a stopwatch's choice between two roundings is no seed's; language
    # models fill the machine one at a time.
    mode = cast(Mode, task.config.stack) if len(parts) > 1 and not task.language else "sequential"
    models, report = train_models(task.fresh, task.recipe, source, None, keep, list(seeds), mode, task.device)
    return models, (time.perf_counter() - start) / len(parts), report


def _complete(out: Path, log: Path, config: Config) -> dict[str, Any]:
    """Results are there: make sure that they are what was asked for, and in the log; their findings."""
    written = read_config(out / "config.yaml")
    for key, value in config.as_dict().items():
        if key not in ("out", "log", "cache") and written.get(key) != value:
            raise ValueError(f"{out} holds the results for another {key}: {written.get(key)!r}, now {value!r}")
    findings: dict[str, Any] = json.loads((out / "findings.json").read_text())
    with locked(log) as held:
        found = read_record(out / "record.json")
        before = found["weights"]["before"]["digest"]
        if config.weights is not None and digest(kept_on_disk(Path(config.weights))) != before:
            raise ValueError(f"{out} holds the results for other weights than {config.weights} has now")
        if not held.has(found["id"]):
            if found["previous"] != held.last_hash:  # killed between the rename and the log, and another request came
                found["previous"] = held.last_hash
                findings["record"]["sha256"] = record_hash(found)
                write_json(out / "findings.json", findings)
                write_report(findings, out / "report.html")
                write_json(out / "record.json", found)
            held.append(out / "record.json")
    if (out / KEPT).exists():
        forget_phases(out)
    return findings


def _as_stored(stored: State, loaded: State, changed: State) -> dict[str, Tensor]:
    """``changed`` in the names and types of the file; what the model has unchanged keeps the file's bits, which a model
    of lower precision than the file has rounded."""
    after = {}
    for name, old in stored.items():
        new = changed[name].detach().cpu()
        after[name] = torch.where(new == loaded[name].cpu(), old, new.to(old.dtype))
    return after


def _identifier() -> dict[str, str]:
    """Made once, so that a resumed run writes the same record."""
    return {"id": str(uuid.uuid4()), "created": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def _as_outcome(kept: dict[str, Any]) -> Outcome:
    return Outcome(kept["method"], kept["settings"], kept["changed"], kept["seconds"], kept["peak_memory"])


def _confusion(task: Task, by_role: dict[str, Any]) -> dict[str, Any] | None:
    if by_role.get("original") is None:
        return None
    return {"classes": task.classes, "before": by_role["original"], "after": by_role["unlearned"],
            "reference": by_role.get("reference")}  # fmt: skip


def _histograms(outcome: dict[str, Any]) -> list[dict[str, Any]]:
    ratios = outcome["details"].get("ratios")
    if not ratios:
        return []
    gamma = outcome["details"]["gamma"]
    # A histogram's bins lie side by side: those between the first and the last filled one, without ratios near zero.
    filled = {edge: count for edge, count in ratios if edge >= SMALLEST_RATIO}
    edges = [edge for edge in ops.ratio_edges().tolist() if min(filled) <= edge <= max(filled)] if filled else []
    if not edges:
        return []
    counts = [filled.get(edge, 0) for edge in edges]
    mark = gamma if isinstance(gamma, float) else None
    return [{"title": "Fisher information, forgotten over retained", "xlabel": "ratio",
             "edges": [*edges, edges[-1] * 1.1], "counts": counts, "mark": mark}]  # fmt: skip
