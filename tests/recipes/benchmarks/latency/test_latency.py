"""What the benchmark of merged networks measures, as far as that can be seen without a GPU."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

from recipes.benchmarks.latency import measuring
from recipes.benchmarks.latency.arguments import LatencyArguments
from recipes.benchmarks.latency.modes import FORMATS, prepared
from recipes.benchmarks.latency.networks import merged, randomize_
from recipes.benchmarks.latency.roofline import Peaks
from recipes.benchmarks.latency.tables import summary, tables
from updp_hf import Plan, find_sites
from updp_hf.surgery.model_io import example_inputs_of


def results(modes: list[str]) -> dict[str, Any]:
    """What a run leaves of one network with three versions, each twice as fast as the one before."""
    costs = {"parameters": 10, "bytes": {"1": 10**6, "128": 10**8}, "bound_seconds": {"1": 0.25, "128": 0.5}}
    versions = {f"P{level}": {**costs, "macs": 8 - level, "merged_blocks": level} for level in (0, 2, 4)}
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


def test_cuda_graphs_are_refused_without_a_gpu() -> None:
    with pytest.raises(ValueError, match="`cuda_graphs` is on and the device is 'cpu'"):
        LatencyArguments(cuda_graphs=True, device="cpu")


def test_each_way_of_running_is_captured_if_graphs_are_asked_for() -> None:
    def modes(**options: bool) -> list[str]:
        return LatencyArguments(device="cuda", **options).modes

    assert modes() == ["eager"]
    assert modes(compile=True) == ["eager", "compiled"]
    assert modes(cuda_graphs=True) == ["eager", "CUDA graphs"]
    assert modes(compile=True, cuda_graphs=True) == ["eager", "compiled", "CUDA graphs", "compiled, CUDA graphs"]


@pytest.mark.parametrize("options", [{"device": "cuda"}, {"device": "cpu", "dtype": "bfloat16"}], ids=str)
def test_onnx_runtime_is_refused_where_it_is_not_measured(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"`onnx` is on, the device is '.*' and the dtype .*: set `device` to cpu"):
        LatencyArguments(onnx=True, **options)


def test_onnx_runtime_comes_after_torch() -> None:
    options = LatencyArguments(onnx=True, compile=True, device="cpu")
    assert options.modes == ["eager", "compiled", "ONNX Runtime"]


def test_every_mode_has_its_rows_in_the_tables() -> None:
    modes = LatencyArguments(device="cuda", compile=True, cuda_graphs=True).modes

    short, long = summary(results(modes)), tables(results(modes))

    for mode in modes:
        assert f"| speed-up, {mode}, batch 128 " in short
        assert f"| latency, {mode}, batch 1, contiguous " in long


def test_the_tables_say_how_far_each_version_is_from_the_roofline() -> None:
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in tables(results(["eager"])).splitlines()]
    assert ["bytes per forward, batch 1", "1.0 MB", "1.0 MB", "1.0 MB"] in rows
    assert ["roofline, batch 128", "500.00 ms", "500.00 ms", "500.00 ms"] in rows
    assert ["fraction of the roofline, eager, batch 1, contiguous", "0.06", "0.12", "0.25"] in rows
    assert ["fraction of the roofline, eager, batch 128, contiguous", "0.12", "0.25", "0.50"] in rows


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever net of timm is asked for, it has two blocks for images of 32×32."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name: create(name, img_size=32, depth=2))


@pytest.mark.slow
def test_onnx_runtime_computes_what_the_merged_net_does(tiny: None) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = timm.create_model("vit_tiny_patch16_224").eval()
    randomize_(model)
    plan = Plan(find_sites(model, ["merge"]).sites[:1])
    net = merged(model, plan, [example_inputs_of(model, 8)])
    session = prepared(net, "contiguous", "ONNX Runtime", {})
    for size in (1, 3):
        images = torch.randn(size, 3, 32, 32)
        with torch.no_grad():
            expected, before = net(images), model(images)
        torch.testing.assert_close(session(x=images), expected, rtol=1e-4, atol=1e-3)
        assert (session(x=images) - before).abs().max() > 0.1


def test_each_version_is_counted_and_measured_at_each_batch_size(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def as_it_is(model: nn.Module, memory_format: str, mode: str, images: dict[str, Any]) -> nn.Module:
        modes.append((mode, memory_format))
        return model

    monkeypatch.setattr(measuring, "prepared", as_it_is)
    options = LatencyArguments(levels=[1, 2], batch_sizes=[1, 4], rounds=1, onnx=True, device="cpu")
    moves = Peaks(macs_per_second=1e30, bytes_per_second=1e6)
    found = measuring.measure("vit_tiny_patch16_224", options, moves)

    versions = found["versions"]
    assert list(versions) == ["P0", "P1", "P2"]
    for version in versions.values():
        assert version["bytes"]["1"] < version["bytes"]["4"] < 4 * version["bytes"]["1"]  # weights are read once
        assert version["bound_seconds"] == pytest.approx({size: n / 1e6 for size, n in version["bytes"].items()})
    assert versions["P0"]["bytes"]["1"] > versions["P1"]["bytes"]["1"] > versions["P2"]["bytes"]["1"]
    runs = [(run["mode"], run["batch_size"], list(run["seconds"])) for run in found["latencies"]]
    assert runs == [(mode, size, ["P0", "P1", "P2"]) for mode in ("eager", "ONNX Runtime") for size in (1, 4)]
    assert set(modes) == {("eager", "contiguous"), ("ONNX Runtime", "contiguous")}


def test_no_memory_format_is_tried_for_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "prepared", lambda model, memory_format, mode, images: model)
    monkeypatch.setattr(measuring, "example_inputs_of", lambda model, size: {"input": torch.zeros(size, 3, 8, 8)})
    options = LatencyArguments(rounds=1, onnx=True, device="cpu")
    versions = {"P0": nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).eval()}
    assert list(measuring.latency(versions, "eager", 1, options)["baseline_by_format"]) == list(FORMATS)
    found = measuring.latency(versions, "ONNX Runtime", 1, options)
    assert (found["baseline_by_format"], found["memory_format"]) == ({}, "contiguous")
