from pathlib import Path

import pytest

from updp_hf import Report
from updp_hf.reporting.card import PICTURES


@pytest.fixture(autouse=True)
def _blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing in the pictures of a card, which would take longer than training; `reporting/` tests drawing."""

    def leave_blank(report: Report, file: Path) -> None:
        file.touch()

    for name in PICTURES:
        monkeypatch.setitem(PICTURES, name, leave_blank)
