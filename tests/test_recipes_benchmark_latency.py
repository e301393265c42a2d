"""What the benchmark of merged networks measures, as far as that can be seen without a GPU."""

import importlib
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "recipes")
    return importlib.import_module("benchmark_latency")


def results(modes: list[str]) -> dict[str, Any]:
    """What a run leaves of one network with three versions, each twice as fast as the one before."""
    versions = {f"P{level}": {"parameters": 10, "macs": 8 - level, "merged_blocks": level} for level in (0, 2, 4)}
    runs = [
        {
            "mode": mode,
            "batch_size": size,
            "memory_format": "contiguous",
            "baseline_by_format": {},
            "seconds": {"P0": 4.0, "P2": 2.0, "P4": 1.0},
        }
        for mode in modes
        for size in (1, 128)
    ]
    return {"networks": {"net": {"image": [3, 8, 8], "sites": 4, "versions": versions, "latencies": runs}}}


def test_cuda_graphs_are_refused_without_a_gpu(benchmark: Any) -> None:
    with pytest.raises(ValueError, match="`cuda_graphs` is on and the device is 'cpu'"):
        benchmark.LatencyArguments(cuda_graphs=True, device="cpu")


def test_each_way_of_running_is_captured_if_graphs_are_asked_for(benchmark: Any) -> None:
    def modes(**options: bool) -> list[str]:
        return benchmark.LatencyArguments(device="cuda", **options).modes

    assert modes() == ["eager"]
    assert modes(compile=True) == ["eager", "compiled"]
    assert modes(cuda_graphs=True) == ["eager", "CUDA graphs"]
    assert modes(compile=True, cuda_graphs=True) == ["eager", "compiled", "CUDA graphs", "compiled, CUDA graphs"]


def test_every_mode_has_its_rows_in_the_tables(benchmark: Any) -> None:
    modes = benchmark.LatencyArguments(device="cuda", compile=True, cuda_graphs=True).modes

    summary, tables = benchmark.summary(results(modes)), benchmark.tables(results(modes))

    for mode in modes:
        assert f"| speed-up, {mode}, batch 128 " in summary
        assert f"| latency, {mode}, batch 1, contiguous " in tables
