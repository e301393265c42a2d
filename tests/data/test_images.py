"""Augmentation depends on seed, epoch and index alone, and broken images are replaced and counted once."""

import random
from functools import partial

import accelerate
import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from tiny_pictures import BROKEN, SIZE, WHOLE, encoded, pixels
from torch.utils.data import DataLoader, RandomSampler
from torchvision.transforms import functional
from transformers import TrainerState

from updp_hf.data.callbacks import BrokenImagesCallback, EpochCallback
from updp_hf.data.images import NO_LABEL, SEED, ImageDataset, ImageSubset
from updp_hf.reporting.provenance import dataset_facts
from updp_hf.reporting.report import HeldOutSet


def to_tensor(image):
    return functional.to_tensor(image.resize((SIZE, SIZE)))


def noisy(image):
    """Draw from each of the generators that augmentations draw from."""
    draws = [random.random(), np.random.rand(), torch.rand(()).item()]
    return torch.cat([to_tensor(image).flatten(), torch.tensor(draws)])


def images(dataset, transform=noisy, **options):
    return ImageDataset(dataset, transform, **{"seed": 3, "replace_broken": True, **options})


def tensors(dataset, epoch=0, **options):
    dataset.set_epoch(epoch)
    batches = list(DataLoader(dataset, **{"batch_size": 4, **options}))
    return torch.cat([batch["pixel_values"] for batch in batches]), torch.cat([batch["labels"] for batch in batches])


def test_an_intact_image_is_what_the_transform_makes_of_it(pictures):
    dataset = images(pictures["validation"], to_tensor)
    assert len(dataset) == 6
    for index, row in enumerate(pictures["validation"]):
        item = dataset[index]
        assert item.keys() == {"pixel_values", "labels"}
        assert torch.equal(item["pixel_values"], functional.to_tensor(row["image"]))
        assert item["labels"] == row["label"]


def test_the_columns_may_have_other_names(pictures):
    renamed = pictures["validation"].rename_columns({"image": "picture", "label": "kind"}).add_column("x", [0] * 6)
    found = images(renamed, to_tensor, image_column="picture", label_column="kind")
    expected = images(pictures["validation"], to_tensor)
    assert torch.equal(found[1]["pixel_values"], expected[1]["pixel_values"])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_draw_what_the_main_process_draws(pictures, workers):
    expected = tensors(images(pictures["train"]))
    found = tensors(images(pictures["train"]), num_workers=workers)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_neither_order_nor_batches_matter(pictures):
    dataset = images(pictures["train"])
    expected = tensors(dataset)[0]
    for index in reversed(range(len(dataset))):
        assert torch.equal(dataset[index]["pixel_values"], expected[index])


def test_epochs_and_seeds_differ_and_images_of_one_epoch_too(pictures):
    drawn = {
        name: tensors(images(pictures["validation"], seed=seed), epoch)[0][:, -3:]
        for name, seed, epoch in [("first", 3, 0), ("next epoch", 3, 1), ("other seed", 4, 0)]
    }
    together = torch.cat(list(drawn.values()))
    assert len(together.unique(dim=0)) == 3 * 6
    assert all(len(together[:, generator].unique()) == 3 * 6 for generator in range(3))


def test_workers_that_outlive_an_epoch_learn_of_the_next(pictures):
    dataset = images(pictures["validation"])
    loader = DataLoader(dataset, batch_size=3, num_workers=1, persistent_workers=True)
    for epoch in (0, 1, 5):
        dataset.set_epoch(epoch)
        found = torch.cat([batch["pixel_values"] for batch in loader])
        assert torch.equal(found, tensors(images(pictures["validation"]), epoch)[0])


def test_the_global_generators_are_left_as_they_were(pictures):
    def seeded():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    def draws():
        return random.random(), np.random.rand(), torch.rand(()).item()

    dataset = images(pictures["train"])
    seeded()
    expected = draws()
    seeded()
    dataset.__getitems__(list(range(len(dataset))))
    assert draws() == expected


# broken images


def is_broken(dataset):
    return [path.endswith(("truncated.jpg", "empty.png", "text.jpg", "truncated.png")) for path in paths(dataset)]


def paths(dataset):
    return [row["path"] for row in dataset.cast_column("image", datasets.Image(decode=False))["image"]]


def test_in_training_a_broken_image_becomes_an_intact_one_with_its_label(pictures):
    dataset = images(pictures["train"], to_tensor)
    found, labels = tensors(dataset)
    broken = is_broken(pictures["train"])
    assert (sum(broken), dataset.broken) == (BROKEN, BROKEN)
    intact = [index for index, value in enumerate(broken) if not value]
    for index in range(len(dataset)):
        same = [i for i in intact if torch.equal(found[i], found[index])]
        assert index in same or broken[index]
        assert int(labels[index]) in {int(labels[i]) for i in same}


def test_in_another_epoch_another_image_takes_the_place(pictures):
    dataset = images(pictures["train"], to_tensor)
    index = is_broken(pictures["train"]).index(True)
    drawn = []
    for epoch in range(8):
        dataset.set_epoch(epoch)
        drawn.append(dataset[index]["pixel_values"])
    assert len(torch.stack(drawn).unique(dim=0)) > 1


def test_in_evaluation_a_broken_image_counts_for_nothing(pictures):
    dataset = images(pictures["train"], to_tensor, replace_broken=False)
    found, labels = tensors(dataset)
    broken = torch.tensor(is_broken(pictures["train"]))
    assert torch.equal(labels == NO_LABEL, broken)
    assert not found[broken].any()
    logits = torch.randn(len(dataset), 3)
    loss = torch.nn.functional.cross_entropy
    assert loss(logits, labels) == loss(logits[~broken], labels[~broken])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_broken_image_is_counted_once_whoever_reads_it_and_how_often(pictures, workers):
    dataset = images(pictures["train"])
    assert dataset.broken == 0
    for epoch in range(2):
        tensors(dataset, epoch, num_workers=workers)
        assert dataset.broken == BROKEN
    tensors(dataset.plain)
    assert (dataset.broken, dataset.plain.broken) == (BROKEN, BROKEN)


def test_a_warning_names_a_broken_image_once(pictures, monkeypatch):
    warnings = []
    monkeypatch.setattr("updp_hf.data.images.logger.warning", warnings.append)
    dataset = images(pictures["train"])
    tensors(dataset), tensors(dataset, epoch=1)
    assert len(warnings) == BROKEN
    assert all("cannot be read" in text and "(row " in text for text in warnings)
    assert sum("dog/empty.png" in text for text in warnings) == 1


def bytes_set(contents):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    rows = [{"bytes": content, "path": None} for content in contents]
    return datasets.Dataset.from_dict({"image": rows, "label": [0] * len(rows)}, features=features)


GOOD = encoded(PIL.Image.fromarray(pixels(0)))


def test_of_many_broken_images_the_first_are_named(monkeypatch):
    warnings = []
    monkeypatch.setattr("updp_hf.data.images.logger.warning", warnings.append)
    tensors(images(bytes_set([GOOD] + [b"no"] * 9)))
    assert len(warnings) == 5
    assert warnings[-1].endswith("Further ones are counted and not named.")


def test_a_set_of_broken_images_alone_is_refused():
    dataset = images(bytes_set([b"no"] * 3))
    with pytest.raises(ValueError, match="None of the 3 images can be read, the last of them An image: is the data"):
        dataset[0]


@pytest.mark.parametrize("replace_broken", [True, False])
def test_a_set_of_which_too_much_is_broken_is_refused(replace_broken):
    contents = [b"no" if index % 8 == 0 else GOOD for index in range(1100)]
    dataset = images(bytes_set(contents), replace_broken=replace_broken)
    with pytest.raises(ValueError, match=r"^12\d of 10\d\d images read are broken, expected at most a tenth: is"):
        dataset.__getitems__(range(1100))


# a plain view, parts, facts


def test_the_plain_view_is_not_to_be_mixed_and_has_a_transform_of_its_own(pictures):
    dataset = images(pictures["train"], noisy, carry_seeds=True, plain_transform=to_tensor)
    assert dataset[0][SEED] != dataset[1][SEED]
    assert dataset.plain[0].keys() == {"pixel_values", "labels"}
    assert torch.equal(dataset.plain[0]["pixel_values"].flatten(), dataset[0]["pixel_values"][:-3])


def test_a_subset_tells_the_epoch(pictures):
    dataset = images(pictures["validation"])
    part = ImageSubset(dataset, [4, 1])
    part.set_epoch(2)
    expected = tensors(dataset, epoch=2)[0]
    assert torch.equal(part[0]["pixel_values"], expected[4])
    assert torch.equal(part.__getitems__([1])[0]["pixel_values"], expected[1])


def test_a_card_learns_what_the_images_are(pictures):
    facts = dataset_facts(images(pictures["train"]))
    assert facts == HeldOutSet(name="imagefolder", split="train", images=WHOLE + BROKEN)


# the epoch, through accelerate and the Trainer


def prepared(dataset, processes, rank):
    loader = DataLoader(dataset, batch_size=2, sampler=RandomSampler(dataset))
    options = {"num_processes": processes, "process_index": rank, "put_on_device": False, "dispatch_batches": False}
    return accelerate.data_loader.prepare_data_loader(loader, use_seedable_sampler=True, data_seed=1, **options)


def begin_epoch(loader, epoch):
    """Do what the Trainer does when an epoch begins."""
    state = TrainerState(epoch=float(epoch))
    EpochCallback().on_epoch_begin(None, state, None, train_dataloader=loader)
    loader.set_epoch(epoch)
    return [tuple(row) for batch in loader for row in batch["pixel_values"].tolist()]


@pytest.mark.parametrize("epoch", [0, 1])
def test_processes_share_the_augmented_images_of_one(pictures, epoch):
    together = begin_epoch(prepared(images(pictures["validation"]), 1, 0), epoch)
    parts = [begin_epoch(prepared(images(pictures["validation"]), 2, rank), epoch) for rank in (0, 1)]
    assert set(parts[0]) | set(parts[1]) == set(together)
    assert together != begin_epoch(prepared(images(pictures["validation"]), 1, 0), epoch + 1)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_epoch_shows_what_was_left_of_it(pictures, processes):
    whole = begin_epoch(prepared(images(pictures["validation"]), processes, 0), 1)
    resumed = accelerate.skip_first_batches(prepared(images(pictures["validation"]), processes, 0), 1)
    assert begin_epoch(resumed, 1) == whole[2:]


def test_broken_images_are_logged_beside_the_loss(pictures, monkeypatch):
    warnings = []
    monkeypatch.setattr("updp_hf.data.callbacks.logger.warning", warnings.append)
    train, held_out = images(pictures["train"]), images(pictures["validation"])
    callback = BrokenImagesCallback(train, held_out)

    def log(**logs):
        state = TrainerState(log_history=[dict(logs)])
        callback.on_log(None, state, None, logs=logs)
        assert state.log_history[-1] == logs
        return logs

    assert log(loss=1.0) == {"loss": 1.0}
    callback.on_train_end(None, None, None)
    assert warnings == []
    tensors(train)
    assert log(loss=1.0) == {"loss": 1.0, "broken_images": BROKEN}
    assert log(eval_loss=1.0)["broken_images"] == BROKEN
    assert log(train_runtime=1.0) == {"train_runtime": 1.0}
    callback.on_train_end(None, None, None)
    assert warnings[0].startswith(f"{BROKEN} images could not be read")


@pytest.mark.slow  # the process imports everything anew
def test_a_set_survives_being_sent_to_a_process_that_is_not_forked(pictures):
    dataset = images(pictures["train"], partial(to_tensor))
    found = tensors(dataset, num_workers=1, multiprocessing_context="spawn", batch_size=16)
    assert torch.equal(found[0], tensors(images(pictures["train"], to_tensor))[0])
    assert dataset.broken == BROKEN
