import re

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from updp_hf.recipe.output import ProgressLines, conditions_sentence, facts_of, table_of
from updp_hf.reporting.report import Cost, LatencyConditions


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        ({"loss": "1.5", "lambda": 0.25, "learning_rate": 1e-3}, ["loss 1.500", "λ 0.25"]),
        ({"eval_loss": 0.5, "eval_accuracy": 0.25}, ["held-out accuracy 25.00%"]),
        ({"eval_loss": 0.5}, ["held-out loss 0.500"]),
        ({"train_runtime": 3.0, "train_loss": 1.0}, []),
    ],
)
def test_a_line_says_what_people_watch(logs, expected):
    assert facts_of(logs) == expected


def test_progress_is_one_line_for_each_log(tmp_path, capsys):
    lines, args, control = ProgressLines(), TrainingArguments(tmp_path), TrainerControl()
    state = TrainerState(max_steps=100, is_world_process_zero=True)
    lines.on_train_begin(args, state, control)
    state.global_step = 50
    lines.on_log(args, state, control, logs={"loss": 2.0})
    lines.on_log(args, state, control, logs={"loss": 2.0, "loss_open": 1.0})
    lines.on_log(args, state, control, logs={"train_runtime": 1.0})
    state.global_step = 100
    lines.on_log(args, state, control, logs={"eval_accuracy": 0.5})
    state.is_world_process_zero = False
    lines.on_log(args, state, control, logs={"loss": 2.0})
    first, second, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"   step  50 of 100: loss 2\.000, 0:00:0\d left", first)
    assert second.startswith("   supernet, step  50 of 100: loss 2.000")
    assert last == "   step 100 of 100: held-out accuracy 50.00%"


def test_models_are_compared_with_the_first_one():
    costs = {"one": Cost(2_000_000, 10**9, {"1": 0.002}), "other": Cost(1_000_000, 5 * 10**8, {"1": 0.001})}
    table = table_of(costs, {"one": {}, "other": {"accuracy": 0.5}})
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:4]] for line in table.splitlines()}
    assert rows["held-out accuracy"] == ["not measured", "50.00%"]
    assert rows["speed-up, batch 1"] == ["1.00×", "2.00×"]


def test_conditions_are_a_sentence():
    known = LatencyConditions(device="cpu", dtype="float32", threads=1, rounds=5, statistic="median")
    assert conditions_sentence(known) == "Latency: cpu, float32, eager, 1 thread; 5 rounds, median."
    assert conditions_sentence(None) == "Latency was not measured."
