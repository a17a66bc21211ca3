"""fastunlearn makes trained networks forget: hand-written kernels under three published algorithms."""

from typing import Any

from fastunlearn import ops
from fastunlearn.codec import Foci, codec, foci
from fastunlearn.evaluate import Confusion, Metrics, confusion_matrix, evaluate
from fastunlearn.fisher import FisherDiagonal, fisher_diagonal
from fastunlearn.independence import CodecTest, codec_test
from fastunlearn.language import causal_lm_loss, is_causal_lm
from fastunlearn.lowrank import RSVD, StreamingSketch, batched_eigh, batched_rsvd
from fastunlearn.methods.baselines import FineTune, GradientAscent, Retrain
from fastunlearn.methods.budget import Budget
from fastunlearn.methods.class_forgetting import ClassForgetting
from fastunlearn.methods.dampening import SelectiveSynapticDampening
from fastunlearn.methods.deepclean import DeepClean
from fastunlearn.methods.explanation import Explanation, Sweep
from fastunlearn.methods.lcodec import LCodec
from fastunlearn.methods.newton import Privacy
from fastunlearn.methods.subspace_report import AlphaSearch, Plan, Spectrum, WeightChange, layer_change
from fastunlearn.optim import MaskedAdamW, MaskedSGD
from fastunlearn.outcome import Outcome
from fastunlearn.parallel.deal import deal
from fastunlearn.subspace import spectral_filter

__all__ = [
    "RSVD",
    "AlphaSearch",
    "Budget",
    "ClassForgetting",
    "CodecTest",
    "Confusion",
    "DeepClean",
    "Explanation",
    "FineTune",
    "FisherDiagonal",
    "Foci",
    "FociSelector",
    "GradientAscent",
    "LCodec",
    "MaskedAdamW",
    "MaskedSGD",
    "Metrics",
    "Outcome",
    "Plan",
    "Privacy",
    "Retrain",
    "SelectiveSynapticDampening",
    "Spectrum",
    "StreamingSketch",
    "Sweep",
    "WeightChange",
    "batched_eigh",
    "batched_rsvd",
    "causal_lm_loss",
    "codec",
    "codec_test",
    "confusion_matrix",
    "deal",
    "evaluate",
    "fisher_diagonal",
    "foci",
    "is_causal_lm",
    "layer_change",
    "ops",
    "spectral_filter",
]


def __getattr__(name: str) -> Any:
    if name == "FociSelector":  # scikit-learn takes longer to import than torch; only this class needs it
        from fastunlearn.selection import FociSelector

        return FociSelector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
