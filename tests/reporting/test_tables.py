"""Facts side by side."""

from updp_hf.reporting.report import Cost
from updp_hf.reporting.tables import side_by_side


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
