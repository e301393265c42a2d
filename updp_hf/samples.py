"""Parts of a training set."""

from typing import Any

import datasets
import torch
from torch.utils.data import IterableDataset, Subset

__all__ = ["sample_and_rest"]


def sample_and_rest(dataset: Any, count: int, seed: int) -> tuple[Any, Any]:
    """Return the first `count` items of a shuffle of `dataset`, fixed by `seed`, and all others.

    Raises:
        ValueError: there is no dataset, or it cannot be read by index.
    """
    if dataset is None or isinstance(dataset, IterableDataset | datasets.IterableDataset):
        raise ValueError(
            f"`train_dataset` is {type(dataset).__name__}, but calibration reads some images by index: pass a "
            "map-style dataset, or gate and calibrate the model yourself before building the trainer."
        )
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    if isinstance(dataset, datasets.Dataset):
        return dataset.select(order[:count]), dataset.select(sorted(order[count:]))
    return Subset(dataset, order[:count]), Subset(dataset, sorted(order[count:]))
