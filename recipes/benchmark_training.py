"""What pruning costs while training: time and memory of steps, against plain fine-tuning of the same network.

    python recipes/benchmark_training.py --output model_cards/benchmark_training_cpu.json
    python recipes/benchmark_training.py --device cuda --bf16 --compile --batch_size 128

The whole tables stand in `recipes/benchmark_training.md`.

Networks in the shapes of DeiT-S and ConvNeXt-T with random weights take training steps in turn, each as the Trainers
take them: the stock Trainer for plain fine-tuning, `UPDPTrainer` with λ held at 0, 0.5 and 1, `SupernetTrainer` with
its four settings a step. All do so with a teacher, too: the unpruned checkpoint, or the supernet's own open setting. A
step is the callback that writes λ, forward, loss, backward, clipping and the optimizer.

Memory is the peak of two steps: what the device's allocator gave out, or, on a CPU, by how much the peak of resident
memory of a process grew that was forked for this alone, from one that holds the libraries and nothing else.
"""

import gc
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import TorchDynamoPlugin
from conditions import conditions_of, write_json
from loader_speed import images_per_second, training_images
from torch import nn
from training_tables import report_of, tables
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from updp_hf import Plan, UPDPTrainer, UPDPTrainingArguments, find_sites, gate_
from updp_hf.core.kinds import DEFAULT_FORM, Form
from updp_hf.core.plan.budget import Demand
from updp_hf.core.plan.site import Site
from updp_hf.recipe.command_line import parse_arguments
from updp_hf.selection.selectors import uniform
from updp_hf.training.supernet import SupernetTrainer

TABLE = Path(__file__).with_suffix(".md")
CLASSES = 1000
WARM_UP = 2
"""Steps of each variant that are not counted; the first ones compile and fill caches."""


@dataclass
class TrainingBenchmarkArguments:
    """The networks, how much of them is pruned, and how they are measured."""

    models: list[str] = field(
        default_factory=lambda: ["deit_small", "convnext_tiny"], metadata={"help": "deit_small, convnext_tiny."}
    )
    form: str = field(
        default=DEFAULT_FORM.value,
        metadata={"help": "What closing a site leaves behind.", "choices": [form.value for form in Form]},
    )
    num_pruned_blocks: int = field(default=6, metadata={"help": "Sites that are gated, spread over the depth."})
    image_size: int = field(default=224, metadata={"help": "Pixels along each side of an image."})
    batch_size: int = field(default=4, metadata={"help": "Images in a step."})
    rounds: int = field(default=8, metadata={"help": "Steps that are measured of each variant, in turn."})
    workers: int = field(default=2, metadata={"help": "Processes that load images, where the loader is measured."})
    loaded_images: int = field(default=512, metadata={"help": "Images that the loader delivers; 0: not measured."})
    memory: bool = field(default=True, metadata={"help": "Measure memory."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to run."})
    bf16: bool = field(default=False, metadata={"help": "Autocast to bfloat16."})
    compile: bool = field(default=False, metadata={"help": "torch.compile all but supernets."})
    quick: bool = field(default=False, metadata={"help": "Tiny networks and few steps: does it run at all?"})
    output: str = field(default="", metadata={"help": "JSON file for what was measured."})

    def __post_init__(self) -> None:
        if self.quick:
            self.image_size, self.batch_size, self.rounds, self.num_pruned_blocks = 32, 2, 2, 2
            self.loaded_images = min(self.loaded_images, 16)


class Network(NamedTuple):
    """The classes of a network, its shape, and that of a tiny one of its kind."""

    model: type[PreTrainedModel]
    config: type[PreTrainedConfig]
    shape: dict[str, Any]
    tiny: dict[str, Any]


NETWORKS = {
    "deit_small": Network(
        DeiTForImageClassification,
        DeiTConfig,
        {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
        {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 3},
    ),
    "convnext_tiny": Network(
        ConvNextForImageClassification, ConvNextConfig, {}, {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 32, 64]}
    ),
}


class Variant(NamedTuple):
    """A way to train: plainly, with λ held at a value, or as a supernet; with a teacher or without."""

    kind: str
    has_teacher: bool


PLAIN, SUPERNET = "plain", "supernet"
LAMBDAS = {"λ = 0": 0.0, "λ = 0.5": 0.5, "λ = 1": 1.0}
VARIANTS = [Variant(kind, has_teacher) for has_teacher in (False, True) for kind in (PLAIN, *LAMBDAS, SUPERNET)]


def main() -> None:
    (options,) = parse_arguments(TrainingBenchmarkArguments)
    results = benchmark(options)
    print(tables(results))
    if options.output:
        write_json(results, options.output)
        files = sorted(Path(options.output).parent.glob("benchmark_training_*.json"))
        TABLE.write_text(report_of(files), encoding="utf-8")


def benchmark(options: TrainingBenchmarkArguments) -> dict[str, Any]:
    """Return all that was measured, and the conditions."""
    torch.backends.cudnn.benchmark = True
    loaded = None
    if options.loaded_images:
        images = training_images(options.loaded_images, options.image_size)
        loaded = images_per_second(images, options.batch_size, options.workers)
    with torch._dynamo.config.patch(recompile_limit=10 * len(VARIANTS)):  # networks of one class share a cache
        networks = {name: measure(name, options) for name in options.models}
    return {"networks": networks, "loaded_images_per_second": loaded, **conditions_of(options)}


def measure(name: str, options: TrainingBenchmarkArguments) -> dict[str, Any]:
    """Return what was gated of one network, and for each variant the time of its step, ratios and memory."""
    memory = {variant: peak_bytes(name, variant, options) if options.memory else None for variant in VARIANTS}
    sites = sites_of(model_of(name, options), options.form)
    with tempfile.TemporaryDirectory() as folder:
        steps = {}
        for variant in VARIANTS:  # one after another, for the newest Trainer's arguments are accelerate's state
            trainer = trainer_of(name, variant, sites, options, folder)
            steps[variant] = step_of(trainer, options)
            if isinstance(trainer, SupernetTrainer):
                settings = len(trainer.settings(0))
        times = measured_in_turn(steps, options)
    variants = [
        {
            **variant._asdict(),
            "step_seconds": statistics.median(elapsed),
            "time_ratio": ratio(elapsed, times[Variant(PLAIN, False)]),
            "time_ratio_alike": ratio(elapsed, times[Variant(PLAIN, variant.has_teacher)]),
            "peak_bytes": memory[variant],
        }
        for variant, elapsed in times.items()
    ]
    gated = len(spread(sites, options.num_pruned_blocks))
    return {"sites": len(sites), "gated_sites": gated, "settings": settings, "variants": variants}


def ratio(elapsed: list[float], plain: list[float]) -> float:
    """Return the median of the ratios within each round."""
    return statistics.median(mine / other for mine, other in zip(elapsed, plain, strict=True))


def measured_in_turn(
    steps: dict[Variant, Callable[[], None]], options: TrainingBenchmarkArguments
) -> dict[Variant, list[float]]:
    """Return the seconds of each step, one a round; each round begins with another variant, so that drifts cancel."""
    times: dict[Variant, list[float]] = {variant: [] for variant in steps}
    variants = list(steps)
    for round_ in range(WARM_UP + options.rounds):
        first = round_ % len(variants)
        for variant in variants[first:] + variants[:first]:
            elapsed = seconds(steps[variant], options.device)
            if round_ >= WARM_UP:
                times[variant].append(elapsed)
    return times


def seconds(step: Callable[[], None], device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def model_of(name: str, options: TrainingBenchmarkArguments) -> nn.Module:
    """Build the network `name` with random weights."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    shape = network.tiny if options.quick else network.shape
    return network.model(network.config(image_size=options.image_size, num_labels=CLASSES, **shape))


def sites_of(model: nn.Module, form: str) -> tuple[Site, ...]:
    """Return the candidates: what a supernet gates."""
    return tuple(site for site in find_sites(model, [form]).sites if site.saves_compute)


def spread(sites: tuple[Site, ...], count: int) -> tuple[Site, ...]:
    """Return `count` of `sites`, or all, spread evenly over the depth."""
    demand = Demand((1.0,) * len(sites), min(count, len(sites)))
    return tuple(sites[index] for index in uniform(demand))


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
    if variant.has_teacher:
        trainer._prepare_teacher()
    return trainer


def step_of(trainer: Trainer, options: TrainingBenchmarkArguments) -> Callable[[], None]:
    """Return a function that takes one step of `trainer` on random images, as its loop takes it."""
    device = trainer.args.device
    size = (options.batch_size, 3, options.image_size, options.image_size)
    inputs = {
        "pixel_values": torch.randn(size, device=device),
        "labels": torch.randint(CLASSES, size[:1], device=device),
    }
    trainer.create_optimizer()
    model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.max_steps = WARM_UP + options.rounds

    def step() -> None:
        trainer.callback_handler.on_step_begin(trainer.args, trainer.state, trainer.control)
        trainer.training_step(model, inputs)
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        model.zero_grad()
        trainer.state.global_step += 1

    return step


def peak_bytes(name: str, variant: Variant, options: TrainingBenchmarkArguments) -> int:
    """Return the peak memory of building the Trainer of `variant` and taking two steps."""
    if options.device.startswith("cuda"):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        take_two_steps(name, variant, options)
        return torch.cuda.max_memory_allocated() - before
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(["updp_hf.training.trainer", "updp_hf.training.supernet"])
    with forking.Pool(1) as pool:
        return pool.apply(growth_of_two_steps, (name, variant, options))


def growth_of_two_steps(name: str, variant: Variant, options: TrainingBenchmarkArguments) -> int:
    """Take two steps and return by how many bytes the peak of this process's resident memory grew."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    take_two_steps(name, variant, options)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def take_two_steps(name: str, variant: Variant, options: TrainingBenchmarkArguments) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # Looked for where nothing is gated, too: the libraries that this takes are then in every process.
        sites = sites_of(model_of(name, options), options.form)
        step = step_of(trainer_of(name, variant, sites, options, folder), options)
        step()
        step()


if __name__ == "__main__":
    main()
