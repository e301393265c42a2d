"""Sets of images from a folder or from the Hub, and one sentence where they cannot be had."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import datasets
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # exported lazily

from updp_hf.errors import AccessError, UPDPError

__all__ = ["AnyDataset", "AnySplits", "from_folder", "from_hub", "streamed"]

AnyDataset: TypeAlias = datasets.Dataset | datasets.IterableDataset
AnySplits: TypeAlias = Mapping[str, AnyDataset]

_SHARDS = 64
_LOCAL = "`--data_dir` for a folder of images, or `--dataset digits` or `--dataset glyphs` for sets made here"


def streamed(splits: datasets.DatasetDict) -> AnySplits:
    """Return each of `splits` as a stream that tells its length, in shards for processes and workers to share."""
    return {name: _stream_of(split) for name, split in splits.items()}


def _stream_of(split: datasets.Dataset) -> datasets.IterableDataset:
    stream = split.to_iterable_dataset(num_shards=min(_SHARDS, max(len(split), 1)))
    name = str(split.split)
    stream.info.splits = datasets.SplitDict({name: datasets.SplitInfo(name, num_examples=len(split))})
    return stream


def from_folder(folder: Path, *, train_split: str, streaming: bool) -> AnySplits:
    """Load a folder of images, or one that `save_to_disk` has written.

    Raises:
        ValueError: it is neither.
    """
    if not folder.is_dir():
        raise UPDPError(f"`--data_dir` is {folder}, which is no folder: give {_LOCAL}.")
    is_dict = (folder / "dataset_dict.json").is_file()
    if is_dict or (folder / "dataset_info.json").is_file():
        saved = datasets.load_from_disk(str(folder))
        splits = saved if is_dict else datasets.DatasetDict({train_split: saved})
        return streamed(splits) if streaming else splits
    try:
        return datasets.load_dataset("imagefolder", data_dir=str(folder), streaming=streaming)
    except (OSError, ValueError, DatasetsError) as error:
        raise UPDPError(
            f"No images could be loaded from {folder} ({_first_line(error)}): expected train/ and validation/, val/ or "
            "test/, and in these a folder of images for each class."
        ) from error


def from_hub(name: str, config_name: str | None, *, streaming: bool) -> AnySplits:
    """Load what `load_dataset` calls `name`.

    Raises:
        AccessError: it could not be reached.
    """
    try:
        return datasets.load_dataset(name, config_name, streaming=streaming)
    # `OSError`: no connection; and `datasets` says the same of what is not there and of what is not for everybody.
    except (OSError, HfHubHTTPError, HFValidationError, httpx.TransportError) as error:
        raise AccessError(
            f"{name} could not be reached, neither on the Hub nor here ({_first_line(error)}): connect, log in if it "
            f"is gated, or give {_LOCAL}."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
