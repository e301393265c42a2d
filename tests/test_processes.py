"""One process does all of the work, and several share it: the latter is tested where two are started."""

from types import SimpleNamespace

import pytest

from updp_hf.processes import on_main_process, split_over_processes


@pytest.mark.parametrize("processes", [None, SimpleNamespace(num_processes=1)])
def test_one_process_does_all_and_agrees_with_itself(processes):
    assert split_over_processes(lambda choice: float(sum(choice)), processes)([(1,), (2, 3), ()]) == [1.0, 5.0, 0.0]
    assert split_over_processes(len, processes)([]) == []
    assert on_main_process(lambda: "plan", processes) == "plan"


def test_an_error_is_raised_as_it_is():
    with pytest.raises(ZeroDivisionError):
        on_main_process(lambda: 1 / 0)
