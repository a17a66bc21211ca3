"""Measuring what was forgotten, against a model that never saw it."""

from fastunlearn.evaluate.confusion import Confusion, confusion_matrix
from fastunlearn.evaluate.metrics import Metrics, evaluate, membership_auc, predict

__all__ = ["Confusion", "Metrics", "confusion_matrix", "evaluate", "membership_auc", "predict"]
