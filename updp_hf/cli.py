"""The command line: `updp-hf`, with one function for each subcommand."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # exported lazily
from torch import nn
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, logging

from updp_hf.core.cost import measure_latency
from updp_hf.core.kinds import DEFAULT_FORM, Form
from updp_hf.deployment.onnx import export_onnx
from updp_hf.errors import UPDPError
from updp_hf.hub.folder import save_merged
from updp_hf.hub.push import push_folder
from updp_hf.reporting.card import CARD_NAME, add_card, is_generated, write_card
from updp_hf.reporting.measure import measure_costs, report_in, report_of
from updp_hf.reporting.report import REPORT_NAME, Report
from updp_hf.reporting.sites_table import sites_table
from updp_hf.reporting.tables import latency_facts, side_by_side, speed_ups
from updp_hf.surgery.gate import plan_of, without_gates
from updp_hf.surgery.merge import merge
from updp_hf.surgery.model_io import example_inputs_of, load_classifier
from updp_hf.training.checkpoints import read_gated_model

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand, and return its exit status: 1 after an error that stderr tells in one sentence."""
    args = _parser().parse_args(arguments)
    if not args.debug:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        disable_progress_bars()
        warnings.simplefilter("ignore")
    try:
        args.subcommand(args)
    except (UPDPError, OSError) as error:
        if args.debug:
            raise
        print(f"updp-hf: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except Exception as error:  # a mistake of ours, of which users need no more than that
        if args.debug:
            raise
        reason = " ".join(str(error).split())
        print(f"updp-hf: {type(error).__name__}: {reason}. `--debug` shows where: please report it.", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "Make a vision checkpoint faster by removing depth."
    parser = argparse.ArgumentParser("updp-hf", description=about, epilog="updp-hf SUBCOMMAND --help gives examples.")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks, and what the libraries have to say")
    subcommands = parser.add_subparsers(metavar="SUBCOMMAND", required=True)
    model = "image classifier: a folder, or an id on the Hub, timm/... too"
    merged = "folder of a merged model, as `save_model` writes it"

    def add(name: str, function: object, about: str, example: str) -> argparse.ArgumentParser:
        example = f"Example: updp-hf {example}"
        added = subcommands.add_parser(name, parents=[common], help=about, description=about, epilog=example)
        added.set_defaults(subcommand=function)
        return added

    about = "Show which blocks of a model can be pruned, what that saves on this machine, and why the rest cannot."
    sites = add("sites", _sites, about, "sites google/vit-base-patch16-224 --batch_size 8")
    sites.add_argument("model", metavar="MODEL", help=model)
    sites.add_argument(
        "--form",
        action="append",
        choices=list(map(str, Form)),
        help=f"what pruning leaves of a block, may be given several times (default: {DEFAULT_FORM})",
    )
    sites.add_argument(
        "--cost",
        choices=["latency", "macs"],
        default="latency",
        help="what pruning has to save: latency, measured on this device, or MACs (default: %(default)s)",
    )
    images = "images in the batch that latency is measured on (default: %(default)s)"
    sites.add_argument("--batch_size", metavar="N", type=int, default=1, help=images)

    about = "Merge a training checkpoint whose gates are closed, and save the merged model in another folder."
    command = add("merge", _merge, about, "merge deit-small-p6/checkpoint-5000 deit-small-p6-merged")
    command.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder checkpoint-* of a pruning run")
    command.add_argument("output", metavar="OUTPUT", type=Path, help="folder for the merged model, new or empty")

    about = (
        "Compare the cost of models for the same images, measured in turn; the first is what others are compared with."
    )
    benchmark = add("benchmark", _benchmark, about, "benchmark facebook/deit-small-patch16-224 deit-small-p6 --compile")
    benchmark.add_argument("models", metavar="MODEL", nargs="+", help=model)
    sizes = "images in a batch, may be several (default: 1 8)"
    benchmark.add_argument("--batch_size", metavar="N", type=int, nargs="+", default=[1, 8], help=sizes)
    benchmark.add_argument(
        "--rounds", metavar="N", type=int, default=15, help="how often each runs (default: %(default)s)"
    )
    benchmark.add_argument("--compile", action="store_true", help="measure them compiled, too")

    about = "Write onnx/model.onnx into the folder of a merged model, and compare it with PyTorch (extra `onnx`)."
    export = add("export", _export, about, "export deit-small-p6")
    export.add_argument("folder", metavar="FOLDER", type=Path, help=merged)

    about = "Write the model card and its pictures into the folder of a merged model, from its report."
    card = add("card", _card, about, "card deit-small-p6 --repo_id me/deit-small-p6")
    card.add_argument("folder", metavar="FOLDER", type=Path, help=merged)
    card.add_argument("--repo_id", metavar="ID", help="where the examples load it from (default: the folder's name)")
    card.add_argument("--force", action="store_true", help="write over a card that was edited by hand")

    about = "Push a merged model to the Hub, in one commit; without a change there is none."
    push = add("push", _push, about, "push deit-small-p6 me/deit-small-p6 --private")
    push.add_argument("folder", metavar="FOLDER", type=Path, help=merged)
    push.add_argument("repo_id", metavar="REPO", help="NAME or USER/NAME, made if there is none")
    push.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    push.add_argument("--token", help="access token (default: that of `hf auth login`)")
    push.add_argument("--revision", metavar="BRANCH", help="the branch to push to, made if there is none")
    push.add_argument("--commit_message", metavar="TEXT", help="title of the commit")
    push.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    return parser


def _sites(args: argparse.Namespace) -> None:
    _check_at_least_one("--batch_size", args.batch_size)
    forms = [str(form) for form in dict.fromkeys(args.form or [DEFAULT_FORM])]
    print(sites_table(_load(args.model), args.model, forms, args.batch_size if args.cost == "latency" else None))


def _merge(args: argparse.Namespace) -> None:
    if (args.output / CONFIG_NAME).exists():
        raise UPDPError(f"{args.output} holds a model already: choose a new folder for the merged one.")
    gated, structure = read_gated_model(args.checkpoint)
    merged = merge(gated)
    has_processor = (args.checkpoint / IMAGE_PROCESSOR_NAME).is_file()
    processor = AutoImageProcessor.from_pretrained(args.checkpoint) if has_processor else None
    report = report_of(merged, (1, 8), base=without_gates(gated), plan=plan_of(gated).to_dict(), structure=structure)
    save_merged(merged, args.output, processor, report, args.output.resolve().name)
    print(f"Saved the merged model in {args.output}.")


def _benchmark(args: argparse.Namespace) -> None:
    for option, values in (("--batch_size", args.batch_size), ("--rounds", [args.rounds])):
        for value in values:
            _check_at_least_one(option, value)
    models: dict[str, nn.Module] = {name: _load(name).eval() for name in dict.fromkeys(args.models)}
    first, *others = models
    images = {name: next(iter(example_inputs_of(model).values())) for name, model in models.items()}
    kinds = {name: f"{tuple(image.shape[1:])} in {image.dtype}" for name, image in images.items()}
    for name in others:
        if kinds[name] != kinds[first]:
            raise UPDPError(
                f"{name} takes images of {kinds[name]}, {first} of {kinds[first]}: compare models for the same images."
            )
    costs, conditions = measure_costs(models, args.batch_size, args.rounds)
    facts = {name: costs[name].facts() | _faster(costs[first].latency, costs[name].latency) for name in models}
    if args.compile:
        inputs = [example_inputs_of(models[first], size) for size in args.batch_size]
        try:
            compiled: dict[str, Any] = {name: torch.compile(model) for name, model in models.items()}
            medians = measure_latency(compiled, inputs, rounds=args.rounds)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UPDPError(f"torch.compile fails ({reason}): measure without `--compile`.") from error
        latencies = {name: dict(zip(map(str, args.batch_size), medians[name], strict=True)) for name in models}
        for name, seconds in latencies.items():
            rows = latency_facts(seconds) | _faster(latencies[first], seconds)
            facts[name] |= {f"{row}, compiled": value for row, value in rows.items()}
    if others:  # 1 is what the ratios are to
        facts[first] |= dict.fromkeys((row for row in facts[others[0]] if row not in facts[first]), "1")
    print(side_by_side(facts))
    print(f"\n{conditions}")


def _faster(first: dict[str, float] | None, this: dict[str, float] | None) -> dict[str, str]:
    ratios = {} if this is first else speed_ups(first, this)
    return {f"speed-up, batch {size}": f"{ratio:.2f}×" for size, ratio in ratios.items()}


def _export(args: argparse.Namespace) -> None:
    _check_folder(args.folder)
    report = report_in(args.folder, _load(str(args.folder)))
    exported = export_onnx(args.folder)
    report = replace(report, onnx=exported.facts())
    report.save(args.folder)
    add_card(report, args.folder, _repo_id(report, args.folder))
    print(f"Wrote {exported.file}: opset {exported.opset}, logits within {exported.difference:.1e} of PyTorch's.\n")
    print(side_by_side(exported.columns()))


def _card(args: argparse.Namespace) -> None:
    _check_folder(args.folder)
    report = report_in(args.folder, _load(str(args.folder)))
    card = args.folder / CARD_NAME
    if card.is_file() and not is_generated(card) and not args.force:
        raise UPDPError(f"{card} was edited by hand, so it is left as it is: `--force` writes over it.")
    if args.repo_id:
        report = replace(report, metadata={**report.metadata, "repo_id": args.repo_id})
    write_card(report, args.folder, _repo_id(report, args.folder))
    if not (args.folder / REPORT_NAME).is_file() or Report.load(args.folder).weights == report.weights:
        report.save(args.folder)  # else the figures of other weights would be lost
    print(f"Wrote {card}.")


def _repo_id(report: Report, folder: Path) -> str:
    return str(report.metadata.get("repo_id") or folder.resolve().name)


def _push(args: argparse.Namespace) -> None:
    _check_folder(args.folder)
    names = ("private", "token", "revision", "commit_message", "create_pr")
    print(push_folder(args.folder, args.repo_id, **{name: getattr(args, name) for name in names}).commit_url)


def _check_at_least_one(option: str, value: int) -> None:
    if value < 1:
        raise UPDPError(f"{option} is {value}, expected at least 1: give a larger number.")


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UPDPError(f"There is no folder {folder}, expected that of a merged model: give the one it was saved in.")


def _load(name: str) -> PreTrainedModel:
    """Load an image classifier to where the Trainer puts it."""
    return load_classifier(name).to("cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    sys.exit(main())
