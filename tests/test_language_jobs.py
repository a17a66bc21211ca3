"""The commands on causal language models: figures are those of plain formulas, and words claim no more than they show.

Perplexities, scores and continuations are computed again here in float64 from the checkpoints and the texts.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import signal
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from texts import FORGOTTEN, LENGTH, TextRequest, configuration, make_text_request, texts, tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

import fastunlearn as fu
from fastunlearn import cli
from fastunlearn.checkpoint import digest, load_weights
from fastunlearn.evaluate import Estimate
from fastunlearn.evaluate.stacked import Recipe, train_models
from fastunlearn.inputs import DataOptions, Loader, build_model, open_samples, tokenizer_of
from fastunlearn.inputs.arrays import Named
from fastunlearn.inputs.own_targets import next_tokens, with_own_targets
from fastunlearn.inputs.samples import Samples
from fastunlearn.jobs import language
from fastunlearn.jobs.config import Config
from fastunlearn.jobs.findings import joined, model_row
from fastunlearn.jobs.planning import plan
from fastunlearn.jobs.task import open_task
from fastunlearn.parallel.ranks import ALONE, world
from fastunlearn.report.log import verify
from fastunlearn.report.record import schema

FILES = {"model.safetensors", "patch.safetensors", "record.json", "report.html", "findings.json", "config.yaml",
         "outcome.json", "salt"}  # fmt: skip
CLASSIFIER_SECTIONS = ("models", "confusion", "probes", "leaks")
PROMPT = 6  # half of a forgotten text


@dataclass(frozen=True)
class Result:
    """One finished run."""

    request: TextRequest
    out: Path

    @cached_property
    def findings(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "findings.json").read_text())
        return found

    @cached_property
    def page(self) -> str:
        return (self.out / "report.html").read_text()

    def row(self, role: str) -> dict[str, Any]:
        found: dict[str, Any] = next(row for row in self.findings["models"] if row["role"] == role)
        return found

    def model(self, role: str) -> Any:
        """In float64."""
        own = {"original": "model", "reference": "never-saw"}.get(role)
        path = self.out / "model.safetensors" if own is None else self.request.folder / own / "model.safetensors"
        model = gpt()
        model.load_state_dict(load_file(path), strict=False)  # the tied head has one name in the file
        return model.double().eval()


def gpt() -> Any:
    import transformers

    return transformers.GPT2LMHeadModel(configuration(len(tokenizer())))


@pytest.fixture(scope="module")
def request_files(tmp_path_factory: pytest.TempPathFactory) -> TextRequest:
    return make_text_request(tmp_path_factory.mktemp("texts"))


def run(request: TextRequest, command: str, out: str, *flags: str) -> Result:
    assert cli.main([command, *flags, "--debug"]) == 0
    return Result(request, request.folder / out)


@pytest.fixture(scope="module")
def cleaned(request_files: TextRequest) -> Result:
    """Some texts, beside a model that was trained without them."""
    more = ("--reference", request_files.path("never-saw"), "--questions", request_files.path("questions.jsonl"))
    return run(request_files, "unlearn", "cleaned", *request_files.of("deepclean", *more, out="cleaned"))


@pytest.fixture(scope="module")
def by_topic(request_files: TextRequest) -> Result:
    flags = request_files.of("class-forgetting", "--forget", "class:birds", out="by-topic")
    return run(request_files, "unlearn", "by-topic", *flags)


def sets() -> dict[str, list[str]]:
    lines = [row["text"] for row in texts(48, 0)]
    kept = [line for n, line in enumerate(lines) if n not in FORGOTTEN]
    held = [row["text"] for row in texts(24, 1)]
    return {"forget": [lines[n] for n in FORGOTTEN], "retain": kept, "test": held}


def log_probs(model: nn.Module, text: str) -> tuple[Tensor, Tensor]:
    """Of every token but the first: log-probabilities of the whole vocabulary [T - 1, V], and the tokens [T - 1]."""
    ids = torch.tensor(tokenizer()(text)["input_ids"])
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1), ids[1:]


def min_k(model: nn.Module, text: str, standardised: bool) -> float:
    log_p, ids = log_probs(model, text)
    own = log_p.gather(1, ids[:, None])[:, 0]
    if standardised:
        mean = (log_p.exp() * log_p).sum(1)
        own = (own - mean) / (log_p.exp() * (log_p - mean[:, None]) ** 2).sum(1).sqrt()
    return float(own.sort().values[: max(1, int(0.2 * len(own)))].mean())


@pytest.mark.parametrize("role", ["original", "unlearned", "reference"])
def test_perplexity_and_next_tokens_are_those_of_plain_formulas(cleaned: Result, role: str) -> None:
    model, row = cleaned.model(role), cleaned.row(role)
    for name, lines in sets().items():
        found = [log_probs(model, line) for line in lines]
        nats = -torch.cat([log_p.gather(1, ids[:, None])[:, 0] for log_p, ids in found])
        right = torch.cat([log_p.argmax(1) == ids for log_p, ids in found])
        assert row["loss"][name]["mean"] == pytest.approx(float(nats.mean()), rel=1e-5)
        assert row["perplexity"][name]["mean"] == pytest.approx(float(nats.mean().exp()), rel=1e-5)
        assert row["accuracy"][name]["mean"] == pytest.approx(100 * float(right.double().mean()))
        assert row["perplexity"][name]["low"] <= row["perplexity"][name]["mean"] <= row["perplexity"][name]["high"]
        reference = cleaned.row("reference")
        assert row["factor"][name]["mean"] == pytest.approx(
            row["perplexity"][name]["mean"] / reference["perplexity"][name]["mean"], rel=1e-9
        )
        assert row["gap"][name]["mean"] == pytest.approx(
            row["accuracy"][name]["mean"] - reference["accuracy"][name]["mean"]
        )


@pytest.mark.parametrize("role", ["original", "unlearned", "reference"])
def test_min_k_attacks_are_those_of_plain_formulas(cleaned: Result, role: str) -> None:
    model, row, lines = cleaned.model(role), cleaned.row(role), sets()
    for name, standardised in (("Min-K%", False), ("Min-K%++", True)):
        scores = [min_k(model, line, standardised) for line in lines["forget"] + lines["test"]]
        members = [1] * len(lines["forget"]) + [0] * len(lines["test"])
        auc = roc_auc_score(members, scores)
        assert row["attacks"][name]["auc"]["mean"] == pytest.approx(auc, abs=1e-9)
        curve = cleaned.findings["roc"][row["name"]][name]
        assert curve["fpr"][0] == curve["tpr"][0] == 0 and curve["fpr"][-1] == curve["tpr"][-1] == 1
        assert torch.trapezoid(torch.tensor(curve["tpr"]), torch.tensor(curve["fpr"])) == pytest.approx(auc, abs=1e-6)


@pytest.mark.parametrize("role", ["original", "unlearned", "reference"])
def test_what_is_recited_is_what_generate_says(cleaned: Result, role: str) -> None:
    model, row = cleaned.model(role), cleaned.row(role)
    assert set(row["extraction"]) == {"forget", "test"}
    for name in ("forget", "test"):
        shares, whole = [], []
        for line in sets()[name]:
            ids = torch.tensor([tokenizer()(line)["input_ids"]])
            mask = torch.ones_like(ids[:, :PROMPT])
            said = model.generate(
                ids[:, :PROMPT], attention_mask=mask, max_new_tokens=ids.shape[1] - PROMPT, do_sample=False
            )
            same = (said == ids)[0, PROMPT:]
            shares.append(float(same.double().mean()))
            whole.append(bool(same.all()))
        assert row["extraction"][name]["overlap"]["mean"] == pytest.approx(100 * sum(shares) / len(shares))
        assert row["extraction"][name]["exact"]["mean"] == pytest.approx(100 * sum(whole) / len(whole))


def test_questions_are_answered_by_the_likelier_choice(cleaned: Result) -> None:
    for role in ("original", "unlearned", "reference"):
        model, right = cleaned.model(role), 0
        for line in Path(cleaned.request.path("questions.jsonl")).read_text().splitlines():
            question = json.loads(line)
            scores = []
            for choice in question["choices"]:
                log_p, ids = log_probs(model, f"{question['question']} {choice}")
                count = len(choice.split())
                scores.append(float(log_p.gather(1, ids[:, None])[-count:].mean()))
            answer = question["answer"]
            answer = question["choices"].index(answer) if isinstance(answer, str) else answer
            right += scores.index(max(scores)) == answer
        assert cleaned.row(role)["questions"]["mean"] == 50.0 * right
    assert any("guessing gets 41.7 % right" in limit for limit in cleaned.findings["limits"])


def test_the_memorised_texts_are_recited_before_and_no_longer_after(cleaned: Result) -> None:
    before, after = cleaned.row("original"), cleaned.row("unlearned")
    assert (
        before["extraction"]["forget"]["overlap"]["mean"] > 95 > 60 > after["extraction"]["forget"]["overlap"]["mean"]
    )
    assert before["perplexity"]["forget"]["mean"] < 1.3 < 2 < after["perplexity"]["forget"]["mean"]


def test_the_weights_are_those_of_the_method_called_directly(cleaned: Result) -> None:
    request = cleaned.request
    model = build_model(request.path("model"), None).eval()
    samples = next_tokens(open_samples(request.path("texts.jsonl"), tokenizer=tokenizer_of(request.path("model"))))
    forgotten = torch.tensor(FORGOTTEN)
    kept = torch.tensor([n for n in range(48) if n not in FORGOTTEN])
    torch.manual_seed(0)
    fu.DeepClean(fraction=0.2, lr=0.01).unlearn(
        model, forget=Loader(samples, forgotten, 16), retain=Loader(samples, kept, 16, shuffle=True)
    )
    state = model.state_dict()
    for name, value in load_file(cleaned.out / "model.safetensors").items():
        assert torch.equal(value, state[name]), name


def test_the_folder_record_and_log_are_as_of_classifiers(cleaned: Result) -> None:
    assert {path.name for path in cleaned.out.iterdir()} == FILES
    made = json.loads((cleaned.out / "record.json").read_text())
    jsonschema.Draft202012Validator(schema()).validate(made)
    assert made["forgotten"]["count"] == len(FORGOTTEN) and made["config"]["questions"] == "questions.jsonl"
    assert [row["role"] for row in made["metrics"]] == ["original", "unlearned", "reference"]
    assert made["metrics"][1]["perplexity"] == cleaned.row("unlearned")["perplexity"]
    checks = verify(
        cleaned.out / "record.json", cleaned.out / "model.safetensors", Path(cleaned.request.path("log.jsonl")),
        cleaned.out / "patch.safetensors",
    )  # fmt: skip
    assert all(check.passed for check in checks), checks


def test_the_patch_brings_the_folders_weights_to_the_unlearned_ones(cleaned: Result, tmp_path: Path) -> None:
    before = str(cleaned.request.folder / "model" / "model.safetensors")
    patched = str(tmp_path / "patched.safetensors")
    patch = str(cleaned.out / "patch.safetensors")
    assert cli.main(["patch", "apply", patch, "--weights", before, "--out", patched]) == 0
    assert digest(load_weights(patched)) == digest(load_weights(cleaned.out / "model.safetensors"))


def test_the_report_shows_what_there_is_and_no_empty_sections(cleaned: Result, by_topic: Result) -> None:
    for result in (cleaned, by_topic):
        shown = re.findall(r'<section id="(\w+)"', result.page)
        assert "language" in shown and "attacks" in shown and "limits" in shown
        assert not set(CLASSIFIER_SECTIONS) & set(shown)
        assert not re.findall(r'<div class="body"></div>', result.page)
        for title in ("Perplexity by model", "Texts continued greedily from their beginnings", "Min-K%++"):
            assert title in result.page
        assert "accurac" not in result.page.lower().replace("accuracies are", "")
    assert "Multiple choice, answered right" in cleaned.page and "Multiple choice" not in by_topic.page
    factor = cleaned.row("unlearned")["factor"]["forget"]["mean"]
    assert f"\N{MULTIPLICATION SIGN}\u202f{factor:#.3g}".rstrip(".") in cleaned.page


def test_no_text_is_in_what_is_written(cleaned: Result) -> None:
    lines = [line for name in ("forget", "retain") for line in sets()[name]]
    for name in ("report.html", "record.json", "findings.json", "outcome.json"):
        written = (cleaned.out / name).read_text()
        assert not [line for line in lines if line in written]


def test_a_topic_is_forgotten_by_name_and_its_test_texts_are_a_set_of_their_own(by_topic: Result) -> None:
    assert by_topic.findings["request"]["samples"] == {"forget": 16, "retain": 32, "test": 16, "test of forgotten": 8}
    model, row = by_topic.model("unlearned"), by_topic.row("unlearned")
    birds = [entry["text"] for entry in texts(24, 1) if entry["label"] == "birds"]
    nats = torch.cat([-log_p.gather(1, ids[:, None]) for log_p, ids in (log_probs(model, line) for line in birds)])
    assert row["loss"]["test of forgotten"]["mean"] == pytest.approx(float(nats.mean()), rel=1e-5)
    forgotten = [entry["text"] for entry in texts(48, 0) if entry["label"] == "birds"]
    scores = [min_k(model, line, False) for line in forgotten + birds]
    auc = roc_auc_score([1] * len(forgotten) + [0] * len(birds), scores)
    assert row["attacks"]["Min-K%"]["auc"]["mean"] == pytest.approx(auc, abs=1e-9)
    assert row["factor"] is None and row["gap"] is None
    said = by_topic.findings["verdict"]
    assert said.startswith("ClassForgetting took the perplexity on the forgotten texts from 1.")
    assert "nothing here says how a model that never saw them behaves" in said
    assert any("not made for language models" in limit for limit in by_topic.findings["limits"])
    assert any("No model was retrained without the data" in limit for limit in by_topic.findings["limits"])


def test_evaluate_says_what_is_known_beside_a_model_that_never_saw_it(
    cleaned: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    request = cleaned.request
    flags = request.flags("--reference", request.path("never-saw"), out="known")
    result = run(request, "evaluate", "known", *flags)
    for role in ("original", "reference"):
        assert result.row(role)["loss"] == cleaned.row(role)["loss"]
        assert result.row(role)["extraction"] == cleaned.row(role)["extraction"]
    said = result.findings["verdict"]
    assert said in capsys.readouterr().out
    assert re.match(r"The model's perplexity on these texts is 1\.\d+, the retrained one's [\d,.]+; it recites ", said)
    assert 'id="language"' in result.page


@pytest.fixture(scope="module")
def compared(request_files: TextRequest) -> Result:
    flags = request_files.flags(
        "--methods", "finetune,gradient-ascent", "--training", "epochs=2", "--seeds", "2", "--no-pictures", out="both"
    )
    return run(request_files, "compare", "both", *flags)


def test_compare_runs_methods_and_retraining_over_seeds(compared: Result) -> None:
    rows = {row["name"]: row for row in compared.findings["models"]}
    assert list(rows) == ["original", "finetune", "gradient-ascent", "retrained"]
    assert {row["perplexity"]["forget"]["runs"] for row in rows.values()} == {2}

    def away(name: str) -> float:
        loss, goal = rows[name]["loss"], rows["retrained"]["loss"]
        return sum(abs(loss[s]["mean"] - goal[s]["mean"]) for s in goal) / len(goal)

    best = min(("finetune", "gradient-ascent"), key=away)
    assert compared.findings["closest"] == best
    said = compared.findings["verdict"]
    assert f"a factor of {math.exp(away(best)):#.3g} away in perplexity, on average over 3 sets" in said
    assert compared.findings["settings"]["training"].startswith("sequential")
    assert "whose perplexities are nearest to the retrained model" in compared.page


def test_retraining_is_the_recipe_on_the_retained_texts_alone(compared: Result) -> None:
    folder = compared.request.path("model")
    samples = next_tokens(open_samples(compared.request.path("texts.jsonl"), tokenizer=tokenizer_of(folder)))
    keep = torch.ones(2, 48, dtype=torch.bool)
    keep[:, list(FORGOTTEN)] = False
    models, _ = train_models(
        lambda: build_model(folder, None, fresh=True), Recipe(epochs=2), samples, None, keep, [0, 1], "sequential"
    )
    losses = []
    for model in models:
        found = [log_probs(model.double(), line) for line in sets()["test"]]
        losses.append(float(-torch.cat([log_p.gather(1, ids[:, None]) for log_p, ids in found]).mean()))
    row = next(row for row in compared.findings["models"] if row["role"] == "reference")
    assert row["loss"]["test"]["mean"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def config_of(request: TextRequest, **more: Any) -> Config:
    return Config(
        **{
            "model": request.path("model"), "data": request.path("texts.jsonl"), "test": request.path("held.jsonl"),
            "forget": f"index:{request.path('forget.json')}", "batch_size": 16, "bootstrap": 20, "relearn": 2, **more,
        }
    )  # fmt: skip


@pytest.mark.parametrize("method", ["deepclean", "class-forgetting", "ssd", "finetune", "gradient-ascent"])
def test_the_plan_counts_what_a_run_reads(request_files: TextRequest, method: str) -> None:
    questions = request_files.path("questions.jsonl")
    found = plan(open_task(config_of(request_files, method=method, reference="retrain", questions=questions)))
    steps = {step.name: step for step in found.steps}
    assert set(steps) == {method, "retrain", "measure", "continue", "questions", "attacks", "relearn"}
    assert steps["measure"].forward == 6 + 4 * 72  # each model, the reference twice, and what is to be relearnt
    assert steps["continue"].forward == 3 * (6 + 24) * (LENGTH - PROMPT)
    assert steps["questions"].forward == 3 * 5
    assert steps["retrain"].backward == 20 * 42
    assert found.samples == {"forget": 6, "retain": 42, "test": 24}
    assert all(step.seconds is not None and step.seconds >= 0 for step in found.steps) and found.peak_memory > 0
    assert f"{method}" in str(found)


def test_a_plan_of_an_exact_fisher_counts_every_token_at_every_position(request_files: TextRequest) -> None:
    config = config_of(
        request_files, method="ssd", settings={"fisher": "exact", "fisher_samples": 2}, batch_size=2,
        data_options={"text_length": 3}, relearn=0,
    )  # fmt: skip
    step = plan(open_task(config)).steps[0]
    assert step.backward == (6 + 2) * len(tokenizer()) * (3 - 1)


def measured(rank: int, config: dict[str, Any]) -> dict[str, Any]:
    task = open_task(Config(**config), world() if rank >= 0 else ALONE)
    return language.measure(task, task.model, language.KnownTexts.of(task, task.model, None), 0)


def test_a_sharded_model_is_measured_by_its_ranks_as_by_one(request_files: TextRequest) -> None:
    questions = request_files.path("questions.jsonl")
    config = config_of(request_files, questions=questions, batch_size=7, parallel="fsdp").as_dict()
    alone = measured(-1, config)
    for found in on_ranks(2, measured, config):
        assert len([note for note in found["notes"] if "time to relearn was not measured" in note]) == 1
        for name in ("loss", "accuracy", "perplexity", "extraction", "attacks", "roc", "questions"):
            assert found[name] == alone[name], name


@pytest.mark.parametrize("killed_at", [6, 11])
def test_a_killed_run_goes_on_to_the_same_weights(cleaned: Result, killed_at: int) -> None:
    """Killed at that rename, in a process of its own; what is finished by then is not done again."""
    request, out = cleaned.request, f"killed-{killed_at}"
    more = ("--reference", request.path("never-saw"), "--questions", request.path("questions.jsonl"))
    flags = ["unlearn", *request.of("deepclean", *more, out=out), "--log", request.path(f"{out}.jsonl")]
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        count = itertools.count(1)

        def counted(move: Any, a: Any, b: Any) -> None:
            if next(count) == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            move(a, b)

        for name in ("replace", "rename"):
            setattr(os, name, partial(counted, getattr(os, name)))
        os._exit(cli.main(flags))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (request.folder / out).exists()
    result = run(request, "unlearn", out, *flags[1:], "--resume")
    assert {path.name for path in result.out.iterdir()} == FILES
    weights = [digest(load_weights(folder / "model.safetensors")) for folder in (result.out, cleaned.out)]
    assert weights[0] == weights[1]
    for role in ("original", "unlearned", "reference"):
        mine, theirs = result.row(role), cleaned.row(role)
        assert {**mine, "seconds": None} == {**theirs, "seconds": None}


def test_an_interrupted_run_does_not_go_on_with_other_questions(
    cleaned: Result, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text(Path(cleaned.request.path("questions.jsonl")).read_text())
    flags = ["unlearn", *cleaned.request.of("deepclean", "--questions", str(asked), out="interrupted")]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fastunlearn.jobs.deletion.measure", interrupt)
        assert cli.main(flags) == 130
    asked.write_text(asked.read_text().replace("tin", "oak"))
    assert cli.main([*flags, "--resume"]) == 1
    assert "the interrupted run" in (told := capsys.readouterr().err) and "another questions digest" in told


def test_a_folders_config_decides_the_results(request_files: TextRequest, tmp_path: Path) -> None:
    folder = shutil.copytree(request_files.path("model"), tmp_path / "model")
    config = config_of(request_files, model=str(folder))
    before = open_task(config).identity()
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "n_head": 1}))  # which no module's text tells
    after = open_task(config).identity()
    assert {key for key in before if before[key] != after[key]} == {"model digest"}


# What is said in one sentence.


def row(nats: float, recited: float, auc: float, half: float = 0.01, retain: float = 1.0) -> dict[str, Any]:
    """Figures of one model beside a reference with a loss of 3 on the forgotten texts; intervals of ``half``."""

    def estimate(mean: float, wide: float) -> dict[str, Any]:
        return {"mean": mean, "low": mean - wide, "high": mean + wide, "runs": 1}

    losses = {"forget": nats, "retain": retain}
    factor = math.exp(nats - 3)
    found = {
        "loss": {name: Estimate(value).as_dict() for name, value in losses.items()},
        "perplexity": {name: Estimate(math.exp(value)).as_dict() for name, value in losses.items()},
        "factor": {"forget": {"mean": factor, "low": factor * (1 - half), "high": factor * (1 + half), "runs": 1}},
        "extraction": {"forget": {"overlap": estimate(recited, 100 * half)}},
        "attacks": {"Min-K%": {"auc": estimate(auc, half), "tpr": {}}},
    }
    return model_row("X", "unlearned", [found])


ORIGINAL, NEVER_SAW = row(0.1, 100, 1.0), row(3, 5, 0.5)


@pytest.mark.parametrize(
    ("unlearned", "word"),
    [
        (row(3.02, 6, 0.52), "Forgotten, as far as these measures see"),
        (row(3.02, 6, 0.52, retain=1.09), "Forgotten, as far as these measures see"),
        (row(3.02, 6, 0.52, retain=1.1), "Forgotten, as far as these measures see, but the retained texts suffered"),
        (row(3.02, 60, 0.52), "Partly forgotten"),  # recited
        (row(3.02, 6, 0.7), "Partly forgotten"),  # told by the attack
        (row(2.5, 6, 0.52), "Partly forgotten"),  # better known
        (row(4.0, 5, 0.5), "Partly forgotten"),  # worse known than by a model that never saw them
        (row(8.0, 90, 0.1), "Not forgotten"),
        (row(0.3, 99, 0.98), "Not forgotten"),
        (row(0.1, 100, 1.0), "Not forgotten"),
    ],
)
def test_the_verdict_compares_with_a_model_that_never_saw_the_texts(unlearned: dict[str, Any], word: str) -> None:
    said = language.verdict(unlearned, ORIGINAL, NEVER_SAW)
    assert said.startswith(f"{word}: after X the perplexity on the forgotten texts is ")
    assert "where a model that never saw them has 20.1 (before: 1.11)" in said


def test_where_chance_explains_everything_nothing_is_decided() -> None:
    wide = [row(n, r, a, half=0.9) for n, r, a in ((2.5, 40, 0.6), (2.9, 30, 0.55), (3.0, 5, 0.5))]
    said = language.verdict(wide[1], wide[0], wide[2])
    assert said.startswith("Undecided, these measures do not even tell the original from a model that never saw")


@pytest.mark.parametrize(
    ("retain", "said"),
    [(1.0, "the same"), (1.03, "3.0 % higher"), (0.9, "9.5 % lower"), (3.0, "7.39 times what it was"),
     (math.inf, "without bound")],
)  # fmt: skip
def test_the_verdict_says_what_it_cost(retain: float, said: str) -> None:
    unlearned = row(3.0, 5, 0.5, retain=retain)
    for reference in (NEVER_SAW, None):
        assert f"; on the retained texts the perplexity is {said}" in language.verdict(unlearned, ORIGINAL, reference)


def test_a_perplexity_without_bound_is_said_and_never_forgotten() -> None:
    broken = row(3.0, 0, 0.5)
    broken["loss"]["forget"] = broken["perplexity"]["forget"] = {"mean": None, "runs": 1}
    said = language.verdict(broken, ORIGINAL, NEVER_SAW)
    assert said.startswith("Partly forgotten: after X the perplexity on the forgotten texts is without bound")
    assert joined([broken["perplexity"], ORIGINAL["perplexity"]])["forget"] is None


def unbounded(name: str, role: str, *sets: str) -> dict[str, Any]:
    """A model whose perplexities on ``sets`` have no bound, on others that of the original."""
    found = {**row(3.0, 0, 0.5), "name": name, "role": role, "seconds": {"mean": 1.0, "runs": 2}}
    for part in sets:
        found["loss"][part] = found["perplexity"][part] = None
    return found


def test_a_factor_without_bound_is_beyond_chance() -> None:
    broken = row(300.0, 0, 0.5)
    broken["factor"]["forget"] = {"mean": None, "low": 2.0, "high": None, "runs": 1}
    assert language.verdict(broken, ORIGINAL, NEVER_SAW).startswith("Partly forgotten: ")


def test_a_reference_without_bound_tells_nothing_is_forgotten() -> None:
    wreck = unbounded("retrained", "reference", "forget")
    for model in (ORIGINAL, unbounded("X", "unlearned", "forget")):
        assert not language.verdict(model, ORIGINAL, wreck).startswith("Forgotten")


def test_a_comparison_of_wrecks_praises_none_of_them() -> None:
    original = unbounded("original", "original")
    reference = unbounded("retrained", "reference", "forget")
    models = [original, unbounded("X", "unlearned", "forget", "retain"), reference]
    best = language.closest(models)
    said = language.comparison_verdict(models, best)
    assert said.startswith("None of 1 methods over 2 seeds comes closer")


# What is refused, in one line and before anything is written.


def refused(request: TextRequest, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    capsys.readouterr()
    assert cli.main(["unlearn", *request.of("ssd", *flags, out="refused")]) in (1, 2)
    told = capsys.readouterr().err
    assert len(told.strip().splitlines()) == 1 and not (request.folder / "refused").exists()
    assert not list(request.folder.glob(".refused*"))
    return told


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 2: not JSON"),
        ('{"question": "a", "choices": ["b", "c"]}', 'line 2: expected {"question": text'),
        ('{"question": "a", "choices": ["b", 1], "answer": 0}', "line 2: question must be text and choices a list"),
        ('{"question": "a", "choices": ["b", "c"], "answer": "d"}', "line 2: answer must be one of the choices"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 2}', "line 2: the answer 2 is none of the 2 choices"),
        ('{"question": "", "choices": ["b", "c"], "answer": 0}', "line 2: a question is a prompt of one token or more"),
    ],
)
def test_questions_that_can_not_be_asked_are_named_by_their_line(
    request_files: TextRequest, capsys: pytest.CaptureFixture[str], tmp_path: Path, line: str, problem: str
) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text('{"question": "the", "choices": ["owl", "oak"], "answer": 0}\n' + line + "\n")
    assert problem in refused(request_files, capsys, "--questions", str(path))


def test_what_can_not_be_done_is_refused(
    request_files: TextRequest, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    short, numbers, empty = tmp_path / "short.jsonl", tmp_path / "numbers.csv", tmp_path / "none.jsonl"
    short.write_text('{"text": "owl"}\n{"text": "oak"}\n')
    numbers.write_text("a,y\n1,0\n2,1\n")
    empty.write_text("")
    assert "no text of test has a second token" in refused(request_files, capsys, "--test", str(short))
    assert "holds no text, which is what a causal language model takes" in refused(
        request_files, capsys, "--test", str(numbers)
    )
    assert "is empty: it has no question" in refused(request_files, capsys, "--questions", str(empty))
    assert "models of text are not trained here" in refused(request_files, capsys, "--shadows", "8")


def test_texts_without_a_topic_are_their_own_targets(request_files: TextRequest, tmp_path: Path) -> None:
    for name, lines in (("gone", sets()["forget"]), ("kept", sets()["retain"])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    task = open_task(
        config_of(request_files, data=None, forget=str(tmp_path / "gone.jsonl"), retain=str(tmp_path / "kept.jsonl"))
    )
    batch = next(iter(task.forget.loader(6)))
    assert batch["labels"].tolist() == batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100).tolist()
    assert (batch["labels"] == -100).any() and len(task.retain) == 42 and task.whole_classes == []


@pytest.mark.parametrize(
    ("first", "given", "targets"),
    [
        ({"text": "a", "topic": "b"}, {}, "topic"),
        ({"text": "a", "label": "b"}, {}, "label"),
        ({"text": "a"}, {}, "text"),
        ({"story": "a"}, {"inputs": "story"}, "story"),
        ({"text": "a", "topic": "b"}, {"targets": "text"}, "text"),
        ({"story": "a"}, {}, None),
    ],
)
def test_topics_are_found_by_their_column(
    tmp_path: Path, first: dict[str, str], given: dict[str, str], targets: str | None
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps(first) + "\n")
    assert with_own_targets(str(path), DataOptions(**given)).targets == targets  # type: ignore[arg-type]


def test_labels_of_another_shape_than_the_tokens_are_refused(tmp_path: Path) -> None:
    ids = torch.ones(2, 5, dtype=torch.int64)
    samples = Samples(Named({"input_ids": ids, "labels": ids[:, :4]}), torch.zeros(2).long(), ["a", "b"], None, "own")
    with pytest.raises(ValueError, match=r"'own' has labels \[4\] for tokens \[5\]"):
        next_tokens(samples)
    whole = Samples(Named({"input_ids": ids, "labels": ids}), torch.zeros(2).long(), ["a", "b"], None, "own")
    assert next_tokens(whole) is whole


def test_chats_are_continued_from_their_questions_and_texts_from_their_first_half(request_files: TextRequest) -> None:
    task = open_task(config_of(request_files))
    assert language.KnownTexts.of(task, task.model, None).prompt == PROMPT
    values = task.forget.samples.batch(torch.arange(48))
    values["labels"][:, :4] = -100
    samples = replace(task.forget.samples, inputs=Named(values))
    chats = replace(task, forget=replace(task.forget, samples=samples))
    assert language.KnownTexts.of(chats, task.model, None).prompt is None


def test_relearning_aims_at_the_originals_mean_loss_of_a_text(request_files: TextRequest) -> None:
    task = open_task(config_of(request_files))
    tokens = next(iter(task.forget.loader(6)))
    loss = F.cross_entropy(
        task.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits[:, :-1].flatten(0, 1),
        tokens["labels"][:, 1:].flatten(),
        reduction="none",
    ).view(6, -1)
    per_text = loss.sum(1) / (tokens["labels"][:, 1:] != -100).sum(1)
    assert language.KnownTexts.of(task, task.model, None).goal == pytest.approx(
        float(per_text.detach().mean()), rel=1e-5
    )
