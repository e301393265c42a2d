import matplotlib
import pytest

from updp_hf.data.made_here.fonts import fonts_with
from updp_hf.data.made_here.glyphs import CLASSES
from updp_hf.errors import AccessError


def names(characters):
    return {path.name for path in fonts_with(characters)}


def test_fonts_of_text_are_found():
    assert {"DejaVuSans.ttf", "DejaVuSerif-Italic.ttf", "STIXGeneral.ttf", "cmr10.ttf", "cmtt10.ttf"} <= names(CLASSES)


@pytest.mark.parametrize(
    ("font", "why"),
    [
        ("cmsy10.ttf", "symbols in the place of letters"),
        ("cmex10.ttf", "parts of brackets in the place of letters"),
        ("STIXSizOneSymReg.ttf", "no letters"),
        ("LastResortHE-Regular.ttf", "one placeholder for all letters"),
    ],
)
def test_fonts_of_symbols_are_left_out(font, why):
    assert font not in names(CLASSES), why


def test_what_counts_is_the_characters_asked_for():
    assert "cmmi10.ttf" in names("abc")
    assert "cmmi10.ttf" not in names("abc123")  # its digits are of the old style, under other names


def test_missing_fonts_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(AccessError, match="holds 0 fonts with all of xyz, expected the 10 or more"):
        fonts_with("xyz")
