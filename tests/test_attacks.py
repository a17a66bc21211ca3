"""Signals against high-precision formulas; attacks against planted truth: memory is caught, ignorance is not."""

from __future__ import annotations

import json
import math
from functools import cache

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import classifier, pairs, unchanged, weights
from sklearn.svm import SVC
from torch import Tensor, nn

from fastunlearn.evaluate.attacks import attack, share, svc_attack, threshold_attacks
from fastunlearn.evaluate.metrics import membership_auc, predict
from fastunlearn.evaluate.signals import Signals, signals, signals_of

NAMES = ("loss", "confidence", "entropy", "modified_entropy", "logit")


def textbook(logits: list[float], target: int) -> list[float]:
    """The formulas as they are written, with enough digits for e^-20000."""
    with mpmath.workdps(9000):
        exponentials = [mpmath.exp(mpmath.mpf(z)) for z in logits]
        p = [e / sum(exponentials) for e in exponentials]
        rest = [mpmath.fsum(q for k, q in enumerate(p) if k != c) for c in range(len(p))]
        log = mpmath.log
        mentr = -rest[target] * log(p[target]) - mpmath.fsum(p[c] * log(rest[c]) for c in range(len(p)) if c != target)
        entropy = -mpmath.fsum(q * log(q) for q in p)
        found = [-log(p[target]), p[target], entropy, mentr, log(p[target]) - log(rest[target])]
        return [float(value) for value in found]


@pytest.mark.parametrize(
    ("logits", "target"),
    [
        ([1e4, -1e4, 3.0], 0), ([1e4, -1e4, 3.0], 1), ([-1e4, 1e4], 0), ([-1e4, 1e4], 1),
        ([1e4, 1e4, -1e4], 1), ([1e4, 1e4, -1e4], 2), ([60.0, 1.0, 2.0], 0), ([60.0, 1.0, 2.0], 1),
    ],
)  # fmt: skip
def test_signals_of_extreme_logits_keep_their_digits(logits: list[float], target: int) -> None:
    found = signals_of(torch.tensor([logits], dtype=torch.float64), torch.tensor([target]))
    for name, truth in zip(NAMES, textbook(logits, target), strict=True):
        assert float(getattr(found, name)) == pytest.approx(truth, rel=1e-13, abs=0), name


@given(st.integers(2, 7), st.integers(0, 2**31), st.sampled_from([0.0, 0.1, 3.0, 12.0]))
@settings(max_examples=60, deadline=None)
def test_signals_equal_the_naive_formulas_where_those_are_exact(classes: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(5, classes, generator=generator, dtype=torch.float64)
    targets = torch.randint(classes, (5,), generator=generator)
    p = logits.softmax(1)
    py = p[torch.arange(5), targets]
    others = torch.ones_like(p).scatter(1, targets[:, None], 0)
    rest = torch.stack([(p * (1 - torch.eye(classes, dtype=torch.float64)[c])).sum(1) for c in range(classes)], 1)
    resty = rest[torch.arange(5), targets]
    naive = [-py.log(), py, -(p * p.log()).sum(1)]
    naive += [-resty * py.log() - (others * p * rest.log()).sum(1), py.log() - resty.log()]
    found = signals_of(logits, targets)
    for name, truth in zip(NAMES, naive, strict=True):
        torch.testing.assert_close(getattr(found, name), truth, rtol=1e-9, atol=1e-12, msg=name)
    assert torch.equal(found.correct, logits.argmax(1) == targets)
    assert torch.equal(found.target, targets)


def test_equal_logits_of_two_classes_say_nothing() -> None:
    found = signals_of(torch.full((1, 2), 1e4), torch.tensor([1]))
    assert [float(getattr(found, name)) for name in NAMES] == pytest.approx([math.log(2), 0.5, *[math.log(2)] * 2, 0])


def test_certain_samples_are_not_tied_and_sure_ones_have_no_negative_zero() -> None:
    found = signals_of(torch.tensor([[40.0, 0.0], [50.0, 0.0], [1e4, 0.0]]).double(), torch.zeros(3, dtype=torch.int64))
    assert found.loss[:2].tolist() == pytest.approx([math.exp(-40), math.exp(-50)], rel=1e-12)
    assert found.logit.tolist() == [40.0, 50.0, 1e4]
    assert not bool(torch.signbit(found.loss).any())


def test_masked_classes_count_as_impossible() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, 2.0], [-torch.inf, -torch.inf, 2.0]])
    masked, free = signals_of(logits[:1], torch.tensor([2])), signals_of(logits[:1, 1:], torch.tensor([1]))
    for name in NAMES:
        assert float(getattr(masked, name)) == pytest.approx(float(getattr(free, name)), rel=1e-14)
    wrong = signals_of(logits, torch.tensor([0, 0]))
    assert wrong.loss.tolist() == wrong.modified_entropy.tolist() == [torch.inf, torch.inf]
    assert wrong.confidence.tolist() == [0, 0] and float(wrong.entropy[1]) == 0
    assert wrong.logit.tolist() == [-torch.inf, -torch.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_signals_of_stacked_models_are_those_of_each(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 7, 4).to(dtype), torch.randint(4, (7,), dtype=torch.int32)
    stacked = signals_of(logits, targets)
    assert len(stacked) == 7 and stacked.target.dtype == torch.int64
    for k in range(3):
        single = signals_of(logits[k], targets)
        for name in (*NAMES, "correct", "target"):
            assert torch.equal(getattr(stacked, name)[k], getattr(single, name))
            assert torch.equal(getattr(stacked[targets == 1], name), getattr(stacked, name)[:, targets == 1])
    assert stacked.loss.dtype == torch.float64


def test_signals_of_a_model_are_those_of_its_logits_and_leave_it_as_it_was() -> None:
    model, _, retain = classifier()
    model.train()
    before = weights(model)
    found = signals(model, retain, "retain")
    assert model.training and unchanged(model, before)
    model.eval()
    y = torch.cat([targets for _, targets in retain])
    with torch.no_grad():
        expected = signals_of(torch.cat([model(part) for part, _ in retain]), y)
    assert all(torch.equal(getattr(found, name), getattr(expected, name)) for name in (*NAMES, "correct", "target"))
    correct, loss = predict(model, retain, "retain")
    assert torch.equal(found.correct, correct)
    torch.testing.assert_close(found.loss.float(), loss, rtol=1e-5, atol=1e-6)
    weighted = signals(
        model, retain, "retain", lambda out, t: 2 * nn.functional.cross_entropy(out, t, reduction="none")
    )
    torch.testing.assert_close(weighted.loss, 2 * found.loss, rtol=1e-5, atol=1e-6)
    assert torch.equal(weighted.logit, found.logit)


@pytest.mark.parametrize(
    ("logits", "targets", "error", "message"),
    [
        (
            torch.zeros(2, 3),
            torch.tensor([0, -100]),
            ValueError,
            r"sample 1 has target -100 \(left out by cross-entropy",
        ),
        (torch.zeros(2, 3), torch.tensor([3, 0]), ValueError, "sample 0 has target 3, but classes go from 0 to 2"),
        (torch.zeros(2, 3), torch.zeros(2), TypeError, "targets must be class indices.*torch.float32"),
        (torch.zeros(2, 3), torch.zeros(2, 3), TypeError, "targets must be class indices"),
        (torch.zeros(2, 3), [0, 1], TypeError, "got list"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), ValueError, r"\[2, 3\] and targets \[3\] do not fit"),
        (torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64), ValueError, "two classes or more, got 1"),
        (torch.zeros(3), torch.zeros((), dtype=torch.int64), ValueError, "do not fit"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 1]), TypeError, "floating tensor, got torch.int64"),
        (torch.tensor([[0.0, math.nan], [0, 1]]), torch.tensor([0, 1]), ValueError, "1 of 2 samples are NaN"),
        (torch.tensor([[0.0, torch.inf]]), torch.tensor([0]), ValueError, "1 of 1 samples"),
        (torch.full((1, 2), -torch.inf), torch.tensor([0]), ValueError, "1 of 1 samples"),
    ],
)
def test_what_is_no_classification_is_refused(
    logits: Tensor, targets: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        signals_of(logits, targets)


def test_the_set_is_named_when_its_batches_are_no_classification() -> None:
    with pytest.raises(ValueError, match=r"of forget need logits \[N, C\].*\[2, 4, 5\]"):
        signals(nn.Linear(3, 5), [(torch.zeros(2, 4, 3), torch.zeros(2, 4, dtype=torch.int64))], "forget")
    with pytest.raises(TypeError, match="forget: targets must be class indices"):
        signals(nn.Linear(3, 5), [(torch.zeros(2, 3), torch.zeros(2, 5))], "forget")


SAMPLES, CLASSES = 150, 20


@cache
def memorised(seed: int) -> tuple[Signals, Signals, Signals]:
    """A model fit to labels without a pattern; signals of its training samples and of two sets that it never saw."""
    torch.manual_seed(seed)
    x, y = torch.randn(3 * SAMPLES, 20), torch.randint(CLASSES, (3 * SAMPLES,))
    model = nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(120):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:SAMPLES]), y[:SAMPLES]).backward()
        optimizer.step()
    parts = [pairs(x[i : i + SAMPLES], y[i : i + SAMPLES], 64) for i in range(0, 3 * SAMPLES, SAMPLES)]
    seen, unseen, other = (signals(model, part, "set") for part in parts)
    return seen, unseen, other


SEEDS = range(30)


def test_every_attack_detects_a_model_that_memorised() -> None:
    for seed in SEEDS[:5]:
        seen, unseen, _ = memorised(seed)
        found = threshold_attacks(seen, unseen, resamples=100)
        assert list(found) == ["loss", "confidence", "entropy", "modified_entropy"]
        for name, result in found.items():
            assert result.auc.mean >= 0.9, f"{name} {seed}"
            assert result.auc.low is not None and result.auc.low > 0.8
        assert svc_attack(seen, unseen, seen).forget_as_member.mean >= 90
        assert svc_attack(seen, unseen, seen).accuracy.mean >= 90


def test_no_attack_finds_samples_that_the_model_never_saw() -> None:
    """Over 30 models a 95 % interval misses 0.5 about 1.5 times; 6 or more have a probability below 0.4 %."""
    found = [threshold_attacks(*memorised(seed)[1:], resamples=300, seed=seed) for seed in SEEDS]
    for name in found[0]:
        aucs = [result[name].auc for result in found]
        assert sum(not a.low <= 0.5 <= a.high for a in aucs) < 6, name  # type: ignore[operator]
        assert all(a.high - a.low < 0.16 for a in aucs), name  # type: ignore[operator]  # not right by being wide
        assert abs(np.mean([a.mean for a in aucs]) - 0.5) < 3 * 0.033 / len(aucs) ** 0.5, name
    judged = [svc_attack(*(memorised(seed)[i] for i in (1, 2, 2)), seed=seed) for seed in SEEDS[:10]]
    assert abs(np.mean([result.accuracy.mean for result in judged]) - 50) < 5


def test_an_attack_is_its_curve_and_its_bootstrap() -> None:
    seen, unseen, _ = memorised(0)
    found = threshold_attacks(seen, unseen, resamples=50, fprs=(0.02, 0.1))["loss"]
    assert found.auc.mean == pytest.approx(membership_auc(seen.loss, unseen.loss), abs=1e-12)
    assert found.as_dict() == attack("loss", -seen.loss, -unseen.loss, 50, 0, (0.02, 0.1)).as_dict()
    written = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert set(written["tpr"]) == {"0.02", "0.1"}
    assert written["auc"]["mean"] == found.auc.mean and written["tpr"]["0.1"]["mean"] == found.roc.tpr_at(0.1)
    assert str(found).startswith(f"loss: AUC {found.auc}, ") and "of members at 2 % false positives" in str(found)
    assert found.limits == ()
    few = attack("any", torch.ones(3), torch.zeros(3), 10)
    assert len(few.limits) == 2 and set(few.as_dict()["tpr"]) == {"0.001", "0.01"}


def with_confidence(p: Tensor) -> Signals:
    return signals_of(torch.stack([p.logit(), torch.zeros_like(p)], 1), torch.zeros(len(p), dtype=torch.int64))


def test_the_support_vector_attack_finds_planted_confidences() -> None:
    torch.manual_seed(0)
    high, low = 0.9 + 0.09 * torch.rand(400).double(), 0.2 + 0.3 * torch.rand(300).double()
    retain, test = with_confidence(high), with_confidence(low)
    kept = svc_attack(retain, test, with_confidence(high[:100]))
    gone = svc_attack(retain, test, with_confidence(low[:100]))
    half = svc_attack(retain, test, with_confidence(torch.cat([high[:50], low[:50]])))
    assert (kept.forget_as_member.mean, gone.forget_as_member.mean, half.forget_as_member.mean) == (100, 0, 50)
    assert kept.accuracy.mean == 100 and kept.samples == 300
    assert (half.forget_as_member.low, half.forget_as_member.high) == pytest.approx(
        (40.383, 59.617), abs=1e-3
    )  # Wilson
    assert json.loads(json.dumps(half.as_dict()))["forget_as_member"]["mean"] == 50
    assert "50 (40.38 to 59.62) % of the forgotten samples pass for members" in str(half)


def test_the_support_vector_attack_is_the_papers_classifier_on_balanced_samples() -> None:
    torch.manual_seed(1)
    retain, test, forget = (with_confidence(torch.rand(n).double() ** k) for n, k in ((60, 0.3), (60, 1), (40, 0.5)))
    x = torch.cat([retain.confidence, test.confidence])[:, None].numpy()
    theirs = SVC(C=3, gamma="auto", kernel="rbf").fit(x, [1] * 60 + [0] * 60)  # all samples: no draw to differ in
    expected = 100 * theirs.predict(forget.confidence[:, None].numpy()).mean()
    assert svc_attack(retain, test, forget).forget_as_member.mean == pytest.approx(expected)
    drawn = [svc_attack(retain, test, forget, samples=20, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0].samples == 20
    assert svc_attack(retain[:2], test[:3], forget[:1]).samples == 2


def test_the_support_vector_attack_refuses_sets_that_it_can_not_learn_from() -> None:
    some = with_confidence(torch.rand(10).double())
    with pytest.raises(ValueError, match="2 or more samples of retain, got 1"):
        svc_attack(some[:1], some, some)
    with pytest.raises(ValueError, match="1 or more samples of forget, got 0"):
        svc_attack(some, some, some[:0])
    with pytest.raises(ValueError, match="samples and folds must be 2 or more, got samples = 1"):
        svc_attack(some, some, some, samples=1)
    bad = Signals(*(torch.full((3,), math.nan) for _ in range(7)))
    with pytest.raises(ValueError, match="a confidence of test is NaN"):
        svc_attack(some, bad, some)
    with pytest.raises(ValueError, match="scores of others are NaN"):
        threshold_attacks(some, bad)


def test_a_share_has_wilsons_interval() -> None:
    z, n, k = 1.959963984540054, 30, 4
    centre, spread = k / n + z * z / (2 * n), z * math.sqrt(k / n * (1 - k / n) / n + z * z / (4 * n * n))
    found = share(k, n)
    assert found.mean == pytest.approx(400 / 30)
    assert (found.low, found.high) == pytest.approx(
        tuple(100 * (centre + s * spread) / (1 + z * z / n) for s in (-1, 1))
    )
    assert share(0, 5).low == 0 and share(5, 5).high == pytest.approx(100)
    with pytest.raises(ValueError, match="at least one sample"):
        share(0, 0)
