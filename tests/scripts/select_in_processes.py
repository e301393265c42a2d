"""Select blocks in as many processes as started; each process writes down what it chose and by which scores.

torchrun --nproc_per_node 2 tests/scripts/select_in_processes.py FOLDER BATCH_SIZE_PER_PROCESS
"""

import sys
from pathlib import Path

import torch
import transformers
from accelerate import PartialState

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_training import RandomImages, resnet, trainer, vit

import updp_hf.core.cost
from updp_hf.core.cost import count_parameters
from updp_hf.errors import PlanError

RUNS = {
    "sensitivity": (resnet, {}),
    "greedy": (resnet, {}),
    "taylor": (resnet, {}),
    "random": (vit, {}),
    "speed-up": (vit, {"num_pruned_blocks": None, "target_speed_up": 1.1, "selector": "sensitivity"}),
    # Without BatchNorms, and with an optimizer that does not divide by small numbers, processes are as one.
    "supernet": (vit, {"form": "merge-keep-norm", "optim": "sgd", "learning_rate": 0.05, "distillation": "soft"}),
}


def main(folder: Path, batch_size: int) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rank = PartialState(cpu=True).process_index
    # A clock that no other load disturbs, and that of each process goes at another speed.
    updp_hf.core.cost.forward_seconds = lambda model, batch: 1e-6 * (1 + rank) * count_parameters(model)
    for selector, (build, changes) in RUNS.items():
        run = trainer(
            folder / selector,
            build(),
            train_dataset=RandomImages(count=48),
            per_device_train_batch_size=batch_size,
            **{"selector": selector, "max_steps": 6, "supernet_fraction": 1.0, **changes},
        )
        chosen = [str(site) for site in run.select().sites]
        supernet = (
            run.selection.supernet
        )  # its gates and statistics stand at the last choice that this process has scored
        weights = {} if supernet is None else {name: p.detach() for name, p in supernet.named_parameters()}
        torch.save({"blocks": chosen, "supernet": weights}, folder / f"{selector}-{rank}.pt")
    run = trainer(folder / "impossible", vit(), num_pruned_blocks=None, target_macs=0.1)
    try:
        run.select()
    except PlanError as error:
        (folder / f"impossible-{rank}.txt").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
