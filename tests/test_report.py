import json

import pytest
import torch
from accelerate import Accelerator, DistributedType
from tiny_training import RandomImages, arguments, last_two, vit
from transformers import TrainingArguments

from updp_hf import Report, calibrate_, gate_, merge
from updp_hf.core.gate import gates
from updp_hf.report import Cost, changed_arguments, device_name, measure_costs, side_by_side


@pytest.fixture(scope="module")
def merged():
    model = vit()
    gate_(model, last_two(vit))
    calibrate_(model, [RandomImages().images])
    for _, gate in gates(model):
        gate.set_lambda_(1.0)
    return merge(model)


def test_costs_are_those_counted_by_hand(merged):
    costs, conditions = measure_costs({"checkpoint": vit(), "pruned": merged})
    tokens, width, hidden = 5, 16, 32
    norm, ffn, linear = 2 * width, 2 * width * hidden + width + hidden, width * width + width
    layer = 2 * norm + 4 * linear + ffn
    embeddings = (3 * 64 + 1) * width + width + tokens * width
    assert costs["checkpoint"].parameters == embeddings + 3 * layer + norm + 4 * width + 4
    assert costs["checkpoint"].parameters - costs["pruned"].parameters == 2 * (norm + ffn - linear)
    assert costs["checkpoint"].macs - costs["pruned"].macs == 2 * tokens * (2 * width * hidden - width * width)
    assert costs["checkpoint"].latency is costs["pruned"].latency is None
    assert conditions == {}


def test_latency_is_measured_by_batch_size_with_its_conditions(merged):
    costs, conditions = measure_costs({"before": vit(), "after": merged}, batch_sizes=(1, 3), rounds=2)
    for cost in costs.values():
        assert set(cost.latency) == {"1", "3"}
        assert min(cost.latency.values()) > 0
    assert conditions["rounds"] == 2
    assert conditions["dtype"] == "float32"
    assert conditions["threads"] == torch.get_num_threads()
    assert conditions["device"] == device_name(torch.device("cpu"))
    assert conditions["device"].startswith("cpu (")


def test_costs_are_measured_in_evaluation_mode(merged):
    modes = []
    model = vit().train()
    model.register_forward_hook(lambda module, *_: modes.append(module.training))
    measure_costs({"before": model, "after": merged}, batch_sizes=(1,), rounds=1)
    assert modes
    assert not any(modes)


def test_the_name_of_a_gpu_is_asked_of_the_driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"driver's name of {device}")
    assert device_name(torch.device("cuda", 1)) == "driver's name of cuda:1"


def test_the_report_survives_its_file(tmp_path):
    report = Report(
        plan=last_two(vit).to_dict(),
        before=Cost(10, 100, {"1": 0.5, "8": 1.5}),
        after=Cost(5, 50),
        merge_error=1e-7,
        metrics_before={"accuracy": 0.75},
        metrics_after={"accuracy": 0.5, "loss": 1.25},
        latency_conditions={"device": "cpu", "threads": 1},
        arguments={"learning_rate": 0.01, "optim": "sgd"},
        seed=3,
    )
    report.save(tmp_path)
    assert Report.load(tmp_path) == report
    assert [path.name for path in tmp_path.iterdir()] == ["updp_report.json"]


def test_what_was_not_measured_stays_unmeasured(tmp_path):
    Report(plan={}, before=Cost(2, 2), after=Cost(1, 1)).save(tmp_path)
    loaded = Report.load(tmp_path)
    assert loaded.merge_error is loaded.seed is loaded.before.latency is None
    assert loaded.metrics_before == loaded.metrics_after == {}
    assert set(loaded.versions) >= {"torch", "transformers", "updp-hf"}


def test_the_file_is_the_same_for_the_same_facts(tmp_path):
    facts = {"plan": {}, "before": Cost(2, 2), "after": Cost(1, 1)}
    texts = []
    for metrics in ({"a": 1.0, "b": 2.0}, {"b": 2.0, "a": 1.0}):
        Report(**facts, metrics_after=metrics).save(tmp_path)
        texts.append((tmp_path / "updp_report.json").read_text(encoding="utf-8"))
    assert texts[0] == texts[1]


def test_only_what_was_changed_is_reported_and_nothing_private(tmp_path):
    args = arguments(
        tmp_path,
        num_pruned_blocks=1,
        hub_token="secret-token",
        hub_model_id="me/model",
        resume_from_checkpoint=str(tmp_path / "checkpoint-3"),
        run_name="a run",
        data_seed=0,
        logging_nan_inf_filter=False,
        lr_scheduler_type="cosine",
    )
    changed = changed_arguments(args)
    assert changed["num_pruned_blocks"] == 1
    assert changed["learning_rate"] == 1e-2
    assert changed["hub_model_id"] == "me/model"
    assert changed["data_seed"] == 0
    assert changed["logging_nan_inf_filter"] is False
    assert changed["lr_scheduler_type"] == "cosine"
    assert "ramp_end" not in changed
    assert "warmup_steps" not in changed
    text = json.dumps(changed)
    for private in (str(tmp_path), "secret-token"):
        assert private not in text
    assert not {"output_dir", "hub_token", "resume_from_checkpoint"} & set(changed)


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


def test_facts_stand_side_by_side():
    table = side_by_side(
        {"before": Cost(22_050_000, 4_600_000_000, {"8": 0.0125}).facts(), "after": Cost(1_500_000, 250_000).facts()}
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[0] == ["", "before", "after"]
    assert rows[2:] == [
        ["parameters", "22.05 M", "1.50 M"],
        ["MACs per image", "4600.0 M", "0.2 M"],
        ["latency, batch 8", "12.50 ms", "not measured"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1
