"""Which samples: by index, by id, by class, or by the user's own predicate."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastunlearn.inputs import places
from fastunlearn.inputs.samples import Samples

FORMS = "index:FILE, id:FILE, class:NAME[,NAME...], predicate:FILE.py:FUNCTION or all"


def select(samples: Samples, spec: str) -> Tensor:
    """The indices of the samples that ``spec`` names: int64 [m], ascending, each once, m >= 1.

    ``index:FILE``: a .json list (or ``{"indices": [...]}``), an .npy of integers, or a .txt of one index per line.
    ``id:FILE``: one id per line. ``class:cat,dog`` or ``class:3``: names of classes, or their numbers.
    ``predicate:file.py:function``: called with (index, id, label) of every sample, returns a bool. ``all``.

    Raises FileNotFoundError or ValueError of one line: indices that are no integers, negative, out of range or there
    twice, unknown ids and classes, a predicate that raises or returns anything else, and a selection of nothing.
    """
    kind, _, rest = spec.partition(":")
    if spec == "all":
        return torch.arange(len(samples))
    choose = _KINDS.get(kind)
    if choose is None or not rest:
        raise ValueError(f"{spec!r} is no selection of samples; write {FORMS}")
    chosen = choose(samples, rest, spec)
    if not chosen:
        raise ValueError(f"{spec!r} selects none of the {len(samples)} samples of {samples.source!r}")
    return torch.tensor(sorted(chosen), dtype=torch.int64)


def _by_index(samples: Samples, path: str, spec: str) -> list[int]:
    reader = {".json": _json_indices, ".npy": _npy_indices, ".txt": _text_indices}.get(Path(path).suffix.lower())
    if reader is None:
        raise ValueError(f"{spec!r}: a file of indices ends in .json, .npy or .txt")
    _require_file(path, spec)
    indices = reader(path, spec)
    for index in indices:
        if index < 0:
            raise ValueError(f"{spec!r}: the index {index} is negative; indices count from 0")
        if index >= len(samples):
            raise ValueError(
                f"{spec!r}: the index {index} is out of range; {samples.source!r} has {len(samples)} samples"
            )
    _require_distinct(indices, spec, "index")
    return indices


def _json_indices(path: str, spec: str) -> list[int]:
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also of text that is not UTF-8
        raise ValueError(f"{spec!r} can not be read as JSON: {places.one_line(error)}") from error
    if isinstance(value, dict):
        if "indices" not in value:
            raise ValueError(f"{spec!r} is an object without 'indices'; expected a list or {{\"indices\": [...]}}")
        value = value["indices"]
    if not isinstance(value, list):
        raise ValueError(f"{spec!r} holds a {type(value).__name__}, expected a list of integers")
    for position, index in enumerate(value):
        if not isinstance(index, int) or isinstance(index, bool):
            raise ValueError(f"{spec!r}: entry {position} is {_short(index)}, expected an integer")
    return value


def _npy_indices(path: str, spec: str) -> list[int]:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, MemoryError) as error:
        raise ValueError(f"{spec!r} can not be read as .npy: {places.one_line(error)}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu" or array.ndim != 1:
        shown = f"{array.dtype} of shape {list(array.shape)}" if isinstance(array, np.ndarray) else "an .npz archive"
        hint = "; numpy.flatnonzero makes indices of a mask" if shown.startswith("bool") else ""
        raise ValueError(f"{spec!r} holds {shown}, expected integers [m]{hint}")
    return [int(index) for index in array]


def _text_indices(path: str, spec: str) -> list[int]:
    numbers = []
    for line, text in _lines(path, spec):
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text.strip()):
            raise ValueError(f"{spec!r}: line {line} is {_short(text)}, expected an integer")
        numbers.append(int(text))
    return numbers


def _by_id(samples: Samples, path: str, spec: str) -> list[int]:
    _require_file(path, spec)
    index = {name: number for number, name in enumerate(samples.ids)}
    chosen = []
    for line, name in _lines(path, spec):
        name = name if name in index else name.strip()
        if name not in index:
            raise ValueError(f"{spec!r}: line {line}, {_short(name)}, is the id of no sample of {samples.source!r}")
        chosen.append(index[name])
    _require_distinct(chosen, spec, "id", samples.ids)
    return chosen


def _by_class(samples: Samples, names: str, spec: str) -> list[int]:
    classes = samples.classes
    # A class may be called "a,b".
    wanted = [names] if classes is not None and names in classes else [name.strip() for name in names.split(",")]
    numbers = [_class_number(samples, name, spec) for name in wanted]
    for name, number in zip(wanted, numbers, strict=True):
        if not (samples.labels == number).any():
            raise ValueError(f"{spec!r}: the class {name!r} has no sample in {samples.source!r}")
    return torch.isin(samples.labels, torch.tensor(numbers)).nonzero().flatten().tolist()


def _class_number(samples: Samples, name: str, spec: str) -> int:
    classes = samples.classes
    if classes is not None and name in classes:
        return classes.index(name)
    present = classes if classes is not None else [str(label) for label in sorted(set(samples.labels.tolist()))]
    number = int(name) if re.fullmatch(r"[0-9]{1,9}", name) else None
    if number is None or (number >= len(classes) if classes is not None else str(number) not in present):
        known = ", ".join(present[:10]) + (f" and {len(present) - 10} more" if len(present) > 10 else "")
        raise ValueError(f"{spec!r}: {samples.source!r} has no class {name!r}; known: {known}")
    return number


def _by_predicate(samples: Samples, place: str, spec: str) -> list[int]:
    predicate = places.find(place)
    if not callable(predicate):
        raise ValueError(f"{spec!r} is a {type(predicate).__name__}, expected a function (index, id, label) -> bool")
    chosen = []
    with places.importable(place):
        for index, (name, label) in enumerate(zip(samples.ids, samples.labels.tolist(), strict=True)):
            doing = f"{spec!r} on sample {index} (id {name!r}, label {label})"
            with places.blaming(doing):
                answer = predicate(index, name, label)
            if not isinstance(answer, (bool, np.bool_)):
                raise ValueError(f"{doing} returned {_short(answer)}, expected True or False")
            if answer:
                chosen.append(index)
    return chosen


_KINDS: dict[str, Callable[[Samples, str, str], list[int]]] = {
    "index": _by_index,
    "id": _by_id,
    "class": _by_class,
    "predicate": _by_predicate,
}


def _require_file(path: str, spec: str) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{spec!r}: there is no file {path!r}")


def _lines(path: str, spec: str) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{spec!r} is not UTF-8 text: {places.one_line(error)}") from error
    return [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _require_distinct(indices: Sequence[int], spec: str, what: str, names: Sequence[Any] | None = None) -> None:
    seen: set[int] = set()
    for index in indices:
        if index in seen:
            raise ValueError(f"{spec!r}: the {what} {index if names is None else repr(names[index])} is there twice")
        seen.add(index)


def _short(value: Any, most: int = 60) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= most else text[: most - 3] + "..."
