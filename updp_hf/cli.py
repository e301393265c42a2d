"""The command line: `updp-hf`, with one function for each subcommand."""

import argparse
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.utils import logging

from updp_hf.core.cost import LatencyTable
from updp_hf.core.graph import ExportError
from updp_hf.core.sites import Form, Refusal, Site
from updp_hf.report import Cost, measure_costs, side_by_side
from updp_hf.surgery import find_sites

__all__ = ["main"]

_EXAMPLE = "Example: updp-hf sites google/vit-base-patch16-224 --batch_size 8"
_UNLOADABLE = (OSError, ValueError, ImportError, RuntimeError, SafetensorError, UnpicklingError)
"""What loading raises: no such model, none that is known here, damaged weights."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand, and return its exit status: 1 after an error that stderr tells in one sentence."""
    args = _parser().parse_args(arguments)
    if not args.debug:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        warnings.simplefilter("ignore")
    try:
        args.subcommand(args)
    except (OSError, ValueError) as error:
        if args.debug:
            raise
        print(f"updp-hf: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "Make a vision checkpoint faster by removing depth."
    parser = argparse.ArgumentParser("updp-hf", description=about, epilog=_EXAMPLE)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("model", metavar="MODEL", help="image classifier: a folder, or an id on the Hub, timm/... too")
    common.add_argument("--debug", action="store_true", help="show tracebacks, and what the libraries have to say")
    subcommands = parser.add_subparsers(metavar="SUBCOMMAND", required=True)

    about = "Show which blocks of a model can be pruned, what that saves on this machine, and why the rest cannot."
    sites = subcommands.add_parser("sites", parents=[common], help=about, description=about, epilog=_EXAMPLE)
    sites.add_argument(
        "--form",
        action="append",
        choices=[form.value for form in Form],
        help=f"what pruning leaves of a block, may be given several times (default: {Form.MERGE})",
    )
    sites.add_argument(
        "--cost",
        choices=["latency", "macs"],
        default="latency",
        help="what pruning has to save: latency, measured on this device, or MACs (default: %(default)s)",
    )
    images = "images in the batch that latency is measured on (default: %(default)s)"
    sites.add_argument("--batch_size", metavar="N", type=int, default=1, help=images)
    sites.set_defaults(subcommand=_sites)
    return parser


def _sites(args: argparse.Namespace) -> None:
    """Print what the model costs, its sites, and the blocks that have none."""
    if args.batch_size < 1:
        raise ValueError(f"--batch_size is {args.batch_size}, expected at least 1: give a number of images.")
    model = _load(args.model)
    forms = list(dict.fromkeys(args.form or [Form.MERGE]))
    latencies = LatencyTable(args.batch_size) if args.cost == "latency" else None
    try:
        sites, refused = find_sites(model, forms, latencies=latencies)
    except ExportError as error:
        raise ValueError(f"{error} That takes Python: `updp_hf.find_sites(model, example_inputs=...)`.") from error
    costs, conditions = measure_costs({args.model: model}, [] if latencies is None else [args.batch_size])
    cost = costs[args.model]
    name = type(model).__name__
    where = {fact: str(value) for fact, value in conditions.items() if fact in ("device", "dtype", "threads")}
    parts = [side_by_side({args.model: {"model class": name, **cost.facts(), **where}})]
    if sites:
        parts.append(_table(sites, cost))
    for form in forms:
        if not any(site.form == form for site in sites):
            why = "" if refused else ", for no repeated blocks with Linears or convolutions were found"
            parts.append(f"{name} has no site of the form {form}{why}. Try another --form.")
    if refused:
        parts.append(_reasons(refused))
    print("\n\n".join(parts))


def _load(name: str) -> PreTrainedModel:
    """Load an image classifier.

    Raises:
        ValueError: there is none, or the checkpoint lacks some of its weights, such as the head's.
    """
    is_folder = Path(name).is_dir()
    expected = "Give a folder that `save_pretrained` wrote, or a Hub id, of an image classifier."
    try:
        # What does not fit is ignored here, because it is refused by name below.
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = AutoModelForImageClassification.from_pretrained(name, **options)
    except _UNLOADABLE as error:
        where = f"the folder {name!r}" if is_folder else f"{name!r}, which is no folder here and was taken for a Hub id"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(f"No image classifier could be loaded from {where}: {reason}. {expected}") from error
    if lacking := sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}):
        raise ValueError(f"{name!r} has no weights that fit {_few(lacking)} of {type(model).__name__}. {expected}")
    return model.to("cuda" if torch.cuda.is_available() else "cpu")  # where the Trainer puts it


def _table(sites: Sequence[Site], cost: Cost) -> str:
    """Return a row for each site in order of execution, and one for all sites of a form that pay."""
    rows = {}
    for index, site in enumerate(sites):
        closed = [*site.norms, *site.activations, *site.shared] or site.run
        slots = ", ".join(slot.removeprefix(site.block).removeprefix(".") for slot in closed)
        names = {"block": site.block, "closes": slots or "all of it", "form": str(site.form)}
        rows[str(index)] = {**names, **_saved([site], cost), "pays": "yes" if site.pays else "no"}
    for form in dict.fromkeys(site.form for site in sites):
        alike = [site for site in sites if site.form is form]
        paying = [site for site in alike if site.pays]
        names = {"block": f"{len(paying)} of {len(alike)} sites pay", "closes": "", "form": ""}
        rows[str(form)] = {**names, **_saved(paying, cost), "pays": ""}
    return side_by_side({fact: {row: facts[fact] for row, facts in rows.items()} for fact in rows["0"]})


def _saved(sites: Sequence[Site], cost: Cost) -> dict[str, str]:
    """Return what closing `sites` saves, and which share of the model's that is."""
    macs, parameters = sum(site.macs_saved for site in sites), sum(site.params_saved for site in sites)
    latency = "not measured"
    if cost.latency and all(site.seconds_saved is not None for site in sites):
        (total,) = cost.latency.values()
        seconds = sum(site.seconds_saved or 0.0 for site in sites)
        latency = f"{seconds * 1e3:z.2f} ms ({seconds / total:z.1%})"
    return {
        "MACs saved": f"{macs / 1e6:z.1f} M ({macs / cost.macs:z.1%})",
        "parameters saved": f"{parameters / 1e6:z.2f} M ({parameters / cost.parameters:z.1%})",
        "latency saved": latency,
    }


def _reasons(refused: Iterable[Refusal]) -> str:
    """Return a list of why blocks have no site, those with the same reason together."""
    blocks: dict[tuple[Form, str], list[str]] = {}
    for refusal in refused:
        reason = refusal.reason.replace(f"'{refusal.block}.", "'").replace(f"'{refusal.block}'", "the block")
        blocks.setdefault((refusal.form, reason), []).append(refusal.block)
    lines = [f"- {_few(names)} ({form}): {reason}." for (form, reason), names in blocks.items()]
    return "\n".join(["Blocks without a site:", *lines])


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


if __name__ == "__main__":
    sys.exit(main())
