"""Pushed models, loaded by the examples of their cards, in fresh processes with an empty cache."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from project import ROOT
from tiny_training import CLASSES, RandomImages, trainer, vit
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    TimmWrapperConfig,
    Trainer,
    TrainingArguments,
    ViTImageProcessor,
)

from updp_hf import UPDPForImageClassification, cli
from updp_hf.deployment.onnx import export_onnx
from updp_hf.hub.push import push_folder
from updp_hf.reporting.report import Report

NAMES = ("vit", "resnet")
FROM_TIMM = ("resnet",)
SIZE = 32
TINY_RESNET = {"channels": [8, 8, 16, 16]}


def build(name):
    if name == "vit":
        return vit(image_size=SIZE)
    config = TimmWrapperConfig(architecture="resnet18", num_labels=CLASSES, model_args=TINY_RESNET, image_size=SIZE)
    return AutoModelForImageClassification.from_config(config).eval()


def export(folder):
    """Do as `updp-hf export` does, but for the latencies, which take time."""
    replace(Report.load(folder), onnx=export_onnx(folder, batch_sizes=()).facts()).save(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folders of trained, merged models, by name."""
    folders = {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp("models") / name
        processor = ViTImageProcessor(size={"height": SIZE, "width": SIZE})
        run = trainer(
            folder,
            build(name),
            processing_class=processor,
            train_dataset=RandomImages(size=SIZE),
            eval_dataset=RandomImages(8, size=SIZE, seed=1),
        )
        run.train()
        run.save_model()
        folders[name] = folder
    return folders


@pytest.fixture
def image(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 51, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    return image


RUN_EXAMPLES = """
import json, sys
from PIL import Image
way, examples = sys.argv[1], json.load(open("examples.json"))
if way != "updp_hf":
    sys.modules["updp_hf"] = None  # as if it were not installed
found = {}
for name, example in examples.items():
    names = {}
    exec(example, names)
    if "classify" in names:
        classify, image = names["classify"], Image.open("image.png")
        ranking = classify(image, top_k=100)
        inputs = classify.image_processor(image, return_tensors="pt")
        logits = classify.model(**inputs).logits
        found[name] = {"ranking": {entry["label"]: entry["score"] for entry in ranking}, "logits": logits[0].tolist()}
    elif "session" in names:
        pixels = names["images"]["pixel_values"]
        found[name] = {"logits": names["session"].run(None, {"pixel_values": pixels})[0][0].tolist()}
    else:
        import torch
        pixels = torch.load("pixels.pt")[name]
        found[name] = {"logits": names["model"](pixels)[0].tolist()}
json.dump(found, open("found.json", "w"))
"""
WAYS = {
    "updp_hf": lambda example: "import updp_hf" in example and "timm" not in example,
    "remote": lambda example: "trust_remote_code=True" in example,
    "timm": lambda example: "timm.create_model" in example,
    "onnx": lambda example: "onnxruntime" in example,
}


def in_a_fresh_process(code, environment, folder, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=folder, stdin=subprocess.DEVNULL
    )


def run_examples(way, cards, environment, folder):
    """Run the example of each card that shows `way`, as it is printed, and return what came out, by name."""
    examples = {}
    for name, card in cards.items():
        shown = [example for example in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL) if WAYS[way](example)]
        assert len(shown) == 1, card
        examples[name] = shown[0]
    (folder / "examples.json").write_text(json.dumps(examples))
    needs_us = way in ("updp_hf", "timm")
    done = in_a_fresh_process(RUN_EXAMPLES, environment, folder, "updp_hf" if needs_us else way)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


def assert_same_everywhere(way, folders, hub, environment, tmp_path, image):
    names = [name for name in folders if way != "timm" or name in FROM_TIMM]
    models = {name: AutoModelForImageClassification.from_pretrained(folders[name]) for name in names}
    pixels = {
        name: AutoImageProcessor.from_pretrained(folders[name])(image, return_tensors="pt")["pixel_values"]
        for name in names
    }
    torch.save(pixels, tmp_path / "pixels.pt")
    cards = {name: hub.files(f"alice/{name}")["README.md"].decode() for name in names}
    found = run_examples(way, cards, environment, tmp_path)
    assert set(found) == set(names)
    for name in names:
        with torch.no_grad():
            expected = models[name](pixel_values=pixels[name]).logits[0]
        tolerance = 1e-4 if way == "onnx" else 1e-6
        scale = float(expected.abs().max())
        assert torch.tensor(found[name]["logits"]) == pytest.approx(expected, abs=tolerance * scale)
        if "ranking" in found[name]:
            labels = models[name].config.id2label
            probabilities = {labels[i]: float(p) for i, p in enumerate(expected.softmax(-1))}
            assert found[name]["ranking"] == pytest.approx(probabilities, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["remote", "updp_hf", "timm", "onnx"])
def test_the_examples_of_the_card_give_the_logits_that_were_saved(way, saved, hub, hub_environment, tmp_path, image):
    folders = {name: shutil.copytree(folder, tmp_path / name) for name, folder in saved.items()}
    for name, folder in folders.items():
        if way == "onnx":
            export(folder)
        push_folder(folder, f"alice/{name}")
    assert_same_everywhere(way, folders, hub, hub_environment, tmp_path, image)


@pytest.mark.slow
def test_without_any_of_the_ways_loading_fails_loudly(saved, hub, hub_environment, tmp_path):
    push_folder(saved["vit"], "alice/vit")
    code = "from transformers import pipeline; pipeline('image-classification', model='alice/vit')"
    done = in_a_fresh_process(code, hub_environment, tmp_path)
    assert done.returncode != 0
    assert "trust_remote_code=True" in done.stderr


@pytest.mark.slow
def test_what_the_digits_recipe_pushes_is_loaded_in_every_way(hub, hub_environment, tmp_path, image):
    folders = {}
    for name in NAMES:
        folders[name] = tmp_path / name
        command = [sys.executable, str(ROOT / "recipes" / "digits.py"), "--model", name, "--output_dir", folders[name]]
        command += ["--baseline_epochs", "1", "--max_steps", "8", "--push_to_hub", "--hub_model_id", f"alice/{name}"]
        command += ["--num_pruned_blocks", "2", "--selector", "last", "--report_to", "none"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=hub_environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert len(hub.messages(f"alice/{name}")) == 1
        export(folders[name])
        assert cli.main(["push", str(folders[name]), f"alice/{name}"]) == 0
        report = Report.load(folders[name])
        assert f"{100 * report.metrics_after['accuracy']:.2f} %" in hub.files(f"alice/{name}")["README.md"].decode()
    for way in WAYS:
        assert_same_everywhere(way, folders, hub, hub_environment, tmp_path, image)


# as any model of transformers


def loaded(name, **options):
    return AutoModelForImageClassification.from_pretrained(f"alice/{name}", **options)


def predict(model, count=4):
    pixels = RandomImages(count, size=SIZE, seed=2).images
    with torch.no_grad():
        return model.eval()(pixel_values=pixels.to(model.device, model.dtype)).logits.float()


EITHER = pytest.mark.parametrize("name", ["vit", pytest.param("resnet", marks=pytest.mark.slow)])


@EITHER
def test_a_downloaded_model_behaves_like_any_other(name, saved, hub, tmp_path):
    push_folder(saved[name], f"alice/{name}")
    expected = predict(loaded(name))
    near = {"rtol": 0, "atol": 0.05 * float(expected.abs().max())}
    for dtype in (torch.float16, torch.bfloat16):
        torch.testing.assert_close(predict(loaded(name, dtype=dtype)), expected, **near)
    torch.testing.assert_close(predict(loaded(name).half()), expected, **near)
    assert torch.equal(predict(loaded(name, device_map="cpu").to("cpu", torch.float32)), expected)
    assert torch.equal(predict(loaded(name, device_map="auto")), expected)
    compiled = torch.compile(loaded(name), backend="aot_eager")
    torch.testing.assert_close(predict(compiled), expected, rtol=1e-4, atol=1e-5)
    loaded(name).save_pretrained(tmp_path / "again")
    assert torch.equal(predict(UPDPForImageClassification.from_pretrained(tmp_path / "again")), expected)
    other = loaded(name, num_labels=7, ignore_mismatched_sizes=True)
    assert predict(other).shape == (4, 7)


@EITHER
def test_a_downloaded_model_is_fine_tuned_and_resumed_by_the_stock_trainer(name, saved, hub, tmp_path):
    push_folder(saved[name], f"alice/{name}")

    def run(folder, **changes):
        args = TrainingArguments(
            **{
                "output_dir": str(folder),
                "max_steps": 6,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-3,
                "save_strategy": "steps",
                "save_steps": 3,
                "use_cpu": True,
                "disable_tqdm": True,
                "report_to": "none",
                **changes,
            }
        )
        return Trainer(model=loaded(name), args=args, train_dataset=RandomImages(size=SIZE))

    straight = run(tmp_path / "straight")
    before = predict(straight.model)
    straight.train()
    assert not torch.equal(predict(straight.model), before)
    resumed = run(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    torch.testing.assert_close(predict(resumed.model), predict(straight.model), rtol=0, atol=0)
    straight.save_model(str(tmp_path / "tuned"))
    tuned = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned")
    assert torch.equal(predict(tuned), predict(straight.model))
    tuned.push_to_hub("alice/tuned")
    card = hub.files("alice/tuned")["README.md"].decode()
    assert "after: not measured" in card  # the figures of the run before are not those of these weights
