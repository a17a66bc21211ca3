"""The methods by the names that a configuration calls them, made from plain settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import nn

from fastunlearn.jobs.config import ConfigError, check_type, is_plain, pick, shown
from fastunlearn.methods.baselines import FineTune, GradientAscent, Retrain
from fastunlearn.methods.budget import Budget
from fastunlearn.methods.class_forgetting import ClassForgetting
from fastunlearn.methods.dampening import SelectiveSynapticDampening
from fastunlearn.methods.deepclean import DeepClean
from fastunlearn.methods.lcodec import LCodec
from fastunlearn.methods.newton import Privacy
from fastunlearn.outcome import Outcome


class Method(Protocol):
    """What every method is to a job."""

    @property
    def unlearn(self) -> Callable[..., Outcome]: ...


@dataclass(frozen=True)
class Entry:
    """One method.

    Attributes:
        kind: its class.
        shuffled: whether it trains on the retained data, which then come in a new seeded order each epoch.
        samples: of each set that it is given where the configuration does not say; None for all.
        baseline: shown as what others are compared with.
    """

    kind: type
    shuffled: bool = False
    samples: int | None = None
    baseline: bool = False


METHODS = {
    "deepclean": Entry(DeepClean, shuffled=True),
    "class-forgetting": Entry(ClassForgetting, samples=1000),
    "lcodec": Entry(LCodec),
    "ssd": Entry(SelectiveSynapticDampening),
    "finetune": Entry(FineTune, shuffled=True, baseline=True),
    "gradient-ascent": Entry(GradientAscent, baseline=True),
    "retrain": Entry(Retrain, shuffled=True, baseline=True),
}
TAKES_VALIDATION = ("deepclean", "lcodec")
_CODE = ("loss_fn", "build", "progress", "score")  # functions, and what the command line decides by itself


def entry(name: str) -> Entry:
    """The method called ``name``; raises ConfigError with the known names."""
    if name not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def make_method(name: str, settings: Mapping[str, Any], seed: int, build: Callable[[], nn.Module]) -> Method:
    """The method with these settings; raises ConfigError naming the setting.

    ``protect`` takes parameter names and names of torch's layers ("BatchNorm2d"), ``autocast`` and ``fisher_dtype``
    "bfloat16", ``privacy`` and ``budget`` mappings. ``seed`` is that of the run unless the settings have their own;
    ``build`` makes a fresh model for retraining.
    """
    kind = entry(name).kind
    known = {f.name: str(f.type) for f in fields(kind)}
    what = f"settings of {name}"
    values = dict(settings)
    for key, value in settings.items():
        if key in _CODE:
            raise ConfigError(f"{what}: {key} can not be set here")
        if key in known and is_plain(known[key]):
            check_type(value, known[key], f"{what}: {key}")
        elif known.get(key, "").startswith(("tuple", "Sequence")):
            if value is not None and not isinstance(value, list):
                raise ConfigError(f"{what}: {key} must be a list, got {shown(value)}")
            values[key] = None if value is None else tuple(value)
    if values.get("protect"):
        values["protect"] = tuple(_layer_or_name(p) for p in settings["protect"])
    for key in ("autocast", "fisher_dtype"):
        if values.get(key) is not None and key in known:
            if values[key] != "bfloat16":
                raise ConfigError(f"{what}: {key} must be bfloat16 or null, got {values[key]!r}")
            values[key] = torch.bfloat16
    for key, part in (("privacy", Privacy), ("budget", Budget)):
        if values.get(key) is not None:
            check_type(values[key], "dict", f"{what}: {key}")
            values[key] = pick(part, values[key], f"{what}: {key}")
    if "seed" in known:
        values.setdefault("seed", seed)
    if kind is Retrain:
        values["build"] = build
    method: Method = pick(kind, values, what)
    return method


def _layer_or_name(text: Any) -> Any:
    layer = getattr(nn, text, None) if isinstance(text, str) else None
    return layer if isinstance(layer, type) and issubclass(layer, nn.Module) else text
