"""The tables and pictures of the benchmark of accuracy."""

import json

from accuracy_records import record

from recipes.benchmarks.accuracy import figures, plot, tables


def test_spreads_are_standard_deviations_over_the_baselines():
    assert tables.spread_of([0.8, 0.9]) == "85.0% ± 7.1"
    assert tables.spread_of([0.01, 0.03], signed=True) == "+2.0 ± 1.4"
    assert tables.spread_of([1.5], form="{:.2f}×") == "1.50×"


def test_tables_and_pictures_are_made_of_what_there_is(tmp_path):
    (tmp_path / "records").mkdir()
    for seed, accuracy in enumerate((0.86, 0.88)):
        found = record(updp_2=accuracy, updp_4=0.8, block_drop_1=0.85, block_drop_2=0.85)
        (tmp_path / "records" / f"digits-vit-{seed}.json").write_text(json.dumps(found))
    results = figures.gathered(tmp_path / "records")
    tables.write_tables(results, tmp_path / "accuracy.json")
    text = (tmp_path / "accuracy.md").read_text()
    assert "87.0% ± 1.4" in text
    assert "+2.0 ± 1.4" in text  # ahead of dropped blocks at the first level alone
    assert json.loads((tmp_path / "accuracy.json").read_text()) == results
    plot.plot(results, tmp_path, "accuracy")
    assert (tmp_path / "accuracy_digits.png").stat().st_size > 5000
