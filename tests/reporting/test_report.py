"""A report survives its file, also one of an earlier release."""

import json
from dataclasses import asdict

import pytest
from project import ROOT
from tiny_training import last_two, vit

from updp_hf import Report
from updp_hf.reporting.report import Cost, LatencyConditions


def test_the_report_survives_its_file(tmp_path):
    report = Report(
        plan=last_two(vit).to_dict(),
        before=Cost(10, 100, {"1": 0.5, "8": 1.5}),
        after=Cost(5, 50),
        merge_error=1e-7,
        metrics_before={"accuracy": 0.75},
        metrics_after={"accuracy": 0.5, "loss": 1.25},
        latency_conditions=LatencyConditions(device="cpu", threads=1),
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


PARTS = ("evaluated_on", "latencies", "latency_conditions", "model", "onnx", "selection", "training")


def test_parts_that_release_0_1_left_empty_are_read_as_not_measured():
    document = {"plan": {}, "before": asdict(Cost(2, 2)), "after": asdict(Cost(1, 1)), **{name: {} for name in PARTS}}
    report = Report.from_dict(document)
    assert [getattr(report, name) for name in PARTS] == [None] * len(PARTS)


def assert_holds(found, expected):
    """Assert that all of a document is in another one, which may have more."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for name, value in expected.items():
            assert_holds(found[name], value)
    else:
        assert found == (None if expected == {} else expected)


@pytest.mark.parametrize("file", sorted(ROOT.glob("model_cards/*/updp_report.json")), ids=lambda file: file.parent.name)
def test_the_reports_of_release_0_1_are_read_whole(file):
    assert_holds(asdict(Report.load(file.parent)), json.loads(file.read_text(encoding="utf-8")))
