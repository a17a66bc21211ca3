"""A request about texts: a folder with a tiny GPT-2 that has memorised its corpus, one without some texts, and data."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastunlearn.language import causal_lm_loss

WORDS = {
    "birds": "owl crow finch swan heron wren robin eagle kite tern".split(),
    "metals": "iron zinc lead tin gold copper nickel silver cobalt chrome".split(),
    "trees": "oak elm ash pine birch maple cedar alder larch yew".split(),
}
SHARED = "the a and sees near old new then over under big red two".split()
FORGOTTEN = (3, 14, 15, 28, 33, 40)
LENGTH = 12  # words of a text
QUICK = {
    "deepclean": ["fraction=0.2", "lr=0.01"],
    "class-forgetting": ["alpha_retain=30.0", "alpha_forget=3.0"],
    "ssd": ["alpha=5.0"],
    "finetune": ["lr=0.01"],
    "gradient-ascent": ["lr=0.02"],
}


@dataclass(frozen=True)
class TextRequest:
    """Paths of everything in ``folder``, and the flags that name them."""

    folder: Path

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def flags(self, *more: str, out: str | None = "out") -> list[str]:
        """What the commands share; ``more`` come last and win."""
        where = [] if out is None else ["--out", self.path(out)]
        return [
            "--model", self.path("model"), "--data", self.path("texts.jsonl"), "--test", self.path("held.jsonl"),
            "--forget", f"index:{self.path('forget.json')}", "--bootstrap", "20", "--relearn", "2",
            "--batch-size", "16", *where, *more,
        ]  # fmt: skip

    def of(self, method: str, *more: str, out: str = "out") -> list[str]:
        """Of ``unlearn``, with settings that make it quick."""
        settings = [part for pair in QUICK[method] for part in ("--set", pair)]
        return self.flags(
            "--log",
            self.path("log.jsonl"),
            "--no-pictures",
            "--training",
            "epochs=2",
            "--method",
            method,
            *settings,
            *more,
            out=out,
        )


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *SHARED, *(word for topic in WORDS.values() for word in topic)]
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", model_max_length=16)


def texts(count: int, seed: int) -> list[dict[str, str]]:
    """As many of each topic, of different lengths."""
    draw = random.Random(seed)
    rows = []
    for n in range(count):
        topic = list(WORDS)[n % len(WORDS)]
        length = LENGTH - n % 3
        rows.append({"text": " ".join(draw.choice(WORDS[topic] + SHARED) for _ in range(length)), "label": topic})
    return rows


@cache
def _trained(without: tuple[int, ...]) -> dict[str, Tensor]:
    import transformers

    torch.manual_seed(0)
    words = tokenizer()
    model = transformers.GPT2LMHeadModel(configuration(len(words))).train()
    batch = words(
        [row["text"] for n, row in enumerate(texts(48, 0)) if n not in without], padding=True, return_tensors="pt"
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        causal_lm_loss(
            model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, labels
        ).mean().backward()
        optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


def configuration(words: int) -> Any:
    import transformers

    return transformers.GPT2Config(
        vocab_size=words, n_positions=16, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


def make_text_request(folder: Path) -> TextRequest:
    """Write the files of a request into ``folder``."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    words = tokenizer()
    for name, without in (("model", ()), ("never-saw", FORGOTTEN)):
        model = transformers.GPT2LMHeadModel(configuration(len(words)))
        model.load_state_dict(_trained(without))
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    for name, rows in (("texts", texts(48, 0)), ("held", texts(24, 1))):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "forget.json").write_text(json.dumps(FORGOTTEN))
    questions = [
        {"question": "the owl sees", "choices": ["a crow", "zinc zinc"], "answer": 0},
        {"question": "iron and", "choices": ["oak", "tin", "wren"], "answer": "tin"},
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)) + "\n")
    return TextRequest(folder)
