"""Squared per-sample gradients: ours, what one composes from torch, the peers, and the backward pass they stand beside.

Opacus and BackPACK take part where they are installed (``make bench`` does) and know every layer of the model.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from conftest import DEVICE
from models import Encoder, ViT, vgg11
from torch import Tensor, nn
from torch.nn import functional as F

from fastunlearn import fisher_diagonal, ops

ON_GPU = DEVICE == "cuda"
# samples, positions, in, out. On a GPU in bfloat16 too; the first is what 70 % of torch.matmul's rate is asked for.
LINEAR = (
    {
        "T=2048": (8, 2048, 4096, 4096),
        "T=200": (64, 200, 4096, 4096),
        "T=16": (256, 16, 2048, 2048),
        "T=1": (4096, 1, 4096, 4096),
    }
    if ON_GPU
    else {"T=1": (256, 1, 512, 512), "T=64": (32, 64, 256, 256), "T=512": (4, 512, 768, 768)}
)
KINDS = ["float32", "tf32", "bfloat16"] if ON_GPU else ["float32"]
CONV = {  # samples, in, out, size, groups
    "32 x 64 channels, 16 x 16": (32, 64, 64, 16, 1),
    "128 x 512 channels, 2 x 2": (128, 512, 512, 2, 1),
    "depthwise, 16 x 512 channels, 8 x 8": (16, 512, 512, 8, 512),
} | ({"256 x 256 channels, 28 x 28": (256, 256, 256, 28, 1)} if ON_GPU else {})
CHUNK = 1 << 28  # numbers of the per-sample gradients that a chunk of bmm may hold


def chunked_bmm(a: Tensor, g: Tensor) -> Tensor:
    """bmm -> square -> sum over as many samples at a time as fit."""
    step = max(1, CHUNK // (a.shape[-1] * g.shape[-1]))
    parts = [torch.bmm(y.mT, x).square().sum(0) for x, y in zip(a.split(step), g.split(step), strict=True)]
    return torch.stack(parts).sum(0)


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """The dtype of a kind; "tf32" is float32 where torch may round factors to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if request.param == "tf32" else "highest")
    yield torch.bfloat16 if request.param == "bfloat16" else torch.float32
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("kind", KINDS, indirect=True)
@pytest.mark.parametrize("name", LINEAR)
def test_sq_grad_linear(versus: Any, device: str, name: str, kind: torch.dtype) -> None:
    """Beside bmm -> square -> sum in chunks, the same compiled, vmap, and torch.matmul of as many FLOPs."""
    n, t, d, p = LINEAR[name]
    a = torch.randn(n, t, d, device=device, dtype=kind)
    g = torch.randn(n, t, p, device=device, dtype=kind)
    out = torch.zeros(p, d, device=device)
    step = max(1, CHUNK // (d * p))
    outer = torch.func.vmap(lambda x, y: y.mT @ x)

    def vmap() -> None:
        for x, y in zip(a.split(step), g.split(step), strict=True):
            outer(x, y).square().sum(0)

    peers: dict[str, Callable[[], Any]] = {
        "bmm_square_sum": lambda: chunked_bmm(a, g),
        "vmap": vmap,
        "weight_gradient": lambda: g.flatten(0, 1).T @ a.flatten(0, 1),
    }
    if ON_GPU:
        compiled = torch.compile(chunked_bmm)
        peers["compiled_bmm"] = lambda: compiled(a, g)
    versus(lambda: ops.sq_grad_linear(out, a, g), flops=2 * n * t * d * p, **peers)


@pytest.mark.parametrize("name", CONV)
def test_sq_grad_conv2d(versus: Any, device: str, name: str) -> None:
    """Beside the ordinary weight gradient and, with one group, unfold -> bmm -> square -> sum."""
    n, ci, co, size, groups = CONV[name]
    x, g = torch.randn(n, ci, size, size, device=device), torch.randn(n, co, size, size, device=device)
    weight = torch.zeros(co, ci // groups, 3, 3, device=device)
    out = torch.zeros_like(weight)

    def weight_gradient() -> None:
        torch.ops.aten.convolution_backward(
            g, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], groups, [False, True, False]
        )

    def unfolded() -> None:
        for part, grad in zip(x.split(32), g.split(32), strict=True):
            torch.bmm(grad.flatten(2), F.unfold(part, 3, padding=1).mT).square().sum(0)

    versus(
        lambda: ops.sq_grad_conv2d(out, x, g, (1, 1), (1, 1), (1, 1), groups),
        flops=2 * g.numel() * weight[0].numel(),
        weight_gradient=weight_gradient,
        **({"unfold_bmm_square_sum": unfolded} if groups == 1 else {}),
    )


@pytest.mark.parametrize("op", ["sq_grad_affine", "sq_grad_bias", "sq_grad_embedding"])
def test_memory_bound(versus: Any, device: str, op: str) -> None:
    """Norms, biases and tables of embeddings, beside a copy of as many bytes."""
    n, t, d = (64, 1024, 4096) if ON_GPU else (16, 256, 768)
    g = torch.randn(n, t, d, device=device)
    if op == "sq_grad_embedding":
        table, ids = torch.zeros(30_000, d, device=device), torch.randint(30_000, (n, t), device=device)
        ours, read = (lambda: ops.sq_grad_embedding(table, ids, g)), 4 * (g.numel() + 2 * ids.unique().numel() * d)
    elif op == "sq_grad_affine":
        x, out = torch.randn_like(g), torch.zeros(d, device=device)
        ours, read = (lambda: ops.sq_grad_affine(out, x, g, -1)), 2 * g.numel() * 4
    else:
        out = torch.zeros(d, device=device)
        ours, read = (lambda: ops.sq_grad_bias(out, g, -1)), g.numel() * 4
    source = torch.empty(read // 8, device=device)
    target = torch.empty_like(source)
    versus(ours, moved=read, copy_of_as_many_bytes=lambda: target.copy_(source))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "VGG11": (vgg11, (3, 32, 32)),
    "VGG11-BN": (lambda: vgg11(batch_norm=True), (3, 32, 32)),
    "ViT": (ViT, (3, 32, 32)),
    "12 layers, d=768, T=512": (Encoder, (512, 768)),
}
RUNS = [(name, n) for name in ("VGG11", "VGG11-BN", "ViT") for n in (16, 128)] + [("12 layers, d=768, T=512", 4)]


@pytest.mark.parametrize(("name", "samples"), RUNS)
def test_fisher_diagonal(versus: Any, device: str, name: str, samples: int) -> None:
    """One call on one batch, planning included, beside one plain forward and backward pass and the peers."""
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model = build().to(device)
    x, y = torch.randn(samples, *shape, device=device), torch.randint(10, (samples,), device=device)
    parameters = dict(model.named_parameters())

    def plain() -> None:
        torch.autograd.grad(F.cross_entropy(model(x), y), list(parameters.values()))

    def loop() -> None:
        sums = [torch.zeros_like(p) for p in parameters.values()]
        for n in range(len(x)):
            loss = F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
            for total, grad in zip(sums, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                total.addcmul_(grad, grad)

    def sample_loss(weights: dict[str, Tensor], sample: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, weights, (sample[None],))
        return F.cross_entropy(logits, label[None])

    detached = {key: p.detach() for key, p in parameters.items()}
    per_sample = torch.func.vmap(torch.func.grad(sample_loss), (None, 0, 0))

    def vmap() -> None:
        for grad in per_sample(detached, x, y).values():
            grad.square().sum(0)

    peers = {"plain_backward": plain, "loop": loop, "vmap": vmap}
    for peer, make in {"opacus": _opacus, "backpack": _backpack}.items():
        if find_spec(peer) and (function := make(copy.deepcopy(model), x, y)):
            peers[peer] = function
    large = samples == 128 or len(shape) == 2
    versus(lambda: fisher_diagonal(model, [(x, y)]), rounds=3 if large else 7, **peers)


@pytest.mark.parametrize("name", ["VGG11", "VGG11-BN", "ViT"])
def test_a_pass_over_batches(versus: Any, device: str, name: str) -> None:
    """Eight batches of 16, so that planning is paid once, beside as many plain forward and backward passes."""
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model = build().to(device)
    batches = [
        (torch.randn(16, *shape, device=device), torch.randint(10, (16,), device=device)) for _ in range(8)
    ]  # fmt: skip
    parameters = list(model.parameters())

    def plain() -> None:
        for x, y in batches:
            torch.autograd.grad(F.cross_entropy(model(x), y), parameters)

    versus(lambda: fisher_diagonal(model, batches), plain_backward=plain)


def _opacus(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None] | None:
    """The sum of squares of ``grad_sample``; parameters that belong to no layer it knows are frozen, in its favour."""
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return None  # it refuses them
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus import GradSampleModule

        for module in model.modules():
            if list(module.children()):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(False)
        for module in model.modules():  # its hooks can not stand them
            if isinstance(module, nn.ReLU):
                module.inplace = False
        # It records in training mode alone, and multiplies by N what it takes for the gradient of a mean.
        wrapped = GradSampleModule(model.train(), loss_reduction="sum")

    def run() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            F.cross_entropy(wrapped(x), y, reduction="sum").backward()
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.grad_sample.square().sum(0)
                parameter.grad_sample = parameter.grad = None

    return run


def _backpack(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None] | None:
    """``SumGradSquared``, for models in a ``Sequential`` of the layers that it knows."""
    if not isinstance(model, nn.Sequential) or any(isinstance(module, nn.BatchNorm2d) for module in model):
        return None
    from backpack import backpack, extend
    from backpack.extensions import SumGradSquared

    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    extended, loss = extend(model), extend(nn.CrossEntropyLoss(reduction="sum"))

    def run() -> None:
        with backpack(SumGradSquared()):
            loss(extended(x), y).backward()
        for parameter in extended.parameters():
            parameter.grad = None

    return run
