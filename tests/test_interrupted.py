"""Killed at any moment: the original checkpoint is as it was, the results are whole or absent, and --resume gets there.

One process imports everything and forks a child per run, so that a run takes a second and not the imports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import Request, make_request

from fastunlearn.checkpoint import digest, load_weights
from fastunlearn.report.log import verify

RESULTS = {"model.safetensors", "patch.safetensors", "record.json", "report.html", "findings.json", "config.yaml",
           "outcome.json", "salt"}  # fmt: skip

HARNESS = '''
import json, os, random, signal, sys, time

sys.path.insert(0, sys.argv[1])
from pathlib import Path

import sklearn.metrics, sklearn.model_selection, sklearn.svm, jsonschema  # what runs will import
import torch
from commands import make_request

import fastunlearn.jobs.deletion
from fastunlearn import cli

folder, moments, boundary = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "renames"


def child(request, out, *flags, kill_at=None):
    """Start a run; with kill_at it kills itself at that rename."""
    process = os.fork()
    if process:
        return process
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    if kill_at is not None:
        count, after = kill_at
        seen = [0]
        for name in ("replace", "rename"):
            def stop(a, b, move=getattr(os, name)):
                seen[0] += 1
                if seen[0] == count and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                move(a, b)
                if seen[0] == count:
                    os.kill(os.getpid(), signal.SIGKILL)
            setattr(os, name, stop)
    more = ("--log", request.path(out) + ".jsonl", "--reference", "retrain", "--training", "epochs=2", "--no-pictures")
    os._exit(cli.main(["unlearn", *request.flags(*more, *flags, out=out)]))


def wait(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


request = make_request(folder)
started = time.perf_counter()
assert wait(child(request, "whole")) == 0, (folder / "stderr").read_text()
whole = time.perf_counter() - started
runs = []
draw = random.Random(0)
for i in range(moments):
    out = f"out{i}"
    if boundary:
        process = child(request, out, kill_at=(i + 1, i % 2))
    else:
        process = child(request, out)
        time.sleep(draw.uniform(0, whole))
        os.kill(process, signal.SIGKILL)
    killed = wait(process)
    present = sorted(p.name for p in (folder / out).iterdir()) if (folder / out).exists() else None
    resumed = [wait(child(request, out, "--resume"))]
    if present is not None:
        resumed.append(wait(child(request, out, "--resume")))  # once more does nothing
    runs.append({"out": out, "killed": killed, "present": present, "resumed": resumed})
    if killed == 0 if boundary else sum(run["killed"] < 0 for run in runs) == 20:
        break
print(json.dumps({"runs": runs, "stderr": (folder / "stderr").read_text()}))
'''


def run_harness(folder: Path, moments: int, kind: str) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-c", HARNESS, str(Path(__file__).parent), str(folder), str(moments), kind],
        capture_output=True, text=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def check(folder: Path, found: dict[str, Any], before: dict[str, str]) -> None:
    """What holds after every kill and resume."""
    expected = digest(load_weights(folder / "whole" / "model.safetensors"))
    for run in found["runs"]:
        out = folder / run["out"]
        assert run["present"] is None or set(run["present"]) - {".phases"} == RESULTS, run
        assert set(run["resumed"]) == {0}, (run, found["stderr"])
        assert {p.name for p in out.iterdir()} == RESULTS
        assert digest(load_weights(out / "model.safetensors")) == expected
        log = folder / f"{run['out']}.jsonl"
        checks = verify(out / "record.json", weights=out / "model.safetensors", log=log)
        assert all(c.passed for c in checks), checks
        assert len(log.read_text().splitlines()) == 1  # in the log once, however often it was resumed
        assert not list(folder.glob(f".{run['out']}.*"))  # nothing left beside it
    assert Request(folder).hashes() == before


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    request = make_request(tmp_path)
    return tmp_path, request.hashes()


def test_killed_at_twenty_random_moments(folder: tuple[Path, dict[str, str]]) -> None:
    path, before = folder
    found = run_harness(path, 100, "random")
    assert [run["killed"] for run in found["runs"]].count(-9) == 20  # the others had just finished
    check(path, found, before)


def test_killed_before_or_after_every_rename(folder: tuple[Path, dict[str, str]]) -> None:
    """Every file appears by a rename, so these are all the states that a kill can leave behind."""
    path, before = folder
    found = run_harness(path, 200, "renames")
    killed = [run["killed"] for run in found["runs"]]
    assert killed[-1] == 0 and set(killed[:-1]) == {-9} and len(killed) > 15
    check(path, found, before)
