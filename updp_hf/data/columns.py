"""Which columns of a set hold images and classes, and class numbers for all labels."""

from typing import Any

import datasets

from updp_hf.data.loading import AnyDataset
from updp_hf.errors import UPDPError

__all__ = ["check_columns", "has_labels", "with_classes"]

_MOST_CLASSES = 1000
"""Class numbers below this are believed, however few the images."""


def check_columns(dataset: AnyDataset, image_column: str, label_column: str) -> None:
    """Refuse a set without these columns.

    Raises:
        ValueError: one is not there, or holds something else; the sentence says which could be meant.
    """
    features = dataset.features or {}
    columns = (
        ("image_column_name", image_column, _could_be_images),
        ("label_column_name", label_column, _could_be_classes),
    )
    for option, name, could_be in columns:
        if name in features and could_be(features[name]):
            continue
        meant = [column for column, feature in features.items() if could_be(feature)]
        found = f"is {features[name]}" if name in features else f"is not among {sorted(features)}"
        hint = f"{' or '.join(map(repr, meant))} could be meant: set" if meant else "None could be meant: check"
        raise UPDPError(f"The column {name!r} {found}. {hint} `--{option}`.")


def _could_be_images(feature: Any) -> bool:
    return isinstance(feature, datasets.Image)


def _could_be_classes(feature: Any) -> bool:
    if isinstance(feature, datasets.ClassLabel):
        return True
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint", "string", "large_string"))


def has_labels(dataset: AnyDataset, label_column: str) -> bool:
    """Return whether any image has a label: ImageNet's test images have -1 for one."""
    if label_column not in (dataset.features or {}):
        return False
    if isinstance(dataset, datasets.IterableDataset):
        first = next(iter(dataset.select_columns([label_column])), {label_column: None})
        return first[label_column] not in (None, -1)
    return any(label not in (None, -1) for label in dataset.unique(label_column))


def with_classes(
    train: AnyDataset, held_out: AnyDataset | None, column: str
) -> tuple[AnyDataset, AnyDataset | None, list[str]]:
    """Return both with class numbers for labels, and the names of the classes.

    Raises:
        ValueError: some labels are no classes, or both have different classes.
    """
    parts = [part for part in (train, held_out) if part is not None]
    feature = train.features[column]
    values = {label for part in parts if isinstance(part, datasets.Dataset) for label in part.unique(column)}
    wrong = sorted((label for label in values if label is None or (isinstance(label, int) and label < 0)), key=str)
    if wrong:
        raise UPDPError(f"In the column {column!r} some images have {wrong[0]} for a label: take them out.")
    if isinstance(feature, datasets.ClassLabel):
        for part in parts:
            _check_classes(part.features[column], feature)
        return train, held_out, list(feature.names)
    if any(isinstance(part, datasets.IterableDataset) for part in parts):
        raise UPDPError(
            f"The column {column!r} is {feature}, so the classes of a stream are not known: do without `--streaming`."
        )
    is_number = all(isinstance(label, int) for label in values)
    if is_number and (greatest := max(values, default=0)) >= max(len(train), _MOST_CLASSES):
        raise UPDPError(
            f"The column {column!r} goes up to {greatest} for {len(train)} images, which are no class numbers: set "
            "`--label_column_name`."
        )
    names = [str(label) for label in (range(max(values, default=-1) + 1) if is_number else sorted(values))]
    train, *others = (part.cast_column(column, datasets.ClassLabel(names=names)) for part in parts)
    return train, next(iter(others), None), names


def _check_classes(found: Any, expected: datasets.ClassLabel) -> None:
    if not isinstance(found, datasets.ClassLabel) or list(found.names) != list(expected.names):
        raise UPDPError(
            f"The images to evaluate on have the classes {getattr(found, 'names', found)}, those to train on "
            f"{expected.names}: both must have the same, in the same order."
        )
