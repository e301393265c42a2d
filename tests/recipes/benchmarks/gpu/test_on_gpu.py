"""The script for one GPU: what it makes of logs, and, on the processor, whether it works at all."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from project import RECIPES

from recipes.benchmarks.gpu import step_rates

SCRIPT = RECIPES / "benchmarks" / "gpu" / "on_gpu.sh"

LOG = """\
10.000000 Pruning, to be saved in a folder.
11.000000 {'loss': '3.5', 'loss_open': '3.9', 'loss_closed': '3.5', 'epoch': '0.1'}
13.000000 {'loss': '3.4', 'loss_open': '3.9', 'loss_closed': '3.4', 'epoch': '0.2'}
14.000000 {'loss': '3.4', 'lambda': '0', 'epoch': '0.1'}
15.000000 {'loss': '3.4', 'lambda': '0.5', 'epoch': '0.2'}
16.000000 {'eval_loss': '3.4', 'epoch': '0.2'}
19.000000 {'loss': '3.4', 'lambda': '0.7', 'epoch': '0.3'}
29.000000 {'loss': '3.4', 'lambda': '1', 'epoch': '0.4'}
29.500000 {'loss': '3.4', 'lambda': '1', 'epoch': '0.5'}
33.500000 {'loss': '3.4', 'lambda': '1', 'epoch': '0.6'}
34.000000 {'loss': '3.4', 'lambda': '1', 'epoch': '0.7'}
35.000000 {'train_runtime': '20.1', 'train_loss': '3.4'}
"""


def test_rates_are_medians_between_logs_of_one_phase_without_an_evaluation_between() -> None:
    _, _, *rows = step_rates.table(LOG.splitlines(), logging_steps=10).splitlines()
    assert rows == ["| supernet | 5.00 |", "| ramp | 10.00 |", "| closed | 20.00 |"]


def test_an_unknown_step_is_refused(tmp_path: Path) -> None:
    run = subprocess.run([SCRIPT, tmp_path, "sleep"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "There is no step 'sleep', expected some of: checkpoints deit_small convnext_tiny" in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("step", ["deit_small", "latency"])
def test_a_step_can_be_run_alone(tmp_path: Path, step: str) -> None:
    subprocess.run([SCRIPT, tmp_path, step], env={**os.environ, "DRY": "1"}, check=True)
    results = tmp_path / "results"
    if step == "latency":
        assert json.loads((results / "benchmark_latency_gpu.json").read_text(encoding="utf-8"))["networks"]
        assert "mobilenetv2_100" in (results / "benchmark_latency_gpu.md").read_text(encoding="utf-8")
    else:
        report = json.loads((results / step / "updp_report.json").read_text(encoding="utf-8"))
        assert report["metrics_after"]["accuracy"] >= 0.0
        assert report["training"]["steps_done"] == report["training"]["steps"]
