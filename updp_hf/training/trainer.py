"""The Trainer that prunes: gate, calibrate, anneal, merge, save."""

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor, nn, no_grad
from transformers import set_seed
from transformers.utils import logging

from updp_hf.core.gates.gate import is_gated
from updp_hf.core.graph.structure import Structure
from updp_hf.core.plan.plan import Plan
from updp_hf.core.schedule import ramp
from updp_hf.errors import UPDPError
from updp_hf.hub.folder import check_unoccupied, save_merged
from updp_hf.processes import on_main_process
from updp_hf.reporting.measure import report_of
from updp_hf.reporting.plots import plot_front
from updp_hf.reporting.provenance import dataset_facts, metadata_of
from updp_hf.reporting.report import Report, SelectionFacts
from updp_hf.selection.choose import Selection, choose
from updp_hf.selection.pareto import FRONT_NAME, Front, pareto_front
from updp_hf.selection.supernet import SUPERNET
from updp_hf.surgery.calibrate import calibrate_
from updp_hf.surgery.find import read
from updp_hf.surgery.gate import gate_, plan_of, without_gates
from updp_hf.surgery.merge import merge
from updp_hf.surgery.model_io import base_model_of, logits_of, model_inputs
from updp_hf.training.arguments import UPDPTrainingArguments
from updp_hf.training.callback import UPDPCallback
from updp_hf.training.checkpoints import last_checkpoint, plan_in
from updp_hf.training.dataloaders import calibration_batches
from updp_hf.training.distillation import frozen_teacher
from updp_hf.training.gated_trainer import GatedTrainer
from updp_hf.training.optimizer import check_optimizer
from updp_hf.training.publishing import Published
from updp_hf.training.run_facts import OTHER_IMAGES, facts_of_run, selection_facts, warn_if_slower, with_speed_up
from updp_hf.training.run_record import read_run_record, write_run_record
from updp_hf.training.supernet import is_selection_begun, supernet_training

__all__ = ["UPDPTrainer"]

logger = logging.get_logger(__name__)

REPORTED_BATCH_SIZES = (1, 8)
"""Batch sizes at which a saved model's latency is measured."""


class UPDPTrainer(Published, GatedTrainer):
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

    def __init__(
        self, model: nn.Module, args: UPDPTrainingArguments, *, teacher: nn.Module | None = None, **kwargs: Any
    ):
        super().__init__(model, args, **kwargs)
        check_unoccupied(args.output_dir, model)
        self.base = without_gates(model).eval().requires_grad_(False)
        self.callback = UPDPCallback(ramp(args.ramp, args.ramp_start, args.ramp_end))  # type: ignore[arg-type]
        self.add_callback(self.callback)
        self.teacher = teacher
        self.selection: Selection | None = None
        self._selection_facts: SelectionFacts | None = None
        self._was_resumed = False

    @property
    def plan(self) -> Plan:
        """The plan that is followed; known once `train` has begun."""
        return plan_of(self.model)

    @cached_property
    def structure(self) -> Structure:
        """That of the unpruned model, which is exported for it, once."""
        return read(self.base)

    def select(self, *, resume: bool = False, **settings: Any) -> Plan:
        """Return the plan: the one given, or the blocks that the selector chooses to keep to the budget.

        All processes return the main one's. The model is left as it is; `selection` tells how they were chosen.

        Args:
            resume: go on with a supernet or a search in the output folder that was interrupted, or use it again.
            **settings: those of `search` in a supernet.

        Raises:
            PlanError: the model has no sites, or the budget cannot be met.
            ValueError: the training set cannot be read by index, or what is in the folder belongs to another search.
        """
        budget, given = self.args.budget(), self.args.given_plan()
        if given is not None:
            return given
        if self.selection is None:
            assert budget is not None
            options = {**self._selection_options(resume=resume), "selector": self.args.selector, **settings}
            self.selection = choose(self.model, budget, self.calibration_batches(), **options)
            self._selection_facts = selection_facts(self.selection)
        return self.selection.plan

    def pareto_front(self, **settings: Any) -> Front:
        """Return the choices of blocks that no other one beats in both score and latency, and save them.

        `pareto.json` and `pareto.png` appear in the output folder. The score is that of the supernet if it is the
        selector, which is trained if it has not been, else the negated divergence from the checkpoint's predictions
        with every closed block fitted by least squares.

        Args:
            **settings: those of `search`, which is made for every number of blocks.
        """
        options = {**self._selection_options(resume=True), **settings}
        front = pareto_front(self.model, self.calibration_batches(), **options)
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            front.save(folder)
            plot_front(front, folder / f"{FRONT_NAME}.png")
        return front

    def calibration_batches(self) -> list[dict[str, Tensor]]:
        """Return the images to calibrate with and to score by, the same on every process."""
        return calibration_batches(self.train_dataset, self.data_collator, self.args, self.image_key)

    def _selection_options(self, *, resume: bool) -> dict[str, Any]:
        """Return what `choose` and `pareto_front` are told."""
        names = ("train_dataset", "data_collator", "compute_loss_func", "optimizer_cls_and_kwargs")
        given = {name: getattr(self, name) for name in names}
        trains = self.args.selector == SUPERNET
        return {
            **self.args.selection_options(),
            "supernet": supernet_training(self.model, self.args, resume=resume, **given) if trains else None,
            "structure": self.structure,
            "processes": PartialState(),
        }

    # before the loop

    def train(self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, **kwargs: Any) -> Any:
        """Select, gate, calibrate, then train: see `Trainer.train`.

        Args:
            resume_from_checkpoint: the checkpoint to go on from; True goes on with the last one in the output folder
                that is complete, or else with the selection.
            **kwargs: as for `Trainer.train`.

        Raises:
            ValueError: there is nothing to go on with.
            OSError: a checkpoint could not be written; the one before is left.
        """
        resumes_selection = False
        if resume_from_checkpoint is True:
            if not self.is_begun():
                raise UPDPError(f"There is no checkpoint in {self.args.output_dir} to resume from: start without.")
            resume_from_checkpoint = self._last_checkpoint()
            resumes_selection = resume_from_checkpoint is None
        if isinstance(resume_from_checkpoint, str | os.PathLike):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
            self._was_resumed = True
            plan = plan_in(resume_from_checkpoint)
            self.args.check_same_plan(plan, resume_from_checkpoint)
            gate_(self.model, plan, structure=self.structure)
            self._selection_facts = read_run_record(resume_from_checkpoint, self.args) or self._selection_facts
        elif not is_gated(self.model):
            self._gate(self.select(resume=resumes_selection))
        check_optimizer(self.optimizer, self.model)
        self._saved = None
        self.prepare_teacher()
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def prepare_teacher(self) -> None:
        """Freeze the teacher where the model is, if one is asked for: `train` does, before its loop begins."""
        if self.args.distillation != "none":
            self._teacher = frozen_teacher(self.teacher or self.base, self.args.device)

    def is_begun(self) -> bool:
        """Return whether a run in the output folder was interrupted with which `train(True)` goes on."""
        return self._last_checkpoint() is not None or is_selection_begun(self.args)

    def _last_checkpoint(self) -> str | None:
        return on_main_process(lambda: last_checkpoint(self.args.output_dir), PartialState())

    def _gate(self, plan: Plan) -> None:
        """Gate and calibrate the model, which is the checkpoint, or the supernet if that is asked for."""
        supernet = None if self.selection is None else self.selection.supernet
        if supernet is not None:
            set_seed(self.args.seed)  # the same whether the supernet has just been trained or was found
            if self.args.start_from_supernet:
                self.model.load_state_dict(without_gates(supernet).state_dict())
        gate_(self.model, replace(plan, base_model=base_model_of(self.model)), structure=self.structure)
        calibrate_(self.model, self.calibration_batches())
        logger.info("Pruning %d blocks: %s.", len(plan.blocks), ", ".join(plan.blocks))

    # within the loop

    def teacher_logits(self, inputs: dict[str, Any], logits: Tensor) -> Tensor:
        """Return what the teacher predicts for this batch."""
        with no_grad():
            return logits_of(self._teacher, model_inputs(self._teacher, inputs[self.image_key])).float()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with λ beside the loss."""
        # The event of that name comes after the reporters, such as TensorBoard's.
        self.callback.on_log(self.args, self.state, self.control, logs)
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate: see `Trainer.evaluate`. What other images than the held-out ones give is left out of the report."""
        metrics: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        if eval_dataset is not None and eval_dataset is not self.eval_dataset and self.state.log_history:
            self.state.log_history[-1][OTHER_IMAGES] = True
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and is_gated(self.model):
            write_run_record(Path(output_dir or self.args.output_dir), self.args, self._selection_facts)

    # after the loop

    def merge(self) -> nn.Module:
        """Return the merged model, on the CPU: see `merge`."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return merge(copy.deepcopy(model).cpu().eval())

    def report(self, merged: nn.Module | None = None, *, batch_sizes: Sequence[int] = REPORTED_BATCH_SIZES) -> Report:
        """Return the facts of this run; nothing is written or remembered.

        Accuracies are those that were logged: at λ = 0 and after the ramp.

        Args:
            merged: what `merge` returned; it is merged by default.
            batch_sizes: the batch sizes to measure latency at, beside that of a speed-up that was asked for.
        """
        merged, device, asked = merged or self.merge(), self.args.device, self.args.target_speed_up
        sizes = {*batch_sizes, *([] if asked is None else [self.args.per_device_eval_batch_size])}
        merged, base = copy.deepcopy(merged).to(device), copy.deepcopy(self.base).to(device)
        report = report_of(merged, sorted(sizes), base=base, plan=self.plan.to_dict(), structure=self.structure)
        run = facts_of_run(self.args, self.state, self.callback.lambda_at, was_resumed=self._was_resumed)
        return replace(
            report,
            **run,
            latencies=None if self.selection is None else self.selection.latencies,
            selection=with_speed_up(self._selection_facts, report, self.args),
            evaluated_on=dataset_facts(self.eval_dataset) if run["metrics_after"] else None,
            metadata=metadata_of(base_model_of(self.base), self.train_dataset, self.args.hub_token),
        )

    def save_model(
        self, output_dir: str | None = None, _internal_call: bool = False, *, report: Report | None = None
    ) -> None:
        """Merge and save: weights, configuration, processor, report and card. Pushing is a step of its own.

        Args:
            output_dir: the output folder by default.
            report: the facts to write, by default those of `report`; with facts that the trainer does not know,
                `replace(trainer.report(), ...)`. Of the main process only.

        Raises:
            MergeError: the gates are not closed yet.
            ValueError: a checkpoint lies in the folder.
        """
        if _internal_call or not is_gated(self.model):
            super().save_model(output_dir, _internal_call=True)  # pushes nothing
            return
        folder = Path(output_dir or self.args.output_dir)
        if self.is_world_process_zero():
            check_unoccupied(folder, self.base)
            merged = self.merge()
            report = report or self.report(merged)
            warn_if_slower(report, self.args)
            save_merged(merged, folder, self.processing_class, report, self._repo_id(folder))
            logger.info("Saved the merged model in %s.", folder)
        self._saved = (folder, self.state.global_step)
        self.accelerator.wait_for_everyone()
