"""The Trainer that selects: from a budget to the blocks to prune, or to the best choices of every number."""

import shutil
import time
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader

from updp_hf.core.cost import LatencyTable
from updp_hf.core.plan.plan import Plan
from updp_hf.core.plan.site import Site
from updp_hf.core.search import Fitness
from updp_hf.data.calibration_set import sample_and_rest
from updp_hf.data.randomness import random_states_kept, seed_generators
from updp_hf.selection.choose import demand_of, select
from updp_hf.selection.pareto import Front, fitted_fitness, front_of
from updp_hf.selection.scores import ScoreHistory, agreed, label_fit, spread
from updp_hf.selection.selectors import fittest, selector_by_name
from updp_hf.surgery.find import require_sites
from updp_hf.training.arguments import SUPERNET, UPDPTrainingArguments
from updp_hf.training.gated_trainer import GatedTrainer
from updp_hf.training.supernet import train_supernet

__all__ = ["SelectingTrainer"]

SELECTION = "updp_selection"
"""Folder inside the output folder for what selecting leaves: the supernet and the scores, from which it is resumed."""


class SelectingTrainer(GatedTrainer):
    """Choose the blocks of a checkpoint that are pruned, by the images that it is to be trained on."""

    def __init__(self, model: nn.Module, args: UPDPTrainingArguments, **kwargs: Any):
        super().__init__(model, args, **kwargs)
        self._latencies: LatencyTable | None = None
        self._selection: dict[str, Any] = {}
        self._supernet: nn.Module | None = None
        self._plan: Plan | None = None

    def select(self, *, resume: bool = False, **settings: Any) -> Plan:
        """Return the plan: the one given, or the blocks that the selector chooses to keep to the budget.

        All processes return the main one's. The model is left as it is.

        Args:
            resume: go on with a supernet or a search in the output folder that was interrupted, or use it again.
            **settings: those of `search` in a supernet.

        Raises:
            PlanError: the model has no sites, or the budget cannot be met.
            ValueError: the training set cannot be read by index, or what is in the folder belongs to another search.
        """
        args, budget = self.args, self.args.budget()
        if budget is None:
            plan = args.given_plan()
            assert plan is not None
            return plan
        if self._plan is not None:
            return self._plan
        begin = time.perf_counter()
        processes, batch_size = PartialState(), args.per_device_eval_batch_size
        found = self._sites()
        options = {"end_activation": args.end_activation, "batch_size": batch_size}
        sites, demand = agreed(lambda: demand_of(self.model, found, budget, **options), processes)
        if args.selector == SUPERNET:
            selector = fittest(self._supernet_fitness(sites, resume=resume), **{"seed": args.seed, **settings})
        else:
            images = self._calibration_batches()
            selector = selector_by_name(args.selector, self.model, sites, images, seed=args.seed, processes=processes)
        chosen = select(
            self.model,
            sites,
            demand,
            selector,
            speed_up=budget.speed_up,
            batch_size=batch_size,
            processes=processes,
        )
        start, end = args.start, args.end_activation
        plan = Plan(chosen, start, end)  # type: ignore[arg-type]
        self._plan = agreed(lambda: plan, processes)
        self._selection = {
            "selector": args.selector,
            "budget": str(budget),
            "candidates": [str(site) for site in sites],
            "seconds": time.perf_counter() - begin,
        }
        return self._plan

    def pareto_front(self, **settings: Any) -> Front:
        """Return the choices of blocks that no other one beats in both score and latency, and save them.

        `pareto.json` and `pareto.png` appear in the output folder. The score is that of the supernet if it is the
        selector, which is trained if it has not been, else the negated divergence from the checkpoint's predictions
        with every closed block fitted by least squares.

        Args:
            **settings: those of `search`, which is made for every number of blocks.
        """
        sites = self._sites()
        processes = PartialState()
        if self.args.selector == SUPERNET:
            fitness: Fitness = self._supernet_fitness(sites, resume=True)
            score = "supernet: negated cross entropy, nats"
        else:
            images = self._calibration_batches()
            fitness = fitted_fitness(self.model, sites, images, processes)
            score = "fitted: negated divergence from the checkpoint, nats"
        front = front_of(
            self.model,
            sites,
            fitness,
            score=score,
            start=self.args.start,  # type: ignore[arg-type]
            end_activation=self.args.end_activation,
            batch_size=self.args.per_device_eval_batch_size,
            processes=processes,
            **{"seed": self.args.seed, **settings},
        )
        if self.is_world_process_zero():
            front.save(self.args.output_dir)
        return front

    def _sites(self) -> tuple[Site, ...]:
        """The candidates, those that the main process found."""
        if self.args.cost == "latency" or self.args.target_speed_up is not None:
            self._latencies = self._latencies or LatencyTable(self.args.per_device_eval_batch_size)
        return agreed(lambda: require_sites(self.model, self.args.form, latencies=self._latencies), PartialState())

    def _supernet_fitness(self, sites: tuple[Site, ...], *, resume: bool) -> ScoreHistory:
        """Train a supernet of `sites` on what is not sampled, and return the fitness of choices on the sample."""
        args, processes = self.args, PartialState()
        folder = self._selection_folder
        if processes.is_main_process and not resume:
            shutil.rmtree(folder, ignore_errors=True)
        processes.wait_for_everyone()
        plan = Plan(sites, args.start, args.end_activation)  # type: ignore[arg-type]
        images = self._calibration_batches()
        _, rest = sample_and_rest(self.train_dataset, args.calibration_size, args.seed)
        self._supernet = train_supernet(
            self.model,
            plan,
            images,
            args,
            folder,
            train_dataset=rest,
            data_collator=self.data_collator,
            compute_loss_func=self.compute_loss_func,
            optimizer_cls_and_kwargs=self.optimizer_cls_and_kwargs,
        )
        subject = {"sites": plan.digest(), "supernet": args.supernet_fraction, "images": args.calibration_size}
        return ScoreHistory(
            spread(label_fit(self._supernet, images), processes),
            {**subject, "seed": args.seed},
            file=folder / "scores.jsonl",
            processes=processes,
            disable_tqdm=bool(args.disable_tqdm),
        )

    def _calibration_batches(self) -> list[dict[str, Tensor]]:
        """The images to calibrate with and to score by, the same on every process, with labels if they have any."""
        sample, _ = sample_and_rest(self.train_dataset, self.args.calibration_size, self.args.seed)
        if isinstance(sample, datasets.Dataset):
            sample = self._remove_unused_columns(sample, description="calibration")
        loader = DataLoader(sample, batch_size=self.args.per_device_eval_batch_size, collate_fn=self.data_collator)
        names = (self.image_key, "labels")
        with random_states_kept():
            # Augmentation draws from the global generators; training is not to notice.
            seed_generators(self.args.seed)
            return [{name: batch[name] for name in names if name in batch} for batch in loader]

    @property
    def _selection_folder(self) -> Path:
        return Path(self.args.output_dir) / SELECTION
