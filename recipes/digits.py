"""The straight line on real images, without a download: prune a small network trained on handwritten digits.

    accelerate launch recipes/digits.py --model resnet
    accelerate launch recipes/digits.py --selector supernet

It takes scikit-learn's digits (1,797 images, a quarter held out), trains a baseline and saves it as an ordinary
checkpoint, prunes that with `UPDPTrainer`, merges, saves, loads the merged model in the ordinary way, and prints both
side by side. With `--selector supernet` these are the four steps of UPDP: a supernet is trained, then searched, the
blocks found are pruned progressively, and merged. `--push_to_hub` publishes the merged model as `--hub_model_id`. Every
training argument of the pruning run is an option; `--config file.yaml` sets several at once.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from accelerate import PartialState
from torch import nn
from torchvision.transforms import v2
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextConfig,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTImageProcessor,
    set_seed,
)

import updp_hf
from updp_hf.data.made_here.digits import digits
from updp_hf.recipe.command_line import parse_arguments
from updp_hf.recipe.output import conditions_sentence, table_of, tell_progress_in_lines
from updp_hf.reporting.measure import measure_costs
from updp_hf.reporting.provenance import with_card_facts

LARGE_BATCH = 256
FITTED = 256
"""Images that the network without training is fitted to."""
BEFORE, UNTRAINED, AFTER = "baseline", "pruned, no training", "pruned, fine-tuned"


class Baseline(NamedTuple):
    """A network, how it is trained from scratch, and how many of its blocks are pruned then: half of them."""

    config: PreTrainedConfig  # always with the size of the images, also where the class has no such field
    epochs: float
    learning_rate: float
    num_pruned_blocks: int


BASELINES = {
    "vit": Baseline(
        ViTConfig(
            hidden_size=96,
            num_hidden_layers=8,
            num_attention_heads=3,
            intermediate_size=384,
            patch_size=4,
            image_size=16,
        ),
        epochs=60,
        learning_rate=1e-3,
        num_pruned_blocks=4,
    ),
    "convnext": Baseline(
        ConvNextConfig(
            num_stages=2, hidden_sizes=[48, 96], depths=[4, 4], layer_scale_init_value=0.1, patch_size=2, image_size=16
        ),
        epochs=40,
        learning_rate=2e-3,
        num_pruned_blocks=4,
    ),
    "mobilenetv2": Baseline(
        TimmWrapperConfig(architecture="mobilenetv2_050", image_size=64),
        epochs=20,
        learning_rate=3e-3,
        num_pruned_blocks=8,
    ),
    "resnet": Baseline(
        TimmWrapperConfig(architecture="resnet18", model_args={"channels": [32, 48, 64, 96]}, image_size=64),
        epochs=20,
        learning_rate=2e-3,
        num_pruned_blocks=4,
    ),
}


@dataclass
class DigitsArguments(updp_hf.UPDPTrainingArguments):
    """The baseline, and the pruning run: `UPDPTrainingArguments` with defaults for the digits."""

    model: str = field(default="vit", metadata={"help": "The network to prune.", "choices": list(BASELINES)})
    baseline_epochs: float | None = field(
        default=None, metadata={"help": "Epochs for which the baseline is trained, by default as many as it needs."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for checkpoints, baseline and merged model: digits_MODEL by default."}
    )
    num_train_epochs: float = 25
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 256
    learning_rate: float = 5e-4
    weight_decay: float = 0.05
    warmup_steps: float = 0.1
    lr_scheduler_type: str = "cosine"
    eval_strategy: str = "steps"
    eval_steps: float = 0.25
    eval_on_start: bool = True
    save_strategy: str = "no"
    logging_steps: float = 0.125
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = torch.cuda.is_available()

    def __post_init__(self) -> None:
        self.output_dir = self.output_dir or f"digits_{self.model}"
        if all(asked is None for asked in (self.plan, self.target_speed_up, self.target_macs, self.target_parameters)):
            self.num_pruned_blocks = self.num_pruned_blocks or BASELINES[self.model].num_pruned_blocks
        super().__post_init__()


def load_splits(processor: ViTImageProcessor, seed: int) -> datasets.DatasetDict:
    """Return the digits as images and labels, `train` augmented and `test` held out."""
    splits = digits(seed)
    augment = v2.RandomAffine(degrees=8, translate=(0.07, 0.07), scale=(0.93, 1.07))
    splits["train"].set_transform(partial(to_inputs, processor=processor, augment=augment))
    splits["test"].set_transform(partial(to_inputs, processor=processor, augment=v2.Identity()))
    return splits


def to_inputs(batch: dict, processor: ViTImageProcessor, augment: v2.Transform) -> dict:
    images = [augment(image.convert("RGB")) for image in batch["image"]]
    return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": batch["label"]}


def stock_arguments(args: DigitsArguments, folder: str, **others: Any) -> TrainingArguments:
    """Return arguments for the stock Trainer, on the device and in the batches of `args`."""
    same = ("per_device_train_batch_size", "per_device_eval_batch_size", "dataloader_pin_memory", "use_cpu")
    return TrainingArguments(
        folder, remove_unused_columns=False, **{name: getattr(args, name) for name in same}, **others
    )


def train_baseline(folder: Path, args: DigitsArguments) -> None:
    """Train a network from scratch and save it as an ordinary checkpoint."""
    config, epochs, learning_rate, _ = BASELINES[args.model]
    processor = ViTImageProcessor(size={"height": config.image_size, "width": config.image_size})
    splits = load_splits(processor, args.seed)
    names = splits["train"].features["label"].names
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    baseline_args = stock_arguments(
        args,
        str(folder),
        num_train_epochs=args.baseline_epochs or epochs,
        learning_rate=learning_rate,
        weight_decay=args.weight_decay,
        warmup_steps=0.1,
        lr_scheduler_type="cosine",
        save_strategy="no",
        logging_steps=0.125,
        seed=args.seed,
        report_to=args.report_to,
    )
    trainer = Trainer(
        model=AutoModelForImageClassification.from_config(config),
        args=baseline_args,
        train_dataset=splits["train"],
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()


def evaluate(model: PreTrainedModel, test: datasets.Dataset, args: DigitsArguments) -> float:
    """Return the accuracy of `model` on held-out images."""
    trainer = Trainer(model, stock_arguments(args, args.output_dir), compute_metrics=updp_hf.compute_accuracy)
    return trainer.evaluate(test)["eval_accuracy"]


def prune_without_training(baseline: PreTrainedModel, train: datasets.Dataset, count: int, form: str) -> nn.Module:
    """Return `baseline` with `count` blocks pruned and fitted in closed form, which takes no training."""
    images = torch.stack(list(train.select(range(FITTED))[:]["pixel_values"]))
    return updp_hf.prune(baseline, [images], updp_hf.Budget(num_blocks=count), form=form)


def main() -> None:
    (args,) = parse_arguments(DigitsArguments)
    tell_progress_in_lines()
    set_seed(args.seed)
    say = PartialState().print  # on the main process only
    folder, baseline_folder = (Path(args.output_dir, name) for name in ("", "baseline"))

    say(f"1. Train the baseline, a small {args.model}, on handwritten digits.")
    train_baseline(baseline_folder, args)
    processor = AutoImageProcessor.from_pretrained(baseline_folder)
    baseline = AutoModelForImageClassification.from_pretrained(baseline_folder)
    splits = load_splits(processor, args.seed)

    say("\n2. Choose the blocks to prune, and close them while fine-tuning.")
    trainer = updp_hf.UPDPTrainer(
        model=AutoModelForImageClassification.from_pretrained(baseline_folder),
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        processing_class=processor,
        compute_metrics=updp_hf.compute_accuracy,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    say(f"   Pruned: {', '.join(trainer.plan.blocks)}.")

    say("\n3. Merge what is left of them.")
    merged = trainer.merge()
    say(f"   Merged and closed logits differ by {merged.config.merge_error:.0e} of their scale.")

    say(f"\n4. Prune as many blocks without any training, each fitted in closed form to {FITTED} images.")
    untrained = prune_without_training(baseline, splits["train"], len(trainer.plan.sites), args.form)

    say("\n5. Evaluate and measure all three.")
    models = {BEFORE: baseline, UNTRAINED: untrained, AFTER: merged}
    metrics = {name: {"accuracy": evaluate(model, splits["test"], args)} for name, model in models.items()}
    report = None
    if args.process_index == 0:
        costs, conditions = measure_costs({k: m.cpu() for k, m in models.items()}, batch_sizes=(1, LARGE_BATCH))
        print(f"\n{table_of(costs, metrics)}\n\n{conditions_sentence(conditions)}")
        report = replace(
            with_card_facts(trainer.report(merged, batch_sizes=()), dataset="scikit-learn's digits, a quarter of them"),
            before=costs[BEFORE],
            after=costs[AFTER],
            latency_conditions=conditions,
            metrics_before=metrics[BEFORE],
            metrics_after=metrics[AFTER],
            metrics_without_training=metrics[UNTRAINED],
        )
    say(f"Accuracy on {len(splits['test'])} held-out images; {len(trainer.plan.sites)} blocks are pruned.\n")
    say("\n6. Save the pruned model, and load it again.")
    trainer.save_model(report=report)
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    say(f"   Held-out accuracy of what was loaded: {evaluate(loaded, splits['test'], args):.2%}.\n")
    say(f"The pruned model is in {folder}, its card in {folder / 'README.md'}, the baseline in {baseline_folder}.")
    if args.push_to_hub:
        say(f"Pushed: {trainer.push_to_hub()}")


if __name__ == "__main__":
    main()
