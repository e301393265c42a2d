"""Steps as the loops of the Trainers take them, and how long they take in turn."""

import statistics
import time
from collections.abc import Callable

import torch
from transformers import (
    Trainer,
)

from recipes.benchmarks.training.arguments import TrainingBenchmarkArguments
from recipes.benchmarks.training.networks import CLASSES
from recipes.benchmarks.training.variants import Variant

WARM_UP = 2
"""Steps of each variant that are not counted; the first ones compile and fill caches."""


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


def measured_in_turn(
    steps: dict[Variant, Callable[[], None]],
    options: TrainingBenchmarkArguments,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Variant, list[float]]:
    """Return the seconds of each step, one a round; each round begins with another variant, so that drifts cancel."""
    times: dict[Variant, list[float]] = {variant: [] for variant in steps}
    variants = list(steps)
    for round_ in range(WARM_UP + options.rounds):
        first = round_ % len(variants)
        for variant in variants[first:] + variants[:first]:
            elapsed = seconds(steps[variant], options.device, clock)
            if round_ >= WARM_UP:
                times[variant].append(elapsed)
    return times


def seconds(step: Callable[[], None], device: str, clock: Callable[[], float]) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    begin = clock()
    step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return clock() - begin


def ratio(elapsed: list[float], plain: list[float]) -> float:
    """Return the median of the ratios within each round."""
    return statistics.median(mine / other for mine, other in zip(elapsed, plain, strict=True))
