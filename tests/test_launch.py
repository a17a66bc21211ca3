"""Under torchrun: the results of one process, one voice, and an end that names the rank it came from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from commands import Request, make_request
from ranks import on_ranks
from texts import make_text_request

from fastunlearn import cli
from fastunlearn.checkpoint import digest, load_weights
from fastunlearn.jobs.config import ConfigError
from fastunlearn.jobs.task import device_named
from fastunlearn.jobs.workspace import KEPT, Workspace
from fastunlearn.parallel.launch import Watch, first_alone, joined, require_same
from fastunlearn.parallel.ranks import ALONE, world
from fastunlearn.report.log import verify

# A user's model that, on rank 1 and once a file is there, kills its process or raises; for one process it does neither.
NET = """
import os, signal
from pathlib import Path
from torch import nn


class Net(nn.Sequential):
    def forward(self, x):
        switch = Path(__file__).with_name("switch")
        if os.environ.get("RANK") == "1" and switch.exists():
            what, file = switch.read_text().split(maxsplit=1)
            if Path(file).exists():
                if what == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ValueError("this rank\\nhas had enough")
        return super().forward(x)


def net():
    return Net(nn.Flatten(), nn.Linear(36, 24), nn.ReLU(), nn.Linear(24, 4))
"""
RESULTS = {"model.safetensors", "patch.safetensors", "record.json", "report.html", "findings.json", "config.yaml",
           "outcome.json", "salt"}  # fmt: skip


def request_of(folder: Path) -> Request:
    request = make_request(folder)
    Path(request.path("net.py")).write_text(NET)
    return request


def config_of(request: Request, out: str) -> str:
    """The same request as a file: torchrun takes some of our flags for its own."""
    keys = {
        "model": request.path("net.py") + ":net", "weights": request.path("weights.safetensors"),
        "data": request.path("train.npz"), "test": request.path("test.npz"), "forget": "class:1", "method": "finetune",
        "settings": {"lr": 0.005, "momentum": 0.5}, "batch_size": 16,
        "bootstrap": 20, "relearn": 0, "pictures": False, "out": request.path(out), "log": request.path(out) + ".jsonl",
    }  # fmt: skip
    Path(request.path(f"{out}.yaml")).write_text(yaml.safe_dump(keys))
    return request.path(f"{out}.yaml")


def torchrun(size: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "-m", "fastunlearn"]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def kept(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def numbers(value: Any) -> list[float]:
    """All of a JSON value, in order."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    return [value] if isinstance(value, (int, float)) else []


def ours(stderr: str) -> list[str]:
    """What the command says about how it ended, without torchrun's own words."""
    return [line for line in stderr.splitlines() if line.startswith(("fastunlearn:", "fastunlearn unlearn:"))]


def shape_of(value: Any) -> Any:
    """The fields of a JSON value, without what they hold."""
    if isinstance(value, dict):
        return {key: shape_of(item) for key, item in value.items()}
    return None


def test_two_processes_forget_texts_as_one_does(tmp_path: Path) -> None:
    """DeepClean on a GPT-2 folder, sharded over two processes, and by one alone."""
    request = make_text_request(tmp_path)
    for out in ("one", "two"):
        keys = {
            "model": request.path("model"), "data": request.path("texts.jsonl"), "test": request.path("held.jsonl"),
            "forget": f"index:{request.path('forget.json')}", "reference": request.path("never-saw"),
            "questions": request.path("questions.jsonl"), "method": "deepclean", "batch_size": 8, "bootstrap": 20,
            "settings": {"fraction": 0.2, "lr": 0.01}, "relearn": 0, "pictures": False,
            "out": request.path(out), "log": request.path(out) + ".jsonl",
        }  # fmt: skip
        Path(request.path(f"{out}.yaml")).write_text(yaml.safe_dump(keys))
    assert cli.main(["unlearn", "--config", request.path("one.yaml")]) == 0
    run = torchrun(2, "unlearn", "--config", request.path("two.yaml"))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("written to") == 1 and run.stderr.count("measuring the original") == 1
    one, two = tmp_path / "one", tmp_path / "two"
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()} == RESULTS
    original = load_weights(request.path("model"))
    expected, found = (load_weights(out / "model.safetensors") for out in (one, two))
    assert found.keys() == expected.keys() and digest(expected) != digest(original)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    records = [kept(out, "record.json") for out in (one, two)]
    assert shape_of(records[0]) == shape_of(records[1])
    assert records[0]["weights"]["before"] == records[1]["weights"]["before"]
    for mine, theirs in zip(records[0]["metrics"], records[1]["metrics"], strict=True):
        for of in ("perplexity", "extraction", "questions"):
            assert numbers(theirs[of]) == pytest.approx(numbers(mine[of]), rel=1e-3)
    checks = verify(two / "record.json", two / "model.safetensors", tmp_path / "two.jsonl", two / "patch.safetensors")
    assert all(check.passed for check in checks), checks
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_killed_rank_is_named_and_one_process_goes_on_from_the_last_phase(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = request_of(tmp_path)
    config = config_of(request, "out")
    phases = tmp_path / ".out.unfinished" / KEPT
    (tmp_path / "switch").write_text(f"kill {phases / 'unlearn.json'}")
    start = time.monotonic()
    run = torchrun(2, "unlearn", "--config", config)
    assert run.returncode != 0 and time.monotonic() - start < 300
    said = ours(run.stderr)
    assert len(said) == 1 and "ended, because rank 1 died" in said[0] and "--resume" in said[0]
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.jsonl").exists()
    assert (phases / "unlearn.json").exists() and (phases / "unlearned" / "model.safetensors").exists()
    unlearned = digest(load_weights(phases / "unlearned"))
    capsys.readouterr()
    assert cli.main(["unlearn", "--config", config, "--resume"]) == 0
    assert "forgetting" not in capsys.readouterr().err  # that phase was finished
    assert {p.name for p in (tmp_path / "out").iterdir()} == RESULTS
    assert digest(load_weights(tmp_path / "out" / "model.safetensors")) == unlearned


def test_a_rank_that_raises_says_so_itself_and_ends_the_job(tmp_path: Path) -> None:
    request = request_of(tmp_path)
    phases = tmp_path / ".out.unfinished" / KEPT
    (tmp_path / "switch").write_text(f"raise {phases / 'request.json'}")
    run = torchrun(2, "unlearn", "--config", config_of(request, "out"))
    assert run.returncode != 0
    said = ours(run.stderr)
    assert said[0] == "fastunlearn unlearn: rank 1: ValueError: this rank has had enough"
    assert len(said) == 2 and "ended, because rank 1 failed" in said[1]
    assert not (tmp_path / "out").exists()


def _watching(rank: int, what: str) -> str:
    """What this rank says when: all fail alike, one fails, one is silent, or each fails in its own way."""
    port = first_alone(world(), _free_port)
    watch = Watch("fastunlearn", dist.TCPStore("127.0.0.1", port, 3, rank == 0), rank, 3)
    dist.barrier()
    try:
        if what == "alike":
            time.sleep(rank / 5)
            return watch.settle(2, ConfigError("no such key"), "fastunlearn unlearn: no such key")
        if what == "own":
            return watch.settle(1, MemoryError(), f"fastunlearn unlearn: {rank} bytes")
        if rank == 2:
            if what == "silent":
                watch.close()
                return ""
            return watch.settle(1, OSError("torn"), "fastunlearn unlearn: torn")
        time.sleep(0.5)
        return watch.settle(1, RuntimeError("closed"), f"fastunlearn unlearn: peer {rank} closed")
    finally:
        dist.barrier()
        if (rank, what) != (2, "silent"):
            watch.close()


def _free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def test_who_says_what_at_the_end() -> None:
    assert on_ranks(3, _watching, "alike") == ["fastunlearn unlearn: no such key", "", ""]
    own = [f"fastunlearn unlearn: rank {rank}: MemoryError: {rank} bytes" for rank in range(3)]
    assert on_ranks(3, _watching, "own") == own
    first, *others = on_ranks(3, _watching, "silent")
    assert first.startswith("fastunlearn: ended, because rank 2 died") and others == ["", ""]
    first, second, third = on_ranks(3, _watching, "one")
    assert third == "fastunlearn unlearn: rank 2: OSError: torn"
    assert first.startswith("fastunlearn: ended, because rank 2 failed") and second == ""


def _alone_first(rank: int, path: str) -> list[Any]:
    ranks, found = world(), []
    found.append(first_alone(ranks, lambda: ("of", rank)))
    wrongs: tuple[Any, ...] = (
        lambda: open(path), lambda: torch.zeros(2) @ torch.zeros(3), lambda: device_named("tpu"),
        lambda: b"\xff".decode(),
    )  # fmt: skip
    for wrong in wrongs:
        try:
            first_alone(ranks, wrong)
        except (OSError, RuntimeError, ValueError) as error:
            found.append((type(error).__name__, str(error)))
    try:
        require_same(ranks, {"seed": 3, "samples": {"forget": "b" if rank == 1 else "a"}})
    except ValueError as error:
        found.append(str(error).partition(";")[0])
    require_same(ranks, {"seed": 3})
    with joined(torch.device("cpu")) as inside:
        found.append((inside.rank, inside.size))
    return found


def test_what_the_first_rank_finds_is_found_by_all(tmp_path: Path) -> None:
    found = on_ranks(2, _alone_first, str(tmp_path / "nowhere"))
    for rank in range(2):
        value, missing, shapes, device, letters, differs, inside = found[rank]
        assert letters[0] in ("UnicodeDecodeError", "ValueError") and "can't decode byte 0xff" in letters[1]
        assert value == ("of", 0)
        assert missing[0] in ("FileNotFoundError", "OSError") and "nowhere" in missing[1]
        assert shapes[0] == "RuntimeError" and device[0] in ("ConfigError", "ValueError")
        assert differs == "rank 1 differs from rank 0 in samples" and inside == (rank, 2)
    assert first_alone(ALONE, lambda: 3) == 3


def _phases(rank: int, out: str, resume: bool) -> tuple[Any, list[str], str]:
    ran: list[str] = []
    try:
        space = Workspace(Path(out), {"seed": 1}, resume, world())
    except OSError as error:
        return None, [], str(error)
    values = [space.phase(name, lambda name=name: ran.append(name) or f"{name} of {rank}") for name in ("a", "b")]  # type: ignore[misc,func-returns-value]
    space.close()
    return values, ran, ""


def test_phases_are_kept_by_the_first_rank_and_skipped_by_all(tmp_path: Path) -> None:
    out = str(tmp_path / "deep" / "out")
    first = on_ranks(2, _phases, out, False)
    assert first == [(["a of 0", "b of 0"], ["a", "b"], "")] * 2
    refused = on_ranks(2, _phases, out, False)
    assert refused[0] == refused[1] and "--resume goes on with it" in refused[0][2]
    assert on_ranks(3, _phases, out, True) == [(["a of 0", "b of 0"], [], "")] * 3
    space = Workspace(Path(out), {"seed": 1}, True)
    assert space.phase("a", lambda: "again") == "a of 0"
    space.close()


def test_several_processes_on_gpus_are_told_to_leave_the_numbers_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="give --device cuda, not cuda:0"):
        device_named("cuda:0")
    assert device_named("cpu") == torch.device("cpu")
