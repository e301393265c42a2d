"""One process for each model, so that a crash or a hang does not end the run."""

import multiprocessing
import time
import warnings
from dataclasses import replace
from multiprocessing.connection import Connection

import torch
from transformers.utils import logging

from recipes.benchmarks.coverage.measuring import measure
from recipes.benchmarks.coverage.row import Row
from updp_hf.errors import ExportError

PRELOADED = [
    "updp_hf",
    "timm",
    "torch._dynamo",
    "torch.export",
    "transformers.models.timm_wrapper.modeling_timm_wrapper",
]
"""What takes longest to import. It is done once, before a process for each model is forked."""


def measure_in_process(name: str, seed: int, time_limit: float) -> Row:
    """Measure one model in a process of its own, and end it when the time is over."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(name, seed, sender), daemon=True)
    begin = time.monotonic()
    process.start()
    sender.close()
    row = Row(name)
    while row.stage != "done":
        if not receiver.poll(max(0.0, begin + time_limit - time.monotonic())):
            row.failure = f"{row.stage}: took more than {time_limit:g} s"
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
