"""Handwritten digits that come with scikit-learn: the smallest set of real images."""

import datasets
import numpy as np

from updp_hf.errors import MissingLibraryError

__all__ = ["digits"]


def digits(seed: int = 0) -> datasets.DatasetDict:
    """Return the 1,797 digits of scikit-learn, 8×8 and grey, a quarter of each class held out in `test`.

    Both splits have `image` and `label`; `seed` says which images are held out.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingLibraryError(
            "The digits come with scikit-learn, which is not installed: pip install 'updp-hf[recipes]'."
        ) from error
    found = load_digits()
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(name) for name in found.target_names])}
    )
    images = [np.uint8(image * 255 / 16) for image in found.images]  # (8, 8) with values 0 to 16
    data = datasets.Dataset.from_dict({"image": images, "label": found.target}, features=features)
    return data.train_test_split(test_size=0.25, stratify_by_column="label", seed=seed)
