"""The Trainer over a gated model: what pruning and the training of a supernet have in common."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import logging

from updp_hf.core.cost import count_macs
from updp_hf.core.gates.contexts import open_gates
from updp_hf.core.gates.gate import is_gated
from updp_hf.data.callbacks import EpochCallback
from updp_hf.errors import UPDPError
from updp_hf.surgery.model_io import example_inputs_of
from updp_hf.training.arguments import UPDPTrainingArguments
from updp_hf.training.averaging import WeightAverage
from updp_hf.training.batch_norms import share_buffers_, synchronized_batch_norms
from updp_hf.training.checkpoints import last_checkpoint, load_checkpoint_, save_checkpoint, whole_or_none
from updp_hf.training.dataloaders import nothing_dropped, read_by_each_process, whole_or_nothing
from updp_hf.training.distillation import distillation_losses

__all__ = ["GatedTrainer"]

logger = logging.get_logger(__name__)


class GatedTrainer(Trainer):
    """Train a gated model: strict checkpoints, statistics of one process, averaged weights, the loss of a teacher."""

    args: UPDPTrainingArguments

    def __init__(self, model: nn.Module, args: UPDPTrainingArguments, **kwargs: Any):
        if not isinstance(args, UPDPTrainingArguments):
            raise TypeError(f"`args` is {type(args).__name__}, expected UPDPTrainingArguments.")
        if args.n_gpu > 1:
            raise UPDPError(
                f"{args.n_gpu} GPUs are visible to one process, which would use DataParallel: start the script with "
                "`accelerate launch`."
            )
        super().__init__(model=model, args=args, **kwargs)
        self.add_callback(EpochCallback())
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UPDPError(
                "FSDP or DeepSpeed is on, but gates and merging need whole parameters: run with plain data parallelism "
                "(`accelerate launch --multi_gpu`)."
            )
        with open_gates(model):
            self._macs = count_macs(model, example_inputs_of(model))
        self._average: WeightAverage | None = None

    @property
    def image_key(self) -> str:
        """The name under which a batch holds the images."""
        return str(getattr(self.model, "main_input_name", "pixel_values"))

    # training

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train: see `Trainer.train`. All processes end with the same weights, averaged ones if asked for."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise UPDPError(f"There is no checkpoint in {self.args.output_dir} to resume from: start without.")
        if self.args.ema_decay is not None:
            self._average = WeightAverage(self.model, self.args.ema_decay)
            self.add_callback(self._average)
        try:
            output = self._train(resume_from_checkpoint or None, **kwargs)
            if self._average is not None:
                self._average.install_()
        finally:
            if self._average is not None:
                self.remove_callback(self._average)
                self._average = None
        share_buffers_(self.model)
        return output

    def _train(self, checkpoint: str | None, **kwargs: Any) -> TrainOutput:
        if checkpoint is not None and (state := self._finished_state(checkpoint)):
            return self._take_over(checkpoint, state)
        with synchronized_batch_norms(self.model, self.args):
            return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def _finished_state(self, checkpoint: str) -> TrainerState | None:
        """Return the state in `checkpoint` if its training has reached its last step."""
        file = Path(checkpoint) / TRAINER_STATE_NAME
        if not file.is_file():
            raise UPDPError(f"{checkpoint} holds no {TRAINER_STATE_NAME}: resume a checkpoint that is complete.")
        state = TrainerState.load_from_json(str(file))
        *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return state if state.global_step >= max_steps else None

    def _take_over(self, checkpoint: str, state: TrainerState) -> TrainOutput:
        """End as the training in `checkpoint` did; the loop of the Trainer would take one more step."""
        logger.info("The training in %s is finished.", checkpoint)
        self.state = state
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(best or checkpoint)
        return TrainOutput(state.global_step, 0.0, {})

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return what is decayed: matrices and kernels, and no vector whatever its name."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the operations of one step: forward, and twice as many backward."""
        return 6 * self._macs * len(next(iter(inputs.values())))

    # the loss

    def teacher_logits(self, inputs: dict[str, Any], logits: Tensor) -> Tensor | None:
        """Return what the `logits` of this batch are to resemble, None if the labels alone teach."""
        return None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of the labels, mixed with that of the teacher while training: see `distillation_losses`."""
        if self.args.distillation == "none" or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.get("labels")
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        student = outputs["logits"].float()
        teacher = self.teacher_logits(inputs, student)
        if teacher is not None:
            losses = distillation_losses(
                student, teacher, hard=self.args.distillation == "hard", temperature=self.args.temperature
            )
            weight = self.args.distillation_weight
            loss = (1 - weight) * loss + weight * self._averaged(losses, labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _averaged(self, losses: Tensor, labels: Tensor | None, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Average as the Trainer averages the loss of the labels.

        That is over the accumulated batch of all processes if it counted that, else over this batch.
        """
        if num_items_in_batch is None or not (self.model_accepts_loss_kwargs or self.compute_loss_func):
            return losses.mean()
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        per_image = labels.shape[1] if labels is not None and labels.ndim == 2 else 1  # mixed labels
        return losses.sum() * processes * per_image / num_items_in_batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log.

        Raises:
            ValueError: loss or gradients are not numbers any more.
        """
        # Gradients are logged only where they are clipped.
        if any(math.isnan(logs.get(name, 0.0)) for name in ("grad_norm", "loss")) and not self.args.fp16:
            raise UPDPError(
                f"The loss or its gradients are NaN at step {self.state.global_step} (learning rate "
                f"{self.lr_scheduler.get_last_lr()[0]:.1e}): lower the learning rate, lengthen the ramp, or find "
                "broken images."
            )
        super().log(logs, start_time)

    # the images

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the images to train on; of a stream each process reads its own shards.

        To evaluate, accelerate lets the main process read a stream and hand out slices, the last filled up evenly, so
        that each image counts once.
        """
        with read_by_each_process(self.accelerator) if self._trains_on_stream() else nullcontext():
            return super().get_train_dataloader()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return the batches of one step; of a stream all of them or none.

        The Trainer would not step after fewer, and processes whose parts of a stream end one batch apart would wait
        for each other.
        """
        if self._trains_on_stream():
            epoch_iterator = whole_or_nothing(epoch_iterator, num_batches)
        found: tuple[list[Any], Tensor | int | None] = super().get_batch_samples(epoch_iterator, num_batches, device)
        return found

    def _trains_on_stream(self) -> bool:
        return isinstance(self.train_dataset, datasets.IterableDataset)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return the loader of the images to evaluate on, all of them whatever `dataloader_drop_last` says."""
        with nothing_dropped(self.args):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """Return the loader of the images to predict, all of them whatever `dataloader_drop_last` says."""
        with nothing_dropped(self.args):
            return super().get_test_dataloader(test_dataset)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the main process's network, averaged if it is, on all processes: see `Trainer.evaluation_loop`."""
        averaged: AbstractContextManager[None] = nullcontext() if self._average is None else self._average.in_place()
        # Its loader draws a seed. Training is not to notice: a run may be resumed without the evaluation before.
        with averaged, torch.random.fork_rng(devices=[]):
            share_buffers_(self.model)
            return super().evaluation_loop(*args, **kwargs)

    # checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with whole_or_none(folder, is_writer=self.args.should_save):
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # what comes next says that the checkpoint of all processes is complete

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not is_gated(self.model):
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        save_checkpoint(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), folder)
        if self._average is not None:
            self._average.save(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_checkpoint_(model or self.model, resume_from_checkpoint)
        if self._average is not None:
            self._average.load_(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        logger.info("Loading the best model, %s.", self.state.best_model_checkpoint)
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))
