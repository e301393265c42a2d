"""What takes most of the time of a tiny training, and is tested elsewhere, is left out here."""

import gc
from collections.abc import Mapping
from pathlib import Path

import pytest
from torch import Tensor, nn

from updp_hf import Report
from updp_hf.reporting.card import PICTURES


@pytest.fixture(autouse=True)
def _frozen_garbage() -> None:
    """Let the collections that end each training pass over what tests and libraries hold."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing in the pictures of a card."""

    def leave_blank(report: Report, file: Path) -> None:
        file.touch()

    for name in PICTURES:
        monkeypatch.setitem(PICTURES, name, leave_blank)


@pytest.fixture(autouse=True)
def _no_stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every forward take a millisecond, without running dozens to tell."""

    def forward_seconds(model: nn.Module, batch: Mapping[str, Tensor]) -> float:
        return 1e-3

    monkeypatch.setattr("updp_hf.core.cost.forward_seconds", forward_seconds)
