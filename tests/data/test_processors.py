"""What prepares the images of a model from timm is saved beside the merged model, and prepares them as before."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import edit_config, pruned_once, tiny_model
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    DPTImageProcessor,
    TimmWrapperImageProcessor,
    ViTImageProcessor,
    pipeline,
)

from updp_hf.data.processors import data_config_of, ordinary_processor

STD = (0.2, 0.3, 0.25)
SIZES = ((64, 64), (51, 70), (90, 47), (33, 34), (35, 64), (31, 29))
"""Heights and widths of images, odd and even, larger and smaller than what is made of them."""


def timm_processor(size=(32, 32), **fields):
    channels = fields.pop("channels", 3)
    normal = {"mean": (0.5, 0.4, 0.3)[:channels], "std": STD[:channels]}
    return TimmWrapperImageProcessor({"input_size": (channels, *size), **normal, **fields})


def noise(height, width, mode="RGB", seed=0):
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def gradient(height, width):
    """An image without sharp edges, which all ways to resize agree on."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(3 * y / height + channel) * np.cos(4 * x / width - channel) for channel in range(3)]
    return Image.fromarray((127.5 * (1 + np.stack(waves, -1))).astype(np.uint8))


def grey_levels(expected, found):
    """Return how far two images are apart before they were normalised."""
    assert expected.shape == found.shape
    std = torch.tensor(STD[: expected.shape[1]])[:, None, None]
    return 255 * std * (expected - found).abs()


def crops_alike(image, processor):
    """Whether both libraries take the same half of what is cut away."""
    size, target = processor.size, (processor.crop_size.height, processor.crop_size.width)
    if size.shortest_edge:
        short = min(image.size)
        scaled = [int(size.shortest_edge * edge / short) for edge in (image.height, image.width)]
    else:
        scaled = [size.height, size.width]
    return all((old - new) % 4 != 3 or old < new for old, new in zip(scaled, target, strict=True))


DATA_CONFIGS = [
    {"crop_pct": 0.875, "interpolation": "bicubic"},
    {"crop_pct": 0.9, "interpolation": "bilinear", "size": (48, 48)},
    {"crop_pct": 0.95, "interpolation": "bicubic", "size": (40, 40)},
    {"crop_pct": 1.0, "interpolation": "lanczos"},
    {"crop_pct": 1.2, "interpolation": "bicubic"},
    {"crop_pct": 1.0, "interpolation": "bicubic", "crop_mode": "squash", "size": (32, 40)},
    {"crop_pct": 0.8, "interpolation": "bilinear", "crop_mode": "squash", "size": (32, 40)},
]


@pytest.mark.parametrize("fields", DATA_CONFIGS, ids=str)
def test_ordinary_processor_makes_the_pixels_that_timm_makes(fields):
    theirs = timm_processor(**fields)
    ours = ordinary_processor(theirs)
    assert type(ours) is BitImageProcessor
    compared = 0
    for size in SIZES:
        for image, largest in ((gradient(*size), 2), (noise(*size), 32)):
            expected = theirs(image)["pixel_values"]
            found = ours(image, return_tensors="pt")["pixel_values"]
            if not crops_alike(image, ours):
                assert expected.shape == found.shape
                continue
            compared += 1
            apart = grey_levels(expected, found)
            assert apart.max() <= largest
            assert apart.mean() <= 1
    assert compared >= 4


def test_crop_is_one_pixel_apart_where_the_halves_are_rounded_otherwise():
    theirs = timm_processor(crop_pct=1.0, interpolation="bicubic")
    ours = ordinary_processor(theirs)
    wide = gradient(32, 35)
    expected, found = theirs(wide)["pixel_values"], ours(wide, return_tensors="pt")["pixel_values"]
    assert grey_levels(expected[..., :-1], found[..., 1:]).max() < 1.5


def test_grey_images_are_prepared_for_models_of_one_channel_and_of_three():
    image = noise(50, 70, "L")
    theirs = timm_processor(channels=1, interpolation="bilinear")
    found = ordinary_processor(theirs)(image, return_tensors="pt")["pixel_values"]
    assert grey_levels(theirs(image)["pixel_values"], found).max() < 1.5
    theirs = timm_processor(interpolation="bilinear")  # timm itself wants its images in colour
    found = ordinary_processor(theirs)(image, return_tensors="pt")["pixel_values"]
    assert grey_levels(theirs(image.convert("RGB"))["pixel_values"], found).max() < 1.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop_mode": "border"}, "'border' to 32 × 32"),
        ({"size": (32, 40)}, "'center' to 32 × 40"),
        ({"interpolation": "nearest"}, "'nearest'"),
        ({"interpolation": "hamming"}, "'hamming'"),
    ],
    ids=str,
)
def test_what_no_ordinary_processor_does_is_not_saved_and_the_log_says_why(fields, message, caplog):
    with caplog.at_level(logging.WARNING, "updp_hf.data.processors"):
        assert ordinary_processor(timm_processor(**fields)) is None
    assert "No image processor is saved" in caplog.text
    assert message in caplog.text


def test_any_other_processor_is_returned_as_it_is():
    for other in (None, ViTImageProcessor(), "tokens"):
        assert ordinary_processor(other) is other


def test_saved_processor_is_loaded_again_and_the_pipeline_ranks_as_before(tmp_path):
    model = pruned_once(tiny_model("timm-wrapper").float())
    theirs = timm_processor(crop_pct=0.875, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config.update(architecture="updp"))
    ours = ordinary_processor(theirs)
    ours.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(again) is BitImageProcessor
    assert again.to_dict() == ours.to_dict()
    image = gradient(50, 70)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = loaded(theirs(image)["pixel_values"]).logits[0].softmax(-1)
    ranking = pipeline("image-classification", model=str(tmp_path), device="cpu")(image, top_k=5)
    assert [entry["label"] for entry in ranking] == [loaded.config.id2label[int(i)] for i in expected.argsort().flip(0)]
    assert [entry["score"] for entry in ranking] == pytest.approx(expected.sort(descending=True)[0].tolist(), abs=0.01)


ODD = {"crop_pct": 0.8, "interpolation": "bilinear", "crop_mode": "squash", "size": (31, 45)}


@pytest.mark.parametrize("fields", [*DATA_CONFIGS, ODD], ids=str)
def test_data_config_read_back_makes_the_same_pixels(fields):
    theirs = timm_processor(**fields)
    config = data_config_of(ordinary_processor(theirs))
    again = TimmWrapperImageProcessor(config)
    for size in SIZES:
        assert torch.equal(theirs(noise(*size))["pixel_values"], again(noise(*size))["pixel_values"])
    crop_pct = config.pop("crop_pct")
    assert crop_pct == pytest.approx(theirs.data_config["crop_pct"], abs=0.05)
    assert config == {name: value for name, value in theirs.data_config.items() if name != "crop_pct"}


def test_data_config_of_a_processor_that_squashes_and_does_not_normalise():
    processor = ViTImageProcessor(size={"height": 32, "width": 40}, do_normalize=False, resample=2)
    expected = {"input_size": (3, 32, 40), "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"}
    assert data_config_of(processor) == {**expected, "mean": (0.0,) * 3, "std": (1.0,) * 3}


@pytest.mark.parametrize(
    ("processor", "size", "mode"),
    [
        (
            ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875, image_std=STD),
            224,
            "center",
        ),  # published
        (ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0, image_std=STD), 32, "center"),
        (ConvNextImageProcessor(size={"shortest_edge": 384}, crop_pct=0.875, image_std=STD), 384, "squash"),
        (DeiTImageProcessor(image_std=STD), 224, "squash"),
    ],
    ids=["convnext", "convnext uncropped", "convnext large", "deit"],
)
def test_data_config_of_a_published_processor_makes_the_same_pixels(processor, size, mode):
    config = data_config_of(processor)
    assert (config["input_size"], config["crop_mode"]) == ((3, size, size), mode)
    for shape in ((300, 300), (260, 347)):
        found = TimmWrapperImageProcessor(config)(gradient(*shape))["pixel_values"]
        assert grey_levels(processor(gradient(*shape), return_tensors="pt")["pixel_values"], found).max() < 2.5


@pytest.mark.parametrize(
    "processor",
    [
        None,
        DPTImageProcessor(),
        ViTImageProcessor(do_rescale=False),
        ViTImageProcessor(do_resize=False),
        ViTImageProcessor(resample=0),
        BitImageProcessor(do_center_crop=False),
        BitImageProcessor(crop_size={"height": 32, "width": 40}),
    ],
    ids=["none", "dpt", "not rescaled", "not resized", "nearest", "not cropped", "not square"],
)
def test_processor_that_timm_cannot_repeat_has_no_data_config(processor):
    assert data_config_of(processor) is None
