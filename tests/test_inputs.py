"""A data set is the same samples in whatever format it is kept, and a selection names the same ones."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fastunlearn.data import read
from fastunlearn.inputs import DataOptions, Loader, Samples, open_samples, select

CLASSES = ["ape", "bee", "cow"]
LABELS = np.array([0] * 5 + [1] * 4 + [2] * 3)
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 3, 6, 5), dtype=np.uint8)  # [N, C, H, W], not square
ALL = torch.arange(12)


def png(image: np.ndarray) -> bytes:
    """Of uint8 [C, H, W], losslessly."""
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()


def files() -> dict[str, bytes]:
    """Path within the folder -> bytes, in the order of the samples."""
    return {f"{CLASSES[c]}/{n:02}.png": png(image) for n, (image, c) in enumerate(zip(IMAGES, LABELS, strict=True))}


def write_folder(root: Path) -> str:
    for name, content in reversed(files().items()):  # the order on the disk is not the order of the samples
        (root / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "folder" / name).write_bytes(content)
    return str(root / "folder")


def write_zip(root: Path) -> str:
    with zipfile.ZipFile(root / "data.zip", "w") as archive:
        for name, content in reversed(files().items()):
            archive.writestr(name, content)
    return str(root / "data.zip")


def write_tar(root: Path, ending: str, inner: str = "") -> str:
    with tarfile.open(root / f"data.{ending}", f"w:{ending.partition('.')[2]}") as archive:
        for name, content in reversed(files().items()):
            member = tarfile.TarInfo(inner + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(root / f"data.{ending}") + (f"::{inner.strip('./')}" if inner.strip("./") else "")


def write_npz(root: Path) -> str:
    np.savez_compressed(root / "data.npz", x=IMAGES, y=LABELS)
    return str(root / "data.npz")


def write_safetensors(root: Path) -> str:
    save_file({"images": torch.from_numpy(IMAGES), "labels": torch.from_numpy(LABELS)}, root / "data.safetensors")
    return str(root / "data.safetensors")


def write_jsonl(root: Path) -> str:
    rows = [{"x": image.tolist(), "y": CLASSES[c]} for image, c in zip(IMAGES, LABELS, strict=True)]
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return str(root / "data.jsonl")


def write_parquet(root: Path) -> str:
    frame = pandas.DataFrame({"pixel_values": [image.tolist() for image in IMAGES], "label": LABELS})
    frame.to_parquet(root / "data.parquet")
    return str(root / "data.parquet")


def write_hugging_face(root: Path, encoded: bool, split: str | None = None) -> str:
    import datasets

    names = datasets.ClassLabel(names=CLASSES)
    if encoded:
        features = datasets.Features({"picture": datasets.Image(), "label": names})
        column: list[Any] = [{"bytes": content, "path": None} for content in files().values()]
        data = datasets.Dataset.from_dict({"picture": column, "label": LABELS.tolist()}, features=features)
    else:
        features = datasets.Features({"x": datasets.Array3D((3, 6, 5), "uint8"), "label": names})
        data = datasets.Dataset.from_dict({"x": list(IMAGES), "label": LABELS.tolist()}, features=features)
    where = root / "hugging"
    (data if split is None else datasets.DatasetDict({split: data})).save_to_disk(str(where))
    return f"{where}" if split is None else f"{where}::{split}"


CODE = """
import io, numpy, torch
from PIL import Image
archive = numpy.load({npz!r})
x, y = torch.from_numpy(archive["x"]), archive["y"]

def tensors():
    return x, y

def channels_last():
    return x.numpy().transpose(0, 2, 3, 1), y.tolist()

class Pictures(torch.utils.data.Dataset):
    classes = ["ape", "bee", "cow"]
    def __len__(self):
        return len(x)
    def __getitem__(self, index):
        return Image.fromarray(x[index].permute(1, 2, 0).numpy()), int(y[index])

class Arrays(Pictures):
    def __getitem__(self, index):
        return x[index].permute(1, 2, 0).numpy(), y[index]
"""


def write_code(root: Path, function: str) -> str:
    (root / "code.py").write_text(CODE.format(npz=write_npz(root)))
    return f"{root / 'code.py'}:{function}"


WRITERS: dict[str, Callable[[Path], str]] = {
    "folder": write_folder,
    "zip": write_zip,
    "tar": lambda root: write_tar(root, "tar"),
    "tar.gz": lambda root: write_tar(root, "tar.gz"),
    "tar.xz, from a dot": lambda root: write_tar(root, "tar.xz", "./"),
    "tar.xz, a folder within": lambda root: write_tar(root, "tar.xz", "some/train/"),
    "npz": write_npz,
    "safetensors": write_safetensors,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "Hugging Face, files": lambda root: write_hugging_face(root, True),
    "Hugging Face, arrays of a split": lambda root: write_hugging_face(root, False, "train"),
    "function, tensors": lambda root: write_code(root, "tensors"),
    "function, channels last": lambda root: write_code(root, "channels_last"),
    "function, Dataset of arrays": lambda root: write_code(root, "Arrays"),
    "function, Dataset": lambda root: write_code(root, "Pictures"),
}


@pytest.fixture(params=WRITERS)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Samples:
    return open_samples(WRITERS[request.param](tmp_path), options=DataOptions(mean=(0.1, 0.2, 0.3), std=0.5))


def test_every_format_gives_the_same_batches_labels_and_selections(opened: Samples, tmp_path: Path) -> None:
    assert len(opened) == 12
    assert opened.labels.dtype == torch.int64 and opened.labels.tolist() == LABELS.tolist()
    assert opened.classes in (CLASSES, None)
    x, y = opened.batch(torch.tensor([11, 0, 4]))
    expected = (IMAGES[[11, 0, 4]] / 255 - np.array([0.1, 0.2, 0.3]).reshape(3, 1, 1)) / 0.5  # float64
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double(), torch.from_numpy(expected), rtol=0, atol=5e-7)
    assert y.tolist() == [2, 0, 0]
    assert opened.signature() == {"shape": [3, 6, 5], "dtype": "float32"}
    (tmp_path / "some.json").write_text("[7, 3, 11]")
    assert select(opened, f"index:{tmp_path / 'some.json'}").tolist() == [3, 7, 11]
    assert select(opened, "class:1").tolist() == [5, 6, 7, 8]
    assert select(opened, "class:0,2").tolist() == [0, 1, 2, 3, 4, 9, 10, 11]
    assert torch.equal(select(opened, "all"), ALL)


def test_image_files_have_one_digest_wherever_they_lie(tmp_path: Path) -> None:
    places = ("folder", "zip", "tar", "tar.gz", "tar.xz, a folder within")
    digests = [open_samples(WRITERS[name](tmp_path)).digest() for name in places]
    assert len(set(digests)) == 1 and re.fullmatch("[0-9a-f]{64}", digests[0])


def test_ids_are_paths_in_folders_and_archives_and_rows_elsewhere(tmp_path: Path) -> None:
    for name in ("folder", "zip", "tar.xz, a folder within"):
        assert open_samples(WRITERS[name](tmp_path)).ids == list(files())
    assert open_samples(write_npz(tmp_path)).ids == [str(row) for row in range(12)]


def test_an_id_column_names_the_samples(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("who,a,b,y\nada,1,2,0\nbob,3,4,1\ncy,5,6,1\n")
    samples = open_samples(str(tmp_path / "data.csv"), options=DataOptions(id="who"))
    assert samples.ids == ["ada", "bob", "cy"]
    (tmp_path / "ids.txt").write_text("cy\n\nada\n")
    assert select(samples, f"id:{tmp_path / 'ids.txt'}").tolist() == [0, 2]
    assert samples.batch(torch.tensor([1]))[0].tolist() == [[3.0, 4.0]]


def test_a_table_takes_its_numbers_but_not_target_id_and_text(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("note,k,b,a,label\nhello,7,1.5,True,NA\nthere,8,2.5,False,no\n")
    samples = open_samples(str(tmp_path / "data.csv"), options=DataOptions(id="k"))
    assert samples.batch(torch.arange(2))[0].tolist() == [[1.5, 1.0], [2.5, 0.0]]
    assert (samples.classes, samples.labels.tolist()) == (["NA", "no"], [0, 1])  # NA is a name here
    samples = open_samples(str(tmp_path / "data.csv"), options=DataOptions(columns=("a", "k"), mean=(0, 7), std=(1, 2)))
    assert samples.batch(torch.arange(2))[0].tolist() == [[1.0, 0.0], [0.0, 0.5]]
    samples = open_samples(str(tmp_path / "data.csv"), options=DataOptions(inputs="b"))
    assert samples.batch(torch.arange(2))[0].tolist() == [[1.5], [2.5]]


def test_parquet_keeps_what_csv_can_not(tmp_path: Path) -> None:
    frame = pandas.DataFrame({"f": np.array([0.1, 0.2], np.float64), "i": [1, 2], "class": ["b", "a"]})
    frame["class"] = frame["class"].astype("category")
    frame.to_parquet(tmp_path / "t.parquet")
    samples = open_samples(str(tmp_path / "t.parquet"))
    assert samples.classes == ["a", "b"] and samples.labels.tolist() == [1, 0]
    assert torch.equal(samples.batch(torch.arange(2))[0], torch.tensor([[0.1, 1], [0.2, 2]]))


def test_names_of_classes_known_from_the_training_set_keep_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("a,y\n1,cow\n2,ape\n")
    alone = open_samples(str(tmp_path / "test.csv"))
    assert alone.labels.tolist() == [1, 0]
    assert open_samples(str(tmp_path / "test.csv"), classes=CLASSES).labels.tolist() == [2, 0]
    folder = Path(write_folder(tmp_path))
    for file in (folder / "bee").iterdir():
        file.unlink()
    (folder / "bee").rmdir()
    samples = open_samples(str(folder), classes=CLASSES)
    assert sorted(set(samples.labels.tolist())) == [0, 2] and samples.classes == CLASSES
    for spec in (write_hugging_face(tmp_path, True), write_code(tmp_path, "Pictures")):
        turned = open_samples(spec, classes=CLASSES[::-1])
        assert turned.labels.tolist() == (2 - LABELS).tolist() and turned.classes == CLASSES[::-1]


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        (np.array([[1, 2], [3, 4]], np.int64), torch.int64, [[1, 2], [3, 4]]),  # token ids stay what they are
        (np.array([[1, 2], [3, 4]], np.uint16), torch.int64, [[1, 2], [3, 4]]),
        (np.array([[1, 2], [3, 4]], np.uint8), torch.float32, [[1 / 255, 2 / 255], [3 / 255, 4 / 255]]),
        (np.array([[0.1, 2], [3, 4]], ">f8"), torch.float32, [[0.1, 2], [3, 4]]),
        (np.array([[1, 2], [3, 4]], np.float16), torch.float32, [[1, 2], [3, 4]]),
        (np.array([[True, False], [True, True]]), torch.float32, [[1, 0], [1, 1]]),
        (np.array([[[51]], [[255]]], np.int32), torch.float32, [[[[0.2]]], [[[1.0]]]]),  # grey images
    ],
)
def test_arrays_of_any_number_type(tmp_path: Path, values: Any, dtype: torch.dtype, expected: Any) -> None:
    np.savez(tmp_path / "a.npz", features=values, target=np.array([1.0, 0.0]))
    samples = open_samples(str(tmp_path / "a.npz"))
    x, y = samples.batch(torch.arange(2))
    assert torch.equal(x, torch.tensor(expected, dtype=dtype)) and y.tolist() == [1, 0]
    assert samples.signature()["dtype"] == str(dtype).removeprefix("torch.")


def test_scale_divides_and_applies_to_token_like_integers_too(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([[4, 8], [16, 0]]), y=[0, 1])
    samples = open_samples(str(tmp_path / "a.npz"), options=DataOptions(scale=16))
    assert torch.equal(samples.batch(torch.arange(2))[0], torch.tensor([[0.25, 0.5], [1.0, 0.0]]))


def test_arrays_of_images_are_resized_and_turned_grey_as_files_are(tmp_path: Path) -> None:
    options = DataOptions(image_size=(8, 4), channels=1)
    batches = [open_samples(WRITERS[name](tmp_path), options=options).batch(ALL)[0] for name in ("folder", "npz")]
    assert batches[0].shape == (12, 1, 8, 4) and torch.equal(*batches)


def test_named_inputs_become_dict_batches(tmp_path: Path) -> None:
    code = (
        "import torch\n"
        "def data():\n"
        "    return {'input_ids': torch.tensor([[5, 6], [7, 8]]), 'weight': torch.ones(2).double()}, [0, 1]\n"
        "class Dicts:\n"
        "    def __len__(self): return 2\n"
        "    def __getitem__(self, i): return {'input_ids': torch.tensor([5, 6]) + 2 * i, 'weight': 1.0, 'labels': i}\n"
    )
    (tmp_path / "named.py").write_text(code)
    for function in ("data", "Dicts"):
        samples = open_samples(f"{tmp_path / 'named.py'}:{function}")
        batch = samples.batch(torch.tensor([1, 0]))
        assert {name: value.tolist() for name, value in batch.items()} == {
            "input_ids": [[7, 8], [5, 6]], "weight": [1.0, 1.0], "labels": [1, 0],
        }  # fmt: skip
        assert samples.signature()["input_ids"] == {"shape": [2], "dtype": "int64"}
        assert samples.signature()["weight"] == {"shape": [], "dtype": "float32"}


def test_a_data_set_too_large_to_keep_is_read_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [write_folder(tmp_path), write_code(tmp_path, "Pictures"), write_code(tmp_path, "Arrays")]
    kept = [open_samples(spec) for spec in specs]
    monkeypatch.setattr("fastunlearn.inputs.images.HELD", IMAGES.nbytes - 1)
    for samples, spec in zip(kept, specs, strict=True):
        lazy = open_samples(spec)
        assert lazy.labels.tolist() == LABELS.tolist() and lazy.classes == CLASSES
        assert type(lazy.inputs) is not type(samples.inputs)
        assert torch.equal(lazy.batch(ALL)[0], samples.batch(ALL)[0])
        assert lazy.digest() == samples.digest()


def test_samples_from_a_function_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    npz = write_npz(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "data.py").write_text(
        f"from fastunlearn.inputs import open_samples\ndef train():\n    return open_samples({npz!r})\n"
    )
    assert open_samples("own.data:train").digest() == open_samples(npz).digest()


# Digest


@pytest.mark.parametrize("name", ["folder", "zip", "npz", "safetensors", "jsonl", "parquet", "Hugging Face, files"])
def test_digest_depends_on_contents_and_not_on_times_or_options(tmp_path: Path, name: str) -> None:
    spec = WRITERS[name](tmp_path)
    before = open_samples(spec).digest()
    for path in tmp_path.rglob("*"):
        os.utime(path, (1, 1))
    assert open_samples(spec, options=DataOptions(mean=0.5, scale=3.0)).digest() == before


def test_digest_changes_with_any_byte_of_an_image_file(tmp_path: Path) -> None:
    folder = Path(write_folder(tmp_path))
    before = open_samples(str(folder)).digest()
    target = folder / "bee" / "06.png"
    content = target.read_bytes()
    target.write_bytes(content + b"\0")  # behind the end of the picture: not a pixel changes
    assert open_samples(str(folder)).digest() != before
    target.write_bytes(content)
    assert open_samples(str(folder)).digest() == before
    target.rename(folder / "bee" / "06b.png")
    assert open_samples(str(folder)).digest() != before


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, np.float64])
def test_digest_changes_with_any_byte_of_an_array(tmp_path: Path, dtype: Any) -> None:
    x, y = np.arange(12, dtype=dtype).reshape(4, 3), np.array([0, 1, 0, 1])

    def digest(x: np.ndarray, y: np.ndarray) -> str:
        np.savez(tmp_path / "a.npz", x=x, y=y)
        return open_samples(str(tmp_path / "a.npz")).digest()

    seen = {digest(x, y), digest(x, 1 - y), digest(x[::-1], y), digest(x.reshape(4, 3, 1), y)}
    for byte in range(x.nbytes):
        changed = np.frombuffer(x.tobytes(), np.uint8).copy()
        changed[byte] ^= 1
        seen.add(digest(changed.view(dtype).reshape(4, 3), y))
    assert len(seen) == 4 + x.nbytes


def test_digest_changes_with_names_of_classes_and_ids(tmp_path: Path) -> None:
    texts = [
        "k,a,y\nu,1,no\nv,2,yes\n",
        "k,a,y\nu,1,no\nv,2,yet\n",
        "k,a,y\nu,1,no\nw,2,yes\n",
        "k,a,y\nu,1,no\nv,3,yes\n",
    ]
    seen = set()
    for text in texts:
        (tmp_path / "t.csv").write_text(text)
        seen.add(open_samples(str(tmp_path / "t.csv"), options=DataOptions(id="k")).digest())
    assert len(seen) == len(texts)


# Loader


def numbered(count: int = 23) -> Samples:
    from fastunlearn.inputs.arrays import Held

    x = torch.arange(count * 2, dtype=torch.float32).reshape(count, 2)
    return Samples(Held(x), torch.arange(count) % 4, [str(n) for n in range(count)], None, "numbered")


@pytest.mark.parametrize("batch_size", [1, 5, 23, 100])
def test_loader_equals_torch_dataloader(batch_size: int) -> None:
    samples = numbered()
    chosen = torch.tensor([3, 4, 7, 22, 0, 1, 9])
    dataset = TensorDataset(*samples.batch(chosen))
    for shuffle in (False, True):
        loader = Loader(samples, chosen, batch_size, shuffle=shuffle, seed=5)
        for epoch in range(2):
            position = {index: place for place, index in enumerate(chosen.tolist())}
            order = [position[index] for index in loader.order(epoch).tolist()]
            torchs = DataLoader(dataset, batch_size=batch_size, sampler=order)
            assert len(loader) == len(torchs)
            for ours, theirs in zip(loader, torchs, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_every_epoch_is_a_new_order_of_the_same_samples() -> None:
    loader = Loader(numbered(), ALL, 5, shuffle=True)
    orders = [torch.cat([x[:, 0] for x, _ in loader]).div(2).long() for _ in range(20)]
    assert all(torch.equal(order.sort().values, ALL) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 20
    first = torch.stack(orders)[:, 0].bincount(minlength=12)
    assert first.max() < 10  # 20 draws of one in 12


def test_an_epoch_can_be_entered_again_after_an_interruption() -> None:
    def epochs(loader: Loader, count: int) -> list[Tensor]:
        return [torch.cat([y for _, y in loader]) for _ in range(count)]

    whole = epochs(Loader(numbered(), ALL, 5, shuffle=True, seed=3), 4)
    interrupted = Loader(numbered(), ALL, 5, shuffle=True, seed=3)
    epochs(interrupted, 2)
    next(iter(interrupted))  # the third is cut off after a batch
    resumed = Loader(numbered(), ALL, 5, shuffle=True, seed=3, epoch=2)
    assert all(torch.equal(a, b) for a, b in zip(epochs(resumed, 2), whole[2:], strict=True))
    assert (interrupted.epoch, resumed.epoch) == (3, 4)


def test_seeds_and_epochs_do_not_meet() -> None:
    seeds = [Loader(numbered(), ALL, 5, shuffle=True, seed=seed) for seed in range(10)]
    orders = {tuple(loader.order(epoch).tolist()) for loader in seeds for epoch in range(10)}
    assert len(orders) == 100


def test_loader_leaves_the_random_state_alone_and_keeps_the_order_given() -> None:
    before = torch.get_rng_state()
    batches = list(Loader(numbered(), torch.tensor([9, 2, 2]), 2, shuffle=True))
    assert torch.equal(torch.get_rng_state(), before) and len(batches) == 2
    assert [x[0, 0].item() for x, _ in Loader(numbered(), torch.tensor([9, 2, 2]), 1)] == [18.0, 4.0, 4.0]


def test_loader_is_what_a_pass_over_the_data_asks_for() -> None:
    loader = Loader(numbered(), ALL, 5)
    assert [batch.size for batch in read(loader, "forget", torch.device("cpu"))] == [5, 5, 2]
    assert [batch.size for batch in read(loader, "forget", torch.device("cpu"))] == [5, 5, 2]


def test_loader_moves_batches_to_the_device() -> None:
    x, y = next(iter(Loader(numbered(), ALL, 5, device="meta")))
    assert x.device.type == y.device.type == "meta"


@pytest.mark.parametrize(
    ("indices", "size", "message"),
    [
        ([], 1, "no samples of 'numbered'"),
        ([0, 23], 1, "index 23 is outside the 23"),
        ([-1], 1, "index -1"),
        ([0], 0, "got 0"),
    ],
)
def test_loader_refuses(indices: list[int], size: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Loader(numbered(), torch.tensor(indices, dtype=torch.int64), size)


# Selections


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"[5, 0, 3]"),
        ("b.json", b'{"indices": [5, 0, 3], "made": "today"}'),
        ("c.txt", b"\xef\xbb\xbf5\r\n0\r\n\r\n 3 "),
        ("d.npy", None),
    ],
)
def test_index_files(tmp_path: Path, name: str, content: bytes | None) -> None:
    path = tmp_path / name
    if content is None:
        np.save(path, np.array([5, 0, 3], np.uint16))
    else:
        path.write_bytes(content)
    chosen = select(numbered(), f"index:{path}")
    assert chosen.dtype == torch.int64 and chosen.tolist() == [0, 3, 5]


def test_ids_select_by_path(tmp_path: Path) -> None:
    samples = open_samples(write_folder(tmp_path))
    (tmp_path / "ids.txt").write_text("cow/11.png\nape/00.png\n")
    assert select(samples, f"id:{tmp_path / 'ids.txt'}").tolist() == [0, 11]


def test_classes_select_by_name_before_number(tmp_path: Path) -> None:
    samples = open_samples(write_folder(tmp_path))
    assert select(samples, "class:bee").tolist() == select(samples, "class:1").tolist() == [5, 6, 7, 8]
    assert select(samples, "class:cow, bee").tolist() == [5, 6, 7, 8, 9, 10, 11]
    (tmp_path / "t.jsonl").write_text('{"a": 1, "y": "x,y"}\n{"a": 2, "y": "one"}\n')
    named = open_samples(str(tmp_path / "t.jsonl"))
    assert select(named, "class:x,y").tolist() == [0] and select(named, "class:0").tolist() == [1]


def test_predicates_see_index_id_and_label_and_what_lies_beside_them(tmp_path: Path) -> None:
    samples = open_samples(write_folder(tmp_path))
    (tmp_path / "beside_predicates.py").write_text("LIMIT = 9\n")
    (tmp_path / "choose.py").write_text(
        "import numpy\n"
        "def chosen(index, name, label):\n"
        "    from beside_predicates import LIMIT\n"
        "    assert type(index) is int and type(name) is str and type(label) is int\n"
        "    return numpy.bool_(name.startswith('cow') and index > LIMIT and label == 2)\n"
    )
    import sys

    before = list(sys.path)
    assert select(samples, f"predicate:{tmp_path / 'choose.py'}:chosen").tolist() == [10, 11]
    assert sys.path == before


def test_data_options_survive_json() -> None:
    from dataclasses import asdict

    options = DataOptions(columns=("a", "b"), image_size=(4, 5), mean=(0.5, 0.25, 1), std=2, id="k")
    assert DataOptions.from_dict(json.loads(json.dumps(asdict(options)))) == options


def test_names_with_odd_but_harmless_characters_are_ids(tmp_path: Path) -> None:
    for name in ("at 1.00\u202fPM.png", " spaces .png", "Grüße 猫.png"):
        (tmp_path / "images" / "a b").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / "a b" / name).write_bytes(png(IMAGES[0]))
    samples = open_samples(str(tmp_path / "images"))
    (tmp_path / "ids.txt").write_text(
        "a b/ spaces .png\na b/at 1.00\u202fPM.png\r\n  a b/Grüße 猫.png\n", encoding="utf-8"
    )
    assert select(samples, f"id:{tmp_path / 'ids.txt'}").tolist() == [0, 1, 2]
    assert len(samples.digest()) == 64


def test_csv_cells_that_look_like_numbers_stay_ids(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("k,a,y\n007,1,0\na1,2,1\n7,3,1\n")
    assert open_samples(str(tmp_path / "t.csv"), options=DataOptions(id="k")).ids == ["007", "a1", "7"]
    (tmp_path / "t.csv").write_text("k,a,y\n007,1,0\n7,2,1\n")
    assert open_samples(str(tmp_path / "t.csv"), options=DataOptions(id="k")).ids == ["007", "7"]


def test_typed_text_may_look_like_a_number(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"a": 1, "y": "cat"}\n{"a": 2, "y": "3"}\n')
    assert open_samples(str(tmp_path / "t.jsonl")).classes == ["3", "cat"]


def test_columns_beside_the_chosen_ones_may_be_anything(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("note,a,y\n5,1,0\nfine,2,1\n,3,1\n")
    with pytest.raises(ValueError, match="column 'note': row 0 is the number 5, row 1 is 'fine'"):
        open_samples(str(tmp_path / "t.csv"))
    samples = open_samples(str(tmp_path / "t.csv"), options=DataOptions(columns=("a",)))
    assert samples.batch(torch.arange(3))[0].tolist() == [[1.0], [2.0], [3.0]]
    (tmp_path / "t.csv").write_text("note,a,y\n,1,0\nfine,2,1\n,3,1\n")  # a hole where nothing is read
    assert open_samples(str(tmp_path / "t.csv")).signature()["shape"] == [1]


def test_digest_of_arrays_does_not_depend_on_how_they_are_converted(tmp_path: Path) -> None:
    spec = write_npz(tmp_path)
    plain = open_samples(spec)
    assert open_samples(spec, options=DataOptions(image_size=9, channels=1, scale=2, std=3)).digest() == plain.digest()


def test_the_row_named_is_the_first_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastunlearn.inputs.arrays._CHECKED", 7)  # two rows at a time
    x = np.zeros((9, 3))
    x[5, 1] = x[6, 0] = np.nan
    np.savez(tmp_path / "a.npz", x=x, y=np.zeros(9))
    with pytest.raises(ValueError, match="row 5 holds NaN"):
        open_samples(str(tmp_path / "a.npz"))
