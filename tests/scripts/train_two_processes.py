"""Train, in as many processes as started, the runs below; each process writes down where it ended.

torchrun --nproc_per_node 2 tests/scripts/train_two_processes.py FOLDER BATCH_SIZE_PER_PROCESS
"""

import sys
from pathlib import Path

import torch
import transformers
from accelerate import PartialState

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_training import RandomImages, trainer, vit, weights

import updp_hf.training.publishing
from updp_hf.surgery.gate import plan_of

RUNS = {
    "batch-norm": {},
    "evaluated": {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4},
    "no-batch-norm": {"form": "merge-keep-norm", "optim": "sgd", "learning_rate": 0.05, "distillation": "soft"},
}


def main(folder: Path, batch_size: int) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rank = PartialState(cpu=True).process_index
    pushed: list[Path] = []
    updp_hf.training.publishing.push_folder = lambda folder, *_, **__: pushed.append(folder)
    for name, changes in RUNS.items():
        pushed.clear()
        # Each process has a folder of its own, so that it shows who writes. That of the main process is the result.
        run = trainer(
            folder / f"{name}-{rank}",
            # The processes start apart, and so select other blocks if left to themselves; DDP levels the weights.
            vit(seed=rank),
            train_dataset=RandomImages(count=20),
            selector="sensitivity",
            max_steps=6,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=2,
            teacher=vit(seed=5) if "distillation" in changes else None,
            **changes,
        )
        run.train()
        run.push_to_hub()  # saves
        ended = {"blocks": plan_of(run.model).blocks, "weights": weights(run.model), "log": run.state.log_history}
        ended["pushes"] = len(pushed)
        torch.save(ended, folder / f"{name}-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
