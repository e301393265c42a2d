"""Checkpoints of full size with random weights, for runs without the Hub: what they learn is of no account.

python -m recipes.benchmarks.gpu.random_checkpoints --folder checkpoints
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextImageProcessor,
    PreTrainedConfig,
    ViTConfig,
    ViTImageProcessor,
    set_seed,
)

from updp_hf.data.made_here.glyphs import CLASSES
from updp_hf.recipe.command_line import parse_arguments

DEIT_SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
CONVNEXT_TINY = {"depths": [3, 3, 9, 3], "hidden_sizes": [96, 192, 384, 768]}
SMALL_VIT = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 96}
SMALL_CONVNEXT = {"depths": [1, 1, 3, 1], "hidden_sizes": [8, 16, 24, 32]}


@dataclass
class CheckpointArguments:
    """Where the checkpoints go, and how large they are."""

    folder: str = field(metadata={"help": "Where `deit_small` and `convnext_tiny` are saved."})
    image_size: int = field(default=224, metadata={"help": "Height and width of an image."})
    small: bool = field(default=False, metadata={"help": "Save tiny networks of the same families."})
    seed: int = field(default=0, metadata={"help": "Of the weights."})


def main() -> None:
    (options,) = parse_arguments(CheckpointArguments)
    set_seed(options.seed)
    size = options.image_size
    labels: dict[str, Any] = {
        "image_size": size,
        "id2label": dict(enumerate(CLASSES)),
        "label2id": {name: index for index, name in enumerate(CLASSES)},
    }
    vit = ViTConfig(**(SMALL_VIT if options.small else DEIT_SMALL), patch_size=min(16, size // 4), **labels)
    # The scale of branches in published weights is far from the 1e-6 from which their training started.
    convnext = ConvNextConfig(
        **(SMALL_CONVNEXT if options.small else CONVNEXT_TINY), layer_scale_init_value=0.1, **labels
    )
    save(vit, ViTImageProcessor(size={"height": size, "width": size}), Path(options.folder) / "deit_small")
    save(
        convnext,
        ConvNextImageProcessor(size={"shortest_edge": size}, crop_pct=1.0),
        Path(options.folder) / "convnext_tiny",
    )


def save(config: PreTrainedConfig, processor: Any, folder: Path) -> None:
    """Save a network with random weights, and what prepares its images."""
    model = AutoModelForImageClassification.from_config(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    print(f"{folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
