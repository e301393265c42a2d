"""Saved models: loaded again by anyone, refused where they have been tampered with."""

import copy
import re
import shutil

import pytest
import safetensors.torch
import torch
from rings import slow_but
from tiny_models import close_, edit_config, edit_weights, logits, pruned_once, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

from updp_hf import Form, Plan, UPDPConfig, UPDPForImageClassification, find_sites, gate_, merge
from updp_hf.errors import PlanError
from updp_hf.model.modeling_updp import updp_config
from updp_hf.surgery.model_io import example_inputs_of, logits_of


@pytest.fixture
def vit(folders, tmp_path):
    """A copy of a saved merged model, to be tampered with."""
    return shutil.copytree(folders["vit"], tmp_path / "vit")


# the way in; fresh processes are in `hub/test_load.py`


@pytest.mark.parametrize("name", ["vit", "timm-wrapper"])
def test_auto_classes_know_our_models(folders, name):
    assert type(AutoConfig.from_pretrained(folders[name])) is UPDPConfig
    model = AutoModelForImageClassification.from_pretrained(folders[name])
    assert type(model) is UPDPForImageClassification
    assert not model.training


def test_configuration_answers_for_its_base(folders):
    config = AutoConfig.from_pretrained(folders["vit"])
    assert (config.image_size, config.num_channels, config.num_labels) == (32, 3, 5)
    assert config.merge_error <= 1e-4
    assert config.architectures == ["UPDPForImageClassification"]
    with pytest.raises(AttributeError, match="'no_such_field'"):
        _ = config.no_such_field


def test_labels_reach_the_loaded_model(vit):
    labels = {i: f"class {i}" for i in range(5)}
    model = UPDPForImageClassification.from_pretrained(vit, id2label=labels, label2id={v: k for k, v in labels.items()})
    assert model.config.id2label == labels
    assert model.base.config.id2label == labels
    output = model(**example_inputs_of(model, 3), labels=torch.tensor([0, 1, 4]))
    assert torch.allclose(output.loss, nn.functional.cross_entropy(output.logits, torch.tensor([0, 1, 4])))


@pytest.mark.parametrize("name", ["vit", "timm-wrapper"])
def test_new_head_for_new_classes(folders, name):
    old = UPDPForImageClassification.from_pretrained(folders[name])
    model = UPDPForImageClassification.from_pretrained(folders[name], num_labels=7, ignore_mismatched_sizes=True)
    assert logits(model).shape == (3, 7)
    assert model.num_labels == model.config.num_labels == model.base.config.num_labels == 7
    assert torch.isfinite(logits(model)).all()
    state = old.state_dict()
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, state[key])}
    heads = {key for key, tensor in model.state_dict().items() if tensor.shape != state[key].shape}
    assert changed == heads
    assert len(heads) == 2


def test_only_a_head_may_have_another_shape(vit):
    def widen(state):
        name = next(name for name in state if name.endswith("mlp.fc2.weight"))
        state[name] = torch.cat([state[name], state[name]])

    edit_weights(vit, widen)
    with pytest.raises(ValueError, match=r"mismatched keys: .*fc2.weight"):
        UPDPForImageClassification.from_pretrained(vit, ignore_mismatched_sizes=True)


def test_fields_of_the_user_are_saved_and_loaded(tmp_path):
    own = {"num_train_images": 1_300_000, "depth_of_shelf": 2**40, "curve": [1e9, 0.5], "note": {"a": [{"b": 10**12}]}}
    model = tiny_model("vit").float()
    for name, value in own.items():
        setattr(model.config, name, value)
    pruned_once(model).save_pretrained(tmp_path)
    loaded = UPDPForImageClassification.from_pretrained(tmp_path)
    assert {name: getattr(loaded.base.config, name) for name in own} == own
    assert {name: getattr(loaded.config, name) for name in own} == own


def test_new_head_is_refused_unless_asked_for(folders):
    with pytest.raises(ValueError, match="ignore_mismatched_sizes"):
        UPDPForImageClassification.from_pretrained(folders["vit"], num_labels=7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["vit", "timm-wrapper"])
def test_loading_in_another_dtype(folders, name, dtype):
    expected = logits(UPDPForImageClassification.from_pretrained(folders[name]))
    model = UPDPForImageClassification.from_pretrained(folders[name], dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.allclose(logits(model).float(), expected, atol=0.05 * float(expected.abs().max()))


def test_half_of_a_loaded_model(folders, tmp_path):
    model = UPDPForImageClassification.from_pretrained(folders["vit"]).half()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    model.save_pretrained(tmp_path)
    again = copy.deepcopy(UPDPForImageClassification.from_pretrained(tmp_path))
    assert again.dtype is torch.float16
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", ["vit", "timm-wrapper"])
def test_second_round_trip_writes_the_same_files(folders, name, tmp_path):
    UPDPForImageClassification.from_pretrained(folders[name]).save_pretrained(tmp_path)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / file).read_bytes() == (folders[name] / file).read_bytes()


def test_tensors_with_several_names_are_saved_and_loaded(tmp_path):
    model = tiny_model("vit")
    first, *others = model.vit.layers
    for layer in others:
        layer.attention = first.attention
    gate_(model, Plan(find_sites(model, ["merge"]).sites))
    close_(model)
    merged = merge(model)
    merged.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert set(stored) == set(merged.state_dict())
    loaded = copy.deepcopy(UPDPForImageClassification.from_pretrained(tmp_path))
    inputs = example_inputs_of(model, 2)
    with torch.no_grad():
        assert torch.equal(logits_of(loaded, inputs), logits_of(merged, inputs))


def test_the_attention_asked_for_is_that_of_the_base(folders):
    model = UPDPForImageClassification.from_pretrained(folders["vit"], attn_implementation="eager")
    assert model.base.config._attn_implementation == "eager"
    inputs = example_inputs_of(model, 2)
    assert model(**inputs, output_attentions=True).attentions


def test_class_names_may_be_any_word(vit):
    edit_config(vit, lambda config: config["base_config"].update(label_descriptions={"backbone": "a spine"}))
    UPDPForImageClassification.from_pretrained(vit)


def test_loading_info_is_returned_when_asked_for(folders):
    model, info = UPDPForImageClassification.from_pretrained(folders["vit"], output_loading_info=True)
    assert type(model) is UPDPForImageClassification
    assert not info["missing_keys"]


# pruned again


def assert_reloads(merged, folder):
    merged.save_pretrained(folder)
    again = copy.deepcopy(UPDPForImageClassification.from_pretrained(folder))
    assert torch.equal(logits(again), logits(merged))


@pytest.mark.parametrize("name", slow_but(["vit", "timm-wrapper", "swin"], "vit"))
def test_merged_model_is_pruned_again(name, tmp_path):
    once = pruned_once(tiny_model(name), end_activation="relu")
    sites = find_sites(once, [Form.MERGE]).sites
    assert len(sites) == len(find_sites(tiny_model(name), [Form.MERGE]).sites) - 1
    twice = pruned_once(copy.deepcopy(once), numbers=(0,), end_activation="gelu")
    assert set(once.config.layout) < set(twice.config.layout)
    assert {p: twice.config.layout[p] for p in once.config.layout} == once.config.layout
    assert_reloads(twice, tmp_path)


@pytest.mark.parametrize("form", slow_but([Form.ATTENTION_DROP, Form.BLOCK_DROP], Form.BLOCK_DROP))
@pytest.mark.parametrize("end_activation", slow_but([None, "relu"], None))
def test_pruned_block_is_pruned_again(form, end_activation, tmp_path):
    once = pruned_once(tiny_model("vit"), end_activation=end_activation)
    assert_reloads(pruned_once(once, form), tmp_path)


def test_second_activation_behind_one_block_is_refused():
    once = pruned_once(tiny_model("vit"), end_activation="relu")
    with pytest.raises(PlanError, match="ends with an activation from an earlier pruning"):
        pruned_once(once, Form.ATTENTION_DROP, end_activation="relu")


# tampered with


def change_layout(path, spec):
    return lambda config: config["layout"].__setitem__(path, spec)


FC1 = "vit.layers.1.mlp.fc1"
MERGED = "base.vit.layers.1.block.mlp.fc1"  # the block is wrapped by its end activation
LINEAR = {"kind": "linear", "in_features": 16, "out_features": 16, "bias": True}
TAMPERED_CONFIGS = {
    "unknown kind": (change_layout(FC1, {"kind": "conv9d"}), "knows the kinds"),
    "kind is a list": (change_layout(FC1, {"kind": ["linear"]}), "knows the kinds"),
    "no kind": (change_layout(FC1, {}), "knows the kinds"),
    "slot is no mapping": (change_layout(FC1, "linear"), "knows the kinds"),
    "absurd size": (change_layout(FC1, {**LINEAR, "out_features": 2**40}), "needs valid values"),
    "negative size": (change_layout(FC1, {**LINEAR, "in_features": -1}), "needs valid values"),
    "size is a flag": (change_layout(FC1, {**LINEAR, "in_features": True}), "needs valid values"),
    "missing field": (change_layout(FC1, {"kind": "linear", "in_features": 16}), "needs valid values"),
    "extra field": (change_layout(FC1, {**LINEAR, "code": "x"}), "needs valid values"),
    "path not there": (change_layout("vit.layers.9.mlp.fc1", LINEAR), r"names the slot 'vit\.layers\.9\.mlp\.fc1'"),
    "empty path": (change_layout("", LINEAR), "names the slot ''"),
    "path into a replaced slot": (change_layout("vit.layers.1.mlp", {"kind": "identity"}), "inside"),
    "unknown activation": (
        change_layout("vit.layers.1", {"kind": "end", "channels": 16, "eps": 1e-5, "activation": "exec"}),
        "needs valid values",
    ),
    "unknown model type": (lambda c: c["base_config"].update(model_type="vit-of-tomorrow"), "'vit-of-tomorrow'"),
    "no model type": (lambda c: c["base_config"].pop("model_type"), "type None"),
    "model in itself": (lambda c: c["base_config"].update(model_type="updp"), "type 'updp'"),
    "unfinished training": (lambda c: c.update(is_gated=True), "unfinished pruning run"),
    "no base": (lambda c: c.pop("base_config"), "no base_config or no layout"),
    "no layout": (lambda c: c.pop("layout"), "no base_config or no layout"),
}


@pytest.mark.parametrize(("change", "message"), TAMPERED_CONFIGS.values(), ids=TAMPERED_CONFIGS)
def test_tampered_configuration_is_refused(vit, change, message):
    edit_config(vit, change)
    with pytest.raises(ValueError, match=message):
        AutoModelForImageClassification.from_pretrained(vit)


@pytest.mark.parametrize("argument", ["checkpoint_path", "pretrained", "pretrained_cfg_overlay", "cache_dir"])
def test_timm_arguments_that_load_files_are_refused(folders, tmp_path, argument):
    folder = shutil.copytree(folders["timm-wrapper"], tmp_path / "timm")
    edit_config(folder, lambda config: config["base_config"]["model_args"].update({argument: "/etc/passwd"}))
    with pytest.raises(ValueError, match=f"asks to load other files \\({argument}\\)"):
        AutoModelForImageClassification.from_pretrained(folder)


def test_missing_weight_is_refused(vit):
    edit_weights(vit, lambda state: state.pop(f"{MERGED}.weight"))
    with pytest.raises(ValueError, match=f"missing keys: {re.escape(MERGED)}.weight"):
        AutoModelForImageClassification.from_pretrained(vit)


def test_extra_weight_is_refused(vit):
    edit_weights(vit, lambda state: state.update({"base.vit.extra": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"unexpected keys: base\.vit\.extra"):
        AutoModelForImageClassification.from_pretrained(vit)


def test_unpruned_weights_are_refused(vit):
    stock = tiny_model("vit").float()
    state = {f"base.{name}": tensor.contiguous() for name, tensor in stock.state_dict().items()}
    safetensors.torch.save_file(state, vit / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="keys"):
        AutoModelForImageClassification.from_pretrained(vit)


def test_missing_weight_is_refused_even_with_a_new_head(vit):
    edit_weights(vit, lambda state: state.pop(f"{MERGED}.bias"))
    with pytest.raises(ValueError, match="missing keys"):
        AutoModelForImageClassification.from_pretrained(vit, num_labels=7, ignore_mismatched_sizes=True)


def test_model_without_a_layout_cannot_be_built():
    with pytest.raises(ValueError, match="no base_config or no layout"):
        UPDPForImageClassification(updp_config(tiny_model("vit")))
