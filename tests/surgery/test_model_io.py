"""An image classifier, loaded with all of its weights or not at all."""

import pytest
import torch
from tiny_models import HF_FFN, tiny_model
from transformers import ViTConfig, ViTModel

from updp_hf import UPDPError, UPDPForImageClassification
from updp_hf.errors import AccessError
from updp_hf.surgery.model_io import load_classifier


@pytest.fixture
def headless(tmp_path):
    ViTModel(ViTConfig(**HF_FFN)).save_pretrained(tmp_path)
    return tmp_path


def test_the_weights_are_those_in_the_folder(tmp_path):
    model = tiny_model("vit").float()
    model.save_pretrained(tmp_path)
    loaded = load_classifier(tmp_path)
    assert not loaded.training
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_a_pruned_model_is_loaded_like_any_other(folders):
    assert type(load_classifier(str(folders["vit"]), dtype=torch.float16)) is UPDPForImageClassification


def test_a_path_is_a_folder_and_no_hub_id(tmp_path):
    with pytest.raises(AccessError, match=r"nowhere holds no config\.json: give the folder"):
        load_classifier(tmp_path / "nowhere")


def test_what_is_neither_folder_nor_hub_id_is_told(tmp_path):
    with pytest.raises(AccessError, match=r"from 'nobody/nothing', which is no folder here and was taken for a Hub id"):
        load_classifier("nobody/nothing")


def test_a_folder_without_weights_is_told(tmp_path):
    ViTConfig(**HF_FFN).save_pretrained(tmp_path)
    with pytest.raises(AccessError, match="No image classifier could be loaded from the folder"):
        load_classifier(tmp_path)


def test_a_feature_extractor_is_no_classifier(headless):
    with pytest.raises(UPDPError, match=r"has no weights that fit classifier\.bias, classifier\.weight of ViTFor"):
        load_classifier(headless)


def test_a_new_head_is_accepted_where_it_is_asked_for(headless):
    assert load_classifier(headless, may_have_new_head=True, num_labels=7).num_labels == 7


def test_nothing_but_the_head_may_be_new(headless):
    with pytest.raises(UPDPError, match="has no weights that fit vit"):
        load_classifier(headless, may_have_new_head=True, num_labels=7, patch_size=2)
