"""What the versions of a network cost, and how long they take."""

import copy
from collections.abc import Iterable
from typing import Any

import timm
import torch
from torch import nn

from recipes.benchmarks.latency.arguments import LatencyArguments
from recipes.benchmarks.latency.modes import FORMATS, ONNX, prepared
from recipes.benchmarks.latency.networks import CALIBRATION_IMAGES, merged, randomize_
from recipes.benchmarks.latency.roofline import Peaks, least_seconds, operators_of
from updp_hf import Plan, find_sites
from updp_hf.core.cost import count_macs, count_parameters, measure_latency
from updp_hf.core.plan.budget import Demand
from updp_hf.selection.selectors import uniform
from updp_hf.surgery.model_io import example_inputs_of


def measure(name: str, options: LatencyArguments, peaks: Peaks) -> dict[str, Any]:
    """Return what the versions of one net cost, the least time that takes, and their latencies at each batch size."""
    torch.manual_seed(options.seed)
    baseline = timm.create_model(name).eval()
    randomize_(baseline)
    sites = tuple(site for site in find_sites(baseline, [options.form]).sites if site.saves_compute)
    levels = options.levels or [round(len(sites) * quarter / 4) for quarter in range(1, 5)]
    counts = [level for level in sorted(set(levels)) if 0 < level <= len(sites)]
    spread = {count: uniform(Demand((1.0,) * len(sites), count)) for count in counts}
    plans = {count: Plan(tuple(sites[index] for index in choice), start="inherit") for count, choice in spread.items()}
    images = [example_inputs_of(baseline, CALIBRATION_IMAGES)]
    versions = {"P0": baseline, **{f"P{level}": merged(baseline, plan, images) for level, plan in plans.items()}}
    example = example_inputs_of(baseline)
    facts: dict[str, dict[str, Any]] = {
        version: {"parameters": count_parameters(model), "macs": count_macs(model, example), "merged_blocks": 0}
        for version, model in versions.items()
    }
    for level, plan in plans.items():
        facts[f"P{level}"]["merged_blocks"] = len(plan.blocks)
    for version, model in versions.items():
        model.to(options.device, getattr(torch, options.dtype))
        facts[version] |= roofline_of(model, options.batch_sizes, peaks)
    return {
        "image": list(next(iter(example.values())).shape[1:]),
        "sites": len(sites),
        "versions": facts,
        "latencies": [latency(versions, mode, size, options) for mode in options.modes for size in options.batch_sizes],
    }


def roofline_of(model: nn.Module, batch_sizes: Iterable[int], peaks: Peaks) -> dict[str, dict[str, float]]:
    """Return the bytes that a forward of `model` moves, and the least seconds that it takes, both by batch size."""
    forwards = {str(size): operators_of(model, example_inputs_of(model, size)) for size in batch_sizes}
    return {
        "bytes": {size: sum(operator.bytes for operator in operators) for size, operators in forwards.items()},
        "bound_seconds": {size: least_seconds(operators, peaks) for size, operators in forwards.items()},
    }


def latency(
    versions: dict[str, nn.Module], mode: str, batch_size: int, options: LatencyArguments
) -> dict[str, int | str | dict[str, float]]:
    """Return the median seconds of one forward of each version, all in the memory format that suits P0 best."""
    images = example_inputs_of(versions["P0"], batch_size)
    baselines: dict[str, float] = {}
    convolutions = sum(isinstance(module, nn.Conv2d) for module in versions["P0"].modules())
    if mode != ONNX and convolutions > 1:  # ONNX Runtime has a layout of its own; one is a patch embedding
        candidates = {name: prepared(copy.deepcopy(versions["P0"]), name, mode, images) for name in FORMATS}
        medians = measure_latency(candidates, [images], rounds=options.rounds)
        baselines = {name: median for name, (median,) in medians.items()}
    best = min(baselines, key=baselines.__getitem__, default="contiguous")
    images = {name: image.contiguous(memory_format=FORMATS[best]) for name, image in images.items()}
    models = {version: prepared(model, best, mode, images) for version, model in versions.items()}
    medians = measure_latency(models, [images], rounds=options.rounds)
    return {
        "mode": mode,
        "batch_size": batch_size,
        "memory_format": best,
        "baseline_by_format": baselines,
        "seconds": {version: median for version, (median,) in medians.items()},
    }
