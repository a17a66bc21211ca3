"""fastunlearn makes trained networks forget: hand-written kernels under three published algorithms."""

from fastunlearn import ops
from fastunlearn.codec import Foci, codec, foci
from fastunlearn.evaluate import Metrics, evaluate
from fastunlearn.fisher import FisherDiagonal, fisher_diagonal
from fastunlearn.lowrank import RSVD, StreamingSketch, batched_eigh, batched_rsvd
from fastunlearn.methods.baselines import FineTune, GradientAscent, Retrain
from fastunlearn.methods.class_forgetting import ClassForgetting
from fastunlearn.methods.dampening import SelectiveSynapticDampening
from fastunlearn.methods.deepclean import DeepClean
from fastunlearn.methods.explanation import Explanation, Sweep
from fastunlearn.methods.lcodec import LCodec
from fastunlearn.optim import MaskedAdamW, MaskedSGD
from fastunlearn.outcome import Outcome
from fastunlearn.subspace import spectral_filter

__all__ = [
    "RSVD",
    "ClassForgetting",
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
    "Retrain",
    "SelectiveSynapticDampening",
    "StreamingSketch",
    "Sweep",
    "batched_eigh",
    "batched_rsvd",
    "codec",
    "evaluate",
    "fisher_diagonal",
    "foci",
    "ops",
    "spectral_filter",
]
