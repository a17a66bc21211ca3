"""Deletion records and their log: what they say can be checked, what they must not say is not in them."""

from __future__ import annotations

import copy
import hashlib
import hmac
import json
import multiprocessing
import os
import resource
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from torch import nn

from fastunlearn.checkpoint import digest, save_weights
from fastunlearn.files import sha256_of_file, write_json
from fastunlearn.outcome import Outcome
from fastunlearn.patch import count_changes, write_patch
from fastunlearn.report.log import Check, append, last_hash, locked, verify
from fastunlearn.report.record import (
    canonical,
    contains,
    hashed_id,
    new_salt,
    plain_limits,
    read_record,
    read_salt,
    record,
    record_hash,
    salt_commitment,
    schema,
    validate,
    weights_entry,
    write_salt,
)

SALT = bytes(range(32))
IDS = ["train/cat/0001.jpg", "Müller, Anna", "customer-4711", "98765432"]
HASH = "0123456789abcdef" * 4


def made(**changes: Any) -> dict[str, Any]:
    """A record of everything a record can hold, with paths and ids in every place they could come in by."""
    metrics = {
        "name": "DeepClean",
        "role": "unlearned",
        "accuracy": {"forget": {"mean": 31.5, "runs": 3, "low": 30.0, "high": 33.0}},
        "gap": None,
    }
    fields: dict[str, Any] = {
        "before": {"file": "resnet.pt", "sha256": HASH, "digest": "a" * 64},
        "after": {"file": "unlearned.safetensors", "sha256": None, "digest": "b" * 64},
        "forgotten": IDS,
        "salt": SALT,
        "outcome": Outcome(
            "DeepClean", {"gamma": 1.5, "loss_fn": nn.CrossEntropyLoss(), "stop": float("inf")}, peak_memory=7
        ),
        "seeds": {"unlearn": 0, "attack": [1, 2]},
        "device": torch.device("cpu"),
        "kernels": {"fisher_squares": {"calls": 12, "backend": "cpu"}},
        "changed": {"0.weight": {"changed": 3, "of": 6}, "0.bias": {"changed": 0, "of": 2}},
        "data": {"source": "/home/anna/photos 2024/set.npz", "digest": HASH, "samples": {"forget": 4, "retain": 90}},
        "metrics": [metrics],
        "limits": plain_limits(method="DeepClean", reference=True, runs=3, attacks=["loss"]),
        "config": {
            "weights": Path("/srv/models/resnet.pt"),
            "forget": "index:/home/anna/secret list/forget.txt",
            "out": "~/results",
            "windows": "C:\\Users\\anna\\data.npz",
            "ids": IDS,
            "as text": "customer-4711,98765432",
            "first": "Müller, Anna",
            "number": "98765432",
            "note": "customer-4711 asked on 1 March",
            "dtype": torch.float32,
        },
    }
    return record(**(fields | changes))


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """before.pt, after.pt, other.pt and patch.safetensors in one folder."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    states = {name: nn.Linear(3, 2).state_dict() for name in ("before", "after", "other")}
    for name, state in states.items():
        save_weights(folder / f"{name}.pt", state)
    write_patch(folder / "patch.safetensors", states["before"], states["after"])
    write_patch(folder / "elsewhere.safetensors", states["before"], states["other"])
    return folder


def of_models(folder: Path, **changes: Any) -> dict[str, Any]:
    states = {name: torch.load(folder / f"{name}.pt") for name in ("before", "after")}
    entries = {name: weights_entry(folder / f"{name}.pt", digest(state)) for name, state in states.items()}
    return made(**entries, changed=count_changes(states["before"], states["after"]), **changes)


def logged(folder: Path, count: int, **changes: Any) -> list[Path]:
    """``count`` requests, one after the other, in ``log.jsonl``; their records."""
    paths = [folder / f"record{i}.json" for i in range(count)]
    for path in paths:
        with locked(folder / "log.jsonl") as held:
            write_json(path, made(previous=held.last_hash, **changes))
            held.append(path)
    return paths


def outcome_of(checks: list[Check]) -> dict[str, bool]:
    return {check.name: check.passed for check in checks}


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, (dict, list)) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))
    else:
        yield path


def altered(value: Any, path: tuple[Any, ...]) -> Any:
    """A copy in which one leaf is another value of the same type."""
    value = copy.deepcopy(value)
    *parents, last = path
    inside = value
    for key in parents:
        inside = inside[key]
    old = inside[last]
    if isinstance(old, str):
        inside[last] = old[:-1] + ("0" if old[-1:] != "0" else "1")
    else:
        inside[last] = {None: HASH, dict: {"more": 1}, list: [1]}.get(old if old is None else type(old), old)
        if isinstance(old, (int, float)):
            inside[last] = old + 1
    return value


# ---- the record ----


def test_the_schema_is_a_valid_schema_and_names_no_address() -> None:
    Draft202012Validator.check_schema(schema())
    assert schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema()["$id"].startswith("urn:")


def test_a_record_is_valid_before_and_after_it_is_written(tmp_path: Path) -> None:
    found = made()
    Draft202012Validator(schema()).validate(found)
    write_json(tmp_path / "record.json", found)
    assert read_record(tmp_path / "record.json") == found
    assert found["forgotten"]["count"] == 4
    assert found["method"] == {
        "name": "DeepClean",
        "settings": {"gamma": 1.5, "loss_fn": "CrossEntropyLoss", "stop": "inf"},
        "seconds": {},
        "peak_memory": 7,
    }
    assert found["versions"]["torch"] == torch.__version__
    assert found["created"].endswith("+00:00")


def test_no_id_no_salt_and_no_folder_is_in_a_record() -> None:
    text = json.dumps(made(), ensure_ascii=False)
    for secret in (
        *IDS,
        SALT.hex(),
        "customer",
        "Anna",
        "0001.jpg",
        "/home",
        "anna",
        "secret list",
        "/srv",
        "Users",
        "~",
    ):
        assert secret not in text, secret
    config = made()["config"]
    assert config["weights"] == "resnet.pt"
    assert config["forget"] == "index:forget.txt"
    assert (config["out"], config["windows"]) == ("results", "data.npz")
    assert config["ids"] == "[4 forgotten samples]"
    assert config["note"] == "[forgotten sample] asked on 1 March"
    assert made()["data"]["source"] == "set.npz"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("clients/anna/set.npz", "set.npz"),
        ("clients/anna/", "anna"),
        ("clients/anna/set.tar.xz::train", "set.tar.xz::train"),
        ("index:clients/anna/forget.txt", "index:forget.txt"),
        ("predicate:clients/anna.py:old", "predicate:anna.py:old"),
        ("clients/anna.py:net", "anna.py:net"),
        ("clients\\anna\\set.npz", "set.npz"),
        ("class:cat/dog", "class:cat/dog"),
        ("package.module:net", "package.module:net"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("rest", "rest"),
        (None, None),
    ],
)
def test_relative_folders_are_left_out_of_what_names_a_file(spec: str | None, expected: str | None) -> None:
    found = made(config={"data": spec, "note": "a/b"}, data={"source": spec or "", "digest": None, "samples": {}})
    assert found["config"] == {"data": expected, "note": "a/b"}
    assert found["data"]["source"] == (expected or "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("class:3", "class:3"),
        ("3", "3"),
        ("index:3,5", "[2 forgotten samples]"),
        ("index:3", "[1 forgotten samples]"),
        ("classes:3,5", "classes:3,5"),
        ("of 65432100 and 5", "of [forgotten sample] and 5"),
        ("3 5", "[2 forgotten samples]"),
        ("a/b", "a/b"),
        ("and / or", "and / or"),
        ("torchvision.models:resnet18", "torchvision.models:resnet18"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("file:///home/anna/x.npz", "x.npz"),
        ("/home/anna/", "anna"),
        ("../anna/x.npz", "x.npz"),
        ("see https://example.org/a and /home/anna/x", "see https://example.org/a and x"),
        ("\\\\server\\share\\x.npz", "x.npz"),
        ("['/home/a b/c']", "['c']"),
        ([3, 5], "[2 forgotten samples]"),
        ([3, 4], [3, 4]),
        ((0.1, 3), [0.1, 3]),
        ([], []),
        (3, 3),
    ],
)
def test_what_becomes_of_settings(text: Any, expected: Any) -> None:
    assert made(forgotten=[3, 5, 65432100], config={"x": text})["config"]["x"] == expected


def test_hashed_ids_are_hmac_and_sorted() -> None:
    found = made()["forgotten"]
    assert found["ids"] == sorted(hmac.digest(SALT, sample.encode(), "sha256").hex() for sample in IDS)
    assert hashed_id(SALT, 17) == hashed_id(SALT, "17")
    assert len({new_salt() for _ in range(100)}) == 100


def test_who_holds_the_salt_can_show_that_a_sample_was_in_the_request() -> None:
    found = made(forgotten=[17, "a"])
    assert contains(found, SALT, 17) and contains(found, SALT, "17") and contains(found, SALT, "a")
    assert not contains(found, SALT, 18)
    with pytest.raises(ValueError, match="not the salt of the record"):
        contains(found, new_salt(), 17)


def test_the_salt_is_for_its_owner_and_never_replaced_by_another(tmp_path: Path) -> None:
    path = tmp_path / "salt"
    write_salt(path, SALT)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_salt(path) == SALT
    write_salt(path, SALT)
    with pytest.raises(FileExistsError, match="salt: holds another salt"):
        write_salt(path, new_salt())
    assert read_salt(path) == SALT
    path.write_text("abc")
    with pytest.raises(ValueError, match="salt: a salt is 64 hexadecimal digits"):
        read_salt(path)


def test_weights_are_named_by_file_hash_and_digest(tmp_path: Path) -> None:
    state = nn.Linear(2, 2).state_dict()
    save_weights(tmp_path / "a.pt", state)
    assert weights_entry(tmp_path / "a.pt", digest(state)) == {
        "file": "a.pt",
        "sha256": sha256_of_file(tmp_path / "a.pt"),
        "digest": digest(state),
    }
    assert weights_entry(tmp_path, digest(state))["sha256"] is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"forgotten": ["a", "b", "a"]}, "'a' is given twice"),
        ({"forgotten": []}, r"record: \$\.forgotten\.count: 0 is less than"),
        ({"limits": ["all is well"]}, r"\$\.limits: .* does not contain"),
        ({"metrics": [{"name": "a", "role": "unlearned", "loss": float("nan")}]}, r"\$\.metrics\[0\]\.loss: is nan"),
        ({"metrics": [{"name": "a"}]}, r"\$\.metrics\[0\]: 'role' is a required"),
        ({"kernels": {"gram": {"calls": -1, "backend": "cpu"}}}, r"\$\.kernels\.gram\.calls: -1 is less"),
        ({"changed": {"0.weight": {"changed": 7, "of": 6}}}, r"\$\.changed\['0\.weight'\]: 7 of 6"),
        ({"previous": HASH + "\n"}, r"\$\.previous: .* is not valid"),
        ({"previous": "abc"}, r"\$\.previous: 'abc' is not valid"),
        ({"created": "2026-11-21 10:00"}, r"\$\.created: '2026-11-21 10:00' does not match"),
        ({"identifier": "7"}, r"\$\.id: '7' does not match"),
        ({"before": {"file": "/a/b.pt", "sha256": None, "digest": HASH}}, r"\$\.weights\.before\.file"),
        ({"seeds": {"all": 0.5}}, r"\$\.seeds\.all: 0\.5"),
        ({"config": {"x": torch.ones(1)}}, r"\$\.config\.x: a Tensor cannot be written"),
    ],
)
def test_what_the_schema_does_not_allow_is_refused_by_its_path(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as refusal:
        made(**changes)
    assert "\n" not in str(refusal.value)


def test_every_field_is_required_and_no_other_is_allowed() -> None:
    whole = made()
    for field in whole:
        with pytest.raises(ValueError, match=f"'{field}' is a required property"):
            validate({key: value for key, value in whole.items() if key != field})
    with pytest.raises(ValueError, match="'salt' was unexpected"):
        validate(whole | {"salt": SALT.hex()})
    for part in ("weights", "forgotten", "method", "device", "data"):
        with pytest.raises(ValueError, match=rf"\$\.{part}: .*'ids_in_clear' was unexpected"):
            validate(whole | {part: whole[part] | {"ids_in_clear": []}})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"id": 1, "id": 2}', "'id' is there twice"),
        (b'{"id": NaN}', r"\$\.id: is nan"),
        (b'{"id": 1e999}', r"\$\.id: is inf"),
        (b"[]", "is not of type 'object'"),
    ],
)
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "record.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"record\.json: .*{expected}"):
        read_record(tmp_path / "record.json")


def test_many_forgotten_samples_are_quickly_recorded() -> None:
    found = made(forgotten=range(20_000))
    assert found["forgotten"]["count"] == 20_000 and contains(found, SALT, 19_999)


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("attacks", [(), ("loss", "entropy"), ("U-LiRA",)])
@pytest.mark.parametrize("method", ["DeepClean", None])
def test_limits_always_say_it_is_no_proof(
    reference: bool, runs: int, attacks: tuple[str, ...], method: str | None
) -> None:
    found = plain_limits(method=method, reference=reference, runs=runs, attacks=attacks)
    text = " ".join(found)
    assert "not a proof of erasure" in found[0]
    assert ("No model was retrained" in text) != reference
    assert ("one run" in text) == (runs == 1)
    assert ("No membership attack was run" in text) == (not attacks)
    assert ("no attack per example" in text) == (attacks == ("loss", "entropy"))
    assert ("were changed" in text) == ("DeepClean is approximate" in text) == (method is not None)
    assert all(sentence.endswith(".") for sentence in found)


# ---- the log ----


def test_lines_are_the_documented_chain(tmp_path: Path) -> None:
    paths = logged(tmp_path, 3)
    lines = (tmp_path / "log.jsonl").read_bytes().splitlines()
    previous = None
    for path, line in zip(paths, lines, strict=True):
        found = json.loads(path.read_text())
        text = json.dumps(found, sort_keys=True, separators=(",", ":")).encode()
        assert json.loads(line) == {
            "record": hashlib.sha256(text).hexdigest(),
            "id": found["id"],
            "created": found["created"],
            "previous": previous,
        }
        assert found["previous"] == previous
        previous = hashlib.sha256(line).hexdigest()
    assert last_hash(tmp_path / "log.jsonl") == previous
    assert all(outcome_of(verify(path, log=tmp_path / "log.jsonl")) == {"record": True, "log": True} for path in paths)


def test_a_log_that_is_not_there_has_no_last_hash_and_is_not_made(tmp_path: Path) -> None:
    assert last_hash(tmp_path / "log.jsonl") is None
    assert not os.listdir(tmp_path)


def test_appending_twice_is_appending_once(tmp_path: Path) -> None:
    paths = logged(tmp_path, 2)
    before = (tmp_path / "log.jsonl").read_bytes()
    append(tmp_path / "log.jsonl", paths[1])
    assert (tmp_path / "log.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match=r"is in .*log\.jsonl already, line 1"):
        append(tmp_path / "log.jsonl", paths[0])
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_a_record_that_names_another_line_before_is_refused(tmp_path: Path) -> None:
    logged(tmp_path, 1)
    before = (tmp_path / "log.jsonl").read_bytes()
    for previous in (None, HASH):
        write_json(tmp_path / "late.json", made(previous=previous))
        with pytest.raises(ValueError, match=r"late\.json: names .* another request came between"):
            append(tmp_path / "log.jsonl", tmp_path / "late.json")
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_the_layout_of_a_record_may_change_but_nothing_in_it(tmp_path: Path) -> None:
    (path,) = logged(tmp_path, 1)
    found = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(found.items())), indent=7, ensure_ascii=False))
    assert outcome_of(verify(path, log=tmp_path / "log.jsonl")) == {"record": True, "log": True}


def test_every_change_of_one_field_of_a_record_is_noticed(tmp_path: Path) -> None:
    (path,) = logged(tmp_path, 1)
    found = json.loads(path.read_text())
    paths = list(leaves(found))
    assert len(paths) > 50
    for leaf in paths:
        write_json(path, altered(found, leaf))
        assert not all(check.passed for check in verify(path, log=tmp_path / "log.jsonl")), leaf


def test_every_change_of_one_field_of_the_log_is_noticed_by_the_last_record(tmp_path: Path) -> None:
    paths = logged(tmp_path, 3)
    log = tmp_path / "log.jsonl"
    lines = log.read_text().splitlines()
    for number, line in enumerate(lines):
        for leaf in leaves(json.loads(line)):
            changed = canonical(altered(json.loads(line), leaf)).decode()
            log.write_text("\n".join([*lines[:number], changed, *lines[number + 1 :]]) + "\n")
            (check,) = [check for check in verify(paths[2], log=log) if check.name == "log"]
            assert not check.passed, (number, leaf)


TAMPERED: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "the first two swapped": (lambda a: [a[1], a[0], *a[2:]], "line 1: names"),
    "two in the middle swapped": (lambda a: [a[0], a[2], a[1], a[3]], "line 2: names"),
    "the first deleted": (lambda a: a[1:], "line 1: names"),
    "one in the middle deleted": (lambda a: [a[0], *a[2:]], "line 2: names"),
    "the last deleted": (lambda a: a[:-1], "none of 3 lines is of the request"),
    "all deleted": (lambda a: [], "none of 0 lines is of the request"),
    "one doubled": (lambda a: [*a, a[3]], "line 5: names"),
    "an empty line": (lambda a: [*a[:2], "", *a[2:]], "line 3: not JSON"),
    "a space": (lambda a: [a[0], a[1].replace(",", ", ", 1), *a[2:]], "line 2: not a line that fastunlearn wrote"),
    "a field more": (lambda a: [a[0][:-1] + ',"z":1}', *a[1:]], "line 1: not a line that fastunlearn wrote"),
    "a number": (lambda a: ["3", *a[1:]], "line 1: not a line"),
    "NaN": (lambda a: ["NaN", *a[1:]], "line 1: not JSON"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_the_first_broken_line_is_named(tmp_path: Path, case: str) -> None:
    paths = logged(tmp_path, 4)
    log = tmp_path / "log.jsonl"
    tamper, expected = TAMPERED[case]
    log.write_text("".join(line + "\n" for line in tamper(log.read_text().splitlines())))
    (check,) = [check for check in verify(paths[3], log=log) if check.name == "log"]
    assert not check.passed and expected in check.detail and "log.jsonl" in check.detail
    before = log.read_bytes()
    if "line" in expected.split()[0]:
        write_json(tmp_path / "next.json", made(previous=HASH))
        with pytest.raises(ValueError, match=expected):  # nothing is built on a broken log
            append(log, tmp_path / "next.json")
    assert log.read_bytes() == before


def test_a_log_cut_anywhere_in_its_last_line_is_noticed_and_mended_by_that_record_alone(tmp_path: Path) -> None:
    paths = logged(tmp_path, 2)
    log = tmp_path / "log.jsonl"
    whole = log.read_bytes()
    first = whole.index(b"\n") + 1
    write_json(tmp_path / "other.json", made(previous=hashlib.sha256(whole[: first - 1]).hexdigest()))
    for length in range(first + 1, len(whole), 29):
        log.write_bytes(whole[:length])
        assert outcome_of(verify(paths[0], log=log)) == {"record": True, "log": False}
        if length > first + 50:  # up to there, within the time, the two lines may be the same
            with pytest.raises(ValueError, match="ends in part of a line"):
                append(log, tmp_path / "other.json")
            assert log.read_bytes() == whole[:length]
        append(log, paths[1])
        assert log.read_bytes() == whole
    log.write_bytes(whole + b"garbage")
    with pytest.raises(ValueError, match="ends in part of a line"):
        append(log, paths[1])
    assert log.read_bytes() == whole + b"garbage"


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    logged(tmp_path, 1)
    log = tmp_path / "log.jsonl"
    before = log.read_bytes()
    write_json(tmp_path / "next.json", made(previous=last_hash(log)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            append(log, tmp_path / "next.json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.read_bytes() == before
    append(log, tmp_path / "next.json")
    assert outcome_of(verify(tmp_path / "next.json", log=log)) == {"record": True, "log": True}


def append_fifty(folder: Path, name: str, template: dict[str, Any], start: Any) -> None:
    start.wait()
    for i in range(50):
        path = folder / f"{name}{i}.json"
        with locked(folder / "log.jsonl") as held:
            path.write_text(json.dumps(template | {"id": str(uuid.uuid4()), "previous": held.last_hash}))
            held.append(path)


def test_two_processes_at_once_keep_the_chain(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # a new interpreter would spend its time on importing torch
    start = context.Barrier(2)
    template = made()
    started = [context.Process(target=append_fifty, args=(tmp_path, name, template, start)) for name in ("a", "b")]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0, 0]
    log = tmp_path / "log.jsonl"
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    paths = [tmp_path / f"{name}{i}.json" for name in ("a", "b") for i in range(50)]
    assert sorted(entry["record"] for entry in entries) == sorted(record_hash(read_record(path)) for path in paths)
    for path in paths[::10]:
        assert outcome_of(verify(path, log=log)) == {"record": True, "log": True}


# ---- verify ----


def test_all_that_a_record_says_can_be_verified(tmp_path: Path, model_files: Path) -> None:
    path = tmp_path / "record.json"
    with locked(tmp_path / "log.jsonl") as held:
        write_json(path, of_models(model_files, previous=held.last_hash))
        held.append(path)
    checks = verify(
        path,
        weights=model_files / "after.pt",
        log=tmp_path / "log.jsonl",
        patch=model_files / "patch.safetensors",
        salt=SALT,
        ids=IDS[:2],
    )
    assert outcome_of(checks) == dict.fromkeys(("record", "log", "weights", "patch", "salt", "ids"), True)
    save_weights(tmp_path / "after.safetensors", torch.load(model_files / "after.pt"))
    assert outcome_of(verify(path, weights=tmp_path / "after.safetensors"))["weights"]


@pytest.mark.parametrize(
    ("given", "name", "expected"),
    [
        ({"weights": "before.pt"}, "weights", "before.pt has the weights before: nothing was forgotten in it"),
        ({"weights": "other.pt"}, "weights", "other.pt has the digest"),
        ({"weights": "patch.safetensors.cut.pt"}, "weights", "cut.pt: not a file that torch.save wrote"),
        ({"patch": "elsewhere.safetensors"}, "patch", "its digest after is"),
        ({"patch": "after.pt"}, "patch", "after.pt: not a safetensors file"),
        ({"salt": bytes(32)}, "salt", "this is not the salt of the record"),
        ({"salt": SALT, "ids": [*IDS, "x", "y"]}, "ids", "'x' and 1 more of 6 are not among the forgotten"),
    ],
)
def test_what_does_not_match_is_said(
    tmp_path: Path, model_files: Path, given: dict[str, Any], name: str, expected: str
) -> None:
    (model_files / "patch.safetensors.cut.pt").write_bytes(b"")
    write_json(tmp_path / "record.json", of_models(model_files))
    paths = {key: model_files / value if key in ("weights", "patch") else value for key, value in given.items()}
    check = verify(tmp_path / "record.json", **paths)[-1]
    assert (check.name, check.passed) == (name, False)
    assert expected in check.detail and "\n" not in check.detail


def test_change_counts_that_are_not_those_of_the_patch_are_said(tmp_path: Path, model_files: Path) -> None:
    found = of_models(model_files)
    found["changed"]["bias"]["changed"] = 1
    write_json(tmp_path / "record.json", found)
    check = verify(tmp_path / "record.json", patch=model_files / "patch.safetensors")[-1]
    assert not check.passed and "changes 2 entries of bias, the record 1" in check.detail


def test_weights_that_did_not_change_are_verified_and_said(tmp_path: Path, model_files: Path) -> None:
    entry = weights_entry(model_files / "before.pt", digest(torch.load(model_files / "before.pt")))
    write_json(tmp_path / "record.json", made(before=entry, after=entry))
    check = verify(tmp_path / "record.json", weights=model_files / "before.pt")[-1]
    assert check.passed and "nothing was changed" in check.detail


def test_an_invalid_record_is_one_failed_check_and_missing_files_are_errors(tmp_path: Path, model_files: Path) -> None:
    write_json(tmp_path / "record.json", made() | {"schema_version": 2})
    (check,) = verify(tmp_path / "record.json", weights=model_files / "after.pt")
    assert not check.passed and "record.json: $.schema_version: 1 was expected" in check.detail
    write_json(tmp_path / "record.json", made())
    for given in ({"weights": "no.pt"}, {"log": "no.jsonl"}, {"patch": "no.safetensors"}):
        with pytest.raises(FileNotFoundError, match="no"):
            verify(tmp_path / "record.json", **{key: tmp_path / name for key, name in given.items()})
    with pytest.raises(ValueError, match="only with its salt"):
        verify(tmp_path / "record.json", ids=["a"])


def test_the_commitment_is_the_documented_hash() -> None:
    assert salt_commitment(SALT) == hashlib.sha256(b"fastunlearn salt" + bytes(1) + SALT).hexdigest()
