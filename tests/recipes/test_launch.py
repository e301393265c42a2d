"""Recipes as a user starts them."""

import os
import re
import subprocess
import sys

import pytest
from project import RECIPES
from recipe_runs import arguments
from transformers import (
    AutoModelForImageClassification,
)

from updp_hf.recipe.prepare import prepare
from updp_hf.reporting.report import Report


def started(name, *given, **environment):
    command = [sys.executable, str(RECIPES / f"{name}.py"), *given]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


@pytest.mark.slow
def test_without_the_hub_a_recipe_ends_with_one_sentence(tmp_path):
    ended = started("deit_small", "--output_dir", str(tmp_path / "out"), HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert ended.returncode == 1
    (sentence,) = [line for line in ended.stderr.splitlines() if line.startswith("deit_small.py: ")]
    assert "ILSVRC/imagenet-1k could not be reached" in sentence
    assert all(option in sentence for option in ("--data_dir", "--dataset digits", "--dataset glyphs"))
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists()


QUICK = {"selector": "uniform", "max_steps": 4, "eval_steps": 4, "max_train_samples": 64, "max_eval_samples": 16}


@pytest.mark.slow
def test_a_recipe_prints_lines_and_one_table_and_nothing_else(tmp_path):
    short = [part for name, value in QUICK.items() for part in (f"--{name}", str(value))]
    config = ["--config", str(RECIPES / "deit_tiny.yaml")]
    ended = started("prune", *config, "--smoke", *short, "--output_dir", str(tmp_path / "out"))
    assert (ended.returncode, ended.stderr) == (0, "")
    lines, pruned = (part.splitlines() for part in ended.stdout.split("\n\n")[:2])
    assert all(line.startswith("   step") for line in lines[2:])
    assert pruned[0].startswith("Pruned: vit.layers.")
    assert len(re.findall(r"^\|-", ended.stdout, flags=re.MULTILINE)) == 1
    assert not re.search(r"[{}\r\x1b]|it/s", ended.stdout)
    assert ended.stdout.endswith(f"are in {tmp_path / 'out'}.\n")


DRAWN_ALIKE = {
    "mobilenetv2": ["--learning_rate", "1e-5"],  # else it multiplies the rounding of the sums of gradients
}


def smoke(name, processes, folder, *given):
    file = RECIPES / "accelerate" / ("cpu.yaml" if processes == 1 else "multi_cpu.yaml")
    command = ["accelerate", "launch", "--config_file", str(file), str(RECIPES / f"{name}.py"), "--smoke", *given]
    command += DRAWN_ALIKE.get(name, [])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--output_dir", str(folder)], check=True, capture_output=True, env=environment)
    return Report.load(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit_tiny", "mobilenetv2"])
def test_one_and_two_processes_prune_alike(name, tmp_path):
    one, two = (smoke(name, count, tmp_path / str(count)) for count in (1, 2))
    assert two.training.processes == 2
    for report, folder in ((one, tmp_path / "1"), (two, tmp_path / "2")):
        merged = AutoModelForImageClassification.from_pretrained(folder)
        assert merged.config.plan["sites"] == report.plan["sites"]
    assert two.plan["sites"] == one.plan["sites"]
    assert two.metrics_after["loss"] == pytest.approx(one.metrics_after["loss"], rel=0.01)


@pytest.mark.slow
def test_two_processes_train_on_parts_of_a_stream_that_end_at_different_steps(tmp_path):
    given = ["--streaming", "true", "--max_train_samples", "97", "--global_batch_size", "64", "--selector", "uniform"]
    report = smoke("deit_tiny", 2, tmp_path, *given, "--calibration_size", "16", "--max_steps", "12")
    # 49 and 48 images in batches of 16, two of which make a step.
    assert (report.training.processes, report.training.steps) == (2, 12)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "at_once"), [(91, 64), (97, 16)])
def test_two_processes_count_each_held_out_image_of_a_stream_once(count, at_once, tmp_path):
    given = ["--streaming", "true", "--max_eval_samples", str(count), "--per_device_eval_batch_size", str(at_once)]
    given += ["--selector", "uniform", "--max_steps", "2"]
    two = smoke("deit_tiny", 2, tmp_path / "two", *given)
    alone = prepare(*arguments("deit_tiny", "--smoke", *given, folder=tmp_path / "one"))
    expected = alone.predict(alone.eval_dataset)
    assert len(expected.label_ids) == count
    assert two.training.processes == 2
    for name in ("accuracy", "top5_accuracy"):  # an image that counted twice would change the fraction
        assert two.metrics_before[name] == pytest.approx(expected.metrics[f"test_{name}"], abs=1e-9)
