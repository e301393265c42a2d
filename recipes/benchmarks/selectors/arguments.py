"""What the benchmark of selectors tries."""

from dataclasses import dataclass, field
from typing import Any

import torch

from recipes.benchmarks.selectors.images import COPIES, NOISE, SAMPLE, TEST_COPIES
from recipes.benchmarks.selectors.networks import NETS, SUPERNETS
from updp_hf.core.plan.plan import library_versions
from updp_hf.reporting.measure import device_name


@dataclass
class SelectorArguments:
    """The network, and how much is tried."""

    model: str = field(default="vit", metadata={"help": "The network.", "choices": list(NETS)})
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "Of the baselines: one for each."})
    repeated: int = field(
        default=3, metadata={"help": "Random plans that are fine-tuned as often as those that selectors chose."}
    )
    supernets: list[str] = field(
        default_factory=lambda: ["supernet"], metadata={"help": "Supernets to train.", "choices": list(SUPERNETS)}
    )
    folder: str = field(default="output/selectors", metadata={"help": "Where the baselines are kept."})
    output: str = field(default="model_cards/benchmark_selectors.json", metadata={"help": "JSON file for the results."})


def conditions(options: SelectorArguments) -> dict[str, Any]:
    """Return under what conditions a network is measured; results of others are not mixed with them."""
    return {
        **NETS[options.model]._asdict(),
        "repeated": options.repeated,
        "images": {"sample": SAMPLE, "copies": COPIES, "test_copies": TEST_COPIES, "noise": NOISE},
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "versions": library_versions(),
    }
