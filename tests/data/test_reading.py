"""Every kind of image becomes RGB, and one that cannot be read an error of one kind."""

from contextlib import suppress
from io import BytesIO

import numpy as np
import PIL.Image
import pytest
from tiny_pictures import encoded, pixels

from updp_hf.data.reading import BrokenImageError, read_image


def read(content):
    return np.asarray(read_image({"bytes": content, "path": None})).astype(int)


RGB = PIL.Image.fromarray(pixels(0, 12, 20, 3))
KNOWS_AVIF = ".avif" in PIL.Image.registered_extensions()  # from version 11.3 of Pillow


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P"])
def test_a_png_of_any_mode_is_read_as_pil_converts_it(mode):
    image = RGB.convert(mode)
    assert np.array_equal(read(encoded(image)), np.asarray(image.convert("RGB")))


def test_cmyk_is_read_with_adobes_inversion():
    flat = PIL.Image.new("RGB", (16, 16), (200, 40, 90))
    content = encoded(flat.convert("CMYK"), "JPEG", quality=100)
    assert PIL.Image.open(BytesIO(content)).mode == "CMYK"
    assert np.abs(read(content) - [200, 40, 90]).max() <= 6


@pytest.mark.parametrize("dtype", ["uint16", ">u2"])
def test_grey_levels_of_16_bits_are_scaled_and_not_clipped(dtype):
    levels = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    form = "TIFF" if dtype == ">u2" else "PNG"
    image = PIL.Image.frombytes("I;16B" if dtype == ">u2" else "I;16", (16, 16), levels.astype(dtype).tobytes())
    found = read(encoded(image, form))
    assert np.array_equal(found, np.repeat(np.arange(256).reshape(16, 16, 1), 3, axis=2))


def test_files_of_32_bits_go_from_black_to_white():
    found = read(encoded(PIL.Image.fromarray(np.linspace(-3.0, 7.0, 256, dtype=np.float32).reshape(16, 16)), "TIFF"))
    assert np.array_equal(found[..., 0].ravel(), np.arange(256))
    constant = read(encoded(PIL.Image.fromarray(np.full((4, 4), 5.0, dtype=np.float32)), "TIFF"))
    assert not constant.any()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_white(mode):
    image = PIL.Image.new(mode, (4, 4), (10,) * (len(mode) - 1) + (255,))
    image.putpixel((0, 0), (10,) * (len(mode) - 1) + (0,))
    found = read(encoded(image))
    assert (found[0, 0] == 255).all()
    assert (found[1:] == 10).all()


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])], ids=["one entry", "bytes"])
def test_transparent_entries_of_a_palette_are_white(transparency):
    image = PIL.Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((0, 0), 1)
    found = read(encoded(image, transparency=transparency))
    assert (found[0, 0] == 255).all()
    assert (found[1:] == [10, 20, 30]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_rotation_in_exif_is_applied_once(orientation):
    image = PIL.Image.fromarray(pixels(0, 8, 16, 3))
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = orientation
    stored = np.asarray(image).astype(int)
    turned = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: stored.swapaxes(0, 1)[:, ::-1],
        7: stored[::-1, ::-1].swapaxes(0, 1),
        8: stored.swapaxes(0, 1)[::-1],
    }[orientation]
    assert np.array_equal(read(encoded(image, exif=exif)), turned)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 300, encoded(RGB)[:60], encoded(RGB)[:-30], encoded(RGB, "JPEG")[:-200], encoded(RGB, "GIF")[:40]],
    ids=["empty", "zeros", "head of a png", "truncated png", "truncated jpeg", "truncated gif"],
)
def test_what_cannot_be_read_is_broken(content):
    with pytest.raises(BrokenImageError, match="An image cannot be read: "):
        read(content)


def damaged(form, where, content):
    found = bytearray(encoded(RGB, form))
    found[where : where + len(content)] = content
    return bytes(found)


@pytest.mark.skipif(not KNOWS_AVIF, reason="this Pillow knows no AVIF")
def test_an_avif_that_cannot_be_decoded_is_broken():
    compressed = encoded(RGB, "AVIF").index(b"mdat") + 4
    with pytest.raises(BrokenImageError, match="Failed to decode") as caught:
        read(damaged("AVIF", compressed, b"\xff" * 16))
    assert type(caught.value.__cause__) is RuntimeError


def test_a_kind_of_dds_that_pil_does_not_know_is_broken():
    with pytest.raises(BrokenImageError, match="Unimplemented pixel format") as caught:
        read(damaged("DDS", 80, b"\4\0\0\0none"))
    assert type(caught.value.__cause__) is NotImplementedError


@pytest.mark.parametrize("value", [None, {"bytes": None, "path": None}, {"bytes": None, "path": "/nowhere/x.png"}])
def test_what_is_not_there_is_broken(value):
    with pytest.raises(BrokenImageError, match="cannot be read"):
        read_image(value)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL warns of odd metadata
def test_bytes_damaged_anywhere_are_an_image_or_broken_and_nothing_else():
    for form in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", *(["AVIF"] if KNOWS_AVIF else [])):
        content = bytearray(encoded(RGB, form))
        draws = np.random.default_rng(0)
        for _ in range(60):
            damaged = content.copy()
            damaged[draws.integers(len(content))] = draws.integers(256)
            with suppress(BrokenImageError):
                assert read(bytes(damaged)).shape[2] == 3


def test_a_decompression_bomb_is_broken(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(BrokenImageError, match="decompression bomb"):
        read(encoded(RGB))
