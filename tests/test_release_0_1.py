"""What release 0.1 wrote works with the code of today: see `files/release_0_1/README.md` for how it was written."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SIZE, logits, randomise_, tiny_model
from tiny_training import logits as logits_of_noise
from tiny_training import resnet, trainer, vit
from torch import nn
from transformers import AutoModelForImageClassification, TimmWrapperConfig, TimmWrapperForImageClassification

from updp_hf import Plan, UPDPForImageClassification, gate_
from updp_hf.cli import main
from updp_hf.core.gates.gate import gates
from updp_hf.core.graph.structure import Structure
from updp_hf.model.layout_updp import get_slot, layout_of, set_slot
from updp_hf.surgery.find import read
from updp_hf.surgery.model_io import model_inputs

FILES = Path(__file__).parent / "files" / "release_0_1"
PLANS = sorted(FILES.glob("plan_*.json"))
MERGED = sorted(FILES.glob("merged_*"))
SIZES = {"vit": (32, 32), "swin": (32, 32)}


def expected_in(folder: Path) -> torch.Tensor:
    return load_file(folder / "expected.safetensors")["logits"]


@cache
def structure_of(name: str) -> Structure:
    model = tiny_model(name)
    return read(model, model_inputs(model, torch.randn(1, 3, *SIZES.get(name, SIZE))))


def test_the_files_are_there():
    assert (len(PLANS), len(MERGED)) == (17, 4)


@pytest.mark.parametrize("file", PLANS, ids=lambda file: file.stem)
def test_a_plan_fits_and_gates_its_model(file: Path):
    _, name, form = file.stem.split("_")
    model, plan = tiny_model(name), Plan.load(file)
    written = json.loads(file.read_text())["sites"]
    assert plan.start == "inherit"
    assert {site.form for site in plan.sites} == {form}
    assert [list(site.slots) for site in plan.sites] == [site["run"] for site in written]
    assert [site.saving.macs for site in plan.sites] == [site["macs_saved"] for site in written]
    gate_(model, plan, structure=structure_of(name))
    assert list(gates(model))
    assert Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize("folder", MERGED, ids=lambda folder: folder.name)
def test_a_merged_model_has_its_logits(folder: Path):
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert isinstance(model, UPDPForImageClassification)
    torch.testing.assert_close(logits(model), expected_in(folder), rtol=0, atol=1e-5)
    assert Plan.from_dict(model.config.plan).sites


HALF_TRAINED = {
    # A key's bias has no gradient but rounding, which Adam divides by its own size. The files were written with two
    # threads of torch: with two, the logits of today are bit-identical; with the one of the tests, 1.1e-3 away.
    "checkpoint_vit_fit": (vit, {"form": "merge-keep-norm", "start": "fit", "ema_decay": 0.5}, 5e-3),
    "checkpoint_resnet_inherit": (resnet, {"form": "merge", "start": "inherit"}, 1e-4),
}


@pytest.mark.parametrize("name", HALF_TRAINED)
def test_a_half_trained_checkpoint_is_trained_to_the_same_end(name: str, tmp_path: Path):
    build, changes, tolerance = HALF_TRAINED[name]
    shutil.copytree(FILES / name, tmp_path / "checkpoint-2")
    run = trainer(tmp_path, build(), save_strategy="steps", save_steps=4, **changes)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert run.state.global_step == 8
    torch.testing.assert_close(logits_of_noise(run.merge()), expected_in(FILES / name), rtol=0, atol=tolerance)


def test_a_closed_checkpoint_is_merged(tmp_path: Path):
    main(["merge", str(FILES / "closed_vit_fit"), str(tmp_path / "merged")])
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of_noise(merged), expected_in(FILES / "checkpoint_vit_fit"), rtol=0, atol=1e-4)


# an activation that a block calls twice, of which one call was pruned

DLA = {"levels": [1] * 6, "channels": [4, 4, 8, 8, 8, 8]}
BLOCK = "timm_model.level2.tree2"


class Pruned(nn.Module):
    """A basic block of DLA with one convolution in place of two and the activation between them."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, x: torch.Tensor, *args: object) -> torch.Tensor:
        return (self.conv(x) + x).relu()


@pytest.fixture
def marked(tmp_path: Path) -> tuple[Path, TimmWrapperForImageClassification]:
    """Write a merged model as release 0.1 did where a block calls one activation twice; return what it computes too."""
    config = TimmWrapperConfig(architecture="dla34", model_args=DLA)
    stock = TimmWrapperForImageClassification(config).eval()
    conv = nn.Conv2d(8, 8, 3, padding=1)
    set_slot(stock, f"{BLOCK}.conv1", conv)
    randomise_(stock)
    identity = {"kind": "identity"}
    layout = {"conv1": layout_of(conv), "bn1": {"kind": "mark"}, "conv2": identity, "bn2": identity}
    layout = {f"{BLOCK}.{name}": spec for name, spec in (layout | {"relu": {"kind": "unless_marked"}}).items()}
    document = {"model_type": "updp", "architectures": ["UPDPForImageClassification"], "dtype": "float32"}
    document |= {"base_config": config.to_dict(), "layout": layout}
    (tmp_path / "config.json").write_text(json.dumps(document))
    gone = tuple(f"{BLOCK}.{name}." for name in ("bn1", "conv2", "bn2"))
    state = {f"base.{name}": tensor for name, tensor in stock.state_dict().items() if not name.startswith(gone)}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    set_slot(stock, BLOCK, Pruned(conv))
    return tmp_path, stock


@torch.no_grad()
def test_a_model_in_which_one_call_of_an_activation_was_pruned_computes_the_same(marked):
    folder, expected = marked
    model = UPDPForImageClassification.from_pretrained(folder).eval()
    images = torch.randn(2, 3, 64, 64)
    for _ in range(2):
        torch.testing.assert_close(model(images).logits, expected(images).logits, rtol=0, atol=1e-5)
    get_slot(model.base, f"{BLOCK}.conv1").register_forward_hook(lambda module, args, output: output.clone())
    get_slot(model.base, f"{BLOCK}.bn1").register_forward_hook(lambda module, args, output: output.clone())
    torch.testing.assert_close(model(images).logits, expected(images).logits, rtol=0, atol=1e-5)
