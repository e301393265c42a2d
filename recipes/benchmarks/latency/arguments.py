"""What the benchmark of latency measures, and how."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from recipes.benchmarks.latency.modes import COMPILED, EAGER, GRAPHS, ONNX
from updp_hf.core.kinds import DEFAULT_FORM, Form


@dataclass
class LatencyArguments:
    """The nets, how much of them is merged, and how they are measured."""

    models: list[str] = field(
        default_factory=lambda: ["resnet34", "mobilenetv2_100", "convnext_tiny", "deit_small_patch16_224"],
        metadata={"help": "Names of timm nets."},
    )
    form: str = field(
        default=DEFAULT_FORM,
        metadata={"help": "What closing a site leaves behind.", "choices": list(map(str, Form))},
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
