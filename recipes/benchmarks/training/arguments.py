"""What the benchmark of training measures, and how."""

from dataclasses import dataclass, field

import torch

from updp_hf.core.kinds import DEFAULT_FORM, Form


@dataclass
class TrainingBenchmarkArguments:
    """The networks, how much of them is pruned, and how they are measured."""

    models: list[str] = field(
        default_factory=lambda: ["deit_small", "convnext_tiny"], metadata={"help": "deit_small, convnext_tiny."}
    )
    form: str = field(
        default=DEFAULT_FORM,
        metadata={"help": "What closing a site leaves behind.", "choices": list(map(str, Form))},
    )
    num_pruned_blocks: int = field(default=6, metadata={"help": "Sites that are gated, spread over the depth."})
    image_size: int = field(default=224, metadata={"help": "Pixels along each side of an image."})
    batch_size: int = field(default=4, metadata={"help": "Images in a step."})
    rounds: int = field(default=8, metadata={"help": "Steps that are measured of each variant, in turn."})
    workers: int = field(default=2, metadata={"help": "Processes that load images, where the loader is measured."})
    loaded_images: int = field(default=512, metadata={"help": "Images that the loader delivers; 0: not measured."})
    memory: bool = field(default=True, metadata={"help": "Measure memory."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to run."})
    bf16: bool = field(default=False, metadata={"help": "Autocast to bfloat16."})
    compile: bool = field(default=False, metadata={"help": "torch.compile all but supernets."})
    quick: bool = field(default=False, metadata={"help": "Tiny networks and few steps: does it run at all?"})
    output: str = field(default="", metadata={"help": "JSON file for what was measured."})

    def __post_init__(self) -> None:
        if self.quick:
            self.image_size, self.batch_size, self.rounds, self.num_pruned_blocks = 32, 2, 2, 2
            self.loaded_images = min(self.loaded_images, 16)
