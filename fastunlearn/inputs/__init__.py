"""Data, models and selections named on a command line, opened and checked."""

from fastunlearn.inputs.models import build_model, tokenizer_of
from fastunlearn.inputs.options import DataOptions
from fastunlearn.inputs.samples import Loader, Samples, open_samples
from fastunlearn.inputs.selection import select
from fastunlearn.inputs.texts import open_questions

__all__ = [
    "DataOptions",
    "Loader",
    "Samples",
    "build_model",
    "open_questions",
    "open_samples",
    "select",
    "tokenizer_of",
]
