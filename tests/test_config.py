"""The configuration: a file and flags are the same keys, flags win, and every mistake is named."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from fastunlearn.jobs.config import FLAGS, HELP, LEAST, Config, ConfigError, add_flags, flag_of, resolve, write_config
from fastunlearn.jobs.methods import METHODS, make_method
from fastunlearn.methods.deepclean import DeepClean
from fastunlearn.methods.lcodec import LCodec
from fastunlearn.methods.newton import Privacy


def parsed(*flags: str) -> Config:
    parser = argparse.ArgumentParser()
    add_flags(parser, [f.name for f in fields(Config)])
    return resolve(parser.parse_args(list(flags)))


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def test_every_key_is_explained_and_has_a_flag() -> None:
    names = {f.name for f in fields(Config)}
    assert set(HELP) == names
    assert set(FLAGS) <= names and set(LEAST) <= names


def test_flags_win_over_the_file_key_by_key(tmp_path: Path) -> None:
    path = written(
        tmp_path, "model: a.b:c\nseed: 3\nsettings: {fraction: 0.1, lr: 0.2}\nmethods: [ssd]\nprobes: false\n"
    )
    config = parsed("--config", path, "--seed", "5", "--set", "fraction=0.4", "--set", "protect=[BatchNorm2d]")
    assert (config.model, config.seed, config.methods, config.probes) == ("a.b:c", 5, ["ssd"], False)
    assert config.settings == {"fraction": 0.4, "lr": 0.2, "protect": ["BatchNorm2d"]}
    assert parsed("--config", path, "--probes", "--methods", "ssd,lcodec").methods == ["ssd", "lcodec"]


def test_the_resolved_file_says_the_same_again(tmp_path: Path) -> None:
    config = parsed("--model", "a.b:c", "--set", "gamma=1.5", "--data-option", "mean=[0.5, 0.4]", "--no-probes")
    again = parsed("--config", written(tmp_path, write_config(config)))
    assert again == config
    assert set(yaml.safe_load(write_config(config))) == {f.name for f in fields(Config)}


def test_a_float_without_a_point_is_a_number_and_text_that_looks_like_one_stays_text(tmp_path: Path) -> None:
    """As in YAML 1.2; PyYAML takes 1e-3 for text."""
    path = written(tmp_path, "model: a.b:c\ntraining: {lr: 1e-3}\ndata_options: {targets: '1e3'}\n")
    config = parsed("--config", path, "--set", "lr=-2E+5", "--set", "name=1e3x", "--set", "code=0x1e3")
    assert config.training == {"lr": 1e-3} and config.data_options == {"targets": "1e3"}
    assert config.settings == {"lr": -2e5, "name": "1e3x", "code": 0x1E3}
    assert parsed("--config", written(tmp_path, write_config(config))) == config
    assert yaml.safe_load(write_config(config)) == config.as_dict()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: a:b\nfroget: class:3\n", "unknown key 'froget'; did you mean forget?"),
        ("model: a:b\nseed: three\n", "seed must be a whole number, got 'three'"),
        ("model: a:b\nseed: true\n", "seed must be a whole number, got True"),
        ("model: a:b\nseed: -1\n", "seed must be 0 or more, got -1"),
        ("model: a:b\nbatch_size: 0\n", "batch_size must be 1 or more, got 0"),
        ("model: a:b\nsettings: [1]\n", "settings must be a mapping"),
        ("model: a:b\nprobes: 1\n", "probes must be true or false, got 1"),
        ("model: 3\n", "model must be text, got 3"),
        ("- model\n", "must hold keys and values"),
        ("", "must hold keys and values"),
        ("model: [a\n", "line 2: not YAML"),
        ("model: !!python/object/apply:os.system ['true']\n", "not YAML"),
    ],
)
def test_a_wrong_file_is_named_with_the_key(tmp_path: Path, text: str, says: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        parsed("--config", path)
    assert str(caught.value).startswith(path)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"model: \xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        parsed("--config", str(path))
    with pytest.raises(FileNotFoundError, match=r"missing\.yaml"):
        parsed("--config", str(tmp_path / "missing.yaml"))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "give --model, or the key model"),
        (["--model", "a:b", "--seed", "x"], "--seed must be a whole number, got 'x'"),
        (["--model", "a:b", "--set", "fraction"], "--set takes KEY=VALUE, got 'fraction'"),
        (["--model", "a:b", "--set", "=3"], "--set takes KEY=VALUE"),
        (["--model", "a:b", "--set", "fraction=[1"], "--set fraction: '[1' can not be read"),
        (["--model", "a:b", "--bootstrap", "3"], "bootstrap must be 10 or more, got 3"),
    ],
)
def test_a_wrong_flag_is_named(flags: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(*flags)
    assert says in str(caught.value)


def test_what_is_missing_is_asked_for_by_flag_and_key() -> None:
    with pytest.raises(ConfigError, match="method is missing: give --method, or the key method"):
        Config(model="a:b").require("method")
    assert flag_of("settings") == "--set" and flag_of("batch_size") == "--batch-size"


def test_settings_become_the_method() -> None:
    method = make_method("deepclean", {"fraction": 0.2, "protect": ["BatchNorm2d", "0.weight"]}, 7, nn.Module)
    assert isinstance(method, DeepClean)
    assert (method.seed, method.protect) == (7, (nn.BatchNorm2d, "0.weight"))
    own = make_method("deepclean", {"seed": 1, "autocast": "bfloat16"}, 7, nn.Module)
    assert isinstance(own, DeepClean) and own.seed == 1
    privacy = {"epsilon": 0.5, "delta": 0.01, "lipschitz": 1.0, "smoothness": 1.0, "strong_convexity": 1.0}
    names = {f.name for f in fields(Privacy)}
    chosen = {k: v for k, v in privacy.items() if k in names} | {k: 1.0 for k in names - set(privacy)}
    removal = make_method("lcodec", {"privacy": chosen, "layers": ["0"]}, 0, nn.Module)
    assert isinstance(removal, LCodec) and isinstance(removal.privacy, Privacy) and removal.layers == ("0",)
    assert all(callable(make_method(name, {}, 0, nn.Module).unlearn) for name in METHODS)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("deepclena", {}, "method must be one of deepclean"),
        ("deepclean", {"fractoin": 0.3}, "settings of deepclean: unknown key 'fractoin'; did you mean fraction?"),
        ("deepclean", {"fraction": "much"}, "settings of deepclean: fraction must be a number, got 'much'"),
        ("deepclean", {"fraction": 3}, "fraction must lie between 0 and 1"),
        ("deepclean", {"fraction": 0.1, "gamma": 2.0}, "give gamma or fraction, not both"),
        ("deepclean", {"finetune_epochs": 1.5}, "finetune_epochs must be a whole number"),
        ("deepclean", {"loss_fn": "x"}, "loss_fn can not be set here"),
        ("deepclean", {"autocast": "float16"}, "autocast must be bfloat16 or null"),
        ("ssd", {"fisher_dtype": "float16"}, "fisher_dtype must be bfloat16 or null"),
        ("deepclean", {"optimizer": "adam"}, "optimizer must be one of"),
        ("class-forgetting", {"alpha_retain": -1.0}, "alpha_retain"),
        ("lcodec", {"budget": {"max_dorp": 1}}, "settings of lcodec: budget: unknown key 'max_dorp'"),
        ("lcodec", {"damping": 0.0}, "damping must be a finite number above 0"),
    ],
)
def test_a_wrong_setting_is_named(name: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_method(name, settings, 0, nn.Module)
    assert says in str(caught.value)
