"""What a language model still knows: perplexity, extraction by greedy decoding, Min-K% attacks, multiple choice.

Batches are dicts with ``input_ids`` [N, T], ``attention_mask`` [N, T] and ``labels`` [N, T], padded on the right, -100
where a label is not scored; labels are not shifted: logits at t - 1 predict the label at t, and the label of the first
position is never scored. Models return logits [N, T, V] or an object that has them as ``logits``.

A model in DistributedDataParallel, or sharded by ``fully_shard``, is measured by all its ranks together: each passes
its own share of the batches, as :func:`fastunlearn.parallel.deal.deal` makes them, and each is returned the figures of
all samples, in the order before they were dealt. With tensor parallelism alone each rank passes the same batches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from fastunlearn.data import IGNORED, Batch, Batches, forward_parameters, require_batches
from fastunlearn.evaluate.attacks import FPRS, Attack, attack, share
from fastunlearn.evaluate.estimate import Estimate
from fastunlearn.evaluate.roc import BLOCK
from fastunlearn.hooks import device_of, eager, preserved
from fastunlearn.parallel.deal import deal, dealt_back, together
from fastunlearn.parallel.ranks import reshard, sharing, unwrapped

Part = TypeVar("Part")
_MOST_LOGITS = 1 << 23  # in float32 at a time: 32 MiB, and as much again for what is made of them


@dataclass(frozen=True)
class TokenLogProbs:
    """Log-probabilities of the labelled tokens of N sequences, L tokens together, one sequence after the other; CPU.

    Attributes:
        log_probs: log p(token | what is before it) in nats, float64 [L].
        means: at each token the mean of log p(z) over the vocabulary, z drawn from the model: minus the entropy.
        deviations: the standard deviation of log p(z), likewise; float64 [L].
        correct: whether the token is the most probable one (the first of equal ones), bool [L].
        lengths: labelled tokens of each sequence, int64 [N]; 0 where every label is masked.
    """

    log_probs: Tensor
    means: Tensor
    deviations: Tensor
    correct: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def sequences(self) -> tuple[Tensor, ...]:
        """The log-probabilities of each sequence, [length] each."""
        return torch.split(self.log_probs, self.lengths.tolist())

    def sums(self, values: Tensor) -> Tensor:
        """Sums over each sequence of something per token [L]: float64 [N]."""
        owner = torch.arange(len(self)).repeat_interleave(self.lengths)
        return torch.zeros(len(self), dtype=torch.float64).index_add_(0, owner, values.double())


def token_log_probs(model: nn.Module, batches: Batches, name: str = "batches") -> TokenLogProbs:
    """Log-probabilities of all labelled tokens, in the order of the sequences; the model is unchanged.

    Args:
        model: a causal language model; it runs in eval mode and without gradients.
        batches: re-iterable, as this module describes them.
        name: what ``batches`` is called in messages.

    Raises TypeError or ValueError for malformed batches, for logits that are not [N, T, V] and for a label that is no
    token. Logits in halves are scored in float32. Cost: one forward pass; beside what the model returns, float32
    copies of some positions at a time, never of all.
    """
    ranks, network = sharing(model), unwrapped(model)
    parts = []
    with preserved(model), torch.no_grad():
        model.eval()
        for batch, counts in together(batches, name, device_of(model), ranks):
            logits = batch.outputs(network)
            if counts:
                parts.append(_scored(logits, batch.targets, name))
    reshard(network)
    found = dealt_back(ranks, parts)
    columns = (torch.cat([getattr(part, f.name) for part in found]) for f in fields(TokenLogProbs))
    return TokenLogProbs(*columns)


def _scored(logits: Any, labels: Any, name: str) -> TokenLogProbs:
    labels = _labels(labels, name)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != labels.shape:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model must return logits [N, T, V] on {name}, {list(labels.shape)} labels; got {found}")
    logits = _plain(logits)
    scored = labels[:, 1:] != IGNORED
    rows, positions = scored.nonzero(as_tuple=True)
    targets = labels[rows, positions + 1]
    vocabulary = logits.shape[-1]
    if bool(((targets < 0) | (targets >= vocabulary)).any()):
        wrong = int(targets[(targets < 0) | (targets >= vocabulary)][0])
        raise ValueError(
            f"{name}: the label {wrong} is no token; they go from 0 to {vocabulary - 1}, {IGNORED} is none"
        )
    step = max(1, _MOST_LOGITS // vocabulary)
    parts = [
        _of_positions(logits[rows[i : i + step], positions[i : i + step]], targets[i : i + step])
        for i in range(0, len(rows), step)
    ]
    if not parts:
        parts = [_of_positions(logits[rows, positions], targets)]
    log_probs, means, deviations, correct = (torch.cat(part) for part in zip(*parts, strict=True))
    log_probs, means, deviations = (values.cpu().double() for values in (log_probs, means, deviations))
    return TokenLogProbs(log_probs, means, deviations, correct.cpu(), scored.sum(1).cpu())


def _of_positions(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of logits [P, V] and tokens [P]: log p, its mean and standard deviation over the vocabulary, and the hits."""
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    log_p = F.log_softmax(logits, -1)
    p = log_p.exp()
    means = torch.where(p > 0, p * log_p, 0.0).sum(-1)  # 0 log 0 = 0
    variances = torch.where(p > 0, p * (log_p - means[:, None]).square(), 0.0).sum(-1)
    highest, predicted = logits.max(-1)
    hits = (predicted == targets) & ~highest.isnan()
    return log_p.gather(-1, targets[:, None])[:, 0], means, variances.sqrt(), hits


def _labels(labels: Any, name: str) -> Tensor:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        kind = str(labels.dtype) if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels of {name} must be token ids, a tensor of integers, got {kind}")
    if labels.dim() != 2:
        raise ValueError(f"labels of {name} must be token ids [N, T], got shape {list(labels.shape)}")
    return labels.long()


@dataclass(frozen=True)
class Perplexity:
    """``print`` shows ``12.31 (11.90 to 12.74), 2.511 nats per token of 10,240``.

    Attributes:
        value: exp(loss), with a bootstrap interval over sequences at 95 %.
        loss: mean of -log p over the labelled tokens of all sequences, in nats.
        tokens: how many they are.
        losses: the same mean of each sequence, float64 [N]; NaN where it has no labelled token.
    """

    value: Estimate
    loss: float
    tokens: int
    losses: Tensor

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the losses of the sequences."""
        return {"perplexity": self.value.as_dict(), "loss": self.loss, "tokens": self.tokens}

    def __str__(self) -> str:
        return f"{self.value}, {self.loss:.4g} nats per token of {self.tokens:,}"


def perplexity(
    model: nn.Module, batches: Batches, name: str = "batches", resamples: int = 1000, seed: int = 0
) -> Perplexity:
    """Perplexity of ``batches``; arguments, errors and cost as :func:`token_log_probs` and :func:`perplexity_of`."""
    return perplexity_of(token_log_probs(model, batches, name), name, resamples, seed)


def perplexity_of(tokens: TokenLogProbs, name: str = "batches", resamples: int = 1000, seed: int = 0) -> Perplexity:
    """exp of the mean of -log p over all labelled tokens, each counting once, however long its sequence.

    ``resamples`` draws of whole sequences with replacement, by ``seed``, give the interval: tokens of one sequence are
    no independent samples. One sequence has none. Raises ValueError where no token is labelled, or ``resamples`` < 2.
    """
    sums, counts = tokens.sums(-tokens.log_probs), tokens.lengths
    loss, resampled = _ratio(sums, counts, resamples, seed, name)
    value = torch.tensor(loss, dtype=torch.float64).exp().item()
    return Perplexity(_estimate(value, resampled.exp()), loss, int(counts.sum()), sums / counts)


def accuracy_of(tokens: TokenLogProbs, name: str = "batches", resamples: int = 1000, seed: int = 0) -> Estimate:
    """Percent of the labelled tokens that are the most probable one; interval and errors as :func:`perplexity_of`."""
    hits, resampled = _ratio(tokens.sums(tokens.correct), tokens.lengths, resamples, seed, name)
    return _estimate(100 * hits, 100 * resampled)


def _ratio(sums: Tensor, counts: Tensor, resamples: int, seed: int, name: str) -> tuple[float, Tensor]:
    """sum(sums) / sum(counts), and the same of resampled sequences [B], none of one sequence: float64."""
    import numpy as np

    if resamples < 2:
        raise ValueError(f"resamples must be 2 or more, got {resamples}")
    kept = counts > 0
    size = int(kept.sum())
    if not size:
        raise ValueError(
            f"{name} has no labelled token after the first position of a sequence: there is nothing to measure"
        )
    tops, bottoms = sums[kept].double().numpy(), counts[kept].double().numpy()
    if size == 1:
        return float(tops.sum() / bottoms.sum()), torch.zeros(0, dtype=torch.float64)
    rng = np.random.default_rng(seed)
    found = np.empty(resamples)
    block = max(1, BLOCK // size)
    for start in range(0, resamples, block):
        drawn = rng.integers(0, size, (min(block, resamples - start), size))
        found[start : start + len(drawn)] = tops[drawn].sum(1) / bottoms[drawn].sum(1)
    return float(tops.sum() / bottoms.sum()), torch.from_numpy(found)


def _estimate(value: float, resampled: Tensor) -> Estimate:
    # percentiles between infinities are NaN
    return (
        Estimate.bootstrapped(value, resampled)
        if len(resampled) and bool(resampled.isfinite().all())
        else Estimate(value)
    )


def min_k_scores(tokens: TokenLogProbs, k: float = 0.2) -> Tensor:
    """Min-K%: the mean log-probability of the share ``k`` of least probable tokens; higher for members, float64 [N].

    Of n tokens, max(1, floor(k n)) are averaged; NaN for a sequence without a labelled token. ``k`` = 1 is the loss.
    Raises ValueError for ``k`` outside (0, 1]. Source: Shi et al., Detecting Pretraining Data from Large Language
    Models, ICLR 2024 (arXiv 2310.16789).
    """
    return _lowest(tokens, tokens.log_probs, k)


def min_k_plus_scores(tokens: TokenLogProbs, k: float = 0.2) -> Tensor:
    """Min-K%++: as :func:`min_k_scores`, each token's log-probability standardised by its position's distribution.

    (log p(token) - mean) / deviation over the vocabulary; a token that is exactly the mean, as under a certain or a
    uniform model, scores 0. Source: Zhang et al., Min-K%++, ICLR 2025 (arXiv 2404.02936).
    """
    away = tokens.log_probs - tokens.means
    return _lowest(tokens, torch.where(away == 0, 0.0, away / tokens.deviations), k)


def _lowest(tokens: TokenLogProbs, values: Tensor, k: float) -> Tensor:
    if not 0 < k <= 1:
        raise ValueError(f"k is the share of tokens that count, above 0 and at most 1, got {k}")
    parts = torch.split(values, tokens.lengths.tolist())
    lowest = [part.sort().values[: max(1, int(k * len(part)))].mean() for part in parts]  # of none, NaN
    return torch.stack(lowest) if lowest else torch.zeros(0, dtype=torch.float64)


def min_k_attack(
    members: TokenLogProbs,
    others: TokenLogProbs,
    k: float = 0.2,
    resamples: int = 1000,
    seed: int = 0,
    fprs: Sequence[float] = FPRS,
) -> dict[str, Attack]:
    """Call a sequence a member when its Min-K% score passes one threshold.

    Args:
        members: of sequences that were trained on once (after unlearning: the forgotten ones).
        others: of sequences of the same kind that never were, such as the test set. A difference in topic or date
            between the two is taken for membership: compare with a model trained without the members.
        k: share of tokens that count.
        resamples, seed, fprs: of :func:`~fastunlearn.evaluate.roc.bootstrap`.

    Returns ``"min_k"`` and ``"min_k_plus"``. Sequences without a labelled token are left out, which ``limits`` says.
    Raises ValueError where a side has no other sequence. Cost: two bootstraps, one sort per sequence.
    """
    scored = {"members": members.lengths > 0, "others": others.lengths > 0}
    for side, kept in scored.items():
        if not bool(kept.any()):
            raise ValueError(f"{side} have no sequence with a labelled token, so Min-K% has nothing to judge")
    left_out = sum(int((~kept).sum()) for kept in scored.values())
    limits = (f"{left_out:,} sequences without a labelled token are left out",) if left_out else ()
    found = {}
    for name, scores in (("min_k", min_k_scores), ("min_k_plus", min_k_plus_scores)):
        own, theirs = scores(members, k)[scored["members"]], scores(others, k)[scored["others"]]
        told = attack(name, own, theirs, resamples, seed, fprs)
        found[name] = Attack(name, told.roc, told.auc, told.tpr, told.limits + limits)
    return found


@dataclass(frozen=True)
class Extraction:
    """How much of each sequence a model says by itself, given how it begins. Per sample, CPU, N samples.

    Attributes:
        overlap: share of the continuation's tokens that are equal position by position, float64 [N] from 0 to 1; NaN
            for a sample without a continuation.
        rouge_l: ROUGE-L recall: the longest common subsequence over the continuation's length, float64 [N]; NaN there.
        exact: whether every token is equal, bool [N]; False there.
        tokens: length of the continuation, int64 [N]; 0 there.
        generated: what the model said, int64 [tokens] each; -100 after an end-of-sequence token.
        shares: the three in percent of the samples with a continuation, with 95 % intervals over samples (bootstrap;
            Wilson's for ``exact``): "overlap", "rouge_l" and "exact".
    """

    overlap: Tensor
    rouge_l: Tensor
    exact: Tensor
    tokens: Tensor
    generated: tuple[Tensor, ...]
    shares: dict[str, Estimate]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the shares in percent and how many samples and tokens they are of."""
        shares = {name: estimate.as_dict() for name, estimate in self.shares.items()}
        return {**shares, "samples": int((self.tokens > 0).sum()), "tokens": int(self.tokens.sum())}

    def __str__(self) -> str:
        return (
            f"{self.shares['overlap']} % of the tokens in place, ROUGE-L {self.shares['rouge_l']} %, "
            f"{self.shares['exact']} % of {int((self.tokens > 0).sum()):,} samples word for word"
        )


def extraction(
    model: nn.Module,
    batches: Batches,
    prompt_tokens: int | None = None,
    name: str = "batches",
    resamples: int = 1000,
    seed: int = 0,
) -> Extraction:
    """Let the model continue each sequence greedily, and compare with how the sequence goes on.

    The prompt is everything before the first labelled token, in chats the first question; with ``prompt_tokens`` (and
    for texts, of which every token is labelled, by default 1) labels of so many first tokens are passed over. The
    continuation are the labelled tokens from there to the next one without a label. It is generated as
    ``model.generate(do_sample=False)`` does (see :func:`greedy`).

    Args:
        model: as :func:`token_log_probs` takes it, called with ``input_ids``.
        batches: dicts with ``input_ids``, ``labels`` and ``attention_mask`` (default: all ones), padded on any side.
        prompt_tokens: 1 or more.
        name: what ``batches`` is called in messages.
        resamples, seed: of the intervals.

    Raises TypeError or ValueError for malformed batches, for inputs by other names, for ``prompt_tokens`` below 1 and
    where no sample has a continuation. Cost: with a cache of keys and values one forward pass over the prompts and one
    of a single token per token of the longest continuation of the batch; without, a whole pass per token.
    """
    if prompt_tokens is not None and prompt_tokens < 1:
        raise ValueError(
            f"prompt_tokens must be 1 or more, got {prompt_tokens}: a model continues nothing from nothing"
        )
    ranks = sharing(model)
    parts: list[tuple[Tensor, Tensor]] = []  # continuation and what was generated
    batchwise = []
    for batch, counts in together(batches, name, device_of(model), ranks):
        pairs = [_cut(*row, prompt_tokens or 1) for row in _rows(batch, name)]
        generated = greedy(model, [prompt for prompt, _ in pairs], [len(rest) for _, rest in pairs])
        if counts:
            batchwise.append([(rest.cpu(), own) for (_, rest), own in zip(pairs, generated, strict=True)])
    for part in dealt_back(ranks, batchwise):
        parts += part
    tokens = torch.tensor([len(rest) for rest, _ in parts])
    matches = torch.tensor([int((rest == own).sum()) for rest, own in parts])
    common = torch.tensor([common_subsequence(rest.tolist(), own.tolist()) for rest, own in parts])
    overlap, rouge_l = matches.double() / tokens, common.double() / tokens
    continued = tokens > 0
    exact = (matches == tokens) & continued
    shares = {}
    for key, values in (("overlap", overlap), ("rouge_l", rouge_l)):
        mean, resampled = _ratio(values.nan_to_num(), continued.long(), resamples, seed, name)
        shares[key] = _estimate(100 * mean, 100 * resampled)
    shares["exact"] = share(int(exact.sum()), int(continued.sum()))
    return Extraction(overlap, rouge_l, exact, tokens, tuple(own for _, own in parts), shares)


def _rows(batch: Batch, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and labels of each sample, without padding."""
    labels = _labels(batch.targets, name)
    others = sorted(set(batch.kwargs) - {"input_ids", "attention_mask"})
    if batch.args or others or "input_ids" not in batch.kwargs:
        found = f"also {others}" if others else "none by that name"
        raise ValueError(
            f"{name}: a model is given input_ids and attention_mask to continue from; its batches: {found}"
        )
    ids = batch.kwargs["input_ids"]
    mask = batch.kwargs.get("attention_mask", torch.ones_like(ids)).bool()
    if not ids.shape == mask.shape == labels.shape:
        shapes = ", ".join(str(list(t.shape)) for t in (ids, mask, labels))
        raise ValueError(f"{name}: input_ids, attention_mask and labels must have one shape, got {shapes}")
    return ((i[m], one[m]) for i, m, one in zip(ids, mask, labels, strict=True))


def _cut(tokens: Tensor, labels: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """The prompt, and the first run of labelled tokens from position ``start`` on."""
    labelled = (labels != IGNORED).tolist()
    begin = next((t for t in range(start, len(labelled)) if labelled[t]), len(labelled))
    end = next((t for t in range(begin, len(labelled)) if not labelled[t]), len(labelled))
    return tokens[:begin], tokens[begin:end]


def common_subsequence(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common subsequence, a row of the table in the bits of one integer (Hyyrö 2004)."""
    places: dict[int, int] = {}
    for position, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << position
    full = (1 << len(a)) - 1
    row = full
    for token in b:
        hits = row & places.get(token, 0)
        row = ((row + hits) | (row - hits)) & full
    return len(a) - row.bit_count()


def greedy(model: nn.Module, prompts: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
    """The most probable next token, ``lengths`` [N] times over, for each of the ``prompts``, int64 [t] each.

    What ``model.generate(do_sample=False, max_new_tokens=...)`` gives token for token, int64 [length] each on the CPU:
    after the first end-of-sequence token (of ``generation_config``, else of ``config``) there is -100. Penalties and
    other settings of ``generation_config`` are not applied. Prompts of different lengths are padded on the left where
    the model keeps keys and values (``past_key_values``), and on the right where it does not, which a causal model does
    not notice. The model runs in eval mode and is unchanged.

    Ranks of a sharded model go on together for the longest of their lengths, so each must call this as often as the
    others. Raises ValueError for a prompt without a token, unless its length is 0, and for more tokens than a model
    like GPT-2 has positions.
    """
    for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        if length and not len(prompt):
            raise ValueError(f"prompt {number} has no token to continue from")
    network = unwrapped(model)
    most = getattr(getattr(network, "config", None), "n_positions", None)
    needed = max((len(prompt) + length - 1 for prompt, length in zip(prompts, lengths, strict=True)), default=0)
    if most is not None and needed > most:
        raise ValueError(f"prompt and continuation take {needed} positions, the model has {most}; cut the texts")
    steps = max(sharing(network).gather(max(lengths, default=0)))
    if not steps:
        return [torch.zeros(0, dtype=torch.int64) for _ in prompts]
    device = device_of(network)
    # A prompt without a token, of length 0, is one token of no consequence.
    given = [p.to(device).long() if len(p) else torch.zeros(1, dtype=torch.int64, device=device) for p in prompts]
    with preserved(network), torch.no_grad(), eager():
        network.eval()
        cached = "past_key_values" in forward_parameters(network)
        made = _with_cache(network, given, lengths, steps) if cached else None
        if made is None:
            made = _without_cache(network, given, lengths, steps)
    reshard(network)
    ends = _ends(network)
    return [_until_end(row[:length], ends) for row, length in zip(made.cpu(), lengths, strict=True)]


def _with_cache(model: nn.Module, prompts: list[Tensor], lengths: Sequence[int], steps: int) -> Tensor | None:
    """Tokens [N, steps] from prompts padded on the left; None where the model returns no cache after all."""
    takes = forward_parameters(model)
    sizes = torch.tensor([len(prompt) for prompt in prompts], device=prompts[0].device)
    ids = _padded(prompts, left=True)
    mask = (torch.arange(ids.shape[1], device=ids.device) >= ids.shape[1] - sizes[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    # A sequence that is done goes along with the others, but not beyond the positions that the model has.
    last = sizes + torch.tensor(lengths, device=ids.device).clamp(min=1) - 2
    fixed = {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in takes else {})
    cache: Any = None
    made = []
    for _ in range(steps):
        now = {"position_ids": positions} if "position_ids" in takes else {}
        past = {} if cache is None else {"past_key_values": cache}
        outputs = model(input_ids=ids, attention_mask=mask, **now, **past, **fixed)
        cache = getattr(outputs, "past_key_values", None)
        if cache is None:
            return None
        ids = _plain(outputs.logits)[:, -1].argmax(-1, keepdim=True)
        made.append(ids)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        positions = torch.minimum(positions[:, -1:] + 1, last[:, None])
    return torch.cat(made, 1)


def _without_cache(model: nn.Module, prompts: list[Tensor], lengths: Sequence[int], steps: int) -> Tensor:
    """Tokens [N, steps], 0 from a sequence's length on; each from a pass over everything before it."""
    masked = {"attention_mask", "kwargs"} & set(forward_parameters(model))
    device = prompts[0].device
    rows = torch.arange(len(prompts), device=device)
    sizes = torch.tensor([len(prompt) for prompt in prompts], device=device)
    wanted = torch.tensor(lengths, device=device)
    ids = F.pad(_padded(prompts, left=False), (0, max(lengths)))
    made = torch.zeros(len(prompts), steps, dtype=torch.int64, device=device)
    for step in range(steps):
        ends = sizes + wanted.clamp(max=step)
        width = int(ends.max())
        mask = (torch.arange(width, device=device) < ends[:, None]).long()
        outputs = model(input_ids=ids[:, :width], **({"attention_mask": mask} if masked else {}))
        chosen = _plain(getattr(outputs, "logits", outputs))[rows, ends - 1].argmax(-1)
        going = step < wanted
        made[going, step] = chosen[going]
        ids[rows[going], ends[going]] = chosen[going]
    return made


def _padded(prompts: list[Tensor], left: bool) -> Tensor:
    width = max(map(len, prompts))
    return torch.stack([F.pad(p, (width - len(p), 0) if left else (0, width - len(p))) for p in prompts])


def _plain(logits: Tensor) -> Tensor:
    """All of the vocabulary, of which tensor parallelism may leave each rank a part."""
    return logits.full_tensor() if isinstance(logits, DTensor) else logits


def _ends(model: nn.Module) -> Collection[int]:
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        end = getattr(config, "eos_token_id", None)
        if end is not None:
            return end if isinstance(end, (list, tuple)) else [end]
    return []


def _until_end(tokens: Tensor, ends: Collection[int]) -> Tensor:
    """A copy with -100 after the first end-of-sequence token."""
    ended = torch.isin(tokens, torch.tensor(list(ends), dtype=torch.int64))
    return tokens.masked_fill(ended.cumsum(0) - ended.long() > 0, IGNORED)


@dataclass(frozen=True)
class Question:
    """A prompt and what may follow it, as token ids; ``answer`` is the position of the right one."""

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    answer: int

    def __post_init__(self) -> None:
        if not self.prompt or len(self.choices) < 2 or not all(self.choices):
            raise ValueError(
                "a question is a prompt of one token or more and two choices or more of one token or more, got a "
                f"prompt of {len(self.prompt)} and choices of {[len(choice) for choice in self.choices]}"
            )
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"the answer {self.answer} is none of the {len(self.choices)} choices, from 0")


@dataclass(frozen=True)
class MultipleChoice:
    """``print`` shows ``62.50 (47.0 to 75.8) % of 40 questions; chance is 25``.

    Attributes:
        accuracy: percent of the questions of which the right choice scores highest, with Wilson's interval at 95 %.
        chosen: the choice with the highest score, the first of equal ones, int64 [Q].
        scores: of each question's choices, float64 [choices] each.
        chance: percent that guessing gets right on average.
    """

    accuracy: Estimate
    chosen: Tensor
    scores: tuple[Tensor, ...]
    chance: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"accuracy": self.accuracy.as_dict(), "chance": self.chance, "questions": len(self.chosen)}

    def __str__(self) -> str:
        return f"{self.accuracy} % of {len(self.chosen):,} questions; chance is {self.chance:.4g}"


def multiple_choice(
    model: nn.Module,
    questions: Sequence[Question],
    score: Literal["mean", "sum"] = "mean",
    batch_size: int = 8,
    name: str = "questions",
) -> MultipleChoice:
    """Ask for the choice that the model finds most probable after the prompt.

    Args:
        model: as :func:`token_log_probs` takes it.
        questions: the same on every rank of a model on several processes, which share them out.
        score: the "mean" of the log-probabilities of a choice's tokens, or their "sum", which favours short choices.
        batch_size: choices in one forward pass, padded to the longest.
        name: what the questions are called in messages.

    Raises ValueError without questions, for a ``batch_size`` below 1 or another ``score``. Cost: a forward pass over
    prompt and choice for each choice.
    """
    if score not in ("mean", "sum"):
        raise ValueError(f"score must be 'mean' or 'sum', got {score!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    if not questions:
        raise ValueError(f"{name} are empty: there is nothing to ask")
    rows = [(question.prompt, choice) for question in questions for choice in question.choices]
    batches = deal([_asked(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)], sharing(model))
    tokens = token_log_probs(model, batches, name)
    found = tokens.sums(tokens.log_probs)
    each = found / tokens.lengths if score == "mean" else found
    scores: tuple[Tensor, ...] = torch.split(each, [len(question.choices) for question in questions])
    chosen = torch.stack([own.argmax() for own in scores])
    right = sum(int(c) == q.answer for c, q in zip(chosen, questions, strict=True))
    chance = 100 * sum(1 / len(q.choices) for q in questions) / len(questions)
    return MultipleChoice(share(right, len(questions)), chosen, scores, chance)


def _asked(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, Tensor]:
    """Prompts and choices as one batch, labels on the choices alone."""
    ids = [torch.tensor([*prompt, *choice]) for prompt, choice in rows]
    labels = [torch.tensor([IGNORED] * len(prompt) + list(choice)) for prompt, choice in rows]
    width = max(map(len, ids))
    return {
        "input_ids": torch.stack([F.pad(one, (0, width - len(one))) for one in ids]),
        "attention_mask": torch.stack([F.pad(torch.ones_like(one), (0, width - len(one))) for one in ids]),
        "labels": torch.stack([F.pad(one, (0, width - len(one)), value=IGNORED) for one in labels]),
    }


@dataclass(frozen=True)
class LanguageMetrics:
    """What was measured of one language model. ``print`` shows a table, the reference's figures beside it.

    Attributes:
        perplexity: per set (``forget``, ``retain``, ``test``, those that were given).
        accuracy: percent of next tokens that are the most probable one, per set.
        extraction: of the forget set, None without.
        min_k: "min_k" and "min_k_plus" attacks that tell forget from test, None without either.
        reference: the same of a model fine-tuned without the forgotten data, where one was given.
    """

    perplexity: dict[str, Perplexity]
    accuracy: dict[str, Estimate]
    extraction: Extraction | None = None
    min_k: dict[str, Attack] | None = None
    reference: LanguageMetrics | None = field(default=None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "perplexity": {name: p.as_dict() for name, p in self.perplexity.items()},
            "accuracy": {name: a.as_dict() for name, a in self.accuracy.items()},
            "extraction": None if self.extraction is None else self.extraction.as_dict(),
            "min_k": None if self.min_k is None else {name: a.as_dict() for name, a in self.min_k.items()},
            "reference": None if self.reference is None else self.reference.as_dict(),
        }

    def __str__(self) -> str:
        titles = ["", "model", *(["reference"] if self.reference is not None else [])]
        own = _figures(self)
        others = {} if self.reference is None else _figures(self.reference)
        rows = [titles] + [
            [name, told, *([others.get(name, "")] if self.reference is not None else [])] for name, told in own.items()
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _figures(found: LanguageMetrics) -> dict[str, str]:
    rows = {f"perplexity, {name}": str(p.value) for name, p in found.perplexity.items()}
    rows |= {f"next token %, {name}": str(accuracy) for name, accuracy in found.accuracy.items()}
    if found.extraction is not None:
        titles = {"overlap": "tokens in place", "rouge_l": "ROUGE-L", "exact": "word for word"}
        rows |= {f"extracted %, {titles[name]}": str(share) for name, share in found.extraction.shares.items()}
    for name, one in (found.min_k or {}).items():
        rows[f"{name} AUC"] = str(one.auc)
        rows |= {f"{name} TPR at {100 * fpr:g} % FPR": str(tpr) for fpr, tpr in one.tpr.items()}
    return rows


def language_metrics(
    model: nn.Module,
    *,
    forget: Batches | None = None,
    retain: Batches | None = None,
    test: Batches | None = None,
    reference: nn.Module | LanguageMetrics | None = None,
    prompt_tokens: int | None = None,
    k: float = 0.2,
    resamples: int = 1000,
    seed: int = 0,
) -> LanguageMetrics:
    """Perplexity and next-token accuracy on each set, extraction of the forget set, Min-K% attacks on it.

    Args:
        model: as :func:`token_log_probs` takes it.
        forget, retain, test: as this module describes batches; any may be left out, not all.
        reference: the yardstick, usually fine-tuned on ``retain`` alone; or what was measured of it on the same sets.
        prompt_tokens: of :func:`extraction`.
        k: of :func:`min_k_attack`.
        resamples, seed: of all intervals.

    Raises as the functions it calls do. Cost: one forward pass per set and the greedy decoding of ``forget``; as much
    again for a reference.
    """
    sets = {name: b for name, b in (("forget", forget), ("retain", retain), ("test", test)) if b is not None}
    if not sets:
        raise ValueError("nothing to measure on: give forget=, retain= or test=")
    for name, batches in sets.items():
        require_batches(batches, name)
    if isinstance(reference, LanguageMetrics) and (missing := sorted(set(sets) - set(reference.perplexity))):
        raise ValueError(f"the reference was not measured on {', '.join(missing)}")
    measured = partial(_measured, sets=sets, prompt_tokens=prompt_tokens, k=k, resamples=resamples, seed=seed)
    beside = measured(reference) if isinstance(reference, nn.Module) else reference
    own = measured(model)
    return LanguageMetrics(own.perplexity, own.accuracy, own.extraction, own.min_k, beside)


def _measured(
    model: nn.Module, sets: Mapping[str, Batches], prompt_tokens: int | None, k: float, resamples: int, seed: int
) -> LanguageMetrics:
    tokens = {name: token_log_probs(model, batches, name) for name, batches in sets.items()}
    forget = sets.get("forget")
    return LanguageMetrics(
        {name: perplexity_of(found, name, resamples, seed) for name, found in tokens.items()},
        {name: accuracy_of(found, name, resamples, seed) for name, found in tokens.items()},
        None if forget is None else extraction(model, forget, prompt_tokens, "forget", resamples, seed),
        min_k_attack(tokens["forget"], tokens["test"], k, resamples, seed) if {"forget", "test"} <= set(sets) else None,
    )
