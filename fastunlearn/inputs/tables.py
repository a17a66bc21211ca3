"""Tables: CSV, Parquet, JSON lines and Hugging Face datasets, of numbers, lists of numbers, texts or images."""

from __future__ import annotations

import hashlib
import importlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fastunlearn.inputs import arrays, places, texts
from fastunlearn.inputs.options import INPUT_NAMES, TARGET_NAMES
from fastunlearn.inputs.samples import OF_NUMBERS, Reading, Samples, assembled, found, listed, refuse

_MISSING = ("", "nan", "NaN")  # cells of a CSV file; "NA" and "None" may well be names


def open_table(reading: Reading) -> Samples:
    """A .csv, .parquet or .jsonl file.

    The inputs are, in this order: the feature ``columns`` of ``options``; its ``inputs`` column; the first column of
    text (with a tokenizer) or of lists that has a default name; all columns of numbers but the target and the id.
    Labels of text are numbered by the sorted names. JSON lines of chats or of prompts with completions are read as
    :func:`~fastunlearn.inputs.texts.open_conversations` does, unless ``options`` name inputs. Raises ValueError naming
    the file, column and first wrong row.
    """
    if reading.inner:
        raise ValueError(f"{reading.spec!r}: a table has no part {reading.inner!r}")
    ending = reading.path.suffix.lower()
    if ending == ".csv":
        return _from_columns(reading, _read_csv(reading))
    if ending == ".parquet":
        return _from_columns(reading, _read_parquet(reading.path, reading.spec))
    rows, lines = jsonl_rows(reading.path, reading.spec)
    if texts.is_conversation(rows, reading.options):
        return texts.open_conversations(reading, rows, lines)
    names = dict.fromkeys(name for row in rows for name in row)
    return _from_columns(reading, {name: [row.get(name) for row in rows] for name in names})


def is_hugging_face(path: Path) -> bool:
    """Whether a folder was written by ``save_to_disk`` of Hugging Face's ``datasets``."""
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))


def open_hugging_face(reading: Reading) -> Samples:
    """A folder that Hugging Face's ``save_to_disk`` wrote; with several splits, ``folder::train`` names one.

    A column of images is read as image files are; everything else as the columns of a table.
    """
    datasets = _required("datasets", reading.spec)
    with places.blaming(f"{reading.spec!r}: datasets.load_from_disk"):
        data = datasets.load_from_disk(str(reading.path))
    if isinstance(data, datasets.DatasetDict):
        if reading.inner not in data:
            known = ", ".join(sorted(data))
            raise ValueError(f"{reading.spec!r}: name one of its splits ({known}), as in '{reading.path}::{min(data)}'")
        data = data[reading.inner]
    elif reading.inner:
        raise ValueError(f"{reading.spec!r}: the data set has no splits, so no part {reading.inner!r}")
    if not len(data):
        raise ValueError(f"{reading.spec!r} is empty: it has no row")
    images = [name for name, feature in data.features.items() if isinstance(feature, datasets.Image)]
    x = reading.options.inputs or (images[0] if len(images) == 1 else None)
    if x is not None and x in images:
        return _open_encoded(reading, data.cast_column(x, datasets.Image(decode=False)), x, images)
    with places.blaming(f"{reading.spec!r}: datasets"):
        table = data.remove_columns(images).with_format("arrow")[:]
    columns = {name: _of_arrow(table[name], _at(reading.spec, name)) for name in table.column_names}
    y, labels, classes = _labels(reading, data, columns)
    return _from_columns(replace(reading, classes=classes), {**columns, y: labels})


def tokenized(texts: Sequence[str], reading: Reading, where: str, padding_side: str | None = None) -> arrays.Named:
    """``input_ids`` and ``attention_mask`` int64 [n, T], T the ``text_length`` or the longest text's; padded on the
    tokenizer's side unless told otherwise.

    Raises ValueError naming ``where`` without a tokenizer or padding token, and for the first text without a token.
    """
    refuse(reading, OF_NUMBERS, "is not for text")
    tokenizer, options = reading.tokenizer, reading.options
    if tokenizer is None:
        raise ValueError(f"{where} is text, which needs a tokenizer: name the folder of a Hugging Face model")
    if tokenizer.pad_token is None:
        raise ValueError(f"{where} is text, and its tokenizer has no padding token; set one and save it")
    limit = tokenizer.model_max_length if tokenizer.model_max_length < 1 << 30 else None  # 1e30 where it is unknown
    length = options.text_length or limit
    with places.blaming(f"{where}: the tokenizer"):
        tokens = tokenizer(
            list(texts), padding="max_length" if options.text_length else "longest", truncation=length is not None,
            max_length=length, return_tensors="pt", padding_side=padding_side,
        )  # fmt: skip
    lengths = tokens["attention_mask"].sum(1)
    if not lengths.all():
        row = int((lengths == 0).nonzero()[0])
        raise ValueError(f"{where}: row {row} is {texts[row][:40]!r}, a text without a token")
    known = tuple(hashlib.sha256(text.encode()).digest() for text in texts)
    return arrays.Named({name: tokens[name].long() for name in ("input_ids", "attention_mask")}, known)


Columns = Mapping[str, Any]  # name -> NumPy array of numbers [n] or of lists of numbers [n, ...], or a list of cells


def _read_csv(reading: Reading) -> Columns:
    spec, options = reading.spec, reading.options
    pandas = _required("pandas", spec)
    texts = [options.id] if reading.tokenizer is None else [options.id, options.inputs or "text"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pandas.errors.ParserWarning)  # rows longer than the header
            frame = pandas.read_csv(
                reading.path, keep_default_na=False, na_values=list(_MISSING), low_memory=False, index_col=False,
                dtype={name: str for name in texts if name is not None},  # the id 007 is not 7
            )  # fmt: skip
    except (OSError, ValueError, pandas.errors.ParserWarning) as error:
        raise ValueError(f"{spec!r} can not be read as CSV: {places.one_line(error)}") from error
    columns: dict[str, Any] = {}
    for name, column in frame.items():
        number = isinstance(column.dtype, np.dtype) and column.dtype.kind in "biuf"
        missing = column.isna()
        columns[str(name)] = column.to_numpy() if number else column.astype(object).where(~missing, None).tolist()
    target = found(columns, options.targets, TARGET_NAMES, "targets", repr(spec))
    chosen = _chosen(reading, target)
    for name, cells in columns.items():
        if isinstance(cells, list) and name not in texts and (chosen is None or name in chosen):
            _require_one_kind(cells, _at(spec, name))
    return columns


def _read_parquet(path: Path, spec: str) -> Columns:
    parquet = _required("pyarrow.parquet", spec)
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError, NotImplementedError) as error:  # ArrowInvalid is a ValueError
        raise ValueError(f"{spec!r} can not be read as Parquet: {places.one_line(error)}") from error
    return {name: _of_arrow(table[name], _at(spec, name)) for name in table.column_names}


def jsonl_rows(path: Path, spec: str) -> tuple[list[dict[str, Any]], list[int]]:
    """The objects of a file of JSON lines, and the lines that they are on, from 1; raises ValueError for anything else.

    Blank lines are passed over.
    """
    rows, lines = [], []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{spec!r}: line {number} is no JSON: {places.one_line(error)}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{spec!r}: line {number} holds a {type(row).__name__}, expected an object")
            rows.append(row)
            lines.append(number)
    return rows, lines


def _of_arrow(column: Any, where: str) -> Any:
    """An array in the type that Arrow has, [n] or, of lists, [n, ...], or a list of anything else."""
    pyarrow, compute, types = (_required(f"pyarrow{part}", where) for part in ("", ".compute", ".types"))
    array = pyarrow.concat_arrays(column.chunks) if column.num_chunks else pyarrow.array([], column.type)
    if isinstance(array, pyarrow.ExtensionArray):  # the Array2D and so on of Hugging Face
        array = array.storage
    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    shape: list[int] = []
    while types.is_list(array.type) or types.is_large_list(array.type) or types.is_fixed_size_list(array.type):
        lengths = compute.list_value_length(array).to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero(lengths != lengths[:1])  # a missing list has no length: NaN
        if len(lengths) and (len(wrong) or lengths[0] != lengths[0]):
            row = int(wrong[0]) // int(np.prod(shape)) if len(wrong) else 0
            raise ValueError(f"{where}: row {row} is missing or has another length than row 0; expected one shape")
        shape.append(int(lengths[0]) if len(lengths) else 0)
        array = array.flatten()
    number = types.is_integer(array.type) or types.is_floating(array.type) or types.is_boolean(array.type)
    if not number:
        return array.to_pylist() if not shape else column.to_pylist()
    return array.to_numpy(zero_copy_only=False).reshape(-1, *shape)  # a missing number becomes NaN


def _from_columns(reading: Reading, columns: Columns) -> Samples:
    spec, options = reading.spec, reading.options
    if not columns or not len(next(iter(columns.values()))):
        raise ValueError(f"{spec!r} is empty: it has no row")
    y = found(columns, options.targets, TARGET_NAMES, "targets", repr(spec))
    if options.id is not None:
        found(columns, options.id, (), "id", repr(spec))
    chosen = _chosen(reading, y)
    columns = {
        name: _column(cells, _at(spec, name)) if chosen is None or name in chosen else cells
        for name, cells in columns.items()
    }
    for name in (y, *(() if options.id is None else (options.id,))):
        _require_cells(columns[name], _at(spec, name))
    ids = None if options.id is None else arrays.ids_from(columns[options.id], _at(spec, options.id))
    if y == options.inputs:
        if not arrays.is_text(columns[y]):
            raise ValueError(f"{_at(spec, y)} is named as inputs and as targets, which only text can be")
        return texts.next_tokens(reading, columns[y], ids, _at(spec, y))
    x, at = _inputs(reading, columns, y)
    return assembled(reading, x, columns[y], ids, at, _at(spec, y))


def _chosen(reading: Reading, target: str) -> set[str | None] | None:
    """The columns that are used; None where all are looked at."""
    options = reading.options
    if options.columns is None and options.inputs is None:
        return None
    return {target, options.id, options.inputs, *(options.columns or ())}


def _require_cells(column: Any, where: str) -> None:
    if not isinstance(column, np.ndarray) and None in column:
        raise ValueError(f"{where}: row {column.index(None)} is missing")


def _inputs(reading: Reading, columns: Columns, target: str) -> tuple[Any, str]:
    """The inputs of a table, [n, columns], [n, ...] or texts, and what to call them."""
    spec, options = reading.spec, reading.options
    others = [name for name in columns if name not in (target, options.id)]
    if options.columns is not None:
        if options.inputs is not None:
            raise ValueError(f"{spec!r}: give the option inputs or columns, not both")
        return _stacked(reading, columns, list(options.columns))
    one = options.inputs or next((n for n in INPUT_NAMES if n in others and _is_input(columns[n], reading)), None)
    if one is not None:
        found(columns, one, (), "inputs", repr(spec))
        x, at = columns[one], _at(spec, one)
        _require_cells(x, at)
        return (x.reshape(-1, 1) if isinstance(x, np.ndarray) and x.ndim == 1 else x), at
    numbers = [name for name in others if isinstance(columns[name], np.ndarray) and columns[name].ndim == 1]
    if not numbers:
        texts = [name for name in others if arrays.is_text(columns[name])]
        hint = f"; {texts[0]!r} is text, which needs a tokenizer" if texts else ""
        raise ValueError(f"{spec!r} has no column of numbers beside the target; it has {listed(columns)}{hint}")
    return _stacked(reading, columns, numbers)


def _is_input(column: Any, reading: Reading) -> bool:
    if isinstance(column, np.ndarray):
        return column.ndim > 1
    return reading.tokenizer is not None


def _stacked(reading: Reading, columns: Columns, names: list[str]) -> tuple[Any, str]:
    for name in names:
        found(columns, name, (), "columns", repr(reading.spec))
        if not isinstance(columns[name], np.ndarray) or columns[name].ndim > 1:
            raise ValueError(f"{reading.spec!r}: column {name!r} holds no numbers, so it is no feature")
        _require_finite(columns[name], _at(reading.spec, name))
    return np.stack([columns[name].astype(np.float64) for name in names], 1), f"{reading.spec!r}: its columns"


def _require_finite(column: Any, where: str) -> None:
    finite = np.isfinite(column.astype(np.float64))
    if not finite.all():
        raise ValueError(f"{where}: row {int(np.flatnonzero(~finite)[0])} is missing, NaN or infinity")


def _column(cells: Any, where: str) -> Any:
    """An array of numbers [n] or, of lists, [n, ...], or a list of texts and None; raises ValueError for a mixture."""
    if isinstance(cells, np.ndarray):
        return cells
    kinds = [_kind(cell) for cell in cells]
    kind = next((k for k in kinds if k != "missing"), "missing")
    row = next((row for row, k in enumerate(kinds) if k != kind), None)
    if kind == "text" and set(kinds) <= {"text", "missing"}:  # a hole counts only where the column is used
        _require_unicode(cells, where)
        return list(cells)
    if kind == "a number" and set(kinds) <= {"a number", "missing"}:
        numbers = np.array([np.nan if cell is None else cell for cell in cells])
        if numbers.dtype.kind == "O":
            raise ValueError(f"{where} holds integers of more than 64 bits")
        return numbers
    if kind == "a list" and row is None:
        return _of_lists(cells, where)
    if row is None:
        return cells  # dates and the like: an error only where they are used
    raise ValueError(f"{where}: row {row} is {kinds[row]}, row {kinds.index(kind)} is {kind}; expected one kind")


def _require_unicode(cells: Sequence[str | None], where: str) -> None:
    for row, cell in enumerate(cells):
        if cell is not None and any("\ud800" <= character <= "\udfff" for character in cell):
            raise ValueError(f"{where}: row {row} is {cell[:40]!r}, which is no Unicode text")


def _require_one_kind(cells: Sequence[str | None], where: str) -> None:
    """A CSV file has no types: a column of numbers in which there is a name would be taken for one of names."""
    numeric = {row: _is_number(cell) for row, cell in enumerate(cells) if cell is not None}
    number = next((row for row, is_number in numeric.items() if is_number), None)
    name = next((row for row, is_number in numeric.items() if not is_number), None)
    if number is not None and name is not None:
        raise ValueError(
            f"{where}: row {number} is the number {cells[number]}, row {name} is {str(cells[name])[:40]!r}; "
            "expected one kind"
        )


def _is_number(cell: str | bool) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _kind(cell: Any) -> str:
    if cell is None:
        return "missing"
    if isinstance(cell, str):
        return "text"
    if isinstance(cell, (bool, int, float, np.number, np.bool_)):
        return "a number"
    return "a list" if isinstance(cell, (list, tuple, np.ndarray)) else f"a {type(cell).__name__}"


def _of_lists(cells: Sequence[Any], where: str) -> Any:
    shapes = [_shape(cell) for cell in cells]
    for row, shape in enumerate(shapes):
        if shape is None or shape != shapes[0]:
            raise ValueError(f"{where}: row {row} has another shape than row 0, or none; expected one shape")
    array = np.array(cells)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{where} has lists of {array.dtype}, expected lists of numbers")
    return array


def _shape(cell: Any) -> tuple[int, ...] | None:
    """Of nested lists; None where those within have different lengths."""
    try:
        return tuple(np.shape(cell))
    except ValueError:
        return None


def _at(spec: str, column: str) -> str:
    return f"{spec!r}: column {column!r}"


def _labels(reading: Reading, data: Any, columns: Columns) -> tuple[str, Any, list[str] | None]:
    """The name of the target column, its cells, and the classes; of a ``ClassLabel`` their names for their numbers."""
    y = found(columns, reading.options.targets, TARGET_NAMES, "targets", repr(reading.spec))
    names = getattr(data.features[y], "names", None)
    if names is None:
        return y, columns[y], reading.classes
    labels, _ = arrays.labels_from(columns[y], _at(reading.spec, y), names)
    return y, [names[label] for label in labels.tolist()], reading.classes or list(names)


def _open_encoded(reading: Reading, data: Any, x: str, pictures: list[str]) -> Samples:
    from fastunlearn.inputs import images

    spec, options = reading.spec, reading.options
    refuse(reading, ("columns", "text_length"), "is not for images")
    with places.blaming(f"{spec!r}: datasets"):
        table = data.remove_columns(pictures).with_format("arrow")[:]
    columns = {name: _column(_of_arrow(table[name], _at(spec, name)), _at(spec, name)) for name in table.column_names}
    y, cells, known = _labels(reading, data, columns)
    _require_cells(cells, _at(spec, y))
    labels, classes = arrays.labels_from(cells, _at(spec, y), known)
    if options.id is not None:
        found(columns, options.id, (), "id", repr(spec))
    ids = arrays.rows(len(labels))
    if options.id is not None:
        _require_cells(columns[options.id], _at(spec, options.id))
        ids = arrays.ids_from(columns[options.id], _at(spec, options.id))
    data = data.with_format(None)

    def read(row: int) -> bytes:
        cell = data[row][x]
        content = cell and (cell["bytes"] or (cell["path"] and _bytes_of(cell["path"], f"{spec!r}: row {row}")))
        if not content:
            raise ValueError(f"{_at(spec, x)}: row {row} is missing")
        return bytes(content)

    return images.open_images(reading, ids, read, labels, ids, classes)


def _bytes_of(path: str, where: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise OSError(f"{where}: the image {path!r} can not be read: {places.one_line(error)}") from error


def _required(package: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ImportError(f"{spec!r} needs {package.partition('.')[0]}: pip install fastunlearn[data]") from error
