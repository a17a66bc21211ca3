"""DeepClean: reset the weights that matter more to the forgotten data than to the retained, fine-tune only those.

Shi, Gourgoulias, Buford, Moran, Ghalyan: DeepClean, ECCV Workshops 2024 (arXiv 2311.10448).
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase

from fastunlearn import ops
from fastunlearn.data import Batches, LossFunction, read
from fastunlearn.evaluate import Metrics, evaluate, predict
from fastunlearn.fisher import Kind
from fastunlearn.hooks import device_of, preserved, restored, restored_on_error
from fastunlearn.methods.baselines import initialise
from fastunlearn.methods.explanation import Explanation, LayerShare, Sweep, SweepPoint
from fastunlearn.methods.importance import (
    Importances,
    Protected,
    candidates,
    check_protect,
    check_samples,
    measure,
    protected_names,
)
from fastunlearn.methods.training import autocast_to, count_steps, descend
from fastunlearn.optim import MaskedAdamW, MaskedSGD
from fastunlearn.outcome import Outcome
from fastunlearn.parallel.ranks import local, sharing, unwrapped

DEFAULT_FRACTION = 0.3
Reset = Literal["zero", "mean", "init"]
OptimizerName = Literal["sgd", "adamw"]


@dataclass(frozen=True)
class Choices:
    """Weights chosen to be reset; of sharded parameters this rank's part, but for the counts.

    Attributes:
        masks: per parameter the chosen weights as bits, see :func:`ops.threshold_reset_`.
        values: what they are reset to, one after the other.
        counts: how many they are, of all ranks.
        gammas: what their ratios passed.
        histogram: of all ratios, int64 [2041]; empty before anything was chosen.
    """

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    gammas: dict[str, float] = field(default_factory=dict)
    histogram: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))

    def __add__(self, other: Choices) -> Choices:
        """Of two sets of parameters."""
        return Choices(
            self.parameters | other.parameters, self.masks | other.masks, self.values | other.values,
            self.counts | other.counts, self.gammas | other.gammas,
            self.histogram.to(other.histogram) + other.histogram,
        )  # fmt: skip

    def report(self, per_layer: bool) -> float | dict[str, float]:
        """Gamma, per parameter if each has its own."""
        return self.gammas if per_layer else next(iter(self.gammas.values()))

    @contextmanager
    def reset(self) -> Iterator[None]:
        """Write the values; if the block raises anything at all, the old ones again."""
        before: dict[str, Tensor] = {}
        try:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    weight = local(parameter.data)
                    bits = ops.unpack_mask(self.masks[name], weight.shape)
                    before[name] = weight[bits]
                    weight[bits] = self.values[name]
            yield
        except BaseException:
            with torch.no_grad():
                for name, old in before.items():
                    weight = local(self.parameters[name].data)
                    weight[ops.unpack_mask(self.masks[name], weight.shape)] = old
            raise


def shares_of(parameters: dict[str, nn.Parameter], passes: int) -> Iterator[dict[str, nn.Parameter]]:
    """Neighbouring parameters in at most so many shares of about as many weights."""
    total, seen = sum(p.numel() for p in parameters.values()), 0
    shares: dict[int, dict[str, nn.Parameter]] = defaultdict(dict)
    for name, parameter in parameters.items():
        middle = seen + parameter.numel() // 2
        shares[min(passes - 1, middle * passes // max(total, 1))][name] = parameter
        seen += parameter.numel()
    yield from shares.values()


@dataclass(frozen=True)
class DeepClean:
    """Weights whose ratio of Fisher information forget / (retain + floor * mean of the tensor) passes gamma are reset
    and fine-tuned on retained data; all others keep every bit.

    Args:
        gamma: the threshold on the ratio; give this or ``fraction``.
        fraction: share of the live weights (those with any information on either set) to reset, from the largest
            ratio down; default 0.3 if neither is given. The paper names no value of gamma: search, see
            :meth:`sweep`.
        per_layer: ``fraction`` holds in each tensor by itself instead of over all together.
        floor: added to the retained information, in units of its mean over the tensor. Without it the largest
            ratios belong to nearly dead weights, whose information is near zero on both sides, and resetting them
            forgets nothing.
        reset: ``"zero"``, ``"mean"`` of the tensor, or ``"init"``, fresh values of ``reset_parameters``.
        protect: parameter names, or module types, never reset (and therefore frozen).
        finetune_epochs: passes over ``retain`` afterwards; 0 leaves the reset weights as they are.
        optimizer: ``"sgd"`` or ``"adamw"``, with state for the reset weights only.
        lr, momentum, weight_decay: of the optimizer (momentum of SGD alone; decay moves only reset weights).
        cosine: let the learning rate rise over the first twentieth of all steps and fall to zero along half a cosine.
        dropout: fine-tune in train mode but for BatchNorm and InstanceNorm, whose statistics are never touched.
        autocast: fine-tune, and measure in a sweep, under torch.autocast of torch.bfloat16; None for whatever context
            the caller has opened.
        patience: with a validation split, stop after so many epochs without a lower loss on it, and keep the best.
        fisher: ``"empirical"``, ``"monte_carlo"`` or ``"exact"``, see :func:`fastunlearn.fisher_diagonal`.
        fisher_samples: how many samples of ``retain`` are read for its information, rounded up to whole batches, the
            first of an iteration (shuffle them); None for all.
        loss_fn: one loss per sample; default cross-entropy, for causal language models that of the next token.
        seed: of Monte-Carlo labels, fresh values, dropout and the rounding of bfloat16 information.
        progress: show progress bars.
        fisher_dtype: torch.bfloat16 holds the information in half of the memory, see
            :func:`fastunlearn.fisher_diagonal`; None for float32.
        offload: hold the information in host memory.
        passes: read the data so many times, each for its share of the weights: the information of one share at a time
            is held, and masks of one bit a weight are kept of it. What is reset is what one pass would reset, so gamma
            must be given, or ``per_layer``.
    """

    gamma: float | None = None
    fraction: float | None = None
    per_layer: bool = False
    floor: float = 0.1
    reset: Reset = "zero"
    protect: tuple[Protected, ...] = ()
    finetune_epochs: int = 1
    optimizer: OptimizerName = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    cosine: bool = False
    dropout: bool = False
    autocast: torch.dtype | None = None
    patience: int | None = None
    fisher: Kind = "empirical"
    fisher_samples: int | None = None
    loss_fn: LossFunction | None = None
    seed: int = 0
    progress: bool = False
    fisher_dtype: torch.dtype | None = None
    offload: bool = False
    passes: int = 1

    def __post_init__(self) -> None:
        if self.gamma is not None and self.fraction is not None:
            raise ValueError("give gamma or fraction, not both")
        if self.gamma is not None and not (math.isfinite(self.gamma) and self.gamma > 0):
            raise ValueError(f"gamma must be a positive number, got {self.gamma}")
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise ValueError(f"fraction must lie between 0 and 1, got {self.fraction}")
        if self.per_layer and self.gamma is not None:
            raise ValueError("per_layer chooses a gamma for each tensor from fraction; give fraction, not gamma")
        if not (math.isfinite(self.floor) and self.floor >= 0) or self.finetune_epochs < 0:
            raise ValueError("floor and finetune_epochs must not be negative")
        if self.reset not in get_args(Reset):
            raise ValueError(f"reset must be one of {', '.join(get_args(Reset))}, got {self.reset!r}")
        if self.optimizer not in get_args(OptimizerName):
            raise ValueError(f"optimizer must be one of {', '.join(get_args(OptimizerName))}, got {self.optimizer!r}")
        check_samples(self.fisher_samples)
        check_protect(self.protect)
        for name, value in (("lr", self.lr), ("momentum", self.momentum), ("weight_decay", self.weight_decay)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number from 0 up, got {value}")
        if self.autocast not in (None, torch.bfloat16):
            raise ValueError(f"autocast must be torch.bfloat16 or None (gradients are not scaled), got {self.autocast}")
        if self.fisher_dtype not in (None, torch.bfloat16):
            raise ValueError(f"fisher_dtype must be torch.bfloat16 or None, got {self.fisher_dtype}")
        if self.passes < 1:
            raise ValueError(f"passes counts from 1, got {self.passes}")
        if self.passes > 1 and self.gamma is None and not self.per_layer:
            raise ValueError(
                "one gamma for a fraction of all weights needs the information of all at once; with passes above 1 "
                "give gamma, or per_layer=True"
            )
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience counts epochs from 1, got {self.patience}")

    def unlearn(self, model: nn.Module, forget: Batches, retain: Batches, validation: Batches | None = None) -> Outcome:
        """Make ``model`` forget, in place.

        Args:
            model: in eval mode if it has BatchNorm; weights that do not require grad are left alone.
            forget, retain: re-iterables of ``(inputs, targets)`` batches.
            validation: retained data held back from ``retain``, for ``patience``.

        Returns:
            An :class:`Outcome`; ``changed`` counts the reset weights per parameter. ``details``: ``gamma`` (one
            number, or per parameter with ``per_layer``), ``ratios`` (the filled bins of :func:`ops.ratio_histogram`, as
            [lower edge, weights]; the infinite left out), ``live`` (weights with any information), ``share_reset``
            (reset over live), ``epochs`` run and ``validation_loss`` after each.

        Raises:
            TypeError, ValueError: as :func:`fastunlearn.fisher_diagonal`, before any weight changes;
                FloatingPointError if fine-tuning diverges. Weights are put back whatever is raised, and when.

        On several ranks (DistributedDataParallel, FSDP2, tensor parallelism), every rank calls this with its own share
        of the samples. Information, masks and fine-tuning stay on the shards; what is selected is exact over all of
        them, because tables of counts are added up. With dealt batches (:func:`fastunlearn.deal`) masks are bit for bit
        those of one process.

        Cost: one Fisher pass over each set (``passes`` of them), five reads of the information, one launch per tensor
        for the reset, ``finetune_epochs`` passes over ``retain``, with ``cosine`` one more if it has no length; memory:
        the weights, two numbers per weight (per weight of a pass's share), three with ``reset="init"``, three copies of
        the largest tensor, a bit per weight, and three numbers (AdamW: four) per reset weight.
        """
        self._check_validation(validation)
        outcome = Outcome("DeepClean", self._settings())
        parameters = candidates(model, self.protect)
        fresh = self._fresh(model, parameters)
        with outcome.measured(device_of(model)):
            chosen = Choices()
            for share in shares_of(parameters, self.passes):
                importances = self._measure(outcome, model, forget, retain, share)
                with outcome.phase("reset"), torch.no_grad():
                    chosen += self._choose(importances, fresh)
                del importances
            self._clean(outcome, model, chosen, retain, validation)
        return outcome

    def sweep(
        self,
        model: nn.Module,
        forget: Batches,
        retain: Batches,
        *,
        gammas: Sequence[float] = (),
        fractions: Sequence[float] = (),
        test: Batches | None = None,
        reference: nn.Module | Metrics | None = None,
        retain_measured: Batches | None = None,
        validation: Batches | None = None,
    ) -> Sweep:
        """Unlearn at many thresholds from one pair of Fisher passes; the model is left as it was.

        Args:
            model, forget, retain, validation: as :meth:`unlearn`.
            gammas, fractions: the thresholds to try, in place of this object's own.
            test: never trained on; gives the membership attack, and without a reference the yardstick of forgetting.
            reference: retrained without ``forget``, the yardstick of everything, or its metrics on the same sets.
            retain_measured: what retained accuracy is measured on, default ``retain``.

        Returns:
            A :class:`Sweep` with one point per threshold: metrics, share reset, gaps and a warning where a point has
            forgotten too much: forget accuracy below the reference's (the test set's without one, so that to forget
            a class, give a reference or test samples of that class) by more than two standard errors, or an attack
            that tells forgotten from test samples the other way round.

        Raises ValueError without any threshold, or without ``test`` and ``reference``; else as :meth:`unlearn`.

        Cost: two Fisher passes; per threshold a reset, a fine-tuning and an evaluation; a copy of the weights.
        """
        self._check_validation(validation)
        if not gammas and not fractions:
            raise ValueError("nothing to sweep: give gammas= or fractions=")
        if test is None and reference is None:
            raise ValueError("how much is enough? give test=, reference= or both")
        settings = [replace(self, gamma=g, fraction=None) for g in gammas]
        settings += [replace(self, gamma=None, fraction=f) for f in fractions]
        parameters = candidates(model, self.protect)
        fresh = self._fresh(model, parameters)
        measured = retain if retain_measured is None else retain_measured
        sets: dict[str, Any] = {"forget": forget, "retain": measured, "test": test, "loss_fn": self.loss_fn}
        device = device_of(model)
        with autocast_to(device, self.autocast):
            yardstick = evaluate(reference, **sets) if isinstance(reference, nn.Module) else reference
            before = evaluate(model, reference=yardstick, **sets)
        passes = Outcome("DeepClean", self._settings())
        importances = self._measure(passes, model, forget, retain, parameters)
        own = sum(batch.size for raw in forget for batch in read([raw], "forget", device))  # of a rank perhaps none
        samples = sum(sharing(model).gather(own))
        points = []
        for setting in settings:
            outcome = Outcome("DeepClean", setting._settings())
            with restored(model, parameters.values()):
                setting._clean(outcome, model, setting._choose(importances, fresh), retain, validation)
                with autocast_to(device, self.autocast):
                    metrics = evaluate(model, reference=yardstick, **sets)
            points.append(SweepPoint.of(outcome, metrics, before, samples))
        return Sweep(before, points, sum(passes.seconds.values()))

    def explain(self, model: nn.Module, forget: Batches, retain: Batches) -> Explanation:
        """Which layers hold the forgotten data: the share of each that would be reset; nothing is changed.

        Errors as :meth:`unlearn`. Cost: its two Fisher passes, one launch and a copy of the weights.
        """
        outcome = Outcome("DeepClean", self._settings())
        importances = self._measure(outcome, model, forget, retain, candidates(model, self.protect))
        with torch.no_grad():  # which weights, whatever they would become
            chosen = replace(self, reset="zero")._choose(importances, None)
        histograms = importances.histogram(importances.floors(self.floor), per_tensor=True).cpu()
        layers = [
            LayerShare(name, p.numel(), int(histograms[i].sum()), chosen.counts[name], histograms[i])
            for i, (name, p) in enumerate(importances.parameters.items())
        ]
        return Explanation(chosen.report(self.per_layer), layers, ops.ratio_edges())

    def _measure(
        self,
        outcome: Outcome,
        model: nn.Module,
        forget: Batches,
        retain: Batches,
        parameters: dict[str, nn.Parameter],
    ) -> Importances:
        return measure(
            outcome, model, forget, retain, parameters, self.fisher, self.loss_fn, self.seed, self.progress,
                self.fisher_samples, self.fisher_dtype, self.offload,
        )  # fmt: skip

    def _threshold(self, importances: Importances) -> tuple[Tensor, Tensor]:
        """Gamma, one or one per tensor, and the floors, on the device."""
        floors = importances.floors(self.floor)
        if self.gamma is not None:
            return torch.tensor(self.gamma, dtype=torch.float32, device=floors.device), floors
        wanted = self.fraction if self.fraction is not None else DEFAULT_FRACTION
        gamma = importances.select_gamma(wanted, floors, self.per_layer)
        if not self.per_layer and not (math.isfinite(gamma) and gamma > 0):
            raise ValueError(
                f"the ratio below which {1 - wanted:.0%} of the live weights lie is {float(gamma)}: too few weights "
                "carry any information on the forgotten data; lower fraction or give gamma"
            )
        return gamma, floors

    def _choose(self, importances: Importances, fresh: dict[str, Tensor] | None) -> Choices:
        """What is to be reset, and to what; the weights are as they were."""
        gamma, floors = self._threshold(importances)
        gammas = gamma.expand(len(floors))
        apart = self.reset == "mean" and importances.holders.size > 1
        means = importances.means(importances.weights) if apart else None
        masks, values, counts = [], {}, []
        for i, (name, weight) in enumerate(zip(importances.parameters, importances.weights, strict=True)):
            copied = weight.clone()  # one tensor's at a time, and of information that is kept on the host
            forget, retain = importances.forget[i].to(weight.device), importances.retain[i].to(weight.device)
            init = None if fresh is None else [fresh[name]]
            mask, count = ops.threshold_reset_(
                [copied], [forget], [retain], gammas[i], self.reset, floors[i : i + 1], init,
                means=None if means is None else means[i : i + 1].nan_to_num(),
            )  # fmt: skip
            masks += mask
            counts.append(count[0])
            values[name] = copied[ops.unpack_mask(mask[0], weight.shape)]
        total = importances.total(torch.stack(counts))
        names = list(importances.parameters)
        return Choices(
            dict(importances.parameters), dict(zip(names, masks, strict=True)), values,
            dict(zip(names, total.tolist(), strict=True)), dict(zip(names, gammas.tolist(), strict=True)),
            importances.histogram(floors),
        )  # fmt: skip

    def _clean(
        self, outcome: Outcome, model: nn.Module, chosen: Choices, retain: Batches, validation: Batches | None
    ) -> None:
        """Reset and fine-tune; whatever is raised, the weights are put back."""
        resets = chosen.counts
        outcome.changed = {name: count for name, count in resets.items() if count}
        histogram = chosen.histogram
        live = int(histogram.sum())
        outcome.details = {
            "gamma": chosen.report(self.per_layer),
            "ratios": _filled_bins(histogram),
            "live": live,
            "share_reset": sum(resets.values()) / max(live, 1),
            "epochs": 0,
        }
        # What an exception has to put back: no other weight is written to.
        with restored_on_error(model, []), chosen.reset():
            with outcome.phase("finetune"):
                masks = {name: mask for name, mask in chosen.masks.items() if resets[name]}
                if masks and self.finetune_epochs:
                    self._finetune(outcome, model, chosen.parameters, masks, retain, validation)

    def _finetune(
        self,
        outcome: Outcome,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        masks: dict[str, Tensor],
        retain: Batches,
        validation: Batches | None,
    ) -> None:
        device = device_of(model)
        tuned = [parameters[name] for name in masks]
        optimizer: torch.optim.Optimizer
        if self.optimizer == "sgd":
            optimizer = MaskedSGD(tuned, list(masks.values()), self.lr, self.momentum, self.weight_decay)
        else:
            optimizer = MaskedAdamW(tuned, list(masks.values()), self.lr, weight_decay=self.weight_decay)
        schedule = None
        if self.cosine:
            steps = self.finetune_epochs * count_steps(model, retain)
            warm = max(1, steps // 20)  # the first steps after a reset are steep

            def factor(step: int) -> float:
                return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))

            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        best: list[Tensor] = []
        losses: list[float] = []

        def stop(epoch: int) -> bool:
            outcome.details["epochs"] = epoch
            if validation is None:
                return False
            losses.append(float(predict(model, validation, "validation", self.loss_fn)[1].mean()))
            outcome.details["validation_loss"] = losses
            lowest = losses.index(min(losses))
            if self.patience is not None and lowest == len(losses) - 1:
                best[:] = [local(p.detach()).clone() for p in tuned]
            return self.patience is not None and len(losses) - 1 - lowest >= self.patience

        with preserved(model):
            torch.manual_seed(self.seed + sharing(model).rank)  # so that ranks drop out other units
            model.train(self.dropout)
            for module in model.modules():
                if isinstance(module, _NormBase):
                    module.eval()
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for parameter in tuned:
                parameter.requires_grad_(True)
            with autocast_to(device, self.autocast):
                descend(
                    model, retain, "retain", optimizer, self.finetune_epochs, self.loss_fn, schedule,
                    after_epoch=stop, progress=self.progress,
                )  # fmt: skip
        with torch.no_grad():
            for parameter, kept in zip(tuned, best, strict=False):  # none were kept without patience
                local(parameter.data).copy_(kept)

    def _fresh(self, model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor] | None:
        """For ``reset="init"``: what a newly initialised model has in the same places."""
        if self.reset != "init":
            return None
        if any(isinstance(p, DTensor) for p in parameters.values()):
            raise ValueError(
                'reset="init" makes a whole model anew, which shards are there to avoid; use "zero" or "mean"'
            )
        other = copy.deepcopy(unwrapped(model))
        with preserved(model), torch.no_grad():
            torch.manual_seed(self.seed)
            initialise(other)
        named = dict(other.named_parameters())
        return {name: named[name].detach() for name in parameters}

    def _check_validation(self, validation: Batches | None) -> None:
        if self.patience is not None and validation is None:
            raise ValueError("patience needs a validation split: pass validation=")

    def _settings(self) -> dict[str, Any]:
        return {
            "gamma": self.gamma,
            "fraction": self.fraction if self.gamma is not None or self.fraction else DEFAULT_FRACTION,
            "per_layer": self.per_layer,
            "floor": self.floor,
            "reset": self.reset,
            "protect": protected_names(self.protect),
            "finetune_epochs": self.finetune_epochs,
            "optimizer": self.optimizer,
            "lr": self.lr,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "cosine": self.cosine,
            "dropout": self.dropout,
            "autocast": None if self.autocast is None else str(self.autocast),
            "patience": self.patience,
            "fisher": self.fisher,
            "fisher_samples": self.fisher_samples,
            "fisher_dtype": None if self.fisher_dtype is None else str(self.fisher_dtype),
            "offload": self.offload,
            "passes": self.passes,
            "seed": self.seed,
        }


def _filled_bins(histogram: Tensor) -> list[list[float]]:
    counts, edges = histogram.tolist(), ops.ratio_edges().tolist()
    return [[edge, count] for edge, count in zip(edges, counts, strict=True) if count and math.isfinite(edge)]
