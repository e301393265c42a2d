"""The private parts of other libraries that we rely on are there, and no others are used."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_training import RandomImages, vit

import updp_hf
from updp_hf.hf_internals import READ_BY, RELIED_ON, without_autocast

PACKAGE = Path(updp_hf.__file__).parent


def named(path):
    """Return what a dotted path names: a module, then attributes."""
    names = path.split(".")
    found = importlib.import_module(names[0])
    for name in names[1:]:
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("path", RELIED_ON)
def test_what_we_rely_on_is_there_with_the_parameters_it_had(path):
    owner, _, name = path.rpartition(".")
    holder = named(owner)
    found = getattr(holder, name) if hasattr(holder, name) else getattr(holder(), name)  # of instances alone
    expected = RELIED_ON[path]
    if expected is not None:
        assert list(inspect.signature(found).parameters) == expected.strip("()").split(", ")


@pytest.mark.parametrize("name", READ_BY)
def test_attributes_are_still_those_that_the_library_knows(name):
    assert f"{name}" in inspect.getsource(importlib.import_module(READ_BY[name]))


def private_names(file):
    """Yield the private names that `file` takes from something that is not of its own class or module."""
    own = {"self", "cls"}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            holder = node.value
            is_own = isinstance(holder, ast.Name) and holder.id in own
            is_super = isinstance(holder, ast.Call) and getattr(holder.func, "id", "") == "super"
            if not is_own or is_super:
                yield node.attr


OURS = {"_states"}
"""Private names of other objects of the same class."""


def test_no_other_private_name_is_used():
    known = {name for path in RELIED_ON for name in path.split(".")} | {*READ_BY, *OURS}
    found = {name: file.name for file in PACKAGE.rglob("*.py") for name in private_names(file)}
    assert {name: file for name, file in found.items() if name not in known} == {}


@pytest.fixture
def new_accelerator():
    """Let accelerate forget the precision of earlier runs, which it has one of for a process, and of this one."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("new_accelerator")
def test_a_model_is_given_back_without_its_autocast():
    model = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(vit())
    images, plain = RandomImages(4).images, vit()
    bare = without_autocast(model)
    with torch.no_grad():
        expected = plain(pixel_values=images).logits
        assert torch.equal(bare(pixel_values=images).logits, expected)
        assert torch.equal(bare(pixel_values=images, return_dict=False)[0], expected)
        assert not torch.equal(model(pixel_values=images).logits, expected)
    assert without_autocast(plain) is plain
