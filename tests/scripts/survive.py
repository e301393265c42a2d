"""Run a small recipe to its end, then again and again killed at random moments, and print what came of it.

python tests/scripts/survive.py FOLDER SEED KILLS

Each life of a run is a process of its own, forked so that nothing has to be imported again. It kills itself at the nth
thing that it does in the folder of the run (files opened, renamed and removed) or to the weights (steps of optimizers).
"""

import json
import os
import random
import signal
import sys
from hashlib import sha256
from pathlib import Path

import datasets
import torch
import transformers
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from updp_hf.recipe.arguments import recipe_arguments
from updp_hf.recipe.prepare import prepare
from updp_hf.recipe.run import prune
from updp_hf.training.checkpoints import last_checkpoint

RECIPE = Path(__file__).parents[2] / "recipes" / "deit_tiny.py"
STEPS, RAMP_END = 12, 6
OPTIONS = {
    "max_steps": STEPS,
    "ramp_end": RAMP_END / STEPS,
    "supernet_fraction": 0.5,
    "global_batch_size": 8,
    "per_device_train_batch_size": 4,
    "max_train_samples": 80,  # an epoch and a bit
    "max_eval_samples": 32,
    "calibration_size": 16,
    "save_steps": 2,
    "eval_steps": 4,
    "save_total_limit": 2,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "distillation": "soft",
    "disable_tqdm": True,
}
TINY = {
    "model_type": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 4,
    "image_size": 8,
    "hidden_dropout_prob": 0.1,
}
PHASES = {"supernet", "search", "ramp", "fine-tuning"}
EVENTS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree")


def run(folder: Path) -> None:
    options = ["--tiny", json.dumps(TINY)]
    options += [part for name, value in OPTIONS.items() for part in (f"--{name}", str(value))]
    arguments = recipe_arguments(RECIPE, ["--smoke", "--output_dir", str(folder), *options])
    prune(prepare(*arguments), arguments[1])


class Life:
    """Count what a process does, and end it by `how` at the event number `last`, never if that is None."""

    def __init__(self, folder: Path, last: int | None, how: signal.Signals):
        self.folder, self.last, self.how, self.count = str(folder), last, how, 0
        sys.addaudithook(self.audit)
        register_optimizer_step_pre_hook(self.step)
        register_optimizer_step_post_hook(self.step)

    def audit(self, event: str, args: tuple) -> None:
        if event in EVENTS and isinstance(args[0], str | os.PathLike) and self.folder in os.fspath(args[0]):
            self.happen()

    def step(self, *_: object) -> None:
        self.happen()

    def happen(self) -> None:
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), self.how)


def live(folder: Path, last: int | None = None, how: signal.Signals = signal.SIGKILL) -> tuple[int, int]:
    """Run in a process of its own; return the signal that ended it, 0 if none did, and the events if it ended well."""
    told, tells = os.pipe()
    child = os.fork()
    if child == 0:
        with open(folder.with_suffix(".log"), "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        life = Life(folder, last, how)
        run(folder)
        os.write(tells, str(life.count).encode())
        os._exit(0)
    os.close(tells)
    _, status = os.waitpid(child, 0)
    with os.fdopen(told) as pipe:
        count = pipe.read()
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(folder.with_suffix(".log").read_text()[-3000:])
    return (os.WTERMSIG(status), 0) if os.WIFSIGNALED(status) else (0, int(count))


def phase(folder: Path) -> str:
    """Tell from what a run has left where it was killed."""
    if not (folder / "updp_selection" / "supernet").is_dir():
        return "supernet"
    steps = [int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")]
    if not steps:
        return "search"
    return "ramp" if max(steps) < RAMP_END else "fine-tuning"


def digests(folder: Path) -> dict[str, str]:
    """Return the digests of what must be the same: weights, averaged weights, and the state of the optimizer."""
    files = [folder / "model.safetensors"]
    files += [folder / f"checkpoint-{STEPS}" / name for name in ("model.safetensors", "average.safetensors")]
    found = {str(file.relative_to(folder)): sha256(file.read_bytes()).hexdigest() for file in files}
    optimizer = torch.load(folder / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
    moments = [tensor for state in optimizer["state"].values() for tensor in state.values()]
    found["optimizer"] = sha256(b"".join(tensor.numpy().tobytes() for tensor in moments)).hexdigest()
    return found


def main(folder: Path, seed: int, kills: int) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_warning()
    datasets.disable_progress_bars()
    draw = random.Random(seed)
    _, events = live(folder / "straight")
    expected = digests(folder / "straight")
    killed, torn, differing = [], 0, []
    # Where it falls depends on how much there is to do, so go on until it has fallen everywhere, and on a checkpoint.
    while len(killed) < kills or (not (torn and {phase for phase, _ in killed} == PHASES) and len(killed) < 5 * kills):
        chain = folder / f"chain-{len(killed)}"
        while True:
            ended_by, _ = live(chain, draw.randint(1, events // 2), draw.choice([signal.SIGKILL, signal.SIGTERM]))
            if not ended_by:
                break
            killed.append([phase(chain), signal.Signals(ended_by).name])
            newest = max(chain.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), default=None)
            torn += newest is not None and last_checkpoint(chain) != str(newest)
        found = digests(chain)
        differing += [f"{chain.name}: {name}" for name in expected if found[name] != expected[name]]
    print(json.dumps({"events": events, "killed": killed, "torn": torn, "differing": differing}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
