"""Short runs of recipes, in this process."""

from project import RECIPES
from transformers import (
    ViTImageProcessor,
)

from updp_hf.recipe.arguments import recipe_arguments


def arguments(name="deit_tiny", *options, folder="unused"):
    return recipe_arguments(RECIPES / f"{name}.py", ["--output_dir", str(folder), *options])


def saved(model, folder):
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


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
