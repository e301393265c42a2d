"""What merging buys: latency of nets with more and more sites merged, beside what their MACs promise.

    python -m recipes.benchmarks.latency --output model_cards/benchmark_latency.json --compile --onnx
    python -m recipes.benchmarks.latency --device cuda --dtype bfloat16 --compile --cuda_graphs --batch_sizes 1 128

The tables are written beside the output.

Each timm net gets random weights, so nothing is downloaded. Those of its sites that save MACs are closed in several
numbers ("P6": six of them), spread evenly over the depth, and merged. All versions of one net run in turn and in the
same memory format: a net of convolutions in the one that suits its baseline best, a transformer in the contiguous one.
A CUDA graph replays a forward without launching its kernels one by one; copying the images into it counts as well.

Beside each latency stands the fraction of the roofline: the least time that the version's operators could take at the
peaks of this machine, measured in the same run, divided by the time that it took. `roofline.py` says what is counted.
A merged net whose fraction is less than that of its baseline wastes some of what merging saved.
"""

from dataclasses import asdict
from pathlib import Path

import torch

from recipes.benchmarks.conditions import conditions_of, write_json
from recipes.benchmarks.latency.arguments import LatencyArguments
from recipes.benchmarks.latency.measuring import measure
from recipes.benchmarks.latency.roofline import measure_peaks
from recipes.benchmarks.latency.tables import page, text_of
from updp_hf.deployment.runtimes import onnx_libraries
from updp_hf.recipe.command_line import parse_arguments


def main() -> None:
    (options,) = parse_arguments(LatencyArguments)
    torch.backends.cudnn.benchmark = True  # else merged kernels of odd sizes depend on a heuristic
    conditions = conditions_of(options)
    if options.onnx:
        conditions["versions"]["onnxruntime"] = onnx_libraries().onnxruntime.__version__
    peaks = measure_peaks(options.device, getattr(torch, options.dtype))
    networks = {name: measure(name, options, peaks) for name in options.models}
    results = {"networks": networks, "peaks": asdict(peaks), **conditions}
    print(text_of(results))
    if options.output:
        write_json(results, options.output)
        Path(options.output).with_suffix(".md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
