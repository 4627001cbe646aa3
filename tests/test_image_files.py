"""What becomes of every kind of image file: the table of docs/data.md, line by line."""

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_image import CLIP_MEAN, random_image, saved

from jaxvlm.data import DataError
from jaxvlm.data.image import MAX_PIXELS, TRANSFORMS, image_size, load_image, transform

RED, BLUE = [255, 0, 0], [0, 0, 255]


def png(width, height, depth, colour, rows=None):
    """A PNG by the specification; without rows, only what its header says."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = b"" if rows is None else zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def loaded(data):
    """As RGB values; from bytes, and the same from a file of whatever name."""
    image = load_image(data)
    assert image.mode == "RGB" and image_size(data) == image.size
    return np.asarray(image)


# ---------------------------------------- modes


def test_palettes_and_transparency():
    picture = random_image(8, 8)
    palette = picture.quantize(4)
    np.testing.assert_array_equal(loaded(saved(palette, "PNG")), palette.convert("RGB"))
    clear = loaded(saved(palette, "PNG", transparency=palette.getpixel((0, 0))))
    assert clear[0, 0].tolist() == [255] * 3
    half = loaded(saved(palette, "PNG", transparency=bytes([255, 128, 0, 255])))  # an alpha for each colour
    index, rgb = np.asarray(palette), np.asarray(palette.convert("RGB")).astype(float)
    np.testing.assert_array_equal(half[(index == 0) | (index == 3)], rgb[(index == 0) | (index == 3)])
    assert (half[index == 2] == 255).all()
    np.testing.assert_allclose(half[index == 1], rgb[index == 1] * 128 / 255 + 127, atol=1)
    key = saved(Image.fromarray(np.uint8([[RED, BLUE]])), "PNG", transparency=tuple(RED))  # one colour is clear
    assert loaded(key).tolist() == [[[255] * 3, BLUE]]
    grey = Image.merge("LA", [Image.new("L", (2, 2), 100), Image.new("L", (2, 2), 51)])
    assert (loaded(saved(grey, "PNG")) == 224).all()  # a fifth of 100 on white
    rgba = Image.merge("RGBA", [*picture.split(), Image.new("L", (8, 8), 255)])
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(loaded(saved(rgba, kind)), picture)
    np.testing.assert_array_equal(loaded(saved(rgba, "WEBP", lossless=True)), picture)


def test_cmyk_is_converted_as_adobe_writes_it():
    """PIL writes and reads CMYK in JPEG files upside down, as Photoshop does."""
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[..., 1:3] = 255  # magenta and yellow
    cmyk = Image.fromarray(ink, "CMYK")
    data = saved(cmyk, "JPEG", quality=95)
    assert b"Adobe" in data and Image.open(io.BytesIO(data)).mode == "CMYK"
    assert np.abs(loaded(data).astype(int) - RED).max() <= 3
    np.testing.assert_array_equal(loaded(saved(cmyk, "TIFF")), np.broadcast_to(np.uint8(RED), (16, 16, 3)))


def test_sixteen_bits_keep_their_high_byte():
    deep = np.asarray([[0, 255, 256], [32768, 65280, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(loaded(saved(Image.fromarray(deep), kind))[..., 0], deep >> 8)
    colours = np.asarray([[[0x12FF, 0x3400, 0xFFFF], [0, 0x7F80, 0x80FF]]], ">u2")
    rgb = png(2, 1, 16, 2, [colours.tobytes()])
    assert loaded(rgb).tolist() == [[[0x12, 0x34, 0xFF], [0, 0x7F, 0x80]]]


def test_one_bit_and_floats():
    bits = Image.fromarray(np.asarray([[True, False], [False, True]]))
    for kind in ("PNG", "TIFF", "BMP"):
        assert loaded(saved(bits, kind))[..., 0].tolist() == [[255, 0], [0, 255]]
    floats = Image.fromarray(np.asarray([[0.0, 0.5, 1.0, np.nan]], np.float32))
    assert loaded(saved(floats, "TIFF"))[0, :, 0].tolist() == [0, 128, 255, 0]
    larger = Image.fromarray(np.asarray([[-3.0, 12.4, 300.0]], np.float32))
    assert loaded(saved(larger, "TIFF"))[0, :, 0].tolist() == [0, 12, 255]


# ---------------------------------------- orientation, frames, profiles, types

TURNED = {  # EXIF 2.3, tag 274: where the first row and the first column of the file belong
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientations(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = random_image(6, 4)
    want = TURNED[orientation](np.asarray(picture))
    np.testing.assert_array_equal(loaded(saved(picture, "PNG", exif=exif)), want)
    assert loaded(saved(picture, "JPEG", exif=exif)).shape == want.shape


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "MPO", "TIFF"])
def test_the_first_of_several_pictures(kind):
    """Animations (APNG among them), the stereo pairs of cameras (MPO), pages."""
    pictures = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(pictures[0], kind, save_all=True, append_images=pictures[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert np.abs(loaded(data).astype(int) - RED).max() <= 2


def test_colour_profiles_are_not_applied():
    """As in LLaVA and the HF processors: the values are those of the file."""
    picture = random_image(8, 8)
    np.testing.assert_array_equal(loaded(saved(picture, "PNG", icc_profile=b"a profile of a wide screen")), picture)


def test_a_progressive_jpeg_is_the_same_picture():
    picture = random_image(40, 30)
    data = [saved(picture, "JPEG", progressive=progressive) for progressive in (False, True)]
    np.testing.assert_array_equal(loaded(data[0]), loaded(data[1]))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "BMP", "MPO"])
def test_the_content_counts_and_not_the_name(tmp_path, kind):
    """OCR-VQA's GIFs are named .jpg."""
    data = saved(random_image(8, 6).quantize(8).convert("RGB"), kind)
    (tmp_path / "a.jpg").write_bytes(data)
    np.testing.assert_array_equal(loaded(tmp_path / "a.jpg"), loaded(data))


# ---------------------------------------- sizes


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1), (1, 65_535), (65_535, 3)])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_extreme_shapes(size, name):
    """Every transform takes them in a moment and in little memory; the colour stays what it is."""
    (square,) = {transform(Image.new("RGB", size, (200, 30, 40)), name, 56, CLIP_MEAN).tobytes()}
    square = np.frombuffer(square, np.uint8).reshape(56, 56, 3)
    if name.startswith("letterbox") and size != (1, 1):
        assert np.abs(square[:, [0, 27]][[0, 27]].astype(int) - (122, 116, 104)).max() < 50  # mostly bars
    else:
        assert (square == (200, 30, 40)).all()


def smooth(width, height):
    return random_image(7, 7).resize((width, height), Image.Resampling.BILINEAR)


@pytest.mark.parametrize("name", ["crop", "letterbox"])
@pytest.mark.parametrize("size", [(30, 300), (300, 30), (31, 247)])
def test_shapes_too_large_to_resize_as_a_whole_are_nearly_the_same(monkeypatch, name, size):
    whole = transform(smooth(*size), name, 24, CLIP_MEAN).astype(int)
    monkeypatch.setattr("jaxvlm.data.image.MAX_PIXELS", 10)
    assert np.abs(transform(smooth(*size), name, 24, CLIP_MEAN) - whole).max() <= 2


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_by_their_header(tmp_path):
    row = bytes(10_000 // 8)
    bomb = png(10_000, 10_000, 1, 0, [row] * 10_000)  # a hundred million pixels
    assert len(bomb) < 20_000
    for data, size in ((bomb, "10000 x 10000"), (png(60_000, 50_000, 8, 2), ""), (png(1, 70_000, 8, 0), "1 x 70000")):
        (tmp_path / "bomb.png").write_bytes(data)
        for read in (load_image, image_size):
            with pytest.raises(DataError, match=rf"bomb.png.*{size}.*(bomb|side of more than 65,535)") as error:
                read(tmp_path / "bomb.png")
            assert "Shrink" in str(error.value) or "Cut" in str(error.value)
    with pytest.raises(DataError, match="cannot be read as an image"):  # says that it is large, and has nothing
        load_image(png(5_000, 5_000, 8, 0))
    assert 10_000**2 > MAX_PIXELS > 8_000 * 11_000


# ---------------------------------------- what is no image


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "is empty .0 bytes..*Download"),
        (
            b"<!DOCTYPE html><title>404",
            r"cannot be read as an image: it begins with b'<!DOCTYPE html>.*Replace the file",
        ),
        (saved(random_image(64, 64), "JPEG")[:2000], "cannot be read as an image: .*truncated"),
        (saved(random_image(64, 64), "JPEG", progressive=True)[:2000], "cannot be read as an image: .*truncated"),
        (saved(random_image(64, 64), "PNG")[:900], "cannot be read as an image"),
        (saved(random_image(64, 64), "PNG")[:20], "cannot be read as an image"),
        (saved(random_image(64, 64), "GIF")[:900], "cannot be read as an image: .*truncated"),
        (saved(random_image(64, 64), "WEBP")[:900], "cannot be read as an image"),
        (b"\xff\xd8\xff\xe0" + bytes(100), "cannot be read as an image"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, data, message):
    (tmp_path / "x.jpg").write_bytes(data)
    with pytest.raises(DataError, match=f"^{re.escape(str(tmp_path / 'x.jpg'))} {message}"):
        load_image(tmp_path / "x.jpg")


def test_folders_and_missing_files_are_named(tmp_path):
    for read in (load_image, image_size):
        with pytest.raises(DataError, match="gone.jpg does not exist"):
            read(tmp_path / "gone.jpg")
        with pytest.raises(DataError, match="is a folder, not an image"):
            read(tmp_path)


def test_every_kind_is_in_the_table():
    """docs/data.md lists what this file tests."""
    table = (Path(__file__).parents[1] / "docs" / "data.md").read_text().partition("## Images")[2].lower()
    words = "palette alpha cmyk 16-bit 1-bit float exif animated mpo icc progressive 1x1 aspect bomb truncated zero-byte html"
    assert [word for word in [*words.split(), "wrong extension", "folder", "missing"] if word not in table] == []
