"""Image files: a folder of class folders, as it lies on the disk or packed into an archive that is never unpacked."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import re
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from fastunlearn.inputs import arrays, places
from fastunlearn.inputs.options import DataOptions
from fastunlearn.inputs.samples import OF_COLUMNS, Reading, Samples, refuse

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
HELD = 2 << 30  # bytes of decoded images that are kept; beyond, they are decoded when asked for
PIXELS = 1 << 26  # of one image
UNPACKED = 4 << 30  # bytes of an archive, together
MEMBER = 256 << 20  # bytes of one member of an archive
_LITTER = ("thumbs.db", "desktop.ini")  # what Windows leaves in folders of pictures


@dataclass(frozen=True, eq=False)
class Encoded:
    """Images [n, C, H, W] that are decoded whenever they are asked for."""

    names: Sequence[str]
    read: Callable[[int], bytes]
    options: DataOptions
    shape: torch.Size
    scaling: arrays.Scaling
    where: str

    def __len__(self) -> int:
        return len(self.names)

    def take(self, indices: Tensor) -> Tensor:
        images = torch.empty(len(indices), *self.shape, dtype=torch.uint8)
        for row, index in enumerate(indices.tolist()):
            image = decoded(self.read(index), self.options, f"{self.where}: the image {self.names[index]!r}")
            _require_shape(image.shape, self.names[index], self.shape, self.names[0], self.where)
            images[row] = image
        return self.scaling(images)

    def hashes(self) -> Iterator[bytes]:
        return (hashlib.sha256(self.read(index)).digest() for index in range(len(self.names)))


def open_folder(reading: Reading) -> Samples:
    """A folder of class folders; the classes are its folders in alphabetical order, each with its files by name.

    Files anywhere below a class folder belong to it. What is hidden is left out, and so is what lies beside the class
    folders unless it is an image; within a class folder every file must be an image, by the end of its name, so that
    nothing is forgotten by half. Raises ValueError naming the first file or folder for which this does not hold.
    """
    if reading.inner:
        raise ValueError(f"{reading.spec!r}: write {str(reading.path / reading.inner)!r} for a folder within a folder")
    root = reading.path
    files, folders = _listed(root, reading.spec)

    def read(name: str) -> bytes:
        try:
            return (root / name).read_bytes()
        except OSError as error:
            raise OSError(f"{reading.spec!r}: the image {name!r} can not be read: {places.one_line(error)}") from error

    return _of_classes(reading, files, folders, read)


def _listed(root: Path, spec: str) -> tuple[list[str], list[str]]:
    """What is not hidden below ``root``, links followed: files and folders by their paths within it."""

    def unreadable(error: OSError) -> None:
        raise OSError(f"{spec!r}: the folder {error.filename!r} can not be read: {places.one_line(error)}") from error

    files, folders = [], []
    above: dict[str, tuple[Path, ...]] = {
        str(root): (root.resolve(),)
    }  # of every folder: itself and those it was reached through
    for place, inner, names in os.walk(root, followlinks=True, onerror=unreadable):
        inner[:] = [name for name in inner if not _hidden(name)]
        for path in (os.path.join(place, name) for name in inner):
            target = Path(path).resolve()
            if target in above[place]:
                raise ValueError(f"{spec!r}: the link {path!r} leads back to a folder above it")
            above[path] = (*above[place], target)
        within = Path(place).relative_to(root)
        folders += [(within / name).as_posix() for name in inner]
        files += [(within / name).as_posix() for name in names if not _hidden(name)]
    return files, folders


def open_archive(reading: Reading) -> Samples:
    """As :func:`open_folder`, from an archive that is read in memory and never unpacked to the disk.

    Raises ValueError naming the member for absolute names, ``..``, links, devices, names that are there twice, and for
    more than ``UNPACKED`` bytes together or ``MEMBER`` in one.
    """
    prefix = "".join(f"{part}/" for part in reading.inner.split("/") if part)
    try:
        contents, folders = _unpacked(reading, prefix)
    except Refused:
        raise
    except _UNREADABLE as error:
        raise ValueError(f"{reading.spec!r} can not be read as an archive: {places.one_line(error)}") from error
    if prefix and prefix[:-1] not in folders:
        tops = ", ".join(sorted({name for name in folders if "/" not in name})[:10]) or "none"
        raise ValueError(f"{reading.spec!r}: the archive has no folder {reading.inner!r}; its folders: {tops}")
    within = [name[len(prefix) :] for name in folders if name.startswith(prefix)]
    return _of_classes(
        reading,
        list(contents),
        [name for name in within if not any(map(_hidden, name.split("/")))],
        contents.__getitem__,
    )


def _unpacked(reading: Reading, prefix: str) -> tuple[dict[str, bytes], set[str]]:
    """The files below ``prefix`` by what follows it, with the bytes of those that are images; and all folders."""
    contents: dict[str, bytes] = {}
    folders: set[str] = set()
    members = _zip_members if reading.path.name.lower().endswith(".zip") else _tar_members
    for name, read in members(reading.path, reading.spec):
        parts = [part for part in name.split("/") if part not in ("", ".")]
        folder = parts if read is None else parts[:-1]
        folders.update("/".join(folder[:depth]) for depth in range(1, len(folder) + 1))
        whole = "/".join(parts)
        if read is None or not whole.startswith(prefix) or any(_hidden(part) for part in parts):
            continue
        short = whole[len(prefix) :]
        if short in contents:
            raise Refused(f"{reading.spec!r}: the member {whole!r} is there twice")
        contents[short] = read() if _is_image(short) else b""
    return contents, folders


def open_images(
    reading: Reading, names: Sequence[str], read: Callable[[int], bytes], labels: Tensor, ids: list[str],
    classes: list[str] | None,
) -> Samples:  # fmt: skip
    """Samples from the bytes of image files: decoded at once if they fit into ``HELD`` bytes, else when asked for."""
    if not names:
        raise ValueError(f"{reading.spec!r} is empty: it has no image")
    where = repr(reading.spec)
    first = decoded(read(0), reading.options, f"{where}: the image {names[0]!r}")
    scaling = arrays.scaling(reading.options, first.shape, torch.uint8, where)
    if first.numel() * len(names) > HELD:
        kept: arrays.Inputs = Encoded(names, read, reading.options, first.shape, scaling, where)
        return Samples(kept, labels, ids, classes, reading.spec)
    images = torch.empty(len(names), *first.shape, dtype=torch.uint8)
    known = []
    for row, name in enumerate(names):
        content = read(row)
        image = decoded(content, reading.options, f"{where}: the image {name!r}")
        _require_shape(image.shape, name, first.shape, names[0], where)
        images[row] = image
        known.append(hashlib.sha256(content).digest())
    return Samples(arrays.Held(images, scaling, tuple(known)), labels, ids, classes, reading.spec)


def decoded(content: bytes, options: DataOptions, where: str) -> Tensor:
    """uint8 [C, H, W] from the bytes of an image file, the first picture of several.

    Palettes are looked up, an alpha channel is dropped, 16-bit grey keeps its upper 8 bits, and nothing is turned by
    what EXIF says: what torchvision does. Raises ValueError starting with ``where`` for anything that can not be read.
    """
    image_module = _pillow()
    try:
        with image_module.open(io.BytesIO(content)) as image:
            if image.width * image.height > PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels, more than {PIXELS:,}")
            return from_image(image, options)
    except image_module.UnidentifiedImageError as error:
        raise ValueError(f"{where} can not be read: it is no image of a known format") from error
    except (
        ArithmeticError, LookupError, MemoryError, NotImplementedError, OSError, SyntaxError, TypeError, ValueError,
        image_module.DecompressionBombError, struct.error, zlib.error,
    ) as error:  # fmt: skip
        raise ValueError(f"{where} can not be read: {places.one_line(error)}") from error


def from_image(image: Any, options: DataOptions) -> Tensor:
    """uint8 [C, H, W] of a Pillow image, with the channels (3 by default) and the size that ``options`` ask for."""
    if image.mode.startswith("I;16"):
        image = _pillow().fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels have 32 bits (Pillow's mode {image.mode}); images have 8 or 16")
    elif image.mode == "P":
        image = image.convert("RGBA")  # with a transparent colour in the palette, RGB at once would warn
    image = image.convert("L" if options.channels == 1 else "RGB")
    if options.size is not None and image.size != options.size[::-1]:
        image = image.resize(options.size[::-1], _pillow().Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image))
    return pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1).contiguous()


def converted(image: Tensor, options: DataOptions) -> Tensor:
    """As :func:`from_image`, of uint8 [1 or 3, H, W]."""
    pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
    asked = replace(options, channels=len(image) if options.channels is None else options.channels)
    return from_image(_pillow().fromarray(pixels.contiguous().numpy()), asked)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("images need Pillow: pip install fastunlearn[data]") from error
    return Image


def _of_classes(
    reading: Reading, files: Sequence[str], folders: Sequence[str], read: Callable[[str], bytes]
) -> Samples:
    refuse(reading, (*OF_COLUMNS, "text_length"), "is not for folders of images")
    where = repr(reading.spec)
    found = sorted(folder for folder in folders if "/" not in folder)
    if not found:
        raise ValueError(f"{where} has no class folders; expected one folder of images per class")
    chosen = []
    for name in files:
        if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name):
            raise ValueError(f"{where}: the file name {name!r} has control characters or is no Unicode")
        if "/" not in name:
            if _is_image(name):
                raise ValueError(f"{where}: the image {name!r} lies outside the class folders")
        elif name.rpartition("/")[2].lower() not in _LITTER:
            if not _is_image(name):
                raise ValueError(f"{where}: {name!r} is no image; a class folder holds {' '.join(SUFFIXES)}")
            chosen.append(name)
    _require_full(found, folders, chosen, reading)
    chosen.sort(key=lambda name: name.partition("/")[::2])
    labels, classes = arrays.labels_from(
        [name.partition("/")[0] for name in chosen], f"{where}: the class folders", reading.classes or found
    )
    return open_images(reading, chosen, lambda row: read(chosen[row]), labels, chosen, classes)


def _require_full(classes: Sequence[str], folders: Sequence[str], files: Sequence[str], reading: Reading) -> None:
    """Every class has an image; where none lies in its class folder, those are no classes but a level above them."""
    with_files = {name.partition("/")[0] for name in files}
    if files and all(name.count("/") > 1 for name in files):
        inner = classes[0] if len(classes) == 1 else next(name for name in classes if name in with_files)
        archive = reading.path.is_file()
        within = "/".join(part for part in (reading.inner, inner) if part)
        hint = f"{reading.path}::{within}" if archive else str(reading.path / inner)
        raise ValueError(
            f"{reading.spec!r} has folders of folders of images, not of images; name one of them: {hint!r}"
        )
    for name in classes:
        if name not in with_files:
            raise ValueError(f"{reading.spec!r}: the class folder {name!r} has no image")


def _require_shape(shape: torch.Size, name: str, expected: torch.Size, first: str, where: str) -> None:
    if shape != expected:
        raise ValueError(
            f"{where}: {name!r} is {shape[1]} x {shape[2]} pixels high and wide, {first!r} is {expected[1]} x "
            f"{expected[2]}; give image_size to have all resized"
        )


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


_UNREADABLE = (
    tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, OSError, RuntimeError, ValueError,
)  # fmt: skip
Member = tuple[str, Callable[[], bytes] | None]  # without a way to read it: a folder


def _zip_members(path: Path, spec: str) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        total = 0
        for info in archive.infolist():
            _require_inside(info.filename, spec)
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise Refused(f"{spec!r}: the member {info.filename!r} is a link or a device")
            if info.flag_bits & 1:
                raise Refused(f"{spec!r}: the member {info.filename!r} is encrypted")
            total += info.file_size
            _require_bounded(info.filename, info.file_size, total, spec)
            yield info.filename, None if info.is_dir() else partial(archive.read, info)


def _tar_members(path: Path, spec: str) -> Iterator[Member]:
    with _uncompressed(path) as file:
        bounded = _Bounded(file, spec)
        with tarfile.open(fileobj=cast(BinaryIO, bounded), mode="r:") as archive:
            total = 0
            for member in archive:
                _require_inside(member.name, spec)
                if not (member.isfile() or member.isdir()) or member.issparse():
                    kind = "a link" if member.issym() or member.islnk() else "a device or a sparse file"
                    raise Refused(f"{spec!r}: the member {member.name!r} is {kind}")
                total += member.size
                _require_bounded(member.name, member.size, total, spec)
                yield member.name, None if member.isdir() else partial(_tar_content, archive, member)
        if bounded.last != bytes(tarfile.BLOCKSIZE):  # tarfile takes a broken header for the end
            raise ValueError("it ends without an end mark: a part of it is missing or a header is broken")
        bounded.finish()


def _tar_content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return b"" if file is None else file.read()


class Refused(ValueError):
    """What an archive holds is not accepted, in contrast to an archive that can not be read."""


def _require_inside(name: str, spec: str) -> None:
    """Nothing is written to the disk, but ids are made of these names, and an archive made to harm is refused."""
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        raise Refused(f"{spec!r}: the member {name!r} has an absolute path")
    if ".." in re.split(r"[/\\]", name):
        raise Refused(f"{spec!r}: the member {name!r} leads out of the archive by '..'")


def _require_bounded(name: str, size: int, total: int, spec: str) -> None:
    if size > MEMBER:
        raise Refused(f"{spec!r}: the member {name!r} has {size:,} bytes, more than {MEMBER:,}")
    if total > UNPACKED:
        raise Refused(f"{spec!r} unpacks to more than {UNPACKED:,} bytes, up to the member {name!r}")


def _uncompressed(path: Path) -> BinaryIO:
    name = path.name.lower()
    if name.endswith((".gz", ".tgz")):
        return cast(BinaryIO, gzip.open(path))
    return cast(BinaryIO, lzma.open(path)) if name.endswith((".xz", ".txz")) else open(path, "rb")


class _Bounded:
    """A file of which tarfile reads no more than it may: headers can ask for any number of bytes."""

    def __init__(self, file: BinaryIO, spec: str) -> None:
        self.file, self.spec = file, spec
        self.last = b""

    def read(self, size: int) -> bytes:
        if size > MEMBER:
            raise Refused(f"{self.spec!r}: a header asks for {size:,} bytes, more than {MEMBER:,}")
        if self.file.tell() > 2 * UNPACKED:  # members, their headers and padding
            raise Refused(f"{self.spec!r} with its headers unpacks to more than {2 * UNPACKED:,} bytes")
        self.last = self.file.read(size)
        return self.last

    def seek(self, position: int) -> int:
        return self.file.seek(position)

    def finish(self) -> None:
        """Read what follows the end mark, zeros mostly, for the check sum that comes last."""
        while self.file.read(1 << 20):
            if self.file.tell() > 2 * UNPACKED:
                raise Refused(f"{self.spec!r} unpacks to more than {UNPACKED:,} bytes")

    def tell(self) -> int:
        return self.file.tell()
