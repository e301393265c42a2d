"""How far "structure is found" reaches: every module of timm and every image classifier of transformers is tried.

    python -m recipes.benchmarks.coverage --time_limit 90
    python -m recipes.benchmarks.coverage --only timm/resnet ViTForImageClassification
    python -m recipes.benchmarks.coverage --table

Each is built small with random weights; its sites are found, gated, closed and merged, and the merged model is saved
and loaded. One process for each model keeps a crash or a hang from ending the run. What was measured is written to JSON
after every model, and a run continues where that file ends. The table of all models is written beside it.
"""

import json
import multiprocessing
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

from recipes.benchmarks.coverage.building import names
from recipes.benchmarks.coverage.process import PRELOADED, measure_in_process
from recipes.benchmarks.coverage.row import Row
from recipes.benchmarks.coverage.tables import markdown
from updp_hf.core.plan.plan import library_versions
from updp_hf.recipe.command_line import parse_arguments


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
        futures = [pool.submit(measure_in_process, name, options.seed, options.time_limit) for name in left]
        for count, future in enumerate(as_completed(futures), start=1):
            row = future.result()
            rows[row.name] = row
            save(rows, options)
            print(
                f"{count}/{len(left)} {row.name}: {row.closed} closed, {row.seconds:.0f} s. {row.failure}", flush=True
            )
    document = json.loads(output.read_text(encoding="utf-8"))
    output.with_suffix(".md").write_text(markdown(document), encoding="utf-8")


def save(rows: dict[str, Row], options: CoverageArguments) -> None:
    document = {
        "versions": library_versions(),
        "seed": options.seed,
        "time_limit": options.time_limit,
        "rows": {name: asdict(rows[name]) for name in names() if name in rows},
    }
    Path(options.output).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
