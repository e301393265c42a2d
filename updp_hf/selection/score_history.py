"""Scores that are remembered, in a file if wanted, so that a search that was interrupted goes on."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers.utils import logging

from updp_hf.core.plan.budget import Choice
from updp_hf.core.search import Fitness
from updp_hf.errors import UPDPError
from updp_hf.processes import on_main_process

__all__ = ["ScoreHistory"]

logger = logging.get_logger(__name__)


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
            self.scores = on_main_process(lambda: self._read(self._file, dict(subject or {})), processes)  # type: ignore[arg-type]

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
