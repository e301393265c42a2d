"""What is run of the benchmark of accuracy."""

from dataclasses import dataclass, field

import torch

from recipes.benchmarks.accuracy.images import DATASETS, Budget
from recipes.benchmarks.accuracy.nets import FAMILIES
from recipes.benchmarks.accuracy.stages import STAGES


@dataclass
class AccuracyArguments:
    """What is run of the benchmark."""

    dataset: str = field(default="digits", metadata={"help": "The images.", "choices": list(DATASETS)})
    families: list[str] = field(
        default_factory=lambda: list(FAMILIES), metadata={"help": "The networks.", "choices": list(FAMILIES)}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": "Of the baselines, one for each; learning rates are searched with 0, so that comes first."},
    )
    stages: list[str] = field(
        default_factory=lambda: list(STAGES), metadata={"help": "What to do of it.", "choices": list(STAGES)}
    )
    quick: bool = field(default=False, metadata={"help": "A few images and steps, to see that all of it works."})
    batch_size: int = field(default=64, metadata={"help": "Images in the forward of which the latency is measured."})
    rounds: int = field(default=15, metadata={"help": "Forwards that are measured of each network, in turn."})
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to run: the Trainer's choice."}
    )
    folder: str = field(default="output/accuracy", metadata={"help": "Where all that was done is kept."})
    output: str | None = field(
        default=None, metadata={"help": "JSON file for all results, with tables and pictures beside it."}
    )

    def __post_init__(self) -> None:
        if self.quick:
            self.folder, self.rounds = f"{self.folder}-quick", 3

    @property
    def budget(self) -> Budget:
        if self.quick:
            return Budget(256, 256, baseline_scale=0.25, calibration_images=32)
        return Budget(baseline_scale=DATASETS[self.dataset])
