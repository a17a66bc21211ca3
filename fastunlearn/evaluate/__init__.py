"""Measuring what was forgotten, against a model that never saw it."""

from fastunlearn.evaluate.metrics import Metrics, evaluate, membership_auc, predict

__all__ = ["Metrics", "evaluate", "membership_auc", "predict"]
