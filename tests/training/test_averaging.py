import copy

import pytest
import torch
from rings import slow_but
from tiny_training import RandomImages, assert_equal, gate_, last_two, resnet, sites_of, trainer, vit, weights
from transformers import TrainerCallback

from updp_hf import Plan
from updp_hf.core.gates.gate import gates, set_lambda_
from updp_hf.training.averaging import WeightAverage

DECAY = 0.75


def gated(seed=0):
    model = vit(seed)
    gate_(model, last_two(vit))
    return model


def test_the_average_follows_the_weights():
    model, other = gated(), gated(seed=1)
    first, second = weights(model), weights(other)
    average = WeightAverage(model, DECAY)
    model.load_state_dict(second)
    average.on_step_end()
    average.install_()
    expected = {
        name: torch.lerp(tensor, second[name], 1 - DECAY) if tensor.is_floating_point() else second[name]
        for name, tensor in first.items()
    }
    assert_equal(weights(model), expected, tolerance=1e-6)


def test_the_model_has_the_average_within_and_its_own_weights_afterwards():
    model = gated()
    before = weights(model)
    average = WeightAverage(model, DECAY)
    model.load_state_dict(weights(gated(seed=1)))
    after = weights(model)
    with average.in_place():
        assert_equal(weights(model), before)
    assert_equal(weights(model), after)
    with pytest.raises(ZeroDivisionError), average.in_place():
        1 / 0  # noqa: B018
    assert_equal(weights(model), after)


def test_lambda_is_not_averaged():
    model = gated()
    average = WeightAverage(model, DECAY)
    set_lambda_(model, 1.0)
    average.on_step_end()
    with average.in_place():
        assert {float(gate.lam) for _, gate in gates(model)} == {1.0}


class ByHand(TrainerCallback):
    """Average what the weights are after each step."""

    def __init__(self):
        self.expected = None

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.expected = weights(model)

    def on_step_end(self, args, state, control, model, **kwargs):
        for name, tensor in model.state_dict().items():
            if name.endswith(".lam") or not tensor.is_floating_point():
                self.expected[name] = tensor.clone()
            else:
                self.expected[name].lerp_(tensor, 1 - DECAY)


class Seen(TrainerCallback):
    """Keep the weights that are evaluated."""

    def on_prediction_step(self, args, state, control, model, **kwargs):
        self.weights = weights(model)


@pytest.mark.parametrize("build", slow_but([vit, resnet], resnet))
def test_the_average_is_evaluated_and_is_left_after_training(build, tmp_path):
    by_hand, seen = ByHand(), Seen()
    plan = Plan(sites_of(build(), "merge")[-1:])
    run = trainer(
        tmp_path,
        build(),
        plan=plan,
        ema_decay=DECAY,
        eval_strategy="steps",
        eval_steps=8,
        callbacks=[by_hand, seen],
    )
    run.train()
    assert_equal(seen.weights, by_hand.expected, tolerance=1e-5)
    assert_equal(weights(run.model), by_hand.expected, tolerance=1e-5)
    plain = trainer(tmp_path, build(), plan=plan)
    plain.train()
    last = weights(plain.model)
    assert any(not torch.equal(tensor, last[name]) for name, tensor in weights(run.model).items())


def test_a_resumed_run_ends_with_the_same_average(tmp_path):
    options = {"ema_decay": DECAY, "save_strategy": "steps", "save_steps": 3}
    straight = trainer(tmp_path, **options)
    straight.train()
    resumed = trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_equal(weights(resumed.model), weights(straight.model))


def test_a_checkpoint_without_an_average_is_not_resumed_with_one(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=3)
    run.train()
    with pytest.raises(ValueError, match=r"holds no average.safetensors: .*with the options that its run had"):
        trainer(tmp_path, ema_decay=DECAY).train(resume_from_checkpoint=True)


def test_the_best_model_is_the_best_average(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    run = trainer(tmp_path, ema_decay=DECAY, load_best_model_at_end=True, **options)
    run.train()
    best = copy.deepcopy(run.model)
    metrics = run.evaluate()
    assert metrics["eval_loss"] == pytest.approx(run.state.best_metric, rel=1e-4)
    assert_equal(weights(best), weights(run.model))


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0, 2.0])
def test_a_decay_is_a_fraction(decay, tmp_path):
    with pytest.raises(ValueError, match="expected a decay between 0 and 1"):
        trainer(tmp_path, ema_decay=decay)


def test_a_supernet_is_not_averaged(tmp_path):
    run = trainer(tmp_path, selector="supernet", ema_decay=DECAY, train_dataset=RandomImages(count=40))
    run.train()
    assert run.plan
