"""The README and the map of the code: their examples run."""

import re
from pathlib import Path

from project import ROOT
from tiny_training import RandomImages, vit
from transformers import ViTImageProcessor

README, MAP = ROOT / "README.md", ROOT / "updp_hf" / "README.md"


def blocks(language: str, *files: Path) -> list[str]:
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_examples_run_one_after_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pushes = []
    monkeypatch.setattr("updp_hf.training.publishing.push_folder", lambda folder, *_, **__: pushes.append(str(folder)))
    vit(num_hidden_layers=7).save_pretrained("checkpoint")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained("checkpoint")
    images = RandomImages(16)
    names = {
        "train_dataset": images,
        "eval_dataset": images,
        "calibration_batches": [images.images],
    }
    # The hub and the length of training are all that differs from what is printed.
    swaps = {'"facebook/deit-small-patch16-224"': '"checkpoint"', "num_train_epochs=30": "max_steps=3, use_cpu=True"}
    for block in blocks("python", README, MAP):
        for printed, local in swaps.items():
            block = block.replace(printed, local)
        exec(compile(block, "README.md", "exec"), names)
    assert {"deit-small-p6", "deit-small-untrained-p3"} <= {folder.name for folder in tmp_path.iterdir()}
    assert len(names["trainer"].plan.sites) == 6
    assert pushes == ["deit-small-p6"]


def test_the_two_commands_are_printed():
    commands = blocks("bash", README)
    assert commands == [
        "pip install '.[recipes]' && accelerate launch recipes/digits.py\n",
        "pip install '.[test]' && pytest\n",
    ]
