"""What gates cost while training: step time and memory of a gated net against plain fine-tuning of the same net.

    python recipes/benchmark_gates.py --batch_size 8

A DeiT-S-shaped network with random weights takes training steps (forward, backward, AdamW), in turn with its
gated copies: all FFNs at λ = 0.5, the same with the norms kept, and all FFNs closed. It prints the ratios of the
medians of one run.
"""

import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import HfArgumentParser, ViTConfig, ViTForImageClassification

from updp_hf import Form, Plan, find_sites, gate_
from updp_hf.core.gate import gates
from updp_hf.core.plan import library_versions
from updp_hf.report import device_name, side_by_side


@dataclass
class BenchmarkArguments:
    """The network and how often it is measured."""

    batch_size: int = field(default=8, metadata={"help": "Images in a step."})
    rounds: int = field(default=20, metadata={"help": "Steps that are measured of each network, in turn."})
    depth: int = field(default=12, metadata={"help": "Blocks."})
    hidden_size: int = field(default=384, metadata={"help": "Channels."})
    image_size: int = field(default=224, metadata={"help": "Pixels along each side of an image."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to run."})
    bf16: bool = field(default=False, metadata={"help": "Autocast to bfloat16."})
    output: str = field(default="", metadata={"help": "JSON file for what was measured."})


VARIANTS: dict[str, tuple[Form, float] | None] = {
    "plain": None,
    "gated, λ = 0.5": (Form.MERGE, 0.5),
    "norm kept, λ = 0.5": (Form.MERGE_KEEP_NORM, 0.5),
    "gated, λ = 1": (Form.MERGE, 1.0),
}


def build(variant: str, options: BenchmarkArguments) -> nn.Module:
    """Return the network, gated as `variant` says."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=options.hidden_size,
        num_hidden_layers=options.depth,
        num_attention_heads=options.hidden_size // 64,
        intermediate_size=4 * options.hidden_size,
        image_size=options.image_size,
        num_labels=1000,
    )
    model = ViTForImageClassification(config).to(options.device).train()
    gating = VARIANTS[variant]
    if gating is not None:
        form, value = gating
        gate_(model, Plan(find_sites(model, [form]).sites))
        for _, gate in gates(model):
            gate.set_lambda_(value)
    return model


def training_step(model: nn.Module, options: BenchmarkArguments) -> Callable[[], None]:
    """Return a function that takes one training step on random images."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    images = torch.randn(options.batch_size, 3, options.image_size, options.image_size, device=options.device)
    labels = torch.randint(0, 1000, (options.batch_size,), device=options.device)

    def step() -> None:
        with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
            loss = model(pixel_values=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def peak_bytes(variant: str, options: BenchmarkArguments) -> int:
    """Return the peak memory of two training steps: of the device's allocator, on the CPU of a process of their own.

    The process must be started while this one is small: it begins with the peak of the one that starts it.
    """
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        take_two_steps(variant, options)
        return torch.cuda.max_memory_allocated()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(take_two_steps, (variant, options))


def take_two_steps(variant: str, options: BenchmarkArguments) -> int:
    """Take two training steps and return the peak memory of this process in bytes."""
    step = training_step(build(variant, options), options)
    step()
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    (options,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    memory = {variant: peak_bytes(variant, options) for variant in VARIANTS}
    steps = {variant: training_step(build(variant, options), options) for variant in VARIANTS}
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for round_ in range(2 + options.rounds):
        for variant, step in steps.items():
            elapsed = seconds(step, options.device)
            if round_ >= 2:
                times[variant].append(elapsed)
    networks = {
        variant: {
            "step_seconds": statistics.median(times[variant]),
            "time_ratio": statistics.median(t / p for t, p in zip(times[variant], times["plain"], strict=True)),
            "peak_bytes": memory[variant],
        }
        for variant in VARIANTS
    }
    facts = {
        "networks": networks,
        "arguments": {name: value for name, value in asdict(options).items() if name != "output"},
        "device": device_name(torch.device(options.device)),
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
    }
    print(table(facts))
    print(f"\n{facts['device']}, {facts['threads']} threads, {facts['arguments']}, {facts['versions']}")
    if options.output:
        Path(options.output).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def table(facts: dict) -> str:
    """Return the Markdown table of what was measured."""
    plain = facts["networks"]["plain"]
    columns = {
        name: {
            "step, median": f"{1e3 * cost['step_seconds']:.0f} ms",
            "time / plain": f"{cost['time_ratio']:.2f}×",
            "peak memory": f"{cost['peak_bytes'] / 2**20:.0f} MiB",
            "memory / plain": f"{cost['peak_bytes'] / plain['peak_bytes']:.2f}×",
        }
        for name, cost in facts["networks"].items()
    }
    return side_by_side(columns)


if __name__ == "__main__":
    main()
