"""What a user gets wrong: one line that names the file, the key or the flag, an exit code, and nothing changed."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import NET, Request, make_request
from PIL import Image
from safetensors.torch import load_file, save_file

from fastunlearn import cli
from fastunlearn.checkpoint import digest, load_weights
from fastunlearn.jobs import deletion
from fastunlearn.jobs.config import flag_of
from fastunlearn.jobs.workspace import Workspace
from fastunlearn.methods.deepclean import DeepClean
from fastunlearn.patch import apply_patch, write_patch
from fastunlearn.report.log import verify

X = np.random.default_rng(0).standard_normal((12, 6, 6)).astype(np.float32)
Y = np.arange(12) % 4
Make = Callable[[Path], object]


# How a run ends, and what it leaves


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    lines: list[str]  # of stderr


def ends(argv: list[str], capfd: pytest.CaptureFixture[str]) -> Ended:
    """Run the command line; argparse ends the process where main would return."""
    capfd.readouterr()
    try:
        code = cli.main(argv)
    except SystemExit as stopped:
        assert isinstance(stopped.code, int)
        code = stopped.code
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    return Ended(code, out, err.splitlines())


def snapshot(folder: Path) -> dict[str, Any]:
    """Every name below, hidden ones too; of files the size, the time of the last change, the mode and the content."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        if path.is_symlink():
            about: Any = os.readlink(path)
        elif path.is_dir():
            about = "folder"
        else:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            about = (status.st_size, status.st_mtime_ns, status.st_mode, content)
        found[path.relative_to(folder).as_posix()] = about
    return found


def request_flags(command: str, folder: Path) -> list[str]:
    """The flags of a request that is in order, as far as the command knows them."""
    every = Request(folder).flags(out="out" if command in ("unlearn", "compare") else None)
    known = {flag_of(name) for name in cli.COMMANDS[command]}
    return [part for pair in zip(every[::2], every[1::2], strict=True) if pair[0] in known for part in pair]


# Malformed files


def arrays(name: str, **parts: Any) -> Make:
    return lambda root: np.savez(root / name, **parts)


def text(name: str, content: str | bytes) -> Make:
    def write(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def cut(name: str, source: str, keep: Callable[[bytes], bytes]) -> Make:
    return lambda root: (root / name).write_bytes(keep((root / source).read_bytes()))


def all_of(*makes: Make) -> Make:
    def write(root: Path) -> None:
        for make in makes:
            make(root)

    return write


def changed(name: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Make:
    """Weights that differ from those of the request."""
    return lambda root: save_file(change(load_file(root / "weights.safetensors")), root / name)


def torch_saved(name: str, value: Any) -> Make:
    return lambda root: torch.save(value, root / name)


class Runs:
    """Whoever unpickles it makes a folder named as it says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def bomb_in_pickle(protocol: int, name: str = "w.pt") -> Make:
    return lambda root: (root / name).write_bytes(pickle.dumps({"1.weight": Runs(root / "it ran")}, protocol))


def bomb_in_archive(root: Path) -> None:
    torch.save({"1.weight": torch.ones(2), "hook": Runs(root / "it ran")}, root / "w.pt")


class Settings:
    """An object of the training script, saved beside the weights."""


def png(side: int = 6, value: int = 9) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((side, side), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def images(root: Path) -> None:
    """Two classes of two images, as a folder."""
    for name in ("cat/1", "cat/2", "dog/1", "dog/2"):
        text(f"images/{name}.png", png(value=len(name)))(root)


def zipped(name: str, *members: str, link: bool = False) -> Make:
    def write(root: Path) -> None:
        with zipfile.ZipFile(root / name, "w") as archive:
            for member in members:
                info = zipfile.ZipInfo(member)
                info.external_attr = (0o120777 if link else 0o100644) << 16
                archive.writestr(info, png())

    return write


def tarred(name: str, *members: str, link: str | None = None) -> Make:
    def write(root: Path) -> None:
        with tarfile.open(root / name, "w") as archive:
            for member in members:
                info, content = tarfile.TarInfo(member), png()
                if link is None:
                    info.size = len(content)
                else:
                    info.type, info.linkname = tarfile.SYMTYPE, link
                archive.addfile(info, io.BytesIO(content) if link is None else None)

    return write


def lying_npz(root: Path) -> None:
    """A few bytes that say they are an array of 800 terabytes."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**14,)})
    with zipfile.ZipFile(root / "t.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header.getvalue() + b"\0" * 1000)
        archive.writestr("y.npy", header.getvalue())


def patch_for_request(root: Path) -> None:
    before = load_weights(root / "weights.safetensors")
    write_patch(root / "p.safetensors", before, {k: v + 1 if k == "1.bias" else v for k, v in before.items()})


def patch_for_another(root: Path) -> None:
    before = {k: v + 1 for k, v in load_weights(root / "weights.safetensors").items()}
    write_patch(root / "p.safetensors", before, {k: v * 2 for k, v in before.items()})


def bomb_in_patch(root: Path) -> None:
    """The right digests and shapes, but values that unpack to 64 MB."""
    patch_for_request(root)
    from safetensors import safe_open

    with safe_open(root / "p.safetensors", "pt") as file:
        metadata = dict(file.metadata())
    table = json.loads(metadata["tensors"])
    table["1.bias"]["values"] = "shuffled"
    metadata["tensors"] = json.dumps(table)
    tensors = load_file(root / "p.safetensors")
    bomb = bytearray(zlib.compress(bytes(1 << 26), 9))
    tensors["1.bias/values"] = torch.frombuffer(bomb, dtype=torch.uint8)
    save_file(tensors, root / "p.safetensors", metadata)


NESTED = "- &a0 [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]\n" + "".join(
    f"- &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


@dataclass(frozen=True)
class Case:
    """``make`` puts what is wrong into the folder; in ``flags``, which come last and win, {} is that folder."""

    name: str
    says: tuple[str, ...]
    flags: tuple[str, ...] = ()
    make: Make | None = None
    command: str = "unlearn"
    code: int = 1
    request: bool = True  # whether the flags of a request in order come first


def weights(name: str, make: Make, *says: str, file: str = "w.safetensors") -> Case:
    return Case(name, ("--weights", file, *says), ("--weights", f"{{}}/{file}"), make)


def forget(name: str, spec: str, make: Make | None, *says: str) -> Case:
    return Case(name, ("--forget", *says), ("--forget", spec), make)


def data(name: str, spec: str, make: Make | None, *says: str, flags: tuple[str, ...] = ()) -> Case:
    return Case(name, ("--data", *says), ("--data", spec, *flags), make)


def npz(name: str, *says: str, **parts: Any) -> Case:
    return data(name, "{}/t.npz", arrays("t.npz", **parts), "t.npz", *says)


def model(name: str, body: str, *says: str, function: str = "net") -> Case:
    return Case(name, ("--model", *says), ("--model", f"{{}}/m.py:{function}"), text("m.py", NET + body))


def forward(result: str) -> str:
    """Code of a model that makes this of its logits ``x``."""
    return (
        "\nclass bad(nn.Sequential):\n    def __init__(self):\n        super().__init__(*net())\n\n"
        f"    def forward(self, x):\n        x = super().forward(x)\n        return {result}\n"
    )


def flag(name: str, *flags: str, says: tuple[str, ...], command: str = "unlearn", make: Make | None = None) -> Case:
    return Case(name, says, flags, make, command, code=2)


def config(name: str, content: str | bytes, *says: str, command: str = "unlearn", which: str = "run.yaml") -> Case:
    return Case(name, (which, *says), ("--config", "{}/run.yaml"), text("run.yaml", content), command, code=2)


WEIGHTS = [
    weights("half of a safetensors file", cut("w.safetensors", "weights.safetensors", lambda b: b[: len(b) // 2])),
    weights("a safetensors file without its last byte", cut("w.safetensors", "weights.safetensors", lambda b: b[:-1])),
    weights("a header that is cut off", cut("w.safetensors", "weights.safetensors", lambda b: b[:40])),
    weights("a header of 2^63 bytes", text("w.safetensors", b"\xff" * 7 + b"\x7f{}")),
    weights("garbage", text("w.safetensors", bytes(range(256)))),
    weights("an empty file of weights", text("w.safetensors", b"")),
    weights("no weights at all", lambda root: save_file({}, root / "w.safetensors"), "without weights"),
    weights("weights of another kind of file", text("w.onnx", b"x"), ".safetensors, .pt", file="w.onnx"),
    weights("an npz by the name of a pt", arrays("w.npz", x=X), file="w.npz"),
    weights("no such file", lambda root: None, "no such file", file="none.pt"),
    weights("a folder without weights", lambda root: (root / "w").mkdir(), "holds no weights", file="w"),
    weights("a safetensors file called pt", cut("w.pt", "weights.safetensors", lambda b: b), "torch.save", file="w.pt"),
    weights("half of a pt file", all_of(torch_saved("v.pt", {"1.bias": torch.ones(24)}),
                                        cut("w.pt", "v.pt", lambda b: b[: len(b) // 2])), file="w.pt"),
    weights("an empty pt file", text("w.pt", b""), file="w.pt"),
    weights("a zip that torch did not write", all_of(zipped("w.zip", "a.txt"), cut("w.pt", "w.zip", lambda b: b)),
            file="w.pt"),
    weights("a pickle that runs code", bomb_in_pickle(2), "refused", "mkdir", file="w.pt"),
    weights("a pickle of protocol 4 that runs code", bomb_in_pickle(4), "refused", file="w.pt"),
    weights("code in torch's own archive", bomb_in_archive, "refused", "mkdir", file="w.pt"),
    weights("Python objects beside the weights", torch_saved("w.pt", {"1.bias": torch.ones(24), "args": Settings()}),
            "refused", "Settings", file="w.pt"),
    weights("numbers for weights", torch_saved("w.pt", {"1.bias": [1.0, 2.0]}), "'1.bias' is a list", file="w.pt"),
    weights("a list for a dictionary", torch_saved("w.pt", [torch.ones(2)]), "a list", file="w.pt"),
    weights("one tensor", torch_saved("w.pt", torch.ones(2)), "dictionary of tensors", file="w.pt"),
    weights("numbers for names", torch_saved("w.pt", {1: torch.ones(2)}), "names of weights", file="w.pt"),
    weights("two models in one file", torch_saved("w.pt", {"model": {"a": torch.ones(1)}, "state_dict": {}}),
            "'state_dict' and 'model'", file="w.pt"),
    weights("missing weights", changed("w.safetensors", lambda s: {k: v for k, v in s.items() if k != "1.bias"}),
            "lacks 1.bias"),
    weights("weights that the model lacks", changed("w.safetensors", lambda s: s | {"9.bias": torch.ones(2)}),
            "has 9.bias"),
    weights("weights of another model", changed("w.safetensors", lambda s: {f"layer.{k}": v for k, v in s.items()}),
            "lacks 1.weight", "has layer.1.bias"),
    weights("another shape", changed("w.safetensors", lambda s: s | {"1.bias": torch.ones(25)}),
            "1.bias has shape [25]", "[24]"),
    weights("a transposed weight", changed("w.safetensors", lambda s: s | {"1.weight": s["1.weight"].T.contiguous()}),
            "1.weight has shape [36, 24]"),
    weights("NaN among the weights", changed("w.safetensors", lambda s: s | {"1.bias": s["1.bias"] * torch.nan}),
            "1.bias holds NaN"),
    weights("infinity among the weights", changed("w.safetensors", lambda s: s | {"3.bias": s["3.bias"] / 0}),
            "3.bias holds NaN or Inf"),
    weights("integers for floats", changed("w.safetensors", lambda s: s | {"1.bias": s["1.bias"].long()}),
            "1.bias is int64, the model's is float32"),
    weights("floats of 64 bits too large for 32", changed(
        "w.safetensors", lambda s: s | {"1.bias": torch.full((24,), 1e300, dtype=torch.float64)}), "too large"),
    weights("shards that are not there", text("w.index.json", '{"weight_map": {"1.bias": "s.safetensors"}}'),
            "s.safetensors", file="w.index.json"),
    weights("shards out of the folder", text("w.index.json", '{"weight_map": {"1.bias": "../s.safetensors"}}'),
            "'../s.safetensors'", file="w.index.json"),
    Case("a reference of another shape", ("--reference", "r.safetensors", "3.bias has shape [5]"),
         ("--reference", "{}/r.safetensors"), changed("r.safetensors", lambda s: s | {"3.bias": torch.ones(5)})),
    Case("a reference that is not there", ("--reference", "none.pt"), ("--reference", "{}/none.pt"), None, "evaluate"),
    Case("a reference of another shape for compare", ("--reference", "3.bias has shape [5]"),
         ("--reference", "{}/r.safetensors"),
         changed("r.safetensors", lambda s: s | {"3.bias": torch.ones(5)}), "compare"),
    Case("half of a safetensors file for evaluate", ("--weights", "w.safetensors"), ("--weights", "{}/w.safetensors"),
         cut("w.safetensors", "weights.safetensors", lambda b: b[:-9]), "evaluate"),
    Case("half of a safetensors file for plan", ("--weights", "w.safetensors"), ("--weights", "{}/w.safetensors"),
         cut("w.safetensors", "weights.safetensors", lambda b: b[:-9]), "plan"),
]  # fmt: skip

FORGET = [
    forget("an index out of range", "index:{}/i.json", text("i.json", "[3, 120]"), "i.json", "120 is out of range"),
    forget("a negative index", "index:{}/i.json", text("i.json", "[3, -1]"), "i.json", "-1 is negative"),
    forget("an index twice", "index:{}/i.json", text("i.json", "[3, 14, 3]"), "i.json", "index 3 is there twice"),
    forget("an index between two", "index:{}/i.json", text("i.json", "[3, 1.5]"), "i.json", "entry 1 is 1.5"),
    forget("true for an index", "index:{}/i.json", text("i.json", "[3, true]"), "i.json", "entry 1 is True"),
    forget("no JSON", "index:{}/i.json", text("i.json", "[3, 14"), "i.json", "JSON"),
    forget("brackets without end in JSON", "index:{}/i.json", text("i.json", "[" * 200_000), "i.json", "JSON"),
    forget("an empty list", "index:{}/i.json", text("i.json", "[]"), "i.json", "selects none"),
    forget("an empty file of indices", "index:{}/i.txt", text("i.txt", ""), "i.txt", "selects none"),
    forget("an array of objects", "index:{}/i.npy", lambda root: np.save(root / "i.npy", np.array([1, None])), "i.npy"),
    forget("a mask for indices", "index:{}/i.npy", lambda root: np.save(root / "i.npy", Y > 2), "i.npy", "flatnonzero"),
    forget("no index file", "index:{}/none.json", None, "none.json", "no file"),
    forget("a folder for an index file", "index:{}/i.json", lambda root: (root / "i.json").mkdir(), "i.json"),
    forget("an id that is not there", "id:{}/ids.txt", text("ids.txt", "3\nbob\n"), "ids.txt", "line 2, 'bob'"),
    forget("an id twice", "id:{}/ids.txt", text("ids.txt", "3\n3\n"), "ids.txt", "'3' is there twice"),
    forget("an unknown class", "class:7", None, "class:7", "no class '7'", "0, 1, 2, 3"),
    forget("a class by a name that there is not", "class:cat", None, "no class 'cat'"),
    forget("a kind of selection that there is not", "indices:3", None, "'indices:3'", "index:FILE"),
    forget("everything", "all", None, "all", "nothing to retain"),
    forget("every class", "class:0,1,2,3", None, "class:0,1,2,3", "takes all 120"),
    forget("a predicate that raises", "predicate:{}/p.py:f", text("p.py", "def f(i, n, l): return 1 // (i - 3) > 9\n"),
           "p.py:f", "ZeroDivisionError"),
    forget("a predicate that returns text", "predicate:{}/p.py:f", text("p.py", "def f(i, n, l): return 'no'\n"),
           "p.py:f", "'no'", "True or False"),
    forget("a predicate that is not there", "predicate:{}/p.py:g", text("p.py", "f = 3\n"), "no 'g'"),
    forget("a predicate file that is not there", "predicate:{}/none.py:f", None, "none.py"),
    forget("a predicate file that is not Python", "predicate:{}/p.py:f", text("p.py", "def f(:\n"), "SyntaxError"),
    forget("a predicate that leaves", "predicate:{}/p.py:f", text("p.py", "def f(i, n, l): raise SystemExit(0)\n"),
           "p.py:f", "SystemExit"),
    Case("forget and retain overlap", ("--forget class:1", "--retain", "sample 5 is in both"),
         ("--forget", "class:1", "--retain", "index:{}/i.json"), text("i.json", "[2, 5]")),
    Case("a retain set that there is not", ("--retain", "'remaining'"), ("--retain", "remaining")),
    Case("an empty class", ("--forget", "'bird'", "no sample"), ("--data", "{}/d.py:data", "--forget", "class:bird"),
         text("d.py", "import torch\nclass data:\n    classes = ['cat', 'dog', 'cow', 'bird']\n"
                      "    def __len__(self): return 8\n"
                      "    def __getitem__(self, i): return torch.ones(6, 6), i % 3\n")),
]  # fmt: skip

with_nan = X.copy()
with_nan[7, 2, 3] = np.nan
with_inf = X.copy()
with_inf[5, 0, 0] = -np.inf

DATA = [
    npz("NaN in the images", "'x'", "row 7 holds NaN or infinity", x=with_nan, y=Y),
    npz("infinity in the images", "'x'", "row 5 holds NaN or infinity", x=with_inf, y=Y),
    npz("inputs of objects", "'x' is an array of objects", x=np.array([X[0], None], dtype=object), y=Y),
    npz("mixed types in one array", "'x' is an array of objects", x=np.array([1, "a", 2.5], dtype=object), y=Y[:3]),
    npz("targets of objects", "'y' is an array of objects", x=X, y=np.array([0, "a"] * 6, dtype=object)),
    npz("more inputs than targets", "'x' has 12", "'y' has 11", x=X, y=Y[:11]),
    npz("targets between classes", "'y': row 1 is 1.5", x=X, y=Y + 0.5 * (np.arange(12) == 1)),
    npz("negative targets", "'y': row 4 is -1", x=X, y=np.where(np.arange(12) == 4, -1, Y)),
    npz("targets NaN", "'y': row 2 is nan", x=X, y=np.where(np.arange(12) == 2, np.nan, Y)),
    npz("targets one-hot", "'y' has shape [12, 4]", x=X, y=np.eye(4)[Y]),
    npz("no samples", "'x' is empty", x=X[:0], y=Y[:0]),
    npz("no targets", "none of y, targets", x=X),
    npz("no inputs", "none of x, inputs", y=Y),
    npz("complex inputs", "'x' holds complex", x=X * 1j, y=Y),
    npz("deep integers without a scale", "'x' has images of integers", "scale", x=(X * 1000).astype(np.int32), y=Y),
    data("an npz that is none", "{}/t.npz", text("t.npz", "hello"), "t.npz"),
    data("an empty npz file", "{}/t.npz", text("t.npz", ""), "t.npz"),
    data("half of an npz", "{}/t.npz", cut("t.npz", "train.npz", lambda b: b[: len(b) // 2]), "t.npz"),
    data("a pickle for an npz", "{}/t.npz", bomb_in_pickle(4, "t.npz"), "t.npz"),
    data("an npz that claims 800 terabytes", "{}/t.npz", lying_npz, "t.npz", "'x'"),
    data("no such data", "{}/none.npz", None, "none.npz", "no such file"),
    data("data of no known format", "{}/t.xlsx", text("t.xlsx", "x"), "t.xlsx", ".npz"),
    data("a folder of nothing", "{}/empty", lambda root: (root / "empty").mkdir(), "empty", "no class folders"),
    Case("more classes than outputs", ("--model", "4 outputs", "7 classes", "t.npz"), ("--data", "{}/t.npz"),
         arrays("t.npz", x=X, y=np.arange(12) % 7)),
    Case("inputs that the model can not take", ("--model", "can not run on", "t.npz"), ("--data", "{}/t.npz"),
         arrays("t.npz", x=X[:, :5], y=Y)),
    Case("test inputs of another shape", ("--model", "can not run on", "s.npz"), ("--test", "{}/s.npz"),
         arrays("s.npz", x=X[:, :5], y=Y)),
    Case("test data that are not there", ("--test", "none.npz"), ("--test", "{}/none.npz")),
    Case("NaN in the test data", ("--test", "s.npz", "row 7"), ("--test", "{}/s.npz"),
         arrays("s.npz", x=with_nan, y=Y)),
    Case("NaN in the validation data", ("--validation", "s.npz", "row 7"), ("--validation", "{}/s.npz"),
         arrays("s.npz", x=with_nan, y=Y)),
    Case("test data with a class more", ("--model", "4 outputs", "5 classes"), ("--test", "{}/s.npz"),
         arrays("s.npz", x=X, y=np.arange(12) % 5)),
    data("mixed types in a column", "{}/t.csv", text("t.csv", "a,b,y\n1,2,0\n3,many,1\n"), "column 'b'", "'many'"),
    data("a hole in a column", "{}/t.csv", text("t.csv", "a,b,y\n1,2,0\n3,,1\n"), "t.csv", "column 'b'", "row 1"),
    data("a column that is missing", "{}/t.csv", text("t.csv", "a,b,y\n1,2,0\n"), "t.csv", "no 'c'",
         flags=("--data-option", "columns=[a, c]")),
    data("a target that is missing", "{}/t.csv", text("t.csv", "a,b\n1,2\n"), "t.csv", "none of y, targets"),
    data("text without a tokenizer", "{}/t.csv", text("t.csv", "text,y\nhello,0\n"), "t.csv", "'text'", "tokenizer"),
    data("a table without rows", "{}/t.csv", text("t.csv", "a,y\n"), "t.csv", "empty"),
    data("a broken line of JSON", "{}/t.jsonl", text("t.jsonl", '{"a": 1, "y": 0}\n{"a": 1,\n'), "t.jsonl", "line 2"),
    data("half of a Parquet file", "{}/t.parquet", text("t.parquet", b"PAR1\0\0"), "t.parquet"),
    data("the same id twice", "{}/t.csv", text("t.csv", "k,a,y\nu,1,0\nu,2,1\n"), "t.csv", "'u' is there twice",
         flags=("--data-option", "id=k")),
    data("a way out of a zip", "{}/a.zip", zipped("a.zip", "../cat/1.png"), "a.zip", "'../cat/1.png'", "'..'"),
    data("a way out of a zip by backslashes", "{}/a.zip", zipped("a.zip", "cat\\..\\..\\1.png"), "a.zip", "'..'"),
    data("an absolute name in a zip", "{}/a.zip", zipped("a.zip", "/etc/1.png"), "a.zip", "absolute"),
    data("a link in a zip", "{}/a.zip", zipped("a.zip", "cat/1.png", link=True), "a.zip", "'cat/1.png'", "link"),
    data("a way out of a tar", "{}/a.tar", tarred("a.tar", "cat/../../1.png"), "a.tar", "'..'"),
    data("an absolute name in a tar", "{}/a.tar", tarred("a.tar", "/etc/passwd.png"), "a.tar", "absolute"),
    data("a link in a tar", "{}/a.tar", tarred("a.tar", "cat/1.png", link="/etc/passwd"), "'cat/1.png'", "link"),
    data("a member twice", "{}/a.tar", tarred("a.tar", "cat/1.png", "cat/1.png"), "a.tar", "twice"),
    data("half of a tar", "{}/a.tar", all_of(tarred("b.tar", "cat/1.png", "dog/1.png"),
                                             cut("a.tar", "b.tar", lambda b: b[:1200])), "a.tar"),
    data("an archive that is none", "{}/a.tar.xz", text("a.tar.xz", "hello"), "a.tar.xz"),
    data("an image that is none", "{}/images", all_of(images, text("images/dog/3.png", "hello")), "'dog/3.png'"),
    data("images of two sizes", "{}/images", all_of(images, text("images/dog/3.png", png(7))), "3.png", "image_size"),
    data("a class folder without images", "{}/images", all_of(images, lambda root: (root / "images/cow").mkdir()),
         "class folder 'cow' has no image"),
    data("notes among the images", "{}/images", all_of(images, text("images/cat/notes.txt", "x")), "'cat/notes.txt'"),
    data("a link in circles", "{}/images", all_of(images, lambda root: (root / "images/cat/up").symlink_to("..")),
         "cat/up"),
    Case("test images of other classes", ("--test", "other", "'cow'", "none of the 2 classes"),
         ("--data", "{}/images", "--test", "{}/other", "--forget", "class:cat"),
         all_of(images, text("other/cow/1.png", png()))),
    data("data whose function raises", "{}/d.py:data", text("d.py", "def data(): raise LookupError('gone')\n"),
         "d.py:data", "LookupError: gone"),
    data("a function that returns no data", "{}/d.py:data", text("d.py", "def data(): return 3\n"), "a int"),
    flag("an unknown option of the data", "--data-option", "imagesize=3", says=("--data-option", "'imagesize'")),
    flag("an option of another type", "--data-option", "image_size=large", says=("--data-option: image_size", "large")),
    Case("an option for other data", ("--data", "train.npz", "option columns"), ("--data-option", "columns=[a]")),
]  # fmt: skip

MODEL = [
    Case("a model file that is not there", ("--model", "none.py"), ("--model", "{}/none.py:net")),
    Case("a model that is no name", ("--model", "'resnet'"), ("--model", "resnet")),
    Case("a module that is not there", ("--model", "no_such_package"), ("--model", "no_such_package.nets:net")),
    Case("a folder that is no model", ("--model", "without config.json"), ("--model", "{}")),
    Case("a Hugging Face folder with a broken configuration", ("--model", "config.json"), ("--model", "{}/hf"),
         text("hf/config.json", "{")),
    Case("a Hugging Face folder without weights", ("--model", "no model.safetensors"), ("--model", "{}/hf"),
         text("hf/config.json", '{"architectures": ["BertForSequenceClassification"]}')),
    Case("code in a Hugging Face folder", ("--model", "architectures"), ("--model", "{}/hf"),
         text("hf/config.json", '{"auto_map": {"AutoModel": "evil.Model"}}')),
    model("a function that is not there", "", "no 'nett'", function="nett"),
    model("a model that raises", "\ndef bad():\n    raise KeyError('depth')\n", "KeyError: 'depth'", function="bad"),
    model("a file that raises", "\n1 / 0\n", "ZeroDivisionError"),
    model("a function that returns no model", "\ndef bad():\n    return 'net'\n", "returned a str", function="bad"),
    model("a model without weights", "\ndef bad():\n    return nn.Flatten()\n", "without parameters", function="bad"),
    model("a model whose forward raises", forward("{}['x']"), "can not run on", "KeyError", function="bad"),
    model("a model that returns pairs", forward("(x, 1)"), "logits [samples, classes]", "tuple", function="bad"),
    model("a model that returns images", forward("x[..., None]"), "[2, 4, 1]", function="bad"),
    model("a model that returns NaN", forward("x / 0 * 0"), "NaN or Inf", function="bad"),
    model("a model that returns classes", forward("x.argmax(1, keepdim=True)"), "logits", function="bad"),
    Case("an argument that the model does not take", ("--model", "depth"), ("--model-argument", "depth=3")),
]  # fmt: skip

YAML = [
    config("no YAML", "model: [a\n", "line 2", "not YAML"),
    config("bytes for YAML", b"model: \xff\xfe", "UTF-8"),
    config("an empty file", "", "keys and values"),
    config("a list for YAML", "- model\n", "keys and values"),
    config("an unknown key", "froget: class:3\n", "'froget'", "did you mean forget"),
    config("an ill-typed key", "batch_size: many\n", "batch_size must be a whole number", "'many'"),
    config("a number out of range", "seeds: 0\n", "seeds must be 1 or more"),
    config("a list for a mapping", "settings: [1]\n", "settings must be a mapping"),
    config("code in YAML", "model: !!python/object/apply:os.mkdir ['it ran']\n", "not YAML"),
    config("a billion values for a number", f"more: &m\n{NESTED}seed: *m\n", "unknown key 'more'"),
    config("a billion values under a known key", f"methods:\n{NESTED}", "methods holds more than 100,000 values"),
    config("a value that holds itself", "methods: &a [*a]\n", "methods", "or itself"),
    config("brackets without end in YAML", "settings: " + "[" * 5000, "not YAML", "recursion"),
    config("a day that there is not", "seed: 2026-13-45\n", "not YAML", "month"),
    config("a tag that does not fit", "probes: !!bool perhaps\n", "not YAML", "perhaps"),
    config("a NUL in text", 'model: "a\\0b"\n', "model", "NUL"),
    config("more resamples than there is memory for", "bootstrap: 10000000000000\n", "bootstrap", "1000000 or less"),
    config("settings of a compared method that are no mapping", "methods: [{method: ssd, settings: [1]}]\n",
           "ssd: settings must be a mapping", command="compare", which=""),
    config("a label that is no text", "methods: [{method: ssd, label: 3}]\n", "ssd: label must be text",
           command="compare", which=""),
    config("an unknown key of a compared method", "methods: [{method: ssd, setting: {}}]\n", "ssd", "'setting'",
           command="compare", which=""),
    config("a date", "settings: {fraction: 2026-01-01}\n", "settings", "date"),
    config("a setting that is infinite", "settings: {gamma: .inf}\n", "settings", "inf"),
    config("a number for a setting's name", "settings: {1: 2}\n", "settings", "1"),
    Case("a configuration that is not there", ("none.yaml",), ("--config", "{}/none.yaml")),
    Case("a folder for a configuration", ("run.yaml",), ("--config", "{}/run.yaml"),
         lambda root: (root / "run.yaml").mkdir()),
]  # fmt: skip

ALONE = ("--model", "{}/net.py:net", "--data", "{}/train.npz")
FLAGS_WRONG = [
    flag("an unknown flag", "--froget", "class:3", says=("--froget", "did you mean --forget?")),
    flag("an unknown flag of plan", "--resume", says=("--resume",), command="plan"),
    flag("a flag without a value", "--seed", says=("--seed", "expected one argument")),
    flag("text for a number", "--seed", "three", says=("--seed", "'three'")),
    flag("a negative number", "--batch-size", "-4", says=("batch", "-4")),
    flag("a seed of more than 32 bits", "--seed", "4294967296", says=("seed", "4294967296")),
    flag("a setting without a value", "--set", "fraction", says=("--set", "'fraction'")),
    flag("a setting that can not be read", "--set", "fraction=[1", says=("--set fraction", "'[1'")),
    flag("an unknown method", "--method", "deepclena", says=("method must be one of deepclean", "'deepclena'")),
    flag("an unknown setting", "--set", "fractoin=0.3", says=("settings of deepclean", "'fractoin'", "fraction")),
    flag("an ill-typed setting", "--set", "fraction=much", says=("settings of deepclean", "fraction", "'much'")),
    flag("text for a list of layers", "--set", "protect=1.weight", says=("protect must be a list",)),
    flag("a number for a mapping", "--method", "lcodec", "--config", "{}/c.yaml", says=("privacy must be a mapping",),
         make=text("c.yaml", "settings: {privacy: 3}\n")),
    flag("text for a number of training", "--training", "lr=fast", says=("training: lr must be a number", "'fast'")),
    flag("a setting out of range", "--set", "fraction=3", says=("settings of deepclean", "fraction")),
    flag("settings that exclude each other", "--set", "gamma=2.0", says=("gamma or fraction",)),
    flag("an unknown key of the training", "--training", "epoch=3", says=("training", "'epoch'", "epochs")),
    flag("training for no epoch", "--training", "epochs=0", says=("training", "epochs")),
    flag("an odd number of shadow models", "--shadows", "9", says=("shadows", "even", "9")),
    flag("too few shadow models", "--shadows", "4", says=("shadows", "8 or more", "4")),
    flag("a device that there is not", "--device", "tpu", says=("--device", "'tpu'")),
    Case("a GPU that there is not", ("--device cuda:99", "can not be used"), ("--device", "cuda:99")),
    flag("a reference that evaluate would train", "--reference", "retrain", says=("--reference",), command="evaluate"),
    flag("shadow models for a comparison", "--shadows", "8", says=("--shadows",), command="compare"),
    flag("an unknown method to compare", "--methods", "ssd,deepclena", says=("'deepclena'",), command="compare"),
    flag("retraining as a method to compare", "--methods", "retrain", says=("methods", "retrain"), command="compare"),
    flag("the same method twice", "--methods", "ssd,ssd", says=("methods", "ssd", "twice"), command="compare"),
    Case("no command", ("command",), (), command="", code=2, request=False),
    Case("an unknown command", ("'forget'",), ("forget",), command="", code=2, request=False),
    Case("no model", ("--model",), ("--data", "{}/train.npz"), code=2, request=False),
    Case("nothing to forget", ("--forget",), (*ALONE, "--method", "ssd", "--out", "{}/out"), code=2, request=False),
    Case("no method", ("--method",), (*ALONE, "--forget", "class:1", "--out", "{}/out"), code=2, request=False),
    Case("nowhere to write to", ("--out",), (*ALONE, "--forget", "class:1", "--method", "ssd"), code=2, request=False),
    Case("nothing to retain", ("--retain",), ("--model", "{}/net.py:net", "--forget", "{}/train.npz", "--method", "ssd",
                                              "--out", "{}/out"), code=2, request=False),
]  # fmt: skip


def log_with(*lines: str) -> Make:
    return text("log.jsonl", "".join(f"{line}\n" for line in lines))


PLACES = [
    Case("--out is a file", ("--out", "net.py", "is a file"), ("--out", "{}/net.py")),
    Case("--out is not empty", ("--out", "full", "not empty"), ("--out", "{}/full"), text("full/notes.txt", "x")),
    Case("--out is below a file", ("--out", "net.py/out"), ("--out", "{}/net.py/out")),
    Case("--out is where nothing can be made", ("--out", "/proc/fastunlearn"), ("--out", "/proc/fastunlearn/out")),
    Case("--out of evaluate is a file", ("--out", "net.py"), ("--out", "{}/net.py"), command="evaluate"),
    Case("--out of compare is not empty", ("--out", "full", "not empty"), ("--out", "{}/full"), text("full/x", "x"),
         "compare"),
    Case("--out of an interrupted run", ("--resume", ".out.unfinished"), (), text(".out.unfinished/x", "x")),
    Case("--log is a folder", ("--log", "logs"), ("--log", "{}/logs"), lambda root: (root / "logs").mkdir()),
    Case("--log is below a file", ("--log", "net.py"), ("--log", "{}/net.py/log.jsonl")),
    Case("--log is the weights", ("--log", "weights.safetensors", "line 1"), ("--log", "{}/weights.safetensors")),
    Case("--log is no log", ("--log", "log.jsonl", "line 1", "JSON"), (), log_with("hello")),
    Case("--log has a line of another program", ("--log", "log.jsonl", "line 1"), (), log_with('{"a":1}')),
    Case("--log begins in the middle", ("--log", "log.jsonl", "line 1", "taken out"), (), log_with(json.dumps(
        {"created": "2026-01-01", "id": "a", "previous": "0" * 64, "record": "0" * 64}, separators=(",", ":")))),
    Case("--log ends in part of a line", ("--log", "log.jsonl", "part of a line"), (), text("log.jsonl", '{"created"')),
    flag("--log is within --out", "--log", "{}/out/log.jsonl", says=("--log", "--out", "beside")),
    flag("--cache is within --out", "--cache", "{}/out", "--shadows", "8", says=("--cache", "--out", "beside")),
    Case("--cache is a file", ("--cache", "net.py"), ("--cache", "{}/net.py", "--shadows", "8")),
]  # fmt: skip


def patch(
    name: str, make: Make, *says: str, which: str = "p.safetensors", weights: str = "weights.safetensors",
    out: str = "new.safetensors",
) -> Case:  # fmt: skip
    flags = (f"{{}}/{which}", "--weights", f"{{}}/{weights}", "--out", f"{{}}/{out}")
    return Case(name, says, flags, all_of(patch_for_request, make), "patch apply", request=False)


def verified(name: str, says: tuple[str, ...], *flags: str, make: Make | None = None) -> Case:
    return Case(name, says, flags, make, "verify", request=False)


PATCHES = [
    patch("a patch for another model", patch_for_another, "weights.safetensors", "p.safetensors", "is for the model"),
    patch("a patch applied twice", lambda root: apply_patch(root / "weights.safetensors", root / "p.safetensors",
                                                            root / "w.pt"), "applied already", weights="w.pt"),
    patch("half of a patch", cut("p.safetensors", "p.safetensors", lambda b: b[: len(b) // 2]), "p.safetensors"),
    patch("a patch with a bit changed", cut("p.safetensors", "p.safetensors",
                                            lambda b: b[:-5] + bytes([b[-5] ^ 1]) + b[-4:]), "damaged"),
    patch("a patch that unpacks to 64 MB", bomb_in_patch, "p.safetensors", "1.bias", "do not unpack to 96 bytes"),
    patch("weights for a patch", lambda root: None, "not a patch", which="weights.safetensors"),
    patch("a patch that is not there", lambda root: None, "none.safetensors", "no such file", which="none.safetensors"),
    patch("weights to patch that are not there", lambda root: None, "none.pt", "no such file", weights="none.pt"),
    patch("a pickle to patch", bomb_in_pickle(2), "w.pt", "refused", weights="w.pt"),
    patch("a patched file of no known format", lambda root: None, "new.onnx", ".safetensors", out="new.onnx"),
    patch("a patched file where a folder is", lambda root: (root / "new.pt").mkdir(), "new.pt", out="new.pt"),
    patch("a patched file below a file", lambda root: None, "net.py", out="net.py/new.pt"),
    Case("no weights to patch", ("--weights",), ("{}/p.safetensors", "--out", "{}/new.pt"), None, "patch apply", 2,
         False),
    Case("no action", ("action",), (), None, "patch", 2, False),
    verified("a record that is not there", ("none.json",), "{}/none.json"),
    verified("a folder for a record", ("r.json",), "{}/r.json", make=lambda root: (root / "r.json").mkdir()),
    verified("an id without the salt", ("salt",), "{}/r.json", "--id", "3"),
    verified("a salt that is none", ("salt", "hexadecimal"), "{}/r.json", "--salt", "{}/salt",
             make=text("salt", "abc")),
]  # fmt: skip

CASES = [*WEIGHTS, *FORGET, *DATA, *MODEL, *YAML, *FLAGS_WRONG, *PLACES, *PATCHES]


@pytest.fixture
def request_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A request in order, in the current folder, so that what is written without a path is seen as well."""
    make_request(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_case_is_named_once() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= 60


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_malformed_input_is_refused_in_one_line_and_changes_nothing(
    case: Case, request_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if case.make is not None:
        case.make(request_folder)
    first = request_flags(case.command, request_folder) if case.request else []
    argv = [*case.command.split(), *first, *(part.replace("{}", str(request_folder)) for part in case.flags)]
    before = snapshot(request_folder)
    ended = ends(argv, capfd)
    assert ended.code == case.code, ended
    assert len(ended.lines) == 1 and ended.out == "", ended
    assert ended.lines[0].startswith(f"fastunlearn {case.command}".rstrip() + ": "), ended.lines
    assert len(ended.lines[0]) < 1000
    assert all(part in ended.lines[0] for part in case.says), ended.lines
    assert snapshot(request_folder) == before


def test_what_was_refused_would_have_run(tmp_path: Path) -> None:
    """That no folder appeared says something only if these files make one."""
    path = tmp_path / "w.pt"
    for make, load in (
        (bomb_in_pickle(2), lambda: pickle.loads(path.read_bytes())),
        (bomb_in_pickle(4), lambda: pickle.loads(path.read_bytes())),
        (bomb_in_archive, lambda: torch.load(path, weights_only=False)),
    ):
        make(tmp_path)
        load()
        (tmp_path / "it ran").rmdir()


# After data were read


def no_space(name: str) -> Callable[[int], None]:
    """An os.fsync to which the disk is full as soon as a file of this name is written."""
    real = os.fsync

    def fsync(handle: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{handle}")).name.lstrip(".").startswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    return fsync


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """The system lets no file grow beyond this many bytes; the write that would ends half way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def unlearn(folder: Path, *more: str) -> list[str]:
    return ["unlearn", *Request(folder).flags("--no-pictures", *more)]


def is_stopped(ended: Ended, code: int, *says: str) -> bool:
    """One line about what stopped it, after those about what it was doing."""
    doing, line = ended.lines[:-1], ended.lines[-1]
    return (
        ended.code == code
        and ended.out == ""
        and line.startswith("fastunlearn unlearn: ")
        and all(part in line for part in says)
        and all(text.startswith(("deepclean: forgetting", "measuring the", "retraining on")) for text in doing)
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A request and the results of its run, for copying."""
    folder = tmp_path_factory.mktemp("finished")
    make_request(folder)
    assert cli.main(unlearn(folder)) == 0
    return folder


@pytest.fixture
def finished_copy(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def unlearned(folder: Path) -> str:
    return digest(load_weights(folder / "out" / "model.safetensors"))


def without(name: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        found = json.loads((root / "out/record.json").read_text())
        del found[name]
        (root / "out/record.json").write_text(json.dumps(found))

    return write


def edited(name: str, old: str, new: str) -> Make:
    def write(root: Path) -> None:
        content = (root / name).read_text()
        assert old in content
        (root / name).write_text(content.replace(old, new, 1))

    return write


RECORD, LOG = "out/record.json", ("--log", "log.jsonl")
BROKEN: list[tuple[str, Make, tuple[str, ...], tuple[str, ...]]] = [
    ("a record without its hashes", without("forgotten"), (), ("record", "'forgotten' is a required property")),
    ("a record that is not JSON", cut(RECORD, RECORD, lambda b: b[:300]), (), ("record", "not JSON")),
    ("an empty record", text(RECORD, ""), (), ("record", "not JSON")),
    ("a list for a record", text(RECORD, "[]"), (), ("record", "$")),
    ("NaN in a record", edited(RECORD, '"peak_memory": ', '"peak_memory": NaN, "x": '), (), ("record", "NaN")),
    ("a key twice", edited(RECORD, '"id": ', '"id": "a", "id": '), (), ("record", "'id' is there twice")),
    ("a count that was changed", edited(RECORD, '"count": 30', '"count": 29'), (), ("record", "30 ids")),
    ("a setting that was changed", edited(RECORD, '"fraction": 0.3', '"fraction": 0.9'), LOG, ("log", "'record'")),
    ("a record of another request", edited("log.jsonl", '"id":"', '"id":"9'), LOG, ("log", "none of 1 lines")),
    ("a log that is no log", text("log.jsonl", "hello\n"), LOG, ("log", "line 1", "not JSON")),
    ("a log cut off", cut("log.jsonl", "log.jsonl", lambda b: b[:-9]), LOG, ("log", "part of a line")),
    ("a log whose first line was taken out", edited("log.jsonl", '"previous":null', f'"previous":"{"0" * 64}"'), LOG,
     ("log", "line 1", "taken out")),
    ("an empty log", text("log.jsonl", ""), LOG, ("log", "none of 0 lines")),
    ("the weights before", all_of(), ("--weights", "weights.safetensors"), ("weights", "nothing was forgotten")),
    ("other weights", changed("w.safetensors", lambda s: {k: v + 1 for k, v in s.items()}),
     ("--weights", "w.safetensors"), ("weights", "w.safetensors", "has the digest")),
    ("half of the weights", cut("w.safetensors", "out/model.safetensors", lambda b: b[:-9]),
     ("--weights", "w.safetensors"), ("weights", "only part of one")),
    ("weights that run code", bomb_in_pickle(2), ("--weights", "w.pt"), ("weights", "refused")),
    ("a patch for another model", patch_for_another, ("--patch", "p.safetensors"), ("patch", "its digest before")),
    ("half of the patch", cut("p.safetensors", "out/patch.safetensors", lambda b: b[:-9]),
     ("--patch", "p.safetensors"), ("patch", "only part of one")),
    ("the salt of another record", text("salt", "0" * 64), ("--salt", "salt"), ("salt", "not the salt")),
    ("a sample that was retained", all_of(), ("--salt", "out/salt", "--id", "0"), ("ids", "'0'")),
]  # fmt: skip


@pytest.mark.parametrize(("make", "flags", "says"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_verify_says_what_does_not_hold_and_ends_with_3(
    make: Make, flags: tuple[str, ...], says: tuple[str, ...], finished_copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make(finished_copy)
    before = snapshot(finished_copy)
    ended = ends(["verify", RECORD, *flags], capfd)
    assert ended.code == 3 and ended.lines == []
    broken = [line for line in ended.out.splitlines() if line.startswith("BROKEN")]
    assert len(broken) == 1 and broken[0].startswith(f"BROKEN  {says[0]}: "), ended.out
    assert all(part in broken[0] for part in says), ended.out
    assert snapshot(finished_copy) == before


def test_a_whole_record_holds(finished_copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """So that what is broken above is broken by what was done to it."""
    flags = (
        "--weights",
        "out/model.safetensors",
        "--patch",
        "out/patch.safetensors",
        "--salt",
        "out/salt",
        "--id",
        "1",
    )
    ended = ends(["verify", RECORD, *LOG, *flags], capfd)
    assert ended.code == 0 and ended.out.count("holds ") == 6, ended


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "not empty"),
        (("--resume", "--seed", "5"), "another seed"),
        (("--resume", "--set", "fraction=0.4"), "another settings"),
        (("--resume", "--method", "finetune"), "another method"),
    ],
)
def test_finished_results_are_not_run_over(
    flags: tuple[str, ...], says: str, finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(finished)
    ended = ends(unlearn(finished, *flags), capfd)
    assert is_stopped(ended, 1, says) and len(ended.lines) == 1, ended
    assert snapshot(finished) == before


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("the factorization\ndid not converge"), 1, "the factorization did not converge"),
        (MemoryError(), 1, "MemoryError"),
        (torch.OutOfMemoryError("no memory"), 1, "no memory"),
    ],
    ids=["Ctrl-C", "a method that fails", "no memory", "no memory on the GPU"],
)
@pytest.mark.parametrize("out", ["out", "results/of/today"])
def test_stopped_within_the_method_nothing_is_left(
    error: BaseException, code: int, says: str, out: str, request_folder: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def stop(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(DeepClean, "unlearn", stop)
    before = snapshot(request_folder)
    ended = ends(unlearn(request_folder, "--out", str(request_folder / out)), capfd)
    assert is_stopped(ended, code, says), ended
    assert snapshot(request_folder) == before


def test_stopped_later_what_is_finished_is_kept_for_the_same_request_alone(
    finished: Path, request_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    before = snapshot(request_folder)
    with monkeypatch.context() as patched:
        patched.setattr(deletion, "write_report", stop)
        assert is_stopped(ends(unlearn(request_folder), capfd), 130, "interrupted", "--resume")
    kept = snapshot(request_folder)
    assert {name: about for name, about in kept.items() if name in before} == before
    assert {name.partition("/")[0] for name in kept.keys() - before.keys()} == {".out.unfinished", "log.jsonl"}
    (request_folder / "more.json").write_text("[3]")
    (request_folder / ".out.unfinished/.model.part").write_text("half")  # what a kill might have left
    changed("w.safetensors", lambda s: {k: v + 1 for k, v in s.items()})(request_folder)
    kept = snapshot(request_folder)
    other_weights = ("--weights", str(request_folder / "w.safetensors"))
    other_samples = ("--forget", f"index:{request_folder / 'more.json'}")
    for more, says in (
        ((), "--resume goes on with it"),
        (("--resume", "--set", "fraction=0.5"), "another settings"),
        (("--resume", "--seed", "5"), "another seed"),
        (("--resume", "--method", "ssd", "--set", "fraction=0.5"), "settings of ssd"),
        (("--resume", *other_samples), "another forget"),
        (("--resume", *other_weights), "another weights"),
    ):
        ended = ends(unlearn(request_folder, *more), capfd)
        assert is_stopped(ended, 2 if "of ssd" in says else 1, says) and len(ended.lines) == 1, ended
        assert snapshot(request_folder) == kept
    assert ends(unlearn(request_folder, "--resume"), capfd).code == 0
    assert unlearned(request_folder) == unlearned(finished)
    assert not (request_folder / ".out.unfinished").exists()


def test_what_another_process_is_working_on_is_left_to_it(
    request_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    space = Workspace(request_folder / "out", {}, resume=False)
    before = snapshot(request_folder)
    ended = ends(unlearn(request_folder, "--resume"), capfd)
    assert is_stopped(ended, 1, "another process is working on", "out") and len(ended.lines) == 1, ended
    assert snapshot(request_folder) == before
    space.close()
    assert not (request_folder / ".out.unfinished").exists()


@pytest.mark.parametrize("name", ["request.json", "unlearned.safetensors", "unlearn.json", "measure-original.json"])
def test_on_a_full_disk_before_anything_is_finished_nothing_is_left(
    name: str, finished: Path, request_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(request_folder)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", no_space(name))
        ended = ends(unlearn(request_folder), capfd)
    assert is_stopped(ended, 1, "No space left on device", name), ended
    if name.startswith("measure"):  # the method was run, and is not run again
        assert (request_folder / ".out.unfinished/.phases/unlearn.json").exists()
    else:
        assert snapshot(request_folder) == before
    assert ends(unlearn(request_folder, "--resume"), capfd).code == 0
    assert unlearned(request_folder) == unlearned(finished)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "patch.safetensors", "salt", "report.html", "record.json", "log.jsonl"]
)
def test_on_a_full_disk_no_result_is_half_written_and_resume_completes_it(
    name: str, finished: Path, request_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(request_folder)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", no_space(name))
        ended = ends(unlearn(request_folder), capfd)
    assert is_stopped(ended, 1, "No space left on device"), ended
    after = snapshot(request_folder)
    assert {n: about for n, about in after.items() if n in before} == before
    assert not any(n.endswith(".part") or n.endswith(f"unfinished/{name}") for n in after)
    assert (request_folder / "out").exists() == (name == "log.jsonl")  # all is there but for the log's line
    assert (request_folder / "log.jsonl").read_text() == "" if (request_folder / "log.jsonl").exists() else True
    assert ends(unlearn(request_folder, "--resume"), capfd).code == 0
    assert unlearned(request_folder) == unlearned(finished)
    assert all(check.passed for check in verify(request_folder / RECORD, log=request_folder / "log.jsonl"))


def test_a_write_that_ends_half_way_leaves_nothing(
    finished: Path, request_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the system itself does where a file may not grow: part of the checkpoint is written, then an error."""
    before = snapshot(request_folder)
    size = (request_folder / "weights.safetensors").stat().st_size
    with files_end_at(size - 100):
        ended = ends(unlearn(request_folder), capfd)
    assert is_stopped(ended, 1, "File too large", "unlearned.safetensors"), ended
    assert snapshot(request_folder) == before
    assert ends(unlearn(request_folder, "--resume"), capfd).code == 0
    assert unlearned(request_folder) == unlearned(finished)
