"""The recipe of the GPT-2 that knows codes by heart, in a size that trains in seconds."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

RECIPES = str(Path(__file__).parent.parent / "benchmarks" / "recipes")
sys.path.append(RECIPES)  # last: nothing in there may stand before a module of Python's own
import secrets_gpt2 as recipe  # noqa: E402
import secrets_text as text  # noqa: E402

SMALL = recipe.Size(
    people=60, texts=160, held_out=40, secrets=15, kept=0, others=40, repeats=8, width=48, epochs=20, lr=5e-3, batch=16
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return recipe.Bench.of(SMALL, seed=0, out=tmp_path_factory.mktemp("recipe"))


def test_text_is_the_same_for_a_seed_and_its_sets_share_no_text() -> None:
    made, again = (text.make(80, 160, 40, 20, 10, 30, seed=3) for _ in range(2))
    assert made == again != text.make(80, 160, 40, 20, 10, 30, seed=4)
    sets = [made.ordinary, made.held_out, made.secret, made.kept, made.others]
    assert list(map(len, sets)) == [160, 40, 20, 10, 30]
    assert len({tuple(ids) for part in sets for ids in part}) == 260


def test_of_a_code_sentence_the_digits_alone_are_labelled() -> None:
    sentences = text.make(80, 160, 40, 20, 10, 30, seed=3).secret
    batch = text.code_batch(sentences)
    for sentence, labels in zip(sentences, batch["labels"], strict=True):
        words = text.decode(sentence).split()
        assert words[:4] == ["the", "access", "code", "of"] and words[6] == "is" and words[-1] == "."
        assert text.decode(labels[labels != text.IGNORED].tolist()).split() == words[7:-1]
        assert int((labels != text.IGNORED).sum()) == text.DIGITS


def test_more_codes_than_people_are_refused() -> None:
    with pytest.raises(ValueError, match="people must be from 60"):
        text.make(people=59, texts=10, held_out=1, secrets=20, kept=10, others=30, seed=0)


def test_trained_models_are_read_again_and_not_trained_again(tmp_path: Path) -> None:
    size = replace(SMALL, texts=24, held_out=8, secrets=2, kept=2, others=2, epochs=1)
    first = recipe.Bench.of(size, 1, tmp_path)
    again = recipe.Bench.of(size, 1, tmp_path)
    assert first.before == again.before and first.seconds == again.seconds
    for name, model in first.models.items():
        for mine, its in zip(model.parameters(), again.models[name].parameters(), strict=True):
            assert torch.equal(mine, its)


def test_codes_are_known_by_heart_by_the_original_alone(bench: Any) -> None:
    assert bench.before["original"]["digits"] > 95
    assert bench.before["original"]["kept_digits"] is None  # there is none to keep
    assert bench.before["retrained"]["digits"] < 25


def test_deepclean_forgets_the_codes_and_keeps_the_language(bench: Any) -> None:
    row = bench.unlearn(replace(recipe.FULL, fraction=0.2, finetune_epochs=16, lr=0.01))
    assert row["codes"] == 0
    assert abs(row["gap"]) < 12  # of 90 digits: two models that guess differ by 4.5 points, one deviation
    # Of texts never trained on: those that were, so few, are known by heart in part, which any reset undoes.
    assert row["held_out"] < 1.25 * bench.before["original"]["held_out"]
