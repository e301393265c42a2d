"""Which plans fit a model: those whose slots can be closed, whatever the finder would choose; others say why not."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from timm.layers import BatchNormAct2d
from tiny_models import REFUSED, SIZE, Residual, tiny_model
from torch import nn

from updp_hf import Plan, find_sites, gate_, merge
from updp_hf.core.depth.attention import Attention
from updp_hf.core.depth.blocks import Block
from updp_hf.core.depth.branches import Branch
from updp_hf.core.depth.runs import Run
from updp_hf.core.gates.gate import set_lambda_
from updp_hf.core.kinds import Form
from updp_hf.errors import PlanError
from updp_hf.surgery.find import read

IMAGES = {"vit": (32, 32), "resnet": SIZE, "chain": SIZE}
NAMES = {"chain": "x"}


@cache
def structure_of(name):
    pixels = torch.randn(1, 3, *IMAGES[name], dtype=torch.float64)
    return read(tiny_model(name), {NAMES.get(name, "pixel_values"): pixels})


@cache
def sites_of(name, form=Form.MERGE):
    return find_sites(None, [form], structure=structure_of(name)).sites


def site(name, form=Form.MERGE, **changes):
    return replace(sites_of(name, form)[0], **changes)


def why_not(name, site):
    return site.fits(structure_of(name))


def stretch(name, first, last, activations):
    """Return the run from module `first` of a chain to module `last`."""
    channels, axis = structure_of(name).channels_behind("features")
    slots = tuple(f"features.{i}" for i in range(first, last + 1))
    return Run(Form.MERGE, "features", slots, channels, axis, activations=tuple(f"features.{i}" for i in activations))


# what fits


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit", {}),
        ("vit", {"form": Form.MERGE_WHOLE_KERNELS}),
        ("resnet", {"cropped": ()}),
        ("resnet", {"cropped": tuple(f"resnet.encoder.stages.0.layers.0.layer.{i}.convolution" for i in (0, 1))}),
    ],
    ids=["as found", "another form of the same kind", "whole kernels", "both cropped"],
)
def test_what_can_be_merged_fits_whatever_the_finder_would_choose(name, changes):
    assert why_not(name, site(name, **changes)) == ""


def test_a_run_may_begin_and_end_elsewhere_than_the_finder_s():
    found, block = site("resnet"), "resnet.encoder.stages.0.layers.0.layer"
    assert found.slots[0] == f"{block}.0.convolution"
    assert found.slots[-1] == f"{block}.1.normalization"
    assert why_not("resnet", replace(found, slots=found.slots[:-1])) == ""
    keeps_norm = site("vit", Form.MERGE_KEEP_NORM)
    assert why_not("vit", replace(keeps_norm, form=Form.MERGE)) == ""


@torch.no_grad()
def test_a_run_may_have_more_maps_than_the_finder_tries():
    run = stretch("chain", 13, 22, (15, 18, 21))
    assert sum(isinstance(structure_of("chain").modules[slot], nn.Conv2d) for slot in run.slots) == 4
    assert why_not("chain", replace(run, slots=run.slots[:-1])) == ""  # the last activation with it
    model, inputs = tiny_model("chain"), {"x": torch.randn(2, 3, *SIZE, dtype=torch.float64)}
    gate_(model, Plan((run,), start="inherit"), structure=structure_of("chain"))
    set_lambda_(model, 1.0)
    torch.testing.assert_close(merge(model, example_inputs=inputs)(**inputs), model(**inputs), rtol=0, atol=1e-10)


def test_attention_may_leave_the_norm_in_front_where_it_is():
    found = site("vit", Form.ATTENTION_DROP)
    assert why_not("vit", replace(found, slots=found.slots[1:])) == ""


# what does not: runs

LAYER = "vit.layers.0"
FC1, ACT, FC2 = (f"{LAYER}.mlp.{name}" for name in ("fc1", "activation_fn", "fc2"))
NORM = f"{LAYER}.layernorm_after"
CONV1, CONV2 = (f"resnet.encoder.stages.0.layers.0.layer.{i}.convolution" for i in (0, 1))

RUNS = {
    "no such slot": (
        "vit",
        {"slots": (NORM, FC1, ACT, f"{LAYER}.mlp.fc3")},
        f"the model has no module '{LAYER}.mlp.fc3'",
    ),
    "no such block": ("vit", {"block": "vit.layers.9"}, "the model has no module 'vit.layers.9'"),
    "another block": ("vit", {"block": "vit.layers.1"}, f"'{NORM}' lies outside of the block 'vit.layers.1'"),
    "no block": ("vit", {"block": ""}, f"'{NORM}' lies outside of the block ''"),
    "no part": ("vit", {"slots": (f"{LAYER}.attention", FC1)}, f"'{LAYER}.attention' cannot be part of a run"),
    "other order": ("vit", {"slots": (NORM, FC1, FC2, ACT)}, f"'{FC1}' does not feed '{FC2}' alone"),
    "one left out": ("vit", {"slots": (NORM, FC1, FC2), "activations": ()}, f"'{FC1}' does not feed '{FC2}' alone"),
    "feeds two": (
        "vit",
        {"slots": (f"{LAYER}.attention.o_proj", NORM, FC1, ACT, FC2)},
        f"'{LAYER}.attention.o_proj' does not feed '{NORM}' alone",
    ),
    "a norm that is said to stay": (
        "vit",
        {"norms": (), "norm_channels": ()},
        f"its non-linearities are '{NORM}', '{ACT}' where '{ACT}' are expected",
    ),
    "an activation too many": (
        "resnet",
        {"activations": ()},
        r"its non-linearities are 'resnet.*activation' where none are expected",
    ),
    "other norms' channels": ("vit", {"norm_channels": (8,)}, "the norms have 16 channels where 8 are expected"),
    "no norms' channels": ("vit", {"norm_channels": ()}, "the norms have 16 channels where none are expected"),
    "more norms' channels": ("vit", {"norm_channels": (16, 16)}, "the norms have 16 channels where 16, 16 are"),
    "other channels": (
        "vit",
        {"channels": 8},
        "'vit.layers.0' returns 16 channels on axis -1 where 8 channels on axis -1",
    ),
    "other axis": (
        "resnet",
        {"channel_axis": -1},
        "returns 8 channels on axis 1 where 8 channels on axis -1 are expected",
    ),
    "one map": (
        "vit",
        {"slots": (NORM, FC1), "activations": ()},
        f"there are fewer than two Linears or convolutions among '{NORM}', '{FC1}'",
    ),
    "cropped activation": ("vit", {"cropped": (ACT,)}, f"'{ACT}' is to be cropped and is no convolution of the run"),
    "cropped Linear": (
        "vit",
        {"cropped": (FC1,)},
        r"do not become one map \(A kernel \(\) with padding \(\) has no centre",
    ),
}


@pytest.mark.parametrize(("name", "changes", "reason"), RUNS.values(), ids=RUNS)
def test_a_run_that_does_not_fit_says_why(name, changes, reason):
    model, run = tiny_model(name), site(name, **changes)
    with pytest.raises(PlanError, match=rf"which does not fit this model, because .*{reason}.*: was the plan made"):
        gate_(model, Plan((run,)), structure=structure_of(name))


def test_an_activation_at_the_front_of_a_run_does_not_fit():
    expected = "the activation 'features.2' stands in front of all Linears and convolutions of the run"
    assert why_not("chain", stretch("chain", 2, 6, (2, 5))) == expected


def test_a_norm_in_front_of_padding_does_not_fit():
    block = Residual(*(nn.Sequential(*front_norm()) for _ in range(2))).eval()
    structure = read(block, {"x": torch.randn(1, 3, 9, 9)})
    run = Run(Form.MERGE, "blocks.0", tuple(f"blocks.0.{i}" for i in range(1, 5)), 8, 1, activations=("blocks.0.3",))
    assert (
        run.fits(structure) == "at the border of an image no single layer computes what 'blocks.0.2', 'blocks.0.4' do"
    )


def front_norm():
    return nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)


def normed_end():
    return nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), BatchNormAct2d(8)


def test_what_a_batch_norm_calls_may_not_be_left_out():
    structure = read(Residual(*(nn.Sequential(*normed_end()) for _ in range(2))).eval(), {"x": torch.randn(1, 3, 9, 9)})
    slots = tuple(f"blocks.0.{i}" for i in range(4))
    run = Run(Form.MERGE, "blocks.0", slots, 8, 1, activations=slots[1:2])
    assert run.fits(structure) == "'blocks.0.3' has an operation in it that the run leaves out"
    assert replace(run, slots=slots[:3]).fits(structure) == ""
    closed = replace(run, slots=(*slots, "blocks.0.3.act"), activations=("blocks.0.1", "blocks.0.3.act"))
    assert closed.fits(structure) == ""


def run_of_refused(name):
    names = ("conv1", "act", "conv2") if name == "called-twice" else [str(i) for i in range(3)]
    slots = tuple(f"blocks.1.{part}" for part in names)
    return Run(Form.MERGE, "blocks.1", slots, 8, 1, activations=(slots[1],))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("called-twice", "'blocks.1.act' is called 2 times"),
        ("tied", "'blocks.1.2' has its parameters read by 'blocks.1.0'"),
        ("standardised", "'blocks.1.0' (StdConv2d) is not affine in a way that is known"),
        ("same", "'blocks.1.0' (Conv2dSame) is not affine in a way that is known"),
    ],
)
def test_a_plan_for_what_looks_like_a_run_says_why_it_is_none(name, reason):
    build, _ = REFUSED[name]
    assert run_of_refused(name).fits(read(build().eval(), {"x": torch.randn(1, 3, *SIZE)})) == reason


# branches, attention, blocks


class Sized(nn.Module):
    """Return a tensor and a number: nothing can stand in its place."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.second(self.first(x).softmax(-1)), 3


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Sized()
        self.never = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))

    def forward(self, x):
        y, _ = self.inner(x)
        return x + y


CONTAINERS = {
    "branch that is not there": (
        Form.BRANCH_FIT,
        {"slots": (f"{LAYER}.ffn",)},
        f"the model has no module '{LAYER}.ffn'",
    ),
    "two branches": (
        Form.BRANCH_FIT,
        {"slots": (f"{LAYER}.mlp", f"{LAYER}.attention")},
        "a branch is one module, and not 2",
    ),
    "attention as a branch": (
        Form.BRANCH_FIT,
        {"slots": (f"{LAYER}.attention",)},
        f"'{LAYER}.attention' is not a module that maps each token by itself, one tensor in and one of the same shape",
    ),
    "branch of other channels": (
        Form.BRANCH_FIT,
        {"channels": 8},
        f"'{LAYER}.mlp' returns 16 channels where 8 are expected",
    ),
    "a branch as attention": (
        Form.ATTENTION_DROP,
        {"slots": (f"{LAYER}.mlp",), "outputs": 0},
        f"'{LAYER}.mlp' is not a module with attention in it, one tensor in and one of the same shape out",
    ),
    "the wrong norm": (
        Form.ATTENTION_DROP,
        {"slots": (NORM, f"{LAYER}.attention")},
        f"'{NORM}' is no norm that feeds '{LAYER}.attention' alone",
    ),
    "attention of another tuple": (
        Form.ATTENTION_DROP,
        {"outputs": 3},
        f"'{LAYER}.attention' returns a tuple of 2 where a tuple of 3 is expected",
    ),
    "attention as a tensor": (
        Form.ATTENTION_DROP,
        {"outputs": 0},
        f"'{LAYER}.attention' returns a tuple of 2 where a tensor is expected",
    ),
    "attention of other channels": (Form.ATTENTION_DROP, {"channels": 2}, "returns 16 channels where 2 are expected"),
    "block that is not there": (
        Form.BLOCK_DROP,
        {"block": "vit.layers.3", "slots": ("vit.layers.3",)},
        "the model has no module 'vit.layers.3'",
    ),
    "part of a block": (
        Form.BLOCK_DROP,
        {"slots": (f"{LAYER}.mlp",)},
        f"'{LAYER}.mlp' is not the block '{LAYER}' itself",
    ),
    "what is no block": (
        Form.BLOCK_DROP,
        {"block": "vit.embeddings", "slots": ("vit.embeddings",)},
        "'vit.embeddings' is no block with one tensor into the block and one of the same shape out",
    ),
    "a list": (
        Form.BLOCK_DROP,
        {"block": "vit.layers", "slots": ("vit.layers",)},
        "'vit.layers' is never called",
    ),
    "block of another tuple": (
        Form.BLOCK_DROP,
        {"outputs": 2},
        "'vit.layers.0' returns a tensor where a tuple of 2 is expected",
    ),
}


@pytest.mark.parametrize(("form", "changes", "reason"), CONTAINERS.values(), ids=CONTAINERS)
def test_a_module_that_does_not_fit_says_why(form, changes, reason):
    assert reason in why_not("vit", site("vit", form, **changes))


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        (Branch("branch-fit", "0", ("0.inner",), 8), "'0.inner' is not a module that maps each token by itself"),
        (Attention("attention-drop", "0", ("0.inner",), 8), "'0.inner' is not a module with attention in it"),
        (Branch("branch-fit", "0", ("0.never",), 8), "'0.never' is never called"),
        (Block("block-drop", "0.never", ("0.never",), 8), "'0.never' is never called"),
        (Run("merge", "0.never", ("0.never.0", "0.never.2"), 8), "'0.never.0' is never called"),
    ],
    ids=lambda value: value.slots[0] if not isinstance(value, str) else "",
)
def test_what_is_not_called_or_returns_more_than_tensors_does_not_fit(site, reason):
    structure = read(nn.Sequential(Outer(), Outer()), {"input": torch.randn(1, 5, 8)})
    assert reason in site.fits(structure)


def test_a_plan_for_another_checkpoint_says_so_in_one_sentence():
    with pytest.raises(PlanError) as refusal:
        gate_(tiny_model("vit"), Plan(sites_of("resnet")[:1]), structure=structure_of("vit"))
    assert str(refusal.value) == (
        "The plan closes resnet.encoder.stages.0.layers.0 (merge), which does not fit this model, because the model "
        "has no module 'resnet.encoder.stages.0.layers.0': was the plan made for another checkpoint?"
    )
