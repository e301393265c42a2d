import pytest
import torch
from tiny_training import timm_vit, vit
from transformers import ConvNextConfig, ViTImageProcessor

from updp_hf.recipe import pretrained
from updp_hf.recipe.pretrained import load_checkpoint, load_teacher, save_tiny

LABELS = [str(digit) for digit in range(10)]


def saved(model, folder):
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def test_a_classifier_that_fits_is_kept(tmp_path):
    model = vit()
    found, processor = load_checkpoint(saved(model, tmp_path), ["a", "b", "c", "d"])
    torch.testing.assert_close(found.classifier.weight, model.classifier.weight)
    assert processor.size["height"] == 16


@pytest.mark.parametrize("build", [vit, timm_vit])
def test_a_classifier_for_other_classes_is_a_new_one_with_a_warning(build, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(pretrained.logger, "warning", said.append)
    found, _ = load_checkpoint(saved(build(), tmp_path), LABELS)
    assert found.config.num_labels == 10
    assert ["4 classes and there are 10" in text for text in said] == [True]


def test_drop_path_is_told_to_models_that_know_it(tmp_path):
    config = ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[2, 2], patch_size=2, image_size=16)
    folder = save_tiny(config, tmp_path / "convnext", LABELS)
    assert load_checkpoint(folder, LABELS, 0.3)[0].config.drop_path_rate == 0.3
    timm = load_checkpoint(saved(timm_vit(), tmp_path / "timm"), ["a", "b", "c", "d"], 0.3)[0]
    assert timm.timm_model.blocks[2].drop_path1.drop_prob == pytest.approx(0.3)
    with pytest.raises(ValueError, match="ViTConfig knows no drop path: leave it out"):
        load_checkpoint(saved(vit(), tmp_path / "vit"), ["a", "b", "c", "d"], 0.3)


def test_a_checkpoint_that_is_not_there_is_told_in_one_sentence(tmp_path):
    with pytest.raises(OSError, match=r"^The checkpoint .*nowhere could not be reached \(.*\): connect"):
        load_checkpoint(str(tmp_path / "nowhere"), LABELS)


def named(model, names, folder, **processor):
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}, **processor).save_pretrained(folder)
    return str(folder)


def test_the_same_classes_in_another_order_are_refused(tmp_path):
    folder = named(vit(), ["cat", "dog", "eel", "fox"], tmp_path)
    load_checkpoint(folder, ["cat", "dog", "eel", "fox"])
    load_checkpoint(folder, ["n01", "n02", "n03", "n04"])  # other names for the same, or so one hopes
    with pytest.raises(ValueError, match="in another order"):
        load_checkpoint(folder, ["dog", "cat", "eel", "fox"])


def test_a_teacher_has_to_know_the_classes_and_to_expect_the_same_images(tmp_path):
    names = ["cat", "dog", "eel", "fox"]
    processor = ViTImageProcessor()
    assert load_teacher(named(vit(), names, tmp_path / "good"), names, processor).config.num_labels == 4
    with pytest.raises(ValueError, match="does not know the 3 classes"):
        load_teacher(named(vit(), names, tmp_path / "classes"), names[:3], processor)
    with pytest.raises(ValueError, match="expects images normalised by"):
        load_teacher(named(vit(), names, tmp_path / "mean", image_mean=[0.1, 0.2, 0.3]), names, processor)
