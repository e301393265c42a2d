import pytest
import torch
from rings import slow_but
from tiny_training import STEPS, Lambdas, RandomImages, gate_, last_two, logits, losses, timm_vit, vit
from transformers import (
    AutoModelForImageClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
)

from updp_hf import UPDPCallback, calibrate_, merge, ramp
from updp_hf.core.gates.gate import gates
from updp_hf.errors import PlanError


def by_hand(folder, model, callback, **changes):
    given = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = TrainingArguments(str(folder), **{**given, **changes})
    recorded = Lambdas()
    run = Trainer(
        model=model,
        args=args,
        train_dataset=RandomImages(),
        eval_dataset=RandomImages(8, seed=1),
        callbacks=[callback, recorded],
    )
    return run, recorded


def gated(build):
    model = build()
    gate_(model, last_two(build))
    calibrate_(model, [RandomImages().images])
    return model


@pytest.mark.parametrize("build", slow_but([vit, timm_vit], vit))
@pytest.mark.parametrize("bf16", [False, True])
def test_the_stock_trainer_anneals_and_the_result_merges(tmp_path, build, bf16):
    model = gated(build)
    run, recorded = by_hand(tmp_path / "run", model, UPDPCallback(ramp(end=0.5)), bf16=bf16)
    run.train()
    assert [value for event, _, value in recorded.seen if event == "step"] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    merged = merge(model)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded), logits(merged), rtol=0.0, atol=0.0)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0.0, atol=5e-2 if bf16 else 1e-4)


def test_early_stopping_waits_for_the_end_of_the_ramp(tmp_path):
    stopper = EarlyStoppingCallback(early_stopping_patience=1)
    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "worsening",
        "greater_is_better": True,
    }
    run, _ = by_hand(tmp_path, gated(vit), stopper, **options)
    run.compute_metrics = lambda _: {"worsening": -float(run.state.global_step)}
    run.add_callback(UPDPCallback(ramp(end=0.5)))
    run.train()
    # λ is 1 from step 4 on: its first evaluation is the best, the second one is worse.
    assert run.state.global_step == 6
    assert all(gate.stage == 1.0 for _, gate in gates(run.model))


def test_lambda_is_handed_to_the_loggers_behind(tmp_path):
    class Logged(UPDPCallback):
        seen: list[float]

        def on_log(self, args, state, control, logs=None, **kwargs):
            super().on_log(args, state, control, logs=logs, **kwargs)
            if "lambda" in logs:
                self.seen.append(logs["lambda"])
                assert "loss" in logs

    callback = Logged(ramp(end=0.5))
    callback.seen = []
    run, _ = by_hand(tmp_path, gated(vit), callback)
    run.train()
    assert callback.seen == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    assert len(losses(run)) == STEPS


def test_an_ungated_model_is_refused(tmp_path):
    run, _ = by_hand(tmp_path, vit(), UPDPCallback())
    with pytest.raises(PlanError, match=r"ViTForImageClassification has no gates: call `gate_\(model, plan\)` first"):
        run.train()


@pytest.mark.parametrize(
    ("schedule", "last"), [(ramp(end=1.0), "0.875"), (ramp("constant", end=0.95), "0"), (lambda progress: 0.5, "0.5")]
)
def test_a_schedule_that_never_trains_the_pruned_network_is_refused(tmp_path, schedule, last):
    run, _ = by_hand(tmp_path, gated(vit), UPDPCallback(schedule))
    with pytest.raises(ValueError, match=f"λ is still {last} in the last of 8 steps.*end the ramp earlier"):
        run.train()


def test_a_schedule_outside_of_its_range_is_refused(tmp_path):
    run, _ = by_hand(tmp_path, gated(vit), UPDPCallback(lambda progress: 1.5 if progress > 0.4 else 0.0))
    with pytest.raises(ValueError, match=r"λ is 1.5, but a gate blends with λ in \[0, 1\]"):
        run.train()


def test_lambda_depends_on_nothing_but_the_step():
    callback = UPDPCallback(ramp("cosine", 0.25, 0.75))
    in_order = [callback.lambda_at(step, 12) for step in range(13)]
    backwards = [callback.lambda_at(step, 12) for step in reversed(range(13))]
    assert backwards == in_order[::-1] == sorted(in_order, reverse=True)
    assert in_order[3] == 0.0
    assert in_order[6] == pytest.approx(0.5)
    assert in_order[9] == 1.0


def test_the_best_model_is_forgotten_when_the_ramp_ends_and_only_then():
    model = gated(vit)
    callback, state = UPDPCallback(ramp(end=0.5)), TrainerState(max_steps=8)
    forgotten = []
    for step in range(8):
        state.global_step, state.best_metric, state.best_global_step, state.best_model_checkpoint = step, 0.9, 1, "here"
        callback.on_step_begin(None, state, None, model=model)
        assert (state.best_metric is None) == (state.best_global_step is None) == (state.best_model_checkpoint is None)
        if state.best_metric is None:
            forgotten.append(step)
    assert forgotten == [4]
    assert {float(gate.lam) for _, gate in gates(model)} == {1.0}


def test_evaluating_before_the_first_step_sees_its_lambda(tmp_path):
    closed = lambda progress: 1.0  # noqa: E731
    run, recorded = by_hand(tmp_path, gated(vit), UPDPCallback(closed), eval_strategy="no", eval_on_start=True)
    run.train()
    assert [entry for entry in recorded.seen if entry[0] == "prediction"] == [("prediction", 0, 1.0)]


def test_a_run_that_stops_in_the_ramp_leaves_lambda_where_it_was(tmp_path):
    class Stop(UPDPCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    model = gated(vit)
    run, _ = by_hand(tmp_path, model, Stop(ramp(end=0.5)))
    run.train()
    assert {float(gate.lam) for _, gate in gates(model)} == {0.5}
    with pytest.raises(ValueError, match="not closed"):
        merge(model)
