"""One network trained open and closed at once: by hand, resumed, and with the statistics of the open one."""

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from rings import slow_but
from tiny_training import (
    RandomImages,
    arguments,
    assert_equal,
    deit,
    gate_,
    logits,
    losses,
    mobilenet,
    resnet,
    sites_of,
    trainer,
    vit,
    weights,
)
from torch import nn
from transformers import TrainerCallback

from updp_hf import Plan, SupernetTrainer, calibrate_
from updp_hf.core.gates.gate import gates
from updp_hf.core.schedule import sandwich
from updp_hf.errors import PlanError
from updp_hf.selection.supernet import SUPERNET
from updp_hf.surgery.gate import close_only_
from updp_hf.training.checkpoints import save_checkpoint
from updp_hf.training.distillation import distillation_losses
from updp_hf.training.gated_trainer import GatedTrainer
from updp_hf.training.supernet import train_supernet

STEPS = 4


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The weights of a supernet whose training was not interrupted."""
    return weights(trained(tmp_path_factory.mktemp("straight"), vit))


@cache
def plan_for(build, form="merge", **plan):
    return Plan(tuple(site for site in sites_of(build(), form) if site.saves_compute), **plan)


@cache
def _gated(build, form, seed, **plan):
    model = build(seed)
    gate_(model, plan_for(build, form, **plan))
    calibrate_(model, [RandomImages(16).images.to(next(model.parameters()).dtype)])
    return model


def gated(build, form="merge", seed=0, **plan):
    return copy.deepcopy(_gated(build, form, seed, **plan))


def double_vit(seed=0):
    return vit(seed).double()


def images_in_double(count):
    dataset = RandomImages(count)
    dataset.images = dataset.images.double()
    return dataset


def supernet(folder, model, num_random=2, trainer=SupernetTrainer, **changes):
    names = ("callbacks", "eval_dataset", "train_dataset", "compute_loss_func")
    given = {name: changes.pop(name) for name in names if name in changes}
    args = arguments(folder, **{"max_steps": STEPS, **changes})
    options = {"num_random": num_random} if trainer is SupernetTrainer else {}
    return trainer(model, args, **{"train_dataset": RandomImages(16), **given}, **options)


BY_HAND = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
"""A step of which subtracts half of the gradients."""
WHOLE = {"per_device_train_batch_size": 8, "train_sampling_strategy": "sequential"}


def lambdas(model):
    return {float(gate.lam) for _, gate in gates(model)}


# the straight line


@pytest.mark.parametrize(
    ("build", "plan"),
    [
        (vit, {}),
        (vit, {"start": "fit", "end_activation": "relu"}),
        (resnet, {"end_activation": "relu"}),
    ],
)
def test_training_moves_both_sides_and_leaves_the_gates_open(tmp_path, build, plan):
    model = gated(build, **plan)
    before = weights(model)
    run = supernet(tmp_path, model)
    run.train()
    assert lambdas(model) == {0.0}
    stayed = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert stayed == []
    open_ = logits(model)
    close_only_(model, (0,))
    assert logits(model).isfinite().all()
    assert not torch.equal(logits(model), open_)


def test_training_begins_with_open_gates(tmp_path):
    runs = []
    for closed in ((), (0, 2)):
        model = gated(vit)
        close_only_(model, closed)
        runs.append(supernet(tmp_path, model))
        runs[-1].train()
    assert_equal(weights(runs[0].model), weights(runs[1].model))


def test_a_model_without_gates_is_refused(tmp_path):
    with pytest.raises(PlanError, match=r"ViTForImageClassification has no gates: call `gate_\(model, plan\)` first"):
        supernet(tmp_path, vit())


def test_a_negative_number_of_random_settings_is_refused(tmp_path):
    with pytest.raises(ValueError, match="3 sites and -1 random choices"):
        supernet(tmp_path, gated(vit), num_random=-1)


# a step, by hand


def step_by_hand_(model, batch, settings, loss_of):
    """Subtract half of the mean of the gradients of every setting."""
    model.train()
    model.zero_grad()
    for choice in settings:
        close_only_(model, choice)
        found = model(pixel_values=batch.images).logits
        (loss_of(found, batch.labels, choice) / len(settings)).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.5 * parameter.grad if parameter.grad is not None else 0.0)
    close_only_(model, ())


@pytest.mark.parametrize(
    "num_random", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(3, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("form", ["merge", "merge-keep-norm"])
def test_a_step_takes_the_mean_of_the_gradients_of_its_settings(tmp_path, num_random, form):
    batch = images_in_double(8)
    by_hand = gated(double_vit, form)
    run = supernet(
        tmp_path, copy.deepcopy(by_hand), num_random, train_dataset=batch, max_steps=3, seed=5, **BY_HAND, **WHOLE
    )
    run.train()
    settings = sandwich(3, num_random=num_random, seed=5)
    start = weights(by_hand)
    for step in range(3):
        assert len(settings(step)) == 2 + num_random
        step_by_hand_(by_hand, batch, settings(step), lambda found, labels, choice: F.cross_entropy(found, labels))
    assert_equal(dict(run.model.named_parameters()), dict(by_hand.named_parameters()), tolerance=1e-10)
    assert max(float((tensor - start[name]).abs().max()) for name, tensor in weights(by_hand).items()) > 1e-2


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_with_distillation_the_closed_learn_from_the_open_and_the_open_from_labels_alone(tmp_path, kind):
    batch = images_in_double(8)
    by_hand = gated(double_vit)
    options = {"distillation": kind, "distillation_weight": 0.3, "temperature": 3.0, **BY_HAND, **WHOLE}
    run = supernet(tmp_path, copy.deepcopy(by_hand), train_dataset=batch, max_steps=2, **options)
    run.train()
    teacher = []

    def loss_of(found, labels, choice):
        own = F.cross_entropy(found, labels)
        if not choice:
            teacher[:] = [found.detach()]
            return own
        return 0.7 * own + 0.3 * distillation_losses(found, teacher[0], hard=kind == "hard", temperature=3.0).mean()

    settings = sandwich(3, seed=run.args.seed)
    for step in range(2):
        step_by_hand_(by_hand, batch, settings(step), loss_of)
    assert_equal(dict(run.model.named_parameters()), dict(by_hand.named_parameters()), tolerance=1e-7)  # float32 losses


def test_distillation_changes_what_the_closed_lose_and_not_the_open(tmp_path):
    logged = []
    for kind in ("none", "soft"):
        run = supernet(tmp_path, gated(vit), max_steps=1, distillation=kind)
        run.train()
        logged.append(run.state.log_history[0])
    assert logged[0]["loss_open"] == logged[1]["loss_open"]
    assert abs(logged[0]["loss_closed"] - logged[1]["loss_closed"]) > 1e-3


@pytest.mark.parametrize("distillation", slow_but(["none", "soft", "hard"], "soft"))
def test_accumulating_gradients_is_the_same_as_a_larger_batch(tmp_path, distillation):
    # Without BatchNorms, which see each batch by itself: also not where `start="fit"` puts them.
    options = {"train_dataset": images_in_double(16), "distillation": distillation, **BY_HAND}
    start = gated(double_vit, "merge-keep-norm", start="inherit")
    whole = supernet(tmp_path, copy.deepcopy(start), per_device_train_batch_size=8, **options)
    parts = supernet(tmp_path, start, per_device_train_batch_size=4, gradient_accumulation_steps=2, **options)
    for run in (whole, parts):
        run.train()
    assert_equal(weights(parts.model), weights(whole.model), tolerance=1e-6)
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-6)


def test_other_losses_are_averaged_over_the_settings_too(tmp_path):
    def constant(outputs, labels, num_items_in_batch=None):
        return 0.0 * outputs.logits.sum() + 3.0

    run = supernet(tmp_path, gated(vit), compute_loss_func=constant)
    run.train()
    assert losses(run) == pytest.approx([3.0] * STEPS)


def test_drawing_settings_does_not_change_the_order_of_the_images(tmp_path):
    seen = {}

    class Watched(RandomImages):
        def __getitem__(self, index):
            seen[count].append(index)
            return super().__getitem__(index)

    for count in (0, 3):
        seen[count] = []
        supernet(tmp_path, gated(vit), num_random=count, train_dataset=Watched(16)).train()
    assert seen[0] == seen[3] != sorted(seen[0])


# what is logged


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_losses_of_the_open_and_the_closed_network_are_logged(tmp_path, accumulation):
    model = gated(vit, "merge-keep-norm", start="inherit")  # without BatchNorms, which train by their batch
    batch = RandomImages(8)
    expected = []
    for choice in ((), (0, 1, 2)):
        close_only_(model, choice)
        expected.append(float(F.cross_entropy(logits(model, batch), batch.labels)))
    run = supernet(
        tmp_path,
        model,
        num_random=0,
        train_dataset=batch,
        learning_rate=0.0,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
    )
    run.train()
    for entry in run.state.log_history[:2]:
        assert entry["loss"] == pytest.approx(sum(expected) / 2, abs=1e-5)
        # With accumulation, those of the last batch, each the mean over its images.
        tolerance = 1e-5 if accumulation == 1 else 0.3 * min(expected)
        assert entry["loss_open"] == pytest.approx(expected[0], abs=tolerance)
        assert entry["loss_closed"] == pytest.approx(expected[1], abs=tolerance)
    assert abs(expected[0] - expected[1]) > 1e-3


def test_an_evaluation_is_that_of_the_open_network(tmp_path):
    model = gated(vit)
    images = RandomImages(8, seed=1)
    expected = float(F.cross_entropy(logits(model, images), images.labels))
    run = supernet(tmp_path, model, eval_dataset=images, eval_strategy="steps", eval_steps=1, learning_rate=0.0)
    run.train()
    found = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert found == pytest.approx([expected] * STEPS, abs=1e-5)


def test_operations_of_all_settings_are_counted(tmp_path):
    model = gated(vit)
    images = {"pixel_values": torch.zeros(4, 3, 16, 16)}
    one = supernet(tmp_path, model, trainer=GatedTrainer).floating_point_ops(images)
    assert supernet(tmp_path, model).floating_point_ops(images) == 4 * one
    assert supernet(tmp_path, model, num_random=0).floating_point_ops(images) == 2 * one


# statistics


def statistics(model, own):
    """Return the running statistics of BatchNorms, of those on pruned sides or of those of the checkpoint."""
    return {
        f"{name}.{key}": tensor
        for name, norm in model.named_modules()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and (".pruned" in name or name.startswith("pruned")) == own
        for key, tensor in norm.state_dict().items()
        if key in ("running_mean", "running_var", "num_batches_tracked")
    }


@pytest.mark.parametrize("build", [resnet, pytest.param(mobilenet, marks=pytest.mark.slow)])
def test_the_checkpoints_statistics_are_those_of_training_the_open_network_alone(tmp_path, build):
    model = gated(build, end_activation="relu")
    before = weights(model)
    # The weights stay, so that both see the same.
    runs = [
        supernet(tmp_path, copy.deepcopy(model), trainer=trainer, learning_rate=0.0)
        for trainer in (SupernetTrainer, GatedTrainer)
    ]
    for run in runs:
        run.train()
    found, expected = (statistics(run.model, own=False) for run in runs)
    assert len(expected) > 10
    assert_equal(found, expected)
    assert all(torch.equal(found[name], before[name] + STEPS) for name in found if name.endswith("num_batches_tracked"))
    assert not any(torch.equal(found[name], before[name]) for name in found)
    own = statistics(runs[0].model, own=True)
    assert own
    assert not any(torch.equal(own[name], before[name]) for name in own)
    assert_equal(statistics(runs[1].model, own=True), {name: before[name] for name in own})


def test_every_batch_norm_goes_on_tracking_afterwards(tmp_path):
    model = gated(resnet, end_activation="relu")
    supernet(tmp_path, model).train()
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


# stopping and going on

RESUMED = {
    "vit": (vit, {}, {}),
    "dropout": (deit, {}, {}),
    "BatchNorms": (resnet, {"end_activation": "relu"}, {}),
    "fit, accumulation, distillation": (
        vit,
        {"start": "fit"},
        {"distillation": "soft", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ),
}


@pytest.mark.parametrize("case", slow_but(RESUMED, "BatchNorms"))
def test_a_resumed_run_ends_where_the_straight_run_ends(tmp_path, case):
    build, plan, options = RESUMED[case]
    # Two steps are an epoch, so checkpoints lie within and between.
    options = {"train_dataset": RandomImages(8), "save_strategy": "steps", "save_steps": 1, **options}
    straight = supernet(tmp_path / "straight", gated(build, **plan), **options)
    straight.train()
    expected = weights(straight.model)
    for step in range(1, STEPS):
        # Nothing of a checkpoint's weights may come from the model that the resumed run starts with.
        resumed = supernet(tmp_path / "resumed", gated(build, seed=1, **plan), **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{step}"))
        assert_equal(weights(resumed.model), expected)
        assert lambdas(resumed.model) == {0.0}
        found, wanted = (run.state.log_history[-2] for run in (resumed, straight))
        assert found == wanted


# for a pruning run


class Steps(TrainerCallback):
    """Count the steps, and break off after some."""

    def __init__(self, broken_off_after=None):
        self.broken_off_after, self.done, self.last = broken_off_after, [], None

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = state.max_steps

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.broken_off_after:
            raise KeyboardInterrupt
        self.done.append(state.global_step)


def trained(folder, build, model=None, train=None, callbacks=(), **changes):
    args = arguments(folder, **{"max_steps": 8, "save_strategy": "steps", "save_steps": 1, **changes})
    return train_supernet(
        build() if model is None else model,
        plan_for(build),
        [RandomImages(16).images],
        args,
        Path(folder) / "selection",
        train_dataset=RandomImages(16) if train is None else train,
        callbacks=list(callbacks),
    )


def test_a_supernet_is_a_gated_trained_copy_with_open_gates(tmp_path):
    model = resnet()
    before, modules = weights(model), list(model.modules())
    steps = Steps()
    found = trained(tmp_path, resnet, model, callbacks=[steps])
    assert steps.done == [0, 1, 2, 3]  # half of those of the run
    assert lambdas(found) == {0.0}
    assert list(model.modules()) == modules
    assert_equal(weights(model), before)
    calibrated = gated(resnet)
    for name, parameter in calibrated.named_parameters():
        assert not torch.equal(dict(found.named_parameters())[name], parameter), name


def test_a_finished_supernet_is_taken_as_it_is(tmp_path):
    first = trained(tmp_path, resnet)
    steps = Steps()
    second = trained(tmp_path, resnet, callbacks=[steps])
    assert steps.last is None
    assert_equal(weights(second), weights(first))
    assert trained(tmp_path, resnet, train=RandomImages(0))  # for which no images are needed


def test_a_supernet_computes_the_same_whether_it_was_trained_in_low_precision_or_found(tmp_path):
    first = trained(tmp_path, vit, bf16=True)
    assert torch.equal(logits(trained(tmp_path, vit, bf16=True)), logits(first))


@pytest.mark.parametrize("step", slow_but([0, 1, 3], 1))
def test_an_interrupted_supernet_goes_on_from_its_last_checkpoint(tmp_path, straight, step):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, vit, callbacks=[Steps(broken_off_after=step)])
    steps = Steps()
    found = trained(tmp_path, vit, callbacks=[steps])
    assert steps.done == list(range(step, 4))
    assert_equal(weights(found), straight)


def test_a_supernet_that_was_not_saved_whole_is_not_taken(tmp_path, straight, monkeypatch):
    def half_saved(model, folder):
        save_checkpoint(model, folder)
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr("updp_hf.training.supernet.save_checkpoint", half_saved)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, vit)
    monkeypatch.undo()
    for _ in range(2):
        assert_equal(weights(trained(tmp_path, vit)), straight)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"max_steps": 8, "supernet_fraction": 0.25}, 2),
        ({"max_steps": 8, "supernet_fraction": 0.01}, 1),
        ({"max_steps": 2, "supernet_fraction": 2.0}, 4),
        ({"max_steps": -1, "num_train_epochs": 3, "supernet_fraction": 0.5}, 6),  # four steps are an epoch
    ],
)
def test_a_supernet_is_trained_for_its_fraction_of_the_run(tmp_path, changes, steps):
    counted = Steps()
    trained(tmp_path, vit, callbacks=[counted], **changes)
    assert counted.last == len(counted.done) == steps


def test_what_the_run_evaluates_keeps_and_pushes_is_not_the_supernets(tmp_path, straight):
    args = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_on_start": True,
        "load_best_model_at_end": True,
        "save_strategy": "best",
        "metric_for_best_model": "loss",
    }
    assert_equal(weights(trained(tmp_path, vit, **args)), straight)  # without an evaluation set
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("selection/*/*")}
    assert left == {"selection/supernet/config.json", "selection/supernet/model.safetensors"}


def test_the_arguments_of_the_run_stay_as_they_are(tmp_path):
    args = arguments(tmp_path, max_steps=4, save_strategy="no", eval_strategy="steps", eval_steps=1)
    before = args.to_dict()
    images = [RandomImages(8).images]
    train_supernet(vit(), plan_for(vit), images, args, tmp_path / "supernet", train_dataset=RandomImages(8))
    assert args.to_dict() == before


def test_a_supernet_is_not_compiled_though_the_run_is(tmp_path, monkeypatch):
    """Each setting would be, until the cache that it shares with the run is full and nothing is compiled any more."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: compiled.append(model) or model)
    run = trainer(tmp_path, selector=SUPERNET, max_steps=2, torch_compile=True, num_pruned_blocks=1)
    run.train()
    assert compiled == [run.model]


def test_a_supernet_needs_images_that_are_not_calibrated_on(tmp_path):
    with pytest.raises(ValueError, match=r"^`calibration_size` is 16, and the training set has no more images: choose"):
        trained(tmp_path, vit, train=RandomImages(0))


def test_a_supernet_of_another_model_is_refused(tmp_path):
    trained(tmp_path, resnet)
    with pytest.raises(ValueError, match=r"(?s)does not fit the model: .*Resume with the model, the plan"):
        trained(tmp_path, vit)
