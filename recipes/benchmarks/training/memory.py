"""The peak of memory of two steps."""

import gc
import multiprocessing
import resource
import tempfile

import torch

from recipes.benchmarks.training.arguments import TrainingBenchmarkArguments
from recipes.benchmarks.training.networks import model_of, sites_of
from recipes.benchmarks.training.steps import step_of
from recipes.benchmarks.training.variants import Variant, trainer_of


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
