"""Which variants of a test run by default, and which in the slow ring."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pytest

__all__ = ["slow_but", "slow_if"]


def slow_but(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Return parameters of a test of which all but some are for the slow ring."""
    slow = pytest.mark.slow
    return [
        value if value in quick else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=slow)
        for value in values
    ]


def slow_if(cases: Mapping[str, Any], slow: Collection[str]) -> list[Any]:
    """Return the cases as parameters by their names, those in `slow` for the slow ring."""
    assert set(slow) <= set(cases)
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), id=name, marks=[pytest.mark.slow] * (name in slow)
        )
        for name, case in cases.items()
    ]
