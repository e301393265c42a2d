"""A stream shows every intact image once an epoch, whichever processes and workers share it, and counts broken ones."""

import accelerate
import pytest
import torch
from tiny_pictures import BROKEN, WHOLE
from torch.utils.data import DataLoader
from torchvision.transforms import functional

from updp_hf.data.augmentation import AugmentationArguments, Mix
from updp_hf.data.images import SEED, ImageDataset
from updp_hf.data.streams import Tally, image_stream


def to_tensor(image):
    return functional.to_tensor(image.resize((8, 8)))


def stream_of(dataset, tally=None, num_shards=1, **options):
    return image_stream(dataset.to_iterable_dataset(num_shards), to_tensor, tally or Tally(), **options)


def rows(items):
    return sorted(tuple(item["pixel_values"].flatten().tolist()) for item in items)


@pytest.fixture(scope="module")
def intact(pictures):
    """The intact training images."""
    dataset = ImageDataset(pictures["train"], to_tensor)
    return [item for item in dataset if item["labels"] >= 0]


def test_a_stream_leaves_broken_images_out_and_counts_them(pictures, intact):
    tally = Tally()
    found = list(stream_of(pictures["train"], tally))
    assert all(item.keys() == {"pixel_values", "labels"} for item in found)
    assert rows(found) == rows(intact)
    assert [item["labels"] for item in found] == [item["labels"] for item in intact]
    assert (tally.read, tally.broken) == (WHOLE + BROKEN, BROKEN)


def test_columns_of_other_names_may_be_those_of_the_items(pictures, intact):
    renamed = pictures["train"].rename_columns({"image": "pixel_values", "label": "labels"})
    found = list(stream_of(renamed, image_column="pixel_values", label_column="labels"))
    assert rows(found) == rows(intact)


def test_a_stream_knows_its_images_without_augmentation_and_seeds(pictures, intact):
    tally = Tally()
    rows_of = pictures["train"].to_iterable_dataset()
    stream = image_stream(rows_of, lambda image: torch.rand(2), tally, carry_seeds=True, plain_transform=to_tensor)
    found = list(stream.plain)
    assert all(item.keys() == {"pixel_values", "labels"} for item in found)
    assert rows(found) == rows(intact)
    assert (tally.read, tally.broken) == (WHOLE + BROKEN, BROKEN)
    assert rows(stream_of(pictures["train"]).plain) == rows(intact)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_share_a_stream_and_its_tally(pictures, intact, workers):
    tally = Tally()
    loader = DataLoader(stream_of(pictures["train"], tally, num_shards=3), batch_size=None, num_workers=workers)
    assert rows(loader) == rows(intact)
    assert (tally.read, tally.broken) == (WHOLE + BROKEN, BROKEN)


@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_two_processes_see_disjoint_images_that_cover_the_set(pictures, intact, num_shards):
    seen = []
    for rank in (0, 1):
        loader = DataLoader(stream_of(pictures["train"], num_shards=num_shards), batch_size=1)
        options = {"num_processes": 2, "process_index": rank, "dispatch_batches": False, "put_on_device": False}
        prepared = accelerate.data_loader.prepare_data_loader(loader, **options)
        seen.append(set(rows({"pixel_values": batch["pixel_values"]} for batch in prepared)))
    repeated = seen[0] & seen[1]
    assert seen[0] | seen[1] == set(rows(intact))
    # Without a shard for each process accelerate fills up the last batch with images of the first.
    assert len(repeated) <= (num_shards < 2)


def test_epochs_are_shuffled_otherwise_through_accelerate(pictures, intact):
    stream = image_stream(pictures["train"].to_iterable_dataset().shuffle(seed=0, buffer_size=8), to_tensor, Tally())
    options = {"num_processes": 1, "process_index": 0, "dispatch_batches": False, "put_on_device": False}
    loader = accelerate.data_loader.prepare_data_loader(DataLoader(stream, batch_size=1), **options)
    epochs = []
    for epoch in (0, 1, 2, 1):
        loader.set_epoch(epoch)
        epochs.append([tuple(batch["pixel_values"].flatten().tolist()) for batch in loader])
    assert all(sorted(epoch) == rows(intact) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[3] == epochs[1]


def test_a_training_stream_is_mixed(pictures):
    mix = Mix(AugmentationArguments(mixup=0.8), 3)
    stream = stream_of(pictures["train"], carry_seeds=True)
    seeds = [item[SEED] for item in stream]
    assert len(set(seeds)) == WHOLE
    assert next(iter(DataLoader(stream, batch_size=4, collate_fn=mix)))["labels"].shape == (4, 3)
    torch.manual_seed(1)
    assert [item[SEED] for item in stream] != seeds


def test_a_stream_of_which_too_much_is_broken_is_refused(pictures):
    tally = Tally()
    with pytest.raises(ValueError, match=r"^2\d\d of 1\d\d\d images read are broken, expected at most a tenth"):
        list(stream_of(pictures["train"].select(list(range(15)) * 68), tally))
