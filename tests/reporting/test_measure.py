import copy
import shutil
from dataclasses import replace
from functools import cache

import pytest
import torch
from tiny_models import pruned_once
from tiny_training import RandomImages, last_two, resnet, timm_vit, vit

from updp_hf import Form, Report, UPDPForImageClassification, calibrate_, gate_, merge
from updp_hf.core.gates.gate import gates
from updp_hf.reporting import measure as module
from updp_hf.reporting.measure import (
    device_name,
    digest_of_weights,
    measure_costs,
    model_facts,
    report_in,
    report_of,
)
from updp_hf.reporting.report import ModelFacts


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
    assert conditions is None


def test_latency_is_measured_by_batch_size_with_its_conditions(merged):
    costs, conditions = measure_costs({"before": vit(), "after": merged}, batch_sizes=(1, 3), rounds=2)
    for cost in costs.values():
        assert set(cost.latency) == {"1", "3"}
        assert min(cost.latency.values()) > 0
    assert conditions.rounds == 2
    assert conditions.dtype == "float32"
    assert conditions.threads == torch.get_num_threads()
    assert conditions.device == device_name(torch.device("cpu"))
    assert conditions.device.startswith("cpu (")


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


# what a model itself tells


@cache
def pruned(build, form=Form.MERGE):
    return pruned_once(build(), form)


@cache
def told(build):
    return report_of(pruned(build))


@pytest.mark.parametrize("build", [vit, *(pytest.param(build, marks=pytest.mark.slow) for build in (timm_vit, resnet))])
def test_a_merged_model_tells_what_was_pruned_and_what_it_costs(build):
    merged, report, base = pruned(build), told(build), build()
    costs, _ = measure_costs({"before": base, "after": merged})
    assert (report.before, report.after) == (costs["before"], costs["after"])
    assert report.after.parameters < report.before.parameters
    assert report.plan == merged.config.plan
    assert report.merge_error == merged.config.merge_error
    assert report.model == model_facts(base, merged)
    assert {site["block"] for site in report.plan["sites"]} <= set(report.blocks)
    assert len(report.blocks) > len(report.plan["sites"])


def test_what_a_model_cannot_tell_is_left_out():
    report = told(vit)
    assert report.metrics_before == report.metrics_after == report.arguments == {}
    for name in ("latency_conditions", "selection", "training", "onnx"):
        assert getattr(report, name) is None
    assert report.before.latency is report.after.latency is report.seed is report.weights is None


def test_its_latency_is_measured_beside_its_skeleton_if_asked_for():
    report = report_of(pruned(vit), batch_sizes=(1, 2))
    assert set(report.before.latency) == set(report.after.latency) == {"1", "2"}
    assert report.latency_conditions.statistic == "median, the models in turn"


def test_the_model_is_left_as_it_is():
    merged = pruned(vit)
    before = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    report_of(merged, batch_sizes=(1,))
    assert all(torch.equal(tensor, before[name]) for name, tensor in merged.state_dict().items())


def test_models_in_other_precisions_tell_the_same():
    expected, found = told(resnet), report_of(copy.deepcopy(pruned(resnet)).to(torch.bfloat16), batch_sizes=(1,))
    assert (found.before.macs, found.after.parameters) == (expected.before.macs, expected.after.parameters)
    assert found.latency_conditions.dtype == "bfloat16"


def test_a_stock_model_tells_its_costs_beside_what_it_was():
    stock = pruned(vit, Form.BLOCK_DROP)
    report = report_of(stock, base=vit(), plan=last_two(vit).to_dict())
    assert report.model == ModelFacts("ViTForImageClassification", "ViTForImageClassification")
    assert report.after == measure_costs({"": stock})[0][""]
    assert report.before.parameters > report.after.parameters
    assert len(report.plan["sites"]) == 2
    with pytest.raises(ValueError, match="does not tell what was pruned"):
        report_of(stock)


def test_a_model_that_was_pruned_twice_tells_of_blocks_that_it_has():
    twice = pruned_once(copy.deepcopy(pruned(vit)), numbers=(0,))
    assert isinstance(twice, UPDPForImageClassification)
    report = report_of(twice)
    assert {site["block"] for site in report.plan["sites"]} <= set(report.blocks)


@pytest.mark.parametrize(
    ("build", "form", "facts"),
    [
        (vit, Form.MERGE, ("ViTForImageClassification", "UPDPForImageClassification", None)),
        (vit, Form.BLOCK_DROP, ("ViTForImageClassification", "ViTForImageClassification", None)),
        (
            timm_vit,
            Form.MERGE,
            ("TimmWrapperForImageClassification", "UPDPForImageClassification", "vit_tiny_patch16_224"),
        ),
    ],
)
def test_classes_and_architecture_are_those_of_the_models(build, form, facts):
    base, merged = build(), pruned(build, form)
    assert model_facts(base, merged) == ModelFacts(*facts)


def test_the_architecture_is_found_in_what_was_pruned_before():
    merged = pruned(timm_vit)
    assert model_facts(merged, merged).timm_architecture == "vit_tiny_patch16_224"


def test_no_architecture_is_made_up():
    assert model_facts(torch.nn.Linear(1, 1), vit()) == ModelFacts("Linear", "ViTForImageClassification")


# beside the weights


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Save a merged model with a report of figures."""
    folder = tmp_path_factory.mktemp("saved")
    pruned(vit).save_pretrained(folder)
    replace(told(vit), metrics_after={"accuracy": 0.5}, weights=digest_of_weights(folder)).save(folder)
    return folder


@pytest.fixture
def folder(template, tmp_path):
    return shutil.copytree(template, tmp_path / "vit-p1")


@pytest.fixture
def warnings_of_report(monkeypatch):
    found = []
    monkeypatch.setattr(module.logger, "warning", found.append)
    return found


def loaded(folder):
    return UPDPForImageClassification.from_pretrained(folder)


def test_the_report_beside_its_weights_is_taken(folder, warnings_of_report):
    model = loaded(folder)
    assert report_in(folder, model) == report_in(str(folder), model) == Report.load(folder)
    assert report_in(folder, model).metrics_after == {"accuracy": 0.5}
    assert warnings_of_report == []


def test_figures_of_other_weights_are_left_out_with_a_warning(folder, warnings_of_report):
    model = loaded(folder)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    model.save_pretrained(folder)
    report = report_in(folder, model)
    assert report.metrics_after == {}
    assert (report.before, report.after) == (told(vit).before, told(vit).after)
    (warning,) = warnings_of_report
    assert "about other weights" in warning


def test_a_report_that_tells_no_weights_is_not_taken(folder, warnings_of_report):
    replace(Report.load(folder), weights=None).save(folder)
    assert report_in(folder, loaded(folder)).metrics_after == {}
    assert len(warnings_of_report) == 1


def test_without_a_report_the_model_tells_without_a_warning(folder, warnings_of_report):
    (folder / "updp_report.json").unlink()
    report = report_in(folder, loaded(folder))
    assert (report.before, report.after) == (told(vit).before, told(vit).after)
    assert report.metrics_after == {}
    assert warnings_of_report == []


def test_what_is_saved_beside_the_weights_is_about_them(folder, warnings_of_report):
    (folder / "updp_report.json").unlink()
    replace(report_in(folder, loaded(folder)), metadata={"tags": ["mine"]}).save(folder)
    assert report_in(folder, loaded(folder)).metadata == {"tags": ["mine"]}
    assert warnings_of_report == []


def test_the_digest_tells_weights_apart_and_nothing_else(tmp_path):
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        vit(seed=seed).save_pretrained(tmp_path / name)
        (tmp_path / name / "README.md").write_text(name, encoding="utf-8")
    one, same, other = (digest_of_weights(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same == digest_of_weights(str(tmp_path / "one"))
    assert one != other
    assert len(one) == 64


def test_a_model_that_is_loaded_and_saved_again_has_the_digest_that_it_had(folder, tmp_path):
    loaded(folder).save_pretrained(tmp_path / "again")
    assert digest_of_weights(tmp_path / "again") == digest_of_weights(folder)


def test_the_digest_is_that_of_all_shards(tmp_path):
    for name in ("one", "other"):
        vit().save_pretrained(tmp_path / name, max_shard_size="20KB")
    shards = sorted((tmp_path / "one").glob("*.safetensors"))
    assert len(shards) > 1
    digest = digest_of_weights(tmp_path / "one")
    assert digest == digest_of_weights(tmp_path / "other")
    shards[-1].write_bytes(shards[-1].read_bytes()[:-1] + b"x")
    assert digest_of_weights(tmp_path / "one") != digest


def test_without_weights_there_is_no_digest(tmp_path):
    assert digest_of_weights(tmp_path) is None
    assert digest_of_weights(tmp_path / "nowhere") is None
