"""A run on an image set is told the epochs, reports broken images, and goes on after a stop as if there was none."""

import pytest
from tiny_pictures import BROKEN
from tiny_training import assert_equal, trainer, vit, weights
from transformers import ViTImageProcessor

from updp_hf.data.augmentation import AugmentationArguments, eval_transform, train_transform
from updp_hf.data.callbacks import BrokenImagesCallback
from updp_hf.data.images import ImageDataset

PROCESSOR = ViTImageProcessor(size={"height": 16, "width": 16})
STEPS = 8  # two epochs


def run_in(folder, pictures, **options):
    train = train_transform(PROCESSOR, AugmentationArguments("rand-m9-mstd0.5-inc1", random_erasing=0.5))
    plain = eval_transform(PROCESSOR)
    images = ImageDataset(pictures["train"], train, replace_broken=True, plain_transform=plain)
    held_out = ImageDataset(pictures["validation"], plain)
    run = trainer(
        folder,
        vit(dropout=0.1),
        train_dataset=images,
        eval_dataset=held_out,
        callbacks=[BrokenImagesCallback(images, held_out)],
        max_steps=STEPS,
        remove_unused_columns=False,
        **options,
    )
    seen = []
    read = images.__getitems__

    def watched(indices):
        seen.append((int(images._epoch), tuple(indices)))
        return read(indices)

    images.__getitems__ = watched
    return run, seen


@pytest.fixture(scope="module")
def whole(tmp_path_factory, pictures):
    folder = tmp_path_factory.mktemp("whole")
    run, seen = run_in(folder, pictures, save_strategy="steps", save_steps=1)
    run.train()
    return folder, run, seen


def test_each_epoch_of_a_run_is_augmented_otherwise(whole):
    batches = [epoch for epoch, indices in whole[2]]
    assert sorted(set(batches)) == [0, 1]
    assert batches == sorted(batches)
    assert batches.count(1) == STEPS // 2


def test_broken_images_are_in_the_log_of_a_run(whole):
    counts = [entry["broken_images"] for entry in whole[1].state.log_history if "broken_images" in entry]
    assert counts[-1] == BROKEN
    assert counts == sorted(counts)


@pytest.mark.parametrize("step", [pytest.param(4, marks=pytest.mark.slow), 6])
def test_a_resumed_run_sees_the_images_and_ends_with_the_weights_of_a_whole_one(whole, tmp_path, pictures, step):
    folder, expected, seen = whole
    run, seen_again = run_in(tmp_path, pictures)
    run.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert seen_again == seen[-(STEPS - step) :]
    assert_equal(weights(run.model), weights(expected.model))
