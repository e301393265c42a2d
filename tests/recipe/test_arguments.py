"""The options of a recipe: which file wins, and what a smoke run changes."""

import pytest
from project import RECIPES

from updp_hf.errors import UPDPError
from updp_hf.recipe.arguments import RecipeArguments, recipe_arguments

NAMES = ["convnext_tiny", "deit_small", "deit_tiny", "mobilenetv2", "resnet34"]


def arguments(name="deit_tiny", *options, folder="unused"):
    return recipe_arguments(RECIPES / f"{name}.py", ["--output_dir", str(folder), *options])


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


def test_the_file_of_a_recipe_is_enough_for_any_script():
    given = ["--config", str(RECIPES / "deit_small.yaml")]
    own, shared = (recipe_arguments(RECIPES / f"{name}.py", given)[2] for name in ("deit_small", "prune"))
    assert shared.model_name_or_path == own.model_name_or_path == "facebook/deit-small-patch16-224"
    assert shared.output_dir == own.output_dir
    assert shared.tiny is None  # of smoke runs alone
    smoke = recipe_arguments(RECIPES / "prune.py", [*given, "--smoke"])[2]
    assert (smoke.output_dir, smoke.tiny["model_type"]) == ("deit_small-smoke", "vit")


def test_a_checkpoint_has_to_be_named():
    with pytest.raises(UPDPError, match="No checkpoint is named"):
        recipe_arguments(
            RECIPES / "prune.py", ["--dataset", "digits", "--output_dir", "unused", "--num_pruned_blocks", "1"]
        )
