"""What the records of the benchmark of accuracy are taken to say."""

import pytest
from accuracy_records import record

from recipes.benchmarks.accuracy import ablations, figures, tables


def test_dropped_blocks_are_judged_on_the_line_between_the_networks_around_updps_latency():
    found = record(updp_2=0.88, block_drop_1=0.87, block_drop_2=0.81, block_drop_3=0.7)
    assert figures.accuracy_at(found, "updp", 1) == 0.88
    assert figures.accuracy_at(found, "block drop", 1) == pytest.approx(0.84)  # 6 ms is half way from 7 to 5
    assert figures.ahead(found, "block drop") == pytest.approx(0.04)
    found = record(updp_2=0.88, block_drop_1=0.87, block_drop_2=0.86, block_drop_3=0.89)
    assert figures.accuracy_at(found, "block drop", 1) == 0.89  # one that is faster, too, is better than that


def test_no_way_is_worse_than_the_baseline_where_updp_is_slower_than_that():
    found = record(updp_2=0.88, updp_4=0.8, block_drop_1=0.87)
    found["sizes"]["networks"][1]["seconds"] = 8.1e-3
    assert figures.accuracy_at(found, "updp", 1) == figures.accuracy_at(found, "block drop", 1) == 0.9
    found["runs"]["baseline 0"] = {"test_accuracy": 0.92}  # fine-tuned as long as the others
    assert figures.accuracy_at(found, "block drop", 1) == 0.92


def test_what_is_not_reached_or_not_run_is_not_made_up():
    found = record(updp_2=0.88, updp_4=0.8, block_drop_3=0.7)
    assert figures.accuracy_at(found, "block drop", 2) is None  # none is as fast as 3 ms
    assert figures.accuracy_at(found, "torch-pruning", 1) is None
    assert figures.ahead(found, "torch-pruning") is None
    found["sizes"]["networks"][1]["seconds"] = 7.9e-3
    assert figures.accuracy_at(found, "torch-pruning", 1) is None  # though the baseline is nearly as fast as UPDP
    found = record(updp_2=0.88, torch_pruning_1=0.8)
    found["sizes"]["networks"].append({"way": "torch pruning", "amount": 1, "level": 1, "seconds": 6.4e-3})
    assert figures.accuracy_at(found, "torch pruning", 1) is None  # it takes 7 % longer than UPDP
    found["sizes"]["networks"][-1]["seconds"] = 6.2e-3
    assert figures.accuracy_at(found, "torch pruning", 1) == 0.8  # 3 % are within what can be measured
    assert tables.spread_of([None, None]) == "–"
    assert tables.spread_of([0.5, None]) == "50.0% (1 of 2)"


def test_what_has_not_been_run_is_missing():
    missing = figures.missing
    modes = dict.fromkeys(("eager", "compiled", "ONNX Runtime"), 1)

    def whole(family):
        level = ablations.ABLATED.get(family)
        names = dict.fromkeys(ablations.ablations_of(level), 1) if level else {}
        runs = {"runs": {"x": 1}, "ablations": names}
        return {"0": {**runs, "runtimes": modes}, "1": runs, "2": {"runs": {"x": 1}}}

    every = {family: whole(family) for family in ("vit", "convnext", "mobilenetv2", "resnet")}
    assert missing(every) == []
    assert missing({**every, "resnet": {"0": {}}}) == ["resnet"]
    assert missing({name: seeds for name, seeds in every.items() if name != "resnet"}) == ["resnet"]
    every["vit"]["1"]["ablations"].popitem()
    assert missing(every) == ["ablations"]
    every["resnet"]["0"]["runtimes"] = {"eager": 1}
    assert missing(every) == ["ablations", "other runtimes"]
