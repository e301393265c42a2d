"""The benchmark of coverage: one small model goes all the way, and the page counts it."""

import pytest

from recipes.benchmarks.coverage.causes import anonymous, cause_of
from recipes.benchmarks.coverage.measuring import measure
from recipes.benchmarks.coverage.row import Row
from recipes.benchmarks.coverage.tables import totals


@pytest.mark.slow
def test_a_model_goes_all_the_way():
    row, stages = Row("transformers/ViTForImageClassification"), []
    measure(row, 0, stages.append)
    assert stages == ["find", "gate", "close", "merge in float64", "merge in float32", "count", "reload"]
    assert row.reloaded
    assert row.closed == row.cheap == 3
    assert row.macs_after < row.macs_before
    assert set(row.merge_errors) == {"float64", "float32"}


def test_totals_count_models_by_library():
    rows = [Row("timm/a", exported=True, sites=2, cheap=1, closed=1, reloaded=True), Row("transformers/B")]
    table = {line.split("|")[1].strip(): line.split("|")[2:4] for line in totals(rows).splitlines()}
    assert [cell.strip() for cell in table["models"]] == ["1", "1"]
    assert [cell.strip() for cell in table["with sites that save compute"]] == ["1", "0"]
    assert [cell.strip() for cell in table["another form saves compute"]] == ["0", "0"]


def test_causes_name_no_model():
    assert anonymous("'stages.0.conv' (Conv2dSame) pads by 3") == "(ConvNdSame) pads by N"
    assert cause_of("looked for two Linears; 'a.b' is called twice; more") == "is called twice"
    assert cause_of("looked for two Linears") == "looked for two Linears"
