"""The networks of the benchmark of selectors, and their supernets."""

from typing import Any, NamedTuple


class Net(NamedTuple):
    """A network of the digits recipe, smaller and deeper or on smaller images, and how it is treated."""

    changes: dict[str, Any]
    num_pruned_blocks: int
    baseline_epochs: int
    epochs: int  # of fine-tuning a plan
    plans: int  # random ones that are fine-tuned for each baseline


NETS = {
    "vit": Net(
        {"num_hidden_layers": 12, "hidden_size": 48, "intermediate_size": 192, "initializer_range": 0.1}, 4, 30, 2, 40
    ),
    "mobilenetv2": Net({"image_size": 32}, 6, 15, 2, 30),
}
SUPERNETS = {
    "supernet": {"supernet_fraction": 1 / 2},
    "supernet, distilled": {"supernet_fraction": 1 / 2, "distillation": "soft"},
    "supernet, short": {"supernet_fraction": 1 / 6},
    "supernet, long": {"supernet_fraction": 3 / 2},
}
"""The length is a fraction of the baseline's epochs."""
