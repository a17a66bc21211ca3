"""One way to look inside a model: record what its modules are given and return, and put everything back.

Fisher squares, Gram matrices and unit activations are all collected through :func:`recording`; nothing
here needs the model rewritten, wrapped or in a ``Sequential``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastunlearn.parallel.ranks import everyone, local, reshard, unwrapped

Copies = list[tuple[str, nn.Parameter, torch.Tensor]]


@dataclass(frozen=True)
class Call:
    """One call of one module in one forward pass, as the module saw it."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def input(self) -> torch.Tensor:
        """The first positional tensor argument: what Linear, Conv and norm layers act on."""
        first = self.args[0] if self.args else next(iter(self.kwargs.values()), None)
        if not isinstance(first, torch.Tensor):
            raise TypeError(f"{type(self.module).__name__} was called without a tensor as its first argument")
        return first


@contextmanager
def recording(modules: Iterable[nn.Module], on_call: Callable[[Call], None]) -> Iterator[None]:
    """Call ``on_call`` after every forward of ``modules``, with what they returned before hooks of others changed it;
    the hooks are gone afterwards, also on an exception."""
    chosen = set(modules)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module in chosen:  # a copy that the forward pass makes of a module has the hook, too
            on_call(Call(module, args, kwargs, output))

    with ExitStack() as stack:
        for module in chosen:
            stack.callback(module.register_forward_hook(hook, with_kwargs=True, prepend=True).remove)
        yield


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put back training flags, ``requires_grad``, ``.grad`` and the random state when the block ends, however it ends.

    FSDP2 has its weights in shards again, too: what it had gathered would be out of date once the shards are written.

    A gradient from before must not be written to meanwhile: drop it with ``zero_grad(set_to_none=True)``.
    """
    training = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            reshard(model)
            for module, mode in training:
                module.training = mode
            for parameter, requires_grad, grad in trainable:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad


@contextmanager
def without_fused_attention() -> Iterator[None]:
    """Keep torch's fused encoder layers off: they call none of their modules and may pad with nested tensors."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def eager() -> AbstractContextManager[Any]:
    """Compiled models run their Python code: a compiled graph calls no hooks. Costs nothing where none can exist."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 stays float32: no autocast, no TF32 or bfloat16 products, whatever the caller has chosen.

    Second derivatives need it. Conjugate gradients do not get below the rounding of TF32, which torch allows in
    convolutions on CUDA by default; and autocast goes on with its cached casts of weights that have moved since.
    """
    backends: Any = torch.backends
    switches = [backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul]
    if device.type == "cpu":
        switches = [backends.mkldnn.conv, backends.mkldnn.rnn, backends.mkldnn.matmul]
    chosen = [switch.fp32_precision for switch in switches]
    with torch.autocast(device.type, enabled=False):
        try:
            for switch in switches:
                switch.fp32_precision = "ieee"
            yield
        finally:
            for switch, precision in zip(switches, chosen, strict=True):
                switch.fp32_precision = precision


@contextmanager
def restored_on_error(model: nn.Module, parameters: Iterable[nn.Parameter] | None = None) -> Iterator[Copies]:
    """Copies of parameters (default: all) and all buffers; written back if the block raises anything at all.

    Yields (name, tensor, copy) for each parameter, shared ones once, so that a method can count what it changed.
    """
    reshard(model)  # the weights at rest are meant
    chosen = None if parameters is None else {id(p) for p in parameters}
    named = [(name, p) for name, p in unwrapped(model).named_parameters() if chosen is None or id(p) in chosen]
    copies = [(name, p, p.detach().clone()) for name, p in named]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        yield copies
    except BaseException:
        with torch.no_grad():
            for tensor, copy in [*((p, copy) for _, p, copy in copies), *buffers]:
                tensor.copy_(copy)
        raise


@contextmanager
def restored(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Put these parameters and all buffers back as they were when the block ends, however it ends."""
    copies = [(t, t.detach().clone()) for t in (*parameters, *model.buffers())]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, copy in copies:
                tensor.copy_(copy)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights are; raises ValueError when it has none or they are spread over devices."""
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "no parameters at all"
        raise ValueError(f"the model must have its weights on one device, found {found}")
    return devices.pop()


def require_separable(model: nn.Module) -> None:
    """Raise ValueError when the samples of a batch influence one another (BatchNorm that uses batch statistics)."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{name or type(module).__name__} is a BatchNorm that normalises by the statistics of the batch, "
                "so one sample's loss depends on the others; call model.eval() first"
            )


def require_finite(model: nn.Module) -> None:
    """Raise ValueError naming the first parameter that holds NaN or Inf."""
    ranks = everyone(model)  # first: a gathered weight's memory goes when it is put back into shards
    named = [(name, local(p)) for name, p in unwrapped(model).named_parameters()]
    # NaN and Inf never leave a sum, which is read once and waited for once; a sum may also overflow by itself.
    sums = [p.detach().sum(dtype=torch.float32 if p.dtype == torch.float16 else None) for _, p in named]
    total = torch.stack([s.detach().abs().to(torch.float64) for s in sums]).sum()
    ranks.sum_(total)  # so that all ranks find, or do not find, the same
    if bool(torch.isfinite(total)):
        return
    here = next((name for name, p in named if not bool(torch.isfinite(p).all())), None)
    for name in ranks.gather(here):
        if name is not None:
            raise ValueError(f"parameter {name} holds NaN or Inf; unlearning would only spread it")
