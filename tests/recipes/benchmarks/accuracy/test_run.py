"""The benchmark of accuracy from end to end."""

import json
import sys

import pytest

from recipes.benchmarks.accuracy import ablations
from recipes.benchmarks.accuracy.__main__ import main


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_and_leaves_every_table(tmp_path, monkeypatch):
    pytest.importorskip("torch_pruning")

    monkeypatch.setitem(ablations.ABLATED, "resnet", 2)
    changed = {"blocks of a supernet", "soft distillation", "checkpoint's weights"}
    for name in set(ablations.ABLATIONS) - changed:
        monkeypatch.delitem(ablations.ABLATIONS, name)
    command = ["benchmark_accuracy", "--quick", "--families", "resnet", "--seeds", "0"]
    command += ["--folder", str(tmp_path / "runs"), "--output", str(tmp_path / "accuracy.json")]
    monkeypatch.setattr(sys, "argv", command)
    main()
    (file,) = (tmp_path / "runs-quick").glob("*.json")
    first = json.loads(file.read_text())
    ways = {key.rsplit(" ", 1)[0] for key in first["runs"]}
    assert ways == {"baseline", "updp", "paper", "abrupt", "block drop", "torch-pruning", "smaller"}
    assert set(first["ablations"]) == set(first["ablated"]["speed-ups"]) == changed
    assert set(first["runtimes"]) == {"eager", "compiled", "ONNX Runtime"}
    assert {"baseline", "updp 12", "torch-pruning"} <= {name.rsplit(" 0.")[0] for name in first["runtimes"]["eager"]}
    main()
    assert json.loads(file.read_text()) == first
    assert "Torch-Pruning" in (tmp_path / "accuracy.md").read_text()
