"""What the tests of recipes share."""

import PIL.Image
import pytest
import torch


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of images of two classes, one of them broken."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 16), ("validation", 4)):
        for index, name in enumerate(("dark", "light")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(100, (20, 24, 3), generator=generator, dtype=torch.uint8) + 150 * index
                PIL.Image.fromarray(pixels.numpy()).save(folder / split / name / f"{number}.png")
    (folder / "train" / "dark" / "broken.png").write_bytes(b"no image")
    return folder
