"""The weights of a model's slots where several ranks hold them: what each rank computes, writes and adds up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate

from fastunlearn.slots import Slot


def whole(value: Tensor) -> Tensor:
    """A DTensor as a plain tensor, brought together by the ranks of its mesh; a plain one as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@dataclass(frozen=True)
class HeldWeight:
    """A slot's weight as this rank updates it.

    Rows of a weight are updated independently, so a rank needs none but those of its shard when the weight is cut along
    its output axis (axis 0 of a Linear or an ungrouped convolution). Cut otherwise (Hugging Face's Conv1D stores
    [in, out], grouped convolutions, tensor parallelism along the inputs), this one weight is brought together for as
    long as its update takes.

    Attributes:
        slot: which weight.
        target: what this rank may write: a view of its parameter, or of its shard of it.
        by_rows: whether ``target`` has whole rows of d elements, and no other ranks' rows are needed.
    """

    slot: Slot
    target: Tensor
    by_rows: bool

    @classmethod
    def of(cls, slot: Slot) -> HeldWeight:
        """Raises ValueError for a packed input projection of attention that is cut along both axes."""
        parameter = slot.parameter
        if not isinstance(parameter, DTensor):
            return cls(slot, slot.region, True)
        held = parameter.to_local().detach()
        axes = {_axis(placement) for placement in parameter.placements} - {None}
        if axes <= {0} and slot.part != "transposed" and slot.groups == 1:
            return cls(slot, held[_packed_rows(slot)] if slot.packed else held, True)
        if slot.packed and 0 in axes:
            raise ValueError(
                f"{slot.key} packs three projections and is cut along both axes ({parameter.placements}); cut it along "
                "one of them, or leave its layer out with layers="
            )
        return cls(slot, slot.region_of(held), False)

    @property
    def numel(self) -> int:
        """Elements of :meth:`matrix`."""
        return self.target.numel() if self.by_rows else self.slot.numel

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight [groups, p, d] in ``dtype``, with the p of this rank's rows; a collective unless ``by_rows``."""
        region = self.target if self.by_rows else self.slot.region_of(whole(self.slot.parameter.detach()))
        return region.to(dtype).reshape(self.slot.groups, len(region) // self.slot.groups, self.slot.dim)

    def portion(self, matrix: Tensor) -> Tensor:
        """Of a weight as :meth:`matrix` gives it what belongs in ``target``, in its shape and dtype; no collective."""
        if self.by_rows:
            return matrix.reshape(self.target.shape).to(self.target.dtype)
        parameter, slot = self.slot.parameter, self.slot
        assert isinstance(parameter, DTensor)
        shape = (len(matrix) * matrix.shape[1], *parameter.shape[1:])
        region = matrix[0].mT.contiguous() if slot.part == "transposed" else matrix.reshape(shape)
        mesh = parameter.device_mesh
        copied = DTensor.from_local(region.to(parameter.dtype), mesh, [Replicate()] * mesh.ndim, run_check=False)
        held = copied.redistribute(placements=parameter.placements).to_local()
        return held.mT if slot.part == "transposed" else held

    def summed(self, *values: Tensor) -> list[float]:
        """Sums over the parts of the weight, of numbers found in ``target`` on each rank that holds another part."""
        total = torch.stack([value.double() for value in values])
        parameter = self.slot.parameter
        if isinstance(parameter, DTensor):
            for dim, placement in enumerate(parameter.placements):
                if _axis(placement) is not None:
                    dist.all_reduce(total, group=parameter.device_mesh.get_group(dim))
        found: list[float] = total.tolist()
        return found

    def squares(self, *matrices: Tensor) -> list[float]:
        """Squared norms of whole weights, of what this rank has of each as :meth:`matrix` gives it."""
        found = [matrix.square().sum() for matrix in matrices]
        return self.summed(*found) if self.by_rows else [float(value) for value in found]


def _axis(placement: Placement) -> int | None:
    """Along which axis a mesh dimension cuts a tensor; None where it does not."""
    return getattr(placement, "dim", None)


def _packed_rows(slot: Slot) -> slice:
    """Which rows of this rank's shard of a packed input projection belong to the slot."""
    parameter = slot.parameter
    assert isinstance(parameter, DTensor)
    mesh, third = parameter.device_mesh, parameter.shape[0] // 3
    number = torch.arange(parameter.shape[0], device=parameter.device)
    copied = DTensor.from_local(number, mesh, [Replicate()] * mesh.ndim, run_check=False)
    number = copied.redistribute(placements=parameter.placements).to_local()
    first = "qkv".index(slot.part) * third
    return slice(int((number < first).sum()), int((number < first + third).sum()))
