"""Accuracy as `evaluate` metrics that need no download."""

from typing import Any

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction

from updp_hf.errors import UPDPError

__all__ = ["Accuracy", "TopKAccuracy", "compute_accuracy", "top_k_accuracy"]

_CITATION = ""
_NO_LABEL = -100  # as in torch's cross entropy
_INPUTS = "predictions: logits of shape (images, classes). references: labels of shape (images,)."


def top_k_accuracy(logits: Any, labels: Any, k: int = 1) -> float:
    """Return the fraction of images whose label is among the `k` classes with the largest logits.

    With fewer than `k` classes every image counts as right. Of equal logits, those of lower class number come first.
    Images with the label -100, such as those that could not be read, do not count.

    Raises:
        ValueError: the shapes are not (images, classes) and (images,), or there are no images that count.
    """
    scores, targets = np.asarray(logits), np.asarray(labels)
    if scores.ndim != 2 or targets.shape != scores.shape[:1] or not (targets != _NO_LABEL).any():
        raise UPDPError(
            f"Logits have shape {scores.shape} and labels {targets.shape}, expected (images, classes) and (images,) "
            "with at least one image whose label is not -100."
        )
    scores, targets = scores[targets != _NO_LABEL], targets[targets != _NO_LABEL]
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return float((best == targets[:, None]).any(axis=1).mean())


class TopKAccuracy(evaluate.Metric):
    """The fraction of images whose label is among the five classes with the largest logits."""

    k = 5
    key = "top5_accuracy"

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {self.key: top_k_accuracy(predictions, references, self.k)}


class Accuracy(TopKAccuracy):
    """The fraction of images whose label has the largest logit."""

    k = 1
    key = "accuracy"


def compute_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return top-1 as `accuracy` and top-5 as `top5_accuracy`; for the Trainer's `compute_metrics`."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {metric.key: top_k_accuracy(logits, prediction.label_ids, metric.k) for metric in (Accuracy, TopKAccuracy)}
