"""Try each given order of imports in a process of its own, and print what went wrong, as JSON.

Arguments: the folder of a merged transformers model, that of a merged timm model, and one piece of code for each order.
"""

import json
import os
import sys
import traceback

import torch  # once for all: the processes are forks of this one
import torchvision  # noqa: F401

TRANSFORMERS_FOLDER, TIMM_FOLDER, *ORDERS = sys.argv[1:]


def load_in_every_way() -> None:
    from transformers import AutoConfig, AutoModelForImageClassification, ViTImageProcessor, pipeline

    loaded = AutoModelForImageClassification.from_pretrained(TRANSFORMERS_FOLDER)
    classify = pipeline("image-classification", model=TRANSFORMERS_FOLDER, image_processor=ViTImageProcessor())
    import timm

    network = timm.create_model(f"local-dir:{TIMM_FOLDER}", pretrained=True).eval()
    same = AutoModelForImageClassification.from_pretrained(TIMM_FOLDER)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network(images), same(pixel_values=images).logits)
    import updp_hf

    assert type(AutoConfig.from_pretrained(TRANSFORMERS_FOLDER)) is updp_hf.UPDPConfig
    assert type(loaded) is type(classify.model) is updp_hf.UPDPForImageClassification
    assert loaded.push_with_card is not None


def what_goes_wrong(order: str) -> str:
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            exec(order, {})
            load_in_every_way()
        except BaseException:
            os.write(writing, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        error = told.read()
    os.wait()
    return error


print(json.dumps({order: what_goes_wrong(order) for order in ORDERS}))
