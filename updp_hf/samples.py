"""Parts of a training set."""

from typing import Any

import datasets
import torch
from torch.utils.data import IterableDataset, Subset

from updp_hf.data.images import SEED, ImageDataset, ImageSubset

__all__ = ["sample_and_rest"]


def sample_and_rest(dataset: Any, count: int, seed: int) -> tuple[Any, Any]:
    """Return the first `count` items of a shuffle of `dataset`, fixed by `seed`, and all others.

    Of an `ImageDataset` the sample is plain: not augmented if it knows how, and not mixed. Of a stream of `datasets`
    the sample is its beginning, unmixed, and the rest is what follows. What follows keeps the order of its shards; if
    it is shuffled through a buffer, its later epochs begin otherwise and may show some images of the sample.

    Raises:
        ValueError: there is no dataset, or it is a stream of another kind.
    """
    if isinstance(dataset, datasets.IterableDataset):
        names = [name for name in (SEED,) if name in (dataset.column_names or [name])]
        return dataset.take(count).remove_columns(names), dataset.skip(count)
    if dataset is None or isinstance(dataset, IterableDataset):
        raise ValueError(
            f"`train_dataset` is {type(dataset).__name__}, but calibration reads some images beforehand: pass a "
            "map-style dataset or a stream of `datasets`, or gate and calibrate the model yourself before building "
            "the trainer."
        )
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    if isinstance(dataset, datasets.Dataset):
        return dataset.select(order[:count]), dataset.select(sorted(order[count:]))
    if isinstance(dataset, ImageDataset):
        return ImageSubset(dataset.plain, order[:count]), ImageSubset(dataset, sorted(order[count:]))
    return Subset(dataset, order[:count]), Subset(dataset, sorted(order[count:]))
