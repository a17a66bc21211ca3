"""What a method holds in memory at its peak, stated before the run: phase by phase, for models of any size.

Nothing is run: passes go through a copy of the model whose tensors have shapes and no values, and every storage that
they allocate and free is counted. So a model may be on the meta device, and be larger than this machine.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastunlearn.data import Batch, per_sample_loss, read
from fastunlearn.fisher import _Work
from fastunlearn.hooks import eager, preserved
from fastunlearn.language import is_causal_lm, loss_for
from fastunlearn.methods.dampening import SelectiveSynapticDampening
from fastunlearn.methods.deepclean import DEFAULT_FRACTION, DeepClean, shares_of
from fastunlearn.methods.importance import candidates
from fastunlearn.methods.training import autocast_to
from fastunlearn.parallel.ranks import ALONE, unwrapped
from fastunlearn.planning import Plan, Probe, observing, sharded_plan
from fastunlearn.rules import rule_of, ruled_owners
from fastunlearn.sums import BUCKET_BYTES, Sums, zeros_dtype

Sharding = Literal["none", "ddp", "fsdp"]
Planned = DeepClean | SelectiveSynapticDampening

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Phase:
    """Bytes that are held at once on the device, at the worst moment of a phase.

    Attributes:
        name: as in :attr:`fastunlearn.Outcome.seconds`, with the pass where there are several.
        terms: what holds them -> bytes.
    """

    name: str
    terms: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.terms.values())


@dataclass(frozen=True)
class MemoryPlan:
    """Of each rank; ``print`` shows the table.

    Attributes:
        phases: in the order they run; of several passes over the data the one that takes most.
        host: bytes of host memory for information that is offloaded to it (of a model on a CPU: in the phases).
        ranks, sharding: as given.
    """

    phases: tuple[Phase, ...]
    host: int = 0
    ranks: int = 1
    sharding: Sharding = "none"

    @property
    def peak(self) -> int:
        """Bytes on the device, of the phase that takes most; without what its libraries hold by themselves."""
        return max(phase.total for phase in self.phases)

    @property
    def weights(self) -> int:
        """Bytes of it that the model takes before the run begins."""
        return min(phase.terms["weights"] for phase in self.phases)

    def __str__(self) -> str:
        names = list(dict.fromkeys(term for phase in self.phases for term in phase.terms))
        width = max(map(len, [*names, "MB on the device"]))
        columns = [max(len(phase.name), 12) for phase in self.phases]
        shared = "" if self.sharding == "none" else f" of each of {self.ranks} ranks ({self.sharding})"
        lines = [f"{self.peak / 1e6:,.1f} MB at the peak{shared}" + f", {self.host / 1e6:,.1f} MB of host memory"
                 * bool(self.host)]  # fmt: skip
        lines.append("  ".join([f"{'MB on the device':{width}}"]
                               + [f"{p.name:>{c}}" for p, c in zip(self.phases, columns, strict=True)]))  # fmt: skip
        for name in [*names, "total"]:
            held = [p.total if name == "total" else p.terms.get(name) for p in self.phases]
            cells = ["" if h is None else f"{h / 1e6:,.1f}" for h in held]
            lines.append("  ".join([f"{name:{width}}"] + [f"{c:>{w}}" for c, w in zip(cells, columns, strict=True)]))
        return "\n".join(lines)


def memory_plan(
    model: nn.Module,
    batch: Any,
    method: Planned,
    ranks: int = 1,
    sharding: Sharding = "none",
    device: torch.device | str | None = None,
    share: float | None = None,
) -> MemoryPlan:
    """What ``method.unlearn`` holds at its peak, on each rank.

    Args:
        model: plain, on any device; on ``torch.device("meta")`` it need not fit anywhere. It is not changed.
        batch: the largest there will be, of tensors on any device; or (samples, positions) for a causal language model.
        method: a :class:`fastunlearn.DeepClean` or :class:`fastunlearn.SelectiveSynapticDampening`.
        ranks: who share the samples.
        sharding: ``"ddp"``, ``"fsdp"`` (``fully_shard`` on every block of the model's longest ModuleList and on the
            model), ``"none"`` for a process alone.
        device: that the run is on, default the model's (a GPU for one on the meta device): on a CPU what is offloaded
            lies in the same memory.
        share: of the weights that are reset, which a ``gamma`` does not tell; default the method's ``fraction``, or
            0.3.

    Raises:
        TypeError: another method. ValueError: ranks and sharding that do not fit together, a model that is sharded
            already, parameters that no kernel has a rule for, ``fisher="exact"`` of a language model; malformed
            batches.

    What is counted: weights, in their dtype; information of both sets, in its dtype, of one pass's share of the
    weights; what autograd, recorded inputs and output gradients, and each layer's squares hold of a batch, by running
    the engine itself on tensors without values; masks, values, optimizer state and gradients of fine-tuning; copies of
    the largest tensor. Not counted: libraries and their workspaces, a GPU's context (about 0.5 GB), what its allocator
    loses between blocks, attention that runs in another way than torch's fused one, and what the data loader holds.

    Cost: two forward passes and, of every pass of the method, one forward and backward pass without values: about 1 ms
    an operation, seconds for a model of 8 B parameters; no memory to speak of.
    """
    if not isinstance(method, (DeepClean, SelectiveSynapticDampening)):
        raise TypeError(f"memory_plan knows DeepClean and SelectiveSynapticDampening, got {type(method).__name__}")
    if sharding not in get_args(Sharding) or ranks < 1 or (sharding == "none") != (ranks == 1):
        raise ValueError(
            f'sharding must be "ddp" or "fsdp" for 2 ranks or more and "none" for one, got {sharding!r} and {ranks}'
        )
    model = unwrapped(model)
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise ValueError('the model is sharded already; plan with the plain one (on the meta device), sharding="fsdp"')
    if method.fisher == "exact" and is_causal_lm(model):
        raise ValueError('fisher="exact" of a language model takes a pass per label and position; it is not planned')
    if device is None:
        device = next(model.parameters()).device
    on_cpu = torch.device(device).type == "cpu"
    if share is None:
        share = getattr(method, "fraction", None) or DEFAULT_FRACTION
    for module in model.modules():
        rule_of(module)  # tries unknown norms with values, once per class: before there are none
    with _without_values(model) as hollow, eager(), preserved(hollow), torch.enable_grad():
        run = _Run(hollow, _hollow_batch(batch), method, ranks, sharding, on_cpu, share)
        if isinstance(method, DeepClean):
            return MemoryPlan(tuple(run.deepclean(method)), run.host, ranks, sharding)
        return MemoryPlan(tuple(run.dampening()), run.host, ranks, sharding)


@contextmanager
def _without_values(model: nn.Module) -> Iterator[nn.Module]:
    """A copy whose parameters and buffers have shapes and dtypes alone; sharing is kept."""
    with FakeTensorMode():
        memo: dict[int, Any] = {}
        for parameter in model.parameters():
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for buffer in model.buffers():
            memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
        yield copy.deepcopy(model, memo)


def _hollow_batch(batch: Any) -> Any:
    if isinstance(batch, tuple) and len(batch) == 2 and all(isinstance(size, int) for size in batch):
        ids = torch.empty(batch, dtype=torch.int64)
        return {"input_ids": ids, "labels": torch.empty_like(ids)}
    return tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype), batch)


def _first(raw: Any, samples: int) -> Batch:
    """Of so many samples, of however many there are."""
    resized = tree_map_only(Tensor, lambda t: t.new_empty((samples, *t.shape[1:])), raw)
    return next(read([resized], "batch", _CPU))


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that are made while it is entered, until they are freed, by kind."""

    def __init__(self, before: Iterable[Tensor], logits: torch.Size) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.logits = logits
        self.known: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in before}
        self.held: Counter[str] = Counter()
        self.now = self.most = 0
        self.at_most: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        kind = "gradients and squares of layers" if torch._C._current_graph_task_id() != -1 else "kept of a batch"
        if tensor.shape == self.logits:
            kind = "logits and their gradient"
        size = storage.nbytes()
        self.known[key] = weakref.ref(storage, partial(self._gone, key, kind, size))
        self.held[kind] += size
        self.now += size
        if self.now > self.most:
            self.most, self.at_most = self.now, Counter(self.held)

    def _gone(self, key: int, kind: str, size: int, _: Any) -> None:
        del self.known[key]
        self.held[kind] -= size
        self.now -= size


class _HollowSums(Sums):
    """Holds of a batch's squares what :class:`Sums` does on one rank of several, and exchanges with nobody."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], way: str) -> None:
        super().__init__({}, ALONE)
        self.parameters, self.way = dict(parameters), way
        if way == "in place":
            self.held = {name: torch.empty(p.shape, dtype=zeros_dtype(p)) for name, p in parameters.items()}
        self.copied: deque[Tensor] = deque(maxlen=2)  # on their way to the host

    def region(self, name: str) -> Tensor:
        parameter = self.parameters[name]
        return self.held.get(name, torch.zeros(parameter.shape, dtype=zeros_dtype(parameter)))

    def complete(self, name: str, region: Tensor) -> None:
        if self.way == "copied":
            self.copied.append(region)
        if self.way in ("ddp", "fsdp"):
            self.waiting[name] = region
            if self.way == "fsdp" and sum(r.nbytes for r in self.waiting.values()) >= BUCKET_BYTES:
                self.flush()

    def flush(self) -> None:
        bucket: list[Tensor] = []
        for name in list(self.waiting):
            bucket.append(self.waiting.pop(name).reshape(-1))
            if sum(r.nbytes for r in bucket) >= BUCKET_BYTES or not self.waiting:
                sent = bucket[0] if len(bucket) == 1 else torch.cat(bucket)
                bucket = []
                torch.empty_like(sent)  # what is received


@dataclass
class _Run:
    """A model without values, and everything that is the same in all phases."""

    model: nn.Module
    raw: Any
    method: Planned
    ranks: int
    sharding: Sharding
    on_cpu: bool
    share: float
    host: int = 0
    _passes: dict[tuple[str, ...], Counter[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.batch = next(read([self.raw], "batch", _CPU))
        self.parameters = candidates(self.model, self.method.protect)
        everything = list(self.model.parameters())
        self.buffers = sum(b.nbytes for b in self.model.buffers())
        self.weights = self._held(p.nbytes for p in everything) + self.buffers
        with torch.no_grad():
            outputs = self.batch.outputs(self.model)
        self.logits = outputs.shape if isinstance(outputs, Tensor) else torch.Size()
        self.offload = bool(getattr(self.method, "offload", False))
        self.gathered = self._gathered() if self.sharding == "fsdp" else 0
        self.block = self._largest_block() if self.sharding == "fsdp" else 0

    # ---- the phases ----------------------------------------------------------------------------------------------

    def deepclean(self, method: DeepClean) -> Iterator[Phase]:
        width = {name: p.itemsize for name, p in self.parameters.items()}
        fresh = sum(p.nbytes for p in self.parameters.values()) if method.reset == "init" else 0
        masks = values = 0
        found: dict[str, list[Phase]] = {"fisher_forget": [], "fisher_retain": [], "reset": []}
        shares = list(shares_of(self.parameters, method.passes))
        for number, part in enumerate(shares, 1):
            sums, host = self._sums(part)
            self.host = max(self.host, 2 * host)
            base = {"weights": self.weights, "fresh weights": fresh, "masks": masks, "reset values": values}
            several = f" {number}/{len(shares)}" * (len(shares) > 1)
            for count, name in enumerate(("fisher_forget", "fisher_retain"), 1):
                held = {"information": count * sums, "gathered weights": self.gathered, **self._pass(part)}
                found[name].append(_phase(name + several, base | held))
            masks += self._held(p.numel() / 8 for p in part.values())
            values += self._held(self.share * p.nbytes for p in part.values())
            scratch = max(self._choosing(p, width[name]) for name, p in part.items())
            found["reset"].append(
                _phase("reset" + several, base | {
                    "masks": masks, "reset values": values, "information": 2 * sums,
                    "copies of the largest tensor": scratch,
                })
            )  # fmt: skip
        for phases in found.values():
            yield max(phases, key=lambda phase: phase.total)
        if method.finetune_epochs:
            yield self._finetune(method, masks, values)

    def dampening(self) -> Iterator[Phase]:
        sums, _ = self._sums(self.parameters)
        copied = self._held(p.nbytes for p in self.parameters.values()) + self.buffers
        base = {"weights": self.weights, "copy of the weights": copied}
        for count, name in enumerate(("fisher_forget", "fisher_retain"), 1):
            held = {"information": count * sums, "gathered weights": self.gathered, **self._pass(self.parameters)}
            yield _phase(name, base | held)
        masks = self._held(p.numel() / 8 for p in self.parameters.values())
        scratch = max(8 * self._elements(p) for p in self.parameters.values())
        yield _phase("dampen", base | {
            "information": 2 * sums, "masks": masks, "copies of the largest tensor": scratch,
        })  # fmt: skip

    def _finetune(self, method: DeepClean, masks: int, values: int) -> Phase:
        moments = (1 if method.momentum else 0) if method.optimizer == "sgd" else 2
        state = self._held(self.share * p.numel() * zeros_dtype(p).itemsize for p in self.parameters.values()) * moments
        gradients = sum(p.nbytes for p in self.parameters.values())
        kept = gradients if method.patience is not None else 0
        held = self._steps(method)
        if self.sharding == "ddp":
            gradients *= 2  # DistributedDataParallel's buckets
        elif self.sharding == "fsdp":
            gradients = self._held(p.nbytes for p in self.parameters.values()) + 2 * self.block
            kept = self._held([kept])
        return _phase("finetune", {
            "weights": self.weights, "masks": masks, "reset values": values, "values before": values + self.buffers,
            "optimizer": state, "gradients": gradients, "best weights": kept, "gathered weights": self.gathered, **held,
        })  # fmt: skip

    # ---- their terms ---------------------------------------------------------------------------------------------

    def _held(self, sizes: Iterable[float]) -> int:
        """Of tensors of these sizes, by one rank."""
        parts = self.ranks if self.sharding == "fsdp" else 1
        return sum(math.ceil(size / parts) for size in sizes)

    def _elements(self, parameter: nn.Parameter) -> int:
        return self._held([parameter.numel()])

    def _sums(self, part: Mapping[str, nn.Parameter]) -> tuple[int, int]:
        """Bytes of one set's information, on the device and on the host."""
        dtype = self.method.fisher_dtype
        width = {name: (zeros_dtype(p) if dtype is None else dtype).itemsize for name, p in part.items()}
        sizes = [p.numel() * width[name] for name, p in part.items()]
        if self.offload and not self.on_cpu:
            return 0, sum(math.ceil(size / self.ranks) for size in sizes)
        if self.sharding == "ddp":  # summed up in runs, and whole again when the pass ends
            return sum(sizes), 0
        return self._held(sizes), 0

    def _choosing(self, parameter: nn.Parameter, width: int) -> int:
        """A float64 copy of the information for its mean; or a copy of the weight, the mask as bytes, and the places
        of what is reset, one index per axis."""
        n = self._elements(parameter)
        moved = 2 * n * (self.method.fisher_dtype or torch.float32).itemsize if self.offload and not self.on_cpu else 0
        return max(8 * n, n * (width + 1) + int(8 * parameter.dim() * self.share * n) + moved)

    def _gathered(self) -> int:
        """FSDP2: what belongs to no block, and two blocks, of which one is on its way."""
        blocks = self._blocks()
        inside = {id(p) for block in blocks for p in block.parameters()}
        root = sum(p.nbytes for p in self.model.parameters() if id(p) not in inside)
        return root + 2 * self._largest_block()

    def _blocks(self) -> list[nn.Module]:
        lists = [m for m in self.model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
        return list(max(lists, key=len)) if lists else [self.model]

    def _largest_block(self) -> int:
        return max(sum(p.nbytes for p in block.parameters()) for block in self._blocks())

    def _pass(self, part: Mapping[str, nn.Parameter]) -> Mapping[str, int]:
        """Of a Fisher pass for these parameters, beyond the sums."""
        key = tuple(part)
        if key not in self._passes:
            self._passes[key] = self._fisher(dict(part))
        return self._passes[key]

    def _fisher(self, part: dict[str, nn.Parameter]) -> Counter[str]:
        method = self.method
        way = "in place"
        if self.sharding != "none":
            way = self.sharding
        elif self.offload:
            way = "copied" if not self.on_cpu else "dropped"
        elif method.fisher_dtype is not None:
            way = "dropped"
        chosen = {id(p) for p in part.values()}
        with preserved(self.model):
            for parameter in self.model.parameters():
                parameter.requires_grad_(id(parameter) in chosen)
            work = _Work(
                self.model, method.loss_fn, method.fisher, "sequence", 0, _HollowSums(part, way), nullcontext, ALONE
            )
            plan, planning = self._rules(work)
            with _Held(self._before(work.sums.held.values()), self.logits) as held:
                if work._add(self.batch, list(plan.units), plan) is None:
                    raise ValueError("the model uses its parameters differently for two samples and for this batch")
                work.sums.flush()
        if planning > held.most:
            return Counter({"planning on two samples": planning})
        found: Counter[str] = held.at_most
        return found

    def _rules(self, work: _Work) -> tuple[Plan, int]:
        """The plan of a pass, and what making it takes of two samples, where one does not see it from the batch: all
        that modules are given and return, and beside it a second graph where copies per sample are tried."""
        one, two = _first(self.raw, 1), _first(self.raw, 2)
        given = [leaf for b in (one, two) for leaf in _tensors(b)]
        owners = ruled_owners(dict(self.model.named_modules()))
        with observing(self.model, work.losses_of, one, keep=False) as (observed, losses):
            shapes = {m: [(r.inputs, r.outputs) for r in records] for m, records in observed.records.items()}
            reached = Counter({m: observed.reached(m) for m in observed.records})
            seen = Probe(shapes, reached, observed.survey.edges, losses.detach(), random=False)
        del observed, losses
        before = self._before([*given, *work.sums.held.values()])
        with _Held(before, self.logits) as held:
            plan = sharded_plan(self.model, work.losses_of, two, seen, owners, work.targets, work.autocast, None)
        if not plan.copies:
            return plan, held.most if self.sharding == "fsdp" or self.batch.size == 1 else 0
        with _Held(before, self.logits) as trial:
            outputs = two.outputs(self.model)
        del outputs
        return plan, held.most + (trial.most if self.sharding != "fsdp" else 0)

    def _steps(self, method: DeepClean) -> Counter[str]:
        """Of two steps of fine-tuning, beyond the gradients, in the order of :func:`descend`."""
        loss_fn = loss_for(self.model, method.loss_fn)
        sharded = self.sharding == "fsdp"
        with preserved(self.model), _Held(self._before(), self.logits) as held:
            self.model.train(method.dropout)
            tuned = {id(p) for p in self.parameters.values()}
            handles = []
            for parameter in self.model.parameters():
                parameter.requires_grad_(id(parameter) in tuned)
                parameter.grad = None
                if sharded and id(parameter) in tuned:  # its gradient goes to the shards at once
                    handles.append(parameter.register_post_accumulate_grad_hook(_drop))  # type: ignore[no-untyped-call]
            for _ in range(2):
                with autocast_to(_CPU, method.autocast):
                    outputs = self.batch.outputs(self.model)
                    losses = per_sample_loss(loss_fn, outputs, self.batch.targets, self.batch.size)
                    loss = losses.mean()
                del outputs, losses
                for parameter in self.parameters.values():
                    parameter.grad = None
                torch.autograd.backward(loss)
            for handle in handles:
                handle.remove()
        beyond = 0 if sharded else sum(p.nbytes for p in self.parameters.values())
        return Counter({"kept of a batch, gradients in flight": max(held.most - beyond, 0)})

    def _before(self, others: Iterable[Tensor] = ()) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers(), *_tensors(self.batch), *others]


def _tensors(batch: Batch) -> list[Tensor]:
    return [leaf for leaf in tree_leaves((batch.args, batch.kwargs, batch.targets)) if isinstance(leaf, Tensor)]


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _phase(name: str, terms: Mapping[str, float]) -> Phase:
    return Phase(name, {term: int(size) for term, size in terms.items() if size})
