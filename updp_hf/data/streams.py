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
    plain_transform: Transform | None = None,
) -> datasets.IterableDataset:
    """Return a stream of `{"pixel_values": Tensor, "labels": int}`, without the images that are broken.

    Its attribute `plain` is a stream of the same images in the order of the first epoch, not to be mixed and with
    `plain_transform`; streams derived from it (`shuffle`, `map`...) do not have it.

    A stream has no indices, so augmentation draws from the global generators of whichever process reads: another
    number of workers draws otherwise, unlike `ImageDataset`. Nor has it a place to go on from: what comes before would
    have to be read again. A recipe that is resumed goes on with the stream in another order, hence with other images,
    and does not end with the same weights to the bit; a supernet that is resumed begins the stream again.

    Args:
        dataset: has a column of images and one of class numbers.
        transform: makes a tensor of an RGB image.
        tally: counts the images.
        image_column: name of the column of images.
        label_column: name of the column of class numbers.
        carry_seeds: whether an item says under "seed" how to mix it: see `updp_hf.data.augmentation.Mix`.
        plain_transform: that of `plain`, by default `transform`.
    """
    names = [image_column, label_column]
    columns = dataset.select_columns(names).cast_column(image_column, datasets.Image(decode=False))

    def read_with(transform: Transform, carry_seeds: bool) -> datasets.IterableDataset:
        reader = _reader(transform, tally, image_column, label_column, carry_seeds)
        return columns.map(reader, batched=True, batch_size=_BATCH, remove_columns=names)

    stream = read_with(transform, carry_seeds)
    stream.plain = read_with(plain_transform or transform, False)
    return stream


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
