"""The diagonal of the Fisher information of an unmodified model: exact per-sample squares at any batch size.

A *unit* is a module whose calls are recorded. Its output gradients are taken as autograd computes them, turned into
squares at once, and dropped: what the layer was given and the gradient of what it returned feed the kernels of
:mod:`fastunlearn.ops` by the rules of :mod:`fastunlearn.rules`. What to record is decided, and proven complete, by
:mod:`fastunlearn.planning`; every batch is held against that plan.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fastunlearn.data import (
    IGNORED,
    Batch,
    Batches,
    LossFunction,
    labelled_positions,
    per_position_loss,
    per_sample_loss,
)
from fastunlearn.draws import derived_seed
from fastunlearn.graph import Aliases, Taps
from fastunlearn.hooks import Call, device_of, eager, preserved, recording, require_finite, require_separable
from fastunlearn.language import fisher_passes, is_next_token_loss, loss_for
from fastunlearn.outcome import track
from fastunlearn.parallel.deal import together
from fastunlearn.parallel.ranks import Ranks, reshard, sharing, unwrapped
from fastunlearn.parallel.tensors import is_parallel, looked_up_here, on_this_rank
from fastunlearn.planning import (
    Observed,
    Plan,
    Probe,
    Ways,
    full_plan,
    owners_with_rules,
    plan_of_rules,
    probe,
    require_independent,
    sharded_plan,
)
from fastunlearn.rules import Seen, joined, rule_of, ruled_owners
from fastunlearn.sums import Sums
from fastunlearn.units import Record, Substitution, Unit, add_squares, map_tensors, spread
from fastunlearn.uses import Use

Kind = Literal["empirical", "monte_carlo", "exact"]
Sample = Literal["sequence", "token"]


class FisherDiagonal(Mapping[str, Tensor]):
    """Parameter name -> mean over samples of the squared per-sample gradient, shaped like the parameter.

    Diagonals of one model over different samples add up to the diagonal over all of them, so a long pass can be split,
    resumed, or spread over machines::

        F = fisher_diagonal(model, first_half)
        F.save("fisher.safetensors")
        F = FisherDiagonal.load("fisher.safetensors") + fisher_diagonal(model, second_half)
        F = sum(fisher_diagonal(model, loader) for loader in loaders)

    Attributes:
        num_samples: how many samples the mean is over.
        kind, sample: as given to :func:`fisher_diagonal`.
    """

    def __init__(
        self, values: Mapping[str, Tensor], num_samples: int, kind: Kind = "empirical", sample: Sample = "sequence"
    ) -> None:
        self._values = dict(values)
        self.num_samples = num_samples
        self.kind: Kind = kind
        self.sample: Sample = sample

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"FisherDiagonal({len(self)} parameters, {self.num_samples} samples)"

    def __add__(self, other: FisherDiagonal) -> FisherDiagonal:
        """The diagonal over the samples of both, on this one's device.

        Raises ValueError when names, shapes, ``kind`` or ``sample`` differ. Rounds once more than a single pass does.
        """
        if not isinstance(other, FisherDiagonal):
            return NotImplemented
        if alone := sorted(set(self) ^ set(other)):
            raise ValueError(f"the diagonals are not of the same parameters: {alone} are in one only")
        for name, value in self.items():
            if value.shape != other[name].shape:
                raise ValueError(
                    f"{name} has shape {list(value.shape)} in one and {list(other[name].shape)} in the other"
                )
        for setting in ("kind", "sample"):
            ours, theirs = getattr(self, setting), getattr(other, setting)
            if ours != theirs:
                raise ValueError(f"the diagonals are of {setting} {ours!r} and {theirs!r}, which do not add up")
        total = self.num_samples + other.num_samples
        share = other.num_samples / total
        values = {name: torch.lerp(v, _placed_like(v, other[name]), share) for name, v in self.items()}
        return FisherDiagonal(values, total, self.kind, self.sample)

    def __radd__(self, other: int) -> FisherDiagonal:
        """For ``sum``, which begins with 0."""
        return self if other == 0 else NotImplemented

    def save(self, path: str | PathLike[str]) -> None:
        """Write everything to a safetensors file.

        Of shards (DTensors) all ranks call this: rank 0 brings the whole diagonal together in host memory and writes
        it. Replicas are the same on every rank: let one of them write. The shards of an ``offload``-ed pass are plain
        tensors, and a file of them is this rank's part alone: give each rank a path of its own.
        """
        from safetensors.torch import save_file

        tensors = {}
        for name, value in self.items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value  # one by one, on all ranks
            if not isinstance(value, DTensor) or dist.get_rank() == 0:
                tensors[name] = whole.cpu().contiguous()
        if not tensors and len(self):
            return
        about = {"num_samples": json.dumps(self.num_samples), "kind": self.kind, "sample": self.sample}
        save_file(tensors, path, metadata=about)

    @classmethod
    def load(cls, path: str | PathLike[str], device: str = "cpu") -> FisherDiagonal:
        """Read what :meth:`save` wrote; raises ValueError for a safetensors file of something else."""
        from safetensors import safe_open

        with safe_open(path, framework="pt", device=device) as file:
            about = file.metadata() or {}
            if "num_samples" not in about:
                raise ValueError(f"{path} is not a Fisher diagonal: it does not say over how many samples")
            values = {name: file.get_tensor(name) for name in file.keys()}
        kind, sample = about.get("kind", "empirical"), about.get("sample", "sequence")
        return cls(values, json.loads(about["num_samples"]), kind, sample)


def fisher_diagonal(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFunction | None = None,
    kind: Kind = "empirical",
    params: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = False,
    name: str = "batches",
    sample: Sample = "sequence",
    dtype: torch.dtype | None = None,
    offload: bool = False,
) -> FisherDiagonal:
    """Mean over samples of the squared per-sample gradient, for every weight; exact at any batch size.

    The model is used as it is: no wrapping, no rewriting; ``.grad``, hooks, modes and the random state are as
    before, also after an exception. Ordinary weight gradients are not computed on the way. Runs under the caller's
    ``torch.autocast``; a compiled model runs uncompiled; ``torch.utils.checkpoint`` must have ``use_reentrant=False``,
    and spares less memory than usual, because what the layers inside are given is recorded.

    Args:
        model: any module; in eval mode where it has BatchNorm or dropout inside an unknown layer.
        batches: re-iterable of ``(inputs, targets)`` or of dicts with ``labels``; samples along the first axis.
        loss_fn: ``loss_fn(outputs, targets) -> Tensor[N]``, one loss per sample, or ``Tensor[N, T]`` for tokens;
            default cross-entropy of logits [N, C] or [N, C, T]; for Hugging Face's causal language models that of
            the next token, :func:`fastunlearn.language.causal_lm_loss`.
        kind: ``"empirical"`` uses the given targets, ``"monte_carlo"`` draws one label per sample from the
            softmax of the model's logits, ``"exact"`` weights the squares of every label by that softmax; of a
            causal language model one label per labelled token, each given the text before it.
        params: names to compute; default all that require grad.
        seed: of the drawn labels.
        progress: show a progress bar.
        name: what error messages call ``batches``.
        sample: ``"sequence"``: a sample is an index of the first axis. ``"token"``: a sample is a position [n, t], and
            its gradient is that of its own loss; positions with the label -100 are neither computed nor counted.
        dtype: ``torch.bfloat16`` keeps the sums in half of the memory, each batch's squares rounded at random so that
            the sum is right on average (:func:`fastunlearn.ops.add_rounded_`, drawn from ``seed``).
        offload: keep the sums in host memory; each layer's squares are copied there while the backward pass goes on.

    Returns:
        A :class:`FisherDiagonal`, float32 (float64 for float64 parameters, or ``dtype``), on the parameters' device,
        or in host memory if ``offload``; of parameters sharded by FSDP2, DTensors sharded alike (local tensors if
        ``offload``).

    On several ranks (a model in DistributedDataParallel, or sharded by ``fully_shard``), every rank calls this with its
    own share of the samples, see :func:`fastunlearn.deal`; shares may differ in length and be empty. A rank adds up the
    squares of its own shard alone: after each batch, layer by layer, it is sent those that the others found. Replicas
    hold a batch's squares as whole weights besides. Shards take kernels alone, weights that all ranks use in every
    batch, and no ``sample="token"``. What is wrong with one rank's samples is raised there; the others then end with
    the error of their backend, or wait for its timeout where nothing like torchrun ends them.

    Raises:
        TypeError: ``batches`` can be read only once, or the model returns integers.
        ValueError: no batch, a loss that is not one per sample, NaN weights, batch statistics in BatchNorm, samples
            whose loss depends on their company (the last sample of the first batch of several is compared with itself
            alone, unless the model draws random numbers), reentrant checkpoints, unknown names in ``params``, logits
            that are not [N, C, ...] where labels are drawn or weighted, no labelled position, complex parameters, hooks
            on parameters or on all modules, an Embedding with max_norm, inputs written over in place, uses of
            parameters that change from pass to pass, or a parameter whose samples can not be told apart.

    Taken on trust: where a weight is used several times in a forward pass, entry n of the axis that grows with the
    batch is sample n in each use. A model that sorts or flips its batch between two uses of a layer is not noticed, nor
    one that picks rows across samples and happens to pick as many as there are samples.

    Cost: one forward and one backward pass without weight gradients, and 2 N T FLOPs per weight in the kernels;
    ``kind="exact"`` takes one backward pass per class, ``sample="token"`` one per position, both C x T, over one graph.
    Memory over that of a backward pass: one float32 number per weight. One sample more is run forward to begin with;
    parameters without a rule take a few more to decide what to do with them: broadcast ones cost nothing then,
    others one more forward and backward pass of their module per sample (with one warning) or, where they are few, for
    all samples together. Source: the diagonal used by DeepClean, Shi et al. 2024; see also Kunstner et al. 2019 on what
    "empirical" means.
    """
    for given, choices, what in ((kind, Kind, "kind"), (sample, Sample, "sample")):
        if given not in get_args(choices):
            raise ValueError(f"{what} must be one of {get_args(choices)}, got {given!r}")
    require_separable(model)
    require_finite(model)
    if torch.nn.modules.module._global_forward_hooks:
        raise ValueError("forward hooks of all modules are registered, and may change what layers return; remove them")
    if dtype not in (None, torch.bfloat16):
        raise ValueError(f"dtype must be torch.bfloat16 or None, got {dtype}")
    device = device_of(model)
    ranks = sharing(model)
    model = unwrapped(model)
    with eager(), preserved(model), torch.enable_grad():
        targets = _select(model, params)
        chosen = {id(p) for p in targets.values()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
        sums = Sums(targets, ranks, dtype, seed, offload)
        work = _Work(model, loss_fn, kind, sample, seed, sums, _autocast(device), ranks)
        for batch, counts in track(together(batches, name, device, ranks), f"Fisher diagonal, {name}", progress):
            work.add(batch, counts)
            reshard(model)
    samples = sum(ranks.gather(work.samples))
    if not samples:
        raise ValueError(f"{name} has no position with a label other than {IGNORED}")
    return FisherDiagonal(sums.mean(samples), samples, kind, sample)


def fisher_plan(model: nn.Module, batches: Batches, loss_fn: LossFunction | None = None) -> dict[str, str]:
    """How :func:`fisher_diagonal` would take each parameter's squares, in words, from the first batch alone.

    For every parameter that requires grad: the rule of its layers, one copy per sample, all samples together or one by
    one inside a module, or that the loss does not depend on it. The model is left as it was; errors and cost are those
    of :func:`fisher_diagonal` on one batch, of every rank its own; replicas may plan differently.
    """
    require_separable(model)
    require_finite(model)
    device, ranks = device_of(model), sharing(model)
    model = unwrapped(model)
    with eager(), preserved(model), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is slow is in the answer
        targets = _select(model, None)
        work = _Work(model, loss_fn, "empirical", "sequence", 0, Sums(targets, ranks), _autocast(device), ranks)
        work.add(*next(together(batches, "batches", device, ranks)))
    plan = work.plan
    assert plan is not None  # add() raises where there is none
    ways = {name: "the loss does not depend on it" for name in targets}
    ways |= {name: f"kernel, {' and '.join(sorted({type(u.module).__name__ for u, _ in uses}))}"
             for name, uses in plan.rules.items()}  # fmt: skip
    ways |= dict.fromkeys(plan.bare, "one copy per sample")
    for fallback in plan.fallbacks.values():
        how = "all samples together" if fallback.batched else "one sample after another"
        ways |= dict.fromkeys(fallback.names, f"{how}, on {fallback.unit.label}")
    return ways


def _placed_like(ours: Tensor, theirs: Tensor) -> Tensor:
    """On the same device, in the same dtype, in the same shards."""
    theirs = theirs.to(ours.device, ours.dtype)
    if isinstance(ours, DTensor) and not isinstance(theirs, DTensor):
        return distribute_tensor(theirs, ours.device_mesh, ours.placements, src_data_rank=None)
    return theirs.full_tensor() if isinstance(theirs, DTensor) and not isinstance(ours, DTensor) else theirs


def _select(model: nn.Module, params: Sequence[str] | None) -> dict[str, nn.Parameter]:
    named = dict(model.named_parameters())
    if params is None:
        chosen = {name: p for name, p in named.items() if p.requires_grad}
    else:
        unknown = sorted(set(params) - set(named))
        if unknown:
            raise ValueError(f"params names {unknown}, which the model does not have; it has {sorted(named)}")
        chosen = {name: named[name] for name in params}
    for name, parameter in chosen.items():
        if parameter.is_complex():
            raise ValueError(f"{name} is complex; the squares of real parameters alone are defined here")
        if parameter._backward_hooks:
            raise ValueError(f"{name} has hooks that change its gradient; remove them, or pass params= without it")
    return chosen


def _autocast(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """The caller's autocast, without its cache: a cached cast made elsewhere may be cut from its weight, and one
    shared by several uses would count as a single use."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext
    dtype = torch.get_autocast_dtype(device.type)
    return lambda: torch.autocast(device.type, dtype, cache_enabled=False)


_UNSTEADY = (
    "the model uses its parameters differently for one sample, two samples and a batch, or from pass to pass, so their "
    "uses can not be told apart; pass params= without those used conditionally"
)


class _Work:
    """The sums, and everything that is the same for all batches."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction | None,
        kind: Kind,
        sample: Sample,
        seed: int,
        sums: Sums,
        autocast: Callable[[], AbstractContextManager[Any]],
        ranks: Ranks,
    ) -> None:
        loss_fn = loss_for(model, loss_fn, sample == "token")
        self.model, self.loss_fn, self.kind, self.sample, self.seed = model, loss_fn, kind, sample, seed
        self.targets, self.sums, self.autocast, self.ranks = sums.parameters, sums, autocast, ranks
        self.device = device_of(model)
        if sums.sharded and (sample == "token" or (kind == "exact" and is_next_token_loss(self.loss_fn))):
            raise ValueError(
                f"kind={kind!r} with sample={sample!r} takes a backward pass for every position, and the ranks of a "
                "sharded model must take as many; use DistributedDataParallel"
            )
        self.generator = torch.Generator(self.device)
        self.samples = 0
        self.batches = 0  # of all ranks, of which this one is at number ``batches + rank``
        self.aliases = Aliases(model) if sums.sharded else None
        self.plan: Plan | None = None
        self.compared = False  # a sample's loss alone with its loss in company
        self.warned: set[str] = set()

    def loss(self, outputs: Any, targets: Any, size: int) -> Tensor:
        """[N], or [N, T] for tokens."""
        measure = per_sample_loss if self.sample == "sequence" else per_position_loss
        return measure(self.loss_fn, outputs, targets, size)

    def losses_of(self, batch: Batch) -> Tensor:
        with self.autocast():
            return self.loss(batch.outputs(self.model), batch.targets, batch.size)

    def add(self, batch: Batch, counts: bool = True) -> None:
        """Add the batch's squares, or, of one that does not count, take part in what the ranks do together."""
        before, self.sums.counts = self.samples, counts
        if self.sums.sharded:
            self._add_sharded(batch)
        else:
            self._add_planned(batch)
        self.batches += self.ranks.size
        if not counts:
            self.samples = before
        self.sums.flush()

    def _add_sharded(self, batch: Batch) -> None:
        """Every pass is a collective, so all ranks plan alike, and no layer is ever run by itself."""
        one = None
        if self.plan is None:
            owners = ruled_owners(dict(self.model.named_modules()))  # before a pass leaves weights gathered
            one = probe(self.model, self.losses_of, batch, self.device, self.aliases)
            self.plan = sharded_plan(
                self.model, self.losses_of, batch, one, owners, self.targets, self.autocast, self.aliases
            )
        if self._add(batch, list(self.plan.units), self.plan, one) is None:
            raise ValueError(_UNSTEADY)

    def _add_planned(self, batch: Batch) -> None:
        """Plan if this is the first batch or one that the plan does not fit, then add the batch's squares."""
        alone = not self.compared and batch.size > 1
        one = probe(self.model, self.losses_of, batch, self.device) if alone or self.plan is None else None
        self.compared |= alone
        if self.plan is not None and self._add(batch, list(self.plan.units), self.plan, one):
            return
        one = one or probe(self.model, self.losses_of, batch, self.device)
        owners = ruled_owners(dict(self.model.named_modules()))
        ruled = owners_with_rules(one, owners, self.targets) if batch.size > 1 else None
        if ruled is not None:
            # The batch itself shows where the samples lie, so that one forward pass serves both.
            modules = list({module: None for found in ruled.values() for _, module, _ in found})
            self.plan = self._add(batch, modules, partial(plan_of_rules, one, ruled, self.targets, batch.size), one)
            if self.plan is not None:
                return
        ways: tuple[Ways, ...] = ("all", "originals", "root")
        for way in ways:
            plan = full_plan(self.model, self.losses_of, batch, one, owners, self.targets, self.autocast, way)
            self.plan = self._add(batch, list(plan.units), plan, one)
            if self.plan is not None:
                return self._warn(self.plan)
        raise ValueError(_UNSTEADY)

    def _warn(self, plan: Plan) -> None:
        slow = [label for label in plan.slow() if label not in self.warned]
        if slow:
            self.warned.update(slow)
            text = f"no kernel for {', '.join(slow)}: differentiated sample by sample, exact but slower"
            warnings.warn(text, stacklevel=4)

    def _add(
        self,
        batch: Batch,
        modules: Sequence[nn.Module],
        plan: Plan | Callable[[Observed], Plan | None],
        one: Probe | None = None,
    ) -> Plan | None:
        """Add one batch's squares; returns the plan, or None with nothing added where the batch does not fit it."""
        # Here: labels are those of the batch however many plans are tried, which depends on the number of ranks.
        self.generator.manual_seed(derived_seed(self.seed, self.batches + self.ranks.rank))
        with ExitStack() as stack:
            taps, substitution = Taps(self.aliases), Substitution()
            stack.callback(taps.close)
            squares = _Squares(self.sums, batch.size, self._running_again(substitution))
            if isinstance(plan, Plan):
                # Until the backward pass is over, for checkpoints run layers again.
                stack.callback(substitution.originals)
                for bare in plan.bare.values():
                    value = spread(self.targets[bare.name], batch.size, bare.form)
                    taps.add(value, partial(squares.take, bare.name))
                    substitution.attribute(bare.module, bare.local, value)
            records: dict[nn.Module, list[Record]] = {module: [] for module in modules}

            def on_call(call: Call) -> None:
                if self.aliases is not None:
                    self.aliases.see(call.module)
                records[call.module].append(Record.of(call, True, taps, squares.arrived))

            with recording(modules, on_call), self.autocast():
                for unit in plan.units.values() if isinstance(plan, Plan) else ():
                    if unit.spread is not None:  # ahead of what records
                        per_sample = partial(spread, samples=batch.size, form=unit.spread)
                        stack.callback(substitution.output(unit.module, per_sample))
                try:
                    outputs = batch.outputs(self.model)
                    if isinstance(plan, Plan) and plan.copies:
                        self.loss(outputs, batch.targets, batch.size)
                except Exception:
                    if isinstance(plan, Plan) and plan.copies:
                        return None  # made for values without samples, whatever it says of those with them
                    raise
                if one is not None:
                    with torch.no_grad():
                        require_independent(one, self.loss(outputs, batch.targets, batch.size), batch)
                passes = self._passes(outputs, batch)
            del outputs  # so that the backward pass can free it
            fitting: Plan | None = None
            samples = 0
            for total, counted, last in passes:
                observed = Observed(records, taps.survey(total))
                first = fitting is None
                fitting = fitting or (plan if isinstance(plan, Plan) else plan(observed))
                if fitting is None or not fitting.fits(observed, batch.size):
                    if first:
                        return None
                    raise ValueError(_UNSTEADY)
                squares.expect(fitting, observed, last)
                if observed.survey.frontier:
                    with self._outside_autocast():
                        taps.backward(total, observed.survey.frontier, retain_graph=not last)
                squares.finish()
                samples += counted
            self.samples += samples
            return fitting or (plan if isinstance(plan, Plan) else self.plan)

    def _running_again(self, substitution: Substitution) -> Callable[[], AbstractContextManager[Any]]:
        @contextmanager
        def context() -> Iterator[None]:
            with substitution.paused(), self.autocast():
                yield

        return context

    def _outside_autocast(self) -> AbstractContextManager[Any]:
        """Backward passes have their types from the forward pass."""
        active = torch.is_autocast_enabled(self.device.type)
        return torch.autocast(self.device.type, enabled=False) if active else nullcontext()

    def _passes(self, outputs: Any, batch: Batch) -> Iterator[tuple[Tensor, int, bool]]:
        """The backward passes of a batch: what to differentiate, how many samples it completes, whether it is the
        last. In each, every sample of the batch has one gradient."""
        if is_next_token_loss(self.loss_fn):
            return fisher_passes(outputs, batch.targets, self.kind, self.sample, self.generator, self.autocast)
        return self._classifier_passes(outputs, batch)

    def _classifier_passes(self, outputs: Any, batch: Batch) -> Iterator[tuple[Tensor, int, bool]]:
        labels: list[tuple[Any, Tensor | None]]
        if self.kind == "empirical":
            labels = [(batch.targets, None)]
        elif self.kind == "monte_carlo":
            labels = [(_draw_labels(self._logits(outputs), batch.targets, self.generator), None)]
        else:
            probabilities = _softmax(self._logits(outputs))
            # The square of sqrt(p) times a gradient is p times its square.
            labels = [
                (_labels_like(probabilities, batch.targets, c), probabilities[:, c].sqrt())
                for c in range(probabilities.shape[1])
            ]
        for i, (targets, weights) in enumerate(labels):
            with self.autocast():
                losses = self.loss(outputs, targets, batch.size)
            if weights is not None:
                losses = losses * weights.to(losses.dtype).reshape(losses.shape)
            final = i == len(labels) - 1
            if final:
                del outputs
            if self.sample == "sequence":
                total = losses.sum()
                del losses
                yield total, batch.size if final else 0, final
                continue
            counts = labelled_positions(batch.targets, losses)
            positions = counts.any(0).nonzero().flatten().tolist()
            for t in positions:
                total = losses[:, t][counts[:, t]].sum()
                yield total, int(counts[:, t].sum()) if final else 0, final and t == positions[-1]

    def _logits(self, outputs: Any) -> Tensor:
        """Logits [N, C], or [N, C, ...] for tokens."""
        shape = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        wanted = "[N, C]" if self.sample == "sequence" else "[N, C, T]"
        if isinstance(outputs, Tensor) and outputs.is_floating_point():
            if outputs.dim() == 2 if self.sample == "sequence" else outputs.dim() > 2:
                return outputs.detach()
        what = "draws labels from" if self.kind == "monte_carlo" else "weights the labels by the softmax of"
        raise ValueError(f"kind={self.kind!r} {what} logits {wanted}, but the model returns {shape}")


def _softmax(logits: Tensor) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()).softmax(1)


def _labels_like(probabilities: Tensor, targets: Any, label: int) -> Tensor:
    """The label ``label`` everywhere, shape [N, ...], except where the given one is ignored."""
    labels = torch.full_like(probabilities[:, 0], label, dtype=torch.int64)
    return _keep_ignored(labels, targets)


def _draw_labels(logits: Tensor, targets: Any, generator: torch.Generator) -> Tensor:
    """One label per sample and position from the softmax of logits [N, C, ...], shape [N, ...]."""
    rows = _softmax(logits).movedim(1, -1)
    drawn = torch.multinomial(rows.flatten(0, -2), 1, generator=generator)
    return _keep_ignored(drawn.reshape(rows.shape[:-1]), targets)


def _keep_ignored(labels: Tensor, targets: Any) -> Tensor:
    alike = isinstance(targets, Tensor) and not targets.is_floating_point() and targets.shape == labels.shape
    return labels.masked_fill(targets == IGNORED, IGNORED) if alike and labels.dim() > 1 else labels


class _Squares:
    """What becomes of the gradients of one batch as they arrive: squares in the sums, and nothing else."""

    def __init__(self, sums: Sums, samples: int, context: Callable[[], AbstractContextManager[Any]]) -> None:
        self.sums, self.samples, self.context = sums, samples, context

    def expect(self, plan: Plan, observed: Observed, last: bool) -> None:
        """Prepare for a backward pass; ``last`` lets go of everything as soon as it is used."""
        self.plan, self.units, self.last = plan, plan.units, last
        reached = observed.survey.reached
        self.records = [r for m in self.units for r in observed.records[m]]
        self.order = {id(record): i for i, record in enumerate(self.records)}
        for record in self.records:
            record.grads = [None] * len(record.keys)
            record.missing = sum(key in reached for key in record.keys)
        self.names: dict[nn.Module, list[tuple[str, str]]] = defaultdict(list)
        self.uses: dict[str, list[tuple[int, Use]]] = defaultdict(list)
        self.calls: Counter[str] = Counter()  # uses still to come
        for name, users in plan.rules.items():
            for unit, local in users:
                self.names[unit.module].append((local, name))
                self.calls[name] += observed.reached(unit.module)
        self.fallbacks = {f.unit.module: f for f in plan.fallbacks.values()}
        self.again: dict[nn.Module, list[Record]] = defaultdict(list)
        self.runs = Counter({m: sum(r.missing > 0 for r in observed.records[m]) for m in self.fallbacks})

    def take(self, name: str, grad: Tensor) -> None:
        """The gradient of a parameter with one copy per sample."""
        with torch.no_grad(), self._into(name) as region:
            add_squares(region, grad)

    def arrived(self, record: Record) -> None:
        """All gradients of a call are there."""
        assert record.call is not None
        module = record.call.module
        unit = self.units.get(module)
        if unit is None:
            return  # called, but not for a parameter that is asked for
        record.require_unwritten(unit)
        if module in self.names and any(grad is not None for grad in record.grads):
            with torch.no_grad():
                self._use(unit, record)
        if module in self.fallbacks:
            self.again[module].append(record)
            self.runs[module] -= 1
            if not self.runs[module]:
                self._run_again(module)
        elif self.last:
            record.call, record.grads = None, []

    def _use(self, unit: Unit, record: Record) -> None:
        rule, call = rule_of(unit.module), record.call
        assert rule is not None and call is not None  # the plan gave it one
        axes = (unit.input_axes, unit.output_axes)
        if unit.spread is not None:
            per_sample = partial(spread, samples=self.samples, form=unit.spread)
            args, kwargs = map_tensors((call.args, call.kwargs), unit.input_axes, lambda t, _: per_sample(t))
            call = replace(call, args=args, kwargs=kwargs)
        grads = tuple(record.grads)
        parallel = is_parallel(call, grads)
        uses = {} if parallel else rule(unit.module, Seen(call, *axes, grads))
        for local, name in self.names[unit.module]:
            if parallel:
                here, theirs = on_this_rank(unit.module, local, call, grads)
                seen = Seen(here, *axes, theirs)
                use = looked_up_here(rule(unit.module, seen)[local], self.plan.parameters[name])
            else:
                use = uses[local]
            self.uses[name].append((self.order[id(record)], use))
            self.calls[name] -= 1
            if not self.calls[name]:
                self._square(name)

    def _square(self, name: str) -> None:
        # Gradients arrive from the last call to the first; rules are given the first call first.
        uses = sorted(self.uses.pop(name), key=lambda pair: pair[0])
        with self._into(name) as region:
            for use in joined([use for _, use in uses]):
                use.add_to(region)

    @contextmanager
    def _into(self, name: str) -> Iterator[Tensor]:
        """What to add the squares of a parameter to; they are all there when the block ends."""
        region = self.sums.region(name)
        yield region
        self.sums.complete(name, region)

    def _run_again(self, module: nn.Module) -> None:
        fallback, records = self.fallbacks[module], self.again.pop(module)
        with ExitStack() as stack:
            regions = [stack.enter_context(self._into(name)) for name in fallback.names]
            parameters = list(zip((self.plan.parameters[n] for n in fallback.names), regions, strict=True))
            fallback.add(records, parameters, self.samples, self.context)
        if self.last:
            for record in records:
                record.call, record.grads = None, []

    def finish(self) -> None:
        """Use what still waits for gradients that autograd found to be zero and never sent."""
        for record in self.records:
            if record.missing > 0 and any(g is not None for g in record.grads):
                self.arrived(record)
        with torch.no_grad():
            for name in list(self.uses):
                self._square(name)
        for module in list(self.again):
            self._run_again(module)
