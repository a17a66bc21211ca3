"""Membership attacks that need the model alone: thresholds on one signal, and a support-vector classifier.

They compare populations and so overstate protection: an average near chance may hide samples that are known for
certain. They are a floor on what leaks; per-example attacks (LiRA, U-LiRA) are the stronger test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastunlearn.evaluate.estimate import Estimate
from fastunlearn.evaluate.roc import Roc, bootstrap, roc
from fastunlearn.evaluate.signals import Signals

FPRS = (0.001, 0.01)  # 0.1 % and 1 % false positives
_SIGNS = {"loss": -1, "confidence": 1, "entropy": -1, "modified_entropy": -1}  # so that higher says member


@dataclass(frozen=True)
class Attack:
    """What one attack found. ``print`` shows ``loss: AUC 0.912 (0.901 to 0.923), 12.3 % (...) at 0.1 %, ...``.

    Attributes:
        name: of the attack.
        roc: its whole curve.
        auc: area under it, with a bootstrap interval: 0.5 can not tell members from others.
        tpr: share of the members found, by false positive rate, both from 0 to 1, with bootstrap intervals.
        limits: what these figures can not say, in plain words.
    """

    name: str
    roc: Roc
    auc: Estimate
    tpr: dict[float, Estimate]
    limits: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON: ``auc`` and ``tpr``; the curve is ``roc.thinned().as_dict()``."""
        return {"auc": self.auc.as_dict(), "tpr": {f"{fpr:g}": tpr.as_dict() for fpr, tpr in self.tpr.items()}}

    def __str__(self) -> str:
        found = [f"{_percent(tpr)} % of members at {100 * fpr:g} % false positives" for fpr, tpr in self.tpr.items()]
        return f"{self.name}: " + ", ".join([f"AUC {self.auc}", *found])


def attack(
    name: str,
    members: Tensor,
    others: Tensor,
    resamples: int = 1000,
    seed: int = 0,
    fprs: Sequence[float] = FPRS,
) -> Attack:
    """The account of any score that is higher for members; scores [n] and [m]. Raises and costs as ``bootstrap``."""
    found = bootstrap(members, others, resamples, seed, fprs)
    return Attack(name, roc(members, others), found["auc"], found["tpr"], tuple(found["limits"]))


def threshold_attacks(
    members: Signals, others: Signals, resamples: int = 1000, seed: int = 0, fprs: Sequence[float] = FPRS
) -> dict[str, Attack]:
    """Call a sample a member when one signal passes one threshold for all classes.

    Args:
        members: signals of samples that were trained on once (after unlearning: the forgotten ones).
        others: signals of samples that never were, such as the test set.
        resamples, seed, fprs: of :func:`~fastunlearn.evaluate.roc.bootstrap`.

    Returns ``"loss"`` (Yeom et al. 2018), ``"confidence"``, ``"entropy"`` (Salem et al. 2019) and
    ``"modified_entropy"`` (Song and Mittal 2021). With the cross-entropy as loss the first two order samples alike,
    but confidences within rounding of 1 are tied.

    Raises ValueError for no samples or NaN signals. Cost: four bootstraps, 1.6 s for 10,000 + 10,000 samples.
    """
    return {
        name: attack(name, sign * getattr(members, name), sign * getattr(others, name), resamples, seed, fprs)
        for name, sign in _SIGNS.items()
    }


@dataclass(frozen=True)
class SVCAttack:
    """What the support-vector attack found; shares are in percent, with Wilson intervals at 95 %.

    Attributes:
        forget_as_member: share of the forgotten samples taken for members. Compare with a retrained model's: a
            generalising model lets many unseen samples pass for members. Papers also print the rest to 100.
        accuracy: cross-validated share of retain and test samples told apart, 50 for a coin: where it is near 50,
            the attack knows nothing and ``forget_as_member`` says nothing.
        samples: how many retain and how many test samples it was trained on, each.
    """

    forget_as_member: Estimate
    accuracy: Estimate
    samples: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        shares = {"forget_as_member": self.forget_as_member.as_dict(), "accuracy": self.accuracy.as_dict()}
        return {**shares, "samples": self.samples}

    def __str__(self) -> str:
        return (
            f"SVC: {self.forget_as_member} % of the forgotten samples pass for members; "
            f"it tells {self.accuracy} % of retain and test apart"
        )


def svc_attack(
    retain: Signals, test: Signals, forget: Signals, samples: int = 2000, seed: int = 0, folds: int = 5
) -> SVCAttack:
    """The confidence attack of the class-forgetting paper: learn retain from test, then judge the forgotten samples.

    An RBF support-vector classifier (C = 3, gamma = 1, as in the papers' public code) on one feature, the probability
    of the true class.

    Args:
        retain, test, forget: signals of the same model.
        samples: at most so many of retain and of test, as many of each, drawn without replacement: the classifier
            is quadratic in them.
        seed: of the draw and of the folds.
        folds: of the cross-validation, fewer where there are not two samples of each side per fold.

    Raises ValueError when a set is empty, retain or test has fewer than 2 samples, or a confidence is NaN. The
    intervals are about the samples judged, not about another draw of training samples.
    Cost: folds + 1 fits, O(samples^2) each; 2 s at 2,000 on one core.
    Sources: Kodge et al., TMLR 2024 (arXiv 2312.00761); Fan et al., SalUn, ICLR 2024.
    """
    import numpy as np
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.svm import SVC

    if samples < 2 or folds < 2:
        raise ValueError(f"samples and folds must be 2 or more, got samples = {samples} and folds = {folds}")
    features = {"retain": retain.confidence, "test": test.confidence, "forget": forget.confidence}
    for name, confidence in features.items():
        least = 1 if name == "forget" else 2
        if len(confidence) < least:
            raise ValueError(f"the SVC attack needs {least} or more samples of {name}, got {len(confidence)}")
        if bool(confidence.isnan().any()):
            raise ValueError(f"a confidence of {name} is NaN")
    size = min(samples, len(retain), len(test))
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(features[name].numpy(), size, replace=False) for name in ("retain", "test")]
    x, y = np.concatenate(drawn)[:, None], np.repeat([1, 0], size)
    classifier = SVC(C=3, gamma=1.0, kernel="rbf")
    split = StratifiedKFold(min(folds, size), shuffle=True, random_state=seed)
    right = int((cross_val_predict(classifier, x, y, cv=split) == y).sum())
    as_member = int(classifier.fit(x, y).predict(features["forget"].numpy()[:, None]).sum())
    return SVCAttack(share(as_member, len(forget)), share(right, 2 * size), size)


def share(hits: int, count: int) -> Estimate:
    """Percent of ``count`` samples, with Wilson's interval at 95 %. Raises ValueError without samples."""
    from scipy.stats import binomtest

    if count < 1:
        raise ValueError("a share needs at least one sample")
    interval = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    return Estimate(100 * hits / count, 100 * float(interval.low), 100 * float(interval.high))


def _percent(rate: Estimate) -> Estimate:
    low, high = (None if end is None else 100 * end for end in (rate.low, rate.high))
    return Estimate(100 * rate.mean, low, high, rate.runs)
