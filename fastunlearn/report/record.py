"""The deletion record: what was forgotten, how, on what, and what was measured, as one JSON document.

It can be filed and shown: forgotten samples are in it as ``HMAC-SHA256(salt, id)`` only, files by name only, and
neither the salt nor an id nor a folder is anywhere in it. Whoever holds the salt can show later that a sample was
among them (:func:`contains`). ``record.schema.json``, beside this file, describes every field.
"""

from __future__ import annotations

import copy
import hashlib
import hmac
import importlib.metadata
import json
import math
import platform
import re
import secrets
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path, PurePath
from typing import Any

import torch

from ..files import replacing, sha256_of_file
from ..outcome import Outcome

SCHEMA_VERSION = 1
SALT_BYTES = 32
LEFT_OUT = "[forgotten sample]"
# Fields of the configuration and of the data that name a file, with or without a kind before it or a part after it.
PLACES = ("model", "weights", "data", "forget", "retain", "test", "validation", "reference", "questions", "out", "log",
          "cache", "source")  # fmt: skip
# Where a file's path begins inside a text: at its start or after a sign, with a root of Unix, Windows or the home.
ROOT = re.compile(r"(?:(?<=[\s:=@,;\"'(\[])|^)(?:file:/*)?(?:~[\w.-]*|[A-Za-z]:|\.{1,2})?[/\\]+(?=\S)")
URL = re.compile(r"\b(?:https?|ftp|s3|gs|hf)://+$")
TOKEN = re.compile(r"[^\s,;:=\"'()\[\]{}]+")


def new_salt() -> bytes:
    """32 random bytes."""
    return secrets.token_bytes(SALT_BYTES)


def hashed_id(salt: bytes, sample: str | int) -> str:
    """HMAC-SHA256 of the sample's id, as text in UTF-8, under the salt; in hexadecimal.

    Without the salt not even a guess at an id can be tried, which a hash alone would allow.
    """
    return hmac.new(salt, str(sample).encode(), hashlib.sha256).hexdigest()


def salt_commitment(salt: bytes) -> str:
    """SHA-256 that tells the right salt from another and nothing else about it."""
    return hashlib.sha256(b"fastunlearn salt\0" + salt).hexdigest()


def write_salt(path: str | Path, salt: bytes) -> None:
    """Write the salt, in hexadecimal, for its owner's eyes only (mode 0600); whole or not at all.

    Raises FileExistsError when ``path`` holds another salt: without that one its records could not be shown to
    contain a sample any more.
    """
    path = Path(path)
    if path.exists():
        if read_salt(path) == salt:
            return
        raise FileExistsError(f"{path}: holds another salt, which earlier records need; choose another file")
    with replacing(path, mode=0o600) as file:
        file.write(salt.hex().encode() + b"\n")


def read_salt(path: str | Path) -> bytes:
    """What :func:`write_salt` wrote; raises OSError or ValueError naming the file."""
    text = Path(path).read_bytes().strip()
    if not re.fullmatch(rb"[0-9a-f]{%d}" % (2 * SALT_BYTES), text):
        raise ValueError(f"{path}: a salt is {2 * SALT_BYTES} hexadecimal digits")
    return bytes.fromhex(text.decode())


def contains(record: Mapping[str, Any], salt: bytes, sample: str | int) -> bool:
    """Whether the sample was among the forgotten; raises ValueError when ``salt`` is not the record's."""
    forgotten = record["forgotten"]
    if not hmac.compare_digest(forgotten["salt_commitment"], salt_commitment(salt)):
        raise ValueError(f"this is not the salt of the record {record['id']}")
    return hashed_id(salt, sample) in forgotten["ids"]


def weights_entry(path: str | Path, digest: str) -> dict[str, Any]:
    """How a record names weights: the file's name, its SHA-256, and :func:`fastunlearn.checkpoint.digest`.

    The SHA-256 is None where the weights are in no single file (a folder of shards, weights known by a name).
    """
    path = Path(path)
    name = path.name or path.resolve().name or "weights"  # "." and "/" have none
    return {"file": name, "sha256": sha256_of_file(path) if path.is_file() else None, "digest": digest}


def record(
    *,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    forgotten: Sequence[str | int],
    salt: bytes,
    outcome: Outcome,
    seeds: Mapping[str, Any],
    device: torch.device,
    kernels: Mapping[str, Mapping[str, Any]],
    changed: Mapping[str, Mapping[str, int]],
    data: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    limits: Sequence[str],
    config: Mapping[str, Any],
    previous: str | None = None,
    identifier: str | None = None,
    created: str | None = None,
) -> dict[str, Any]:
    """A valid record as a dictionary for :func:`fastunlearn.files.write_json`.

    Args:
        before, after: from :func:`weights_entry`.
        forgotten: ids of the forgotten samples, each once; only their hashes go into the record.
        salt: from :func:`new_salt`; only a commitment to it goes into the record.
        outcome: what the method reported; its name, settings, seconds per phase and peak memory in bytes.
        seeds: by what they were used for.
        device: what the method ran on.
        kernels: ``{operator: {"calls": n, "backend": name}}``.
        changed: ``{parameter: {"changed": n, "of": n}}``, from :func:`fastunlearn.patch.count_changes`.
        data: ``{"source": text, "digest": SHA-256 or None, "samples": {set: n}}``.
        metrics: the models of the findings, each with ``name`` and ``role``.
        limits: from :func:`plain_limits`.
        config: everything that was asked for, resolved.
        previous: :func:`fastunlearn.report.log.last_hash` of the log the record will be appended to.
        identifier, created: a UUID and a UTC time in ISO 8601 when the request has them already; else new ones.

    Paths in settings, data and config become file names, and lists and words in them that are ids of forgotten
    samples are left out; settings that are infinite become text. Raises ValueError for ids that repeat, for NaN among
    the metrics, and for what the schema does not allow.
    """
    ids = [str(sample) for sample in forgotten]
    if len(set(ids)) != len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise ValueError(f"the forgotten sample {twice!r} is given twice")
    hidden = frozenset(ids)
    _require_json(list(metrics), "$.metrics", "record")
    made = {
        "schema_version": SCHEMA_VERSION,
        "id": identifier or str(uuid.uuid4()),
        "created": created or datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "weights": {"before": dict(before), "after": dict(after)},
        "forgotten": {
            "count": len(ids),
            "ids": sorted(hashed_id(salt, sample) for sample in ids),
            "salt_commitment": salt_commitment(salt),
        },
        "method": {
            "name": outcome.method,
            "settings": _cleared(outcome.settings, hidden),
            "seconds": dict(outcome.seconds),
            "peak_memory": outcome.peak_memory,
        },
        "seeds": dict(seeds),
        "versions": versions(),
        "device": {"name": device_name(device), "type": device.type},
        "kernels": {name: dict(use) for name, use in kernels.items()},
        "changed": {name: dict(count) for name, count in changed.items()},
        "data": _without_folders(_cleared(data, hidden)),
        "metrics": _cleared(list(metrics), hidden),
        "limits": list(limits),
        "previous": previous,
        "config": _without_folders(_cleared(config, hidden)),
    }
    validate(made)
    return made


def plain_limits(
    *,
    method: str | None,
    reference: bool,
    runs: int = 1,
    attacks: Sequence[str] = (),
) -> list[str]:
    """What the figures do not show, as sentences for someone who does not know the field.

    Args:
        method: its name; None where nothing was unlearned, only measured.
        reference: whether a model was retrained without the data and compared with.
        runs: over how many seeds the figures are.
        attacks: names of the membership attacks that were run; one whose name contains ``lira`` is per example.
    """
    found = ["This report says what was measured; it is not a proof of erasure."]
    if method is not None:
        found = [
            "This record says what was run and what was measured; it is not a proof of erasure.",
            f"{method} is approximate: nothing guarantees that these are weights which training without the data would "
            "have led to.",
            "Only the weights named here were changed: not copies of the model, nor backups, logs or the data "
            "themselves.",
        ]
    if not reference:
        found.append("No model was retrained without the data, so the distance from one was not measured.")
    if runs == 1:
        found.append("The figures are of one run; how much they change with another seed was not measured.")
    else:
        found.append(
            f"The intervals are over {runs} runs with other seeds; they say nothing about other data or models."
        )
    if not attacks:
        found.append("No membership attack was run.")
    else:
        found.append(f"The attacks run were {', '.join(attacks)}; a stronger one may still find forgotten samples.")
        if not any("lira" in attack.lower() for attack in attacks):
            found.append(
                "These attacks put one threshold to all samples, which overstates how well single samples are "
                "protected; no attack per example (U-LiRA) was run."
            )
    return found


def versions() -> dict[str, str | None]:
    """Of Python, torch, fastunlearn, and of CUDA and the NVIDIA driver where there are any."""
    try:
        own = importlib.metadata.version("fastunlearn")
    except importlib.metadata.PackageNotFoundError:
        own = None
    driver = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", driver.read_text()) if driver.is_file() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastunlearn": own,
        "cuda": torch.version.cuda,
        "driver": found[1] if found else None,
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    processors = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", processors.read_text()) if processors.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine() or device.type


@cache
def _schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(__file__).with_name("record.schema.json").read_text(encoding="utf-8"))
    return found


def schema() -> dict[str, Any]:
    """The published JSON Schema (2020-12) of a record."""
    return copy.deepcopy(_schema())


def validate(record: Any, source: str = "record") -> None:
    """Raise ValueError, in one line with the JSON path, for the first field that is not as the schema has it.

    Besides the schema: no NaN or infinity, hashes in ascending order and as many as counted, no more weights changed
    than there are.
    """
    from jsonschema import Draft202012Validator

    _require_json(record, "$", source)
    errors = sorted(Draft202012Validator(_schema()).iter_errors(record), key=lambda error: error.json_path)
    if errors:
        message = errors[0].message
        raise ValueError(
            f"{source}: {errors[0].json_path}: {message if len(message) < 200 else message[:200] + ' ...'}"
        )
    forgotten = record["forgotten"]
    if forgotten["ids"] != sorted(forgotten["ids"]):
        raise ValueError(f"{source}: $.forgotten.ids: must be in ascending order")
    if forgotten["count"] != len(forgotten["ids"]):
        raise ValueError(
            f"{source}: $.forgotten.count: is {forgotten['count']}, but there are {len(forgotten['ids'])} ids"
        )
    for name, count in record["changed"].items():
        if count["changed"] > count["of"]:
            raise ValueError(f"{source}: $.changed[{name!r}]: {count['changed']} of {count['of']} cannot have changed")


def read_record(path: str | Path) -> dict[str, Any]:
    """The record in a file; raises OSError, and ValueError naming the file, the line or the JSON path."""
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    validate(found, str(path))
    return dict(found)


def canonical(value: Any) -> bytes:
    """JSON with sorted keys, no spaces and ASCII only: the same bytes however the file is laid out."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def record_hash(record: Mapping[str, Any]) -> str:
    """SHA-256 of the record's canonical JSON, by which the log knows it."""
    return hashlib.sha256(canonical(record)).hexdigest()


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice")
        found[key] = value
    return found


def _require_json(value: Any, where: str, source: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{source}: {where}: is {value}; JSON has no NaN or infinity, use null")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{source}: {where}: has the key {key!r}, keys of JSON are text")
            _require_json(item, f"{where}.{key}", source)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _require_json(item, f"{where}[{i}]", source)
    elif value is not None and not isinstance(value, (str, int, float)):
        raise ValueError(f"{source}: {where}: a {type(value).__name__} cannot be written as JSON")


def _without_folders(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with the names of what lies in relative folders; elsewhere a/b may be no path at all."""
    return {key: _named(value) if key in PLACES and isinstance(value, str) else value for key, value in values.items()}


def _named(spec: str) -> str:
    """``index:lists/forget.txt`` as ``index:forget.txt``, ``nets/small.py:net`` as ``small.py:net``."""
    kind, colon, rest = spec.partition(":")
    if kind in ("class", "classes") or URL.search(spec.partition("//")[0] + "//"):
        return spec
    if not colon or "/" in kind or "\\" in kind:
        kind, colon, rest = "", "", spec
    return kind + colon + re.split(r"[/\\]+", rest.rstrip("/\\"))[-1]


def _cleared(value: Any, hidden: frozenset[str]) -> Any:
    """``value`` as JSON, with files by name only and without ids of forgotten samples."""
    if isinstance(value, Mapping):
        return {str(_cleared(key, hidden)): _cleared(item, hidden) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        if value and all(isinstance(item, (str, int)) and str(item) in hidden for item in value):
            return f"[{len(value)} forgotten samples]"
        return [_cleared(item, hidden) for item in value]
    if isinstance(value, PurePath):
        return _cleared(value.name, hidden)
    if isinstance(value, (str, torch.dtype, torch.device)):
        return _cleared_text(str(value), hidden)
    if callable(value):  # a loss function among the settings
        return getattr(value, "__qualname__", type(value).__name__)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _cleared_text(text: str, hidden: frozenset[str]) -> str:
    """Short numbers stay where they stand alone: ``class:3`` is a class, though 3 may be a sample as well."""
    if text in hidden and not _is_short_number(text):
        return LEFT_OUT
    prefix, _, rest = text.partition(":") if re.match(r"\w+:", text) else ("", "", text)
    words = TOKEN.findall(rest)
    listed = len(words) > 1 or (words and prefix in ("index", "indices", "id", "ids", "sample", "samples"))
    if listed and prefix not in ("class", "classes") and all(word in hidden for word in words):
        return f"[{len(words)} forgotten samples]"
    text = TOKEN.sub(lambda w: LEFT_OUT if w[0] in hidden and not _is_short_number(w[0]) else w[0], text)
    for root in ROOT.finditer(text):
        if not URL.search(text[: root.end()]):  # to the last separator: folders may have spaces in their names
            return text[: root.start()] + re.split(r"[/\\]+", text[root.start() :].rstrip("/\\"))[-1]
    return text


def _is_short_number(text: str) -> bool:
    return text.isdigit() and len(text) < 6
