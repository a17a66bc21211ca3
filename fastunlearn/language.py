"""Causal language models: which models they are, and the loss of a sequence, in Hugging Face's conventions.

Labels [N, T] are not shifted: the logits at t - 1 predict label t, so that ``labels = input_ids`` trains a model to
go on with its own text. The label -100 is not scored, and the first label never is: nothing predicts it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fastunlearn.data import IGNORED, LossFunction

_OWN_TOKEN = ("WithLMHeadModel", "XLNetLMHeadModel")
_CHUNK = 1 << 22  # logits taken to float32 at a time, 16 MiB


def is_causal_lm(model: nn.Module) -> bool:
    """Whether ``model`` is one of Hugging Face's causal language models, by the name of its class or of one it derives
    from: ``...ForCausalLM`` or ``...LMHeadModel``.

    Looks into DistributedDataParallel, ``torch.compile`` and PEFT's wrappers. XLM's and Flaubert's
    ``...WithLMHeadModel`` and XLNet's predict each position's own token and do not count. Of Bart's relatives the
    decoders alone (``BartForCausalLM``) count, though their own loss takes labels that are shifted already.
    """
    names = [cls.__name__ for cls in type(model).__mro__]
    if any(n.endswith(("ForCausalLM", "LMHeadModel")) and not n.endswith(_OWN_TOKEN) for n in names):
        return True
    if isinstance(model, (DistributedDataParallel, nn.DataParallel)):
        return is_causal_lm(model.module)
    if "OptimizedModule" in names:  # by name: neither compiler nor PEFT is imported for those who use none
        return is_causal_lm(cast(Any, model)._orig_mod)
    return "PeftModel" in names and is_causal_lm(cast(Any, model).get_base_model())


def loss_for(model: nn.Module, loss_fn: LossFunction | None, by_position: bool = False) -> LossFunction | None:
    """What a model is measured by where the caller may have said nothing.

    Args:
        by_position: one loss per sequence and position, as ``sample="token"`` of :func:`fastunlearn.fisher_diagonal`
            wants it.

    Returns:
        ``loss_fn`` if there is one; else :func:`causal_lm_loss` (by position :func:`causal_lm_loss_by_position`) for a
        causal language model; else None, which stands for cross-entropy.
    """
    if loss_fn is not None or not is_causal_lm(model):
        return loss_fn
    return causal_lm_loss_by_position if by_position else causal_lm_loss


def causal_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over a sequence's labelled positions, in nats, shape [N].

    Args:
        logits: [N, T, V], floating; halves are taken to float32 a few positions at a time.
        labels: integers [N, T], not shifted: the logits at t - 1 predict label t; -100 is not scored. Batches that
            are dicts with an ``attention_mask`` come with -100 wherever that is 0.

    A sequence without any labelled position has loss 0 and gradient 0; it still counts as a sample.

    Raises TypeError for logits that are no tensor or not floating, ValueError for shapes that do not fit and, on the
    CPU, for labels that are no token; on a GPU that is an assertion in the kernel, as with torch's own cross-entropy.

    Cost: one pass over the logits each way. Between the two nothing of the size of the logits is kept but the logits
    themselves, and the backward pass allocates their gradient, in their dtype; when the gradient's own graph is asked
    for (``create_graph=True``) it keeps the softmax in float32, too.
    """
    losses = causal_lm_loss_by_position(logits, labels)
    return losses.sum(1) / scored(labels).sum(1).clamp(min=1)


def causal_lm_loss_by_position(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of label t under the logits at t - 1, in nats, shape [N, T]; 0 at t = 0 and where the label is
    -100. Arguments, errors and cost as of :func:`causal_lm_loss`."""
    logits = _checked(logits, labels)
    return F.pad(cast(Tensor, _NextTokenLoss.apply(logits, labels)), (1, 0))  # type: ignore[no-untyped-call]


def predictions(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits as the view [N, V, T - 1] and the labels [N, T - 1] that they predict, as classifiers of positions have
    them. Errors as of :func:`causal_lm_loss`."""
    return _checked(logits, labels)[:, :-1].transpose(1, 2), labels[:, 1:]


def scored(labels: Tensor) -> Tensor:
    """Which labels are predicted and count, bool [N, T]: not the first, and none that is -100."""
    counted = labels != IGNORED
    counted[:, :1] = False
    return counted


def is_next_token_loss(loss_fn: LossFunction | None) -> bool:
    """Whether ``loss_fn`` is what :func:`loss_for` gives causal language models."""
    return loss_fn in (causal_lm_loss, causal_lm_loss_by_position)


def fisher_passes(
    logits: Tensor,
    labels: Tensor,
    kind: str,
    sample: str,
    generator: torch.Generator,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Iterator[tuple[Tensor, int, bool]]:
    """The backward passes that :func:`fastunlearn.fisher_diagonal` takes over one graph of a causal language model:
    what to differentiate, how many samples it completes, whether it is the last.

    ``kind="monte_carlo"`` draws a label for every labelled position of a sequence, each given the text before it.
    ``kind="exact"`` is the expectation over them: drawn labels of different positions are independent and their
    gradients have mean zero, so the mixed terms of the square vanish, and V squares are added up per position, each
    weighted by its probability; with ``sample="sequence"`` over the squared number of labelled positions, too.

    Cost: one pass; with ``sample="token"`` one per position that any sequence has labelled, with ``kind="exact"`` V
    per such position.
    """
    labels = labels.to(logits.device)
    counted = scored(labels)
    if kind == "monte_carlo":
        labels = _drawn(logits.detach(), counted, generator)
    if kind != "exact" and sample == "sequence":
        with autocast():
            total = causal_lm_loss(logits, labels).sum()
        del logits
        yield total, len(labels), True
        return
    positions = counted.any(0).nonzero().flatten().tolist()
    classes = range(logits.shape[-1]) if kind == "exact" else (None,)
    share = 1 / counted.sum(1).clamp(min=1) if sample == "sequence" else torch.ones_like(labels[:, 0])
    samples = len(labels) if sample == "sequence" else int(counted.sum())
    if not positions and sample == "sequence":  # samples without a gradient
        yield logits[:0].sum(), samples, True
        return
    for t in positions:
        for c in classes:
            last = t == positions[-1] and c in (None, classes[-1])
            wanted = labels[:, t] if c is None else torch.full_like(labels[:, t], c)
            row = logits[:, t - 1]
            with autocast():
                losses = F.cross_entropy(_wide(row), wanted.masked_fill(~counted[:, t], IGNORED), reduction="none")
            weight = share.to(losses.dtype)
            if c is not None:  # the square of sqrt(p) times a gradient is p times its square
                weight = weight * _wide(row.detach()).log_softmax(1)[:, c].div(2).exp()
            total = (losses * weight)[counted[:, t]].sum()
            del row, losses
            if last:
                del logits
            yield total, samples if last else 0, last


def _drawn(logits: Tensor, counted: Tensor, generator: torch.Generator) -> Tensor:
    """Labels [N, T] from the softmax of the logits one position before, -100 where none counts."""
    labels = torch.full_like(counted, IGNORED, dtype=torch.int64)
    rows = max(1, _CHUNK // logits.shape[-1])
    for places in torch.split(counted.nonzero(), rows):
        n, t = places.unbind(1)
        labels[n, t] = torch.multinomial(_wide(logits[n, t - 1]).softmax(1), 1, generator=generator)[:, 0]
    return labels


def _checked(logits: Any, labels: Any) -> Tensor:
    if isinstance(logits, DTensor):
        logits = logits.full_tensor()
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        found = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"a causal language model must return logits [N, T, V], got {found}; pass loss_fn= otherwise")
    fits = isinstance(labels, Tensor) and logits.dim() == 3 and logits.shape[:2] == labels.shape
    if not fits or labels.is_floating_point():
        found = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(
            f"a causal language model needs labels of integers [N, T] for its logits [N, T, V], not shifted, got "
            f"{found} for {list(logits.shape)}; pass loss_fn= for anything else"
        )
    if labels.device.type == "cpu" and not isinstance(labels, FakeTensor):  # where looking waits for nobody
        wrong = labels[((labels < 0) & (labels != IGNORED)) | (labels >= logits.shape[-1])]
        if len(wrong):
            raise ValueError(
                f"the label {int(wrong[0])} is no token; they go from 0 to {logits.shape[-1] - 1}, {IGNORED} is none"
            )
    return logits


def _wide(x: Tensor) -> Tensor:
    """Not below float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _chunks(positions: int, sequences: int, classes: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, sequences * classes))
    return (slice(start, min(start + step, positions)) for start in range(0, positions, step))


class _NextTokenLoss(torch.autograd.Function):
    """Logits [N, T, V], labels [N, T] -> losses [N, T - 1] of labels 1 to T - 1, 0 where the label is -100.

    torch's own keeps a float32 copy of halves and their log-softmax, and writes a float32 gradient before the one in
    the dtype of the logits: at a vocabulary of 150,000 several times what the rest of a model takes.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        n, length, classes = logits.shape
        wanted = labels[:, 1:].long()
        dtype = torch.promote_types(logits.dtype, torch.float32)
        norms = logits.new_empty(n, max(length - 1, 0), dtype=dtype)
        losses = torch.empty_like(norms)
        for part in _chunks(norms.shape[1], n, classes):
            rows = _wide(logits[:, part])
            norms[:, part] = rows.logsumexp(-1)
            index = wanted[:, part].masked_fill(wanted[:, part] == IGNORED, 0)
            losses[:, part] = norms[:, part] - rows.gather(-1, index[..., None])[..., 0]
        ctx.save_for_backward(logits, wanted, norms)
        return losses.masked_fill_(wanted == IGNORED, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        logits, wanted, norms = ctx.saved_tensors
        grad = grad.masked_fill(wanted == IGNORED, 0)
        index = wanted.masked_fill(wanted == IGNORED, 0)[..., None]
        if torch.is_grad_enabled():  # of plain operations, so that the gradient can be differentiated
            rows = _wide(logits[:, :-1]).masked_fill((wanted == IGNORED)[..., None], 0).softmax(-1)
            rows = (rows - torch.zeros_like(rows).scatter(-1, index, 1)) * grad[..., None]
            return F.pad(rows, (0, 0, 0, 1)).to(logits.dtype), None
        out = grad.new_empty(logits.shape, dtype=logits.dtype)  # of grad, so that vmap may batch it
        out[:, -1:] = 0
        for part in _chunks(norms.shape[1], len(logits), logits.shape[-1]):
            rows = _wide(logits[:, part]).sub(norms[:, part, None]).exp_()
            rows.scatter_add_(-1, index[:, part], rows.new_full((), -1).expand(index[:, part].shape))
            # Where nothing is scored a logit may be NaN, which times 0 is NaN.
            rows = torch.where(grad[:, part, None] == 0, 0, rows * grad[:, part, None])
            out[:, part] = rows
        return out, None
