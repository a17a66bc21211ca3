"""Weights in and out of files: safetensors and torch's own format, read without running code, written whole or not.

A state is a dictionary from the names of ``model.state_dict()`` to tensors. :func:`digest` is what a state is known by,
whatever file, order or device it is in.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import struct
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .files import replacing

State = Mapping[str, Tensor]
T = TypeVar("T")

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
WRAPPERS = ("state_dict", "model_state_dict", "model")  # where training scripts put the weights beside the rest
PREFIXES = ("module.", "_orig_mod.")  # DataParallel, torch.compile
IN_FOLDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SHOWN = 5

# The names of the safetensors format for torch's types.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip

# What torch.load(weights_only=True) raises for bytes that are no pickle of weights.
UNREADABLE = (
    pickle.UnpicklingError, EOFError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, AssertionError,
    OverflowError, MemoryError, OSError, struct.error,
)  # fmt: skip


def load_weights(path: str | Path, mmap: bool = False) -> dict[str, Tensor]:
    """The weights in a file or a Hugging Face folder, on the CPU; no code in the file is run.

    Reads ``.safetensors``; ``.pt``, ``.pth`` and ``.bin`` with ``torch.load(weights_only=True)``; an index of shards
    (``model.safetensors.index.json``); and a folder with one of these under Hugging Face's names. Of a training
    checkpoint the weights are taken from ``state_dict``, ``model_state_dict`` or ``model`` when exactly one of them
    is there. ``module.`` (DataParallel) and ``_orig_mod.`` (torch.compile) are taken off when every name has them.

    With ``mmap`` torch's zip format is not read but mapped, so that what is not looked at costs nothing; the file must
    then stay as it is.

    Raises OSError when a file cannot be read, and ValueError when it is truncated, holds Python objects, or is not a
    dictionary of one tensor or more; always in one line that names the file.
    """
    path = weights_file(Path(path))
    return without_prefixes(_read_shards(path) if path.name.endswith(".index.json") else _read_file(path, mmap))


def weights_file(path: Path) -> Path:
    """``path``, or of a folder the file or index in it under Hugging Face's names; raises as :func:`load_weights`."""
    if path.is_dir():
        found = [path / name for name in IN_FOLDER if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path}: the folder holds no weights; expected one of {', '.join(IN_FOLDER)}")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected weights as {', '.join(SUFFIXES)} or a folder of them")
    return path


def without_prefixes(named: dict[str, T]) -> dict[str, T]:
    """The same under the names that the model had before DataParallel or torch.compile wrapped it."""
    for prefix in PREFIXES:
        if all(key.startswith(prefix) and key != prefix for key in named):
            named = {key[len(prefix) :]: value for key, value in named.items()}
    return named


def load_into(model: nn.Module, state: State, source: str) -> None:
    """Give ``model`` the weights of ``state``, all of them or, when anything is wrong, none.

    Names and shapes must be those of ``model.state_dict()``. Of weights that the model shares between several names
    (tied embeddings) one name is enough. Floating-point types are cast to the model's, as torch does. BatchNorm's
    ``num_batches_tracked``, which old checkpoints lack, stays as it is when absent.

    Args:
        model: changed in place, where it is.
        state: as :func:`load_weights` returns it.
        source: what to call it in messages: the file's name.

    Raises ValueError, and changes nothing, for missing, unexpected or misshapen weights, an integer where a float
    belongs or the reverse, values that are NaN or infinite or do not fit the model's type (a buffer that the model
    itself fills with infinities, such as a mask, may hold the same ones), and tied weights that differ.
    """
    own = model.state_dict()
    require_initialised(own)
    twins = tied(own)
    names = names_for(own, state, twins, f"{source} does not fit {type(model).__name__}")
    full = {key: state[names[key]] if key in names else value for key, value in own.items()}
    for key, value in own.items():
        require_type(key, full[key].dtype, full[key].shape, value, source)
        require_finite(key, full[key], value, source)
    for key, others in twins.items():
        for other in others:
            if not torch.equal(full[key], full[other]):
                raise ValueError(f"{source}: {key} and {other} are one tensor in the model but differ in the file")
    model.load_state_dict(full, strict=True)


def require_initialised(own: State) -> None:
    """Raise ValueError where a model has no values yet that a checkpoint could replace."""
    uninitialised = [key for key, value in own.items() if nn.parameter.is_lazy(value) or value.is_meta]
    if uninitialised:
        raise ValueError(
            f"the model's {some(uninitialised)} have no values to load into yet; "
            "run one batch through a lazy model, or build it on a device other than meta"
        )


def names_for(own: State, found: Collection[str], twins: Mapping[str, list[str]], misfit: str) -> dict[str, str]:
    """For each weight of a model the name of ``found`` that it is given: its own, or that of one tied to it.

    BatchNorm's ``num_batches_tracked`` is left out where it is not found. Raises ValueError, which begins with
    ``misfit``, when names are missing or unexpected.
    """
    names = {}
    for key in own:
        present = [name for name in (key, *twins.get(key, ())) if name in found]
        if present:
            names[key] = present[0]
    missing = [key for key in own if key not in names and key.rpartition(".")[2] != "num_batches_tracked"]
    unexpected = [key for key in found if key not in own]
    if missing or unexpected:
        parts = [f"lacks {some(missing)}"] * bool(missing)
        parts += [f"has {some(unexpected)}, which the model does not"] * bool(unexpected)
        raise ValueError(f"{misfit}: it {' and '.join(parts)}")
    return names


def save_weights(path: str | Path, state: State, like: str | Path | None = None) -> None:
    """Write ``state`` as safetensors or in torch's format, by the suffix of ``path``; whole or not at all.

    Tensors may be on any device, in any layout, and share memory; each is written for itself, so that loading gives
    the same :func:`digest`, and nothing of a larger tensor that it is a view of gets into the file. Needs memory for
    one tensor at a time (safetensors) or for those that are views (torch's format).

    Args:
        path: ends in ``.safetensors``, ``.pt``, ``.pth`` or ``.bin``. Its folder is made.
        state: names and tensors, one or more.
        like: the checkpoint that the weights came from. Names that it lacks are left out where they share memory with
            one that it has (``lm_head.weight`` of a Hugging Face model), and the metadata of a safetensors file is
            kept, so that the two files can be compared, and patched, one by the other.

    Raises ValueError for another suffix, an empty state or a type of tensor that the format has no name for.
    """
    path = Path(path)
    _require_suffix(path)
    require_tensors(state, "the state to save")
    metadata = {"format": "pt"}
    if like is not None:
        state = as_in(state, load_weights(like).keys())
        if Path(like).suffix == ".safetensors":
            metadata |= safetensors_metadata(Path(like))
    with replacing(path) as file:
        if path.suffix == ".safetensors":
            write_safetensors(file, state, metadata)
        else:
            _torch_save({key: _alone(value) for key, value in state.items()}, file)


def as_in(state: State, names: Collection[str]) -> dict[str, Tensor]:
    """``state`` without the names that ``names`` lacks though one that is tied to them is there."""
    twins = tied(state)
    return {k: t for k, t in state.items() if k in names or not any(o in names for o in twins.get(k, ()))}


def digest(state: State) -> str:
    """SHA-256, in hexadecimal, of the names, types, shapes and values of a state.

    The same whatever the order, memory layout or device, and for every file format. Values count bit by bit: 0.0 and
    -0.0 differ. For each name in sorted order, what is hashed is the length (8 bytes, little-endian) of the JSON text
    ``[name, dtype, [shape]]``, that text in ASCII, and the values in row-major order, little-endian. Reads every byte
    once; copies one tensor at a time, and only those not contiguous on the CPU.
    """
    sha256 = hashlib.sha256()
    for name in sorted(state):
        sha256.update(digest_heading(name, state[name]))
        sha256.update(raw_bytes(state[name]))
    return sha256.hexdigest()


def digest_heading(name: str, tensor: Tensor) -> bytes:
    """What :func:`digest` hashes before the values of a tensor."""
    text = json.dumps([name, dtype_name(tensor.dtype), list(tensor.shape)], separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of any strided layout, device and type in row-major order; a copy only where needed."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().reshape(-1)
    if flat.numel() == 0:
        return memoryview(b"")
    if flat.stride(0) != 1:  # the view of one element may have any stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    return memoryview(flat.view(torch.uint8).numpy().data)


def write_safetensors(file: BinaryIO, state: State, metadata: Mapping[str, str]) -> None:
    """Write the safetensors format tensor by tensor; safetensors' own ``save`` holds the whole model twice more."""
    start, places = safetensors_layout(state, metadata)
    file.write(start)
    for key in places:
        file.write(raw_bytes(state[key]))


def safetensors_layout(state: State, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """How a safetensors file of ``state`` begins, and for each tensor, in the order of the file, the byte it begins at.

    Widest types come first, so that every value is aligned, and then by name. Reads no values.
    """
    order = sorted(state, key=lambda key: (-state[key].element_size(), key))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    places = {}
    end = 0
    for key in order:
        tensor = state[key]
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{key} is {dtype_name(tensor.dtype)}, which safetensors has no name for; save as .pt")
        places[key], end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [places[key], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of 8
    start = len(text).to_bytes(8, "little") + text
    return start, {key: len(start) + place for key, place in places.items()}


def _read_file(path: Path, mmap: bool = False) -> dict[str, Tensor]:
    _require_suffix(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state: Any = load_file(path)
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path}: not a safetensors file, or only part of one ({first_line(error)})") from error
    else:
        state = _unwrapped(_read_pickle(path, mmap), path)
    require_tensors(state, str(path))
    return dict(state)


def _read_pickle(path: Path, mmap: bool = False) -> Any:
    with open(path, "rb") as file:
        start = file.read(4)
    if not start.startswith((b"PK\x03\x04", b"\x80")):
        raise ValueError(f"{path}: not a file that torch.save wrote")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickles of other versions
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and start.startswith(b"PK"))
    except UNREADABLE as error:
        text = str(error)
        if "TorchScript" in text:
            raise ValueError(
                f"{path}: refused, a TorchScript archive holds code; save only torch.save(model.state_dict(), path)"
            ) from error
        if isinstance(error, pickle.UnpicklingError) and (found := re.search(r"GLOBAL ([\w.]+)", text)):
            raise ValueError(
                f"{path}: refused, the pickle holds code or Python objects ({found[1]}), which could run anything; "
                "where the file is trusted, load it there and save only torch.save(model.state_dict(), path)"
            ) from error
        found = re.search(r"Unsupported .*", text)
        raise ValueError(
            f"{path}: refused, no weights that torch.save wrote, or only part of them, and no other pickle is run "
            f"({found[0] if found else first_line(error)})"
        ) from error


def _unwrapped(content: Any, path: Path) -> Any:
    """The dictionary of weights of a training checkpoint; anything else as it is."""
    if not isinstance(content, Mapping) or any(isinstance(value, Tensor) for value in content.values()):
        return content
    inside = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]
    if len(inside) > 1:
        raise ValueError(f"{path}: has weights under {' and '.join(map(repr, inside))}; save the ones that are meant")
    return content[inside[0]] if inside else content


def shards_of(index: Path) -> dict[Path, set[str]]:
    """The files that an index names, all there, and the weights that are in each, by what the index says."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{index}: not JSON ({first_line(error)})") from error
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise ValueError(f"{index}: expected 'weight_map', a dictionary from weights to the files they are in")
    shards = sorted(set(where.values()))
    for shard in shards:
        if not is_plain_name(shard):
            raise ValueError(f"{index}: names the shard {shard!r}; shards must be files in the same folder")
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{index}: names the shard {shard}, which is not in {index.parent}")
    return {index.parent / shard: {key for key, name in where.items() if name == shard} for shard in shards}


def is_plain_name(name: str) -> bool:
    """Whether a file of this name lies in the folder it is looked for in, and nowhere else."""
    return name not in ("", ".", "..") and not re.search(r"[/\\:\0]", name)


def require_listed(found: Collection[str], listed: Collection[str], shard: Path, index: Path) -> None:
    """Raise ValueError unless a shard holds what its index says."""
    if set(found) != set(listed):
        raise ValueError(f"{shard}: differs from {index.name} in {some(sorted(set(found) ^ set(listed)))}")


def _read_shards(index: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for shard, listed in shards_of(index).items():
        part = _read_file(shard)
        require_listed(part, listed, shard, index)
        state |= part
    return state


def safetensors_metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _require_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: weights end in {', '.join(SUFFIXES)}, not {path.suffix or 'without a suffix'!r}")


def require_tensors(state: Any, source: str) -> None:
    if not isinstance(state, Mapping):
        raise ValueError(f"{source}: expected a dictionary of tensors, found {_a(state)}; save model.state_dict()")
    if not state:
        raise ValueError(f"{source}: an empty dictionary, without weights")
    for key, value in state.items():
        if not isinstance(key, str):
            raise ValueError(f"{source}: expected names of weights as keys, found {key!r} ({type(key).__name__})")
        if not isinstance(value, Tensor):
            raise ValueError(f"{source}: expected a dictionary of tensors, but {key!r} is {_a(value)}")
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise ValueError(f"{source}: {key!r} is a sparse, quantized or empty-handed (meta) tensor; make it dense")


def require_type(key: str, dtype: torch.dtype, shape: Sequence[int], own: Tensor, source: str) -> None:
    """Raise ValueError unless such a tensor can take the place of ``own`` without a loss that is more than rounding."""
    if tuple(shape) != tuple(own.shape):
        raise ValueError(f"{source}: {key} has shape {list(shape)}, the model's has {list(own.shape)}")
    fits = dtype == own.dtype or torch.promote_types(dtype, own.dtype) == own.dtype
    if dtype.is_floating_point or own.dtype.is_floating_point:
        fits = dtype.is_floating_point and own.dtype.is_floating_point
    if not fits or (dtype == torch.bool) != (own.dtype == torch.bool) or dtype.is_complex != own.dtype.is_complex:
        raise ValueError(f"{source}: {key} is {dtype_name(dtype)}, the model's is {dtype_name(own.dtype)}")


def require_finite(key: str, value: Tensor, own: Tensor, source: str) -> None:
    """Raise ValueError where ``value`` has NaN or infinities, cast to the type of ``own``, that ``own`` has not."""
    if not (value.dtype.is_floating_point or value.is_complex()):
        return
    if bool(_finite(cast := value.to(own.dtype)).all()):
        return
    here = cast.to(own.device)
    if bool((_finite(here) | (here == own)).all()):
        return
    if bool(_finite(value).all()):
        raise ValueError(f"{source}: {key} is {dtype_name(value.dtype)} and too large for {dtype_name(own.dtype)}")
    raise ValueError(f"{source}: {key} holds NaN or Inf; such a model cannot be unlearned from")


def _finite(tensor: Tensor) -> Tensor:
    return torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor)  # not there for float8


def tied(state: State) -> dict[str, list[str]]:
    """For each name whose tensor has another name as well: the other names.

    A DTensor, of which a rank may hold nothing, is another's twin when both are one object, which they are in
    ``state_dict(keep_vars=True)``.
    """
    groups: dict[Any, list[str]] = {}
    for key, value in state.items():
        if is_traceable_wrapper_subclass(value):
            groups.setdefault(id(value), []).append(key)
        elif value.numel():
            place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
            groups.setdefault(place, []).append(key)
    return {
        key: [other for other in group if other != key] for group in groups.values() for key in group if len(group) > 1
    }


def _torch_save(state: State, file: BinaryIO) -> None:
    try:
        torch.save(dict(state), file)
    except RuntimeError as error:
        if error.__context__ is not None:  # a full disk or Ctrl-C, which torch's closing of the archive runs over
            raise error.__context__ from None
        raise


def _alone(tensor: Tensor) -> Tensor:
    """``tensor`` on the CPU in memory of its own size: torch.save writes all memory that a view is a part of."""
    tensor = tensor.detach().cpu()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _a(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return re.sub(r"\x1b\[\d*m", "", text.splitlines()[0].split(". ")[0])[:120] if text else type(error).__name__
