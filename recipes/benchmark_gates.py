"""What gates cost while training: step time and memory of a gated net against plain fine-tuning of the same net.

    python recipes/benchmark_gates.py --batch_size 8

A DeiT-S-shaped network with random weights takes training steps (forward, backward, AdamW), in turn with its
gated copies: all FFNs at λ = 0.5, the same with the norms kept, and all FFNs closed. It prints the ratios of the
medians of one run.
"""

import copy
import json
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
    rounds: int = field(default=7, metadata={"help": "Steps that are measured of each network, in turn."})
    depth: int = field(default=12, metadata={"help": "Blocks."})
    hidden_size: int = field(default=384, metadata={"help": "Channels."})
    image_size: int = field(default=224, metadata={"help": "Pixels along each side of an image."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to run."})
    bf16: bool = field(default=False, metadata={"help": "Autocast to bfloat16."})
    output: str = field(default="", metadata={"help": "JSON file for what was measured."})


def variants(plain: nn.Module) -> dict[str, nn.Module]:
    """Return the network and its gated copies."""

    def gated(form: Form, value: float) -> nn.Module:
        model = copy.deepcopy(plain)
        gate_(model, Plan(find_sites(model, [form]).sites))
        for _, gate in gates(model):
            gate.set_lambda_(value)
        return model

    return {
        "plain": plain,
        "gated, λ = 0.5": gated(Form.FFN, 0.5),
        "norm kept, λ = 0.5": gated(Form.FFN_KEEP_NORM, 0.5),
        "gated, λ = 1": gated(Form.FFN, 1.0),
    }


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


def bytes_for_backward(step: Callable[[], None]) -> int:
    """Return the size of the distinct tensors that one step keeps for its backward pass, parameters included."""
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(sizes.values())


def main() -> None:
    (options,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=options.hidden_size,
        num_hidden_layers=options.depth,
        num_attention_heads=options.hidden_size // 64,
        intermediate_size=4 * options.hidden_size,
        image_size=options.image_size,
        num_labels=1000,
    )
    models = variants(ViTForImageClassification(config).to(options.device).train())
    steps = {name: training_step(model, options) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(2 + options.rounds):
        for name, step in steps.items():
            elapsed = seconds(step, options.device)
            if round_ >= 2:
                times[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in times.items()}
    memory = {name: bytes_for_backward(step) for name, step in steps.items()}
    facts = {
        "networks": {name: {"step_seconds": medians[name], "bytes_for_backward": memory[name]} for name in steps},
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
            "time / plain": f"{cost['step_seconds'] / plain['step_seconds']:.2f}×",
            "kept for backward": f"{cost['bytes_for_backward'] / 2**20:.0f} MiB",
            "memory / plain": f"{cost['bytes_for_backward'] / plain['bytes_for_backward']:.2f}×",
        }
        for name, cost in facts["networks"].items()
    }
    return side_by_side(columns)


if __name__ == "__main__":
    main()
