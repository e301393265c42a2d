"""What merging buys: latency of nets with more and more sites merged, beside what their MACs promise.

    python recipes/benchmark_latency.py --output model_cards/benchmark_latency.json --compile --onnx
    python recipes/benchmark_latency.py --device cuda --dtype bfloat16 --compile --cuda_graphs --batch_sizes 1 128

The whole tables stand in `recipes/benchmark_latency.md`.

Each timm net gets random weights, so nothing is downloaded. Those of its sites that save MACs are closed in several
numbers ("P6": six of them), spread evenly over the depth, and merged. All versions of one net run in turn and in the
same memory format: a net of convolutions in the one that suits its baseline best, a transformer in the contiguous one.
A CUDA graph replays a forward without launching its kernels one by one; copying the images into it counts as well.

Beside each latency stands the fraction of the roofline: the least time that the version's operators could take at the
peaks of this machine, measured in the same run, divided by the time that it took. `roofline.py` says what is counted.
A merged net whose fraction is less than that of its baseline wastes some of what merging saved.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from conditions import conditions_of, write_json
from latency_modes import COMPILED, EAGER, FORMATS, GRAPHS, ONNX, prepared
from roofline import Peaks, least_seconds, measure_peaks, operators_of
from torch import Tensor, nn

from updp_hf import Plan, close_, find_sites, merge, recalibrate_batch_norms_
from updp_hf.core.cost import count_macs, count_parameters, measure_latency
from updp_hf.core.kinds import DEFAULT_FORM, Form
from updp_hf.core.plan.budget import Demand
from updp_hf.deployment.runtimes import onnx_libraries
from updp_hf.recipe.command_line import parse_arguments
from updp_hf.reporting.report import side_by_side
from updp_hf.selection.selectors import uniform
from updp_hf.surgery.calibrate import calibrated_copy
from updp_hf.surgery.model_io import example_inputs_of

CALIBRATION_IMAGES = 8
TABLE = Path(__file__).with_suffix(".md")


@dataclass
class LatencyArguments:
    """The nets, how much of them is merged, and how they are measured."""

    models: list[str] = field(
        default_factory=lambda: ["resnet34", "mobilenetv2_100", "convnext_tiny", "deit_small_patch16_224"],
        metadata={"help": "Names of timm nets."},
    )
    form: str = field(
        default=DEFAULT_FORM.value,
        metadata={"help": "What closing a site leaves behind.", "choices": [form.value for form in Form]},
    )
    levels: list[int] = field(
        default_factory=list,
        metadata={"help": "Numbers of sites to close, where a net has as many; a quarter, a half, ... by default."},
    )
    batch_sizes: list[int] = field(default_factory=lambda: [1, 16], metadata={"help": "Images in a forward."})
    rounds: int = field(default=15, metadata={"help": "Forwards that are measured of each version, in turn."})
    compile: bool = field(
        default=False, metadata={"help": "Measure with torch.compile too; its isolate_recompiles needs a recent torch."}
    )
    cuda_graphs: bool = field(
        default=False, metadata={"help": "Measure forwards captured in CUDA graphs too, compiled ones with `compile`."}
    )
    onnx: bool = field(default=False, metadata={"help": "Measure with ONNX Runtime too, on the CPU in float32."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "Of all weights."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to run."})
    seed: int = field(default=0, metadata={"help": "Of the random weights."})
    output: str = field(default="", metadata={"help": "JSON file for what was measured."})

    def __post_init__(self) -> None:
        if self.cuda_graphs and torch.device(self.device).type != "cuda":
            raise ValueError(f"`cuda_graphs` is on and the device is {self.device!r}, which has none: set `device`.")
        if self.onnx and (torch.device(self.device).type != "cpu" or self.dtype != "float32"):
            raise ValueError(
                f"`onnx` is on, the device is {self.device!r} and the dtype {self.dtype}, but ONNX Runtime is measured "
                "on the CPU in float32: set `device` to cpu and `dtype` to float32, or leave `onnx` out."
            )

    @property
    def modes(self) -> list[str]:
        """The ways to run a forward."""
        modes = [EAGER, COMPILED] if self.compile else [EAGER]
        graphs = [GRAPHS if mode == EAGER else f"{mode}, {GRAPHS}" for mode in modes if self.cuda_graphs]
        return [*modes, *([ONNX] if self.onnx else []), *graphs]


def main() -> None:
    (options,) = parse_arguments(LatencyArguments)
    torch.backends.cudnn.benchmark = True  # else merged kernels of odd sizes depend on a heuristic
    conditions = conditions_of(options)
    if options.onnx:
        conditions["versions"]["onnxruntime"] = onnx_libraries().onnxruntime.__version__
    peaks = measure_peaks(options.device, getattr(torch, options.dtype))
    networks = {name: measure(name, options, peaks) for name in options.models}
    results = {"networks": networks, "peaks": asdict(peaks), **conditions}
    facts = "; ".join(f"{name}: {value}" for name, value in results.items() if name != "networks")
    text = f"{tables(results)}\n\n{facts}"
    print(text)
    if options.output:
        write_json(results, options.output)
        TABLE.write_text(f"# Latency of merged networks\n\n{text}\n", encoding="utf-8")


def measure(name: str, options: LatencyArguments, peaks: Peaks) -> dict[str, Any]:
    """Return what the versions of one net cost, the least time that takes, and their latencies at each batch size."""
    torch.manual_seed(options.seed)
    baseline = timm.create_model(name).eval()
    randomize_(baseline)
    sites = tuple(site for site in find_sites(baseline, [options.form]).sites if site.saves_compute)
    levels = options.levels or [round(len(sites) * quarter / 4) for quarter in range(1, 5)]
    counts = [level for level in sorted(set(levels)) if 0 < level <= len(sites)]
    spread = {count: uniform(Demand((1.0,) * len(sites), count)) for count in counts}
    plans = {count: Plan(tuple(sites[index] for index in choice)) for count, choice in spread.items()}
    images = [example_inputs_of(baseline, CALIBRATION_IMAGES)]
    versions = {"P0": baseline, **{f"P{level}": merged(baseline, plan, images) for level, plan in plans.items()}}
    example = example_inputs_of(baseline)
    facts: dict[str, dict[str, Any]] = {
        version: {"parameters": count_parameters(model), "macs": count_macs(model, example), "merged_blocks": 0}
        for version, model in versions.items()
    }
    for level, plan in plans.items():
        facts[f"P{level}"]["merged_blocks"] = len(plan.blocks)
    for version, model in versions.items():
        model.to(options.device, getattr(torch, options.dtype))
        facts[version] |= roofline_of(model, options.batch_sizes, peaks)
    return {
        "image": list(next(iter(example.values())).shape[1:]),
        "sites": len(sites),
        "versions": facts,
        "latencies": [latency(versions, mode, size, options) for mode in options.modes for size in options.batch_sizes],
    }


@torch.no_grad()
def randomize_(model: nn.Module) -> None:
    """Give `model` weights under which activations keep their scale, and statistics unlike those of a fresh net."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0, 0.1)
        elif parameter.dim() == 1:  # scales of norms and of branches
            parameter.uniform_(0.5, 1.5)
        elif name.endswith("weight"):
            nn.init.kaiming_normal_(parameter, nonlinearity="linear")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    recalibrate_batch_norms_(model, [example_inputs_of(model, CALIBRATION_IMAGES)])
    for norm in norms:
        norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.7, 1.4)


def merged(baseline: nn.Module, plan: Plan, batches: Sequence[dict[str, Tensor]]) -> nn.Module:
    """Return a copy of `baseline` in which the sites of `plan` are closed and merged, without training."""
    model = calibrated_copy(baseline, plan, batches)
    close_(model)
    return merge(model)


def roofline_of(model: nn.Module, batch_sizes: Iterable[int], peaks: Peaks) -> dict[str, dict[str, float]]:
    """Return the bytes that a forward of `model` moves, and the least seconds that it takes, both by batch size."""
    forwards = {str(size): operators_of(model, example_inputs_of(model, size)) for size in batch_sizes}
    return {
        "bytes": {size: sum(operator.bytes for operator in operators) for size, operators in forwards.items()},
        "bound_seconds": {size: least_seconds(operators, peaks) for size, operators in forwards.items()},
    }


def latency(
    versions: dict[str, nn.Module], mode: str, batch_size: int, options: LatencyArguments
) -> dict[str, int | str | dict[str, float]]:
    """Return the median seconds of one forward of each version, all in the memory format that suits P0 best."""
    images = example_inputs_of(versions["P0"], batch_size)
    baselines: dict[str, float] = {}
    convolutions = sum(isinstance(module, nn.Conv2d) for module in versions["P0"].modules())
    if mode != ONNX and convolutions > 1:  # ONNX Runtime has a layout of its own; one is a patch embedding
        candidates = {name: prepared(copy.deepcopy(versions["P0"]), name, mode, images) for name in FORMATS}
        medians = measure_latency(candidates, [images], rounds=options.rounds)
        baselines = {name: median for name, (median,) in medians.items()}
    best = min(baselines, key=baselines.__getitem__, default="contiguous")
    images = {name: image.contiguous(memory_format=FORMATS[best]) for name, image in images.items()}
    models = {version: prepared(model, best, mode, images) for version, model in versions.items()}
    medians = measure_latency(models, [images], rounds=options.rounds)
    return {
        "mode": mode,
        "batch_size": batch_size,
        "memory_format": best,
        "baseline_by_format": baselines,
        "seconds": {version: median for version, (median,) in medians.items()},
    }


def summary(results: dict[str, Any]) -> str:
    """Return a Markdown table with a column for each net: all of its sites merged, and the fewest that were tried."""
    columns = {}
    for name, network in results["networks"].items():
        _, fewest, *_, whole = network["versions"]
        facts = dict(_costs(network, whole))
        columns[name] = {"all sites merged": whole[1:]}
        columns[name] |= {fact: facts[fact] for fact in ("parameters", "MACs per image", "MACs, P0 / this")}
        for version, runs in ((whole, network["latencies"]), (fewest, network["latencies"][:2])):
            merged = "speed-up" if version == whole else f"{version[1:]} sites merged"
            for run in runs:
                columns[name][f"{merged}, {run['mode']}, batch {run['batch_size']}"] = f"{_speed_up(run, version):.2f}×"
    return side_by_side(columns)


def tables(results: dict[str, Any]) -> str:
    """Return a Markdown table for each net: a column for each version, speed-ups beside the ratio of the MACs."""
    return "\n\n".join(
        f"**{name}**, {'×'.join(map(str, network['image']))}, {network['sites']} sites:\n\n"
        + side_by_side(
            {version: dict([*_costs(network, version), *_times(network, version)]) for version in network["versions"]}
        )
        for name, network in results["networks"].items()
    )


def _costs(network: dict[str, Any], version: str) -> Iterator[tuple[str, str]]:
    cost = network["versions"][version]
    yield "merged blocks", str(cost["merged_blocks"])
    yield "parameters", f"{cost['parameters'] / 1e6:.2f} M"
    yield "MACs per image", f"{cost['macs'] / 1e6:.0f} M"
    yield "MACs, P0 / this", f"{_ratio_of_macs(network, version):.2f}×"


def _times(network: dict[str, Any], version: str) -> Iterator[tuple[str, str]]:
    cost, ratio = network["versions"][version], _ratio_of_macs(network, version)
    for size, moved in cost["bytes"].items():
        yield f"bytes per forward, batch {size}", f"{moved / 1e6:.1f} MB"
        yield f"roofline, batch {size}", f"{1e3 * cost['bound_seconds'][size]:.2f} ms"
    for run in network["latencies"]:
        condition = f"{run['mode']}, batch {run['batch_size']}, {run['memory_format']}"
        seconds, speed_up = run["seconds"][version], _speed_up(run, version)
        yield f"latency, {condition}", f"{1e3 * seconds:.2f} ms"
        yield f"speed-up, {condition} (/ ratio of MACs)", f"{speed_up:.2f}× ({speed_up / ratio:.2f})"
        bound = cost["bound_seconds"][str(run["batch_size"])]
        yield f"fraction of the roofline, {condition}", f"{bound / seconds:.2f}"


def _ratio_of_macs(network: dict[str, Any], version: str) -> float:
    return float(network["versions"]["P0"]["macs"] / network["versions"][version]["macs"])


def _speed_up(run: dict[str, Any], version: str) -> float:
    return float(run["seconds"]["P0"] / run["seconds"][version])


if __name__ == "__main__":
    main()
