"""The ways to train that are compared, each with the Trainer that it takes."""

from typing import NamedTuple

from accelerate.utils import TorchDynamoPlugin
from transformers import (
    Trainer,
    TrainingArguments,
)

from recipes.benchmarks.training.arguments import TrainingBenchmarkArguments
from recipes.benchmarks.training.networks import model_of, spread
from updp_hf import Plan, UPDPTrainer, UPDPTrainingArguments, gate_
from updp_hf.core.plan.site import Site
from updp_hf.training.supernet import SupernetTrainer


class Variant(NamedTuple):
    """A way to train: plainly, with λ held at a value, or as a supernet; with a teacher or without."""

    kind: str
    has_teacher: bool


PLAIN, SUPERNET = "plain", "supernet"
LAMBDAS = {"λ = 0": 0.0, "λ = 0.5": 0.5, "λ = 1": 1.0}
VARIANTS = [Variant(kind, has_teacher) for has_teacher in (False, True) for kind in (PLAIN, *LAMBDAS, SUPERNET)]


def trainer_of(
    name: str, variant: Variant, sites: tuple[Site, ...], options: TrainingBenchmarkArguments, folder: str
) -> Trainer:
    """Return the Trainer that `variant` stands for, its model gated and λ set."""
    model = model_of(name, options)
    common = {
        "use_cpu": options.device == "cpu",
        "bf16": options.bf16,
        "torch_compile": options.compile,
        "learning_rate": 1e-5,
        "report_to": "none",
        "disable_tqdm": True,
    }
    if variant == Variant(PLAIN, False):
        return Trainer(model, TrainingArguments(folder, **common))
    plan = Plan(sites if variant.kind == SUPERNET else spread(sites, options.num_pruned_blocks))
    distillation = "soft" if variant.has_teacher else "none"
    args = UPDPTrainingArguments(folder, plan=plan, distillation=distillation, **common)
    if variant.kind == SUPERNET:
        gate_(model, plan)
        trainer = SupernetTrainer(model, args)
        trainer.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")  # as its `train` has it
        return trainer
    trainer = UPDPTrainer(model, args)
    if variant.kind != PLAIN:
        gate_(model, plan)
        trainer.callback.schedule = lambda progress: LAMBDAS[variant.kind]
    trainer.prepare_teacher()
    return trainer
