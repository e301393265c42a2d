"""Work that several processes share: one does it and tells the others, or each does a part."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

__all__ = ["on_main_process", "split_over_processes"]

A = TypeVar("A")
T = TypeVar("T")


def on_main_process(function: Callable[[], T], processes: PartialState | None = None) -> T:
    """Call `function` on the main process alone, and return its result, or raise its error, on all of them.

    Args:
        function: what it returns can be pickled.
        processes: those that run; None is this process alone.
    """
    if processes is None or processes.num_processes == 1:
        return function()
    told: Any = None
    if processes.is_main_process:
        try:
            told = function()
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            told = error  # else the others would wait for ever
    (told,) = broadcast_object_list([told])
    if isinstance(told, Exception):
        raise told
    return told


def split_over_processes(
    function: Callable[[A], T], processes: PartialState | None = None
) -> Callable[[Sequence[A]], list[T]]:
    """Return the function that calls `function` for each of several values, each process for its share of them.

    Every value is computed whole by one process, so the results do not depend on the number of processes.

    Args:
        function: from one value to its result, which can be pickled.
        processes: those that run; None is this process alone.
    """
    if processes is None or processes.num_processes == 1:
        return lambda values: [function(value) for value in values]

    def for_all(values: Sequence[A]) -> list[T]:
        count, rank = processes.num_processes, processes.process_index
        mine = [(index, function(values[index])) for index in range(rank, len(values), count)]
        results = dict(gather_object(mine))
        return [results[index] for index in range(len(values))]

    return for_all
