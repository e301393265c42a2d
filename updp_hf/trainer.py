"""The Trainer that prunes: select, gate, calibrate, anneal, merge, save."""

import copy
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import broadcast, broadcast_object_list
from huggingface_hub import upload_folder
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from updp_hf.calibration import calibrate_
from updp_hf.callback import UPDPCallback
from updp_hf.core.cost import LatencyTable, count_macs
from updp_hf.core.gate import gates, is_gated
from updp_hf.core.plan import Plan
from updp_hf.core.policy import ramp
from updp_hf.distillation import distillation_losses
from updp_hf.files import load_checkpoint_, plan_in, refuse_occupied, save_checkpoint, save_merged, write_merged
from updp_hf.inputs import base_model_of, example_inputs_of, logits_of, model_inputs
from updp_hf.merging import merge
from updp_hf.report import Report, changed_arguments, measure_costs
from updp_hf.selection import Selector, last, least_damage, uniform
from updp_hf.surgery import gate_, plan_of, require_sites
from updp_hf.training_args import UPDPTrainingArguments

__all__ = ["UPDPTrainer"]

logger = logging.get_logger(__name__)

REPORTED_BATCH_SIZES = (1, 8)
"""Batch sizes at which a saved model's latency is measured."""


class UPDPTrainer(Trainer):
    """Prune a vision checkpoint while fine-tuning it.

    `train()` selects the blocks if no plan was given, gates them, calibrates what is new, and anneals the gates
    during training; `save_model()` merges and saves. Everything else is `Trainer`.

    Args:
        model: the checkpoint, unpruned.
        args: what to prune and how, beside the usual.
        teacher: the image classifier to distil from; by default the checkpoint itself, if `args` ask for distillation.
        **kwargs: as for `Trainer`.

    Example:
        >>> trainer = UPDPTrainer(
        ...     model=model,
        ...     args=UPDPTrainingArguments("vit-p6", num_pruned_blocks=6, num_train_epochs=10),
        ...     train_dataset=train,
        ...     eval_dataset=test,
        ...     processing_class=processor,
        ... )
        >>> trainer.train()
        >>> trainer.save_model()
    """

    args: UPDPTrainingArguments

    def __init__(
        self, model: nn.Module, args: UPDPTrainingArguments, *, teacher: nn.Module | None = None, **kwargs: Any
    ):
        if not isinstance(args, UPDPTrainingArguments):
            raise TypeError(f"`args` is {type(args).__name__}, expected UPDPTrainingArguments.")
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, which would use DataParallel: start the script with "
                "`accelerate launch`."
            )
        refuse_occupied(args.output_dir, model)
        self.callback = UPDPCallback(ramp(args.ramp, args.ramp_start, args.ramp_end))  # type: ignore[arg-type]
        self.base = _without_gates(model).eval().requires_grad_(False)
        super().__init__(model=model, args=args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "FSDP or DeepSpeed is on, but gates and merging need whole parameters: run with plain data parallelism "
                "(`accelerate launch --multi_gpu`)."
            )
        self.add_callback(self.callback)
        self.teacher = teacher
        self._latencies: LatencyTable | None = None
        self._macs = count_macs(model, example_inputs_of(model))

    @property
    def plan(self) -> Plan:
        """The plan that is followed; known once `train` has begun."""
        return plan_of(self.model)

    # before the loop

    def train(self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, **kwargs: Any) -> Any:
        """Select, gate, calibrate, then train: see `Trainer.train`."""
        if resume_from_checkpoint is True:
            has_run = Path(self.args.output_dir).is_dir()
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) if has_run else None
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no checkpoint in {self.args.output_dir} to resume from: start without.")
        if isinstance(resume_from_checkpoint, str | os.PathLike):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
            plan = plan_in(resume_from_checkpoint)
            self.args.refuse_other(plan, resume_from_checkpoint)
            gate_(self.model, plan)
        elif not is_gated(self.model):
            images = self._calibration_batches()
            plan = self._agreed_plan(images)
            gate_(self.model, plan)
            calibrate_(self.model, images)
            logger.info("Pruning %d blocks: %s.", len(plan.blocks), ", ".join(plan.blocks))
        self._refuse_early_optimizer()
        if self.args.distillation != "none":
            self._prepare_teacher()
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self._share_buffers_()
        return output

    def _agreed_plan(self, images: list[dict[str, Tensor]]) -> Plan:
        """The plan given, or the one selected; the main process's choice, so that all processes prune alike."""
        args = self.args
        given = args.given_plan()
        if given is not None:
            return given
        selectors: dict[str, Callable[[], Selector]] = {
            "least-damage": lambda: least_damage(self.model, images),
            "uniform": lambda: uniform,
            "last": lambda: last,
        }
        if args.cost == "latency":
            self._latencies = LatencyTable(args.per_device_eval_batch_size)
        sites = require_sites(self.model, args.form, latencies=self._latencies)
        chosen = selectors[args.selector]()(sites, args.num_pruned_blocks or 0)
        start, end = args.start, args.end_activation
        plan = Plan(chosen, start, end, base_model=base_model_of(self.model))  # type: ignore[arg-type]
        return broadcast_object_list([plan])[0]

    def _refuse_early_optimizer(self) -> None:
        if self.optimizer is None:
            return
        held = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        inserted = [name for name, _ in self.model.named_parameters() if ".pruned." in name]
        if not all(id(self.model.get_parameter(name)) in held for name in inserted):
            raise ValueError(
                f"The optimizer given ({type(self.optimizer).__name__}) does not hold the parameters of the gates, "
                "which were put in after it was built: leave it to the trainer (`optim`, `optimizer_cls_and_kwargs`), "
                "or gate and calibrate the model before you build it."
            )

    def _calibration_batches(self) -> list[dict[str, Tensor]]:
        """The first images of a fixed shuffle, the same on every process."""
        dataset = self.train_dataset
        if dataset is None or isinstance(dataset, IterableDataset):
            raise ValueError(
                f"`train_dataset` is {type(dataset).__name__}, but calibration reads some images by index: pass a "
                "map-style dataset, or gate and calibrate the model yourself before building the trainer."
            )
        generator = torch.Generator().manual_seed(self.args.seed)
        indices = torch.randperm(len(dataset), generator=generator)[: self.args.calibration_size].tolist()
        subset: Any = Subset(dataset, indices)
        if isinstance(dataset, datasets.Dataset):
            subset = self._remove_unused_columns(dataset.select(indices), description="calibration")
        loader = DataLoader(subset, batch_size=self.args.per_device_eval_batch_size, collate_fn=self.data_collator)
        with torch.random.fork_rng():
            # Augmentation draws from the global generator; training is not to notice.
            torch.manual_seed(self.args.seed)
            return [{self._image_key: batch[self._image_key]} for batch in loader]

    @property
    def _image_key(self) -> str:
        """The name under which a batch holds the images."""
        return str(getattr(self.base, "main_input_name", "pixel_values"))

    def _prepare_teacher(self) -> None:
        teacher = self.base if self.teacher is None else self.teacher
        if is_gated(teacher):
            raise ValueError("The teacher has gates, expected an unpruned image classifier: pass one as `teacher`.")
        on_cuda = self.args.device.type == "cuda"
        teacher = copy.deepcopy(teacher).to(self.args.device, torch.bfloat16 if on_cuda else None)
        self._teacher = teacher.eval().requires_grad_(False)

    # within the loop

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
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        with torch.no_grad():
            images = inputs[self._image_key]
            teacher = logits_of(self._teacher, model_inputs(self._teacher, images)).float()
        losses = distillation_losses(
            outputs["logits"].float(), teacher, hard=self.args.distillation == "hard", temperature=self.args.temperature
        )
        # Averaged as the Trainer averages the loss of the labels: over the accumulated batch of all processes if it
        # counted that, else over this batch.
        if num_items_in_batch is not None and (self.model_accepts_loss_kwargs or self.compute_loss_func):
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            distilled = losses.sum() * processes / num_items_in_batch
        else:
            distilled = losses.mean()
        weight = self.args.distillation_weight
        loss = (1 - weight) * loss + weight * distilled
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with λ beside the loss.

        Raises:
            ValueError: the gradients are not numbers any more.
        """
        if "loss" in logs:
            logs = {**logs, "lambda": self.callback.lambda_at(max(self.state.global_step - 1, 0), self.state.max_steps)}
        if math.isnan(logs.get("grad_norm", 0.0)) and not self.args.fp16:
            raise ValueError(
                f"The gradients are NaN at step {self.state.global_step} (learning rate "
                f"{self._get_learning_rate():.1e}): lower the learning rate, lengthen the ramp, or find broken images."
            )
        super().log(logs, start_time)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return what is decayed: matrices and kernels, and no vector whatever its name."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the main process's network on all processes: see `Trainer.evaluation_loop`."""
        self._share_buffers_()
        return super().evaluation_loop(*args, **kwargs)

    def _share_buffers_(self) -> None:
        """Give all processes the running statistics of the main one, which is the one that saves.

        While training, each has its own from its own images, until the next forward.
        """
        for buffer in self.model.buffers():
            buffer.copy_(broadcast(buffer))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the operations of one step: forward, and twice as many backward."""
        return 6 * self._macs * len(next(iter(inputs.values())))

    # checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not is_gated(self.model):
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        save_checkpoint(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_checkpoint_(model or self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        logger.info("Loading the best model, %s.", self.state.best_model_checkpoint)
        load_checkpoint_(self.model, str(self.state.best_model_checkpoint))

    # after the loop

    def merge(self) -> nn.Module:
        """Return the merged model, on the CPU: see `merge`."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return merge(copy.deepcopy(model).cpu().eval())

    def report(self, merged: nn.Module) -> Report:
        """Return the facts of this run. Accuracies are those that were logged: at λ = 0 and after the ramp."""
        evaluations = [entry for entry in self.state.log_history if "eval_loss" in entry]
        opened = [e for e in evaluations if e["step"] == 0 and self.callback.lambda_at(0, self.state.max_steps) == 0.0]
        closed = [e for e in evaluations if self.callback.lambda_at(int(e["step"]) - 1, self.state.max_steps) == 1.0]
        if self.args.load_best_model_at_end and self.state.best_global_step:
            closed = [e for e in closed if e["step"] == self.state.best_global_step]
        device = self.args.device
        models = {"before": copy.deepcopy(self.base).to(device), "after": copy.deepcopy(merged).to(device)}
        costs, conditions = measure_costs(models, batch_sizes=REPORTED_BATCH_SIZES)
        return Report(
            plan=self.plan.to_dict(),
            before=costs["before"],
            after=costs["after"],
            latency_conditions=conditions,
            merge_error=getattr(getattr(merged, "config", None), "merge_error", None),
            metrics_before=_metrics(opened[0]) if opened else {},
            metrics_after=_metrics(closed[-1]) if closed else {},
            latencies=asdict(self._latencies) if self._latencies else {},
            arguments=changed_arguments(self.args),
            seed=self.args.seed,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Merge and save: weights, configuration, processor and report. Pushing is a step of its own.

        Raises:
            MergeError: the gates are not closed yet.
            ValueError: a checkpoint lies in the folder.
        """
        if _internal_call or not is_gated(self.model):
            super().save_model(output_dir, _internal_call)
            return
        if self.is_world_process_zero():
            folder = Path(output_dir or self.args.output_dir)
            refuse_occupied(folder, self.base)
            merged = self.merge()
            save_merged(merged, folder, self.processing_class, self.report(merged))
            logger.info("Saved the merged model in %s.", folder)
        self.accelerator.wait_for_everyone()

    def push_to_hub(
        self,
        commit_message: str | None = "Add pruned model",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Merge and upload what `save_model` saves, in one commit; never checkpoints, optimizer state or pickles."""
        self.init_hf_repo(token=token, private=private)
        if not self.is_world_process_zero():
            return None
        with tempfile.TemporaryDirectory() as folder:
            merged = self.merge()
            write_merged(merged, Path(folder), self.processing_class, self.report(merged))
            return upload_folder(
                repo_id=self.hub_model_id,
                folder_path=folder,
                commit_message=commit_message,
                token=token or self.args.hub_token,
                revision=revision or self.args.hub_revision,
            )


def _without_gates(model: nn.Module) -> nn.Module:
    """Return a copy of `model` with the original in every slot that holds a gate."""
    stock = copy.deepcopy(model)
    stock.__dict__.pop("updp_plan", None)
    for path, gate in reversed(list(gates(stock))):
        stock.set_submodule(path, gate.original)
    return stock


def _metrics(entry: dict[str, float]) -> dict[str, float]:
    timing = ("runtime", "per_second")
    return {k.removeprefix("eval_"): v for k, v in entry.items() if k.startswith("eval_") and not k.endswith(timing)}
