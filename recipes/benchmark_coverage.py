"""How far "structure is found" reaches: every module of timm and every image classifier of transformers is tried.

    python recipes/benchmark_coverage.py --time_limit 90
    python recipes/benchmark_coverage.py --only timm/resnet ViTForImageClassification
    python recipes/benchmark_coverage.py --table

Each is built small with random weights; its sites are found, gated, closed and merged, and the merged model is saved
and loaded. One process for each model keeps a crash or a hang from ending the run. What was measured is written to JSON
after every model, and a run continues where that file ends. The table of all models stands beside this script.
"""

import collections
import copy
import inspect
import json
import math
import multiprocessing
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils import logging

from updp_hf import Form, Plan, UPDPForImageClassification, close_, find_sites, gate_, merge
from updp_hf.core.cost import count_macs
from updp_hf.core.graph.calls import ExportError
from updp_hf.core.plan.plan import library_versions
from updp_hf.core.plan.site import Site
from updp_hf.model.layout_updp import get_slot
from updp_hf.recipe.command_line import parse_arguments
from updp_hf.surgery.merge import TOLERANCES
from updp_hf.surgery.model_io import logits_of

CLASSES = 5
SIZES = (64, 96, 128, 224, 240, 256, 384)
"""Pixels along a side of the images. The first size that a model accepts is taken."""
PRELOADED = [
    "updp_hf",
    "timm",
    "torch._dynamo",
    "torch.export",
    "transformers.models.timm_wrapper.modeling_timm_wrapper",
]
"""What takes longest to import. It is done once, before a process for each model is forked."""
TABLE = Path(__file__).with_suffix(".md")

# What makes a model small, where its class has such an argument.
TIMM_SMALL: dict[str, int] = {"depth": 3}
TRANSFORMERS_SMALL: dict[str, int] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "projection_dim": 48,
    "pooler_output_size": 48,
}
# What that leaves too large or does not fit, by model type. These win.
TRANSFORMERS_ARGUMENTS: dict[str, dict[str, Any]] = {
    "efficientnet": {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
    "imagegpt": {"n_embd": 48, "n_layer": 3, "n_head": 3, "n_positions": 64},
    "perceiver": {
        "d_latents": 32,
        "num_latents": 8,
        "num_self_attends_per_block": 3,
        "num_self_attention_heads": 2,
        "num_cross_attention_heads": 1,
    },
    "shieldgemma2": {"mm_tokens_per_image": 4},
}


@dataclass
class CoverageArguments:
    """Which models are tried, and how long."""

    output: str = field(
        default="model_cards/benchmark_coverage.json", metadata={"help": "JSON file for what was measured."}
    )
    only: list[str] = field(default_factory=list, metadata={"help": "Measure these, again if need be."})
    fresh: bool = field(default=False, metadata={"help": "Forget what the file holds."})
    table: bool = field(default=False, metadata={"help": "Write the table from the file and measure nothing."})
    processes: int = field(default=1, metadata={"help": "Models that are measured at a time, one thread each."})
    time_limit: float = field(default=120.0, metadata={"help": "Seconds for a model."})
    seed: int = field(default=0, metadata={"help": "Seed of weights and images."})


@dataclass
class Row:
    """What was measured of one model. None: it did not come to that."""

    name: str
    stage: str = "build"  # what is being done, "done" at the end
    model: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    image_size: int = 0
    exported: bool | None = None
    sites: int = 0  # of the form `merge`
    cheap: int = 0  # those that save multiply-accumulates
    form: str = ""  # the form that was closed
    closed: int = 0
    gate_error: float | None = None
    merge_errors: dict[str, float] = field(default_factory=dict)  # by dtype, the largest of logits and blocks
    reloaded: bool | None = None
    macs_before: int = 0
    macs_after: int = 0
    refusals: dict[str, int] = field(default_factory=dict)  # number of blocks by cause
    why_not: str = ""  # why no site of the form `merge` pays
    failure: str = ""  # what ended the measurement before it was done
    seconds: float = 0.0


# building


def names() -> list[str]:
    """Return the names of all rows."""
    by_type = {**MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES}
    del by_type["timm_wrapper"]  # walked by the modules of timm
    classes = [name for value in by_type.values() for name in ([value] if isinstance(value, str) else value)]
    return [f"timm/{module}" for module in timm.list_modules()] + [f"transformers/{name}" for name in classes]


def build_small(row: Row, seed: int) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Build the model of a row for the smallest images that it accepts; return it with a batch of four inputs."""
    library, _, name = row.name.partition("/")
    build = build_timm if library == "timm" else build_transformers
    failure = None
    for size in SIZES:
        try:
            row.model, row.arguments, model = build(name, size)
            model = model.double().eval()
            randomise_(model, seed)
            inputs = inputs_for(model, size, seed)
            logits_of(model, inputs)
        except Exception as error:  # whatever a model raises that is not made for this size
            failure = error
            continue
        row.image_size = size
        settle_(model, inputs)
        return model, inputs
    assert failure is not None
    raise failure


def build_timm(module: str, size: int) -> tuple[str, dict[str, Any], PreTrainedModel]:
    architecture, parameters = smallest_architecture(module)
    small = {name: value for name, value in TIMM_SMALL.items() if isinstance(parameters.get(name), int)}
    sized = {"img_size": size} if "img_size" in parameters else {}
    arguments = {**small, **sized}
    config = TimmWrapperConfig(architecture=architecture, num_labels=CLASSES, model_args=arguments)
    return architecture, arguments, TimmWrapperForImageClassification(config)


@cache
def smallest_architecture(module: str) -> tuple[str, dict[str, Any]]:
    """Return the architecture of a module of timm with the fewest parameters, and the defaults of its arguments."""
    sizes = {}
    for name in timm.list_models(module=module, exclude_filters="tf_*"):
        with torch.device("meta"):
            model = timm.create_model(name)
        signature = inspect.signature(type(model).__init__)
        sizes[name] = (
            sum(parameter.numel() for parameter in model.parameters()),
            {argument.name: argument.default for argument in signature.parameters.values()},
        )
    smallest = min(sizes, key=lambda name: sizes[name][0])
    return smallest, sizes[smallest][1]


def build_transformers(name: str, size: int) -> tuple[str, dict[str, Any], PreTrainedModel]:
    model_class = getattr(transformers, name)
    config_class = model_class.config_class
    arguments = small_arguments(config_class, size) | TRANSFORMERS_ARGUMENTS.get(config_class.model_type, {})
    return config_class.model_type, arguments, model_class(config_class(num_labels=CLASSES, **arguments))


def small_arguments(config_class: Any, size: int) -> dict[str, Any]:
    """Return arguments that make a small configuration, by the names and types of the class's own defaults."""
    default = config_class()
    defaults = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    small = {**TRANSFORMERS_SMALL, "image_size": size}
    arguments: dict[str, Any] = {name: value for name, value in small.items() if isinstance(defaults.get(name), int)}
    if isinstance(defaults.get("image_size"), list | tuple):
        arguments["image_size"] = [size, size]
    if "depths" in defaults:
        arguments["depths"] = [2] * len(default.depths)
    return arguments | {name: small_arguments(type(defaults[name]), size) for name in config_class.sub_configs}


def inputs_for(model: PreTrainedModel, size: int, seed: int) -> dict[str, Tensor]:
    """Return a batch of four. The images differ in colour as much as in detail: all means over noise would be alike."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    colour, detail = (torch.randn(4, 3, side, side, generator=generator).double() for side in (1, size))
    images = colour + detail
    if config.model_type == "imagegpt":  # one token for each pixel
        return {"input_ids": torch.randint(config.vocab_size - 1, (4, config.n_positions), generator=generator)}
    if config.model_type == "siglip2":  # patches
        patch = config.vision_config.patch_size
        patches = nn.functional.unfold(images, patch, stride=patch).mT
        shapes = torch.tensor([[size // patch, size // patch]] * 4)
        return {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(patches.shape[:2]),
            "spatial_shapes": shapes,
        }
    if config.model_type == "shieldgemma2":  # a prompt around the image
        prompt = torch.tensor([[2, *[config.image_token_index] * config.mm_tokens_per_image, 3]] * 4)
        return {"input_ids": prompt, "pixel_values": images}
    return {model.main_input_name: images}


def converted(inputs: dict[str, Tensor], dtype: torch.dtype, batch_size: int = 4) -> dict[str, Tensor]:
    return {name: x[:batch_size].to(dtype) if x.is_floating_point() else x[:batch_size] for name, x in inputs.items()}


def randomise_(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter. Fresh ones hide errors: biases are 0, norms are 1, a layer scale is 1e-5."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            drawn /= math.sqrt(math.prod(parameter.shape[1:]))
        elif "bias" in name.rpartition(".")[2]:
            drawn *= 0.3
        else:
            drawn = torch.rand(parameter.shape, generator=generator) + 0.5
        parameter.copy_(drawn)


def settle_(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """Give each BatchNorm the statistics of what comes in, so that nothing explodes or saturates."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.training, norm.momentum = True, 1.0
    logits_of(model, inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.training, norm.momentum = False, momentum
        if norm.running_var is not None:
            norm.running_var += 0.1  # for channels that are the same everywhere


# measuring


@torch.no_grad()
def measure(row: Row, seed: int, report: Callable[[str], None]) -> None:
    """Fill in the row, telling `report` what is done next."""
    model, inputs = build_small(row, seed)
    one = converted(inputs, torch.float64, batch_size=1)

    report("find")
    sites = choose_sites(row, model, one)
    if not sites:
        return
    plan = Plan(tuple(sites))
    row.form, row.closed, row.macs_before = str(sites[0].form), len(sites), count_macs(model, one)

    report("gate")
    expected = logits_of(model, inputs)
    gate_(model, plan, example_inputs=one)
    row.gate_error = difference(expected, logits_of(model, inputs))

    report("close")
    close_(model)
    randomise_(model, seed + 1)
    settle_(model, inputs)

    for dtype in (torch.float64, torch.float32):
        report(f"merge in {str(dtype).removeprefix('torch.')}")
        closed = model.to(dtype).train().eval()  # Levit's cache keeps its dtype until the mode changes
        images = converted(inputs, dtype)
        merged = merge(closed, example_inputs=images)
        error = largest_difference(closed, merged, images, plan.blocks)
        row.merge_errors[str(dtype).removeprefix("torch.")] = error
        if not error <= TOLERANCES[dtype]:
            raise ValueError(f"blocks of the merged and the closed model differ by {error:.0e}")

    report("count")
    row.macs_after = count_macs(merged, converted(one, torch.float32))
    report("reload")
    row.reloaded = loads_identically(merged, images)


def choose_sites(row: Row, model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Site]:
    """Return the sites that pay, of the form `merge` or else of the first that has any."""
    found = find_sites(model, [Form.MERGE], example_inputs=inputs)
    row.exported = True
    cheap = [site for site in found.sites if site.saves_compute]
    row.sites, row.cheap = len(found.sites), len(cheap)
    row.refusals = dict(collections.Counter(cause_of(refusal.reason) for refusal in found.unsupported))
    if cheap:
        return cheap
    if found.sites:
        row.why_not = "closing any of the sites saves nothing"
    else:
        row.why_not = found.unsupported[0].reason if found.unsupported else "no blocks to look into"
    others = [site for site in find_sites(model, list(Form), example_inputs=inputs).sites if site.saves_compute]
    form = next((form for form in Form if any(site.form == form for site in others)), None)
    return [site for site in others if site.form == form]


def largest_difference(
    closed: PreTrainedModel, merged: PreTrainedModel, inputs: dict[str, Tensor], blocks: list[str]
) -> float:
    """Return the largest difference of the logits and of what the pruned blocks return."""
    places = blocks if isinstance(merged, UPDPForImageClassification) else []  # a stock model has lost dropped blocks
    expected, found = (observe(model, inputs, places) for model in (closed, merged))
    return max(difference(value, found[place]) for place, value in expected.items())


def observe(model: PreTrainedModel, inputs: dict[str, Tensor], blocks: list[str]) -> dict[str, Tensor]:
    """Return the logits and the outputs of `blocks`, paths of the stock architecture."""
    seen: dict[str, Tensor] = {}
    root = model.base if isinstance(model, UPDPForImageClassification) else model

    def keep(path: str, output: Any) -> None:
        seen[path] = output if isinstance(output, Tensor) else output[0]

    handles = [
        get_slot(root, path).register_forward_hook(lambda module, args, output, path=path: keep(path, output))
        for path in blocks
    ]
    seen["logits"] = logits_of(model, inputs)
    for handle in handles:
        handle.remove()
    return seen


def difference(expected: Tensor, found: Tensor) -> float:
    """Return the largest difference, relative to how much the images differ: a constant would agree with anything."""
    spread = (expected - expected.mean(0)).abs().max()
    return float((found - expected).abs().max() / spread)


def loads_identically(merged: PreTrainedModel, inputs: dict[str, Tensor]) -> bool:
    """Save and load the model; return whether every weight was found and the logits are the same to the bit."""
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        loaded, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
        # Weights in a mapped file are not aligned in memory, which moves the last bit; a copy's are.
        loaded = copy.deepcopy(loaded)
    wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
    return not wrong and torch.equal(logits_of(loaded, inputs), logits_of(merged, inputs))


def cause_of(reason: str) -> str:
    """Return the first thing that stands in the way of a block's site, or what was looked for if there is none."""
    looked_for, _, obstacles = reason.partition("; ")
    return anonymous((obstacles or looked_for).partition("; ")[0])


def anonymous(text: str) -> str:
    """Return what texts on many models have in common: no paths, no numbers."""
    return re.sub(r"\d+", "N", re.sub(r"'\w+(\.\w+)+' ?", "", text))


# processes


def measure_in_process(name: str, options: CoverageArguments) -> Row:
    """Measure one model in a process of its own, and end it when the time is over."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(name, options.seed, sender), daemon=True)
    begin = time.monotonic()
    process.start()
    sender.close()
    row = Row(name)
    while row.stage != "done":
        if not receiver.poll(max(0.0, begin + options.time_limit - time.monotonic())):
            row.failure = f"{row.stage}: took more than {options.time_limit:g} s"
            break
        try:
            row = receiver.recv()
        except EOFError:
            process.join()
            row.failure = f"{row.stage}: the process ended with code {process.exitcode}"
            break
    process.join(timeout=1.0 if row.stage == "done" else 0.0)
    process.kill()
    return replace(row, seconds=round(time.monotonic() - begin, 1))


def work(name: str, seed: int, sender: Connection) -> None:
    """Measure one model, and send the row whenever there is more in it."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    row = Row(name)

    def report(stage: str) -> None:
        row.stage = stage
        sender.send(row)

    try:
        report("build")
        measure(row, seed, report)
    except Exception as error:
        row.exported = False if isinstance(error, ExportError) else row.exported
        first = next(iter(str(error).strip().splitlines()), "")[:200]
        row.failure = f"{row.stage}: {type(error).__name__}: {first}"
    report("done")


# writing


def save(rows: dict[str, Row], options: CoverageArguments) -> None:
    document = {
        "versions": library_versions(),
        "seed": options.seed,
        "time_limit": options.time_limit,
        "rows": {name: asdict(rows[name]) for name in names() if name in rows},
    }
    Path(options.output).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def markdown(document: dict[str, Any]) -> str:
    """Return the tables of what was measured."""
    rows = [Row(**row) for row in document["rows"].values()]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    intro = f"""# Coverage

Written by `python recipes/benchmark_coverage.py`: one small model of each module of timm, and every image classifier of
transformers. Random weights, seed {document["seed"]}, at most {document["time_limit"]:g} s each. {versions}.

*Sites* are those of the form `merge`, *that pay* those whose closing saves multiply-accumulates. *Form* and *closed*
tell what was closed: all of these, or where none pays, those of the first other form that has any. *Gated* and *merged*
are the largest differences of logits and pruned blocks from the checkpoint and from the closed model in float64 and
float32. *Loads* means the same logits to the bit after `save_pretrained` and `from_pretrained`."""
    parts = {
        "Why blocks have no site": refusals(rows),
        "Where models fail": failures(rows),
        "Models": models(rows),
    }
    return "\n\n".join([intro, totals(rows), *(f"## {title}\n\n{table}" for title, table in parts.items())]) + "\n"


def totals(rows: list[Row]) -> str:
    counts: dict[str, Callable[[Row], Any]] = {
        "models": lambda row: True,
        "exported": lambda row: row.exported,
        "with sites": lambda row: row.sites,
        "with sites that pay": lambda row: row.cheap,
        "… gated, merged and loaded": lambda row: row.cheap and row.reloaded,
        "another form pays": lambda row: row.closed and not row.cheap,
        "… gated, merged and loaded, other form": lambda row: row.closed and not row.cheap and row.reloaded,
    }
    libraries = ("timm", "transformers")
    return grid(
        ["", *libraries],
        [
            [
                name,
                *(str(sum(bool(test(row)) for row in rows if row.name.startswith(library))) for library in libraries),
            ]
            for name, test in counts.items()
        ],
    )


def refusals(rows: list[Row]) -> str:
    blocks: collections.Counter[str] = collections.Counter()
    for row in rows:
        blocks.update(row.refusals)
    found = by_cause((cause, row) for row in rows for cause in row.refusals)
    return grid(
        ["cause", "models", "blocks", "such as"],
        [[cause, str(len(where)), str(blocks[cause]), ", ".join(where[:3])] for cause, where in found],
    )


def failures(rows: list[Row]) -> str:
    found = by_cause((anonymous(row.failure), row) for row in rows if row.failure)
    return grid(
        ["cause", "models", "such as"], [[cause, str(len(where)), ", ".join(where[:3])] for cause, where in found]
    )


def by_cause(pairs: Iterable[tuple[str, Row]]) -> list[tuple[str, list[str]]]:
    """Group the names of models by cause, the commonest first."""
    found: dict[str, list[str]] = {}
    for cause, row in pairs:
        found.setdefault(cause, []).append(row.name.partition("/")[2])
    return sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))


def models(rows: list[Row]) -> str:
    header = (
        "name, model, pixels, exported, sites, that pay, form, closed, gated, merged, loads, MACs, seconds, why not"
    )
    return grid(
        header.split(", "),
        [
            [
                row.name,
                row.model,
                str(row.image_size or ""),
                yes_no(row.exported),
                str(row.sites),
                str(row.cheap),
                row.form,
                str(row.closed or ""),
                "" if row.gate_error is None else f"{row.gate_error:.0e}",
                " ".join(f"{error:.0e}" for error in row.merge_errors.values()),
                yes_no(row.reloaded),
                f"{row.macs_after / row.macs_before:.2f}×" if row.macs_after else "",
                f"{row.seconds:.0f}",
                row.failure or row.why_not,
            ]
            for row in rows
        ],
    )


def yes_no(value: bool | None) -> str:
    return {True: "yes", False: "no", None: ""}[value]


def grid(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', ' ') for cell in line)} |" for line in lines)


def main() -> None:
    (options,) = parse_arguments(CoverageArguments)
    output = Path(options.output)
    rows: dict[str, Row] = {}
    if output.exists() and not options.fresh:
        rows = {name: Row(**row) for name, row in json.loads(output.read_text(encoding="utf-8"))["rows"].items()}
    wanted = [name for name in names() if not options.only or {name, name.partition("/")[2]} & set(options.only)]
    left = [] if options.table else [name for name in wanted if options.only or name not in rows]
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    with ThreadPoolExecutor(options.processes) as pool:
        futures = [pool.submit(measure_in_process, name, options) for name in left]
        for count, future in enumerate(as_completed(futures), start=1):
            row = future.result()
            rows[row.name] = row
            save(rows, options)
            print(
                f"{count}/{len(left)} {row.name}: {row.closed} closed, {row.seconds:.0f} s. {row.failure}", flush=True
            )
    TABLE.write_text(markdown(json.loads(output.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
