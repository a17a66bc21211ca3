"""One request as a flat set of keys: from a YAML file, from flags, or both; flags win."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

VALUES = 100_000  # values in a configuration: YAML can write a billion of them in ten lines
Say = Callable[[str], None]  # where a run says what it is doing


class ConfigError(ValueError):
    """A key or a flag that is wrong by itself, before any file is opened."""


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on but for the contents of the files it names. Each field is a key and a flag,
    explained in :data:`HELP`."""

    model: str
    model_arguments: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    data: str | None = None
    data_options: dict[str, Any] = field(default_factory=dict)
    forget: str | None = None
    retain: str = "rest"
    test: str | None = None
    validation: str | None = None
    method: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    methods: list[Any] = field(default_factory=list)
    method_samples: int | None = None
    reference: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    stack: str = "auto"
    measured: int = 10_000
    shadows: int = 0
    probes: bool = True
    questions: str | None = None
    relearn: int = 50
    bootstrap: int = 1000
    pictures: bool = True
    batch_size: int = 128
    device: str = "cpu"
    parallel: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    seeds: int = 3
    out: str | None = None
    log: str | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            require_plain(getattr(self, f.name), f.name)
            check_type(getattr(self, f.name), str(f.type), f.name)
            value, least = getattr(self, f.name), LEAST.get(f.name)
            if least is not None and value is not None and value < least:
                raise ConfigError(f"{f.name} must be {least} or more, got {value}")
            if f.name in MOST and value > MOST[f.name]:
                raise ConfigError(f"{f.name} must be {MOST[f.name]} or less, got {value}")

        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                *most, last = known
                raise ConfigError(f"{name} must be {', '.join(most)} or {last}, got {getattr(self, name)!r}")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def require(self, *names: str) -> None:
        """Raise ConfigError naming the first of these keys that has no value."""
        for name in names:
            if getattr(self, name) in (None, ""):
                raise ConfigError(f"{name} is missing: give {flag_of(name)}, or the key {name} in the configuration")


HELP = {
    "model": "package.module:function, file.py:function, torchvision:NAME, timm:NAME or a Hugging Face folder",
    "model_arguments": "given to the function that makes the model",
    "weights": "checkpoint to unlearn from: safetensors, or .pt with nothing but weights",
    "data": "training data: folder of class folders, archive::folder, npz, safetensors, csv, parquet, jsonl, datasets "
    "folder, or package.module:function",
    "data_options": "how data is read: image_size, mean, std, inputs, targets, ...",
    "forget": "index:FILE, id:FILE, class:NAME[,NAME] or predicate:FILE.py:FUNCTION of the data; without --data, data",
    "retain": "rest (all that is not forgotten), or chosen as with --forget",
    "test": "data that no model was trained on",
    "validation": "data held back from retain, for methods that stop by it",
    "method": "deepclean, class-forgetting, lcodec, ssd, finetune, gradient-ascent or retrain",
    "settings": "of the method, as its class documents them",
    "methods": "of a comparison: names, or in a file {method: name, settings: {...}}; all when empty",
    "method_samples": "of each set that the method reads, evenly over classes; all, but 1000 for class-forgetting",
    "reference": 'the yardstick: weights of a model that never saw the forgotten data, or "retrain"',
    "training": "of retraining and shadow models: epochs, lr, weight_decay, batch_size",
    "stack": "train several models at once: stacked, sequential, or auto, whichever is faster here",
    "measured": "retained samples at most that are measured, drawn once",
    "shadows": "shadow models behind the per-example attacks LiRA and U-LiRA; 0 for none",
    "probes": "ask every layer, by a linear probe, whether it still knows a forgotten class",
    "questions": "of a language model: JSON lines of question, choices and answer, asked before and after",
    "relearn": "steps at most of learning again what was forgotten; 0 leaves it out",
    "bootstrap": "resamples behind the interval of an attack",
    "pictures": "charts as PNG and SVG beside the report; needs matplotlib",
    "batch_size": "of every pass",
    "device": "cpu, cuda or cuda:N; of several processes each takes the GPU of its local rank",
    "parallel": "how the processes that torchrun started hold the model: fsdp (sharded; auto), ddp (each has all) or "
    "tp (layers split)",
    "dtype": "of the weights while the model runs: float32, bfloat16 or auto, as it is made; results keep the file's",
    "seed": "of everything that is drawn",
    "seeds": "runs of a comparison, from --seed on",
    "out": "folder for the results; must not exist, or be empty",
    "log": "append-only log of deletions; beside the folder by default",
    "cache": "folder of shadow models; beside the folder by default",
}  # what each key means, as --help says it
FLAGS = {"settings": "set", "data_options": "data-option", "model_arguments": "model-argument"}  # the others: by name
LEAST = {"method_samples": 1, "measured": 1, "shadows": 0, "relearn": 0, "bootstrap": 10, "batch_size": 1, "seed": 0,
         "seeds": 1}  # fmt: skip
CHOICES = {"stack": ("auto", "stacked", "sequential"), "parallel": ("auto", "fsdp", "ddp", "tp"),
           "dtype": ("auto", "float32", "bfloat16")}  # fmt: skip
MOST = {
    "bootstrap": 1_000_000,
    "seed": 2**31 - 1,
    "seeds": 2**31 - 1,
}  # a seed and seeds added are a seed that NumPy takes
FLOAT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+\Z")
# What PyYAML raises for brackets without end, and for values that are not what they are tagged as or look like.
UNREADABLE = (RecursionError, ValueError, LookupError, AttributeError, TypeError)
_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,), "int": (int,), "bool": (bool,), "dict": (dict,), "list": (list,), "float": (float, int),
}  # fmt: skip
_WORDS = {"str": "text", "int": "a whole number", "bool": "true or false", "dict": "a mapping", "list": "a list",
          "float": "a number"}  # fmt: skip


def require_plain(value: Any, name: str) -> None:
    """Raise ConfigError unless ``value`` is made of at most ``VALUES`` of what JSON has, with text for keys."""
    waiting, count = [value], 0
    while waiting:
        one = waiting.pop()
        count += 1
        if count > VALUES:
            raise ConfigError(f"{name} holds more than {VALUES:,} values, or itself")
        if isinstance(one, dict):
            odd = next((key for key in one if not isinstance(key, str)), None)
            if odd is not None:
                raise ConfigError(f"{name}: the key {shown(odd)} must be text")
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
        elif one is not None and not isinstance(one, (str, int, float)):
            raise ConfigError(f"{name} holds {shown(one)}, a {type(one).__name__}; write a number, text, true or false")
        elif isinstance(one, str) and "\0" in one:
            raise ConfigError(f"{name} holds {shown(one)}, which has a NUL character")
        elif isinstance(one, float) and not math.isfinite(one):
            raise ConfigError(f"{name} holds {one}; numbers must be finite")


def shown(value: Any) -> str:
    """``repr`` of a value for a message, cut short."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return " ".join(short.repr(value).split())


def check_type(value: Any, annotation: str, name: str) -> None:
    """Raise ConfigError unless ``value`` is what a field annotated like this takes."""
    kind = _kind(annotation)
    if value is None and annotation.endswith(" | None"):
        return
    if not isinstance(value, _TYPES[kind]) or (kind in ("int", "float") and isinstance(value, bool)):
        raise ConfigError(f"{name} must be {_WORDS[kind]}, got {shown(value)}")


def is_plain(annotation: str) -> bool:
    """Whether :func:`check_type` knows what a field annotated like this takes."""
    return annotation.removesuffix(" | None") in _TYPES


def _kind(annotation: Any) -> str:
    """The bare type in an annotation of this module, which are text: "dict" of "dict[str, Any] | None"."""
    return str(annotation).removesuffix(" | None").split("[")[0]


def flag_of(name: str) -> str:
    """What a key is called on the command line."""
    return "--" + FLAGS.get(name, name).replace("_", "-")


def read_config(path: Path) -> dict[str, Any]:
    """The keys of a YAML file; raises ConfigError or OSError naming the file and the key."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        found = from_yaml(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except UNREADABLE as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "it can not be read"
        raise ConfigError(f"{path}{where}: not YAML: {problem}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold keys and values, it holds {type(found).__name__}")
    names = [f.name for f in fields(Config)]
    for key in found:
        if key not in names:
            raise ConfigError(f"{path}: unknown key {shown(key)}{_suggestion(str(key), names)}")
    try:
        replace(Config(model=""), **found)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return found


def _suggestion(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


def write_config(config: Config) -> str:
    """As YAML, every key with its value, so that it says the same whatever the defaults become."""
    import yaml

    return yaml.dump(config.as_dict(), Dumper=_with_floats(yaml.SafeDumper), sort_keys=False, allow_unicode=True)


def from_yaml(text: str) -> Any:
    """The value written there; 1e-3 is a number, which PyYAML takes for text. Raises as ``yaml.safe_load``."""
    import yaml

    return yaml.load(text, Loader=_with_floats(yaml.SafeLoader))  # no less safe


def _with_floats(kind: Any) -> Any:
    """A loader or dumper of PyYAML that knows floats without a point, as YAML 1.2 has them."""
    extended: Any = type(kind.__name__, (kind,), {})
    extended.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789"))
    return extended


def add_flags(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """A flag for each of these keys, and ``--config``; a flag that was not given has no value."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of the same keys; flags win")
    for f in fields(Config):
        if f.name not in names:
            continue
        kind = _kind(f.type)
        default = "" if f.default in (None, MISSING) else f" (default: {f.default})"
        options: dict[str, Any] = {"dest": f.name, "default": None, "help": HELP[f.name] + default}
        if kind == "bool":
            options["action"] = argparse.BooleanOptionalAction
        elif kind == "dict":
            options |= {"action": "append", "metavar": "KEY=VALUE"}
        elif kind == "list":
            options["metavar"] = "NAME,NAME"
        else:
            options["metavar"] = {"int": "N"}.get(kind, "FILE" if f.name in ("weights", "log") else f.name.upper())
        parser.add_argument(flag_of(f.name), **options)


def resolve(arguments: argparse.Namespace) -> Config:
    """The file's keys, overridden by the flags; raises ConfigError naming the key or the flag."""
    found = read_config(arguments.config) if arguments.config is not None else {}
    for f in fields(Config):
        given = getattr(arguments, f.name, None)
        if given is None:
            continue
        kind = _kind(f.type)
        if kind == "dict":
            found[f.name] = {**found.get(f.name, {}), **_pairs(given, flag_of(f.name))}
        elif kind == "list":
            found[f.name] = [name for name in given.split(",") if name]
        elif kind == "int":
            found[f.name] = _whole(given, flag_of(f.name))
        else:
            found[f.name] = given
    if not found.get("model"):
        raise ConfigError("model is missing: give --model, or the key model in the configuration")
    return Config(**found)


def _whole(text: str, flag: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"{flag} must be a whole number, got {text!r}") from error


def _pairs(texts: Sequence[str], flag: str) -> dict[str, Any]:
    import yaml

    found = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(f"{flag} takes KEY=VALUE, got {text!r}")
        try:
            found[key] = from_yaml(value)
        except (yaml.YAMLError, *UNREADABLE) as error:
            raise ConfigError(f"{flag} {key}: {value!r} can not be read as a value") from error
    return found


def pick(kind: type, given: Mapping[str, Any], what: str) -> Any:
    """An instance of the dataclass ``kind`` from the keys of ``given``; ConfigError names ``what`` and the key."""
    known = [f.name for f in fields(kind)]
    for key in given:
        if key not in known:
            raise ConfigError(f"{what}: unknown key {key!r}{_suggestion(str(key), known)}")
        annotation = next(str(f.type) for f in fields(kind) if f.name == key)
        if is_plain(annotation):
            check_type(given[key], annotation, f"{what}: {key}")
    try:
        return kind(**given)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what}: {error}") from error
