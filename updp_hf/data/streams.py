"""Images and labels from a stream: augmented, broken ones left out and counted."""

from collections.abc import Callable
from typing import Any

import datasets
import torch

from updp_hf.data.images import SEED, Transform, check_broken, warn_of_broken
from updp_hf.data.reading import BrokenImageError, read_image

__all__ = ["Tally", "image_stream"]

_BATCH = 16
_WORKERS = 1024


class Tally:
    """How many images of a stream were read, and how many were broken, by this process and the workers of its loaders.

    An image that is read in several epochs counts in each.
    """

    def __init__(self) -> None:
        # One row for each worker, so that none writes where another does.
        self._counts = torch.zeros(_WORKERS + 1, 2, dtype=torch.int64).share_memory_()

    @property
    def read(self) -> int:
        """The images read, broken ones among them."""
        return int(self._counts[:, 0].sum())

    @property
    def broken(self) -> int:
        """The broken images."""
        return int(self._counts[:, 1].sum())

    def add(self, *, broken: bool) -> None:
        """Count one image."""
        worker = torch.utils.data.get_worker_info()
        row = self._counts[0 if worker is None else 1 + worker.id % _WORKERS]
        row += torch.tensor([1, int(broken)])


def image_stream(
    dataset: datasets.IterableDataset,
    transform: Transform,
    tally: Tally,
    *,
    image_column: str = "image",
    label_column: str = "label",
    carry_seeds: bool = False,
) -> datasets.IterableDataset:
    """Return a stream of `{"pixel_values": Tensor, "labels": int}`, without the images that are broken.

    A stream has no indices, so augmentation draws from the global generators of whichever process reads: another
    number of workers, or a resumed run, draws otherwise, unlike `ImageDataset`.

    Args:
        dataset: has a column of images and one of class numbers.
        transform: makes a tensor of an RGB image.
        tally: counts the images.
        image_column: name of the column of images.
        label_column: name of the column of class numbers.
        carry_seeds: whether an item says under "seed" how to mix it: see `updp_hf.data.augmentation.Mix`.
    """
    columns = dataset.select_columns([image_column, label_column])
    return columns.cast_column(image_column, datasets.Image(decode=False)).map(
        _reader(transform, tally, image_column, label_column, carry_seeds),
        batched=True,
        batch_size=_BATCH,
        remove_columns=[image_column, label_column],
    )


def _reader(
    transform: Transform, tally: Tally, image_column: str, label_column: str, carry_seeds: bool
) -> Callable[[dict[str, list[Any]]], dict[str, list[Any]]]:
    def read(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"pixel_values": [], "labels": []}
        for value, label in zip(rows[image_column], rows[label_column], strict=True):
            try:
                image = read_image(value)
            except BrokenImageError as error:
                tally.add(broken=True)
                warn_of_broken(tally.broken, str(error))
                check_broken(tally.broken, tally.read)
                continue
            tally.add(broken=False)
            found["pixel_values"].append(transform(image))
            found["labels"].append(label)
        if carry_seeds:
            found[SEED] = torch.randint(2**62, (len(found["labels"]),)).tolist()
        return found

    return read
