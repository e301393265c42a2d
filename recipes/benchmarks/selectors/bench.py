"""A trained baseline, and plans that are fine-tuned from it."""

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, PreTrainedModel, Trainer, set_seed

from recipes import digits
from recipes.benchmarks.selectors.images import BATCH, SAMPLE, Distorted, hard_digits
from recipes.benchmarks.selectors.networks import NETS
from updp_hf import Plan, UPDPTrainer
from updp_hf.core.kinds import Form
from updp_hf.core.plan.budget import Choice, Demand
from updp_hf.core.plan.site import Site
from updp_hf.data.calibration_set import sample_and_rest
from updp_hf.selection.scores import labels_of, log_probabilities
from updp_hf.surgery.find import require_sites


class Bench(NamedTuple):
    """A trained baseline and what is needed to judge plans for it."""

    name: str
    seed: int
    model: PreTrainedModel
    sites: tuple[Site, ...]
    train: Distorted
    test: list[dict[str, Tensor]]
    sample: list[dict[str, Tensor]]

    @classmethod
    def of(cls, name: str, seed: int, folder: Path) -> "Bench":
        """Make the data, and train the baseline if it is not in `folder`."""
        config = copy.deepcopy(digits.BASELINES[name].config)
        for change, value in {**NETS[name].changes, "num_labels": 10}.items():
            setattr(config, change, value)
        train, test = hard_digits(config.image_size, seed)
        if not (folder / "config.json").is_file():
            set_seed(seed)
            model = AutoModelForImageClassification.from_config(config)
            rate = digits.BASELINES[name].learning_rate
            args = arguments(name, seed, folder, num_train_epochs=NETS[name].baseline_epochs, learning_rate=rate)
            trainer = Trainer(model=model, args=args, train_dataset=train)
            trainer.train()
            trainer.save_model()
        model = AutoModelForImageClassification.from_pretrained(folder).eval()
        torch.manual_seed(seed)
        part, _ = sample_and_rest(train, SAMPLE, seed)
        sample = list(DataLoader(part, batch_size=BATCH))
        return cls(name, seed, model, require_sites(model, Form.MERGE), train, test, sample)

    @property
    def demand(self) -> Demand:
        return Demand((1.0,) * len(self.sites), NETS[self.name].num_pruned_blocks)


def arguments(name: str, seed: int, folder: Path | str, **changes: Any) -> digits.DigitsArguments:
    """Return the arguments of the digits recipe, on one thread of the CPU and without a word."""
    quiet = {"eval_strategy": "no", "eval_on_start": False, "logging_strategy": "no", "report_to": "none"}
    as_in_the_paper = {"start": "inherit", "ramp_end": 0.5}
    settings = {
        **quiet,
        **as_in_the_paper,
        "use_cpu": True,
        "disable_tqdm": True,
        "calibration_size": SAMPLE,
        **changes,
    }
    return digits.DigitsArguments(model=name, seed=seed, output_dir=str(folder), **settings)


def fine_tuned(bench: Bench, choice: Choice, seed: int) -> dict[str, float]:
    """Return accuracy and loss of the pruned network on the held-out images."""
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(tuple(bench.sites[index] for index in choice), start="inherit")
        args = arguments(bench.name, seed, folder, num_train_epochs=NETS[bench.name].epochs, plan=plan)
        set_seed(seed)
        trainer = UPDPTrainer(model=copy.deepcopy(bench.model), args=args, train_dataset=bench.train)
        trainer.train()
        return held_out(trainer.model, bench.test)


def held_out(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Return accuracy and mean loss of `model` on the batches."""
    found, labels = log_probabilities(model, batches).cpu(), torch.cat([labels_of(batch) for batch in batches])
    return {
        "accuracy": float((found.argmax(-1) == labels).double().mean()),
        "loss": float(F.nll_loss(found, labels)),
    }
