"""What a user may ask for: nothing is silently wrong, and what can not work is refused before it begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import NET, Request, make_request

from fastunlearn.checkpoint import digest, load_weights, save_weights
from fastunlearn.cli import main
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
