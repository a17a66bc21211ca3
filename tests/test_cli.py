"""The command line as a user runs it."""

from __future__ import annotations

import importlib.machinery
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastunlearn
from fastunlearn import cli


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastunlearn", *arguments], capture_output=True, text=True, timeout=300
    )


def without_times(value: Any) -> Any:
    """The record but for what a clock or the process's memory says."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if "seconds" not in k and k != "peak_memory"}
    return [without_times(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two runs of the demo with the default seed."""
    found = []
    for i in range(2):
        out = tmp_path_factory.mktemp(f"demo{i}")
        result = run("demo", "--out", str(out))
        assert result.returncode == 0, result.stderr
        assert "accuracy in %" in result.stdout
        assert (out / "picture.png").read_bytes().startswith(b"\x89PNG")
        found.append(json.loads((out / "record.json").read_text()))
    return found


def test_two_runs_of_the_demo_give_the_same_record(records: list[dict[str, Any]]) -> None:
    assert without_times(records[0]) == without_times(records[1])


def test_demo_forgets_a_class(records: list[dict[str, Any]]) -> None:
    row = records[0]["requests"][0]
    assert row["models"]["ClassForgetting"]["accuracy"]["forget"] <= 2
    assert row["forgotten_class_test_accuracy"] <= 2
    kept = {name: row["models"][name]["accuracy"]["test"] for name in ("original", "ClassForgetting")}
    assert kept["original"] - kept["ClassForgetting"] <= 3


def test_demo_deepclean_is_near_the_retrained_model(records: list[dict[str, Any]]) -> None:
    gap = records[0]["requests"][1]["models"]["DeepClean"]["gap"]
    assert all(abs(gap[name]) <= 5 for name in ("forget", "retain", "test"))


def test_demo_lcodec_raises_the_loss_of_removed_samples(records: list[dict[str, Any]]) -> None:
    row = records[0]["requests"][2]
    original, unlearned = row["models"]["original"], row["models"]["LCodec"]
    assert unlearned["loss"]["forget"] > original["loss"]["forget"]
    assert all(r["loss_after"] > r["loss_before"] for r in row["method"]["details"]["removals"])
    assert original["accuracy"]["test"] - unlearned["accuracy"]["test"] <= 2


def test_demo_takes_less_than_90_seconds(records: list[dict[str, Any]]) -> None:
    assert min(record["seconds"] for record in records) < 90


def test_doctor_says_what_each_operator_will_use() -> None:
    result = run("doctor")
    assert result.returncode == 0, result.stderr
    assert f"torch    {torch.__version__}" in result.stdout
    for name in ("sq_grad_linear", "sq_grad_conv2d", "threshold_reset_", "mask_grads_"):
        assert name in result.stdout
    if not torch.cuda.is_available():
        assert "usable here on CPU tensors" in result.stdout
        assert (
            "CPU build of torch" in result.stdout
            or "no GPU or no driver" in result.stdout
            or "CPU build" in result.stdout
        )


def test_doctor_works_where_there_is_no_nvcc(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert cli.main(["doctor"]) == 0
    assert "nvcc     not found" in capsys.readouterr().out


def test_doctor_says_how_to_build_when_the_library_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fail() -> Any:
        raise ImportError("fastunlearn is not built: run `pip install .`")

    monkeypatch.setattr("fastunlearn._library.load", fail)
    assert cli.main(["doctor"]) == 1
    assert "not built" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_refused_in_one_line(tmp_path: Path) -> None:
    result = run("demo", "--device", "cuda", "--out", str(tmp_path / "out"))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "--device cuda can not be used" in result.stderr
    assert not (tmp_path / "out").exists()


def test_importing_prints_nothing_and_loads_no_plotting() -> None:
    code = "import fastunlearn, sys; assert not {'matplotlib', 'sklearn', 'rich'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_the_library_has_one_extension_for_this_python() -> None:
    path = Path(fastunlearn.ops._C.__file__)
    assert any(path.name.endswith(suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES)


def test_library_code_prints_nothing(capfd: Any) -> None:
    """Methods and evaluation are silent; progress is opt-in."""
    from models import classifier

    model, forget, retain = classifier()
    fastunlearn.DeepClean(fraction=0.1).unlearn(model, forget, retain)
    fastunlearn.ClassForgetting().unlearn(model, forget, retain)
    fastunlearn.FineTune().unlearn(model, forget, retain)
    fastunlearn.LCodec(perturbations=20, hessian_samples=10, max_units=1).unlearn(
        model, [(forget[0][0][:1], forget[0][1][:1])], retain
    )
    fastunlearn.evaluate(model, forget=forget, retain=retain, test=retain)
    assert capfd.readouterr() == ("", "")
