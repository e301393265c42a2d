"""The straight line of a recipe: what it prunes, and how it goes on where it was interrupted."""

import sys

import pytest
from project import RECIPES
from recipe_runs import LIT, arguments, options, saved
from tiny_training import assert_equal, weights
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    TrainerCallback,
)

from updp_hf.data import streams
from updp_hf.data.augmentation import AugmentationArguments
from updp_hf.data.reading import read_image
from updp_hf.recipe.prepare import prepare
from updp_hf.recipe.run import prune, run, summary
from updp_hf.reporting.report import Cost, Report


@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_folder_of_images_is_pruned_on(streaming, pictures, tmp_path):
    checkpoint = saved(ConvNextForImageClassification(ConvNextConfig(**LIT)), tmp_path / "checkpoint")
    given = options(data_dir=pictures, model_name_or_path=checkpoint, streaming=streaming)
    data, augmentation, args = arguments("convnext_tiny", *given, folder=tmp_path / "out")
    trainer = prepare(data, augmentation, args)
    prune(trainer, augmentation)
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert len(merged.config.plan["sites"]) == 1
    assert trainer.state.log_history[-1]["broken_images"] >= 1
    assert Report.load(tmp_path / "out").arguments["cutmix"] == 1.0
    assert "cutmix" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_same_command_goes_on_where_a_run_was_interrupted(tmp_path, capsys):
    given = ["--smoke", *options(save_strategy="steps", save_steps=1, max_train_samples=64, max_eval_samples=16)]

    def trainer():
        return prepare(*arguments("deit_tiny", *given, folder=tmp_path))

    interrupt(trainer())
    assert "Pruning " in capsys.readouterr().out
    resumed = trainer()
    prune(resumed, AugmentationArguments())
    assert "Going on with " in capsys.readouterr().out
    straight = prepare(*arguments("deit_tiny", *given, folder=tmp_path / "straight"))
    prune(straight, AugmentationArguments())
    assert_equal(weights(resumed.model), weights(straight.model))
    facts = [Report.load(folder).selection for folder in (tmp_path, tmp_path / "straight")]
    assert facts[0].candidates == facts[1].candidates


@pytest.mark.slow
def test_a_stream_goes_on_in_another_order_and_reads_nothing_again_to_skip_it(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(streams, "read_image", lambda value: read.append(value["bytes"]) or read_image(value))
    given = ["--smoke", *options(streaming=True, save_strategy="steps", save_steps=1, global_batch_size=32)]

    def trainer():
        return prepare(*arguments("deit_tiny", *given, folder=tmp_path))

    interrupt(trainer())
    before = read.copy()
    read.clear()
    resumed = trainer()
    prune(resumed, AugmentationArguments())
    assert resumed.state.global_step == 4
    assert 2 * 32 <= len(read) < 4 * 32  # two steps, and what was read ahead
    assert read[:16] != before[:16]


def interrupt(run):
    run.add_callback(Interruption())
    with pytest.raises(KeyboardInterrupt):
        prune(run, AugmentationArguments())


class Interruption(TrainerCallback):
    """End a run in its third step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_what_this_package_says_ends_a_recipe_with_a_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prune.py"])
    with pytest.raises(SystemExit, match=r"^prune\.py: Of `dataset`, .* none is given"):
        run(str(RECIPES / "prune.py"))


def test_other_errors_end_a_recipe_with_a_traceback(monkeypatch):
    given = ["--config", str(RECIPES / "deit_tiny.yaml"), "--no_such_option", "1"]
    monkeypatch.setattr(sys, "argv", ["prune.py", *given])
    with pytest.raises(ValueError, match="not used by the HfArgumentParser"):
        run(str(RECIPES / "prune.py"))


def test_the_summary_says_what_was_not_measured():
    costs = Cost(2_000_000, 10**9, {"1": 0.002}), Cost(1_000_000, 5 * 10**8, {"1": 0.001})
    report = Report(plan={}, before=costs[0], after=costs[1], metrics_after={"accuracy": 0.5})
    table = summary(report)
    assert "not measured" in table
    assert "50.00%" in table
    assert "2.00×" in table
