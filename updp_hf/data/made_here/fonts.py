"""The fonts that matplotlib ships, those in which the characters asked for are ordinary glyphs."""

import unicodedata
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font

from updp_hf.errors import AccessError

__all__ = ["fonts_with"]

MIN_FONTS = 10


@cache
def fonts_with(characters: str) -> tuple[Path, ...]:
    """Return the fonts that draw each of `characters`, letters and digits, as itself, in the order of their names.

    What a font says of its glyphs decides: in fonts of symbols or placeholders the glyph of `a` has another name than
    `a`, and the fonts of sizes have none.

    Raises:
        AccessError: there are fewer than ten.
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    found = tuple(path for path in sorted(folder.glob("*.ttf")) if _draws(path, characters))
    if len(found) < MIN_FONTS:
        raise AccessError(
            f"{folder} holds {len(found)} fonts with all of {characters}, expected the {MIN_FONTS} or more that come "
            "with matplotlib: install it with pip, which brings them."
        )
    return found


def _draws(path: Path, characters: str) -> bool:
    font = FT2Font(str(path))
    return all(font.get_glyph_name(font.get_char_index(ord(c))) == _glyph_name(c) for c in characters)


def _glyph_name(character: str) -> str:
    """Return the name that a glyph has in the files of fonts: `a` for a, `seven` for 7."""
    return unicodedata.name(character).removeprefix("DIGIT ").lower() if character.isdigit() else character
