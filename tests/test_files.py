"""Files are whole or absent: whatever happens while they are written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fastunlearn.files import replacing, sha256_of_file, write_json, write_text

SOURCE = Path(__file__).parent.parent


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_file_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "weights.bin"
    with replacing(path) as file:
        file.write(b"all of it")
        assert not path.exists()
    assert contents(path.parent) == {"weights.bin": b"all of it"}


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_whatever_is_raised_the_old_file_stays_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), replacing(path) as file:
        file.write(b"half")
        raise error
    assert contents(tmp_path) == {"weights.bin": b"old"}


def test_a_full_disk_leaves_the_old_file_and_is_named(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writing beyond it fails as it does on a full one."""
    path = tmp_path / "weights.bin"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # Python ignores the signal that comes with it
    try:
        with pytest.raises(OSError, match=rf"^\[Errno 27\] File too large: '{path}'$"), replacing(path) as file:
            file.write(bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == {"weights.bin": b"old"}


def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"old")
    program = (
        "import os, signal, sys\n"
        "from fastunlearn.files import replacing\n"
        "with replacing(sys.argv[1]) as file:\n"
        "    file.write(bytes(200000))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], env={**os.environ, "PYTHONPATH": str(SOURCE)})
    assert done.returncode == -9
    assert path.read_bytes() == b"old"


def test_the_mode_is_what_the_umask_leaves(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        write_text(tmp_path / "open", "x")
        with replacing(tmp_path / "secret", mode=0o600) as file:
            assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600  # from the start, not only at the end
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


def test_a_folder_in_the_way_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(IsADirectoryError, match="out"), replacing(tmp_path / "out"):
        raise AssertionError("the block must not run")
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_where_the_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OSError, match="out"):
        write_text(tmp_path / "out" / "report.html", "x")


def test_a_link_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("shared by others")
    (tmp_path / "weights").symlink_to("blob")
    write_text(tmp_path / "weights", "new")
    assert contents(tmp_path) == {"blob": b"shared by others", "weights": b"new"}


def test_a_long_name_can_be_written(tmp_path: Path) -> None:
    write_text(tmp_path / ("a" * 250), "x")
    assert os.listdir(tmp_path) == ["a" * 250]


def test_writers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    texts = [str(i) * 50_000 for i in range(8)]
    threads = [threading.Thread(target=write_text, args=(tmp_path / "x", text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() in texts


def test_json_is_written_without_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, 2.5, None, "é"]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, 2.5, None, "é"]}
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert os.listdir(tmp_path) == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text())["a"][0] == 1


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_sha256_is_that_of_the_bytes(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "x").write_bytes(content)
    assert sha256_of_file(tmp_path / "x") == hashlib.sha256(content).hexdigest()
