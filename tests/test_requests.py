"""What a user may ask for: nothing is silently wrong, and what can not work is refused before it begins."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import NET, Request, make_request
from torch import nn

from fastunlearn.checkpoint import digest, load_weights, save_weights
from fastunlearn.cli import main
from fastunlearn.jobs import deletion
from fastunlearn.jobs.comparison import _chosen, compare
from fastunlearn.jobs.config import Config, ConfigError
from fastunlearn.jobs.methods import METHODS
from fastunlearn.jobs.task import FORGOTTEN_TEST, Task, open_task
from fastunlearn.methods.lcodec import LCodec
from fastunlearn.report.record import weights_entry


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    return make_request(tmp_path)


def without(flags: list[str], *names: str) -> list[str]:
    """``flags`` less those of these names and their values."""
    drop = {i + k for i, flag in enumerate(flags) if flag in names for k in (0, 1)}
    return [flag for i, flag in enumerate(flags) if i not in drop]


def quick(request: Request, *more: str) -> list[str]:
    """An ``unlearn`` without what takes time."""
    few = ("--relearn", "0", "--no-probes", "--no-pictures", "--training", "epochs=2")
    return ["unlearn", *request.of("ssd", *few, *more)]


def evaluating(request: Request, *more: str) -> list[str]:
    """An ``evaluate`` of the same."""
    flags = without(request.flags("--relearn", "0", "--no-probes"), "--method", "--set", "--log")
    return ["evaluate", *flags, *more]


def refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and the one line about it; nothing may have been written beside the inputs."""
    folder = Path(flags[flags.index("--out") + 1]).parent
    before = sorted(folder.iterdir())
    code = main(flags)
    assert sorted(folder.iterdir()) == before
    return code, capsys.readouterr().err.splitlines()[-1]


def test_a_model_with_new_random_weights_is_not_unlearned_from(
    request_: Request, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags in (quick(request_), evaluating(request_)):
        code, line = refused(without(flags, "--weights"), capsys)
        assert code == 2 and "new random weights" in line and "--weights" in line


def test_a_model_that_brings_its_weights_can_be_unlearned_from_but_not_retrained(
    request_: Request, capsys: pytest.CaptureFixture[str]
) -> None:
    own = f"""
from safetensors.torch import load_file


def trained():
    model = net()
    model.load_state_dict(load_file({request_.path("weights.safetensors")!r}))
    return model
"""
    (request_.folder / "own.py").write_text(NET + own)
    flags = without(quick(request_, "--model", request_.path("own.py") + ":trained"), "--weights")
    code, line = refused([*flags, "--reference", "retrain"], capsys)
    assert code == 1 and "has the original's weights from the start" in line
    compare = ["compare", *without(flags[1:], "--method", "--set", "--log")]
    assert refused(compare, capsys)[0] == 1
    assert main(flags) == 0


def test_weights_in_shards_become_one_file(request_: Request) -> None:
    state = load_weights(request_.path("weights.safetensors"))
    first, *rest = state
    shards = request_.folder / "shards"
    shards.mkdir()
    save_weights(shards / "a.safetensors", {first: state[first]})
    save_weights(shards / "b.safetensors", {name: state[name] for name in rest})
    where = {name: "a.safetensors" if name == first else "b.safetensors" for name in state}
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    for out, weights in (("one", index), ("two", shards)):
        flags = quick(request_, "--weights", str(weights), "--out", request_.path(out))
        assert main(flags) == 0
        record = json.loads((request_.folder / out / "record.json").read_text())
        assert record["weights"]["after"]["digest"] == digest(load_weights(request_.folder / out / "model.safetensors"))
    assert (weights_entry(".", "0" * 64)["file"], weights_entry("/", "0" * 64)["file"]) == (Path.cwd().name, "weights")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_only_what_the_method_changed_counts_as_changed(request_: Request, dtype: str) -> None:
    """Also where the model computes in another precision than the file has."""
    (request_.folder / "half.py").write_text(
        NET + "\n\ndef half():\n    class Half(nn.Module):\n"
        "        def __init__(self):\n            super().__init__()\n            self.net = net().bfloat16()\n\n"
        "        def forward(self, x):\n            return self.net(x.bfloat16())\n\n    return Half()\n"
    )
    wanted = getattr(torch, dtype)
    state = {f"net.{k}": v.to(wanted) for k, v in load_weights(request_.path("weights.safetensors")).items()}
    generator = torch.Generator().manual_seed(1)
    state = {k: v + (1e-6 * torch.rand(v.shape, generator=generator)).to(wanted) for k, v in state.items()}
    torch.save(state, request_.folder / "stored.pt")
    flags = quick(request_, "--model", request_.path("half.py") + ":half", "--weights", request_.path("stored.pt"))
    assert main([*flags, "--set", 'protect=["net.1.weight", "net.1.bias"]']) == 0
    record = json.loads((request_.folder / "out" / "record.json").read_text())
    after = load_weights(request_.folder / "out" / "model.pt")
    assert {value.dtype for value in after.values()} == {wanted}
    assert [record["changed"][f"net.1.{k}"]["changed"] for k in ("weight", "bias")] == [0, 0]
    assert 0 < record["changed"]["net.3.weight"]["changed"] < record["changed"]["net.3.weight"]["of"]
    outcome = json.loads((request_.folder / "out" / "outcome.json").read_text())
    assert {k: v["changed"] for k, v in record["changed"].items() if v["changed"]} == outcome["changed"]


def opened(request: Request, **more: Any) -> Task:
    return open_task(
        Config(
            model=request.path("net.py") + ":net", weights=request.path("weights.safetensors"),
            data=request.path("train.npz"), test=request.path("test.npz"), forget="class:1", **more,
        )
    )  # fmt: skip


def test_what_is_measured_is_drawn_apart_from_what_the_method_sees(request_: Request) -> None:
    """One seed for both draws would measure the retained accuracy on the very samples that the method was given."""
    task = opened(request_, measured=45, method_samples=45)
    _, seen, _ = task.batches("class-forgetting", task.config.seed)
    both = int(torch.isin(seen.indices, task.measured.indices).sum())
    assert len(task.retain) == 90 and 12 <= both <= 33  # 22.5 expected, 5 deviations to either side


def test_validation_goes_to_the_methods_that_take_it(request_: Request) -> None:
    task = opened(request_, validation=request_.path("test.npz"))
    assert [name for name in METHODS if task.batches(name, 0)[2] is not None] == ["deepclean", "lcodec"]


def test_a_part_of_the_retained_samples_is_said_to_be_one(request_: Request) -> None:
    assert main(quick(request_, "--measured", "40")) == 0
    findings = json.loads((request_.folder / "out" / "findings.json").read_text())
    assert findings["request"]["samples"]["retain"] == 90
    assert "Of the 90 retained samples 40, drawn at random, were measured." in findings["limits"]


def test_u_lira_s_method_is_given_some_of_every_forgotten_class_and_the_validation(
    request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The samples lie class by class, as in a folder of class folders, and the method takes a part of them."""
    data = np.load(request_.path("train.npz"))
    order = np.argsort(data["y"], kind="stable")
    np.savez(request_.path("sorted.npz"), x=data["x"][order], y=data["y"][order])
    seen: list[tuple[set[int], bool]] = []
    unlearn = LCodec.unlearn

    def watched(self: LCodec, model: nn.Module, forget: Any, retain: Any, **more: Any) -> Any:
        seen.append((set(torch.cat([y for _, y in forget]).tolist()), "validation" in more))
        return unlearn(self, model, forget, retain, **more)

    monkeypatch.setattr(LCodec, "unlearn", watched)
    flags = request_.of("lcodec", "--relearn", "0", "--no-probes", "--no-pictures")
    budget = ("--set", "budget={max_drop: 50.0}", "--validation", request_.path("test.npz"))
    shadows = ("--shadows", "8", "--training", "epochs=1", "--training", "batch_size=16", "--method-samples", "16")
    more = ("--data", request_.path("sorted.npz"), "--forget", "class:0,1", "--set", "hessian_samples=8")
    assert main(["unlearn", *flags, *budget, *shadows, *more]) == 0
    assert len(seen) == 1 + 4 and seen == [({0, 1}, True)] * 5


def test_output_that_nobody_reads_is_no_failure(request_: Request) -> None:
    """``| head`` closes the pipe; the results are there, the log has its line, and nothing is said of an error."""
    flags = quick(request_)
    for i, redirected in enumerate(("| true", ">&-")):
        command = [sys.executable, "-m", "fastunlearn", *flags, "--out", request_.path(f"out{i}")]
        script = f"{shlex.join(command)} {redirected}; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=300)
        assert done.returncode == (141, 0)[i]
        assert not {"Error", "Errno", "Traceback", "Exception"} & set(done.stderr.replace(":", " ").split())
        assert (request_.folder / f"out{i}" / "record.json").exists()
        assert len((request_.folder / "log.jsonl").read_text().splitlines()) == i + 1


def test_warnings_of_others_are_shown_as_before_once_a_command_is_done(request_: Request) -> None:
    shown = warnings.showwarning
    assert main(["plan", *request_.flags(out=None)]) == 0
    assert warnings.showwarning is shown


def test_classes_of_forget_and_retain_as_data_of_their_own_are_numbered_together(request_: Request) -> None:
    """As in the data that they were one of, whichever classes each of them lacks."""
    names = np.array(["eel", "ant", "fox", "cat"])  # sorted: ant, cat, eel, fox
    data, test = np.load(request_.path("train.npz")), np.load(request_.path("test.npz"))
    for name, rows, source in (
        ("forget", data["y"] == 0, data), ("retain", data["y"] % 4 != 0, data), ("test", test["y"] >= 0, test)
    ):  # fmt: skip
        np.savez(request_.path(f"{name}_.npz"), x=source["x"][rows], y=names[source["y"][rows]])
    one = {name: request_.path(f"{name}_.npz") for name in ("forget", "retain", "test")}
    task = open_task(
        Config(model=request_.path("net.py") + ":net", weights=request_.path("weights.safetensors"), **one)
    )
    assert task.classes == ["ant", "cat", "eel", "fox"] and task.whole_classes == [2]
    assert {name: sorted(set(part.labels.tolist())) for name, part in task.sets.items()} == {
        "forget": [2], "retain": [0, 1, 3], "test": [0, 1, 3], FORGOTTEN_TEST: [2]
    }  # fmt: skip


def test_test_samples_are_not_those_of_the_request(request_: Request, capsys: pytest.CaptureFixture[str]) -> None:
    same = request_.path("same.npz")
    shutil.copy(request_.path("train.npz"), same)
    code, line = refused(quick(request_, "--test", same), capsys)
    assert code == 1 and f"--test {same} holds the samples that are forgotten or retained" in line


@pytest.mark.parametrize("label", ["a/../../b", "", "/tmp/x", "x" * 81, "a\nb"])
def test_a_label_of_a_comparison_names_files(label: str) -> None:
    config = Config(model="a:b", forget="class:1", out="out", methods=[{"method": "ssd", "label": label}])
    if label:
        with pytest.raises(ConfigError, match="methods: ssd: label must be up to 80"):
            compare(config, False, print)
    else:
        assert _chosen(config)[0][0] == "ssd"


def test_without_matplotlib_there_are_no_pictures_and_all_else(
    request_: Request, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    flags = quick(request_)
    flags.remove("--no-pictures")
    assert main(flags) == 0
    assert "no pictures beside the report: they need matplotlib" in capsys.readouterr().err
    assert (request_.folder / "out" / "report.html").exists() and not (request_.folder / "out" / "pictures").exists()


def interrupted(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until the method is done and the first model is to be measured."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(deletion, "measure", stop)
        assert main(flags) == 130


def test_a_run_goes_on_only_with_the_same_model_data_and_weights(
    request_: Request, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = quick(request_)
    interrupted(flags, monkeypatch)
    assert main(flags) == 1 and "or is still at it" in capsys.readouterr().err
    data = dict(np.load(request_.path("train.npz")))
    data["x"][0] += 1
    state = load_weights(request_.path("weights.safetensors"))
    first = next(iter(state))

    def other_data() -> None:
        np.savez(request_.path("train.npz"), **data)

    def other_weights() -> None:
        save_weights(request_.path("weights.safetensors"), state | {first: state[first] + 1})

    def other_code() -> None:
        (request_.folder / "net.py").write_text(NET.replace("ReLU", "Tanh"))

    for change, what in ((other_data, "data digests"), (other_weights, "weights digest"), (other_code, "model digest")):
        change()
        assert main([*flags, "--resume"]) == 1
        assert f"had another {what}" in capsys.readouterr().err
        make_request(request_.folder)
    assert main([*flags, "--resume"]) == 0
    assert main([*flags, "--resume"]) == 0
    other_weights()
    assert main([*flags, "--resume"]) == 1
    assert "holds the results for other weights than" in capsys.readouterr().err


def test_a_test_set_without_the_forgotten_class_is_said_to_be_one(request_: Request) -> None:
    data = np.load(request_.path("test.npz"))
    np.savez(request_.path("lacking.npz"), x=data["x"][data["y"] != 1], y=data["y"][data["y"] != 1])
    assert main(quick(request_, "--test", request_.path("lacking.npz"))) == 0
    limits = json.loads((request_.folder / "out" / "record.json").read_text())["limits"]
    assert any("No test sample is of a forgotten class" in limit for limit in limits)
