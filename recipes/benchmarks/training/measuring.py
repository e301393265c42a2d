"""All that is measured of the ways to train."""

import statistics
import tempfile
from typing import Any

import torch

from recipes.benchmarks.conditions import conditions_of
from recipes.benchmarks.training.arguments import TrainingBenchmarkArguments
from recipes.benchmarks.training.loader import images_per_second, training_images
from recipes.benchmarks.training.memory import peak_bytes
from recipes.benchmarks.training.networks import model_of, sites_of, spread
from recipes.benchmarks.training.steps import measured_in_turn, ratio, step_of
from recipes.benchmarks.training.variants import PLAIN, VARIANTS, Variant, trainer_of
from updp_hf.training.supernet import SupernetTrainer


def benchmark(options: TrainingBenchmarkArguments) -> dict[str, Any]:
    """Return all that was measured, and the conditions."""
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
