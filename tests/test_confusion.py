"""Confusion matrices: counts, where a class went, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import confusion_matrix as by_sklearn
from torch import Tensor, nn

from fastunlearn import Confusion, confusion_matrix


class Logits(nn.Module):
    """Returns its input: the logits are the data."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, logits: Tensor) -> Tensor:
        return logits


def test_counts_equal_those_of_scikit_learn_at_any_batch_size() -> None:
    torch.manual_seed(0)
    logits, y = torch.randn(101, 5), torch.randint(0, 4, (101,))  # no sample of class 4
    wanted = by_sklearn(y, logits.argmax(1), labels=range(5))
    for size in (1, 7, 101):
        batches = list(zip(logits.split(size), y.split(size), strict=True))
        found = confusion_matrix(Logits().train(), batches)
        assert found.counts.dtype == torch.int64 and found.counts.tolist() == wanted.tolist()
    assert found.accuracy == pytest.approx(100 * float((logits.argmax(1) == y).float().mean()))
    assert not found.rows[4].any() and torch.allclose(found.rows[:4].sum(1), torch.ones(4).double())


def test_where_a_class_went_is_sorted_and_has_no_zeros(tmp_path: Path) -> None:
    confusion = Confusion(torch.tensor([[0, 1, 3], [0, 2, 0], [0, 0, 0]]))
    assert confusion.where(0) == {2: 75.0, 1: 25.0} and confusion.where(2) == {}
    assert list(confusion.where(0)) == [2, 1]
    assert confusion.accuracy == pytest.approx(100 / 3)
    lines = str(confusion).splitlines()
    assert lines[1].split() == ["0", ".", "25.0", "75.0", "4"] and len(lines) == 4
    assert confusion.as_dict()["counts"] == [[0, 1, 3], [0, 2, 0], [0, 0, 0]]
    confusion.picture(tmp_path / "both.svg", after=Confusion(torch.eye(3, dtype=torch.int64)))
    drawn = (tmp_path / "both.svg").read_text()
    assert "before 33.3 % right" in drawn and "after 100.0 % right" in drawn
    confusion.picture(tmp_path / "one.svg")
    assert "before" not in (tmp_path / "one.svg").read_text()
    for bad in (-1, 3):
        with pytest.raises(ValueError, match="one of the 3 classes"):
            confusion.where(bad)


def test_positions_count_and_ignored_targets_do_not() -> None:
    logits = torch.randn(2, 3, 4)
    y = torch.tensor([[0, 1, 2, -100], [-100, 0, 0, 1]])
    found = confusion_matrix(Logits(), [(logits, y)], classes=4)
    assert int(found.counts.sum()) == 6 and found.counts.shape == (4, 4)
    assert found.counts.sum(1).tolist() == [3, 2, 1, 0]


BAD: list[tuple[Any, Any, type[Exception], str]] = [
    ([(torch.zeros(2, 3), torch.zeros(2))], None, TypeError, "integers"),
    ([(torch.zeros(2, 3), torch.zeros(2, 1).long())], None, ValueError, "need targets of shape"),
    ([(torch.zeros(2, 3), torch.tensor([0, 3]))], None, ValueError, "a target is 3"),
    ([(torch.zeros(2, 3), torch.tensor([0, 1]))], 2, ValueError, "more than classes = 2"),
    ([], None, ValueError, "empty"),
    (iter([(torch.zeros(2, 3), torch.tensor([0, 1]))]), None, TypeError, "read only once"),
]


@pytest.mark.parametrize(("batches", "classes", "error", "message"), BAD)
def test_what_cannot_be_counted_is_refused(batches: Any, classes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        confusion_matrix(Logits(), batches, classes)
