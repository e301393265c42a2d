"""Small pictures, and a folder of them: of every kind, whole and broken."""

from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image

CLASSES = ["cat", "dog", "owl"]
SIZE = 16
WHOLE, BROKEN = 11, 4
"""How many images of the folder's train part can be read, and how many cannot."""


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (SIZE, SIZE, 3), dtype=np.uint8)


def encoded(image: PIL.Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def write_folder(folder: Path) -> None:
    """Write train/ with `WHOLE` and `BROKEN` images of `CLASSES`, and val/ with two of each class."""
    for split, count in (("train", 3), ("val", 2)):
        for number, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                image = PIL.Image.fromarray(pixels(10 * number + index))
                (folder / split / name / f"{index}.png").write_bytes(encoded(image))
    photo = PIL.Image.fromarray(pixels(1, 64, 64, 3))
    jpeg = encoded(photo, "JPEG")
    files = {
        "cat/cmyk.jpg": encoded(photo.convert("CMYK"), "JPEG"),
        "dog/grey.png": encoded(photo.convert("L")),
        "cat/truncated.jpg": jpeg[: len(jpeg) // 2],
        "dog/empty.png": b"",
        "owl/text.jpg": b"no image at all",
        "owl/truncated.png": encoded(photo)[:200],
    }
    for name, content in files.items():
        (folder / "train" / name).write_bytes(content)
