"""Class forgetting by one projection per layer: gradient-free, a few hundred samples, seconds."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastunlearn.data import Batches, LossFunction, require_batches
from fastunlearn.evaluate import evaluate
from fastunlearn.hooks import device_of, require_finite, require_separable, restored
from fastunlearn.methods.subspace_report import AlphaPoint, AlphaSearch, LayerPlan, LayerSpectrum, Plan, Spectrum
from fastunlearn.outcome import Outcome
from fastunlearn.parallel.ranks import Ranks, everyone, reshard, sharing, unwrapped
from fastunlearn.parallel.weights import HeldWeight
from fastunlearn.slots import Slot, choose_layers, left_out, supported_layers
from fastunlearn.subspace import (
    BLOCK,
    POSITIONS,
    SOLVERS,
    Eigenpairs,
    GramAccumulator,
    Moments,
    Positions,
    Solver,
    batch_sizes,
    collect_grams,
    low_rank,
    moments_eigenpairs,
    rows_dtype,
)

Score = Callable[[nn.Module], Mapping[str, float]]
_OVERSAMPLE = 16  # of a sketch, beside its rank


@dataclass(frozen=True)
class ClassForgetting:
    """Remove the activation subspace of a class: W <- W - W (I - M_retain) M_forget, layer by layer.

    M_retain and M_forget are the spectral filters (:func:`fastunlearn.spectral_filter`) of each layer's
    inputs over the retain and the forget samples. Every Linear, convolution, Hugging Face Conv1D and projection of
    MultiheadAttention is updated once; biases, norm layers, embeddings and everything else stay. Source: Kodge, Saha
    & Roy, TMLR 2024 (arXiv 2312.00761). Its public settings (samples, alpha_retain, alpha_forget): CIFAR-10 VGG11-BN
    900, 100, 3; CIFAR-100 990, 1000, 30; ImageNet 999, 100, 10. They are not the best of every model: :meth:`search`
    from 0.25 to 1000.

    Several classes at once: put samples of all of them into ``forget``. One after another: call :meth:`unlearn` again,
    with the classes forgotten before left out of ``retain``, or they are protected.

    Text, by topic: ``forget`` holds texts on what is to be forgotten, ``retain`` texts on all that is to stay, in the
    same style, so that what the two share (grammar, common words) is protected. Batches are dicts, and rows where their
    "attention_mask" is 0 do not count. An output layer tied to the embedding is left alone, like the embedding. The
    first token of pretrained language models may hold most of a layer's energy (an attention sink, arXiv 2309.17453),
    which leaves the filter blind to the rest; ``positions="labelled"`` with labels of -100 leaves it out.

    Several ranks: every rank of a model in DistributedDataParallel or sharded by FSDP2's ``fully_shard`` calls the same
    method with its own share of the samples (:func:`fastunlearn.deal`), which may be empty; the ranks of tensor
    parallelism pass the same samples. Gram matrices are summed layer by layer, and each rank updates its own shards:
    the result is that of one process to rounding.

    Attributes:
        alpha_retain: > 0; larger protects more of what the retain samples use.
        alpha_forget: > 0; larger removes more of what the forget samples use.
        solver: "cholesky", "eigh" and "rsvd" of summed Gram matrices, "sketch" without any, or "auto", layer by
            layer: in n x n where there are fewer rows than columns, else Cholesky, which is exact at any alpha (the
            system's condition is at most max(alpha, 1 / alpha)); and a sketch where the Gram matrices do not fit
            ``memory_limit``, the smallest layers going first. What was used and why: ``details["solver"]``.
        max_patches: rows of input sampled per layer and set; None for all.
        layers: names of the layers to update; by default all whose weights require grad (an adapter's alone), or all
            where none does. An attention's name stands for its four projections ``.q``, ``.k``, ``.v``, ``.out_proj``,
            which may be named themselves.
        seed: of that sample, and of "rsvd" and "sketch".
        progress: show progress bars.
        rank: eigenpairs kept by "rsvd" and "sketch"; None for 4 alpha, at least 64. What lies outside is dropped, at
            an error in each filter of at most its gain there, which ``details["solver"]`` states (of a sketch an
            estimate of it, which may be several times too low where spectra fall slowly).
        memory_limit: bytes that "auto" may fill with Gram matrices; None for half of what the device has free when
            the run begins, of several ranks what the poorest has. State it where the choice must not depend on the
            machine.
        positions: which positions of a text give rows: "attended", or "labelled", those of them whose output is
            scored. Targets are then labels [N, T], -100 where there is none, as of a prompt; of a causal language model
            position t is scored by label t + 1, of any other by its own.
    """

    alpha_retain: float = 100.0
    alpha_forget: float = 3.0
    solver: Solver = "auto"
    max_patches: int | None = 10_000
    layers: Sequence[str] | None = None
    seed: int = 0
    progress: bool = False
    rank: int | None = None
    memory_limit: int | None = None
    positions: Positions = "attended"

    def __post_init__(self) -> None:
        _require_alphas("alpha_retain", [self.alpha_retain])
        _require_alphas("alpha_forget", [self.alpha_forget])
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {self.solver!r}")
        if self.max_patches is not None and self.max_patches < 1:
            raise ValueError(f"max_patches must be 1 or more, or None for no limit, got {self.max_patches}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be 1 or more, or None to follow alpha, got {self.rank}")
        if self.memory_limit is not None and self.memory_limit < 0:
            raise ValueError(f"memory_limit counts bytes from 0, got {self.memory_limit}")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions must be one of {', '.join(POSITIONS)}, got {self.positions!r}")

    def unlearn(self, model: nn.Module, forget: Batches, retain: Batches) -> Outcome:
        """Forget in place what only ``forget`` needs; the model runs in eval mode meanwhile, then as before.

        Args:
            model: any module; weights in float64, float32, bfloat16 or float16 (everything but its own forward pass
                is computed in float64).
            forget: re-iterable batches of the samples to forget; targets are used for ``positions="labelled"`` only.
            retain: re-iterable batches of samples to protect; about as many as in ``forget`` suffice.

        Returns:
            An :class:`~fastunlearn.outcome.Outcome`. ``details``: ``rows`` (per layer, input rows used of
            retain and forget), ``relative_change`` (per layer, norm of the update over norm of the weight; see
            :func:`fastunlearn.layer_change`), ``solver`` (per layer, which and why) and ``untouched`` (per layer left
            alone, the reason).

        Raises:
            TypeError: ``forget`` or ``retain`` cannot be iterated twice.
            ValueError: one of them is empty or malformed; the model has NaN or Inf in a weight or a layer's
                input, a BatchNorm in train mode, an unknown name in ``layers``; an update that is not finite.
            The model is untouched whenever this raises, also when its own forward pass does.

        Cost: a forward pass over both sets, per layer rows * d^2 + d^3 / 3 + 4 p d^2 multiply-adds in float64, one
        copy of the weights and two Gram matrices per layer; :meth:`plan` states the bytes. No d x d filter is formed.
        On several ranks the copy is one of the rank's own shards; a weight that is not cut along its output axis
        (Hugging Face's Conv1D, a grouped convolution, a row-parallel layer) is brought together for its update, one
        at a time.
        """
        inner = _require_ready(model, forget, retain)
        outcome = Outcome("ClassForgetting", asdict(self))
        with outcome.measured(device_of(inner)):
            uses, untouched = _updatable(inner, self.layers)
            plans = self._plans(uses, self._limit(model))
            with outcome.phase("gather"):
                retained, forgotten = self._collect(model, uses, plans, forget, retain)
            with outcome.phase("solve"), torch.no_grad():
                called = _called(uses, retained, forgotten, untouched)
                updates = [
                    self._solve(slots, plans[slots[0].name], retained[slots[0].name], forgotten[slots[0].name], outcome)
                    for slots in called
                ]
            with outcome.phase("write"), torch.no_grad():
                parameters = {id(p): key for key, p in inner.named_parameters()}  # a shared one under its first name
                for held, updated, changed in updates:
                    if changed:
                        key = parameters[id(held.slot.parameter)]
                        outcome.changed[key] = outcome.changed.get(key, 0) + changed
                    held.target.copy_(updated)
        for name in ("rows", "relative_change", "solver"):
            outcome.details.setdefault(name, {})
        outcome.details["untouched"] = untouched
        return outcome

    def plan(self, model: nn.Module, forget: Batches, retain: Batches) -> Plan:
        """What :meth:`unlearn` would hold in memory, layer by layer, before any row is read; ``print`` it.

        Of several ranks what this one would hold; all of them call it together.

        Raises as :meth:`unlearn` for malformed batches and unknown layers. Cost: one iteration over both sets, without
        running the model.
        """
        require_batches(forget, "forget")
        require_batches(retain, "retain")
        reshard(model)
        uses, untouched = _updatable(unwrapped(model), self.layers)
        limit, ranks = self._limit(model), sharing(model)
        plans = self._plans(uses, limit)
        share = 0
        if self.max_patches is not None:
            for batches, name in ((forget, "forget"), (retain, "retain")):
                sizes = [size for of_rank in batch_sizes(batches, name, ranks) for size in of_rank]
                share = max(share, -(-self.max_patches * max(sizes) // sum(sizes)))
        slots = [slot for group in uses for slot in group]
        sample = sum(slot.groups * share * slot.dim * rows_dtype(slot).itemsize for slot in slots)
        weights = sum(HeldWeight.of(group[0]).target.nbytes for group in uses)
        workspace = max((_workspace(slot, plans[slot.name]) for slot in slots), default=0)
        return Plan(list(plans.values()), sample, workspace, weights, limit, untouched)

    def search(
        self,
        model: nn.Module,
        forget: Batches,
        retain: Batches,
        alphas_retain: Sequence[float] = (1.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
        alphas_forget: Sequence[float] = (0.25, 1.0, 3.0, 10.0, 30.0, 100.0),
        *,
        forget_measured: Batches | None = None,
        retain_measured: Batches | None = None,
        test: Batches | None = None,
        loss_fn: LossFunction | None = None,
        score: Score | None = None,
    ) -> AlphaSearch:
        """Try every pair of alphas from one pass over the data and one eigendecomposition per layer and set.

        Args:
            model, forget, retain: as :meth:`unlearn`; the model is left as it was.
            alphas_retain, alphas_forget: the grid, in place of this object's own.
            forget_measured, retain_measured: held-back samples on which to measure; default ``forget``, ``retain``.
            test: one more set to measure on; no choice depends on it.
            loss_fn: of :func:`fastunlearn.evaluate`.
            score: what to measure instead, for models that :func:`fastunlearn.evaluate` does not fit: from a model to
                percentages, "forget" and "retain" among them. On several ranks all call it together; the numbers that
                count are those of each rank, so have them agree.

        Returns:
            An :class:`AlphaSearch` with one point per pair; its ``best()`` has the alphas to unlearn with.

        Raises:
            ValueError: an empty or bad grid, a score without "forget" and "retain"; TypeError, ValueError as
                :meth:`unlearn`.

        Cost: a forward pass over both sets; per layer two eigendecompositions (about 18 d^3, or n^3 for n < d) and
        p d^2 + d^3 once, p d^2 per alpha_retain and per point; an evaluation per point. Held: 3 d^2 + 4 p d numbers in
        float64 per layer. No filter is formed. Source: arXiv 2312.00761.
        """
        _require_alphas("alphas_retain", alphas_retain)
        _require_alphas("alphas_forget", alphas_forget)
        inner = _require_ready(model, forget, retain)
        measured = forget if forget_measured is None else forget_measured
        kept = retain if retain_measured is None else retain_measured

        def accuracies() -> dict[str, float]:
            if score is None:
                return evaluate(model, forget=measured, retain=kept, test=test, loss_fn=loss_fn).accuracy
            scores = dict(score(model))
            if not {"forget", "retain"} <= set(scores):
                raise ValueError(f"score must return 'forget' and 'retain' in percent, got {sorted(scores)}")
            return scores

        start = time.perf_counter()
        uses, untouched = _updatable(inner, self.layers)
        plans = self._plans(uses, self._limit(model), max(alphas_retain), max(alphas_forget))
        retained, forgotten = self._collect(model, uses, plans, forget, retain)
        called = _called(uses, retained, forgotten, untouched)
        with torch.no_grad():
            layers = []
            for slots in called:
                name, plan = slots[0].name, plans[slots[0].name]
                pairs = [
                    self._eigenpairs(moments.pop(name), plan, rank)
                    for moments, rank in zip((retained, forgotten), plan.ranks, strict=True)
                ]
                layers.append(_Projected.of(slots[0], *pairs))
        seconds = time.perf_counter() - start
        original = accuracies()
        points: list[AlphaPoint] = []
        norm = math.sqrt(sum(layer.squared_norm for layer in layers))
        with torch.no_grad(), restored(inner, [slots[0].parameter for slots in called]):
            for alpha_retain in alphas_retain:
                unprotected = [layer.unprotected(alpha_retain) for layer in layers]
                for alpha_forget in alphas_forget:
                    reshard(inner)  # as the measurement may have left it
                    squared = sum(
                        layer.write(part, alpha_forget) for layer, part in zip(layers, unprotected, strict=True)
                    )
                    change = math.sqrt(squared) / norm if norm else 0.0
                    points.append(AlphaPoint(alpha_retain, alpha_forget, accuracies(), change))
            reshard(inner)
        return AlphaSearch(original, points, seconds)

    def spectrum(self, model: nn.Module, forget: Batches, retain: Batches) -> Spectrum:
        """The spectra that the filters act on, layer by layer; nothing is changed.

        Errors as :meth:`unlearn`. Cost: its passes over the data and two eigendecompositions per layer.
        """
        inner = _require_ready(model, forget, retain)
        uses, untouched = _updatable(inner, self.layers)
        plans = self._plans(uses, self._limit(model))
        retained, forgotten = self._collect(model, uses, plans, forget, retain)
        found = []
        with torch.no_grad():
            for slots in _called(uses, retained, forgotten, untouched):
                name, plan = slots[0].name, plans[slots[0].name]
                ratios = [
                    self._eigenpairs(moments[name], plan, rank).ratios.cpu()
                    for moments, rank in zip((retained, forgotten), plan.ranks, strict=True)
                ]
                rows = (retained[name].rows_seen, forgotten[name].rows_seen)
                found.append(LayerSpectrum(name, slots[0].dim, rows, *ratios))
        return Spectrum(found, self.alpha_retain, self.alpha_forget)

    def _plans(
        self,
        uses: list[list[Slot]],
        limit: int | None,
        alpha_retain: float | None = None,
        alpha_forget: float | None = None,
    ) -> dict[str, LayerPlan]:
        """Per slot what is collected: "auto" gives Gram matrices to the smallest layers first, while they fit."""
        alphas = (alpha_retain or self.alpha_retain, alpha_forget or self.alpha_forget)
        plans: dict[str, LayerPlan] = {}
        filled = 0
        for group in sorted(uses, key=lambda group: sum(_gram_bytes(slot, self.max_patches) for slot in group)):
            exact = sum(_gram_bytes(slot, self.max_patches) for slot in group)
            sizes = [self.rank or low_rank(group[0].dim, alpha) for alpha in alphas]
            ranks = min(sizes[0], group[0].dim), min(sizes[1], group[0].dim)
            lean = sum(_sketch_bytes(slot, ranks) for slot in group)
            solver, reason = self.solver, "asked for"
            if solver == "auto":
                thin = self.max_patches is not None and self.max_patches < group[0].dim
                solver, reason = (
                    ("auto", f"{self.max_patches} rows at most") if thin else ("cholesky", "it fits in memory")
                )
                if limit is not None and filled + exact > limit and lean < exact:
                    solver = "sketch"
                    reason = (
                        f"Gram matrices of {group[0].dim} x {group[0].dim} would take {_mb(exact)} MB beside "
                        f"{_mb(filled)} MB of smaller layers; the limit is {_mb(limit)} MB"
                    )
                else:
                    if solver == "cholesky" and limit is not None and filled + exact > limit:
                        reason = f"over the limit of {_mb(limit)} MB, but a sketch would hold no less"
                    filled += exact
            for slot in group:
                held = _sketch_bytes(slot, ranks) if solver == "sketch" else _gram_bytes(slot, self.max_patches)
                plans[slot.name] = LayerPlan(
                    slot.name, slot.groups, slot.dim, self.max_patches, solver, reason, ranks, held
                )
        return {slot.name: plans[slot.name] for group in uses for slot in group}

    def _limit(self, model: nn.Module) -> int | None:
        """Bytes that "auto" may fill; no other solver has a choice to make."""
        if self.solver != "auto":
            return None
        if self.memory_limit is not None:
            return self.memory_limit
        return _half_of_free(device_of(model), everyone(model))

    def _collect(
        self, model: nn.Module, uses: list[list[Slot]], plans: dict[str, LayerPlan], forget: Batches, retain: Batches
    ) -> tuple[dict[str, Moments], dict[str, Moments]]:
        """Moments of both sets per weight, under its first slot's name: uses of a shared weight add up."""
        found = []
        for side, (batches, what) in enumerate(((retain, "retain"), (forget, "forget"))):
            sketched = {name: plan.ranks[side] for name, plan in plans.items() if plan.solver == "sketch"}
            moments = collect_grams(
                model, batches, list(plans), self.max_patches, self.seed, what, self.progress, sketched, self.positions
            )
            for first, *others in uses:
                for other in others:
                    moments[first.name].merge_(cast(Any, moments.pop(other.name)))  # uses of one weight are alike
            found.append(moments)
        return found[0], found[1]

    def _solve(
        self, slots: list[Slot], plan: LayerPlan, retain: Moments, forget: Moments, outcome: Outcome
    ) -> tuple[HeldWeight, Tensor, int]:
        """What this rank writes, checked to be finite, and where: in shape and dtype of the target; and how many
        entries of the weight change, of all ranks."""
        slot, held = slots[0], HeldWeight.of(slots[0])
        weight = held.matrix(torch.float64)
        try:
            kept, one = self._filter(retain, weight, self.alpha_retain, plan, plan.ranks[0])
            unprotected = kept.neg_().add_(weight)  # in place: W may be larger than all that was collected
            delta, other = self._filter(forget, unprotected, self.alpha_forget, plan, plan.ranks[1])
        except ValueError as error:
            raise ValueError(f"layer {slot.name}: {error}") from error
        del kept, unprotected
        norms = [math.sqrt(square) for square in held.squares(delta, weight)]
        change = norms[0] / max(norms[1], torch.finfo(weight.dtype).tiny)
        updated = held.portion(delta.neg_().add_(weight))
        wrong, changed = held.summed((~torch.isfinite(updated)).sum(), (updated != held.target).sum())
        if wrong:
            raise ValueError(f"the update of layer {slot.name} is not finite; no weight was changed")
        solver = one[0] if one[0] == other[0] else f"{one[0]} for retain, {other[0]} for forget"
        used = solver, one[1] if one == other else f"retain: {one[1]}; forget: {other[1]}"
        for name, value in (
            ("rows", (retain.rows_seen, forget.rows_seen)), ("relative_change", change), ("solver", used)
        ):  # fmt: skip
            outcome.details.setdefault(name, {})[slot.name] = value
        return held, updated, int(changed)

    def _filter(
        self, moments: Moments, weight: Tensor, alpha: float, plan: LayerPlan, rank: int
    ) -> tuple[Tensor, tuple[str, str]]:
        """weight @ M(alpha), and by which solver, why."""
        if plan.solver in ("rsvd", "sketch"):
            pairs = self._eigenpairs(moments, plan, rank)
            kept = pairs.values.shape[-1]
            bound = "at most" if plan.solver == "rsvd" else "by estimate"
            reason = (
                f"{plan.reason}; of {plan.dim} directions {kept} are kept, the filter's gain on any other is {bound} "
                f"{pairs.dropped_gain(alpha):.2g}"
            )
            return pairs.filter(weight, alpha), (plan.solver, reason)
        assert isinstance(moments, GramAccumulator)
        solver, reason = plan.solver, plan.reason
        if self.solver == "auto":
            thin = moments.rows_seen < plan.dim
            reason = (
                f"{moments.rows_seen} rows are fewer than {plan.dim} columns: solved in the rows' number"
                if thin
                else f"{plan.reason}; {plan.dim} x {plan.dim} is solved with condition {max(alpha, 1 / alpha):g} at "
                "most, in float64"
            )
            return moments.filter(weight, alpha, "auto"), ("rows" if thin else "cholesky", reason)
        return moments.filter(weight, alpha, solver), (solver, reason)

    def _eigenpairs(self, moments: Moments, plan: LayerPlan, rank: int) -> Eigenpairs:
        try:
            return moments_eigenpairs(moments, rank if plan.solver == "rsvd" else None, self.seed)
        except ValueError as error:
            raise ValueError(f"layer {plan.name}: {error}") from error


@dataclass(frozen=True)
class _Projected:
    """A layer of a search: W in the eigenvectors of both sets, so that no alpha needs another decomposition.

    delta = W (I - V_r g_r V_r^T) V_f g_f V_f^T = (Q - (P g_r) C) g_f V_f^T with P = W V_r, Q = W V_f, C = V_r^T V_f.
    """

    held: HeldWeight
    weight: Tensor  # [groups, p, d], float64, as it was
    retain: Eigenpairs
    forget: Eigenpairs
    on_retain: Tensor  # P [groups, p, k_r]
    on_forget: Tensor  # Q [groups, p, k_f]
    cross: Tensor  # C [groups, k_r, k_f]

    @classmethod
    def of(cls, slot: Slot, retain: Eigenpairs, forget: Eigenpairs) -> _Projected:
        held = HeldWeight.of(slot)
        weight = held.matrix(torch.float64).clone()
        p, q = weight @ retain.vectors, weight @ forget.vectors
        return cls(held, weight, retain, forget, p, q, retain.vectors.mT @ forget.vectors)

    @property
    def squared_norm(self) -> float:
        return self.held.squares(self.weight)[0]

    def unprotected(self, alpha_retain: float) -> Tensor:
        """W (I - M_retain) V_f, [groups, p, k_f]."""
        return self.on_forget - self.on_retain * self.retain.gain(alpha_retain)[:, None, :] @ self.cross

    def write(self, unprotected: Tensor, alpha_forget: float) -> float:
        """Put the update of this pair of alphas into the model; returns its squared norm."""
        delta = unprotected * self.forget.gain(alpha_forget)[:, None, :] @ self.forget.vectors.mT
        updated = self.held.portion(self.weight - delta)
        if self.held.summed((~torch.isfinite(updated)).sum())[0]:
            raise ValueError(f"the update of layer {self.held.slot.name} is not finite; the model was put back")
        self.held.target.copy_(updated)
        return self.held.squares(delta)[0]


def _require_alphas(name: str, alphas: Sequence[float]) -> None:
    if not alphas:
        raise ValueError(f"{name} must name at least one alpha")
    for alpha in alphas:
        if not 0 < alpha < float("inf"):
            raise ValueError(f"{name} must be a finite number above 0, got {alpha}")


def _require_ready(model: nn.Module, forget: Batches, retain: Batches) -> nn.Module:
    """The module whose layers are updated, its parameters as this rank holds them between forward passes."""
    require_batches(forget, "forget")
    require_batches(retain, "retain")
    reshard(model)
    inner = unwrapped(model)
    require_finite(model)
    require_separable(inner)
    return inner


def _gram_bytes(slot: Slot, rows: int | None) -> int:
    """At most held of both sets: rows while they are fewer than columns, then d x d in float64."""
    if rows is not None and rows < slot.dim:
        return 2 * slot.groups * rows * slot.dim * rows_dtype(slot).itemsize
    return 2 * slot.groups * slot.dim**2 * 8


def _sketch_bytes(slot: Slot, ranks: tuple[int, int]) -> int:
    """G Omega [groups, d, rank + oversample] and a trace per group, of both sets, float64; Omega is never stored."""
    return sum(8 * slot.groups * (slot.dim * min(rank + _OVERSAMPLE, slot.dim) + 1) for rank in ranks)


def _workspace(slot: Slot, plan: LayerPlan) -> int:
    """At most at once beside what is held: one block of rows, and the temporaries of one layer's solve."""
    d, weight = slot.dim, HeldWeight.of(slot).numel
    if plan.solver == "sketch":
        solve = 4 * slot.groups * d * (max(plan.ranks) + _OVERSAMPLE)
    elif plan.rows is not None and plan.rows < d and plan.solver in ("auto", "rsvd"):
        solve = slot.groups * (4 * plan.rows * d + 3 * plan.rows**2)
    else:
        solve = 6 * slot.groups * d**2
    block = BLOCK if plan.rows is None else min(BLOCK, plan.rows)
    return 8 * (solve + 6 * weight + 2 * slot.groups * block * d)


def _half_of_free(device: torch.device, ranks: Ranks) -> int | None:
    """Half of the bytes free on ``device`` now, of several ranks what the poorest has; None where no system says.

    Ranks on CPUs of one machine share its memory; devices are each rank's own.
    """
    owner = f"{socket.gethostname()} {'' if device.type == 'cpu' else ranks.rank}"
    found = ranks.gather((owner, _free(device)))
    owners = [name for name, _ in found]
    return min((free // 2 // owners.count(name) for name, free in found if free is not None), default=None)


def _free(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            sizes = dict(line.split(":") for line in lines)
        return int(sizes["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # nobody says how much is free
        except (ValueError, OSError, AttributeError):
            return None


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f}"


def _called(
    uses: list[list[Slot]], retained: Mapping[str, Moments], forgotten: Mapping[str, Moments], untouched: dict[str, str]
) -> list[list[Slot]]:
    """The weights that both sets have rows for; the others join ``untouched``."""
    found = []
    for slots in uses:
        name = slots[0].name
        missing = [
            what for what, moments in (("retain", retained), ("forget", forgotten)) if not moments[name].rows_seen
        ]
        if missing:
            # A zero Gram matrix would pass for "nothing to protect": no rows is no evidence, not evidence of none.
            reason = f"the forward pass over {' and '.join(missing)} never called it"
            untouched.update((slot.name, reason) for slot in slots)
        else:
            found.append(slots)
    return found


def _updatable(model: nn.Module, layers: Sequence[str] | None) -> tuple[list[list[Slot]], dict[str, str]]:
    """The chosen slots, those that share a weight together; and the ones to leave alone, with the reason.

    Gradients are not needed here, so a model whose weights are all frozen is taken whole; one with an adapter, or with
    a part that is trained, is changed there alone.
    """
    chosen = choose_layers(model, layers)
    partly = layers is None and any(p.requires_grad for p in model.parameters())
    untouched = left_out(model) if layers is None else {}
    users: dict[int, list[tuple[str, str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((f"{name}.{key}".lstrip("."), name, module))
    on: dict[str, list[Slot]] = {}
    for slot in supported_layers(model).values():
        on.setdefault(slot.key, []).append(slot)
    found: list[list[Slot]] = []
    done: set[tuple[int, tuple[str, int]]] = set()
    for slot in chosen.values():
        weight = id(slot.parameter), slot.layout
        if weight in done:
            continue
        done.add(weight)
        if partly and not slot.parameter.requires_grad:
            untouched[slot.name] = "it does not require grad, as others do; name it in layers= to change it"
            continue
        # Every use of a shared weight counts, also those in layers that were not named.
        shared = []
        foreign = []
        for key, name, module in users[id(slot.parameter)]:
            same = [other for other in on.get(key, []) if other.layout == slot.layout]
            shared += same
            if not same:
                foreign.append(f"{name} ({type(module).__name__})")
        if foreign:
            untouched[slot.name] = f"its weight is also used by {', '.join(foreign)}"
        else:
            found.append([slot, *(other for other in shared if other.name != slot.name)])
    return found, untouched
