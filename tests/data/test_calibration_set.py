"""A sample is fixed by its seed, and what is left is all the rest."""

import datasets
import PIL.Image
import pytest
import torch
from tiny_training import RandomImages
from torch.utils.data import IterableDataset

from updp_hf.data.calibration_set import sample_and_rest
from updp_hf.data.images import SEED, ImageDataset
from updp_hf.data.streams import Tally, image_stream

ZERO = torch.zeros(2)


def indexed(count=20):
    return [{"index": index} for index in range(count)]


def coloured(count=20):
    images = [PIL.Image.new("RGB", (4, 4), (index, 0, 0)) for index in range(count)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": images, "label": list(range(count))}, features=features)


def indices(part):
    return [part[index]["index"] for index in range(len(part))]


@pytest.mark.parametrize("count", [0, 1, 7, 20])
@pytest.mark.parametrize("build", [indexed, lambda: datasets.Dataset.from_list(indexed())], ids=["list", "datasets"])
def test_sample_and_rest_are_all_items_once(build, count):
    sample, rest = sample_and_rest(build(), count, seed=3)
    assert len(sample) == count
    assert sorted(indices(sample) + indices(rest)) == list(range(20))
    assert indices(rest) == sorted(indices(rest))


def test_a_sample_is_fixed_by_its_seed_whatever_holds_the_items():
    first = indices(sample_and_rest(indexed(), 8, seed=3)[0])
    assert indices(sample_and_rest(indexed(), 8, seed=3)[0]) == first != sorted(first)
    assert indices(sample_and_rest(datasets.Dataset.from_list(indexed()), 8, seed=3)[0]) == first
    assert indices(sample_and_rest(indexed(), 8, seed=4)[0]) != first


def test_a_smaller_sample_is_the_beginning_of_a_larger_one():
    assert indices(sample_and_rest(indexed(), 12, seed=0)[0])[:5] == indices(sample_and_rest(indexed(), 5, seed=0)[0])


def test_a_sample_of_more_than_there_are_is_all_and_nothing_is_left():
    sample, rest = sample_and_rest(indexed(), 256, seed=0)
    assert sorted(indices(sample)) == list(range(20))
    assert len(rest) == 0


def test_sampling_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    torch.manual_seed(0)
    first = indices(sample_and_rest(indexed(), 5, seed=1)[0])
    torch.manual_seed(9)
    state = torch.get_rng_state()
    assert indices(sample_and_rest(indexed(), 5, seed=1)[0]) == first
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(before)


def test_a_dataset_of_datasets_keeps_its_transform_and_its_format():
    dataset = datasets.Dataset.from_list(indexed())
    doubled = dataset.with_transform(lambda rows: {"index": [2 * value for value in rows["index"]]})
    sample, rest = sample_and_rest(doubled, 8, seed=3)
    plain = sample_and_rest(indexed(), 8, seed=3)
    assert isinstance(sample, datasets.Dataset)
    assert isinstance(rest, datasets.Dataset)
    assert indices(sample) == [2 * value for value in indices(plain[0])]
    assert indices(rest) == [2 * value for value in indices(plain[1])]
    sample, rest = sample_and_rest(dataset.with_format("torch"), 8, seed=3)
    assert all(isinstance(part[0]["index"], torch.Tensor) for part in (sample, rest))
    assert sample.column_names == dataset.column_names


def test_no_item_is_read_by_sampling():
    class Precious(RandomImages):
        def __getitem__(self, index):
            raise AssertionError(index)

    sample, rest = sample_and_rest(Precious(), 8, seed=0)
    assert (len(sample), len(rest)) == (8, 24)


def test_the_sample_of_an_image_set_is_plain_and_the_rest_learns_the_epoch():
    options = {"carry_seeds": True, "plain_transform": lambda image: ZERO}
    dataset = ImageDataset(coloured(), lambda image: torch.rand(2), **options)
    sample, rest = sample_and_rest(dataset, 8, seed=3)
    expected = sample_and_rest(indexed(), 8, seed=3)
    assert [item["labels"] for item in sample] == indices(expected[0])
    assert [item["labels"] for item in rest] == indices(expected[1])
    assert all(item.keys() == {"pixel_values", "labels"} and item["pixel_values"] is ZERO for item in sample)
    before = rest[0]
    rest.set_epoch(1)
    assert (SEED in before, SEED in rest[0]) == (True, True)
    assert not torch.equal(rest[0]["pixel_values"], before["pixel_values"])


@pytest.mark.parametrize("features", [None, datasets.Features({"index": datasets.Value("int64")})])
@pytest.mark.parametrize("mixed", [True, False])
def test_the_sample_of_a_stream_is_its_beginning_and_the_rest_all_of_it(features, mixed):
    stream = datasets.IterableDataset.from_generator(lambda: iter(indexed()), features=features)
    if mixed:
        stream = stream.map(lambda row: {**row, SEED: 7})
    sample, rest = sample_and_rest(stream, 8, seed=3)
    assert list(sample) == indexed()[:8]
    assert [row["index"] for row in rest] == list(range(20))
    assert all((SEED in row) == mixed for row in rest)


def test_the_sample_of_an_image_stream_is_plain():
    rows = coloured().to_iterable_dataset(4).shuffle(seed=1, buffer_size=5)
    options = {"carry_seeds": True, "plain_transform": lambda image: ZERO}
    stream = image_stream(rows, lambda image: torch.rand(2), Tally(), **options)
    sample, rest = sample_and_rest(stream, 8, seed=3)
    found = list(sample)
    assert [item["labels"] for item in found] == [item["labels"] for item in rest][:8] != list(range(8))
    assert all(item.keys() == {"pixel_values", "labels"} and torch.equal(item["pixel_values"], ZERO) for item in found)
    assert all(SEED in item for item in rest)
    rest.set_epoch(1)
    assert [item["labels"] for item in sample] == [item["labels"] for item in found]


@pytest.mark.parametrize("count", [1, 6, 20])
def test_processes_and_workers_share_all_that_is_left_of_a_sampled_stream(count):
    _, rest = sample_and_rest(datasets.Dataset.from_list(indexed()).to_iterable_dataset(4), count, seed=3)
    assert sorted(row["index"] for rank in range(2) for row in rest.shard(2, rank)) == list(range(20))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(RandomImages())


@pytest.mark.parametrize(("build", "name"), [(Stream, "Stream"), (lambda: None, "NoneType")], ids=["torch", "none"])
def test_what_cannot_be_sampled_is_refused(build, name):
    with pytest.raises(
        ValueError, match=f"^`train_dataset` is {name}, but calibration reads some images beforehand: pass"
    ):
        sample_and_rest(build(), 8, seed=0)
