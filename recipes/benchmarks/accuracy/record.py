"""What the accuracy benchmark has done so far with one baseline, kept in a file."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["Record"]


class Record:
    """What is known of one baseline: a JSON document that is written after each step."""

    def __init__(self, file: Path, conditions: dict[str, Any]):
        self.file = file
        self.found: dict[str, Any] = {"conditions": conditions}
        if file.is_file():
            self.found = json.loads(file.read_text(encoding="utf-8"))
        if self.found["conditions"] != conditions:
            raise ValueError(
                f"{file} has results under {self.found['conditions']}, expected {conditions}: give another `folder`."
            )

    def do(self, stage: str, name: str, step: Callable[[], Any]) -> Any:
        """Return what `step` gives, or has given before."""
        done = self.found.setdefault(stage, {})
        if name not in done:
            begin = time.perf_counter()
            done[name] = step()
            print(f"{time.strftime('%H:%M:%S')} {self.file.stem}, {stage}, {name}: {done[name]}", flush=True)
            self.found.setdefault("seconds", {})[f"{stage}, {name}"] = time.perf_counter() - begin
            unfinished = self.file.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
            unfinished.replace(self.file)
        return done[name]
