"""What the command line prints, read back, and models large enough for its digits."""

import re

import pytest
from tiny_training import vit
from transformers.utils import logging

LARGE_ENOUGH = {"hidden_size": 64, "intermediate_size": 256, "image_size": 32, "patch_size": 4}
"""So that what a site saves shows in the digits that are printed."""


@pytest.fixture(autouse=True)
def loud_libraries():
    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(verbosity)
    if shows_progress:
        logging.enable_progress_bar()


def large_vit():
    return vit(**LARGE_ENOUGH)


def tables(printed):
    """Return the Markdown tables as a dict by row of dicts by column."""
    found = []
    for table in re.findall(r"(?:^\|.*\n?)+", printed, flags=re.MULTILINE):
        head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
        found.append({line[0]: dict(zip(head[1:], line[1:], strict=True)) for line in lines})
    return found


def number(cell):
    return float(cell.split()[0])
