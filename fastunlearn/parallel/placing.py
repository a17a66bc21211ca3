"""A model laid out over the ranks that work on it: replicated (DDP), sharded (FSDP2) or split by layers (TP)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fastunlearn.parallel.checkpoints import load_sharded
from fastunlearn.parallel.ranks import Ranks

WAYS = ("none", "ddp", "fsdp", "tp")
# Of the styles that transformers' plans name, those that torch has; its others are for experts and fused weights.
STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
}


def place(
    build: Callable[[], nn.Module],
    how: str,
    ranks: Ranks,
    device: torch.device,
    dtype: torch.dtype | None = None,
    weights: str | Path | None = None,
) -> nn.Module:
    """A model for all ranks to work on together, on their devices, in eval mode.

    Every rank calls it with the same arguments. With ``fsdp`` and ``tp``, and ``weights`` given, no rank ever holds
    the whole: the model is built without memory for its parameters, laid out, and each rank reads what it keeps.

    Args:
        build: makes the model on the CPU, the same one on every rank; its own weights are lost where others are given.
        how: ``none``, the whole model here and nothing shared; ``ddp``, the whole model on every rank; ``fsdp``,
            sharded by ``fully_shard`` (see :func:`shard`); ``tp``, Linear layers split as :func:`split` does.
        dtype: of its floating-point parameters and buffers; default as ``build`` makes them.
        weights: a checkpoint, as :func:`~fastunlearn.parallel.checkpoints.load_sharded` reads it.

    Raises ValueError for another ``how``, for weights that do not fit, and for models that ``tp`` has no plan for;
    OSError where the weights can not be read.
    """
    if how not in WAYS:
        raise ValueError(f"a model is placed by {', '.join(WAYS)}, got {how!r}")
    laid_out = how in ("fsdp", "tp") and ranks.group is not None
    if laid_out and weights is not None:
        with without_memory():
            model = build()
    else:
        model = build()
    if dtype is not None:
        model.to(dtype)
    if laid_out:
        mesh = init_device_mesh(device.type, (ranks.size,))
        shard(model, mesh) if how == "fsdp" else split(model, mesh)
    _give_memory(model, device)
    if weights is not None:
        load_sharded(model, weights)
    model.eval()
    return replicated(model, ranks) if how == "ddp" else model


def replicated(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model in DistributedDataParallel, in the mode it is in; as it is where one rank has it alone."""
    if ranks.group is None:
        return model
    wrapped = DistributedDataParallel(model, process_group=ranks.group)
    wrapped.training = model.training  # a wrapper begins in training mode, whatever it wraps
    return wrapped


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """``fully_shard`` each of the model's blocks, and what is left as one; in place.

    The blocks are the children of the ModuleList or Sequential with the most parameters: the transformer blocks of a
    transformer. One block at a time is whole while the model computes. What shares a parameter with another part (tied
    embeddings) stays in the rest.
    """
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The parts that are sharded one by one."""
    lists = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m)]
    if not lists:
        return []
    users = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    largest = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))
    found = []
    for block in dict.fromkeys(largest.children()):
        own = Counter(id(p) for m in block.modules() for p in m._parameters.values() if p is not None)
        if block is not model and own and all(users[p] == count for p, count in own.items()):
            found.append(block)
    return found


def split(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split the Linear layers of a Hugging Face model over the ranks, as its own plan says; in place.

    Attention heads and the inner units of an MLP are dealt out: ``q_proj`` and ``up_proj`` by their outputs, ``o_proj``
    and ``down_proj`` by their inputs. What the plan does not name, and tied embeddings, every rank has whole. All
    ranks must be given the same batches.

    Raises ValueError, before anything is split, for a model without a plan (GPT-2 has fused weights) or with styles
    that torch has none for, and where heads or units can not be dealt out evenly.
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    inner: Any = getattr(model, "base_model", model)
    start = f"{model.base_model_prefix}." if inner is not model and isinstance(inner, nn.Module) else ""
    plan = {start + key: style for key, style in (getattr(config, "base_model_tp_plan", None) or {}).items()}
    if not plan:
        raise ValueError(f"{name} has no plan for tensor parallelism (base_model_tp_plan in its config); use fsdp")
    plan |= getattr(type(model), "_tp_plan", None) or {}
    unknown = sorted({style for style in plan.values() if style not in STYLES})
    if unknown:
        raise ValueError(
            f"the plan of {name} for tensor parallelism asks for {unknown[0]}, which torch has not; use fsdp"
        )
    users = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    chosen = {}
    for path, module in model.named_modules():
        pattern = ".".join("*" if part.isdigit() else part for part in path.split("."))
        if pattern in plan and all(users[id(p)] == 1 for p in module._parameters.values() if p is not None):
            if not isinstance(module, nn.Linear):
                raise ValueError(f"{path} of {name} is a {type(module).__name__}, which can not be split; use fsdp")
            chosen[path] = STYLES[plan[pattern]]()
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        count = getattr(config, key, None)
        if isinstance(count, int) and count % mesh.size():
            raise ValueError(f"{name} has {key} {count}, which {mesh.size()} ranks can not share evenly; use fsdp")
    parallelize_module(model, mesh, chosen)


@contextmanager
def without_memory() -> Iterator[None]:
    """Parameters that are made in this block are on the meta device: shapes and types, no memory, no initialisation.

    Buffers are made as ever: what a model computes itself and no checkpoint has (rotary frequencies, masks) is there.
    """
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _give_memory(model: nn.Module, device: torch.device) -> None:
    """Move the model to ``device``; what is on the meta device gets memory without values there.

    ``to_empty`` would take the values of the buffers, too. Parameters stay the objects they are, so that tied ones stay
    tied.
    """
    swapping = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    apply: Any = model._apply
    try:
        apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swapping)
