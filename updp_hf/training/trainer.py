"""The Trainer that prunes: select, gate, calibrate, anneal, merge, save."""

import copy
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers import set_seed
from transformers.utils import logging

from updp_hf.core.gates.gate import is_gated
from updp_hf.core.plan.plan import Plan
from updp_hf.core.schedule import ramp
from updp_hf.errors import UPDPError
from updp_hf.hub.folder import refuse_occupied, save_merged
from updp_hf.hub.push import push_folder
from updp_hf.reporting.card import add_card
from updp_hf.reporting.provenance import dataset_facts, metadata_of
from updp_hf.reporting.report import Report, changed_arguments, measure_costs, model_facts
from updp_hf.selection.scores import agreed
from updp_hf.surgery.calibrate import calibrate_
from updp_hf.surgery.find import blocks_of
from updp_hf.surgery.gate import gate_, plan_of, without_gates
from updp_hf.surgery.merge import merge
from updp_hf.surgery.model_io import base_model_of, logits_of, model_inputs
from updp_hf.training.arguments import UPDPTrainingArguments
from updp_hf.training.callback import UPDPCallback
from updp_hf.training.checkpoints import last_checkpoint, plan_in
from updp_hf.training.run_facts import OTHER_IMAGES, evaluations, metrics_before_and_after, training_facts
from updp_hf.training.selecting_trainer import SelectingTrainer

__all__ = ["UPDPTrainer"]

logger = logging.get_logger(__name__)

REPORTED_BATCH_SIZES = (1, 8)
"""Batch sizes at which a saved model's latency is measured."""
RUN_NAME = "updp_run.json"
"""File of a checkpoint with the options of its run and the facts of its selection, for when it is resumed."""


class UPDPTrainer(SelectingTrainer):
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
        refuse_occupied(args.output_dir, model)
        self.base = without_gates(model).eval().requires_grad_(False)
        self.callback = UPDPCallback(ramp(args.ramp, args.ramp_start, args.ramp_end))  # type: ignore[arg-type]
        self.add_callback(self.callback)
        self.teacher = teacher
        self._was_resumed = False
        self._saved: tuple[Path, int] | None = None

    @property
    def plan(self) -> Plan:
        """The plan that is followed; known once `train` has begun."""
        return plan_of(self.model)

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
            self.args.refuse_other(plan, resume_from_checkpoint)
            gate_(self.model, plan)
            self._go_on_with(Path(resume_from_checkpoint) / RUN_NAME)
        elif not is_gated(self.model):
            plan = self.select(resume=resumes_selection)
            if self._supernet is not None:
                set_seed(self.args.seed)  # the same whether the supernet has just been trained or was found
                if self.args.start_from_supernet:
                    self.model.load_state_dict(without_gates(self._supernet).state_dict())
            gate_(self.model, replace(plan, base_model=base_model_of(self.model)))
            calibrate_(self.model, self._calibration_batches())
            logger.info("Pruning %d blocks: %s.", len(plan.blocks), ", ".join(plan.blocks))
        self._refuse_early_optimizer()
        self._saved = None
        if self.args.distillation != "none":
            self._prepare_teacher()
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def is_begun(self) -> bool:
        """Return whether a run in the output folder was interrupted with which `train(True)` goes on."""
        return self._last_checkpoint() is not None or agreed(self._selection_folder.is_dir, PartialState())

    def _go_on_with(self, file: Path) -> None:
        """Take over the facts of the selection, and warn of options that are others now."""
        if not file.is_file():
            return
        run = json.loads(file.read_text(encoding="utf-8"))
        self._selection = run["selection"]
        before, now = run["arguments"], self._options()
        changed = [
            f"{name} {now.get(name, 'by default')} (was {before.get(name, 'by default')})"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if changed:
            logger.warning(f"The run goes on with other options than it was begun with: {', '.join(changed)}.")

    def _options(self) -> dict[str, Any]:
        """Return the options that are not the defaults, as JSON values."""
        options: dict[str, Any] = json.loads(json.dumps(changed_arguments(self.args), default=str))
        return options

    def _last_checkpoint(self) -> str | None:
        return agreed(lambda: last_checkpoint(self.args.output_dir), PartialState())

    def _refuse_early_optimizer(self) -> None:
        if self.optimizer is None:
            return
        held = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        inserted = [name for name, _ in self.model.named_parameters() if ".pruned." in name]
        if not all(id(self.model.get_parameter(name)) in held for name in inserted):
            raise UPDPError(
                f"The optimizer given ({type(self.optimizer).__name__}) does not hold the parameters of the gates, "
                "which were put in after it was built: leave it to the trainer (`optim`, `optimizer_cls_and_kwargs`), "
                "or gate and calibrate the model before you build it."
            )

    def _prepare_teacher(self) -> None:
        teacher = self.base if self.teacher is None else self.teacher
        if is_gated(teacher):
            raise UPDPError("The teacher has gates, expected an unpruned image classifier: pass one as `teacher`.")
        on_cuda = self.args.device.type == "cuda"
        teacher = copy.deepcopy(teacher).to(self.args.device, torch.bfloat16 if on_cuda else None)
        self._teacher = teacher.eval().requires_grad_(False)

    # within the loop

    def teacher_logits(self, inputs: dict[str, Any], logits: Tensor) -> Tensor:
        """Return what the teacher predicts for this batch."""
        with torch.no_grad():
            return logits_of(self._teacher, model_inputs(self._teacher, inputs[self.image_key])).float()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with λ beside the loss."""
        if "loss" in logs:
            logs = {**logs, "lambda": self.callback.lambda_at(max(self.state.global_step - 1, 0), self.state.max_steps)}
        super().log(logs, start_time)

    # after the loop

    def merge(self) -> nn.Module:
        """Return the merged model, on the CPU: see `merge`."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return merge(copy.deepcopy(model).cpu().eval())

    def report(self, merged: nn.Module) -> Report:
        """Return the facts of this run. Accuracies are those that were logged: at λ = 0 and after the ramp."""
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        history = evaluations(self.state, self.callback.lambda_at)
        metrics_before, metrics_after = metrics_before_and_after(history, best or self.state.global_step)
        if self.args.start_from_supernet:
            metrics_before = {}  # what was evaluated is the supernet, not the checkpoint
        device = self.args.device
        models = {"before": copy.deepcopy(self.base).to(device), "after": copy.deepcopy(merged).to(device)}
        asked, size = self.args.target_speed_up, self.args.per_device_eval_batch_size
        sizes = REPORTED_BATCH_SIZES if asked is None else (*REPORTED_BATCH_SIZES, size)
        costs, conditions = measure_costs(models, batch_sizes=sorted(set(sizes)))
        if asked is not None:
            before, after = ((cost.latency or {})[str(size)] for cost in (costs["before"], costs["after"]))
            self._selection["speed_up"] = before / after
            if before / after < asked:
                logger.warning(
                    f"The merged model is {before / after:.2f}× as fast at batch size {size}, {asked:g}× was asked "
                    "for: measure on an idle machine, or ask for more."
                )
        return Report(
            plan=self.plan.to_dict(),
            before=costs["before"],
            after=costs["after"],
            model=model_facts(self.base, merged),
            blocks=blocks_of(self.base),
            latency_conditions=conditions,
            merge_error=getattr(getattr(merged, "config", None), "merge_error", None),
            metrics_before=metrics_before,
            metrics_after=metrics_after,
            latencies=asdict(self._latencies) if self._latencies else {},
            selection=self._selection,
            arguments=changed_arguments(self.args),
            training=training_facts(self.args, self.state, was_resumed=self._was_resumed),
            history=history,
            evaluated_on=dataset_facts(self.eval_dataset) if metrics_after else {},
            metadata=metadata_of(base_model_of(self.base), self.train_dataset, self.args.hub_token),
            seed=self.args.seed,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Merge and save: weights, configuration, processor and report. Pushing is a step of its own.

        Raises:
            MergeError: the gates are not closed yet.
            ValueError: a checkpoint lies in the folder.
        """
        if _internal_call or not is_gated(self.model):
            super().save_model(output_dir, _internal_call=True)  # pushes nothing
            return
        folder = Path(output_dir or self.args.output_dir)
        if self.is_world_process_zero():
            refuse_occupied(folder, self.base)
            merged = self.merge()
            save_merged(merged, folder, self.processing_class, self.report(merged), self._repo_id(folder))
            logger.info("Saved the merged model in %s.", folder)
        self._saved = (folder, self.state.global_step)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and is_gated(self.model):
            run = {"arguments": self._options(), "selection": self._selection}
            (Path(output_dir or self.args.output_dir) / RUN_NAME).write_text(json.dumps(run), encoding="utf-8")

    def _repo_id(self, folder: Path) -> str:
        return str(self.hub_model_id or self.args.hub_model_id or folder.resolve().name)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write the card of the saved model again, with facts that no run can know.

        Args:
            language: of the labels.
            license: of the model; by default that of the checkpoint, if the Hub tells.
            tags: further ones.
            model_name: title of the card; by default the name of the repository or folder.
            finetuned_from: id of the checkpoint on the Hub; by default that from which it was loaded.
            tasks: of no effect, for the task is image classification.
            dataset_tags: ids of the datasets on the Hub; of several the first is the one that was evaluated on.
            dataset: name of the set of images that was evaluated on.
            dataset_args: of no effect.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        report = Report.load(folder)
        ids = _listed(dataset_tags)
        metadata = {
            "language": language,
            "license": license,
            "tags": _listed(tags),
            "model_name": model_name,
            "base_model": finetuned_from,
            "datasets": ids,
        }
        where = {"name": ", ".join(_listed(dataset)), "id": ids[0] if ids else None}
        report = replace(
            report,
            metadata={**report.metadata, **{name: value for name, value in metadata.items() if value}},
            evaluated_on={**report.evaluated_on, **{name: value for name, value in where.items() if value}},
        )
        report.save(folder)
        add_card(report, folder, self._repo_id(folder))

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate: see `Trainer.evaluate`. What other images than the held-out ones give is left out of the report."""
        metrics: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        if eval_dataset is not None and eval_dataset is not self.eval_dataset and self.state.log_history:
            self.state.log_history[-1][OTHER_IMAGES] = True
        return metrics

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Push the merged model, saved before unless it is; never checkpoints, optimizer state or pickles.

        Args:
            commit_message: title of the commit.
            blocking: whether to wait; else a `Future` is returned.
            token: access token, `hub_token` by default.
            revision: the branch, `hub_revision` by default.
            private: whether a new repository is private, `hub_private_repo` by default.
            **kwargs: those of `create_model_card`.

        Raises:
            HubError: the Hub refused or was not reached; the merged model lies in the output folder.
            ValueError: nothing has been pruned yet.
            MergeError: the gates are not closed yet.
        """
        if not is_gated(self.model):
            raise UPDPError("Nothing is pruned yet that could be pushed: call `train()` first.")
        folder = Path(self.args.output_dir)
        if self._saved != (folder, self.state.global_step):
            self.save_model()
        if kwargs:
            self.create_model_card(**kwargs)
        if not self.is_world_process_zero():
            return None
        options: dict[str, Any] = {
            "private": self.args.hub_private_repo if private is None else private,
            "token": token or self.args.hub_token,
            "revision": revision or self.args.hub_revision,
            "commit_message": commit_message,
        }
        repo_id = self._repo_id(folder)
        if not blocking:
            return HfApi().run_as_future(push_folder, folder, repo_id, **options)
        return push_folder(folder, repo_id, **options)


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
