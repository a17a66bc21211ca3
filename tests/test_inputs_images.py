"""Image files become what torchvision makes of them, and what an archive may hold is bounded."""

from __future__ import annotations

import io
import lzma
import os
import re
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fastunlearn.inputs import DataOptions, open_samples
from fastunlearn.inputs.images import decoded

RGB = np.random.default_rng(1).integers(0, 256, (6, 5, 3), dtype=np.uint8)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def folder(root: Path, images: dict[str, bytes]) -> str:
    for name, content in images.items():
        (root / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "data" / name).write_bytes(content)
    return str(root / "data")


def pixels(content: bytes, **options: Any) -> np.ndarray:
    """[H, W, C]"""
    return decoded(content, DataOptions(**options), "it").permute(1, 2, 0).numpy()


def test_colours_are_kept_exactly() -> None:
    for form in ("PNG", "BMP", "PPM", "TIFF"):
        assert np.array_equal(pixels(encoded(Image.fromarray(RGB), form)), RGB)
    assert np.array_equal(pixels(encoded(Image.fromarray(RGB), "WEBP", lossless=True)), RGB)


def test_grey_images_have_three_equal_channels_unless_one_is_asked_for() -> None:
    grey = encoded(Image.fromarray(RGB[:, :, 0]))
    assert np.array_equal(pixels(grey), RGB[:, :, :1].repeat(3, 2))
    assert np.array_equal(pixels(grey, channels=1), RGB[:, :, :1])


def test_colour_becomes_grey_by_the_weights_of_itu_r_601() -> None:
    grey = pixels(encoded(Image.fromarray(RGB)), channels=1)[:, :, 0]
    expected = RGB @ np.array([0.299, 0.587, 0.114])
    assert np.abs(grey - expected).max() <= 0.51


def test_sixteen_bit_grey_keeps_its_upper_bits() -> None:
    deep = np.array([[0, 255, 256], [32768, 65535, 511]], np.uint16)
    assert pixels(encoded(Image.fromarray(deep)), channels=1)[:, :, 0].tolist() == [[0, 0, 1], [128, 255, 1]]


@pytest.mark.filterwarnings("error")
def test_alpha_is_dropped_and_palettes_are_looked_up() -> None:
    alpha = np.concatenate([RGB, np.full((6, 5, 1), 7, np.uint8)], 2)
    assert np.array_equal(pixels(encoded(Image.fromarray(alpha))), RGB)
    palette = Image.fromarray(RGB).quantize(256)
    assert np.array_equal(pixels(encoded(palette)), np.asarray(palette.convert("RGB")))
    transparent = encoded(palette, transparency=bytes([0, 128] * 8))
    assert np.array_equal(pixels(transparent), np.asarray(palette.convert("RGB")))
    assert pixels(encoded(Image.fromarray(alpha[:, :, 2:], "LA"))).shape == (6, 5, 3)
    assert set(np.unique(pixels(encoded(Image.fromarray(RGB[:, :, 0] > 99))))) == {0, 255}


def test_the_first_picture_of_several_counts() -> None:
    frames = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (10, 200)]
    assert (pixels(encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])) == 10).all()


def test_resizing_is_torchs_antialiased_bilinear() -> None:
    large = np.random.default_rng(2).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    for size in ((16, 11), (80, 60)):
        ours = decoded(encoded(Image.fromarray(large)), DataOptions(image_size=size), "it")
        x = torch.from_numpy(large).permute(2, 0, 1).unsqueeze(0)
        torchs = F.interpolate(x.double(), size, mode="bilinear", antialias=True)[0]
        assert ours.shape == (3, *size)
        assert (ours - torchs).abs().max() <= 1.01  # Pillow rounds to 8 bits after each axis


def test_images_of_different_sizes_are_named_or_resized(tmp_path: Path) -> None:
    small, large = encoded(Image.fromarray(RGB)), encoded(Image.fromarray(RGB).resize((9, 9)))
    spec = folder(tmp_path, {"a/1.png": small, "b/2.png": large})
    with pytest.raises(ValueError, match=r"'b/2.png' is 9 x 9 pixels.*'a/1.png' is 6 x 5.*image_size"):
        open_samples(spec)
    assert open_samples(spec, options=DataOptions(image_size=7)).signature()["shape"] == [3, 7, 7]


def test_a_large_folder_names_the_file_of_another_size_when_it_comes_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastunlearn.inputs.images.HELD", 1)
    small, large = encoded(Image.fromarray(RGB)), encoded(Image.fromarray(RGB).resize((9, 9)))
    samples = open_samples(folder(tmp_path, {"a/1.png": small, "b/2.png": large, "b/3.png": b"\x89PNG"}))
    assert samples.batch(torch.tensor([0]))[0].shape == (1, 3, 6, 5)
    with pytest.raises(ValueError, match=r"'b/2.png' is 9 x 9"):
        samples.batch(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"the image 'b/3.png' can not be read"):
        samples.batch(torch.tensor([2]))


def test_hidden_files_and_files_beside_the_class_folders_are_left_out(tmp_path: Path) -> None:
    image = encoded(Image.fromarray(RGB))
    extra = {
        ".DS_Store": b"",
        "README.md": b"",
        "a/.x.png": b"",
        ".git/x.txt": b"",
        "a/Thumbs.db": b"",
        "__MACOSX/a": b"",
    }
    samples = open_samples(folder(tmp_path, {"b/2.PNG": image, "a/deep/er/1.png": image, "a/1.png": image, **extra}))
    assert samples.ids == ["a/1.png", "a/deep/er/1.png", "b/2.PNG"]
    assert samples.classes == ["a", "b"] and samples.labels.tolist() == [0, 0, 1]


def test_a_level_above_the_classes_is_not_taken_for_them(tmp_path: Path) -> None:
    image = encoded(Image.fromarray(RGB))
    spec = folder(tmp_path, {"train/a/1.png": image, "train/b/2.png": image})
    with pytest.raises(ValueError, match=re.escape(repr(str(Path(spec) / "train")))):
        open_samples(spec)
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("top/train/a/1.png", image)
    with pytest.raises(ValueError, match=re.escape("data.zip::top'")):
        open_samples(str(tmp_path / "data.zip"))
    with pytest.raises(ValueError, match=re.escape("data.zip::top/train'")):
        open_samples(str(tmp_path / "data.zip") + "::top")
    assert open_samples(str(tmp_path / "data.zip") + "::top/train/").ids == ["a/1.png"]


def test_links_within_a_folder_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    spec = folder(tmp_path, {"a/1.png": encoded(Image.fromarray(RGB))})
    (Path(spec) / "b").symlink_to(tmp_path / "elsewhere")
    folder(tmp_path / "elsewhere", {"2.png": encoded(Image.fromarray(RGB))})
    assert open_samples(spec).ids == ["a/1.png", "b/data/2.png"]
    (Path(spec) / "a" / "up").symlink_to(spec)
    with pytest.raises(ValueError, match=r"the link .*up' leads back"):
        open_samples(spec)
    (Path(spec) / "a" / "up").unlink()
    (Path(spec) / "a" / "across").symlink_to(Path(spec) / "b")
    (tmp_path / "elsewhere" / "back").symlink_to(Path(spec) / "a")
    with pytest.raises(ValueError, match=r"the link .* leads back"):
        open_samples(spec)


def test_a_folder_that_can_not_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = folder(tmp_path, {"a/1.png": encoded(Image.fromarray(RGB)), "a/b/2.png": b""})
    scandir = os.scandir

    def denied(path: Any) -> Any:
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(OSError, match=r"the folder '.*/a/b' can not be read: PermissionError"):
        open_samples(spec)


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    spec = folder(tmp_path, {"a/1.png": encoded(Image.fromarray(RGB))})
    (Path(spec) / "a" / "2.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(OSError, match=r"the image 'a/2.png' can not be read: FileNotFoundError") as raised:
        open_samples(spec)
    assert "\n" not in str(raised.value)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is this large."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(9000, 9000), (60000, 60000)])
def test_images_that_claim_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path, size: Any) -> None:
    with pytest.raises(ValueError, match=r"the image 'a/1.png' can not be read.* pixels"):
        open_samples(folder(tmp_path, {"a/1.png": bomb(*size)}))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of TIFF, about what it then reads or refuses
def test_any_cut_of_an_image_is_refused_or_whole(tmp_path: Path) -> None:
    for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        content = encoded(Image.fromarray(RGB), form)
        whole = pixels(content)
        for length in range(0, len(content), 7):
            try:
                assert np.array_equal(pixels(content[:length]), whole)  # a trailer may be missing
            except ValueError as error:
                assert str(error).startswith("it can not be read: ") and "\n" not in str(error)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_any_byte_changed_in_an_image_is_refused_in_one_line_or_read(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        content = bytearray(encoded(Image.fromarray(RGB), form))
        for _ in range(60):
            place, old = int(random.integers(len(content))), 0
            old, content[place] = content[place], int(random.integers(256))
            try:
                assert decoded(bytes(content), DataOptions(), "it").dtype == torch.uint8
            except ValueError as error:
                assert str(error).startswith("it can not be read: ") and "\n" not in str(error)
            content[place] = old


# Archives


def tar(path: Path, *members: tarfile.TarInfo | str, content: bytes = b"") -> str:
    content = content or encoded(Image.fromarray(RGB))
    with tarfile.open(path, "w:" + path.suffix[1:].replace("tar", "")) as archive:
        for member in ("a/1.png", *members):
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(content) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(content))
    return str(path)


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        ("/a/2.png", "absolute"),
        ("C:/a/2.png", "absolute"),
        ("\\a\\2.png", "absolute"),
        ("a/../../2.png", r"'\.\.'"),
        ("a\\..\\2.png", r"'\.\.'"),
        (special("a/2.png", tarfile.SYMTYPE, "/etc/passwd"), "a link"),
        (special("a/2.png", tarfile.SYMTYPE, "1.png"), "a link"),
        (special("a/2.png", tarfile.LNKTYPE, "a/1.png"), "a link"),
        (special("a/2.png", tarfile.CHRTYPE), "a device"),
        (special("a/2.png", tarfile.FIFOTYPE), "a device"),
        (special("a/2.png", tarfile.GNUTYPE_SPARSE), "a sparse file"),
        ("./a//1.png", "there twice"),
    ],
)
@pytest.mark.parametrize("ending", ["tar", "tar.xz"])
def test_members_of_a_tar_that_lead_elsewhere_are_refused_by_name(
    tmp_path: Path, member: Any, reason: str, ending: str
) -> None:
    name = member if isinstance(member, str) else member.name
    with pytest.raises(ValueError, match=reason) as raised:
        open_samples(tar(tmp_path / f"data.{ending}", member))
    named = "a/1.png" if "twice" in reason else name
    assert repr(named) in str(raised.value) and "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == [f"data.{ending}"]


@pytest.mark.parametrize(
    ("name", "mode", "reason"),
    [
        ("/a/2.png", 0, "absolute"),
        ("../a/2.png", 0, r"'\.\.'"),
        ("a/2.png", 0o120777, "a link"),
        ("a/2.png", 0o020666, "device"),
    ],
)
def test_members_of_a_zip_that_lead_elsewhere_are_refused_by_name(
    tmp_path: Path, name: str, mode: int, reason: str
) -> None:
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        archive.writestr("a/1.png", encoded(Image.fromarray(RGB)))
        archive.writestr(info, encoded(Image.fromarray(RGB)))
    with pytest.raises(ValueError, match=reason) as raised:
        open_samples(str(tmp_path / "data.zip"))
    assert repr(name) in str(raised.value)


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tar.xz", "zip"])
def test_archives_that_unpack_to_too_much_are_refused(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"data.{ending}"
    zeros = bytes(1 << 20)
    if ending == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for n in range(4):
                archive.writestr(f"a/{n}.bin", zeros)
    else:
        tar(path, *(f"a/{n}.bin" for n in range(3)), content=zeros)
    monkeypatch.setattr("fastunlearn.inputs.images.UNPACKED", 3 << 20)
    with pytest.raises(ValueError, match=r"unpacks to more than 3,145,728 bytes"):
        open_samples(str(path))
    monkeypatch.setattr("fastunlearn.inputs.images.MEMBER", 1 << 19)
    with pytest.raises(ValueError, match=r"has 1,048,576 bytes, more than 524,288"):
        open_samples(str(path))


def test_a_header_that_asks_for_more_than_a_member_may_have_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastunlearn.inputs.images.MEMBER", 1 << 16)
    with tarfile.open(tmp_path / "data.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("a/" + "x" * (1 << 17)))
    with pytest.raises(ValueError, match=r"a header asks for"):
        open_samples(str(tmp_path / "data.tar"))


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tar.xz", "zip"])
def test_an_archive_cut_anywhere_is_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"data.{ending}"
    if ending == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("a/1.png", "b/2.png"):
                archive.writestr(name, encoded(Image.fromarray(RGB)))
    else:
        tar(path, "b/2.png")
    content = path.read_bytes()
    end = 5 * 512 if ending == "tar" else len(content)  # two members of two blocks and an end mark; then but zeros
    for length in [*range(0, end, 61), *range(512, min(end, 2560), 512), end - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=re.escape(repr(str(path)))) as raised:
            open_samples(str(path))
        assert "\n" not in str(raised.value)


def test_a_broken_header_within_a_tar_is_not_taken_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "data.tar"
    tar(path, "b/2.png")
    content = bytearray(path.read_bytes())
    assert len(open_samples(str(path))) == 2
    content[1024 + 3] ^= 1  # in the name, which the check sum of the header covers
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"a header is broken"):
        open_samples(str(path))


def test_headers_and_what_follows_the_end_count_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.tar.xz"
    tar(path, *(special(f"a/{n}", tarfile.DIRTYPE) for n in range(60)))
    assert len(open_samples(str(path))) == 1
    monkeypatch.setattr("fastunlearn.inputs.images.UNPACKED", 1 << 13)
    with pytest.raises(ValueError, match=r"with its headers unpacks to more than 16,384 bytes"):
        open_samples(str(path))
    tar(path)
    assert len(open_samples(str(path))) == 1
    path.write_bytes(path.read_bytes() + lzma.compress(bytes(1 << 22)))
    with pytest.raises(ValueError, match=r"unpacks to more than 8,192 bytes"):
        open_samples(str(path))


def test_encrypted_members_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/1.png", encoded(Image.fromarray(RGB)))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"'a/1.png' is encrypted"):
        open_samples(str(path))
