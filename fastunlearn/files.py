"""Files that are either whole or absent, and what they are known by."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replacing(path: str | Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A binary file to write, which takes the place of ``path`` when the block ends and never before.

    It is written under another name beside it, flushed to the disk and renamed, which the file system does at once or
    not at all. Whatever the block raises, a full disk and Ctrl-C included, the other name is gone and ``path`` is
    as it was. A process that is killed may leave ``.<name>.*.part`` behind, never half of ``path``. ``mode`` is what
    the user's umask takes away from. A symbolic link is replaced, not what it points to.

    Raises OSError, which names ``path``, where it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    name = str(path.parent / f".{path.name[:200]}.{secrets.token_hex(8)}.part")
    try:
        with open(name, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException as error:
        with suppress(FileNotFoundError):
            os.unlink(name)
        if isinstance(error, OSError) and error.errno and error.filename in (None, name):
            # The user knows nothing of the other name, and a full disk comes without any.
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise
    sync_folder(path.parent)


def write_json(path: str | Path, value: Any) -> None:
    """``value`` as indented JSON, as :func:`replacing` does it; raises ValueError for NaN and infinities."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_text(path: str | Path, text: str) -> None:
    """``text`` as UTF-8, as :func:`replacing` does it."""
    with replacing(path) as file:
        file.write(text.encode())


def linked(source: Path, path: Path) -> None:
    """A second name for a file, or a copy of it where the file system has one name for each; replaces ``path``."""
    path.unlink(missing_ok=True)
    try:
        os.link(source, path)
    except OSError:
        with open(source, "rb") as old, replacing(path) as new:
            shutil.copyfileobj(old, new)


def sha256_of_file(path: str | Path) -> str:
    """Of its bytes, in hexadecimal; reads the file once."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Have the names in ``folder`` survive a power cut, where the system can be asked for that."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
