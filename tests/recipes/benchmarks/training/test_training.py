"""The benchmark of training steps: every way to train is measured, and the tables say of what."""

import itertools
import json

import pytest
import torch

from recipes.benchmarks.training.arguments import TrainingBenchmarkArguments
from recipes.benchmarks.training.measuring import benchmark
from recipes.benchmarks.training.memory import peak_bytes
from recipes.benchmarks.training.networks import model_of, sites_of
from recipes.benchmarks.training.steps import measured_in_turn, step_of
from recipes.benchmarks.training.tables import tables
from recipes.benchmarks.training.variants import Variant, trainer_of


@pytest.fixture
def options():
    return TrainingBenchmarkArguments(quick=True, memory=False, device="cpu", workers=0, models=["deit_small"])


@pytest.mark.slow
def test_every_way_to_train_is_measured(options):
    results = benchmark(options)
    found = results["networks"]["deit_small"]
    assert [(v["kind"], v["has_teacher"]) for v in found["variants"]] == [
        (kind, teacher) for teacher in (False, True) for kind in ("plain", "λ = 0", "λ = 0.5", "λ = 1", "supernet")
    ]
    assert all(variant["step_seconds"] > 0 for variant in found["variants"])
    assert (found["gated_sites"], found["sites"], found["settings"]) == (2, 3, 4)
    assert results["loaded_images_per_second"] > 0
    json.dumps(results)
    text = tables(results)
    assert "a setting" in text
    assert "images/s" in text
    assert "memory" not in text.split("arguments")[0]


@pytest.mark.parametrize(("kind", "value"), [("λ = 0.5", 0.5), ("supernet", 0.0)])
def test_a_step_trains_and_leaves_lambda_where_it_is_held(options, tmp_path, kind, value):
    sites = sites_of(model_of("deit_small", options), options.form)
    trainer = trainer_of("deit_small", Variant(kind, True), sites, options, str(tmp_path))
    weights = [parameter.clone() for parameter in trainer.model.parameters()]
    step = step_of(trainer, options)
    for _ in range(3):
        step()
    lambdas = {float(buffer) for name, buffer in trainer.model.named_buffers() if name.endswith(".lam")}
    assert lambdas == ({value} if value is not None else set())
    assert any(not torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters(), strict=True))
    assert trainer.state.global_step == 3


def test_rounds_begin_with_another_variant_and_the_first_are_not_counted(options):
    ticks = itertools.count()
    taken = []
    steps = {name: lambda name=name: taken.append(name) for name in "abc"}
    times = measured_in_turn(steps, options, lambda: next(ticks))
    assert "".join(taken) == "abcbcacababc"
    assert times == {name: [1] * options.rounds for name in "abc"}


@pytest.mark.slow
def test_memory_is_measured_in_processes_of_their_own(options):
    plain, supernet = (peak_bytes("deit_small", Variant(kind, False), options) for kind in ("plain", "supernet"))
    assert 2**20 < plain < 2**30
    assert 2**20 < supernet < 2**30
