"""What a model costs: parameters, multiply-accumulates, latency."""

import copy
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from updp_hf.core.gates.contexts import evaluation

__all__ = [
    "LatencyTable",
    "count_macs",
    "count_parameters",
    "forward_seconds",
    "macs_by_module",
    "measure_latency",
]


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Return the multiply-accumulates of one forward, the attention products included."""
    return macs_by_module(model, inputs)[""]


def macs_by_module(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the multiply-accumulates of one forward by the path of the module, "" for the whole model."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation for a whole attention, of which nothing is counted
    try:
        with evaluation(model), _frozen(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    root = type(model).__name__
    counts = counter.get_flop_counts()
    by_path = {
        name.removeprefix(root).removeprefix("."): sum(by_operation.values()) // 2
        for name, by_operation in counts.items()
        if name == root or name.startswith(f"{root}.")
    }
    return {**by_path, "": counter.get_total_flops() // 2}


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Count both products of an attention, of operands (batch, heads, positions, channels)."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


if (_fused := torch.ops.aten._scaled_dot_product_flash_attention_for_cpu) not in flop_registry:
    register_flop_formula(_fused)(_attention_flops)  # which torch 2.14 takes for free


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter require gradients: the counter would follow one that is handed to a module, and fail."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def forward_seconds(model: nn.Module, batch: Mapping[str, Tensor]) -> float:
    """Return how long one forward takes: the clock of all latencies of this package."""
    device = next(iter(batch.values())).device
    on_accelerator = device.type != "cpu"
    if on_accelerator:
        torch.accelerator.synchronize(device)
    begin = time.perf_counter()
    model(**batch)
    if on_accelerator:
        torch.accelerator.synchronize(device)
    return time.perf_counter() - begin


def measure_latency(
    models: Mapping[str, nn.Module],
    inputs: Sequence[Mapping[str, Tensor]],
    *,
    rounds: int = 15,
    warm_up: int = 3,
) -> dict[str, list[float]]:
    """Return the median latency in seconds of one forward, for each model and each of `inputs`.

    The models run in turn within every round, so that a machine that changes its speed changes it for all of them.
    """
    times: dict[str, list[list[float]]] = {name: [[] for _ in inputs] for name in models}
    with torch.inference_mode():
        for index, batch in enumerate(inputs):
            for round_ in range(warm_up + rounds):
                for name, model in models.items():
                    seconds = forward_seconds(model, batch)
                    if round_ >= warm_up:
                        times[name][index].append(seconds)
    return {name: [statistics.median(seconds) for seconds in by_input] for name, by_input in times.items()}


@dataclass
class LatencyTable:
    """What modules take on the present device: median seconds of one forward, each shape of each kind measured once."""

    batch_size: int = 1
    rounds: int = 15
    seconds: dict[str, float] = field(default_factory=dict)

    def of(self, module: nn.Module, shape: Sequence[int]) -> float:
        """Return the latency of `module`, of one tensor of `shape` with its batch axis replaced, in evaluation mode."""
        like = next(module.parameters())
        shape = (self.batch_size, *shape[1:])
        kinds = "; ".join(repr(part).replace("\n", "") for part in module.modules() if not list(part.children()))
        key = f"{kinds} at {shape}, {str(like.dtype).removeprefix('torch.')}, {like.device.type}"
        if key not in self.seconds:
            x = torch.zeros(shape, dtype=like.dtype, device=like.device)
            timed = {"": copy.deepcopy(module).eval()}
            self.seconds[key] = measure_latency(timed, [{"input": x}], rounds=self.rounds)[""][0]
        return self.seconds[key]
