import json
import pickle

import pytest
import torch
from tiny_training import arguments, last_two, trainer, vit
from transformers import HfArgumentParser

from updp_hf import Plan, UPDPTrainingArguments
from updp_hf.errors import PlanError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_pruned_blocks": None}, "Of `num_pruned_blocks`, .* and `plan`, none is given: give one of them"),
        ({"num_pruned_blocks": 2, "plan": "plan.json"}, "`num_pruned_blocks` and `plan` is given: give one of them"),
        ({"num_pruned_blocks": 0}, "`num_blocks` is 0, expected at least 1"),
        ({"num_pruned_blocks": -1}, "`num_blocks` is -1, expected at least 1"),
        ({"selector": "best"}, r"`selector` is 'best', expected one of \['sensitivity', .*'supernet'\]"),
        ({"form": "mlp"}, "`form` is 'mlp', expected one of .*'merge-keep-norm'"),
        ({"start": "random"}, r"`start` is 'random', expected one of \['inherit', 'fit'\]"),
        ({"end_activation": "tanh"}, "`end_activation` is 'tanh', expected one of .*'gelu'"),
        ({"distillation": "firm"}, r"`distillation` is 'firm', expected one of \['none', 'soft', 'hard'\]"),
        ({"ramp": "square"}, "The ramp's shape is 'square', expected one of"),
        ({"ramp_start": 0.6}, "The ramp goes from 0.6 to 0.5, expected 0 <= start <= end <= 1"),
        ({"ramp_start": -0.1}, "The ramp goes from -0.1 to 0.5"),
        ({"ramp_end": 1.1}, "The ramp goes from 0.0 to 1.1"),
        ({"ramp_end": float("nan")}, "The ramp goes from 0.0 to nan"),
        ({"distillation_weight": 1.5}, "`distillation_weight` is 1.5"),
        ({"distillation_weight": -0.5}, "`distillation_weight` is -0.5"),
        ({"temperature": 0.0}, "`temperature` 0.0 .*a temperature above 0"),
        ({"temperature": float("nan")}, "`temperature` nan .*a temperature above 0"),
        ({"calibration_size": 0}, "`calibration_size` 0, expected .* at least one image"),
        ({"push_to_hub": True, "hub_strategy": "every_save"}, "`hub_strategy` is 'every_save', which would publish"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"ramp_start": 0.0, "ramp_end": 0.0},
        {"ramp_start": 0.5, "ramp_end": 0.5},
        {"distillation_weight": 0.0},
        {"distillation_weight": 1.0},
        {"calibration_size": 1},
        {"end_activation": "silu"},
        {"push_to_hub": True, "hub_strategy": "end"},
    ],
    ids=str,
)
def test_the_limits_are_allowed(tmp_path, changes):
    args = arguments(tmp_path, **changes)
    assert {name: getattr(args, name) for name in changes} == changes


def test_gates_leave_parameters_unused_unless_told_otherwise(tmp_path):
    assert arguments(tmp_path).ddp_find_unused_parameters is True
    assert arguments(tmp_path, activation_checkpointing=True).ddp_find_unused_parameters is True
    assert arguments(tmp_path, ddp_find_unused_parameters=False).ddp_find_unused_parameters is False


VALUES = {
    "num_pruned_blocks": 3,
    "selector": "uniform",
    "form": "branch-fit",
    "start": "fit",
    "end_activation": "gelu",
    "ramp": "cosine",
    "ramp_start": 0.1,
    "ramp_end": 0.75,
    "calibration_size": 64,
    "distillation": "hard",
    "distillation_weight": 0.25,
    "temperature": 3.0,
    "learning_rate": 0.001,
    "use_cpu": True,
}


def parse_command_line(parser, folder):
    words = [word for name, value in VALUES.items() for word in (f"--{name}", str(value))]
    return parser.parse_args_into_dataclasses(["--output_dir", str(folder), *words])


def parse_json(parser, folder):
    (folder / "args.json").write_text(json.dumps({"output_dir": str(folder), **VALUES}))
    return parser.parse_json_file(folder / "args.json")


def parse_yaml(parser, folder):
    lines = [f"{name}: {value}" for name, value in {"output_dir": folder, **VALUES}.items()]
    (folder / "args.yaml").write_text("\n".join(lines))
    return parser.parse_yaml_file(folder / "args.yaml")


@pytest.mark.parametrize("parse", [parse_command_line, parse_json, parse_yaml])
def test_the_arguments_parse_from(tmp_path, parse):
    (args,) = parse(HfArgumentParser(UPDPTrainingArguments), tmp_path)
    assert {name: getattr(args, name) for name in VALUES} == VALUES


def test_a_plan_file_on_the_command_line_is_followed(tmp_path):
    last_two(vit).save(tmp_path / "plan.json")
    words = ["--output_dir", str(tmp_path), "--plan", str(tmp_path / "plan.json"), "--use_cpu", "true"]
    (args,) = HfArgumentParser(UPDPTrainingArguments).parse_args_into_dataclasses(words)
    assert trainer(tmp_path, args=args).select() == last_two(vit)


def test_a_plan_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "plan.json").write_text("not JSON")
    with pytest.raises(PlanError, match="is not JSON"):
        trainer(tmp_path, plan=str(tmp_path / "plan.json")).train()


@pytest.mark.parametrize("name", ["selector", "form", "start", "end_activation", "ramp", "distillation"])
def test_the_command_line_refuses_what_is_not_a_choice(tmp_path, name, capsys):
    words = ["--output_dir", str(tmp_path), "--num_pruned_blocks", "1", f"--{name}", "nonsense"]
    with pytest.raises(SystemExit):
        HfArgumentParser(UPDPTrainingArguments).parse_args_into_dataclasses(words)
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err


def test_the_help_can_be_shown(capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(UPDPTrainingArguments).parse_args_into_dataclasses(["--help"])
    assert "--num_pruned_blocks" in capsys.readouterr().out


def test_a_plan_object_is_written_as_json(tmp_path):
    args = arguments(tmp_path, plan=last_two(vit))
    document = json.loads(args.to_json_string())
    assert Plan.from_dict(document["plan"]) == last_two(vit)
    assert args.to_sanitized_dict()["ramp_end"] == 0.5
    assert "vit.layers.2" in str(args)


def test_the_arguments_survive_the_file_that_the_trainer_writes(tmp_path):
    args = arguments(tmp_path, plan=last_two(vit), ramp="cosine")
    torch.save(args, tmp_path / "training_args.bin")
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert loaded.to_dict() == args.to_dict()
    assert pickle.loads(pickle.dumps(args)).plan == last_two(vit)
