"""Which selector chooses the best blocks, and what it costs: its scores beside what fine-tuning really gives.

    python recipes/benchmark_selectors.py --model vit

A network trained from scratch on digits, made hard by distortions and noise, loses K of its blocks. Each selector
chooses K sites, and scores a random sample of such plans if it has a score for plans. The sample and the choices are
fine-tuned with `UPDPTrainer`, which tells what the scores are worth. Results are written as they come; the same command
goes on where it was interrupted. The table of all networks stands in `recipes/benchmark_selectors.md`. More supernets
for one of the baselines:

    python recipes/benchmark_selectors.py --model vit --seeds 0 --supernets "supernet, distilled" "supernet, short"
"""

import copy
import json
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import digits
import torch
import torch.nn.functional as F  # noqa: N812
from selectors_table import REPEATS, table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from transformers import AutoModelForImageClassification, PreTrainedModel, Trainer, ViTImageProcessor, set_seed
from transformers.utils import logging

from updp_hf import Plan, UPDPTrainer, recalibrate_batch_norms_
from updp_hf.core.kinds import Form
from updp_hf.core.plan.budget import Choice, Demand
from updp_hf.core.plan.plan import library_versions
from updp_hf.core.plan.site import Site
from updp_hf.core.search import search
from updp_hf.data.calibration_set import sample_and_rest
from updp_hf.recipe.command_line import parse_arguments
from updp_hf.reporting.report import device_name
from updp_hf.selection.scores import ScoreHistory, closeness, label_fit, labels_of, log_probabilities, spread
from updp_hf.selection.selectors import least, selector_by_name, sensitivities, taylor_importances
from updp_hf.surgery.calibrate import calibrated_copy
from updp_hf.surgery.find import require_sites
from updp_hf.surgery.gate import close_only_
from updp_hf.training.supernet import train_supernet

ROOT = Path(__file__).parent.parent
TABLE = Path(__file__).with_suffix(".md")
COPIES, TEST_COPIES = 16, 8
"""How often each digit is distorted anew: for training, which draws one of them each time, and held out."""
NOISE = 0.25
"""Standard deviation of the noise on pixels between -1 and 1."""
BATCH, SAMPLE = 256, 256
"""Images in a forward that needs no gradients, and training images by which selectors score."""


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
FREE = ("taylor", "sensitivity, inherit", "sensitivity, fit", "divergence, inherit", "divergence, fit", "greedy")
BLIND = ("uniform", "last", "random")
"""Those that train nothing: of them, those that look at nothing. A divergence is that of whole plans."""


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
    output: str = field(
        default=str(ROOT / "model_cards" / "benchmark_selectors.json"), metadata={"help": "JSON file for the results."}
    )


class Distorted(Dataset):
    """Digits of which each was distorted several times; reading one draws one of these."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels  # (copies, digits, 3, height, width), (digits,)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        drawn = int(torch.randint(len(self.images), ()))
        return {"pixel_values": self.images[drawn, index], "labels": self.labels[index]}

    def batches(self) -> list[dict[str, Tensor]]:
        """Return all distorted images."""
        parts = zip(
            self.images.flatten(0, 1).split(BATCH), self.labels.repeat(len(self.images)).split(BATCH), strict=True
        )
        return [{"pixel_values": images, "labels": labels} for images, labels in parts]


def hard_digits(size: int, seed: int) -> tuple[Distorted, list[dict[str, Tensor]]]:
    """Return the digits rotated, moved, sheared, resized and with noise: for training, and held out."""
    processor = ViTImageProcessor(size={"height": size, "width": size})
    move = v2.RandomAffine(degrees=15, translate=(0.1, 0.1), scale=(0.85, 1.1), shear=8, interpolation=2)
    distort = v2.Compose([v2.Resize(32, antialias=True), move, v2.Resize(size, antialias=True)])
    splits = digits.load_splits(processor, seed)
    torch.manual_seed(seed)
    found = []
    for split, copies in (("train", COPIES), ("test", TEST_COPIES)):
        clean = splits[split].with_format(None)[:]
        images = torch.stack([digits.to_inputs(clean, processor, distort)["pixel_values"] for _ in range(copies)])
        found.append(Distorted(images + NOISE * torch.randn(images.shape), torch.tensor(clean["label"])))
    return found[0], found[1].batches()


class Bench(NamedTuple):
    """A trained baseline and what is needed to judge plans for it."""

    name: str
    seed: int
    model: PreTrainedModel
    sites: tuple[Site, ...]
    train: Distorted
    test: list[dict[str, Tensor]]
    sample: list[dict[str, Tensor]]

    @classmethod
    def of(cls, name: str, seed: int, folder: Path) -> "Bench":
        """Make the data, and train the baseline if it is not in `folder`."""
        config = copy.deepcopy(digits.BASELINES[name].config)
        for change, value in {**NETS[name].changes, "num_labels": 10}.items():
            setattr(config, change, value)
        train, test = hard_digits(config.image_size, seed)
        if not (folder / "config.json").is_file():
            set_seed(seed)
            model = AutoModelForImageClassification.from_config(config)
            rate = digits.BASELINES[name].learning_rate
            args = arguments(name, seed, folder, num_train_epochs=NETS[name].baseline_epochs, learning_rate=rate)
            trainer = Trainer(model=model, args=args, train_dataset=train)
            trainer.train()
            trainer.save_model()
        model = AutoModelForImageClassification.from_pretrained(folder).eval()
        torch.manual_seed(seed)
        part, _ = sample_and_rest(train, SAMPLE, seed)
        sample = list(DataLoader(part, batch_size=BATCH))
        return cls(name, seed, model, require_sites(model, Form.MERGE), train, test, sample)

    @property
    def demand(self) -> Demand:
        return Demand((1.0,) * len(self.sites), NETS[self.name].num_pruned_blocks)


def arguments(name: str, seed: int, folder: Path | str, **changes: Any) -> digits.DigitsArguments:
    """Return the arguments of the digits recipe, on one thread of the CPU and without a word."""
    quiet = {"eval_strategy": "no", "eval_on_start": False, "logging_strategy": "no", "report_to": "none"}
    as_in_the_paper = {"start": "inherit", "ramp_end": 0.5}
    settings = {
        **quiet,
        **as_in_the_paper,
        "use_cpu": True,
        "disable_tqdm": True,
        "calibration_size": SAMPLE,
        **changes,
    }
    return digits.DigitsArguments(model=name, seed=seed, output_dir=str(folder), **settings)


def main() -> None:
    (options,) = parse_arguments(SelectorArguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    output = Path(options.output)
    results = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {"networks": {}}
    network = results["networks"].setdefault(options.model, {"conditions": conditions(options), "seeds": {}})
    if network["conditions"] != conditions(options):
        raise ValueError(
            f"{output} has results of {network['conditions']}, expected {conditions(options)}: give another file."
        )
    for seed in options.seeds:
        bench = Bench.of(options.model, seed, Path(options.folder) / options.model / f"seed-{seed}")
        found = network["seeds"].setdefault(str(seed), {"selectors": {}, "plans": {}})
        for _ in steps(bench, found, options):
            output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(results))
    TABLE.write_text(f"# Selectors\n\n{table(results)}\n", encoding="utf-8")


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


def steps(bench: Bench, found: dict[str, Any], options: SelectorArguments) -> Iterator[None]:
    """Do what is missing in `found`, and yield after each step."""
    found["baseline"] = {**held_out(bench.model, bench.test), "sites": len(bench.sites)}
    generator = random.Random(bench.seed)
    sample: list[Choice] = []
    while len(sample) < NETS[bench.name].plans:
        plan = bench.demand.draw(generator)
        sample += [plan] if plan not in sample else []
    found["sample"] = [key(plan) for plan in sample]
    for name in (*FREE, *BLIND, *options.supernets):
        if name not in found["selectors"]:
            found["selectors"][name] = run = choose(name, bench, sample)
            say(bench, f"{name}: plan {run['choice']} in {run['seconds']:.1f} s, {run['images']} images")
            yield
    choices = [tuple(map(int, run["choice"].split())) for run in found["selectors"].values()]
    for count, plans in ((1, [*choices, *sample]), (REPEATS, [*choices, *sample[: options.repeated]])):
        for plan in plans:
            runs = found["plans"].setdefault(key(plan), [])
            while len(runs) < count:
                runs.append(fine_tuned(bench, plan, bench.seed + 1000 * len(runs)))
                say(bench, f"plan {key(plan)}: {runs[-1]}")
                yield


def say(bench: Bench, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {bench.name}, seed {bench.seed}, {text}", flush=True)


def key(plan: Choice) -> str:
    return " ".join(map(str, plan))


def choose(name: str, bench: Bench, sample: Sequence[Choice]) -> dict[str, Any]:
    """Return what the selector `name` chooses, what that costs, and its scores of the sample if it has any."""
    model, sites, images, demand = bench.model, bench.sites, bench.sample, bench.demand
    kind, _, start = name.partition(", ")
    history, harms = None, []
    begin = time.process_time()
    with counted(model) as forwards:
        if kind in ("supernet", "divergence"):
            net = supernet(bench, name) if kind == "supernet" else calibrated(bench, start)
            history = ScoreHistory(spread((label_fit if kind == "supernet" else closeness)(net, images)))
            choice = search(history, demand, seed=bench.seed)
        elif kind in ("taylor", "sensitivity"):
            harms = (
                sensitivities(model, sites, images, start=start) if start else taylor_importances(model, sites, images)
            )
            choice = least(harms)(demand)
        else:
            choice = selector_by_name(name, model, sites, images, seed=bench.seed)(demand)
    run = {"choice": key(choice), "images": sum(forwards), "seconds": time.process_time() - begin}
    if history is not None:
        run |= {"searched": len(history.scores), "scores": list(history(sample))}
    elif harms:
        run["scores"] = [-sum(harms[index] for index in plan) for plan in sample]
    if kind == "supernet":  # the same, scored by accuracy instead of by loss
        run["accuracies"] = []
        for plan in sample:
            close_only_(net, plan)
            recalibrate_batch_norms_(net, images)
            run["accuracies"].append(held_out(net, images)["accuracy"])
    return run


def calibrated(bench: Bench, start: str) -> nn.Module:
    """Return the baseline gated at all sites, whose pruned sides begin as `start` says."""
    return calibrated_copy(bench.model, Plan(bench.sites, start=start), bench.sample)


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """Count the images that go through `model` and its copies; with a backward pass, each counts as three."""
    found: list[int] = []

    def count(module: nn.Module, args: Any, kwargs: Mapping[str, Tensor]) -> None:
        found.append(len(kwargs["pixel_values"]) * (3 if torch.is_grad_enabled() else 1))

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def supernet(bench: Bench, name: str) -> nn.Module:
    """Train a supernet on the images by which it is not scored."""
    _, rest = sample_and_rest(bench.train, SAMPLE, bench.seed)
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(
            bench.name, bench.seed, folder, num_train_epochs=NETS[bench.name].baseline_epochs, **SUPERNETS[name]
        )
        plan = Plan(bench.sites, args.start)
        set_seed(bench.seed)
        return train_supernet(bench.model, plan, bench.sample, args, Path(folder), train_dataset=rest)


def fine_tuned(bench: Bench, choice: Choice, seed: int) -> dict[str, float]:
    """Return accuracy and loss of the pruned network on the held-out images."""
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(tuple(bench.sites[index] for index in choice))
        args = arguments(bench.name, seed, folder, num_train_epochs=NETS[bench.name].epochs, plan=plan)
        set_seed(seed)
        trainer = UPDPTrainer(model=copy.deepcopy(bench.model), args=args, train_dataset=bench.train)
        trainer.train()
        return held_out(trainer.model, bench.test)


def held_out(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Return accuracy and mean loss of `model` on the batches."""
    found, labels = log_probabilities(model, batches).cpu(), torch.cat([labels_of(batch) for batch in batches])
    return {
        "accuracy": float((found.argmax(-1) == labels).double().mean()),
        "loss": float(F.nll_loss(found, labels)),
    }


if __name__ == "__main__":
    main()
