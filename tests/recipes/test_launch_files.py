"""The files that `accelerate launch` and the recipes read."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from project import ROOT

from updp_hf import UPDPTrainingArguments

FOLDER = ROOT / "recipes"
MODELS = ("deit_tiny", "deit_small", "resnet34", "mobilenetv2", "convnext_tiny")
RECIPES = (*MODELS, "smoke")
MULTI = DistributedType.MULTI_GPU  # what starts several processes, on the processor too
FIELDS = {field.name for field in dataclasses.fields(UPDPTrainingArguments)}
TYPES = typing.get_type_hints(UPDPTrainingArguments)


def launch_file(name: str) -> str:
    return str(FOLDER / "accelerate" / f"{name}.yaml")


def launched(name: str, *options: str) -> Any:
    """What `accelerate launch` makes of a file and further options."""
    options = ("--config_file", launch_file(name), *options, "script.py")
    return _validate_launch_command(launch_command_parser().parse_args(options))[0]


def recipe(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def holds(annotation: Any, value: Any) -> bool:
    """Whether a field of this type can hold `value`, an int being a float; a dict, a list and an enum may be text."""
    kinds = typing.get_args(annotation) or (annotation,)
    if isinstance(value, str):
        return any(kind is not bool and kind not in (int, float) for kind in kinds if kind is not type(None))
    return type(value) in kinds or (type(value) is int and float in kinds)


@pytest.fixture(autouse=True)
def _no_threads_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else accelerate counts the cores and warns


@pytest.mark.parametrize(
    ("name", "kind", "processes", "machines", "use_cpu"),
    [
        ("cpu", DistributedType.NO, 1, 1, True),
        ("multi_cpu", MULTI, 2, 1, True),
        ("one_gpu", DistributedType.NO, 1, 1, False),
        ("multi_gpu", MULTI, 8, 1, False),
        ("multi_node", MULTI, 16, 2, False),
    ],
)
def test_accelerate_knows_every_key_of_a_launch_file(
    name: str, kind: DistributedType, processes: int, machines: int, use_cpu: bool
) -> None:
    config = load_config_from_file(launch_file(name))

    assert isinstance(config, ClusterConfig)
    assert (config.distributed_type, config.num_processes, config.num_machines) == (kind, processes, machines)
    assert config.use_cpu is use_cpu
    assert config.mixed_precision == "no"  # an argument of the training, and of nothing else


def test_there_is_no_other_launch_file() -> None:
    assert {file.stem for file in (FOLDER / "accelerate").iterdir()} == {
        "cpu",
        "multi_cpu",
        "one_gpu",
        "multi_gpu",
        "multi_node",
    }


@pytest.mark.parametrize("name", ["cpu", "multi_cpu"])
def test_files_for_the_processor_hide_the_gpus(name: str) -> None:
    assert set(launched(name).gpu_ids.split(",")) == {"-1"}


@pytest.mark.parametrize(("name", "starts_several"), [("cpu", False), ("one_gpu", False), ("multi_cpu", True)])
def test_accelerate_starts_several_processes_only_where_the_name_says_so(name: str, starts_several: bool) -> None:
    assert launched(name).multi_gpu is starts_several


def test_options_win_over_a_launch_file() -> None:
    asked = launched("multi_node", "--num_processes", "4", "--machine_rank", "1", "--main_process_ip", "first")

    assert (asked.num_processes, asked.num_machines) == (4, 2)
    assert (asked.machine_rank, asked.main_process_ip) == (1, "first")
    assert launched("multi_cpu", "--num_processes", "3").num_processes == 3


@pytest.mark.parametrize("name", RECIPES)
def test_numbers_of_a_recipe_are_numbers(name: str) -> None:
    values = recipe(name)

    wrong = {key: value for key, value in values.items() if key in FIELDS and not holds(TYPES[key], value)}
    assert not wrong
    assert not [key for key, value in values.items() if isinstance(value, str) and is_number(value)]


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", RECIPES)
def test_no_key_of_a_recipe_is_there_twice(name: str) -> None:
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    keys = [line.split(":")[0] for line in lines if line and not line.startswith(("#", " "))]

    assert keys == list(recipe(name))  # YAML keeps the last of two and says nothing


@pytest.mark.parametrize("name", MODELS)
def test_every_setting_of_a_full_recipe_names_its_source(name: str) -> None:
    running, found = False, []
    for line in (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        running = running or line == "# Running it: ours"
        if line and not line.startswith(("#", " ")) and not running and " # " not in line:
            found.append(line.split(":")[0])

    assert running
    assert set(found) <= {"output_dir", "dataset_name", "model_name_or_path"}


@pytest.mark.parametrize("name", MODELS)
def test_training_takes_the_arguments_of_a_recipe(name: str, tmp_path: Path) -> None:
    values = {key: value for key, value in recipe(name).items() if key in FIELDS}
    args = UPDPTrainingArguments(**{**values, "output_dir": str(tmp_path), "use_cpu": True})

    assert args.num_pruned_blocks == recipe(name)["num_pruned_blocks"]
    assert 0 <= args.get_warmup_steps(1000) < 100  # a fraction of all steps, and no number of epochs


@pytest.mark.parametrize("name", MODELS)
def test_the_smoke_run_of_a_recipe_is_short_and_divides_among_one_or_two_processes(name: str, tmp_path: Path) -> None:
    values = {**recipe(name), **recipe("smoke")}
    known = {key: value for key, value in values.items() if key in FIELDS}
    args = UPDPTrainingArguments(**{**known, "output_dir": str(tmp_path)})

    assert args.max_steps * (1 + 4 * args.supernet_fraction) < 100
    assert 0 < args.save_steps < args.max_steps
    assert all(values["global_batch_size"] % (args.per_device_train_batch_size * count) == 0 for count in (1, 2))
    assert args.per_device_train_batch_size % 2 == 0  # mixup wants pairs
    assert not args.bf16
