"""Weights in files: what is read is what was written, and what is not weights is refused in one line."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fastunlearn.checkpoint import digest, load_into, load_weights, raw_bytes, save_weights

FORMATS = ("weights.safetensors", "weights.pt")


class Tied(nn.Module):
    """An embedding that is the head as well, BatchNorm's integer buffer, a mask with infinities."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.full((2, 2), -float("inf")).triu(1))


def awkward_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    base = torch.randn(4, 5)
    return {
        "plain": torch.randn(3, 2),
        "0-dim": torch.tensor(-0.0),
        "empty": torch.empty(0, 3),
        "bfloat16": torch.randn(5).bfloat16(),
        "half": torch.randn(2, 2).half(),
        "double": torch.randn(3).double(),
        "bool": torch.tensor([True, False, True]),
        "counter": torch.tensor(2**40 + 1),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "complex": torch.randn(2, dtype=torch.complex64),
        "conjugate": torch.randn(2, dtype=torch.complex64).conj(),
        "transposed": base.t(),
        "column": base[:, 1:2],
        "one element, stride 5": base[:1, :1].t(),
        "expanded": torch.randn(1, 3).expand(4, 3),
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "shared": base,
        "float8": torch.randn(4).to(torch.float8_e4m3fn),
        "NaN with a payload": torch.tensor([0x7FC12345, 0x7F812345], dtype=torch.int32).view(torch.float32),
        "ünï.cödé": torch.ones(1),
    }


def bits(tensor: Tensor) -> bytes:
    return bytes(
        tensor.resolve_conj().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).tolist()
    )


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_loaded_is_bit_by_bit_what_was_saved(tmp_path: Path, name: str) -> None:
    state = awkward_state()
    save_weights(tmp_path / name, state)
    found = load_weights(tmp_path / name)
    assert found.keys() == state.keys()
    for key, tensor in state.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        if tensor.numel():
            assert bits(found[key]) == bits(tensor), key
    assert digest(found) == digest(state)
    assert os.listdir(tmp_path) == [name]


def test_safetensors_own_reader_and_writer_agree_with_ours(tmp_path: Path) -> None:
    state = {key: value.clone(memory_format=torch.contiguous_format) for key, value in awkward_state().items()}
    state["conjugate"] = state["conjugate"].resolve_conj()
    save_weights(tmp_path / "a.safetensors", state)
    found = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert {key: bits(value) for key, value in found.items()} == {key: bits(value) for key, value in state.items()}
    assert len((tmp_path / "a.safetensors").read_bytes()) == len(safetensors.torch.save(state, {"format": "pt"}))


def test_a_file_of_one_type_is_laid_out_as_safetensors_does(tmp_path: Path) -> None:
    state = nn.TransformerEncoderLayer(8, 2, 12).state_dict()
    save_weights(tmp_path / "a.safetensors", state)
    ours, theirs = (tmp_path / "a.safetensors").read_bytes(), safetensors.torch.save(state, {"format": "pt"})
    length = 8 + struct.unpack("<Q", theirs[:8])[0]
    assert json.loads(ours[8:length]) == json.loads(theirs[8:length])
    assert ours[length:] == theirs[length:]


def test_the_digest_is_the_documented_hash() -> None:
    state = {"b": torch.tensor([[1.5, -0.0]]), "a": torch.tensor(3)}
    expected = hashlib.sha256()
    for text, values in (
        (b'["a","int64",[]]', struct.pack("<q", 3)),
        (b'["b","float32",[1,2]]', struct.pack("<2f", 1.5, -0.0)),
    ):
        expected.update(struct.pack("<Q", len(text)) + text + values)
    assert digest(state) == expected.hexdigest()


def test_the_digest_does_not_depend_on_order_or_layout() -> None:
    state = awkward_state()
    other = {key: value.clone(memory_format=torch.contiguous_format) for key, value in reversed(state.items())}
    assert digest(other) == digest(state)
    assert digest({key: nn.Parameter(value) for key, value in state.items() if value.is_floating_point()}) == digest(
        {key: value for key, value in state.items() if value.is_floating_point()}
    )


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.tensor([0.0, -0.0])},
        {"b": torch.zeros(2)},
        {"a": torch.zeros(2, 1)},
        {"a": torch.zeros(2, dtype=torch.int32)},
        {"a": torch.zeros(1), "b": torch.zeros(1)},
        {"a": torch.zeros(2), "b": torch.zeros(0)},
    ],
)
def test_the_digest_depends_on_names_types_shapes_and_bits(other: dict[str, Tensor]) -> None:
    assert digest(other) != digest({"a": torch.zeros(2)})


def test_raw_bytes_of_a_contiguous_tensor_are_not_a_copy() -> None:
    tensor = torch.zeros(4)
    view = raw_bytes(tensor)
    tensor[0] = 1.0
    assert bytes(view[:4]) == struct.pack("<f", 1.0)


def test_a_view_does_not_take_the_rest_of_its_memory_into_the_file(tmp_path: Path) -> None:
    secret = torch.full((1000,), 1.2345)
    secret[:10] = 0
    for name in FORMATS:
        save_weights(tmp_path / name, {"a": secret[:10]})
        assert struct.pack("<f", 1.2345) not in (tmp_path / name).read_bytes()


def test_changing_loaded_weights_does_not_change_the_file(tmp_path: Path) -> None:
    for name in FORMATS:
        save_weights(tmp_path / name, {"a": torch.zeros(5000)})
        before = (tmp_path / name).read_bytes()
        load_weights(tmp_path / name)["a"].fill_(1)
        assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("name", FORMATS)
def test_saving_over_the_file_the_weights_came_from(tmp_path: Path, name: str) -> None:
    save_weights(tmp_path / name, {"a": torch.arange(5000.0), "b": torch.zeros(2)})
    state = load_weights(tmp_path / name)
    expected = digest(state)
    save_weights(tmp_path / name, state, like=tmp_path / name)
    assert digest(load_weights(tmp_path / name)) == expected == digest(state)


@pytest.mark.parametrize("name", FORMATS)
def test_tied_weights_come_back_under_both_names_and_one_is_enough(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model, other = Tied(), Tied()
    save_weights(tmp_path / name, model.state_dict())
    state = load_weights(tmp_path / name)
    assert torch.equal(state["head.weight"], state["embedding.weight"])
    for left_out in ("head.weight", "embedding.weight"):
        load_into(other, {key: value for key, value in state.items() if key != left_out}, name)
        assert digest(other.state_dict()) == digest(model.state_dict())
        assert other.head.weight is other.embedding.weight
        nn.init.zeros_(other.head.weight)


def test_like_leaves_out_the_same_tied_name_and_keeps_metadata(tmp_path: Path) -> None:
    model = Tied()
    state = {key: value for key, value in model.state_dict().items() if key != "head.weight"}
    safetensors.torch.save_file(state, tmp_path / "theirs.safetensors", {"format": "pt", "licence": "free"})
    save_weights(tmp_path / "ours.safetensors", model.state_dict(), like=tmp_path / "theirs.safetensors")
    assert digest(load_weights(tmp_path / "ours.safetensors")) == digest(load_weights(tmp_path / "theirs.safetensors"))
    with safetensors.safe_open(tmp_path / "ours.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "licence": "free"}


# ---- what training scripts and Hugging Face write ----


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
def test_a_training_checkpoint_is_unwrapped(tmp_path: Path, wrapper: str) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.save({"epoch": 3, wrapper: model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pth")
    assert digest(load_weights(tmp_path / "a.pth")) == digest(model.state_dict())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_prefix_comes_off_when_every_name_has_it(tmp_path: Path, prefix: str) -> None:
    torch.save({prefix + "a": torch.ones(1), prefix + "module.b": torch.ones(1)}, tmp_path / "a.bin")
    assert set(load_weights(tmp_path / "a.bin")) == {"a", "module.b"}


def test_a_prefix_stays_when_some_names_lack_it(tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "a.pt")
    assert set(load_weights(tmp_path / "a.pt")) == {"module.a", "b"}


def test_the_old_format_of_torch_save_is_read(tmp_path: Path) -> None:
    state = nn.Linear(3, 2).state_dict()
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert digest(load_weights(tmp_path / "a.pt")) == digest(state)


@pytest.mark.parametrize(("index", "suffix"), [("model", "safetensors"), ("pytorch_model", "bin")])
def test_a_folder_of_shards_is_one_state(tmp_path: Path, index: str, suffix: str) -> None:
    parts = [{"a": torch.randn(3), "b": torch.randn(2)}, {"c": torch.randn(1)}]
    where = {}
    for i, part in enumerate(parts, 1):
        save_weights(tmp_path / f"{index}-{i}-of-2.{suffix}", part)
        where |= dict.fromkeys(part, f"{index}-{i}-of-2.{suffix}")
    path = tmp_path / f"{index}.{suffix}.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": where}))
    assert digest(load_weights(tmp_path)) == digest(load_weights(path)) == digest(parts[0] | parts[1])


def test_a_hugging_face_folder_with_one_file(tmp_path: Path) -> None:
    save_weights(tmp_path / "model.safetensors", {"a": torch.ones(1)})
    (tmp_path / "config.json").write_text("{}")
    assert list(load_weights(tmp_path)) == ["a"]


# ---- what is refused ----


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../outside", b"x")


def cut(path: Path, keep: float) -> None:
    safetensors.torch.save_file({"a": torch.randn(1000)}, path) if path.suffix == ".safetensors" else torch.save(
        {"a": torch.randn(1000)}, path
    )
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def header(text: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + body


def index_of(**weights: Any) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps({"weight_map": weights})) and None


REFUSED: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a pickle with code": ("a.pt", lambda p: torch.save({"a": Bomb()}, p), "refused, the pickle holds code.*mkdir"),
    "a plain pickle with code": ("a.bin", lambda p: p.write_bytes(pickle.dumps(Bomb())), "no other pickle is run"),
    "an old pickle with code": ("a.pt", lambda p: p.write_bytes(pickle.dumps(Bomb(), 0)), "not a file that torch.save"),
    "a whole model": ("a.pt", lambda p: torch.save(nn.Linear(1, 1), p), "Linear.*save only torch.save"),
    "a numpy number": ("a.pt", lambda p: torch.save({"best": np.float64(1)}, p), "numpy"),
    "an archive out of its folder": ("a.pt", zipped, "no weights that torch.save wrote"),
    "nothing (pt)": ("a.pt", lambda p: p.write_bytes(b""), "not a file that torch.save"),
    "text": ("a.pth", lambda p: p.write_text("hello"), "not a file that torch.save"),
    "a tenth (pt)": ("a.pt", lambda p: cut(p, 0.1), "only part"),
    "nearly all (pt)": ("a.pt", lambda p: cut(p, 0.99), "only part"),
    "nothing (safetensors)": ("a.safetensors", lambda p: p.write_bytes(b""), "not a safetensors file"),
    "a tenth (safetensors)": ("a.safetensors", lambda p: cut(p, 0.1), "only part"),
    "nearly all (safetensors)": ("a.safetensors", lambda p: cut(p, 0.999), "only part"),
    "a header of 2^60 bytes": (
        "a.safetensors",
        lambda p: p.write_bytes(struct.pack("<Q", 2**60) + b"{}"),
        "not a safe",
    ),
    "an unknown type": (
        "a.safetensors",
        lambda p: p.write_bytes(header(b'{"a":{"dtype":"Q9","shape":[1],"data_offsets":[0,4]}}', bytes(4))),
        "not a safetensors file",
    ),
    "offsets beyond the end": (
        "a.safetensors",
        lambda p: p.write_bytes(header(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}', bytes(4))),
        "not a safetensors file",
    ),
    "overlapping tensors": (
        "a.safetensors",
        lambda p: p.write_bytes(
            header(
                b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
                bytes(4),
            )
        ),
        "not a safetensors file",
    ),
    "a pt file named safetensors": (
        "a.safetensors",
        lambda p: torch.save({"a": torch.ones(1)}, p),
        "not a safetensors",
    ),
    "no tensors": ("a.safetensors", lambda p: safetensors.torch.save_file({}, p), "empty dictionary"),
    "an empty dictionary": ("a.pt", lambda p: torch.save({}, p), "empty dictionary"),
    "a list": ("a.pt", lambda p: torch.save([torch.ones(1)], p), "expected a dictionary of tensors, found a list"),
    "a tensor": ("a.pt", lambda p: torch.save(torch.ones(1), p), "found a Tensor"),
    "a number among tensors": ("a.pt", lambda p: torch.save({"a": torch.ones(1), "n": 3}, p), "'n' is an int"),
    "numbers as names": ("a.pt", lambda p: torch.save({0: torch.ones(1)}, p), "found 0"),
    "two sets of weights": (
        "a.pt",
        lambda p: torch.save({"model": {"a": torch.ones(1)}, "state_dict": {"a": torch.ones(1)}}, p),
        "'state_dict' and 'model'",
    ),
    "an empty set of weights": ("a.pt", lambda p: torch.save({"state_dict": {}, "epoch": 1}, p), "empty dictionary"),
    "a sparse tensor": ("a.pt", lambda p: torch.save({"a": torch.eye(2).to_sparse()}, p), "'a' is a sparse"),
    "another suffix": ("a.onnx", lambda p: p.write_bytes(b"x"), "weights end in .*not '.onnx'"),
    "no file": ("a.pt", lambda p: None, "no such file"),
    "a folder without weights": ("folder", lambda p: p.mkdir(), "the folder holds no weights"),
    "an index that is no JSON": ("m.index.json", lambda p: p.write_text("{"), "not JSON"),
    "an index without a map": ("m.index.json", lambda p: p.write_text("[]"), "expected 'weight_map'"),
    "an index of numbers": ("m.index.json", index_of(a=3), "expected 'weight_map'"),
    "a shard above": ("m.index.json", index_of(a="../a.pt"), "same folder"),
    "a shard elsewhere": ("m.index.json", index_of(a="/etc/passwd"), "same folder"),
    "a shard on Windows": ("m.index.json", index_of(a="..\\a.pt"), "same folder"),
    "a shard on a drive": ("m.index.json", index_of(a="C:a.pt"), "same folder"),
    "a shard that is the folder": ("m.index.json", index_of(a=".."), "same folder"),
    "a shard that is missing": ("m.index.json", index_of(a="b.pt"), "b.pt, which is not in"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_that_names_the_file(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, make, expected = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    make(tmp_path / name)
    with pytest.raises((ValueError, OSError), match=expected) as refusal:
        load_weights(tmp_path / name)
    message = str(refusal.value)
    assert name in message and "\n" not in message
    assert not (tmp_path / "exploded").exists()


def test_an_index_and_its_shards_must_agree(tmp_path: Path) -> None:
    save_weights(tmp_path / "s.safetensors", {"a": torch.ones(1), "b": torch.ones(1)})
    for where in ({"a": "s.safetensors"}, {"a": "s.safetensors", "b": "s.safetensors", "c": "s.safetensors"}):
        (tmp_path / "m.index.json").write_text(json.dumps({"weight_map": where}))
        with pytest.raises(ValueError, match=r"s.safetensors: differs from m.index.json in [bc]"):
            load_weights(tmp_path / "m.index.json")


def test_damaged_bytes_are_refused_or_loaded_never_worse(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name in FORMATS:
        save_weights(tmp_path / name, nn.Linear(8, 4).state_dict())
        whole = (tmp_path / name).read_bytes()
        for _ in range(60):
            damaged = np.frombuffer(whole, np.uint8).copy()
            damaged[generator.integers(min(len(damaged), 600), size=3)] = generator.integers(256, size=3)
            (tmp_path / f"x{name}").write_bytes(damaged.tobytes())
            try:
                load_weights(tmp_path / f"x{name}")
            except ValueError as error:
                assert f"x{name}" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"mask": None}, r"f\.pt does not fit Tied: it lacks mask$"),
        ({"more": torch.ones(1)}, r"it has more, which the model does not"),
        ({"embedding.weight": None, "head.weight": None}, r"lacks embedding\.weight, head\.weight"),
        ({"norm.bias": torch.ones(4)}, r"f\.pt: norm\.bias has shape \[4\], the model's has \[3\]"),
        ({"norm.bias": torch.ones(3, dtype=torch.int64)}, r"norm\.bias is int64, the model's is float32"),
        ({"norm.bias": torch.ones(3, dtype=torch.complex64)}, r"norm\.bias is complex64, the model's is float32"),
        ({"norm.num_batches_tracked": torch.tensor(1.0)}, r"num_batches_tracked is float32, the model's is int64"),
        ({"norm.num_batches_tracked": torch.tensor(True)}, r"num_batches_tracked is bool, the model's is int64"),
        ({"norm.bias": torch.tensor([1, float("nan"), 1])}, r"norm\.bias holds NaN or Inf"),
        ({"norm.bias": torch.tensor([1, float("inf"), 1])}, r"norm\.bias holds NaN or Inf"),
        ({"mask": torch.full((2, 2), float("inf"))}, r"mask holds NaN or Inf"),
        ({"norm.bias": torch.full((3,), 1e300, dtype=torch.float64)}, r"norm\.bias is float64 and too large"),
        ({"head.weight": torch.zeros(7, 3)}, r"(embedding|head)\.weight and (embedding|head)\.weight are one tensor"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(change: dict[str, Tensor | None], expected: str) -> None:
    torch.manual_seed(0)
    model, donor = Tied(), Tied()
    before = digest(model.state_dict())
    state = {key: value for key, value in {**donor.state_dict(), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=expected):
        load_into(model, state, "f.pt")
    assert digest(model.state_dict()) == before


def test_five_names_are_enough() -> None:
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(6)))
    with pytest.raises(ValueError) as refusal:
        load_into(model, {"x": torch.ones(1)}, "f.pt")
    assert str(refusal.value) == (
        "f.pt does not fit Sequential: it lacks 0.weight, 0.bias, 1.weight, 1.bias, 2.weight and 7 more "
        "and has x, which the model does not"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_weights_are_cast_as_torch_does(dtype: torch.dtype) -> None:
    model, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    state = {key: value.to(dtype) for key, value in nn.Linear(5, 3).state_dict().items()}
    load_into(model, state, "f.pt")
    theirs.load_state_dict(state)
    assert digest(model.state_dict()) == digest(theirs.state_dict())


def test_an_old_checkpoint_without_batch_counters_is_loaded() -> None:
    model = nn.BatchNorm2d(2)
    model.num_batches_tracked.fill_(5)
    load_into(model, {key: torch.full((2,), 3.0) for key in ("weight", "bias", "running_mean", "running_var")}, "f.pt")
    assert int(model.num_batches_tracked) == 5 and model.running_var.tolist() == [3, 3]


@pytest.mark.parametrize("model", [nn.LazyLinear(3), nn.Linear(2, 2, device="meta")])
def test_a_model_without_values_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="no values to load into yet"):
        load_into(model, {"weight": torch.ones(2, 2), "bias": torch.ones(2)}, "f.pt")


def test_what_cannot_be_saved_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    save_weights(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    before = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"b is complex128.*save as \.pt"):
        save_weights(tmp_path / "a.safetensors", {"b": torch.ones(1, dtype=torch.complex128)})
    with pytest.raises(ValueError, match="empty dictionary"):
        save_weights(tmp_path / "a.safetensors", {})
    with pytest.raises(ValueError, match=r"a\.txt: weights end in"):
        save_weights(tmp_path / "a.txt", {"a": torch.ones(1)})
    assert os.listdir(tmp_path) == ["a.safetensors"] and (tmp_path / "a.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", FORMATS)
def test_a_full_disk_is_named_and_the_old_file_stays(tmp_path: Path, name: str) -> None:
    """A limit on the size of files stands for the disk."""
    save_weights(tmp_path / name, {"a": torch.ones(1)})
    before = (tmp_path / name).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '.*{name}'"):
            save_weights(tmp_path / name, {"a": torch.ones(200_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_bytes() == before
