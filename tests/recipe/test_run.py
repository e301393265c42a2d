import importlib.util
import os
import subprocess
import sys

import PIL.Image
import pytest
import torch
from project import RECIPES
from tiny_training import assert_equal, vit, weights
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    TrainerCallback,
    ViTImageProcessor,
)

from updp_hf.data import streams
from updp_hf.data.augmentation import AugmentationArguments
from updp_hf.data.reading import read_image
from updp_hf.recipe import run as recipe
from updp_hf.recipe.run import (
    RecipeArguments,
    load_checkpoint,
    prepare,
    recipe_arguments,
    save_tiny,
    set_steps,
    summary,
)
from updp_hf.reporting.report import Cost, Report
from updp_hf.surgery.find import require_sites

NAMES = ["convnext_tiny", "deit_small", "deit_tiny", "mobilenetv2", "resnet34"]
LABELS = [str(digit) for digit in range(10)]


def tiny_of(name):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TINY


def arguments(name="deit_tiny", *options, folder="unused"):
    return recipe_arguments(RECIPES / f"{name}.py", ["--output_dir", str(folder), *options])


# the values


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_the_full_one_for_imagenet(name):
    data, augmentation, args = arguments(name)
    assert data.dataset_name == "ILSVRC/imagenet-1k"
    assert args.num_train_epochs >= 90
    assert args.global_batch_size == args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert 0.0 < args.learning_rate < 1.0
    assert args.num_pruned_blocks
    assert not args.smoke
    assert args.save_strategy == "steps"  # from which a run that was killed goes on
    assert augmentation.horizontal_flip == 0.5


@pytest.mark.parametrize("name", NAMES)
def test_a_smoke_run_is_on_digits_whatever_the_file_says(name):
    config = str(RECIPES / f"{name}.yaml")
    for options in (["--smoke"], ["--config", config, "--smoke"]):
        data, _, args = arguments(name, *options)
        assert (data.dataset, data.dataset_name, args.max_steps, args.selector) == ("digits", None, 24, "supernet")
        assert args.smoke


def test_a_smoke_run_leaves_the_folder_of_the_full_one_alone(monkeypatch):
    (full,), (smoke,) = ([recipe_arguments(RECIPES / "deit_tiny.py", argv)[2]] for argv in ([], ["--smoke"]))
    assert (full.output_dir, smoke.output_dir) == ("deit-tiny-p5", "deit_tiny-smoke")


@pytest.mark.parametrize("option", ["--smoke=true", "--smoke=True", "--smoke=1"])
def test_smoke_may_be_said_in_other_words(option):
    assert arguments("deit_tiny", option)[2].max_steps == 24
    assert arguments("deit_tiny", "--smoke", "false")[2].max_steps == -1


def test_smoke_is_for_the_command_line(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("smoke: true\n")
    with pytest.raises(ValueError, match="give `--smoke` on the command line"):
        arguments("deit_tiny", "--config", str(file))


def test_options_are_not_guessed(capsys):
    with pytest.raises(ValueError, match=r"not used by the HfArgumentParser: \['--target_sp', '1.2'\]"):
        arguments("deit_tiny", "--target_sp", "1.2")


def test_the_command_line_wins_over_the_file_and_over_smoke(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("learning_rate: 0.5\nmixup: 0.0\ncutmix: 0.0\n")
    options = ["--config", str(file), "--smoke", "--data_dir", "images", "--target_macs", "0.9", "--max_steps", "3"]
    data, augmentation, args = arguments("deit_small", *options)
    assert (data.data_dir, data.dataset, data.dataset_name) == ("images", None, None)
    assert (args.target_macs, args.num_pruned_blocks, args.max_steps) == (0.9, None, 3)
    assert augmentation.mixup == 0.2  # of the smoke run, which is laid over the file


@pytest.mark.parametrize("name", NAMES)
def test_the_tiny_network_has_blocks_to_prune(name, tmp_path):
    model, _ = load_checkpoint(save_tiny(tiny_of(name), tmp_path / "tiny", LABELS), LABELS)
    _, _, args = arguments(name, "--smoke")
    assert len(require_sites(model, args.form)) > args.num_pruned_blocks


@pytest.mark.parametrize(
    ("asked", "at_once", "processes", "expected"),
    [(32, 16, 1, (16, 2)), (32, 16, 2, (16, 1)), (32, 64, 1, (32, 1)), (32, 64, 4, (8, 1)), (8, 4, 1, (4, 2))],
)
def test_the_images_of_a_step_are_shared_out(asked, at_once, processes, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(RecipeArguments, "world_size", processes)
    args = RecipeArguments(
        str(tmp_path), num_pruned_blocks=1, global_batch_size=asked, per_device_train_batch_size=at_once
    )
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == expected


@pytest.mark.parametrize(("asked", "at_once", "processes"), [(33, 16, 1), (32, 16, 3), (1, 16, 2), (40, 16, 2)])
def test_images_that_cannot_be_shared_out_are_refused(asked, at_once, processes, monkeypatch, tmp_path):
    monkeypatch.setattr(RecipeArguments, "world_size", processes)
    with pytest.raises(ValueError, match="cannot share out: choose a number of processes"):
        RecipeArguments(
            str(tmp_path), num_pruned_blocks=1, global_batch_size=asked, per_device_train_batch_size=at_once
        )


def test_a_stream_is_trained_on_for_as_many_steps_as_its_epochs_have():
    _, _, args = arguments("deit_tiny", "--num_train_epochs", "3", "--global_batch_size", "32")
    set_steps(args, 100)
    assert args.max_steps == 10
    set_steps(args, None)  # said already
    args.max_steps = -1
    with pytest.raises(ValueError, match="say with `--max_steps`"):
        set_steps(args, None)


# the line


def saved(model, folder):
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of images of two classes, one of them broken."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 16), ("validation", 4)):
        for index, name in enumerate(("dark", "light")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(100, (20, 24, 3), generator=generator, dtype=torch.uint8) + 150 * index
                PIL.Image.fromarray(pixels.numpy()).save(folder / split / name / f"{number}.png")
    (folder / "train" / "dark" / "broken.png").write_bytes(b"no image")
    return folder


SHORT = {
    "max_steps": 4,
    "global_batch_size": 8,
    "per_device_train_batch_size": 8,
    "calibration_size": 8,
    "num_pruned_blocks": 1,
    "selector": "uniform",
    "eval_strategy": "no",
    "eval_on_start": "false",
    "save_strategy": "no",
    "disable_tqdm": "true",
    "dataloader_num_workers": 0,
    "dataloader_persistent_workers": "false",
}
LIT = {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [2, 2], "patch_size": 2, "image_size": 16, "num_labels": 2}


def options(**changes):
    return [part for name, value in {**SHORT, **changes}.items() for part in (f"--{name}", str(value))]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_images_is_pruned_on(streaming, pictures, tmp_path):
    checkpoint = saved(ConvNextForImageClassification(ConvNextConfig(**LIT)), tmp_path / "checkpoint")
    given = options(data_dir=pictures, model_name_or_path=checkpoint, streaming=streaming)
    data, augmentation, args = arguments("convnext_tiny", *given, folder=tmp_path / "out")
    trainer = prepare(data, augmentation, args, tiny=None)
    recipe.prune(trainer, augmentation)
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert len(merged.config.plan["sites"]) == 1
    assert trainer.state.log_history[-1]["broken_images"] >= 1
    assert Report.load(tmp_path / "out").arguments["cutmix"] == 1.0
    assert "cutmix" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_epochs_of_a_stream_of_known_length_become_steps(tmp_path):
    checkpoint = saved(vit(num_labels=10), tmp_path / "checkpoint")
    given = options(dataset="digits", model_name_or_path=checkpoint, streaming=True, max_train_samples=40, max_steps=-1)
    trainer = prepare(*arguments("deit_tiny", *given, "--num_train_epochs", "2", folder=tmp_path / "out"), tiny=None)
    assert trainer.args.max_steps == 10


def test_the_same_command_goes_on_where_a_run_was_interrupted(tmp_path, capsys):
    given = ["--smoke", *options(save_strategy="steps", save_steps=1, max_train_samples=64, max_eval_samples=16)]

    def trainer():
        return prepare(*arguments("deit_tiny", *given, folder=tmp_path), tiny=tiny_of("deit_tiny"))

    interrupt(trainer())
    assert "Pruning " in capsys.readouterr().out
    resumed = trainer()
    recipe.prune(resumed, AugmentationArguments())
    assert "Going on with " in capsys.readouterr().out
    straight = prepare(*arguments("deit_tiny", *given, folder=tmp_path / "straight"), tiny=tiny_of("deit_tiny"))
    recipe.prune(straight, AugmentationArguments())
    assert_equal(weights(resumed.model), weights(straight.model))
    facts = [Report.load(folder).selection for folder in (tmp_path, tmp_path / "straight")]
    assert facts[0]["candidates"] == facts[1]["candidates"]


def test_a_stream_goes_on_in_another_order_and_reads_nothing_again_to_skip_it(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(streams, "read_image", lambda value: read.append(value["bytes"]) or read_image(value))
    given = ["--smoke", *options(streaming=True, save_strategy="steps", save_steps=1, global_batch_size=32)]

    def trainer():
        return prepare(*arguments("deit_tiny", *given, folder=tmp_path), tiny=tiny_of("deit_tiny"))

    interrupt(trainer())
    before = read.copy()
    read.clear()
    resumed = trainer()
    recipe.prune(resumed, AugmentationArguments())
    assert resumed.state.global_step == 4
    assert 2 * 32 <= len(read) < 4 * 32  # two steps, and what was read ahead
    assert read[:16] != before[:16]


def interrupt(run):
    run.add_callback(Interruption())
    with pytest.raises(KeyboardInterrupt):
        recipe.prune(run, AugmentationArguments())


class Interruption(TrainerCallback):
    """End a run in its third step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_too_few_images_for_a_batch_are_refused(pictures, tmp_path):
    checkpoint = saved(ConvNextForImageClassification(ConvNextConfig(**LIT)), tmp_path / "checkpoint")
    given = options(data_dir=pictures, model_name_or_path=checkpoint, max_train_samples=4)
    with pytest.raises(ValueError, match="There are 4 images to train on, but 1 processes take 8 at once"):
        prepare(*arguments("convnext_tiny", *given, folder=tmp_path / "out"), tiny=None)


def test_a_new_classifier_is_no_teacher(tmp_path):
    checkpoint = saved(vit(), tmp_path / "checkpoint")  # of 4 classes
    given = options(dataset="digits", model_name_or_path=checkpoint, distillation="hard")
    with pytest.raises(ValueError, match=r"does not know the 10 classes .* set `--distillation none`"):
        prepare(*arguments("deit_tiny", *given, folder=tmp_path / "out"), tiny=None)


class TheirsError(ValueError):
    """What a library may raise."""


@pytest.mark.parametrize("is_ours", [True, False])
def test_what_this_package_says_ends_a_recipe_with_a_sentence_and_other_errors_do_with_a_traceback(
    is_ours, monkeypatch, tmp_path
):
    def fails(*args):
        if is_ours:
            set_steps(RecipeArguments(str(tmp_path), num_pruned_blocks=1), None)
        raise TheirsError("bits must be between 1 and 8")

    monkeypatch.setattr(recipe, "prepare", fails)
    monkeypatch.setattr(sys, "argv", ["deit_tiny.py"])
    with pytest.raises(SystemExit if is_ours else TheirsError) as ended:
        recipe.run(str(RECIPES / "deit_tiny.py"), tiny=None)
    assert not is_ours or str(ended.value).startswith("deit_tiny.py: The stream does not tell how many")


def test_the_summary_says_what_was_not_measured():
    costs = Cost(2_000_000, 10**9, {"1": 0.002}), Cost(1_000_000, 5 * 10**8, {"1": 0.001})
    report = Report(plan={}, before=costs[0], after=costs[1], metrics_after={"accuracy": 0.5})
    table = summary(report)
    assert "not measured" in table
    assert "50.00 %" in table
    assert "2.00×" in table


# as a user starts it


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


DRAWN_ALIKE = {
    "convnext_tiny": ["--drop_path_rate", "0"],  # else each process draws its own paths to drop
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
@pytest.mark.parametrize("name", NAMES)
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
    alone = prepare(*arguments("deit_tiny", "--smoke", *given, folder=tmp_path / "one"), tiny=tiny_of("deit_tiny"))
    expected = alone.predict(alone.eval_dataset)
    assert len(expected.label_ids) == count
    assert two.training.processes == 2
    for name in ("accuracy", "top5_accuracy"):  # an image that counted twice would change the fraction
        assert two.metrics_before[name] == pytest.approx(expected.metrics[f"test_{name}"], abs=1e-9)
