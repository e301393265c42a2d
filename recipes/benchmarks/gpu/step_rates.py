"""Steps per second by phase, from the log of a recipe whose lines begin with the seconds at which they came.

python -m recipes.benchmarks.gpu.step_rates deit_small.log 20   # logging_steps of that run
"""

import ast
import re
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

PHASES = ("supernet", "ramp", "closed")


def main() -> None:
    file, logging_steps = sys.argv[1:]
    print(table(Path(file).read_text(encoding="utf-8").splitlines(), int(logging_steps)))


def table(lines: Iterable[str], logging_steps: int) -> str:
    """Return a Markdown table: for each phase the median of the rates between two logs, so compiling does not count."""
    found: dict[str, list[float]] = {phase: [] for phase in PHASES}
    before: tuple[float, str] | None = None
    for seconds, phase in _logs(lines):
        if before is not None and phase == before[1]:
            found[phase].append(logging_steps / (seconds - before[0]))
        before = None if phase is None else (seconds, phase)
    rows = [f"| {phase} | {statistics.median(rates):.2f} |" for phase, rates in found.items() if rates]
    return "\n".join(["| phase | steps/s |", "|---|---|", *rows])


def _logs(lines: Iterable[str]) -> Iterator[tuple[float, str | None]]:
    """Yield when a step was logged and in which phase it was, None for an evaluation, which takes its time too."""
    for line in lines:
        match = re.match(r"(\d+\.\d+) (\{.*\})$", line)
        if match is None:
            continue
        entry = ast.literal_eval(match[2])
        if "loss" not in entry:
            yield float(match[1]), None
        elif "lambda" not in entry:
            yield float(match[1]), "supernet"
        else:
            yield float(match[1]), "closed" if float(entry["lambda"]) == 1.0 else "ramp"


if __name__ == "__main__":
    main()
