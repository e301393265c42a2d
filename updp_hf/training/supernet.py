"""Supernet training, UPDP's first step: one network whose sites are trained open and closed at once."""

import copy
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import TorchDynamoPlugin
from torch import Tensor, nn
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from updp_hf.core.gates.contexts import stock_statistics_kept
from updp_hf.core.plan.plan import Plan
from updp_hf.core.schedule import sandwich
from updp_hf.errors import UPDPError
from updp_hf.selection.scores import agreed
from updp_hf.surgery.calibrate import calibrate_
from updp_hf.surgery.gate import close_only_, gate_, plan_of
from updp_hf.training.arguments import UPDPTrainingArguments
from updp_hf.training.checkpoints import appearing_whole, last_checkpoint, load_checkpoint_, save_checkpoint
from updp_hf.training.gated_trainer import GatedTrainer

__all__ = ["SupernetTrainer", "train_supernet"]


class SupernetTrainer(GatedTrainer):
    """Train a gated model by the sandwich rule: in each step, one backward for each setting of the gates.

    All settings share the weights, and the step's loss is their mean. BatchNorms normalise by the batch; the
    checkpoint's keep the running statistics of the open network, and those on the pruned sides have their own. Before
    a choice of sites is scored, all take the statistics of that choice: see `recalibrate_batch_norms_`.

    If `args` ask for distillation, the closed settings learn from what the open one predicts for the same batch
    (in-place distillation, Yu & Huang, arXiv 1903.05134).

    Args:
        model: a model gated with all sites that are candidates; its gates are open again after training.
        args: the arguments of a Trainer; what they say of pruning is not used but distillation.
        num_random: settings a step beside all open and all closed.
        **kwargs: as for `Trainer`.

    Raises:
        PlanError: the model is not gated.

    Example:
        >>> gate_(model, Plan(find_sites(model).sites))
        >>> calibrate_(model, batches)
        >>> SupernetTrainer(model, args, train_dataset=train).train()
    """

    def __init__(self, model: nn.Module, args: UPDPTrainingArguments, *, num_random: int = 2, **kwargs: Any):
        self.settings = sandwich(len(plan_of(model).sites), num_random=num_random, seed=args.seed)
        super().__init__(model, args, **kwargs)
        self._closed: tuple[int, ...] = ()
        self._count = 1
        self._losses: list[Tensor] = []

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train: see `Trainer.train`. Nothing is compiled: every setting of the gates would be anew."""
        with _eager(self.accelerator):
            return super().train(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Compute the gradients of every setting of this step, one after another, and open all gates again."""
        settings = self.settings(self.state.global_step)
        self._count = len(settings)
        open_, *closed = settings
        self._set_(open_)
        self._losses = [super().training_step(model, inputs, num_items_in_batch)]
        with stock_statistics_kept(self.model):
            for choice in closed:
                self._set_(choice)
                self._losses.append(super().training_step(model, inputs, num_items_in_batch))
        self._set_(())
        return torch.stack(self._losses).sum()

    def _set_(self, choice: tuple[int, ...]) -> None:
        self._closed = choice
        close_only_(self.model, choice)

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the loss of this setting, divided by the number of settings."""
        result = super().compute_loss(model, *args, **kwargs)
        if not model.training:
            return result
        if isinstance(result, tuple):
            return (result[0] / self._count, result[1])
        return result / self._count

    def teacher_logits(self, inputs: dict[str, Any], logits: Tensor) -> Tensor | None:
        """Return what the open network predicts for this batch."""
        if not self._closed:
            self._open = logits.detach()
            return None
        return self._open

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the losses of the open and of the closed network in the last step beside their mean."""
        if "loss" in logs and self._losses:
            scale = self._count * self.current_gradient_accumulation_steps
            open_, closed = (scale * float(loss) for loss in self._losses[:2])
            logs = {**logs, "loss_open": open_, "loss_closed": closed}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the operations of one step, every setting counted as the open one."""
        return len(self.settings(self.state.global_step)) * super().floating_point_ops(inputs)


def train_supernet(
    model: nn.Module,
    plan: Plan,
    images: Sequence[Any],
    args: UPDPTrainingArguments,
    folder: Path,
    *,
    train_dataset: Any,
    **kwargs: Any,
) -> nn.Module:
    """Return a copy of `model` gated with `plan` and trained as a supernet, which is kept in `folder`.

    One that is there and finished is taken; if it was interrupted, its training goes on from its last checkpoint.
    `args` are those of the pruning run, `images` calibrate what is new, the rest is as for `Trainer`.

    Raises:
        ValueError: there is no image to train on, or what lies in `folder` does not fit.
    """
    supernet = copy.deepcopy(model)
    gate_(supernet, plan)
    finished, checkpoints = folder / "supernet", folder / "training"
    if finished.is_dir():
        load_checkpoint_(supernet, finished)
        return supernet.to(args.device)
    if isinstance(train_dataset, Sized) and not len(train_dataset):  # a stream does not tell
        raise UPDPError(
            f"`calibration_size` is {args.calibration_size}, and the training set has no more images: choose fewer, "
            "for the supernet is trained on the others."
        )
    calibrate_(supernet, images)
    trainer = SupernetTrainer(supernet, _arguments(args, checkpoints), train_dataset=train_dataset, **kwargs)
    trainer.train(resume_from_checkpoint=agreed(lambda: last_checkpoint(checkpoints), PartialState()))
    if trainer.is_world_process_zero():
        with appearing_whole(finished) as whole:
            save_checkpoint(supernet, whole)
    trainer.accelerator.wait_for_everyone()
    for wrapper in ("forward", "_original_forward"):
        # The autocast that accelerate put around it: a supernet that is loaded is scored without.
        supernet.__dict__.pop(wrapper, None)
    return supernet


def _arguments(args: UPDPTrainingArguments, folder: Path) -> UPDPTrainingArguments:
    """Return the arguments for the supernet of a pruning run with `args`."""
    changed = copy.copy(args)  # not `replace`, which would make a new object and reset the state of accelerate
    changed.output_dir = str(folder)
    changed.num_train_epochs = args.num_train_epochs * args.supernet_fraction
    changed.max_steps = max(round(args.max_steps * args.supernet_fraction), 1) if args.max_steps > 0 else -1
    changed.eval_strategy = IntervalStrategy.NO
    changed.eval_on_start = changed.load_best_model_at_end = changed.push_to_hub = False
    if args.save_strategy == SaveStrategy.BEST:
        changed.save_strategy = SaveStrategy.NO  # nothing is evaluated
    changed.ema_decay = None  # the search scores the weights as they are
    return changed


@contextmanager
def _eager(accelerator: Accelerator) -> Iterator[None]:
    """Let `accelerator` compile no model that it prepares.

    Its state is one for all trainers of a process, so it still holds what the arguments of the pruning run ask for.
    """
    asked = accelerator.state.dynamo_plugin
    accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")
    try:
        yield
    finally:
        accelerator.state.dynamo_plugin = asked
