"""Imports go one way, folder by folder, and never in a circle; what travels to the Hub needs nothing of the rest."""

import ast
import statistics
import sys
from functools import cache
from pathlib import Path

import networkx
import pytest

import updp_hf

ROOT = "updp_hf"
PACKAGE = Path(updp_hf.__file__).parent
FILES = {
    ".".join((ROOT, *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}
LEVELS = (
    {"model", "processes", "hf_internals"},
    {"errors"},
    {"data"},
    {"core"},
    {"surgery", "tasks"},
    {"selection"},
    {"prune", "reporting"},
    {"hub", "deployment"},
    {"training"},
    {"recipe", "cli"},
    {"", "registration"},  # the package itself, whose public names are loaded when they are used
)
"""The folders and files of the package from the ground up: each may import those of its own level and of lower ones."""

STANDARD = tuple(sys.stdlib_module_names)


def place(module, below=ROOT):
    """The folder or file right below `below` that `module` lies in."""
    return module.removeprefix(below).removeprefix(".").split(".")[0]


def level(module):
    return next(number for number, places in enumerate(LEVELS) if place(module) in places)


def resolve(name):
    """The module that `name` is, or is defined in."""
    while name not in FILES and "." in name:
        name = name.rpartition(".")[0]
    return name


@cache
def imports(module):
    """What `module` imports anywhere: at its top, in functions, for type checkers, by the name that a string holds."""
    file, found = FILES[module], set()
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: -node.level + 1 or None] if node.level else []
            source = ".".join([*parts, *([node.module] if node.module else [])])
            found |= {f"{source}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            found |= {value.value for value in node.args if isinstance(value, ast.Constant)}
    return found


def ours(module):
    return {resolve(name) for name in imports(module) if place(name, "") == ROOT} - {module}


def others(module):
    return {place(name, "") for name in imports(module)} - {ROOT}


def is_in(module, *folders):
    return any(module == f"{ROOT}.{folder}" or module.startswith(f"{ROOT}.{folder}.") for folder in folders)


def in_folder(folder):
    return [module for module in FILES if is_in(module, folder)]


def test_the_walk_sees_the_package():
    assert {"updp_hf", "updp_hf.core.algebra.affine", "updp_hf.hub", "updp_hf.cli"} <= set(FILES)
    assert "updp_hf.core.plan.plan" in ours("updp_hf.surgery.merge")
    assert "updp_hf.model.layout_updp" in ours("updp_hf.model.configuration_updp")
    assert "updp_hf.hub.push" in ours("updp_hf.registration")  # inside a function
    assert "updp_hf.model.modeling_updp" in ours("updp_hf.registration")  # by a string


@pytest.mark.parametrize("module", FILES)
def test_no_import_goes_up(module):
    assert [name for name in sorted(ours(module)) if level(name) > level(module)] == []


def test_no_imports_go_in_a_circle():
    graph = networkx.DiGraph([(module, name) for module in FILES for name in ours(module)])
    assert [sorted(circle) for circle in networkx.strongly_connected_components(graph) if len(circle) > 1] == []


@pytest.mark.parametrize("module", FILES)
def test_nothing_imports_recipes_or_tests(module):
    assert not others(module) & {"recipes", "tests"}


@pytest.mark.parametrize("module", in_folder("model"))
def test_what_travels_to_the_hub_needs_only_what_lies_beside_it(module):
    text = FILES[module].read_text(encoding="utf-8")
    assert all(is_in(name, "model") for name in ours(module))
    assert "updp_hf" not in {place(alias, "") for alias in absolute(text)}
    assert others(module) <= {"torch", "transformers", "huggingface_hub", "safetensors", *STANDARD}


def absolute(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


@pytest.mark.parametrize("module", in_folder("core"))
def test_core_needs_torch_alone(module):
    reached = networkx.DiGraph([(name, other) for name in FILES for other in ours(name)])
    reached.add_node(module)
    needed = {module, *networkx.descendants(reached, module)}
    assert set().union(*map(others, needed)) <= {"torch", *STANDARD}
    assert all(is_in(name, "core", "model", "errors") for name in needed)


@pytest.mark.parametrize("module", in_folder("core"))
def test_kinds_of_sites_are_known_to_their_registry_alone(module):
    axis = {place(module, "updp_hf.core")}
    axes = {"depth", "width"} & {place(name, "updp_hf.core") for name in ours(module) if is_in(name, "core")}
    assert axis == {"kinds"} or axes <= axis


@pytest.mark.parametrize("module", in_folder("data"))
def test_data_knows_images_alone(module):
    assert [name for name in ours(module) if not is_in(name, "data", "errors", "processes")] == []


def test_files_are_short():
    lines = {module: len(file.read_text(encoding="utf-8").splitlines()) for module, file in FILES.items()}
    assert statistics.median(count for count in lines.values() if count > 1) <= 120
    assert {module: count for module, count in lines.items() if count > 300} == {}
