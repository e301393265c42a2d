"""Reports with nothing missing, or nothing in them, for the tests of cards and pictures."""

from dataclasses import fields, replace

from tiny_training import last_two, vit

from updp_hf import Plan, Report
from updp_hf.core.kinds import kind_of_form
from updp_hf.core.plan.site import Saving
from updp_hf.reporting.report import (
    Cost,
    HeldOutSet,
    LatencyConditions,
    ModelFacts,
    OnnxFacts,
    SelectionFacts,
    TrainingFacts,
)


def full_report(**changes):
    """Return a report in which nothing is missing and no two numbers are the same."""
    facts = {
        "plan": {**last_two(vit).to_dict(), "base_model": "facebook/deit-tiny", "revision": "0123456789abcdef0123"},
        "before": Cost(61_070_000, 1_234_500_000, {"1": 0.02513, "8": 0.18764}),
        "after": Cost(47_390_000, 901_700_000, {"1": 0.01427, "8": 0.09358}),
        "model": ModelFacts("ViTForImageClassification", "UPDPForImageClassification"),
        "blocks": [f"vit.layers.{index}" for index in range(3)],
        "merge_error": 3e-7,
        "metrics_before": {"accuracy": 0.8312, "f1": 0.7719, "loss": 0.6437},
        "metrics_after": {"accuracy": 0.8145, "f1": 0.7566, "loss": 0.6921},
        "metrics_without_training": {"accuracy": 0.2284},
        "latency_conditions": LatencyConditions(
            "cpu (a kind, 4 cores)", "float32", 3, 17, "median, the models in turn", "eager"
        ),
        "selection": SelectionFacts(
            selector="greedy",
            budget="2 sites",
            candidates=["vit.layers.0 (merge)", "vit.layers.1 (merge)", "vit.layers.2 (merge)"],
            seconds=41.0,
        ),
        "arguments": {"learning_rate": 0.01, "num_pruned_blocks": 2},
        "training": TrainingFacts("cosine", 0.07, 0.59, 120, 2.5, 2, "a GPU", seconds=93.0),
        "history": [
            {"step": 0, "lambda": 0.0, "accuracy": 0.8312, "loss": 0.6437},
            {"step": 120, "lambda": 1.0, "accuracy": 0.8145, "loss": 0.6921},
        ],
        "evaluated_on": HeldOutSet("digits", "someone/digits", "test", 360),
        "metadata": {
            **{"license": "apache-2.0", "datasets": ["imagenet-1k"], "tags": ["vision", "pruned"]},
            "widget": [{"src": "https://example.org/tiger.jpg", "example_title": "Tiger"}],
        },
        "onnx": OnnxFacts(
            18,
            4e-7,
            {"PyTorch eager": {"1": 0.01536, "8": 0.10247}, "ONNX Runtime": {"1": 0.00972, "8": 0.07631}},
            LatencyConditions("cpu (another kind, 6 cores)", threads=5),
        ),
        "seed": 11,
        "weights": "ab" * 32,
        "versions": {"torch": "2.8.0", "timm": "1.0.20"},
    }
    return Report(**{**facts, **changes})


OPTIONAL = {field.name: field for field in fields(Report) if field.name not in ("plan", "before", "after", "versions")}


def without(report, names):
    """Return `report` with the facts `names` missing; `latency` and `sites` are facts of their own."""
    missing = {name: Report(report.plan, report.before, report.after).__dict__[name] for name in names & set(OPTIONAL)}
    if "latency" in names:
        missing |= {when: replace(getattr(report, when), latency=None) for when in ("before", "after")}
    if "sites" in names:
        missing["plan"] = {"sites": []}
    return replace(report, **missing)


def empty_report(**changes):
    return Report({"sites": []}, Cost(10_000, 2_000_000), Cost(5_000, 1_000_000), **changes)


def stock_report():
    names = ModelFacts("ViTForImageClassification", "ViTForImageClassification")
    plan = Plan((site("block-drop", "vit.layers.1", "vit.layers.1", saving=Saving(70, 9)),))
    return full_report(model=names, plan=plan.to_dict(), merge_error=None)


def site(form, block, *slots, **changes):
    return kind_of_form(form)(form, block, slots, **changes)


def timm_report():
    names = ("TimmWrapperForImageClassification", "UPDPForImageClassification", "vit_tiny_patch16_224")
    return full_report(model=ModelFacts(*names))
