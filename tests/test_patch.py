"""Patches: exactly the changed weights arrive, on exactly the model they were made for."""

from __future__ import annotations

import json
import os
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from fastunlearn.checkpoint import digest, load_weights, save_weights
from fastunlearn.patch import apply_patch, changed_entries, count_changes, read_patch, write_patch

State = dict[str, Tensor]


def floats(*words: int) -> Tensor:
    return torch.tensor(np.array(words, np.uint32).view(np.int32)).view(torch.float32)


def network() -> State:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 400), nn.BatchNorm1d(400), nn.Linear(400, 50)).state_dict()


def changed(state: State, share: float) -> State:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, tensor in state.items():
        chosen = torch.rand(tensor.shape, generator=generator) < share
        found[name] = torch.where(chosen, tensor + 1, tensor)
    return found


def bits(tensor: Tensor) -> list[int]:
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).tolist()


def carried(tmp_path: Path, before: State, after: State, name: str = "weights.safetensors") -> State:
    """``after`` as it comes out of a file of ``before`` and a patch."""
    save_weights(tmp_path / name, before)
    write_patch(tmp_path / "patch.safetensors", before, after)
    apply_patch(tmp_path / name, tmp_path / "patch.safetensors", tmp_path / f"new-{name}")
    return load_weights(tmp_path / f"new-{name}")


CASES: dict[str, tuple[State, State]] = {
    "nothing": (network(), network()),
    "everything": (network(), {name: tensor + 1 for name, tensor in network().items()}),
    "one in a hundred": (network(), changed(network(), 0.01)),
    "half": (network(), changed(network(), 0.5)),
    "-0.0": ({"a": torch.zeros(3)}, {"a": torch.tensor([0.0, -0.0, 0.0])}),
    "the payload of a NaN": ({"a": floats(0x7FC00000, 0, 5)}, {"a": floats(0x7FC12345, 0x7F812345, 5)}),
    "a NaN that stays": ({"a": floats(0x7FC12345, 1)}, {"a": floats(0x7FC12345, 2)}),
    "bfloat16": (
        {"a": torch.arange(64).bfloat16().reshape(8, 8)},
        {"a": torch.arange(64).bfloat16().reshape(8, 8).fill_diagonal_(-1)},
    ),
    "half precision, one byte of two": ({"a": torch.ones(9).half()}, {"a": torch.full((9,), 1.001).half()}),
    "integers": ({"a": torch.tensor([2**40, -1])}, {"a": torch.tensor([2**40 + 1, -1])}),
    "booleans": ({"a": torch.tensor([True, False, True])}, {"a": torch.tensor([True, True, False])}),
    "one byte": ({"a": torch.arange(256, dtype=torch.uint8)}, {"a": torch.arange(256, dtype=torch.uint8).flip(0)}),
    "complex": ({"a": torch.zeros(3, dtype=torch.complex64)}, {"a": torch.tensor([0, 1j, 0])}),
    "0-dim": ({"a": torch.tensor(3), "b": torch.tensor(1.0)}, {"a": torch.tensor(4), "b": torch.tensor(1.0)}),
    "empty tensors": ({"a": torch.empty(0, 4), "b": torch.ones(2)}, {"a": torch.empty(0, 4), "b": torch.zeros(2)}),
    "transposed": ({"a": torch.arange(6.0).reshape(2, 3).t()}, {"a": torch.arange(6.0).reshape(2, 3).t() * 2}),
    "far apart": ({"a": torch.zeros(70_001)}, {"a": torch.zeros(70_001).index_fill(0, torch.tensor([0, 70_000]), 1)}),
    "names of every kind": (
        {"a/b": torch.zeros(1), "a/b/values": torch.zeros(1), "ü": torch.zeros(1), "": torch.zeros(1)},
        {"a/b": torch.ones(1), "a/b/values": torch.ones(1), "ü": torch.ones(1), "": torch.ones(1)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_patched_model_is_the_new_one_bit_by_bit(tmp_path: Path, case: str) -> None:
    before, after = CASES[case]
    found = carried(tmp_path, before, after)
    assert found.keys() == after.keys()
    for name, tensor in after.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(found[name]) == bits(tensor), name


def test_torch_files_and_types_safetensors_does_not_know(tmp_path: Path) -> None:
    before = {"a": torch.arange(5).to(torch.complex128), "b": torch.ones(3)}
    after = {"a": before["a"] * torch.tensor([1, 1, 1j, 1, 1]), "b": torch.ones(3)}
    assert digest(carried(tmp_path, before, after, "weights.pt")) == digest(after)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=200), st.sampled_from([1, 2, 4, 8]))
def test_any_positions_in_any_width(tmp_path_factory: pytest.TempPathFactory, marks: list[int], width: int) -> None:
    dtype = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    before = {"a": torch.zeros(len(marks), dtype=dtype)}
    after = {"a": torch.tensor(marks, dtype=dtype) << (8 * width - 3)}
    folder = tmp_path_factory.mktemp("patch")
    assert digest(carried(folder, before, after)) == digest(after)


def test_a_patch_of_one_percent_is_a_small_part_of_the_checkpoint(tmp_path: Path) -> None:
    before = network()
    after = changed(before, 0.01)
    save_weights(tmp_path / "whole.safetensors", after)
    write_patch(tmp_path / "patch.safetensors", before, after)
    sizes = {name: (tmp_path / f"{name}.safetensors").stat().st_size for name in ("whole", "patch")}
    # a value of 4 bytes and a position of 1 byte for each of 100 entries of 4 bytes, and the names
    assert sizes["patch"] < 0.02 * sizes["whole"]


def test_a_patch_of_everything_is_hardly_larger_than_the_checkpoint(tmp_path: Path) -> None:
    before, after = CASES["everything"]
    save_weights(tmp_path / "whole.safetensors", after)
    write_patch(tmp_path / "patch.safetensors", before, after)
    assert (tmp_path / "patch.safetensors").stat().st_size < 1.02 * (tmp_path / "whole.safetensors").stat().st_size


def test_the_same_change_makes_the_same_file(tmp_path: Path) -> None:
    before, after = CASES["half"]
    write_patch(tmp_path / "a.safetensors", before, after)
    write_patch(tmp_path / "b.safetensors", dict(reversed(before.items())), dict(reversed(after.items())))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_patch_has_nothing_of_the_old_values(tmp_path: Path) -> None:
    """Two old models, one new one: but for the digest before, the patches are the same bytes."""
    torch.manual_seed(0)
    new, one, other = torch.randn(500), torch.randn(500), torch.randn(500)
    for name, old in (("one", one), ("other", other)):
        write_patch(tmp_path / f"{name}.safetensors", {"a": old}, {"a": new})
    contents = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("one", "other")]
    hidden = [c.replace(digest({"a": old}).encode(), b"") for c, old in zip(contents, (one, other), strict=True)]
    assert hidden[0] == hidden[1]


def test_what_is_reported_is_what_changed(tmp_path: Path) -> None:
    before, after = CASES["one in a hundred"]
    patch = write_patch(tmp_path / "patch.safetensors", before, after)
    expected = {name: int((before[name] != after[name]).sum()) for name in before}
    assert patch.changed == {name: count for name, count in expected.items() if count}
    assert read_patch(tmp_path / "patch.safetensors") == patch
    assert (patch.before, patch.after) == (digest(before), digest(after))
    assert count_changes(before, after) == {
        name: {"changed": expected[name], "of": tensor.numel()} for name, tensor in after.items()
    }


def test_changed_entries_are_those_that_differ_in_any_bit() -> None:
    before, after = floats(0, 0x7FC00000, 0x7FC00000, 1), floats(0x80000000, 0x7FC00000, 0x7FC00001, 1)
    assert changed_entries(before, after).tolist() == [True, False, True, False]
    assert changed_entries(before.reshape(2, 2).t(), after.reshape(2, 2).t()).tolist() == [True, True, False, False]


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_a_file_can_be_patched_in_place(tmp_path: Path, name: str) -> None:
    before, after = CASES["half"]
    save_weights(tmp_path / name, before)
    write_patch(tmp_path / "patch.safetensors", before, after)
    apply_patch(tmp_path / name, tmp_path / "patch.safetensors", tmp_path / name)
    assert digest(load_weights(tmp_path / name)) == digest(after)
    assert sorted(os.listdir(tmp_path)) == sorted(["patch.safetensors", name])


def test_a_patch_made_from_one_format_applies_to_the_other(tmp_path: Path) -> None:
    before, after = CASES["half"]
    save_weights(tmp_path / "weights.pt", before)
    write_patch(tmp_path / "patch.safetensors", before, after)
    apply_patch(tmp_path / "weights.pt", tmp_path / "patch.safetensors", tmp_path / "new.safetensors")
    assert digest(load_weights(tmp_path / "new.safetensors")) == digest(after)


def test_another_model_is_refused_by_both_digests(tmp_path: Path) -> None:
    before, after = CASES["half"]
    other = {**before, "0.bias": before["0.bias"] + 1}
    save_weights(tmp_path / "other.safetensors", other)
    write_patch(tmp_path / "patch.safetensors", before, after)
    with pytest.raises(ValueError) as refusal:
        apply_patch(tmp_path / "other.safetensors", tmp_path / "patch.safetensors", tmp_path / "new.safetensors")
    assert digest(other) in str(refusal.value) and digest(before) in str(refusal.value)
    save_weights(tmp_path / "after.safetensors", after)
    with pytest.raises(ValueError, match=r"after\.safetensors: patch\.safetensors was applied already"):
        apply_patch(tmp_path / "after.safetensors", tmp_path / "patch.safetensors", tmp_path / "new.safetensors")
    assert not (tmp_path / "new.safetensors").exists()


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ({"b": torch.ones(2)}, "only one of them has a"),
        ({"a": torch.ones(3)}, r"a is float32 \[2\] before and float32 \[3\] after"),
        ({"a": torch.ones(2).half()}, r"a is float32 \[2\] before and float16 \[2\] after"),
    ],
)
def test_models_that_are_not_alike_have_no_patch(tmp_path: Path, after: State, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        write_patch(tmp_path / "patch.safetensors", {"a": torch.ones(2)}, after)
    with pytest.raises(ValueError, match=expected):
        count_changes({"a": torch.ones(2)}, after)
    assert not os.listdir(tmp_path)


def test_a_patch_is_a_safetensors_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"p\.pt: a patch is a safetensors file"):
        write_patch(tmp_path / "p.pt", {"a": torch.ones(2)}, {"a": torch.ones(2)})


# ---- damaged, forged and oversized patches: of [0, 0, 0, 0] to [0, 1, 0, 2] ----

BEFORE, AFTER = {"a": torch.zeros(4)}, {"a": torch.tensor([0.0, 1.0, 0.0, 2.0])}
Edit = Callable[[dict[str, str], dict[str, Any], State], None]


def packed(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(zlib.compress(data)), dtype=torch.uint8)


def table(**fields: Any) -> Edit:
    return lambda metadata, entries, tensors: entries["a"].update(fields)


def tensor(part: str, value: Tensor, **fields: Any) -> Edit:
    def edit(metadata: dict[str, str], entries: dict[str, Any], tensors: State) -> None:
        tensors[f"a/{part}"] = value
        entries["a"].update(fields)

    return edit


def text(key: str, value: str) -> Edit:
    return lambda metadata, entries, tensors: metadata.update({key: value})


BOMB = bytes(10_000_000)
FORGED: dict[str, tuple[Edit, str]] = {
    "another format": (text("format", "pt"), "not a patch that fastunlearn wrote"),
    "another version": (text("version", "2"), "a patch of version 2"),
    "a short digest": (text("before", "abc"), "'before' is not a SHA-256"),
    "an upper-case digest": (text("after", "A" * 64), "'after' is not a SHA-256"),
    "another digest after": (text("after", "0" * 64), "damaged; the weights it leads to have the digest"),
    "a table that is no JSON": (text("tensors", "{"), "'tensors' is not JSON"),
    "a table too deep": (text("tensors", "[" * 100_000), "'tensors' is not JSON"),
    "a list of tensors": (text("tensors", "[]"), "'tensors' is not a dictionary"),
    "an entry without tensors": (lambda m, e, t: e.update(b=e["a"]), "its table and its tensors differ in b/positions"),
    "tensors without an entry": (lambda m, e, t: t.update(b=torch.ones(1)), "differ in b"),
    "an entry that is a list": (lambda m, e, t: e.update(a=[]), "expected the fields"),
    "an entry with more": (table(old=[1]), "expected the fields"),
    "a weight the model lacks": (
        lambda m, e, t: (
            (
                e.update(z=e.pop("a")),
                t.update({f"z/{part}": t.pop(f"a/{part}") for part in ("positions", "values")}),
            )
            and None
        ),
        "changes z, which .* does not have",
    ),
    "no changes": (table(count=0), "changes 0 of 4 entries"),
    "more changes than entries": (table(count=5), "changes 5 of 4 entries"),
    "a count that is text": (table(count="2"), "must be integers"),
    "a count that is true": (table(count=True), "must be integers"),
    "a negative size": (table(shape=[-4]), "must be integers"),
    "an endless size": (table(shape=[2**70]), "must be integers"),
    "a shape that is a number": (table(shape=4), "must be integers"),
    "another shape": (table(shape=[2, 2]), r"float32 \[2, 2\] in the patch, but float32 \[4\]"),
    "a larger shape": (table(shape=[2**40], count=2**39), r"float32 \[4\] in the model"),
    "another type": (table(dtype="int32"), r"int32 \[4\] in the patch"),
    "an unknown encoding": (table(positions="xor"), "unknown encoding 'xor'"),
    "an encoding that is a list": (table(values=["raw"]), "unknown encoding"),
    "positions of floats": (tensor("positions", torch.ones(3)), "must be one-dimensional uint8"),
    "values in two dimensions": (tensor("values", torch.zeros(2, 4, dtype=torch.uint8)), "must be one-dimensional"),
    "a mask with another count": (tensor("positions", packed(b"\x0b"), positions="mask"), "does not mark 2 of 4"),
    "a mask beyond the end": (tensor("positions", packed(b"\x22"), positions="mask"), "does not mark 2 of 4"),
    "a mask too long": (tensor("positions", packed(b"\x0a\0"), positions="mask"), "do not unpack to 1 bytes"),
    "a mask bomb": (tensor("positions", packed(BOMB), positions="mask"), "do not unpack to 1 bytes"),
    "positions twice": (tensor("positions", packed(b"\1\0"), positions="delta1"), "do not rise"),
    "positions beyond the end": (tensor("positions", packed(b"\1\3"), positions="delta1"), "exceed 4 entries"),
    "positions that run over": (
        tensor("positions", packed(b"\3" + bytes(7) + b"\xfe" + b"\xff" * 7), positions="delta8"),
        "do not rise",
    ),
    "too few positions": (tensor("positions", packed(b"\1"), positions="delta1"), "do not unpack to 2 bytes"),
    "positions in half a word": (tensor("positions", packed(b"\1\2\0"), positions="delta2"), "unpack to 4 bytes"),
    "a position bomb": (tensor("positions", packed(BOMB), positions="delta4"), "do not unpack to 8 bytes"),
    "positions that are no zlib": (tensor("positions", torch.ones(9, dtype=torch.uint8)), "damaged"),
    "half of the zlib data": (tensor("positions", packed(b"\1\2")[:-3], positions="delta1"), "do not unpack"),
    "more after the zlib data": (
        tensor("positions", torch.cat([packed(b"\1\2"), torch.ones(2, dtype=torch.uint8)]), positions="delta1"),
        "do not unpack",
    ),
    "too few values": (tensor("values", torch.zeros(7, dtype=torch.uint8), values="raw"), "7 bytes are not 2 values"),
    "a value bomb": (tensor("values", packed(BOMB), values="shuffled"), "do not unpack to 8 bytes"),
    "other values": (
        tensor("values", torch.zeros(8, dtype=torch.uint8), values="raw"),
        "damaged; the weights it leads",
    ),
}


def forge(folder: Path, edit: Edit) -> None:
    """weights.safetensors and a patch.safetensors for it with something in it changed."""
    save_weights(folder / "weights.safetensors", BEFORE)
    write_patch(folder / "patch.safetensors", BEFORE, AFTER)
    with safetensors.safe_open(folder / "patch.safetensors", framework="pt") as file:
        metadata, tensors = dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}
    as_written = metadata["tensors"]
    entries = json.loads(as_written)
    edit(metadata, entries, tensors)
    if metadata["tensors"] == as_written:
        metadata["tensors"] = json.dumps(entries)
    save_file(tensors, folder / "patch.safetensors", metadata)


@pytest.mark.parametrize("case", FORGED)
def test_refused_in_one_line_that_names_the_patch(tmp_path: Path, case: str) -> None:
    edit, expected = FORGED[case]
    forge(tmp_path, edit)
    content = (tmp_path / "weights.safetensors").read_bytes()
    with pytest.raises(ValueError, match=expected) as refusal:
        apply_patch(tmp_path / "weights.safetensors", tmp_path / "patch.safetensors", tmp_path / "weights.safetensors")
    assert "patch.safetensors" in str(refusal.value) and "\n" not in str(refusal.value)
    assert (tmp_path / "weights.safetensors").read_bytes() == content


@pytest.mark.parametrize("case", [case for case in FORGED if case.endswith("bomb")])
def test_a_bomb_is_never_unpacked(tmp_path: Path, case: str) -> None:
    forge(tmp_path, FORGED[case][0])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="do not unpack"):
            apply_patch(tmp_path / "weights.safetensors", tmp_path / "patch.safetensors", tmp_path / "new.safetensors")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(BOMB) / 20


def test_a_patch_cut_anywhere_or_missing_is_refused(tmp_path: Path) -> None:
    save_weights(tmp_path / "weights.safetensors", BEFORE)
    path = tmp_path / "patch.safetensors"
    with pytest.raises(FileNotFoundError, match=r"patch\.safetensors: no such file"):
        read_patch(path)
    write_patch(path, BEFORE, AFTER)
    content = path.read_bytes()
    for length in range(0, len(content), 13):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"patch\.safetensors: not a safetensors file"):
            apply_patch(tmp_path / "weights.safetensors", path, tmp_path / "new.safetensors")
    assert not (tmp_path / "new.safetensors").exists()
