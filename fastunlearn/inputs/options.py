"""How a data set is read: names of its parts, and what is done to its images, numbers and texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

INPUT_NAMES = ("x", "inputs", "images", "features", "pixel_values", "text")
TARGET_NAMES = ("y", "targets", "labels", "label", "target", "class")
TEXT_SPLITS = ("paragraph", "line", "block", "file")


@dataclass(frozen=True)
class DataOptions:
    """How to read a data set; every field survives JSON and YAML. Lists and tuples are the same here.

    inputs, targets, id : names of the arrays or columns; the defaults tried are x, inputs, images, features,
        pixel_values, text, and y, targets, labels, label, target, class. Without ``id`` a sample is known by its path
        within the folder, or by its row.
    columns : names of the feature columns of a table; default every numeric column but the target and the id.
    image_size : images are resized (bilinear, antialiased) to this height and width, or to a square of this side.
    channels : 1 or 3; the default is 3 for image files, as torchvision reads them, and what arrays have.
    scale : inputs are divided by it; default 255 for 8-bit integers and image files, none for anything else.
    mean, std : subtracted, then divided by; one number, or one per channel or column. After ``scale``.
    text_length : tokens per text; longer ones are cut, shorter ones padded. Default: the longest text's, at most
        what the tokenizer's model takes.
    text_split : what a sample of a text file is: a "paragraph" (between blank lines), a "line", a "block" of
        ``text_length`` tokens of the whole, or the "file". Default: "paragraph" of a file, "file" of a folder.

    Raises TypeError for a field of another type, ValueError for a value that can not be meant, both naming the field.
    """

    inputs: str | None = None
    targets: str | None = None
    columns: tuple[str, ...] | None = None
    id: str | None = None
    image_size: int | tuple[int, int] | None = None
    channels: int | None = None
    mean: float | tuple[float, ...] | None = None
    std: float | tuple[float, ...] | None = None
    scale: float | None = None
    text_length: int | None = None
    text_split: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # what JSON and YAML make of a tuple
                object.__setattr__(self, field.name, tuple(value))
        for name in ("inputs", "targets", "id"):
            _require(name, getattr(self, name), _is_name, "a name")
        _require("columns", self.columns, lambda v: _all(v, _is_name) and len(set(v)) == len(v), "distinct names")
        _require("image_size", self.image_size, _is_size, "a whole number of 1 or more, or a pair of them")
        _require("channels", self.channels, _is_whole, "1 or 3")
        _require("text_length", self.text_length, _is_whole, "a whole number")
        for name in ("mean", "std"):
            _require(name, getattr(self, name), lambda v: _is_real(v) or _all(v, _is_real), "a number or numbers")
        _require("scale", self.scale, _is_real, "a number")
        if self.channels not in (None, 1, 3):
            raise ValueError(f"channels must be 1 or 3, got {self.channels}")
        if self.text_length is not None and self.text_length < 1:
            raise ValueError(f"text_length must be 1 or more, got {self.text_length}")
        _require("text_split", self.text_split, _is_name, "a name")
        if self.text_split not in (None, *TEXT_SPLITS):
            raise ValueError(f"text_split must be one of {', '.join(TEXT_SPLITS)}, got {self.text_split!r}")
        for name in ("std", "scale"):
            value = getattr(self, name)
            if value is not None and not all(v > 0 for v in (value if isinstance(value, tuple) else (value,))):
                raise ValueError(f"{name} must be above 0, got {_shown(value)}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "data options") -> DataOptions:
        """From a mapping such as a section of a YAML file; raises ValueError for a key that is no field."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"{where}: unknown key {key!r}; known: {', '.join(known)}")
        return cls(**values)

    @property
    def size(self) -> tuple[int, int] | None:
        """``image_size`` as (height, width)."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size


def _require(name: str, value: Any, holds: Any, expected: str) -> None:
    if value is not None and not holds(value):
        raise TypeError(f"{name} must be {expected}, got {_shown(value)}")


def _shown(value: Any) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)


def _all(value: Any, holds: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(holds(part) for part in value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_size(value: Any) -> bool:
    pair = value if isinstance(value, tuple) else (value, value)
    return len(pair) == 2 and all(_is_whole(side) and side >= 1 for side in pair)
