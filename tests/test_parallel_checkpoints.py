"""Checkpoints of sharded models: bit for bit in every direction, each rank its share, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fastunlearn.checkpoint import digest, load_into, load_weights, save_weights
from fastunlearn.parallel import checkpoints
from fastunlearn.parallel.checkpoints import count_changed, load_sharded, save_distributed, save_sharded, sharded_digest

# torch says so wherever its checkpoints are used by one process.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

TYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn)


class Odd(nn.Module):
    """Parameters and buffers of the given shapes."""

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        for i, shape in enumerate(shapes):
            self.register_parameter(f"p{i}", nn.Parameter(torch.randn(shape, generator=random).to(dtype)))
        self.register_buffer("mask", torch.full((3, 3), -float("inf")).triu(1))
        self.register_buffer("steps", torch.tensor(2**40 + seed))
        self.register_buffer("scale", torch.randn(5, 2, generator=random))
        self.register_buffer("cache", torch.randn(2, generator=random), persistent=False)


def odd_shapes(draw: random.Random) -> list[tuple[int, ...]]:
    sizes = (1, 1, 2, 3, 5, 7, 8)
    shapes: list[tuple[int, ...]] = [(1,), (1, 3), (3, 1), (5, 7)]
    return shapes + [tuple(draw.choice(sizes) for _ in range(draw.randint(1, 4))) for _ in range(3)]


def full_state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def mesh_for(draw: random.Random, size: int) -> DeviceMesh:
    shape = draw.choice([(size,), (size // min(size, 2), min(size, 2)), (1, size)])
    return init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])


def scatter(model: Odd, mesh: DeviceMesh, draw: random.Random) -> None:
    """Every tensor in a sharding drawn at random: rows, columns, further axes, several of them, replicas."""

    def scattered(tensor: Tensor) -> DTensor:
        options = [Replicate(), *(Shard(axis) for axis in range(tensor.dim()))]
        return distribute_tensor(tensor, mesh, [draw.choice(options) for _ in range(mesh.ndim)], src_data_rank=None)

    for name, parameter in list(model.named_parameters()):
        setattr(model, name, nn.Parameter(scattered(parameter.detach())))
    model.scale = scattered(model.scale)


def holds(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """Each rank's part is that of the full tensors, scattered by torch."""
    for key, value in model.state_dict().items():
        want = expected[key]
        if isinstance(value, DTensor):
            value, want = (
                value.to_local(),
                distribute_tensor(want, value.device_mesh, value.placements, src_data_rank=None).to_local(),
            )
        assert value.dtype == want.dtype, key
        assert torch.equal(value.reshape(-1).view(torch.uint8), want.reshape(-1).view(torch.uint8)), key


def round_trips(rank: int, folder: Path, seeds: range) -> None:
    size = dist.get_world_size()
    for seed in seeds:
        draw = random.Random(seed)
        shapes, dtype = odd_shapes(draw), draw.choice(TYPES)
        model, other, plain = (Odd(shapes, dtype, s) for s in (seed, seed + 1000, seed + 2000))
        expected = full_state(model)
        if draw.random() < 0.3:
            for each in (model, other):
                fully_shard(each, mesh=mesh_for(draw, size))  # of two axes the first replicates
        else:
            for each in (model, other):
                scatter(each, mesh_for(draw, size), draw)
        assert sharded_digest(model) == digest(expected)
        here = folder / f"{size} {seed}"
        save_sharded(here / "sharded", model, max_shard_bytes=draw.choice([1, 50, 200, 10**9]))
        save_distributed(here / "distributed", model)
        for name in ("sharded", "distributed"):
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.zero_()
            assert load_sharded(other, here / name) == ["cache"]
            holds(other, expected)
            assert count_changed(other, here / name) == {}
        if rank == 0:
            assert digest(load_weights(here / "sharded")) == digest(expected)
            for name in ("sharded", "distributed"):  # alone, whatever process groups there are
                load_sharded(plain, here / name)
                assert digest(plain.state_dict()) == digest(expected)
                load_into(plain, full_state(Odd(shapes, dtype, 1)), "another")
            state = full_state(plain)
            dcp.load(state, checkpoint_id=here / "distributed", no_dist=True)
            assert digest(state) == digest(expected)
            assert sorted(os.listdir(here)) == ["distributed", "sharded"]
        dist.barrier()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_sharding_of_any_shape_survives_bit_by_bit(tmp_path: Path, size: int) -> None:
    on_ranks(size, round_trips, tmp_path, range(8))


def test_a_plain_model_alone_is_written_and_read_the_same_way(tmp_path: Path) -> None:
    shapes = [(3, 2), (1,), (0, 4)]
    model, other = Odd(shapes, torch.bfloat16, 0), Odd(shapes, torch.bfloat16, 1)
    assert sharded_digest(model) == digest(model.state_dict())
    save_sharded(tmp_path / "one", model)
    assert os.listdir(tmp_path / "one") == ["model.safetensors"]
    save_sharded(tmp_path / "many", model, max_shard_bytes=1)
    save_distributed(tmp_path / "distributed", model)
    save_weights(tmp_path / "model.pt", model.state_dict())
    for name in ("one", "one/model.safetensors", "many", "distributed", "model.pt"):
        load_into(other, full_state(Odd(shapes, torch.bfloat16, 1)), "another")
        load_sharded(other, tmp_path / name)
        assert digest(other.state_dict()) == digest(model.state_dict())


def test_one_file_is_what_save_weights_writes(tmp_path: Path) -> None:
    model = Odd([(3, 2), (1,), (4, 5)], torch.bfloat16, 0)
    save_sharded(tmp_path / "folder", model)
    save_weights(tmp_path / "model.safetensors", model.state_dict())
    assert (tmp_path / "folder" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_no_file_is_larger_than_asked_unless_it_is_one_tensor(tmp_path: Path) -> None:
    model = nn.ParameterDict({f"w{i}": torch.zeros(n) for i, n in enumerate((3, 3, 50, 2, 2, 2, 9))})
    save_sharded(tmp_path / "out", model, max_shard_bytes=40)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = [
        sorted(k for k, f in index["weight_map"].items() if f == name)
        for name in sorted(os.listdir(tmp_path / "out"))[:-1]
    ]
    assert files == [["w0", "w1"], ["w2"], ["w3", "w4", "w5"], ["w6"]]
    assert index["metadata"]["total_size"] == 4 * 71
    with pytest.raises(ValueError, match="max_shard_bytes must be 1 or more, got 0"):
        save_sharded(tmp_path / "none", model, max_shard_bytes=0)


# Hugging Face models


def language_model(kind: str) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=37, n_positions=16, n_embd=12, n_layer=2, n_head=3)).bfloat16()
    config = LlamaConfig(
        vocab_size=37, hidden_size=12, intermediate_size=21, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=kind == "tied llama",
    )  # fmt: skip
    return LlamaForCausalLM(config).bfloat16()


KINDS = ("gpt2", "llama", "tied llama")


def same_names(state: dict[str, Tensor], tied: bool) -> nn.Module:
    """Modules that hold these parameters under these names, on the meta device; ranks need no transformers for it."""
    root = nn.Module()
    for key, value in state.items():
        *path, last = key.split(".")
        module = root
        for name in path:
            if name not in dict(module.named_children()):
                module.add_module(name, nn.Module())
            module = module.get_submodule(name)
        parameter = nn.Parameter(torch.empty_like(value, device="meta"))
        if key == "lm_head.weight" and tied:
            parameter = next(
                p for name, p in root.named_parameters() if name.endswith(("wte.weight", "embed_tokens.weight"))
            )
        module.register_parameter(last, parameter)
    return root


def shard_blocks(model: Any) -> None:
    for block in (model.transformer.h if hasattr(model, "transformer") else model.model.layers).children():
        fully_shard(block)
    fully_shard(model)


def rewrite(rank: int, folder: Path, states: dict[str, dict[str, Tensor]]) -> list[str]:
    found = []
    for kind, state in states.items():
        model = same_names(state, tied=kind != "llama")
        original = folder / f"original {kind}"
        shard_blocks(model)
        with pytest.raises(ValueError, match=r"the model's .* have no values to load into yet"):
            load_sharded(model, original)
        model.to_empty(device="cpu")
        assert load_sharded(model, original) == []
        like = original / "model.safetensors"
        config = (original / "config.json").read_bytes()
        save_sharded(
            folder / kind, model, 2000, like, beside=lambda at, config=config: (at / "config.json").write_bytes(config)
        )
        save_distributed(folder / f"{kind} distributed", model)
        found.append(sharded_digest(model))
    return found


def test_language_models_go_through_four_ranks_and_back_to_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    states = {}
    for kind in KINDS:
        model = language_model(kind)
        model.save_pretrained(tmp_path / f"original {kind}")
        states[kind] = full_state(model)
    assert on_ranks(4, rewrite, tmp_path, states) == [[digest(state) for state in states.values()]] * 4
    for kind, state in states.items():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype=torch.bfloat16)
        assert digest(again.state_dict()) == digest(state)
        assert load_weights(tmp_path / kind).keys() == load_weights(tmp_path / f"original {kind}").keys()
        assert len(list((tmp_path / kind).glob("model-*-of-*.safetensors"))) > 2
        for name in (kind, f"{kind} distributed"):
            plain = language_model(kind)
            with torch.no_grad():
                for parameter in plain.parameters():
                    parameter.zero_()
            load_sharded(plain, tmp_path / name)
            assert digest(plain.state_dict()) == digest(state)


def language_models(rank: int, folder: Path) -> list[str]:
    found = []
    for kind, left in (
        ("gpt2", []),
        ("tied llama", ["model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"]),
    ):
        with torch.device("meta"):
            model = language_model(kind)
        shard_blocks(model)
        model.to_empty(device="cpu")
        assert load_sharded(model, folder / kind) == left
        for buffer in model.buffers():
            buffer.fill_(1)
        model(input_ids=torch.arange(6).reshape(2, 3))  # after which the last group stays gathered
        found.append(sharded_digest(model))
        save_sharded(folder / f"{kind} again", model, like=folder / kind / "model.safetensors")
    return found


def test_transformers_own_models_are_built_without_memory_sharded_and_loaded(tmp_path: Path) -> None:
    expected = []
    for kind in ("gpt2", "tied llama"):
        model = language_model(kind)
        model.save_pretrained(tmp_path / kind)
        expected.append(digest(model.state_dict()))
    assert on_ranks(2, language_models, tmp_path) == [expected] * 2
    for kind in ("gpt2", "tied llama"):
        assert digest(load_weights(tmp_path / kind)) == digest(load_weights(tmp_path / f"{kind} again"))


def tensor_parallel(rank: int, folder: Path) -> None:
    for hidden in (1, 3, 5, 8):
        torch.manual_seed(hidden)
        model = nn.Sequential(nn.Linear(3, hidden), nn.GELU(), nn.Linear(hidden, 2))
        expected = full_state(model)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["data"])
        assert sharded_digest(model) == digest(expected)
        save_sharded(folder / f"{hidden}", model, max_shard_bytes=40)
        save_distributed(folder / f"{hidden} distributed", model)
        for name in (f"{hidden}", f"{hidden} distributed"):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.to_local().zero_()
            load_sharded(model, folder / name)
            assert sharded_digest(model) == digest(expected)
        assert digest(load_weights(folder / f"{hidden}")) == digest(expected)


def test_tensor_parallelism_inside_fsdp_keeps_rows_and_columns_in_place(tmp_path: Path) -> None:
    on_ranks(4, tensor_parallel, tmp_path)


def data_parallel(rank: int, folder: Path) -> None:
    model = nn.parallel.DistributedDataParallel(Odd([(5, 3), (2,)], torch.float32, 0))
    if rank:
        model.module.scale.add_(1)  # buffers drift between forward passes; those of rank 0 count
    expected = full_state(Odd([(5, 3), (2,)], torch.float32, 0))
    assert sharded_digest(model) == digest(expected)
    save_sharded(folder / "out", model)
    assert digest(load_weights(folder / "out")) == digest(expected)
    load_sharded(model, folder / "out")
    assert digest(model.module.state_dict()) == digest(expected)


def test_data_parallel_replicas_are_written_once(tmp_path: Path) -> None:
    on_ranks(2, data_parallel, tmp_path)


# What does not fit


def wrong(state: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    state = dict(state)
    if how == "missing":
        del state["2.bias"]
    elif how == "unexpected":
        state["extra"] = torch.zeros(2)
    elif how == "misshapen":
        state["0.weight"] = state["0.weight"].t()
    elif how == "integer":
        state["0.bias"] = state["0.bias"].long()
    elif how == "first row":
        state["2.weight"] = state["2.weight"].index_fill(0, torch.tensor(0), float("nan"))
    elif how == "last row":
        state["2.weight"] = state["2.weight"].index_fill(0, torch.tensor(4), float("inf"))
    elif how == "too large":
        state["2.weight"] = state["2.weight"].double().index_fill(0, torch.tensor(4), 1e300)
    return state


HOWS = ("missing", "unexpected", "misshapen", "integer", "first row", "last row", "too large")


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 5))


def refused(rank: int, folder: Path) -> list[str]:
    model = small()
    before = digest(model.state_dict())
    fully_shard(model)
    messages = []
    for path in sorted(folder.iterdir()):
        with pytest.raises((ValueError, OSError)) as caught:
            load_sharded(model, path)
        messages.append(f"{type(caught.value).__name__}: {caught.value}")
        assert "\n" not in messages[-1]
    assert sharded_digest(model) == before
    return messages


def test_every_rank_raises_what_load_into_would_and_changes_nothing(tmp_path: Path) -> None:
    state = small().state_dict()
    for how in HOWS:
        save_weights(tmp_path / f"{how}.safetensors", wrong(state, how))
        dcp.save(wrong(state, how), checkpoint_id=tmp_path / f"{how}", no_dist=True)
    save_weights(tmp_path / "cut.safetensors", state)
    os.truncate(tmp_path / "cut.safetensors", os.path.getsize(tmp_path / "cut.safetensors") - 1)
    (tmp_path / "other.txt").touch()
    (tmp_path / "empty").mkdir()
    found = on_ranks(2, refused, tmp_path)
    assert found[0] == found[1]
    by_name = dict(zip(sorted(path.name for path in tmp_path.iterdir()), found[0], strict=True))
    for how in HOWS:
        path = tmp_path / f"{how}.safetensors"
        with pytest.raises(ValueError) as caught:
            load_into(small(), load_weights(path), str(path))
        text = f"ValueError: {caught.value}".replace("Sequential", "FSDPSequential")
        assert by_name[path.name] == text
        assert by_name[how] == text.replace(".safetensors", "")
    for name in ("cut.safetensors", "other.txt", "empty"):
        with pytest.raises(ValueError) as caught:
            load_weights(tmp_path / name)
        assert by_name[name] == f"ValueError: {caught.value}"


def test_tied_weights_need_one_name_and_must_agree(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7, bias=False))
        model[1].weight = model[0].weight
        return model

    values = torch.randn(7, 3)
    for name in ("0.weight", "1.weight"):
        model = tied()
        save_weights(tmp_path / "a.safetensors", {name: values})
        load_sharded(model, tmp_path / "a.safetensors")
        assert model[0].weight is model[1].weight and torch.equal(model[0].weight, values)
        save_sharded(tmp_path / name, model, like=tmp_path / "a.safetensors")
        assert load_weights(tmp_path / name).keys() == {name}
    save_weights(tmp_path / "b.safetensors", {"0.weight": values, "1.weight": values + 1})
    with pytest.raises(ValueError, match=r"0.weight and 1.weight are one tensor in the model but differ in the file"):
        load_sharded(model, tmp_path / "b.safetensors")
    assert torch.equal(model[0].weight, values)


def test_a_buffer_still_on_the_meta_device_is_named(tmp_path: Path) -> None:
    model = Odd([(2,)], torch.float32, 0)
    save_sharded(tmp_path / "out", model)
    model.cache = torch.empty(2, device="meta")
    with pytest.raises(ValueError, match="the model's cache have no values"):
        load_sharded(model, tmp_path / "out")


# torch.distributed.checkpoint's folders


def test_the_weights_are_found_in_a_training_checkpoint(tmp_path: Path) -> None:
    model = small()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}
    dcp.save(state, checkpoint_id=tmp_path / "run", no_dist=True)
    other = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 5))
    load_sharded(other, tmp_path / "run")
    assert digest(other.state_dict()) == digest(model.state_dict())


class Payload:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("touch ran",)


def test_metadata_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_distributed("run", small())
    (tmp_path / "run" / ".metadata").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match=r"run/.metadata: refused, .*\(it names posix.system\)"):
        load_sharded(small(), "run")
    assert not (tmp_path / "ran").exists()


def test_metadata_that_points_outside_the_folder_are_refused(tmp_path: Path) -> None:
    save_distributed(tmp_path / "run", small())
    with open(tmp_path / "run" / ".metadata", "rb") as file:
        metadata = pickle.load(file)  # our own
    for info in metadata.storage_data.values():
        info.relative_path = "../elsewhere.distcp"
    (tmp_path / "run" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"names the file '../elsewhere.distcp'; pieces lie in the same folder"):
        load_sharded(small(), tmp_path / "run")


def test_a_damaged_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    model = small()
    save_distributed(tmp_path / "run", model)
    (data,) = (tmp_path / "run").glob("*.distcp")
    content = data.read_bytes()
    data.write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"run: .* cannot be read, a file is damaged") as caught:
        load_sharded(model, tmp_path / "run")
    assert "\n" not in str(caught.value)
    data.unlink()
    with pytest.raises(FileNotFoundError):
        load_sharded(model, tmp_path / "run")
    (tmp_path / "run" / ".metadata").write_bytes(b"")
    with pytest.raises(ValueError, match=r"refused, not what torch.distributed.checkpoint writes"):
        load_sharded(model, tmp_path / "run")


# Whole or not at all


def killed(rank: int, folder: Path, victim: int, distributed: bool) -> None:
    model = small()
    fully_shard(model)
    save_sharded(folder / "before", model)

    def die(*args: Any) -> None:
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    if distributed:
        dcp.FileSystemWriter.write_data = die
        save_distributed(folder / "out", model)
    else:
        write, calls = checkpoints._write_box, []

        def in_the_middle(*args: Any) -> None:
            calls.append(args)
            if len(calls) == 2:
                die()
            write(*args)

        checkpoints._write_box = in_the_middle
        save_sharded(folder / "out", model, max_shard_bytes=20)


@pytest.mark.parametrize("victim, distributed", [(0, False), (1, False), (1, True)])
def test_a_rank_killed_while_writing_leaves_no_folder(tmp_path: Path, victim: int, distributed: bool) -> None:
    with pytest.raises(AssertionError, match=r"rank [012]"):
        on_ranks(3, killed, tmp_path, victim, distributed)
    left = sorted(os.listdir(tmp_path))
    assert "before" in left and "out" not in left
    assert left == ["before"] or victim == 0  # rank 0 clears up, unless it is the one that died


def disk_full(rank: int, folder: Path) -> list[str]:
    model = small()
    fully_shard(model)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    if rank == 1:
        checkpoints._write_box = full
        dcp.FileSystemWriter.write_data = full
    found = []
    for save in (save_sharded, save_distributed):
        with pytest.raises(OSError) as caught:
            save(folder / "out", model)
        found.append(str(caught.value))
    return found


def test_a_full_disk_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    first, second = on_ranks(2, disk_full, tmp_path)
    assert first == second
    assert first[0] == f"[Errno 28] No space left on device: '{tmp_path / 'out'}'"
    assert re.fullmatch(r".*out: rank 1 could not write its part \(.*No space left.*\)", first[1])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("save", [save_sharded, save_distributed])
def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, save: Callable[..., None]) -> None:
    (tmp_path / "out").mkdir()
    save(tmp_path / "out", small())
    before = sorted(os.listdir(tmp_path / "out"))
    with pytest.raises(FileExistsError, match="out: is there already"):
        save(tmp_path / "out", small())
    assert sorted(os.listdir(tmp_path / "out")) == before and os.listdir(tmp_path) == ["out"]


# What is counted, and what it costs


def changes(rank: int, folder: Path) -> dict[str, int]:
    draw = random.Random(3)
    model = Odd([(7, 5), (1,), (3, 2)], torch.float32, 0)
    save_weights(folder / f"{rank}.safetensors", model.double().state_dict())
    model.float()
    with torch.no_grad():
        model.p0[6, 1:4] += 1
        model.p0[0, 0] += 1
        model.p1.neg_()
    scatter(model, init_device_mesh("cpu", (2, 2)), draw)
    return count_changed(model, folder / "0.safetensors")


def test_changed_entries_are_counted_once_though_ranks_hold_them_alike(tmp_path: Path) -> None:
    assert on_ranks(4, changes, tmp_path) == [{"p0": 4, "p1": 1}] * 4


def read_bytes(rank: int, path: Path) -> tuple[int, int]:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    fully_shard(model)
    total = 0

    def counted(*args: Any) -> Any:
        return {name: checkpoints.Stored(s.dtype, s.shape, count(s.read)) for name, s in plain(*args).items()}

    def count(read: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def reading(box: Any) -> Tensor:
            nonlocal total
            found = read(box)
            total += found.nbytes
            return found

        return reading

    plain, checkpoints.open_stored = checkpoints.open_stored, counted
    load_sharded(model, path)
    return total, sum(p.to_local().nbytes for p in model.parameters())


def test_each_rank_reads_its_share_twice_and_nothing_else(tmp_path: Path) -> None:
    save_sharded(tmp_path / "out", nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4))))
    found = on_ranks(4, read_bytes, tmp_path / "out")
    assert found == [(2 * 4 * 64 * 64, 4 * 64 * 64)] * 4  # 4 bytes, 4 layers, a quarter of the rows


def peaks(rank: int, folder: Path) -> list[int]:
    """KiB of memory, mapped files included, above what there was, while loading, hashing, counting and saving."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16)))
    fully_shard(model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().zero_()
    tiny = nn.Linear(2, 2)
    fully_shard(tiny)
    save_sharded(folder / "warm", tiny)
    load_sharded(tiny, folder / "warm")
    sharded_digest(tiny)
    save_distributed(folder / "warm distributed", tiny)

    def growth(work: Callable[[], object]) -> int:
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what there is now

        def memory(name: str) -> int:
            return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

        before = memory("VmRSS")
        work()
        return memory("VmHWM") - before

    return [
        growth(lambda: load_sharded(model, folder / "in")),
        growth(lambda: sharded_digest(model)),
        growth(lambda: count_changed(model, folder / "in")),
        growth(lambda: save_sharded(folder / "out", model, max_shard_bytes=2 * 10**7)),
        growth(lambda: save_distributed(folder / "distributed", model)),
    ]


def test_memory_stays_within_a_few_tensors_above_a_rank_s_share(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        save_sharded(tmp_path / "in", nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16))))
    for found in on_ranks(2, peaks, tmp_path):
        # A tensor has 4096 KiB, the allocator keeps some of what it frees; the other rank's share would be 32768.
        assert max(found) < 6 * 4096, found
