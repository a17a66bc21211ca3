"""What is wrong with a data set, a selection or an option is said in one line that names it, and nothing is changed."""

from __future__ import annotations

import io
import json
import re
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastunlearn.inputs import DataOptions, Samples, open_samples, select
from fastunlearn.inputs.arrays import Held

X, Y = np.arange(12, dtype=np.float32).reshape(4, 3), np.array([0, 1, 0, 1])


@dataclass(frozen=True)
class Case:
    """``write`` makes the data in a folder and returns what to open; the message holds all of ``says``."""

    name: str
    write: Callable[[Path], str]
    says: tuple[str, ...]
    options: DataOptions = field(default_factory=DataOptions)
    error: type[Exception] = ValueError


def npz(**parts: Any) -> Callable[[Path], str]:
    def write(root: Path) -> str:
        np.savez(root / "data.npz", **parts)
        return str(root / "data.npz")

    return write


def tensors(**parts: torch.Tensor) -> Callable[[Path], str]:
    def write(root: Path) -> str:
        save_file(parts, root / "data.safetensors")
        return str(root / "data.safetensors")

    return write


def text(name: str, content: str | bytes) -> Callable[[Path], str]:
    def write(root: Path) -> str:
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return str(root / name)

    return write


def csv(content: str) -> Callable[[Path], str]:
    return text("data.csv", content)


def jsonl(*rows: Any) -> Callable[[Path], str]:
    return text("data.jsonl", "\n".join(map(json.dumps, rows)))


def parquet(**columns: Any) -> Callable[[Path], str]:
    def write(root: Path) -> str:
        pandas.DataFrame(columns).to_parquet(root / "data.parquet")
        return str(root / "data.parquet")

    return write


def code(content: str) -> Callable[[Path], str]:
    def write(root: Path) -> str:
        (root / "code.py").write_text("import numpy, torch\n" + content)
        return f"{root / 'code.py'}:data"

    return write


def png(side: int = 4) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), 9, np.uint8)).save(file, "PNG")
    return file.getvalue()


def folder(**files: bytes | None) -> Callable[[Path], str]:
    """Names with ``__`` for ``/`` and ``_`` for ``.``; None is an empty folder."""

    def write(root: Path) -> str:
        for name, content in files.items():
            path = root / "images" / name.replace("__", "/").replace("_", ".")
            (path if content is None else path.parent).mkdir(parents=True, exist_ok=True)
            if content is not None:
                path.write_bytes(content)
        return str(root / "images")

    return write


def hugging_face(split: str | None = None, **columns: Any) -> Callable[[Path], str]:
    def write(root: Path) -> str:
        import datasets

        data = datasets.Dataset.from_dict(columns)
        (data if split is None else datasets.DatasetDict({split: data})).save_to_disk(str(root / "set"))
        return str(root / "set")

    return write


def hugging_images(*contents: bytes | None) -> Callable[[Path], str]:
    def write(root: Path) -> str:
        import datasets

        features = datasets.Features({"a": datasets.Image(), "y": datasets.Value("int64")})
        cells = [content and {"bytes": content, "path": None} for content in contents]
        rows = {"a": cells, "y": [0] * len(cells)}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(root / "set"))
        return str(root / "set")

    return write


def changed(write: Callable[[Path], str], change: Callable[[bytes], bytes]) -> Callable[[Path], str]:
    def written(root: Path) -> str:
        spec = write(root)
        Path(spec).write_bytes(change(Path(spec).read_bytes()))
        return spec

    return written


def within(write: Callable[[Path], str], inner: str) -> Callable[[Path], str]:
    return lambda root: f"{write(root)}::{inner}"


def with_nan(row: int, value: float = np.nan, shape: tuple[int, ...] = (4, 3)) -> np.ndarray:
    x = np.zeros(shape, np.float32)
    x[row:].reshape(-1)[-1] = value
    x[row].reshape(-1)[0] = value
    return x


def one_image(archive_name: str, member: str) -> Callable[[Path], str]:
    def write(root: Path) -> str:
        with zipfile.ZipFile(root / archive_name, "w") as archive:
            archive.writestr(member, png())
        return str(root / archive_name)

    return write


CASES = [
    # What is not there, or not known
    Case("no such file", lambda root: str(root / "none.npz"), ("none.npz", "no such file"), error=FileNotFoundError),
    Case("no such code file", lambda root: f"{root}/none.py:data", ("none.py", "no file"), error=FileNotFoundError),
    Case("unknown ending", text("data.xlsx", "x"), ("data.xlsx", "no known format", ".npz", ".safetensors", ".csv")),
    Case("no ending", text("data", "x"), ("data", "no known format")),
    Case("an npz that is none", text("data.npz", "hello there"), ("data.npz", "can not be read as .npz")),
    Case("an empty npz file", text("data.npz", ""), ("data.npz", "can not be read as .npz")),
    Case("half an npz", changed(npz(x=X, y=Y), lambda b: b[: len(b) // 2]), ("data.npz", "can not be read")),
    Case("a bit of an npz", changed(npz(x=X, y=Y), lambda b: b.replace(X[1].tobytes(), X[2].tobytes())),
         ("data.npz", "'x' can not be read", "CRC")),
    Case("a pickle for an npz", text("data.npz", b"\x80\x04cos\nsystem\n(S'true'\ntR."),
         ("data.npz", "can not be read")),
    Case("half a safetensors", changed(tensors(x=torch.ones(4, 3), y=torch.ones(4)), lambda b: b[:-9]),
         ("data.safetensors", "can not be read", "SafetensorError")),
    Case("a safetensors that is none", text("data.safetensors", b"\xff" * 64), ("data.safetensors", "can not be read")),
    Case("half a parquet", changed(parquet(a=[1, 2], y=[0, 1]), lambda b: b[:-9]), ("data.parquet", "Parquet")),
    Case("an empty csv file", csv(""), ("data.csv", "can not be read as CSV")),
    Case("a csv of bytes", csv("a,y\n1,") and text("data.csv", b"a,y\n\xff\xfe,1\n"), ("data.csv", "CSV", "utf-8")),
    Case("a csv row too long", csv("a,y\n1,0\n1,2,3\n"), ("data.csv", "CSV", "line 3")),
    Case("csv rows too long", csv("a,y\n1,0,3\n1,2,3\n"), ("data.csv", "CSV")),
    Case("no json in jsonl", text("data.jsonl", '{"a": 1, "y": 0}\n{"a": 1'), ("data.jsonl", "line 2", "no JSON")),
    Case("a list in jsonl", jsonl({"a": 1, "y": 0}, [1]), ("data.jsonl", "line 2", "a list")),
    # Empty
    Case("no rows in csv", csv("a,y\n"), ("data.csv", "empty")),
    Case("no lines in jsonl", text("data.jsonl", "\n\n"), ("data.jsonl", "empty")),
    Case("no samples in npz", npz(x=np.zeros((0, 3)), y=np.zeros(0)), ("data.npz", "empty")),
    Case("samples of nothing", npz(x=np.zeros((4, 0)), y=Y), ("data.npz': 'x'", "empty", "[4, 0]")),
    Case("one number", npz(x=np.float32(3), y=Y), ("data.npz': 'x'", "empty")),
    Case("no rows in a hf set", hugging_face(a=[], y=[]), ("set",)),
    Case("an empty folder", folder(a=None), ("images", "class folder 'a' has no image")),
    Case("a folder of nothing", lambda root: str(root), ("no class folders",)),
    # Names
    Case("no inputs", npz(a=X, y=Y), ("data.npz", "none of x, inputs", "'a'", "option inputs")),
    Case("no targets", npz(x=X, z=Y), ("data.npz", "none of y, targets", "'z'", "option targets")),
    Case("inputs that are not there", npz(x=X, y=Y), ("data.npz", "no 'q' (option inputs)", "'x', 'y'"),
         DataOptions(inputs="q")),
    Case("targets that are not there", csv("a,y\n1,0\n"), ("data.csv", "no 'q' (option targets)"),
         DataOptions(targets="q")),
    Case("an id that is not there", csv("a,y\n1,0\n"), ("data.csv", "no 'q' (option id)"), DataOptions(id="q")),
    Case("columns that are not there", csv("a,y\n1,0\n"), ("data.csv", "no 'q' (option columns)"),
         DataOptions(columns=("a", "q"))),
    Case("inputs and columns", csv("a,y\n1,0\n"), ("data.csv", "not both"), DataOptions(columns=("a",), inputs="a")),
    Case("no numbers", csv("text,y\nhello,0\n"), ("data.csv", "no column of numbers", "'text' is text", "tokenizer")),
    Case("text without a tokenizer", csv("text,y\nhello,0\n"), ("data.csv", "'text'", "tokenizer"),
         DataOptions(inputs="text")),
    Case("text among the columns", csv("a,b,y\n1,u,0\n"), ("data.csv", "column 'b'", "no numbers"),
         DataOptions(columns=("a", "b"))),
    Case("no such split", within(hugging_face("train", a=[1.0], y=[0]), "test"), ("set", "splits (train)")),
    Case("a split of none", within(hugging_face(a=[1.0], y=[0]), "train"), ("set", "no splits", "'train'")),
    Case("a part of an npz", within(npz(x=X, y=Y), "train"), ("data.npz::train", "part 'train'")),
    # Lengths
    Case("more inputs than targets", npz(x=X, y=Y[:3]), ("data.npz': 'x' has 4", "'y' has 3")),
    Case("more targets than inputs", tensors(x=torch.ones(2, 3), y=torch.zeros(3)), ("'x' has 2", "'y' has 3")),
    Case("ids of another length", npz(x=X, y=Y, k=[1, 2]), ("data.npz", "2 ids"), DataOptions(id="k")),
    Case("named inputs of several lengths",
         code("def data(): return {'a': torch.ones(3), 'b': torch.ones(2)}, [0] * 3"),
         ("code.py", "'b' has 2", "'a' has 3")),
    Case("labels among the inputs", code("def data(): return {'labels': torch.ones(1)}, [0]"), ("code.py", "'labels'")),
    Case("an image of 32 bits", code("from PIL import Image\nclass data:\n  def __len__(self): return 1\n"
                                     "  def __getitem__(self, i): return Image.new('F', (4, 4)), 0"),
         ("code.py:data", "sample 0", "32 bits")),
    Case("no named inputs", code("def data(): return {}, [0]"), ("code.py", "empty")),
    # Targets
    Case("targets between whole numbers", npz(x=X, y=[0, 1, 1.5, 2.5]), ("data.npz': 'y'", "row 2 is 1.5")),
    Case("targets NaN", npz(x=X, y=[0, np.nan, 1, 1]), ("data.npz': 'y'", "row 1 is nan")),
    Case("targets infinite", npz(x=X, y=[0, 1, 1, np.inf]), ("data.npz': 'y'", "row 3 is inf")),
    Case("negative targets", npz(x=X, y=[0, 1, -1, -2]), ("data.npz': 'y'", "row 2 is -1")),
    Case("targets too large", npz(x=X, y=[0, 1, 2_000_000, 1]), ("data.npz': 'y'", "row 2 is 2000000", "1,000,000")),
    Case("targets of two axes", npz(x=X, y=np.eye(4)), ("data.npz': 'y'", "[4, 4]", "one label per sample")),
    Case("complex targets", npz(x=X, y=Y * 1j), ("data.npz': 'y'", "complex")),
    Case("a missing target", csv("a,y\n1,no\n2,\n"), ("data.csv", "column 'y'", "row 1 is missing")),
    Case("a missing number as target", csv("a,y\n1,0\n2,\n"), ("data.csv", "column 'y'", "row 1 is nan")),
    # Numbers
    Case("NaN in an array", npz(x=with_nan(2), y=Y), ("data.npz': 'x'", "row 2 holds NaN or infinity")),
    Case("infinity in an array", npz(x=with_nan(1, -np.inf), y=Y), ("data.npz': 'x'", "row 1 holds NaN")),
    Case("NaN in images", tensors(images=torch.from_numpy(with_nan(3, shape=(4, 3, 5, 5))), labels=torch.zeros(4)),
         ("data.safetensors': 'images'", "row 3 holds NaN")),
    Case("numbers beyond float32", npz(x=X.astype(np.float64) * 1e300, y=Y), ("'x'", "row 0 holds", "too large")),
    Case("NaN in csv", csv("a,b,y\n1,2,0\n3,nan,1\n"), ("data.csv", "column 'b'", "row 1 is missing, NaN")),
    Case("infinity in csv", csv("a,b,y\n1,2,0\n3,-inf,1\n"), ("data.csv", "column 'b'", "row 1")),
    Case("a hole in csv", csv("a,b,y\n1,,0\n3,4,1\n"), ("data.csv", "column 'b'", "row 0 is missing")),
    Case("a hole in jsonl", jsonl({"a": 1, "b": 2, "y": 0}, {"a": 1, "y": 0}), ("column 'b'", "row 1 is missing")),
    Case("a hole in parquet", parquet(a=[1, None], y=[0, 1]), ("data.parquet", "column 'a'", "row 1 is missing")),
    Case("NaN from a function", code("def data(): return torch.tensor([[1.0], [float('nan')]]), [0, 1]"),
         ("code.py", "the inputs", "row 1 holds NaN")),
    Case("deep images without a scale", npz(x=np.full((4, 5, 5), 4095), y=Y), ("data.npz': 'x'", "4095", "scale")),
    # Kinds
    Case("objects", npz(x=np.array([1, "a", None, {}], dtype=object), y=Y), ("data.npz': 'x'", "array of objects")),
    Case("object targets", npz(x=X, y=np.array([0, 1, 0, "a"], dtype=object)), ("data.npz': 'y'", "objects")),
    Case("complex inputs", npz(x=X * 1j, y=Y), ("data.npz': 'x'", "complex64")),
    Case("dates", npz(x=np.array(["2026-01-01"] * 4, "M8[D]"), y=Y), ("data.npz': 'x'", "datetime64")),
    Case("bytes", npz(x=np.array([b"a"] * 4), y=Y), ("data.npz': 'x'", "expected numbers")),
    Case("numbers and names in csv", csv("a,y\n1,0\nhello,1\n"), ("data.csv", "column 'a'", "row 0 is the number 1",
                                                                 "row 1 is 'hello'")),
    Case("numbers and names in targets", csv("a,y\n1,cat\n2,3\n"), ("data.csv", "column 'y'", "row 1 is the number 3")),
    Case("numbers and names in jsonl", jsonl({"a": 1, "y": 0}, {"a": "1", "y": 0}), ("column 'a'", "row 1 is text")),
    Case("numbers and lists in jsonl", jsonl({"x": [1], "y": 0}, {"x": 1, "y": 0}),
         ("column 'x'", "row 1 is a number")),
    Case("lists of several lengths", jsonl({"x": [1], "y": 0}, {"x": [1, 2], "y": 0}),
         ("column 'x'", "row 1 has another")),
    Case("uneven lists", jsonl({"x": [[1], [1, 2]], "y": 0}), ("data.jsonl", "column 'x'", "row 0 has another")),
    Case("lists of text", jsonl({"x": ["a", "b"], "y": 0}), ("data.jsonl", "column 'x'", "expected lists of numbers")),
    Case("uneven lists in parquet", parquet(x=[[1.0], [1.0, 2.0]], y=[0, 1]), ("column 'x'", "row 1 is missing or")),
    Case("uneven nested lists in parquet", parquet(x=[[[1], [2]], [[1], [2, 3]]], y=[0, 1]), ("column 'x'", "row 1")),
    Case("huge integers", jsonl({"a": 10**30, "y": 0}), ("data.jsonl", "column 'a'", "64 bits")),
    Case("text as its own target without text", csv("a,y\n1,0\n"), ("data.csv", "column 'a'", "only text"),
         DataOptions(inputs="a", targets="a")),
    # Options that would be passed over
    Case("an id for a folder", folder(a__1_png=png()), ("images", "option id"), DataOptions(id="k")),
    Case("columns for an npz", npz(x=X, y=Y), ("data.npz", "option columns is for tables"),
         DataOptions(columns=("x",))),
    Case("text_length for numbers", npz(x=X, y=Y), ("data.npz", "option text_length"), DataOptions(text_length=3)),
    Case("mean for inputs by name", code("def data(): return {'a': torch.ones(1)}, [0]"), ("code.py", "option mean"),
         DataOptions(mean=1)),
    Case("scale for text", csv("text,y\nhello,0\n"), ("data.csv", "option scale is not for text"),
         DataOptions(inputs="text", scale=2)),
    Case("targets for a function", code("def data(): return [1.0], [0]"), ("code.py", "option targets"),
         DataOptions(targets="y")),
    Case("mean for Samples", code("from fastunlearn.inputs import *\nfrom fastunlearn.inputs.arrays import Held\n"
                                  "one = torch.ones(1, 1)\n"
                                  "def data(): return Samples(Held(one), one[0].long(), ['a'], None, 's')"),
         ("code.py:data", "option mean", "returned Samples"), DataOptions(mean=1)),
    Case("half a surrogate pair", text("data.jsonl", '{"text": "\\ud800", "y": 0}'),
         ("column 'text'", "row 0", "Unicode")),
    # Ids
    Case("an id twice", csv("k,a,y\nu,1,0\nv,2,1\nu,3,1\n"), ("data.csv", "id 'u' is there twice"),
         DataOptions(id="k")),
    Case("an id twice in an npz", npz(x=X, y=Y, k=[7, 8, 9, 8]), ("data.npz", "id '8'"), DataOptions(id="k")),
    Case("ids between whole numbers", npz(x=X, y=Y, k=[1.5, 2, 3, 4]), ("'k'", "text or integers"),
         DataOptions(id="k")),
    Case("an id of two lines", jsonl({"k": "a\nb", "a": 1, "y": 0}), ("column 'k'", "row 0 is 'a\\nb'"),
         DataOptions(id="k")),
    # Images
    Case("an image that is none", folder(a__1_png=png(), b__2_png=b"hello"), ("images", "'b/2.png'", "no image")),
    Case("half an image", folder(a__1_png=png(64)[:-60], b__2_png=png(64)), ("images", "'a/1.png'", "can not be read")),
    Case("an empty image", folder(a__1_png=b""), ("images", "'a/1.png'", "can not be read")),
    Case("no image in a class", folder(a__1_png=png(), b=None), ("images", "class folder 'b' has no image")),
    Case("something else in a class", folder(a__1_png=png(), a__notes_txt=b""),
         ("images", "'a/notes.txt' is no image")),
    Case("an image outside the classes", folder(a__1_png=png(), x_png=png()), ("images", "'x.png' lies outside")),
    Case("images of two sizes", folder(a__1_png=png(4), b__2_png=png(5)), ("'b/2.png'", "'a/1.png'", "image_size")),
    Case("mean of two channels", folder(a__1_png=png()), ("images", "mean has 2 numbers", "3"),
         DataOptions(mean=(0.5, 0.5))),
    Case("an archive that is none", text("data.tar.xz", "hello"), ("data.tar.xz", "can not be read as an archive")),
    Case("a zip that is none", text("data.zip", "hello"), ("data.zip", "can not be read as an archive")),
    Case("a folder the archive lacks", within(one_image("d.zip", "top/a/1.png"), "train"),
         ("d.zip::train", "no folder 'train'", "its folders: top")),
    Case("a way out of an archive", one_image("d.zip", "../a/1.png"), ("d.zip", "'../a/1.png'", "'..'")),
    Case("a missing text", hugging_face(a=["x", None], y=[0, 1]), ("set", "column 'a'", "row 1 is missing"),
         DataOptions(inputs="a")),
    Case("an image missing in a hf set", hugging_images(png(), None), ("set", "column 'a'", "row 1 is missing")),
    Case("an image broken in a hf set", hugging_images(png(), png()[:50]), ("set", "the image '1'", "can not be read")),
    # Code
    Case("code that raises", code("def data(): raise KeyError('a\\nb')"), ("code.py:data", "raised KeyError")),
    Case("code that can not be imported", code("1 / 0\ndef data(): pass"), ("code.py", "raised ZeroDivisionError")),
    Case("code that is no function", code("data = 3"), ("code.py:data", "is a int")),
    Case("code without it", code("other = 3"), ("code.py:data", "no 'data'")),
    Case("code that returns nothing", code("def data(): pass"), ("code.py:data", "returned a NoneType")),
    Case("code that returns three", code("def data(): return 1, 2, 3, 4"), ("code.py:data", "returned a tuple")),
    Case("a data set that raises", code("class data:\n  def __len__(self): return 3\n  def __getitem__(self, i):\n"
                                        "    return torch.ones(2) / (2 - i if i < 2 else 1 // 0), 0"),
         ("code.py:data", "sample 2", "ZeroDivisionError")),
    Case("a data set of several shapes", code("class data:\n  def __len__(self): return 3\n"
                                              "  def __getitem__(self, i): return torch.ones(1 + i // 2), 0"),
         ("code.py:data", "sample 2", "[2]", "[1]")),
    Case("a data set of several types", code("class data:\n  def __len__(self): return 2\n"
                                             "  def __getitem__(self, i): return (1, 1.5)[i], 0"),
         ("code.py:data", "sample 1", "float64", "int64")),
    Case("a data set of singles", code("class data:\n  def __len__(self): return 2\n"
                                       "  def __getitem__(self, i): return torch.ones(2)"),
         ("code.py:data", "sample 0 is a Tensor", "pair")),
    Case("a data set of unlabelled dicts", code("class data:\n  def __len__(self): return 2\n"
                                                "  def __getitem__(self, i): return {'x': 1}"),
         ("code.py:data", "sample 0 has x", "'labels'")),
    Case("an empty data set", code("class data:\n  def __len__(self): return 0\n  def __getitem__(self, i): pass"),
         ("code.py:data", "empty")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_malformed_data_is_refused_in_one_line(case: Case, tmp_path: Path) -> None:
    spec = case.write(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(case.error) as raised:
        open_samples(spec, options=case.options)
    message = str(raised.value)
    assert "\n" not in message and len(message) < 900
    assert all(part in message for part in case.says), message
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_names_of_classes_that_are_not_known_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,y\n1,cat\n2,cow\n")
    with pytest.raises(ValueError, match=r"column 'y': row 1 is 'cow', which is none of the 2 classes"):
        open_samples(str(tmp_path / "t.csv"), classes=["cat", "dog"])
    np.savez(tmp_path / "t.npz", x=X, y=[0, 1, 2, 1])
    with pytest.raises(ValueError, match=r"'y': row 2 is 2; expected less than 2, the classes"):
        open_samples(str(tmp_path / "t.npz"), classes=["cat", "dog"])


class Without:
    """A finder for which a package is not installed."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=self.package)


@pytest.mark.parametrize(
    ("package", "write"),
    [
        ("PIL", folder(a__1_png=png())),
        ("pandas", csv("a,y\n1,0\n")),
        ("pyarrow", parquet(a=[1], y=[0])),
        ("datasets", hugging_face(a=[1.0], y=[0])),
    ],
)
def test_a_missing_package_is_named_with_what_to_install(
    package: str, write: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = write(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [Without(package), *sys.meta_path])
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=re.escape("pip install fastunlearn[data]")) as raised:
        open_samples(spec)
    assert "\n" not in str(raised.value)


# Options


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"imagesize": 3}, ValueError, "unknown key 'imagesize'; known: inputs, targets"),
        ({"inputs": 3}, TypeError, "inputs must be a name, got 3"),
        ({"id": ""}, TypeError, "id must be a name, got ''"),
        ({"columns": "a"}, TypeError, "columns must be distinct names, got 'a'"),
        ({"columns": []}, TypeError, "columns must be distinct names, got []"),
        ({"columns": ["a", "a"]}, TypeError, "columns must be distinct names, got ['a', 'a']"),
        ({"image_size": 0}, TypeError, "image_size must be a whole number of 1 or more, or a pair of them, got 0"),
        ({"image_size": [3, 4, 5]}, TypeError, "image_size"),
        ({"image_size": 3.0}, TypeError, "image_size"),
        ({"image_size": True}, TypeError, "image_size"),
        ({"channels": 2}, ValueError, "channels must be 1 or 3, got 2"),
        ({"channels": "3"}, TypeError, "channels must be 1 or 3, got '3'"),
        ({"mean": "0.5"}, TypeError, "mean must be a number or numbers, got '0.5'"),
        ({"mean": [0.5, None]}, TypeError, "mean must be a number or numbers, got [0.5, None]"),
        ({"mean": float("nan")}, TypeError, "mean"),
        ({"std": [1, 0]}, ValueError, "std must be above 0, got [1, 0]"),
        ({"scale": 0}, ValueError, "scale must be above 0, got 0"),
        ({"scale": True}, TypeError, "scale must be a number, got True"),
        ({"text_length": 0}, ValueError, "text_length must be 1 or more, got 0"),
        ({"text_length": 2.5}, TypeError, "text_length must be a whole number, got 2.5"),
    ],
)
def test_options_are_refused_by_name(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        DataOptions.from_dict(values)


# Selections


def samples(classes: list[str] | None = None) -> Samples:
    return Samples(Held(torch.ones(6, 2)), torch.tensor([0, 1, 2] * 2), list("abcdef"), classes, "six")


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("spec", "content", "says"),
    [
        ("index:{}/i.json", "[0, 6, 7]", ("i.json", "6 is out of range", "6 samples")),
        ("index:{}/i.json", "[0, -1]", ("i.json", "-1 is negative")),
        ("index:{}/i.json", "[0, 3, 5, 3, 5]", ("i.json", "index 3 is there twice")),
        ("index:{}/i.json", "[]", ("i.json", "selects none of the 6")),
        ("index:{}/i.json", "[0, 1.0]", ("i.json", "entry 1 is 1.0")),
        ("index:{}/i.json", "[true]", ("i.json", "entry 0 is True")),
        ("index:{}/i.json", '[0, "1"]', ("i.json", "entry 1 is '1'")),
        ("index:{}/i.json", "[[0, 1]]", ("i.json", "entry 0 is [0, 1]")),
        ("index:{}/i.json", '{"forget": [1]}', ("i.json", "'indices'")),
        ("index:{}/i.json", '{"indices": 3}', ("i.json", "holds a int")),
        ("index:{}/i.json", "3", ("i.json", "holds a int")),
        ("index:{}/i.json", "[0, 1", ("i.json", "JSON", "JSONDecodeError")),
        ("index:{}/i.json", b"\xff\xfe", ("i.json", "JSON", "UnicodeDecodeError")),
        ("index:{}/i.json", "[" * 100_000, ("i.json", "JSON", "RecursionError")),
        ("index:{}/i.npy", npy([0.0, 1.0]), ("i.npy", "float64 of shape [2]")),
        ("index:{}/i.npy", npy([True, False]), ("i.npy", "bool", "flatnonzero")),
        ("index:{}/i.npy", npy([[0, 1]]), ("i.npy", "shape [1, 2]")),
        ("index:{}/i.npy", npy(np.array([0, None])), ("i.npy", "can not be read as .npy")),
        ("index:{}/i.npy", npy([0, 1])[:-3], ("i.npy", "can not be read as .npy")),
        ("index:{}/i.npy", b"", ("i.npy", "can not be read as .npy")),
        ("index:{}/i.npy", npy(np.array([2**64 - 1], np.uint64)), ("i.npy", "18446744073709551615 is out of range")),
        ("index:{}/i.txt", "0\n1.5\n", ("i.txt", "line 2 is '1.5'")),
        ("index:{}/i.txt", "0\n\none\n", ("i.txt", "line 3 is 'one'")),
        ("index:{}/i.txt", "1_0\n", ("i.txt", "line 1 is '1_0'")),
        ("index:{}/i.txt", "0\n0\n", ("i.txt", "index 0 is there twice")),
        ("index:{}/i.txt", b"\xff\n", ("i.txt", "UTF-8")),
        ("index:{}/i.csv", "0\n", ("i.csv", ".json, .npy or .txt")),
        ("index:{}/none.txt", "", ("none.txt", "no file")),
        ("index:", "", ("'index:' is no selection",)),
        ("indices:{}/i.txt", "", ("no selection", "index:FILE")),
        ("rest", "", ("no selection",)),
        ("", "", ("no selection",)),
        ("id:{}/i.txt", "a\nz\n", ("i.txt", "line 2, 'z'", "no sample of 'six'")),
        ("id:{}/i.txt", "a\nb\na\n", ("i.txt", "id 'a' is there twice")),
        ("id:{}/i.txt", "\n", ("i.txt", "selects none")),
        ("class:3", "", ("class:3", "no class '3'", "known: 0, 1, 2")),
        ("class:cat", "", ("no class 'cat'", "known: 0, 1, 2")),
        ("class:0,,1", "", ("no class ''",)),
        ("class:-1", "", ("no class '-1'",)),
        ("predicate:{}/p.py:raises", "def raises(i, n, l):\n  if i > 2: raise KeyError('gone')\n  return True\n",
         ("p.py:raises", "sample 3 (id 'd', label 0)", "KeyError: 'gone'")),
        ("predicate:{}/p.py:number", "def number(i, n, l): return 1\n", ("p.py:number", "sample 0", "returned 1")),
        ("predicate:{}/p.py:never", "def never(i, n, l): return False\n", ("p.py:never", "selects none of the 6")),
        ("predicate:{}/p.py:two", "def two(i, n): return True\n", ("p.py:two", "sample 0", "TypeError")),
        ("predicate:{}/p.py:absent", "", ("p.py:absent", "no 'absent'")),
        ("predicate:{}/p.py", "", ("p.py", "file.py:function")),
        ("predicate:{}/none.py:f", "", ("none.py", "no file")),
    ],
)  # fmt: skip
def test_malformed_selections_are_refused_in_one_line(
    spec: str, content: str | bytes, says: tuple[str, ...], tmp_path: Path
) -> None:
    name = re.search(r"\{}/([\w.]+)", spec)
    if name and not name[1].startswith("none"):
        (tmp_path / name[1]).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        select(samples(), spec.format(tmp_path))
    message = str(raised.value)
    assert "\n" not in message and len(message) < 900
    assert all(part in message for part in says), message


def test_unknown_classes_list_the_known_but_not_more_than_ten() -> None:
    names = [f"c{n:02}" for n in range(14)]
    with pytest.raises(ValueError, match=r"no class 'dog'; known: c00, c01, .*, c09 and 4 more$"):
        select(samples(names), "class:dog")
    with pytest.raises(ValueError, match=r"the class 'c07' has no sample in 'six'"):
        select(samples(names), "class:c01,c07")
    with pytest.raises(ValueError, match=r"no class '14'"):
        select(samples(names), "class:14")


def test_a_predicate_that_raises_is_chained(tmp_path: Path) -> None:
    (tmp_path / "p.py").write_text("def f(i, n, l): raise LookupError('a\\nb')\n")
    with pytest.raises(ValueError, match=r"raised LookupError: a b$") as raised:
        select(samples(), f"predicate:{tmp_path / 'p.py'}:f")
    assert isinstance(raised.value.__cause__, LookupError)
