"""Parts of a training set: a few images to calibrate with, and the others."""

from typing import Any

import datasets
import torch
from torch.utils.data import IterableDataset, Subset

from updp_hf.data.images import SEED, ImageDataset, ImageSubset
from updp_hf.errors import UPDPError

__all__ = ["sample_and_rest"]


def sample_and_rest(dataset: Any, count: int, seed: int) -> tuple[Any, Any]:
    """Return the first `count` items of a shuffle of `dataset`, fixed by `seed`, and all others.

    Of an `ImageDataset` and of an `image_stream` the sample is plain: not augmented if they know how, and not mixed.

    Of a stream of `datasets` the sample is its beginning, and the rest is the whole stream: processes and workers
    divide it by shards, so none could tell which images are left. What is trained on the rest is thus trained on the
    sample too, which matters for small sets only.

    Raises:
        ValueError: there is no dataset, or it is a stream of another kind.
    """
    if isinstance(dataset, datasets.IterableDataset):
        plain = getattr(dataset, "plain", dataset)
        names = [name for name in (SEED,) if name in (plain.column_names or [name])]
        return plain.take(count).remove_columns(names), dataset
    if dataset is None or isinstance(dataset, IterableDataset):
        raise UPDPError(
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
