"""How good a choice of sites is: the predictions of one gated network in which just these are closed."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from updp_hf.core.gates.contexts import evaluation
from updp_hf.core.plan.budget import Choice
from updp_hf.errors import UPDPError
from updp_hf.surgery.corrections import recalibrate_batch_norms_
from updp_hf.surgery.gate import close_only_
from updp_hf.surgery.model_io import check_batches, logits_of, model_inputs

__all__ = [
    "Score",
    "closeness",
    "divergence",
    "label_fit",
    "labels_of",
    "log_probabilities",
]

Score = Callable[[Choice], float]
"""From a choice of sites to how good it is, the higher the better."""


def closeness(gated: nn.Module, batches: Iterable[Mapping[str, Any] | Tensor]) -> Score:
    """Return the score -KL(open ‖ closed) in nats, the mean over the images; no labels are needed.

    Each choice is closed as the pruned sides stand; they want to be calibrated.
    """
    images = check_batches(batches)
    close_only_(gated, ())
    expected = log_probabilities(gated, images)

    def score(choice: Choice) -> float:
        close_only_(gated, choice)
        found = log_probabilities(gated, images)
        return _worst_if_nan(-divergence(found, expected))

    return score


def label_fit(gated: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Score:
    """Return the score -cross entropy in nats, the mean over the images, of a supernet's choice on labelled images.

    The running statistics of all BatchNorms are taken anew for each choice, from the same images. The loss tells
    choices apart that have the same accuracy, and agrees better with what training gives, as
    `recipes.benchmarks.selectors` shows.

    Raises:
        ValueError: the batches have no labels.
    """
    images = check_batches(batches)
    labels = torch.cat([labels_of(batch) for batch in images])

    def score(choice: Choice) -> float:
        close_only_(gated, choice)
        recalibrate_batch_norms_(gated, images)
        return _worst_if_nan(-float(F.nll_loss(log_probabilities(gated, images).cpu(), labels.cpu())))

    return score


def _worst_if_nan(score: float) -> float:
    """Return a score that can be compared, also of a network whose values overflow once it is closed."""
    return -math.inf if math.isnan(score) else score


def labels_of(batch: Any) -> Tensor:
    """Return the labels `(images,)` of a batch.

    Raises:
        ValueError: it has none.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        raise UPDPError("The images have no labels, by which the choices are scored: pass batches with `labels`.")
    return labels


@torch.no_grad()
def log_probabilities(model: nn.Module, images: Sequence[Any]) -> Tensor:
    """Return the logarithms of the probabilities that `model` gives each class: (images, classes), in float64."""
    with evaluation(model):
        logits = [logits_of(model, model_inputs(model, batch)).double() for batch in images]
    return F.log_softmax(torch.cat(logits), -1)


def divergence(found: Tensor, expected: Tensor) -> float:
    """Return the mean of KL(expected ‖ found) over the images, in nats, of what `log_probabilities` gave for each."""
    return float(F.kl_div(found, expected, reduction="batchmean", log_target=True))
