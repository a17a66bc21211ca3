"""Models by name: the user's own function, torchvision, timm, or a Hugging Face folder."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from fastunlearn.inputs import places

FORMS = (
    "write package.module:function, path/to/file.py:function, torchvision:NAME, timm:NAME or a Hugging Face folder "
    "(with config.json)"
)
# The last part of a Hugging Face architecture's name, and the class that loads it.
AUTO_CLASSES = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")


def build_model(
    spec: str, classes: int | None, arguments: Mapping[str, Any] | None = None, fresh: bool = False
) -> nn.Module:
    """The model that ``spec`` names, on the CPU, in the mode its maker left it in.

    ``package.module:function`` and ``path/to/file.py:function`` are called with ``arguments``, and with
    ``num_classes=classes`` (or ``classes=``) where they have such a parameter. ``torchvision:resnet18`` and
    ``timm:NAME`` are built with ``num_classes=classes`` and random weights; nothing is downloaded. A Hugging Face
    folder is loaded with its own safetensors weights by what ``architectures`` in its config.json says: sequence
    classification, image classification or causal language modelling; no code of the folder is run. ``classes`` None
    leaves the number of classes to the model. ``fresh`` asks for a newly initialised model: of a folder, one of its
    architecture with random weights; what else makes models makes fresh ones anyway.

    Raises FileNotFoundError, ImportError (torchvision, timm or transformers are missing) or ValueError of one line
    that names ``spec``, chained to what the model's own code raised; also for what is no nn.Module or has no
    parameter. TypeError for arguments that are no mapping with names.
    """
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise TypeError(f"the arguments of a model must be a mapping from names to values, got {arguments!r}")
    maker, colon, name = spec.partition(":")
    if (Path(spec) / "config.json").is_file():
        model = _hugging_face(Path(spec), classes, dict(arguments), spec, fresh)
    elif colon and maker in ("torchvision", "timm"):
        model = _from_library(maker, name, classes, dict(arguments), spec)
    elif places.names_code(spec):
        model = _from_code(spec, classes, dict(arguments))
    elif Path(spec).is_dir():
        raise ValueError(f"{spec!r} is a folder without config.json; {FORMS}")
    else:
        raise ValueError(f"{spec!r} names no model; {FORMS}")
    if not isinstance(model, nn.Module):
        raise ValueError(f"{spec!r} returned a {type(model).__name__}, expected a torch.nn.Module")
    if next(model.parameters(), None) is None:
        raise ValueError(f"{spec!r} returned a {type(model).__name__} without parameters; there is nothing to unlearn")
    return model


def tokenizer_of(spec: str) -> Any:
    """The tokenizer in a Hugging Face folder, or None for a model without one.

    One that has no padding token pads with its end-of-sequence token. Raises ValueError of one line where its files
    can not be read, ImportError without transformers.
    """
    folder = Path(spec)
    if not (folder / "config.json").is_file() or not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    transformers = _imported("transformers", spec)
    with places.blaming(f"{spec!r}: the tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _from_code(spec: str, classes: int | None, arguments: dict[str, Any]) -> Any:
    function = places.find(spec)
    if isinstance(function, nn.Module):
        raise ValueError(f"{spec!r} is a model; name a function that builds one, so that it can be built again")
    if not callable(function):
        raise ValueError(f"{spec!r} is a {type(function).__name__}, expected a function that returns a model")
    wanted = next((name for name in ("num_classes", "classes") if name in _parameters(function)), None)
    if wanted is not None and classes is not None:
        arguments = {wanted: classes} | arguments
    return places.call(spec, function, **arguments)


def _parameters(function: Callable[..., Any]) -> Mapping[str, Any]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # compiled code need not tell
        return {}


def _from_library(library: str, name: str, classes: int | None, arguments: dict[str, Any], spec: str) -> Any:
    if not re.fullmatch(r"[\w.\-]+", name):  # timm downloads what has a "hf-hub:" before it
        raise ValueError(f"{spec!r}: {name!r} is no name of a {library} model, such as {library}:resnet18")
    downloads = "weights" if library == "torchvision" else "pretrained"
    for key in (downloads, "weights_backbone", "pretrained_cfg", "checkpoint_path"):
        if arguments.get(key):
            raise ValueError(f"{spec!r}: the argument {key!r} is not taken; weights come from a file of their own")
    arguments = {"num_classes": classes, **arguments} if classes is not None else arguments
    module = _imported(library, spec)
    with places.blaming(repr(spec)):
        if library == "timm":
            return module.create_model(name, **{**arguments, "pretrained": False})
        return module.get_model(name, **{**arguments, "weights": None})


def _imported(library: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(library if library != "torchvision" else "torchvision.models")
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise ImportError(f"{spec!r} needs {library}, which is not installed: pip install {library}") from error


def _hugging_face(folder: Path, classes: int | None, arguments: dict[str, Any], spec: str, fresh: bool) -> Any:
    for key in ("trust_remote_code", "local_files_only", "use_safetensors", "output_loading_info", "num_labels"):
        if key in arguments:
            raise ValueError(f"{spec!r}: the argument {key!r} is not taken; it is fixed for Hugging Face folders")
    config = _config(folder, spec)
    auto = _auto_class(config, spec)
    if not any((folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        raise ValueError(f"{spec!r} has no model.safetensors; write it with save_pretrained (pickles are not read)")
    transformers = _imported("transformers", spec)
    kind = getattr(transformers, auto)
    if fresh:
        with _quiet(transformers), places.blaming(repr(spec)):
            own = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            return kind.from_config(own, **arguments)
    with _quiet(transformers), places.blaming(repr(spec)):
        model, told = kind.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True,
            output_loading_info=True, **arguments,
        )  # fmt: skip
    missing = sorted(told["missing_keys"])
    if missing:
        raise ValueError(f"{spec!r}: its weights lack {missing[0]!r} and {len(missing) - 1} more of its architecture's")
    labels = getattr(model.config, "num_labels", None)
    if classes is not None and not auto.endswith("CausalLM") and labels is not None and classes > labels:
        raise ValueError(f"{spec!r} tells {labels} classes apart, the data has {classes}")
    return model


def _config(folder: Path, spec: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{spec!r}: config.json can not be read: {places.one_line(error)}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{spec!r}: config.json holds a {type(config).__name__}, expected an object")
    return config


def _auto_class(config: dict[str, Any], spec: str) -> str:
    named = config.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    for name in names:
        for end, auto in AUTO_CLASSES.items():
            if name.endswith(end):
                return auto
    shown, known = ", ".join(names) or "nothing", ", ".join(f"...{end}" for end in AUTO_CLASSES)
    raise ValueError(f"{spec!r}: 'architectures' in config.json says {shown}; known are {known}")


@contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Without progress bars and warnings: what they would say is checked here."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
