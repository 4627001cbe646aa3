import io

import numpy as np
import pytest
from PIL import Image

from jaxvlm.data import DataError
from jaxvlm.data import image as image_module
from jaxvlm.data.image import TILED, TRANSFORMS, load_image, transform, transform_version
from jaxvlm.templates import TRANSFORM_VERSIONS

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
SIZES = [(40, 30), (30, 40), (31, 47), (16, 16), (200, 7), (3, 50), (1, 1), (64, 63)]


def random_image(width, height, mode="RGB", seed=0):
    channels = {"RGB": 3, "RGBA": 4, "CMYK": 4, "L": 1}[mode]
    array = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(array.squeeze(2) if channels == 1 else array, mode if mode == "CMYK" else None)


def saved(image, fmt, **options):
    out = io.BytesIO()
    image.save(out, fmt, **options)
    return out.getvalue()


# ---------------------------------------- transforms


@pytest.mark.parametrize("size", SIZES)
def test_crop_is_clips_processor(size):
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = clip.CLIPImageProcessorPil(
        size={"shortest_edge": 24},
        crop_size={"height": 24, "width": 24},
        do_rescale=False,
        do_normalize=False,
    )
    image = random_image(*size)
    want = np.asarray(processor(image, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
    np.testing.assert_array_equal(transform(image, "crop", 24, CLIP_MEAN), want)


@pytest.mark.parametrize("size", SIZES)
def test_naive_is_siglips_processor(size):
    siglip = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
    processor = siglip.SiglipImageProcessorPil(
        size={"height": 24, "width": 24},
        do_rescale=False,
        do_normalize=False,
        resample=Image.Resampling.BICUBIC,
    )
    image = random_image(*size)
    want = np.asarray(processor(image, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
    np.testing.assert_array_equal(transform(image, "naive", 24, CLIP_MEAN), want)


@pytest.mark.parametrize("size", SIZES)
def test_letterbox_is_llavas(size):
    """The padding written by array indices: mean colour, image at (side - short) // 2; then CLIP's resize."""
    image = random_image(*size)
    width, height = size
    side = max(size)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = (122, 116, 104)
    left, top = (side - width) // 2, (side - height) // 2
    square[top : top + height, left : left + width] = np.asarray(image)
    want = np.asarray(Image.fromarray(square).resize((24, 24), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(transform(image, "letterbox", 24, CLIP_MEAN), want)
    llava = pytest.importorskip("transformers.models.llava.image_processing_pil_llava")
    side = {"height": 24, "width": 24}
    settings = {"size": {"shortest_edge": 24}, "crop_size": side, "do_rescale": False, "do_normalize": False}
    processor = llava.LlavaImageProcessorPil(do_pad=True, **settings)
    theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
    np.testing.assert_array_equal(theirs, want)


def test_transforms_are_named_and_versioned():
    assert set(TRANSFORMS) | set(TILED) == set(TRANSFORM_VERSIONS) >= {"naive", "crop", "letterbox"}
    assert transform_version("letterbox") == "letterbox/1"
    with pytest.raises(DataError, match="no image transform 'pad'.*letterbox"):
        transform(random_image(4, 4), "pad", 8, CLIP_MEAN)
    for name in TRANSFORMS:
        out = transform(random_image(9, 5), name, 8, CLIP_MEAN)
        assert out.shape == (8, 8, 3) and out.dtype == np.uint8


# ---------------------------------------- loading


def test_sources_of_an_image_agree(tmp_path):
    image = random_image(12, 10)
    (tmp_path / "a.jpg").write_bytes(saved(image, "PNG"))  # the name lies; the content counts
    for source in (
        tmp_path / "a.jpg",
        str(tmp_path / "a.jpg"),
        saved(image, "PNG"),
        image,
        np.asarray(image),
    ):
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        np.testing.assert_array_equal(loaded, image)
    grey = np.asarray(random_image(5, 4, "L"))
    np.testing.assert_array_equal(np.asarray(load_image(grey)), np.repeat(grey[..., None], 3, 2))


def test_transparency_is_composited_on_white():
    array = np.zeros((2, 3, 4), np.uint8)
    array[..., 0], array[:, 1, 3], array[:, 2, 3] = 200, 255, 51  # clear, opaque, a fifth
    for data in (saved(Image.fromarray(array), "PNG"), Image.fromarray(array), array):
        out = np.asarray(load_image(data))
        assert out[0, 0].tolist() == [255] * 3 and out[0, 1].tolist() == [200, 0, 0]
        assert out[0, 2].tolist() == [244, 204, 204]


def test_sixteen_bits_of_other_forms():
    deep = np.asarray([[0, 255, 256], [32768, 65280, 65535]], np.uint16)
    big_endian = Image.frombytes("I;16B", (3, 2), deep.astype(">u2").tobytes())
    np.testing.assert_array_equal(np.asarray(load_image(big_endian))[..., 0], deep >> 8)
    ints = Image.fromarray(deep.astype(np.int32))
    np.testing.assert_array_equal(np.asarray(load_image(ints))[..., 0], deep >> 8)


def test_malformed_exif_is_left_alone():
    image = Image.fromarray(np.asarray([[[255, 0, 0], [0, 0, 255]]], np.uint8))
    broken = saved(image, "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert load_image(broken).size == (2, 1)


def test_bad_sources_are_named(monkeypatch):
    good = saved(random_image(64, 64), "JPEG")
    with pytest.raises(DataError, match="img 3 is empty"):
        load_image(b"", name="img 3")
    with pytest.raises(DataError, match="must be uint8"):
        load_image(np.zeros((2, 2, 3)))
    monkeypatch.setattr(image_module, "MAX_PIXELS", 1000)
    with pytest.raises(DataError, match=r"\(64 x 64\) has more than 1,000 pixels.*bomb"):
        load_image(good)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="bomb"):
        load_image(good)


def test_the_callers_image_is_left_alone(tmp_path):
    Image.new("RGBA", (3, 3), (1, 2, 3, 0)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert load_image(image).getpixel((0, 0)) == (255, 255, 255)
        assert image.mode == "RGBA" and image.getpixel((0, 0)) == (1, 2, 3, 0)
