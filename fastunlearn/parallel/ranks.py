"""Who works together on a model, and what of it each process holds: DDP, FSDP2, tensor parallelism as torch has them.

A plain model is worked on alone, whatever process groups exist. A model in DistributedDataParallel, or sharded by
``fully_shard`` or ``parallelize_module``, is worked on by all its ranks together: each calls the same function at the
same time, with its own share of the samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """Processes that work together; one alone has no group and no collective costs anything.

    Attributes:
        group: of torch.distributed; None for one process alone.
        rank: of this process in the group, from 0.
        size: how many there are.
    """

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Ranks:
        return cls(group, dist.get_rank(group), dist.get_world_size(group)) if group.size() > 1 else cls()

    def sum_(self, *tensors: Tensor) -> None:
        """Replace every tensor by its sum over the ranks, in place."""
        if self.group is not None:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self.group)

    def gather(self, value: Any) -> list[Any]:
        """What each rank gave, in their order; anything that can be pickled."""
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def numbers(self, value: int, device: torch.device) -> list[int]:
        """As :meth:`gather`, of a whole number, which takes one collective on ``device``."""
        if self.group is None:
            return [value]
        found = torch.empty(self.size, 1, dtype=torch.int64, device=device)
        dist.all_gather(list(found), torch.tensor([value], device=device), group=self.group)
        numbers: list[int] = found.flatten().tolist()
        return numbers


ALONE = Ranks()


def replicas(model: nn.Module) -> DistributedDataParallel | None:
    """The DistributedDataParallel around the whole model, also inside of torch.compile; None where there is none."""
    inner = model._orig_mod if type(model).__name__ == "OptimizedModule" else model  # no import for who compiles not
    return inner if isinstance(inner, DistributedDataParallel) else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel; any other as it is."""
    ddp = replicas(model)
    return model if ddp is None else unwrapped(ddp.module)


def reshard(model: nn.Module) -> None:
    """Let FSDP2 put the root's weights back into shards, which it leaves gathered after a forward pass alone."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def everyone(model: nn.Module) -> Ranks:
    """All ranks that hold a part of the model or of its samples; it is in its shards afterwards.

    Raises ValueError for what is not supported: DistributedDataParallel around a part of the model or around shards,
    the older FullyShardedDataParallel, shards on some ranks of a job only.
    """
    ddp = replicas(model)
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, (DistributedDataParallel, FullyShardedDataParallel)):
            kind = type(module).__name__
            raise ValueError(
                f"{name or 'the model'} is in {kind}; supported are DistributedDataParallel around the whole model, "
                "fully_shard and parallelize_module"
            )
    reshard(model)
    sharded = {name: p for name, p in unwrapped(model).named_parameters() if isinstance(p, DTensor)}
    if ddp is not None:
        if sharded:
            raise ValueError(
                f"{next(iter(sharded))} is a DTensor inside DistributedDataParallel; use either shards or replicas"
            )
        return Ranks.of(ddp.process_group)
    if not sharded:
        return ALONE
    world = dist.group.WORLD
    assert world is not None  # there is no mesh without
    for name, parameter in sharded.items():
        if parameter.device_mesh.size() != world.size():
            raise ValueError(
                f"{name} is on a mesh of {parameter.device_mesh.size()} ranks, but {world.size()} were started; "
                "shard it over all of them"
            )
    return Ranks.of(world)


def sharing(model: nn.Module) -> Ranks:
    """The ranks that have samples of their own: all of DDP and FSDP2; with tensor parallelism alone each has the same.

    Raises ValueError as :func:`everyone`, and for FSDP2 over a mesh of several dimensions, beside plain parameters, or
    with weights that wait on another device than they are used on.
    """
    ranks = everyone(model)
    if replicas(model) is not None:
        return ranks
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        return ALONE
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            raise ValueError(f"{name} is not sharded, but others are; call fully_shard on the whole model, too")
        if parameter.device_mesh.ndim != 1 or not isinstance(parameter.placements[0], Shard):
            raise ValueError(
                f"{name} is placed as {parameter.placements} on a mesh of {parameter.device_mesh.ndim} dimensions; "
                "FSDP2 is supported on meshes of one dimension"
            )
        if parameter.device.type != parameter.device_mesh.device_type:
            raise ValueError(
                f"{name} is on the {parameter.device.type} and used on {parameter.device_mesh.device_type}: "
                "CPUOffloadPolicy is not supported; offload=True holds the Fisher information in host memory"
            )
    return ranks


def holders(model: nn.Module) -> Ranks:
    """The ranks that hold different weights; of replicas each holds all of them, and is alone in that."""
    ranks = everyone(model)
    return ranks if replicas(model) is None else ALONE


def counted(parameter: Tensor, holders: Ranks) -> bool:
    """Whether this rank's part of the parameter counts in a sum over the holders: a shard does, of copies the first."""
    sharded = isinstance(parameter, DTensor) and any(isinstance(p, Shard) for p in parameter.placements)
    return sharded or holders.rank == 0


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: all of a plain one, the local tensor of a DTensor, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def world() -> Ranks:
    """The processes that torchrun started together, if they have been joined; else this one alone."""
    if not dist.is_available() or not dist.is_initialized():
        return ALONE
    assert dist.group.WORLD is not None
    return Ranks.of(dist.group.WORLD)
