"""Measuring what was forgotten, against a model that never saw it."""

from fastunlearn.evaluate.attacks import Attack, SVCAttack, attack, svc_attack, threshold_attacks
from fastunlearn.evaluate.confusion import Confusion, confusion_matrix
from fastunlearn.evaluate.distances import RelativeDistance, activation_distance, weight_distance
from fastunlearn.evaluate.estimate import Estimate
from fastunlearn.evaluate.language import (
    Extraction,
    LanguageMetrics,
    MultipleChoice,
    Perplexity,
    Question,
    TokenLogProbs,
    extraction,
    language_metrics,
    min_k_attack,
    multiple_choice,
    perplexity,
    token_log_probs,
)
from fastunlearn.evaluate.leaks import LeakReport, NeighbourSet, leak_report, leak_scores, neighbours
from fastunlearn.evaluate.metrics import ClassMetrics, Metrics, evaluate, membership_auc, predict
from fastunlearn.evaluate.probes import linear_probe
from fastunlearn.evaluate.relearn import Relearn, anamnesis_index, relearn_time
from fastunlearn.evaluate.roc import Roc
from fastunlearn.evaluate.seeds import ClassEstimates, MetricsOverSeeds, over_runs
from fastunlearn.evaluate.signals import Signals, signals_of

# Shadow models train as the methods do, and these import what is above: LiRA, U-LiRA and their shadow models are in
# fastunlearn.evaluate.lira, .shadows and .stacked.
__all__ = [
    "Attack",
    "ClassEstimates",
    "ClassMetrics",
    "Confusion",
    "Estimate",
    "Extraction",
    "LanguageMetrics",
    "LeakReport",
    "Metrics",
    "MetricsOverSeeds",
    "MultipleChoice",
    "NeighbourSet",
    "Perplexity",
    "Question",
    "RelativeDistance",
    "Relearn",
    "Roc",
    "SVCAttack",
    "Signals",
    "TokenLogProbs",
    "activation_distance",
    "anamnesis_index",
    "attack",
    "confusion_matrix",
    "evaluate",
    "extraction",
    "language_metrics",
    "leak_report",
    "leak_scores",
    "linear_probe",
    "membership_auc",
    "min_k_attack",
    "multiple_choice",
    "neighbours",
    "over_runs",
    "perplexity",
    "predict",
    "relearn_time",
    "signals_of",
    "svc_attack",
    "threshold_attacks",
    "token_log_probs",
    "weight_distance",
]
