"""From a budget to a plan within the trainer: selectors, the supernet, what is resumed, the front."""

import json

import pytest
import torch
from rings import slow_but
from tiny_training import (
    RandomImages,
    arguments,
    assert_equal,
    logits,
    mobilenet,
    resnet,
    sites_of,
    trainer,
    vit,
    weights,
)
from transformers import AutoModelForImageClassification, TrainerCallback

import updp_hf.selection.pareto
import updp_hf.training.supernet
from updp_hf import Plan, Report, UPDPTrainer
from updp_hf.core.cost import count_macs, count_parameters
from updp_hf.errors import PlanError
from updp_hf.selection.score_history import ScoreHistory
from updp_hf.surgery.gate import plan_of
from updp_hf.surgery.model_io import example_inputs_of
from updp_hf.training.supernet import SupernetTrainer

NO_BLOCKS = {"num_pruned_blocks": None}


class PlugPulledError(Exception):
    """What interrupts a run."""


SELECTORS = ["sensitivity", "greedy", "taylor", "uniform", "last", "random", "supernet"]


@pytest.mark.parametrize("selector", slow_but(SELECTORS, "greedy"))
def test_selecting_returns_the_plan_alone_and_training_follows_it(tmp_path, selector):
    model = resnet()
    before = weights(model)
    run = trainer(tmp_path, model, selector=selector)
    plan = run.select()
    assert len(plan.sites) == 2
    assert_equal(weights(run.model), before)
    assert run.select() is plan
    run.train()
    assert plan_of(run.model).digest() == plan.digest()


def test_selecting_returns_the_plan_given(tmp_path):
    plan = Plan(sites_of(vit(), "merge")[:1])
    assert trainer(tmp_path, plan=plan).select() == plan


SUPERNET_TAKES_LONG = pytest.param("supernet", marks=pytest.mark.slow)


@pytest.mark.parametrize("selector", ["last", SUPERNET_TAKES_LONG])
@pytest.mark.parametrize("name", ["macs", "parameters"])
@pytest.mark.parametrize("build", slow_but([vit, mobilenet], vit))
def test_budgets_of_cost_are_kept(tmp_path, selector, name, build):
    model = build()
    before, sites = cost(model, name), sites_of(model, "merge")
    useful = [s for site in sites if (s := site.saving.macs if name == "macs" else site.saving.parameters) > 0]
    left = 1 - 0.5 * sum(useful) / before
    run = trainer(tmp_path, model, selector=selector, max_steps=2, **NO_BLOCKS, **{f"target_{name}": left})
    run.train()
    assert cost(run.merge(), name) <= left * before
    assert len(run.plan.sites) < len(useful)


def test_what_is_put_behind_the_blocks_counts_for_the_budget(tmp_path):
    before = count_parameters(vit())
    run = trainer(tmp_path, target_parameters=0.84, end_activation="relu", max_steps=2, **NO_BLOCKS)
    run.train()
    assert count_parameters(run.merge()) <= 0.84 * before


def cost(model, name):
    return count_macs(model, example_inputs_of(model)) if name == "macs" else count_parameters(model)


def test_an_impossible_budget_tells_the_best_that_is_possible(tmp_path):
    message = r"The budget is 10% of the MACs, but closing all 3 sites that save any leaves \d+\.\d%: "
    with pytest.raises(PlanError, match=message):
        trainer(tmp_path, target_macs=0.1, **NO_BLOCKS).select()


@pytest.fixture
def seconds(monkeypatch):
    """Let a forward take a microsecond for each parameter."""
    monkeypatch.setattr("updp_hf.core.cost.forward_seconds", lambda model, batch: 1e-6 * count_parameters(model))


def test_a_speed_up_is_asked_for_until_it_is_measured(tmp_path, seconds):
    run = trainer(tmp_path, target_speed_up=1.15, **NO_BLOCKS)
    assert len(run.select().sites) == 2
    assert run.selection.speed_up >= 1.15
    with pytest.raises(PlanError, match=r"a speed-up of 9×, but closing all 3 sites makes the model \d\.\d+× as fast"):
        trainer(tmp_path, target_speed_up=9, **NO_BLOCKS).select()


def test_the_report_tells_how_the_blocks_were_chosen(tmp_path):
    run = trainer(tmp_path, selector="sensitivity")
    run.train()
    run.save_model()
    selection = Report.load(tmp_path).selection
    assert selection.selector == "sensitivity"
    assert selection.budget == "2 sites"
    assert len(selection.candidates) == 3
    assert Report.load(tmp_path).plan == run.plan.to_dict()


@pytest.mark.parametrize("speed_up", [1.2, 1.1])
@pytest.mark.usefixtures("seconds")
def test_what_was_asked_for_is_measured_again_when_it_is_saved(tmp_path, speed_up, monkeypatch, caplog):
    run = trainer(tmp_path, target_speed_up=1.15, **NO_BLOCKS)
    run.train()
    before = count_parameters(vit())
    monkeypatch.setattr(
        "updp_hf.core.cost.forward_seconds",
        lambda model, batch: 1.0 if count_parameters(model) == before else 1.0 / speed_up,
    )
    with caplog.at_level("WARNING"):
        run.save_model()
    assert Report.load(tmp_path).selection.speed_up == pytest.approx(speed_up)
    assert set(Report.load(tmp_path).after.latency) == {"1", "8", "16"}
    assert ("1.10× as fast at batch size 16, 1.15× was asked for" in caplog.text) == (speed_up < 1.15)


# the supernet


def supernet_run(folder, **changes):
    defaults = {"selector": "supernet", "supernet_fraction": 1.0, "save_strategy": "steps", "save_steps": 3}
    return trainer(folder, resnet(), train_dataset=RandomImages(count=48), **{**defaults, **changes})


def test_the_four_steps_end_in_a_merged_model(tmp_path):
    run = supernet_run(tmp_path)
    run.train()
    run.save_model()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(run.model), rtol=0.0, atol=1e-4)
    head, *lines = (tmp_path / "updp_selection" / "scores.jsonl").read_text().splitlines()
    assert len(lines) == 6  # of 4 sites, 2
    scores = {tuple(choice): score for choice, score in map(json.loads, lines)}
    best = max(scores, key=scores.get)
    assert [site.block for site in run.plan.sites] == [sites_of(resnet(), "merge")[i].block for i in best]
    assert json.loads(head)["images"] == 16


def test_the_supernet_never_sees_the_images_it_is_scored_by(tmp_path, monkeypatch):
    seen = []
    original = SupernetTrainer.__init__

    def spy(self, model, args, **kwargs):
        seen.append(kwargs["train_dataset"])
        original(self, model, args, **kwargs)

    monkeypatch.setattr(SupernetTrainer, "__init__", spy)
    run = supernet_run(tmp_path)
    run.select()
    scored_by = torch.cat([batch["pixel_values"] for batch in run.calibration_batches()])
    (trained_on,) = seen
    assert len(trained_on) == 32
    for item in trained_on:
        assert not (item["pixel_values"] == scored_by).all(dim=(1, 2, 3)).any()


@pytest.mark.parametrize("from_supernet", [False, True])
def test_pruning_starts_from_the_checkpoint_unless_told_otherwise(tmp_path, from_supernet):
    starts = {}

    class Start(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            starts["classifier"] = model.classifier[1].weight.detach().clone()

    run = supernet_run(tmp_path, start_from_supernet=from_supernet, callbacks=[Start()])
    run.train()
    assert torch.equal(starts["classifier"], resnet().classifier[1].weight) != from_supernet
    if from_supernet:
        assert torch.equal(starts["classifier"], run.selection.supernet.classifier[1].weight)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Run without interruption, and return the scores and the weights that it ends with."""
    folder = tmp_path_factory.mktemp("straight")
    run = supernet_run(folder)
    run.train()
    return (folder / "updp_selection" / "scores.jsonl").read_text(), weights(run.model)


def assert_resumes(folder, straight):
    run = supernet_run(folder)
    run.train(resume_from_checkpoint=True)
    scores, ended = straight
    assert (folder / "updp_selection" / "scores.jsonl").read_text() == scores
    assert_equal(weights(run.model), ended)


@pytest.mark.parametrize("step", slow_but([2, 4, 8], 4))
def test_an_interrupted_supernet_is_trained_on(tmp_path, straight, step, monkeypatch):
    original = SupernetTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == step:
            raise PlugPulledError
        return original(self, *args, **kwargs)

    if step < 8:
        monkeypatch.setattr(SupernetTrainer, "training_step", interrupted)
    else:  # when it is about to be kept
        monkeypatch.setattr(
            updp_hf.training.supernet, "save_checkpoint", lambda *args: (_ for _ in ()).throw(PlugPulledError)
        )
    with pytest.raises(PlugPulledError):
        supernet_run(tmp_path).train()
    monkeypatch.undo()
    assert_resumes(tmp_path, straight)


@pytest.mark.parametrize("count", slow_but(range(6), 2))
def test_an_interrupted_search_goes_on(tmp_path, straight, count, monkeypatch):
    original = ScoreHistory._append

    def interrupted(self, choice, value):
        if len(self.scores) > count:
            with self._file.open("a") as file:
                file.write("[[0, ")  # the line that was being written
            raise PlugPulledError
        original(self, choice, value)

    monkeypatch.setattr(ScoreHistory, "_append", interrupted)
    with pytest.raises(PlugPulledError):
        supernet_run(tmp_path).train()
    monkeypatch.undo()
    monkeypatch.setattr(SupernetTrainer, "train", lambda *args, **kwargs: pytest.fail("the supernet was finished"))
    assert_resumes(tmp_path, straight)


def test_an_interrupted_pruning_goes_on_without_selecting_again(tmp_path, straight, monkeypatch):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise PlugPulledError

    with pytest.raises(PlugPulledError):
        supernet_run(tmp_path, callbacks=[Stop()]).train()
    monkeypatch.setattr(UPDPTrainer, "select", lambda *args, **kwargs: pytest.fail("there is a plan"))
    assert_resumes(tmp_path, straight)


def test_another_search_is_not_resumed(tmp_path):
    supernet_run(tmp_path).select()
    with pytest.raises(ValueError, match="holds the scores of another search"):
        supernet_run(tmp_path, seed=1).select(resume=True)


def test_starting_anew_forgets_an_earlier_selection(tmp_path):
    supernet_run(tmp_path).select()
    first = (tmp_path / "updp_selection" / "scores.jsonl").read_text()
    supernet_run(tmp_path, seed=1).select()
    assert (tmp_path / "updp_selection" / "scores.jsonl").read_text() != first


def test_the_supernet_needs_images_of_its_own(tmp_path):
    with pytest.raises(ValueError, match="`calibration_size` is 48, and the training set has no more images"):
        supernet_run(tmp_path, calibration_size=48).select()


def test_images_without_labels_cannot_score_a_supernet(tmp_path):
    run = supernet_run(tmp_path)
    run.select()
    run = supernet_run(tmp_path)
    run.calibration_batches = lambda: [{"pixel_values": RandomImages().images}]
    with pytest.raises(ValueError, match="The images have no labels"):
        run.select(resume=True)


# the front


@pytest.mark.parametrize("selector", slow_but(["last", "supernet"], "supernet"))
def test_the_front_is_saved_with_a_picture(tmp_path, selector, seconds):
    run = trainer(tmp_path, selector=selector)
    front = run.pareto_front()
    assert updp_hf.selection.pareto.Front.load(tmp_path) == front
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert {len(point.plan["sites"]) for point in (*front.points, *front.beaten)} == {1, 2, 3}
    chosen = trainer(tmp_path / "run", args=arguments(tmp_path / "run", plan=Plan.from_dict(front.points[0].plan)))
    chosen.train()


def test_plans_of_the_front_prune_as_the_arguments_say(tmp_path):
    args = arguments(tmp_path, num_pruned_blocks=1, selector="last", start="inherit", end_activation="relu")
    (point, *_) = trainer(tmp_path, args=args).pareto_front().points
    assert (point.plan["start"], point.plan["end_activation"]) == ("inherit", "relu")


def test_a_run_exports_its_model_once(tmp_path, monkeypatch):
    exports = []
    export = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: exports.append(1) or export(*args, **kwargs))
    run = trainer(tmp_path, selector="greedy", max_steps=2)
    del run.structure  # so that it is read anew
    run.train()
    run.save_model()
    assert len(exports) == 1
