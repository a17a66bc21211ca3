"""Every rule against one backward pass per sample, in float64, without the engine; the engine where they must agree."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastunlearn import uses as uses_module
from fastunlearn.fisher import fisher_diagonal
from fastunlearn.hooks import Call
from fastunlearn.rules import Seen, applies, joinable, joined, rule_of, ruled_owners

DOUBLE = torch.float64


@dataclass
class Called:
    """One call on a batch. ``axes`` name the samples' axis per tensor given; an axis (0, h) holds h rows a sample."""

    module: nn.Module
    args: tuple[Any, ...]
    axes: tuple[Any, ...] = (0,)
    out_axis: int = 0
    kwargs: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[int, ...] = (0,)  # which of them the loss depends on

    def __post_init__(self) -> None:
        with torch.no_grad():
            returned = self.module(*self.args, **self.kwargs)
        every = [t for t in tree_flatten(returned)[0] if isinstance(t, Tensor)]
        self.out_axes = (self.out_axis, *[0] * (len(every) - 1))
        self.grads = tuple(torch.randn_like(t) if i in self.outputs else None for i, t in enumerate(every))

    @property
    def samples(self) -> int:
        i = self.outputs[0]
        grad = self.grads[i]
        assert grad is not None
        return grad.shape[self.out_axes[i]]

    def seen(self) -> Seen:
        plain = tuple(axis[0] if isinstance(axis, tuple) else axis for axis in self.axes)
        return Seen(Call(self.module, self.args, self.kwargs, None), plain, self.out_axes, self.grads)

    def loss(self, n: int, module: nn.Module | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Of sample n alone."""
        leaves, structure = tree_flatten((self.args, self.kwargs))
        axes = iter(self.axes)
        known: dict[int, Tensor] = {}  # query is key must stay so
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                axis = next(axes)
                if id(leaf) not in known:
                    part = leaf
                    if isinstance(axis, tuple):
                        part = leaf.narrow(axis[0], n * axis[1], axis[1])
                    elif axis is not None:
                        part = leaf.narrow(axis, n, 1).contiguous()
                    known[id(leaf)] = part.to(dtype) if dtype and part.is_floating_point() else part
                leaves[i] = known[id(leaf)]
        args, kwargs = tree_unflatten(leaves, structure)
        returned = (module or self.module)(*args, **kwargs)
        every = [t for t in tree_flatten(returned)[0] if isinstance(t, Tensor)]
        return sum(
            (t * g.narrow(axis, n, 1).to(t.dtype)).sum()
            for t, g, axis in zip(every, self.grads, self.out_axes, strict=True)
            if g is not None
        )  # type: ignore[return-value]


def all_modules(calls: Sequence[Called]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for i, module in enumerate(dict.fromkeys(call.module for call in calls)):
        found.update((f"{i}.{name}", m) for name, m in module.named_modules())
    return found


def by_rules(*calls: Called) -> dict[str, Tensor]:
    """Sums of squares by owner and name, with the engine's agreement on who answers for what."""
    found: dict[str, Tensor] = {}
    for owned in ruled_owners(all_modules(calls)).values():
        parameter = owned[0][1].get_parameter(owned[0][2])
        users = [(module, local) for _, module, local in owned]
        made = [(call, local) for module, local in users for call in calls if call.module is module]
        assert joinable(users, len(made))
        out = torch.zeros_like(parameter, dtype=DOUBLE if parameter.dtype == DOUBLE else torch.float32)
        with torch.no_grad():
            every = []
            for call, local in made:
                rule = rule_of(call.module)
                assert rule is not None
                assert applies(call.module, call.seen().input_axes, call.out_axes)
                every.append(rule(call.module, call.seen())[local])
            for use in joined(every) * 2:  # added, not written
                use.add_to(out)
            out /= 2
        found[f"{owned[0][0]}/{owned[0][2]}"] = out
    return found


def by_loop(*calls: Called, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The definition; on a copy of everything in another dtype if one is given."""
    modules = {module: module for module in all_modules(calls).values()}
    if dtype is not None:
        every = list(modules)
        modules = dict(zip(every, (m.to(dtype) for m in copy.deepcopy(nn.ModuleList(every))), strict=True))
    owned = {
        f"{owners[0][0]}/{owners[0][2]}": modules[owners[0][1]].get_parameter(owners[0][2])
        for owners in ruled_owners(all_modules(calls)).values()
    }
    found = {name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in owned.items()}
    for n in range(calls[0].samples):
        loss = sum(call.loss(n, modules[call.module], dtype) for call in calls)
        grads = torch.autograd.grad(loss, list(owned.values()), materialize_grads=True, allow_unused=True)
        for out, grad in zip(found.values(), grads, strict=True):
            out += grad.to(out.dtype).square()
    return found


def assert_exact(*calls: Called) -> dict[str, Tensor]:
    ours, loop = by_rules(*calls), by_loop(*calls)
    assert ours.keys() == loop.keys()
    for name in loop:
        torch.testing.assert_close(ours[name], loop[name], rtol=1e-9, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")
    return ours


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


SEEDS = range(30)


def seeded(seed: int) -> random.Random:
    torch.manual_seed(seed)
    return random.Random(seed)


# ---- convolutions -----------------------------------------------------------------------------------------------


def random_conv(rng: random.Random, axes: int) -> tuple[nn.Module, list[int]]:
    """A convolution and an image size [C, *sizes] for it."""
    groups = rng.choice([1, 1, 2, 3])
    inside, outside = groups * rng.randint(1, 2), groups * rng.randint(1, 3)
    kernel = [rng.randint(1, 3) for _ in range(axes)]
    dilation = [rng.randint(1, 2) for _ in range(axes)]
    padding: Any = rng.choice(["same", "valid", [rng.randint(0, 3) for _ in range(axes)]])
    stride = [1 if padding == "same" else rng.randint(1, 3) for _ in range(axes)]
    mode = rng.choice(["zeros", "circular", "reflect", "replicate"])
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    conv = cls(inside, outside, kernel, stride, padding, dilation, groups, rng.random() < 0.5, mode, dtype=DOUBLE)
    return conv, [inside, *(rng.randint(5, 7) for _ in range(axes))]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_convolution(axes: int, seed: int) -> None:
    rng = seeded(seed)
    conv, size = random_conv(rng, axes)
    assert_exact(Called(conv, (randn(rng.randint(1, 4), *size),)))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("limit", [1, 1_000, 5_000, 32 << 20])
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("seed", SEEDS[:8])
def test_convolution_used_twice_on_other_sizes(
    axes: int, seed: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uses_module, "CHUNK_BYTES", limit)
    rng = seeded(100 + seed)
    conv, size = random_conv(rng, axes)
    assert_exact(Called(conv, (randn(3, *size),)), Called(conv, (randn(3, size[0], *(n + 1 for n in size[1:])),)))


def random_transposed(rng: random.Random, axes: int) -> tuple[nn.Module, list[int]]:
    groups = rng.choice([1, 1, 2, 3])
    inside, outside = groups * rng.randint(1, 2), groups * rng.randint(1, 2)
    kernel = [rng.randint(1, 3) for _ in range(axes)]
    dilation = [rng.randint(1, 3) for _ in range(axes)]
    stride = [rng.randint(1, 3) for _ in range(axes)]
    padding = [rng.randint(0, 2) for _ in range(axes)]
    extra = [rng.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True)]
    cls = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
    conv = cls(inside, outside, kernel, stride, padding, extra, groups, rng.random() < 0.5, dilation, dtype=DOUBLE)
    return conv, [inside, *(rng.randint(5, 6) for _ in range(axes))]


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_transposed_convolution(axes: int, seed: int) -> None:
    rng = seeded(seed)
    conv, size = random_transposed(rng, axes)
    assert_exact(Called(conv, (randn(rng.randint(1, 4), *size),)))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_transposed_convolution_with_output_padding_above_its_stride(axes: int) -> None:
    """Padding uncovers output positions behind the regular ones, and their gradients count."""
    torch.manual_seed(0)
    cls = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
    conv = cls(2, 3, 3, stride=2, padding=2, output_padding=3, dilation=4, dtype=DOUBLE)
    assert_exact(Called(conv, (randn(2, 2, *[4] * axes),)))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_transposed_convolution_of_a_given_output_size(axes: int) -> None:
    torch.manual_seed(0)
    cls = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
    conv = cls(2, 3, 3, stride=3, padding=1, dtype=DOUBLE)
    for size in (10, 11, 12):
        assert_exact(Called(conv, (randn(2, 2, *[4] * axes),), kwargs={"output_size": [size] * axes}))


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_tied_to_a_transposed_one(axes: int, groups: int) -> None:
    torch.manual_seed(0)
    down = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](4, 6, 3, stride=2, groups=groups, dtype=DOUBLE)
    up = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1](
        6, 4, 3, stride=2, output_padding=1, groups=groups, dtype=DOUBLE
    )
    up.weight = down.weight
    assert_exact(Called(down, (randn(3, 4, *[7] * axes),)), Called(up, (randn(3, 6, *[3] * axes),)))


# ---- linear layers ----------------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """As transformers.pytorch_utils.Conv1D."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 5), (4, 2, 3, 5)])
@pytest.mark.parametrize("build", [lambda: nn.Linear(5, 3), lambda: nn.Linear(5, 3, bias=False), lambda: Conv1D(3, 5)])
def test_linear(build: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for axis in range(len(shape) - 1):
        assert_exact(Called(build().double(), (randn(*shape),), (axis,), axis))


def test_linear_used_twice_and_shared() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(5, 5).double(), nn.Linear(5, 5).double()
    second.weight, second.bias = first.weight, first.bias
    assert_exact(
        Called(first, (randn(4, 5),)), Called(first, (randn(2, 4, 5),), (1,), 1), Called(second, (randn(4, 3, 5),))
    )


def test_lazy_linear_once_it_has_a_shape() -> None:
    torch.manual_seed(0)
    layer = nn.LazyLinear(3, dtype=DOUBLE)
    layer(randn(2, 5))
    assert_exact(Called(layer, (randn(4, 3, 5),)))


@pytest.mark.parametrize("middle", [(), (3,), (3, 2)])
@pytest.mark.parametrize("bias", [False, True])
def test_bilinear(middle: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Bilinear(3, 4, 5, bias, dtype=DOUBLE)
    first = Called(layer, (randn(4, *middle, 3), randn(4, *middle, 4)), (0, 0))
    named = Called(layer, (), (0, 0), kwargs={"input2": randn(4, *middle, 4), "input1": randn(4, *middle, 3)})
    assert_exact(first)
    assert_exact(named)
    assert_exact(first, named)
    second = (randn(2, 4, 3), randn(2, 4, 4))
    assert_exact(Called(layer, second, (1, 1), 1))


# ---- embeddings -------------------------------------------------------------------------------------------------


def ids(*shape: int, of: int = 7) -> Tensor:
    return torch.randint(of, shape)


@pytest.mark.parametrize("padding_idx", [None, 2, -1])
@pytest.mark.parametrize("shape", [(4,), (4, 6), (4, 2, 3)])
def test_embedding(shape: tuple[int, ...], padding_idx: int | None) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(7, 3, padding_idx, dtype=DOUBLE)
    for axis in range(len(shape)):
        assert_exact(Called(table, (ids(*shape),), (axis,), axis))
    assert_exact(Called(table, (ids(*shape),)), Called(table, (ids(4, 5).int(),)))


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("options", [("sum", False), ("sum", True), ("mean", False)])
@pytest.mark.parametrize("limit", [1, 32 << 20])
def test_embedding_bag(
    options: tuple[str, bool], padding_idx: int | None, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uses_module, "CHUNK_BYTES", limit)
    torch.manual_seed(0)
    mode, weighted = options
    table = nn.EmbeddingBag(7, 3, mode=mode, padding_idx=padding_idx, dtype=DOUBLE)
    kwargs = {"per_sample_weights": randn(4, 6)} if weighted else {}
    bags = ids(4, 6)
    bags[0] = 2  # nothing but padding
    call = Called(table, (bags,), (0,) * (1 + weighted), kwargs=kwargs)
    assert_exact(call)
    assert_exact(call, Called(table, (ids(4, 3),)))


def test_bags_of_one_index_each_by_offsets() -> None:
    torch.manual_seed(0)
    table, weights = nn.EmbeddingBag(7, 3, mode="sum", padding_idx=1, dtype=DOUBLE), randn(5)
    table_ids = ids(5)
    flat = Called(table, (table_ids, torch.arange(5)), (0, 0, 0), kwargs={"per_sample_weights": weights})
    rows = Called(table, (table_ids[:, None],), (0, 0), kwargs={"per_sample_weights": weights[:, None]})
    rows.grads = flat.grads
    torch.testing.assert_close(by_rules(flat), assert_exact(rows), rtol=1e-12, atol=0)


def test_bags_of_several_indices_in_one_row_are_refused() -> None:
    table = nn.EmbeddingBag(7, 3, mode="sum", dtype=DOUBLE)
    call = Called(table, (ids(4), torch.tensor([0, 2, 2, 3])), (0, 0))
    with pytest.raises(ValueError, match=r"give it input \[N, T\]"):
        by_rules(call)


@pytest.mark.parametrize("limit", [1, 32 << 20])
@pytest.mark.parametrize("seed", SEEDS)
def test_tables_tied_to_anything(seed: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings with and without padding, bags and linear layers of either orientation on one weight [7, 3]."""
    monkeypatch.setattr(uses_module, "CHUNK_BYTES", limit)
    rng = seeded(seed)

    def one(kind: str) -> Called:
        if kind == "embedding":
            return Called(nn.Embedding(7, 3, rng.choice([None, 1]), dtype=DOUBLE), (ids(3, rng.randint(1, 6)),))
        if kind == "bag":
            return Called(nn.EmbeddingBag(7, 3, mode=rng.choice(["sum", "mean"]), dtype=DOUBLE), (ids(3, 4),))
        if kind == "head":
            return Called(nn.Linear(3, 7, dtype=DOUBLE), (randn(3, 3) if rng.random() < 0.3 else randn(3, 4, 3),))
        return Called(Conv1D(3, 7).double(), (randn(3, 2, 7),))

    kinds = ["embedding", rng.choice(["head", "swapped", "embedding", "bag"])]
    kinds += rng.choices(["embedding", "bag", "head", "swapped"], k=rng.randint(0, 2))
    calls = [one(kind) for kind in kinds]
    for call in calls[1:]:
        call.module.weight = calls[0].module.weight
    assert_exact(*calls)


def test_squares_of_a_tied_table_never_fall_below_zero() -> None:
    """Where both uses cancel, what is left is rounding, and still a sum of squares."""
    torch.manual_seed(0)
    table, head = nn.Embedding(5, 8), nn.Linear(8, 5, bias=False)
    head.weight = table.weight
    looked_up, read = Called(table, (ids(64, 3, of=5),)), Called(head, (torch.randn(64, 8),))
    # The head's gradient at row v is g_v x; give it to the embedding with the other sign.
    (g,), (x,) = read.grads, read.args
    counts = F.one_hot(looked_up.args[0], 5).sum(1).float()
    row = -(g / counts.clamp(min=1)).gather(1, looked_up.args[0])
    looked_up.grads = (row[..., None] * x[:, None],)
    ours = next(iter(by_rules(looked_up, read).values()))
    alone = next(iter(by_rules(read).values()))
    assert (ours >= 0).all()
    untouched = torch.einsum("nv,nd->vd", (g * (counts == 0)).square(), x.square())
    assert (ours - untouched).abs().max() <= 1e-6 * alone.max()


# ---- norms ------------------------------------------------------------------------------------------------------


NORMS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]] = {  # layer, input, the axes samples may lie on
    "LayerNorm": (lambda: nn.LayerNorm(6), (4, 5, 6), (0, 1)),
    "LayerNorm without bias": (lambda: nn.LayerNorm(6, bias=False, eps=0.1), (4, 6), (0,)),
    "LayerNorm over two axes": (lambda: nn.LayerNorm((5, 6)), (4, 3, 5, 6), (0, 1)),
    "LayerNorm over all axes": (lambda: nn.LayerNorm((3, 5, 6), bias=False), (4, 3, 5, 6), (0,)),
    "RMSNorm": (lambda: nn.RMSNorm(6), (4, 5, 6), (0, 1)),
    "RMSNorm over two axes": (lambda: nn.RMSNorm((5, 6), eps=0.1), (3, 4, 5, 6), (0, 1)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6, eps=0.1), (4, 6, 5), (0,)),
    "GroupNorm of images": (lambda: nn.GroupNorm(3, 6), (4, 6, 3, 2), (0,)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(3, affine=True), (4, 3, 5), (0,)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3, affine=True, eps=0.1), (4, 3, 5, 2), (0,)),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(3, affine=True), (4, 3, 2, 2, 3), (0,)),
    "InstanceNorm2d with statistics": (
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        (4, 3, 5, 2),
        (0,),
    ),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3, eps=0.1), (4, 3), (0,)),
    "BatchNorm1d of sequences": (lambda: nn.BatchNorm1d(3), (4, 3, 5), (0,)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3, eps=1e-2), (4, 3, 5, 2), (0,)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(3), (4, 3, 2, 2, 3), (0,)),
    "PReLU": (lambda: nn.PReLU(), (4, 3, 2), (0, 1)),
    "PReLU of channels": (lambda: nn.PReLU(3), (4, 3, 2), (0,)),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(3), (4, 3, 5), (0,)),
}


def moved(layer: nn.Module) -> nn.Module:
    """In eval mode, no weight and no statistic as it was at the start."""
    for tensor in [*layer.parameters(), *layer.buffers()]:
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2)
    return layer.double().eval()


@pytest.mark.parametrize("name", NORMS)
def test_norm(name: str) -> None:
    torch.manual_seed(0)
    build, shape, axes = NORMS[name]
    layer = moved(build())
    for axis in axes:
        assert_exact(Called(layer, (randn(*shape) + 0.5,), (axis,), axis))
    assert_exact(*(Called(layer, (randn(*shape) + 1,)) for _ in range(2)))


def test_instance_norm_that_updates_its_statistics_normalises_by_the_instance() -> None:
    torch.manual_seed(0)
    layer = moved(nn.InstanceNorm1d(3, affine=True, track_running_stats=True)).train()
    assert_exact(Called(layer, (randn(4, 3, 5),)))


# ---- attention --------------------------------------------------------------------------------------------------


def random_attention(rng: random.Random) -> Called:
    heads, width = rng.choice([1, 2, 3]), 6
    first = rng.random() < 0.5
    separate = rng.random() < 0.4
    layer = nn.MultiheadAttention(
        width, heads, bias=rng.random() < 0.7, add_bias_kv=rng.random() < 0.4, add_zero_attn=rng.random() < 0.3,
        kdim=5 if separate else None, vdim=4 if separate else None, batch_first=first, dtype=DOUBLE,
    )  # fmt: skip
    for parameter in layer.parameters():
        parameter.data = randn(*parameter.shape) / 2
    samples, length = rng.randint(1, 3), rng.randint(1, 4)
    kind = "three" if separate else rng.choice(["self", "cross", "three"])
    source = length if kind == "self" else rng.randint(1, 5)

    def rows(length: int, width: int) -> Tensor:
        return randn(samples, length, width) if first else randn(length, samples, width)

    query = rows(length, width)
    key = query if kind == "self" else rows(source, 5 if separate else width)
    value = rows(source, 4 if separate else width) if kind == "three" else key
    kwargs: dict[str, Any] = {"need_weights": rng.random() < 0.5, "average_attn_weights": rng.random() < 0.5}
    axis = 0 if first else 1
    axes: list[Any] = [axis] * 3
    if rng.random() < 0.4:
        hidden = torch.rand(samples, source) < 0.4
        hidden[:, 0] = False
        kwargs["key_padding_mask"] = hidden if rng.random() < 0.5 else hidden.double() * -1.5
        axes.append(0)
    kwargs["attn_mask"] = None
    mask = rng.choice(["", "two axes", "three axes", "causal"])
    if mask == "causal":
        kwargs["attn_mask"] = torch.ones(length, source, dtype=torch.bool).triu(1)
        kwargs["is_causal"] = True
        axes.append(None)
    elif mask:
        shape = (length, source) if mask == "two axes" else (samples * heads, length, source)
        blocked = torch.rand(shape) < 0.4
        blocked[..., 0] = False
        kwargs["attn_mask"] = blocked if rng.random() < 0.5 else randn(*shape)
        axes.append(None if mask == "two axes" else (0, heads))
    outputs = rng.choice([(0,), (0, 1), (1,)]) if kwargs["need_weights"] else (0,)
    return Called(layer, (query, key, value), tuple(axes), axis, kwargs, outputs)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("seed", range(80))
def test_attention(seed: int) -> None:
    assert_exact(random_attention(seeded(seed)))


def test_attention_used_on_itself_and_on_another_sequence() -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(6, 2, batch_first=True, dtype=DOUBLE)
    x, y = randn(3, 4, 6), randn(3, 2, 6)
    assert_exact(Called(layer, (x, x, x), (0, 0, 0)), Called(layer, (x, y, y), (0, 0, 0)))


def test_attention_without_a_batch_is_refused() -> None:
    layer = nn.MultiheadAttention(6, 2, dtype=DOUBLE)
    x = randn(4, 6)
    with pytest.raises(ValueError, match="without a batch"), torch.no_grad():
        rule = rule_of(layer)
        assert rule is not None
        seen = Called(layer, (x, x, x), (0, 0, 0)).seen()
        rule(layer, seen)["in_proj_weight"].add_to(torch.zeros(18, 6, dtype=DOUBLE))


# ---- low precision ----------------------------------------------------------------------------------------------


def tied_pair() -> list[Called]:
    table, head = nn.Embedding(9, 16), nn.Linear(16, 9, bias=False)
    head.weight = table.weight
    return [Called(table, (ids(24, 5, of=9),)), Called(head, (torch.randn(24, 4, 16),))]


def self_attention() -> list[Called]:
    x = torch.randn(8, 12, 16)
    return [
        Called(nn.MultiheadAttention(16, 2, batch_first=True), (x, x, x), (0, 0, 0), kwargs={"need_weights": False})
    ]


LOW: dict[str, Any] = {
    "linear": lambda: [Called(nn.Linear(24, 16), (torch.randn(32, 20, 24),))],
    "linear, one position": lambda: [Called(nn.Linear(24, 16), (torch.randn(64, 24),))],
    "convolution": lambda: [Called(nn.Conv2d(6, 8, 3, padding=1), (torch.randn(16, 6, 12, 12),))],
    "transposed convolution": lambda: [Called(nn.ConvTranspose2d(6, 8, 3, 2), (torch.randn(16, 6, 7, 7),))],
    "convolution in three dimensions": lambda: [Called(nn.Conv3d(3, 4, 3), (torch.randn(8, 3, 7, 7, 7),))],
    "layer norm": lambda: [Called(nn.LayerNorm(24), (torch.randn(32, 20, 24),))],
    "layer norm, samples second": lambda: [Called(nn.LayerNorm(24), (torch.randn(20, 32, 24),), (1,), 1)],
    "RMS norm": lambda: [Called(nn.RMSNorm(24), (torch.randn(32, 20, 24),))],
    "group norm": lambda: [Called(nn.GroupNorm(2, 8), (torch.randn(16, 8, 6, 6),))],
    "bilinear": lambda: [Called(nn.Bilinear(9, 8, 7), (torch.randn(32, 5, 9), torch.randn(32, 5, 8)), (0, 0))],
    "embedding": lambda: [Called(nn.Embedding(9, 16), (ids(24, 20, of=9),))],
    "bag": lambda: [Called(nn.EmbeddingBag(9, 16, mode="mean"), (ids(24, 7, of=9),))],
    "embedding tied to the head": tied_pair,
    "attention": self_attention,
}


def lowered(calls: list[Called], dtype: torch.dtype) -> list[Called]:
    """In ``dtype``: weights, inputs and gradients."""
    nn.ModuleList([call.module for call in calls]).to(dtype)
    for call in calls:
        call.args = tuple(t.to(dtype) if t.is_floating_point() else t for t in call.args)
        if len(call.args) == 3:
            call.args = (call.args[0],) * 3
        call.grads = tuple(None if g is None else g.to(dtype) for g in call.grads)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOW)
def test_error_is_at_most_twice_that_of_a_loop_in_the_same_dtype(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    calls = lowered(LOW[name](), dtype)
    ours, loop, exact = by_rules(*calls), by_loop(*calls), by_loop(*calls, dtype=DOUBLE)
    assert all(value.dtype == torch.float32 for value in ours.values())
    for parameter in exact:
        norm = exact[parameter].norm()
        mine, theirs = ((values[parameter] - exact[parameter]).norm() / norm for values in (ours, loop))
        assert mine <= 2 * theirs + torch.finfo(torch.float32).eps, parameter


# ---- memory -----------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest storage, in bytes, that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_flatten(result)[0]:
            if isinstance(t, Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return result


def twice(module: nn.Module, *inputs: Tensor) -> list[Called]:
    return [Called(module, (x,)) for x in inputs]


def large_tied_pair() -> list[Called]:
    table, head = nn.Embedding(1000, 64), nn.Linear(64, 1000, bias=False)
    head.weight = table.weight
    return [Called(table, (ids(64, 4, of=1000),)), Called(head, (torch.randn(64, 4, 64),))]


def wide_attention() -> list[Called]:
    x = torch.randn(64, 4, 256)
    return [Called(nn.MultiheadAttention(256, 4, batch_first=True), (x, x, x), (0, 0, 0))]


MEMORY: dict[str, Any] = {
    "linear": lambda: [Called(nn.Linear(512, 512), (torch.randn(64, 512),))],
    "linear used twice": lambda: twice(nn.Linear(512, 512), torch.randn(64, 512), torch.randn(64, 2, 512)),
    "bilinear": lambda: [Called(nn.Bilinear(64, 64, 64), (torch.randn(64, 64), torch.randn(64, 64)), (0, 0))],
    "convolution": lambda: [Called(nn.Conv2d(64, 64, 3), (torch.randn(64, 64, 4, 4),))],
    "convolution used twice": lambda: twice(nn.Conv2d(64, 64, 3), torch.randn(64, 64, 4, 4), torch.randn(64, 64, 3, 3)),
    "convolution in three dimensions": lambda: [Called(nn.Conv3d(32, 32, 3), (torch.randn(64, 32, 4, 4, 4),))],
    "transposed convolution": lambda: [Called(nn.ConvTranspose2d(64, 64, 3), (torch.randn(64, 64, 2, 2),))],
    "embedding": lambda: [Called(nn.Embedding(1000, 64), (ids(64, 4, of=1000),))],
    "embedding tied to the head": large_tied_pair,
    "attention": wide_attention,
}


@pytest.mark.parametrize("name", MEMORY)
def test_no_rule_holds_a_gradient_per_sample(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is larger than a parameter, what was recorded, or a chunk: an eighth of a gradient per sample."""
    torch.manual_seed(0)
    chunk = 1 << 19
    monkeypatch.setattr(uses_module, "CHUNK_BYTES", chunk)
    calls = MEMORY[name]()
    parameters = [p for module in {call.module for call in calls} for p in module.parameters()]
    recorded = sum(t.nbytes for call in calls for t in (*call.args, *call.grads) if t is not None)
    bound = max(chunk, recorded, *(p.nbytes for p in parameters))
    assert calls[0].samples * max(p.nbytes for p in parameters) > 8 * bound
    with Largest() as largest:
        by_rules(*calls)
    assert largest.bytes <= bound


@pytest.mark.parametrize("groups", [1, 4])
def test_patches_of_one_large_sample_are_written_out_in_parts(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv3d(8, 8, 3, groups=groups), torch.randn(2, 8, 8, 8, 8)
    channel = 27 * 6**3 * 4
    monkeypatch.setattr(uses_module, "CHUNK_BYTES", 2 * channel + 1)
    with Largest() as largest:
        by_rules(Called(conv, (x,)))
    assert largest.bytes == 2 * channel


# ---- which modules have a rule, and who answers for what ----------------------------------------------------------


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** 2


class Standardised(nn.Conv2d):
    """Has the forward of its class, and another convolution beneath it."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


class OwnConv1D(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** 2


def replaced_forward() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.forward = lambda x: F.linear(x, layer.weight) ** 2  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    "build",
    [
        lambda: OwnForward(3, 3),
        lambda: Standardised(2, 2, 3),
        lambda: OwnConv1D(3, 3),
        replaced_forward,
        lambda: nn.Embedding(5, 3, scale_grad_by_freq=True),
        lambda: nn.EmbeddingBag(5, 3, scale_grad_by_freq=True),
        lambda: nn.EmbeddingBag(5, 3, mode="max"),
        lambda: nn.EmbeddingBag(5, 3, max_norm=1.0),
        lambda: nn.MultiheadAttention(4, 2, dropout=0.1),
        lambda: nn.LSTM(3, 3),
        nn.Sequential,
    ],
)
def test_what_is_not_its_class_or_not_independent_has_no_rule(build: Any) -> None:
    assert rule_of(build()) is None


def test_dropout_of_attention_counts_only_while_training() -> None:
    assert rule_of(nn.MultiheadAttention(4, 2, dropout=0.1).eval()) is not None


def test_attention_answers_for_its_output_projection() -> None:
    attention = nn.MultiheadAttention(4, 2)
    owners = ruled_owners(dict(nn.Sequential(attention).named_modules()))
    assert owners[id(attention.out_proj.weight)] == [("0", attention, "out_proj.weight")]
    assert owners[id(attention.in_proj_bias)] == [("0", attention, "in_proj_bias")]


def test_a_subclass_of_attention_leaves_its_output_projection_to_itself() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:
            return self.out_proj(x)

    attention = Own(4, 2)
    owners = ruled_owners(dict(attention.named_modules()))
    assert owners[id(attention.out_proj.weight)] == [("out_proj", attention.out_proj, "weight")]


def test_uses_without_a_sum_in_common_are_not_joinable() -> None:
    conv, groups = nn.Conv2d(4, 4, 3), nn.Conv2d(8, 4, 3, groups=2)
    assert joinable([(conv, "weight"), (conv, "weight")], 2)
    assert not joinable([(conv, "weight"), (groups, "weight")], 2)
    assert not joinable([(nn.LayerNorm(4), "weight"), (nn.Linear(4, 4), "bias")], 2)
    assert not joinable([(nn.MultiheadAttention(4, 2), "in_proj_weight"), (nn.Linear(4, 12), "weight")], 2)
    assert not joinable([(nn.Linear(4, 4), "weight_v")], 1)


def test_samples_on_an_axis_of_positions_are_left_to_the_engine() -> None:
    """A convolution or a norm would mix them there; where a kernel of one does not, they are differentiated alone."""
    assert not applies(nn.Conv1d(2, 2, 1), (2,), (2,))
    assert not applies(nn.GroupNorm(1, 2), (2,), (2,))
    assert not applies(nn.BatchNorm1d(2), (2,), (2,))
    assert not applies(nn.MultiheadAttention(4, 2), (0, None, None), (0,))
    assert not applies(nn.Linear(2, 2), (None,), (0,))
    assert applies(nn.Linear(2, 2), (1,), (1,))


# ---- with the engine --------------------------------------------------------------------------------------------


def engine_equals_loop(model: nn.Module, inputs: Tensor) -> None:
    """No fallback: a layer without a kernel would warn."""
    model = model.double()
    targets = torch.randn_like(model(inputs))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * targets).flatten(1).sum(1)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "no kernel for")
        fisher = fisher_diagonal(model, [(inputs, targets)], loss)
    named = dict(model.named_parameters())
    expected = {name: torch.zeros_like(p) for name, p in named.items()}
    for n in range(len(inputs)):
        value = loss(model(inputs[n : n + 1]), targets[n : n + 1]).sum()
        for out, grad in zip(expected.values(), torch.autograd.grad(value, list(named.values())), strict=True):
            out += grad.square() / len(inputs)
    for name in expected:
        torch.testing.assert_close(
            fisher[name], expected[name], rtol=1e-9, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}"
        )


class Then(nn.Module):
    """Any function of modules."""

    def __init__(self, run: Any, **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def tied(run: Any, **modules: nn.Module) -> nn.Module:
    """All with the weight of the first."""
    first, *others = modules.values()
    for other in others:
        other.weight = first.weight
    return Then(run, **modules)


def attended(query: Any, **options: Any) -> nn.Module:
    """Attention of a query made from x [N, 5, 6] and of x, samples second inside unless told otherwise."""
    first = options.get("batch_first", False)
    swap = (lambda t: t) if first else (lambda t: t.transpose(0, 1))

    def run(m: Any, x: Tensor) -> Tensor:
        return swap(m.attention(*query(swap(x), swap(x[:, :2]).tanh()), need_weights=False)[0])

    return Then(run, attention=nn.MultiheadAttention(6, 2, **options))


ENGINE: dict[str, Any] = {
    # Cases in which other libraries are silently wrong.
    "padding same": lambda: (nn.Conv2d(3, 4, (2, 4), padding="same"), randn(3, 3, 5, 6)),
    "padding same, dilated": lambda: (nn.Conv2d(3, 4, 2, padding="same", dilation=3), randn(3, 3, 5, 6)),
    "circular padding": lambda: (nn.Conv2d(3, 4, 3, padding=2, padding_mode="circular"), randn(3, 3, 5, 6)),
    "reflect padding": lambda: (nn.Conv1d(3, 4, 3, padding=2, padding_mode="reflect"), randn(3, 3, 5)),
    "replicate padding": lambda: (nn.Conv3d(3, 4, 2, padding=1, padding_mode="replicate"), randn(3, 3, 4, 3, 3)),
    "depthwise": lambda: (nn.Conv2d(4, 8, 3, groups=4), randn(3, 4, 5, 6)),
    "tied linear layers": lambda: (
        tied(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(4, 4), b=nn.Linear(4, 4)),
        randn(3, 4),
    ),
    "embedding tied to its head": lambda: (
        tied(lambda m, x: m.b(m.a(x).tanh()), a=nn.Embedding(7, 4), b=nn.Linear(4, 7)),
        ids(3, 5),
    ),
    "padding index": lambda: (nn.Embedding(7, 3, padding_idx=2), ids(4, 6)),
    "layer norm without bias": lambda: (nn.LayerNorm(6, bias=False), randn(3, 5, 6)),
    "layer norm over positions": lambda: (nn.LayerNorm(6), randn(3, 8, 6)),
    "linear over positions": lambda: (nn.Linear(6, 4), randn(3, 8, 6)),
    "linear on four axes": lambda: (nn.Linear(6, 4), randn(3, 2, 4, 6)),
    "batch norm with another eps": lambda: (moved(nn.BatchNorm2d(3, eps=0.1)), randn(4, 3, 4, 4)),
    "group norm": lambda: (nn.GroupNorm(2, 4), randn(3, 4, 5)),
    "RMS norm": lambda: (nn.RMSNorm(6), randn(3, 5, 6)),
    "three dimensions": lambda: (nn.Conv3d(2, 3, 2), randn(3, 2, 4, 3, 3)),
    # What else has a rule.
    "transposed": lambda: (nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), randn(3, 3, 4, 4)),
    "convolution used twice": lambda: (
        Then(lambda m, x: m.a(m.a(x).tanh()).flatten(1), a=nn.Conv2d(3, 3, 2, stride=2)),
        randn(3, 3, 8, 9),
    ),
    "tied autoencoder": lambda: (
        tied(lambda m, x: m.b(m.a(x).tanh()), a=nn.Conv2d(3, 4, 3), b=nn.ConvTranspose2d(4, 3, 3)),
        randn(3, 3, 6, 6),
    ),
    "bag": lambda: (nn.EmbeddingBag(7, 3, padding_idx=0), ids(4, 5)),
    "two tables": lambda: (
        tied(lambda m, x: m.a(x[:, :2]) * m.b(x[:, 2:4]), a=nn.Embedding(7, 3), b=nn.Embedding(7, 3, padding_idx=1)),
        ids(4, 5),
    ),
    "bilinear": lambda: (Then(lambda m, x: m.a(x, x.tanh()), a=nn.Bilinear(4, 4, 3)), randn(3, 5, 4)),
    "Conv1D": lambda: (Conv1D(3, 4), randn(3, 5, 4)),
    "instance norm": lambda: (nn.InstanceNorm2d(3, affine=True), randn(3, 3, 4, 4)),
    "PReLU": lambda: (nn.PReLU(3), randn(3, 3, 4)),
    "self-attention": lambda: (attended(lambda x, y: (x, x, x)), randn(3, 5, 6)),
    "self-attention, samples first": lambda: (attended(lambda x, y: (x, x, x), batch_first=True), randn(3, 5, 6)),
    "attention on another sequence": lambda: (attended(lambda x, y: (x, y, y)), randn(3, 5, 6)),
    "attention of three": lambda: (attended(lambda x, y: (x, y, y.tanh()), bias=False), randn(3, 5, 6)),
    "attention with learned keys": lambda: (
        attended(lambda x, y: (x, y, y), add_bias_kv=True, add_zero_attn=True, batch_first=True),
        randn(3, 5, 6),
    ),
    "attention with weights of their own": lambda: (
        attended(lambda x, y: (x, y, y), kdim=6, vdim=6, batch_first=True),
        randn(3, 5, 6),
    ),
    "attention weights in the loss": lambda: (
        Then(lambda m, x: torch.cat(m.a(x, x, x), 2), a=nn.MultiheadAttention(6, 2, batch_first=True)),
        randn(3, 5, 6),
    ),
    "transformer": lambda: (
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 2, enable_nested_tensor=False
        ).eval(),
        randn(3, 5, 6),
    ),
    "decoder": lambda: (
        Then(
            lambda m, x: m.a(x, x[:, :3].tanh(), tgt_mask=nn.Transformer.generate_square_subsequent_mask(5).to(x)),
            a=nn.TransformerDecoderLayer(6, 2, 8, batch_first=True).eval(),
        ),
        randn(3, 5, 6),
    ),
}


class Mixed(nn.Module):
    """Layers of most kinds, of which autocast lowers some."""

    def __init__(self, autocast: bool) -> None:
        super().__init__()
        self.autocast = autocast
        self.conv, self.norm, self.slope = nn.Conv1d(4, 16, 3, padding=1), nn.LayerNorm(16), nn.PReLU()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up, self.head = nn.ConvTranspose1d(16, 8, 2, 2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            x = self.slope(self.norm(self.conv(x).mT))
            x = x + self.attention(x, x, x)[0]
            return self.head(self.up(x.mT).mT)


def test_error_under_autocast_is_at_most_twice_that_of_a_loop() -> None:
    torch.manual_seed(0)
    model, x, y = Mixed(True), torch.randn(12, 4, 10), torch.randn(12, 20, 5)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.to(targets.dtype) * targets).sum((1, 2))

    def loop(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        named = dict(model.named_parameters())
        grads = [
            torch.autograd.grad(loss(model(x[n : n + 1]), y[n : n + 1]).sum(), list(named.values())) for n in range(12)
        ]
        return {name: torch.stack([g[i] for g in grads]).square().mean(0) for i, name in enumerate(named)}

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "no kernel for")
        ours = fisher_diagonal(model, [(x, y)], loss)
    theirs = loop(model, x, y)
    exact = Mixed(False).double()
    exact.load_state_dict(model.state_dict())
    for name, value in loop(exact, x.double(), y.double()).items():
        mine, other = ((values[name] - value).norm() / value.norm() for values in (ours, theirs))
        assert mine <= 2 * other, name


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", ENGINE)
def test_engine_and_rules_agree(name: str) -> None:
    torch.manual_seed(0)
    engine_equals_loop(*ENGINE[name]())


def test_a_weight_computed_from_others_is_differentiated_sample_by_sample() -> None:
    """weight_g and weight_v lie on a Linear whose rule does not know them."""
    torch.manual_seed(0)
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(4, 3)).double()
    x, y = randn(3, 4), torch.tensor([0, 2, 1])
    with pytest.warns(UserWarning, match="no kernel for"):
        fisher = fisher_diagonal(layer, [(x, y)])
    expected = torch.zeros_like(layer.weight_g)
    for n in range(3):
        loss = F.cross_entropy(layer(x[n : n + 1]), y[n : n + 1])
        expected += torch.autograd.grad(loss, layer.weight_g)[0].square() / 3
    torch.testing.assert_close(fisher["weight_g"], expected, rtol=1e-9, atol=1e-14)


def test_dropout_in_attention_is_refused_by_name() -> None:
    model = attended(lambda x, y: (x, x, x), dropout=0.1, batch_first=True).double()
    with pytest.raises(ValueError, match=r"attention .*drops units at random"):
        fisher_diagonal(model, [(randn(3, 5, 6), torch.zeros(3, 5, dtype=torch.long))], lambda o, t: o.sum((1, 2)))
