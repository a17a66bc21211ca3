"""Models and texts named on a command line: the user's code, torchvision, timm and Hugging Face folders."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastunlearn.data import read
from fastunlearn.inputs import DataOptions, Loader, build_model, open_samples, select, tokenizer_of

CODE = """
from torch import nn
from parts_of_it import WIDTH

def net(num_classes=7, depth=1):
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(depth)], nn.Linear(WIDTH, num_classes))

def fixed():
    return nn.Linear(2, 3)

class Own(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.head = nn.Linear(4, classes)

def no_model():
    return [1]

def no_parameter():
    return nn.ReLU()

def fails():
    raise RuntimeError("first line\\nsecond line")

def leaves():
    raise SystemExit(3)

built = fixed()
number = 3
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with own.py, package/inner.py and package/broken.py; it is the current directory."""
    (tmp_path / "parts_of_it.py").write_text("WIDTH = 4\n")
    (tmp_path / "own.py").write_text(CODE)
    (tmp_path / "package_of_models").mkdir()
    (tmp_path / "package_of_models" / "__init__.py").write_text("")
    (tmp_path / "package_of_models" / "inner.py").write_text(CODE)
    (tmp_path / "package_of_models" / "broken.py").write_text("import parts_of_it\nraise KeyError('gone')\n")
    (tmp_path / "broken.py").write_text("x = 1\nimport no_such_module_anywhere\n")
    (tmp_path / "torn.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if "package_of_models" in name or name == "parts_of_it":
            del sys.modules[name]


@pytest.mark.parametrize("place", ["own.py", "package_of_models.inner"])
def test_functions_and_classes_build_models(code: Path, place: str) -> None:
    path = list(sys.path)
    net = build_model(f"{place}:net", 5, {"depth": 2})
    assert isinstance(net, nn.Sequential) and len(net) == 3 and net[-1].out_features == 5
    assert build_model(f"{place}:net", None)[-1].out_features == 7
    assert build_model(f"{place}:net", 5, {"num_classes": 9})[-1].out_features == 9  # what is said counts
    assert build_model(f"{place}:Own", 6).head.out_features == 6
    assert build_model(f"{place}:fixed", 6).out_features == 3
    assert sys.path == path


def test_a_file_is_imported_from_any_directory(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code / "elsewhere").mkdir()
    monkeypatch.chdir(code / "elsewhere")
    assert build_model(f"{code / 'own.py'}:net", 5)[-1].out_features == 5
    assert build_model("../own.py:net", 5)[-1].out_features == 5


def test_a_file_is_imported_again_only_after_it_has_changed(code: Path) -> None:
    (code / "counted.py").write_text(
        "from torch import nn\nclass M(nn.Linear):\n    def __init__(self): super().__init__(1, 1)\n"
    )
    first, second = build_model("counted.py:M", None), build_model("counted.py:M", None)
    assert type(first) is type(second)
    (code / "counted.py").write_text(
        "from torch import nn\nclass M(nn.Linear):\n    def __init__(self): super().__init__(1, 2)\n"
    )
    assert build_model("counted.py:M", None).out_features == 2  # though written in the same second, as long as before
    assert not (code / "__pycache__").exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("own.py:no_model", "returned a list, expected a torch.nn.Module"),
        ("own.py:no_parameter", "returned a ReLU without parameters"),
        ("own.py:fails", "raised RuntimeError: first line second line"),
        ("own.py:leaves", "raised SystemExit: 3"),
        ("own.py:built", "is a model; name a function"),
        ("own.py:number", "is a int, expected a function"),
        ("own.py:absent", "own.py has no 'absent'"),
        ("own.py:Own", "raised TypeError:"),
        ("broken.py:net", "importing broken.py raised ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
        ("torn.py:net", "importing torn.py raised SyntaxError:"),
        ("package_of_models.broken:net", "importing package_of_models.broken raised KeyError: 'gone'"),
        ("package_of_models.absent:net", "there is no module 'package_of_models.absent'"),
        ("no_such_package_anywhere.x:net", "there is no module 'no_such_package_anywhere'"),
        ("absent.py:net", "there is no file 'absent.py'"),
        ("own.py", "names no model; write package.module:function"),
        ("own.py:two words", "names no model"),
        (".", "is a folder without config.json"),
    ],
)
def test_what_builds_no_model_is_refused_in_one_line(code: Path, spec: str, message: str) -> None:
    path, modules = list(sys.path), dict(sys.modules)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)) as raised:
        build_model(spec, None)
    assert "\n" not in str(raised.value) and repr(spec) in str(raised.value)
    if "raised" in message or "no module" in message:
        assert raised.value.__cause__ is not None
    assert sys.path == path
    left = {name for name in sys.modules if name not in modules and ("broken" in name or "torn" in name)}
    assert not left


def test_a_package_whose_module_fails_can_be_mended_and_imported(code: Path) -> None:
    with pytest.raises(ValueError, match="raised KeyError"):
        build_model("package_of_models.broken:net", None)
    assert not [name for name in sys.modules if name.startswith("package_of_models")]
    (code / "package_of_models" / "broken.py").write_text(CODE + "\n# mended\n")
    assert build_model("package_of_models.broken:net", 2)[-1].out_features == 2


def test_arguments_must_have_names() -> None:
    with pytest.raises(TypeError, match="must be a mapping from names"):
        build_model("own.py:net", None, {3: 4})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="must be a mapping from names"):
        build_model("own.py:net", None, [("a", 1)])  # type: ignore[arg-type]


# torchvision and timm


FAKE_TORCHVISION = """
from torch import nn
def get_model(name, *, weights, num_classes=1000, width=2):
    if name != "resnet18":
        raise ValueError(f"Unknown model {name}")
    assert weights is None
    return nn.Linear(width, num_classes)
"""
FAKE_TIMM = """
from torch import nn
def create_model(name, *, pretrained, num_classes=1000, width=2):
    if name != "vit_tiny.in1k":
        raise RuntimeError(f"Unknown model ({name})")
    assert pretrained is False
    return nn.Linear(width, num_classes)
"""


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "fakes" / "torchvision").mkdir(parents=True)
    (tmp_path / "fakes" / "torchvision" / "__init__.py").write_text("")
    (tmp_path / "fakes" / "torchvision" / "models.py").write_text(FAKE_TORCHVISION)
    (tmp_path / "fakes" / "timm.py").write_text(FAKE_TIMM)
    monkeypatch.syspath_prepend(str(tmp_path / "fakes"))
    names = ("torchvision", "torchvision.models", "timm")
    kept = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    yield
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(kept)


@pytest.mark.parametrize("spec", ["torchvision:resnet18", "timm:vit_tiny.in1k"])
def test_libraries_build_models_by_name(libraries: None, spec: str) -> None:
    """Against small stand-ins with the signatures of torchvision.models.get_model and timm.create_model: neither
    package is a dependency of the tests. What they stand in for is what these two functions document."""
    assert build_model(spec, 5, {"width": 3}).weight.shape == (5, 3)
    assert build_model(spec, None).weight.shape == (1000, 2)
    assert build_model(spec, 5, {"num_classes": 6}).weight.shape == (6, 2)
    with pytest.raises(ValueError, match=r"raised \w+: Unknown model") as raised:
        build_model(spec.partition(":")[0] + ":resnet17", 5)
    assert raised.value.__cause__ is not None and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("spec", "arguments"),
    [
        ("torchvision:resnet18", {"weights": "DEFAULT"}),
        ("torchvision:resnet18", {"weights_backbone": "DEFAULT"}),
        ("timm:vit_tiny.in1k", {"pretrained": True}),
        ("timm:vit_tiny.in1k", {"checkpoint_path": "x.pth"}),
    ],
)
def test_nothing_is_downloaded_or_unpickled_by_arguments(libraries: None, spec: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"the argument {next(iter(arguments))!r} is not taken"):
        build_model(spec, 5, arguments)


@pytest.mark.parametrize("spec", ["timm:hf-hub:org/name", "timm:local-dir:/x", "torchvision:", "timm:a b"])
def test_names_that_lead_to_a_download_are_refused(libraries: None, spec: str) -> None:
    with pytest.raises(ValueError, match=r"is no name of a"):
        build_model(spec, 5)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_library_that_is_not_installed_is_named(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [Without(library), *sys.meta_path])
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=f"needs {library}, which is not installed: pip install {library}"):
        build_model(f"{library}:resnet18", 5)


class Without:
    """A finder for which a package is not installed."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=self.package)


# Hugging Face


TEXTS = ["the cat sat", "a dog ran off", "the dog sat", "a cat", "cat cat cat cat cat dog", "unheard words"]


def tokenizer(**options: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "the", "a", "cat", "dog", "sat", "ran", "off"]
    words_only = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    words_only.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words_only, unk_token="[UNK]", **options)


@pytest.fixture(scope="module")
def made() -> dict[str, nn.Module]:
    """Small models of random weights."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    bert = transformers.BertConfig(vocab_size=9, max_position_embeddings=16, num_labels=3, **sizes)
    vit = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes)
    gpt = transformers.GPT2Config(vocab_size=9, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    return {
        "text": transformers.BertForSequenceClassification(bert),
        "image": transformers.ViTForImageClassification(vit),
        "causal": transformers.GPT2LMHeadModel(gpt),
    }


@pytest.fixture(scope="module")
def folders(made: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models as save_pretrained writes them."""
    root = tmp_path_factory.mktemp("hugging")
    for name, model in made.items():
        model.save_pretrained(root / name)
    tokenizer(pad_token="[PAD]", model_max_length=16).save_pretrained(root / "text")
    tokenizer(eos_token="off").save_pretrained(root / "causal")
    return {name: root / name for name in made}


def texts(tmp_path: Path) -> str:
    rows = [{"text": text, "label": ["no", "yes"][n % 2]} for n, text in enumerate(TEXTS)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "texts.jsonl")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("text", "BertForSequenceClassification"), ("image", "ViTForImageClassification"), ("causal", "GPT2LMHeadModel")],
)
def test_folders_are_loaded_with_their_weights_by_architecture(
    made: dict[str, nn.Module], folders: dict[str, Path], name: str, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = build_model(str(folders[name]), 3 if name != "causal" else None)
    assert type(model).__name__ == kind
    expected, state = made[name].state_dict(), model.state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[key], expected[key]) for key in state)
    assert capfd.readouterr() == ("", "")


def test_a_fresh_model_of_a_folder_has_its_architecture_and_none_of_its_weights(folders: dict[str, Path]) -> None:
    kept, fresh = build_model(str(folders["text"]), 3), build_model(str(folders["text"]), 3, fresh=True)
    ours, theirs = kept.state_dict(), fresh.state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    drawn = [name for name, value in ours.items() if value.is_floating_point() and value.unique().numel() > 2]
    assert drawn and not any(torch.equal(ours[name], theirs[name]) for name in drawn)


def test_texts_become_dict_batches_that_the_model_takes(folders: dict[str, Path], tmp_path: Path) -> None:
    model, words = build_model(str(folders["text"]), 2), tokenizer_of(str(folders["text"]))
    samples = open_samples(texts(tmp_path), tokenizer=words)
    assert samples.classes == ["no", "yes"] and samples.labels.tolist() == [0, 1, 0, 1, 0, 1]
    batch = samples.batch(torch.tensor([3, 0]))
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[3, 4, 0, 0, 0, 0], [2, 4, 6, 0, 0, 0]],
        "attention_mask": [[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]],
        "labels": [1, 0],
    }
    assert samples.signature()["input_ids"] == {"shape": [6], "dtype": "int64"}
    loader = Loader(samples, select(samples, "class:yes"), 2)
    assert [batch.outputs(model).shape for batch in read(loader, "forget", torch.device("cpu"))] == [(2, 3), (1, 3)]


@pytest.mark.parametrize("length", [1, 4, 9])
def test_text_length_cuts_and_pads(folders: dict[str, Path], tmp_path: Path, length: int) -> None:
    words = tokenizer_of(str(folders["text"]))
    samples = open_samples(texts(tmp_path), tokenizer=words, options=DataOptions(text_length=length))
    batch = samples.batch(torch.arange(6))
    assert batch["input_ids"].shape == (6, length)
    assert batch["attention_mask"].sum(1).tolist() == [min(length, len(text.split())) for text in TEXTS]


def test_texts_longer_than_the_model_takes_are_cut(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"text,y\n{'cat ' * 40},0\n")
    assert open_samples(str(tmp_path / "t.csv"), tokenizer=tokenizer_of(str(folders["text"]))).signature()["input_ids"][
        "shape"
    ] == [16]


def test_a_text_of_a_csv_file_may_be_a_number(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,y\n7,0\nthe cat,1\n")
    samples = open_samples(str(tmp_path / "t.csv"), tokenizer=tokenizer_of(str(folders["text"])))
    assert samples.batch(torch.arange(2))["input_ids"].tolist() == [[1, 0], [2, 4]]


def test_the_digest_of_texts_sees_words_the_tokenizer_does_not_know(folders: dict[str, Path], tmp_path: Path) -> None:
    words = tokenizer_of(str(folders["text"]))
    before = open_samples(texts(tmp_path), tokenizer=words)
    path = tmp_path / "texts.jsonl"
    path.write_text(path.read_text().replace("unheard", "unhearD"))
    after = open_samples(str(path), tokenizer=words)
    assert torch.equal(before.batch(torch.arange(6))["input_ids"], after.batch(torch.arange(6))["input_ids"])
    assert before.digest() != after.digest()


def test_texts_can_be_their_own_targets(folders: dict[str, Path], tmp_path: Path) -> None:
    words = tokenizer_of(str(folders["causal"]))
    assert words.pad_token == "off"
    samples = open_samples(texts(tmp_path), tokenizer=words, options=DataOptions(inputs="text", targets="text"))
    batch = samples.batch(torch.tensor([0, 4]))
    assert batch["labels"].tolist() == [[2, 4, 6, -100, -100, -100], [4, 4, 4, 4, 4, 5]]
    logits = build_model(str(folders["causal"]), None)(**batch).logits
    assert logits.shape == (2, 6, 9)


def test_texts_of_a_hugging_face_data_set_and_of_an_npz_are_the_same(folders: dict[str, Path], tmp_path: Path) -> None:
    import datasets
    import numpy as np

    words = tokenizer_of(str(folders["text"]))
    labels = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": labels})
    rows = {"text": TEXTS, "label": [0, 1] * 3}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "set"))
    np.savez(tmp_path / "t.npz", text=np.array(TEXTS), y=np.array(["no", "yes"] * 3))
    digests = {open_samples(str(tmp_path / name), tokenizer=words).digest() for name in ("set", "t.npz")}
    assert digests == {open_samples(texts(tmp_path), tokenizer=words).digest()}


def test_models_without_a_tokenizer_have_none(folders: dict[str, Path]) -> None:
    assert tokenizer_of(str(folders["image"])) is None
    assert tokenizer_of("own.py:net") is None


@pytest.fixture
def broken(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the text model to break."""
    shutil.copytree(folders["text"], tmp_path / "copy")
    return tmp_path / "copy"


def set_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def cut_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def drop_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["bert.embeddings.word_embeddings.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def only_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def own_code(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('run')\n")
    set_config(folder, model_type="evil", auto_map={"AutoModelForSequenceClassification": "evil.Evil",
                                                     "AutoConfig": "evil.EvilConfig"})  # fmt: skip


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (cut_weights, "raised SafetensorError"),
        (drop_weight, "its weights lack 'bert.embeddings.word_embeddings.weight'"),
        (only_a_pickle, "has no model.safetensors"),
        (own_code, "raised ValueError"),
        (lambda folder: set_config(folder, architectures=["BertForMaskedLM"]), "says BertForMaskedLM; known are"),
        (lambda folder: set_config(folder, architectures=None), "says nothing"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json can not be read: JSONDecodeError"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json holds a list"),
        (lambda folder: set_config(folder, vocab_size=10), "raised RuntimeError"),
    ],
)
def test_folders_that_are_not_whole_are_refused_in_one_line(broken: Path, breaking: Any, message: str) -> None:
    breaking(broken)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        build_model(str(broken), 3)
    assert "\n" not in str(raised.value) and repr(str(broken)) in str(raised.value)


def test_more_classes_than_the_model_tells_apart_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="tells 3 classes apart, the data has 4"):
        build_model(str(folders["text"]), 4)


def test_arguments_that_would_run_code_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="'trust_remote_code' is not taken"):
        build_model(str(folders["text"]), 3, {"trust_remote_code": True})


def test_a_tokenizer_that_can_not_be_read_is_refused_in_one_line(broken: Path) -> None:
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="the tokenizer raised") as raised:
        tokenizer_of(str(broken))
    assert "\n" not in str(raised.value)


def test_importing_the_package_imports_none_of_the_heavy_libraries() -> None:
    heavy = "pandas PIL datasets transformers pyarrow torchvision timm sklearn scipy matplotlib"
    code = (
        "import sys, fastunlearn; before = set(sys.modules); import fastunlearn.inputs; "
        f"print([name for name in {heavy.split()} if name in sys.modules and name not in before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
