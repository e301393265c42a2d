"""How good a choice of sites is: the predictions of one gated network in which just these are closed."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from transformers.utils import logging

from updp_hf.core.gates.contexts import evaluation
from updp_hf.core.plan.budget import Choice
from updp_hf.core.search import Fitness
from updp_hf.errors import UPDPError
from updp_hf.surgery.corrections import recalibrate_batch_norms_
from updp_hf.surgery.gate import close_only_
from updp_hf.surgery.model_io import check_batches, logits_of, model_inputs

__all__ = [
    "Score",
    "ScoreHistory",
    "agreed",
    "closeness",
    "divergence",
    "label_fit",
    "labels_of",
    "log_probabilities",
    "spread",
]

logger = logging.get_logger(__name__)

Score = Callable[[Choice], float]
"""From a choice of sites to how good it is, the higher the better."""
T = TypeVar("T")


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
    `recipes/benchmark_selectors.py` shows.

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


def spread(score: Score, processes: PartialState | None = None) -> Fitness:
    """Return the fitness that scores several choices; with `processes`, each of them scores its share.

    Every choice is scored whole by one process, so that as many processes as there are find the same numbers.
    """
    if processes is None or processes.num_processes == 1:
        return lambda choices: [score(choice) for choice in choices]

    def fitness(choices: Sequence[Choice]) -> list[float]:
        count, rank = processes.num_processes, processes.process_index
        mine = [(index, score(choices[index])) for index in range(rank, len(choices), count)]
        scores = dict(gather_object(mine))
        return [scores[index] for index in range(len(choices))]

    return fitness


def agreed(function: Callable[[], T], processes: PartialState | None = None) -> T:
    """Return what `function` returns on the main process, which alone calls it, or raise the error that it raises.

    The others wait for it, and would wait for ever if they were not told of an error.
    """
    if processes is None or processes.num_processes == 1:
        return function()
    told: Any = None
    if processes.is_main_process:
        try:
            told = function()
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            told = error
    (told,) = broadcast_object_list([told])
    if isinstance(told, Exception):
        raise told
    return told


class ScoreHistory:
    """A fitness that asks for each choice once, remembers, and shows how far the search is.

    With a `file`, each score is a line of it as soon as it is known: a search that was interrupted goes on from there.

    Args:
        fitness: what scores.
        subject: JSON values that tell what is scored; a file about another subject is refused.
        file: where the scores are kept, in JSON Lines; nowhere by default.
        processes: with several, the main one reads and writes the file.
        disable_tqdm: whether to show no progress bar.

    Raises:
        ValueError: the file is about something else.
    """

    def __init__(
        self,
        fitness: Fitness,
        subject: Mapping[str, Any] | None = None,
        *,
        file: str | os.PathLike[str] | None = None,
        processes: PartialState | None = None,
        disable_tqdm: bool = False,
    ):
        self.scores: dict[Choice, float] = {}
        self._fitness = fitness
        self._file = None if file is None else Path(file)
        self._at_once = 1 if processes is None else processes.num_processes
        self._is_main = processes is None or processes.is_main_process
        self._disable_tqdm = disable_tqdm or not self._is_main
        if self._file is not None:
            self.scores = agreed(lambda: self._read(self._file, dict(subject or {})), processes)  # type: ignore[arg-type]

    def __call__(self, choices: Sequence[Choice]) -> list[float]:
        """Return the score of each choice."""
        new = [choice for choice in dict.fromkeys(choices) if choice not in self.scores]
        with logging.tqdm(total=len(new), desc="Search", disable=self._disable_tqdm or not new, leave=False) as bar:
            for start in range(0, len(new), self._at_once):
                scored = new[start : start + self._at_once]
                for choice, value in zip(scored, self._fitness(scored), strict=True):
                    self.scores[choice] = value
                    self._append(choice, value)
                bar.update(len(scored))
                bar.set_postfix_str(f"best {max(self.scores.values()):.4g}")
        return [self.scores[choice] for choice in choices]

    def _read(self, file: Path, subject: dict[str, Any]) -> dict[Choice, float]:
        head, *lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else [""]
        if not lines:  # there is no file, or not even its first line was finished
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(subject, sort_keys=True) + "\n", encoding="utf-8")
            return {}
        if head != json.dumps(subject, sort_keys=True):
            raise UPDPError(
                f"{file} holds the scores of another search ({head[:200]}), expected {json.dumps(subject)[:200]}: "
                "start without resuming, or in another folder."
            )
        *whole, cut = lines  # what follows the last newline was being written when the search was interrupted
        if cut:
            file.write_text("\n".join([head, *whole, ""]), encoding="utf-8")
        found = [json.loads(line) for line in whole]
        logger.info("The search goes on after %d choices that were scored before.", len(found))
        return {tuple(choice): value for choice, value in found}

    def _append(self, choice: Choice, value: float) -> None:
        if self._file is None or not self._is_main:
            return
        with self._file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps([list(choice), value]) + "\n")
