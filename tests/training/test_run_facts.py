"""What is told of a run, and what is not."""

import json

from accelerate import Accelerator, DistributedType
from tiny_training import arguments, last_two, vit
from transformers import TrainingArguments

from updp_hf.training.run_facts import changed_arguments


def test_only_what_was_changed_is_reported_and_nothing_private(tmp_path):
    args = arguments(
        tmp_path,
        num_pruned_blocks=1,
        hub_token="secret-token",
        hub_model_id="me/model",
        resume_from_checkpoint=str(tmp_path / "checkpoint-3"),
        run_name="a run",
        data_seed=0,
        skip_memory_metrics=False,
        lr_scheduler_type="cosine",
    )
    changed = changed_arguments(args)
    assert changed["num_pruned_blocks"] == 1
    assert changed["learning_rate"] == 1e-2
    assert changed["data_seed"] == 0
    assert changed["skip_memory_metrics"] is False
    assert changed["lr_scheduler_type"] == "cosine"
    assert changed["ramp_end"] == 0.5
    assert "ramp_start" not in changed
    assert "warmup_steps" not in changed
    text = json.dumps(changed)
    for private in (str(tmp_path), "secret-token", "me/model", "a run"):
        assert private not in text
    assert not {"output_dir", "hub_token", "hub_model_id", "resume_from_checkpoint", "run_name"} & set(changed)


def test_the_plan_is_reported_once(tmp_path):
    changed = changed_arguments(arguments(tmp_path, plan=last_two(vit)))
    assert "plan" not in changed
    assert "num_pruned_blocks" not in changed


def test_the_arguments_of_the_stock_trainer_are_compared_with_their_own_defaults(tmp_path):
    assert changed_arguments(TrainingArguments(str(tmp_path), use_cpu=True, seed=5)) == {"seed": 5, "use_cpu": True}


def test_reporting_leaves_the_state_of_accelerate_alone(tmp_path):
    args = arguments(tmp_path)
    accelerator = Accelerator(cpu=True)
    changed_arguments(args)
    assert accelerator.distributed_type is DistributedType.NO
