"""A trained baseline of the benchmark of accuracy, and what becomes of it in each way."""

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, PreTrainedModel

from recipes.benchmarks.accuracy.images import Budget, Splits
from recipes.benchmarks.accuracy.nets import FAMILIES, config_of, options, pruned, trained, untrained
from recipes.benchmarks.accuracy.thinning import thinned
from recipes.benchmarks.accuracy.ways import BASELINE, DROP, HOW, PAPER, SMALLER, TORCH_PRUNING, UPDP, Network
from recipes.benchmarks.latency.networks import merged
from recipes.benchmarks.selectors.bench import held_out
from updp_hf import Plan, UPDPTrainingArguments
from updp_hf.core.kinds import DEFAULT_FORM, Form
from updp_hf.core.plan.budget import Choice, Demand
from updp_hf.selection.selectors import selector_by_name
from updp_hf.surgery.find import require_sites
from updp_hf.training.checkpoints import appearing_whole


class _InOrder(Demand):
    """A demand that returns what is taken in the order in which it is given."""

    def take(self, order: Iterable[int]) -> Choice:
        return tuple(order)


@dataclass(frozen=True)
class Bench:
    """A trained baseline and what is needed to judge what is made of it."""

    family: str
    seed: int
    budget: Budget
    splits: Splits
    folder: Path
    device: str

    @property
    def labels(self) -> int:
        return int(self.splits.train.labels.max()) + 1

    def baseline(self) -> PreTrainedModel:
        """Return the baseline, trained if it has not been yet."""
        folder, family = self.folder / "baseline", FAMILIES[self.family]
        if not folder.is_dir():
            model = untrained(config_of(self.family, self.labels), self.seed)
            settings = self.settings("training", self.baseline_epochs, family.learning_rate)
            model = trained(model, self.splits.train, settings)
            with appearing_whole(folder) as unfinished:
                model.save_pretrained(unfinished)
        model = AutoModelForImageClassification.from_pretrained(folder)
        return model.to(self.device).eval()

    def settings(self, name: str, epochs: float, learning_rate: float) -> dict[str, Any]:
        """Return the options of `TrainingArguments` for a training in the folder `name`."""
        settings = options(self.budget, self.folder / name, epochs, learning_rate, self.seed)
        return {**settings, "use_cpu": self.device == "cpu"}

    @property
    def baseline_epochs(self) -> float:
        return self.budget.baseline_scale * FAMILIES[self.family].baseline_epochs

    def sample(self) -> list[dict[str, Tensor]]:
        """Return the images that selection and calibration see."""
        count = self.budget.calibration_images
        return list(DataLoader(self.splits.train.part(0, count), batch_size=count))

    def plan(self, model: nn.Module, count: int, form: Form = DEFAULT_FORM, selector: str = "greedy") -> Plan:
        """Return the plan that closes `count` sites of `model`."""
        sites = require_sites(model, form)
        if selector == "greedy":
            choice = sorted(self.order(model, form)[:count])
        else:
            demand = Demand((1.0,) * len(sites), count)
            choice = list(selector_by_name(selector, model, sites, self.sample(), seed=self.seed)(demand))
        return Plan(tuple(sites[index] for index in choice), start="inherit")

    def order(self, model: nn.Module, form: Form) -> list[int]:
        """Return the sites in the order in which the greedy selector closes them, found once."""
        file = self.folder / f"order-{form}.json"
        if not file.is_file():
            sites = require_sites(model, form)
            order = selector_by_name("greedy", model, sites, self.sample())(_InOrder((1.0,) * len(sites), len(sites)))
            file.write_text(json.dumps(order), encoding="utf-8")
        found: list[int] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def build(self, network: Network, model: nn.Module) -> nn.Module:
        """Return what is made of the baseline `model`, as it is run afterwards, before any training."""
        if network.way == SMALLER:
            config = config_of(self.family, self.labels, int(network.amount))
            return untrained(config, self.seed).to(self.device).eval()
        if network.way == BASELINE:
            return copy.deepcopy(model)
        if network.way == TORCH_PRUNING:
            return thinned(model, network.amount)
        return merged(model, self.plan_of(network, model), self.sample())

    def plan_of(self, network: Network, model: nn.Module) -> Plan:
        form = {DROP: Form.BLOCK_DROP, PAPER: Form.MERGE}.get(network.way, DEFAULT_FORM)
        plan = self.plan(model, int(network.amount), form)
        return replace(plan, start=UPDPTrainingArguments.start) if network.way == UPDP else plan

    def run(
        self, network: Network, model: nn.Module, learning_rate: float, pruning: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Train what `network` says, with other options of pruning if any, and return how well it does."""
        epochs = self.budget.epochs + (self.baseline_epochs if network.way == SMALLER else 0)
        settings = self.settings("training", epochs, learning_rate)
        if network.way in (BASELINE, TORCH_PRUNING, SMALLER):
            result = trained(self.build(network, model), self.splits.train, settings)
        else:
            settings |= {"calibration_size": self.budget.calibration_images, **HOW[network.way]}
            settings |= {"plan": self.plan_of(network, model)} if pruning is None else pruning
            result = pruned(model, self.splits.train, settings)
        found = {"learning_rate": learning_rate, "epochs": epochs}
        for split, part in (("validation", self.splits.validation), ("test", self.splits.test)):
            found |= {f"{split}_{name}": value for name, value in held_out(result, part.batches()).items()}
        return found
