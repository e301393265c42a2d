"""Merged models that came from timm, loaded by timm."""

import copy
import shutil

import pytest
import timm
import torch
from tiny_models import CLASSES, TIMM, TIMM_RESNET, TIMM_SWIN, edit_config, pruned_once, randomise_, tiny_model
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitImageProcessor,
    DPTImageProcessor,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from updp_hf import UPDPConfig, UPDPForImageClassification

DATA = {
    "input_size": [3, 64, 64],
    "interpolation": "bilinear",
    "crop_pct": 0.9,
    "crop_mode": "center",
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.3, 0.25],
    "test_input_size": [3, 96, 96],
}
"""What the configuration of a checkpoint on the Hub holds in `pretrained_cfg`."""
NETS = {
    "vit": ("vit_tiny_patch16_224", TIMM),
    "swin": ("swin_tiny_patch4_window7_224", {**TIMM_SWIN, "mlp_ratio": 2.0}),
    "resnet": ("resnet18", TIMM_RESNET),
    "mobilenetv2": ("mobilenetv2_050", {}),
}
EVERY_NET = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("swin", "mobilenetv2"))) for name in NETS]
)


def save_merged(name, folder, **fields):
    architecture, model_args = NETS[name]
    config = {"architecture": architecture, "num_labels": CLASSES, "model_args": copy.deepcopy(model_args)}
    model = TimmWrapperForImageClassification(TimmWrapperConfig(**config, **fields)).eval()
    randomise_(model)
    pruned_once(model, end_activation="relu").save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders of merged models by the name of their network, each made when it is first asked for."""

    class Folders(dict):
        def __missing__(self, name):
            self[name] = tmp_path_factory.mktemp("timm")
            save_merged(name, self[name])
            return self[name]

    return Folders()


@pytest.fixture
def resnet(folders, tmp_path):
    """A copy of a merged model, to be changed."""
    return shutil.copytree(folders["resnet"], tmp_path / "resnet")


@torch.no_grad()
def outputs(network, size=32):
    return copy.deepcopy(network).eval()(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)))


@EVERY_NET
def test_timm_builds_the_network_that_was_merged(folders, name):
    expected = UPDPForImageClassification.from_pretrained(folders[name])
    network = timm.create_model(f"local-dir:{folders[name]}", pretrained=True)
    assert type(network) is type(expected.base.timm_model)
    assert torch.equal(outputs(network), outputs(expected).logits)


def test_timm_downloads_from_the_hub(folders, tmp_path):
    repository = tmp_path / "models--user--model"
    snapshot = shutil.copytree(folders["resnet"], repository / "snapshots" / ("a" * 40))
    BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 36, "width": 36}).save_pretrained(snapshot)
    for revision in ("main", "v1"):
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text("a" * 40)
    expected = outputs(timm.create_model(f"local-dir:{folders['resnet']}", pretrained=True))
    for name in ("user/model", "user/model@v1"):
        network = timm.create_model(f"hf-hub:{name}", pretrained=True, cache_dir=tmp_path)
        assert torch.equal(outputs(network), expected)
        assert network.pretrained_cfg["hf_hub_id"] == name
        assert network.pretrained_cfg["input_size"] == (3, 36, 36)


def test_network_is_as_timm_makes_its_own(folders):
    network = timm.create_model(f"local-dir:{folders['resnet']}", pretrained=True)
    assert all(module.training for module in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert network.default_cfg is network.pretrained_cfg
    cfg = network.pretrained_cfg
    assert (cfg["architecture"], cfg["num_classes"]) == ("updp", CLASSES)
    assert (cfg["source"], cfg["file"]) == ("local-dir", str(folders["resnet"]))
    assert cfg["first_conv"] == "conv1"
    assert "url" not in cfg
    images = torch.randn(2, 3, 32, 32)
    stock = timm.create_model("resnet18", **TIMM_RESNET)
    assert network.forward_features(images).shape == stock.forward_features(images).shape
    assert len(network.forward_intermediates(images, intermediates_only=True)) == 5
    network.set_grad_checkpointing()
    network(images).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_half_precision_is_loaded_in_float32(resnet):
    UPDPForImageClassification.from_pretrained(resnet, dtype=torch.float16).save_pretrained(resnet)
    assert AutoModelForImageClassification.from_pretrained(resnet).dtype is torch.float16
    network = timm.create_model(f"local-dir:{resnet}", pretrained=True)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


@EVERY_NET
def test_num_classes_gives_a_new_head(folders, name):
    old = timm.create_model(f"local-dir:{folders[name]}", pretrained=True)
    new = timm.create_model(f"local-dir:{folders[name]}", pretrained=True, num_classes=7)
    assert outputs(new).shape == (2, 7)
    assert new.num_classes == 7
    assert new.pretrained_cfg["num_classes"] == CLASSES  # which the weights are for, as timm has it
    state = old.state_dict()
    assert len({key for key, tensor in new.state_dict().items() if not torch.equal(tensor, state[key])}) == 2
    bare = timm.create_model(f"local-dir:{folders[name]}", pretrained=True, num_classes=0)
    assert outputs(bare).shape == (2, bare.num_features if name != "mobilenetv2" else bare.head_hidden_size)
    same = timm.create_model(f"local-dir:{folders[name]}", pretrained=True, num_classes=CLASSES)
    assert torch.equal(outputs(same), outputs(old))


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_without_pretrained_the_weights_are_fresh(folders, name):
    trained = timm.create_model(f"local-dir:{folders[name]}", pretrained=True)
    fresh = timm.create_model(f"local-dir:{folders[name]}")
    assert {key: tensor.shape for key, tensor in fresh.state_dict().items()} == {
        key: tensor.shape for key, tensor in trained.state_dict().items()
    }
    weights = [key for key, parameter in trained.named_parameters() if parameter.ndim > 1]
    state = trained.state_dict()
    assert not any(torch.equal(fresh.state_dict()[key], state[key]) for key in weights)
    assert torch.isfinite(outputs(fresh)).all()


def test_rates_of_dropout_reach_the_network_and_change_no_weight(folders):
    plain = timm.create_model(f"local-dir:{folders['vit']}", pretrained=True, in_chans=3)
    network = timm.create_model(f"local-dir:{folders['vit']}", pretrained=True, drop_rate=0.2, drop_path_rate=0.3)
    assert network.head_drop.p == 0.2
    assert network.blocks[2].drop_path1.drop_prob == pytest.approx(0.3)
    assert torch.equal(outputs(network), outputs(plain))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_pool": "avg"}, "cannot be built with other global_pool than"),
        ({"features_only": True, "out_indices": (1,)}, "other features_only, out_indices than"),
        ({"in_chans": 1}, "takes images of 3 channels, not of 1"),
        ({"pretrained_cfg_overlay": {"url": "somewhere"}}, "leave out url in the overlay"),
    ],
    ids=str,
)
def test_arguments_that_would_change_the_weights_are_refused(folders, arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(f"local-dir:{folders['resnet']}", pretrained=True, **arguments)


def test_name_of_the_registry_is_no_network_by_itself():
    with pytest.raises(ValueError, match="say which pruned model you want"):
        timm.create_model("updp", pretrained=True)


def test_pruned_model_that_is_not_from_timm_is_refused(tmp_path):
    pruned_once(tiny_model("vit")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a pruned 'vit' of transformers, not a network of timm"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(is_gated=True), "unfinished pruning run"),
        (lambda config: config.pop("base_config"), "no base_config or no layout"),
        (lambda config: config["layout"].update(absent={"kind": "identity"}), "names the slot 'absent'"),
    ],
    ids=["unfinished", "no base", "wrong layout"],
)
def test_what_is_no_merged_model_is_refused(resnet, change, message):
    edit_config(resnet, change)
    with pytest.raises(ValueError, match=message):
        timm.create_model(f"local-dir:{resnet}", pretrained=True)


def test_images_are_prepared_as_the_checkpoint_wanted_them(tmp_path):
    save_merged("resnet", tmp_path, pretrained_cfg=DATA)
    network = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    expected = {name: tuple(value) if isinstance(value, list) else value for name, value in DATA.items()}
    del expected["test_input_size"]
    assert timm.data.resolve_model_data_config(network) == expected
    at_test = timm.data.resolve_model_data_config(network, use_test_size=True)
    assert at_test["input_size"] == (3, 96, 96)
    assert timm.data.create_transform(**timm.data.resolve_model_data_config(network)) is not None


def test_processor_beside_the_model_has_the_last_word(tmp_path):
    save_merged("resnet", tmp_path, pretrained_cfg=DATA)
    ViTImageProcessor(size={"height": 48, "width": 40}, resample=3, image_mean=[0.1] * 3).save_pretrained(tmp_path)
    network = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert timm.data.resolve_model_data_config(network, use_test_size=True) == {
        "input_size": (3, 48, 40),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": (0.1,) * 3,
        "std": (0.5,) * 3,
    }


def test_crop_share_of_the_checkpoint_is_kept_where_the_processor_does_the_same(tmp_path):
    save_merged("resnet", tmp_path, pretrained_cfg=DATA)
    same = BitImageProcessor(size={"shortest_edge": 71}, crop_size={"height": 64, "width": 64}, resample=2)
    same.save_pretrained(tmp_path)
    data = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path}", pretrained=True))
    assert (data["crop_pct"], data["input_size"]) == (0.9, (3, 64, 64))
    assert data["mean"] == tuple(same.image_mean)


def test_processor_that_timm_cannot_repeat_leaves_the_word_to_the_checkpoint(tmp_path):
    save_merged("resnet", tmp_path, pretrained_cfg=DATA)
    DPTImageProcessor().save_pretrained(tmp_path)
    data = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path}", pretrained=True))
    assert data["input_size"] == (3, 64, 64)


def test_size_that_a_network_was_built_for_is_told(folders):
    network = timm.create_model(f"local-dir:{folders['vit']}", pretrained=True)
    assert timm.data.resolve_model_data_config(network)["input_size"] == (3, 32, 32)


def test_overlay_has_the_last_word(folders):
    overlay = {"crop_pct": 0.5}
    network = timm.create_model(f"local-dir:{folders['resnet']}", pretrained=True, pretrained_cfg_overlay=overlay)
    assert network.pretrained_cfg["crop_pct"] == 0.5


def test_transformers_loads_the_same_folder_as_ever(resnet):
    processor = BitImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(resnet)
    config = AutoConfig.from_pretrained(resnet)
    assert type(config) is UPDPConfig
    assert config.architecture == "updp"
    model = AutoModelForImageClassification.from_pretrained(resnet)
    assert type(model) is UPDPForImageClassification
    assert model.base.config.architecture == "resnet18"
    assert type(AutoImageProcessor.from_pretrained(resnet)) is BitImageProcessor
    assert pipeline("image-classification", model=str(resnet), device="cpu").model.config.architecture == "updp"
    model.save_pretrained(resnet)
    assert torch.equal(outputs(timm.create_model(f"local-dir:{resnet}", pretrained=True)), outputs(model).logits)
