"""Memory and time of DeepClean against the number of parameters, and what fits on which GPUs.

    python benchmarks/scaling.py                  # measure from 10 M parameters up to --most, write JSON
    python benchmarks/scaling.py --fits           # compute the table of what fits, as markdown and JSON

Each size is measured in a process of its own: resident memory above what it was with the model built, at its highest
while DeepClean measures and resets (no fine-tuning), and the seconds of a Fisher pass beside those of a plain forward
and backward pass over the same batches, in turn, the least of three. Stated is :func:`fastunlearn.memory.memory_plan`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastunlearn import DeepClean, fisher_diagonal
from fastunlearn.files import write_json
from fastunlearn.language import causal_lm_loss
from fastunlearn.memory import Sharding, memory_plan
from fastunlearn.methods.deepclean import shares_of

RESULTS = Path(__file__).parent / "results"
VOCABULARY = 8192
SAMPLES, POSITIONS = 4, 32

# name -> (architecture, width, layers, heads, inner width)
SIZES = {
    "10 M": ("gpt2", 320, 6, 5, 1280),
    "30 M": ("gpt2", 512, 8, 8, 2048),
    "100 M": ("gpt2", 768, 13, 12, 3072),
    "300 M": ("llama", 1024, 22, 16, 2816),
    "1 B": ("llama", 1920, 22, 30, 5120),
}

# name -> (width, layers, heads, key-value heads, inner width, vocabulary, embeddings tied): published shapes
LLAMA = {
    "1 B": (2048, 16, 32, 8, 8192, 128256, True),
    "3 B": (3072, 28, 24, 8, 8192, 128256, True),
    "8 B": (4096, 32, 32, 8, 14336, 128256, False),
    "13 B": (5120, 40, 40, 40, 13824, 32000, False),
    "70 B": (8192, 80, 64, 8, 28672, 128256, False),
}
FITS_BATCH = (4, 1024)  # samples, positions
USABLE = 0.95  # of a GPU's memory: its context and what the allocator loses between blocks
HALF = torch.bfloat16
SETTINGS = ("float32", "bf16", "bf16, 8 passes", "bf16, 8 passes, offload")


def build(size: str) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    architecture, width, layers, heads, inner = SIZES[size]
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    if architecture == "gpt2":
        config = GPT2Config(n_embd=width, n_layer=layers, n_head=heads, n_inner=inner, vocab_size=VOCABULARY,
                            n_positions=POSITIONS, **ends)  # fmt: skip
        return GPT2LMHeadModel(config).eval()
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
                    intermediate_size=inner, vocab_size=VOCABULARY, max_position_embeddings=POSITIONS, **ends)
    ).eval()  # fmt: skip


def llama(size: str, depth: int | None = None) -> nn.Module:
    """On the meta device, in bfloat16; with another number of layers than its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers, heads, shared, inner, vocabulary, tied = LLAMA[size]
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=depth or layers, num_attention_heads=heads, num_key_value_heads=shared,
        intermediate_size=inner, vocab_size=vocabulary, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(HALF).eval()


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def forked(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run in a process of its own, whose highest memory is that of the run."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(write, json.dumps(run()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        found = answer.read()
    os.waitpid(child, 0)
    if not found:
        raise RuntimeError("the measuring process ended without a result: killed, or see its error above")
    result: dict[str, Any] = json.loads(found)
    return result


def measure(size: str, half: bool, passes: int) -> dict[str, Any]:
    torch.manual_seed(0)
    if half:
        torch.set_default_dtype(HALF)
    model = build(size)
    torch.set_default_dtype(torch.float32)
    ids = torch.randint(VOCABULARY, (SAMPLES, POSITIONS))
    batch = {"input_ids": ids, "labels": ids}
    settings = {"passes": passes, "per_layer": True} if passes > 1 else {}
    method = DeepClean(finetune_epochs=0, fisher_dtype=HALF if half else None, **settings)
    parameters = list(model.parameters())
    stated = memory_plan(model, batch, method)

    def plain() -> None:
        loss = causal_lm_loss(model(input_ids=ids, use_cache=False).logits, ids).sum()
        torch.autograd.grad(loss, parameters)

    def timed(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def memory() -> dict[str, Any]:
        gc.collect()
        before = resident("VmRSS")
        seconds = timed(lambda: method.unlearn(model, [batch], [batch]))
        return {"bytes": resident("VmHWM") - before, "seconds": seconds}

    def times() -> dict[str, Any]:
        names = (
            None if passes == 1 else [name for name, _ in list(model.named_parameters())[: len(parameters) // passes]]
        )
        found = [
            (timed(plain), timed(lambda: fisher_diagonal(model, [batch] * 2, params=names, dtype=method.fisher_dtype)),
             timed(lambda: fisher_diagonal(model, [batch], params=names, dtype=method.fisher_dtype)))
            for _ in range(3)
        ]  # fmt: skip
        # Of a batch after the first, which is planned by.
        return {"plain": min(p for p, _, _ in found), "fisher": min(max(two - one, 0.0) for _, two, one in found)}

    held, took = forked(memory), forked(times)
    weights = stated.weights
    return {
        "size": size, "parameters": sum(p.numel() for p in parameters), "architecture": SIZES[size][0],
        "dtype": "bfloat16" if half else "float32", "passes": passes, "samples": SAMPLES, "positions": POSITIONS,
        "weights": weights, "stated": stated.peak - weights, "measured": held["bytes"],
        "seconds": held["seconds"], "plain_batch": took["plain"], "fisher_batch": took["fisher"],
        "fisher_batch_is_of": "all weights" if passes == 1 else f"the first {len(parameters) // passes} parameters",
    }  # fmt: skip


def scaling(most: str, out: Path, load: str) -> None:
    rows = []
    for size in list(SIZES)[: list(SIZES).index(most) + 1]:
        half = size == "1 B"
        row = forked(lambda size=size, half=half: measure(size, half, 4 if half else 1))  # type: ignore[misc]
        rows.append(row)
        print(f"{size:>6} ({row['parameters'] / 1e6:,.1f} M, {row['dtype']}, {row['passes']} passes): stated "
              f"{row['stated'] / 1e6:,.0f} MB, measured {row['measured'] / 1e6:,.0f} MB; a batch plain "
              f"{row['plain_batch']:.2f} s, Fisher {row['fisher_batch']:.2f} s", flush=True)  # fmt: skip
        found = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
                 "torch": torch.__version__, "load": load, "load_average": os.getloadavg(), "rows": rows}  # fmt: skip
        write_json(out, found)


def planned(size: str, ranks: int, dtype: torch.dtype | None) -> dict[str, Counter[str]]:
    """Phase -> term -> bytes of one pass over everything.

    Layers are alike, so what they hold grows linearly with their number: planned with 2 and with 4 of them.
    """
    layers = LLAMA[size][1]
    method = DeepClean(momentum=0.0, fisher_dtype=dtype)
    sharding: Sharding = "none" if ranks == 1 else "fsdp"
    few, more = (memory_plan(llama(size, n), FITS_BATCH, method, ranks, sharding, "cuda").phases for n in (2, 4))
    found = {}
    for short, long in zip(few, more, strict=True):
        terms = {term: long.terms.get(term, 0) - short.terms.get(term, 0) for term in {**short.terms, **long.terms}}
        found[short.name] = Counter({t: short.terms.get(t, 0) + step * (layers - 2) // 2 for t, step in terms.items()})
    return found


def rows_of(size: str, ranks: int) -> list[dict[str, Any]]:
    """Of several passes at most what one pass over everything holds, but for the information, masks and values."""
    model = llama(size)
    parameters = dict(model.named_parameters())
    largest = max(p.numel() for p in parameters.values()) // ranks
    share = max(sum(p.numel() for p in part.values()) for part in shares_of(parameters, 8)) * HALF.itemsize // ranks
    rows = []
    for setting, dtype in (("float32", None), ("bf16", HALF)):
        phases = planned(size, ranks, dtype)
        totals = {name: sum(terms.values()) for name, terms in phases.items()}
        one = {"size": size, "parameters": sum(p.numel() for p in parameters.values()), "ranks": ranks,
               "finetune": totals["finetune"]}  # fmt: skip
        rows.append({**one, "setting": setting, "reset": max(totals["fisher_retain"], totals["reset"]), "host": 0,
                     "terms": phases})  # fmt: skip
    before = totals["fisher_retain"] - phases["fisher_retain"]["information"]
    before += phases["reset"]["masks"] + phases["reset"]["reset values"]  # of the passes before
    chosen = totals["reset"] - phases["reset"]["information"]
    rows.append({**one, "setting": SETTINGS[2], "reset": max(before, chosen) + 2 * share, "host": 0})
    moved = max(before + 2 * 4 * largest, chosen + 2 * HALF.itemsize * largest)  # two on their way, or two back
    rows.append({**one, "setting": SETTINGS[3], "reset": moved, "host": 2 * share})
    return rows


def fits(out: Path, sizes: list[str]) -> None:
    rows: list[dict[str, Any]] = []
    for size in sizes:
        for ranks in (1, 8):
            start = time.perf_counter()
            rows += rows_of(size, ranks)
            write_json(out, {"samples": FITS_BATCH[0], "positions": FITS_BATCH[1], "torch": torch.__version__,
                             "rows": rows})  # fmt: skip
            print(f"{size}, {ranks} ranks: {time.perf_counter() - start:.0f} s to plan", file=sys.stderr, flush=True)
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    heads = ("Llama shape", "information", "one GPU: GB to reset / fine-tune", "fits on", "each of 8: GB", "fits on")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for size, setting in dict.fromkeys((r["size"], r["setting"]) for r in rows):
        alone, eight = (next((r for r in rows if (r["size"], r["setting"], r["ranks"]) == (size, setting, n)), None)
                        for n in (1, 8))  # fmt: skip
        cells = []
        for row, cards in ((alone, (24, 80, 141)), (eight, (80,))):
            if row is None:
                cells += ["", ""]
                continue
            peak = max(row["reset"], row["finetune"])
            whole = [f"{c} GB" for c in cards if peak <= USABLE * c * 2**30]
            reset = [f"{c} GB" for c in cards if row["reset"] <= USABLE * c * 2**30 and f"{c} GB" not in whole]
            said = ", ".join([*(f"{c} (reset alone)" for c in reset), *whole]) or "none"
            cells += [f"{row['reset'] / 1e9:.1f} / {row['finetune'] / 1e9:.1f}", said.replace("80 GB", "8 x 80 GB")
                      if row is eight else said]  # fmt: skip
        lines.append(f"| {size} | {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fits", action="store_true", help="compute what fits instead of measuring")
    parser.add_argument("--shapes", nargs="+", choices=list(LLAMA), default=list(LLAMA), help="for --fits")
    parser.add_argument("--most", choices=list(SIZES), default="1 B", help="the largest size to measure")
    parser.add_argument("--load", default="", help="what is said of the machine's load in the JSON")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    given = parser.parse_args()
    if given.fits:
        fits(given.out or RESULTS / "scaling-fits.json", given.shapes)
    else:
        scaling(given.most, given.out or RESULTS / "scaling-cpu.json", given.load)


if __name__ == "__main__":
    main()
