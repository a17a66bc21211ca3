"""``evaluate``: what a model still knows of some samples, beside one that never saw them, without changing it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastunlearn.checkpoint import load_into
from fastunlearn.files import write_json, write_text
from fastunlearn.jobs import language
from fastunlearn.jobs.config import Config, ConfigError, Say, write_config
from fastunlearn.jobs.findings import model_row
from fastunlearn.jobs.measuring import known_of, measure
from fastunlearn.jobs.task import open_task
from fastunlearn.jobs.workspace import Workspace, require_free
from fastunlearn.report.html import write_report
from fastunlearn.report.record import device_name, plain_limits, versions


def evaluate_weights(config: Config, say: Say) -> dict[str, Any]:
    """The findings about ``weights`` and, if given, ``reference``; also written to ``out`` where that is given.

    Raises as :func:`~fastunlearn.jobs.deletion.unlearn`; ConfigError for what only makes sense with a method.
    """
    if config.reference == "retrain":
        raise ConfigError("reference: evaluate trains nothing; give --reference the weights of a retrained model")
    if config.out is not None:
        require_free(Path(config.out), resume=False)
    task = open_task(config)
    task.require_trained()
    if task.language:
        language.require_measurable(task)
    reference = None
    if task.reference is not None:
        reference = task.copy()
        load_into(reference, task.reference, "--reference")
    rows, rocs, confusions, probes, distances = [], {}, {}, {}, {}
    notes: list[str] = []
    known = known_of(task, task.model, reference)
    for label, role, model in (("model", "original", task.model), ("retrained", "reference", reference)):
        if model is not None:
            say(f"measuring the {label}" if role == "original" else "measuring the retrained model")
            found = measure(task, model, reference, known, config.seed)
            rocs[label], confusions[role], probes[label] = (found.pop(k) for k in ("roc", "confusion", "probes"))
            distances[label] = found.pop("activation_distance")
            notes += [note for note in found.pop("notes") if note not in notes]
            rows.append(model_row(label, role, [{**found, "seconds": None}]))
    samples = {name: len(part) for name, part in task.sets.items()}
    if task.language:
        said = language.statement(rows[0], rows[1] if len(rows) > 1 else None)
    else:
        accuracy = rows[0]["accuracy"]["forget"]["mean"]
        goal = f", the retrained one {rows[1]['accuracy']['forget']['mean']:.1f} %" if len(rows) > 1 else ""
        said = f"The model is right on {accuracy:.1f} % of these samples{goal}."
    findings = {
        "title": f"What is known of {config.forget}",
        "verdict": said,
        "request": {"forget": config.forget, "retain": config.retain, "samples": samples,
                    "data": config.data or config.forget, "model": config.model},
        "models": rows, "roc": rocs, "layers": [], "probes": None if None in probes.values() else probes,
        "activation_distance": None if None in distances.values() else distances,
        "confusion": None, "histograms": [], "spectra": [], "leaks": None,
        "limits": plain_limits(method=None, reference=reference is not None, attacks=list(rows[0]["attacks"])) + notes,
        "settings": {}, "versions": versions(),
        "device": {"name": device_name(task.device), "type": task.device.type}, "record": {"id": None, "sha256": None},
    }  # fmt: skip
    if confusions.get("original") is not None:
        findings["confusion"] = {"classes": task.classes, "before": confusions["original"], "after": None,
                                 "reference": confusions.get("reference")}  # fmt: skip
    if config.out is not None:
        space = Workspace(Path(config.out), task.identity(), resume=False)
        try:
            write_text(space.path / "config.yaml", write_config(config))
            write_json(space.path / "findings.json", findings)
            write_report(findings, space.path / "report.html")
            space.finish()
        finally:
            space.close()
    return findings
