"""How the benchmark of accuracy brings networks to one latency, and which learning rates they get."""

import pytest

from recipes.benchmarks.accuracy import matching, rates, ways
from recipes.benchmarks.accuracy.record import Record


@pytest.mark.parametrize(("aim", "whole"), [(0.37, False), (5, True)])
def test_bisecting_finds_where_a_falling_ratio_is_one(aim, whole):
    low, high = (0, 12) if whole else (0.0, 0.9)
    found = matching.bisected(lambda place: 1 + aim - place, low, high, whole=whole)
    assert abs(found - aim) <= (0 if whole else 0.9 / 2**5)


def test_a_network_is_trained_with_the_learning_rate_that_was_best_for_the_one_next_to_it(tmp_path):
    network = ways.Network
    others = [network("updp", 4, 1), network("drop", 2, 1), network("drop", 5, 1), network("drop", 7, 2)]
    assert rates.nearest(network("drop", 4, 1), others) == others[2]
    assert rates.nearest(network("drop", 4, 3), others) == others[3]
    record = Record(tmp_path / "digits-vit-0.json", {})
    for factor, loss in ((1.0, 0.3), (0.3, 0.1)):
        record.do("rates", f"drop 5, {factor}", lambda: {"validation_loss": loss})  # noqa: B023
    with pytest.raises(ValueError, match=r"digits-vit-0\.json has no learning rates for 'drop 5' yet"):
        rates.best_run(others[2], record)
    record.do("rates", "drop 5, 0.1", lambda: {"validation_loss": 0.2})
    assert rates.best_run(others[2], record) == {"validation_loss": 0.1}
    record.do("rates", "drop 5, 3.0", lambda: {"validation_loss": 0.05})  # is tried where the highest was best
    assert rates.best_run(others[2], record) == {"validation_loss": 0.05}
