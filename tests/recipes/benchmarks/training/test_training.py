"""The benchmark of training steps: every way to train is measured, and the tables say of what."""

import importlib.util
import itertools
import json
import sys

import pytest
import torch
from project import RECIPES


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(RECIPES)
    spec = importlib.util.spec_from_file_location("benchmark_training", RECIPES / "benchmark_training.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_training", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    return module


@pytest.fixture
def options(recipe):
    return recipe.TrainingBenchmarkArguments(quick=True, memory=False, device="cpu", workers=0, models=["deit_small"])


@pytest.mark.slow
def test_every_way_to_train_is_measured(recipe, options):
    results = recipe.benchmark(options)
    found = results["networks"]["deit_small"]
    assert [(v["kind"], v["has_teacher"]) for v in found["variants"]] == [
        (kind, teacher) for teacher in (False, True) for kind in ("plain", "λ = 0", "λ = 0.5", "λ = 1", "supernet")
    ]
    assert all(variant["step_seconds"] > 0 for variant in found["variants"])
    assert (found["gated_sites"], found["sites"], found["settings"]) == (2, 3, 4)
    assert results["loaded_images_per_second"] > 0
    json.dumps(results)
    text = recipe.tables(results)
    assert "a setting" in text
    assert "images/s" in text
    assert "memory" not in text.split("arguments")[0]


@pytest.mark.parametrize(("kind", "value"), [("plain", None), ("λ = 0.5", 0.5), ("λ = 1", 1.0), ("supernet", 0.0)])
def test_a_step_trains_and_leaves_lambda_where_it_is_held(recipe, options, tmp_path, kind, value):
    sites = recipe.sites_of(recipe.model_of("deit_small", options), options.form)
    trainer = recipe.trainer_of("deit_small", recipe.Variant(kind, True), sites, options, str(tmp_path))
    weights = [parameter.clone() for parameter in trainer.model.parameters()]
    step = recipe.step_of(trainer, options)
    for _ in range(3):
        step()
    lambdas = {float(buffer) for name, buffer in trainer.model.named_buffers() if name.endswith(".lam")}
    assert lambdas == ({value} if value is not None else set())
    assert any(not torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters(), strict=True))
    assert trainer.state.global_step == 3


def test_rounds_begin_with_another_variant_and_the_first_are_not_counted(recipe, options, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(recipe.time, "perf_counter", lambda: next(ticks))
    taken = []
    steps = {name: lambda name=name: taken.append(name) for name in "abc"}
    times = recipe.measured_in_turn(steps, options)
    assert "".join(taken) == "abcbcacababc"
    assert times == {name: [1] * options.rounds for name in "abc"}


@pytest.mark.slow
def test_memory_is_measured_in_processes_of_their_own(recipe, options):
    plain, supernet = (
        recipe.peak_bytes("deit_small", recipe.Variant(kind, False), options) for kind in ("plain", "supernet")
    )
    assert 2**20 < plain < 2**30
    assert 2**20 < supernet < 2**30
