"""From options to a trainer."""

import pytest
from recipe_runs import LIT, arguments, options, saved
from tiny_training import vit
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
)

from updp_hf.errors import UPDPError
from updp_hf.recipe.prepare import prepare, set_steps, tiny_of
from updp_hf.recipe.pretrained import load_checkpoint, save_tiny
from updp_hf.surgery.find import require_sites

NAMES = [
    "convnext_tiny",
    "deit_tiny",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("deit_small", "mobilenetv2", "resnet34")),
]
LABELS = [str(digit) for digit in range(10)]


@pytest.mark.parametrize("name", NAMES)
def test_the_tiny_network_has_blocks_to_prune(name, tmp_path):
    model, _ = load_checkpoint(save_tiny(tiny_of(arguments(name, "--smoke")[2]), tmp_path / "tiny", LABELS), LABELS)
    _, _, args = arguments(name, "--smoke")
    assert len(require_sites(model, args.form)) > args.num_pruned_blocks


def test_a_stream_is_trained_on_for_as_many_steps_as_its_epochs_have():
    _, _, args = arguments("deit_tiny", "--num_train_epochs", "3", "--global_batch_size", "32")
    set_steps(args, 100)
    assert args.max_steps == 10
    set_steps(args, None)  # said already
    args.max_steps = -1
    with pytest.raises(ValueError, match="say with `--max_steps`"):
        set_steps(args, None)


def test_epochs_of_a_stream_of_known_length_become_steps(tmp_path):
    checkpoint = saved(vit(num_labels=10), tmp_path / "checkpoint")
    given = options(dataset="digits", model_name_or_path=checkpoint, streaming=True, max_train_samples=40, max_steps=-1)
    trainer = prepare(*arguments("deit_tiny", *given, "--num_train_epochs", "2", folder=tmp_path / "out"))
    assert trainer.args.max_steps == 10


def test_too_few_images_for_a_batch_are_refused(pictures, tmp_path):
    checkpoint = saved(ConvNextForImageClassification(ConvNextConfig(**LIT)), tmp_path / "checkpoint")
    given = options(data_dir=pictures, model_name_or_path=checkpoint, max_train_samples=4)
    with pytest.raises(ValueError, match="There are 4 images to train on, but 1 processes take 8 at once"):
        prepare(*arguments("convnext_tiny", *given, folder=tmp_path / "out"))


def test_a_new_classifier_is_no_teacher(tmp_path):
    checkpoint = saved(vit(), tmp_path / "checkpoint")  # of 4 classes
    given = options(dataset="digits", model_name_or_path=checkpoint, distillation="hard")
    with pytest.raises(ValueError, match=r"does not know the 10 classes .* set `--distillation none`"):
        prepare(*arguments("deit_tiny", *given, folder=tmp_path / "out"))


def test_a_smoke_run_needs_a_tiny_network(tmp_path):
    _, _, args = arguments("deit_tiny", "--smoke", "--tiny", '{"hidden_size": 8}', folder=tmp_path)
    with pytest.raises(UPDPError, match="needs `tiny` in the file of the recipe"):
        tiny_of(args)
