"""Images and labels for a loader: each augmented by draws of its own, broken ones replaced and counted."""

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers.utils import logging

from updp_hf.data.randomness import random_states_kept, seed_generators, seed_of
from updp_hf.data.reading import BrokenImageError, describe_image, read_image
from updp_hf.errors import UPDPError

__all__ = ["NO_LABEL", "SEED", "ImageDataset", "ImageSubset", "Transform", "check_broken", "warn_of_broken"]

logger = logging.get_logger(__name__)

Transform = Callable[[PIL.Image.Image], Tensor]

NO_LABEL = -100
"""The label of an image that is not to count: torch's cross entropy leaves it out."""
SEED = "seed"
"""Under this name an item of a training set carries the seed by which it is to be mixed with others."""
_UNREAD, _INTACT, _BROKEN = range(3)
_WARNINGS = 5
_ENOUGH, _TOLERATED = 1000, 0.1


class ImageDataset(Dataset[dict[str, Any]]):
    """Images and labels of a `datasets.Dataset`.

    An item is `{"pixel_values": Tensor, "labels": int}`. What its transform draws depends on `seed`, the epoch and
    the index of the image alone: any number of workers and of processes, and a resumed run, draw the same, and the
    global generators are left as they were.

    A broken image is counted, once however often it is read, and a warning names the first few. In training another
    takes its place, drawn by the same rule. In evaluation it becomes a black image with the label -100, which counts
    neither for the loss nor for the accuracy.

    Args:
        dataset: has a column of images and one of class numbers.
        transform: makes a tensor of an RGB image.
        image_column: name of the former.
        label_column: name of the latter.
        seed: of the augmentation.
        replace_broken: whether these images are for training.
        carry_seeds: whether an item says under "seed" how to mix it: see `updp_hf.data.augmentation.Mix`.
        plain_transform: that of `plain`, by default `transform`.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        transform: Transform,
        *,
        image_column: str = "image",
        label_column: str = "label",
        seed: int = 0,
        replace_broken: bool = False,
        carry_seeds: bool = False,
        plain_transform: Transform | None = None,
    ):
        columns = dataset.with_format(None).select_columns([image_column, label_column])
        self._dataset = columns.cast_column(image_column, datasets.Image(decode=False))
        self._transform, self._plain_transform = transform, plain_transform
        self._columns = (image_column, label_column)
        self._seed, self._replace_broken, self._carry_seeds = seed, replace_broken, carry_seeds
        # In shared memory, for the loader's workers are processes of their own, and may outlive an epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._states = torch.full((len(dataset),), _UNREAD, dtype=torch.uint8).share_memory_()

    @property
    def info(self) -> datasets.DatasetInfo:
        """What is known of the set."""
        return self._dataset.info

    @property
    def split(self) -> Any:
        """The name of this part of the set."""
        return self._dataset.split

    @property
    def broken(self) -> int:
        """How many images were found broken by this process and the workers of its loaders."""
        return int((self._states == _BROKEN).sum())

    @property
    def plain(self) -> "ImageDataset":
        """The same images, not to be mixed and with `plain_transform`; broken ones are counted with those here."""
        plain = ImageDataset(
            self._dataset,
            self._plain_transform or self._transform,
            image_column=self._columns[0],
            label_column=self._columns[1],
            seed=self._seed,
            replace_broken=self._replace_broken,
        )
        plain._states = self._states
        return plain

    def set_epoch(self, epoch: int) -> None:
        """Draw other augmentations than in other epochs, in workers that are running too."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return the items of a whole batch, which a loader asks for."""
        rows = self._dataset[list(indices)]
        with random_states_kept():
            return [self._item(*row) for row in zip(indices, *(rows[name] for name in self._columns), strict=True)]

    def _item(self, index: int, value: Any, label: int) -> dict[str, Any]:
        seed = seed_of(self._seed, int(self._epoch), index % len(self))
        image = self._read(index, value)
        if image is None:
            image, label = self._another(seed) if self._replace_broken else (_black(), NO_LABEL)
        seed_generators(seed)
        item = {"pixel_values": self._transform(image), "labels": label}
        return {**item, SEED: seed} if self._carry_seeds else item

    def _read(self, index: int, value: Any) -> PIL.Image.Image | None:
        """Return the image, None if it is broken."""
        was_read = bool(self._states[index])
        try:
            image = read_image(value)
        except BrokenImageError as error:
            self._states[index] = _BROKEN
            if not was_read:
                warn_of_broken(self.broken, f"{error} (row {index})")
                check_broken(self.broken, int((self._states != _UNREAD).sum()))
            return None
        self._states[index] = _INTACT
        return image

    def _another(self, seed: int) -> tuple[PIL.Image.Image, int]:
        """Return an intact image and its label, drawn by `seed`.

        Raises:
            ValueError: there is none.
        """
        for index in torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist():
            row = self._dataset[index]
            image = self._read(index, row[self._columns[0]])
            if image is not None:
                return image, row[self._columns[1]]
        raise UPDPError(
            f"None of the {len(self)} images can be read, the last of them {describe_image(row[self._columns[0]])}: "
            "is the data complete, and is the column that of the images?"
        )


class ImageSubset(Subset[dict[str, Any]]):
    """Some items of an `ImageDataset`, which is told the epoch through it."""

    dataset: ImageDataset

    def set_epoch(self, epoch: int) -> None:
        """Tell the whole set: see `ImageDataset.set_epoch`."""
        self.dataset.set_epoch(epoch)


def warn_of_broken(count: int, what: str) -> None:
    """Warn of a broken image, the `count`-th, if it is one of the first few."""
    if count <= _WARNINGS:
        end = " Further ones are counted and not named." if count == _WARNINGS else ""
        logger.warning(f"{what}. The run goes on without it.{end}")


def check_broken(broken: int, read: int) -> None:
    """Refuse to go on with a set of which too much is broken.

    Raises:
        ValueError: of at least 1,000 images read, more than a tenth are broken.
    """
    if read >= _ENOUGH and broken > _TOLERATED * read:
        raise UPDPError(
            f"{broken} of {read} images read are broken, expected at most a tenth: is the data complete, and is the "
            "column that of the images?"
        )


def _black() -> PIL.Image.Image:
    return PIL.Image.new("RGB", (256, 256))
