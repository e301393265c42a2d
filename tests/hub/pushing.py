"""What the tests of pushing share."""

from collections.abc import Mapping
from pathlib import Path

from loopback import LoopbackHub

REPO = "alice/pruned"
FOR_EVER = float("inf")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def model_files(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Leave out what is written for the repository that it is pushed to."""
    return {name: content for name, content in files.items() if Path(name).suffix in {".json", ".safetensors", ".py"}}


def assert_holds(hub: LoopbackHub, folder: Path, repo: str = REPO, revision: str = "main") -> None:
    """Check that the repository holds the model in `folder`, and not half of it or half of another."""
    assert model_files(hub.files(repo, revision)) == model_files(contents(folder))
