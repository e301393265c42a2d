"""Augmentation is what timm makes of the arguments, and mixing depends on the seeds of the items alone."""

import pickle

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_pictures import pixels
from torch.utils.data import DataLoader
from torchvision.transforms import functional
from transformers import (
    BitImageProcessor,
    CLIPImageProcessor,
    HfArgumentParser,
    TimmWrapperImageProcessor,
    ViTImageProcessor,
)

from updp_hf.data.augmentation import AugmentationArguments, Mix, eval_transform, train_transform
from updp_hf.data.images import NO_LABEL, SEED, ImageDataset
from updp_hf.data.randomness import seed_generators

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
VIT = ViTImageProcessor(size={"height": 24, "width": 24}, image_mean=MEAN, image_std=STD, resample=3)
CROPPING = BitImageProcessor(
    size={"shortest_edge": 32},
    crop_size={"height": 24, "width": 24},
    image_mean=MEAN,
    image_std=STD,
    resample=3,
    do_center_crop=True,
)
TIMM = TimmWrapperImageProcessor(
    {"input_size": (3, 24, 24), "mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 0.75}
)
PROCESSORS = pytest.mark.parametrize("processor", [VIT, CROPPING, TIMM], ids=["vit", "cropping", "timm"])
NONE = {"horizontal_flip": 0.0, "min_crop_scale": 1.0}
IMAGE = PIL.Image.fromarray(pixels(0, 48, 48, 3))


def normalized(image):
    return functional.normalize(functional.to_tensor(image), MEAN, STD)


@PROCESSORS
def test_without_augmentation_an_image_is_resized_and_normalized(processor):
    found = train_transform(processor, AugmentationArguments(**NONE))(IMAGE)
    expected = normalized(IMAGE.resize((24, 24), PIL.Image.Resampling.BICUBIC))
    torch.testing.assert_close(found, expected)


def test_without_augmentation_the_middle_of_an_oblong_image_is_kept_in_shape():
    image = PIL.Image.fromarray(pixels(0, 24, 40, 3))
    found = train_transform(VIT, AugmentationArguments(**NONE))(image)
    torch.testing.assert_close(found, normalized(image.crop((8, 0, 32, 24))))


@PROCESSORS
@pytest.mark.parametrize("size", [(7, 90), (24, 24), (300, 200)])
def test_images_of_any_size_become_tensors_of_one(processor, size):
    image = PIL.Image.new("RGB", size, (100, 150, 200))
    augmented = train_transform(processor, AugmentationArguments("rand-m9-mstd0.5-inc1", random_erasing=1.0))(image)
    plain = eval_transform(processor)(image)
    assert augmented.shape == plain.shape == (3, 24, 24)
    torch.testing.assert_close(plain, normalized(PIL.Image.new("RGB", (24, 24), (100, 150, 200))))


def test_evaluation_sees_what_the_processor_makes():
    expected = CROPPING(images=[IMAGE], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(eval_transform(CROPPING)(IMAGE), expected)


def drawn(args, seed=0):
    seed_generators(seed)
    return train_transform(VIT, args)(IMAGE)


@pytest.mark.parametrize(
    "changed",
    [
        {"auto_augment": "rand-m9-mstd0.5-inc1"},
        {"random_erasing": 1.0},
        {"color_jitter": 0.4},
        {"horizontal_flip": 1.0},
        {"min_crop_scale": 0.3},
        {"interpolation": "bilinear"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_each_argument_does_something(changed):
    args, plain = AugmentationArguments(**{**NONE, **changed}), AugmentationArguments(**NONE)
    assert any(not torch.equal(drawn(args, seed), drawn(plain, seed)) for seed in range(3))
    assert torch.equal(drawn(args, 1), drawn(args, 1))


def test_augmentation_draws_from_generators_that_an_image_set_seeds(pictures):
    args = AugmentationArguments("rand-m9-mstd0.5-inc1", random_erasing=0.5, color_jitter=0.3, interpolation="random")
    dataset = ImageDataset(pictures["validation"], train_transform(VIT, args), seed=1)
    expected = [dataset[index]["pixel_values"] for index in range(6)]
    for workers in (0, 2):
        found = next(iter(DataLoader(dataset, batch_size=6, num_workers=workers)))["pixel_values"]
        assert torch.equal(found, torch.stack(expected))
    dataset.set_epoch(1)
    assert not torch.equal(dataset[0]["pixel_values"], expected[0])


@PROCESSORS
def test_transforms_can_be_sent_to_another_process(processor):
    for transform in (train_transform(processor, AugmentationArguments(**NONE)), eval_transform(processor)):
        sent = pickle.loads(pickle.dumps(transform))
        assert torch.equal(sent(IMAGE), transform(IMAGE))


def test_policies_can_be_sent_to_another_process():
    for policy in ("rand-m9-mstd0.5-inc1", "augmix-m5-w4", "original"):
        pickle.dumps(train_transform(VIT, AugmentationArguments(policy, random_erasing=0.25)))


def test_a_processor_that_timm_cannot_follow_is_refused():
    with pytest.raises(ValueError, match=r"CLIPImageProcessor.* does not say size, mean and deviation of RGB images"):
        train_transform(CLIPImageProcessor(), AugmentationArguments())


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("random_erasing", 1.5, "expected a probability from 0 to 1"),
        ("horizontal_flip", -0.1, "expected a probability"),
        ("mixup_switch_prob", float("nan"), "expected a probability"),
        ("mixup", -1.0, "expected a number that is not negative"),
        ("min_crop_scale", 0.0, "expected a fraction above 0"),
        ("interpolation", "nearest", "expected one of"),
        ("auto_augment", "nonsense", "expected a policy of timm"),
        ("auto_augment", "rand-x9", "expected a policy of timm"),
    ],
)
def test_arguments_out_of_range_are_refused(name, value, expected):
    with pytest.raises(ValueError, match=f"`{name}` is .*{expected}"):
        AugmentationArguments(**{name: value})


def test_arguments_are_read_from_a_command_line_and_explain_themselves():
    parser = HfArgumentParser(AugmentationArguments)
    (args,) = parser.parse_args_into_dataclasses(["--auto_augment", "rand-m9-inc1", "--mixup", "0.8"])
    assert (args.auto_augment, args.mixup, args.mixes) == ("rand-m9-inc1", 0.8, True)
    assert not AugmentationArguments().mixes
    assert all(action.help for action in parser._actions)


# mixing

CLASSES = 5
BOTH = AugmentationArguments(mixup=0.8, cutmix=1.0)


def items(count, seeded=True):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    found = [{"pixel_values": image, "labels": index % CLASSES} for index, image in enumerate(images)]
    return [{**item, SEED: 100 + index} for index, item in enumerate(found)] if seeded else found


@pytest.mark.parametrize("args", [BOTH, AugmentationArguments(mixup=0.8), AugmentationArguments(cutmix=1.0)])
@pytest.mark.parametrize("count", [1, 2, 7, 8])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_labels_are_probabilities_and_those_of_the_pixels(args, count, smoothing):
    batch = Mix(args, CLASSES, label_smoothing=smoothing)(items(count))
    assert batch.keys() == {"pixel_values", "labels"}
    labels = batch["labels"]
    assert labels.shape == (count, CLASSES)
    torch.testing.assert_close(labels.sum(1), torch.ones(count))
    assert labels.min() >= smoothing / CLASSES - 1e-6
    plain = torch.stack([item["pixel_values"] for item in items(count)])
    if count % 2:  # left over
        assert torch.equal(batch["pixel_values"][-1], plain[-1])
        assert labels[-1].max() == pytest.approx(1 - smoothing + smoothing / CLASSES)
    if count == 8:
        assert not torch.equal(batch["pixel_values"], plain)


def test_pixels_and_labels_are_mixed_in_the_same_proportion():
    batch = Mix(AugmentationArguments(mixup=0.8), CLASSES)(items(4))
    plain = torch.stack([item["pixel_values"] for item in items(4)])
    share = batch["labels"][0, 0]
    assert 0 < share < 1
    torch.testing.assert_close(batch["pixel_values"], share * plain + (1 - share) * plain.flip(0))


def test_mixing_depends_on_the_seeds_alone():
    mix = Mix(BOTH, CLASSES)
    np.random.seed(0)
    first = mix(items(8))
    np.random.seed(9)
    again = mix(items(8))
    assert all(torch.equal(first[name], again[name]) for name in first)
    others = [{**item, SEED: item[SEED] + 1} for item in items(8)]
    assert not torch.equal(mix(others)["labels"], first["labels"])


def test_mixing_leaves_the_global_generator_as_it_was():
    np.random.seed(0)
    expected = np.random.rand()
    np.random.seed(0)
    Mix(BOTH, CLASSES)(items(8))
    assert np.random.rand() == expected


@pytest.mark.parametrize("args", [BOTH, AugmentationArguments()])
def test_items_without_a_seed_are_not_mixed(args):
    found = Mix(args, CLASSES)([*items(3, seeded=False), {"pixel_values": torch.zeros(3, 8, 8), "labels": NO_LABEL}])
    assert found["labels"].tolist() == [0, 1, 2, NO_LABEL]
    assert torch.equal(found["pixel_values"][0], items(3)[0]["pixel_values"])


def test_without_mixup_and_cutmix_seeds_are_dropped_and_labels_stay():
    found = Mix(AugmentationArguments(), CLASSES)(items(4))
    assert found.keys() == {"pixel_values", "labels"}
    assert found["labels"].tolist() == [0, 1, 2, 3]


def test_without_mixup_and_cutmix_labels_are_smoothed_in_training_alone():
    mix = Mix(AugmentationArguments(), CLASSES, label_smoothing=0.1)
    plain = [{name: value for name, value in item.items() if name != "seed"} for item in items(4)]
    found, evaluated = mix(items(4)), mix(plain)
    torch.testing.assert_close(found["labels"].sum(1), torch.ones(4))
    assert found["labels"].argmax(1).tolist() == evaluated["labels"].tolist() == [0, 1, 2, 3]
    assert found["labels"].max() == pytest.approx(0.9 + 0.1 / CLASSES)
    torch.testing.assert_close(found["pixel_values"], evaluated["pixel_values"])


def test_training_images_are_mixed_and_plain_ones_are_not(pictures):
    transform = train_transform(VIT, AugmentationArguments(**NONE))
    dataset = ImageDataset(pictures["validation"], transform, carry_seeds=True)
    mix = Mix(BOTH, 3)
    mixed, plain = (next(iter(DataLoader(part, 6, collate_fn=mix))) for part in (dataset, dataset.plain))
    assert mixed["labels"].shape == (6, 3)
    assert plain["labels"].tolist() == pictures["validation"]["label"]
