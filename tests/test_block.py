"""Blocks of units that are not rows of one weight: attention projections, transposed linears, filters in 3-D."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import Conv1D
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastunlearn.data import Batch
from fastunlearn.methods.block import Block, trainable_layers, unit_count, unit_parameters
from fastunlearn.methods.curvature import gradient, matrix, product


class Mixed(nn.Module):
    """[N, 1, 4, 3, 3] through a Conv3d, two attentions (one with weights apart), and a transposed linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 4, (1, 2, 3))
        self.packed = nn.MultiheadAttention(4, 2, batch_first=True)
        self.apart = nn.MultiheadAttention(4, 2, batch_first=True, kdim=2, vdim=3, bias=False)
        self.turned = Conv1D(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).flatten(2).mT
        h = h + self.packed(h, h, h, need_weights=False)[0]
        h = h + self.apart(h, h[..., :2].sin(), h[..., 1:])[0]
        result: Tensor = self.turned(h).mean(1)
        return result


UNITS = {
    "conv": [("conv", 2), ("conv", 0)],
    "packed": [("packed.in_proj", u) for u in (11, 0, 5)] + [("packed.out_proj", 3)],
    "apart": [("apart.in_proj", u) for u in (1, 3, 4, 9)] + [("apart.out_proj", 0)],
    "turned": [("turned", 2), ("turned", 0)],
    "all": [("turned", 1), ("packed.in_proj", 6), ("apart.in_proj", 10), ("conv", 1), ("apart.out_proj", 2)],
}


def mixed() -> tuple[Mixed, Batch]:
    torch.manual_seed(0)
    model = Mixed().double().eval()
    for bias in (model.packed.in_proj_bias, model.packed.out_proj.bias):
        nn.init.normal_(bias)
    x = torch.randn(6, 1, 4, 3, 3, dtype=torch.float64)
    return model, Batch((x,), {}, torch.arange(6) % 3, 6)


def positions(model: nn.Module, units: list[tuple[str, int]]) -> Tensor:
    """Where the units' weights are among all weights in a row, by the documented naming and nothing else."""
    at: dict[str, Tensor] = {}
    start = 0
    for name, p in model.named_parameters():
        at[name] = torch.arange(start, start + p.numel()).view_as(p)
        start += p.numel()
    names = list(at)
    found: dict[str, set[int]] = {}
    for layer, unit in units:
        part, row = f"{layer}.weight", unit
        if layer == "packed.in_proj":
            part = "packed.in_proj_weight"
        if layer == "apart.in_proj":
            part, row = f"apart.{'qkv'[unit // 4]}_proj_weight", unit % 4
        found.setdefault(part, set()).add(row)
        bias = part.replace("weight", "bias")
        if bias in at:
            found.setdefault(bias, set()).add(row)
    pieces = []
    for name in sorted(found, key=names.index):
        whole = at[name].T if name == "turned.weight" else at[name]
        pieces.append(whole[sorted(found[name])].reshape(-1))
    return torch.cat(pieces)


def flat_loss(model: nn.Module, batch: Batch) -> tuple[Any, Tensor]:
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([s.numel() for s in shapes.values()])
        values = {name: piece.view(s) for (name, s), piece in zip(shapes.items(), pieces, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, values, batch.args), batch.targets)

    return loss, torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("name", UNITS)
def test_gradient_hessian_and_its_products_equal_those_of_the_whole_model(name: str) -> None:
    model, batch = mixed()
    block = Block(trainable_layers(model, None), UNITS[name], None)
    loss, flat = flat_loss(model, batch)
    # A block lists parts by layer, the model's parameters in registration order: compare as sets of entries.
    marks = torch.arange(len(flat), dtype=torch.float64)
    pieces = dict(zip((id(p) for p in model.parameters()), marks.split([p.numel() for p in model.parameters()]),
                      strict=True))  # fmt: skip
    order = block.flat([pieces[id(p)].view_as(p) for p in block.parameters]).long()
    assert torch.equal(order.sort().values, positions(model, UNITS[name]).sort().values)
    assert torch.equal(block.values(), flat[order])
    with sdpa_kernel(SDPBackend.MATH):
        truth = torch.autograd.functional.hessian(loss, flat)[order][:, order]
    assert torch.allclose(matrix(model, block, [batch], None, "exact"), truth, rtol=0, atol=1e-12)
    (slope,) = torch.autograd.grad(loss(flat.requires_grad_()), flat)
    assert torch.allclose(gradient(model, block, [batch], None), slope[order], rtol=0, atol=1e-13)
    v = torch.randn(2, block.size, dtype=torch.float64)
    assert torch.allclose(product(model, block, [batch], None, "exact")(v), v @ truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", UNITS)
def test_gauss_newton_and_fisher_equal_the_jacobian_products(name: str) -> None:
    model, batch = mixed()
    block = Block(trainable_layers(model, None), UNITS[name], None)
    outputs = model(*batch.args)
    losses = F.cross_entropy(outputs, batch.targets, reduction="none")

    def rows(values: Tensor) -> Tensor:
        found = [torch.autograd.grad(v, block.parameters, retain_graph=True) for v in values.reshape(-1)]
        return torch.stack([block.flat(g) for g in found])

    jacobian, own = rows(outputs).view(6, 3, -1), rows(losses)
    p = outputs.softmax(1).detach()
    curved = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    truth = torch.einsum("nas,nab,nbt->st", jacobian, curved, jacobian) / 6
    assert torch.allclose(matrix(model, block, [batch], None, "gauss_newton"), truth, rtol=0, atol=1e-12)
    assert torch.allclose(matrix(model, block, [batch], None, "fisher"), own.mT @ own / 6, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", UNITS)
def test_add_moves_the_units_and_nothing_else(name: str) -> None:
    model, _ = mixed()
    block = Block(trainable_layers(model, None), UNITS[name], None)
    before, old = block.values(), {n: p.detach().clone() for n, p in model.named_parameters()}
    step = torch.randn(block.size, dtype=torch.float64)
    block.add_(step)
    assert torch.equal(block.values(), before + step)
    changed = sum(int((p != old[n]).sum()) for n, p in model.named_parameters())
    assert changed == block.size
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())


def test_units_of_projections_are_counted_and_checked() -> None:
    model, _ = mixed()
    layers = trainable_layers(model, None)
    assert {name: unit_count(m) for name, m in layers.items()} == {
        "conv": 4, "packed.in_proj": 12, "packed.out_proj": 4, "apart.in_proj": 12, "apart.out_proj": 4, "turned": 3,
    }  # fmt: skip
    for unit in (-1, 12):
        with pytest.raises(ValueError, match=f"'packed.in_proj' has units 0 to 11, not {unit}"):
            Block(layers, [("packed.in_proj", unit)], None)
    assert Block(layers, [("apart.in_proj", 0), ("apart.in_proj", 4), ("apart.in_proj", 8)], None).sizes == [4, 2, 3]


def test_frozen_parameters_of_a_projection_stay_out() -> None:
    model, _ = mixed()
    model.packed.in_proj_bias.requires_grad_(False)
    model.apart.k_proj_weight.requires_grad_(False)
    layers = trainable_layers(model, None)
    assert [s.parameter is model.packed.in_proj_weight for s in unit_parameters(model.packed)] == [True]
    block = Block(layers, [("packed.in_proj", 7), ("apart.in_proj", 5), ("apart.in_proj", 9)], None)
    assert block.units == [("packed.in_proj", 7), ("apart.in_proj", 9)] and block.size == 4 + 3
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable linear, convolution or attention weight"):
        trainable_layers(model, None)
