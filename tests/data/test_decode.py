"""Awkward image files: upright RGB, or a reason; never half an image, a warning or a crash."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from sslcli.config.data import Folder
from sslcli.data import decode, open_source
from sslcli.data.decode import SUFFIXES, read_image
from sslcli.data.source import UnreadableImage

H, W = 24, 36
DOWN, ACROSS = np.mgrid[:H, :W]
PIXELS = np.stack([ACROSS * 7, DOWN * 10, (ACROSS * DOWN) % 256], axis=-1).astype(np.uint8)
PICTURE = Image.fromarray(PIXELS)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(tmp_path: Path, data: bytes, name: str = "x.jpg") -> np.ndarray:
    path = tmp_path / name
    path.write_bytes(data)
    return read_image(str(path).encode(), name)


def reason(tmp_path: Path, data: bytes, name: str = "x.jpg") -> str:
    with pytest.raises(UnreadableImage) as caught:
        read(tmp_path, data, name)
    assert caught.value.name == name
    assert name in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value.reason


def test_rgb_is_read_as_it_is_and_may_be_written_to(tmp_path: Path) -> None:
    image = read(tmp_path, encoded(PICTURE, "PNG"), "x.png")
    assert image.dtype == np.uint8
    assert np.array_equal(image, PIXELS)
    image[:] = 0


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_orientation_is_applied(tmp_path: Path, orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(PICTURE, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    got = read(tmp_path, data)
    assert got.shape == ((W, H, 3) if orientation >= 5 else (H, W, 3))
    assert np.array_equal(got, expected)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0garbage that is no TIFF",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
    ],
)
def test_damaged_metadata_leave_the_picture(tmp_path: Path, exif: bytes) -> None:
    assert read(tmp_path, encoded(PICTURE, "JPEG", exif=exif)).shape == (H, W, 3)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("WEBP", {}),
        ("BMP", {}),
        ("PPM", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("JPEG2000", {}),
    ],
)
def test_a_cut_file_is_whole_or_unreadable(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    data = encoded(PICTURE, kind, **options)
    whole = read(tmp_path, data)
    unreadable = 0
    for length in [*range(0, len(data), max(1, len(data) // 40)), *range(len(data) - 15, len(data))]:
        try:
            assert np.array_equal(read(tmp_path, data[:length]), whole)
        except UnreadableImage:
            unreadable += 1
    assert unreadable > 35


@pytest.mark.parametrize(("kind", "share"), [("JPEG", 0.97), ("JPEG", 0.6), ("PNG", 0.5), ("WEBP", 0.5), ("GIF", 0.5)])
def test_a_copy_that_was_never_finished_is_unreadable(tmp_path: Path, kind: str, share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    there = int(share * len(data))
    assert "zeros" in reason(tmp_path, data[:there] + bytes(len(data) - there))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_padding_after_the_end_does_no_harm(tmp_path: Path, kind: str) -> None:
    data = encoded(PICTURE, kind)
    assert np.array_equal(read(tmp_path, data + bytes(1000)), read(tmp_path, data))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    deep = np.linspace(0, 65535, H * W).astype(np.uint16).reshape(H, W)
    expected = np.rint(deep / 257).astype(np.uint8)
    assert expected.max() == 255
    for kind in ("PNG", "TIFF", "PPM"):
        got = read(tmp_path, encoded(Image.fromarray(deep), kind))
        assert np.array_equal(got, np.repeat(expected[..., None], 3, axis=2)), kind


def test_real_and_wide_values_are_scaled_or_refused(tmp_path: Path) -> None:
    share = np.linspace(0, 1, H * W, dtype=np.float32).reshape(H, W)
    got = read(tmp_path, encoded(Image.fromarray(share), "TIFF"))
    assert np.array_equal(got[..., 0], np.rint(share * 255).astype(np.uint8))
    assert "0..1" in reason(tmp_path, encoded(Image.fromarray(share * 300), "TIFF"))
    assert "16 bits" in reason(tmp_path, encoded(Image.fromarray((share * 1e6).astype(np.int32)), "TIFF"))


def test_every_mode_becomes_rgb_as_pillow_converts_it(tmp_path: Path) -> None:
    for mode, kind in [("L", "JPEG"), ("1", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("CMYK", "TIFF")]:
        data = encoded(PICTURE.convert(mode), kind)
        with Image.open(io.BytesIO(data)) as image:
            assert image.mode == mode
            expected = np.asarray(image.convert("RGB"))
        assert np.array_equal(read(tmp_path, data), expected), (mode, kind)


def test_palette_with_transparent_bytes_gives_no_warning(tmp_path: Path) -> None:
    palette = PICTURE.convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    data = encoded(palette, "PNG", transparency=bytes(range(0, 160, 10)))
    assert np.array_equal(read(tmp_path, data), np.asarray(palette.convert("RGB")))


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (read(tmp_path, data, "x.gif") == (255, 0, 0)).all()


def test_content_counts_not_the_suffix(tmp_path: Path) -> None:
    assert np.array_equal(read(tmp_path, encoded(PICTURE, "PNG"), "named.jpg"), PIXELS)


def test_what_is_no_image_says_why(tmp_path: Path) -> None:
    assert reason(tmp_path, b"") == "an empty file"
    assert "not an image" in reason(tmp_path, b"I am an image\n", "text.png")
    assert "not an image" in reason(tmp_path, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "script.jpg")
    assert "exceeds limit" in reason(
        tmp_path, b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\0;"
    )
    with pytest.raises(UnreadableImage, match="No such file"):
        read_image(str(tmp_path / "gone.png").encode(), "gone.png")
    with pytest.raises(UnreadableImage, match="directory"):
        read_image(str(tmp_path).encode(), "folder.png")


def test_suffixes_are_lower_case_with_a_dot() -> None:
    assert all(suffix.startswith(b".") and suffix == suffix.lower() for suffix in SUFFIXES)
    assert {b".jpg", b".jpeg", b".png", b".ppm", b".bmp", b".tif", b".webp", b".gif"} <= SUFFIXES


@pytest.mark.data
def test_every_awkward_file_is_an_image_or_counted(small_data: Path, tmp_path: Path) -> None:
    with tarfile.open(small_data / "awkward.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    manifest = json.loads((tmp_path / "awkward" / "MANIFEST.json").read_text())
    files = tmp_path / "awkward" / "files"
    source = open_source(Folder(path=files))
    listed = [source.name(index) for index in range(len(source))]
    assert sorted([*listed, "._trimaps", "Abyssinian_100.mat"]) == sorted(manifest)
    assert source.ignored == 2
    for index, name in enumerate(listed):
        if manifest[name]["pil"] != "decodes":
            with pytest.raises(UnreadableImage):
                source.read(index)
            continue
        image = source.read(index)
        with Image.open(files / name) as raw:
            turned = ImageOps.exif_transpose(raw)
            assert image.shape == (turned.height, turned.width, 3), name
            if turned.mode == "I;16":
                expected = np.rint(np.asarray(turned) / 257)[..., None].repeat(3, axis=2)
            else:
                expected = np.asarray(turned.convert("RGB"))
            assert np.array_equal(image, expected), name
    right = source.read(listed.index("hopper_orientation_2.jpg")).astype(int)
    for orientation in range(3, 9):
        other = source.read(listed.index(f"hopper_orientation_{orientation}.jpg"))
        assert np.abs(right - other).mean() < 6, "one picture stored eight ways; turned wrongly it differs by 40"


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1, "quality": 30}])
def test_the_faster_decoder_gives_the_pixels_that_pillow_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, options: dict[str, Any]
) -> None:
    data = encoded(PICTURE.resize((61, 83)).convert(mode), "JPEG", **options)
    assert decode._turbo(io.BytesIO(data)) is not None
    fast = read(tmp_path, data)
    monkeypatch.setattr(decode, "simplejpeg", None)
    assert np.array_equal(fast, read(tmp_path, data))


def test_the_faster_decoder_leaves_damaged_files_to_pillow() -> None:
    data = encoded(PICTURE.resize((64, 64)), "JPEG")
    assert decode._turbo(io.BytesIO(data[: len(data) // 2])) is None
    assert decode._turbo(io.BytesIO(data[: len(data) // 2] + data[-2:])) is None
