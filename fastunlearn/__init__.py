"""fastunlearn makes trained networks forget: hand-written kernels under three published algorithms."""

from fastunlearn import ops
from fastunlearn.codec import Foci, codec, foci
from fastunlearn.evaluate import Confusion, Metrics, confusion_matrix, evaluate
from fastunlearn.fisher import FisherDiagonal, fisher_diagonal
from fastunlearn.lowrank import RSVD, StreamingSketch, batched_eigh, batched_rsvd
from fastunlearn.methods.baselines import FineTune, GradientAscent, Retrain
from fastunlearn.methods.class_forgetting import ClassForgetting
from fastunlearn.methods.dampening import SelectiveSynapticDampening
from fastunlearn.methods.deepclean import DeepClean
from fastunlearn.methods.explanation import Explanation, Sweep
from fastunlearn.methods.lcodec import LCodec
from fastunlearn.methods.subspace_report import AlphaSearch, Plan, Spectrum, WeightChange, layer_change
from fastunlearn.optim import MaskedAdamW, MaskedSGD
from fastunlearn.outcome import Outcome
from fastunlearn.subspace import spectral_filter

__all__ = [
    "RSVD",
    "AlphaSearch",
    "ClassForgetting",
    "Confusion",
    "DeepClean",
    "Explanation",
    "FineTune",
    "FisherDiagonal",
    "Foci",
    "GradientAscent",
    "LCodec",
    "MaskedAdamW",
    "MaskedSGD",
    "Metrics",
    "Outcome",
    "Plan",
    "Retrain",
    "SelectiveSynapticDampening",
    "Spectrum",
    "StreamingSketch",
    "Sweep",
    "WeightChange",
    "batched_eigh",
    "batched_rsvd",
    "codec",
    "confusion_matrix",
    "evaluate",
    "fisher_diagonal",
    "foci",
    "layer_change",
    "ops",
    "spectral_filter",
]
