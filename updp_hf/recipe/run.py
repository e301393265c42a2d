"""The straight line of every recipe: prune while fine-tuning, merge, save, say what came of it."""

import sys
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState

from updp_hf.data.augmentation import AugmentationArguments
from updp_hf.errors import UPDPError
from updp_hf.recipe.arguments import changed, recipe_arguments
from updp_hf.recipe.output import conditions_sentence, table_of, tell_progress_in_lines
from updp_hf.recipe.prepare import prepare
from updp_hf.reporting.report import Report
from updp_hf.training.trainer import UPDPTrainer

__all__ = ["prune", "run"]


def run(script: str) -> None:
    """Run a recipe. Its values are those of the YAML file beside the script, if there is one, and of `--config`.

    The same command again goes on where a run was interrupted. What is wrong with the input ends it with one sentence.

    Args:
        script: `__file__` of the recipe.
    """
    try:
        data, augmentation, args = recipe_arguments(Path(script))
        tell_progress_in_lines()
        prune(prepare(data, augmentation, args), augmentation)
    except UPDPError as error:
        sys.exit(f"{Path(script).name}: {error}" if PartialState().is_main_process else 1)


def prune(trainer: UPDPTrainer, augmentation: AugmentationArguments) -> None:
    """Prune, or go on with what was interrupted; merge, save, push if asked for, and print what came of it.

    The report and the card get the `augmentation`, which the trainer does not know.
    """
    args, say = trainer.args, PartialState().print  # on the main process only
    is_begun = trainer.is_begun()
    say(f"{'Going on with' if is_begun else 'Pruning'} {args.model_name_or_path}.")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or is_begun)
    say(f"\nPruned: {', '.join(trainer.plan.blocks)}.")
    report = trainer.report() if args.process_index == 0 else None
    if report is not None:
        report = replace(report, arguments=report.arguments | changed(augmentation))
        print(f"\n{summary(report)}\n\n{conditions_sentence(report.latency_conditions)}")
    trainer.save_model(report=report)
    say(f"The merged model, its report and its card are in {args.output_dir}.")
    if args.push_to_hub:
        say(f"Pushed: {trainer.push_to_hub()}")


def summary(report: Report) -> str:
    """Return a table of the model before and after pruning."""
    costs = {"before": report.before, "after": report.after}
    return table_of(costs, {"before": report.metrics_before, "after": report.metrics_after})
