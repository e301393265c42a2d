"""Writes λ into the gates as training goes on, for any Trainer."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from updp_hf.core.gates.gate import set_lambda_
from updp_hf.core.schedule import Schedule, ramp
from updp_hf.errors import UPDPError
from updp_hf.surgery.gate import plan_of

__all__ = ["UPDPCallback"]

logger = logging.get_logger(__name__)


class UPDPCallback(TrainerCallback):
    """Anneal the gates of a gated model: λ follows `schedule` over the steps of training.

    λ is a function of `state.global_step` alone, so a resumed run and all processes agree without talking. Until λ
    is 1 the network is not the pruned one, so what was the best model so far is forgotten at the end of the ramp.

    With the stock `Trainer`, do not resume or load the best model at the end: it loads ViT and DeiT by names that it
    did not save them under, and only warns. `UPDPTrainer` loads strictly.

    Args:
        schedule: from progress in [0, 1] to λ; by default `ramp()`, linear over the first tenth of training.

    Example:
        >>> gate_(model, plan)
        >>> calibrate_(model, batches)
        >>> Trainer(model=model, args=args, train_dataset=dataset, callbacks=[UPDPCallback()]).train()
        >>> merged = merge(model)
    """

    def __init__(self, schedule: Schedule | None = None):
        self.schedule = schedule or ramp()

    def lambda_at(self, step: int, total_steps: int) -> float:
        """Return λ during the optimizer step number `step`, counted from 0."""
        return self.schedule(min(step / max(total_steps, 1), 1.0))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Set λ for the step that comes, so that an evaluation before it sees the right network."""
        plan_of(model)  # says what to do if the model is not gated
        if self.lambda_at(state.max_steps - 1, state.max_steps) < 1.0:
            raise UPDPError(
                f"λ is still {self.lambda_at(state.max_steps - 1, state.max_steps):g} in the last of {state.max_steps} "
                "steps, so the pruned network would never be trained: end the ramp earlier."
            )
        self._write(model, state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Set λ, once per optimizer step."""
        value = self._write(model, state)
        was = self.lambda_at(state.global_step - 1, state.max_steps) if state.global_step else 0.0
        if value == 1.0 and was < 1.0:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
            logger.info("All gates are closed from step %d on.", state.global_step)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Do not let early stopping end the ramp: the metric falls on the way, and an open net cannot be merged."""
        if control.should_training_stop and self.lambda_at(max(state.global_step - 1, 0), state.max_steps) < 1.0:
            control.should_training_stop = False
            logger.info("Early stopping is put off until all gates are closed.")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Leave the gates at the λ that belongs to where training ended."""
        self._write(model, state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add λ to what is logged."""
        if logs is not None and "loss" in logs:
            logs["lambda"] = self.lambda_at(max(state.global_step - 1, 0), state.max_steps)

    def _write(self, model: nn.Module, state: TrainerState) -> float:
        set_lambda_(model, self.lambda_at(state.global_step, state.max_steps))
        return self.lambda_at(state.global_step, state.max_steps)
