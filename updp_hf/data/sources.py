"""Where the images of a recipe come from: a set made here, a folder, or a name on the Hub."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

import datasets
import numpy as np

from updp_hf.data.columns import check_columns, has_labels, with_classes
from updp_hf.data.loading import AnyDataset, AnySplits, from_folder, from_hub, streamed
from updp_hf.errors import UPDPError

__all__ = ["DataArguments", "Splits", "load_splits"]

MADE_HERE = ("digits", "glyphs")
_HELD_OUT = ("validation", "val", "test")
_TENTH = 0.1
_BUFFER = 10_000
"""Images of a stream among which the next is drawn: about a gigabyte of files of ImageNet's size."""


@dataclass
class DataArguments:
    """Which images to train and to evaluate on. One of `dataset`, `dataset_name` and `data_dir` says where they are."""

    ALTERNATIVES: ClassVar[tuple[tuple[str, ...], ...]] = (("dataset", "dataset_name", "data_dir"),)
    """Groups of fields of which one is to be given."""

    dataset: str | None = field(
        default=None, metadata={"help": "A set that is made here, without the Hub.", "choices": list(MADE_HERE)}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Id on the Hub, such as ILSVRC/imagenet-1k, or whatever else `load_dataset` takes."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of `dataset_name`."})
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "A folder with train/ and validation/, val/ or test/, and in these a folder of images for each "
            "class; or one that `save_to_disk` of datasets has written."
        },
    )
    train_split: str = field(default="train", metadata={"help": "The split to train on."})
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "The split to evaluate on: by default the first of validation, val and test that is there and has "
            "labels, else a tenth of the training images is held out."
        },
    )
    image_column_name: str = field(default="image", metadata={"help": "The column with the images."})
    label_column_name: str = field(default="label", metadata={"help": "The column with the classes."})
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the images as they come, without downloading all beforehand. Of no use for a folder, whose "
            "images would come class by class."
        },
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on so many images, drawn at random; of a stream, on the first ones."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on so many images, drawn at random; of a stream, on the first ones."}
    )
    num_glyphs: int = field(default=20_000, metadata={"help": "Number of images of glyphs."})
    glyph_resolution: int = field(default=64, metadata={"help": "Height and width of glyphs, in pixels."})

    def __post_init__(self) -> None:
        """Check what can be checked without images."""
        (sources,) = self.ALTERNATIVES
        given = [f"`{name}`" for name in sources if getattr(self, name) is not None]
        if len(given) != 1:
            raise UPDPError(
                f"Of `dataset`, `dataset_name` and `data_dir`, {' and '.join(given) or 'none'} is given: give one."
            )
        if self.dataset is not None and self.dataset not in MADE_HERE:
            raise UPDPError(f"`dataset` is {self.dataset!r}, expected one of {list(MADE_HERE)}.")
        for name in ("max_train_samples", "max_eval_samples", "num_glyphs", "glyph_resolution"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UPDPError(f"`{name}` is {value}, expected at least 1.")


class Splits(NamedTuple):
    """Images to train and to evaluate on, each with a column of images and one of class numbers."""

    train: AnyDataset
    held_out: AnyDataset
    labels: list[str]
    num_train_images: int | None
    """None if the source of a stream does not tell; then what `max_train_samples` says, if anything."""


def load_splits(args: DataArguments, seed: int, *, first_step: int = 0) -> Splits:
    """Load the images that `args` name.

    Columns keep their names. A stream is shuffled by `seed + first_step`, otherwise in each epoch, and not divided
    among processes: accelerate does that.

    Args:
        args: which images.
        seed: of everything that is drawn.
        first_step: the step that training goes on from: it is not to begin with the same images of a stream again.

    Raises:
        ValueError: there are no such images, splits or columns, or the labels are no classes.
        AccessError: the Hub was not reached.
    """
    found = {name: _with_known_features(split) for name, split in _load(args, seed).items()}
    if args.train_split not in found:
        raise UPDPError(f"There is no split {args.train_split!r}, but {sorted(found)}: choose with `--train_split`.")
    check_columns(found[args.train_split], args.image_column_name, args.label_column_name)
    train = found[args.train_split]
    held_out = _to_evaluate_on(found, args)
    train, held_out, labels = with_classes(train, held_out, args.label_column_name)
    if held_out is None:
        train, held_out = _parted(train, args, seed)
    count = _length_told(train)
    train = _at_most(train, args.max_train_samples, seed)
    if isinstance(train, datasets.IterableDataset):
        train = train.shuffle(seed=seed + first_step, buffer_size=_BUFFER)
    if args.max_train_samples is not None:
        count = args.max_train_samples if count is None else min(count, args.max_train_samples)
    return Splits(train, _at_most(held_out, args.max_eval_samples, seed), labels, count)


def _load(args: DataArguments, seed: int) -> AnySplits:
    if args.dataset is not None:
        splits = _made_here(args, seed)
        return streamed(splits) if args.streaming else splits
    if args.data_dir is not None:
        return from_folder(Path(args.data_dir), train_split=args.train_split, streaming=args.streaming)
    assert args.dataset_name is not None
    return from_hub(args.dataset_name, args.dataset_config_name, streaming=args.streaming)


def _made_here(args: DataArguments, seed: int) -> datasets.DatasetDict:
    if args.dataset == "digits":
        from updp_hf.data.made_here.digits import digits  # scikit-learn is not installed everywhere

        return digits(seed)
    from updp_hf.data.made_here.glyphs import glyphs

    return glyphs(args.num_glyphs, args.glyph_resolution, seed)


def _to_evaluate_on(found: AnySplits, args: DataArguments) -> AnyDataset | None:
    """Return the images to evaluate on, None if no split is for that."""
    if args.eval_split is not None:
        if args.eval_split not in found:
            raise UPDPError(f"There is no split {args.eval_split!r}, but {sorted(found)}: choose with `--eval_split`.")
        check_columns(found[args.eval_split], args.image_column_name, args.label_column_name)
        if not has_labels(found[args.eval_split], args.label_column_name):
            raise UPDPError(f"The images of {args.eval_split!r} have no labels: choose another with `--eval_split`.")
        return found[args.eval_split]
    names = (name for name in _HELD_OUT if name in found and name != args.train_split)
    return next((found[name] for name in names if has_labels(found[name], args.label_column_name)), None)


def _parted(train: AnyDataset, args: DataArguments, seed: int) -> tuple[AnyDataset, AnyDataset]:
    """Return nine tenths of the images and the tenth that is held out."""
    if isinstance(train, datasets.IterableDataset):
        raise UPDPError(
            "There is no split to evaluate on, and a stream cannot be parted: choose with `--eval_split`, or do "
            "without `--streaming`."
        )
    if len(train) < 2:
        raise UPDPError(f"There are {len(train)} images, of which none can be held out: give more.")
    parts = train.train_test_split(_TENTH, seed=seed, stratify_by_column=_stratum(train, args.label_column_name))
    return parts["train"], parts["test"]


def _stratum(dataset: datasets.Dataset, column: str) -> str | None:
    """Return `column` if a tenth of each of its classes can be held out, None if some are too few."""
    counts = np.unique(dataset.with_format("numpy")[column][:], return_counts=True)[1]
    return column if counts.min() >= 2 and len(counts) <= int(len(dataset) * _TENTH) else None


def _with_known_features(dataset: AnyDataset) -> AnyDataset:
    """Return `dataset`; of a stream that does not tell its columns, the first rows are read."""
    if isinstance(dataset, datasets.IterableDataset) and dataset.features is None:
        return dataset._resolve_features()
    return dataset


def _length_told(dataset: AnyDataset) -> int | None:
    """Return the number of images; of a stream what its source says, None if it says nothing."""
    if isinstance(dataset, datasets.Dataset):
        return len(dataset)
    told = (dataset.info.splits or {}).get(str(dataset.split))
    return int(told.num_examples) if told is not None and told.num_examples else None


def _at_most(dataset: AnyDataset, count: int | None, seed: int) -> AnyDataset:
    if count is None:
        return dataset
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.take(count)
    return dataset.shuffle(seed=seed).select(range(min(count, len(dataset))))
