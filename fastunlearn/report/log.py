"""The log of requests, each chained to the one before by hash, and the check of a record against log and weights.

``log.jsonl`` has one line per request, canonical JSON of ``record`` (SHA-256 of the record's canonical JSON), ``id``
and ``created`` (as in the record) and ``previous`` (SHA-256 of the line before, without its line end; null in the
first). The record itself names ``previous`` as well. A line changed, taken out or moved breaks the chain at the next
line; a change of the last line, or lines cut off the end, show when the records they belong to are verified. Whoever
can rewrite every record and the whole log can make a new chain: keep the last hash where they cannot.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..checkpoint import digest, load_weights
from ..files import sync_folder
from ..patch import read_patch
from .record import canonical, hashed_id, read_record, record_hash, salt_commitment

FIELDS = ("record", "id", "created", "previous")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Check:
    """One thing that :func:`verify` looked at."""

    name: str
    passed: bool
    detail: str


class HeldLog:
    """A log that no one else can append to; from :func:`locked`."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file = file
        self._lines, self._torn = _split(file.read())
        _require_chain(self._lines, path)

    @property
    def last_hash(self) -> str | None:
        """What the next record names as ``previous``: SHA-256 of the last complete line, None without one."""
        return _line_hash(self._lines[-1]) if self._lines else None

    @property
    def torn(self) -> bool:
        """Whether the log ends in part of a line."""
        return bool(self._torn)

    def has(self, identifier: str) -> bool:
        """Whether the request of this id is in the log."""
        return any(json.loads(line)["id"] == identifier for line in self._lines)

    def append(self, record_path: str | Path) -> None:
        """As :func:`append`."""
        record = read_record(record_path)
        line = _line(record)
        if self._lines and self._lines[-1] == line and not self._torn:
            return
        if not (line + b"\n").startswith(self._torn):
            raise ValueError(
                f"{self.path}: ends in part of a line, from an append that was cut off; append the record that it "
                "belongs to, or take that part out"
            )
        for number, earlier in enumerate(self._lines, 1):
            if json.loads(earlier)["id"] == record["id"]:
                raise ValueError(f"{record_path}: the request {record['id']} is in {self.path} already, line {number}")
        if record["previous"] != self.last_hash:
            raise ValueError(
                f"{record_path}: names {record['previous']} as the line before, the last of {self.path} is "
                f"{self.last_hash}; another request came between, write the record anew with this one"
            )
        end = sum(len(earlier) + 1 for earlier in self._lines)
        try:
            self._file.seek(end)
            rest = line + b"\n"
            while rest:  # a write to an unbuffered file may end early
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except BaseException:
            self._file.truncate(end)  # a full disk
            raise
        sync_folder(self.path.parent)
        self._lines.append(line)
        self._torn = b""


@contextmanager
def locked(log: str | Path) -> Iterator[HeldLog]:
    """Hold the log: read its end, write the record that names it, append; no other request can come between.

    ::

        with locked("log.jsonl") as held:
            write_json("record.json", record(..., previous=held.last_hash))
            held.append("record.json")

    Waits for another process that holds it; the lock goes with the process, however that ends. Makes the file. Within
    the block use ``held``: :func:`append` and :func:`last_hash` would wait for the block's own end.

    Raises OSError where the file cannot be written or the system has no such locks (Windows), ValueError when the log
    is broken, naming the first line that is.
    """
    try:
        import fcntl
    except ImportError as error:
        raise OSError(f"{log}: logs of requests need the file locks of a POSIX system") from error
    log = Path(log)
    log.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(log, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    with open(handle, "r+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield HeldLog(log, file)


def append(log: str | Path, record_path: str | Path) -> None:
    """Add the record's line to the log, on the disk when this returns; nothing when it is the last line already.

    A part of this very line that a killed process left at the end is completed. Raises OSError or ValueError, and
    changes nothing, when the record is not valid, does not name the log's last line as ``previous``, or is further up
    already; when the log is broken, or ends in part of another line.
    """
    with locked(log) as held:
        held.append(record_path)


def last_hash(log: str | Path) -> str | None:
    """SHA-256 of the last complete line, None without one or without the file. Errors as :func:`locked`."""
    if not Path(log).exists():
        return None
    with locked(log) as held:
        return held.last_hash


def require_whole(log: str | Path) -> None:
    """Raise, before a long run, what would keep its record from being appended; nothing for a log yet to be made.

    OSError and ValueError as :func:`locked`, ValueError also for one that ends in part of a line.
    """
    if not Path(log).exists():
        return
    with locked(log) as held:
        if held.torn:
            raise ValueError(
                f"{log}: ends in part of a line, from an append that was cut off; go on with the run that it belongs "
                "to, or take that part out"
            )


def verify(
    record_path: str | Path,
    weights: str | Path | None = None,
    log: str | Path | None = None,
    patch: str | Path | None = None,
    salt: bytes | None = None,
    ids: Iterable[str | int] | None = None,
) -> list[Check]:
    """What the record says, checked against all that is given; the first check, ``record``, is of the record itself.

    Args:
        record_path: the record; when it is not valid, nothing else is checked.
        weights: must be the weights after, in whatever file format.
        log: must be unbroken and have the record's line.
        patch: must lead from the weights before to the weights after.
        salt: must be the record's.
        ids: must all be among the forgotten; needs ``salt``.

    Raises OSError when a file cannot be read, ValueError for ids without salt; all else is a check that did not pass.
    """
    if ids is not None and salt is None:
        raise ValueError("ids of samples can be looked up in a record only with its salt")
    try:
        record = read_record(record_path)
    except ValueError as error:
        return [Check("record", False, str(error))]
    checks = [Check("record", True, f"valid; its SHA-256 is {record_hash(record)}")]
    if log is not None:
        checks.append(_check_log(record, Path(log)))
    if weights is not None:
        checks.append(_check_weights(record, Path(weights)))
    if patch is not None:
        checks.append(_check_patch(record, Path(patch)))
    if salt is not None:
        checks += _check_ids(record, salt, ids)
    return checks


def _check_log(record: Mapping[str, Any], log: Path) -> Check:
    lines, torn = _split(log.read_bytes())
    try:
        _require_chain(lines, log)
    except ValueError as error:
        return Check("log", False, str(error))
    if torn:
        return Check("log", False, f"{log}: line {len(lines) + 1}: ends in part of a line, from an append cut off")
    for number, line in enumerate(lines, 1):
        if json.loads(line)["id"] != record["id"]:
            continue
        if line == _line(record):
            return Check("log", True, f"line {number} of {len(lines)}, every line chained to the one before")
        wrong = next(name for name in FIELDS if json.loads(line)[name] != json.loads(_line(record))[name])
        return Check(
            "log", False, f"{log}: line {number}: '{wrong}' is not that of the record: one of them was changed"
        )
    return Check("log", False, f"{log}: none of {len(lines)} lines is of the request {record['id']}")


def _check_weights(record: Mapping[str, Any], weights: Path) -> Check:
    try:
        found = digest(load_weights(weights))
    except ValueError as error:
        return Check("weights", False, str(error))
    before, after = (record["weights"][side]["digest"] for side in ("before", "after"))
    if found == after:
        same = "; the same as before: nothing was changed" if before == after else ""
        return Check("weights", True, f"{weights} has the weights after, digest {after}{same}")
    if found == before:
        return Check(
            "weights", False, f"{weights} has the weights before: nothing was forgotten in it (digest {before})"
        )
    return Check("weights", False, f"{weights} has the digest {found}; after is {after}, before {before}")


def _check_patch(record: Mapping[str, Any], path: Path) -> Check:
    try:
        patch = read_patch(path)
    except ValueError as error:
        return Check("patch", False, str(error))
    for side, found in (("before", patch.before), ("after", patch.after)):
        if found != (expected := record["weights"][side]["digest"]):
            return Check("patch", False, f"{path}: its digest {side} is {found}, the record's is {expected}")
    recorded = {name: count["changed"] for name, count in record["changed"].items() if count["changed"]}
    if patch.changed != recorded:
        name = min(patch.changed.items() ^ recorded.items())[0]
        counts = f"{patch.changed.get(name, 0)} entries of {name}, the record {recorded.get(name, 0)}"
        return Check("patch", False, f"{path}: changes {counts}")
    return Check("patch", True, f"{path} leads from the weights before to the weights after")


def _check_ids(record: Mapping[str, Any], salt: bytes, ids: Iterable[str | int] | None) -> list[Check]:
    forgotten = record["forgotten"]
    if salt_commitment(salt) != forgotten["salt_commitment"]:
        return [Check("salt", False, f"this is not the salt of the record {record['id']}")]
    checks = [Check("salt", True, "the salt of this record")]
    if ids is None:
        return checks
    known = set(forgotten["ids"])
    asked = list(dict.fromkeys(str(sample) for sample in ids))
    absent = [sample for sample in asked if hashed_id(salt, sample) not in known]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        return [*checks, Check("ids", False, f"{absent[0]!r}{more} of {len(asked)} are not among the forgotten")]
    return [*checks, Check("ids", True, f"all {len(asked)} are among the {forgotten['count']} forgotten")]


def _line(record: Mapping[str, Any]) -> bytes:
    own = {name: record[name] for name in FIELDS if name != "record"}
    return canonical({"record": record_hash(record), **own})


def _line_hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _split(content: bytes) -> tuple[list[bytes], bytes]:
    """Complete lines without their ends, and what follows the last of them."""
    *lines, torn = content.split(b"\n")
    return lines, torn


def _require_chain(lines: list[bytes], log: Path) -> None:
    previous: str | None = None
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            as_written = canonical(entry)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{log}: line {number}: not JSON ({error})") from error
        if not isinstance(entry, dict) or sorted(entry) != sorted(FIELDS) or line != as_written:
            raise ValueError(f"{log}: line {number}: not a line that fastunlearn wrote; was it edited?")
        record, name, created, before = (entry[field] for field in FIELDS)
        if not all(isinstance(text, str) for text in (record, name, created)) or not SHA256.fullmatch(record):
            raise ValueError(f"{log}: line {number}: 'record' must be a SHA-256, 'id' and 'created' texts")
        if before != previous:
            raise ValueError(
                f"{log}: line {number}: names {before} as the line before, which is {previous}: "
                "a line was changed, taken out or moved"
            )
        if name in seen:
            raise ValueError(f"{log}: line {number}: the request {name} is in line {seen[name]} already")
        seen[name] = number
        previous = _line_hash(line)
