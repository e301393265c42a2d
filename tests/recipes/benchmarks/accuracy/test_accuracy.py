"""The benchmark of accuracy: its images and ways are fair, and its tables say what its runs gave."""

import importlib
import json
import sys
from typing import Any

import pytest
import torch
from project import RECIPES
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from updp_hf.core.cost import count_macs


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a file of the recipes by name."""
    monkeypatch.syspath_prepend(RECIPES)
    return importlib.import_module


def record(**runs: float) -> dict[str, Any]:
    """What is left of a baseline at 8 ms with 90 %, UPDP at 6 and 3 ms, dropped blocks at 7, 5 and 4 ms."""
    networks = [("baseline", 0, 0, 8), ("updp", 2, 1, 6), ("updp", 4, 2, 3)]
    networks += [("block drop", 1, 1, 7), ("block drop", 2, 1, 5), ("block drop", 3, 2, 4)]
    entries = [
        {"way": way, "amount": amount, "level": level, "seconds": 1e-3 * ms, "parameters": 1000, "macs": 2000}
        for way, amount, level, ms in networks
    ]
    return {
        "conditions": {"device": "a test"},
        "baseline": {"trained": {"test_accuracy": 0.9}},
        "sizes": {"networks": entries},
        "runs": {key.replace("_", " "): {"test_accuracy": accuracy} for key, accuracy in runs.items()},
    }


def test_dropped_blocks_are_judged_on_the_line_between_the_networks_around_updps_latency(recipes):
    figures = recipes("accuracy_figures")
    found = record(updp_2=0.88, block_drop_1=0.87, block_drop_2=0.81, block_drop_3=0.7)
    assert figures.accuracy_at(found, "updp", 1) == 0.88
    assert figures.accuracy_at(found, "block drop", 1) == pytest.approx(0.84)  # 6 ms is half way from 7 to 5
    assert figures.ahead(found, "block drop") == pytest.approx(0.04)
    found = record(updp_2=0.88, block_drop_1=0.87, block_drop_2=0.86, block_drop_3=0.89)
    assert figures.accuracy_at(found, "block drop", 1) == 0.89  # one that is faster, too, is better than that


def test_no_way_is_worse_than_the_baseline_where_updp_is_slower_than_that(recipes):
    figures = recipes("accuracy_figures")
    found = record(updp_2=0.88, updp_4=0.8, block_drop_1=0.87)
    found["sizes"]["networks"][1]["seconds"] = 8.1e-3
    assert figures.accuracy_at(found, "updp", 1) == figures.accuracy_at(found, "block drop", 1) == 0.9
    found["runs"]["baseline 0"] = {"test_accuracy": 0.92}  # fine-tuned as long as the others
    assert figures.accuracy_at(found, "block drop", 1) == 0.92


def test_what_is_not_reached_or_not_run_is_not_made_up(recipes):
    figures, tables = recipes("accuracy_figures"), recipes("accuracy_tables")
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


def test_what_has_not_been_run_is_missing(recipes):
    missing, ablations = recipes("accuracy_figures").missing, recipes("accuracy_ablations")
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


def test_spreads_are_standard_deviations_over_the_baselines(recipes):
    tables = recipes("accuracy_tables")
    assert tables.spread_of([0.8, 0.9]) == "85.0% ± 7.1"
    assert tables.spread_of([0.01, 0.03], signed=True) == "+2.0 ± 1.4"
    assert tables.spread_of([1.5], form="{:.2f}×") == "1.50×"


def test_tables_and_pictures_are_made_of_what_there_is(recipes, tmp_path):
    (tmp_path / "records").mkdir()
    for seed, accuracy in enumerate((0.86, 0.88)):
        found = record(updp_2=accuracy, updp_4=0.8, block_drop_1=0.85, block_drop_2=0.85)
        (tmp_path / "records" / f"digits-vit-{seed}.json").write_text(json.dumps(found))
    results = recipes("accuracy_figures").gathered(tmp_path / "records")
    recipes("accuracy_tables").write_tables(results, tmp_path / "accuracy.json")
    text = (tmp_path / "accuracy.md").read_text()
    assert "87.0% ± 1.4" in text
    assert "+2.0 ± 1.4" in text  # ahead of dropped blocks at the first level alone
    assert json.loads((tmp_path / "accuracy.json").read_text()) == results
    recipes("accuracy_plot").plot(results, tmp_path, "accuracy")
    assert (tmp_path / "accuracy_digits.png").stat().st_size > 5000


@pytest.mark.parametrize(("aim", "whole"), [(0.37, False), (5, True)])
def test_bisecting_finds_where_a_falling_ratio_is_one(recipes, aim, whole):
    bisected = recipes("accuracy_matching").bisected
    low, high = (0, 12) if whole else (0.0, 0.9)
    found = bisected(lambda place: 1 + aim - place, low, high, whole=whole)
    assert abs(found - aim) <= (0 if whole else 0.9 / 2**5)


def test_a_network_is_trained_with_the_learning_rate_that_was_best_for_the_one_next_to_it(recipes, tmp_path):
    chosen, network = recipes("accuracy_rates"), recipes("accuracy_ways").Network
    others = [network("updp", 4, 1), network("drop", 2, 1), network("drop", 5, 1), network("drop", 7, 2)]
    assert chosen.nearest(network("drop", 4, 1), others) == others[2]
    assert chosen.nearest(network("drop", 4, 3), others) == others[3]
    record = recipes("accuracy_record").Record(tmp_path / "digits-vit-0.json", {})
    for factor, loss in ((1.0, 0.3), (0.3, 0.1)):
        record.do("rates", f"drop 5, {factor}", lambda: {"validation_loss": loss})  # noqa: B023
    with pytest.raises(ValueError, match=r"digits-vit-0\.json has no learning rates for 'drop 5' yet"):
        chosen.best_run(others[2], record)
    record.do("rates", "drop 5, 0.1", lambda: {"validation_loss": 0.2})
    assert chosen.best_run(others[2], record) == {"validation_loss": 0.1}
    record.do("rates", "drop 5, 3.0", lambda: {"validation_loss": 0.05})  # is tried where the highest was best
    assert chosen.best_run(others[2], record) == {"validation_loss": 0.05}


def test_validation_shares_no_digit_with_training_and_each_digit_is_distorted_anew(recipes, monkeypatch):
    images_of = recipes("accuracy_images")
    splits = images_of.load_images("digits", 16, images_of.Budget())
    assert [len(split) for split in splits] == [9776, 1000, 3600]
    copies = splits.validation.labels.view(images_of.DIGITS_COPIES, -1)
    assert (copies == copies[0]).all()  # all copies of the same digits
    found = images_of.digits(seed=0)["train"]
    numbers = images_of.datasets.Dataset.from_dict({"image": found["image"], "label": list(range(len(found)))})
    with monkeypatch.context() as patched:
        patched.setattr(images_of, "digits", lambda seed: {"train": numbers, "test": found})
        told_apart = images_of.load_images("digits", 16, images_of.Budget())
    assert not set(told_apart.train.labels.tolist()) & set(told_apart.validation.labels.tolist())
    images = splits.validation.images.view(images_of.DIGITS_COPIES, -1, 3, 16, 16)
    assert not torch.equal(images[0], images[1])
    again = images_of.load_images("digits", 16, images_of.Budget())
    assert torch.equal(splits.test.images, again.test.images)


@pytest.mark.parametrize(("train", "held_out"), [(40, 30), (300, 20)])
def test_there_are_as_many_glyphs_as_the_budget_says(recipes, monkeypatch, train, held_out):
    images_of = recipes("accuracy_images")
    monkeypatch.setattr(images_of, "VALIDATION", 10)
    splits = images_of.load_images("glyphs", 16, images_of.Budget(train, held_out))
    assert [len(split) for split in splits] == [train, 10, held_out]


def test_glyphs_are_white_on_black_whatever_their_colours(recipes):
    images_of = recipes("accuracy_images")
    colours = torch.tensor([[200, 20, 90], [30, 220, 40]]).view(2, 3, 1, 1)
    pictures = colours.expand(2, 3, 16, 16).clone()
    pictures[:, :, 5:9, 6:8] = torch.tensor([[10, 200, 60], [90, 90, 250]]).view(2, 3, 1, 1)
    inked = images_of._inked(images_of.Images(pictures.byte(), torch.tensor([3, 4])))
    expected = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    expected[:, :, 5:9, 6:8] = 255
    assert torch.equal(inked.images, expected)
    assert inked.labels.tolist() == [3, 4]


def vit() -> TimmWrapperForImageClassification:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=sizes, num_labels=5, image_size=16)
    )


def resnet() -> TimmWrapperForImageClassification:
    sizes = {"layers": (1, 1, 1, 1), "channels": (8, 16, 16, 16)}
    return TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture="resnet18", model_args=sizes, num_labels=5, image_size=16)
    )


@pytest.mark.parametrize("build", [vit, resnet])
def test_torch_pruning_leaves_a_narrower_network_that_runs(recipes, build):
    pytest.importorskip("torch_pruning")
    model, images = build().eval(), {"pixel_values": torch.randn(3, 3, 16, 16)}
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    pruned = recipes("accuracy_ways").thinned(model, 0.5)
    assert pruned(**images).logits.shape == (3, 5)
    assert count_macs(pruned, images) < 0.6 * count_macs(model, images)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_and_leaves_every_table(recipes, tmp_path, monkeypatch):
    pytest.importorskip("torch_pruning")
    benchmark, ablations = recipes("benchmark_accuracy"), recipes("accuracy_ablations")
    monkeypatch.setitem(ablations.ABLATED, "resnet", 2)
    changed = {"blocks of a supernet", "soft distillation", "checkpoint's weights"}
    for name in set(ablations.ABLATIONS) - changed:
        monkeypatch.delitem(ablations.ABLATIONS, name)
    command = ["benchmark_accuracy", "--quick", "--families", "resnet", "--seeds", "0"]
    command += ["--folder", str(tmp_path / "runs"), "--output", str(tmp_path / "accuracy.json")]
    monkeypatch.setattr(sys, "argv", command)
    benchmark.main()
    (file,) = (tmp_path / "runs-quick").glob("*.json")
    first = json.loads(file.read_text())
    ways = {key.rsplit(" ", 1)[0] for key in first["runs"]}
    assert ways == {"baseline", "updp", "paper", "abrupt", "block drop", "torch-pruning", "smaller"}
    assert set(first["ablations"]) == set(first["ablated"]["speed-ups"]) == changed
    assert set(first["runtimes"]) == {"eager", "compiled", "ONNX Runtime"}
    assert {"baseline", "updp 12", "torch-pruning"} <= {name.rsplit(" 0.")[0] for name in first["runtimes"]["eager"]}
    benchmark.main()
    assert json.loads(file.read_text()) == first
    assert "Torch-Pruning" in (tmp_path / "accuracy.md").read_text()
