"""Imports go one way: recipes → shell → surgery → core; what travels to the Hub needs none of them, data neither."""

import ast
import sys
from pathlib import Path

import pytest

import updp_hf

PACKAGE = Path(updp_hf.__file__).parent
TRAVELLING = ("checks_updp", "configuration_updp", "layout_updp", "modeling_updp", "weights_updp")
SHELL = (
    *(
        "trainer",
        "gated_trainer",
        "selecting_trainer",
        "training_args",
        "callback",
        "supernet",
        "report",
        "prune",
        "cli",
        "card",
        "hub",
    ),
    *("origin", "export", "processors", "timm_models", "run_log", "sites_table"),
    *("selection", "selectors", "scoring", "samples", "pareto", "plots", "data", "recipe", "pretrained"),
    *("checkpoints", "averaging", "losses", "loaders", "arguments"),
)
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(file: Path) -> set[str]:
    """Return what `file` imports anywhere, with its module; of a relative import the module only, with its dots."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.add("." * node.level + (node.module or ""))
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_of(module: str, *packages: str) -> bool:
    return module.split(".")[0] in packages or any(module == p or module.startswith(f"{p}.") for p in packages)


def name(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def test_the_walk_sees_the_package():
    assert {"core/affine.py", "data/glyphs.py", "surgery.py", "layout_updp.py"} <= {name(file) for file in FILES}
    assert "updp_hf.core.algebra.affine" in imports(PACKAGE / "merging.py")


@pytest.mark.parametrize("file", [f for f in FILES if f.parent.name == "core"], ids=name)
def test_core_needs_torch_alone(file):
    allowed = ("torch", "updp_hf.core", "updp_hf.model.layout_updp", *sys.stdlib_module_names)
    assert [module for module in imports(file) if not is_of(module, *allowed)] == []


@pytest.mark.parametrize("stem", TRAVELLING)
def test_what_travels_to_the_hub_is_self_contained(stem):
    siblings = {f".{other}" for other in TRAVELLING}
    allowed = ("torch", "transformers", "huggingface_hub", "safetensors", *sys.stdlib_module_names)
    found = imports(PACKAGE / f"{stem}.py")
    assert [module for module in found if module not in siblings and not is_of(module, *allowed)] == []


def test_the_layout_needs_no_transformers():
    assert not [module for module in imports(PACKAGE / "layout_updp.py") if is_of(module, "transformers")]


@pytest.mark.parametrize("file", [f for f in FILES if f.parent.name == "data"], ids=name)
def test_data_knows_images_alone(file):
    ours = [module for module in imports(file) if is_of(module, "updp_hf")]
    assert [module for module in ours if not is_of(module, "updp_hf.data", "updp_hf.data.processors")] == []


@pytest.mark.parametrize("file", FILES, ids=name)
def test_nothing_imports_recipes_or_tests(file):
    assert not [module for module in imports(file) if is_of(module, "recipes", "tests")]


@pytest.mark.parametrize("file", ["surgery.py", "merging.py"])
def test_surgery_does_not_know_the_shell(file):
    shell = [f"updp_hf.{module}" for module in SHELL]
    assert not [module for module in imports(PACKAGE / file) if is_of(module, *shell)]
