import copy
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from rings import slow_but
from tiny_models import pruned_once
from tiny_training import (
    STEPS,
    RandomImages,
    assert_equal,
    gate_,
    last_two,
    logits,
    resnet,
    sites_of,
    timm_vit,
    trainer,
    vit,
    weights,
)

from updp_hf import Form, Plan, calibrate_, merge
from updp_hf.core.gates.gate import gates
from updp_hf.errors import PlanError
from updp_hf.hub.folder import is_training_checkpoint
from updp_hf.surgery.gate import plan_of
from updp_hf.training import checkpoints
from updp_hf.training.checkpoints import (
    AVERAGE_NAME,
    gated_model_in,
    last_checkpoint,
    save_checkpoint,
    whole_or_none,
)


@cache
def calibrated(build):
    model = build()
    gate_(model, last_two(build))
    calibrate_(model, [RandomImages().images])
    return model.eval()


def gated(build, lam):
    """Return a model whose gates stand at λ, each a bit further than the one before."""
    model = copy.deepcopy(calibrated(build))
    for index, (_, gate) in enumerate(gates(model)):
        gate.set_lambda_(min(lam + 0.01 * index, 1.0))
    return model


@cache
def pruned(form=Form.MERGE):
    return pruned_once(vit(), form)


@pytest.mark.parametrize("build", slow_but([vit, timm_vit, resnet], resnet))
@pytest.mark.parametrize("lam", [0.25, 1.0])
def test_a_gated_model_is_built_as_it_was_saved(build, lam, tmp_path):
    model = gated(build, lam)
    save_checkpoint(model, tmp_path)
    found = gated_model_in(tmp_path)
    assert_equal(weights(found), weights(model))
    assert [(path, float(gate.lam)) for path, gate in gates(found)] == [
        (path, float(gate.lam)) for path, gate in gates(model)
    ]
    assert plan_of(found) == plan_of(model)
    assert not found.training
    torch.testing.assert_close(logits(found), logits(model), rtol=0.0, atol=0.0)


def test_the_labels_are_those_of_the_checkpoint(tmp_path):
    model = gated(vit, 1.0)
    model.config.id2label = {index: f"class {index}" for index in range(4)}
    model.config.label2id = {name: index for index, name in model.config.id2label.items()}
    save_checkpoint(model, tmp_path)
    assert merge(gated_model_in(tmp_path)).config.id2label == model.config.id2label


@pytest.mark.parametrize("build", [vit, pruned])
def test_what_is_no_training_checkpoint_is_not_taken_for_one(build, tmp_path):
    build().save_pretrained(tmp_path)
    assert not is_training_checkpoint(tmp_path)
    with pytest.raises(PlanError, match="is no checkpoint of a pruning run"):
        gated_model_in(tmp_path)


def test_a_training_checkpoint_is_known_by_its_configuration(tmp_path):
    assert not is_training_checkpoint(tmp_path)
    assert not is_training_checkpoint(tmp_path / "nowhere")
    save_checkpoint(gated(vit, 0.5), tmp_path)
    assert is_training_checkpoint(tmp_path)
    assert is_training_checkpoint(str(tmp_path))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    save_checkpoint(gated(vit, 1.0), tmp_path)
    vit().save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match="does not fit the model"):
        gated_model_in(tmp_path)


def test_a_checkpoint_of_a_model_that_was_pruned_before_can_be_built(tmp_path):
    model = copy.deepcopy(pruned())
    gate_(model, Plan(sites_of(model, "merge")[:1]))
    save_checkpoint(model, tmp_path)
    torch.testing.assert_close(logits(gated_model_in(tmp_path)), logits(model), rtol=0.0, atol=0.0)


# which one to go on from


def finished(folder: Path, *steps: int) -> Path:
    for step in steps:
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").touch()
        (checkpoint / "trainer_state.json").write_text("{}")
    return folder


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(checkpoints.logger, "warning_once", said.append)
    return said


def test_the_newest_checkpoint_is_found(tmp_path, warnings):
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "nowhere") is None
    finished(tmp_path, 9, 10, 2)
    finished(tmp_path / "checkpoint-x", 11)
    (tmp_path / "checkpoint-12").touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert not warnings


def without_state(checkpoint: Path) -> None:
    (checkpoint / "trainer_state.json").unlink()


def with_half_a_state(checkpoint: Path) -> None:
    (checkpoint / "trainer_state.json").write_text('{"epoch": 1.')


def without_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()


@pytest.mark.parametrize("spoil", [without_state, with_half_a_state, without_weights])
def test_a_half_written_checkpoint_is_passed_over(spoil, tmp_path, warnings):
    spoil(finished(tmp_path, 2, 4) / "checkpoint-4")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert [text for text in warnings if "checkpoint-4 is not complete" in text]
    spoil(tmp_path / "checkpoint-2")
    assert last_checkpoint(tmp_path) is None


def test_a_checkpoint_that_is_written_again_counts_when_it_is_whole(tmp_path, warnings):
    checkpoint = finished(tmp_path, 2) / "checkpoint-2"
    with whole_or_none(checkpoint, is_writer=True):
        assert last_checkpoint(tmp_path) is None
        (checkpoint / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == str(checkpoint)


@pytest.mark.parametrize("name", slow_but(["config.json", "optimizer.pt"], "optimizer.pt"))
def test_a_full_disk_ends_the_run_with_a_sentence_and_leaves_the_checkpoint_before(name, tmp_path):
    """/dev/full is a file on a disk that has no room left."""
    full = tmp_path / "checkpoint-4"
    full.mkdir()
    (full / name).symlink_to("/dev/full")
    run = trainer(tmp_path, save_strategy="steps", save_steps=2)
    with pytest.raises(OSError, match=r"checkpoint-4 could not be written .*GiB are free.* goes on after checkpoint-2"):
        run.train()
    assert not full.exists()
    again = trainer(tmp_path, save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=True)
    straight = trainer(tmp_path / "straight")
    straight.train()
    assert_equal(weights(again.model), weights(straight.model))


def test_without_an_earlier_checkpoint_the_run_begins_anew(tmp_path):
    with pytest.raises(OSError, match="which begins anew"), whole_or_none(tmp_path / "checkpoint-2", is_writer=True):
        raise OSError("no space left")


def test_processes_that_lose_each_other_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="closed by peer"), whole_or_none(tmp_path / "checkpoint-2", is_writer=True):
        raise RuntimeError("Connection closed by peer")


def test_what_fails_after_a_checkpoint_is_complete_takes_it_not_away(tmp_path):
    checkpoint = tmp_path / "checkpoint-2"

    def write_and_fail():
        with whole_or_none(checkpoint, is_writer=True):
            finished(tmp_path, 2)
            raise OSError("an old one")

    with pytest.raises(OSError, match=r"^an old one$"):
        write_and_fail()
    assert last_checkpoint(tmp_path) == str(checkpoint)


def test_a_process_that_writes_nothing_takes_nothing_away(tmp_path):
    checkpoint = finished(tmp_path, 2) / "checkpoint-2"
    with pytest.raises(OSError, match=r"^told as it is$"), whole_or_none(checkpoint, is_writer=False):
        raise OSError("told as it is")
    assert last_checkpoint(tmp_path) == str(checkpoint)


@pytest.mark.parametrize("spoil", slow_but([without_state, without_weights], without_state))
def test_a_run_goes_on_from_the_checkpoint_before_a_half_written_one(spoil, tmp_path, warnings):
    options = {"save_strategy": "steps", "save_steps": 3}
    run = trainer(tmp_path, **options)
    run.train()
    spoil(tmp_path / "checkpoint-8")
    again = trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert any("checkpoint-8 is not complete" in text for text in warnings)
    assert_equal(weights(again.model), weights(run.model))
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")


@pytest.mark.parametrize(
    "options", slow_but([{}, {"ema_decay": 0.5}, {"load_best_model_at_end": True}], {"ema_decay": 0.5}), ids=str
)
def test_a_run_that_had_finished_is_not_trained_any_further(options, tmp_path):
    """The training ends within an epoch, where the loop of the Trainer would take one more step."""
    options = {**options, "train_dataset": RandomImages(count=20), "save_strategy": "steps", "save_steps": 2}
    options |= {"eval_strategy": "steps", "eval_steps": 2}
    run = trainer(tmp_path, **options)
    run.train()
    again = trainer(tmp_path, vit(seed=1), **options)
    output = again.train(resume_from_checkpoint=True)
    assert output.global_step == again.state.global_step == STEPS
    assert_equal(weights(again.model), weights(run.model))
    assert last_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{STEPS}")
    again.save_model(str(tmp_path / "merged"))
    longer = trainer(tmp_path, **options, max_steps=STEPS + 2)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == STEPS + 2


def test_the_averaged_weights_are_those_that_are_merged(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=8, ema_decay=0.5)
    run.train()
    assert (tmp_path / "checkpoint-8" / AVERAGE_NAME).is_file()
    assert_equal(weights(gated_model_in(tmp_path / "checkpoint-8")), weights(run.model))
