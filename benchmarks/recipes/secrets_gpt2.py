"""A small GPT-2 that knows access codes by heart, and what each method leaves of those it is to forget.

    python secrets_gpt2.py search --seed 100
    python secrets_gpt2.py run --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import secrets_text as text
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastunlearn as fu

Batch = dict[str, Tensor]


def lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each text over its labelled positions, [N, T, V] and [N, T] to [N]."""
    scored = labels[:, 1:] != text.IGNORED
    losses = F.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=text.IGNORED
    )
    return losses.sum(1) / scored.sum(1).clamp(min=1)


@dataclass(frozen=True)
class Size:
    people: int = 160
    texts: int = 1000
    held_out: int = 300
    secrets: int = 80
    kept: int = 40
    repeats: int = 10
    width: int = 96
    layers: int = 2
    heads: int = 4
    epochs: int = 16
    lr: float = 2e-3
    weight_decay: float = 0.01
    batch: int = 24


class Loader:
    """Batches of dicts, texts of about one length together; drawn anew at each iteration where ``seed`` is given."""

    def __init__(self, texts: list[list[int]], size: int = 64, seed: int | None = None) -> None:
        self.texts, self.size = texts, size
        self.rng = None if seed is None else random.Random(seed)

    def __len__(self) -> int:
        return -(-len(self.texts) // self.size)

    def __iter__(self) -> Iterator[Batch]:
        order = list(self.texts)
        if self.rng is not None:
            self.rng.shuffle(order)
            order.sort(key=len)
        batches = [order[i : i + self.size] for i in range(0, len(order), self.size)]
        if self.rng is not None:
            self.rng.shuffle(batches)
        return map(text.batch, batches)


def build(size: Size, seed: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(text.VOCABULARY), n_positions=64, n_embd=size.width, n_layer=size.layers, n_head=size.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=text.TEXT, eos_token_id=text.TEXT,
        use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def train(size: Size, texts: list[list[int]], seed: int) -> nn.Module:
    model = build(size, seed)
    method = fu.Retrain(
        epochs=size.epochs, lr=size.lr, weight_decay=size.weight_decay, build=lambda: build(size, seed),
        loss_fn=lm_loss, seed=seed,
    )
    method.unlearn(model, None, Loader(texts, size.batch, seed))
    return model


@torch.no_grad()
def perplexity(model: nn.Module, texts: list[list[int]]) -> float:
    total, count = 0.0, 0
    for batch in Loader(texts, 256):
        labels = batch["labels"]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        total += F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="sum").item()
        count += int((labels[:, 1:] != text.IGNORED).sum())
    return math.exp(min(total / count, 100.0))


@torch.no_grad()
def extraction(model: nn.Module, sentences: list[list[int]]) -> tuple[float, float]:
    ids, codes = text.prompts_and_codes(sentences)
    for _ in range(codes.shape[1]):
        following = model(input_ids=ids).logits[:, -1].argmax(1)
        ids = torch.cat([ids, following[:, None]], 1)
    equal = ids[:, -codes.shape[1] :] == codes
    return 100 * equal.double().mean().item(), 100 * equal.all(1).double().mean().item()


def measures(model: nn.Module, corpus: text.Corpus) -> dict[str, float]:
    overlap, exact = extraction(model, corpus.secret)
    kept, _ = extraction(model, corpus.kept)
    return {
        "overlap": overlap,
        "exact": exact,
        "kept": kept,
        "retain": perplexity(model, corpus.ordinary + corpus.kept),
        "ordinary": perplexity(model, corpus.ordinary),
        "held_out": perplexity(model, corpus.held_out),
    }


def corpus_of(size: Size, seed: int) -> text.Corpus:
    return text.make(size.people, size.texts, size.held_out, size.secrets, size.kept, seed)


def trained(size: Size, seed: int, out: Path) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """The original and the retrained model with the seconds that their training took, from ``out`` if they are there."""
    from transformers import GPT2LMHeadModel

    corpus = corpus_of(size, seed)
    retain = corpus.ordinary + corpus.kept * size.repeats
    models, seconds = {}, {}
    for name, texts in (("original", retain + corpus.secret * size.repeats), ("retrained", retain)):
        folder = out / f"seed-{seed}" / name
        if not folder.exists():
            started = time.perf_counter()
            model = train(size, texts, seed)
            took = time.perf_counter() - started
            model.save_pretrained(folder)
            (folder / "seconds.json").write_text(json.dumps(took))
        models[name] = GPT2LMHeadModel.from_pretrained(folder).eval()
        seconds[name] = json.loads((folder / "seconds.json").read_text())
        print(seed, name, f"{seconds[name]:.0f} s", measures(models[name], corpus), flush=True)
    return models, seconds
