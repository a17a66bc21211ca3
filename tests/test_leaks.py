"""Neighbours against brute force, leak scores against counting, and what a report says of them."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from models import Pairs, classifier, pairs, unchanged, weights
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from fastunlearn.evaluate.leaks import LeakReport, leak_report, leak_scores, neighbours
from fastunlearn.evaluate.signals import Signals, signals, signals_of


def joined(batches: Pairs) -> Tensor:
    return torch.cat([x for x, _ in batches])


def brute_force(ours: Tensor, theirs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    cosine = F.cosine_similarity(ours.double()[:, None], theirs.double()[None], dim=2)
    order = cosine.argsort(dim=1, descending=True, stable=True)[:, :count]
    return order, cosine.gather(1, order)


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_neighbours_are_the_brute_force_ones_whatever_the_size_of_a_block(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[neighbours.__module__], "BLOCK", block)
    model, forget, retain = classifier()
    model.train()
    before = weights(model)
    found = neighbours(model, forget, retain, count=4)
    assert model.training and unchanged(model, before)
    model.eval()
    with torch.no_grad():
        ours, theirs = model[:6](joined(forget)), model[:6](joined(retain))
    nearest, cosine = brute_force(ours, theirs, 4)
    assert torch.equal(found.nearest, nearest)
    torch.testing.assert_close(found.similarity, cosine, rtol=0, atol=1e-6)
    assert found.positions.tolist() == sorted(set(nearest.flatten().tolist()))
    assert found.layer == "6"


def test_a_retained_duplicate_of_a_forgotten_sample_is_its_first_neighbour_and_equal_ones_keep_their_order() -> None:
    model, forget, retain = classifier()
    x, y = (torch.cat(parts) for parts in zip(*retain, strict=True))
    forgotten = joined(forget)
    for position, copy in ((3, 0), (77, 1), (139, 1), (40, 1)):
        x[position] = forgotten[copy]
    for size in (1, 13, 140):  # the same whatever shares a batch
        found = neighbours(model, forget, pairs(x, y, size), count=3)
        assert int(found.nearest[0, 0]) == 3
        assert found.nearest[1].tolist() == [40, 77, 139]
        assert found.similarity[1].tolist() == pytest.approx([1.0] * 3, abs=1e-9)


class Convolutional(nn.Module):
    """Ends in a convolution; its only Linear is a gate in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(x * self.gate(x.mean((2, 3)))[..., None, None]).mean((2, 3))


def test_without_a_linear_head_the_logits_are_compared() -> None:
    torch.manual_seed(0)
    _, forget, retain = classifier()
    model = Convolutional()
    with torch.no_grad():
        nearest, _ = brute_force(model(joined(forget)), model(joined(retain)), 2)
    found = neighbours(model, forget, retain, count=2)
    assert found.layer == "logits"
    assert torch.equal(found.nearest, nearest)


def test_samples_that_the_model_makes_nothing_of_have_the_first_as_neighbours() -> None:
    model = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(4, 3))
    nothing = -torch.ones(2, 4)
    found = neighbours(model, pairs(nothing, torch.zeros(2).long()), pairs(torch.ones(5, 4), torch.zeros(5).long()), 2)
    assert found.nearest.tolist() == [[0, 1], [0, 1]]
    assert found.similarity.tolist() == [[0, 0], [0, 0]]
    assert found.positions.tolist() == [0, 1]


def test_neighbours_that_can_not_be_named_are_refused() -> None:
    model, forget, retain = classifier()
    data = TensorDataset(*(torch.cat(parts) for parts in zip(*retain, strict=True)))
    with pytest.raises(ValueError, match="shuffles, so positions in it mean nothing"):
        neighbours(model, forget, DataLoader(data, 32, shuffle=True))
    with pytest.raises(ValueError, match="shuffles"):
        neighbours(model, forget, DataLoader(data, 32, sampler=SubsetRandomSampler(range(9))))
    in_order = neighbours(model, forget, DataLoader(data, 32), count=1)
    assert torch.equal(in_order.nearest, neighbours(model, forget, retain, count=1).nearest)
    with pytest.raises(ValueError, match="count must be 1 or more, got 0"):
        neighbours(model, forget, retain, count=0)
    with pytest.raises(ValueError, match="count is 141, but retain has 140 samples"):
        neighbours(model, forget, retain, count=141)
    assert neighbours(model, forget, retain, count=140).positions.tolist() == list(range(140))
    with pytest.raises(ValueError, match="features of a sample of retain are NaN"):
        neighbours(model, forget, [(torch.full((2, 1, 6, 6), math.nan), torch.zeros(2).long())])
    with pytest.raises(ValueError, match="forget is empty"):
        neighbours(model, [], retain)


def of_class(logit: list[float], target: list[int]) -> Signals:
    """Signals with these scaled confidences: p_y / (1 - p_y) = exp(logit), of 3 classes."""
    z = torch.zeros(len(logit), 3, dtype=torch.float64)
    index = torch.tensor(target)[:, None]
    return signals_of(z.scatter(1, index, torch.tensor(logit).double()[:, None] + math.log(2)), index[:, 0])


def test_leak_scores_are_percentiles_within_the_class() -> None:
    torch.manual_seed(0)
    targets = torch.randint(2, (120,)).tolist()
    values = torch.randn(120).round(decimals=1).tolist()
    test = of_class(values, targets)
    samples = of_class([0.0, 0.0, 9.0, -9.0, 0.3], [0, 1, 1, 0, 1])
    found = leak_scores(samples, test)
    assert found.dtype == torch.float64
    for k in range(5):
        score = float(samples.logit[k])
        pool = [float(test.logit[i]) for i in range(120) if targets[i] == int(samples.target[k])]
        below = sum(p < score for p in pool) + 0.5 * sum(p == score for p in pool)
        assert float(found[k]) == pytest.approx(100 * below / len(pool), abs=1e-12)
    assert (float(found[2]), float(found[3])) == (100, 0)


def test_a_class_with_few_test_samples_is_compared_with_all() -> None:
    values, targets = torch.arange(60).double().tolist(), [0] * 20 + [1] * 19 + [2] * 21
    test = of_class(values, targets)
    found = leak_scores(of_class([10.5, 20.5, 100.0], [0, 1, 1]), test)
    assert found.tolist() == pytest.approx([100 * 11 / 20, 100 * 21 / 60, 100])
    assert leak_scores(of_class([1.0], [2]), of_class([0.0], [0])).tolist() == [100]
    with pytest.raises(ValueError, match="need test samples"):
        leak_scores(test, test[:0])


def test_samples_never_seen_are_at_any_percentile_and_memorised_ones_at_the_top() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(900, 20), torch.randint(4, (900,))
    model = nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 4))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x[:200]), y[:200]).backward()
        optimizer.step()
    seen, unseen, test = (
        signals(model, pairs(x[s], y[s]), "x") for s in (slice(200), slice(200, 500), slice(500, 900))
    )
    scores = leak_scores(unseen, test)
    assert abs(float(scores.mean()) - 50) < 3 * 28.9 * (1 / 300 + 1 / 400) ** 0.5  # uniform from 0 to 100
    assert 20 < float(scores.std()) < 35
    assert float(leak_scores(seen, test).median()) > 85


def report() -> LeakReport:
    before, after = torch.tensor([90.0, 80, 70, 60, 50]), torch.tensor([50.0, 95, 70, 90, 20])
    return LeakReport(("a", "b", "c", "d", "e"), before, after, torch.tensor([45.0, 50, 75, 60, 20]), "neighbours")


def test_a_report_counts_what_rose_and_shows_the_worst_first() -> None:
    found = report()
    assert found.rose.mean == 40 and found.median_change == 0 and found.median_excess == 5
    assert found.worst(3).ids == ("d", "b", "c")
    assert found.worst(2, by="after").ids == ("b", "d")
    worst = found.worst(99)
    assert worst.ids == ("d", "b", "c", "e", "a")
    assert worst.before.tolist() == [60, 80, 70, 50, 90] and worst.after.tolist() == [90, 95, 70, 20, 50]
    assert worst.reference is not None and worst.reference.tolist() == [60, 50, 75, 20, 45]
    assert found.summary()["which"] == "neighbours" and found.summary()["rose"]["mean"] == 40
    assert str(found).startswith("5 neighbours: 40 (")
    assert str(found).endswith("% leak more, median change +0, +5 from the reference")
    written = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert list(written) == ["ids", "before", "after", "reference"]
    assert written["after"] == [50, 95, 70, 90, 20] and written["ids"] == ["a", "b", "c", "d", "e"]
    alone = LeakReport(found.ids, found.before, found.after)
    assert alone.as_dict()["reference"] is None and alone.median_excess is None and alone.which == "forgotten"


def test_a_report_of_models_is_the_scores_of_each() -> None:
    torch.manual_seed(0)
    model, forget, retain = classifier()
    other, *_ = classifier()
    nn.init.zeros_(other[6].weight)
    sets = [(signals(m, forget, "forget"), signals(m, retain, "test")) for m in (model, other, model)]
    found = leak_report(sets[0], sets[1], sets[2])
    assert found.ids == tuple(map(str, range(20)))
    assert torch.equal(found.before, leak_scores(*sets[0])) and torch.equal(found.after, leak_scores(*sets[1]))
    assert found.reference is not None and torch.equal(found.reference, found.before)
    assert leak_report(sets[0], sets[1], ids=range(5, 25), which="neighbours").ids[0] == "5"


def test_a_report_that_does_not_add_up_is_refused() -> None:
    three = torch.zeros(3)
    with pytest.raises(ValueError, match=r"after must be one score per sample, \[2\] for forgotten, got \[3\]"):
        LeakReport(("a", "b"), three[:2], three)
    with pytest.raises(ValueError, match="a score of reference of neighbours is NaN or infinite"):
        LeakReport(("a",), three[:1], three[:1], torch.tensor([torch.inf]), "neighbours")
    with pytest.raises(ValueError, match="at least one sample"):
        LeakReport((), three[:0], three[:0])
    with pytest.raises(ValueError, match="by must be 'change' or 'after', got 'before'"):
        report().worst(by="before")
    with pytest.raises(ValueError, match="count must be 1 or more"):
        report().worst(0)
