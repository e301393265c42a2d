import json
from dataclasses import replace
from functools import cache

import pytest
from huggingface_hub import ModelCard
from project import ROOT
from tiny_models import pruned_once
from tiny_training import assert_equal, last_two, vit, weights
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessor

from updp_hf import Form, Report, gate_
from updp_hf.hub.folder import MERGED_FILES, check_unoccupied, save_merged
from updp_hf.reporting.card import render_card
from updp_hf.reporting.measure import digest_of_weights, report_of
from updp_hf.training.checkpoints import save_checkpoint


def test_a_training_checkpoint_is_not_written_over(tmp_path):
    model = vit()
    gate_(model, last_two(vit))
    save_checkpoint(model, tmp_path / "checkpoint-4")
    check_unoccupied(tmp_path, vit())
    with pytest.raises(ValueError, match="holds a training checkpoint"):
        check_unoccupied(tmp_path / "checkpoint-4", vit())


def test_the_source_is_not_written_over(tmp_path):
    vit().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="where the checkpoint itself lies"):
        check_unoccupied(tmp_path, type(vit()).from_pretrained(tmp_path))


@pytest.mark.parametrize("folder", ["new", "new/folder"])
def test_a_new_folder_is_free(folder, tmp_path):
    check_unoccupied(tmp_path / folder, vit())
    check_unoccupied(tmp_path / folder, nn.Linear(1, 1))


@cache
def pruned(form=Form.MERGE):
    return pruned_once(vit(), form)


@pytest.fixture(scope="module")
def merged():
    return pruned()


@pytest.fixture(scope="module")
def report(merged):
    return replace(report_of(merged), metrics_after={"accuracy": 0.4321})


def names(folder):
    return {path.name for path in folder.iterdir()}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


CODE = {path.name for path in (ROOT / "updp_hf" / "model").glob("*_updp.py")}
EVERY = {"config.json", "model.safetensors", *CODE, "updp_report.json", "README.md", "before_after.png", "blocks.png"}


def test_model_report_and_card_are_saved_and_nothing_else(merged, report, tmp_path):
    folder = tmp_path / "new" / "vit-p1"
    save_merged(merged, folder, None, report, "someone/vit-p1")
    assert names(folder) == EVERY
    assert_equal(weights(AutoModelForImageClassification.from_pretrained(folder)), weights(merged))
    saved = Report.load(folder)
    assert saved == replace(report, weights=digest_of_weights(folder))
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text == render_card(saved, "someone/vit-p1", [path.name for path in folder.glob("*.png")])
    assert ModelCard(text).data.eval_results[0].metric_value == 0.4321


def test_every_file_is_one_that_is_published(merged, report, tmp_path, sketches):
    save_merged(merged, tmp_path, ViTImageProcessor(), report, "vit-p1")
    published = {path.name for pattern in MERGED_FILES for path in tmp_path.glob(pattern)}
    assert names(tmp_path) == published == {*EVERY, "preprocessor_config.json"}


def test_the_processor_is_saved_beside_the_model(merged, report, tmp_path, sketches):
    processor = ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3])
    save_merged(merged, tmp_path, processor, report, "vit-p1")
    assert [*AutoImageProcessor.from_pretrained(tmp_path).image_mean] == [0.1, 0.2, 0.3]


def test_a_stock_model_is_saved_without_code(report, tmp_path, sketches):
    stock = pruned(Form.BLOCK_DROP)
    save_merged(stock, tmp_path, None, report_of(stock, base=vit()), "vit-p1")
    assert not list(tmp_path.glob("*.py"))
    assert "import updp_hf" not in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_saving_again_gives_the_same_files(merged, report, tmp_path):
    found = []
    for _ in range(2):
        save_merged(merged, tmp_path, None, report, "vit-p1")
        found.append(contents(tmp_path))
    assert found[0] == found[1]


def test_a_card_that_was_edited_by_hand_stays(merged, report, tmp_path, sketches):
    card = tmp_path / "README.md"
    save_merged(merged, tmp_path, None, report, "vit-p1")
    card.write_text("# My own card\n", encoding="utf-8")
    save_merged(merged, tmp_path, None, replace(report, seed=7), "vit-p1")
    assert card.read_text(encoding="utf-8") == "# My own card\n"
    assert Report.load(tmp_path).seed == 7


def fails(*args, **kwargs):
    raise RuntimeError("it failed")


@pytest.mark.parametrize("broken", ["render_card", "draw_pictures"])
def test_a_failure_of_the_card_does_not_cost_the_model(broken, merged, report, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("updp_hf.reporting.card.logger.warning", warnings.append)
    monkeypatch.setattr(f"updp_hf.reporting.card.{broken}", fails)
    save_merged(merged, tmp_path, None, report, "vit-p1")
    assert_equal(weights(AutoModelForImageClassification.from_pretrained(tmp_path)), weights(merged))
    assert Report.load(tmp_path).weights == digest_of_weights(tmp_path)
    assert "README.md" not in names(tmp_path)
    (warning,) = warnings
    assert "RuntimeError: it failed" in warning


class HalfSaved:
    """A processor that breaks in the middle of a file."""

    def save_pretrained(self, folder):
        (folder / "preprocessor_config.json").write_text("{", encoding="utf-8")
        raise OSError("disk full")


def test_a_file_appears_when_it_is_whole(merged, report, tmp_path, sketches):
    save_merged(merged, tmp_path, ViTImageProcessor(), report, "vit-p1")
    before = contents(tmp_path)
    with pytest.raises(OSError, match="disk full"):
        save_merged(pruned(Form.BLOCK_DROP), tmp_path, HalfSaved(), replace(report, seed=7), "vit-p1")
    assert contents(tmp_path) == before


def test_nothing_half_saved_is_left_in_a_new_folder(merged, report, tmp_path):
    with pytest.raises(OSError, match="disk full"):
        save_merged(merged, tmp_path / "new", HalfSaved(), report, "vit-p1")
    assert names(tmp_path / "new") == set()


def test_files_of_others_stay(merged, report, tmp_path, sketches):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    save_merged(merged, tmp_path, None, report, "vit-p1")
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_what_is_no_transformers_model_cannot_be_saved(report, tmp_path):
    with pytest.raises(ValueError, match="Linear is no transformers model"):
        save_merged(nn.Linear(1, 1), tmp_path / "new", None, report, "vit-p1")
    assert not (tmp_path / "new").exists()


def test_no_path_of_the_machine_is_saved(merged, report, tmp_path, sketches):
    vit().save_pretrained(tmp_path / "source")
    model = pruned_once(AutoModelForImageClassification.from_pretrained(tmp_path / "source"))
    save_merged(model, tmp_path / "vit-p1", None, report_of(model), "vit-p1")
    for name in ("config.json", "updp_report.json", "README.md"):
        text = (tmp_path / "vit-p1" / name).read_text(encoding="utf-8")
        assert str(tmp_path) not in text
    assert "base_model" not in ModelCard.load(tmp_path / "vit-p1" / "README.md").data.to_dict()
    assert (
        json.loads((tmp_path / "vit-p1" / "updp_report.json").read_text(encoding="utf-8"))["plan"]["base_model"] == ""
    )
