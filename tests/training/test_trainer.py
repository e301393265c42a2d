import copy
import json
import math
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F  # noqa: N812
import transformers.trainer
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from huggingface_hub import ModelCard
from rings import slow_but
from tiny_training import (
    STEPS,
    Lambdas,
    RandomImages,
    arguments,
    assert_equal,
    deit,
    gate_,
    last_two,
    logits,
    losses,
    mobilenet,
    resnet,
    sites_of,
    timm_vit,
    trainer,
    vit,
    weights,
)
from torch._dynamo.utils import counters
from torch.utils.data import IterableDataset
from transformers import AutoModelForImageClassification, TrainerCallback, ViTForImageClassification, ViTImageProcessor

import updp_hf.training.publishing
import updp_hf.training.run_record
from updp_hf import (
    Plan,
    Report,
    UPDPForImageClassification,
    UPDPTrainer,
    calibrate_,
    close_,
    compute_accuracy,
    merge,
    ramp,
)
from updp_hf.core.cost import count_parameters
from updp_hf.core.gates.gate import gates
from updp_hf.errors import MergeError, PlanError
from updp_hf.reporting.report import HeldOutSet
from updp_hf.surgery.gate import plan_of
from updp_hf.surgery.model_io import example_inputs_of, logits_of
from updp_hf.training.losses import label_loss

SAVED = {
    *("config.json", "model.safetensors", "updp_report.json"),
    *(f"{name}_updp.py" for name in ("bounds", "checks", "configuration", "layout", "modeling", "modules", "weights")),
    *("README.md", "before_after.png", "blocks.png", "schedule.png"),
}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# the straight line


@pytest.mark.parametrize("build", slow_but([vit, deit, timm_vit, resnet, mobilenet], vit, resnet))
def test_train_ends_closed_and_saves_the_merged_model(tmp_path, build):
    run = trainer(tmp_path, build())
    run.train()
    assert plan_of(run.model).blocks == [site.block for site in sites_of(build(), "merge") if site.saves_compute][-2:]
    assert {float(gate.lam) for _, gate in gates(run.model)} == {1.0}

    run.save_model()
    assert names(tmp_path) == SAVED
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert isinstance(loaded, UPDPForImageClassification)
    torch.testing.assert_close(logits(loaded), logits(run.merge()), rtol=0.0, atol=0.0)
    torch.testing.assert_close(logits(loaded), logits(run.model), rtol=0.0, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    slow_but(
        [
            {"selector": "sensitivity"},
            {"selector": "uniform"},
            {"form": "merge-keep-norm", "start": "fit"},
            {"form": "branch-fit"},
            {"form": "attention-drop"},
            {"end_activation": "relu"},
            {"ramp": "cosine", "ramp_start": 0.25, "ramp_end": 0.75},
            {"ramp": "constant"},
            {"ramp_end": 0.0},
        ],
        {"end_activation": "relu"},
        {"form": "attention-drop"},
    ),
    ids=str,
)
def test_what_the_arguments_ask_for_is_trained_and_merged(tmp_path, changes):
    run = trainer(tmp_path, **changes)
    run.train()
    run.save_model()
    assert len(plan_of(run.model).sites) == 2
    assert {site.form for site in plan_of(run.model).sites} == {changes.get("form", "merge")}
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(run.model), rtol=0.0, atol=1e-3)


def test_dropped_blocks_save_as_the_stock_class(tmp_path):
    run = trainer(tmp_path, form="block-drop")
    run.train()
    run.save_model()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is ViTForImageClassification
    assert loaded.config.num_hidden_layers == 1
    torch.testing.assert_close(logits(loaded), logits(run.model), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("as_file", slow_but([False, True], True))
def test_a_given_plan_is_followed(tmp_path, as_file):
    plan = Plan(sites_of(vit(), "merge")[:1])
    plan.save(tmp_path / "plan.json")
    run = trainer(tmp_path / "run", plan=str(tmp_path / "plan.json") if as_file else plan)
    run.train()
    assert plan_of(run.model).digest() == plan.digest()


def test_a_merged_model_can_be_pruned_again(tmp_path):
    first = trainer(tmp_path / "first", num_pruned_blocks=1)
    first.train()
    first.save_model()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "first")
    second = trainer(tmp_path / "second", loaded, num_pruned_blocks=1)
    second.train()
    second.save_model()
    twice = AutoModelForImageClassification.from_pretrained(tmp_path / "second")
    assert twice.num_parameters() < loaded.num_parameters()
    torch.testing.assert_close(logits(twice), logits(second.model), rtol=0.0, atol=1e-4)


def test_training_an_epoch_more_keeps_the_plan(tmp_path):
    run = trainer(tmp_path)
    run.train()
    plan = plan_of(run.model)
    run.train()
    assert plan_of(run.model) is plan


def test_the_processor_is_saved_with_the_model(tmp_path):
    run = trainer(tmp_path, processing_class=ViTImageProcessor(size={"height": 16, "width": 16}))
    run.train()
    run.save_model()
    assert names(tmp_path) == {*SAVED, "preprocessor_config.json"}


class Augmented(RandomImages):
    """Images that are changed by draws from each of the global generators."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return {**item, "pixel_values": item["pixel_values"] + random.random() + np.random.rand() + torch.rand(())}


def test_the_calibration_images_are_chosen_without_touching_the_global_generators(tmp_path):
    def states():
        return [random.getstate(), *np.random.get_state()[1], *torch.get_rng_state().tolist()]

    run = trainer(tmp_path, train_dataset=Augmented())
    before = states()
    batches = run.calibration_batches()
    assert states() == before
    assert sum(len(batch["pixel_values"]) for batch in batches) == run.args.calibration_size
    random.random(), np.random.rand(), torch.rand(())
    other = trainer(tmp_path, train_dataset=Augmented()).calibration_batches()
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(batches, other, strict=True))


def test_a_dataset_of_datasets_with_columns_to_spare_is_calibrated_on(tmp_path):
    images = RandomImages()
    columns = {"pixel_values": images.images.tolist(), "labels": images.labels.tolist(), "name": ["x"] * len(images)}
    dataset = datasets.Dataset.from_dict(columns).with_format("torch")
    run = trainer(tmp_path, train_dataset=dataset)
    run.train()
    assert set(run.calibration_batches()[0]) == {"pixel_values", "labels"}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(RandomImages())


@pytest.mark.parametrize("build", [Stream, lambda: None])
def test_calibration_needs_a_dataset_that_can_be_sampled(tmp_path, build):
    with pytest.raises(ValueError, match="calibration reads some images beforehand: pass a map-style dataset or a"):
        trainer(tmp_path, train_dataset=build()).train()


@pytest.mark.parametrize("selector", ["last", "supernet"])
def test_a_stream_of_datasets_is_calibrated_and_trained_on(tmp_path, selector):
    stream = datasets.IterableDataset.from_generator(lambda: iter(RandomImages()))
    run = trainer(tmp_path, train_dataset=stream, selector=selector)
    run.train()
    images = torch.cat([batch["pixel_values"] for batch in run.calibration_batches()])
    assert torch.equal(images, RandomImages().images[:16])
    assert run.state.global_step == STEPS
    assert all(float(gate.lam) == 1.0 for _, gate in gates(run.model))


def test_a_stream_is_trained_on_by_shards_and_evaluated_as_accelerate_does(tmp_path):
    stream = datasets.IterableDataset.from_generator(lambda: iter(RandomImages()))
    run = trainer(tmp_path, train_dataset=stream, eval_dataset=stream)
    for _ in range(2):
        assert isinstance(run.get_train_dataloader(), DataLoaderShard)
        assert isinstance(run.get_eval_dataloader(), DataLoaderDispatcher)
        assert isinstance(run.get_test_dataloader(stream), DataLoaderDispatcher)
    run.accelerator.dataloader_config.dispatch_batches = True  # as if asked for
    assert isinstance(run.get_train_dataloader(), DataLoaderDispatcher)


def test_only_whole_steps_are_taken_from_a_stream(tmp_path):
    stream = datasets.IterableDataset.from_generator(lambda: iter(RandomImages()))
    batches = [{"pixel_values": torch.zeros(1), "labels": torch.zeros(1)} for _ in range(5)]
    for dataset, left in ((stream, []), (RandomImages(), batches[4:])):
        run, epoch = trainer(tmp_path, train_dataset=dataset), iter(batches)
        found = [run.get_batch_samples(epoch, 2, torch.device("cpu"))[0] for _ in range(4)]
        assert [len(group) for group in found] == [2, 2, len(left), 0]


def test_a_stream_trains_a_model_that_was_calibrated_by_hand(tmp_path):
    model = vit()
    gate_(model, Plan(sites_of(model, "merge")[-2:]))
    calibrate_(model, [RandomImages().images])
    run = trainer(tmp_path, model, train_dataset=Stream())
    run.train()
    run.save_model()
    assert names(tmp_path) == SAVED
    assert Report.load(tmp_path).before.parameters == vit().num_parameters()


# saving


def test_a_half_open_gate_is_not_saved_and_the_folder_stays_as_it_was(tmp_path):
    run = trainer(tmp_path)
    run.train()
    run.save_model()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    next(gate for _, gate in gates(run.model)).set_lambda_(0.5)
    with pytest.raises(MergeError, match="not closed"):
        run.save_model()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_failure_in_the_middle_of_writing_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    run = trainer(tmp_path)
    run.train()
    run.save_model()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(Report, "save", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    run.model.classifier.bias.data += 1
    with pytest.raises(OSError, match="disk full"):
        run.save_model()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_checkpoint_is_not_overwritten(tmp_path):
    vit().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = ViTForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="where the checkpoint itself lies: choose another folder"):
        trainer(tmp_path, model)
    run = trainer(tmp_path / "run", model)
    run.train()
    with pytest.raises(ValueError, match="where the checkpoint itself lies: choose another folder"):
        run.save_model(str(tmp_path))
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_model_that_came_from_no_folder_is_saved_anywhere(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    trainer(Path("."))


class _Hub:
    """What the Hub is asked for. The tests in `hub/` push to one that answers."""

    def __init__(self):
        self.pushes = []

    def create_repo(self, name, **kwargs):
        return type("RepoUrl", (), {"repo_id": name})()

    def push(self, folder, repo_id, **options):
        self.pushes.append((folder, repo_id, options))
        return "done"


@pytest.fixture
def hub(monkeypatch):
    hub = _Hub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    monkeypatch.setattr(updp_hf.training.publishing, "push_folder", hub.push)
    return hub


def test_the_arguments_say_how_is_pushed(tmp_path, hub):
    run = trainer(
        tmp_path,
        push_to_hub=True,
        hub_strategy="end",
        hub_model_id="me/pruned",
        hub_token="secret",
        hub_private_repo=True,
        save_strategy="steps",
        save_steps=4,
    )
    run.train()
    assert hub.pushes == []
    assert run.push_to_hub(commit_message="Pruned", revision="small") == "done"
    options = {"private": True, "token": "secret", "revision": "small", "commit_message": "Pruned"}
    assert hub.pushes.pop() == (tmp_path, "me/pruned", options)
    assert names(tmp_path) > SAVED


def test_what_was_saved_is_pushed_as_it_lies(tmp_path, hub):
    run = trainer(tmp_path, hub_model_id="me/pruned")
    run.train()
    run.save_model()
    report = replace(Report.load(tmp_path), metrics_without_training={"accuracy": 0.5})
    report.save(tmp_path)
    run.push_to_hub()
    assert Report.load(tmp_path) == report
    run.push_to_hub(license="mit", dataset="noise", dataset_tags="me/noise", tags="tiny", finetuned_from="you/vit")
    changed = Report.load(tmp_path)
    assert changed.metrics_without_training == {"accuracy": 0.5}
    head = ModelCard.load(tmp_path / "README.md").data
    assert (head.license, head.datasets, head.base_model) == ("mit", ["me/noise"], "you/vit")
    assert "tiny" in head.tags
    assert [push[1] for push in hub.pushes] == ["me/pruned"] * 2


def test_nothing_is_pushed_before_training(tmp_path, hub):
    run = trainer(tmp_path, push_to_hub=True, hub_model_id="me/pruned")
    run.save_model()
    with pytest.raises(ValueError, match="Nothing is pruned yet"):
        run.push_to_hub()
    assert hub.pushes == []


def test_a_model_that_was_trained_again_is_saved_again(tmp_path, hub):
    run = trainer(tmp_path, hub_model_id="me/pruned")
    run.train()
    run.push_to_hub()
    before = (tmp_path / "model.safetensors").read_bytes()
    run.train()
    run.push_to_hub()
    assert (tmp_path / "model.safetensors").read_bytes() != before


def test_the_report_is_of_the_held_out_images_and_of_the_weights_that_are_saved(tmp_path):
    run = trainer(tmp_path, eval_strategy="no")
    run.train()
    run.state.log_history.append({"eval_loss": 1.0, "step": STEPS - 1})  # λ was 1 there, too
    assert run.report(run.merge()).metrics_after == {}
    expected = run.evaluate()["eval_loss"]
    run.evaluate(RandomImages(4, seed=9))
    assert run.report(run.merge()).metrics_after["loss"] == expected


def test_a_report_is_made_without_a_trace_and_written_once_with_what_else_is_known(tmp_path):
    run = trainer(tmp_path)
    run.train()
    before = copy.deepcopy(run.state)
    report = run.report(batch_sizes=())
    assert run.report(batch_sizes=()) == report
    assert (run.state, list(tmp_path.iterdir())) == (before, [])
    report = replace(report, metrics_without_training={"accuracy": 0.5}, evaluated_on=HeldOutSet("noise"))
    run.save_model(report=report)
    saved = Report.load(tmp_path)
    assert replace(saved, weights=None) == report.as_saved()
    assert "accuracy 50.00 %" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_the_plan_names_the_checkpoint_that_was_pruned_and_no_other(tmp_path):
    plan = replace(last_two(vit), base_model="somebody/vit")
    run = trainer(tmp_path, plan=plan)
    run.train()
    report = run.report(run.merge())
    assert report.plan["base_model"] == ""


def test_a_metric_that_is_no_number_costs_neither_report_nor_card(tmp_path):
    def metrics(_):
        return {"accuracy": 0.5, "confusion": [[1, 2], [3, 4]], "note": None}

    run = trainer(tmp_path, compute_metrics=metrics, eval_strategy="steps", eval_steps=4)
    run.train()
    run.save_model()
    assert Report.load(tmp_path).metrics_after["confusion"] == [[1, 2], [3, 4]]
    assert "50.00 %" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_pushing_need_not_be_waited_for(tmp_path, hub):
    run = trainer(tmp_path, hub_model_id="me/pruned")
    run.train()
    assert run.push_to_hub(blocking=False).result() == "done"


def test_an_unfinished_model_is_not_pushed(tmp_path, hub):
    run = trainer(tmp_path, push_to_hub=True, hub_strategy="end", hub_model_id="me/pruned")
    run.train()
    next(gate for _, gate in gates(run.model)).set_lambda_(0.0)
    with pytest.raises(MergeError, match="not closed"):
        run.push_to_hub()
    assert hub.pushes == []


# stopping and going on

RESUMED = {
    "vit": (vit, {}),
    "deit with dropout": (deit, {}),
    "timm": (timm_vit, {}),
    "padding that is filled, BatchNorms": (mobilenet, {}),
    "cropped kernels, end activation, fit": (resnet, {"start": "fit", "end_activation": "relu"}),
    "fit, end activation, accumulation, teacher": (
        vit,
        {
            "start": "fit",
            "end_activation": "gelu",
            "distillation": "soft",
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
        },
    ),
}


@pytest.mark.parametrize("steps", [(2, 5), pytest.param((1, 3, 4), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("case", slow_but(RESUMED, "fit, end activation, accumulation, teacher"))
def test_a_resumed_run_ends_where_the_straight_run_ends(tmp_path, case, steps):
    build, changes = RESUMED[case]
    # Four steps are an epoch and λ = 1 from the fourth on, so checkpoints lie before, at and after both.
    options = {"train_dataset": RandomImages(count=16), "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    options |= changes
    teacher = {"teacher": vit(seed=7)} if "distillation" in changes else {}
    straight = trainer(tmp_path / "straight", build(), **options, **teacher)
    straight.train()
    expected = weights(straight.model)
    assert [entry["lambda"] for entry in straight.state.log_history[:-1]] == pytest.approx([0, 1 / 3, 2 / 3, 1, 1, 1])
    for step in steps:
        # Nothing of a checkpoint's weights may come from the model that the resumed run starts with.
        resumed = trainer(tmp_path / "resumed", build(seed=step), **options, **teacher)
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{step}"))
        assert_equal(weights(resumed.model), expected)
        found, wanted = (run.state.log_history[-2] for run in (resumed, straight))
        assert found == wanted


def test_evaluating_does_not_change_what_training_draws(tmp_path):
    """A run is resumed at the end of an epoch without the evaluation that follows there."""
    found = []
    for when in ("no", "steps"):
        run = trainer(tmp_path, vit(dropout=0.3), eval_strategy=when, eval_steps=1)
        run.train()
        found.append(weights(run.model))
    assert_equal(*found)


def test_a_run_that_goes_on_with_other_options_says_so(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(updp_hf.training.run_record.logger, "warning", said.append)
    options = {"save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path, **options).train()
    trainer(tmp_path, **options).train(resume_from_checkpoint=True)
    assert not said
    trainer(tmp_path, **options, learning_rate=0.5, weight_decay=0.1).train(resume_from_checkpoint=True)
    (text,) = said
    assert "learning_rate 0.5 (was 0.01), weight_decay 0.1 (was by default)" in text


@pytest.mark.parametrize("way", slow_but([True, Path], True))
def test_ways_to_name_the_checkpoint(tmp_path, way):
    straight = trainer(tmp_path, save_strategy="steps", save_steps=3)
    straight.train()
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")
    resumed = trainer(tmp_path, vit(seed=1))
    resumed.train(resume_from_checkpoint=True if way is True else tmp_path / "checkpoint-6")
    assert_equal(weights(resumed.model), weights(straight.model))


def test_there_is_nothing_to_resume_from(tmp_path):
    with pytest.raises(ValueError, match=r"There is no checkpoint in .* to resume from"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"There is no checkpoint in .* to resume from"):
        trainer(tmp_path / "new").train(resume_from_checkpoint=True)


@pytest.fixture
def checkpoint(tmp_path):
    run = trainer(tmp_path / "run", save_strategy="steps", save_steps=STEPS)
    run.train()
    run.save_model()
    return tmp_path / "run" / f"checkpoint-{STEPS}"


def test_another_structure_is_refused(tmp_path, checkpoint):
    with pytest.raises(PlanError, match="was the plan made for another checkpoint"):
        trainer(tmp_path, vit(num_hidden_layers=2)).train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match=r"(?s)does not fit the model: .*classifier.*Resume with the model"):
        trainer(tmp_path, vit(num_labels=3)).train(resume_from_checkpoint=str(checkpoint))


def test_another_plan_is_refused(tmp_path, checkpoint):
    gated = vit()
    gate_(gated, Plan(sites_of(gated, "merge")[:1]))
    with pytest.raises(PlanError, match="already gated with another plan"):
        trainer(tmp_path, gated).train(resume_from_checkpoint=str(checkpoint))
    for changes in (
        {"plan": Plan(sites_of(vit(), "merge")[:1])},
        {"num_pruned_blocks": 1},
        {"form": "merge-keep-norm"},
        {"start": "fit"},
        {"end_activation": "relu"},
    ):
        with pytest.raises(PlanError, match="prunes otherwise than the arguments ask"):
            trainer(tmp_path, **changes).train(resume_from_checkpoint=str(checkpoint))


def test_a_folder_that_is_no_training_checkpoint_is_refused(tmp_path, checkpoint):
    with pytest.raises(PlanError, match="is no checkpoint of a pruning run"):
        trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint.parent))
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors: resume a checkpoint that is complete"):
        trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("damage", [lambda held: held.popitem(), lambda held: held.update(more=torch.zeros(1))])
def test_a_checkpoint_with_a_tensor_too_few_or_too_many_is_refused(tmp_path, checkpoint, damage):
    held = safetensors.torch.load_file(checkpoint / "model.safetensors")
    damage(held)
    safetensors.torch.save_file(held, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)does not fit the model: .*Resume with the model"):
        trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))


def test_a_training_checkpoint_is_not_taken_for_a_pruned_model(checkpoint):
    with pytest.raises(ValueError, match="weights of an unfinished pruning run, not a pruned model"):
        AutoModelForImageClassification.from_pretrained(checkpoint)


def test_a_checkpoint_holds_the_plan_and_every_gate(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["is_gated"]
    assert Plan.from_dict(config["plan"]).blocks == ["vit.layers.1", "vit.layers.2"]
    saved = safetensors.torch.load_file(checkpoint / "model.safetensors")
    assert {float(tensor) for name, tensor in saved.items() if name.endswith(".lam")} == {1.0}


# the best model

EARLY_BEST = [0.9, 0.8, 0.99, 0.95, 0.2, 0.5, 0.3, 0.1]
"""By evaluation: the first four are made with λ < 1."""


class Scripted:
    """Metrics that the test decides."""

    def __init__(self, values):
        self.values = iter(values)

    def __call__(self, prediction) -> dict[str, float]:
        return {"accuracy": next(self.values)}


def best_of(folder: Path, values: list[float], model: Any = None, **changes: Any) -> UPDPTrainer:
    return trainer(
        folder,
        model,
        compute_metrics=Scripted(values),
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        plan=last_two(vit),
        metric_for_best_model="accuracy",
        **{"save_strategy": "steps", **changes},
    )


@pytest.mark.parametrize(
    "changes", slow_but([{}, {"save_total_limit": 1}, {"save_strategy": "best"}], {"save_total_limit": 1}), ids=str
)
def test_the_best_model_is_one_with_closed_gates(tmp_path, changes):
    run = best_of(tmp_path, EARLY_BEST, **changes)
    run.train()
    assert Path(run.state.best_model_checkpoint).name == "checkpoint-6"
    assert_equal(weights(run.model), safetensors.torch.load_file(tmp_path / "checkpoint-6" / "model.safetensors"))
    assert run.report(run.merge()).metrics_after["accuracy"] == 0.5


@pytest.mark.parametrize("step", slow_but([2, 4, 6], 4))
def test_the_best_model_of_a_resumed_run_is_the_same(tmp_path, step):
    best_of(tmp_path, EARLY_BEST).train()
    resumed = best_of(tmp_path, EARLY_BEST[step:], vit(seed=1))
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert Path(resumed.state.best_model_checkpoint).name == "checkpoint-6"
    assert_equal(weights(resumed.model), safetensors.torch.load_file(tmp_path / "checkpoint-6" / "model.safetensors"))


# λ


def test_lambda_is_logged_beside_the_loss(tmp_path):
    run = trainer(tmp_path)
    run.train()
    logged = [entry["lambda"] for entry in run.state.log_history if "loss" in entry]
    assert logged == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    assert all("lambda" not in entry for entry in run.state.log_history if "loss" not in entry)


@pytest.mark.slow
def test_a_compiled_model_is_compiled_anew_at_the_ends_of_the_ramp_alone(tmp_path):
    torch._dynamo.reset()
    counters.clear()
    options = {"torch_compile": True, "torch_compile_backend": "eager", "eval_strategy": "steps", "eval_steps": 2}
    ramp = {"ramp_start": 0.25, "ramp_end": 0.75}
    trainer(tmp_path, compute_loss_func=label_loss, **ramp, **options).train()
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]


def test_no_image_is_dropped_from_an_evaluation(tmp_path):
    images = RandomImages(10, seed=1)
    found = {}
    for drops in (False, True):
        options = {"dataloader_drop_last": drops, "per_device_eval_batch_size": 4}
        run = trainer(tmp_path / str(drops), eval_dataset=images, compute_metrics=compute_accuracy, **options)
        assert run.predict(images).predictions.shape == (10, 4)
        found[drops] = {name: value for name, value in run.evaluate().items() if name in ("eval_loss", "eval_accuracy")}
        assert run.args.dataloader_drop_last is drops
    assert found[True] == found[False]
    assert len(found[True]) == 2


def test_lambda_changes_neither_within_a_step_nor_while_evaluating(tmp_path):
    lambdas = Lambdas()
    run = trainer(
        tmp_path,
        callbacks=[lambdas],
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
    )
    run.train()
    schedule = ramp(end=0.5)
    assert {event for event, _, _ in lambdas.seen} == {"substep", "step", "prediction"}
    for event, step, value in lambdas.seen:
        assert value == schedule(max(step - 1, 0) / STEPS if event == "prediction" else step / STEPS), (event, step)


def test_a_ramp_that_does_not_end_before_training_does_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"λ is still 0.875 in the last of 8 steps"):
        trainer(tmp_path, ramp_end=1.0).train()


# accumulated, checkpointed, in half precision, compiled


WHOLE_BATCHES = pytest.param(timm_vit, 16, id="timm, whole batches", marks=pytest.mark.slow)


@pytest.mark.parametrize(("build", "count"), [pytest.param(vit, 22, id="last batch incomplete"), WHOLE_BATCHES])
@pytest.mark.parametrize("distillation", slow_but(["none", "soft", "hard"], "soft"))
def test_accumulating_equals_a_larger_batch(tmp_path, build, count, distillation):
    # Without BatchNorm, which sees the small batches, and without Adam, which blows rounding up.
    options = {
        "plan": last_two(build, "merge-keep-norm"),
        "optim": "sgd",
        "learning_rate": 0.05,
        "distillation": distillation,
    }
    options |= {"train_dataset": RandomImages(count), "teacher": build(seed=5), "max_steps": 6}
    whole = trainer(tmp_path, build(), per_device_train_batch_size=8, **options)
    whole.train()
    parts = trainer(tmp_path, build(), per_device_train_batch_size=4, gradient_accumulation_steps=2, **options)
    parts.train()
    assert_equal(weights(parts.model), weights(whole.model), tolerance=1e-6)
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-6)
    start = build().state_dict()
    moved = [
        float((tensor - start[name]).abs().max()) for name, tensor in weights(whole.model).items() if name in start
    ]
    assert max(moved) > 1e-2


@pytest.mark.parametrize("build", slow_but([vit, timm_vit], vit))
def test_activation_checkpointing_changes_no_loss(tmp_path, build):
    plan = last_two(build)
    runs = [trainer(tmp_path, build(), plan=plan, activation_checkpointing=flag) for flag in (False, True)]
    for run in runs:
        run.train()
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), abs=1e-6)
    plain, checkpointed = (dict(run.model.named_parameters()) for run in runs)
    assert_equal(checkpointed, plain, tolerance=1e-5)
    merged = runs[1].merge()
    torch.testing.assert_close(logits(merged), logits(runs[1].model), rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("build", slow_but([vit, timm_vit], vit))
def test_bf16(tmp_path, build):
    run = trainer(tmp_path, build(), bf16=True, distillation="soft")
    run.train()
    run.save_model()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(logits(loaded), logits(run.merge()), rtol=0.0, atol=0.0)
    # Training goes on in bf16 after the merge, which looked at a copy.
    assert not torch.equal(logits(loaded), logits(run.model))
    torch.testing.assert_close(logits(loaded), logits(run.model), rtol=0.0, atol=5e-2)


@pytest.mark.parametrize("build", slow_but([vit, resnet, mobilenet], resnet))
@pytest.mark.parametrize("averages_buffers", [True, False])
def test_an_average_of_the_weights_is_closed_and_merged(tmp_path, build, averages_buffers):
    run = trainer(tmp_path, build())
    run.train()
    average = torch.optim.swa_utils.AveragedModel(
        run.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=averages_buffers
    )
    for gate in (gate for _, gate in gates(average.module)):
        gate.set_lambda_(0.5)  # as after averaging over the ramp
    with pytest.raises(MergeError, match="not closed"):
        merge(average.module)
    close_(average.module)
    torch.testing.assert_close(logits(merge(average.module)), logits(average.module), rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("cost", ["macs", "latency"])
def test_the_report_tells_what_latencies_the_sites_were_chosen_by(tmp_path, cost, monkeypatch):
    monkeypatch.setattr("updp_hf.core.cost.forward_seconds", lambda model, batch: float(count_parameters(model)))
    run = trainer(tmp_path, resnet(), cost=cost, max_steps=2)
    run.train()
    run.save_model()
    table = Report.load(tmp_path).latencies
    if cost == "macs":
        assert table is None
    else:
        assert table.batch_size == 16
        kinds = [key for key in table.seconds if key.startswith("Conv2d(8, 8") and ";" not in key]
        assert kinds
        assert all(" at (16, 8, " in key and key.endswith("float32, cpu") for key in kinds)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.compile's own
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch.compile's own
def test_torch_compile(tmp_path):
    plain, compiled = (trainer(tmp_path, torch_compile=flag) for flag in (False, True))
    for run in (plain, compiled):
        run.train()
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-3)
    compiled.save_model()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(compiled.model), rtol=0.0, atol=1e-4)


# distillation


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_the_loss_is_shared_between_labels_and_teacher(tmp_path, kind):
    student, teacher = vit(), vit(seed=5)
    images, labels = RandomImages(4).images, RandomImages(4).labels
    first = trainer(
        tmp_path,
        student,
        train_dataset=RandomImages(4),
        teacher=teacher,
        plan=last_two(vit),
        distillation=kind,
        distillation_weight=0.3,
        temperature=3.0,
    )
    with torch.no_grad():
        own, others = student(pixel_values=images).logits, teacher(pixel_values=images).logits
    expected = 0.7 * F.cross_entropy(own, labels) + 0.3 * (
        F.cross_entropy(own, others.argmax(-1))
        if kind == "hard"
        else 9 * F.kl_div((own / 3).log_softmax(-1), (others / 3).softmax(-1), reduction="batchmean")
    )
    first.train()
    assert losses(first)[0] == pytest.approx(float(expected), abs=1e-5)


def test_the_checkpoint_is_its_own_teacher_and_stays_as_it_was(tmp_path):
    original = vit(dropout=0.3)
    before = weights(original)
    run = trainer(tmp_path, original, distillation="soft")
    run.train()
    assert_equal(weights(run._teacher), before)
    assert not any(module.training for module in run._teacher.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in run._teacher.parameters())


def test_weight_zero_ignores_the_teacher_and_weight_one_the_labels(tmp_path):
    plan = last_two(vit)
    plain = trainer(tmp_path, plan=plan)
    plain.train()
    without = trainer(tmp_path, plan=plan, distillation="soft", distillation_weight=0.0)
    without.train()
    assert_equal(weights(without.model), weights(plain.model), tolerance=1e-6)

    relabelled = RandomImages()
    relabelled.labels = (relabelled.labels + 1) % 4
    alone = {"plan": plan, "distillation": "soft", "distillation_weight": 1.0, "teacher": vit(seed=5)}
    runs = [trainer(tmp_path, train_dataset=dataset, **alone) for dataset in (RandomImages(), relabelled)]
    for run in runs:
        run.train()
    assert_equal(weights(runs[1].model), weights(runs[0].model))


def test_any_image_classifier_teaches(tmp_path):
    """A bare timm net takes its images under another name and returns a tensor."""
    wrapped = timm_vit(seed=5)
    runs = [trainer(tmp_path, distillation="soft", teacher=teacher) for teacher in (wrapped, wrapped.timm_model)]
    for run in runs:
        run.train()
    assert_equal(weights(runs[1].model), weights(runs[0].model))


def test_evaluation_does_not_ask_the_teacher(tmp_path):
    plain, distilled = trainer(tmp_path), trainer(tmp_path, distillation="soft", teacher=vit(seed=5))
    assert distilled.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"logits of shape \(4, 7\), the student \(4, 4\)"):
        trainer(tmp_path, distillation="hard", teacher=vit(num_labels=7)).train()


def test_a_teacher_with_gates_is_refused(tmp_path):
    teacher = vit()
    gate_(teacher, Plan(sites_of(teacher, "merge")[:1]))
    with pytest.raises(ValueError, match="The teacher has gates"):
        trainer(tmp_path, distillation="soft", teacher=teacher).train()


# the optimizer


class Optimized(TrainerCallback):
    """Keep the optimizer's groups as they are while training."""

    groups: list[dict[str, Any]]

    def on_train_begin(self, args, state, control, optimizer, **kwargs):
        self.groups = optimizer.param_groups


@pytest.mark.parametrize("build", slow_but([vit, timm_vit], vit))
def test_matrices_are_decayed_and_vectors_are_not_and_everything_trains(tmp_path, build):
    optimized = Optimized()
    run = trainer(tmp_path, build(), callbacks=[optimized], weight_decay=0.1, end_activation="relu", start="fit")
    run.train()
    decays = {id(p): group["weight_decay"] for group in optimized.groups for p in group["params"]}
    for name, parameter in run.model.named_parameters():
        assert decays[id(parameter)] == (0.1 if parameter.ndim >= 2 else 0.0), name


@pytest.mark.parametrize("changes", [{}, {"start": "fit"}, {"end_activation": "relu"}], ids=str)
def test_every_parameter_of_the_pruned_sides_moves(tmp_path, changes):
    before: dict[str, torch.Tensor] = {}

    class Remember(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            before.update(weights(model))

    run = trainer(tmp_path, callbacks=[Remember()], **changes)
    run.train()
    pruned = {name: parameter for name, parameter in run.model.named_parameters() if ".pruned." in name}
    assert pruned
    # A bias behind whose map a BatchNorm comes only moves by rounding, hence weights and biases of the norms alike.
    assert [name for name, parameter in pruned.items() if torch.equal(parameter, before[name])] == []


def test_an_optimizer_built_before_the_gates_is_refused(tmp_path):
    model = vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"optimizer .* does not hold the parameters of the gates"):
        trainer(tmp_path, model, optimizers=(optimizer, None)).train()


def test_an_optimizer_of_ones_own_for_a_gated_model_is_taken(tmp_path):
    model = vit()
    gate_(model, Plan(sites_of(model, "merge")[-2:]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer(tmp_path, model, optimizers=(optimizer, None)).train()


# refusals and numbers


@pytest.mark.parametrize("clipping", [1.0, 0.0])
def test_nan_ends_the_run(tmp_path, clipping):
    def broken(outputs, labels, num_items_in_batch=None):
        return outputs.logits.sum() * math.nan

    with pytest.raises(ValueError, match=r"The loss or its gradients are NaN at step 1 \(learning rate .*: lower the"):
        trainer(tmp_path, compute_loss_func=broken, max_grad_norm=clipping).train()


def test_other_arguments_and_data_parallel_are_refused(tmp_path, monkeypatch):
    stock = transformers.TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="`args` is TrainingArguments, expected UPDPTrainingArguments"):
        UPDPTrainer(model=vit(), args=stock)
    args = arguments(tmp_path)
    monkeypatch.setattr(type(args), "n_gpu", 2)
    with pytest.raises(ValueError, match=r"2 GPUs are visible to one process.*accelerate launch"):
        UPDPTrainer(model=vit(), args=args)


def test_more_blocks_than_there_are_is_refused(tmp_path):
    with pytest.raises(PlanError, match="The budget is 4 sites, but the model has 3 sites: ask for no more"):
        trainer(tmp_path, num_pruned_blocks=4).train()


def test_operations_are_those_of_forward_and_backward(tmp_path):
    run = trainer(tmp_path)
    tokens, width, hidden = 5, 16, 32
    layer = tokens * (4 * width**2 + 2 * width * hidden) + 2 * tokens**2 * width
    macs = (tokens - 1) * 3 * 64 * width + 3 * layer + width * 4
    assert run.floating_point_ops({"pixel_values": torch.zeros(4, 3, 16, 16)}) == 6 * 4 * macs


def test_the_report_states_what_was_logged(tmp_path):
    values = [0.25, *EARLY_BEST]
    run = trainer(
        tmp_path, compute_metrics=Scripted(values), eval_strategy="steps", eval_steps=1, eval_on_start=True, seed=3
    )
    run.train()
    run.save_model()
    report = Report.load(tmp_path)
    assert report.plan == plan_of(run.model).to_dict()
    assert report.metrics_before["accuracy"] == 0.25
    assert report.metrics_after["accuracy"] == EARLY_BEST[-1]
    assert set(report.metrics_after) == {"accuracy", "loss"}
    assert report.before.parameters == vit().num_parameters()
    assert report.after.parameters == run.merge().num_parameters() < report.before.parameters
    assert report.merge_error is not None
    assert report.merge_error < 1e-4
    assert report.seed == report.arguments["seed"] == 3


def test_the_trainer_can_be_used_after_saving(tmp_path):
    run = trainer(tmp_path)
    run.train()
    before = run.evaluate()["eval_loss"]
    run.save_model()
    assert run.evaluate()["eval_loss"] == before
    run.train()


def test_the_report_leaves_out_what_was_not_measured(tmp_path):
    run = trainer(tmp_path, compute_metrics=Scripted([0.25]), eval_on_start=True, ramp_end=0.0)
    run.train()
    report = run.report(run.merge())
    assert report.metrics_before == report.metrics_after == {}  # the evaluation was made before the first step


def test_the_checkpoint_given_computes_the_same_before_the_first_step(tmp_path):
    model = vit()
    expected = logits_of(model, example_inputs_of(model, 4)).detach()
    found = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            with torch.no_grad():
                found.append(logits_of(model.eval(), example_inputs_of(model, 4)))

    trainer(tmp_path, model, callbacks=[Look()]).train()
    torch.testing.assert_close(found[0], expected, rtol=0.0, atol=0.0)


def test_no_file_but_the_result_is_written_next_to_it(tmp_path):
    run = trainer(tmp_path / "run")
    run.train()
    run.save_model(str(tmp_path / "elsewhere"))
    assert names(tmp_path / "elsewhere") == SAVED
    assert not (tmp_path / "run").exists() or os.listdir(tmp_path / "run") == []
