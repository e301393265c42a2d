"""A saved model on its way to the Hub: what arrives, where, and what stays at home."""

import json
import pickle
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pushing import REPO, assert_holds, contents
from tiny_training import logits
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessor

from updp_hf import UPDPForImageClassification
from updp_hf.hub.push import push_folder
from updp_hf.reporting.card import CARD_NAME, render_card
from updp_hf.reporting.report import OnnxFacts, Report

STRAYS = {
    "optimizer.pt": b"PK",
    "training_args.bin": pickle.dumps({"hub_token": "hf_alice"}),
    "pytorch_model.bin": pickle.dumps([1]),
    "trainer_state.json": b"{}",
    "token": b"hf_alice",
    ".env": b"HF_TOKEN=hf_alice",
    "notes.md": b"to do",
    "holiday.png": b"\x89PNG",
    "model.pkl": pickle.dumps(1),
    "setup.py": b"import os",
    "checkpoint-8/model.safetensors": b"gated",
    "checkpoint-8/config.json": b"{}",
    "onnx/notes.txt": b"to do",
    ".git/config": b"[core]",
    "__pycache__/modeling_updp.cpython-311.pyc": b"code",
}


def load(**options):
    return UPDPForImageClassification.from_pretrained(REPO, **options)


def scatter(folder):
    for name, content in STRAYS.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)


# what arrives


def test_a_new_repo_holds_what_the_folder_holds_after_one_commit(hub, folder):
    url = push_folder(folder, REPO)
    assert_holds(hub, folder)
    assert set(hub.files(REPO)) == set(contents(folder))
    assert {"config.json", "model.safetensors", "preprocessor_config.json", CARD_NAME} <= set(hub.files(REPO))
    assert len(hub.messages(REPO)) == 1
    assert url.startswith(f"{hub.url}/{REPO}")


def test_the_pushed_model_computes_what_the_saved_one_does(hub, folder):
    push_folder(folder, REPO)
    saved = UPDPForImageClassification.from_pretrained(folder)
    assert torch.equal(logits(load()), logits(saved))
    assert type(AutoModelForImageClassification.from_pretrained(REPO)) is UPDPForImageClassification
    assert AutoImageProcessor.from_pretrained(REPO).size == {"height": 16, "width": 16}


def test_what_lies_about_in_the_folder_stays_at_home(hub, folder):
    expected = set(contents(folder))
    scatter(folder)
    push_folder(folder, REPO)
    assert set(hub.files(REPO)) == expected


@pytest.mark.parametrize("of_these_weights", [True, False])
def test_an_exported_graph_travels_along_if_it_is_of_these_weights(hub, folder, of_these_weights):
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"graph")
    if of_these_weights:
        replace(Report.load(folder), onnx=OnnxFacts(opset=18, difference=1e-6)).save(folder)
    push_folder(folder, REPO)
    assert hub.files(REPO).get("onnx/model.onnx") == (b"graph" if of_these_weights else None)
    assert_holds(hub, folder)


def test_a_model_in_shards_arrives_whole(hub, folder):
    model = UPDPForImageClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="8KB")
    assert not (folder / "model.safetensors").exists()
    push_folder(folder, REPO)
    assert torch.equal(logits(load()), logits(model))


def test_shards_take_the_place_of_one_file(hub, folder, other_folder):
    push_folder(other_folder, REPO)
    model = UPDPForImageClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="8KB")
    push_folder(folder, REPO)
    assert torch.equal(logits(load()), logits(model))


def test_the_message_is_that_of_the_commit(hub, folder):
    push_folder(folder, REPO, commit_message="P2")
    assert hub.messages(REPO) == ["P2"]


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_half_a_model_is_refused_before_anything_is_sent(hub, folder, missing):
    (folder / missing).unlink()
    with pytest.raises((ValueError, OSError), match=re.escape(str(folder))):
        push_folder(folder, REPO)
    assert hub.requests == []


def test_a_training_checkpoint_is_refused_before_anything_is_sent(hub, trained):
    with pytest.raises(ValueError, match=r"unfinished|checkpoint"):
        push_folder(trained()[1] / "checkpoint-8", REPO)
    assert hub.requests == []


# where it arrives


def test_an_existing_repo_gets_one_commit_and_keeps_what_is_not_ours(hub, folder, other_folder):
    hub.add(REPO, {"samples/cat.jpg": b"cat"})
    push_folder(other_folder, REPO)
    push_folder(folder, REPO)
    assert len(hub.messages(REPO)) == 3
    assert hub.files(REPO).pop("samples/cat.jpg") == b"cat"
    assert_holds(hub, folder)


def test_a_processor_that_was_pushed_on_its_own_stays(hub, folder):
    ViTImageProcessor(size={"height": 16, "width": 16}).push_to_hub(REPO)
    (folder / "preprocessor_config.json").unlink()
    push_folder(folder, REPO)
    assert AutoImageProcessor.from_pretrained(REPO).size == {"height": 16, "width": 16}


def test_a_branch_is_made_and_main_stays(hub, folder, other_folder):
    push_folder(other_folder, REPO)
    push_folder(folder, REPO, revision="small/p2")
    assert_holds(hub, other_folder)
    assert_holds(hub, folder, revision="small/p2")
    saved = UPDPForImageClassification.from_pretrained(folder)
    assert torch.equal(logits(load(revision="small/p2")), logits(saved))
    push_folder(other_folder, REPO, revision="small/p2")
    assert_holds(hub, other_folder, revision="small/p2")


def test_a_pull_request_leaves_main_alone(hub, folder):
    hub.add(REPO, {CARD_NAME: b"# Mine"})
    assert "/discussions/1" in push_folder(folder, REPO, create_pr=True).pr_url
    assert hub.files(REPO) == {CARD_NAME: b"# Mine"}
    assert hub.files(REPO, "refs/pr/1")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("private", [True, False, None])
def test_a_repo_is_private_when_asked_for(hub, folder, private):
    push_folder(folder, REPO, private=private)
    assert hub.repos[REPO].private is bool(private)
    assert_holds(hub, folder)


def test_the_token_given_counts_and_not_the_one_logged_in(hub, folder):
    push_folder(folder, "bob/pruned", token="hf_bob")
    assert_holds(hub, folder, "bob/pruned")


def test_a_name_alone_is_that_of_a_repo_of_the_user(hub, folder):
    push_folder(folder, "pruned")
    assert_holds(hub, folder, "alice/pruned")


def test_a_member_pushes_to_the_organisation(hub, folder):
    push_folder(folder, "atelier/pruned")
    assert_holds(hub, folder, "atelier/pruned")
    assert 'model="atelier/pruned"' in hub.files("atelier/pruned")[CARD_NAME].decode()


# again


@pytest.mark.parametrize("revision", [None, "small"])
def test_a_second_push_without_changes_makes_no_commit(hub, folder, revision):
    push_folder(folder, REPO, revision=revision)
    before = hub.messages(REPO, revision or "main")
    push_folder(folder, REPO, revision=revision)
    assert hub.messages(REPO, revision or "main") == before
    assert len(before) == 1


@pytest.mark.parametrize("revision", [None, "small"])
def test_a_card_written_by_the_user_is_left_alone(hub, folder, revision):
    hub.add(REPO, {CARD_NAME: b"---\nlicense: mit\n---\n# Mine\n"})
    push_folder(folder, REPO, revision=revision)
    assert hub.files(REPO, revision or "main")[CARD_NAME] == b"---\nlicense: mit\n---\n# Mine\n"
    assert_holds(hub, folder, revision=revision or "main")


def test_a_card_that_was_generated_is_written_over(hub, folder):
    report = Report.load(folder)
    hub.add(REPO, {CARD_NAME: render_card(replace(report, seed=report.seed + 1), REPO).encode()})
    push_folder(folder, REPO)
    assert hub.files(REPO)[CARD_NAME].decode() == render_card(report, REPO)


def test_a_card_that_was_edited_on_the_hub_stays(hub, folder):
    edited = render_card(Report.load(folder), REPO).encode() + b"Beware of dogs.\n"
    hub.add(REPO, {CARD_NAME: edited})
    push_folder(folder, REPO)
    assert hub.files(REPO)[CARD_NAME] == edited


def test_a_card_in_the_folder_that_was_written_by_the_user_goes_along(hub, folder):
    (folder / CARD_NAME).write_text("# Mine")
    push_folder(folder, REPO)
    assert hub.files(REPO)[CARD_NAME] == b"# Mine"


def test_a_card_that_cannot_be_read_as_text_is_the_users_own(hub, folder):
    hub.add(REPO, {CARD_NAME: b"\xff\xfe\x00"})
    push_folder(folder, REPO)
    assert hub.files(REPO)[CARD_NAME] == b"\xff\xfe\x00"


# from a model and from a trainer


def test_a_model_pushes_itself(hub, folder):
    model = UPDPForImageClassification.from_pretrained(folder)
    model.push_to_hub(REPO)
    assert len(hub.messages(REPO)) == 1
    assert torch.equal(logits(load()), logits(model))
    model.push_to_hub(REPO)
    assert len(hub.messages(REPO)) == 1


def test_a_model_pushes_itself_to_a_private_branch(hub, folder):
    model = UPDPForImageClassification.from_pretrained(folder)
    model.push_to_hub(REPO, private=True, revision="small", commit_message="P2")
    assert hub.repos[REPO].private
    assert hub.files(REPO) == {}
    assert hub.messages(REPO, "small") == ["P2"]


def test_a_model_that_pushes_itself_leaves_the_users_card_alone(hub, folder):
    hub.add(REPO, {CARD_NAME: b"# Mine"})
    UPDPForImageClassification.from_pretrained(folder).push_to_hub(REPO)
    assert hub.files(REPO)[CARD_NAME] == b"# Mine"


def test_a_trainer_pushes_its_merged_model_in_one_commit(hub, trained):
    run, folder = trained()
    run.push_to_hub()
    assert len(hub.messages(REPO)) == 1
    saved = UPDPForImageClassification.from_pretrained(folder)
    assert torch.equal(logits(load()), logits(saved))
    assert {"preprocessor_config.json", "updp_report.json", CARD_NAME} <= set(hub.files(REPO))


def test_nothing_private_and_no_code_in_disguise_is_pushed(hub, folder, trained):
    run, output = trained()
    scatter(folder)
    push_folder(folder, REPO)
    run.push_to_hub(revision="trainer")
    UPDPForImageClassification.from_pretrained(folder).push_to_hub(REPO, revision="model")
    secrets = ["hf_alice", *map(str, (folder, output, output.parent, Path.home(), Path.cwd(), sys.prefix))]
    for revision in ("main", "trainer", "model"):
        for name, content in hub.files(REPO, revision).items():
            assert [secret for secret in secrets if secret.encode() in content] == [], name
            assert not content.startswith((b"PK", b"\x80")), name
            assert Path(name).suffix in {".json", ".safetensors", ".md", ".png", ".py", ".onnx"}


# for anyone


def test_the_configuration_names_no_machine(hub, folder):
    push_folder(folder, REPO)
    config = json.loads(hub.files(REPO)["config.json"])
    assert "_name_or_path" not in config
    assert "_name_or_path" not in config["base_config"]
