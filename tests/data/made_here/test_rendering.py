import numpy as np
import pytest
from PIL import Image

from updp_hf.data.made_here import rendering
from updp_hf.data.made_here.fonts import fonts_with
from updp_hf.data.made_here.glyphs import CLASSES
from updp_hf.data.made_here.rendering import MIN_CONTRAST, colours, render

FONTS = fonts_with(CLASSES)


def random(seed=0):
    return np.random.default_rng(seed)


def grey(image):
    return np.asarray(image.convert("L"), dtype=float)


@pytest.mark.parametrize("resolution", [16, 33, 224])
def test_a_picture_has_the_size_asked_for(resolution):
    picture = render("A", FONTS[0], resolution, random())
    assert (picture.size, picture.mode) == ((resolution, resolution), "RGB")


@pytest.mark.parametrize("font", FONTS, ids=lambda font: font.stem)
def test_every_class_looks_different(font):
    assert len({render(character, font, 16, random()).tobytes() for character in CLASSES}) == len(CLASSES)


def test_every_font_looks_different():
    assert len({render("a", font, 32, random()).tobytes() for font in FONTS}) == len(FONTS)


def test_the_same_numbers_give_the_same_picture():
    assert render("B", FONTS[3], 32, random(5)).tobytes() == render("B", FONTS[3], 32, random(5)).tobytes()
    assert render("B", FONTS[3], 32, random(5)).tobytes() != render("B", FONTS[3], 32, random(6)).tobytes()


def test_colours_are_far_enough_apart():
    for seed in range(200):
        first, second = (
            Image.new("RGB", (1, 1), colour).convert("L").getpixel((0, 0)) for colour in colours(random(seed))
        )
        assert abs(first - second) >= MIN_CONTRAST - 1  # mode L is rounded


@pytest.fixture
def plain(monkeypatch):
    """Draw white on black, and no noise."""
    monkeypatch.setattr(rendering, "NOISE", 0)
    monkeypatch.setattr(rendering, "colours", lambda random: ((255, 255, 255), (0, 0, 0)))


def test_a_character_can_be_seen(plain):
    for seed, character in enumerate(CLASSES * 4):
        picture = grey(render(character, FONTS[seed % len(FONTS)], 32, random(seed)))
        assert picture.max() >= 255 / 3  # also of a thin stroke that is blurred
        assert 0.02 < picture.mean() / 255 < 0.5


def test_a_picture_looks_the_same_at_every_resolution(plain):
    for seed, character in enumerate(CLASSES):
        large, small = (render(character, FONTS[seed % len(FONTS)], side, random(seed)) for side in (128, 32))
        large = grey(large.resize((32, 32), Image.Resampling.BOX))
        assert np.abs(large - grey(small)).mean() < 0.7 * np.abs(large.T - grey(small)).mean()
